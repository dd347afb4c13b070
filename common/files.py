"""Files that are either whole or absent: written under a temporary name, then renamed."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

from common.cli import UserError


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path in the folder of `path`; renames it to `path` when the block ends without an error.

    Args:
        path: str or `pathlib.Path`, the final name. Missing parent folders are created. The temporary name keeps the
            suffix, because Keras and matplotlib choose the format by it.

    Raises:
        UserError: where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Writes `content` to `path` as indented JSON that ends in a newline."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def sha256(path):
    """Returns the SHA-256 of the file at `path` as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
