"""What every script promises, whatever it trains."""

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY

SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
SHARED_FLAGS = [
    "--train",
    "--load",
    "--experiments",
    "--quick",
    "--epochs",
    "--batch-size",
    "--seed",
    "--resume",
    "--data-dir",
    "--output-dir",
]


def run(script, *flags, **environment):
    """Runs a script in a process of its own; with KERAS_BACKEND=jax it starts in half of the time."""
    return subprocess.run(
        [sys.executable, REPOSITORY / script, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def error_line(done):
    """The one line on standard error."""
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_shared_flags_in_order(script):
    help_text = run(script, "--help", KERAS_BACKEND="jax").stdout.split("options:")[1]
    places = [help_text.index(f"  {flag} ") for flag in SHARED_FLAGS]
    assert places == sorted(places)


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_one_line(script):
    assert "--trian" in error_line(run(script, "--load", "--trian"))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "tell_the_time.py"])  # renders its own
def test_no_data_and_no_network_is_one_line(script, tmp_path):
    # A proxy that nobody runs makes every machine one without a network.
    environment = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment["KERAS_BACKEND"] = "jax"
    line = error_line(run(script, "--load", "--data-dir", tmp_path, "--output-dir", tmp_path, **environment))
    assert "by hand into" in line
    assert str(tmp_path) in line


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_do_not_import_tensorflow(script):
    text = (REPOSITORY / script).read_text()
    assert "import tensorflow" not in text
    assert "from tensorflow" not in text


def test_nothing_in_common_imports_a_script():
    names = [script.removesuffix(".py") for script in SCRIPTS]
    for path in (REPOSITORY / "common").glob("*.py"):
        assert not any(f"import {name}" in path.read_text() or f"from {name}" in path.read_text() for name in names)


def test_no_file_is_too_large():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    sizes = {name: (REPOSITORY / name).stat().st_size for name in tracked if name and (REPOSITORY / name).exists()}
    assert all(size < 45e6 for size in sizes.values())
    assert sum(size for name, size in sizes.items() if name.startswith("saved_models/")) < 100e6
    assert not [name for name in sizes if name.startswith("data/") and name != "data/README.md"]
