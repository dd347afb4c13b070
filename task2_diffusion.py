"""A diffusion model that draws smallNORB toys out of noise, to order: "an airplane, seen from 30 degrees".

A network learns to tell the toy from the noise in noisy pictures, knowing how much noise there is and, most of the
time, what kind of toy it is and from how high it is seen. Drawing starts with pure noise and removes a little of it at
a time. The method is that of Ho, Jain & Abbeel 2020 (DDPM) and Song, Meng & Ermon 2021 (DDIM) in continuous time,
with the velocity of Salimans & Ho 2022 and the classifier-free guidance of Ho & Salimans 2022.

    python task2_diffusion.py --train             trains the network and its judge, draws and judges samples
    python task2_diffusion.py --load              restores the saved networks: same figures and metrics, in half an hour
    python task2_diffusion.py --experiments       the comparison behind the choices
    python task2_diffusion.py --load --category airplane --elevation 30 --samples 64    draws to order, needs no data

Good samples look like pictures of the training toys (Fréchet and kernel distance), show what was asked for (a
classifier agrees), and are no copies (nearest training pictures). A tenth of the training pictures is never trained on,
so that we know how near to its training pictures an honest new picture of the same toys is.
"""

from common import quiet  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
import json
import math
import time as clock
from typing import NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from PIL import Image
from sklearn.metrics import confusion_matrix

from common import cli, figures, metrics, runs
from common.datasets import SMALLNORB_CATEGORIES as CATEGORIES
from common.datasets import SMALLNORB_ELEVATION_DEGREES as DEGREES
from common.datasets import area_average, load_smallnorb
from common.files import replacing, write_json

SCRIPT = "task2_diffusion"
MODELS = ["network", "judge"]
FEATURE_SCRIPT, FEATURE_MODEL, FEATURE_LAYER = "task1_smallnorb_cnn", "plain", "features"  # the space of the distances
IMAGE_SIZE = 48
PATCH = 2  # pixels: the network works on patches of 2 x 2, a quarter of the cost
ANY_CATEGORY, ANY_ELEVATION = len(CATEGORIES), len(DEGREES)  # labels that withhold the answer
GREY_MEAN, GREY_DEVIATION = 192, 45  # grey levels: mean and standard deviation of the training pictures, rounded
CONDITION_WIDTH = 128  # numbers that tell every block how noisy the picture is and what it shows
CONDITION_DROPOUT = 0.1  # how often the network is not told what it sees (Ho & Salimans 2022, section 3.2)
SIGNAL_AT_END = 0.02  # what is left of the picture where drawing starts; at 0 nothing could be divided by it
NUM_JUDGED = 10_000  # samples
SPLIT_SEED = 2024
PREDICT_BATCH_SIZE = 256
QUICK_PICTURES = 320
QUICK_JUDGED = 45
QUICK_STEPS = 3  # of drawing
QUICK_WIDTHS = (16, 32)  # a short run spends its time on compiling, which a smaller network has less of


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the experiments on the training vary; the defaults are their baseline.

    Attributes:
        standardized: whether black and white are not -1 and 1, but as far apart as gives the pictures mean 0 and
            standard deviation 1, like the noise. That decides how soon they drown in it (Chen 2023, "On the importance
            of noise scheduling for diffusion models").
        widths: filters at 24, 12 and 6 patches a side.
        blocks: residual blocks a resolution, as many on the way down as on the way up.
        attention: whether the coarsest resolution has self-attention.
        target: "velocity" or "noise", what the network predicts.
        loss: "mse" or "mae".
        average: momentum of the moving average of the weights; 0 for none.
        learning_rate: highest learning rate.
        batch_size: pictures per step.
        epochs: passes over the training pictures.
    """

    standardized: bool = False
    widths: tuple = (48, 96, 160)
    blocks: int = 1
    attention: bool = True
    target: str = "velocity"
    loss: str = "mse"
    average: float = 0.99
    learning_rate: float = 2e-3
    batch_size: int = 64
    epochs: int = 3


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        sampler: "ddim" (the same noise always becomes the same picture) or "ddpm" (fresh noise at every step).
        steps: int.
        guidance: float; 0 ignores the labels, 1 obeys them, more overdoes it.
        spacing: float; the steps end at times (1 - number / steps) ** spacing: 1 for steps of the same length, more for
            steps that get shorter as the picture gets clearer.
    """

    sampler: str = "ddpm"
    steps: int = 30
    guidance: float = 2.0
    spacing: float = 2.0


FINAL_SAMPLING = Sampling()


# ---------------------------------------------------------------------------------------------------------------- data


class Pictures(NamedTuple):
    """Pictures of the left camera.

    Attributes:
        images: uint8 (n, 48, 48), 0 to 255.
        category: int64 (n,), 0 to 4, index into `CATEGORIES`.
        elevation: int64 (n,), 0 to 8, index into `DEGREES`.
    """

    images: np.ndarray
    category: np.ndarray
    elevation: np.ndarray

    def take(self, indices):
        """Returns the pictures at `indices` (integers, a slice or a mask)."""
        return Pictures(*(array[indices] for array in self))


def load_pictures(data_dir, quick=False):
    """Loads the left views of smallNORB at 48 x 48.

    Args:
        data_dir: `pathlib.Path`.
        quick: bool, whether to take only `QUICK_PICTURES` of each split.

    Returns:
        dict of `Pictures` and the checksums of the arrays (dict of str). "train" and "validation" show the same 25
        toys, nine in ten and one in ten of the pictures, at random. Task 1 must not split like that, since its network
        has to do well on new toys; this one has to do well on these. "test" are the 25 toys of the official test set.

    Raises:
        UserError: where the dataset is neither there nor to be had.
    """
    dataset = load_smallnorb(data_dir)
    pictures = {}
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        step = len(examples.images) // QUICK_PICTURES if quick else 1
        images = area_average(examples.images[::step, :, :, :1], IMAGE_SIZE)[..., 0]
        pictures[part] = Pictures(images, examples.category[::step], examples.elevation[::step])
    order = np.random.default_rng(SPLIT_SEED).permutation(len(pictures["train"].images))
    tenth = len(order) // 10
    pictures["validation"] = pictures["train"].take(np.sort(order[:tenth]))
    pictures["train"] = pictures["train"].take(np.sort(order[tenth:]))
    return pictures, dataset.checksums


def every_label(count):
    """Labels for samples, all 45 pairs of category and elevation equally often: two int64 (count,)."""
    number = np.arange(count)
    return number % len(CATEGORIES), number // len(CATEGORIES) % len(DEGREES)


# ----------------------------------------------------------------------------------------------------------- diffusion


def rates(time):
    """The cosine schedule (Nichol & Dhariwal 2021), written as an arc.

    Args:
        time: tensor of any shape, 0 (no noise) to 1 (hardly any picture).

    Returns:
        Two tensors like `time`: how much picture and how much noise; their squares add up to 1.
    """
    angle = time * math.acos(SIGNAL_AT_END)
    return ops.cos(angle), ops.sin(angle)


def clean_picture(target, noisy, prediction, signal_rate, noise_rate):
    """Returns the picture within a noisy one, going by what the network predicts.

    Args:
        target: "velocity" (signal rate x noise - noise rate x picture) or "noise".
        noisy, prediction: tensors (n, 48, 48, 1).
        signal_rate, noise_rate: numbers, or tensors (n, 1, 1, 1).
    """
    if target == "velocity":
        return signal_rate * noisy - noise_rate * prediction
    return (noisy - noise_rate * prediction) / signal_rate


def middle_and_unit(recipe):
    """The grey level that counts as 0, and how many grey levels make 1."""
    return (GREY_MEAN, GREY_DEVIATION) if recipe.standardized else (127.5, 127.5)


def to_picture(images, recipe):
    """Returns float32 (n, 48, 48, 1) around 0 for images (n, 48, 48) in the uint8 range."""
    middle, unit = middle_and_unit(recipe)
    return (ops.cast(images, "float32")[..., None] - middle) / unit


def to_grey(pictures, recipe):
    """Returns uint8 (n, 48, 48) for pictures (n, 48, 48, 1): `to_picture` backwards."""
    middle, unit = middle_and_unit(recipe)
    return np.rint(np.clip(pictures[..., 0] * unit + middle, 0, 255)).astype("uint8")


class AddNoise(layers.Layer):
    """Makes an exercise for the network out of pictures: noise is added, and sometimes the labels are withheld.

    Args:
        recipe: `Recipe`.
        seed: int.

    Call arguments:
        images: uint8 (n, 48, 48).
        category, elevation: int32 (n,).

    Returns:
        Tuple of the noisy pictures (n, 48, 48, 1), the times (n, 1), both labels (n,), some of them withheld, and what
        the network should predict, like the noisy pictures.
    """

    def __init__(self, recipe, seed, **keywords):
        super().__init__(**keywords)
        self.recipe = recipe
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, category, elevation):
        count = ops.shape(images)[0]
        picture = to_picture(images, self.recipe)
        time = keras.random.uniform((count, 1), seed=self.seed_generator)
        signal_rate, noise_rate = rates(time[:, :, None, None])
        noise = keras.random.normal(ops.shape(picture), seed=self.seed_generator)
        noisy = signal_rate * picture + noise_rate * noise
        wanted = noise if self.recipe.target == "noise" else signal_rate * noise - noise_rate * picture
        withheld = keras.random.uniform((count,), seed=self.seed_generator) < CONDITION_DROPOUT
        category = ops.where(withheld, ANY_CATEGORY, category)
        elevation = ops.where(withheld, ANY_ELEVATION, elevation)
        return noisy, time, category, elevation, wanted


class Exercise(keras.Model):
    """Functional model from pictures and labels to what the network predicts and what it should have predicted."""

    squared = True

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        prediction, wanted = y_pred
        difference = ops.cast(prediction, "float32") - wanted
        return ops.mean(ops.square(difference) if self.squared else ops.abs(difference))


# ------------------------------------------------------------------------------------------------------------ networks


def convolution(filters, kernel_size=3, **keywords):
    return layers.Conv2D(filters, kernel_size, padding="same", **{"kernel_initializer": "he_normal"} | keywords)


def activated(features):
    # ReLU where such networks usually have SiLU, which would take as much time on a CPU as all the convolutions.
    return layers.ReLU()(layers.GroupNormalization(8)(features))


def build_network(recipe):
    """Builds a U-Net (Ronneberger et al. 2015) of residual blocks that are told time, category and elevation.

    Args:
        recipe: `Recipe`.

    Returns:
        Functional `keras.Model` of built-in layers. Inputs, a dict: `noisy` (n, 48, 48, 1), what `to_picture` returns,
        with noise; `time` (n, 1), 0 to 1; `category` (n,) integers, 0 to 4, or 5 for any; `elevation` (n,) integers, 0
        to 8 for 30 to 70 degrees, or 9 for any. Output: velocity or noise (n, 48, 48, 1), as the recipe says.
    """
    noisy = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 1), name="noisy")
    time = keras.Input((1,), name="time")
    category = keras.Input((), dtype="int32", name="category")
    elevation = keras.Input((), dtype="int32", name="elevation")

    # Sines of the time, from half a turn to 50 turns (Vaswani et al. 2017, section 3.5).
    frequencies = np.geomspace(math.pi, 100 * math.pi, CONDITION_WIDTH // 2).astype("float32")
    angles = time * frequencies
    condition = layers.Concatenate()([ops.sin(angles), ops.cos(angles)])
    condition = layers.Dense(CONDITION_WIDTH, activation="silu")(condition)
    told = [
        layers.Dense(CONDITION_WIDTH)(condition),
        layers.Embedding(ANY_CATEGORY + 1, CONDITION_WIDTH)(category),
        layers.Embedding(ANY_ELEVATION + 1, CONDITION_WIDTH)(elevation),
    ]
    condition = layers.Activation("silu")(layers.Add()(told))

    def residual_block(features, filters):
        """Two convolutions; between them the condition scales and shifts every filter (Perez et al. 2018)."""
        shortcut = features if features.shape[-1] == filters else convolution(filters, 1)(features)
        features = layers.GroupNormalization(8)(convolution(filters)(activated(features)))
        scale = layers.Dense(filters)(condition)[:, None, None]
        shift = layers.Dense(filters)(condition)[:, None, None]
        features = layers.ReLU()(features * (1 + scale) + shift)
        # Blocks start as identities, so that a deep network trains like a shallow one at first.
        return layers.Add()([shortcut, convolution(filters, kernel_initializer="zeros")(features)])

    def attention(features):
        size, filters = features.shape[1], features.shape[-1]
        tokens = layers.Reshape((size * size, filters))(layers.GroupNormalization(8)(features))
        tokens = layers.MultiHeadAttention(4, filters // 4)(tokens, tokens)
        return layers.Add()([features, layers.Reshape((size, size, filters))(tokens)])

    def stage(features, filters, coarsest):
        features = residual_block(features, filters)
        return attention(features) if coarsest and recipe.attention else features

    # The four pixels of each patch become channels.
    side = IMAGE_SIZE // PATCH
    features = layers.Reshape((side, PATCH, side, PATCH))(noisy)
    features = layers.Reshape((side, side, PATCH**2))(layers.Permute((1, 3, 2, 4))(features))
    features = convolution(recipe.widths[0])(features)
    skipped = []
    for level, filters in enumerate(recipe.widths):
        if level:
            features = layers.AveragePooling2D(2)(features)
        for _ in range(recipe.blocks):
            features = stage(features, filters, filters == recipe.widths[-1])
            skipped.append(features)
    features = residual_block(features, recipe.widths[-1])
    for level, filters in reversed(list(enumerate(recipe.widths))):
        for _ in range(recipe.blocks):
            features = layers.Concatenate()([features, skipped.pop()])
            features = stage(features, filters, filters == recipe.widths[-1])
        if level:
            features = layers.UpSampling2D(2)(features)
    features = convolution(PATCH**2, kernel_initializer="zeros", dtype="float32")(activated(features))
    features = layers.Permute((1, 3, 2, 4))(layers.Reshape((side, side, PATCH, PATCH))(features))
    prediction = layers.Reshape((IMAGE_SIZE, IMAGE_SIZE, 1))(features)
    inputs = {"noisy": noisy, "time": time, "category": category, "elevation": elevation}
    return keras.Model(inputs, prediction, name="diffusion")


def build_judge():
    """Builds a small classifier that says what a sample shows.

    The network of task 1 cannot do that: it needs the pictures of both cameras, and samples have one.

    Returns:
        Functional `keras.Model` from pictures (n, 48, 48) in the uint8 range to a dict: `category` (n, 5) and
        `elevation` (n, 9) probabilities.
    """
    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE), name="images")
    features = layers.Rescaling(1 / 255)(layers.Reshape((IMAGE_SIZE, IMAGE_SIZE, 1))(images))
    features = layers.LayerNormalization(axis=(1, 2, 3), center=False, scale=False)(features)
    features = convolution(32, 5, strides=2, activation="relu")(features)
    for filters in (32, 64, 128):
        features = convolution(filters, activation="relu")(features)
        features = layers.MaxPooling2D(2)(convolution(filters, use_bias=False)(features))
        features = layers.ReLU()(layers.BatchNormalization()(features))
    features = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(features))
    outputs = {
        "category": layers.Dense(len(CATEGORIES), "softmax", dtype="float32", name="category")(features),
        "elevation": layers.Dense(len(DEGREES), "softmax", dtype="float32", name="elevation")(features),
    }
    return keras.Model(images, outputs, name="judge")


# ------------------------------------------------------------------------------------------------------------ training

JUDGE_EPOCHS = 6


def training_inputs(pictures):
    """Returns `pictures` as the dict that an `Exercise` is fitted on."""
    return {
        "images": pictures.images,
        "category": pictures.category.astype("int32"),
        "elevation": pictures.elevation.astype("int32"),
    }


def train_network(recipe, pictures, seed, *, folder, resume, validation=None):
    """Trains one diffusion network from scratch, or goes on from its checkpoint.

    Args:
        recipe: `Recipe`.
        pictures: `Pictures` to train on.
        seed: int, of weights, order, noise and withheld labels.
        folder: where the checkpoints live.
        resume: bool, whether to go on from the last of them.
        validation: `Pictures` for the learning curves, or None.

    Returns:
        The trained network in float32 with averaged weights (`keras.Model`), its learning curves (dict of lists), and
        seconds (float).
    """
    keras.utils.set_random_seed(seed)
    steps = math.ceil(len(pictures.images) / recipe.batch_size) * recipe.epochs
    with runs.building_for_speed() as precision:
        network = build_network(recipe)
    inputs = {
        "images": keras.Input((IMAGE_SIZE, IMAGE_SIZE), dtype="uint8", name="images"),
        "category": keras.Input((), dtype="int32", name="category"),
        "elevation": keras.Input((), dtype="int32", name="elevation"),
    }
    noisy, time, category, elevation, wanted = AddNoise(recipe, seed)(**inputs)
    told = {"noisy": noisy, "time": time, "category": category, "elevation": elevation}
    model = Exercise(inputs, (network(told), wanted))
    model.squared = recipe.loss == "mse"
    schedule = runs.cosine_schedule(recipe.learning_rate, steps)
    averaging = {"use_ema": True, "ema_momentum": recipe.average} if recipe.average else {}
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=1e-3, **averaging), **runs.compile_options(steps))
    curves, seconds = runs.fit(
        model,
        training_inputs(pictures),
        None,
        validation_data=validation and (training_inputs(validation),),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        folder=folder,
        settings={
            "recipe": {**dataclasses.asdict(recipe), "widths": list(recipe.widths)},
            "seed": seed,
            "precision": precision,
        },
        resume=resume,
    )
    # The average takes the place of the weights. Keras does that at the end of `fit`, but not where a finished
    # training was restored.
    model.optimizer.finalize_variable_values(model.trainable_variables)
    full_precision = build_network(recipe)
    runs.set_weights(full_precision, network.get_weights())
    return full_precision, curves, seconds


def train_judge(pictures, seed, *, epochs, batch_size, folder, resume, validation=None):
    """Trains the judge. Arguments and results as `train_network`."""
    keras.utils.set_random_seed(seed)
    steps = math.ceil(len(pictures.images) / batch_size) * epochs
    with runs.building_for_speed() as precision:
        judge = build_judge()
    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE))
    translation = layers.RandomTranslation(0.05, 0.05, seed=seed)
    translation.supports_jit = True  # Keras denies it of this layer, and would run every step uncompiled under JAX
    model = keras.Model(images, judge(translation(images[..., None])[..., 0]))
    model.compile(
        keras.optimizers.AdamW(runs.cosine_schedule(3e-3, steps), weight_decay=1e-2),
        loss=dict.fromkeys(judge.output, "sparse_categorical_crossentropy"),
        metrics=dict.fromkeys(judge.output, "accuracy"),
        **runs.compile_options(steps),
    )

    def targets(pictures):
        return {"category": pictures.category, "elevation": pictures.elevation}

    curves, seconds = runs.fit(
        model,
        pictures.images,
        targets(pictures),
        validation_data=validation and (validation.images, targets(validation)),
        epochs=epochs,
        batch_size=batch_size,
        folder=folder,
        settings={"model": "judge", "seed": seed, "precision": precision},
        resume=resume,
    )
    full_precision = build_judge()
    runs.set_weights(full_precision, judge.get_weights())
    return full_precision, curves, seconds


# ------------------------------------------------------------------------------------------------------------- drawing


class GivenSeed(keras.random.SeedGenerator):
    """A seed out of two integer tensors. Drawing with it changes no state, which a compiled loop would not allow."""

    def __init__(self, first, second):
        self.seed = ops.stack([ops.cast(number, "uint32") for number in (first, second)])

    def next(self, ordered=True):
        return self.seed


class Sampler(keras.Model):
    """Draws pictures, all steps in one compiled loop.

    Each step estimates the clean picture, then mixes it anew with less noise: with the noise that was in it (DDIM), or
    in part with fresh noise (DDPM). That is equation 12 of Song, Meng & Ermon 2021; the share of fresh noise is their
    equation 16 with eta = 0 and eta = 1.

    Args:
        network: what `build_network` returned, or a restored one.
        recipe: `Recipe`, which the network was trained by.
        sampling: `Sampling`.

    Call arguments:
        inputs: dict of `noise` (n, 48, 48, 1), standard normal, `category` and `elevation` (n,) as the network wants,
            and `seed` (n,) integers, of which the first one decides on all fresh noise of the batch.

    Returns:
        float32 (n, 48, 48, 1), as `to_picture` returns them.
    """

    def __init__(self, network, recipe, sampling):
        super().__init__()
        self.network, self.recipe, self.sampling = network, recipe, sampling

    def predict_target(self, noisy, time, category, elevation):
        """What the network predicts, pushed away from what it would predict for any toy (Ho & Salimans 2022, eq. 6)."""
        guidance = self.sampling.guidance
        asked = [] if guidance == 0 else [(category, elevation)]
        if guidance != 1:
            asked.append((ops.full_like(category, ANY_CATEGORY), ops.full_like(elevation, ANY_ELEVATION)))
        # Both in one batch: the loop then holds the network once, and compiles in half the time.
        categories, elevations = (ops.concatenate(labels) for labels in zip(*asked, strict=True))
        noisy = ops.concatenate([noisy] * len(asked))
        times = ops.full((ops.shape(noisy)[0], 1), 1.0) * time
        told = {"noisy": noisy, "time": times, "category": categories, "elevation": elevations}
        predictions = ops.split(ops.cast(self.network(told, training=False), "float32"), len(asked))
        if len(asked) == 1:
            return predictions[0]
        for_this, for_any = predictions
        return for_any + guidance * (for_this - for_any)

    def step(self, number, noisy, inputs):
        """Returns less noisy pictures: those at the end of step `number`, 0 for the first one."""

        def time_after(number):
            left = ops.maximum(1 - ops.cast(number, "float32") / self.sampling.steps, 0.0)
            return ops.power(left, self.sampling.spacing)

        time = time_after(number)
        signal_rate, noise_rate = rates(time)
        next_signal_rate, next_noise_rate = rates(time_after(number + 1))
        prediction = self.predict_target(noisy, time, inputs["category"], inputs["elevation"])
        # Nothing is darker than black or lighter than white.
        picture = clean_picture(self.recipe.target, noisy, prediction, signal_rate, noise_rate)
        middle, unit = middle_and_unit(self.recipe)
        picture = ops.clip(picture, (0 - middle) / unit, (255 - middle) / unit)
        noise = (noisy - signal_rate * picture) / noise_rate
        if self.sampling.sampler == "ddim":
            return next_signal_rate * picture + next_noise_rate * noise
        lost = ops.sqrt(ops.maximum(1 - ops.square(signal_rate / next_signal_rate), 0.0))
        fresh_rate = next_noise_rate / noise_rate * lost
        kept_rate = ops.sqrt(ops.maximum(ops.square(next_noise_rate) - ops.square(fresh_rate), 0.0))
        fresh = keras.random.normal(ops.shape(noisy), seed=GivenSeed(inputs["seed"][0], number))
        return next_signal_rate * picture + kept_rate * noise + fresh_rate * fresh

    def call(self, inputs):
        def body(number, noisy):
            return self.step(number, noisy, inputs)

        return ops.fori_loop(0, self.sampling.steps, body, inputs["noise"])


def sampler_inputs(category, elevation, seed, noise=None):
    """Returns the inputs of a `Sampler`; see `draw_samples`."""
    generator = np.random.default_rng(seed)
    fresh = generator.standard_normal((len(category), IMAGE_SIZE, IMAGE_SIZE, 1), dtype="float32")
    return {
        "noise": fresh if noise is None else noise,
        "category": category.astype("int32"),
        "elevation": elevation.astype("int32"),
        "seed": generator.integers(2**31, size=len(category), dtype="int32"),
    }


def draw_samples(sampler, category, elevation, seed=0, noise=None):
    """Draws one picture for each label.

    Args:
        sampler: `Sampler`. It compiles its loop once, so draw everything with the same one.
        category, elevation: integers (n,), 0 to 4 and 0 to 8.
        seed: int, of all noise.
        noise: float32 (n, 48, 48, 1) to start from, or None for noise of that seed.

    Returns:
        uint8 (n, 48, 48).
    """
    inputs = sampler_inputs(category, elevation, seed, noise)
    return to_grey(sampler.predict(inputs, batch_size=PREDICT_BATCH_SIZE, verbose=0), sampler.recipe)


# ------------------------------------------------------------------------------------------------------------- judging


def load_feature_network(output_dir):
    """Restores what turns pictures into the features that distances are measured in.

    Returns:
        `keras.Model` from (n, 48, 48, 2) to the 192 averaged features before the heads of task 1's plain network. That
        network wants both views; it is given the same picture twice, for samples and real pictures alike. The numbers
        are comparable within this project alone.
    """
    folder = runs.saved_models_folder(output_dir, FEATURE_SCRIPT)
    network, _ = runs.load_model(folder / f"{FEATURE_MODEL}.keras")
    return runs.for_prediction(keras.Model(network.input, network.get_layer(FEATURE_LAYER).output))


def extract_features(feature_network, images):
    """Returns float32 (n, 192) for uint8 pictures (n, 48, 48)."""
    pairs = np.repeat(images[..., None], 2, axis=3)
    return feature_network.predict(pairs, batch_size=PREDICT_BATCH_SIZE, verbose=0)


def distances(features, real_features):
    """Returns {"frechet_distance", "kernel_distance"} between two sets of features, (n, 192) and (m, 192)."""
    return {
        "frechet_distance": metrics.frechet_distance(features, real_features),
        "kernel_distance": metrics.kernel_distance(features, real_features),
    }


def agreement(judge, images, category, elevation):
    """How far the judge sees what was asked for.

    Args:
        judge: what `build_judge` or `runs.load_model` returned.
        images: uint8 (n, 48, 48).
        category, elevation: integers (n,), what the pictures should show.

    Returns:
        dict of float: `category_agreement` and `elevation_agreement` from 0 to 1, `elevation_mae_degrees`; and the
        categories and elevations that the judge saw, integers (n,).
    """
    answers = judge.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)
    seen, seen_elevation = answers["category"].argmax(1), answers["elevation"].argmax(1)
    measured = {
        "category_agreement": float(np.mean(seen == category)),
        "elevation_agreement": float(np.mean(seen_elevation == elevation)),
        "elevation_mae_degrees": float(np.mean(np.abs(DEGREES[seen_elevation] - DEGREES[elevation]))),
    }
    return measured, seen, seen_elevation


def nearest_neighbours(images, training_images):
    """Finds the training picture that each picture is most like.

    Args:
        images: uint8 (n, 48, 48).
        training_images: uint8 (m, 48, 48).

    Returns:
        The root of the mean squared difference of grey levels, float (n,), and which training picture, int (n,).
    """
    training = training_images.reshape(len(training_images), -1).astype("float32")
    squares = np.sum(np.square(training), axis=1)
    distance, index = np.empty(len(images)), np.empty(len(images), int)
    for start in range(0, len(images), 500):
        some = images[start : start + 500].reshape(-1, training.shape[1]).astype("float32")
        index[start : start + 500] = nearest = (squares - 2 * some @ training.T).argmin(1)
        # Measured anew at the nearest one: the short formula above rounds where two pictures are almost the same.
        distance[start : start + 500] = np.sqrt(np.mean(np.square(some - training[nearest]), axis=1))
    return distance, index


def shrunken(images):
    """Real pictures that have lost their details: shrunk to 12 x 12 and enlarged again. uint8 in and out."""
    small = area_average(images[..., None], IMAGE_SIZE // 4).astype("float32")
    large = ops.convert_to_numpy(ops.image.resize(small, (IMAGE_SIZE, IMAGE_SIZE), interpolation="bilinear"))
    return np.clip(np.rint(large[..., 0]), 0, 255).astype("uint8")


class Judgement(NamedTuple):
    """What `judge_samples` found out.

    Attributes:
        metrics: dict from "train", "validation" and "test" to the metrics against those pictures (dict of float).
        references: dict from a name to the same metrics of pictures that no diffusion model drew.
        judge_metrics: dict from "train", "validation" and "test" to what the judge gets right there (dict of float).
        images: uint8 (n, 48, 48), the samples.
        asked, seen: integers (n,), the categories asked for and seen.
        neighbour_distances: dict from "samples", "validation" and "test" to how far the nearest training picture
            is, in grey levels (n,).
        nearest: int (n,), the training picture that each sample is most like.
    """

    metrics: dict
    references: dict
    judge_metrics: dict
    images: np.ndarray
    asked: np.ndarray
    seen: np.ndarray
    neighbour_distances: dict
    nearest: np.ndarray


def judge_samples(sampler, judge, feature_network, pictures, seed, count):
    """Draws samples and compares them with real pictures.

    Args:
        sampler: `Sampler`.
        judge: the trained judge.
        feature_network: what `load_feature_network` returned.
        pictures: dict of `Pictures` of "train", "validation" and "test".
        seed: int, of the samples.
        count: int, number of samples.

    Returns:
        `Judgement`.
    """
    category, elevation = every_label(count)
    images = draw_samples(sampler, category, elevation, seed)
    judge = runs.for_prediction(judge)
    agreed, seen, _ = agreement(judge, images, category, elevation)
    real = {part: extract_features(feature_network, some.images) for part, some in pictures.items()}
    features = extract_features(feature_network, images)
    neighbours, nearest = nearest_neighbours(images, pictures["train"].images)
    neighbour_distances = {"samples": neighbours}
    for part in ("validation", "test"):
        neighbour_distances[part], _ = nearest_neighbours(pictures[part].images, pictures["train"].images)
    close = {
        f"closer_than_1st_percentile_of_{part}": float(
            np.mean(neighbours < np.percentile(neighbour_distances[part], 1))
        )
        for part in ("validation", "test")
    }
    measured = {part: distances(features, real[part]) for part in pictures}
    for part in measured:
        measured[part] |= agreed | close | {"neighbour_grey_levels": float(np.median(neighbours))}

    # As many real training pictures as there are samples: what a perfect model of the training pictures would score.
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(pictures["train"].images))[:count]
    noise = generator.integers(0, 256, images.shape, "uint8")
    references = {
        "train_pictures": distances(real["train"][chosen], real["test"]),
        "shrunken_test_pictures": distances(
            extract_features(feature_network, shrunken(pictures["test"].images)), real["test"]
        ),
        "noise": distances(extract_features(feature_network, noise), real["test"]),
    }
    judge_metrics = {
        part: agreement(judge, some.images, some.category, some.elevation)[0] for part, some in pictures.items()
    }
    for part, right in judge_metrics.items():
        references[f"{part}_pictures"] = references.get(f"{part}_pictures", {}) | right
    for part in ("validation", "test"):
        references[f"{part}_pictures"]["neighbour_grey_levels"] = float(np.median(neighbour_distances[part]))
    return Judgement(measured, references, judge_metrics, images, category, seen, neighbour_distances, nearest)


# --------------------------------------------------------------------------------------------------------- experiments

BASELINE = Recipe()
TRAINING_EXPERIMENTS = {
    "baseline": BASELINE,
    "standardised pictures": dataclasses.replace(BASELINE, standardized=True),
    "noise instead of velocity": dataclasses.replace(BASELINE, target="noise"),
    "absolute instead of squared error": dataclasses.replace(BASELINE, loss="mae"),
    "no moving average": dataclasses.replace(BASELINE, average=0.0),
    "no attention": dataclasses.replace(BASELINE, attention=False),
}
STEPS = (5, 10, 20, 50, 100, 200)
GUIDANCES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)
SPACINGS = (1.0, 1.5, 2.0, 3.0)
SAMPLING_EXPERIMENTS = {
    **{f"guidance {guidance:g}": Sampling(guidance=guidance) for guidance in GUIDANCES},
    **{f"spacing {spacing:g}": Sampling(spacing=spacing) for spacing in SPACINGS},
    **{f"{sampler}, {steps} steps": Sampling(sampler, steps) for steps in STEPS for sampler in ("ddim", "ddpm")},
}
EXPERIMENT_SAMPLES = 450


def with_flags(recipe, arguments):
    """Returns a `Recipe` with what the command line changes, and the smaller network of a quick run."""
    recipe = cli.with_flags(recipe, arguments)
    return dataclasses.replace(recipe, widths=QUICK_WIDTHS) if arguments.quick else recipe


def run_experiments(arguments):
    """Compares ways of training at a small budget, then ways of drawing with the saved network.

    Everything is judged by samples against the validation pictures. Each run adds one row to the table.
    """
    table = runs.experiments_table(arguments.output_dir, SCRIPT)
    finished = {(row["name"], int(row["seed"])) for row in runs.read_rows(table)}
    left = [name for name in [*TRAINING_EXPERIMENTS, *SAMPLING_EXPERIMENTS] if (name, arguments.seed) not in finished]
    if arguments.quick:
        left = [name for name in left if name in ("baseline", "ddpm, 5 steps")]
    folder = runs.saved_models_folder(arguments.output_dir, SCRIPT)
    pictures, _ = load_pictures(arguments.data_dir, arguments.quick)
    judge = runs.for_prediction(runs.load_model(folder / "judge.keras")[0])
    feature_network = load_feature_network(arguments.output_dir)
    real_features = extract_features(feature_network, pictures["validation"].images)
    category, elevation = every_label(QUICK_JUDGED if arguments.quick else EXPERIMENT_SAMPLES)
    for number, name in enumerate(left):
        print(f"{len(left) - number} of {len(TRAINING_EXPERIMENTS) + len(SAMPLING_EXPERIMENTS)} runs left: {name}")
        started = clock.time()
        if name in TRAINING_EXPERIMENTS:
            recipe, sampling = with_flags(TRAINING_EXPERIMENTS[name], arguments), FINAL_SAMPLING
            network, _, _ = train_network(
                recipe,
                pictures["train"],
                arguments.seed,
                folder=arguments.output_dir / "runs" / SCRIPT / "experiment",
                resume=False,
            )
        else:
            network, card = runs.load_model(folder / "network.keras")
            recipe = Recipe(**card["recipe"])
            sampling = SAMPLING_EXPERIMENTS[name]
        sampler = Sampler(runs.for_prediction(network), recipe, sampling)
        images = draw_samples(sampler, category, elevation, arguments.seed)
        measured = distances(extract_features(feature_network, images), real_features)
        measured |= agreement(judge, images, category, elevation)[0]
        settings = {"name": name, "seed": arguments.seed, **dataclasses.asdict(recipe), **dataclasses.asdict(sampling)}
        settings |= {
            "parameters": runs.parameter_counts(network)["trainable"],
            "seconds": round(clock.time() - started, 1),
            "samples": len(images),
        }
        runs.append_row(table, settings | {key: round(value, 5) for key, value in measured.items()})
        show_experiments(arguments.output_dir)
    print(f"finished runs are in {table}")


# ------------------------------------------------------------------------------------------------------------- figures


def draw_network(recipe, folder):
    """A diagram of the network that `build_network` builds."""
    figure, axes = plt.subplots(figsize=(10, 4.6))
    last = len(recipe.widths) - 1
    blocks = f"{recipe.blocks} x residual block" if recipe.blocks > 1 else "residual block"

    def box(x, y, text, color=figures.BLUE):
        frame = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color, "linewidth": 1.5}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame)

    def connect(start, end, text="", shift=(0, 0)):
        axes.plot(*zip(start, end, strict=True), color=figures.GREY, zorder=0)
        middle = [(a + b) / 2 + more for a, b, more in zip(start, end, shift, strict=True)]
        axes.text(*middle, text, ha="center", va="bottom", fontsize=8, color=figures.GREY)

    for level, filters in enumerate(recipe.widths):
        side = IMAGE_SIZE // PATCH // 2**level
        extra = "\nattention" if level == last and recipe.attention else ""
        y = -1.3 * level
        for x in (level - last - 1.2, last + 1.2 - level):
            box(x, y, f"{side} x {side} x {filters}\n{blocks}{extra}")
        connect((level - last - 1.2, y), (last + 1.2 - level, y), "" if level else "skip connections: concatenate")
        if level < last:
            connect((level - last - 1.2, y), (level - last - 0.2, y - 1.3), "average\npooling", (-0.5, -0.25))
            connect((last + 0.2 - level, y - 1.3), (last + 1.2 - level, y), "enlarge", (0.4, -0.1))
    box(0, -1.3 * last, f"{side} x {side} x {filters}\nresidual block")
    edge = last + 1.2
    box(-edge, 1.4, f"noisy picture, {IMAGE_SIZE} x {IMAGE_SIZE}", figures.GREEN)
    box(edge, 1.4, f"{recipe.target}, {IMAGE_SIZE} x {IMAGE_SIZE}", figures.RED)
    connect((-edge, 1.4), (-edge, 0), f"{PATCH} x {PATCH} pixels\nbecome channels,\nconvolution", (-0.55, -0.3))
    connect((edge, 0), (edge, 1.4), f"convolution,\nchannels become\n{PATCH} x {PATCH} pixels", (0.55, -0.3))
    box(
        0,
        1.4,
        "time (sines), category, elevation (embeddings)\nscale and shift every filter of every block",
        figures.ORANGE,
    )
    axes.set_xlim(-edge - 1, edge + 1)
    axes.set_ylim(-1.3 * last - 0.6, 1.9)
    axes.set_axis_off()
    axes.set_title("The network: a U-Net of residual blocks that know what they are to draw")
    return figures.save(figure, folder / "network.png")


def draw_first_samples(sampler, seed, folder):
    """The first 64 samples of the seed, orders at random."""
    generator = np.random.default_rng(seed)
    category, elevation = generator.integers(len(CATEGORIES), size=64), generator.integers(len(DEGREES), size=64)
    images = draw_samples(sampler, category, elevation, seed)
    figure, axes = plt.subplots(8, 8, figsize=(10, 11))
    for panel, image, kind, height in zip(axes.flat, images, category, elevation, strict=True):
        figures.picture(panel, image, f"{CATEGORIES[kind]}, {DEGREES[height]}°")
    figure.suptitle("The first 64 samples, not picked", x=0.01, ha="left")
    return figures.save(figure, folder / "samples.png")


def draw_all_orders(sampler, seed, folder):
    """The same noise as each category from each elevation."""
    category, elevation = np.divmod(np.arange(len(CATEGORIES) * len(DEGREES)), len(DEGREES))
    noise = np.random.default_rng(seed).standard_normal((1, IMAGE_SIZE, IMAGE_SIZE, 1), dtype="float32")
    images = draw_samples(sampler, category, elevation, seed, np.repeat(noise, len(category), axis=0))
    figure, axes = plt.subplots(len(CATEGORIES), len(DEGREES), figsize=(10, 6))
    for panel, image, kind, height in zip(axes.flat, images, category, elevation, strict=True):
        figures.picture(panel, image, f"{CATEGORIES[kind]}, {DEGREES[height]}°")
    figure.suptitle("The same noise, drawn to every order", x=0.01, ha="left")
    return figures.save(figure, folder / "orders.png")


def draw_the_way(sampler, seed, folder):
    """One order per category on its way out of the noise."""
    steps = sampler.sampling.steps
    shown = np.linspace(0, steps, 9).round().astype(int).tolist()
    inputs = sampler_inputs(np.arange(len(CATEGORIES)), np.full(len(CATEGORIES), 3), seed)
    inputs = {name: ops.convert_to_tensor(values) for name, values in inputs.items()}
    noisy = inputs["noise"]
    figure, axes = plt.subplots(len(CATEGORIES), len(shown), figsize=(10, 6))
    for number in range(steps + 1):
        if number in shown:
            images = to_grey(ops.convert_to_numpy(noisy), sampler.recipe)
            for panel, image in zip(axes[:, shown.index(number)], images, strict=True):
                figures.picture(panel, image)
            axes[0, shown.index(number)].set_title(f"step {number} of {steps}", fontsize=9, loc="center")
        if number < steps:
            noisy = sampler.step(number, noisy, inputs)
    figure.suptitle("Out of the noise: one toy of each category on its way", x=0.01, ha="left")
    return figures.save(figure, folder / "denoising.png")


def draw_interpolations(sampler, seed, folder):
    """From one noise to another with the same order, for eight pairs."""
    pairs, columns = 8, 9
    generator = np.random.default_rng(seed)
    first, second = generator.standard_normal((2, pairs, IMAGE_SIZE, IMAGE_SIZE, 1), dtype="float32")
    # Along the arc: a mixture of two noises by shares would be too weak to be noise.
    angle = np.linspace(0, np.pi / 2, columns, dtype="float32")[:, None, None, None]
    noise = np.concatenate([np.cos(angle) * a + np.sin(angle) * b for a, b in zip(first, second, strict=True)])
    category = np.repeat(np.arange(pairs) % len(CATEGORIES), columns)
    images = draw_samples(sampler, category, np.full(len(category), 3), seed, noise)
    figure, axes = plt.subplots(pairs, columns, figsize=(10, 9.2))
    for panel, image in zip(axes.flat, images, strict=True):
        figures.picture(panel, image)
    title = f"From one noise to another, the order being the same, {DEGREES[3]}°: eight pairs"
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, folder / "interpolations.png")


def draw_nearest(judgement, training_images, folder):
    """The first samples above the training pictures that they are most like, and the most copied ones."""
    figure = plt.figure(figsize=(10, 5.4))
    closest = np.argsort(judgement.neighbour_distances["samples"])[:12]
    for part, chosen, title in zip(
        figure.subfigures(2, 1),
        (np.arange(12), closest),
        ("The first twelve samples, and below each the nearest training picture", "The twelve samples nearest to one"),
        strict=True,
    ):
        axes = part.subplots(2, 12)
        for column, number in enumerate(chosen):
            distance = judgement.neighbour_distances["samples"][number]
            figures.picture(axes[0, column], judgement.images[number], f"{distance:.1f}")
            figures.picture(axes[1, column], training_images[judgement.nearest[number]])
        part.suptitle(title + "; grey levels apart", x=0.01, ha="left")
    return figures.save(figure, folder / "nearest.png")


def draw_neighbour_distances(judgement, folder):
    """How far samples and real pictures are from the training pictures."""
    figure, axes = plt.subplots(figsize=(8, 4))
    edges = np.geomspace(1, 60, 80)
    labels = {
        "samples": "samples",
        "validation": "pictures of the training toys\nthat were not trained on",
        "test": "pictures of test toys",
    }
    for (part, label), color in zip(labels.items(), (figures.RED, figures.BLUE, figures.GREY), strict=True):
        distance = judgement.neighbour_distances[part]
        share, _ = np.histogram(np.clip(distance, edges[0], edges[-1]), edges)
        axes.stairs(share / len(distance), edges, color=color, linewidth=2)
        peak = share.argmax()
        top = (edges[peak], share[peak] / len(distance))
        axes.annotate(label, top, xytext=(6, 4), textcoords="offset points", color=color)
    axes.set(xscale="log", xlabel="distance to the nearest training picture in grey levels", ylabel="share of pictures")
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # room for the labels
    axes.set_title("Copies would lie left of the pictures that were kept from the training")
    return figures.save(figure, folder / "neighbour_distances.png")


def draw_agreement(judgement, folder):
    """What the judge sees in samples of each order."""
    counts = confusion_matrix(judgement.asked, judgement.seen, labels=range(len(CATEGORIES)))
    figure, axes = plt.subplots(figsize=(5.6, 5.2))
    figures.confusion_matrix(axes, counts, CATEGORIES, "What was asked for, and what the judge sees")
    axes.set(xlabel="category seen", ylabel="category asked for")
    return figures.save(figure, folder / "agreement.png")


def draw_learning_curves(card, folder):
    """Loss of the diffusion network on pictures of the training and on those that were kept from it."""
    curves = card["curves"]
    figure, axes = plt.subplots(figsize=(8, 4))
    epochs = np.arange(1, len(curves["loss"]) + 1)
    axes.plot(epochs, curves["loss"], label="training")
    axes.plot(epochs, curves["val_loss"], label="validation,\nweights not averaged")
    axes.set(xlabel="epoch", ylabel=f"loss ({card['recipe']['target']}, {card['recipe']['loss']})", yscale="log")
    axes.set_title("How well the network tells toy from noise")
    figures.label_lines(axes)
    return figures.save(figure, folder / "learning_curves.png")


def draw_quality_against_steps(rows, folder):
    """Distance to the validation pictures against steps and guidance."""
    named = {row["name"]: row for row in rows}
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for sampler in ("ddim", "ddpm"):
        steps = [number for number in STEPS if f"{sampler}, {number} steps" in named]
        quality = [float(named[f"{sampler}, {number} steps"]["frechet_distance"]) for number in steps]
        left.plot(steps, quality, "o-", label=sampler.upper())
    left.set(xlabel="steps", ylabel="Fréchet distance to validation pictures")
    if any(len(line.get_xdata()) for line in left.get_lines()):  # nothing has no logarithm
        left.set(xscale="log", yscale="log")
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_formatter("{x:g}")
    left.set_xticks(STEPS, STEPS)
    left.set_title("How many steps drawing takes")
    figures.label_lines(left)
    guidances = [number for number in GUIDANCES if f"guidance {number:g}" in named]
    quality = [float(named[f"guidance {number:g}"]["frechet_distance"]) for number in guidances]
    agreed = [float(named[f"guidance {number:g}"]["category_agreement"]) for number in guidances]
    right.plot(quality, agreed, "-", color=figures.GREY, linewidth=1)
    right.scatter(quality, agreed, color=figures.BLUE, zorder=3)
    for guidance, x, y in zip(guidances, quality, agreed, strict=True):
        right.annotate(f"{guidance:g}", (x, y), xytext=(5, -11), textcoords="offset points")
    right.set(xlabel="Fréchet distance to validation pictures", ylabel="judge sees the category asked for")
    right.yaxis.set_major_formatter("{x:.0%}")
    right.set_title("Guidance: 0 ignores the order, 1 obeys it")
    return figures.save(figure, folder / "quality.png")


def draw_experiments(rows, folder):
    """Distance and agreement after short trainings, one change at a time."""
    rows = [row for row in rows if row["name"] in TRAINING_EXPERIMENTS]
    names = [name for name in TRAINING_EXPERIMENTS if any(row["name"] == name for row in rows)]
    figure, panels = plt.subplots(1, 2, figsize=(10, 0.34 * len(names) + 1.3), sharey=True)
    for panel, column, label in zip(
        panels,
        ("frechet_distance", "category_agreement"),
        ("Fréchet distance to validation pictures", "judge sees the category asked for"),
        strict=True,
    ):
        panel.scatter([float(row[column]) for row in rows], [names.index(row["name"]) for row in rows], s=28)
        panel.set(xlabel=label)
        panel.grid(True, axis="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    panels[1].xaxis.set_major_formatter("{x:.1%}")
    figure.suptitle(f"One change at a time, {BASELINE.epochs} epochs of training, a point a seed", x=0.01, ha="left")
    return figures.save(figure, folder / "experiments.png")


# ---------------------------------------------------------------------------------------------------------------- main

FINAL = Recipe(average=0.999, epochs=16)


def train(arguments):
    """Trains the wanted networks and saves them; their cards get their metrics in `report`.

    Returns:
        set of str, the names of the trained networks.
    """
    pictures, checksums = load_pictures(arguments.data_dir, arguments.quick)
    names = [arguments.model] if arguments.model else list(reversed(MODELS))
    for name in names:
        print(f"training the {name} network")
        options = {
            "folder": arguments.output_dir / "runs" / SCRIPT / name,
            "resume": arguments.resume,
            "validation": pictures["validation"],
        }
        recipe = with_flags(FINAL if name == "network" else Recipe(epochs=JUDGE_EPOCHS), arguments)
        if name == "network":
            network, curves, seconds = train_network(recipe, pictures["train"], arguments.seed, **options)
        else:
            options |= {"epochs": recipe.epochs, "batch_size": recipe.batch_size}
            network, curves, seconds = train_judge(pictures["train"], arguments.seed, **options)
        card = runs.card(
            SCRIPT,
            name,
            arguments,
            recipe=recipe,
            seed=arguments.seed,
            dataset={
                "name": "smallnorb, left views at 48 x 48",
                **{part: len(some.images) for part, some in pictures.items()},
                "sha256": checksums,
            },
            pictures=len(pictures["train"].images),
            curves=curves,
            seconds=seconds,
        )
        card["metrics"] = {}
        if name == "network":
            card["sampling"] = dataclasses.asdict(FINAL_SAMPLING)
        else:
            del card["recipe"]  # the judge takes nothing from it but epochs and batch size
        runs.save_model(network, arguments.output_dir / "saved_models" / SCRIPT / f"{name}.keras", card)
    return set(names)


def report(arguments, trained=()):
    """Restores the saved networks, draws and judges samples, writes results and figures.

    Args:
        arguments: the parsed command line.
        trained: names of the networks that were trained just now, whose cards still lack their metrics.
    """
    folder = runs.saved_models_folder(arguments.output_dir, SCRIPT)
    print(f"models from {folder}")
    network, card = runs.load_model(folder / "network.keras")
    judge, judge_card = runs.load_model(folder / "judge.keras")
    pictures, checksums = load_pictures(arguments.data_dir, arguments.quick)
    sampling = dataclasses.replace(FINAL_SAMPLING, steps=QUICK_STEPS) if arguments.quick else FINAL_SAMPLING
    sampler = Sampler(runs.for_prediction(network), Recipe(**card["recipe"]), sampling)
    drawings = arguments.output_dir / "report" / "figures" / SCRIPT
    # Where pictures of different orders or noises are compared, no fresh noise may come between.
    repeatable = Sampler(sampler.network, sampler.recipe, dataclasses.replace(sampling, sampler="ddim"))
    written = [
        draw_network(sampler.recipe, drawings),
        draw_first_samples(sampler, arguments.seed, drawings),
        draw_all_orders(repeatable, arguments.seed, drawings),
        draw_the_way(repeatable, arguments.seed, drawings),
        draw_interpolations(repeatable, arguments.seed, drawings),
        draw_learning_curves(card, drawings),
    ]
    count = QUICK_JUDGED if arguments.quick else NUM_JUDGED
    print(f"drawing and judging {count:,} samples")
    feature_network = load_feature_network(arguments.output_dir)
    judgement = judge_samples(sampler, judge, feature_network, pictures, arguments.seed, count)
    measured = {"network": judgement.metrics, "judge": judgement.judge_metrics}
    cards = {"network": card, "judge": judge_card}
    for name, restored in (("network", network), ("judge", judge)):
        if name in trained:
            cards[name]["metrics"] = measured[name]
            runs.save_model(restored, folder / f"{name}.keras", cards[name])
        print(f"\n{name}: {cards[name]['parameters']['trainable']:,} parameters")
        runs.print_metrics(measured[name]["test"], cards[name])
    if card["dataset"]["sha256"] != checksums:
        print("note: the pictures differ from those that the recorded metrics were measured on")

    results_file = arguments.output_dir / "report" / "results" / f"{SCRIPT}.json"
    floor = judgement.references["train_pictures"]
    results = {
        "script": f"{SCRIPT}.py",
        "test": {
            **judgement.metrics["test"],
            **{
                f"{name}_over_floor": judgement.metrics["test"][name] / floor[name]
                for name in floor
                if "distance" in name
            },
        },
        "validation": judgement.metrics["validation"],
        "train": judgement.metrics["train"],
        "references": judgement.references,
        "samples": count,
        "sampling": dataclasses.asdict(sampling),
        "seeds": 1,
        "models": {
            name: {
                "parameters": each["parameters"]["trainable"],
                "epochs": each["epochs"],
                "minutes": round(each["seconds"] / 60, 1),
                "hardware": each["hardware"],
                "shortened": each["shortened"],
            }
            for name, each in cards.items()
        },
    }
    write_json(results_file, results)
    written += [
        results_file,
        draw_nearest(judgement, pictures["train"].images, drawings),
        draw_neighbour_distances(judgement, drawings),
        draw_agreement(judgement, drawings),
    ]
    written += show_experiments(arguments.output_dir)
    print("\nwrote", *written, sep="\n  ")


def show_experiments(output_dir):
    """Draws the finished experiments and puts them into the results, where there are any.

    Returns:
        list of `pathlib.Path` of the figures.
    """
    rows = runs.read_rows(runs.experiments_table(output_dir, SCRIPT))
    results_file = output_dir / "report" / "results" / f"{SCRIPT}.json"
    if not rows or not results_file.exists():
        return []
    columns = ("frechet_distance", "category_agreement", "elevation_mae_degrees")
    results = json.loads(results_file.read_text())
    results["experiments"] = {row["name"]: {column: float(row[column]) for column in columns} for row in rows}
    write_json(results_file, results)
    drawings = output_dir / "report" / "figures" / SCRIPT
    written = [draw_quality_against_steps(rows, drawings)]
    if any(row["name"] in TRAINING_EXPERIMENTS for row in rows):
        written.append(draw_experiments(rows, drawings))
    return written


def draw_to_order(arguments):
    """Draws what the command line asks for; whatever it leaves open is drawn at random.

    Writes a mosaic (PNG, twice as large) and an `.npz` with `images` uint8 (n, 48, 48), `category` int64 (n,), index
    into `CATEGORIES`, and `elevation` int64 (n,), degrees.
    """
    network, card = runs.load_model(runs.saved_models_folder(arguments.output_dir, SCRIPT) / "network.keras")
    count = arguments.samples or 64
    generator = np.random.default_rng(arguments.seed)
    category, elevation = generator.integers(len(CATEGORIES), size=count), generator.integers(len(DEGREES), size=count)
    if arguments.category:
        category[:] = CATEGORIES.index(arguments.category)
    if arguments.elevation:
        elevation[:] = list(DEGREES).index(arguments.elevation)
    sampling = Sampling(
        arguments.sampler or FINAL_SAMPLING.sampler,
        arguments.steps or FINAL_SAMPLING.steps,
        FINAL_SAMPLING.guidance if arguments.guidance is None else arguments.guidance,
    )
    sampler = Sampler(runs.for_prediction(network), Recipe(**card["recipe"]), sampling)
    images = draw_samples(sampler, category, elevation, arguments.seed)
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    mosaic = np.full((rows * columns, IMAGE_SIZE, IMAGE_SIZE), 255, "uint8")
    mosaic[:count] = images
    mosaic = mosaic.reshape(rows, columns, IMAGE_SIZE, IMAGE_SIZE).transpose(0, 2, 1, 3)
    mosaic = mosaic.reshape(rows * IMAGE_SIZE, columns * IMAGE_SIZE).repeat(2, axis=0).repeat(2, axis=1)
    order = f"{arguments.category or 'any'}_{arguments.elevation or 'any'}_seed_{arguments.seed}"
    path = arguments.output_dir / "runs" / SCRIPT / f"{order}.png"
    with replacing(path) as temporary:
        Image.fromarray(mosaic).save(temporary, format="PNG")
    with replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, images=images, category=category, elevation=DEGREES[elevation])
    print("wrote", path, path.with_suffix(".npz"), sep="\n  ")


def positive_or_zero(text):
    number = float(text)
    if not 0 <= number < math.inf:
        raise ValueError
    return number


def main(argv=None):
    flags = cli.parser(__doc__, MODELS)
    drawing = flags.add_argument_group("drawing to order, with --load; what is left out is drawn at random")
    drawing.add_argument("--category", choices=CATEGORIES)
    drawing.add_argument("--elevation", type=int, choices=list(DEGREES), metavar="DEGREES", help="30, 35 ... 70")
    drawing.add_argument("--samples", type=cli.positive, metavar="N", help="how many pictures (default: 64)")
    drawing.add_argument("--steps", type=cli.positive, metavar="N", help=f"default: {FINAL_SAMPLING.steps}")
    guidance_help = f"0 ignores the order, 1 obeys it, more overdoes it (default: {FINAL_SAMPLING.guidance:g})"
    drawing.add_argument("--guidance", type=positive_or_zero, metavar="W", help=guidance_help)
    drawing.add_argument("--sampler", choices=("ddim", "ddpm"), help=f"default: {FINAL_SAMPLING.sampler}")
    arguments = cli.parse(flags, argv)
    orders = ("category", "elevation", "samples", "steps", "guidance", "sampler")
    if any(getattr(arguments, name) is not None for name in orders):
        if not arguments.load:
            raise cli.UserError("drawing to order needs a trained network; use --load")
        draw_to_order(arguments)
    elif arguments.experiments:
        run_experiments(arguments)
    else:
        report(arguments, train(arguments) if arguments.train else ())


if __name__ == "__main__":
    cli.run(main)
