"""Files that are either whole or absent: written under a temporary name, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
import time
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


@contextlib.contextmanager
def building(folder):
    """Yields a new empty folder beside `folder`; gives it that name, in place of an older one, when the block ends.

    Whatever happens in between, `folder` is either what it was before or complete. What a process left behind that was
    killed more than a day ago is removed first; a younger one may belong to a process that is still at work.

    Args:
        folder: `pathlib.Path`, the final name.

    Raises:
        OSError: where the disk is full or the folder cannot be written.
    """
    for left_over in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - left_over.stat().st_mtime > 24 * 3600:
            shutil.rmtree(left_over, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path, content):
    """Writes `content` to `path` as indented JSON that ends in a newline."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def sha256(path):
    """Returns the SHA-256 of the file at `path` as a hexadecimal string."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
