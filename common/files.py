"""Files that are either whole or absent, and validated where they are read."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

from common.errors import UserError, reason

TEMPORARY = re.compile(r"\.(\d+)\..+")  # ".<process>.<final name>"
H5PY_ERRORS = (OSError, RuntimeError)  # the latter is what h5py raises on a full disk


@contextlib.contextmanager
def replacing(path, errors=OSError):
    """Yields a temporary path beside `path` and renames it to `path` when the block ends without an error.

    The temporary name keeps the suffix, by which Keras and matplotlib choose the format. Raises `UserError` in place of
    `errors`, which say that the disk is full or the folder cannot be written: `H5PY_ERRORS` where h5py writes the file.
    """
    path = Path(path)
    temporary = _temporary_name(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except errors as error:
        raise _write_error(path, error) from error
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


def _write_error(path, error):
    return UserError(f"cannot write {path}: {reason(error)}; free some space or choose another --output-dir")


def check_writable(folder):
    """Raises `UserError` where nothing can be written into `folder`, which is created where needed."""
    probe = _temporary_name(Path(folder) / "probe")
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(bytes(4096))
    except OSError as error:
        raise _write_error(f"into {folder}", error) from error
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
    """Returns the JSON object in a file as a dict. Raises `UserError` where there is none, which ends with `advice`."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); {advice}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged (it holds no JSON object); {advice}")
    return content


def sha256(path):
    """Returns the SHA-256 of the file at `path` in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
