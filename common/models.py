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
from common.errors import UserError, reason
from common.files import H5PY_ERRORS, read_json, replacing, sha256, write_json
from common.training import RUN, count_steps, fast_precision, num_devices

FEW_IMAGES = 500  # from so many on, predictions are worth the preparation of a faster network
PACKAGES = ("keras", "tensorflow", "jax", "numpy", "scikit-learn")
RESTORE = "restore it with `git checkout`, or make it with --train"
CARD_FIELDS = {  # what every card must have, by type
    str: ("script", "model", "command", "git_commit", "backend", "precision", "hardware", "weights_sha256"),
    int: ("seed", "steps", "batch_size"),
    (int, float): ("epochs", "seconds"),
    dict: ("config", "parameters", "dataset", "versions", "curves", "metrics"),
}


def hardware():
    """Returns the processors that the backend computes on, in words."""
    if keras.backend.backend() == "jax":
        import jax  # which names the accelerator, where there is one

        if jax.default_backend() != "cpu":
            return jax.devices()[0].device_kind
    elif keras.backend.backend() == "tensorflow":
        from tensorflow import config

        for gpu in config.list_physical_devices("GPU"):
            return config.experimental.get_device_details(gpu).get("device_name", "GPU")
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


def conditions():
    """Returns what predictions depend on, up to rounding."""
    return {"backend": keras.backend.backend(), "precision": fast_precision(), "hardware": hardware()}


def environment():
    """Returns what a measured number depends on: `conditions`, commit, date and package versions."""
    installed = {package.metadata["Name"].lower() for package in metadata.distributions()}
    versions = {name: metadata.version(name) for name in PACKAGES if name in installed}
    return {
        "git_commit": git_commit(),
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), **versions},
        **conditions(),
    }


def card(script, model, arguments, *, config, seed, dataset, curves, seconds, metrics):
    """Returns the card of a model that was trained and measured just now, but for what `save_model` adds.

    `dataset` is a dict with "name", the number of images of each part ("train", "validation", "test", "sample") and
    "sha256", the checksums of the arrays; `metrics` is a dict from part to metrics; the rest is as for `training.fit`.
    """
    shortened = [flag for flag in ("quick", "sample") if getattr(arguments, flag)]
    return {
        "script": f"{script}.py",
        "model": model,
        "command": arguments.command,
        **environment(),
        "seed": seed,
        "config": dataclasses.asdict(config),
        "epochs": (epochs := max(map(len, curves.values()), default=config.epochs)),  # fewer where a callback stops
        "steps": count_steps(dataset["train"], dataclasses.replace(config, epochs=epochs)),
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


def model_path(output_dir, script, name):
    """Returns where one model is: in the output directory or, where it is not, in the repository."""
    path = models_folder(output_dir, script) / f"{name}.keras"
    return path if path.exists() else models_folder(REPOSITORY, script) / path.name


def restore(path, script, config_type):
    """Returns a model that `save_model` wrote, uncompiled, its config, a `config_type`, and its card."""
    model, card = load_model(path, script)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in card["config"].items()}
    try:
        return model, config_type(**fields), card
    except TypeError as error:
        raise UserError(f"the card of {path} has another config ({error}); {RESTORE}") from error


def save_model(model, path, card, compresslevel=6):
    """Writes `model` to `path` (`<name>.keras`, without optimizer state) and its card beside it (`<name>.json`).

    Keras writes a zip archive without compression; it reads a compressed one (`compresslevel` as in zlib) as well.
    """
    with replacing(path, H5PY_ERRORS) as temporary:
        model.save(temporary)
        with zipfile.ZipFile(temporary) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, compresslevel=compresslevel) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    card = {**card, "parameters": parameter_counts(model), "weights_sha256": sha256(path)}
    write_json(path.with_suffix(".json"), card)


def read_card(path):
    """Returns the card (dict) beside the weights at `path`; raises `UserError` where it is not whole."""
    path = Path(path).with_suffix(".json")
    found = read_json(path, RESTORE)
    fields = [(name, kind) for kind, names in CARD_FIELDS.items() for name in names]
    wrong = [name for name, kind in fields if not isinstance(found.get(name), kind)]
    if wrong:
        raise UserError(f"{path} is not the card of a model (missing or wrong: {', '.join(wrong)}); {RESTORE}")
    return found


def load_model(path, script, input_shape=None):
    """Returns a model that `save_model` wrote, uncompiled, and its card.

    Raises `UserError` where weights or card are missing or damaged, or do not belong together, to the script of this
    name, or to inputs of `input_shape`, a tuple without the batch (None for models with several inputs).
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
        raise UserError(f"Keras {keras.__version__} cannot open {path} ({reason(error)}); {RESTORE}") from error
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

    To be called before the model is measured. `precision` is "float16" (11 significant bits) or "bfloat16" (8).
    """

    def rounded(weights):
        return keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.cast(weights, precision), "float32"))

    set_weights(model, [rounded(each) if each.dtype == "float32" else each for each in model.get_weights()])


def round_to_grid(model):
    """Rounds each filter to multiples of a power of two, at most 1/16 of its standard deviation, in place.

    Rounded weights are exact in 16 bits and compress to about 1.1 bytes, half of what `round_weights` leaves. The error
    is below 2 % of the standard deviation. Each filter has a grid of its own, because those of one kernel may differ in
    size by a factor of a hundred.
    """

    def rounded(weights):
        if weights.ndim < 2:
            return weights
        deviations = weights.std(axis=tuple(range(weights.ndim - 1)), keepdims=True)
        steps = 2.0 ** np.floor(np.log2(np.maximum(deviations, 1e-6) / 16))
        return (np.rint(weights / steps) * steps).astype("float32")

    set_weights(model, [rounded(weights) for weights in model.get_weights()])


def for_prediction(model, num_images=FEW_IMAGES):
    """Returns a copy of a float32 `model` whose convolutions compute as `fast_precision` says; weights stay float32.

    Predictions differ by rounding, in about the third digit, which would show in metrics on fewer than `FEW_IMAGES`:
    for those it is `model` itself, or a copy on the devices in use where it was built on others.
    """
    precision = fast_precision() if num_images >= FEW_IMAGES else "float32"
    if precision == "float32" and num_devices(model) == RUN.get()[0]:
        return model

    def copy(layer):
        config = layer.get_config()
        if isinstance(layer, keras.layers.Conv2D) and precision != "float32":
            config["dtype"] = precision
        return type(layer).from_config(config)

    fast = keras.models.clone_model(model, clone_function=copy, recursive=True)
    set_weights(fast, model.get_weights())
    return fast
