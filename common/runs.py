"""Training that survives being killed, saved models with a card that says where they come from, experiment tables."""

import contextlib
import csv
import dataclasses
import datetime
import json
import math
import os
import platform
import shutil
import subprocess
import time
import zipfile
from importlib import metadata
from pathlib import Path

import keras
import numpy as np

from common.cli import REPOSITORY, UserError
from common.files import replacing, sha256, write_json

STEPS_PER_EXECUTION = 16  # optimisation steps between two returns to Python, which cost a tenth of the time otherwise
PACKAGES = ("keras", "tensorflow", "jax", "numpy", "scikit-learn")


class Diverged(UserError):
    """The loss of a training left the finite numbers."""


class Checkpoint(keras.callbacks.Callback):
    """After every epoch writes weights, optimizer state, learning curves and seconds to a folder, and nothing half.

    `keras.callbacks.BackupAndRestore` keeps neither the learning curves nor the pair of weights and epoch number
    together when the process is killed between writing the one and the other. Here `state.json` names the weights it
    belongs to and is renamed into place last, so that a kill at any moment costs at most the epoch under way.

    Args:
        folder: `pathlib.Path`, created when needed.
        settings: dict that JSON can hold, what makes this training different from another one.
    """

    def __init__(self, folder, settings):
        super().__init__()
        self.folder, self.settings = Path(folder), settings
        self.epoch, self.history, self.seconds = 0, {}, 0.0

    def restore(self, model):
        """Puts the last checkpoint, where there is one, into a compiled `model`; `self.epoch` says how far it got.

        Raises:
            UserError: where the checkpoint is damaged or belongs to a training with other settings.
        """
        path = self.folder / "state.json"
        if not path.exists():
            return
        try:
            state = json.loads(path.read_text())
            if state["settings"] != self.settings:
                changed = [k for k in self.settings if state["settings"].get(k) != self.settings[k]]
                raise UserError(
                    f"the checkpoint in {self.folder} was made with other settings ({', '.join(changed)}); "
                    "use those again, or start over without --resume"
                )
            model.load_weights(self.folder / state["weights"])
            self.epoch, self.history, self.seconds = state["epoch"], state["history"], state["seconds"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"the checkpoint in {self.folder} is damaged; start over without --resume") from error

    def on_train_begin(self, logs=None):
        self.started = time.time() - self.seconds

    def on_epoch_end(self, epoch, logs=None):
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        self.epoch, self.seconds = epoch + 1, time.time() - self.started
        weights = self.folder / f"epoch_{self.epoch:04d}.weights.h5"
        with replacing(weights) as temporary:
            self.model.save_weights(temporary)
        state = {
            "epoch": self.epoch,
            "weights": weights.name,
            "seconds": self.seconds,
            "settings": self.settings,
            "history": self.history,
        }
        write_json(self.folder / "state.json", state)
        for old in self.folder.glob("epoch_*.weights.h5"):
            if old != weights:
                old.unlink()


def fit(model, inputs, targets, *, epochs, batch_size, folder, settings, resume, **keywords):
    """`model.fit` that can be killed at any moment and resumed.

    Args:
        model: compiled `keras.Model`.
        inputs, targets, epochs, batch_size: as in `keras.Model.fit`; further `keywords` go there too.
        folder: where the checkpoint lives. It stays after the end, so that a script that trains several models one
            after the other skips the finished ones when it is resumed.
        settings: dict that JSON can hold; a checkpoint with other settings is refused.
        resume: bool. False deletes an older checkpoint first.

    Returns:
        The learning curves, a dict from metric name to a list with one float per epoch, and the seconds that all
        epochs took together (float).

    Raises:
        UserError: where the checkpoint cannot be used.
        Diverged: a `UserError`, where the training left the finite numbers.
    """
    folder = Path(folder)
    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
    checkpoint = Checkpoint(folder, {**settings, "epochs": epochs, "batch_size": batch_size})
    # The optimizer's state must exist before it is restored; and TensorFlow traces a step twice that creates variables,
    # so those of the losses and metrics are created by one example.
    model.optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "tensorflow" and targets is not None:
        first, answer = keras.tree.map_structure(lambda array: array[:1], (inputs, targets))
        predicted = model(first)
        model.compute_loss(first, answer, predicted)
        model.compute_metrics(first, answer, predicted)
        model.reset_metrics()
    checkpoint.restore(model)
    if checkpoint.epoch:
        print(f"resuming after epoch {checkpoint.epoch} of {epochs}")
    callbacks = [keras.callbacks.TerminateOnNaN(), *keywords.pop("callbacks", []), checkpoint]
    if checkpoint.epoch < epochs:
        keywords |= {"initial_epoch": checkpoint.epoch, "epochs": epochs, "batch_size": batch_size}
        model.fit(inputs, targets, callbacks=callbacks, **keywords)
    if not np.isfinite(checkpoint.history["loss"][-1]) or checkpoint.epoch < epochs:
        raise Diverged("the loss is no longer a finite number; lower the learning rate or try another --seed")
    return checkpoint.history, checkpoint.seconds


def cosine_schedule(learning_rate, steps):
    """Returns a Keras learning rate schedule: a twentieth of `steps` up, then a cosine down to 0."""
    warmup_steps = max(steps // 20, 1)
    return keras.optimizers.schedules.CosineDecay(
        0.0, max(steps - warmup_steps, 1), warmup_target=learning_rate, warmup_steps=warmup_steps
    )


def hardware():
    """Returns the processors that the backend computes on, in words (str)."""
    if keras.backend.backend() == "jax":
        import jax  # which names the accelerator, where there is one

        if jax.default_backend() != "cpu":
            return jax.devices()[0].device_kind
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"


def fast_precision():
    """Returns the Keras dtype policy that trains fastest here: "mixed_bfloat16" or "float32".

    bfloat16 arithmetic, with weights kept in float32, nearly doubles the speed of convolutions on GPUs and on CPUs with
    instructions for it (AMX, AVX-512 BF16), and slows every other CPU down.
    """
    if any("gpu" in device.lower() for device in keras.distribution.list_devices()):
        return "mixed_bfloat16"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = keras.backend.backend() == "tensorflow" and ("amx_bf16" in flags or "avx512_bf16" in flags)
    return "mixed_bfloat16" if fast else "float32"


@contextlib.contextmanager
def building_for_speed():
    """While it is entered, layers are made to compute as `fast_precision` says. Yields that policy's name (str)."""
    precision = fast_precision()
    keras.config.set_dtype_policy(precision)
    try:
        yield precision
    finally:
        keras.config.set_dtype_policy("float32")


@contextlib.contextmanager
def building_in_float32():
    """While it is entered, layers are made to compute in float32, also inside of `building_for_speed`."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy("float32")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(policy)


def compile_options(steps):
    """Returns keyword arguments of `keras.Model.compile` that make a training of `steps` steps (int) fastest."""
    return {
        # XLA's convolutions are slower than oneDNN's on a CPU under TensorFlow. Under JAX every step is compiled,
        # unless the `supports_jit` of a layer says no; Keras then only warns.
        "jit_compile": keras.backend.backend() == "jax",
        # A loop takes longer to compile than a single step, which a short training never earns back.
        "steps_per_execution": STEPS_PER_EXECUTION if steps >= STEPS_PER_EXECUTION else 1,
    }


def set_weights(model, weights):
    """`keras.Model.set_weights`, after which `Normalization` layers use the new mean and variance, too."""
    model.set_weights(weights)
    for layer in model.layers:
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()


def for_prediction(model):
    """Returns a copy of a float32 `model` that predicts fast here: its convolutions compute as `fast_precision` says.

    Everything else, and the weights, stay float32. Predictions differ from those of `model` by rounding alone, in about
    the third digit.
    """
    precision = fast_precision()
    if precision == "float32":
        return model

    def copy(layer):
        config = layer.get_config()
        if isinstance(layer, keras.layers.Conv2D):
            config["dtype"] = precision
        return type(layer).from_config(config)

    fast = keras.models.clone_model(model, clone_function=copy)
    set_weights(fast, model.get_weights())
    return fast


def environment():
    """Returns a dict with git commit, date, backend, package versions and hardware, for a card."""
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    installed = {package.metadata["Name"].lower() for package in metadata.distributions()}
    return {
        "git_commit": git.stdout.strip() or "not a git checkout",
        "date": datetime.date.today().isoformat(),
        "backend": keras.backend.backend(),
        "precision": fast_precision(),
        "versions": {
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in PACKAGES if name in installed},
        },
        "hardware": hardware(),
    }


def card(script, model, arguments, *, recipe, seed, dataset, pictures, curves, seconds):
    """Returns what the card of every model that a script has just trained says; scripts add their metrics.

    Args:
        script, model: str.
        arguments: the parsed command line.
        recipe: dataclass instance with, among others, `epochs` and `batch_size`.
        seed: int.
        dataset: dict that JSON can hold: name, sizes, checksums.
        pictures: int, how many of them an epoch has.
        curves, seconds: as `fit` returns them.
    """
    return {
        "script": f"{script}.py",
        "model": model,
        "command": arguments.command,
        **environment(),
        "seed": seed,
        "recipe": dataclasses.asdict(recipe),
        "epochs": recipe.epochs,
        "steps": math.ceil(pictures / recipe.batch_size) * recipe.epochs,
        "batch_size": recipe.batch_size,
        "dataset": dataset,
        "shortened": "--quick: a few pictures only" if arguments.quick else None,
        "seconds": round(seconds, 1),
        "curves": curves,
    }


def parameter_counts(model):
    """Returns {"trainable": int, "total": int} for a Keras model."""
    return {"trainable": sum(int(np.prod(v.shape)) for v in model.trainable_variables), "total": model.count_params()}


def round_weights(model, precision="float16"):
    """Rounds the float32 weights of `model` to 16 bits, in place, so that they compress to 60 % of the space or less.

    They stay float32 for Keras. To be called before the model is evaluated.

    Args:
        model: `keras.Model`.
        precision: "float16" (11 significant bits) or "bfloat16" (8, and files that are smaller by a quarter).
    """

    def rounded(weights):
        return keras.ops.convert_to_numpy(keras.ops.cast(keras.ops.cast(weights, precision), "float32"))

    set_weights(model, [rounded(each) if each.dtype == "float32" else each for each in model.get_weights()])


def save_model(model, path, card):
    """Writes `model` to `path` (`<name>.keras`, without optimizer state) and its card beside it (`<name>.json`).

    The file is a zip archive, as Keras wants it, but compressed, which Keras reads as well.

    Args:
        model: uncompiled `keras.Model` of built-in layers.
        path: `pathlib.Path` that ends in ".keras".
        card: dict that JSON can hold. "parameters" and "weights_sha256" are added.
    """
    with replacing(path) as temporary:
        model.save(temporary)
        _compress(temporary)
    card = {**card, "parameters": parameter_counts(model), "weights_sha256": sha256(path)}
    write_json(path.with_suffix(".json"), card)


def _compress(path):
    """Writes the zip archive at `path` again with its members compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def load_model(path):
    """Restores a model that `save_model` wrote.

    Args:
        path: `pathlib.Path` that ends in ".keras".

    Returns:
        The uncompiled `keras.Model` and its card (dict).

    Raises:
        UserError: where weights or card are missing, damaged, or do not belong together.
    """
    again = "get it again from the repository, or make it with --train"
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise UserError(f"{file} is missing; {again}")
    try:
        card = json.loads(path.with_suffix(".json").read_text())
        expected = card["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path.with_suffix('.json')} is not the card of a model; {again}") from error
    if sha256(path) != expected:
        raise UserError(f"{path} is damaged (its checksum differs from the one on its card); {again}")
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True), card
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise UserError(f"Keras {keras.__version__} cannot open {path} ({reason}); see requirements.txt") from error


def saved_models_folder(output_dir, script):
    """The folder `--load` reads: `saved_models/<script>` under `output_dir`, else the one in the repository."""
    folder = Path(output_dir) / "saved_models" / script
    return folder if folder.is_dir() else REPOSITORY / "saved_models" / script


def print_metrics(measured, card=None):
    """Prints a table of metrics, beside the recorded ones where there are any, and marks those that differ.

    With the backend and precision of the card they have to agree to the printed digits, otherwise within half a per
    cent of the recorded value. Processors round bfloat16 sums differently, so there it has to be the same one, too.

    Args:
        measured: dict from metric name to number.
        card: dict, the card of the model; its `metrics["test"]` is what was recorded. Or None.
    """
    width = max(len(name) for name in measured)
    recorded = card["metrics"].get("test", {}) if card else {}
    tolerance = 5e-5
    here = {"backend": keras.backend.backend(), "precision": fast_precision(), "hardware": hardware()}
    deciding = here if here["precision"] == "mixed_bfloat16" else ("backend", "precision")
    if card and any(card[field] != here[field] for field in deciding):
        tolerance = 0.005
        recorded_with = f"{card['backend']} in {card['precision']} on {card['hardware']}"
        print(f"recorded with {recorded_with}; half a per cent of difference is rounding")
    print(f"{'metric':{width}}  measured" + ("  recorded" if recorded else ""))
    for name, value in measured.items():
        line = f"{name:{width}}  {value:8.4f}"
        if name in recorded:
            agrees = abs(value - recorded[name]) <= tolerance * max(1, abs(recorded[name]))
            line += f"  {recorded[name]:8.4f}" + ("" if agrees else "  differs")
        print(line)


def experiments_table(output_dir, script):
    """Path of the CSV table of a script's experiments."""
    return Path(output_dir) / "report" / "results" / f"{script}_experiments.csv"


def read_rows(path):
    """Returns the rows of an experiment table as a list of dicts of str; empty where there is no table yet.

    Raises:
        UserError: where the table is damaged.
    """
    if not Path(path).exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away to start the experiments over") from error
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} has rows of different lengths; move it away to start the experiments over")
    return rows


def append_row(path, row):
    """Adds `row` (dict) to the table at `path`; the file is replaced as a whole, so that it never holds half a row."""
    rows = [*read_rows(path), row]
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
