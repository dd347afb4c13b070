"""What every script and the layout of the repository promise, whatever a script trains."""

import ast
import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from conftest import QUICK_COMPILATION, REPOSITORY

SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py"))
SHARED_FLAGS = [
    "--train",
    "--load",
    "--experiments",
    "--model",
    "--quick",
    "--sample",
    "--epochs",
    "--batch-size",
    "--seed",
    "--resume",
    "--record",
    "--data-dir",
    "--output-dir",
]
SMALLEST_MODEL = {  # of each script, the fastest one to train that it draws figures of
    "addnist_classifier.py": "shared",
    "fashion_cifar_mlp_cnn.py": "cifar_cnn_3",
    "task1_smallnorb_cnn.py": "joint",
    "task2_diffusion.py": "judge",
    "tell_the_time.py": "classes_24",
    "voc_segmentation.py": "unet_bilinear",
}

BACKENDS = {"fashion_cifar_mlp_cnn.py": "jax"}  # one is enough here; tests of other scripts try what is theirs


def run(script, *flags, folder=REPOSITORY, **environment):
    """Runs a script in a process of its own; with KERAS_BACKEND=jax it starts in half of the time."""
    return subprocess.run(
        [sys.executable, folder / script, *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": QUICK_COMPILATION, **environment},
        check=False,
    )


def error_line(done):
    """The one line on standard error."""
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def imports(path):
    """Yields the dotted names that a file imports anywhere."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_shared_flags_in_order(script):
    help_text = run(script, "--help", KERAS_BACKEND="jax").stdout.split("options:")[1]
    places = [help_text.index(f"  {flag} ") for flag in SHARED_FLAGS]
    assert places == sorted(places)


def test_help_says_the_same_of_a_flag_everywhere():
    """AddNIST's script has a command line of its own, since its assignment asks for a single file."""
    texts = [run(script, "--help", KERAS_BACKEND="jax").stdout for script in ("addnist_classifier.py", SCRIPTS[-1])]
    for flag in set(SHARED_FLAGS) - {"--model"}:
        of_flag = [" ".join(text[text.index(f"  {flag} ") :].split("\n  -")[0].split()) for text in texts]
        assert of_flag[0] == of_flag[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_one_line(script):
    assert "--trian" in error_line(run(script, "--load", "--trian"))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "tell_the_time.py"])  # renders its own
def test_no_data_and_no_network_is_one_line_that_ends_with_the_way_out(script, tmp_path):
    # A proxy that nobody runs makes every machine one without a network.
    environment = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    environment["KERAS_BACKEND"] = "jax"
    line = error_line(run(script, "--load", "--data-dir", tmp_path, "--output-dir", tmp_path, **environment))
    assert "by hand into" in line
    assert str(tmp_path) in line
    assert line.endswith("or add --sample")


@pytest.fixture(scope="module")
def bare_repository(tmp_path_factory):
    """A copy of the repository without plots/ and experiments/, and without git."""
    folder = tmp_path_factory.mktemp("bare")
    for script in SCRIPTS:
        shutil.copy(REPOSITORY / script, folder)
    shutil.copytree(REPOSITORY / "common", folder / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "data").symlink_to(REPOSITORY / "data")
    (folder / "saved_models").symlink_to(REPOSITORY / "saved_models")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_train_and_restore_without_plots_and_experiments(script, bare_repository, tmp_path):
    flags = ["--quick", "--sample", "--model", SMALLEST_MODEL[script], "--output-dir", tmp_path]
    environment = {"KERAS_BACKEND": BACKENDS.get(script, "tensorflow")}
    done = run(script, "--train", *flags, folder=bare_repository, **environment)
    assert done.returncode == 0, done.stderr
    assert "figures are skipped" in done.stdout
    assert not list(tmp_path.rglob("*.png"))
    (card,) = (json.loads(path.read_text()) for path in (tmp_path / "saved_models").rglob("*.json"))
    assert card["git_commit"].startswith("unknown")
    assert card["backend"] in (environment["KERAS_BACKEND"], "jax")  # AddNIST's network is always trained by JAX
    assert card["shortened"]
    done = run(script, "--load", *flags, folder=bare_repository, **environment)
    assert done.returncode == 0, done.stderr
    assert "DIFFERS" not in done.stdout
    rows = json.loads((tmp_path / "runs" / script.removesuffix(".py") / "verification.json").read_text())["rows"]
    assert all(row["agrees"] and math.isfinite(row["measured"]) for row in rows)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_do_not_import_tensorflow(script):
    assert not [name for name in imports(REPOSITORY / script) if name.startswith("tensorflow.")]


def test_imports_go_one_way():
    names = {script.removesuffix(".py") for script in SCRIPTS}
    for path in (REPOSITORY / "common").glob("*.py"):
        parts = {name.split(".")[0] for name in imports(path)}
        assert not parts & (names | {"plots", "experiments"}), path
    for path in (REPOSITORY / "plots").glob("*.py"):
        ours = {name for name in imports(path) if name.split(".")[0] in names | {"common", "plots", "experiments"}}
        assert ours <= {"common.figures"}, path
    for path in (REPOSITORY / "experiments").glob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in names | {"common", "plots"}}, path


def test_common_has_no_import_circles():
    graph = {
        path.stem: {name.split(".")[1] for name in imports(path) if name.startswith("common.")}
        for path in (REPOSITORY / "common").glob("*.py")
    }
    while graph:
        leaves = {name for name, needed in graph.items() if not needed & graph.keys()}
        assert leaves, f"a circle among {sorted(graph)}"
        graph = {name: needed for name, needed in graph.items() if name not in leaves}


def test_sizes_of_the_code():
    lengths = {path: len(path.read_text().splitlines()) for path in REPOSITORY.glob("*.py")}
    assert not [path.name for path, length in lengths.items() if length > 750]
    common = sum(len(path.read_text().splitlines()) for path in (REPOSITORY / "common").glob("*.py"))
    assert common < 2550


def test_no_file_is_too_large():
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    ).stdout.split("\0")
    sizes = {name: (REPOSITORY / name).stat().st_size for name in tracked if name and (REPOSITORY / name).is_file()}
    assert all(size < 45e6 for size in sizes.values())
    assert sum(size for name, size in sizes.items() if name.startswith("saved_models/")) < 180e6
    samples = {name: size for name, size in sizes.items() if name.startswith("data/samples/")}
    assert sum(samples.values()) < 6e6
    data = {name for name in sizes if name.startswith("data/")} - set(samples)
    assert data <= {"data/README.md"}
