import errno
import hashlib
import json

import pytest

from common.cli import UserError
from common.files import replacing, sha256, write_json


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
