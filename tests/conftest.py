"""What several tests need: running a script, and where the real datasets are."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from common import cli

REPOSITORY = Path(__file__).resolve().parent.parent
if keras.backend.backend() == "tensorflow":
    import tensorflow

    # Rewriting a graph takes longer than the few steps of a test; results differ by rounding.
    tensorflow.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})
# A test of JAX spends most of its time on compiling what then runs for a second.
QUICK_COMPILATION = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def run_script(script, backend, *flags, fresh=False):
    """Runs a script as a user does. Returns a `subprocess.CompletedProcess`.

    Args:
        script: str, its name without ".py".
        backend: "tensorflow" or "jax".
        flags: its command line.
        fresh: bool, whether it must be a process of its own, which knows nothing but what is on the disk. Otherwise a
            script on the backend of the tests runs within their process, which spares it the start.
    """
    if backend == keras.backend.backend() and not fresh:
        output, errors = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                cli.run(importlib.import_module(script).main, [str(flag) for flag in flags])
            except SystemExit as end:
                code = end.code or 0
        return subprocess.CompletedProcess(flags, code, output.getvalue(), errors.getvalue())
    return subprocess.run(
        [sys.executable, REPOSITORY / f"{script}.py", *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "KERAS_BACKEND": backend, "XLA_FLAGS": QUICK_COMPILATION},
        check=False,
    )


def read_verification(script, output_dir):
    """Returns the rows that a script wrote when it compared its metrics with the cards, a list of dicts."""
    return json.loads((output_dir / "runs" / script / "verification.json").read_text())["rows"]


def run_elsewhere(code, folder, *arguments, **environment):
    """Runs Python `code` in `folder` with none of our modules on the path. Returns what it prints; it must succeed."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**os.environ, **environment, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


@pytest.fixture(scope="session")
def real_data_dir():
    """The folder of the real datasets; skips the test where smallNORB has not been installed there."""
    data_dir = Path(os.environ.get("DATA_DIR", REPOSITORY / "data"))
    if not any((data_dir / "smallnorb").glob("*/dataset_info.json")):
        pytest.skip(f"smallNORB is not installed in {data_dir}")
    return data_dir
