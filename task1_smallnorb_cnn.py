"""smallNORB: the category of a toy, and the elevation of the camera that sees it.

A two-branch network, a plain CNN beside a ConvNeXt, takes both camera views of a toy and predicts its category (five
classes) and the elevation of the camera (regression, in degrees). For comparison, the plain branch is trained alone
with more filters, and two networks have one task each. The dataset is LeCun, Huang & Bottou, "Learning methods for
generic object recognition with invariance to pose and lighting" (CVPR 2004).

    python task1_smallnorb_cnn.py --train          three seeds of joint and plain, one of category and elevation
    python task1_smallnorb_cnn.py --load           restore and measure joint; another one with --model
    python task1_smallnorb_cnn.py --experiments    the comparison behind the choices, on held-out toys

The joint network on the 25 test toys: category accuracy 97.34 ± 0.39 %, elevation error 2.38 ± 0.02° (3 seeds, each 9
minutes of training on 2 cores of an AMD EPYC). Hinton, Sabour & Frosst (2018) report 94.8 % for a plain CNN and 98.2 %
for capsules with EM routing.

Two properties of the dataset need care. The 972 images of a toy are near-copies of each other, so that a random
validation split measures memory: here whole toys are held out, and the official test toys are read once. And the grey
level of the background alone gives two thirds of the elevations away: `repaint_background` measures how much a network
relies on it.
"""

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
import functools
import math
from typing import NamedTuple

import keras
import numpy as np
import pandas as pd
from keras import layers, ops
from sklearn.metrics import accuracy_score, confusion_matrix, mean_absolute_error
from sklearn.neighbors import KNeighborsClassifier

from common import cli, models, results, training
from common.datasets import SMALLNORB_CATEGORIES as CATEGORIES
from common.datasets import SMALLNORB_ELEVATION_DEGREES, area_average, load_smallnorb
from common.errors import UserError
from common.files import read_json, write_json

SCRIPT = "task1_smallnorb_cnn"
IMAGE_SIZE = 48  # side in pixels
AUGMENTATIONS = ("shift", "scale", "rotation", "flip", "brightness", "background", "cutout")


@dataclasses.dataclass(frozen=True)
class Config:
    """What the experiments vary; the defaults are their baseline."""

    outputs: tuple = ("category", "elevation")  # or one of them
    views: int = 2  # 2 for both cameras, 1 for the left one alone
    image_size: int = IMAGE_SIZE  # side in pixels
    standardize: bool = True  # each stereo pair to mean 0 and standard deviation 1, inside the network
    augmentations: tuple = AUGMENTATIONS  # out of these
    branches: tuple = ("plain",)  # keys of BRANCHES; several stand side by side
    width: int = 32  # filters of the first stage of each branch
    local_contrast: tuple = ()  # sides, in pixels, of surroundings whose mean is subtracted to make extra channels
    dropout: float = 0.2  # before the output layers
    label_smoothing: float = 0.05  # of the categories
    elevation_loss: str = "mae"  # "mse", "huber" or "expectation" (cross-entropy on nine classes, then their mean)
    elevation_weight: float = 1.0  # of the elevation loss against the category loss, both scaled to start near 1
    optimizer: str = "adamw"  # "adamw", "nadam" or "sgd" (momentum 0.9, Nesterov)
    learning_rate: float = 2e-3  # the highest one
    weight_decay: float = 1e-2  # decoupled, for "adamw" alone
    schedule: str = "cosine"  # "cosine" (with warm-up) or "constant"
    batch_size: int = 64  # stereo pairs
    epochs: int = 2


# What the experiments led to. Sixteen epochs on all five folds are as many steps as twenty on four of them.
JOINT = Config(
    augmentations=("shift", "scale", "rotation", "flip", "background"),
    branches=("plain", "convnext"),
    width=40,
    elevation_loss="expectation",
    elevation_weight=0.5,
    epochs=16,
)
CONFIGS = {
    "joint": JOINT,
    "plain": dataclasses.replace(JOINT, branches=("plain",), width=48),
    "category": dataclasses.replace(JOINT, outputs=("category",)),
    "elevation": dataclasses.replace(JOINT, outputs=("elevation",)),
}
MODELS = list(CONFIGS)
NUM_SEEDS = {"joint": 3, "plain": 3, "category": 1, "elevation": 1}
# The experiment with the config of a model, for 6 epochs and each fold held out in turn, that is its validation.
VALIDATION = {"joint": "6 epochs, 40 filters, plain+convnext", "plain": "6 epochs, 48 filters, plain"}

METRICS = (
    "category_accuracy",
    "elevation_mae_degrees",
    "elevation_mae_degrees_background_shifted",
    "elevation_mae_degrees_background_repainted",
)
CURVES_FILE = f"{SCRIPT}_held_out_curves.json"  # beside the experiment table: those at the full training budget
SHOWN_CURVES = "20 epochs"  # the experiment whose learning curves the figure shows
INPUT_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 2)  # of the saved networks
QUICK_IMAGES = 320
COMMON_BACKGROUND = 200  # grey level near the mean over the training images
MATTE_WIDTH = 12  # grey levels: how far from the background level a pixel still counts as background

MAX_SHIFT = 0.07  # of the image's side
MAX_LOG_SCALE = 0.15  # between exp(-0.15) = 0.86 and exp(0.15) = 1.16 times as large
MAX_ROTATION = 8.0  # degrees about the viewing axis, which leave the elevation unchanged
MAX_LOG_CONTRAST = 0.4
MAX_BRIGHTNESS = 40.0  # grey levels
BACKGROUND_LEVELS = (90.0, 255.0)
CUTOUT_SIDE = 0.25  # of the image's side


# ---------------------------------------------------------------------------------------------------------------- data


class StereoPairs(NamedTuple):
    """Stereo pairs at the size that the network takes, with their targets."""

    images: np.ndarray  # uint8 (n, size, size, 2), 0 to 255, left view first
    category: np.ndarray  # int64 (n,), index into `CATEGORIES`
    elevation: np.ndarray  # float32 (n,), 30 to 70 degrees
    instance: np.ndarray  # int64 (n,), which toy of its category

    def take(self, indices):
        """Returns the pairs at `indices` (integers, a slice or a mask)."""
        return StereoPairs(*(array[indices] for array in self))


def prepare(examples, quick=False, image_size=IMAGE_SIZE):
    """Turns `common.datasets.StereoImages` into `StereoPairs`, with `quick` only some of them, evenly spread."""
    step = max(len(examples.images) // QUICK_IMAGES, 1) if quick else 1
    return StereoPairs(
        area_average(examples.images[::step], image_size),
        examples.category[::step],
        SMALLNORB_ELEVATION_DEGREES[examples.elevation[::step]].astype("float32"),
        examples.instance[::step],
    )


def hold_out(pairs, fold):
    """Returns the pairs of the other toys, and those of fold `fold`: of this instance of every category."""
    held_out = pairs.instance == fold
    return pairs.take(~held_out), pairs.take(held_out)


def background_level(images):
    """Returns the grey level of the background, the median over the border two pixels wide: float32 (n, 1, 1, 2)."""
    frame = np.ones(images.shape[1:3], bool)
    frame[2:-2, 2:-2] = False
    return np.median(images[:, frame], axis=1).astype("float32")[:, None, None, :]


def shift_background(images, level=COMMON_BACKGROUND):
    """Brightens or darkens each image as a whole so that its background gets the grey `level`. uint8 in and out."""
    return np.clip(np.rint(images + (level - background_level(images))), 0, 255).astype("uint8")


def repaint_background(images, level=COMMON_BACKGROUND):
    """Gives the background the grey `level` and leaves the toy unmodified. uint8 in and out.

    A pixel counts as background by how close it is to the background level, with a soft edge, so that shadows fade into
    the background as before. Harder than `shift_background`: the contrast of toy and background gives nothing away.
    """
    old = background_level(images)
    matte = np.exp(-np.square((images - old) / MATTE_WIDTH))
    return np.clip(np.rint(images + matte * (level - old)), 0, 255).astype("uint8")


def replace_backgrounds(images):
    """Returns the images with their backgrounds replaced, both ways: dict of uint8 arrays like `images`."""
    return {"shifted": shift_background(images), "repainted": repaint_background(images)}


class StereoAugmentation(layers.Layer):
    """Random changes of stereo pairs that leave category and elevation true. The identity outside training.

    Both views of a pair change alike, so that the disparity between them, which tells depth, stays. Resampling is the
    costliest part, so each step moves the first half of the batch and repaints the background of the middle half; in a
    random order every image meets every combination. Takes and returns (n, size, size, 2), 0 to 255, float32.
    """

    def __init__(self, augmentations, seed, **keywords):
        super().__init__(**keywords)
        self.augmentations = set(augmentations)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, training=False):
        wanted = self.augmentations if training else set()
        images = ops.cast(self._flip(images) if "flip" in wanted else images, "float32")
        count = ops.shape(images)[0]
        if {"shift", "scale", "rotation"} & wanted:
            images = ops.concatenate([self._move(images[: count // 2]), images[count // 2 :]])
        if "background" in wanted:
            first, last = count // 4, count - count // 4
            images = ops.concatenate([images[:first], self._repaint(images[first:last]), images[last:]])
        if "brightness" in wanted:
            images = self._relight(images)
        return self._cut_out(images) if "cutout" in wanted else images

    def _uniform(self, images, low, high):
        """One random number per image: (n, 1, 1, 1)."""
        return keras.random.uniform((ops.shape(images)[0], 1, 1, 1), low, high, seed=self.seed_generator)

    def _flip(self, images):
        """Mirrors half of the pairs. The mirror image of a scene swaps the cameras, so the views are swapped, too."""
        _, height, width, views = images.shape
        # With the views of a pixel side by side, the reversed row is the mirrored row with the views swapped.
        rows = ops.reshape(images, (-1, height, width * views))
        mirrored = self._uniform(images, 0.0, 1.0)[..., 0] < 0.5
        return ops.reshape(ops.where(mirrored, ops.flip(rows, axis=2), rows), (-1, height, width, views))

    def _move(self, images):
        def amount(name, limit):
            return self._uniform(images, -limit, limit)[:, 0, 0, 0] * (name in self.augmentations)

        size = images.shape[1]
        center = (size - 1) / 2
        scale, angle = ops.exp(amount("scale", MAX_LOG_SCALE)), amount("rotation", math.radians(MAX_ROTATION))
        # Where each new pixel comes from: x' = a x - b y + c, y' = b x + a y + d, turned about the image's centre.
        a, b = ops.cos(angle) / scale, ops.sin(angle) / scale
        c = center - (a - b) * center + amount("shift", MAX_SHIFT * size)
        d = center - (b + a) * center + amount("shift", MAX_SHIFT * size)
        transforms = ops.stack([a, -b, c, b, a, d, 0 * a, 0 * a], axis=1)
        return ops.image.affine_transform(images, transforms, interpolation="bilinear", fill_mode="nearest")

    def _level(self, images):
        """The background level, estimated from every second pixel of the top and bottom rows: (n, 1, 1, 2)."""
        border = ops.concatenate([images[:, 0, ::2], images[:, -1, ::2]], axis=1)
        return ops.median(border, axis=1)[:, None, None, :]

    def _repaint(self, images):
        """`repaint_background` with a random level for each image."""
        level = self._level(images)
        change = self._uniform(images, *BACKGROUND_LEVELS) - level
        return images + ops.exp(-ops.square((images - level) * (1 / MATTE_WIDTH))) * change

    def _relight(self, images):
        """Random contrast and brightness of whole images, clipped as a camera clips."""
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


# --------------------------------------------------------------------------------------------------------------- model

convolution = functools.partial(layers.Conv2D, padding="same", kernel_initializer="he_normal")


def build_plain(features, width):
    """A strided convolution, then three stages of two convolutions and a pooling (VGG; Simonyan & Zisserman 2015).

    Normalisation comes once a stage, after the pooling, where it costs a quarter; on a CPU it is otherwise as
    expensive as the convolutions. Takes (n, size, size, channels), returns (n, size / 16, size / 16, 4 width).
    """
    features = convolution(width, 5, strides=2, activation="relu")(features)
    for filters in (width, 2 * width, 4 * width):
        features = convolution(filters, 3, activation="relu")(features)
        features = convolution(filters, 3, use_bias=False)(features)
        features = layers.MaxPooling2D(2)(features)
        features = layers.BatchNormalization()(features)
        features = layers.ReLU()(features)
    return features


def build_convnext(features, width):
    """A small ConvNeXt (Liu et al. 2022): patches, then three stages of two residual blocks with 7 x 7 filters.

    Each block convolves every channel by itself and then mixes the channels. The large filters are cheap because they
    work on 12 x 12 places or fewer, so that from the first block on a filter sees half of the toy, where `build_plain`
    begins with details. Normalisation is per place, never over the batch. Shapes as in `build_plain`.
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


BRANCHES = {"plain": build_plain, "convnext": build_convnext}


class Head(NamedTuple):
    """An output of the network or of one of its branches."""

    tensor: keras.KerasTensor  # (n, 5), (n, 9) or (n, 1)
    target: str  # which of the targets it predicts: "category", "elevation_probabilities" or "elevation"
    is_trained: bool  # otherwise its loss is logged only


def build_heads(features, config, prefix):
    """Builds the output layers of one branch, whose names begin with `prefix`: dict from layer name to `Head`."""
    features = layers.GlobalAveragePooling2D(name=f"{prefix}features")(features)
    features = layers.Dropout(config.dropout)(features)
    heads = {}
    for target in config.outputs:
        if target == "elevation" and config.elevation_loss == "expectation":
            target = "elevation_probabilities"
        name = f"{prefix}{target}"
        if target == "elevation":
            # Mean and deviation of the nine elevations, so that the layer before has numbers near 0 and 1 to predict.
            mean, deviation = SMALLNORB_ELEVATION_DEGREES.mean(), SMALLNORB_ELEVATION_DEGREES.std()
            tensor = layers.Dense(1, dtype="float32")(features)
            tensor = layers.Rescaling(deviation, mean, dtype="float32", name=name)(tensor)
        else:
            classes = CATEGORIES if target == "category" else SMALLNORB_ELEVATION_DEGREES
            tensor = layers.Dense(len(classes), activation="softmax", dtype="float32", name=name)(features)
        heads[name] = Head(tensor, target, True)
    return heads


def build_network(config, builders=BRANCHES):
    """Builds the network of a config out of built-in layers; `builders` is a dict from branch to function.

    Returns a functional `keras.Model` from images (n, size, size, 2), 0 to 255, to a dict of `config.outputs`,
    `category` (n, 5) probabilities and `elevation` (n, 1) degrees; and a dict from layer name to `Head`.
    """
    images = keras.Input((config.image_size, config.image_size, 2), name="images")
    features = images if config.views == 2 else images[..., :1]
    features = layers.Rescaling(1 / 255)(features)
    if config.standardize:
        features = layers.LayerNormalization(axis=(1, 2, 3), center=False, scale=False)(features)
    if config.local_contrast:  # Cireşan et al. (2011) add channels of local contrast, too
        surroundings = [layers.AveragePooling2D(side, 1, padding="same")(features) for side in config.local_contrast]
        features = layers.Concatenate()([features, *(layers.Subtract()([features, mean]) for mean in surroundings)])
    policy = keras.config.dtype_policy()
    is_single, heads = len(config.branches) == 1, {}
    for branch in config.branches:
        # What lies between the convolutions of a ConvNeXt takes longer in bfloat16 than they gain by it.
        with training.computing_in("float32" if branch == "convnext" else policy):
            branch_features = builders[branch](features, config.width)
        heads |= build_heads(branch_features, config, "" if is_single else f"{branch}_")
    if not is_single:
        # The prediction is the mean over the branches (Cireşan et al. 2012). Each branch has losses of its own, so that
        # they err on different toys; the loss of the mean is only logged.
        for target in dict.fromkeys(head.target for head in heads.values()):
            tensors = [head.tensor for head in heads.values() if head.target == target and head.is_trained]
            heads[target] = Head(layers.Average(dtype="float32", name=target)(tensors), target, False)
    if "elevation_probabilities" in heads:
        expectation = layers.Dense(1, use_bias=False, trainable=False, dtype="float32", name="elevation")
        heads["elevation"] = Head(expectation(heads["elevation_probabilities"].tensor), "elevation", False)
        expectation.set_weights([SMALLNORB_ELEVATION_DEGREES.astype("float32")[:, None]])
    outputs = {name: heads[name].tensor for name in config.outputs}
    return keras.Model(images, outputs, name="_and_".join(config.outputs)), heads


# ------------------------------------------------------------------------------------------------------------ training


def compile_for_training(network, heads, config, steps, seed):
    """Returns a compiled model that shares the weights of `network`, augments its images, and outputs every head.

    `steps` is the number of optimisation steps of the whole training run, `seed` that of the augmentation.
    """
    images = keras.Input(network.input_shape[1:], dtype="uint8")
    augmented = StereoAugmentation(config.augmentations, seed)(images)
    every_head = keras.Model(network.input, {name: head.tensor for name, head in heads.items()})
    model = keras.Model(images, every_head(augmented))
    # The scale brings losses in degrees, or their squares, to the size of the cross-entropy.
    deviation = float(SMALLNORB_ELEVATION_DEGREES.std())
    elevation_loss, scale = {
        "mae": (keras.losses.MeanAbsoluteError(), 1 / deviation),
        "mse": (keras.losses.MeanSquaredError(), 1 / deviation**2),
        "huber": (keras.losses.Huber(delta=5.0), 1 / (5 * deviation)),
        "expectation": (keras.losses.MeanAbsoluteError(), 0.0),  # only logged; the nine probabilities are trained
    }[config.elevation_loss]
    cross_entropy = keras.losses.CategoricalCrossentropy
    objectives = {  # loss, weight and metric by target
        "category": (cross_entropy(label_smoothing=config.label_smoothing), 1.0, "accuracy"),
        "elevation": (elevation_loss, config.elevation_weight * scale, "mae"),
        "elevation_probabilities": (cross_entropy(), config.elevation_weight, "accuracy"),
    }
    rates = {"cosine": training.cosine_schedule(config.learning_rate, steps), "constant": config.learning_rate}
    learning_rate = rates[config.schedule]
    optimizer = {
        "adamw": lambda: keras.optimizers.AdamW(learning_rate, weight_decay=config.weight_decay),
        "nadam": lambda: keras.optimizers.Nadam(learning_rate),
        "sgd": lambda: keras.optimizers.SGD(learning_rate, momentum=0.9, nesterov=True),
    }[config.optimizer]()
    model.compile(
        optimizer,
        loss={name: objectives[head.target][0] for name, head in heads.items()},
        loss_weights={name: objectives[head.target][1] * head.is_trained for name, head in heads.items()},
        metrics={name: objectives[head.target][2] for name, head in heads.items()},
        **training.compile_options(steps),
    )
    return model


def training_targets(pairs, heads):
    """Returns the target array of each head, a dict by its name."""
    targets = {
        "category": np.eye(len(CATEGORIES), dtype="float32")[pairs.category],
        "elevation": pairs.elevation[:, None],
        "elevation_probabilities": (pairs.elevation[:, None] == SMALLNORB_ELEVATION_DEGREES).astype("float32"),
    }
    return {name: targets[head.target] for name, head in heads.items()}


def train_network(config, pairs, seed, held_out=None, builders=BRANCHES, **checkpoint):
    """Trains one network on `pairs`, with validation curves on `held_out`; `checkpoint` is `folder` and `resume`.

    Returns the network in float32, its learning curves (dict of lists) and the seconds that it took.
    """
    keras.utils.set_random_seed(seed)
    with training.computing_in(training.fast_precision()) as precision:
        network, heads = build_network(config, builders)
        steps = training.count_steps(len(pairs.images), config)
        model = compile_for_training(network, heads, config, steps, seed)
    targets = training_targets(pairs, heads)
    validation = held_out and (held_out.images, training_targets(held_out, heads))
    settings = {"config": config, "seed": seed, "precision": precision, "validation_data": validation, **checkpoint}
    curves, seconds = training.fit(model, pairs.images, targets, **settings)
    full_precision, _ = build_network(config, builders)
    models.set_weights(full_precision, network.get_weights())
    return full_precision, curves, seconds


def train(arguments, dataset):
    """Trains the wanted models and saves the one of the first seed, with a card that has the metrics of all seeds."""
    names = [arguments.model] if arguments.model else MODELS
    pairs = prepare(dataset.train, arguments.quick)
    trained = {}
    for name, seed, folder in results.training_runs(SCRIPT, arguments, names, NUM_SEEDS):
        config = cli.with_flags(CONFIGS[name], arguments)
        run = train_network(config, pairs, seed, folder=folder, resume=arguments.resume)
        trained.setdefault(name, []).append((config, seed, *run))

    # The test images are read after the last training run has ended.
    tested = "sample" if arguments.sample else "test"
    parts = {"train": pairs, tested: prepare(dataset.test, arguments.quick)}
    if not arguments.sample:
        parts["sample"] = prepare(load_smallnorb(arguments.data_dir, sample=True).test)
    on_folds = experiment_means(read_experiments(arguments)[0])
    for name, runs in trained.items():
        config, seed, network, curves, seconds = runs[0]  # the first seed is saved, whatever its metrics
        metrics = {part: evaluate(network, each)[0] for part, each in parts.items()}
        seeds = [metrics[tested], *(evaluate(run[2], parts[tested])[0] for run in runs[1:])]
        about = {"name": dataset.name, **{part: len(each.images) for part, each in parts.items()}}
        metrics["validation"] = on_folds.get(VALIDATION.get(name))
        if metrics["validation"]:  # every training image is in one of the folds that were held out in turn
            about["validation"] = len(dataset.train.images)
        about["sha256"] = dataset.checksums
        made = {"config": config, "seed": seed, "curves": curves, "seconds": seconds}
        card = models.card(SCRIPT, name, arguments, dataset=about, metrics=metrics, **made)
        card["seeds"] = [{"seed": run[1], **values} for run, values in zip(runs, seeds, strict=True)]
        models.save_model(network, arguments.output_dir / "saved_models" / SCRIPT / f"{name}.keras", card)


# ---------------------------------------------------------------------------------------------------------- evaluation


def predict(network, images):
    """Returns a dict of float32 arrays: `category` (n, 5) probabilities, `elevation` (n,) degrees, or one of them."""
    predictions = network.predict(images, batch_size=256, verbose=0)
    return {name: values[:, 0] if name == "elevation" else values for name, values in predictions.items()}


def evaluate(network, pairs):
    """Returns the metrics, also with the backgrounds replaced, and the predictions on the unmodified images."""
    network = models.for_prediction(network, len(pairs.images))
    predictions = predict(network, pairs.images)
    metrics = {}
    if "category" in predictions:
        metrics["category_accuracy"] = accuracy_score(pairs.category, predictions["category"].argmax(1))
    if "elevation" in predictions:
        metrics["elevation_mae_degrees"] = mean_absolute_error(pairs.elevation, predictions["elevation"])
        for kind, images in replace_backgrounds(pairs.images).items():
            error = mean_absolute_error(pairs.elevation, predict(network, images)["elevation"])
            metrics[f"elevation_mae_degrees_background_{kind}"] = error
        metrics["elevation_mae_degrees_background_replaced"] = max(metrics[name] for name in METRICS[2:])
    return {name: float(value) for name, value in metrics.items()}, predictions


def reference_errors(train, test):
    """Baselines without a network: the mean elevation, and a nearest-neighbour lookup on the background grey level."""
    levels, test_levels = (background_level(split.images)[:, 0, 0] for split in (train, test))
    elevation, test_elevation = (SMALLNORB_ELEVATION_DEGREES[split.elevation] for split in (train, test))
    guess = KNeighborsClassifier(25).fit(levels, elevation).predict(test_levels)
    return {
        "mean_elevation_mae_degrees": float(np.abs(test_elevation - elevation.mean()).mean()),
        "background_lookup_accuracy": float((guess == test_elevation).mean()),
        "background_lookup_mae_degrees": float(np.abs(test_elevation - guess).mean()),
    }


def accuracy_per_toy(pairs, predictions):
    """Returns the category accuracy on the images of each toy: dict of category to dict of instance (str) to float."""
    right = pd.Series(predictions["category"].argmax(1) == pairs.category)
    accuracies = right.groupby([pairs.category, pairs.instance.astype(str)]).mean()
    return {name: accuracies[category].to_dict() for category, name in enumerate(CATEGORIES)}


def most_confident_mistakes(pairs, predictions, number=16, per_toy=2):
    """Returns the indices of the wrong categories that the network is surest of, at most `per_toy` of the same toy."""
    order = np.argsort(-predictions["category"].max(1))
    order = order[predictions["category"].argmax(1)[order] != pairs.category[order]]
    rank = pd.Series(order).groupby([pairs.category[order], pairs.instance[order]]).cumcount()
    return order[rank < per_toy][:number]


# --------------------------------------------------------------------------------------------------------- experiments


def run_experiments(arguments, examples):
    """Trains every config of the experiments on its folds; adds one row per run to the table."""
    experiments = results.optional_module("experiments", SCRIPT)
    if experiments is None:
        return
    _, held_out_curves = read_experiments(arguments)
    table = results.table_path(arguments.output_dir, SCRIPT)
    settings = {"folder": arguments.output_dir / "runs" / SCRIPT / "experiment", "resume": False}
    settings["builders"] = {**BRANCHES, **experiments.BRANCHES}
    planned = experiments.planned_runs(arguments.seed)
    for run in results.unfinished(table, planned, limit=2 if arguments.quick else None):
        changes = experiments.EXPERIMENTS[run["factor"]][run["name"]]
        config = cli.with_flags(dataclasses.replace(Config(), **changes), arguments)
        pairs, held_out = hold_out(prepare(examples, arguments.quick, config.image_size), run["fold"])
        network, curves, seconds = train_network(config, pairs, arguments.seed, held_out, **settings)
        metrics, _ = evaluate(network, held_out)
        row = {
            **run,
            **dataclasses.asdict(config),
            "parameters": models.parameter_counts(network)["trainable"],
            "seconds": round(seconds, 1),
            **{metric: round(metrics[metric], 4) if metric in metrics else "" for metric in METRICS},
        }
        results.append_row(table, row)
        if run["factor"] == experiments.FULL_BUDGET:
            held_out_curves.setdefault(run["name"], {})[str(run["fold"])] = curves
            write_json(table.with_name(CURVES_FILE), held_out_curves)


def read_experiments(arguments):
    """Returns the experiment table and learning curves, {name: {fold: {metric: one float per epoch}}}.

    Both are empty where there are no files yet. Raises `UserError` where one of them is damaged.
    """
    path = results.recorded_path(arguments, f"{SCRIPT}_experiments.csv")
    table = results.read_table(path, numbers=METRICS, texts=("factor", "name", "fold"))
    path = results.recorded_path(arguments, CURVES_FILE)
    advice = "restore it with `git checkout`, or move it away to start over"
    content = read_json(path, advice) if path.exists() else {}
    try:
        return table, {
            name: {fold: pd.DataFrame(curves).astype(float).to_dict("list") for fold, curves in folds.items()}
            for name, folds in content.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); {advice}") from error


def experiment_means(table):
    """Returns, for the name of each experiment in the table, the mean of each metric, and the metrics per fold."""
    means = {}
    for name, runs in table.groupby("name", sort=False):
        per_fold = runs.groupby("fold")[list(METRICS)].mean()
        folds = {fold: metrics.dropna().to_dict() for fold, metrics in per_fold.iterrows()}
        means[name] = {**per_fold.mean().dropna().to_dict(), "toys": folds}
    return means


# -------------------------------------------------------------------------------------------------------------- report


def draw_joint(plots, folder, train, test, predictions, metrics, references, curves, held_out_curves):
    """Selects and computes what the figures of the joint network show, and has them drawn. Returns their paths."""
    names = np.array(CATEGORIES)
    order = np.random.default_rng(0).permutation(len(train.images))
    shown = np.concatenate([order[train.category[order] == category][:4] for category in range(len(names))])
    samples = prepare(type(train)(*(array[shown] for array in train)), image_size=train.images.shape[1])
    random = np.random.default_rng(0).permutation(len(test.images))[:16]
    guess, elevation = names[predictions["category"].argmax(1)], predictions["elevation"]
    counts = confusion_matrix(names[test.category], guess, labels=names)
    errors = pd.Series(np.abs(elevation - test.elevation)).groupby(names[test.category]).mean()[names].to_dict()
    mistakes = most_confident_mistakes(test, predictions)
    confidence = predictions["category"].max(1)[mistakes]
    toys = pd.DataFrame({"category": test.category, "instance": test.instance}).drop_duplicates()
    toys = toys.sort_values(["category", "instance"]).index
    levels = background_level(test.images)[:, 0, 0, 0]
    images = test.images[[np.abs(levels - level).argmin() for level in (130, 180, 250)]]
    images = {"unmodified": images, **replace_backgrounds(images)}
    return [
        plots.draw_samples(samples, names, folder / "samples.png"),
        plots.draw_learning_curves(curves, held_out_curves, folder / "learning_curves.png"),
        plots.draw_confusion_matrix(counts, names, folder / "confusion_matrix.png"),
        plots.draw_elevation(test.elevation, elevation, errors, folder / "elevation.png"),
        plots.draw_predictions(test.take(random), guess[random], elevation[random], names, folder / "predictions.png"),
        plots.draw_test_toys(test.images[toys], accuracy_per_toy(test, predictions), folder / "test_toys.png"),
        plots.draw_mistakes(test.take(mistakes), guess[mistakes], confidence, names, folder / "mistakes.png"),
        plots.draw_shortcut(images, metrics, references, folder / "shortcut.png"),
    ]


def draw_experiments(plots, folder, experiments, train, table):
    """Has the two figures of the experiments drawn. Returns their paths."""
    runs = table.groupby(["factor", "name"])

    def values(every_fold):
        labels = experiments.labels(every_fold)
        groups = {label: runs.get_group(key) for key, label in labels.items() if key in runs.groups}
        return {metric: {label: group[metric].tolist() for label, group in groups.items()} for metric in METRICS}

    # Every toy from the same view, or from nearly the same one where that is missing.
    order = np.argsort(np.abs(train.elevation - 2) + np.abs(train.lighting - 2), kind="stable")
    toys = pd.DataFrame({"instance": train.instance, "category": train.category}).iloc[order].drop_duplicates()
    images = train.images[toys.sort_values(["instance", "category"]).index]
    return [
        plots.draw_experiments(values(False), folder / "experiments.png"),
        plots.draw_every_fold(images, CATEGORIES, experiments.ALL_FOLDS, values(True), folder / "every_toy.png"),
    ]


def summarise(cards, measured, references, table):
    """Returns what the results JSON holds; `cards` and `measured` (metrics on the test images) are dicts by model."""
    summary = {"script": f"{SCRIPT}.py", "models": {}, "references": references, "experiments": experiment_means(table)}
    for model, card in cards.items():
        seeds = pd.DataFrame(card["seeds"])[list(measured[model])]
        summary["models"][model] = {
            "train": card["metrics"]["train"],
            "test": measured[model],
            "seeds": {"number": len(seeds), "mean": seeds.mean().to_dict(), "std": seeds.std().fillna(0).to_dict()},
            "parameters": card["parameters"]["total"],
            "minutes": round(card["seconds"] / 60, 1),
            **{name: card[name] for name in ("epochs", "hardware", "shortened")},
        }
    if "joint" in cards:
        summary |= {"test": measured["joint"], "seeds": summary["models"]["joint"]["seeds"]}
    return summary


def report(arguments, dataset):
    """Restores and measures the wanted models, by default all after --train or with --record, else joint alone."""
    folder = models.models_folder(arguments.output_dir, SCRIPT)
    print(f"models from {folder}")
    default = MODELS if arguments.train or arguments.record else ["joint"]
    names = [arguments.model] if arguments.model else default
    restored = {name: models.load_model(folder / f"{name}.keras", SCRIPT, INPUT_SHAPE) for name in names}
    table, held_out_curves = read_experiments(arguments)
    test = prepare(dataset.test, arguments.quick)
    size, part = len(test.images), "sample" if arguments.sample else "test"
    measured, predictions, rows, written = {}, {}, [], []
    for name, (network, card) in restored.items():
        measured[name], predictions[name] = evaluate(network, test)
        rows += results.compare(card, measured[name], part=part, size=size, sha256=dataset.checksums)
        if arguments.record:
            checksums = None if arguments.sample else dataset.checksums
            results.record_metrics(folder / f"{name}.json", checksums, **{part: (size, measured[name])})
    references = reference_errors(dataset.train, dataset.test)
    print("baselines without a network:", *(f"{name} {value:.4f}" for name, value in references.items()), sep="\n  ")
    if (arguments.train or arguments.record) and not arguments.sample:
        summary = summarise({name: card for name, (_, card) in restored.items()}, measured, references, table)
        if "joint" in names:
            summary["test_toys"] = accuracy_per_toy(test, predictions["joint"])
        written.append(results.write_results(SCRIPT, arguments, summary))
    plots = results.optional_module("plots", SCRIPT) if "joint" in names else None
    if plots:
        folder = arguments.output_dir / "report" / "figures" / SCRIPT
        curves = restored["joint"][1]["curves"], held_out_curves.get(SHOWN_CURVES, {})
        shown = dataset.train, test, predictions["joint"], measured["joint"], references, *curves
        written += draw_joint(plots, folder, *shown)
        experiments = results.optional_module("experiments", SCRIPT) if len(table) else None
        if experiments:
            written += draw_experiments(plots, folder, experiments, dataset.train, table)
    return results.conclude(SCRIPT, arguments, rows, written)


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    arguments = cli.parse(cli.parser(__doc__, MODELS), argv)
    dataset = load_smallnorb(arguments.data_dir, arguments.sample)
    if arguments.experiments:
        return run_experiments(arguments, dataset.train)
    if arguments.train:
        train(arguments, dataset)
    return report(arguments, dataset)


if __name__ == "__main__":
    cli.run(main)
