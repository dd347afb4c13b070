import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import building, check_writable, read_json, remove_leftovers, replacing, sha256, write_json


def test_replacing_keeps_suffixes_and_leaves_only_the_final_file(tmp_path):
    with replacing(tmp_path / "new" / "model.weights.h5") as temporary:
        assert temporary.name.endswith(".weights.h5")
        temporary.write_text("whole")
        assert not (tmp_path / "new" / "model.weights.h5").exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.weights.h5"]


def test_a_failure_leaves_the_old_file(tmp_path):
    path = tmp_path / "figure.png"
    path.write_text("old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("ha")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_user_error(tmp_path):
    def write():
        with replacing(tmp_path / "x.json"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*x\.json: No space left on device; free some space"):
        write()


def test_write_json_and_sha256(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"accuracy": 0.5})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    assert path.read_text().endswith("}\n")
    assert sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_building_a_folder_replaces_it_as_a_whole(tmp_path):
    folder = tmp_path / "cache"
    with building(folder) as temporary:
        (temporary / "old").touch()
        assert not folder.exists()
    with building(folder) as temporary:
        (temporary / "new").touch()
        assert [path.name for path in folder.iterdir()] == ["old"]
    assert [path.name for path in folder.iterdir()] == ["new"]

    def stop_half_way():
        with building(folder) as temporary:
            (temporary / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    left_folder, left_file = tmp_path / f".{dead_process()}.cache", tmp_path / "deep" / f".{dead_process()}.x.json"
    kept = [tmp_path / f".{os.getpid()}.cache", tmp_path / ".hidden", tmp_path / ".5.keep.d" / "x"]
    for folder in (left_folder, tmp_path / "deep", kept[0], tmp_path / ".5.keep.d"):
        folder.mkdir()
    for file in (left_file, left_folder / "half.npy", kept[1]):
        file.touch()
    remove_leftovers(tmp_path / "missing")
    remove_leftovers(tmp_path)
    assert not left_folder.exists()
    assert not left_file.exists()
    assert kept[0].exists()
    assert kept[1].exists()


def test_building_removes_what_a_killed_process_left(tmp_path):
    left = tmp_path / f".{dead_process()}.cache"
    left.mkdir()
    with building(tmp_path / "cache"):
        pass
    assert not left.exists()


def test_the_first_error_is_reported_even_if_cleaning_up_fails_too(tmp_path, monkeypatch):
    def write():
        with replacing(tmp_path / "x.json") as temporary:
            temporary.touch()
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(OSError("read-only")))
            raise OSError(errno.EFBIG, "File too large")

    with pytest.raises(UserError, match="File too large"):
        write()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '"text"', "\x00\x01", '{"a": 1', "[" * 100_000], ids=lambda text: text[:8]
)
def test_json_that_is_no_object_is_a_user_error(content, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"results\.json is damaged .*; get it again") as error:
        read_json(path, "get it again")
    assert "\n" not in str(error.value)


def test_json_that_is_missing_or_no_text_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="is missing; get it again"):
        read_json(tmp_path / "none.json", "get it again")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x80")
    with pytest.raises(UserError, match="is damaged"):
        read_json(tmp_path / "binary.json", "get it again")
    write_json(tmp_path / "whole.json", {"accuracy": 0.5})
    assert read_json(tmp_path / "whole.json", "") == {"accuracy": 0.5}


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path, monkeypatch):
    check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write into .*file.*choose another --output-dir"):
        check_writable(tmp_path / "file" / "below")

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        check_writable(tmp_path)
