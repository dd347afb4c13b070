"""What several tests need: running a script, folders that look like whole datasets, and where the real ones are."""

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

from common import cli, datasets

REPOSITORY = Path(__file__).resolve().parent.parent
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
def fake_data_dir(tmp_path_factory):
    """A data folder with a full-size smallNORB cache: noise where `--quick` looks, holes in the file elsewhere."""
    data_dir = tmp_path_factory.mktemp("data")
    source = datasets.SOURCES["smallnorb"]
    cache = data_dir / "cache" / "smallnorb"
    cache.mkdir(parents=True)
    generator = np.random.default_rng(0)
    step = 24300 // 320  # as `--quick` takes every so many pictures, labels change only that often
    count = np.arange(24300) // step
    for split, toys in (("train", (4, 6, 7, 8, 9)), ("test", (0, 1, 2, 3, 5))):
        images = np.lib.format.open_memmap(cache / f"{split}_images.npy", "w+", np.uint8, (24300, 96, 96, 2))
        images[::step] = generator.integers(90, 256, images[::step].shape)
        labels = {
            "category": count % 5,
            "instance": np.array(toys)[count // 5 % 5],
            "elevation": count // 25 % 9,
            "azimuth": count % 18,
            "lighting": count % 6,
        }
        for name, values in labels.items():
            np.save(cache / f"{split}_{name}.npy", values)
    checksums = {f"{split}_{field}": "0" * 64 for split in ("train", "test") for field in source.features}
    names = ["four-legged animals", "human figures", "airplanes", "trucks", "cars"]
    (cache / "manifest.json").write_text(json.dumps({"class_names": names, "sha256": checksums}))
    return data_dir


@pytest.fixture(scope="session")
def fake_labelled_dir(tmp_path_factory):
    """A data folder with full-size caches of Fashion-MNIST and CIFAR-10: noise that gets brighter with the class."""
    data_dir = tmp_path_factory.mktemp("labelled")
    generator = np.random.default_rng(0)
    for name in ("fashion_mnist", "cifar10"):
        source = datasets.SOURCES[name]
        cache = data_dir / "cache" / name
        cache.mkdir(parents=True)
        labels = np.arange(500) % 10
        images = generator.integers(0, 120, (500, *source.image_shape), dtype=np.uint8)
        images += (labels * 14).astype(np.uint8)[:, None, None, None]
        for split, size in source.sizes.items():
            np.save(cache / f"{split}_images.npy", np.tile(images, (size // 500, 1, 1, 1)))
            np.save(cache / f"{split}_labels.npy", np.tile(labels, size // 500))
        checksums = {f"{split}_{field}": "0" * 64 for split in source.sizes for field in source.features}
        names = [f"class {number}" for number in range(10)]
        (cache / "manifest.json").write_text(json.dumps({"class_names": names, "sha256": checksums}))
    return data_dir


@pytest.fixture(scope="session")
def real_data_dir():
    """The folder of the real datasets; skips the test where smallNORB has not been installed there."""
    data_dir = Path(os.environ.get("DATA_DIR", REPOSITORY / "data"))
    if not any((data_dir / "smallnorb").glob("*/dataset_info.json")):
        pytest.skip(f"smallNORB is not installed in {data_dir}")
    return data_dir
