"""smallNORB: what is the toy, and from how high does the camera see it?

One network of two columns, a plain CNN and a ConvNeXt, looks at both camera views of a toy and answers two questions at
once: its category (five classes) and the elevation of the camera (regression, in degrees). For comparison, the plain
column is trained alone with more filters, and two networks have one question each. The dataset is LeCun, Huang &
Bottou, "Learning methods for generic object recognition with invariance to pose and lighting" (CVPR 2004).

    python task1_smallnorb_cnn.py --train          three joint networks, three plain ones, one per question
    python task1_smallnorb_cnn.py --load           restores the joint one: same metrics, same figures, in a minute
    python task1_smallnorb_cnn.py --load --model category     restores and measures another one
    python task1_smallnorb_cnn.py --experiments    the comparison behind the choices, on held-out toys

Two things make this dataset treacherous. Each training toy is photographed 972 times, so a random validation split
shows the network toys it knows; here validation toys are never trained on, and the official test toys are read once.
And the grey of the background alone gives the elevation away: looking it up is right for two thirds of the pictures.
`repaint_background` measures how much a network relies on that.
"""

from common import quiet  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import contextlib
import dataclasses
import json
import math
import time
from typing import NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from sklearn.metrics import accuracy_score, confusion_matrix, mean_absolute_error
from sklearn.neighbors import KNeighborsClassifier

from common import cli, figures, runs
from common.datasets import SMALLNORB_CATEGORIES as CATEGORIES
from common.datasets import SMALLNORB_ELEVATION_DEGREES, area_average, load_smallnorb
from common.files import write_json
from common.metrics import standard_deviation

SCRIPT = "task1_smallnorb_cnn"
MODELS = ["joint", "plain", "category", "elevation"]
TRAINING_TOYS = (4, 6, 7, 8, 9)
COMMON_BACKGROUND = 200  # grey level near the mean over the training pictures
MATTE_WIDTH = 12  # grey levels: how far from the background level a pixel still counts as background
NUM_SEEDS = {"joint": 3, "plain": 3, "category": 1, "elevation": 1}
PREDICT_BATCH_SIZE = 256
QUICK_PICTURES = 320
KNOWN_RESULTS = """\
Category accuracy others report on this split: plain CNN 94.8 %, capsules with EM routing 98.2 %, 98.6 % with several
crops (Hinton, Sabour & Frosst 2018); best published 99.1 %. Elevation error on this split: none published.
Without a network:"""

AUGMENTATIONS = ("shift", "scale", "rotation", "flip", "brightness", "background", "cutout")
MAX_SHIFT = 0.07  # of the picture's side
MAX_LOG_SCALE = 0.15  # between exp(-0.15) = 0.86 and exp(0.15) = 1.16 times as large
MAX_ROTATION = 8.0  # degrees about the viewing axis, which leave the elevation as it is
MAX_LOG_CONTRAST = 0.4
MAX_BRIGHTNESS = 40.0  # grey levels
BACKGROUND_LEVELS = (90.0, 255.0)
CUTOUT_SIDE = 0.25  # of the picture's side
POOR_ACCURACY = 0.9  # below which a figure marks a test toy


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that an experiment varies; the defaults are the baseline of the experiments.

    Attributes:
        outputs: tuple out of "category" and "elevation".
        views: 2 for both cameras, 1 for the left one alone.
        image_size: side of the pictures in pixels.
        standardize: whether each stereo pair is brought to mean 0 and standard deviation 1 inside the network.
        augmentations: tuple out of `AUGMENTATIONS`.
        architecture: one of `ARCHITECTURES`, or several with plus signs between, which become columns side by side.
        width: filters of the first stage of convolutions.
        local_contrast: sides, in pixels, of the surroundings that are subtracted from the grey to make extra channels.
        dropout: rate before the output layers.
        label_smoothing: for the categories.
        elevation_loss: "mae", "mse", "huber" or "expectation" (cross-entropy on nine classes, then their mean).
        elevation_weight: of the elevation loss against the category loss, both being near 1 at the start.
        optimizer: "adamw", "adam", "nadam" or "sgd" (momentum 0.9, Nesterov).
        learning_rate: highest learning rate.
        weight_decay: decoupled, for "adamw" alone.
        schedule: "cosine" (with warm-up), "constant" or "plateau".
        batch_size: stereo pairs per step.
        epochs: passes over the training pictures.
    """

    outputs: tuple = ("category", "elevation")
    views: int = 2
    image_size: int = 48
    standardize: bool = True
    augmentations: tuple = AUGMENTATIONS
    architecture: str = "plain"
    width: int = 32
    local_contrast: tuple = ()
    dropout: float = 0.2
    label_smoothing: float = 0.05
    elevation_loss: str = "mae"
    elevation_weight: float = 1.0
    optimizer: str = "adamw"
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    schedule: str = "cosine"
    batch_size: int = 64
    epochs: int = 2


# ---------------------------------------------------------------------------------------------------------------- data


class Pictures(NamedTuple):
    """Stereo pairs at the size the network sees, with their labels.

    Attributes:
        images: uint8 (n, size, size, 2), 0 to 255, left view first.
        category: int64 (n,), 0 to 4, index into `CATEGORIES`.
        elevation: float32 (n,), 30 to 70 degrees.
        instance: int64 (n,), which toy of its category.
    """

    images: np.ndarray
    category: np.ndarray
    elevation: np.ndarray
    instance: np.ndarray

    def take(self, indices):
        """Returns the pictures at `indices` (integers, a slice or a mask)."""
        return Pictures(*(array[indices] for array in self))


def prepare(examples, image_size, quick):
    """Turns one split of smallNORB into `Pictures`.

    Args:
        examples: `common.datasets.StereoImages`.
        image_size: int, side in pixels.
        quick: bool, whether to take only `QUICK_PICTURES` of them, evenly spread.
    """
    step = len(examples.images) // QUICK_PICTURES if quick else 1
    return Pictures(
        area_average(examples.images[::step], image_size),
        examples.category[::step],
        SMALLNORB_ELEVATION_DEGREES[examples.elevation[::step]].astype("float32"),
        examples.instance[::step],
    )


def hold_out_toy(pictures, toy):
    """Splits pictures into those of the other toys and those of instance number `toy` of each category.

    The 972 pictures of a toy are near-copies of each other. Whole toys have to stay out of the training for the
    validation to say anything about toys that were never seen, as the test toys are.
    """
    held_out = pictures.instance == toy
    return pictures.take(~held_out), pictures.take(held_out)


def background_level(images):
    """Returns the grey of the background, the median over the border two pixels wide: float32 (n, 1, 1, 2)."""
    frame = np.ones(images.shape[1:3], bool)
    frame[2:-2, 2:-2] = False
    return np.median(images[:, frame], axis=1).astype("float32")[:, None, None, :]


def shift_background(images, level=COMMON_BACKGROUND):
    """Brightens or darkens each picture as a whole so that its background gets the grey `level`. uint8 in and out."""
    shifted = images + (level - background_level(images))
    return np.clip(np.rint(shifted), 0, 255).astype("uint8")


def repaint_background(images, level=COMMON_BACKGROUND):
    """Gives the background the grey `level` and leaves the toy as it is. uint8 in and out.

    A pixel counts as background by how close it is to the background level, with a soft edge, so that shadows fade
    into the new background as they did into the old one. Harder than `shift_background`: toy and background no longer
    differ by as much as they did, so that the contrast between them gives nothing away either.
    """
    old = background_level(images)
    matte = np.exp(-np.square((images - old) / MATTE_WIDTH))
    return np.clip(np.rint(images + matte * (level - old)), 0, 255).astype("uint8")


class StereoAugmentation(layers.Layer):
    """Random changes of stereo pairs that leave category and elevation true. Does nothing outside training.

    Both views of a pair are changed alike, so that the disparity between them, which tells depth, stays. Shift, scale
    and rotation are one resampling. That is the costliest part, so each step resamples the first half of the batch and
    repaints the background of the middle half; the order of the pictures is random, so every picture meets every
    combination over the epochs.

    Args:
        augmentations: tuple out of `AUGMENTATIONS`.
        seed: int.

    Call arguments:
        images: (n, size, size, 2), 0 to 255.
        training: bool.

    Returns:
        float32 (n, size, size, 2), 0 to 255.
    """

    def __init__(self, augmentations, seed, **keywords):
        super().__init__(**keywords)
        self.augmentations = set(augmentations)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, training=False):
        if not training:
            return ops.cast(images, "float32")
        if "flip" in self.augmentations:
            images = self._flip(images)
        images = ops.cast(images, "float32")
        count = ops.shape(images)[0]
        if {"shift", "scale", "rotation"} & self.augmentations:
            images = ops.concatenate([self._move(images[: count // 2]), images[count // 2 :]])
        if "background" in self.augmentations:
            first, last = count // 4, count - count // 4
            images = ops.concatenate([images[:first], self._repaint(images[first:last]), images[last:]])
        if "brightness" in self.augmentations:
            images = self._relight(images)
        if "cutout" in self.augmentations:
            images = self._cut_out(images)
        return images

    def _uniform(self, images, low, high):
        """One random number a picture: (n, 1, 1, 1)."""
        return keras.random.uniform((ops.shape(images)[0], 1, 1, 1), low, high, seed=self.seed_generator)

    def _flip(self, images):
        """Mirrors half of the pairs. The mirror image of a scene swaps the cameras, so the views are swapped, too."""
        _, height, width, views = images.shape
        # With the views of a pixel side by side, the reversed row is the mirrored row with the views swapped.
        rows = ops.reshape(images, (-1, height, width * views))
        mirrored = self._uniform(images, 0.0, 1.0)[..., 0] < 0.5
        return ops.reshape(ops.where(mirrored, ops.flip(rows, axis=2), rows), (-1, height, width, views))

    def _amount(self, name, images, limit):
        """Random numbers (n,) within plus and minus `limit`, or zeros where the augmentation `name` is not wanted."""
        if name in self.augmentations:
            return ops.reshape(self._uniform(images, -limit, limit), (-1,))
        return ops.zeros((ops.shape(images)[0],))

    def _move(self, images):
        size = images.shape[1]
        center = (size - 1) / 2
        scale = ops.exp(self._amount("scale", images, MAX_LOG_SCALE))
        angle = self._amount("rotation", images, math.radians(MAX_ROTATION))
        # Where each new pixel comes from: x' = a x - b y + c, y' = b x + a y + d, turned about the picture's centre.
        a, b = ops.cos(angle) / scale, ops.sin(angle) / scale
        c = center - (a - b) * center + self._amount("shift", images, MAX_SHIFT * size)
        d = center - (b + a) * center + self._amount("shift", images, MAX_SHIFT * size)
        transforms = ops.stack([a, -b, c, b, a, d, 0 * a, 0 * a], axis=1)
        return ops.image.affine_transform(images, transforms, interpolation="bilinear", fill_mode="nearest")

    def _level(self, images):
        """The background level, estimated from every second pixel of the top and bottom rows: (n, 1, 1, 2)."""
        border = ops.concatenate([images[:, 0, ::2], images[:, -1, ::2]], axis=1)
        return ops.median(border, axis=1)[:, None, None, :]

    def _repaint(self, images):
        """`repaint_background` with a random level for each picture."""
        level = self._level(images)
        change = self._uniform(images, *BACKGROUND_LEVELS) - level
        return images + ops.exp(-ops.square((images - level) * (1 / MATTE_WIDTH))) * change

    def _relight(self, images):
        """Random contrast and brightness of whole pictures, clipped as a camera clips."""
        contrast = ops.exp(self._uniform(images, -MAX_LOG_CONTRAST, MAX_LOG_CONTRAST))
        brightness = self._uniform(images, -MAX_BRIGHTNESS, MAX_BRIGHTNESS)
        mean = ops.mean(images, axis=(1, 2, 3), keepdims=True)
        return ops.clip((images - mean) * contrast + mean + brightness, 0.0, 255.0)

    def _cut_out(self, images):
        """Hides a random square behind the background level (DeVries & Taylor 2017), the same one in both views."""
        size = images.shape[1]
        side = CUTOUT_SIDE * size
        pixels = ops.arange(size, dtype="float32")
        rows = ops.reshape(pixels, (1, -1, 1, 1)) - self._uniform(images, 0.0, size - side)
        columns = ops.reshape(pixels, (1, 1, -1, 1)) - self._uniform(images, 0.0, size - side)
        inside = ops.logical_and(ops.logical_and(rows >= 0, rows < side), ops.logical_and(columns >= 0, columns < side))
        return ops.where(inside, self._level(images), images)


# -------------------------------------------------------------------------------------------------------------- models


def convolution(filters, kernel_size=3, **keywords):
    return layers.Conv2D(filters, kernel_size, padding="same", kernel_initializer="he_normal", **keywords)


def stem(features, width):
    """Halves the pictures: symbolic tensors (n, size, size, channels) to (n, size / 2, size / 2, width)."""
    return convolution(width, 5, strides=2, activation="relu")(features)


def build_plain(features, width):
    """Three stages of two convolutions and a pooling (VGG style; Simonyan & Zisserman 2015).

    Normalisation comes once a stage, after the pooling, where it costs a quarter; on a CPU it is otherwise as
    expensive as the convolutions.

    Args:
        features: symbolic tensor (n, size, size, channels).
        width: int, filters of the first stage; the later ones have twice and four times as many.

    Returns:
        Symbolic tensor (n, size / 16, size / 16, 4 width).
    """
    features = stem(features, width)
    for filters in (width, 2 * width, 4 * width):
        features = convolution(filters, activation="relu")(features)
        features = convolution(filters, use_bias=False)(features)
        features = layers.MaxPooling2D(2)(features)
        features = layers.BatchNormalization()(features)
        features = layers.ReLU()(features)
    return features


def build_residual(features, width):
    """Three residual blocks, each followed by a pooling (He et al. 2016). Arguments and result as `build_plain`."""
    features = stem(features, width)
    for filters in (width, 2 * width, 4 * width):
        shortcut = convolution(filters, 1, use_bias=False)(features)
        features = convolution(filters, use_bias=False)(features)
        features = layers.BatchNormalization()(features)
        features = layers.ReLU()(features)
        features = convolution(filters, use_bias=False)(features)
        features = layers.BatchNormalization()(features)
        features = layers.Add()([features, shortcut])
        features = layers.ReLU()(features)
        features = layers.MaxPooling2D(2)(features)
    return features


def build_separable(features, width):
    """`build_plain` with depthwise-separable convolutions (Chollet 2017): a ninth of the multiplications."""
    features = stem(features, width)
    for filters in (width, 2 * width, 4 * width):
        features = layers.SeparableConv2D(filters, 3, padding="same", activation="relu")(features)
        features = layers.SeparableConv2D(filters, 3, padding="same", use_bias=False)(features)
        features = layers.MaxPooling2D(2)(features)
        features = layers.BatchNormalization()(features)
        features = layers.ReLU()(features)
    return features


def build_convnext(features, width):
    """A small ConvNeXt (Liu et al. 2022): patches, then three stages of two residual blocks with 7 x 7 neighbourhoods.

    Each block looks around with one 7 x 7 filter a channel and then mixes the channels of every place. Looking around
    is cheap and happens on 12 x 12 places or fewer, so that from the first block on a filter sees half of the toy,
    where `build_plain` begins with details. Everything is normalised place by place, nothing by the rest of the batch.
    Arguments and result as `build_plain`.
    """
    for stage, filters in enumerate((width, 2 * width, 4 * width)):
        side = 4 if stage == 0 else 2
        features = layers.Conv2D(filters, side, strides=side)(features)
        features = layers.LayerNormalization()(features)
        for _ in range(2):
            change = layers.DepthwiseConv2D(7, padding="same")(features)
            change = layers.LayerNormalization()(change)
            change = layers.Dense(3 * filters, activation="gelu")(change)
            change = layers.Dense(filters)(change)
            features = layers.Add()([features, change])
    return layers.LayerNormalization()(features)


ARCHITECTURES = {
    "plain": build_plain,
    "residual": build_residual,
    "separable": build_separable,
    "convnext": build_convnext,
}


def build_heads(features, recipe, prefix):
    """Builds the last layers of one column.

    Args:
        features: symbolic tensor (n, height, width, channels), what the column made of the pictures.
        recipe: `Recipe`.
        prefix: str that the names of the layers begin with.

    Returns:
        dict of symbolic tensors: `category` (n, 5) probabilities; for the elevation `elevation` (n, 1) degrees or
        `elevation_probabilities` (n, 9), of which the mean is still to be taken.
    """
    features = layers.GlobalAveragePooling2D(name=f"{prefix}features")(features)
    features = layers.Dropout(recipe.dropout)(features)

    def probabilities(classes, name):
        return layers.Dense(classes, activation="softmax", dtype="float32", name=f"{prefix}{name}")(features)

    heads = {}
    if "category" in recipe.outputs:
        heads["category"] = probabilities(len(CATEGORIES), "category")
    if "elevation" in recipe.outputs and recipe.elevation_loss == "expectation":
        heads["elevation_probabilities"] = probabilities(len(SMALLNORB_ELEVATION_DEGREES), "elevation_probabilities")
    elif "elevation" in recipe.outputs:
        # Mean and deviation of the nine elevations, so that the layer before has numbers near 0 and 1 to predict.
        mean, deviation = SMALLNORB_ELEVATION_DEGREES.mean(), SMALLNORB_ELEVATION_DEGREES.std()
        degrees = layers.Rescaling(deviation, mean, dtype="float32", name=f"{prefix}elevation")
        heads["elevation"] = degrees(layers.Dense(1, dtype="float32")(features))
    return heads


def build_network(recipe):
    """Builds the network a recipe describes, out of built-in layers alone.

    Args:
        recipe: `Recipe`.

    Returns:
        Functional `keras.Model` from pictures (n, size, size, 2) in the uint8 range to a dict with the
        wanted outputs: `category` (n, 5) probabilities and `elevation` (n, 1) degrees.
    """
    images = keras.Input((recipe.image_size, recipe.image_size, 2), name="images")
    features = images if recipe.views == 2 else images[..., :1]
    features = layers.Rescaling(1 / 255)(features)
    if recipe.standardize:  # each stereo pair by its own mean and deviation, so that brightness says nothing
        features = layers.LayerNormalization(axis=(1, 2, 3), center=False, scale=False)(features)
    if recipe.local_contrast:
        # What differs from its surroundings, at several distances, beside the grey itself (Ciresan et al. 2011).
        surroundings = [layers.AveragePooling2D(side, 1, padding="same")(features) for side in recipe.local_contrast]
        features = layers.Concatenate()([features, *(layers.Subtract()([features, mean]) for mean in surroundings)])
    # Several columns answer each for itself, and their mean is the answer of the network (Ciresan et al. 2012).
    columns = recipe.architecture.split("+")
    answers = {}
    for column in columns:
        # What lies between the convolutions of a ConvNeXt takes longer in bfloat16 than they gain by it.
        with runs.building_in_float32() if column == "convnext" else contextlib.nullcontext():
            column_features = ARCHITECTURES[column](features, recipe.width)
        prefix = f"{column}_" if len(columns) > 1 else ""
        for name, answer in build_heads(column_features, recipe, prefix).items():
            answers.setdefault(name, []).append(answer)
    outputs = {
        name: layers.Average(dtype="float32", name=name)(parts) if len(columns) > 1 else parts[0]
        for name, parts in answers.items()
    }
    if "elevation_probabilities" in outputs:
        degrees = SMALLNORB_ELEVATION_DEGREES.astype("float32")
        expectation = layers.Dense(1, use_bias=False, trainable=False, dtype="float32", name="elevation")
        outputs["elevation"] = expectation(outputs.pop("elevation_probabilities"))
        expectation.set_weights([degrees[:, None]])
    return keras.Model(images, outputs, name="_and_".join(recipe.outputs))


# ------------------------------------------------------------------------------------------------------------ training

QUESTIONS = ("category", "elevation", "elevation_probabilities")  # how the names of the layers with losses end


def question(head):
    """Returns which of `QUESTIONS` a layer answers, by its name (str), which may begin with that of a column."""
    return next(name for name in QUESTIONS if head.endswith(name))


def compile_for_training(network, recipe, steps, seed):
    """Wraps `network` into a model that augments its pictures, and compiles it.

    Args:
        network: what `build_network` returned for the same `recipe`; the two share their weights.
        recipe: `Recipe`.
        steps: int, optimisation steps of the whole training, which the cosine schedule needs.
        seed: int, of the augmentation.

    Returns:
        Compiled `keras.Model`; `training_targets` makes its targets.
    """
    images = keras.Input(network.input_shape[1:], dtype="uint8")
    heads = {layer.name: layer.output for layer in network.layers if layer.name.endswith(QUESTIONS)}
    augmented = StereoAugmentation(recipe.augmentations, seed)(images)
    model = keras.Model(images, keras.Model(network.input, heads)(augmented))

    deviation = float(SMALLNORB_ELEVATION_DEGREES.std())
    losses = {
        "category": keras.losses.CategoricalCrossentropy(label_smoothing=recipe.label_smoothing),
        "elevation": {
            "mse": keras.losses.MeanSquaredError(),
            "huber": keras.losses.Huber(delta=5.0),
        }.get(recipe.elevation_loss, keras.losses.MeanAbsoluteError()),
        "elevation_probabilities": keras.losses.CategoricalCrossentropy(),
    }
    # Every column learns for itself, so that they err on different toys; what they say together is only watched.
    learnt = [head for head in heads if "+" not in recipe.architecture or head not in QUESTIONS]
    # Brings the elevation losses, in degrees or their squares, to the size of the cross-entropy. With "expectation" the
    # cross-entropy of the nine probabilities is what is learnt, and the error of their mean is only watched.
    scale = {"mae": 1 / deviation, "mse": 1 / deviation**2, "huber": 1 / (5 * deviation), "expectation": 0.0}
    weights = {
        "category": 1.0,
        "elevation": recipe.elevation_weight * scale[recipe.elevation_loss],
        "elevation_probabilities": recipe.elevation_weight,
    }
    metrics = {"category": "accuracy", "elevation": "mae", "elevation_probabilities": "accuracy"}

    learning_rate = recipe.learning_rate
    if recipe.schedule == "cosine":
        learning_rate = runs.cosine_schedule(recipe.learning_rate, steps)
    optimizer = {
        "adam": lambda: keras.optimizers.Adam(learning_rate),
        "adamw": lambda: keras.optimizers.AdamW(learning_rate, weight_decay=recipe.weight_decay),
        "nadam": lambda: keras.optimizers.Nadam(learning_rate),
        "sgd": lambda: keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True),
    }[recipe.optimizer]()
    model.compile(
        optimizer,
        loss={head: losses[question(head)] for head in heads},
        loss_weights={head: weights[question(head)] if head in learnt else 0.0 for head in heads},
        metrics={head: metrics[question(head)] for head in heads},
        **runs.compile_options(steps),
    )
    return model


def training_targets(pictures, model):
    """Returns the dict of targets for `pictures` that fits the outputs of a model of `compile_for_training`."""
    targets = {
        "category": np.eye(len(CATEGORIES), dtype="float32")[pictures.category],
        "elevation": pictures.elevation[:, None],
        "elevation_probabilities": (pictures.elevation[:, None] == SMALLNORB_ELEVATION_DEGREES).astype("float32"),
    }
    return {head: targets[question(head)] for head in model.output}


def train_network(recipe, pictures, seed, *, folder, resume, held_out=None):
    """Trains one network from scratch, or goes on from its checkpoint.

    Args:
        recipe: `Recipe`.
        pictures: `Pictures` to train on.
        seed: int, of weights, order and augmentation.
        folder: where the checkpoints live.
        resume: bool, whether to go on from the last of them.
        held_out: `Pictures` of toys that are not trained on, for the learning curves, or None.

    Returns:
        The trained network in float32 (`keras.Model`), its learning curves (dict of lists), and seconds (float).
    """
    keras.utils.set_random_seed(seed)
    steps_per_epoch = math.ceil(len(pictures.images) / recipe.batch_size)
    with runs.building_for_speed() as precision:
        network = build_network(recipe)
        model = compile_for_training(network, recipe, steps_per_epoch * recipe.epochs, seed)
    callbacks = []
    if recipe.schedule == "plateau":
        callbacks.append(keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.3, patience=0))
    curves, seconds = runs.fit(
        model,
        pictures.images,
        training_targets(pictures, model),
        validation_data=held_out and (held_out.images, training_targets(held_out, model)),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        folder=folder,
        settings={"recipe": json.loads(json.dumps(dataclasses.asdict(recipe))), "seed": seed, "precision": precision},
        resume=resume,
        callbacks=callbacks,
    )
    full_precision = build_network(recipe)
    runs.set_weights(full_precision, network.get_weights())
    return full_precision, curves, seconds


# ---------------------------------------------------------------------------------------------------------- evaluation


def predict(network, images):
    """Returns a dict of float32 arrays: `category` (n, 5) probabilities, `elevation` (n,) degrees, or one of them."""
    predictions = network.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)
    return {name: values[:, 0] if name == "elevation" else values for name, values in predictions.items()}


def background_versions(images):
    """Returns the pictures with their backgrounds replaced, both ways: dict of uint8 arrays like `images`."""
    return {"shifted": shift_background(images), "repainted": repaint_background(images)}


def evaluate(network, pictures, versions=None):
    """Measures a network on pictures as they are and with their backgrounds replaced.

    Args:
        network: what `build_network` or `runs.load_model` returned.
        pictures: `Pictures`.
        versions: what `background_versions` returned, where several networks are measured on the same pictures.

    Returns:
        Metrics (dict of float) and the predictions on the pictures as they are (see `predict`).
    """
    network = runs.for_prediction(network)
    predictions = predict(network, pictures.images)
    metrics = {}
    if "category" in predictions:
        metrics["category_accuracy"] = accuracy_score(pictures.category, predictions["category"].argmax(1))
    if "elevation" in predictions:
        metrics["elevation_mae_degrees"] = mean_absolute_error(pictures.elevation, predictions["elevation"])
        prefix = "elevation_mae_degrees_background_"
        for name, images in (versions or background_versions(pictures.images)).items():
            elevation = predict(network, images)["elevation"]
            metrics[prefix + name] = mean_absolute_error(pictures.elevation, elevation)
        metrics[prefix + "replaced"] = max(metrics[prefix + "shifted"], metrics[prefix + "repainted"])
    return {name: float(value) for name, value in metrics.items()}, predictions


# --------------------------------------------------------------------------------------------------------- experiments

BASELINE = Recipe()
EXPERIMENT_TOYS = (4, 7)  # held out in turn
METRIC_COLUMNS = (
    "category_accuracy",
    "elevation_mae_degrees",
    "elevation_mae_degrees_background_shifted",
    "elevation_mae_degrees_background_repainted",
)


def change(**changes):
    return dataclasses.replace(BASELINE, **changes)


EXPERIMENTS = {
    "baseline": {"baseline": BASELINE},
    "views": {"left view only": change(views=1)},
    "picture size": {"64 x 64": change(image_size=64)},
    "input": {
        "not standardised": change(standardize=False),
        "local contrast channels": change(local_contrast=(5, 13)),
    },
    "augmentation": {
        "none": change(augmentations=()),
        **{f"{name} alone": change(augmentations=(name,)) for name in AUGMENTATIONS},
    },
    "architecture": {
        "residual": change(architecture="residual"),
        "separable": change(architecture="separable"),
        "convnext": change(architecture="convnext"),
    },
    "width": {"width 16": change(width=16), "width 48": change(width=48)},
    "heads": {"category only": change(outputs=("category",)), "elevation only": change(outputs=("elevation",))},
    "elevation loss": {
        "mean squared error": change(elevation_loss="mse"),
        "Huber": change(elevation_loss="huber"),
        "expectation of 9 classes": change(elevation_loss="expectation"),
    },
    "optimizer": {
        "Adam": change(optimizer="adam"),
        "Nadam": change(optimizer="nadam"),
        "SGD, momentum": change(optimizer="sgd", learning_rate=0.05),
    },
    "learning rate": {"constant": change(schedule="constant"), "plateau": change(schedule="plateau")},
    "regularisation": {
        "no weight decay": change(weight_decay=0.0),
        "weight decay 0.1": change(weight_decay=0.1),
        "no dropout": change(dropout=0.0),
        "dropout 0.5": change(dropout=0.5),
        "no label smoothing": change(label_smoothing=0.0),
    },
}

# At full length, with the augmentations that helped or cost nothing and feed fast enough (see `make bench`).
FULL_LENGTH = change(augmentations=("shift", "scale", "rotation", "flip", "background"), epochs=20)

# What the experiments led to. Sixteen epochs on five toys are as many steps as twenty on the four of a fold.
FINAL = dataclasses.replace(
    FULL_LENGTH,
    architecture="plain+convnext",
    width=40,
    elevation_loss="expectation",
    elevation_weight=0.5,
    epochs=16,
)
SHOWN_CURVES = "20 epochs"  # whose curves on held-out toys the figure shows
EXPERIMENTS["full length"] = {
    "20 epochs": FULL_LENGTH,
    "20 epochs, expectation of 9 classes": dataclasses.replace(FULL_LENGTH, elevation_loss="expectation"),
}
# Which toys are held out matters more than any setting, so two architectures, and the two as columns of one network of
# about as many parameters as a network of each can have, meet on all of them.
EVERY_TOY = "every toy"  # the factor whose recipes are trained on all five folds
EXPERIMENTS[EVERY_TOY] = {
    f"6 epochs, {width} filters, {architecture}": dataclasses.replace(
        FINAL, architecture=architecture, width=width, epochs=6
    )
    for width, architecture in ((48, "plain"), (48, "convnext"), (40, "plain+convnext"))
}
RECIPES = {
    "joint": FINAL,
    "plain": dataclasses.replace(FINAL, architecture="plain", width=48),
    "category": dataclasses.replace(FINAL, outputs=("category",)),
    "elevation": dataclasses.replace(FINAL, outputs=("elevation",)),
}


def experiment_means(rows):
    """Returns, for the name of each experiment in the table, the means of its metrics, and the metrics per toy."""
    means = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        per_toy = {
            row["held_out_toy"]: {column: float(row[column]) for column in METRIC_COLUMNS if row[column]}
            for row in rows
            if row["name"] == name
        }
        columns = next(iter(per_toy.values()))
        means[name] = {column: float(np.mean([metrics[column] for metrics in per_toy.values()])) for column in columns}
        means[name]["toys"] = per_toy
    return means


def planned_runs():
    """Returns all runs of the experiments, in order: list of (factor, name, recipe, held-out toy).

    The folds of a recipe follow each other, so that an interrupted comparison is still a fair one.
    """
    return [
        (factor, name, recipe, toy)
        for factor, recipes in EXPERIMENTS.items()
        for name, recipe in recipes.items()
        for toy in (TRAINING_TOYS if factor == EVERY_TOY else EXPERIMENT_TOYS)
    ]


def run_experiments(arguments, examples):
    """Trains every recipe of `EXPERIMENTS` on the folds of `planned_runs`; adds one row a run to the CSV table.

    Args:
        arguments: from `cli.parse`.
        examples: `common.datasets.StereoImages`, the official training set. The test set is not looked at.
    """
    results_folder = arguments.output_dir / "report" / "results"
    table = runs.experiments_table(arguments.output_dir, SCRIPT)
    planned = planned_runs()
    finished = {
        (row["factor"], row["name"], int(row["held_out_toy"]), int(row["seed"])) for row in runs.read_rows(table)
    }
    left = [run for run in planned if (*run[:2], run[3], arguments.seed) not in finished]
    if arguments.quick:
        left = left[:2]
    pictures_by_size = {}
    started = time.time()
    for number, (factor, name, recipe, toy) in enumerate(left):
        minutes = (
            f", about {(time.time() - started) / number * (len(left) - number) / 60:.0f} minutes" if number else ""
        )
        print(f"{len(left) - number} of {len(planned)} runs left{minutes}: {factor}, {name}, toy {toy} held out")
        recipe = cli.with_flags(recipe, arguments)
        if recipe.image_size not in pictures_by_size:
            pictures_by_size[recipe.image_size] = prepare(examples, recipe.image_size, arguments.quick)
        pictures, held_out = hold_out_toy(pictures_by_size[recipe.image_size], toy)
        network, curves, seconds = train_network(
            recipe,
            pictures,
            arguments.seed,
            folder=arguments.output_dir / "runs" / SCRIPT / "experiment",
            resume=False,
            held_out=held_out,
        )
        metrics, _ = evaluate(network, held_out)
        row = {
            "factor": factor,
            "name": name,
            "held_out_toy": toy,
            "seed": arguments.seed,
            **{
                field: "+".join(map(str, value)) if isinstance(value, tuple) else value
                for field, value in dataclasses.asdict(recipe).items()
            },
            "parameters": runs.parameter_counts(network)["trainable"],
            "seconds": round(seconds, 1),
            **{metric: round(metrics[metric], 4) if metric in metrics else "" for metric in METRIC_COLUMNS},
        }
        runs.append_row(table, row)
        if factor == "full length":
            path = results_folder / f"{SCRIPT}_held_out_curves.json"
            all_curves = json.loads(path.read_text()) if path.exists() else {}
            all_curves.setdefault(name, {})[str(toy)] = curves
            write_json(path, all_curves)
    print(f"all {len(planned)} runs are in {table}" if not arguments.quick else f"wrote {table}")


# ------------------------------------------------------------------------------------------------------------- figures


def draw_samples(examples, folder):
    """Four stereo pairs of each category, the first ones in a fixed random order."""
    order = np.random.default_rng(0).permutation(len(examples.images))
    figure, axes = plt.subplots(len(CATEGORIES), 8, figsize=(9, 6))
    for row, category in enumerate(CATEGORIES):
        chosen = order[examples.category[order] == row][:4]
        for pair, index in enumerate(chosen):
            degrees = SMALLNORB_ELEVATION_DEGREES[examples.elevation[index]]
            for view, side in enumerate(("left", "right")):
                figures.picture(axes[row, 2 * pair + view], examples.images[index, :, :, view], f"{side}, {degrees}°")
        axes[row, 0].text(-0.15, 0.5, category, transform=axes[row, 0].transAxes, rotation=90, va="center", ha="center")
    figure.suptitle("Training toys as the two cameras see them, with the elevation of the cameras", x=0.01, ha="left")
    return figures.save(figure, folder / "samples.png")


def draw_learning_curves(curves, held_out_curves, folder):
    """Learning curves of the saved joint network, beside those of trainings with one toy of each category held out.

    Args:
        curves: dict of lists, one number an epoch.
        held_out_curves: dict from held-out toy to such a dict that also has validation curves.
        folder: `pathlib.Path` of the figure.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    panels = (
        ("category_accuracy", lambda values: 100 * (1 - np.asarray(values)), "category errors in %"),
        ("elevation_mae", np.asarray, "elevation error in degrees (MAE)"),
    )
    for panel, (name, convert, label) in zip(axes, panels, strict=True):
        lines = [("final network on its\ntraining toys, augmented", figures.BLUE, curves[name])]
        for toy, color in zip(held_out_curves, (figures.ORANGE, figures.GREEN), strict=False):
            lines.append((f"toys {toy} held out,\n32 filters, MAE", color, held_out_curves[toy][f"val_{name}"]))
        for line_label, color, values in lines:
            panel.plot(np.arange(1, len(values) + 1), convert(values), color=color, label=line_label)
        panel.set(yscale="log", xlabel="epoch", ylabel=label)
        panel.yaxis.set_major_formatter("{x:g}")
        if name == "elevation_mae":  # less than two decades leave room for more numbers
            panel.yaxis.set_minor_formatter("{x:g}")
        figures.label_lines(panel)
    axes[0].set_title("Training toys are soon known by heart, others are not")
    axes[1].set_title("Elevation improves on both to the end")
    return figures.save(figure, folder / "learning_curves.png")


def draw_confusion(pictures, predictions, folder):
    """Confusion matrix of the categories on the test toys."""
    counts = confusion_matrix(pictures.category, predictions["category"].argmax(1), labels=range(len(CATEGORIES)))
    accuracy = np.trace(counts) / counts.sum()
    figure, axes = plt.subplots(figsize=(5.6, 5.2))
    title = f"{accuracy:.2%} of {counts.sum():,} test pictures are right"
    figures.confusion_matrix(axes, counts, CATEGORIES, title)
    return figures.save(figure, folder / "confusion_matrix.png")


def draw_elevation(pictures, predictions, folder):
    """Distribution of the predicted elevation for each true one, and the mean error per category."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(2, 1))
    groups = [predictions["elevation"][pictures.elevation == degrees] for degrees in SMALLNORB_ELEVATION_DEGREES]
    parts = left.violinplot(groups, SMALLNORB_ELEVATION_DEGREES, widths=4, showmedians=True, showextrema=False)
    parts["cmedians"].set_color(figures.BLACK)
    left.plot([27, 73], [27, 73], color=figures.GREY, linewidth=0.8, zorder=0)
    left.set(xlabel="true elevation in degrees", ylabel="predicted elevation in degrees", xlim=(27, 73))
    left.set_xticks(SMALLNORB_ELEVATION_DEGREES)
    left.set_title("Predicted elevation of test pictures: distribution and median")
    errors = np.abs(predictions["elevation"] - pictures.elevation)
    means = [errors[pictures.category == category].mean() for category in range(len(CATEGORIES))]
    bars = right.barh(CATEGORIES, means, color=figures.BLUE)
    right.bar_label(bars, fmt="%.2f°", padding=3)
    right.set(xlabel="mean absolute error in degrees", title=f"All together: {errors.mean():.2f}°")
    right.grid(False)
    right.invert_yaxis()
    return figures.save(figure, folder / "elevation.png")


def draw_predictions(pictures, predictions, folder):
    """What the network says of 16 test pictures, the first ones in a fixed random order."""
    chosen = np.random.default_rng(0).permutation(len(pictures.images))[:16]
    figure, axes = plt.subplots(2, 8, figsize=(10, 3.1))
    for panel, index in zip(axes.flat, chosen, strict=True):
        guess = predictions["category"][index].argmax()
        color = figures.BLACK if guess == pictures.category[index] else figures.RED
        figures.picture(panel, pictures.images[index, :, :, 0])
        truth = f"{CATEGORIES[pictures.category[index]]}, {pictures.elevation[index]:.0f}°"
        answer = f"{CATEGORIES[guess]}, {predictions['elevation'][index]:.1f}°"
        panel.set_title(f"{truth}\n→ {answer}", fontsize=8, loc="center", color=color)
    figure.suptitle(
        "Test toys, not picked: the truth → what the network says (left view of each pair)", x=0.01, ha="left"
    )
    return figures.save(figure, folder / "predictions.png")


def accuracy_per_toy(pictures, predictions):
    """Returns the share of each toy's pictures whose category is right: dict of category to dict of toy to float."""
    right = predictions["category"].argmax(1) == pictures.category
    return {
        name: {
            str(toy): float(right[(pictures.category == category) & (pictures.instance == toy)].mean())
            for toy in np.unique(pictures.instance[pictures.category == category])
        }
        for category, name in enumerate(CATEGORIES)
    }


def draw_test_toys(pictures, accuracy, folder):
    """Every test toy, seen from the left camera, with the share of its pictures whose category is right.

    Args:
        pictures: `Pictures` of the test set.
        accuracy: dict, see `accuracy_per_toy`.
        folder: `pathlib.Path` of the figure.
    """
    toys_per_category = max(len(toys) for toys in accuracy.values())
    figure, axes = plt.subplots(len(CATEGORIES), toys_per_category, figsize=(7, 8), squeeze=False)
    for category, (name, line) in enumerate(zip(CATEGORIES, axes, strict=True)):
        for panel in line:
            panel.set_axis_off()
        for panel, (toy, share) in zip(line, accuracy[name].items(), strict=False):
            index = np.flatnonzero((pictures.category == category) & (pictures.instance == int(toy)))[0]
            color = figures.RED if share < POOR_ACCURACY else figures.BLACK
            figures.picture(panel, pictures.images[index, :, :, 0], f"{name} {toy}: {share:.1%}", color)
    title = f"Test toys, and the share of their pictures whose category is right (coloured: below {POOR_ACCURACY:.0%})"
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, folder / "test_toys.png")


def draw_mistakes(pictures, predictions, folder):
    """The 16 test pictures whose wrong category the network is surest of, at most two of the same toy."""
    guess = predictions["category"].argmax(1)
    confidence = np.where(guess == pictures.category, -1.0, predictions["category"].max(1))
    chosen, per_toy = [], {}
    for index in np.argsort(-confidence):
        toy = (pictures.category[index], pictures.instance[index])
        if confidence[index] < 0 or len(chosen) == 16:
            break
        if per_toy.get(toy, 0) < 2:
            per_toy[toy] = per_toy.get(toy, 0) + 1
            chosen.append(index)
    figure, axes = plt.subplots(4, 8, figsize=(10, 6))
    for panel in axes.flat:
        panel.set_axis_off()
    for place, index in enumerate(chosen):
        pair = axes[place // 4, 2 * (place % 4) : 2 * (place % 4) + 2]
        true, wrong = CATEGORIES[pictures.category[index]], CATEGORIES[guess[index]]
        figures.picture(pair[0], pictures.images[index, :, :, 0], f"{true} {pictures.instance[index]}")
        figures.picture(pair[1], pictures.images[index, :, :, 1], f"{wrong}? {confidence[index]:.0%}", figures.RED)
    title = "The most confident mistakes, two a toy at most: left view with the truth, right view with the answer"
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, folder / "mistakes.png")


# What the figures of the experiments show: the label of an axis, and how to read it from a row of the table.
ERRORS = (
    ("category errors in %", lambda row: 100 - 100 * float(row["category_accuracy"] or "nan")),
    ("elevation MAE in degrees", lambda row: float(row["elevation_mae_degrees"] or "nan")),
    (
        "elevation MAE in degrees,\nbackground repainted",
        lambda row: float(row["elevation_mae_degrees_background_repainted"] or "nan"),
    ),
)


def draw_experiments(rows, folder):
    """Every experiment with one point per held-out toy, the baseline as a line."""
    rows = [row for row in rows if row["factor"] in EXPERIMENTS and row["factor"] != EVERY_TOY]
    done = {(row["factor"], row["name"]) for row in rows}
    names = [name for name in dict.fromkeys(run[:2] for run in planned_runs()) if name in done]
    figure, axes = plt.subplots(1, 3, figsize=(11, 0.24 * len(names) + 1.4), sharey=True)
    for panel, (label, read) in zip(axes, ERRORS, strict=True):
        for number, toy in enumerate(EXPERIMENT_TOYS):
            points = [
                (read(row), names.index((row["factor"], row["name"])))
                for row in rows
                if int(row["held_out_toy"]) == toy
            ]
            panel.scatter(*zip(*points, strict=True), s=18, color=figures.COLORS[number], label=f"toys {toy} held out")
        means = [np.mean([read(row) for row in rows if (row["factor"], row["name"]) == name]) for name in names]
        panel.scatter(means, range(len(names)), marker="|", s=90, color=figures.BLACK, label="mean")
        panel.axvline(means[names.index(("baseline", "baseline"))], color=figures.GREY, linewidth=0.8, zorder=0)
        panel.set_xlabel(label)
    axes[0].set_yticks(range(len(names)), [name if factor == name else f"{factor}: {name}" for factor, name in names])
    axes[0].invert_yaxis()
    axes[0].set_title("Each change from the baseline (grey line), on toys that were held out")
    axes[2].legend(loc="lower right", fontsize=8, frameon=True)
    return figures.save(figure, folder / "experiments.png")


def draw_every_toy(rows, examples, folder):
    """The training toys, and the errors of each architecture on those that were held out from its training.

    Args:
        rows: list of dict of str, the experiment table.
        examples: `common.datasets.StereoImages`, the official training set.
        folder: `pathlib.Path` of the figure.
    """
    figure = plt.figure(figsize=(12, 5))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    shown = (examples.elevation == 2) & (examples.lighting == 2)
    lines = left.subplots(len(TRAINING_TOYS), len(CATEGORIES))
    for row, (line, toy) in enumerate(zip(lines, TRAINING_TOYS, strict=True)):
        for category, panel in enumerate(line):
            index = np.flatnonzero(shown & (examples.category == category) & (examples.instance == toy))[0]
            figures.picture(panel, examples.images[index, :, :, 0], CATEGORIES[category] if row == 0 else None)
        line[0].text(-0.1, 0.5, f"toys {toy}", transform=line[0].transAxes, ha="right", va="center", fontsize=9)
    panels = right.subplots(1, len(ERRORS), sharey=True)
    for panel, (label, read) in zip(panels, ERRORS, strict=True):
        for name, color in zip(EXPERIMENTS[EVERY_TOY], figures.COLORS, strict=False):
            of_name = [row for row in rows if row["name"] == name]
            heights = [TRAINING_TOYS.index(int(row["held_out_toy"])) for row in of_name]
            panel.plot([read(row) for row in of_name], heights, "o", color=color, label=name.split(", ")[-1])
        panel.set(xlabel=label, xlim=(0, 1.1 * panel.get_xlim()[1]))
        panel.grid(True, axis="both")
    panels[0].set_yticks(range(len(TRAINING_TOYS)), [f"toys {toy}" for toy in TRAINING_TOYS])
    panels[0].invert_yaxis()
    panels[0].set_title("Errors on each row of toys when it is held out")
    panels[1].legend(loc="center left")
    return figures.save(figure, folder / "every_toy.png")


def draw_shortcut(pictures, results, folder):
    """What the background gives away: the pictures of the test, and the errors with and without it.

    Args:
        pictures: `Pictures` of the test set.
        results: dict, see `summarise`.
        folder: `pathlib.Path` of the figure.
    """
    figure = plt.figure(figsize=(10, 4.6))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.7))
    axes = left.subplots(3, 3)
    levels = background_level(pictures.images)[:, 0, 0, 0]
    samples = pictures.images[[np.abs(levels - level).argmin() for level in (130, 180, 250)]]
    versions = (
        ("as it is", samples),
        ("shifted", shift_background(samples)),
        ("repainted", repaint_background(samples)),
    )
    for column, (name, images) in enumerate(versions):
        for row in range(3):
            figures.picture(axes[row, column], images[row, :, :, 0], name if row == 0 else None)
    bars = [("predicting the mean", results["references"]["mean_elevation_mae_degrees"], figures.GREY)]
    bars.append(("look-up on background grey", results["references"]["background_lookup_mae_degrees"], figures.GREY))
    for kind, label in (
        ("", "as they are"),
        ("_background_shifted", "shifted"),
        ("_background_repainted", "repainted"),
    ):
        error = results["models"]["joint"]["test"][f"elevation_mae_degrees{kind}"]
        bars.append((f"saved network, pictures {label}", error, figures.BLUE))
    panel = right.subplots()
    drawn = panel.barh(
        [name for name, _, _ in bars], [value for _, value, _ in bars], color=[color for _, _, color in bars]
    )
    panel.bar_label(drawn, fmt="%.2f°", padding=3)
    panel.invert_yaxis()
    panel.grid(False)
    panel.set(xlabel="elevation error on test toys in degrees (MAE)", title="The network does not need the background")
    return figures.save(figure, folder / "shortcut.png")


# ---------------------------------------------------------------------------------------------------------------- main


def reference_errors(train, test):
    """What can be had without a network: the mean elevation, and looking the elevation up by the background's grey.

    Args:
        train, test: `common.datasets.StereoImages`.

    Returns:
        dict of float: errors in degrees on the test pictures, and the share of the nine elevations that the look-up
        (a vote of the 25 training pictures with the most similar background levels of both views) gets right.
    """
    levels, test_levels = (background_level(split.images)[:, 0, 0] for split in (train, test))
    elevation, test_elevation = (SMALLNORB_ELEVATION_DEGREES[split.elevation] for split in (train, test))
    guess = KNeighborsClassifier(25).fit(levels, elevation).predict(test_levels)
    return {
        "mean_elevation_mae_degrees": float(np.abs(test_elevation - elevation.mean()).mean()),
        "background_lookup_accuracy": float((guess == test_elevation).mean()),
        "background_lookup_mae_degrees": float(np.abs(test_elevation - guess).mean()),
    }


def dataset_card(dataset):
    """The part of a card that says which pictures a model has seen."""
    return {
        "name": dataset.name,
        "train": len(dataset.train.images),
        "validation": "the same recipe for 6 epochs, each row of toys held out in turn; none in the final training",
        "test": len(dataset.test.images),
        "sha256": dataset.checksums,
    }


def train(arguments, dataset):
    """Trains the wanted models, the joint one with several seeds, and saves them with their cards.

    The test pictures are read after the last training has ended.
    """
    pictures = prepare(dataset.train, FINAL.image_size, arguments.quick)
    trained = []
    for model in [arguments.model] if arguments.model else MODELS:
        recipe = cli.with_flags(RECIPES[model], arguments)
        for seed in range(arguments.seed, arguments.seed + (1 if arguments.quick else NUM_SEEDS[model])):
            print(f"{model}, seed {seed}")
            folder = arguments.output_dir / "runs" / SCRIPT / f"{model}_seed_{seed}"
            trained.append(
                (model, seed, recipe, *train_network(recipe, pictures, seed, folder=folder, resume=arguments.resume))
            )

    test = prepare(dataset.test, FINAL.image_size, arguments.quick)
    versions = background_versions(test.images)
    on_folds = experiment_means(runs.read_rows(runs.experiments_table(arguments.output_dir, SCRIPT)))
    cards = {}
    for model, seed, recipe, network, curves, seconds in trained:
        metrics, _ = evaluate(network, test, versions)
        if seed != arguments.seed:
            cards[model]["seeds"].append({"seed": seed, **metrics})
            continue
        cards[model] = {
            **runs.card(
                SCRIPT,
                model,
                arguments,
                recipe=recipe,
                seed=seed,
                dataset=dataset_card(dataset),
                pictures=len(pictures.images),
                curves=curves,
                seconds=seconds,
            ),
            "metrics": {
                "train": evaluate(network, pictures)[0],
                "validation": on_folds.get(f"6 epochs, {recipe.width} filters, {recipe.architecture}")
                if len(recipe.outputs) == 2
                else None,
                "test": metrics,
            },
            "seeds": [{"seed": seed, **metrics}],
        }
    for model, seed, _, network, _, _ in trained:
        if seed == arguments.seed:
            runs.save_model(network, arguments.output_dir / "saved_models" / SCRIPT / f"{model}.keras", cards[model])


def summarise(cards, measured, references, rows):
    """Builds what `report/results/task1_smallnorb_cnn.json` holds.

    Args:
        cards: dict from model name to its card.
        measured: dict from model name to its metrics on the test pictures.
        references: see `reference_errors`.
        rows: list of dict of str, the experiment table.

    Returns:
        dict: `test` (metrics of the saved joint network), `seeds` (number, mean and standard deviation of its metrics
        over the seeds), `models` (the same and more per model), `references`, and `experiments` (mean over the held-out
        toys).
    """
    results = {
        "script": f"{SCRIPT}.py",
        "models": {},
        "references": references,
        "experiments": experiment_means(rows),
    }
    for model, card in cards.items():
        results["models"][model] = {
            "train": card["metrics"]["train"],
            "test": measured[model],
            "seeds": {
                "number": len(card["seeds"]),
                "mean": {name: float(np.mean([run[name] for run in card["seeds"]])) for name in measured[model]},
                "std": {name: standard_deviation([run[name] for run in card["seeds"]]) for name in measured[model]},
            },
            "parameters": card["parameters"]["total"],
            "epochs": card["epochs"],
            "minutes": round(card["seconds"] / 60, 1),
            "hardware": card["hardware"],
            "shortened": card["shortened"],
        }
    if "joint" in cards:
        results["test"] = measured["joint"]
        results["seeds"] = results["models"]["joint"]["seeds"]
    return results


def report(arguments, dataset):
    """Restores saved models, measures them on the test pictures, writes results and figures.

    After a training these are all models; otherwise the wanted one, which is the joint one where none is named. What
    the results file says of the others stays.
    """
    folder = runs.saved_models_folder(arguments.output_dir, SCRIPT)
    print(f"models from {folder}")
    all_or_joint = MODELS if arguments.train else ["joint"]
    names = [arguments.model] if arguments.model else all_or_joint
    restored = {model: runs.load_model(folder / f"{model}.keras") for model in names}
    test = prepare(dataset.test, FINAL.image_size, arguments.quick)
    versions = background_versions(test.images)
    cards, measured, predictions = {}, {}, {}
    for model, (network, card) in restored.items():
        cards[model] = card
        measured[model], predictions[model] = evaluate(network, test, versions)
        print(f"\n{model}: {cards[model]['parameters']['total']:,} parameters")
        runs.print_metrics(measured[model], cards[model])
        if cards[model]["dataset"]["sha256"] != dataset.checksums:
            print("note: the pictures differ from those that the recorded metrics were measured on")

    report_folder = arguments.output_dir / "report"
    results_file = report_folder / "results" / f"{SCRIPT}.json"
    rows = runs.read_rows(runs.experiments_table(arguments.output_dir, SCRIPT))
    references = reference_errors(dataset.train, dataset.test)
    print(f"\n{KNOWN_RESULTS}")
    runs.print_metrics(references)
    results = summarise(cards, measured, references, rows)
    if "joint" in cards:
        results["test_toys"] = accuracy_per_toy(test, predictions["joint"])
    if results_file.exists():
        previous = json.loads(results_file.read_text())
        results = {**previous, **results, "models": {**previous["models"], **results["models"]}}
    write_json(results_file, results)
    written = [results_file]

    if "joint" in cards:  # the figures show what the joint network does
        drawings = report_folder / "figures" / SCRIPT
        curves = report_folder / "results" / f"{SCRIPT}_held_out_curves.json"
        held_out_curves = json.loads(curves.read_text()).get(SHOWN_CURVES, {}) if curves.exists() else {}
        written += [
            draw_samples(dataset.train, drawings),
            draw_learning_curves(cards["joint"]["curves"], held_out_curves, drawings),
            draw_confusion(test, predictions["joint"], drawings),
            draw_elevation(test, predictions["joint"], drawings),
            draw_predictions(test, predictions["joint"], drawings),
            draw_test_toys(test, results["test_toys"], drawings),
            draw_mistakes(test, predictions["joint"], drawings),
            draw_shortcut(test, results, drawings),
        ]
        if rows:
            written.append(draw_experiments(rows, drawings))
        if any(row["factor"] == EVERY_TOY for row in rows):
            written.append(draw_every_toy(rows, dataset.train, drawings))
    print("\nwrote", *written, sep="\n  ")


def main(argv=None):
    arguments = cli.parse(cli.parser(__doc__, MODELS), argv)
    dataset = load_smallnorb(arguments.data_dir)
    if arguments.experiments:
        run_experiments(arguments, dataset.train)
        return
    if arguments.train:
        train(arguments, dataset)
    report(arguments, dataset)


if __name__ == "__main__":
    cli.run(main)
