"""Files that are either whole or absent, and validated where they are read."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from common.errors import UserError

TEMPORARY = re.compile(r"\.(\d+)\..+")  # ".<process>.<final name>"


@contextlib.contextmanager
def replacing(path):
    """Yields a temporary path beside `path` and renames it to `path` when the block ends without an error.

    The temporary name keeps the suffix, by which Keras and matplotlib choose the format. Raises `UserError` where the
    disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def building(folder):
    """Yields a new empty folder and puts it in the place of `folder` when the block ends without an error.

    Whatever happens in between, `folder` is either what it was before or complete. Raises OSError where the disk is
    full or the folder cannot be written.
    """
    remove_leftovers(folder.parent)
    temporary = _temporary_name(folder)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _temporary_name(path):
    return path.with_name(f".{os.getpid()}.{path.name}")


def write_error(path, error):
    """Returns the `UserError` for an exception raised while `path` was written."""
    reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0][:200]
    return UserError(f"cannot write {path}: {reason}; free some space or choose another --output-dir")


def check_writable(folder):
    """Raises `UserError` where nothing can be written into `folder`, which is created where needed."""
    probe = _temporary_name(Path(folder) / "probe")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror or error}; free some space or choose another --output-dir"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Removes temporary files and folders below `folder` whose process no longer runs."""
    for path in sorted(Path(folder).rglob(".*")) if Path(folder).is_dir() else []:
        match = TEMPORARY.fullmatch(path.name)
        if match and not _is_running(int(match[1])):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def write_json(path, content):
    """Writes `content` to `path` as indented JSON that ends in a newline."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path, advice):
    """Returns the JSON object (dict) in the file at `path`.

    Raises `UserError` where the file is missing, truncated, or holds no object; `advice` says what to do about it.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:100]}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object); {advice}")
    return content


def sha256(path):
    """Returns the SHA-256 of the file at `path` in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
