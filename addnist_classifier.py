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

Test accuracy, mean and standard deviation of five seeds: shared 98.09 +- 0.15 % (47,770 parameters, 4.4 minutes each),
ordinary 96.62 +- 0.09 % (96,248 parameters, 4.3 minutes), on 2 cores of a Xeon.

One file, and nothing but NumPy, JAX and Optax to train and measure, as the assignment asks. The data are the official
arrays (doi 10.25405/data.ncl.24574354) where data/addnist/ holds them, and otherwise built from MNIST as published.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends in one line, also during the imports below and inside compiled code
    LAST_WORDS = b"\nerror: interrupted; what was saved stays, continue with --resume\n"
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, LAST_WORDS), os._exit(130)))

import argparse
import contextlib
import csv
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
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Config:
    """A training configuration."""

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
MODELS = list(CONFIGS)
NUM_SEEDS = 5
PARAMETER_LIMIT, STEP_LIMIT = 100_000, 10_000  # fewer than that many parameters, at most that many steps

SCRIPT = "addnist_classifier"
REPOSITORY = Path(__file__).resolve().parent
SAMPLE = REPOSITORY / "data" / "samples" / "mnist.npz"
NUM_CLASSES, NUM_DIGITS, CHANNELS, SIDE = 20, 10, 3, 28
ENCODERS = {"shared": [""], "mixed": [""], "ordinary": ["red_", "green_", "blue_"]}  # prefixes of their weights
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081
SIZES = {"train": 45_000, "valid": 15_000, "test": 10_000}
SMALL_SIZE = 500  # of each split with --quick or --sample
DATA_SEED = 2024  # of the dataset that is built from MNIST
MAX_SHIFT = 2  # pixels
STEPS_PER_CALL = 500  # optimisation steps in one compiled call; after each there is a checkpoint and a snapshot
EVALUATION_BATCH = 500
CURVE_ITEMS = 5000  # of each split, which the learning curves are measured on
CALIBRATION_ITEMS = 2000  # of the training set, over which the normalisation of finished networks is measured
CURVES = ("step", "loss", "train_accuracy", "valid_accuracy")
TOLERANCE, TOLERANCE_ELSEWHERE = 5e-4, 5e-3  # of metrics on the platform they were recorded on, and on another
SPACE_NEEDED = 10_000_000  # bytes that one training run writes
MNIST_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MNIST_FILES = {  # MD5
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
OFFICIAL_ARCHIVE = "https://data.ncl.ac.uk/ndownloader/articles/24574354/versions/1"
OFFICIAL_ADVICE = "get all six official arrays from https://doi.org/10.25405/data.ncl.24574354"
AGAIN = "finish an interrupted run with --train --resume, or get weights and card again from the repository"
UNREADABLE = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError)
UNREADABLE += (NotImplementedError, RecursionError, zipfile.BadZipFile, zlib.error, csv.Error)


class UserError(Exception):
    """A failure that the user can fix. Its text is one line: what happened; what to do."""


# ---------------------------------------------------------------------------------------------------------------- data


class Split(NamedTuple):
    """Some of the items; nothing trains on `digits`, and the official arrays have none."""

    images: np.ndarray  # uint8 (n, 3, 28, 28)
    labels: np.ndarray  # int32 (n,), 0 to 19
    digits: np.ndarray | None  # int32 (n, 3)


def load_data(data_dir, quick=False, sample=False):
    """Returns AddNIST, a dict of `Split` ("train", "valid", "test"), and what it was made of (str)."""
    sizes = dict.fromkeys(SIZES, SMALL_SIZE) if quick or sample else SIZES
    if sample:
        arrays, advice = read_file(SAMPLE, "get it again from the repository"), "get it again from the repository"
        mnist = checked_mnist([arrays.get(name, np.empty(0)) for name in MNIST_ARRAYS], SAMPLE, advice)
        return build_from_mnist(mnist, sizes), "built from the MNIST sample"
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir} is a file; name the folder that holds the datasets")
    if any((data_dir / "addnist").glob("*.npy")):
        official = load_official(data_dir / "addnist").items()
        return {name: Split(x[: sizes[name]], y[: sizes[name]], None) for name, (x, y) in official}, "official"
    return build_from_mnist(load_mnist(data_dir), sizes), "built from MNIST"


def digit_triples():
    """Returns the ordered triples of digits whose sum less one is a class: int (915, 3)."""
    triples = np.array(list(np.ndindex((NUM_DIGITS,) * CHANNELS)))
    return triples[(triples.sum(axis=1) >= 1) & (triples.sum(axis=1) <= NUM_CLASSES)]


def build_split(images, digits, count, seed):
    """Draws a `Split` of `count` items, a multiple of 20, from MNIST images (m, 28, 28) of `digits` (m,).

    Each class is equally frequent, within a class each triple of digits, and of a digit each image.
    """
    generator = np.random.default_rng(seed)
    triples = digit_triples()
    labels = generator.permutation(np.repeat(np.arange(NUM_CLASSES), count // NUM_CLASSES))
    chosen = np.empty((len(labels), CHANNELS), int)
    for label in range(NUM_CLASSES):
        of_label = triples[triples.sum(axis=1) - 1 == label]
        chosen[labels == label] = of_label[generator.integers(len(of_label), size=np.sum(labels == label))]
    drawn = np.empty_like(chosen)
    for digit in range(NUM_DIGITS):
        of_digit = np.flatnonzero(digits == digit)
        drawn[chosen == digit] = of_digit[generator.integers(len(of_digit), size=np.sum(chosen == digit))]
    return Split(images[drawn], labels.astype("int32"), chosen.astype("int32"))


def build_from_mnist(mnist, sizes):
    """Builds "train", "valid" and "test" (dict of `Split`) such that no two of them share an image of a digit.

    The original draws 60,000 items from the MNIST training images with replacement and splits them at random, so that
    many of its validation items have an exact twin in its training set. Here a sixth of the MNIST training images is
    held out for validation.
    """
    images, digits, test_images, test_digits = mnist
    held_out, rest = np.split(np.random.default_rng(DATA_SEED).permutation(len(images)), [len(images) // 6])
    return {
        "train": build_split(images[rest], digits[rest], sizes["train"], DATA_SEED + 1),
        "valid": build_split(images[held_out], digits[held_out], sizes["valid"], DATA_SEED + 2),
        "test": build_split(test_images, test_digits, sizes["test"], DATA_SEED + 3),
    }


def load_mnist(data_dir):
    """Returns training images (m, 28, 28) and digits (m,) of MNIST, and the same of its test set.

    From the `.npy` cache of the other scripts, from what TensorFlow Datasets has prepared, or from the official files,
    which are downloaded into `data_dir`/mnist where they are missing.
    """
    cache, folder = data_dir / "cache" / "mnist", data_dir / "mnist"
    if (cache / "manifest.json").exists():  # written last
        advice = f"delete {cache}, so that MNIST is prepared again"
        checksums = read_file(cache / "manifest.json", advice, lambda manifest: dict(manifest["sha256"]))
        arrays = [read_file(cache / f"{name}.npy", advice, checksum=checksums.get(name, "")) for name in MNIST_ARRAYS]
        return checked_mnist(arrays, cache, advice)
    advice = f"delete {folder}, so that MNIST is downloaded again, or add --sample"
    if any(folder.glob("*/dataset_info.json")) and importlib.util.find_spec("tensorflow_datasets"):
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        try:
            library = importlib.import_module("tensorflow_datasets")
            splits = library.as_numpy(library.load("mnist", data_dir=data_dir, download=False, batch_size=-1))
        except Exception as error:  # that library raises dozens of kinds; each is reported
            raise UserError(f"TensorFlow Datasets cannot read {folder} ({error}); {advice}") from error
        arrays = [splits[split][field] for split in ("train", "test") for field in ("image", "label")]
        return checked_mnist(arrays, folder, advice)
    arrays = []
    for name, checksum in MNIST_FILES.items():
        if not (folder / name).exists():
            download([mirror + name for mirror in MNIST_MIRRORS], folder / name, ", or add --sample", checksum)
        values = read_file(folder / name, "delete it, so that it is downloaded again", checksum=checksum)
        arrays.append(values[16:].reshape(-1, SIDE, SIDE, 1) if "images" in name else values[8:].astype(int))
    return checked_mnist(arrays, folder, advice)


def checked_mnist(arrays, path, advice):
    """Returns `arrays` without the channel axis of images; raises `UserError` where they are not like MNIST."""
    for images, digits in (arrays[:2], arrays[2:]):
        shapes = digits.ndim == 1 and images.shape == (len(digits), SIDE, SIDE, 1) and images.dtype == np.uint8
        if not (shapes and np.array_equal(np.unique(digits), np.arange(NUM_DIGITS))):
            raise UserError(f"{path} does not hold MNIST: images of 28 x 28 bytes and their labels 0 to 9; {advice}")
    return arrays[0][..., 0], arrays[1], arrays[2][..., 0], arrays[3]


def load_official(folder):
    """Reads the official arrays: dict from split to images, uint8 (n, 3, 28, 28), and labels, int32 (n,).

    The files hold float images, normalised by the mean and deviation of MNIST, which is undone here.
    """

    def check_images(images):
        grey = (images * MNIST_DEVIATION + MNIST_MEAN) * 255
        if not (np.isfinite(grey).all() and grey.min() > -2 and grey.max() < 257):
            raise ValueError("it is not normalised as AddNIST is")
        return np.rint(np.clip(grey, 0, 255)).astype("uint8")

    def check_labels(labels):
        if not np.isin(labels, np.arange(NUM_CLASSES)).all():
            raise ValueError("it holds labels other than 0 to 19")
        return labels.astype("int32")

    arrays = {}
    for name, size in SIZES.items():
        images = read_file(folder / f"{name}_x.npy", OFFICIAL_ADVICE, check_images)
        labels = read_file(folder / f"{name}_y.npy", OFFICIAL_ADVICE, check_labels)
        if images.shape != (size, CHANNELS, SIDE, SIDE) or labels.shape != (size,):
            shapes = f"{images.shape} and {labels.shape}, not ({size}, 3, 28, 28) and ({size},)"
            raise UserError(f"{name}_x.npy and {name}_y.npy in {folder} have shapes {shapes}; {OFFICIAL_ADVICE}")
        arrays[name] = images, labels
    return arrays


def download(urls, path, otherwise, checksum=None):
    """Downloads `path` from the first of `urls` that has it, with that MD5 where one is given."""
    for url in urls:
        print(f"downloading {url}")
        with contextlib.suppress(OSError, http.client.HTTPException):
            with urllib.request.urlopen(url, timeout=15) as response:
                content = response.read()
            if checksum in (None, hashlib.md5(content).hexdigest()):
                return write_file(path, content)
    raise UserError(f"{path.name} cannot be downloaded; put {urls[-1]} by hand into {path.parent}{otherwise}")


def download_official(folder):
    """Downloads the official archive and unpacks its six arrays into `folder`."""
    archive = download([OFFICIAL_ARCHIVE], folder / "addnist.zip", ", or go without: AddNIST is built from MNIST then")
    for member, content in read_file(archive, f"delete it and {OFFICIAL_ADVICE}").items():
        if Path(member).name in {f"{split}_{part}.npy" for split in SIZES for part in ("x", "y")}:
            write_file(folder / Path(member).name, content)
    archive.unlink()
    load_official(folder)
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
    if config.model == "shared":
        shape = config.widths[-1], NUM_DIGITS
    else:
        add_layer(jax.random.fold_in(key, 1), "hidden", (len(prefixes) * config.widths[-1], config.hidden))
        shape = config.hidden, NUM_CLASSES
    return parameters | {"dense": jnp.zeros(shape), "dense_bias": jnp.zeros(shape[-1])}


def convolution(features, kernel, stride):
    """A convolution with "same" padding of (n, side, side, channels) by (size, size, channels, filters).

    Written as a matrix product: shifted copies of the map, side by side, times the kernel. On a CPU, XLA is ten times
    as fast at this as at `jax.lax.conv_general_dilated`, whose gradients with strides it computes without a library.
    """
    size, side = kernel.shape[0], features.shape[1]
    side_out = -(-side // stride)
    padding = max((side_out - 1) * stride + size - side, 0)
    before, after = padding // 2, padding - padding // 2
    padded = jnp.pad(features, ((0, 0), (before, after), (before, after), (0, 0)))
    reach = (side_out - 1) * stride + 1
    shifts = [padded[:, i : i + reach : stride, j : j + reach : stride] for i in range(size) for j in range(size)]
    return jnp.concatenate(shifts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def normalized(features, parameters, name, moments):
    """Batch normalisation (Ioffe & Szegedy 2015), then ReLU.

    A finished network has the mean and variance of each filter among its `parameters`. One in training uses those of
    the batch, and puts them into the dict `moments`.
    """
    mean, variance = parameters.get(f"mean_{name}"), parameters.get(f"variance_{name}")
    if mean is None:
        axes = tuple(range(features.ndim - 1))
        mean = moments[f"mean_{name}"] = features.mean(axes)
        variance = moments[f"variance_{name}"] = jnp.square(features - mean).mean(axes)
    scale = parameters[f"gain_{name}"] * jax.lax.rsqrt(variance + 1e-5)
    return jax.nn.relu((features - mean) * scale + parameters[f"bias_{name}"])


def encoder(parameters, images, prefix, moments):
    """Four convolutions, of which the first three halve the map, then the average over the map.

    From uint8 (n, 28, 28, channels) to (n, widths[-1]); `prefix` says which encoder of the network it is.
    """
    features = (images.astype("float32") / 255 - MNIST_MEAN) / MNIST_DEVIATION
    for number in range(4):
        name = f"{prefix}{number}"
        features = convolution(features, parameters[f"kernel_{name}"], stride=1 if number == 3 else 2)
        features = normalized(features, parameters, name, moments)
    return features.mean(axis=(1, 2))


def digit_log_probabilities(parameters, images, moments):
    """The distribution over digits that the shared network sees in each channel: (n, 3, 10)."""
    logits = encoder(parameters, images.reshape(-1, SIDE, SIDE, 1), "", moments) @ parameters["dense"]
    return jax.nn.log_softmax(logits + parameters["dense_bias"]).reshape(-1, CHANNELS, NUM_DIGITS)


def sum_log_probabilities(digit_log_probabilities):
    """From distributions of three independent digits, (n, 3, 10), to that of the class, (n, 20), all logarithms.

    Sums of 0 and of 21 to 27 do not occur in AddNIST: the distribution is conditioned on a sum from 1 to 20.
    """
    red, green, blue = jnp.moveaxis(jnp.exp(digit_log_probabilities), 1, 0)
    two = jax.vmap(jnp.convolve)(red, green)  # sums 0 to 18
    three = jax.vmap(jnp.convolve)(two, blue)  # sums 0 to 27
    classes = three[:, 1 : NUM_CLASSES + 1] + 1e-12
    return jnp.log(classes) - jnp.log(classes.sum(axis=1, keepdims=True))


def log_probabilities(parameters, images, model, moments):
    """Log probabilities of the classes, (n, 20), for images uint8 (n, 3, 28, 28). `moments`: see `normalized`."""
    if model == "shared":
        return sum_log_probabilities(digit_log_probabilities(parameters, images, moments))
    channels = jnp.split(jnp.moveaxis(images, 1, -1), len(ENCODERS[model]), axis=-1)
    features = [encoder(parameters, x, prefix, moments) for x, prefix in zip(channels, ENCODERS[model], strict=True)]
    features = jnp.concatenate(features, axis=-1) @ parameters["kernel_hidden"]
    hidden = normalized(features, parameters, "hidden", moments)
    return jax.nn.log_softmax(hidden @ parameters["dense"] + parameters["dense_bias"])


@jax.jit(static_argnames="model")
def calibrated(parameters, images, model):
    """Returns `parameters` with the mean and variance of each filter over `images`, uint8 (n, 3, 28, 28).

    From then on the prediction for an image does not depend on the rest of the batch.
    """
    moments = {}
    log_probabilities(parameters, images, model, moments)
    return {**parameters, **moments}


def layout(config):
    """Returns shape and type of every finished weight of a network, a dict like what `calibrated` returns."""
    images = jax.ShapeDtypeStruct((2, CHANNELS, SIDE, SIDE), np.uint8)
    return jax.eval_shape(lambda x: calibrated(init_model(jax.random.key(0), config), x, config.model), images)


def count_parameters(parameters):
    """Counts every number of a network, those of the normalisation included where it is calibrated."""
    return sum(math.prod(array.shape) for array in parameters.values())


def penalty(num_parameters, steps):
    """Marks that the brief takes off: 5 for each begun tenth above 99,999 parameters and above 10,000 steps."""
    tenths = max(
        math.ceil((num_parameters - PARAMETER_LIMIT) / (PARAMETER_LIMIT / 10)), num_parameters >= PARAMETER_LIMIT
    )
    return 5 * (max(tenths, 0) + max(math.ceil((steps - STEP_LIMIT) / (STEP_LIMIT / 10)), 0))


# ------------------------------------------------------------------------------------------------- losses and training


class State(NamedTuple):
    """Everything that a training run needs to continue."""

    parameters: dict
    average: dict  # moving average of the parameters
    optimizer: tuple
    key: jax.Array
    step: jax.Array


def shifted(images, key):
    """Shifts each digit by up to `MAX_SHIFT` pixels, each channel on its own; black comes in from outside."""
    count = images.shape[0] * CHANNELS
    padded = jnp.pad(images.reshape(count, SIDE, SIDE), ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT)))
    corners = jax.random.randint(key, (count, 2), 0, 2 * MAX_SHIFT + 1)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, (SIDE, SIDE)))
    return cut(padded, corners).reshape(images.shape)


def warped(images, key, rotation, scale):
    """Rotates each digit by up to `rotation` degrees and scales height and width by a factor of up to 1 +- `scale`.

    About the centre, with bilinear interpolation; black comes in from outside.
    """
    count = images.shape[0] * CHANNELS
    angle_key, scale_key = jax.random.split(key)
    angles = jax.random.uniform(angle_key, (count, 1, 1), minval=-1, maxval=1) * math.radians(rotation)
    scales = 1 + jax.random.uniform(scale_key, (count, 2, 1, 1), minval=-1, maxval=1) * scale
    center = (SIDE - 1) / 2
    down, right = (jnp.arange(SIDE) - center)[:, None], (jnp.arange(SIDE) - center)[None, :]
    rows = (jnp.cos(angles) * down - jnp.sin(angles) * right) * scales[:, 0] + center
    columns = (jnp.sin(angles) * down + jnp.cos(angles) * right) * scales[:, 1] + center
    sample = jax.vmap(lambda image, y, x: jax.scipy.ndimage.map_coordinates(image, [y, x], order=1))
    moved = sample(images.reshape(count, SIDE, SIDE).astype("float32"), rows, columns)
    return jnp.rint(moved).astype("uint8").reshape(images.shape)


def permuted(images, key):
    """Puts the channels of each image in a random order of its own."""
    order = jnp.argsort(jax.random.uniform(key, images.shape[:2]), axis=1)
    return jnp.take_along_axis(images, order[:, :, None, None], axis=1)


def make_training(config):
    """Returns `start(seed)`, which makes a `State`, and `advance(state, images, labels, steps)`.

    `advance` takes so many optimisation steps in one compiled call; it returns the next `State` and the mean loss.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, max(config.steps // 20, 1), config.steps)
    optimizer = optax.adamw(schedule, weight_decay=config.weight_decay)

    def start(seed):
        key, subkey = jax.random.split(jax.random.PRNGKey(seed))
        parameters = init_model(subkey, config)
        return State(parameters, parameters, optimizer.init(parameters), key, jnp.zeros((), int))

    def loss(parameters, images, labels):
        predicted = log_probabilities(parameters, images, config.model, {})
        return -jnp.take_along_axis(predicted, labels[:, None], axis=1).mean()

    @jax.jit(static_argnames="steps")
    def advance(state, images, labels, steps):
        def step(state, _):
            key, batch_key, shift_key, permute_key = jax.random.split(state.key, 4)
            chosen = jax.random.randint(batch_key, (config.batch_size,), 0, len(labels))
            batch = shifted(images[chosen], shift_key) if config.shift else images[chosen]
            if config.rotation or config.scale:
                batch = warped(batch, jax.random.fold_in(shift_key, 1), config.rotation, config.scale)
            if config.permute:
                batch = permuted(batch, permute_key)
            value, gradient = jax.value_and_grad(loss)(state.parameters, batch, labels[chosen])
            update, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
            parameters = optax.apply_updates(state.parameters, update)
            # At first the average follows closely, so that it forgets the initial weights.
            momentum = jnp.minimum(config.average, (state.step + 1) / (state.step + 10))
            average = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, state.average, parameters)
            return State(parameters, average, optimizer_state, key, state.step + 1), value

        state, losses = jax.lax.scan(step, state, length=steps)
        return state, losses.mean()

    return start, advance


def train_network(config, splits, seed, *, folder, resume):
    """Trains a network on "train", with a checkpoint in `folder` from which `resume` continues.

    Returns the averaged and calibrated parameters of every snapshot (list of dict), learning curves (dict of lists, one
    value per snapshot) and seconds.
    """
    start, advance = make_training(config)
    state, snapshots, curves, seconds = start(seed), [], {name: [] for name in CURVES}, 0.0
    settings = {**dataclasses.asdict(config), "widths": list(config.widths), "seed": seed}
    checkpoint = folder / "checkpoint.npz"
    if resume and checkpoint.exists():
        state, snapshots, curves, seconds = restore_checkpoint(checkpoint, settings, state, config)
        print(f"resuming after step {int(state.step):,}")
    images, labels = jnp.asarray(splits["train"].images), jnp.asarray(splits["train"].labels)
    some = [Split(splits[n].images[:CURVE_ITEMS], splits[n].labels[:CURVE_ITEMS], None) for n in ("train", "valid")]
    while int(state.step) < config.steps:
        started = time.time()
        state, loss = advance(state, images, labels, min(STEPS_PER_CALL, config.steps - int(state.step)))
        parameters = calibrated(state.average, images[:CALIBRATION_ITEMS], config.model)
        values = int(state.step), float(loss), *(accuracy(parameters, split, config.model) for split in some)
        if not math.isfinite(values[1]):
            raise UserError("the loss is no longer a finite number; lower the learning rate or try another --seed")
        for name, value in zip(CURVES, values, strict=True):
            curves[name].append(value)
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

    def check(arrays):
        about = json.loads(str(arrays.pop("about")))
        changed = [name for name in settings if about["settings"][name] != settings[name]]
        if changed:
            raise UserError(f"{path} was made with other settings ({', '.join(changed)}); use those again, or {advice}")
        check_curves(about["curves"], CURVES)
        template = fresh, [layout(config)] * len(about["curves"]["step"])
        check_arrays(arrays, {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(template))})
        leaves = [jnp.asarray(arrays[str(number)]) for number in range(len(arrays))]
        state, snapshots = jax.tree.unflatten(jax.tree.structure(template), leaves)
        if int(state.step) != about["curves"]["step"][-1]:
            raise ValueError("its step is not that of its curves")
        return state, snapshots, about["curves"], float(about["seconds"])

    advice = "start over without --resume"
    return read_file(path, advice, check)


# --------------------------------------------------------------------------------------------------------------- files


def read_file(path, advice, check=None, checksum=None):
    """Returns what a file holds (arrays, JSON, a table or an archive), or what `check` makes of it.

    Everything that can be wrong with the file becomes a `UserError` that ends in `advice`.
    """
    try:
        with open(path, "rb") as file:
            if checksum is not None:
                if hashlib.file_digest(file, "md5" if path.suffix == ".gz" else "sha256").hexdigest() != checksum:
                    raise ValueError("its checksum is not the recorded one")
                file.seek(0)
            if path.suffix == ".npz":
                with np.load(file) as arrays:
                    content = dict(arrays)
            elif path.suffix == ".npy":
                content = np.lib.format.read_array(file)
            elif path.suffix == ".gz":
                content = np.frombuffer(gzip.decompress(file.read()), np.uint8)
            elif path.suffix == ".zip":
                with zipfile.ZipFile(file) as archive:
                    content = {name: archive.read(name) for name in archive.namelist()}
            elif path.suffix == ".csv":
                content = list(csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""), strict=True))
            else:
                content = json.load(file)
                if not isinstance(content, dict):
                    raise ValueError("it holds no JSON object")
        return check(content) if check else content
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {advice}") from error
    except UNREADABLE as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {str(error)[:100]}); {advice}") from error


def write_file(path, content):
    """Writes bytes, or what `read_file` returns, under a temporary name and renames it, never half. Returns `path`."""
    buffer = io.BytesIO()
    if path.suffix == ".npz":
        np.savez(buffer, **content)
    elif path.suffix == ".json":
        buffer.write((json.dumps(content, indent=1) + "\n").encode())
    elif path.suffix == ".csv":
        writer = csv.DictWriter(io.TextIOWrapper(buffer, "utf-8", write_through=True), content[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(content)
    else:
        buffer.write(content)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(buffer.getbuffer())
        temporary.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free some space or choose another --output-dir") from error
    finally:
        with contextlib.suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)
    return path


def prepare_output(output_dir):
    """Raises `UserError` where a training run could not be written; removes what killed processes left behind."""
    for folder in (output_dir / "saved_models" / SCRIPT, output_dir / "report", output_dir / "runs" / SCRIPT):
        for path in folder.rglob(".*.*"):
            with contextlib.suppress(ValueError, PermissionError, OverflowError):  # not ours
                try:
                    os.kill(int(path.name.split(".")[1]), 0)
                except ProcessLookupError:
                    path.unlink(missing_ok=True)
    write_file(output_dir / "probe", bytes(SPACE_NEEDED)).unlink()


def check_arrays(arrays, expected):
    """Raises ValueError where `arrays` have other names, shapes or types than `expected`, or no finite numbers."""
    if arrays.keys() != expected.keys():
        raise ValueError(f"{', '.join(sorted(arrays.keys() ^ expected.keys()))} is missing or does not belong there")
    for name, array in arrays.items():
        if (array.shape, array.dtype) != (expected[name].shape, expected[name].dtype) or not np.isfinite(array).all():
            raise ValueError(f"{name} has another shape or type, or numbers that are not finite")


def check_curves(curves, names):
    values = np.array([curves[name] for name in names])  # raises ValueError where their lengths differ
    if not (values.ndim == 2 and values.size and np.isfinite(values).all()):
        raise ValueError("its learning curves are empty or not finite")


def read_card(path):
    """Returns the card at `path` (dict) with the config as a `Config`; it has all that results and figures need."""

    def check(card):
        if (card["script"], card["model"]) != (f"{SCRIPT}.py", path.stem):
            raise ValueError("it belongs to another network")
        check_curves(card["curves"], (*CURVES, "test_accuracy"))
        numbers = json.dumps([model_results(card), card["seed"], card["metrics"]], allow_nan=False)
        _ = numbers, card["platform"], card["weights_sha256"], card["dataset"]["sha256"]
        return card

    return read_file(path, AGAIN, check)


def load_weights(path):
    """Returns the parameters (dict of arrays) and the card of saved weights."""

    def check(parameters):
        config = Config(**{**card["config"], "widths": tuple(card["config"]["widths"])})
        check_arrays(parameters, layout(config))
        return parameters

    card = read_card(path.with_suffix(".json"))
    return read_file(path, AGAIN, check, checksum=card["weights_sha256"]), card


def cards_in(root):
    """Returns the cards of the networks that are saved below `root`, a dict from model to card."""
    paths = [root / "saved_models" / SCRIPT / f"{model}.json" for model in MODELS]
    return {path.stem: read_card(path) for path in paths if path.exists()}


def environment():
    """Returns what a card says about where it was made."""
    commit, processor = "not a git checkout", platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # git is not installed
        command = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or commit
    with contextlib.suppress(OSError):  # not Linux
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ")[1] for line in lines if line.startswith("model name")), processor)
    device = jax.devices()[0]
    return {
        "git_commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "backend": "jax",
        "platform": device.platform,
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
        "hardware": f"{processor}, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind,
    }


# ---------------------------------------------------------------------------------------------------------- evaluation


@jax.jit(static_argnames=("model", "digits"))
def predict_batch(parameters, images, model, digits):
    if digits:
        return digit_log_probabilities(parameters, images, {})
    return log_probabilities(parameters, images, model, {})


def predict(parameters, images, model, digits=False):
    """Returns log probabilities of classes (n, 20), or of `digits` (n, 3, 10), for images uint8 (n, 3, 28, 28)."""
    starts = range(0, len(images), EVALUATION_BATCH)
    return np.concatenate([predict_batch(parameters, images[i : i + EVALUATION_BATCH], model, digits) for i in starts])


def accuracy(parameters, split, model):
    return float(np.mean(predict(parameters, split.images, model).argmax(1) == split.labels))


def measure(parameters, splits, model):
    """Measures a network on every split: dict from split to metric to float, and dict from split to `predict`."""
    metrics, predicted = {}, {}
    for name, split in splits.items():
        found = predicted[name] = predict(parameters, split.images, model)
        metrics[name] = {
            "accuracy": float(np.mean(found.argmax(1) == split.labels)),
            "loss": float(-found[np.arange(len(found)), split.labels].mean()),
        }
        if model == "shared" and split.digits is not None and name in ("test", "sample"):
            digits = predict(parameters, split.images, model, digits=True).argmax(-1)
            metrics[name]["digit_accuracy"] = float(np.mean(digits == split.digits))
    return metrics, predicted


def checksum_of(splits):
    """SHA-256 of the images and labels of all splits (dict), in order."""
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update(split.images.tobytes() + split.labels.tobytes())
    return digest.hexdigest()


def model_results(card):
    """Returns what the results say about one network."""
    summary = {"number": len(card["seeds"])}
    for part in SIZES:
        for name in ("accuracy", "loss"):
            values = [seed["metrics"][part][name] for seed in card["seeds"].values()]
            deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            summary[f"{part}_{name}"] = {"mean": float(np.mean(values)), "std": deviation}
    return {
        **{part: card["metrics"][part] for part in SIZES},
        "seeds": summary,
        "parameters": card["parameters"]["trainable"],
        "minutes": round(card["seconds"] / 60, 1),
        "data": card["dataset"]["name"],
        **{name: card[name] for name in ("steps", "penalty", "hardware", "shortened")},
    }


def compare_experiments(rows):
    """Compares every experiment with the baseline of its network, on the seeds that both have.

    Returns a dict from name to parameters, steps, valid_accuracy (mean), values (one per seed), difference (mean),
    noise (standard deviation of the baseline) and resolved (whether the difference exceeds twice the noise of such a
    mean); None where that cannot be said yet.
    """
    scores, compared, first = {}, {}, {}
    for row in rows:
        first.setdefault(row["name"], row)
        scores.setdefault(row["name"], {})[row["seed"]] = float(row["valid_accuracy"])
    for row in rows:
        own = scores[row["name"]]
        name = row["name"].partition(", ")[0] + ", baseline"  # names are "<network>, <what is changed>"
        baseline, fields = scores.get(name, {}), first.get(name, {})
        differences = [own[seed] - baseline[seed] for seed in own if seed in baseline]
        noise = float(np.std(list(baseline.values()), ddof=1)) if len(baseline) > 1 else None
        known = differences and noise is not None
        compared[row["name"]] = {
            "parameters": int(row["parameters"]),
            "steps": int(row["steps"]),
            "valid_accuracy": float(np.mean(list(own.values()))),
            "values": list(own.values()),
            "changed": [field for field in Config.__dataclass_fields__ if row[field] != fields.get(field)],
            "difference": float(np.mean(differences)) if differences else None,
            "noise": noise,
            "resolved": abs(np.mean(differences)) > 2 * noise * math.sqrt(2 / len(differences)) if known else None,
        }
    return compared


def write_results(output_dir):
    """Writes report/results/addnist_classifier.json from the cards of the saved networks and the experiments."""
    models = {model: model_results(card) for model, card in cards_in(output_dir).items()}
    results = {"script": f"{SCRIPT}.py", "models": models, "test": next(iter(models.values()))["test"]}
    results["experiments"] = compare_experiments(read_rows(output_dir))
    results |= {name: value for name, value in results["test"].items() if name == "digit_accuracy"}
    return write_file(output_dir / "report" / "results" / f"{SCRIPT}.json", results)


# --------------------------------------------------------------------------------------------------------- experiments


def read_rows(root):
    """Returns the rows of the experiments below `root`, a list of dict of str; [] where there are none yet."""

    def check(rows):
        for row in rows:
            if not {"name", "model", *Config.__dataclass_fields__} <= row.keys() or {None} & {*row, *row.values()}:
                raise ValueError("its columns are not those of this version")
            if not np.isfinite([float(row[n]) for n in ("seed", "steps", "parameters", "valid_accuracy")]).all():
                raise ValueError("it has numbers that are not finite")
        return rows

    path = root / "report" / "results" / f"{SCRIPT}_experiments.csv"
    return read_file(path, "move it away to start the experiments over", check) if path.exists() else []


def run_experiments(arguments):
    """Trains every planned configuration that the table has no row of, and measures it on validation."""
    try:
        from experiments.addnist_classifier import BASELINES, VARIANTS
    except ImportError as error:
        raise UserError(f"there is no comparison to run ({error}); get experiments/ from the repository") from error
    chosen, planned = [arguments.model] if arguments.model else MODELS, {}
    for model in chosen:
        planned |= {(f"{model}, baseline", seed): Config(**BASELINES[model]) for seed in range(NUM_SEEDS)}
    for model in chosen:
        for name, change in VARIANTS[model].items():
            planned[f"{model}, {name}", arguments.seed] = Config(**{**BASELINES[model], **change})
    finished = {(row["name"], int(row["seed"])) for row in read_rows(arguments.output_dir)}
    left = [run for run in planned if run not in finished]
    splits, _ = load_data(arguments.data_dir, arguments.quick, arguments.sample)
    table = arguments.output_dir / "report" / "results" / f"{SCRIPT}_experiments.csv"
    for number, (name, seed) in enumerate(left[: 2 if arguments.quick else None]):
        print(f"{len(left) - number} of {len(planned)} runs left: {name}, seed {seed}")
        config = with_flags(planned[name, seed], arguments, splits)
        folder = arguments.output_dir / "runs" / SCRIPT / "experiment"
        snapshots, curves, seconds = train_network(config, splits, seed, folder=folder, resume=False)
        row = {"name": name, "seed": seed, **dataclasses.asdict(config)}
        row |= {"parameters": count_parameters(snapshots[-1]), "seconds": round(seconds, 1)}
        row |= {metric: round(curves[metric][-1], 5) for metric in ("loss", "train_accuracy")}
        row |= {"valid_accuracy": round(accuracy(snapshots[-1], splits["valid"], config.model), 5)}
        write_file(table, [*read_rows(arguments.output_dir), row])  # read anew: another process may have added a row
    print(f"\n{'experiment':40} seeds  validation  difference from the baseline")
    for name, found in compare_experiments(read_rows(arguments.output_dir)).items():
        line = f"{name:40} {len(found['values']):5}  {found['valid_accuracy']:10.2%}"
        if found["difference"] is not None and not name.endswith("baseline"):
            line += f"  {found['difference']:+10.2%}" + ("" if found["resolved"] else "  not resolved")
        print(line)
    print(f"finished runs are in {table}")


# ----------------------------------------------------------------------------------------------------- train and report


def with_flags(config, arguments, splits):
    """Returns `config` with what the command line changes."""
    batch_size = arguments.batch_size or config.batch_size
    steps = arguments.epochs * math.ceil(len(splits["train"].labels) / batch_size) if arguments.epochs else config.steps
    return dataclasses.replace(config, batch_size=batch_size, steps=min(steps, 20) if arguments.quick else steps)


def train(arguments):
    """Trains all seeds of the chosen networks; saves the weights of the first, and the metrics of all on its card."""
    splits, source = load_data(arguments.data_dir, arguments.quick, arguments.sample)
    parts = splits | ({"sample": load_data(arguments.data_dir, sample=True)[0]["test"]} if SAMPLE.exists() else {})
    chosen = [arguments.model] if arguments.model else MODELS
    configs = {model: with_flags(CONFIGS[model], arguments, splits) for model in chosen}
    seeds = range(arguments.seed, arguments.seed + (1 if arguments.quick else NUM_SEEDS))
    trained = {}
    for model, config in configs.items():
        for seed in seeds:
            folder = arguments.output_dir / "runs" / SCRIPT / f"{model}_seed_{seed}"
            trained[model, seed] = train_network(config, splits, seed, folder=folder, resume=arguments.resume)
    # The test images are read from here on, after the last training run.
    for model, config in configs.items():
        of_seeds = {}
        for seed in seeds:
            snapshots, _, seconds = trained[model, seed]
            of_seeds[str(seed)] = {"seconds": round(seconds, 1), "metrics": measure(snapshots[-1], parts, model)[0]}
        snapshots, curves, _ = trained[model, arguments.seed]
        count = count_parameters(snapshots[-1])
        path = arguments.output_dir / "saved_models" / SCRIPT / f"{model}.npz"
        write_file(path, snapshots[-1])
        card = {
            "script": f"{SCRIPT}.py",
            "model": model,
            "command": arguments.command,
            **environment(),
            "seed": arguments.seed,
            "config": dataclasses.asdict(config),
            "epochs": round(config.steps * config.batch_size / len(splits["train"].labels), 1),
            "steps": config.steps,
            "batch_size": config.batch_size,
            "parameters": {"trainable": count, "total": count},
            "penalty": penalty(count, config.steps),
            "dataset": {
                "name": f"AddNIST, {source}",
                **{name: len(split.labels) for name, split in parts.items()},
                "sha256": checksum_of(splits),
                "sample_sha256": checksum_of({"sample": parts["sample"]}) if "sample" in parts else None,
            },
            "shortened": "--quick: few items and steps" if arguments.quick else None,
            **of_seeds[str(arguments.seed)],
            "curves": {**curves, "test_accuracy": [accuracy(s, splits["test"], model) for s in snapshots]},
            "seeds": of_seeds,
            "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        write_file(path.with_suffix(".json"), card)
    print(f"wrote {write_results(arguments.output_dir)}")


def report(arguments):
    """Measures the saved networks beside the recorded metrics, and draws the figures. Returns the exit code."""
    inside = arguments.record or (arguments.output_dir / "saved_models" / SCRIPT).is_dir()
    root = arguments.output_dir if inside else REPOSITORY
    folder = root / "saved_models" / SCRIPT
    print(f"networks from {folder}")
    restored = {m: load_weights(folder / f"{m}.npz") for m in ([arguments.model] if arguments.model else MODELS)}
    splits, source = load_data(arguments.data_dir, arguments.quick, arguments.sample)
    parts, key = ({"sample": splits["test"]}, "sample_sha256") if arguments.sample else (splits, "sha256")
    sizes, data_checksum = {name: len(split.labels) for name, split in parts.items()}, checksum_of(parts)
    rows, predicted, written = [], {}, []
    for model, (parameters, card) in restored.items():
        metrics, found = measure(parameters, parts, model)
        predicted[model] = found["sample" if arguments.sample else "test"]
        same_data = card["dataset"].get(key) == data_checksum
        if not same_data:
            print(f"{model}: not compared, since its card is not about these items (AddNIST, {source}, {sizes})")
        tolerance = TOLERANCE if card["platform"] == jax.default_backend() else TOLERANCE_ELSEWHERE
        for part, name in [(part, name) for part, values in metrics.items() for name in values]:
            value = metrics[part][name]
            recorded = card["metrics"].get(part, {}).get(name) if same_data else None
            agrees = None if recorded is None else abs(value - recorded) <= tolerance
            row = {"task": "AddNIST", "model": model, "metric": f"{part} {name.replace('_', ' ')}"}
            rows.append({**row, "measured": value, "recorded": recorded, "agrees": agrees, "tolerance": tolerance})
        if arguments.record:
            if not (same_data or arguments.sample):
                raise UserError(f"{model} was trained with other data; --record needs the same, or --train anew")
            card["metrics"] |= metrics
            card["seeds"][str(card["seed"])]["metrics"] |= metrics
            card["dataset"] |= {**sizes, key: data_checksum}
            written.append(write_file(folder / f"{model}.json", card))
    if arguments.record and arguments.sample:  # nothing but the cards
        return print("wrote", *written, sep="\n  ")
    if arguments.record:
        written.append(write_results(arguments.output_dir))
    try:
        from common.errors import UserError as FigureError
        from plots import addnist_classifier as plots
    except ImportError as error:
        print(f"figures are skipped ({error})")
    else:
        try:
            figures = arguments.output_dir / "report" / "figures" / SCRIPT
            written += draw_figures(plots, figures, root, splits, predicted, restored)
        except FigureError as error:
            raise UserError(str(error)) from error
    print(f"\n{'model':8}  {'metric':21}  measured  recorded")
    for row in rows:
        line = f"{row['model']:8}  {row['metric']:21}  {row['measured']:8.4f}"
        if row["recorded"] is not None:
            line += f"  {row['recorded']:8.4f}  {'agrees' if row['agrees'] else 'DIFFERS'}"
        print(line)
    print(f"numbers agree where they differ by at most {max(row['tolerance'] for row in rows)}")
    content = {"script": f"{SCRIPT}.py", "command": arguments.command, "rows": rows}
    written.append(write_file(arguments.output_dir / "runs" / SCRIPT / "verification.json", content))
    print("\nwrote", *written, sep="\n  ")
    return int(any(row["agrees"] is False for row in rows))


def confusion(truth, predicted, size):
    """Counts of every pair of a true and a predicted class: int (size, size)."""
    return np.bincount(truth.ravel() * size + predicted.ravel(), minlength=size**2).reshape(size, size)


def draw_figures(plots, folder, root, splits, predicted, restored):
    """Computes what the figures show and has them drawn into `folder`; returns their paths."""
    train, test, compared = splits["train"], splits["test"], compare_experiments(read_rows(root))
    digits = None if train.digits is None else train.digits[:10]
    curves = {model: card["curves"] for model, card in cards_in(root).items()}
    written = [
        plots.draw_samples(train.images[:10], train.labels[:10], digits, folder / "samples.png"),
        plots.draw_curves(curves, folder / "curves.png"),
    ]
    for model, found in predicted.items():
        counts = confusion(test.labels, found.argmax(1), NUM_CLASSES)
        written.append(plots.draw_confusion(counts, model, folder / f"confusion_{model}.png"))
    if "shared" in predicted:
        classes = predicted["shared"].argmax(1)
        wrong = np.flatnonzero(classes != test.labels)
        wrong = wrong[np.argsort(-predicted["shared"][wrong].max(1))][:20]  # the most confident mistakes
        digits = None if test.digits is None else test.digits[wrong]
        path = folder / "mistakes.png"
        written.append(plots.draw_mistakes(test.images[wrong], test.labels[wrong], classes[wrong], digits, path))
    if "shared" in predicted and test.digits is not None:
        digits = predict(restored["shared"][0], test.images, "shared", digits=True).argmax(-1)
        written.append(plots.draw_digits(confusion(test.digits, digits, NUM_DIGITS), folder / "digits.png"))
    if compared:
        written.append(plots.draw_scaling(compared, folder / "scaling.png"))
        written.append(plots.draw_experiments(compared, folder / "experiments.png"))
    return written


# ---------------------------------------------------------------------------------------------------------------- main


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, like every other error."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def whole_number(low, high):
    """Returns the type of a flag that takes a whole number from `low` to `high`."""

    def convert(text):
        with contextlib.suppress(ValueError):
            if low <= int(text) <= high:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {low} to {high}")

    return convert


def parse(argv):
    """Returns the command line as an `argparse.Namespace`; the flags are those of all scripts of the collection."""
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    mode = flags.add_mutually_exclusive_group(required=True)
    for name, text in (
        ("--train", "build, fit, measure, save, write results and figures"),
        ("--load", "restore from saved_models/, measure, compare with the recorded numbers, write figures"),
        ("--experiments", "the comparison behind the choices (resumable)"),
        ("--download", "fetch the official AddNIST arrays into DATA_DIR/addnist"),
    ):
        mode.add_argument(name, action="store_true", help=text)
    flags.add_argument("--model", choices=MODELS, help="one of the models (default: all)")
    flags.add_argument("--quick", action="store_true", help="a few steps into runs/quick/: proves that it works")
    flags.add_argument("--sample", action="store_true", help="use the images in data/samples/ instead of the dataset")
    for name, low, high, default, text in (
        ("--epochs", 1, 100_000, None, "passes over the training items"),
        ("--batch-size", 1, 100_000, None, "examples per optimisation step"),
        ("--seed", 0, 2**32 - 1, 0, "seed of everything random (default: 0)"),
    ):
        flags.add_argument(name, type=whole_number(low, high), metavar="N", default=default, help=text)
    flags.add_argument("--resume", action="store_true", help="resume a stopped training run from its last checkpoint")
    flags.add_argument("--record", action="store_true", help="with --load: write the measured numbers down (authors)")
    default = Path(os.environ.get("DATA_DIR", REPOSITORY / "data"))
    text = "where datasets are kept (default: $DATA_DIR, else data)"
    flags.add_argument("--data-dir", type=Path, metavar="DIR", default=default, help=text)
    text = "where everything is written, and models are looked for first (default: the repository; runs/quick with "
    text += "--quick, runs/sample with --sample unless --record is given)"
    flags.add_argument("--output-dir", type=Path, metavar="DIR", help=text)
    arguments = flags.parse_args(argv)
    if arguments.output_dir is None:
        sample = arguments.sample and not arguments.record
        arguments.output_dir = REPOSITORY / ("runs/quick" if arguments.quick else "runs/sample" if sample else "")
    if arguments.resume and arguments.load:
        raise UserError("--resume continues a training run, but --load never trains; leave one of them out")
    if arguments.record and (arguments.quick or not arguments.load):
        raise UserError("--record writes down what --load measures on all items; use it with --load, without --quick")
    if arguments.experiments and (arguments.epochs or arguments.batch_size):
        raise UserError("--epochs and --batch-size are part of what --experiments compares; leave them out")
    arguments.command = shlex.join(["python", flags.prog, *(sys.argv[1:] if argv is None else map(str, argv))])
    return arguments


def main(argv=None):
    """Does what the command line says; returns the exit code."""
    arguments = parse(argv)
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
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
