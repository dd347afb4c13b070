"""AddNIST with fewer than 100,000 parameters and at most 10,000 optimisation steps, in pure JAX.

An image holds three handwritten digits r, g and b in its colour channels, and its class is r + g + b - 1, one of 20
(Geada et al. 2024). The digits themselves are not labelled. Two networks are compared:

    shared     one encoder turns every channel into a distribution over ten digits; the distribution of the sum is the
               convolution of the three, so that the labels of the sums alone train it
    ordinary   one encoder per channel, each with weights of its own, and a hidden layer on top of all three

    python addnist_classifier.py --train           trains five seeds of both, measures and saves them
    python addnist_classifier.py --load            restores the saved ones, compares with the recorded metrics
    python addnist_classifier.py --load --sample   the same on 500 items built from images in the repository
    python addnist_classifier.py --experiments     accuracy against parameters and steps, and what each part is worth

Test accuracy, mean and standard deviation of five seeds, on 2 cores of a Xeon: shared 98.09 +- 0.15 % (47,770
parameters, 4.4 minutes each), ordinary 96.62 +- 0.09 % (96,248 parameters, 4.3 minutes). One file, and nothing but
NumPy, JAX and Optax to train and measure, as the assignment asks. The data are the official arrays where data/addnist/
holds them (doi 10.25405/data.ncl.24574354), and otherwise built from MNIST as published.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends in one line, also during the imports below and inside compiled code
    INTERRUPTED = b"\nerror: interrupted; what was saved stays, continue with --resume\n"
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, INTERRUPTED), os._exit(130)))

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import http.client
import importlib.util
import io
import json
import math
import platform
import shlex
import subprocess
import time
import urllib.request
import zipfile
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Config:  # of a training run
    model: str = "shared"  # "shared", "ordinary", or "mixed": ordinary with one encoder for all three channels
    widths: tuple = (16, 32, 48, 64)  # filters of the four convolutions of an encoder
    hidden: int = 0  # units of the dense layer after the encoders; the shared network has none
    steps: int = 5000  # optimisation steps
    batch_size: int = 64
    learning_rate: float = 3e-3  # the highest, after warm-up and before cosine decay
    weight_decay: float = 1e-2  # decoupled (Loshchilov & Hutter 2019)
    shift: bool = True  # shift each digit at random
    rotation: float = 0.0  # largest angle in degrees by which each digit is rotated at random
    scale: float = 0.0  # largest relative change of the height and width of each digit
    permute: bool = False  # put the channels of each image in a random order, which leaves their sum
    average: float = 0.995  # momentum of the moving average of the weights that is measured and saved


CONFIGS = {
    "shared": Config(),
    "ordinary": Config("ordinary", (12, 24, 36, 48), hidden=96, steps=10_000, learning_rate=1e-2),
}
MODELS, NUM_SEEDS = list(CONFIGS), 5
PARAMETER_LIMIT, STEP_LIMIT = 100_000, 10_000  # fewer than that many parameters, at most that many steps

SCRIPT, REPOSITORY = "addnist_classifier", Path(__file__).resolve().parent
SAMPLE = REPOSITORY / "data" / "samples" / "mnist.npz"
NUM_CLASSES, NUM_DIGITS, CHANNELS, SIDE = 20, 10, 3, 28
ENCODERS = {"shared": [""], "mixed": [""], "ordinary": ["red_", "green_", "blue_"]}  # prefixes of their weights
TRIPLES = np.array([digits for digits in np.ndindex(10, 10, 10) if 1 <= sum(digits) <= NUM_CLASSES])  # (915, 3)
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081
SIZES = {"train": 45_000, "valid": 15_000, "test": 10_000}
DATA_SEED = 2024  # of the dataset that is built from MNIST
MAX_SHIFT = 2  # pixels
STEPS_PER_CALL = 500  # optimisation steps in one compiled call; after each there is a checkpoint and a snapshot
EVALUATION_BATCH = 500
CURVE_ITEMS = 5000  # of each split, which the learning curves are measured on
CALIBRATION_ITEMS = 2000  # of the training set, over which the normalisation of finished networks is measured
CURVES = ("step", "loss", "train_accuracy", "valid_accuracy")
TOLERANCE, TOLERANCE_ELSEWHERE = 5e-4, 5e-3  # of metrics on the platform they were recorded on, and on another
MNIST_MIRROR = "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST_FILES = {  # array: (official file, MD5)
    "train_images": ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
    "train_labels": ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
    "test_images": ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
    "test_labels": ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
}
OFFICIAL_ARCHIVE = "https://data.ncl.ac.uk/ndownloader/articles/24574354/versions/1"
OFFICIAL_ADVICE = "get all six official arrays from https://doi.org/10.25405/data.ncl.24574354"
TABLE_ADVICE = "move it away to start the experiments over"
AGAIN = "finish an interrupted run with --train --resume, or get weights and card again from the repository"
Split = namedtuple("Split", "images labels digits")  # uint8 (n, 3, 28, 28), int32 (n,) 0 to 19, int32 (n, 3) or None
State = namedtuple("State", "parameters average optimizer key step")  # of a training run; average of the parameters


class UserError(Exception):
    """A failure that the user can fix. Its text is one line: what happened; what to do."""


# ---------------------------------------------------------------------------------------------------------------- data
def load_data(data_dir, quick=False, sample=False):
    """Returns AddNIST, a dict of `Split` ("train", "valid", "test"), and what it was made of (str)."""
    sizes = dict.fromkeys(SIZES, 500) if quick or sample else SIZES
    if sample:
        with reading(SAMPLE, "get it again from the repository"):
            mnist = checked_mnist([np.load(SAMPLE)[name] for name in MNIST_FILES])
        return build_from_mnist(mnist, sizes), "built from the MNIST sample"
    if any((data_dir / "addnist").glob("*.npy")):
        return load_official(data_dir / "addnist", sizes), "official"
    return build_from_mnist(load_mnist(data_dir), sizes), "built from MNIST"


def build_split(images, digits, count, seed):
    """Draws `count` items from images (m, 28, 28) of `digits` (m,), uniformly: class, then triple, then images."""
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat(np.arange(NUM_CLASSES), count // NUM_CLASSES))
    chosen = np.empty((len(labels), CHANNELS), int)
    for label in range(NUM_CLASSES):
        of_label = TRIPLES[TRIPLES.sum(axis=1) - 1 == label]
        chosen[labels == label] = of_label[generator.integers(len(of_label), size=np.sum(labels == label))]
    drawn = np.empty_like(chosen)
    for digit in range(NUM_DIGITS):
        of_digit = np.flatnonzero(digits == digit)
        drawn[chosen == digit] = of_digit[generator.integers(len(of_digit), size=np.sum(chosen == digit))]
    return Split(images[drawn], labels.astype("int32"), chosen.astype("int32"))


def build_from_mnist(mnist, sizes):
    """Builds a dict of `Split` no two of which share an image of a digit: a sixth of those for training is held out."""
    # In the original, training and validation draw from the same images, so that many of their items are the same.
    images, digits, *test = mnist
    held_out, rest = np.split(np.random.default_rng(DATA_SEED).permutation(len(images)), [len(images) // 6])
    drawn = {"train": (images[rest], digits[rest]), "valid": (images[held_out], digits[held_out]), "test": test}
    return {name: build_split(*drawn[name], sizes[name], DATA_SEED + n) for n, name in enumerate(drawn, start=1)}


def load_mnist(data_dir):
    """Returns images (m, 28, 28) and digits (m,) of the training set of MNIST, then of its test set."""
    cache, folder, arrays = data_dir / "cache" / "mnist", data_dir / "mnist", []
    if (cache / "manifest.json").exists():  # written last
        with reading(cache, f"delete {cache}, so that MNIST is prepared again"):  # the cache of the other scripts
            checksums = json.loads((cache / "manifest.json").read_text("utf-8"))["sha256"]
            for name in MNIST_FILES:
                if hashlib.sha256((cache / f"{name}.npy").read_bytes()).hexdigest() != checksums[name]:
                    raise ValueError(f"the checksum of {name}.npy is not the one in manifest.json")
                arrays.append(np.load(cache / f"{name}.npy"))
            return checked_mnist(arrays)
    with reading(folder, f"delete {folder}, so that MNIST is downloaded again, or add --sample"):
        if any(folder.glob("*/dataset_info.json")) and importlib.util.find_spec("tensorflow_datasets"):
            library = importlib.import_module("tensorflow_datasets")
            splits = library.as_numpy(library.load("mnist", data_dir=data_dir, download=False, batch_size=-1))
            return checked_mnist([splits[split][field] for split in ("train", "test") for field in ("image", "label")])
        for name, checksum in MNIST_FILES.values():
            if not (folder / name).exists():
                download(MNIST_MIRROR + name, folder / name, "or add --sample")
            content = (folder / name).read_bytes()
            if hashlib.md5(content).hexdigest() != checksum:
                raise ValueError(f"{name} has another checksum than the official one")
            values = np.frombuffer(gzip.decompress(content), np.uint8)
            arrays.append(values[16:].reshape(-1, SIDE, SIDE, 1) if "images" in name else values[8:].astype(int))
        return checked_mnist(arrays)


def checked_mnist(arrays):
    """Returns `arrays` without the channel axis of images; raises ValueError where they are not like MNIST."""
    for images, digits in (arrays[:2], arrays[2:]):
        shapes = digits.ndim == 1 and images.shape == (len(digits), SIDE, SIDE, 1) and images.dtype == np.uint8
        if not (shapes and np.array_equal(np.unique(digits), np.arange(NUM_DIGITS))):
            raise ValueError("it does not hold images of 28 x 28 bytes and their labels, all of 0 to 9")
    return arrays[0][..., 0], arrays[1], arrays[2][..., 0], arrays[3]


def load_official(folder, sizes):
    """Returns the official arrays, whose normalisation is undone, cut to `sizes`: dict of `Split`."""
    splits = {}
    for name, size in SIZES.items():
        with reading(folder / f"{name}_[xy].npy", OFFICIAL_ADVICE):
            images, labels = (np.load(folder / f"{name}_{part}.npy") for part in ("x", "y"))
            if images.shape != (size, CHANNELS, SIDE, SIDE) or labels.shape != (size,):
                raise ValueError(f"shapes {images.shape} and {labels.shape}, not ({size}, 3, 28, 28) and ({size},)")
            images, labels = (images[: sizes[name]] * MNIST_DEVIATION + MNIST_MEAN) * 255, labels[: sizes[name]]
            if not np.isin(labels, np.arange(NUM_CLASSES)).all():
                raise ValueError("labels other than 0 to 19")
            if not (np.isfinite(images).all() and images.min() > -2 and images.max() < 257):
                raise ValueError("images are not normalised as AddNIST is")
            splits[name] = Split(np.rint(np.clip(images, 0, 255)).astype("uint8"), labels.astype("int32"), None)
    return splits


def download(url, path, otherwise):
    """Downloads `url` to `path`; `otherwise` ends the `UserError` where that fails."""
    print(f"downloading {url}")
    try:
        with urllib.request.urlopen(url, timeout=15) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as error:
        reason = f"{path.name} is not in {path.parent} and cannot be downloaded ({error})"
        raise UserError(f"{reason}; put {url} by hand into {path.parent}, {otherwise}") from error
    return write_file(path, content)


def download_official(folder):
    """Downloads the official archive and unpacks its six arrays into `folder`."""
    archive = download(OFFICIAL_ARCHIVE, folder / "addnist.zip", "unpack it there, or use MNIST instead")
    with reading(archive, f"delete it and {OFFICIAL_ADVICE}"), zipfile.ZipFile(archive) as files:
        for member in files.namelist():
            if Path(member).name in {f"{split}_{part}.npy" for split in SIZES for part in ("x", "y")}:
                write_file(folder / Path(member).name, files.read(member))
    archive.unlink()
    load_official(folder, SIZES)
    print(f"the official AddNIST is in {folder}")


# --------------------------------------------------------------------------------------------------------------- model
def init_model(key, config):
    """Returns fresh parameters of the network that `config` describes: dict of float32 arrays."""
    parameters = {}

    def add_layer(key, name, shape):  # weights that a normalisation follows
        parameters[f"kernel_{name}"] = math.sqrt(2 / math.prod(shape[:-1])) * jax.random.normal(key, shape)  # He 2015
        parameters[f"gain_{name}"], parameters[f"bias_{name}"] = jnp.ones(shape[-1]), jnp.zeros(shape[-1])

    prefixes = ENCODERS[config.model]
    for prefix, subkey in zip(prefixes, jax.random.split(key, CHANNELS) if len(prefixes) > 1 else [key], strict=True):
        in_channels = CHANNELS if config.model == "mixed" else 1
        for number, (filters, size) in enumerate(zip(config.widths, (5, 3, 3, 3), strict=True)):
            subkey, layer_key = jax.random.split(subkey)
            add_layer(layer_key, f"{prefix}{number}", (size, size, in_channels, filters))
            in_channels = filters
    if config.model != "shared":
        add_layer(jax.random.fold_in(key, 1), "hidden", (len(prefixes) * config.widths[-1], config.hidden))
    shape = (config.widths[-1], NUM_DIGITS) if config.model == "shared" else (config.hidden, NUM_CLASSES)
    return parameters | {"dense": jnp.zeros(shape), "dense_bias": jnp.zeros(shape[-1])}


def convolution(features, kernel, stride):
    """A convolution with "same" padding of (n, side, side, channels) by (size, size, channels, filters)."""
    # A matrix product of shifted copies: on a CPU ten times as fast as `conv_general_dilated` and its gradients.
    size, side = kernel.shape[0], features.shape[1]
    reach = (-(-side // stride) - 1) * stride + 1
    padding = max(reach - 1 + size - side, 0)
    pad = padding // 2, padding - padding // 2
    padded = jnp.pad(features, ((0, 0), pad, pad, (0, 0)))
    shifts = [padded[:, i : i + reach : stride, j : j + reach : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def sum_log_probabilities(digit_log_probabilities):
    """From distributions of three independent digits, (n, 3, 10), to that of the class, (n, 20), all logarithms."""
    red, green, blue = jnp.moveaxis(jnp.exp(digit_log_probabilities), 1, 0)
    two = jax.vmap(jnp.convolve)(red, green)  # sums 0 to 18
    three = jax.vmap(jnp.convolve)(two, blue)  # sums 0 to 27
    classes = three[:, 1 : NUM_CLASSES + 1] + 1e-12  # other sums do not occur in AddNIST
    return jnp.log(classes) - jnp.log(classes.sum(axis=1, keepdims=True))


@jax.jit(static_argnames="model")
def forward(parameters, images, model):
    """Returns log probabilities of classes (n, 20) and, if shared, digits (n, 3, 10), and moments of every filter.

    A finished network has the moments among its `parameters`; others use those of the batch, uint8 (n, 3, 28, 28).
    """
    moments = {}

    def normalized(features, name):  # batch normalisation (Ioffe & Szegedy 2015), then ReLU
        axes = tuple(range(features.ndim - 1))
        mean = moments[f"mean_{name}"] = parameters.get(f"mean_{name}", features.mean(axes))
        variance = parameters.get(f"variance_{name}", jnp.square(features - mean).mean(axes))
        moments[f"variance_{name}"] = variance
        scale = parameters[f"gain_{name}"] * jax.lax.rsqrt(variance + 1e-5)
        return jax.nn.relu((features - mean) * scale + parameters[f"bias_{name}"])

    def encoder(images, prefix):  # from (n, 28, 28, channels) to (n, widths[-1])
        features = (images.astype("float32") / 255 - MNIST_MEAN) / MNIST_DEVIATION
        for number, stride in enumerate((2, 2, 2, 1)):
            features = convolution(features, parameters[f"kernel_{prefix}{number}"], stride)
            features = normalized(features, f"{prefix}{number}")
        return features.mean(axis=(1, 2))

    if model == "shared":
        logits = encoder(images.reshape(-1, SIDE, SIDE, 1), "") @ parameters["dense"] + parameters["dense_bias"]
        digits = jax.nn.log_softmax(logits).reshape(-1, CHANNELS, NUM_DIGITS)
        return sum_log_probabilities(digits), digits, moments
    channels = jnp.split(jnp.moveaxis(images, 1, -1), len(ENCODERS[model]), axis=-1)
    features = [encoder(part, prefix) for part, prefix in zip(channels, ENCODERS[model], strict=True)]
    hidden = normalized(jnp.concatenate(features, axis=-1) @ parameters["kernel_hidden"], "hidden")
    return jax.nn.log_softmax(hidden @ parameters["dense"] + parameters["dense_bias"]), None, moments


def calibrated(parameters, images, model):
    """Returns `parameters` with the mean and variance of each filter over `images`: batches no longer matter."""
    return {**parameters, **forward(parameters, images, model)[2]}


def layout(config):
    """Returns shape and type of every finished weight of a network, a dict like what `calibrated` returns."""
    images = jax.ShapeDtypeStruct((2, CHANNELS, SIDE, SIDE), np.uint8)
    return jax.eval_shape(lambda x: calibrated(init_model(jax.random.key(0), config), x, config.model), images)


def penalty(num_parameters, steps):
    """Marks that the brief takes off: 5 for each begun tenth above 99,999 parameters and above 10,000 steps."""
    too_large = math.ceil((num_parameters - PARAMETER_LIMIT) / (PARAMETER_LIMIT // 10))
    too_long = math.ceil((steps - STEP_LIMIT) / (STEP_LIMIT // 10))
    return 5 * (max(too_large, int(num_parameters == PARAMETER_LIMIT)) + max(too_long, 0))


# ------------------------------------------------------------------------------------------------- losses and training
def augmented(images, key, permute_key, config):
    """Shifts, rotates and scales each digit at random, as far as `config` says; black comes in from outside."""
    flat = images.reshape(-1, SIDE, SIDE)
    count, center = len(flat), (SIDE - 1) / 2
    if config.shift:
        padded = jnp.pad(flat, ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT)))
        corners = jax.random.randint(key, (count, 2), 0, 2 * MAX_SHIFT + 1)
        flat = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, (SIDE, SIDE)))(padded, corners)
    if config.rotation or config.scale:
        angle_key, scale_key = jax.random.split(jax.random.fold_in(key, 1))
        angles = jax.random.uniform(angle_key, (count, 1, 1), minval=-1, maxval=1) * math.radians(config.rotation)
        scales = 1 + jax.random.uniform(scale_key, (count, 2, 1, 1), minval=-1, maxval=1) * config.scale
        down, right = (jnp.arange(SIDE) - center)[:, None], (jnp.arange(SIDE) - center)[None, :]
        rows = (jnp.cos(angles) * down - jnp.sin(angles) * right) * scales[:, 0] + center
        columns = (jnp.sin(angles) * down + jnp.cos(angles) * right) * scales[:, 1] + center
        sample = jax.vmap(lambda image, y, x: jax.scipy.ndimage.map_coordinates(image, [y, x], order=1))
        flat = jnp.rint(sample(flat.astype("float32"), rows, columns)).astype("uint8")
    images = flat.reshape(images.shape)
    if config.permute:
        order = jnp.argsort(jax.random.uniform(permute_key, images.shape[:2]), axis=1)
        images = jnp.take_along_axis(images, order[:, :, None, None], axis=1)
    return images


def make_optimizer(config):
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(config.steps // 20, 1), config.steps)
    return optax.adamw(schedule, weight_decay=config.weight_decay)


@jax.jit(static_argnames=("config", "steps"))
def advance(state, images, labels, config, steps):
    """Takes optimisation steps, all in one compiled call; returns the next `State` and the mean loss."""
    optimizer = make_optimizer(config)

    def loss(parameters, images, labels):
        return -jnp.take_along_axis(forward(parameters, images, config.model)[0], labels[:, None], axis=1).mean()

    def step(state, _):
        key, batch_key, shift_key, permute_key = jax.random.split(state.key, 4)
        chosen = jax.random.randint(batch_key, (config.batch_size,), 0, len(labels))
        batch = augmented(images[chosen], shift_key, permute_key, config)
        value, gradient = jax.value_and_grad(loss)(state.parameters, batch, labels[chosen])
        update, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, update)
        # At first the average follows closely, so that it forgets the initial weights.
        momentum = jnp.minimum(config.average, (state.step + 1) / (state.step + 10))
        average = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, state.average, parameters)
        return State(parameters, average, optimizer_state, key, state.step + 1), value

    state, losses = jax.lax.scan(step, state, length=steps)
    return state, losses.mean()


def train_network(config, splits, seed, *, folder, resume):
    """Trains on "train", with checkpoints in `folder`: weights and learning curves of all snapshots, and seconds."""
    key, subkey = jax.random.split(jax.random.PRNGKey(seed))
    parameters, checkpoint = init_model(subkey, config), folder / "checkpoint.npz"
    state = State(parameters, parameters, make_optimizer(config).init(parameters), key, jnp.zeros((), int))
    snapshots, curves, seconds = [], {name: [] for name in CURVES}, 0.0
    settings = dataclasses.asdict(config) | {"widths": list(config.widths), "seed": seed}
    settings |= {"data": checksum_of([splits["train"]])}
    if resume and checkpoint.exists():
        state, snapshots, curves, seconds = restore_checkpoint(checkpoint, settings, state, config)
        print(f"resuming after step {int(state.step):,}")
    images, labels = jnp.asarray(splits["train"].images), jnp.asarray(splits["train"].labels)
    while int(state.step) < config.steps:
        started = time.time()
        state, value = advance(state, images, labels, config, min(STEPS_PER_CALL, config.steps - int(state.step)))
        parameters = calibrated(state.average, images[:CALIBRATION_ITEMS], config.model)
        values = [int(state.step), float(value)]
        values += [accuracy(parameters, splits[name], config.model, CURVE_ITEMS) for name in ("train", "valid")]
        if not math.isfinite(value):
            raise UserError("the loss is no longer a finite number; lower the learning rate or try another --seed")
        curves = {name: [*curves[name], value] for name, value in zip(CURVES, values, strict=True)}
        snapshots.append({name: np.asarray(array) for name, array in parameters.items()})
        seconds += time.time() - started
        about = json.dumps({"settings": settings, "curves": curves, "seconds": seconds})
        leaves = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves((state, snapshots)))}
        write_file(checkpoint, {"about": np.array(about), **leaves})
        progress = f"{config.model}, seed {seed}, step {values[0]:,} of {config.steps:,}: loss {values[1]:.4f}"
        print(f"\r{progress}, validation accuracy {values[3]:.2%}", end="", flush=True)
    print()
    return snapshots, curves, seconds


def restore_checkpoint(path, settings, fresh, config):
    """Returns state, snapshots, curves and seconds of a checkpoint; `fresh` is a state with the same shapes."""
    with reading(path, "start over without --resume"):
        arrays = dict(np.load(path))
        about = json.loads(str(arrays.pop("about")))
        if changed := [name for name in settings if about["settings"][name] != settings[name]]:
            raise UserError(f"{path} was made with other settings ({', '.join(changed)}); use those, or no --resume")
        curves = {name: np.array(values, float) for name, values in about["curves"].items()}
        template = fresh, [layout(config)] * len(curves["step"])
        expected = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(template))}
        check_arrays(arrays | curves, expected | dict.fromkeys(CURVES, np.zeros(len(curves["step"]))))
        state, snapshots = jax.tree.unflatten(jax.tree.structure(template), [jnp.asarray(arrays[n]) for n in expected])
        return state, snapshots, about["curves"], float(about["seconds"])


# --------------------------------------------------------------------------------------------------------------- files
def write_file(path, content):
    """Writes bytes, arrays (`.npz`) or JSON under a temporary name that becomes `path`, never half. Returns `path`."""
    if path.suffix == ".npz":
        buffer = io.BytesIO()
        np.savez(buffer, **content)
        content = buffer.getvalue()
    elif path.suffix == ".json":
        content = (json.dumps(content, indent=1) + "\n").encode()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        reason = f"{error.strerror or error}; free some space or choose another --output-dir"
        raise UserError(f"cannot write {path}: {reason}") from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def reading(path, advice):
    """Everything that a missing or damaged file raises within the block becomes a `UserError` that ends in `advice`."""
    try:
        yield
    except Exception as error:  # libraries raise dozens of kinds; none is hidden
        if isinstance(error, UserError):
            raise
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error!r:.120})"
        raise UserError(f"{getattr(error, 'filename', None) or path} {reason}; {advice}") from error


def prepare_output(output_dir):
    """Raises `UserError` where a training run could not be written; removes what killed processes left behind."""
    for folder in (output_dir / "saved_models" / SCRIPT, output_dir / "report", output_dir / "runs" / SCRIPT):
        for path in folder.rglob(".*.*"):
            with contextlib.suppress(ValueError, OSError, OverflowError):  # not ours
                try:
                    os.kill(int(path.name.split(".")[1]), 0)
                except ProcessLookupError:
                    path.unlink(missing_ok=True)
    write_file(output_dir / f".space.{os.getpid()}", bytes(10_000_000)).unlink()  # about what one training run writes


def check_arrays(arrays, expected):
    """Raises an error where `arrays` have other names, shapes or types than `expected`, or no finite numbers."""
    for name in arrays.keys() | expected.keys():
        array, like = arrays[name], expected[name]
        if (array.shape, array.dtype) != (like.shape, like.dtype) or not np.isfinite(array).all():
            raise ValueError(f"{name} has another shape or type, or numbers that are not finite")


def load_network(path):
    """Returns saved weights (dict of arrays) and their card, which has all that results and figures need."""
    with reading(path.with_suffix(".*"), AGAIN):
        card = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if (card["script"], card["model"], type(card["platform"])) != (f"{SCRIPT}.py", path.stem, str):
            raise ValueError("its card belongs to another network")
        if hashlib.sha256(path.read_bytes()).hexdigest() != card["weights_sha256"]:
            raise ValueError("the checksum of the weights is not the one on their card")
        json.dumps([card["seeds"][str(card["seed"])], card["metrics"], model_results(card)], allow_nan=False)
        config = Config(**{**card["config"], "widths": tuple(card["config"]["widths"])})
        curves = {name: np.array(values, float) for name, values in card["curves"].items()}
        lengths = dict.fromkeys([*CURVES, "test_accuracy"], np.zeros(len(curves["step"])))
        parameters = dict(np.load(path))
        check_arrays(parameters | curves, layout(config) | lengths)
        return parameters, card


def environment():
    """Returns what a card says about where it was made."""
    commit, device = "unknown: not a git checkout", jax.devices()[0]
    hardware = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # git is not installed
        command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or commit
    with contextlib.suppress(OSError, IndexError):  # not Linux on an x86 processor
        hardware = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    hardware = f"{hardware}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
    about = {"git_commit": commit, "date": time.strftime("%Y-%m-%d"), "backend": "jax", "platform": device.platform}
    versions = {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__}
    return about | {"versions": versions, "hardware": hardware}


# ---------------------------------------------------------------------------------------------------------- evaluation
def predict(parameters, images, model):
    """Returns log probabilities of the classes (n, 20) and, from the shared network, the digits (n, 3) or None."""
    starts = range(0, len(images), EVALUATION_BATCH)
    outputs = [forward(parameters, images[start : start + EVALUATION_BATCH], model)[:2] for start in starts]
    digits = np.concatenate([digits.argmax(-1) for _, digits in outputs]) if model == "shared" else None
    return np.concatenate([classes for classes, _ in outputs]), digits


def accuracy(parameters, split, model, count=None):
    return float(np.mean(predict(parameters, split.images[:count], model)[0].argmax(1) == split.labels[:count]))


def measure(parameters, splits, model):
    """Measures a network on every split: dict from split to metric to float, and what `predict` says of the last."""
    metrics = {}
    for name, split in splits.items():
        classes, digits = predict(parameters, split.images, model)
        loss = -classes[np.arange(len(classes)), split.labels].mean()
        metrics[name] = {"accuracy": float(np.mean(classes.argmax(1) == split.labels)), "loss": float(loss)}
        if digits is not None and split.digits is not None and name in ("test", "sample"):
            metrics[name]["digit_accuracy"] = float(np.mean(digits == split.digits))
    return metrics, (classes, digits)


def checksum_of(splits):
    """SHA-256 of images and labels, split by split."""
    return hashlib.sha256(b"".join(array.tobytes() for split in splits for array in split[:2])).hexdigest()


def model_results(card):
    """Returns what the results say about one network."""
    summary = {"number": len(card["seeds"])}
    for part, name in [(part, name) for part in SIZES for name in ("accuracy", "loss")]:
        values = [seed["metrics"][part][name] for seed in card["seeds"].values()]
        deviation = np.std(values, ddof=1) if len(values) > 1 else 0
        summary[f"{part}_{name}"] = {"mean": float(np.mean(values)), "std": float(deviation)}
    about = {name: card[name] for name in ("steps", "penalty", "hardware", "shortened")}
    about |= {"parameters": card["parameters"]["trainable"], "minutes": round(card["seconds"] / 60, 1)}
    return {part: card["metrics"][part] for part in SIZES} | about | {"seeds": summary, "data": card["dataset"]["name"]}


def write_results(output_dir):
    """Writes report/results/addnist_classifier.json from the cards of the saved networks and the experiments."""
    paths = [output_dir / "saved_models" / SCRIPT / f"{model}.npz" for model in MODELS]
    models = {path.stem: model_results(load_network(path)[1]) for path in paths if path.exists()}
    results = {"script": f"{SCRIPT}.py", "models": models, "test": next(iter(models.values()))["test"]}
    results["experiments"] = compared_experiments(output_dir)
    results |= {name: value for name, value in results["test"].items() if name == "digit_accuracy"}
    return write_file(output_dir / "report" / "results" / f"{SCRIPT}.json", results)


# -------------------------------------------------------------------------------------------------------------- report
def with_flags(config, arguments, splits):
    batch_size = arguments.batch_size or config.batch_size
    steps = arguments.epochs * math.ceil(len(splits["train"].labels) / batch_size) if arguments.epochs else config.steps
    return dataclasses.replace(config, batch_size=batch_size, steps=min(steps, 20) if arguments.quick else steps)


def optional(folder):
    """Returns this script's module in plots/ or experiments/, or None, with one line, where it is missing."""
    try:
        return importlib.import_module(f"{folder}.{SCRIPT}")
    except ModuleNotFoundError as error:
        print(f"{'figures' if folder == 'plots' else folder} are skipped: {error}")


def compared_experiments(root):
    """Returns what experiments/ says about the table below `root`: dict from the name of an experiment to a dict."""
    table = root / "report" / "results" / f"{SCRIPT}_experiments.csv"
    module = optional("experiments") if table.exists() else None
    with reading(table, TABLE_ADVICE):
        return module.compare(table.read_text("utf-8")) if module else {}


def run_experiments(arguments):
    """Trains every planned configuration that the table has no row of, and measures it on validation."""
    module, table = optional("experiments"), arguments.output_dir / "report" / "results" / f"{SCRIPT}_experiments.csv"
    if not module:
        raise UserError("there is nothing to run; get experiments/ from the repository")
    splits, _ = load_data(arguments.data_dir, arguments.quick, arguments.sample)
    with reading(table, TABLE_ADVICE):
        left = module.unfinished(table.read_text("utf-8") if table.exists() else "", arguments.models, arguments.seed)
    for number, (name, seed, fields) in enumerate(left[: 2 if arguments.quick else None]):
        print(f"{len(left) - number} runs left: {name}, seed {seed}")
        config, folder = with_flags(Config(**fields), arguments, splits), arguments.output_dir / "runs" / SCRIPT
        snapshots, curves, seconds = train_network(config, splits, seed, folder=folder / "experiment", resume=False)
        row = {"name": name, "seed": seed, **dataclasses.asdict(config)}
        row |= {"parameters": sum(array.size for array in snapshots[-1].values()), "seconds": round(seconds, 1)}
        row |= {name: round(curves[name][-1], 5) for name in ("loss", "train_accuracy")}
        row["valid_accuracy"] = round(accuracy(snapshots[-1], splits["valid"], config.model), 5)
        with reading(table, TABLE_ADVICE):  # again: another process may have added rows
            text = module.with_row(table.read_text("utf-8") if table.exists() else "", row)
        write_file(table, text.encode())
    print(module.summary(compared_experiments(arguments.output_dir)), f"finished runs are in {table}", sep="\n")


def train(arguments):
    """Trains all seeds of the chosen networks; saves the weights of the first, and the metrics of all on its card."""
    splits, source = load_data(arguments.data_dir, arguments.quick, arguments.sample)
    sample = load_data(arguments.data_dir, sample=True)[0]["test"] if SAMPLE.exists() else splits["test"]
    parts, trained = {**splits, "sample": sample}, {}
    configs = {model: with_flags(CONFIGS[model], arguments, splits) for model in arguments.models}
    seeds = range(arguments.seed, arguments.seed + (1 if arguments.quick else NUM_SEEDS))
    for model, seed in [(model, seed) for model in configs for seed in seeds]:
        folder = arguments.output_dir / "runs" / SCRIPT / f"{model}_seed_{seed}"
        trained[model, seed] = train_network(configs[model], splits, seed, folder=folder, resume=arguments.resume)
    # The test images are read from here on, after the last training run.
    dataset = {"name": f"AddNIST, {source}", **{name: len(split.labels) for name, split in parts.items()}}
    dataset |= {"sha256": checksum_of(splits.values()), "sample_sha256": checksum_of([sample])}
    for model, config in configs.items():
        of_seeds = {}
        for seed in seeds:
            snapshots, _, seconds = trained[model, seed]
            of_seeds[str(seed)] = {"seconds": seconds, "metrics": measure(snapshots[-1], parts, model)[0]}
        snapshots, curves, _ = trained[model, arguments.seed]
        curves["test_accuracy"] = [accuracy(snapshot, splits["test"], model) for snapshot in snapshots]
        path = write_file(arguments.output_dir / "saved_models" / SCRIPT / f"{model}.npz", snapshots[-1])
        count = sum(array.size for array in snapshots[-1].values())
        card = {"script": f"{SCRIPT}.py", "model": model, "command": arguments.command, **environment()}
        card |= {"seed": arguments.seed, "config": dataclasses.asdict(config), "dataset": dataset}
        card |= {"epochs": round(config.steps * config.batch_size / len(splits["train"].labels), 1)}
        card |= {"steps": config.steps, "batch_size": config.batch_size, "penalty": penalty(count, config.steps)}
        card |= {"parameters": {"trainable": count, "total": count}, **of_seeds[str(arguments.seed)], "seeds": of_seeds}
        card |= {"shortened": "a few items only" if arguments.quick or arguments.sample else None, "curves": curves}
        card["weights_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        write_file(path.with_suffix(".json"), card)
    print(f"wrote {write_results(arguments.output_dir)}")


def report(arguments):
    """Measures the saved networks beside the recorded metrics, and draws the figures. Returns the exit code."""
    own = arguments.record or (arguments.output_dir / "saved_models" / SCRIPT).is_dir()
    root = arguments.output_dir if own else REPOSITORY
    folder = root / "saved_models" / SCRIPT
    print(f"networks from {folder}")
    restored = {model: load_network(folder / f"{model}.npz") for model in arguments.models}
    splits, source = load_data(arguments.data_dir, arguments.quick, arguments.sample)
    parts, key = ({"sample": splits["test"]}, "sample_sha256") if arguments.sample else (splits, "sha256")
    sizes, checksum = {name: len(split.labels) for name, split in parts.items()}, checksum_of(parts.values())
    rows, predicted, written = [], {}, []
    for model, (parameters, card) in restored.items():
        metrics, predicted[model] = measure(parameters, parts, model)
        same_data = card["dataset"].get(key) == checksum
        if not same_data:
            print(f"{model}: not compared, as its card is about other items than these ({source}; {sizes})")
        tolerance = TOLERANCE if card["platform"] == jax.default_backend() else TOLERANCE_ELSEWHERE
        for part, name in [(part, name) for part, values in metrics.items() for name in values]:
            value, recorded = metrics[part][name], card["metrics"].get(part, {}).get(name) if same_data else None
            row = {"task": "AddNIST", "model": model, "part": part, "metric": name, "measured": value}
            agrees = None if recorded is None else abs(value - recorded) <= tolerance
            rows.append(row | {"recorded": recorded, "agrees": agrees, "tolerance": tolerance})
        if arguments.record:
            if not (same_data or arguments.sample):
                raise UserError(f"{model} was trained with other data; --record needs the same, or --train anew")
            for about in (card, card["seeds"][str(card["seed"])]):
                about["metrics"] |= metrics
            card["dataset"] |= sizes | {key: checksum}
            written.append(write_file(folder / f"{model}.json", card))
    if not (arguments.record and arguments.sample):  # which writes nothing but the cards
        written += [write_results(root)] if arguments.record else []
        plots = optional("plots")
        drawn = compared_experiments(root), splits, predicted, {m: card["curves"] for m, (_, card) in restored.items()}
        written += plots.draw(*drawn, arguments.output_dir / "report" / "figures" / SCRIPT) if plots else []
    print(f"\n{'model':8}  {'metric':21}  measured  recorded (numbers agree where they differ by {tolerance} at most)")
    for r in rows:
        known = f"  {r['recorded']:8.4f}  {'agrees' if r['agrees'] else 'DIFFERS'}" if r["agrees"] is not None else ""
        print(f"{r['model']:8}  {r['part'] + ' ' + r['metric'].replace('_', ' '):21}  {r['measured']:8.4f}{known}")
    content = {"script": f"{SCRIPT}.py", "command": arguments.command, "rows": rows}
    written.append(write_file(arguments.output_dir / "runs" / SCRIPT / "verification.json", content))
    print("\nwrote", *written, sep="\n  ")
    return int(any(row["agrees"] is False for row in rows))


# ---------------------------------------------------------------------------------------------------------------- main
def main(argv=None):
    """Does what the command line says; the flags are those of all scripts of the collection. Returns the exit code."""
    flags = argparse.ArgumentParser(prog=f"{SCRIPT}.py", description=__doc__, allow_abbrev=False)
    flags.formatter_class = argparse.RawDescriptionHelpFormatter

    def error(message):
        raise UserError(f"{message}; see {flags.prog} --help")

    flags.error = error
    mode = flags.add_mutually_exclusive_group(required=True)
    switch, number, path = {"action": "store_true"}, {"type": int, "metavar": "N"}, {"type": Path, "metavar": "DIR"}
    data = path | {"default": os.environ.get("DATA_DIR", REPOSITORY / "data")}
    mode.add_argument("--train", **switch, help="build, fit, measure, save, write results and figures")
    text = "restore from saved_models/, measure, compare with the recorded numbers, write figures"
    mode.add_argument("--load", **switch, help=text)
    mode.add_argument("--experiments", **switch, help="the comparison behind the choices (resumable)")
    mode.add_argument("--download", **switch, help="fetch the official AddNIST arrays into DATA_DIR/addnist")
    flags.add_argument("--model", choices=MODELS, help="one of the models (default: all)")
    flags.add_argument("--quick", **switch, help="a few batches into runs/quick/: proves that it works")
    flags.add_argument("--sample", **switch, help="use the images in data/samples/ instead of the full dataset")
    flags.add_argument("--epochs", **number, help="passes over the training images")
    flags.add_argument("--batch-size", **number, help="examples per optimisation step")
    flags.add_argument("--seed", **number, default=0, help="seed of everything random (default: 0)")
    flags.add_argument("--resume", **switch, help="resume a stopped training run from its last checkpoint")
    flags.add_argument("--record", **switch, help="with --load: write the measured numbers down (authors)")
    flags.add_argument("--data-dir", **data, help="where datasets are kept (default: $DATA_DIR, else data)")
    text = "where everything is written, and models are looked for first (default: the repository; runs/quick with "
    flags.add_argument("--output-dir", **path, help=text + "--quick, runs/sample with --sample)")
    arguments = flags.parse_args(argv)
    for name, low, high in (("epochs", 1, 100_000), ("batch_size", 1, 100_000), ("seed", 0, 2**32 - 1)):
        value = getattr(arguments, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} is not a whole number from {low} to {high}")
    if arguments.resume and arguments.load:
        raise UserError("--resume continues a training run, but --load never trains; leave one of them out")
    if arguments.record and (arguments.quick or not arguments.load):
        raise UserError("--record writes down what --load measures; use it with --load and without --quick")
    if (arguments.epochs or arguments.batch_size) and not arguments.train:
        raise UserError("--epochs and --batch-size are about training runs of --train; leave them out")
    default = "runs/quick" if arguments.quick else "runs/sample" if arguments.sample and not arguments.record else ""
    arguments.output_dir = arguments.output_dir or REPOSITORY / default
    for folder in (arguments.data_dir, arguments.output_dir):
        if folder.is_file():
            raise UserError(f"{folder} is a file; name a folder")
    arguments.models = [arguments.model] if arguments.model else MODELS
    arguments.command = shlex.join(["python", flags.prog, *(sys.argv[1:] if argv is None else map(str, argv))])
    if arguments.download:
        return download_official(arguments.data_dir / "addnist")
    prepare_output(arguments.output_dir)
    if arguments.experiments:
        return run_experiments(arguments)
    if arguments.train:
        train(arguments)
    return report(arguments)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode must not end a training run
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except Exception as error:
        if type(error).__name__ != "UserError":  # the one of common/, which plots/ use, is another class
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
