"""Speed and memory of every script: `make bench`. Writes report/results/bench.json, or with --model one row of it.

- Training: images per second as `--train` feeds its model (`common.training.fit`), beside a bare `model.fit` of the
  same model, augmentation included, on the same arrays with the defaults of Keras. They take turns, because other work
  on the machine slows either down from time to time; what counts is the ratio of their best epochs. The first epoch of
  every `fit` does not count: it compiles, and sets up what a long training run sets up once. The scripts in pure JAX
  have no `fit` to compare with; the steps between two checkpoints are timed, validation included.
- `--load --sample`: seconds from start to exit, and the peak of memory.
- Sampling: seconds of a process that generates 64 images.

With `--devices N`, instead, images per second on one device and on so many, in a row of its own.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import importlib

import keras
import numpy as np

from common import cli, training
from common.files import read_json, write_json
from common.models import conditions

REPOSITORY = cli.REPOSITORY
SCRIPTS = {  # script -> the model that is trained; None for pure JAX, which has no `model.fit` to compare with
    "task1_smallnorb_cnn": "joint",
    "task2_diffusion": "network",
    "fashion_cifar_mlp_cnn": "cifar_cnn_1",
    "tell_the_time": "best_75",
    "cifar100_transfer": "own_3",
    "voc_segmentation": "unet_bilinear",
    "pegasus_gan": "diffusion",
    "addnist_classifier": None,
    "cifar100_generator": None,
}
SAMPLING = {"task2_diffusion": 64, "pegasus_gan": 64, "cifar100_generator": 64}  # script -> number of images
BATCHES, ROUNDS = 32, 5


class LastEpoch(keras.callbacks.Callback):
    """Measures the seconds of the last epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.started = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.started


class Captured(Exception):
    """Carries what a script hands to `training.fit`."""


def capture(script, model, arguments, devices=1):
    """Returns the compiled model, inputs, targets and config that `--train` hands to `training.fit` first."""

    def stop(model, inputs, targets, *, config, **_):
        raise Captured(model, inputs, targets, config)

    original, training.fit = training.fit, stop
    try:
        with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as folder:
            flags = ["--data-dir", str(arguments.data_dir), "--output-dir", link_models(folder)]
            flags += ["--model", model, "--devices", str(devices)]
            importlib.import_module(script).main(["--train", *flags])
    except Captured as captured:
        model, inputs, targets, config = captured.args
        count = BATCHES * config.batch_size
        few = keras.tree.map_structure(lambda a: None if a is None else a[:count], (inputs, targets))
        return model, *few, dataclasses.replace(config, epochs=2)
    finally:
        training.fit = original
    raise RuntimeError(f"{script}.py --train does not use training.fit")


def link_models(folder):
    """Returns `folder`, in which there are the saved models now: a generator is measured with its classifier."""
    (Path(folder) / "saved_models").symlink_to(REPOSITORY / "saved_models")
    return folder


def bare_fit(model, inputs, targets, config):
    """Trains two epochs as Keras does by default; returns the images per second of the second one."""
    last, model.steps_per_execution = LastEpoch(), 1
    options = {"batch_size": config.batch_size, "epochs": config.epochs, "verbose": 0, "callbacks": [last]}
    model.fit(inputs, targets, **options)
    return BATCHES * config.batch_size / last.seconds


def our_fit(model, inputs, targets, config):
    """Trains two epochs as `--train` does; returns the images per second of the second one."""
    last = LastEpoch()
    with tempfile.TemporaryDirectory() as folder:
        options = {"seed": 0, "folder": folder, "resume": False, "callbacks": [last], "verbose": 0}
        training.fit(model, inputs, targets, config=config, **options)
    return BATCHES * config.batch_size / last.seconds


def measure_training(script, model, arguments):
    """Returns images per second of the best of `ROUNDS` epochs, bare and as `--train` does it, and their ratio."""
    turns, speeds = [(fit, capture(script, model, arguments)) for fit in (bare_fit, our_fit)], {}
    for number in range(ROUNDS):
        for fit, parts in turns[:: -1 if number % 2 else 1]:
            speeds[fit] = max(speeds.get(fit, 0.0), fit(*parts))
    found = {"model": model, "images_per_second": speeds[our_fit], "bare_images_per_second": speeds[bare_fit]}
    return found | {"ratio": speeds[our_fit] / speeds[bare_fit]}


def measure_devices(script, model, arguments):
    """Returns images per second of the best of `ROUNDS` epochs on one device and on several."""
    speeds = []
    for devices in (1, arguments.devices):
        with training.running(devices, None, None):
            parts = capture(script, model, arguments, devices)
            speeds.append(max(our_fit(*parts) for _ in range(ROUNDS)))
    return {"model": model, "images_per_second": speeds[0], "on_devices": speeds[1], "devices": arguments.devices}


def measure_jax_training(script):
    """Returns images per second of a script in pure JAX, with the fewer steps between its 2nd, 3rd and 4th checkpoint.

    It trains on the tracked sample, as the size of the dataset does not matter to a step.
    """
    module, stamps = importlib.import_module(script), []
    original = module.write_file

    def stamp(path, content):
        if path.name == "checkpoint.npz":
            about = json.loads(str(content["about"]))
            stamps.append((time.perf_counter(), about["curves"]["step"][-1] * about["settings"]["batch_size"]))
        if len(stamps) == 4:
            raise Captured
        return original(path, content)

    module.write_file = stamp
    try:
        with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory() as folder:
            module.main(["--train", "--sample", "--epochs", "1000", "--output-dir", folder])
    except Captured:
        seconds, images = np.diff(stamps, axis=0)[1:].T
        return {"images_per_second": float(max(images / seconds))}
    finally:
        module.write_file = original
    raise RuntimeError(f"{script}.py --train wrote only {len(stamps)} checkpoints")


def measure_process(*command):
    """Returns the seconds and the peak of memory, in GB, of a process; it must succeed."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, cwd=REPOSITORY)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    unit = 1e9 if sys.platform == "darwin" else 1e6  # bytes there, kilobytes elsewhere
    return time.perf_counter() - start, usage.ru_maxrss / unit


def write_row(path, measured, name, found, about):
    """Adds a row to those `measured` so far, and writes all of them in the order of `SCRIPTS`."""
    found = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}
    measured[name] = found | about
    print(name, json.dumps(measured[name]), flush=True)
    order = {script: number for number, script in enumerate(SCRIPTS)}
    write_json(path, {"scripts": dict(sorted(measured.items(), key=lambda row: order[row[0].split()[0]]))})


def main(argv=None):
    arguments = cli.parse(cli.parser(__doc__, list(SCRIPTS)), ["--train", *(sys.argv[1:] if argv is None else argv)])
    path = REPOSITORY / "report" / "results" / "bench.json"
    measured = read_json(path, "delete it")["scripts"] if arguments.model and path.exists() else {}
    for script in [arguments.model] if arguments.model else SCRIPTS:
        if arguments.devices > 1:
            found = measure_devices(script, SCRIPTS[script], arguments)
            write_row(path, measured, f"{script} --devices {arguments.devices}", found, conditions())
            continue
        if SCRIPTS[script]:
            found, about = measure_training(script, SCRIPTS[script], arguments), conditions()
        else:
            found, about = measure_jax_training(script), conditions() | {"backend": "jax", "precision": "float32"}
        keras.utils.clear_session()
        with tempfile.TemporaryDirectory() as folder:
            folders = ["--output-dir", link_models(folder), "--data-dir", str(arguments.data_dir)]
            command = [f"{script}.py", "--load", *folders]
            found["load_seconds"], found["load_gigabytes"] = measure_process(*command, "--sample")
            if script in SAMPLING:
                found["sampling_seconds"], _ = measure_process(*command, "--samples", str(SAMPLING[script]))
        write_row(path, measured, script, found, about)


if __name__ == "__main__":
    cli.run(main)
