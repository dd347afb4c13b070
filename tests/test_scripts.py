"""What every script and the layout of the repository promise, whatever a script trains."""

import ast
import contextlib
import functools
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest
from conftest import QUICK_COMPILATION, REPOSITORY, read_verification

SCRIPTS = sorted(path.name for path in REPOSITORY.glob("*.py") if path.stem != "app")  # which imports them all
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
    "--devices",
    "--record",
    "--data-dir",
    "--output-dir",
    "--logdir",
]
KERAS_FLAGS = {"--devices", "--logdir"}  # of all scripts but those in pure JAX
PURE_JAX = {  # single files with a command line of their own -> the shared flags that they lack
    "addnist_classifier.py": KERAS_FLAGS,
    "cifar100_generator.py": KERAS_FLAGS | {"--model"},
}
BARE_RUNS = {  # backend -> script -> fastest model to train that it draws figures of (or None), how it is made smaller
    "tensorflow": {
        "task1_smallnorb_cnn": ("joint", {"width": 8}),
        "task2_diffusion": ("judge", {}),
        "cifar100_transfer": ("own_1", {"filters": (4, 6, 8)}),
        "tell_the_time": ("classes_24", {"width": 4, "augment": False}),
        "voc_segmentation": ("unet_bilinear", {"widths": (4, 8)}),
        "pegasus_gan": ("judge_b", {"widths": (8, 8)}),
    },
    "jax": {
        "fashion_cifar_mlp_cnn": ("cifar_cnn_3", {}),
        "addnist_classifier": ("shared", {}),
        "cifar100_generator": (None, {"patch": 8}),
    },
}
REAL_PROCESS = ("addnist_classifier.py", "task1_smallnorb_cnn.py")  # the first has a beginning and an end of its own


def run(script, *flags):
    """Runs a script in a process of its own."""
    return subprocess.run([sys.executable, REPOSITORY / script, *flags], capture_output=True, text=True, check=False)


def run_as_main(script, *flags):
    """Runs a script as its `__main__` within this process, which spares it the import of TensorFlow."""
    output, errors = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    handler, code = signal.getsignal(signal.SIGINT), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                runpy.run_path(str(REPOSITORY / script), run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            finally:
                signal.signal(signal.SIGINT, handler)
    return subprocess.CompletedProcess(flags, code, *(each.buffer.getvalue().decode() for each in (output, errors)))


@functools.cache
def help_text(script):
    return run_as_main(script, "--help").stdout


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
    options = help_text(script).split("options:")[1]
    places = [options.index(f"  {flag} ") for flag in SHARED_FLAGS if flag not in PURE_JAX.get(script, ())]
    assert places == sorted(places)


@pytest.mark.parametrize("script", PURE_JAX)
def test_help_says_the_same_of_a_flag_everywhere(script):
    texts = [help_text(name) for name in (script, SCRIPTS[-1])]
    for flag in set(SHARED_FLAGS) - KERAS_FLAGS - {"--model"}:
        of_flag = [
            " ".join(text[text.index(f"  {flag} ") :].split("\n\n")[0].split("\n  -")[0].split()) for text in texts
        ]
        assert of_flag[0] == of_flag[1]


@pytest.mark.parametrize("script", SCRIPTS)
def test_unknown_flag_is_one_line(script):
    assert "--trian" in error_line(run_as_main(script, "--load", "--trian"))


@pytest.mark.parametrize("script", REAL_PROCESS)
def test_nothing_else_reaches_the_screen_of_a_new_process(script):
    assert "--trian" in error_line(run(script, "--load", "--trian"))


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "tell_the_time.py"])  # renders its own
def test_no_data_and_no_network_is_one_line_that_ends_with_the_way_out(script, tmp_path, monkeypatch):
    # A proxy that nobody runs makes every machine one without a network.
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(urllib.request, "_opener", None)  # an earlier one would not know the proxy
    line = error_line(run_as_main(script, "--load", "--data-dir", tmp_path, "--output-dir", tmp_path))
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


RUN_SEVERAL = """
import contextlib, dataclasses, importlib, io, json, sys, traceback
mode, folder, models = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
from common import startup
import keras
if keras.backend.backend() == "tensorflow":
    import tensorflow
    tensorflow.config.run_functions_eagerly(True)  # tracing takes longer than a few steps
from common import cli
done = {}
for script, (model, changes) in models.items():
    output, errors, code = io.StringIO(), io.StringIO(), 0
    flags = [mode, "--quick", "--sample", "--output-dir", f"{folder}/{script}"]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            task = importlib.import_module(script)
            if model is None:
                task.CONFIG = dataclasses.replace(task.CONFIG, **changes)
            else:
                flags += ["--model", model]
                if changes:
                    task.CONFIGS[model] = dataclasses.replace(task.CONFIGS[model], **changes)
            cli.run(task.main, flags)
        except SystemExit as end:
            code = end.code
        except Exception:
            code = traceback.print_exc() or 1
    done[script] = code, output.getvalue(), errors.getvalue()
with open(f"{folder}/{mode}.json", "w") as file:
    json.dump(done, file)
"""


@pytest.fixture(scope="module")
def run_bare(bare_repository, tmp_path_factory):
    """A function from a backend to what its scripts print and write without plots/ and experiments/.

    All scripts of a backend are trained in one process, and restored in another one.
    """

    @functools.cache
    def run_all(backend):
        folder = tmp_path_factory.mktemp(backend)
        environment = {"KERAS_BACKEND": backend, "XLA_FLAGS": QUICK_COMPILATION, "PYTHONPATH": ""}
        runs = []
        for mode in ("--train", "--load"):
            subprocess.run(
                [sys.executable, "-c", RUN_SEVERAL, mode, folder, json.dumps(BARE_RUNS[backend])],
                cwd=bare_repository,
                env={**os.environ, **environment},
                check=True,
            )
            runs.append(json.loads((folder / f"{mode}.json").read_text()))
        return folder, *runs

    return run_all


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_train_and_restore_without_plots_and_experiments(script, run_bare):
    script = script.removesuffix(".py")
    (backend,) = (backend for backend, scripts in BARE_RUNS.items() if script in scripts)
    folder, trained, loaded = run_bare(backend)
    code, output, errors = trained[script]
    assert code == 0, errors
    assert "figures are skipped" in output
    assert not list((folder / script).rglob("*.png"))
    (card,) = (json.loads(path.read_text()) for path in (folder / script / "saved_models").rglob("*.json"))
    assert card["git_commit"].startswith("unknown")
    assert card["backend"] == backend
    assert card["shortened"]
    code, output, errors = loaded[script]
    assert code == 0, errors
    assert "DIFFERS" not in output
    rows = read_verification(script, folder / script)
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
    lengths = {path.stem: len(path.read_text().splitlines()) for path in REPOSITORY.glob("*.py")}
    # Two generators, two judges and four ways to a Pegasus take more than the others; so does a file that stands alone.
    limits = dict.fromkeys(lengths, 750) | {"pegasus_gan": 800, "cifar100_generator": 800}
    assert not [name for name, length in lengths.items() if length > limits[name]]
    common = sum(len(path.read_text().splitlines()) for path in (REPOSITORY / "common").glob("*.py"))
    assert common < 3900  # of it clocks, diffusion models, the network of FID and winged horses take 1,500


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
