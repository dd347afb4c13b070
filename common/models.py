"""Saved models with a card beside them that says where they come from."""

import dataclasses
import datetime
import functools
import os
import platform
import subprocess
import zipfile
from importlib import metadata
from pathlib import Path

import keras
import numpy as np

from common.cli import REPOSITORY
from common.errors import UserError
from common.files import read_json, replacing, sha256, write_error, write_json
from common.training import count_steps, fast_precision

FEW_IMAGES = 500  # from so many on, predictions are worth the preparation of a faster network
PACKAGES = ("keras", "tensorflow", "jax", "numpy", "scikit-learn")
RESTORE = "restore it with `git checkout`, or make it with --train"
CARD_FIELDS = {  # what every card must have, and its type
    "script": str,
    "model": str,
    "command": str,
    "git_commit": str,
    "seed": int,
    "config": dict,
    "epochs": (int, float),
    "steps": int,
    "batch_size": int,
    "parameters": dict,
    "dataset": dict,
    "backend": str,
    "precision": str,
    "versions": dict,
    "hardware": str,
    "seconds": (int, float),
    "curves": dict,
    "metrics": dict,
    "weights_sha256": str,
}


def hardware():
    """Returns the processors that the backend computes on, in words."""
    if keras.backend.backend() == "jax":
        import jax  # which names the accelerator, where there is one

        if jax.default_backend() != "cpu":
            return jax.devices()[0].device_kind
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


@functools.cache
def git_commit():
    """Returns the commit of the checkout, or words that say that there is none."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown: git is not installed"
    return found.stdout.strip() or "unknown: not a git checkout"


def environment():
    """Returns what a measured number depends on: commit, date, backend, precision, package versions, hardware."""
    installed = {package.metadata["Name"].lower() for package in metadata.distributions()}
    return {
        "git_commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "backend": keras.backend.backend(),
        "precision": fast_precision(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES if name in installed},
        },
        "hardware": hardware(),
    }


def card(script, model, arguments, *, config, seed, dataset, curves, seconds, metrics):
    """Returns the card of a model that was trained and measured just now, but for what `save_model` adds.

    Args:
        script, model: names.
        arguments: the parsed command line.
        config: dataclass instance with, among others, `epochs` and `batch_size`.
        dataset: dict with "name", the number of images of each part ("train", "validation", "test", "sample") and
            "sha256", the checksums of the arrays.
        curves, seconds: as `training.fit` returns them.
        metrics: dict from part to metrics.
    """
    shortened = [flag for flag in ("quick", "sample") if getattr(arguments, flag)]
    return {
        "script": f"{script}.py",
        "model": model,
        "command": arguments.command,
        **environment(),
        "seed": seed,
        "config": dataclasses.asdict(config),
        "epochs": config.epochs,
        "steps": count_steps(dataset["train"], config),
        "batch_size": config.batch_size,
        "dataset": dataset,
        "shortened": f"{', '.join(f'--{flag}' for flag in shortened)}: a few images only" if shortened else None,
        "seconds": round(seconds, 1),
        "curves": curves,
        "metrics": metrics,
    }


def parameter_counts(model):
    """Returns {"trainable": int, "total": int} for a Keras model."""
    return {"trainable": sum(int(np.prod(v.shape)) for v in model.trainable_variables), "total": model.count_params()}


def models_folder(output_dir, script):
    """Returns the folder that `--load` reads: `saved_models/<script>` of `output_dir`, else that of the repository."""
    folder = Path(output_dir) / "saved_models" / script
    return folder if folder.is_dir() else REPOSITORY / "saved_models" / script


def save_model(model, path, card, compresslevel=6):
    """Writes `model` to `path` (`<name>.keras`, without optimizer state) and its card beside it (`<name>.json`).

    The file is a zip archive, as Keras wants it, but compressed, which Keras reads as well. "parameters" and
    "weights_sha256" are added to the card. `compresslevel` is that of zlib, 9 for the smallest file.
    """
    with replacing(path) as temporary:
        try:
            model.save(temporary)
            _compress(temporary, compresslevel)
        except RuntimeError as error:  # what h5py raises on a full disk
            raise write_error(path, error) from error
    card = {**card, "parameters": parameter_counts(model), "weights_sha256": sha256(path)}
    write_json(path.with_suffix(".json"), card)


def _compress(path, compresslevel):
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=compresslevel) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def read_card(path):
    """Returns the card (dict) beside the weights at `path`; raises `UserError` where it is not whole."""
    path = Path(path).with_suffix(".json")
    found = read_json(path, RESTORE)
    wrong = [name for name, kind in CARD_FIELDS.items() if not isinstance(found.get(name), kind)]
    if wrong:
        raise UserError(f"{path} is not the card of a model (missing or wrong: {', '.join(wrong)}); {RESTORE}")
    return found


def load_model(path, script, input_shape=None):
    """Restores a model that `save_model` wrote.

    Args:
        path: `pathlib.Path` that ends in ".keras".
        script: name of the script that the model must belong to.
        input_shape: tuple without the batch, which the model's input must have; None for models with several inputs.

    Returns the uncompiled `keras.Model` and its card. Raises `UserError` where weights or card are missing, damaged, or
    do not belong together.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing; {RESTORE}")
    found = read_card(path)
    if sha256(path) != found["weights_sha256"]:
        raise UserError(
            f"{path} and its card do not belong together (checksums differ: one is damaged, or saving was "
            f"interrupted); continue with --train --resume, or {RESTORE}"
        )
    if found["script"] != f"{script}.py":
        raise UserError(f"{path} was made by {found['script']}; {RESTORE}")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises many kinds for files that are no models; each is reported
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"Keras {keras.__version__} cannot open {path} ({reason}); {RESTORE}") from error
    if input_shape is not None and model.input_shape[1:] != tuple(input_shape):
        raise UserError(f"{path} takes inputs of shape {model.input_shape[1:]} instead of {input_shape}; {RESTORE}")
    return model, found


def set_weights(model, weights):
    """`keras.Model.set_weights`, after which `Normalization` layers use the new mean and variance, too."""
    model.set_weights(weights)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def round_weights(model, precision="float16"):
    """Rounds the float32 weights of `model` to 16 bits, in place, so that they compress to 60 % of the space or less.

    They stay float32 for Keras. To be called before the model is measured. `precision` is "float16" (11 significant
    bits) or "bfloat16" (8, and files that are smaller by a quarter).
    """

    def rounded(weights):
        return keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.cast(weights, precision), "float32"))

    set_weights(model, [rounded(each) if each.dtype == "float32" else each for each in model.get_weights()])


def for_prediction(model, num_images=FEW_IMAGES):
    """Returns a copy of a float32 `model` whose convolutions compute as `fast_precision` says.

    Everything else, and the weights, stay float32. Predictions differ from those of `model` by rounding, in about the
    third digit. Metrics on fewer than `FEW_IMAGES` would show that, so for so few it is `model` itself.
    """
    precision = fast_precision()
    if num_images < FEW_IMAGES or precision == "float32":
        return model

    def copy(layer):
        config = layer.get_config()
        if isinstance(layer, keras.layers.Conv2D):
            config["dtype"] = precision
        return type(layer).from_config(config)

    fast = keras.models.clone_model(model, clone_function=copy)
    set_weights(fast, model.get_weights())
    return fast
