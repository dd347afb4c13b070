"""CIFAR-100 images from fewer than 1,000,000 parameters and at most 50,000 optimisation steps, in pure JAX.

A class-conditional diffusion model (Karras et al. 2022): a U-Net learns to denoise images at every noise level, and a
deterministic sampler turns Gaussian noise, the latent vector, into images.

    python cifar100_generator.py --train                            trains, measures and saves the network
    python cifar100_generator.py --load                             restores it, compares with the recorded metrics
    python cifar100_generator.py --load --sample                    the same on images in the repository
    python cifar100_generator.py --experiments                      what each choice is worth
    python cifar100_generator.py --load --samples 64 --class tiger  generates images, without a dataset

FID (768-d) of 10,000 samples to the test images 0.45, n = 1; our classifier takes 38 % of them for the class asked for.
947,836 parameters, 26,000 steps in 160 minutes on 2 cores of a server CPU.

One file, and nothing but NumPy, JAX and Optax to train and sample, as the assignment asks. Moving averages of the
weights are copies of the same network, not further parameters.
"""

import os
import signal
import sys

if __name__ == "__main__":  # Ctrl-C ends in one line, also during the imports below and inside compiled code
    INTERRUPTED = b"\nerror: interrupted; what was saved stays; --train continues with --resume\n"
    signal.signal(signal.SIGINT, lambda *_: (os.write(2, INTERRUPTED), os._exit(130)))

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import http.client
import importlib
import io
import json
import math
import platform
import shlex
import subprocess
import tarfile
import time
import urllib.request
from collections import namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Config:  # of a training run
    patch: int = 2  # side of the squares of pixels that become channels before the first convolution
    widths: tuple = (56, 80, 104)  # channels of the maps, whose sides halve from level to level
    blocks: tuple = (1, 1, 1)  # residual blocks of each level on the way down, and as many on the way up
    attention: int = 8  # side of the maps with self-attention after every block; 0 for none
    embedding: int = 64  # units that represent noise level and class
    target: str = "edm"  # what is predicted: "edm" (Karras et al. 2022, table 1) or "velocity" (Liu et al. 2023)
    noise_mean: float = -1.2  # of the logarithm of the noise levels, normally distributed, before the first restart
    noise_deviation: float = 1.2
    label_dropout: float = 0.1  # share of images whose class is withheld, for guidance
    steps: int = 26_000  # optimisation steps
    restarts: tuple = (16_000,)  # steps after which optimiser and averages start again, from the averaged weights
    restart_noise: tuple = (-0.2, 1.5)  # mean and deviation from then on: higher levels decide shapes and classes
    batch_size: int = 64
    learning_rate: float = 1e-3  # the highest, after warm-up and before cosine decay
    averages: tuple = (0.999, 0.9995, 0.9999)  # momenta, lower at first; that of the lowest held-out loss is saved


@dataclasses.dataclass(frozen=True)
class Sampling:  # how images are generated
    steps: int = 18  # of Heun's method, which calls the network twice in all but the last
    guidance: float = 5.0  # until one is chosen; 1 is the network, more exaggerates the class (Ho & Salimans 2022)
    low: float = 0.2  # guidance applies between these noise levels only (Kynkäänniemi et al. 2024)
    high: float = 20.0


CONFIG, TASK = Config(), sys.modules[__name__]  # of the saved network; this module, for experiments/
PARAMETER_LIMIT, STEP_LIMIT = 1_000_000, 50_000  # fewer than that many parameters, at most that many steps
SCRIPT, MODEL, REPOSITORY = "cifar100_generator", "diffusion", Path(__file__).resolve().parent
SAMPLE = REPOSITORY / "data" / "samples" / "cifar100.npz"
CLASSIFIER = REPOSITORY / "saved_models" / "cifar100_transfer" / "own_3.keras"
NUM_CLASSES, SIDE, CHANNELS, SHAPE = 100, 32, 3, (32, 32, 3)
DATA_SEED = 2024  # of the held-out images and of the noise that the loss is measured with
CPU = jax.default_backend() == "cpu"  # where gradients of XLA's convolutions take three times as long
PART = 16  # images whose gradients are computed together on a CPU, since those of more do not fit into its cache
STEPS_PER_CHECKPOINT = 250  # optimisation steps, also between the points of the learning curves
SNAPSHOT_STEPS = 4_000  # between weights that are kept to measure FID over training
BATCH = 16 if CPU else 500  # of images that are generated or measured; more do not fit into the cache of a CPU
CURVE_ITEMS, MEASURED_ITEMS = 1000, 10_000  # of each split, at most: for learning curves, and for metrics
HIGHEST, LOWEST, SPACING = 80.0, 0.002, 7  # noise levels of the sampler (Karras et al. 2022, equation 5)
DATA_DEVIATION = 0.5  # of pixel values, which are scaled to -1 to 1 (Karras et al. 2022, table 1)
MEASURED_NOISE = -1.2, 1.2  # mean and deviation of the logarithm of the noise levels that the loss is measured at
NUM_UNSELECTED, BALANCED = 64, np.arange(MEASURED_ITEMS) % NUM_CLASSES  # the brief's batch; classes of others
ONE_HOT = np.eye(NUM_CLASSES + 1, dtype="float32")  # class weights; the last stands for "no class"
RESULTS = ("parameters", "steps", "penalty", "seconds", "hardware", "shortened", "sampling", "scale", "second_seed")
ON_CARD = ("seed", "dataset", "metrics", "measured_on", "curves", "choices", "class_names")  # what else is needed
CURVES = ("step", "loss", "train_loss", "valid_loss")
TOLERANCE, TOLERANCE_ELSEWHERE = 5e-4, 5e-3  # of metrics, relative, on the platform they are recorded on, and others
SMALLEST, SMALLEST_OF = 0.2, {"kernel_distance": 0.01}  # below, the tolerance no longer falls with the metric
ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz"
ARCHIVE_SHA256 = "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec"
Split = namedtuple("Split", "images labels")  # uint8 (n, 32, 32, 3), int32 (n,) 0 to 99
State = namedtuple("State", "parameters averages optimizer key step")  # of a training run; averages: a tuple


class UserError(Exception):
    """A failure that the user can fix. Its text is one line: what happened; what to do."""


# ---------------------------------------------------------------------------------------------------------------- data
def load_data(data_dir, quick=False, sample=False):
    """Returns CIFAR-100, a dict of `Split` ("train", "valid", "test"), and the names of its classes (list of str).

    A tenth of the official training images of each class is held out: the same, wherever they come from.
    """
    splits, count = {}, 200 if quick else None
    advice = "get it again from the repository" if sample else "delete it and get it again, or add --sample"
    with reading(SAMPLE if sample else data_dir / "*" / "cifar100", advice):
        arrays = dict(np.load(SAMPLE)) if sample else load_cifar(data_dir)
        names = [str(name) for name in arrays["class_names"]]
        for part in ("train", "test"):
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].astype("int32")
            found = images.shape, images.dtype, labels.min(), labels.max(), len(names)
            if found != ((len(labels), *SHAPE), np.uint8, 0, NUM_CLASSES - 1, NUM_CLASSES):
                raise ValueError("it does not hold images of 32 x 32 x 3 bytes of 100 classes")
            order = np.array(sorted(range(len(labels)), key=lambda i: (images[i].tobytes(), labels[i])))
            order = np.random.default_rng(DATA_SEED).permutation(order)
            splits[part] = Split(images[order], labels[order])
        by_class = np.argsort(splits["train"].labels, kind="stable").reshape(NUM_CLASSES, -1)  # as many of each
    held_out = np.isin(np.arange(by_class.size), by_class[:, : max(by_class.shape[1] // 10, 1)])
    chosen = {"train": ("train", ~held_out), "valid": ("train", held_out), "test": ("test", slice(None))}
    return {name: Split(*(array[rows][:count] for array in splits[of])) for name, (of, rows) in chosen.items()}, names


def load_cifar(data_dir):
    """Returns the official arrays (dict) from the cache of the other scripts, or else from the official archive."""
    cache, path, arrays = data_dir / "cache" / "cifar100", data_dir / "cifar100" / Path(ARCHIVE).name, {}
    if (cache / "manifest.json").exists():  # written last
        manifest = json.loads((cache / "manifest.json").read_text("utf-8"))
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            if hashlib.sha256((cache / f"{name}.npy").read_bytes()).hexdigest() != manifest["sha256"][name]:
                raise ValueError(f"the checksum of {name}.npy is not the one in manifest.json")
            arrays[name] = np.load(cache / f"{name}.npy")
        return arrays | {"class_names": manifest["class_names"]}
    if not path.exists():
        print(f"downloading {ARCHIVE}")
        try:
            with urllib.request.urlopen(ARCHIVE, timeout=15) as response:
                write_file(path, response.read())
        except (OSError, http.client.HTTPException) as error:
            reason = f"{path.name} is not in {path.parent} and cannot be downloaded ({error})"
            raise UserError(f"{reason}; put {ARCHIVE} by hand into {path.parent}, or add --sample") from error
    if hashlib.sha256(path.read_bytes()).hexdigest() != ARCHIVE_SHA256:
        raise ValueError(f"the checksum of {path.name} is not the official one")
    with tarfile.open(path) as archive:
        for part in ("train", "test"):  # rows of a coarse label, a fine label, and red, green and blue
            content = archive.extractfile(f"cifar-100-binary/{part}.bin").read()
            rows = np.frombuffer(content, np.uint8).reshape(-1, 2 + math.prod(SHAPE))
            arrays[f"{part}_images"] = rows[:, 2:].reshape(-1, CHANNELS, SIDE, SIDE).transpose(0, 2, 3, 1)
            arrays[f"{part}_labels"] = rows[:, 1]
        names = archive.extractfile("cifar-100-binary/fine_label_names.txt").read().decode().split()
        return arrays | {"class_names": names}


# --------------------------------------------------------------------------------------------------------------- model
def convolve(maps, kernel, stride):
    """Convolves maps (n, side, side, channels) with kernels of 3 x 3, stride 1, zero padding, or of 2 x 2, stride 2."""
    if not CPU:
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": "highest"}  # no TF32
        return jax.lax.conv_general_dilated(maps, kernel, (stride, stride), "SAME", **options)
    (size, *_, filters), side, margin = kernel.shape, maps.shape[1], len(kernel) // 3
    maps = jnp.pad(maps, ((0, 0), (margin, margin), (margin, margin), (0, 0)))
    shifted = [maps[:, i : i + side : stride, j : j + side : stride] for i in range(size) for j in range(size)]
    patches = jnp.concatenate(shifted, axis=-1)  # the pixels under the kernel at each position
    return jnp.matmul(patches, kernel.reshape(-1, filters), precision="highest")


def unet(weight, inputs, log_sigma, conditions, config):
    """The U-Net: images (n, 32, 32, 3), logarithms of noise levels (n,), class weights (n, 101) to (n, 32, 32, 3)."""

    def dense(inputs, name, units, gain=1.0):
        kernel = weight(f"{name}_kernel", (inputs.shape[-1], units), gain)
        return jnp.matmul(inputs, kernel, precision="highest") + weight(f"{name}_bias", (units,), 0.0)

    def convolution(maps, name, filters, size=3, stride=1, gain=1.0):
        kernel = weight(f"{name}_kernel", (size, size, maps.shape[-1], filters), gain)
        return convolve(maps, kernel, stride) + weight(f"{name}_bias", (filters,), 0.0)

    def normalized(maps, scale, shift):  # group normalisation (Wu & He 2018), scale and shift per image or for all
        count, *_, channels = maps.shape
        moments = maps.mean((1, 2)), jnp.square(maps).mean((1, 2))
        mean, square = (m.reshape(count, channels // 8, 8).mean(-1).repeat(8, axis=-1) for m in moments)
        scale = (1 + scale) * jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0) + 1e-5)
        return maps * scale[:, None, None] + (shift - mean * scale)[:, None, None]

    def activated(maps, name):  # before a convolution
        scale, shift = weight(f"{name}_scale", maps.shape[-1:], 0.0), weight(f"{name}_shift", maps.shape[-1:], 0.0)
        return jax.nn.silu(normalized(maps, scale, shift))

    def block(maps, name):
        width = maps.shape[-1]
        hidden = convolution(activated(maps, f"{name}_first"), f"{name}_first", width)
        scale, shift = jnp.split(dense(embedded, f"{name}_condition", 2 * width, 0.1), 2, axis=-1)
        hidden = jax.nn.silu(normalized(hidden, scale, shift))
        maps = maps + convolution(hidden, f"{name}_second", width, gain=0.0)
        return maps + attention(maps, f"{name}_attention") if maps.shape[1] == config.attention else maps

    def attention(maps, name, heads=4):  # over all positions (Vaswani et al. 2017)
        flat = normalized(maps, *jnp.zeros(2)).reshape(len(maps), -1, maps.shape[-1])
        parts = jnp.split(dense(flat, f"{name}_inputs", 3 * maps.shape[-1]), 3, axis=-1)
        query, key, value = (part.reshape(*part.shape[:2], heads, -1) for part in parts)
        with jax.default_matmul_precision("highest"):
            outputs = jax.nn.dot_product_attention(query, key, value).reshape(flat.shape)
        return dense(outputs, f"{name}_outputs", maps.shape[-1], 0.0).reshape(maps.shape)

    angles = log_sigma[:, None] * 2.0 ** jnp.linspace(-2, 3, 16)
    embedded = dense(jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1), "noise", config.embedding)
    classes = weight("classes", (NUM_CLASSES + 1, config.embedding), 10.0)  # about 1 each
    embedded = embedded + jnp.matmul(conditions, classes, precision="highest")
    embedded = jax.nn.silu(dense(jax.nn.silu(embedded), "embedded", config.embedding))

    count, patch, side, last = len(inputs), config.patch, SIDE // config.patch, len(config.widths) - 1
    maps = inputs.reshape(count, side, patch, side, patch, CHANNELS)
    maps = maps.transpose(0, 1, 3, 2, 4, 5).reshape(count, side, side, -1)
    maps, skips = convolution(maps, "input", config.widths[0]), []
    for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
        if level:
            maps = convolution(maps, f"down_{level}", width, size=2, stride=2)
        for number in range(blocks):
            maps = block(maps, f"down_{level}_{number}")
        skips.append(maps)
    for level, width in reversed(list(enumerate(config.widths))):
        if level < last:  # projected before upsampling: the same, cheaper; gain 1/√2, as two maps are added
            maps = dense(maps, f"up_{level}", width, 0.7).repeat(2, axis=1).repeat(2, axis=2)
            maps = maps + dense(skips[level], f"skip_{level}", width, 0.7)
        for number in range(config.blocks[level]):
            maps = block(maps, f"up_{level}_{number}")
    maps = convolution(activated(maps, "output"), "output", CHANNELS * patch**2, gain=0.0)
    maps = maps.reshape(count, side, side, patch, patch, CHANNELS).transpose(0, 1, 3, 2, 4, 5)
    return maps.reshape(inputs.shape)


def init_model(seed, config):
    """Returns fresh parameters: dict of float32 arrays, normal with a variance of gain² / inputs."""
    parameters, generator = {}, np.random.default_rng(seed)

    def weight(name, shape, gain):
        scale = np.float32(gain / math.sqrt(math.prod(shape[:-1])))
        return parameters.setdefault(name, scale * generator.standard_normal(shape, dtype="float32"))

    inputs = jnp.zeros((1, *SHAPE)), jnp.zeros(1), jnp.zeros((1, NUM_CLASSES + 1))
    jax.eval_shape(lambda: unet(weight, *inputs, config))  # which asks for all of them and computes nothing
    return parameters


def penalty(num_parameters, steps):
    """Marks taken off: 5 per tenth above 1,000,000 parameters (or exactly that many) and above 50,000 steps."""
    too_large = math.ceil((num_parameters - PARAMETER_LIMIT) / (PARAMETER_LIMIT // 10))
    too_long = math.ceil((steps - STEP_LIMIT) / (STEP_LIMIT // 10))
    return 5 * (max(too_large, int(num_parameters == PARAMETER_LIMIT)) + max(too_long, 0))


def budget(config):
    """Returns number of parameters, penalty, and a line (str) about both numbers and their limits."""
    count = sum(array.size for array in init_model(0, config).values())
    text = f"{count:,} of fewer than {PARAMETER_LIMIT:,} parameters, {config.steps:,} of at most {STEP_LIMIT:,} steps"
    return count, penalty(count, config.steps), f"{text}, penalty {penalty(count, config.steps)}"


def preconditioning(sigma, target):
    """Returns factors of the noisy image and of the network's output in the denoised image, and of its input."""
    if target == "velocity":  # noise minus image, where (1 - t) image + t noise has the noise level t / (1 - t)
        return 1 / (1 + sigma), -sigma / (1 + sigma), 1 / (1 + sigma)
    total = jnp.sqrt(jnp.square(sigma) + DATA_DEVIATION**2)
    return jnp.square(DATA_DEVIATION / total), sigma * DATA_DEVIATION / total, 1 / total


def predict(parameters, noisy, sigma, conditions, config):
    """Returns the network's output at noise levels (n,), and the first two factors of `preconditioning`."""
    skip, out, scale = (factor[:, None, None, None] for factor in preconditioning(sigma, config.target))
    output = unet(lambda name, *_: parameters[name], scale * noisy, jnp.log(sigma), conditions, config)
    return output, skip, out


@jax.jit(static_argnames=("config", "guided"))
def denoise(parameters, noisy, sigma, conditions, guidance, config, guided):
    """Estimates the images (n, 32, 32, 3), -1 to 1, in noisy ones, with classifier-free guidance where `guided`."""
    if guided:  # without a class as well, in the same batch
        nothing = jnp.zeros_like(conditions).at[:, -1].set(1)
        noisy, sigma = jnp.tile(noisy, (2, 1, 1, 1)), jnp.tile(sigma, 2)
        conditions = jnp.concatenate([conditions, nothing])
    output, skip, out = predict(parameters, noisy, sigma, conditions, config)
    images = skip * noisy + out * output
    conditional, unconditional = jnp.split(images, 2) if guided else (images, images)
    return unconditional + guidance * (conditional - unconditional) if guided else images


# ------------------------------------------------------------------------------------------------- losses and training
def make_optimizer(config, begin=0):  # for the stage of training that begins after that step
    steps = min(step for step in (*config.restarts, config.steps) if step > begin) - begin
    schedule = optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, steps // 50 + 1, steps + 1)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def start(parameters, key, step, config):
    """Returns a fresh `State`: at the beginning, and at each warm restart (after Loshchilov & Hutter 2017)."""
    parameters, *averages = (jax.tree.map(np.array, parameters) for _ in (0, *config.averages))
    return State(parameters, tuple(averages), make_optimizer(config, step).init(parameters), key, jnp.asarray(step))


@jax.jit(static_argnames=("config", "steps", "begin"), donate_argnums=0)
def advance(state, images, labels, config, steps, begin=0):
    """Takes `steps` steps of the stage that began after step `begin`, in one call: next `State` and mean loss."""
    optimizer, count = make_optimizer(config, begin), config.batch_size
    mean, deviation = config.restart_noise if begin else (config.noise_mean, config.noise_deviation)
    parts = count // PART if CPU and count % PART == 0 else 1

    def loss(parameters, clean, noise, sigma, conditions):
        noisy = clean + noise * sigma[:, None, None, None]
        output, skip, out = predict(parameters, noisy, sigma, conditions, config)
        # The error of the denoised image, weighted so that every noise level counts alike at first.
        return jnp.mean(jnp.square(output - (clean - skip * noisy) / out))

    def step(state, _):
        key, batch_key, mirror_key, noise_key, level_key, drop_key = jax.random.split(state.key, 6)
        chosen = jax.random.randint(batch_key, (count,), 0, len(labels))
        clean = images[chosen].astype("float32") / 127.5 - 1
        clean = jnp.where(jax.random.bernoulli(mirror_key, shape=(count, 1, 1, 1)), clean[:, :, ::-1], clean)
        # One noise level from each of as many equally likely intervals (Kingma et al. 2021, appendix I.1).
        quantile = (jnp.arange(count) + jax.random.uniform(level_key, (count,), minval=1e-3)) / count
        quantile = jnp.minimum(quantile, 1 - 2**-24)  # rounding must not make it 1, whose noise level is infinite
        sigma = jnp.exp(mean + deviation * jax.scipy.special.ndtri(quantile))
        dropped = jax.random.bernoulli(drop_key, config.label_dropout, (count,))
        conditions = jax.nn.one_hot(jnp.where(dropped, NUM_CLASSES, labels[chosen]), NUM_CLASSES + 1)
        noise = jax.random.normal(noise_key, clean.shape)
        batch = jax.tree.map(lambda a: a.reshape(parts, -1, *a.shape[1:]), (clean, noise, sigma, conditions))
        found = jax.lax.map(lambda part: jax.value_and_grad(loss)(state.parameters, *part), batch)
        value, gradient = jax.tree.map(lambda of_parts: of_parts.mean(axis=0), found)
        update, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
        parameters = optax.apply_updates(state.parameters, update)
        # At first the averages follow closely, so that they forget the weights that the stage began with.
        age, pairs = state.step - begin, zip(state.averages, config.averages, strict=True)
        early = (age + 1) / (age + 10)
        averages = tuple(optax.incremental_update(parameters, old, 1 - jnp.minimum(m, early)) for old, m in pairs)
        return State(parameters, averages, optimizer_state, key, state.step + 1), value

    state, losses = jax.lax.scan(step, state, length=steps)
    return state, losses.mean()


def train_network(config, splits, seed, *, name, folder, resume):
    """Trains on "train", with checkpoints and snapshots in `folder`: averaged weights, learning curves, and seconds."""
    settings = json.loads(json.dumps(dataclasses.asdict(config)))
    settings |= {"seed": seed, "data": checksum_of([splits["train"]])}
    path, curves, seconds = folder / "checkpoint.npz", {key: [] for key in CURVES}, 0.0
    state = start(init_model(seed, config), jax.random.PRNGKey(seed), 0, config)
    with reading(path, "start over without --resume"):
        if resume and path.exists():
            arrays, expected = dict(np.load(path)), {str(n): leaf for n, leaf in enumerate(jax.tree.leaves(state))}
            about = json.loads(str(arrays.pop("about")))
            changed = ", ".join(key for key in settings if about["settings"].get(key) != settings[key])
            if changed:
                raise UserError(f"{path} was made with other settings ({changed}); use those, or no --resume")
            curves, seconds = {name: list(about["curves"][name]) for name in CURVES}, float(about["seconds"])
            check_arrays(arrays, expected)
            state = jax.tree.unflatten(jax.tree.structure(state), [jnp.asarray(arrays[n]) for n in expected])
            print(f"resuming after step {int(state.step):,}")
    images, labels = (jnp.asarray(array) for array in splits["train"])
    while int(state.step) < config.steps:
        started, step = time.time(), int(state.step)
        begin = max(first for first in (0, *config.restarts) if first <= step)
        if step == begin > 0:
            state = start(state.averages[0], state.key, step, config)
        steps = min(end - step for end in (*config.restarts, config.steps, step + STEPS_PER_CHECKPOINT) if end > step)
        state, loss = advance(state, images, labels, config, steps, begin)
        values = [int(state.step), float(loss)]
        values += [denoising_loss(state.averages[0], splits[part], config, CURVE_ITEMS) for part in ("train", "valid")]
        if not np.isfinite(values).all():
            raise UserError("the loss is no longer a finite number; try another --seed or a larger --batch-size")
        curves = {key: [*curves[key], value] for key, value in zip(CURVES, values, strict=True)}
        seconds += time.time() - started
        if values[0] % SNAPSHOT_STEPS == 0:
            write_file(folder / f"snapshot_{values[0]:05}.npz", jax.tree.map(np.float16, state.averages[0]))
        about = json.dumps({"settings": settings, "curves": curves, "seconds": seconds})
        write_file(path, {"about": np.array(about), **{str(n): leaf for n, leaf in enumerate(jax.tree.leaves(state))}})
        progress = f"{name}, step {values[0]:,} of {config.steps:,}: loss {values[1]:.4f}, validation {values[3]:.4f}"
        print(f"\r{progress}, {steps * config.batch_size / (time.time() - started):,.0f} images/s", end="", flush=True)
    print()
    return jax.tree.map(np.asarray, state.averages), curves, seconds


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
        if isinstance(error, UserError | MemoryError | jax.errors.JaxRuntimeError):  # the file may be good
            raise
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({error!r:.120})"
        raise UserError(f"{getattr(error, 'filename', None) or path} {reason}; {advice}") from error


def check_arrays(arrays, expected):
    """Raises an error where names, shapes or types differ from those `expected`, or numbers are not finite."""
    for name in arrays.keys() | expected.keys():
        array, like = arrays[name], expected[name]
        if (array.shape, array.dtype) != (like.shape, like.dtype) or not np.isfinite(array).all():
            raise ValueError(f"{name} has another shape or type, or numbers that are not finite")


def load_network(path):
    """Returns weights (dict of arrays), `Config` and `Sampling` of a saved network, all in one list, and its card."""
    with reading(path.with_suffix(".*"), "finish a run with --train --resume, or get it again from the repository"):
        card = json.loads(path.with_suffix(".json").read_text("utf-8"))
        if (card["script"], card["model"], type(card["platform"])) != (f"{SCRIPT}.py", path.stem, str):
            raise ValueError("its card belongs to another network")
        if hashlib.sha256(path.read_bytes()).hexdigest() != card["weights_sha256"]:
            raise ValueError("the checksum of the weights is not the one on their card")
        json.dumps([card[k] for k in (*RESULTS, *ON_CARD)], allow_nan=False)
        if not all(isinstance(value, dict) for value in (card["dataset"], card["metrics"], *card["metrics"].values())):
            raise ValueError("its card has no metrics or no dataset")
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in card["config"].items()})
        parameters = dict(np.load(path))
        check_arrays(parameters, init_model(0, config))
        return [parameters, config, Sampling(**card["sampling"])], card


def environment():
    """Returns what a card says about where it was made."""
    commit, device, hardware = "", jax.devices()[0], platform.machine()
    with contextlib.suppress(OSError):  # git is not installed
        command, options = ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], {"capture_output": True, "text": True}
        commit = subprocess.run(command, check=False, **options).stdout.strip()
    with contextlib.suppress(OSError, IndexError):  # not Linux on an x86 processor
        hardware = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    hardware = f"{hardware}, {os.cpu_count()} cores" if CPU else device.device_kind
    versions = {"python": platform.python_version(), "jax": jax.__version__, "optax": optax.__version__}
    about = {"git_commit": commit or "unknown: not a git checkout", "date": time.strftime("%Y-%m-%d")}
    return about | {"backend": "jax", "platform": device.platform, "versions": versions, "hardware": hardware}


# ------------------------------------------------------------------------------------------------------------ sampling
def noise_levels(steps):
    """Returns the noise levels between which the sampler steps, from the highest to 0: float (steps + 1,)."""
    ramp = np.linspace(HIGHEST ** (1 / SPACING), LOWEST ** (1 / SPACING), steps) ** SPACING
    return np.append(ramp, 0.0).astype("float32")


def heun(denoiser, noisy, levels):
    """Follows the probability flow from noise level `levels[0]` to the last (Karras et al. 2022, algorithm 1)."""
    for level, following in np.stack([levels[:-1], levels[1:]], axis=1):
        slope = (noisy - denoiser(noisy, level)) / level
        proposal = noisy + (following - level) * slope
        if following > 0:
            slope = (slope + (proposal - denoiser(proposal, following)) / following) / 2
        noisy = noisy + (following - level) * slope
    return noisy


def draw_noise(count, seed):
    """Returns standard normal noise (count, 32, 32, 3) and random classes (count,), the first ones of `seed`."""
    noise = np.random.default_rng([seed, 0]).standard_normal((count, *SHAPE), dtype="float32")
    return noise, np.random.default_rng([seed, 1]).integers(NUM_CLASSES, size=count)


def in_batches(function, *arrays, name=""):
    """Calls `function` on BATCH rows at a time, and returns its results together; progress is counted as `name`."""
    results, count = [], len(arrays[0])
    for start in range(0, count, BATCH):  # all of one size, the last filled up with copies: one compilation
        rows = (np.resize(array[start : start + BATCH], (BATCH, *array.shape[1:])) for array in arrays)
        results.append(np.asarray(function(*rows)))
        if name:
            print(f"\r{name}: {min(start + BATCH, count):,} of {count:,}", end="", flush=True)
    print(end="\n" if name else "")
    return np.concatenate(results)[:count]


def sample(parameters, config, sampling, noise, conditions, name=""):
    """Generates images, uint8 (n, 32, 32, 3), from standard normal noise and class weights (n, 101)."""
    levels, parameters = noise_levels(sampling.steps), jax.device_put(parameters)

    def generate(noise, conditions):
        def denoiser(noisy, level):
            guided = sampling.guidance != 1 and sampling.low <= level <= sampling.high
            return denoise(parameters, noisy, np.full(len(noisy), level), conditions, sampling.guidance, config, guided)

        return heun(denoiser, noise * levels[0], levels)

    images = (in_batches(generate, noise, conditions, name=name) + 1) * 127.5
    return np.rint(np.clip(images, 0, 255)).astype("uint8")


# ---------------------------------------------------------------------------------------------------------- evaluation
def denoising_loss(parameters, split, config, count=MEASURED_ITEMS):
    """Returns the error of denoised images at fixed noise of MEASURED_NOISE, weighted as in Karras et al. 2022."""
    clean, labels = split.images[:count].astype("float32") / 127.5 - 1, split.labels[:count]
    parameters, generator = jax.device_put(parameters), np.random.default_rng(DATA_SEED)
    noise = generator.standard_normal(clean.shape, dtype="float32")
    quantiles = (generator.permutation(len(clean)) + 0.5) / len(clean)
    sigma = np.exp(MEASURED_NOISE[1] * np.asarray(jax.scipy.special.ndtri(quantiles), "float32") + MEASURED_NOISE[0])

    def errors(clean, noise, sigma, conditions):
        noisy = clean + noise * sigma[:, None, None, None]
        return jnp.square(denoise(parameters, noisy, sigma, conditions, 1.0, config, False) - clean).mean((1, 2, 3))

    weights = (np.square(sigma) + DATA_DEVIATION**2) / np.square(sigma * DATA_DEVIATION)
    return float(np.mean(weights * in_batches(errors, clean, noise, sigma, ONE_HOT[labels])))


def fid_of(compare, memory, network, count, seed, part):
    """Returns what `compare` says of samples of all classes; what the file `memory` holds is not measured again."""
    (parameters, _, sampling), labels = network, BALANCED[:count]  # network: weights, `Config` and `Sampling`
    key = f"{checksum_of([parameters.values()])}, {sampling}, {count} samples of seed {seed}, {part}"
    with reading(memory, "delete it, so that the network is measured again"):
        known = json.loads(memory.read_text("utf-8")) if memory and memory.exists() else {}
    if key not in known:
        images = sample(*network, draw_noise(count, seed)[0], ONE_HOT[labels], "samples")
        known[key] = compare(images, part, labels)
        if memory:
            write_file(memory, known)
    return known[key]


def measure(network, parts, training, fid, seed):
    """Measures a network on every part: dict from part to metric to float. Other arguments as from `parts_of`."""
    metrics = {name: {"loss": denoising_loss(network[0], split, network[1])} for name, split in parts.items()}
    if training:
        noise, labels = draw_noise(NUM_UNSELECTED, seed)
        images = sample(*network, noise, ONE_HOT[labels], "unselected samples")
        novelty = importlib.import_module("common.fid").novelty
        metrics |= {n: metrics[n] | novelty(images, parts[n].images[: len(images)], training[n]) for n in training}
    if fid:
        metrics["test"] |= fid(network, MEASURED_ITEMS, seed, "test")
    return metrics


def references(network, splits, fid, data_dir, seed):
    """Returns what stands beside the metrics: those with other latents, and the FID of images not generated."""
    scale = importlib.import_module("common.fid").scale(data_dir, splits["train"].images, splits["test"].images)
    return {"second_seed": fid(network, MEASURED_ITEMS, seed + 1, "test"), "scale": scale}


def parts_of(arguments, splits):
    """Returns what is measured: splits by part, training images by part for novelty, and `fid_of` or None."""
    parts, training, fid = dict(splits), {"test": splits["train"]}, None
    if SAMPLE.exists():  # not where the script is alone
        sample = load_data(arguments.data_dir, sample=True)[0]
        parts, training = parts | {"sample": sample["test"]}, training | {"sample": sample["train"]}
    if arguments.load:
        parts = {"sample": parts["sample"]} if arguments.sample else splits
    if arguments.quick or not (module := optional("common.fid", "FID and novelty are")):
        return parts, {}, None
    if not arguments.sample:  # which has too few images for FID
        images = {part: split.images[:MEASURED_ITEMS] for part, split in splits.items()}
        memory = arguments.output_dir / "runs" / SCRIPT / "measured.json" if arguments.train else None
        if memory and not arguments.resume:
            memory.unlink(missing_ok=True)
        fid = functools.partial(fid_of, module.comparison(arguments.data_dir, images, CLASSIFIER), memory)
    return parts, {name: of.images for name, of in training.items() if name in parts}, fid


def checksum_of(splits):
    return hashlib.sha256(b"".join(array.tobytes() for split in splits for array in split)).hexdigest()


def write_results(output_dir):
    """Writes report/results/cifar100_generator.json from the card of the saved network and the experiments."""
    _, card = load_network(output_dir / "saved_models" / SCRIPT / f"{MODEL}.npz")
    results = {"script": f"{SCRIPT}.py", **{name: card[name] for name in RESULTS}, **card["metrics"]}
    results["experiments"] = compared_experiments(output_dir)
    return write_file(output_dir / "report" / "results" / f"{SCRIPT}.json", results)


# -------------------------------------------------------------------------------------------------------------- report
def with_flags(config, arguments, splits):
    batch_size = arguments.batch_size or (16 if arguments.quick else config.batch_size)
    steps = arguments.epochs * math.ceil(len(splits["train"].labels) / batch_size) if arguments.epochs else config.steps
    return dataclasses.replace(config, batch_size=batch_size, steps=min(steps, 10) if arguments.quick else steps)


def optional(module, skipped):
    """Returns a module of the repository, or None, with one line about what is `skipped`, where it is missing."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        print(f"{skipped} skipped: {error}")


def compared_experiments(root):
    """Returns what experiments/ says about the table below `root`: dict from the name of an experiment to a dict."""
    table = root / "report" / "results" / f"{SCRIPT}_experiments.csv"
    module = optional(f"experiments.{SCRIPT}", "experiments are") if table.exists() else None
    with reading(table, "move it away to start the experiments over"):
        return module.compare(table.read_text("utf-8")) if module else {}


def train(arguments):
    """Trains, measures and saves the network. Returns what `measure` says of it."""
    splits, class_names = load_data(arguments.data_dir, arguments.quick, arguments.sample)
    parts, training, fid = parts_of(arguments, splits)
    dataset = {"name": "CIFAR-100", **{name: len(split.labels) for name, split in parts.items()}}
    dataset |= {"sha256": checksum_of(splits.values()), "sample_sha256": checksum_of([parts.get("sample", ())])}
    config, seed = with_flags(CONFIG, arguments, splits), arguments.seed
    count, marks, used = budget(config)
    print(used)
    folder = arguments.output_dir / "runs" / SCRIPT / f"{MODEL}_seed_{seed}"
    averages, curves, seconds = train_network(config, splits, seed, name=MODEL, folder=folder, resume=arguments.resume)
    losses = [denoising_loss(average, splits["valid"], config) for average in averages]
    parameters, average = averages[np.argmin(losses)], config.averages[np.argmin(losses)]
    module = optional(f"experiments.{SCRIPT}", "experiments are") if fid else None
    sampling, choices = module.choose(TASK, parameters, config, fid, folder) if module else (Sampling(), [])
    network = parameters, config, sampling  # measured on the test images after the last choice only
    metrics = measure(network, parts, training, fid, seed)
    card = {"script": f"{SCRIPT}.py", "model": MODEL, "command": arguments.command, **environment()}
    card |= {"seed": seed, "config": dataclasses.asdict(config), "dataset": dataset, "class_names": class_names}
    card |= {"epochs": round(config.steps * config.batch_size / len(splits["train"].labels), 1)}
    card |= {"steps": config.steps, "batch_size": config.batch_size, "penalty": marks, "seconds": seconds}
    card |= {"parameters": {"trainable": count, "total": count}, "metrics": metrics, "curves": curves}
    card |= {"sampling": dataclasses.asdict(sampling), "choices": choices, "measured_on": jax.default_backend()}
    card |= references(network, splits, fid, arguments.data_dir, seed) if fid else {"second_seed": {}, "scale": {}}
    card |= {"shortened": "a few images only" if arguments.quick or arguments.sample else None, "average": average}
    path = write_file(arguments.output_dir / "saved_models" / SCRIPT / f"{MODEL}.npz", parameters)
    write_file(path.with_suffix(".json"), card | {"weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
    print(used, f"wrote {write_results(arguments.output_dir)}", sep="\n")
    return metrics


def generate(arguments):
    """Writes images of one class or of random ones: `images` uint8 (n, 32, 32, 3), `label` (n,), `class_names`."""
    network, card = load_network(arguments.folder / f"{MODEL}.npz")
    names, chosen, folder = card["class_names"], arguments.class_name, arguments.export
    if folder and folder.exists() and (folder.is_file() or any(folder.iterdir())):  # others would be measured, too
        raise UserError(f"{folder} is not an empty folder; choose another one for --export")
    if chosen is not None and chosen not in names:
        raise UserError(f"there is no class {chosen}; choose one of {', '.join(names)}")
    changed = {name: getattr(arguments, name) for name in ("steps", "guidance") if getattr(arguments, name) is not None}
    network[2] = dataclasses.replace(network[2], **changed)
    noise, labels = draw_noise(arguments.samples or NUM_UNSELECTED, arguments.seed)
    labels = np.full_like(labels, names.index(chosen)) if chosen else labels
    images = sample(*network, noise, ONE_HOT[labels], "samples")
    path = arguments.output_dir / "runs" / SCRIPT / f"{chosen or 'all'}_seed_{arguments.seed}.npz"
    written = [write_file(path, {"images": images, "label": labels, "class_names": names})]
    if tools := optional("common.images", "PNG files are"):
        written.append(tools.write_grid(images, path.with_suffix(".png"), 2))
        for number, image in enumerate(images if folder else ()):
            tools.write_grid(image[None], folder / f"{number:05}.png", 1)
        written += [f"{len(images):,} PNG files in {folder}"] if folder else []
    print("wrote", *written, sep="\n  ")


def report(arguments, measured=None):
    """Measures the saved network beside the recorded metrics, and draws the figures. Returns the exit code."""
    folder = arguments.output_dir / "saved_models" / SCRIPT if measured else arguments.folder
    print(f"network from {folder}")
    splits, _ = load_data(arguments.data_dir, arguments.quick, arguments.sample)
    network, card = load_network(folder / f"{MODEL}.npz")
    parts, training, fid = parts_of(arguments, splits) if not measured else (splits, {}, None)
    key = "sample_sha256" if arguments.load and arguments.sample else "sha256"
    checksum = checksum_of((parts if key == "sample_sha256" else splits).values())
    if not (known := card["metrics"] if card["dataset"].get(key) == checksum else {}):
        print("not compared, as the card is about other images than these")
        if arguments.record:
            raise UserError("the network was trained with other data; --record needs the same, or --train anew")
    metrics, rows, written = measured or measure(network, parts, training, fid, card["seed"]), [], []
    tolerance = TOLERANCE if card["measured_on"] == jax.default_backend() else TOLERANCE_ELSEWHERE
    for part, name in [(part, name) for part, values in metrics.items() for name in values]:
        value, recorded = metrics[part][name], known.get(part, {}).get(name)
        row = {"task": "CIFAR-100 generation", "model": MODEL, "part": part, "metric": name, "measured": value}
        allowed = tolerance * max(abs(recorded or 0), SMALLEST_OF.get(name, SMALLEST))
        agrees = None if recorded is None else abs(value - recorded) <= allowed
        rows.append(row | {"recorded": recorded, "agrees": agrees, "tolerance": tolerance})
    if arguments.record:
        card |= {"metrics": known | metrics, "measured_on": jax.default_backend()}
        card |= references(network, splits, fid, arguments.data_dir, card["seed"]) if fid else {}
        written.append(write_file(folder / f"{MODEL}.json", card))
    if not (arguments.record and arguments.sample):  # which writes nothing but the card
        written += [write_results(folder.parent.parent)] if arguments.record else []
        network[2] = dataclasses.replace(network[2], steps=2) if arguments.quick else network[2]
        draw = functools.partial(sample, *network, name="images of figures")
        if plots := optional(f"plots.{SCRIPT}", "figures are"):
            few, load = arguments.quick or arguments.sample, importlib.import_module("common.fid").load_classifier
            drawn = compared_experiments(folder.parent.parent), splits, card, draw
            drawn += draw_noise(2 * NUM_CLASSES, card["seed"]), None if few else load(CLASSIFIER)
            written += plots.draw(*drawn, arguments.output_dir / "report" / "figures" / SCRIPT)
    print(f"\n{'metric':27}  measured  recorded (tolerance {tolerance:.2%}, of {SMALLEST} at least)")
    for r in rows:
        known = f"  {r['recorded']:8.4f}  {'agrees' if r['agrees'] else 'DIFFERS'}" if r["agrees"] is not None else ""
        print(f"{r['part'] + ' ' + r['metric'].replace('_', ' '):27}  {r['measured']:8.4f}{known}")
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
    group = flags.add_argument_group("generating images, with --load; what is left out is as in the recorded metrics")
    group.add_argument("--samples", **number, help=f"number of images (default: {NUM_UNSELECTED})")
    group.add_argument("--class", dest="class_name", metavar="NAME", help="of all images (default: random classes)")
    group.add_argument("--guidance", type=float, metavar="W", help="1 is the network itself, more exaggerates classes")
    group.add_argument("--steps", **number, help="steps of the sampler")
    group.add_argument("--export", **path, help="write a PNG file per image there, for other FID programs")
    arguments = flags.parse_args(argv)
    ranges = {"epochs": (1, 100_000), "batch_size": (1, 100_000), "seed": (0, 2**32 - 1), "samples": (1, 100_000)}
    for name, (low, high) in (ranges | {"steps": (2, 1000), "guidance": (0, 20)}).items():
        value, kind = getattr(arguments, name), "number" if name == "guidance" else "whole number"
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value} is not a {kind} from {low} to {high}")
    options = {"samples", "class_name", "guidance", "steps", "export"}
    if (generating := any(getattr(arguments, name) is not None for name in options)) and not arguments.load:
        raise UserError("images are generated with a trained network; add --load")
    if generating and (arguments.record or arguments.quick or arguments.sample):
        raise UserError("--record, --quick and --sample are about metrics; leave them out, or the options of images")
    if arguments.resume and arguments.load:
        raise UserError("--resume continues a training run, but --load never trains; leave one of them out")
    if arguments.record and (arguments.quick or not arguments.load):
        raise UserError("--record writes down what --load measures; use it with --load and without --quick")
    if (arguments.epochs or arguments.batch_size) and not arguments.train:
        raise UserError("--epochs and --batch-size are about training runs of --train; leave them out")
    default = "runs/quick" if arguments.quick else "runs/sample" if arguments.sample and not arguments.record else ""
    arguments.output_dir = arguments.output_dir or REPOSITORY / default
    if file := next((path for path in (arguments.data_dir, arguments.output_dir) if path.is_file()), None):
        raise UserError(f"{file} is a file; name a folder")
    own = arguments.record or (arguments.output_dir / "saved_models" / SCRIPT).is_dir()
    arguments.folder = (arguments.output_dir if own else REPOSITORY) / "saved_models" / SCRIPT
    arguments.command = shlex.join(["python", flags.prog, *(sys.argv[1:] if argv is None else map(str, argv))])
    size = 100_000_000 if arguments.train else 1000  # about what is written; better to fail now than after hours
    write_file(arguments.output_dir / f".space.{os.getpid()}", bytes(size)).unlink(missing_ok=True)
    if generating:
        return generate(arguments)
    if arguments.experiments:
        if module := optional(f"experiments.{SCRIPT}", "experiments are"):
            return module.run(TASK, arguments)
        raise UserError("experiments/ is needed for that; get it from the repository")
    return report(arguments, train(arguments) if arguments.train else None)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode must not end a training run
        stream.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os._exit(128 + signal.SIGPIPE)
    except Exception as error:
        if type(error).__name__ != "UserError":  # the one of common/, which plots/ use, is another class
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
