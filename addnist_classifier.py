"""AddNIST with fewer than 100,000 parameters and at most 10,000 optimisation steps, in pure JAX.

A picture has three handwritten digits r, g and b in its colour channels; its class is r + g + b - 1, one of 20. Nobody
tells the network that there are digits. Two networks of the same size are compared:

    shared     reads each channel with the same small network, and adds the three digits as random variables: the
               distribution of their sum is the convolution of the three distributions of digits
    ordinary   has a small network for each channel, and dense layers that make one of 20 classes out of what they see

    python addnist_classifier.py --train          five seeds of both
    python addnist_classifier.py --load           restores the saved ones: same metrics, same figures
    python addnist_classifier.py --experiments    accuracy against parameters and steps, and what each part is worth

One file and nothing but NumPy, JAX, Optax and matplotlib, as the assignment asks. The data are the official AddNIST
arrays (Geada et al. 2024, doi 10.25405/data.ncl.24574354) where `data/addnist/` holds them, and built from MNIST by the
published recipe where it does not.
"""

import argparse
import csv
import dataclasses
import datetime
import gzip
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

matplotlib.use("Agg")  # figures are files
import matplotlib.pyplot as plt

SCRIPT = "addnist_classifier"
REPOSITORY = Path(__file__).resolve().parent
NUM_CLASSES, NUM_DIGITS, CHANNELS, SIDE = 20, 10, 3, 28
COLORS_READ = ("red", "green", "blue")
PARAMETER_LIMIT, STEP_LIMIT = 100_000, 10_000  # fewer than that many parameters, at most that many steps
MNIST_MEAN, MNIST_DEVIATION = 0.1307, 0.3081
SIZES = {"train": 45_000, "valid": 15_000, "test": 10_000}
RECIPE_SEED = 2024  # of the data set that is built from MNIST
MODELS = ["shared", "ordinary"]
NUM_SEEDS = 5
STEPS_PER_CALL = 500  # optimisation steps in one compiled call; after each there is a checkpoint and a snapshot
EVALUATION_BATCH = 500
CURVE_PICTURES = 5000  # of each split, which the learning curves are measured on
CALIBRATION_PICTURES = 2000  # of the training set, over which the normalisation of finished networks is measured
MAX_SHIFT = 2  # pixels, of each digit on its own: a digit moved by that much is the same digit
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#888888"  # Okabe & Ito 2008
OFFICIAL_PAGE = "https://doi.org/10.25405/data.ncl.24574354"
OFFICIAL_ARCHIVE = "https://data.ncl.ac.uk/ndownloader/articles/24574354/versions/1"
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
KNOWN_RESULTS = (
    "Others, test accuracy: ResNet-18 92 to 93 %, competition record 95.06 %, best published 97.91 % with any size; "
    "a student within this budget 84.95 %."
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the experiments vary; the defaults are the final training of the shared network.

    Attributes:
        model: "shared", "ordinary", or "mixed", which is the ordinary network with one reader of all three channels.
        widths: filters of the four convolutions of a reader.
        hidden: units of the dense layer after the readers; the shared network has none.
        steps: optimisation steps.
        batch_size: pictures per step.
        learning_rate: highest learning rate.
        weight_decay: decoupled.
        shift: whether digits are shifted at random.
        rotation: largest angle in degrees by which each digit is rotated at random; 0 for none.
        scale: largest relative change of the size of each digit; 0 for none.
        permute: whether the channels of each picture are put in a random order, which leaves their sum.
        average: momentum of the moving average of the weights that is evaluated and saved.
    """

    model: str = "shared"
    widths: tuple = (16, 32, 48, 64)
    hidden: int = 0
    steps: int = 5000
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    shift: bool = True
    rotation: float = 0.0
    scale: float = 0.0
    permute: bool = False
    average: float = 0.995


BASELINES = {
    "shared": Recipe(),
    "ordinary": Recipe("ordinary", (12, 24, 36, 48), hidden=96, steps=10_000, learning_rate=1e-2),
}
RECIPES = BASELINES


class UserError(Exception):
    """A failure that the user can mend. Its text is one line: what happened; what to do."""


# ---------------------------------------------------------------------------------------------------------------- data


class Split(NamedTuple):
    """Some of the pictures.

    Attributes:
        images: uint8 (n, 3, 28, 28).
        labels: int32 (n,), 0 to 19.
        digits: int32 (n, 3), what no training sees; None for the official arrays, which do not tell.
    """

    images: np.ndarray
    labels: np.ndarray
    digits: np.ndarray | None


def digit_triples():
    """Returns the ordered triples of digits whose sum less one is a class: int (915, 3)."""
    triples = np.stack(np.meshgrid(*[np.arange(NUM_DIGITS)] * CHANNELS, indexing="ij"), axis=-1).reshape(-1, CHANNELS)
    label = triples.sum(axis=1) - 1
    return triples[(label >= 0) & (label < NUM_CLASSES)]


def build_split(images, digits, count, seed):
    """Builds AddNIST pictures by the published recipe.

    Args:
        images: uint8 (m, 28, 28), the MNIST pictures to draw from.
        digits: integers (m,), what they show.
        count: int, a multiple of 20: as many pictures for each class.
        seed: int.

    Returns:
        `Split`, shuffled. Within a class all triples of digits are equally likely, and all pictures of a digit.
    """
    generator = np.random.default_rng(seed)
    triples = digit_triples()
    labels = generator.permutation(np.repeat(np.arange(NUM_CLASSES), count // NUM_CLASSES))
    chosen = np.empty((len(labels), CHANNELS), int)
    for label in range(NUM_CLASSES):
        of_label = triples[triples.sum(axis=1) - 1 == label]
        chosen[labels == label] = of_label[generator.integers(len(of_label), size=np.sum(labels == label))]
    pictures = np.empty_like(chosen)
    for digit in range(NUM_DIGITS):
        of_digit = np.flatnonzero(digits == digit)
        pictures[chosen == digit] = of_digit[generator.integers(len(of_digit), size=np.sum(chosen == digit))]
    return Split(images[pictures], labels.astype("int32"), chosen.astype("int32"))


def build_from_mnist(data_dir, sizes=None):
    """Builds train, valid and test out of MNIST, so that no two of them share a picture of a digit.

    The original draws 60,000 items from the MNIST training pictures with replacement and splits them at random, so that
    many of its validation items have an exact twin in its training set. Here a sixth of the MNIST training pictures is
    set aside for validation.

    Returns:
        dict of `Split`.
    """
    sizes = sizes or SIZES
    images, digits, test_images, test_digits = load_mnist(data_dir)
    order = np.random.default_rng(RECIPE_SEED).permutation(len(images))
    aside = len(order) // 6
    return {
        "train": build_split(images[order[aside:]], digits[order[aside:]], sizes["train"], RECIPE_SEED + 1),
        "valid": build_split(images[order[:aside]], digits[order[:aside]], sizes["valid"], RECIPE_SEED + 2),
        "test": build_split(test_images, test_digits, sizes["test"], RECIPE_SEED + 3),
    }


def load_mnist(data_dir):
    """Returns MNIST: uint8 (60000, 28, 28), int (60000,), uint8 (10000, 28, 28), int (10000,).

    Looks for the `.npy` cache of the other scripts, then for the four official files in `data_dir`/mnist, and
    downloads those.

    Raises:
        UserError: where it is neither there nor to be had.
    """
    cache = data_dir / "cache" / "mnist"
    if (cache / "manifest.json").exists():  # written last, so that the arrays are whole
        arrays = [
            np.load(cache / f"{split}_{field}.npy") for split in ("train", "test") for field in ("images", "labels")
        ]
        return arrays[0][..., 0], arrays[1], arrays[2][..., 0], arrays[3]
    arrays = []
    for name, checksum in MNIST_FILES.items():
        content = gzip.decompress(fetch_mnist_file(data_dir / "mnist" / name, checksum))
        header = 16 if "images" in name else 8  # bytes
        values = np.frombuffer(content, np.uint8, offset=header)
        arrays.append(values.reshape(-1, SIDE, SIDE) if "images" in name else values.astype(int))
    return tuple(arrays)


def fetch_mnist_file(path, checksum):
    """Returns the bytes of one official MNIST file, from `path` or from the internet."""
    if path.exists():
        content = path.read_bytes()
        if hashlib.md5(content).hexdigest() != checksum:
            raise UserError(f"{path} is damaged; delete it, so that it is downloaded again")
        return content
    for mirror in MNIST_MIRRORS:
        try:
            with urllib.request.urlopen(mirror + path.name, timeout=15) as answer:
                content = answer.read()
        except (urllib.error.URLError, OSError):
            continue
        if hashlib.md5(content).hexdigest() == checksum:
            write_file(path, lambda temporary, content=content: temporary.write_bytes(content))
            return content
    raise UserError(
        f"{path.name} of MNIST could not be downloaded; get it from {MNIST_MIRRORS[0]} or {MNIST_MIRRORS[1]} "
        f"and put it by hand into {path.parent}"
    )


def load_official(folder):
    """Reads the official arrays.

    Args:
        folder: `pathlib.Path` with `train_x.npy`, `train_y.npy`, and the same of valid and test: float32
            (n, 3, 28, 28), MNIST pictures normalised by mean 0.1307 and deviation 0.3081, and labels 0 to 19.

    Returns:
        dict of `Split`, with the grey levels that the pictures had before they were normalised.

    Raises:
        UserError: where an array is missing or not what it should be.
    """
    splits = {}
    for name in SIZES:
        arrays = {}
        for part in ("x", "y"):
            path = folder / f"{name}_{part}.npy"
            try:
                arrays[part] = np.load(path)
            except FileNotFoundError as error:
                raise UserError(f"{path} is missing; put all six official arrays there ({OFFICIAL_PAGE})") from error
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{path} is damaged; get it again from {OFFICIAL_PAGE}") from error
        images, labels = arrays["x"], arrays["y"]
        if images.shape[1:] != (CHANNELS, SIDE, SIDE) or labels.shape != images.shape[:1]:
            raise UserError(
                f"{folder}/{name}_x.npy and {name}_y.npy have shapes {images.shape} and {labels.shape} instead of "
                f"(n, 3, 28, 28) and (n,); get them again from {OFFICIAL_PAGE}"
            )
        if not np.isin(labels, np.arange(NUM_CLASSES)).all():
            raise UserError(f"{folder}/{name}_y.npy holds labels other than 0 to 19; get it from {OFFICIAL_PAGE}")
        grey = (images * MNIST_DEVIATION + MNIST_MEAN) * 255
        if not (np.isfinite(grey).all() and grey.min() > -2 and grey.max() < 257):
            raise UserError(f"{folder}/{name}_x.npy is not normalised as AddNIST is; get it from {OFFICIAL_PAGE}")
        splits[name] = Split(np.rint(np.clip(grey, 0, 255)).astype("uint8"), labels.astype("int32"), None)
    return splits


def download_official(folder):
    """Downloads the official archive and unpacks its six arrays into `folder`.

    Raises:
        UserError: where the server does not answer or sends something else.
    """
    archive = folder / "addnist.zip"
    print(f"downloading {OFFICIAL_ARCHIVE}")
    try:
        with urllib.request.urlopen(OFFICIAL_ARCHIVE, timeout=15) as answer:
            write_file(archive, lambda temporary: temporary.write_bytes(answer.read()))
        with zipfile.ZipFile(archive) as files:
            for member in files.namelist():
                name = Path(member).name
                if name in {f"{split}_{part}.npy" for split in SIZES for part in ("x", "y")}:
                    write_file(folder / name, lambda temporary, m=member: temporary.write_bytes(files.read(m)))
    except (urllib.error.URLError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"AddNIST could not be downloaded ({error}); get the six arrays from {OFFICIAL_PAGE} and put them into "
            f"{folder}, or go without them: the script builds its own from MNIST"
        ) from error
    finally:
        archive.unlink(missing_ok=True)


def load_data(data_dir, quick=False):
    """Loads AddNIST, the official arrays where they are, otherwise built from MNIST.

    Returns:
        dict of `Split` ("train", "valid", "test"), and "official" or "built from MNIST".
    """
    folder = data_dir / "addnist"
    if folder.is_dir() and any(folder.glob("*.npy")):
        splits, source = load_official(folder), "official"
    else:
        splits, source = build_from_mnist(data_dir, dict.fromkeys(SIZES, 500) if quick else None), "built from MNIST"
    if quick:
        splits = {name: Split(*(a if a is None else a[:500] for a in split)) for name, split in splits.items()}
    return splits, source


# -------------------------------------------------------------------------------------------------------------- models


def init_layer(key, name, shape):
    """Returns fresh parameters of weights that are followed by a normalisation: dict of float32 arrays."""
    scale = math.sqrt(2 / math.prod(shape[:-1]))  # He et al. 2015
    return {
        f"kernel_{name}": scale * jax.random.normal(key, shape),
        f"gain_{name}": jnp.ones(shape[-1]),
        f"bias_{name}": jnp.zeros(shape[-1]),
    }


def init_reader(key, prefix, in_channels, widths):
    """Returns fresh parameters of a `reader`: dict of float32 arrays."""
    parameters = {}
    for number, (filters, size) in enumerate(zip(widths, (5, 3, 3, 3), strict=True)):
        key, subkey = jax.random.split(key)
        parameters |= init_layer(subkey, f"{prefix}{number}", (size, size, in_channels, filters))
        in_channels = filters
    return parameters


def init_model(key, recipe):
    """Returns fresh parameters of the network that `recipe` describes: dict of float32 arrays."""
    num_features, num_outputs = recipe.widths[-1], NUM_CLASSES
    if recipe.model == "shared":
        parameters, num_outputs = init_reader(key, "", 1, recipe.widths), NUM_DIGITS
    elif recipe.model == "mixed":
        parameters = init_reader(key, "", CHANNELS, recipe.widths)
    else:
        parameters = {}
        for color, subkey in zip(COLORS_READ, jax.random.split(key, CHANNELS), strict=True):
            parameters |= init_reader(subkey, f"{color}_", 1, recipe.widths)
        num_features *= CHANNELS
    if recipe.model != "shared":
        parameters |= init_layer(jax.random.fold_in(key, 1), "hidden", (num_features, recipe.hidden))
        num_features = recipe.hidden
    return parameters | {"dense": jnp.zeros((num_features, num_outputs)), "dense_bias": jnp.zeros(num_outputs)}


def convolution(features, kernel, stride):
    """A convolution with "same" padding, written as a matrix product.

    Shifted copies of the map, side by side, times the kernel. On a CPU, XLA is ten times as fast at this as at its own
    `jax.lax.conv_general_dilated`, of which it computes the gradients of strided ones without a library.

    Args:
        features: (n, side, side, channels).
        kernel: (size, size, channels, filters).
        stride: int.

    Returns:
        (n, side / stride, side / stride, filters), rounded up.
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

    Where `parameters` hold the mean and variance of each filter, those are used; a network under training has none and
    uses those of the batch, which are put into the dict `moments`.
    """
    mean, variance = parameters.get(f"mean_{name}"), parameters.get(f"variance_{name}")
    if mean is None:
        axes = tuple(range(features.ndim - 1))
        mean = moments[f"mean_{name}"] = features.mean(axes)
        variance = moments[f"variance_{name}"] = jnp.square(features - mean).mean(axes)
    scale = parameters[f"gain_{name}"] * jax.lax.rsqrt(variance + 1e-5)
    return jax.nn.relu((features - mean) * scale + parameters[f"bias_{name}"])


def reader(parameters, images, prefix, moments):
    """Four convolutions, of which the first three halve the map, then the average over the map.

    Args:
        parameters: what `init_model` or `calibrated` returned.
        images: float32 (n, 28, 28, channels).
        prefix: str, which reader of the network it is.
        moments: dict, see `normalized`.

    Returns:
        float32 (n, widths[-1]).
    """
    features = images
    for number in range(4):
        name = f"{prefix}{number}"
        features = convolution(features, parameters[f"kernel_{name}"], stride=1 if number == 3 else 2)
        features = normalized(features, parameters, name, moments)
    return features.mean(axis=(1, 2))


def sum_log_probabilities(digit_log_probabilities):
    """The distribution of the sum of independent digits, given that it is a class.

    Args:
        digit_log_probabilities: (n, 3, 10), the distribution of each digit.

    Returns:
        (n, 20): log probabilities of the classes, sums 1 to 20. Sums of 0 and of 21 to 27 do not occur in AddNIST, so
        their probability is shared out.
    """
    red, green, blue = jnp.moveaxis(jnp.exp(digit_log_probabilities), 1, 0)
    # The outer product of two distributions, shifted so that equal sums stand in one column, is their convolution.
    two = jax.vmap(jnp.convolve)(red, green)  # sums 0 to 18
    three = jax.vmap(jnp.convolve)(two, blue)  # sums 0 to 27
    classes = three[:, 1 : NUM_CLASSES + 1] + 1e-12
    return jnp.log(classes) - jnp.log(classes.sum(axis=1, keepdims=True))


def digit_log_probabilities(parameters, images, moments):
    """What the shared network makes of each channel: (n, 3, 10) for uint8 (n, 3, 28, 28). Moments: see `normalized`."""
    features = reader(parameters, scaled(images).reshape(-1, SIDE, SIDE, 1), "", moments)
    logits = features @ parameters["dense"] + parameters["dense_bias"]
    return jax.nn.log_softmax(logits).reshape(-1, CHANNELS, NUM_DIGITS)


def scaled(images):
    """Returns uint8 pictures normalised as AddNIST is, float32."""
    return (images.astype("float32") / 255 - MNIST_MEAN) / MNIST_DEVIATION


def log_probabilities(parameters, images, model, moments):
    """Log probabilities of the classes.

    Args:
        parameters: of `model`, what `init_model` or `calibrated` returned.
        images: uint8 (n, 3, 28, 28).
        model: "shared", "ordinary" or "mixed".
        moments: dict, see `normalized`.

    Returns:
        float32 (n, 20).
    """
    if model == "shared":
        return sum_log_probabilities(digit_log_probabilities(parameters, images, moments))
    channels = jnp.moveaxis(scaled(images), 1, -1)
    if model == "mixed":
        features = reader(parameters, channels, "", moments)
    else:
        split = zip(COLORS_READ, jnp.split(channels, CHANNELS, axis=-1), strict=True)
        features = [reader(parameters, channel, f"{color}_", moments) for color, channel in split]
        features = jnp.concatenate(features, axis=-1)
    hidden = normalized(features @ parameters["kernel_hidden"], parameters, "hidden", moments)
    return jax.nn.log_softmax(hidden @ parameters["dense"] + parameters["dense_bias"])


@jax.jit(static_argnames="model")
def calibrated(parameters, images, model):
    """Returns `parameters` with the mean and variance of each filter over `images`, uint8 (n, 3, 28, 28).

    From then on what the network says of a picture does not depend on the other pictures of the batch.
    """
    moments = {}
    log_probabilities(parameters, images, model, moments)
    return {**parameters, **moments}


def count_parameters(parameters):
    """Counts every number of a network, those of the normalisation included where it is calibrated."""
    return sum(int(np.prod(array.shape)) for array in jax.tree.leaves(parameters))


def penalty(num_parameters, steps):
    """Marks that the brief takes off: 5 for each begun tenth above 99,999 parameters and above 10,000 steps.

    110,000 parameters cost 5, 150,000 cost 25, 11,000 steps cost 5 (the brief's own examples).
    """
    marks = 0
    if num_parameters >= PARAMETER_LIMIT:
        marks += 5 * max(1, math.ceil((num_parameters - PARAMETER_LIMIT) / (PARAMETER_LIMIT / 10)))
    if steps > STEP_LIMIT:
        marks += 5 * math.ceil((steps - STEP_LIMIT) / (STEP_LIMIT / 10))
    return marks


# ------------------------------------------------------------------------------------------------------------ training


class State(NamedTuple):
    """Everything a training needs to go on; `average` is the moving average of the parameters."""

    parameters: dict
    average: dict
    optimizer: tuple
    key: jax.Array
    step: jax.Array


def shifted(images, key):
    """Moves each digit on its own by up to `MAX_SHIFT` pixels; what leaves the picture is lost, what enters is black.

    The channels are shifted apart, since nothing says that digits of one picture lie on top of each other.
    """
    count = images.shape[0] * CHANNELS
    padded = jnp.pad(images.reshape(count, SIDE, SIDE), ((0, 0), (MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT)))
    corners = jax.random.randint(key, (count, 2), 0, 2 * MAX_SHIFT + 1)
    cut = jax.vmap(lambda image, corner: jax.lax.dynamic_slice(image, corner, (SIDE, SIDE)))
    return cut(padded, corners).reshape(images.shape)


def warped(images, key, rotation, scale):
    """Rotates and scales each digit about the centre of its channel, with bilinear interpolation.

    Args:
        images: uint8 (n, 3, 28, 28).
        key: JAX random key.
        rotation: largest angle in degrees.
        scale: largest relative change of size along each axis.

    Returns:
        uint8 (n, 3, 28, 28); what comes from outside of the image is black.
    """
    count = images.shape[0] * CHANNELS
    angle_key, scale_key = jax.random.split(key)
    angles = jax.random.uniform(angle_key, (count,), minval=-1, maxval=1) * math.radians(rotation)
    scales = 1 + jax.random.uniform(scale_key, (count, 2), minval=-1, maxval=1) * scale
    cos, sin = jnp.cos(angles)[:, None, None], jnp.sin(angles)[:, None, None]
    offsets = jnp.arange(SIDE) - (SIDE - 1) / 2
    down, right = offsets[:, None], offsets[None, :]
    center = (SIDE - 1) / 2
    rows = (cos * down - sin * right) * scales[:, 0, None, None] + center
    columns = (sin * down + cos * right) * scales[:, 1, None, None] + center
    sample = jax.vmap(lambda image, y, x: jax.scipy.ndimage.map_coordinates(image, [y, x], order=1))
    flat = images.reshape(count, SIDE, SIDE).astype("float32")
    return jnp.rint(sample(flat, rows, columns)).astype("uint8").reshape(images.shape)


def permuted(images, key):
    """Puts the channels of each picture in a random order of its own."""
    order = jnp.argsort(jax.random.uniform(key, images.shape[:2]), axis=1)
    return jnp.take_along_axis(images, order[:, :, None, None], axis=1)


def make_training(recipe):
    """Builds the functions of a training.

    Args:
        recipe: `Recipe`.

    Returns:
        `start(seed)`, which returns a `State`, and `advance(state, images, labels)`, which takes `STEPS_PER_CALL` steps
        in one compiled call and returns the next `State` and the mean loss.
    """
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, max(recipe.steps // 20, 1), recipe.steps)
    optimizer = optax.adamw(schedule, weight_decay=recipe.weight_decay)
    steps_per_call = min(STEPS_PER_CALL, recipe.steps)

    def start(seed):
        key, subkey = jax.random.split(jax.random.key(seed))
        parameters = init_model(subkey, recipe)
        return State(parameters, parameters, optimizer.init(parameters), key, jnp.zeros((), int))

    def loss(parameters, images, labels):
        found = log_probabilities(parameters, images, recipe.model, {})
        return -jnp.take_along_axis(found, labels[:, None], axis=1).mean()

    @jax.jit
    def advance(state, images, labels):
        def step(state, _):
            key, batch_key, shift_key, permute_key = jax.random.split(state.key, 4)
            batch = jax.random.randint(batch_key, (recipe.batch_size,), 0, len(labels))
            pictures = shifted(images[batch], shift_key) if recipe.shift else images[batch]
            if recipe.rotation or recipe.scale:
                pictures = warped(pictures, jax.random.fold_in(shift_key, 1), recipe.rotation, recipe.scale)
            if recipe.permute:
                pictures = permuted(pictures, permute_key)
            value, gradient = jax.value_and_grad(loss)(state.parameters, pictures, labels[batch])
            update, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
            parameters = optax.apply_updates(state.parameters, update)
            # At first the average follows closely, so that it forgets where it came from.
            momentum = jnp.minimum(recipe.average, (state.step + 1) / (state.step + 10))
            average = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, state.average, parameters)
            return State(parameters, average, optimizer_state, key, state.step + 1), value

        state, losses = jax.lax.scan(step, state, length=steps_per_call)
        return state, losses.mean()

    return start, advance


@jax.jit(static_argnames="model")
def predict_batch(parameters, images, model):
    return log_probabilities(parameters, images, model, {})


def predict(parameters, images, model):
    """Returns log probabilities, float32 (n, 20), for pictures uint8 (n, 3, 28, 28)."""
    batches = range(0, len(images), EVALUATION_BATCH)
    return np.concatenate([predict_batch(parameters, images[i : i + EVALUATION_BATCH], model) for i in batches])


def accuracy(parameters, split, model):
    return float(np.mean(predict(parameters, split.images, model).argmax(1) == split.labels))


def train_network(recipe, splits, seed, *, folder, resume):
    """Trains one network from scratch, or goes on from its checkpoint.

    Args:
        recipe: `Recipe`.
        splits: dict of `Split`; "train" is trained on, "valid" is only looked at.
        seed: int.
        folder: where the checkpoint lives.
        resume: bool, whether to go on from it.

    Returns:
        The averaged and calibrated parameters, learning curves (dict of lists, one value a snapshot) with such
        parameters of every snapshot under "snapshots", and seconds.
    """
    start, advance = make_training(recipe)
    state = start(seed)
    curves = {"step": [], "loss": [], "train_accuracy": [], "valid_accuracy": []}
    snapshots, seconds = [], 0.0
    settings = {**dataclasses.asdict(recipe), "widths": list(recipe.widths), "seed": seed}
    checkpoint = folder / "checkpoint.npz"
    if resume and checkpoint.exists():
        state, snapshots, curves, seconds = restore_checkpoint(checkpoint, settings, state)
        print(f"resuming after step {int(state.step):,}")
    images, labels = jnp.asarray(splits["train"].images), jnp.asarray(splits["train"].labels)
    some = {name: Split(*(a if a is None else a[:CURVE_PICTURES] for a in split)) for name, split in splits.items()}
    while int(state.step) < recipe.steps:
        started = time.time()
        state, loss = advance(state, images, labels)
        loss = float(loss)
        if not math.isfinite(loss):
            raise UserError("the loss is no longer a finite number; lower the learning rate or try another --seed")
        curves["step"].append(int(state.step))
        curves["loss"].append(loss)
        parameters = calibrated(state.average, images[:CALIBRATION_PICTURES], recipe.model)
        curves["train_accuracy"].append(accuracy(parameters, some["train"], recipe.model))
        curves["valid_accuracy"].append(accuracy(parameters, some["valid"], recipe.model))
        snapshots.append({name: np.asarray(array) for name, array in parameters.items()})
        seconds += time.time() - started
        save_checkpoint(checkpoint, settings, state, snapshots, curves, seconds)
        print(
            f"\r{recipe.model}, seed {seed}, step {int(state.step):,} of {recipe.steps:,}: loss {loss:.4f}, "
            f"{curves['valid_accuracy'][-1]:.2%} of validation right",
            end="",
            flush=True,
        )
    print()
    return snapshots[-1], {**curves, "snapshots": snapshots}, seconds


def save_checkpoint(path, settings, state, snapshots, curves, seconds):
    arrays = [np.asarray(a) for a in jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))]
    stacked = {f"snapshots_{name}": np.stack([each[name] for each in snapshots]) for name in snapshots[0]}
    about = json.dumps({"settings": settings, "curves": curves, "seconds": seconds})
    named = {f"state_{number}": array for number, array in enumerate(arrays)} | stacked
    write_file(path, lambda temporary: save_arrays(temporary, {**named, "about": np.array(about)}))


def restore_checkpoint(path, settings, state):
    """Returns state, snapshots, curves and seconds of a checkpoint; `state` is a fresh one that shows their shape."""
    try:
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            if about["settings"] != settings:
                changed = [name for name in settings if about["settings"].get(name) != settings[name]]
                raise UserError(
                    f"{path} was made with other settings ({', '.join(changed)}); use those again, or start over "
                    "without --resume"
                )
            raw = state._replace(key=jax.random.key_data(state.key))
            leaves, shape = jax.tree.flatten(raw)
            raw = jax.tree.unflatten(shape, [jnp.asarray(file[f"state_{i}"]) for i in range(len(leaves))])
            stacked = {name.removeprefix("snapshots_"): file[name] for name in file if name.startswith("snapshots_")}
            snapshots = [
                {name: array[i] for name, array in stacked.items()} for i in range(len(about["curves"]["step"]))
            ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged; start over without --resume") from error
    return raw._replace(key=jax.random.wrap_key_data(raw.key)), snapshots, about["curves"], about["seconds"]


# --------------------------------------------------------------------------------------------------------------- files


def write_file(path, write):
    """Calls `write(temporary)` and renames the temporary file to `path`, where nothing half-written is ever found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path, content):
    return write_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def save_arrays(path, arrays):
    with open(path, "wb") as file:
        np.savez(file, **arrays)


def save_weights(path, parameters, card):
    """Writes parameters (`.npz`) and their card (`.json`, with the checksum of the weights) beside them."""
    write_file(path, lambda temporary: save_arrays(temporary, parameters))
    card = {**card, "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_json(path.with_suffix(".json"), card)


def load_weights(path):
    """Returns the parameters (dict of arrays) and the card of saved weights.

    Raises:
        UserError: where they are missing, damaged, or do not belong together.
    """
    again = "get it again from the repository, or make it with --train"
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise UserError(f"{file} is missing; {again}")
    try:
        card = json.loads(path.with_suffix(".json").read_text())
        expected = card["weights_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path.with_suffix('.json')} is not the card of a network; {again}") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
        raise UserError(f"{path} is damaged (its checksum differs from the one on its card); {again}")
    with np.load(path) as file:
        return dict(file), card


def environment():
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = jax.devices()[0]
    return {
        "git_commit": git.stdout.strip() or "not a git checkout",
        "date": datetime.date.today().isoformat(),
        "backend": "jax",
        "versions": {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__},
        "hardware": f"{name}, {cores} cores" if device.platform == "cpu" else device.device_kind,
    }


# --------------------------------------------------------------------------------------------------------- experiments

WIDTHS_TRIED = {
    "shared": ((6, 12, 16, 24), (12, 24, 32, 48), (24, 48, 64, 80)),
    "ordinary": ((4, 8, 12, 16), (6, 12, 16, 24), (8, 16, 24, 32)),
}
STEPS_TRIED = (1000, 2500, 5000, 10_000)


def experiments():
    """Returns what is compared, one change at a time: dict from a name to `Recipe`."""
    named = {f"{model}, as it is": recipe for model, recipe in BASELINES.items()}
    for model, recipe in BASELINES.items():
        changes = {
            "rotation 10°, scale 10 %": {"rotation": 10.0, "scale": 0.1},
            "rotation 15°, scale 15 %": {"rotation": 15.0, "scale": 0.15},
            "batches of 128": {"batch_size": 128},
            "no shifts": {"shift": False},
        }
        if model == "ordinary":
            mixed = {"model": "mixed", "widths": (24, 48, 64, 80)}
            changes |= {"one reader of all channels": mixed, "channels in random order": {"permute": True}}
        changes |= {f"{steps:,} steps": {"steps": steps} for steps in STEPS_TRIED}
        changes |= {f"filters {' '.join(map(str, widths))}": {"widths": widths} for widths in WIDTHS_TRIED[model]}
        for name, change in changes.items():
            changed = dataclasses.replace(recipe, **change)
            if changed != recipe:
                named[f"{model}, {name}"] = changed
    return named


def run_experiments(arguments):
    """Trains every recipe of `experiments` once, measures it on validation, and adds a row a run to the table."""
    table = arguments.output_dir / "report" / "results" / f"{SCRIPT}_experiments.csv"
    rows = read_rows(table)
    finished = {(row["name"], int(row["seed"])) for row in rows}
    planned = experiments()
    left = [name for name in planned if (name, arguments.seed) not in finished][: 2 if arguments.quick else None]
    splits, _ = load_data(arguments.data_dir, arguments.quick)
    for number, name in enumerate(left):
        print(f"{len(left) - number} of {len(planned)} runs left: {name}")
        recipe = with_flags(planned[name], arguments)
        folder = arguments.output_dir / "runs" / SCRIPT / "experiment"
        parameters, curves, seconds = train_network(recipe, splits, arguments.seed, folder=folder, resume=False)
        row = {"name": name, "seed": arguments.seed, **dataclasses.asdict(recipe)}
        row |= {"parameters": count_parameters(parameters), "seconds": round(seconds, 1)}
        row |= {metric: round(curves[metric][-1], 5) for metric in ("loss", "train_accuracy")}
        row |= {"valid_accuracy": round(accuracy(parameters, splits["valid"], recipe.model), 5)}
        rows.append(row)
        write_file(table, lambda temporary: write_rows(temporary, rows))
    print(f"finished runs are in {table}")


def read_rows(path):
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"{path} has rows of different lengths; move it away to start the experiments over")
    return rows


def write_rows(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def with_flags(recipe, arguments):
    """Returns `recipe` with what the command line changes. `--epochs` counts passes over 45,000 training pictures."""
    batch_size = arguments.batch_size or recipe.batch_size
    steps = recipe.steps
    if arguments.epochs:
        steps = arguments.epochs * math.ceil(SIZES["train"] / batch_size)
    if arguments.quick:
        steps = min(steps, 20)
    steps = max(STEPS_PER_CALL, steps // STEPS_PER_CALL * STEPS_PER_CALL) if steps > STEPS_PER_CALL else steps
    return dataclasses.replace(recipe, batch_size=batch_size, steps=steps)


# ---------------------------------------------------------------------------------------------------------- evaluation


def measure(parameters, splits, model):
    """Measures a network on every split.

    Returns:
        dict from "train", "valid" and "test" to {"accuracy", "loss"} (dict of dict of float), and a dict from the same
        names to what `predict` says there.
    """
    measured, answers = {}, {}
    for name, split in splits.items():
        found = answers[name] = predict(parameters, split.images, model)
        measured[name] = {
            "accuracy": float(np.mean(found.argmax(1) == split.labels)),
            "loss": float(-found[np.arange(len(found)), split.labels].mean()),
        }
    return measured, answers


def checksum(splits):
    """SHA-256 of the pictures and labels of all splits, in order."""
    digest = hashlib.sha256()
    for split in splits.values():
        digest.update(split.images.tobytes() + split.labels.tobytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------- figures

plt.rcParams.update(
    {
        "savefig.dpi": 200,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "figure.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)
COLORS = dict(zip(MODELS, (BLUE, ORANGE), strict=True))


def save_figure(figure, path):
    write_file(path, figure.savefig)
    plt.close(figure)
    return path


def show_picture(axes, image, title, color="black"):
    """Shows one picture (3, 28, 28) as the eye sees it: red, green and blue on top of each other."""
    axes.imshow(np.moveaxis(image, 0, -1))
    axes.set_axis_off()
    axes.set_title(title, fontsize=8, loc="center", color=color)


def draw_samples(split, folder):
    """Training pictures, the first ones, with their channels apart."""
    figure, axes = plt.subplots(4, 10, figsize=(10, 4.6))
    for column in range(10):
        show_picture(axes[0, column], split.images[column], f"class {split.labels[column]}")
        for channel in range(CHANNELS):
            alone = np.zeros_like(split.images[column])
            alone[channel] = split.images[column, channel]
            digit = "" if split.digits is None else str(split.digits[column, channel])
            show_picture(axes[1 + channel, column], alone, digit)
    figure.suptitle("What the network sees, and below it what is in there: r + g + b - 1", x=0.01, ha="left")
    return save_figure(figure, folder / "samples.png")


def draw_curves(cards, folder):
    """Accuracy and loss over the steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    styles = {"train_accuracy": ":", "valid_accuracy": "--", "test_accuracy": "-"}
    for model, card in cards.items():
        curves = card["curves"]
        for name, style in styles.items():
            left.plot(curves["step"], curves[name], style, color=COLORS[model], label=f"{model}, {name[:5].strip('_')}")
        right.plot(curves["step"], curves["loss"], color=COLORS[model], label=model)
    lowest = min(min(card["curves"]["test_accuracy"][len(card["curves"]["step"]) // 8 :]) for card in cards.values())
    left.set(xlabel="optimisation step", ylabel="accuracy", ylim=(max(0, lowest - 0.02), 1.002))
    left.yaxis.set_major_formatter("{x:.0%}")
    left.legend()
    left.set_title("Accuracy of the averaged weights; test evaluated afterwards")
    right.set(xlabel="optimisation step", ylabel="training loss, with shifts", yscale="log")
    right.legend()
    right.set_title("Loss")
    return save_figure(figure, folder / "curves.png")


def confusion(truth, answer, size):
    counts = np.zeros((size, size), int)
    np.add.at(counts, (truth, answer), 1)
    return counts


def draw_confusion(found, split, model, folder):
    """Which classes are taken for which, in counts."""
    counts = confusion(split.labels, found.argmax(1), NUM_CLASSES)
    figure, axes = plt.subplots(figsize=(8, 7.4))
    axes.imshow(np.sqrt(counts / np.maximum(counts.sum(1, keepdims=True), 1)), cmap="Blues", vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = "white" if row == column else "black"
        axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="predicted class", ylabel="true class", title=f"Test pictures, the {model} network")
    axes.set_xticks(range(NUM_CLASSES))
    axes.set_yticks(range(NUM_CLASSES))
    axes.grid(False)
    return save_figure(figure, folder / f"confusion_{model}.png")


def draw_mistakes(found, split, folder):
    """The 20 mistakes that the shared network is surest of."""
    wrong = np.flatnonzero(found.argmax(1) != split.labels)
    chosen = wrong[np.argsort(-found[wrong].max(1))][:20]
    figure, axes = plt.subplots(2, 10, figsize=(10, 2.7))
    for panel in axes.flat:
        panel.set_axis_off()
    for panel, number in zip(axes.flat, chosen, strict=False):
        digits = "" if split.digits is None else "+".join(map(str, split.digits[number])) + "-1 = "
        show_picture(panel, split.images[number], f"{digits}{split.labels[number]}\nnot {found[number].argmax()}", RED)
    figure.suptitle("The most confident mistakes: the truth, and what the network says instead", x=0.01, ha="left")
    return save_figure(figure, folder / "mistakes.png")


def draw_digits(counts, folder):
    """What the shared network reads from single channels, although it never saw a digit's label."""
    share = counts / counts.sum(axis=1, keepdims=True)
    figure, axes = plt.subplots(figsize=(5.6, 5.2))
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        color = "white" if share[row, column] > 0.4 else "black"
        axes.text(column, row, f"{share[row, column]:.1%}", ha="center", va="center", fontsize=7, color=color)
    axes.set(xlabel="digit that the network reads", ylabel="digit in the channel", title="It found out what digits are")
    axes.set_xticks(range(NUM_DIGITS))
    axes.set_yticks(range(NUM_DIGITS))
    axes.grid(False)
    return save_figure(figure, folder / "digits.png")


def draw_scaling(rows, folder):
    """Validation accuracy against the number of parameters and of steps."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    titles = {"parameters": "Narrower and wider networks", "steps": "Shorter and longer trainings"}
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        for model in MODELS:
            kind = "filters" if column == "parameters" else "steps"
            points = sorted(
                (int(row[column]), float(row["valid_accuracy"]))
                for row in rows
                if row["model"] == model and (row["name"].endswith("as it is") or kind in row["name"])
            )
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=COLORS[model], label=model)
        panel.set(xscale="log", xlabel=column if column == "parameters" else "optimisation steps")
        panel.set(ylabel="validation accuracy", title=title)
        panel.yaxis.set_major_formatter("{x:.0%}")
        panel.legend()
    return save_figure(figure, folder / "scaling.png")


# ---------------------------------------------------------------------------------------------------------------- main


def train(arguments):
    """Trains all seeds of the wanted models; saves the weights of the first one, and the metrics of all on its card."""
    splits, source = load_data(arguments.data_dir, arguments.quick)
    trained = {}
    for model in [arguments.model] if arguments.model else MODELS:
        recipe = with_flags(RECIPES[model], arguments)
        for seed in range(arguments.seed, arguments.seed + (1 if arguments.quick else NUM_SEEDS)):
            folder = arguments.output_dir / "runs" / SCRIPT / f"{model}_seed_{seed}"
            trained[model, seed] = train_network(recipe, splits, seed, folder=folder, resume=arguments.resume)
    data_checksum = checksum(splits)
    # The test pictures are read from here on, after the last training.
    for model in dict.fromkeys(model for model, _ in trained):
        recipe = with_flags(RECIPES[model], arguments)
        of_seeds = {}
        for (name, seed), (parameters, _, seconds) in trained.items():
            if name == model:
                of_seeds[seed] = {"seconds": round(seconds, 1), "metrics": measure(parameters, splits, model)[0]}
        parameters, curves, _ = trained[model, arguments.seed]
        snapshots = curves.pop("snapshots")
        test_curve = [accuracy(snapshot, splits["test"], model) for snapshot in snapshots]
        num_parameters = count_parameters(parameters)
        card = {
            "script": f"{SCRIPT}.py",
            "model": model,
            "command": arguments.command,
            **environment(),
            "seed": arguments.seed,
            "recipe": dataclasses.asdict(recipe),
            "epochs": round(recipe.steps * recipe.batch_size / len(splits["train"].labels), 1),
            "steps": recipe.steps,
            "batch_size": recipe.batch_size,
            "parameters": {"trainable": num_parameters, "total": num_parameters},
            "penalty": penalty(num_parameters, recipe.steps),
            "dataset": {
                "name": f"AddNIST, {source}",
                **{name: len(split.labels) for name, split in splits.items()},
                "sha256": data_checksum,
            },
            "shortened": "--quick: a few pictures and steps only" if arguments.quick else None,
            "seconds": of_seeds[arguments.seed]["seconds"],
            "curves": {**curves, "test_accuracy": test_curve},
            "metrics": of_seeds[arguments.seed]["metrics"],
            "seeds": of_seeds,
        }
        save_weights(arguments.output_dir / "saved_models" / SCRIPT / f"{model}.npz", parameters, card)


def summarise(cards, measured, rows):
    """Builds what `report/results/addnist_classifier.json` holds.

    Args:
        cards: dict from model to its card.
        measured: dict from model to its metrics.
        rows: list of dict of str, the experiment table.
    """
    results = {"script": f"{SCRIPT}.py", "models": {}}
    for model, card in cards.items():
        of_seeds = list(card["seeds"].values())
        summary = {}
        for part in SIZES:
            for name in ("accuracy", "loss"):
                values = [seed["metrics"][part][name] for seed in of_seeds]
                summary[f"{part}_{name}"] = {
                    "mean": float(np.mean(values)),
                    "std": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                }
        results["models"][model] = {
            **measured[model],
            "seeds": {"number": len(of_seeds), **summary},
            "parameters": card["parameters"]["trainable"],
            "steps": card["steps"],
            "penalty": card["penalty"],
            "minutes": round(card["seconds"] / 60, 1),
            "hardware": card["hardware"],
            "shortened": card["shortened"],
            "data": card["dataset"]["name"],
        }
    main_model = next(iter(results["models"]))
    results["test"] = results["models"][main_model]["test"]
    results["experiments"] = {
        row["name"]: {"parameters": int(row["parameters"]), "valid_accuracy": float(row["valid_accuracy"])}
        for row in rows
    }
    return results


def report(arguments):
    """Restores the saved networks, measures them on the test pictures, writes results and figures."""
    folder = arguments.output_dir / "saved_models" / SCRIPT
    folder = folder if folder.is_dir() else REPOSITORY / "saved_models" / SCRIPT
    print(f"models from {folder}")
    restored = {m: load_weights(folder / f"{m}.npz") for m in ([arguments.model] if arguments.model else MODELS)}
    splits, source = load_data(arguments.data_dir, arguments.quick)
    print(f"AddNIST, {source}; {KNOWN_RESULTS}")
    measured, answers, cards, data_checksum = {}, {}, {}, checksum(splits)
    for model, (parameters, card) in restored.items():
        cards[model] = card
        measured[model], found = measure(parameters, splits, model)
        answers[model] = found["test"]
        print(
            f"\n{model}: {card['parameters']['trainable']:,} parameters (fewer than {PARAMETER_LIMIT:,} allowed), "
            f"{card['steps']:,} steps ({STEP_LIMIT:,} allowed), penalty {card['penalty']} marks"
        )
        same_data = card["dataset"]["sha256"] == data_checksum
        print(f"{'metric':16} measured" + ("  recorded" if same_data else ""))
        for part, values in measured[model].items():
            for name, value in values.items():
                line = f"{part + ' ' + name:16} {value:8.4f}"
                if same_data:
                    recorded = card["metrics"][part][name]
                    line += f"  {recorded:8.4f}" + ("" if abs(value - recorded) < 5e-4 else "  differs")
                print(line)
        if not same_data:
            print("note: these are other pictures than those that the recorded metrics were measured on")

    report_folder = arguments.output_dir / "report"
    rows = read_rows(report_folder / "results" / f"{SCRIPT}_experiments.csv")
    results = summarise(cards, measured, rows)
    drawings = report_folder / "figures" / SCRIPT
    test = splits["test"]
    written = [draw_samples(splits["train"], drawings)]
    if not arguments.model:  # both networks share the figure
        written.append(draw_curves(cards, drawings))
    written += [draw_confusion(answers[model], test, model, drawings) for model in cards]
    if "shared" in cards:
        written.append(draw_mistakes(answers["shared"], test, drawings))
        if test.digits is not None:
            batches = [test.images[i : i + EVALUATION_BATCH] for i in range(0, len(test.images), EVALUATION_BATCH)]
            read = jax.jit(lambda parameters, images: digit_log_probabilities(parameters, images, {}))
            digits = np.concatenate([read(restored["shared"][0], images) for images in batches])
            counts = confusion(test.digits.ravel(), digits.argmax(-1).ravel(), NUM_DIGITS)
            results["digit_accuracy"] = float(np.trace(counts) / counts.sum())
            written.append(draw_digits(counts, drawings))
    if rows:
        written.append(draw_scaling(rows, drawings))
    results_file = report_folder / "results" / f"{SCRIPT}.json"
    if arguments.model and results_file.exists():  # the other model keeps its results
        previous = json.loads(results_file.read_text())
        results = {**previous, **results, "models": {**previous["models"], **results["models"]}}
        results["test"] = results["models"].get("shared", results)["test"]
    written.append(write_json(results_file, results))
    print("\nwrote", *written, sep="\n  ")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, like every other error."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def parse(argv):
    """Returns the command line as an `argparse.Namespace`; the flags are those of all scripts of the collection."""
    flags = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    mode = flags.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true", help="build, fit, save, evaluate, write figures and results")
    mode.add_argument(
        "--load", action="store_true", help="restore from saved_models/, evaluate, write the same figures"
    )
    mode.add_argument("--experiments", action="store_true", help="the comparison behind the choices; can be resumed")
    mode.add_argument("--download", action="store_true", help="fetch the official AddNIST arrays into DATA_DIR/addnist")
    flags.add_argument("--model", choices=MODELS, help="one of the models (default: all)")
    flags.add_argument("--quick", action="store_true", help="a few steps into runs/quick/: proves that it works")
    flags.add_argument("--epochs", type=positive, metavar="N", help="passes over the training set")
    flags.add_argument("--batch-size", type=positive, metavar="N", help="examples per optimisation step")
    flags.add_argument("--seed", type=int, default=0, metavar="N", help="seed of everything random (default: 0)")
    flags.add_argument("--resume", action="store_true", help="go on from the last checkpoint of a stopped --train")
    flags.add_argument(
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("DATA_DIR", REPOSITORY / "data")),
        metavar="DIR",
        help="where datasets are kept (default: $DATA_DIR, else data)",
    )
    flags.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="where everything is written, and read by --load (default: the repository; runs/quick with --quick)",
    )
    arguments = flags.parse_args(argv)
    if arguments.output_dir is None:
        arguments.output_dir = REPOSITORY / "runs" / "quick" if arguments.quick else REPOSITORY
    if arguments.resume and arguments.load:
        raise UserError("--resume goes on with a training, --load never trains; leave one of them out")
    if not 0 <= arguments.seed < 2**32:
        raise UserError(f"--seed {arguments.seed} is out of range; choose one from 0 to {2**32 - 1}")
    arguments.command = shlex.join(["python", flags.prog, *(sys.argv[1:] if argv is None else argv)])
    return arguments


def main(argv=None):
    arguments = parse(argv)
    if arguments.download:
        download_official(arguments.data_dir / "addnist")
        load_official(arguments.data_dir / "addnist")
        print(f"the official AddNIST is in {arguments.data_dir / 'addnist'}")
    elif arguments.experiments:
        run_experiments(arguments)
    else:
        if arguments.train:
            train(arguments)
        report(arguments)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("error: interrupted; what was saved stays, go on with --resume", file=sys.stderr)
        sys.exit(130)
