import errno
import hashlib
import json
import os
import time

import pytest

from common.cli import UserError
from common.files import building, replacing, sha256, write_json


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


def test_building_removes_what_a_killed_process_left_long_ago(tmp_path):
    old, young = tmp_path / ".cache.1", tmp_path / ".cache.2"
    for left_over in (old, young):
        left_over.mkdir()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    with building(tmp_path / "cache"):
        pass
    assert not old.exists()
    assert young.exists()
