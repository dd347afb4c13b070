"""Two reference networks of Géron's book, tuned on Fashion-MNIST and carried over to CIFAR-10.

The multi-layer perceptron (MLP) of chapter 10 and the convolutional network (CNN) of chapter 14 of "Hands-On Machine
Learning with Scikit-Learn, Keras and TensorFlow" (2nd edition, 2019) are trained as they stand in the book. Then one
thing at a time is changed: initialisation, activation, optimiser, regularisation, layers. What helped is put together,
and the three best configurations of each kind are trained on CIFAR-10, to see whether they are the best ones there too.

    python fashion_cifar_mlp_cnn.py --experiments    the tuning, on validation pictures; can be stopped and resumed
    python fashion_cifar_mlp_cnn.py --train          trains references, best and carried-over networks, three seeds each
    python fashion_cifar_mlp_cnn.py --load           restores the saved networks: same metrics, same figures

A tenth of the training pictures, the same one in every run, is kept for validation, and every choice is made there. The
test pictures are read for the saved networks alone.
"""

from common import quiet  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import contextlib
import dataclasses
import json
import math
from typing import NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers
from scipy.stats import spearmanr
from sklearn.metrics import confusion_matrix, log_loss
from sklearn.model_selection import train_test_split

from common import cli, figures, runs
from common.datasets import load_cifar10, load_fashion_mnist
from common.files import write_json
from common.metrics import standard_deviation

SCRIPT = "fashion_cifar_mlp_cnn"
NETWORKS = ("mlp", "cnn")
LOADERS = {"fashion": load_fashion_mnist, "cifar": load_cifar10}
# Between the two datasets lie three of our own making, each with one of the things that make CIFAR-10 harder.
DATASET_NAMES = {
    "fashion": "Fashion-MNIST",
    "fashion shifted": "the same, shifted",
    "fashion cluttered": "the same, on photographs",
    "cifar grey": "CIFAR-10 in grey",
    "cifar": "CIFAR-10",
}
NUM_CLASSES = 10
NUM_SEEDS = 3
NUM_EXPERIMENT_SEEDS = 2
NUM_CARRIED = 8  # configurations of each kind whose ranking is compared between the datasets
SPLIT_SEED = 10
PREDICT_BATCH_SIZE = 500
QUICK_PICTURES = 320
MAX_SHIFT = 0.1  # of the picture's side, as augmentation
SHIFTED_PIXELS = 6  # by which "fashion shifted" moves pictures at most
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue in brightness, ITU-R BT.601
KNOWN_RESULTS = """\
Accuracy on the test pictures that others report. Fashion-MNIST, MLP: the book's notebook 88.4 %, students 87 to 89.7 %.
CNN: the book's text "over 92 %", its notebook 89.8 %, its readers 90 to 91.4 %, its third edition 91.2 %; with batch
normalisation and augmentation 93.4 %, ResNet-18 94.9 %, best published 96.7 %. CIFAR-10, students: MLP 32 to 47 %, CNN
45 to 79 %."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that an experiment varies; the defaults are the MLP of the book, chapter 10, pages 299 to 307.

    Attributes:
        filters: of each stage of convolutions; the first stage has one convolution, the later ones `convolutions`. A
            stage ends with max pooling. No stages make an MLP.
        first_kernel, kernel: sides of the filters of the first and the later convolutions, in pixels.
        convolutions: per stage.
        hidden: units of each hidden dense layer.
        activation: of every hidden layer.
        initializer: of every kernel, a name that Keras knows, or "unit_normal".
        optimizer: key of `OPTIMIZERS`.
        learning_rate: constant, or the highest one of the schedule.
        schedule: "constant" or "cosine" (with warm-up).
        l1, l2: weight of the penalties on every kernel.
        dropout: rate after every hidden dense layer.
        batch_norm: "none", "layers" (every hidden layer is normalised before its activation, Ioffe & Szegedy 2015) or
            "stages" (only what the pooling of each stage returns, a sixth of the numbers).
        standardize: whether each pixel is brought to mean 0 and standard deviation 1 over the training pictures, as the
            book does for its CNN, or all are divided by 255.
        augmentation: tuple out of "flip" (left and right) and "shift" (by up to `MAX_SHIFT`, in whole pixels, so that
            nothing is blurred).
        batch_size: pictures per step.
        epochs: passes over the training pictures at full length.
    """

    filters: tuple = ()
    first_kernel: int = 7
    kernel: int = 3
    convolutions: int = 2
    hidden: tuple = (300, 100)
    activation: str = "relu"
    initializer: str = "glorot_uniform"
    optimizer: str = "sgd"
    learning_rate: float = 0.01
    schedule: str = "constant"
    l1: float = 0.0
    l2: float = 0.0
    dropout: float = 0.0
    batch_norm: str = "none"
    standardize: bool = False
    augmentation: tuple = ()
    batch_size: int = 32
    epochs: int = 30


REFERENCES = {
    "mlp": Recipe(),
    # Chapter 14, page 447.
    "cnn": Recipe(
        filters=(64, 128, 256),
        hidden=(128, 64),
        optimizer="nadam",
        learning_rate=0.001,
        dropout=0.5,
        standardize=True,
        epochs=10,
    ),
}
OPTIMIZERS = {
    "sgd": keras.optimizers.SGD,
    "nesterov": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
    "rmsprop": keras.optimizers.RMSprop,
    "adam": keras.optimizers.Adam,
    "nadam": keras.optimizers.Nadam,
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.01),
}

# ----------------------------------------------------------------------------------------------------- what is tried


def optimizer_changes(**rates):
    """Returns one change for each optimiser and each of its learning rates."""
    return {
        f"{name} {rate:g}": {"optimizer": name, "learning_rate": rate} for name, some in rates.items() for rate in some
    }


SHARED_CHANGES = {
    "initialisation": {
        "He": {"initializer": "he_normal"},
        "LeCun": {"initializer": "lecun_normal"},
        "normal with deviation 1, bad on purpose": {"initializer": "unit_normal"},
    },
    "activation": {name: {"activation": name} for name in ("elu", "selu", "silu", "gelu", "tanh", "sigmoid")},
}
CHANGES = {
    "mlp": {
        **SHARED_CHANGES,
        "optimiser": optimizer_changes(
            sgd=(0.001, 0.1),
            nesterov=(0.003, 0.01, 0.03),
            rmsprop=(0.0003, 0.001),
            adam=(0.0003, 0.001, 0.01),
            nadam=(0.0003, 0.001),
            adamw=(0.0003, 0.001),
        ),
        "learning rate": {"cosine": {"schedule": "cosine"}},
        "regularisation": {
            "L1 0.0001": {"l1": 1e-4},
            "L2 0.0001": {"l2": 1e-4},
            "L2 0.001": {"l2": 1e-3},
            "dropout 0.25": {"dropout": 0.25},
            "dropout 0.5": {"dropout": 0.5},
            "batch norm": {"batch_norm": "layers"},
        },
        "layers": {
            "none": {"hidden": ()},
            "100": {"hidden": (100,)},
            "300": {"hidden": (300,)},
            "300, 100, 50": {"hidden": (300, 100, 50)},
            "300, 300, 300, 300": {"hidden": (300, 300, 300, 300)},
            "500, 200": {"hidden": (500, 200)},
        },
        "batch size": {"128": {"batch_size": 128}, "512": {"batch_size": 512}},
        "input": {"standardised": {"standardize": True}},
        "augmentation": {
            "flip": {"augmentation": ("flip",)},
            "shift": {"augmentation": ("shift",)},
        },
    },
    "cnn": {
        **SHARED_CHANGES,
        "optimiser": optimizer_changes(
            sgd=(0.01, 0.1),
            nesterov=(0.003, 0.01),
            rmsprop=(0.0003, 0.001),
            adam=(0.0003, 0.001),
            nadam=(0.0003, 0.003),
            adamw=(0.0003, 0.001),
        ),
        "learning rate": {"cosine": {"schedule": "cosine"}},
        "regularisation": {
            "no dropout": {"dropout": 0.0},
            "dropout 0.25": {"dropout": 0.25},
            "L1 0.00001": {"l1": 1e-5},
            "L2 0.0001": {"l2": 1e-4},
            "batch norm": {"batch_norm": "layers"},
            "batch norm after pooling": {"batch_norm": "stages"},
        },
        "layers": {
            "one convolution a stage": {"convolutions": 1},
            "two stages": {"filters": (64, 128)},
            "four stages": {"filters": (64, 128, 256, 256)},
            "one dense layer": {"hidden": (128,)},
            "no dense layer": {"hidden": ()},
        },
        "filters": {
            "half": {"filters": (32, 64, 128)},
            "first 3 x 3": {"first_kernel": 3},
            "first 5 x 5": {"first_kernel": 5},
            "all 5 x 5": {"first_kernel": 5, "kernel": 5},
        },
        "batch size": {"128": {"batch_size": 128}},
        "input": {"divided by 255": {"standardize": False}},
        "augmentation": {
            "flip": {"augmentation": ("flip",)},
            "shift": {"augmentation": ("shift",)},
        },
    },
}
# Chosen after the single changes of the first seed: what helped most on validation, put together step by step.
ADAM = {"optimizer": "adam", "learning_rate": 0.001, "schedule": "cosine", "epochs": 15}
WIDE = ADAM | {"hidden": (500, 200)}
COSINE = {"schedule": "cosine", "batch_norm": "stages", "dropout": 0.25}
SMALL_KERNEL = COSINE | {"first_kernel": 3}
PLAIN = SMALL_KERNEL | {"standardize": False}
HALF = {"filters": (32, 64, 128)}
FLIP, FLIP_SHIFT = {"augmentation": ("flip",)}, {"augmentation": ("flip", "shift")}
TOGETHER = {
    "mlp": {
        "Adam, cosine": ADAM,
        "Adam, cosine, standardised": ADAM | {"standardize": True},
        "Adam, cosine, batch norm": ADAM | {"batch_norm": "layers"},
        "Adam, cosine, 500, 200": WIDE,
        "Adam, cosine, 500, 200, standardised": WIDE | {"standardize": True},
        "Adam, cosine, 500, 200, standardised, dropout 0.25": WIDE | {"standardize": True, "dropout": 0.25},
        "Adam, cosine, 500, 200, dropout 0.25": WIDE | {"dropout": 0.25},
        "Adam, cosine, 500, 200, batch norm, dropout 0.25, flip, shift": WIDE
        | {"batch_norm": "layers", "dropout": 0.25}
        | FLIP_SHIFT,
    },
    "cnn": {
        "cosine, norm": COSINE,
        "cosine, norm, 3 x 3": SMALL_KERNEL,
        "cosine, norm, 3 x 3, flip": SMALL_KERNEL | FLIP,
        "cosine, norm, 3 x 3, flip, shift": SMALL_KERNEL | FLIP_SHIFT,
        "cosine, norm, 3 x 3, half": SMALL_KERNEL | HALF,
        "cosine, norm, 3 x 3, half, flip": SMALL_KERNEL | HALF | FLIP,
        "cosine, norm, 3 x 3, half, flip, shift": SMALL_KERNEL | HALF | FLIP_SHIFT,
        "cosine, norm, 3 x 3, divided by 255": PLAIN,
        "cosine, norm, 3 x 3, divided by 255, flip": PLAIN | FLIP,
        "cosine, norm, 3 x 3, divided by 255, flip, shift": PLAIN | FLIP_SHIFT,
        "cosine, norm, 3 x 3, divided by 255, half": PLAIN | HALF,
        "cosine, norm, 3 x 3, divided by 255, half, flip": PLAIN | HALF | FLIP,
        "cosine, norm, 3 x 3, divided by 255, half, flip, shift": PLAIN | HALF | FLIP_SHIFT,
    },
}
SHORT_EPOCHS = {"mlp": 6, "cnn": 4}
SHORT_PICTURES = {"mlp": None, "cnn": 10_000}  # of the training pictures, always the same ones; None for all


def recipes(network):
    """Returns all configurations of "mlp" or "cnn": dict from a name, "reference" or "factor: change", to `Recipe`."""
    reference = REFERENCES[network]
    named = {"reference": reference}
    for factor, changes in {**CHANGES[network], "together": TOGETHER[network]}.items():
        named |= {f"{factor}: {name}": dataclasses.replace(reference, **change) for name, change in changes.items()}
    return named


FINALISTS = {
    "mlp": (
        "together: Adam, cosine, 500, 200",
        "together: Adam, cosine, 500, 200, standardised",
        "together: Adam, cosine",
        "together: Adam, cosine, batch norm",
        "together: Adam, cosine, standardised",
    ),
    "cnn": (
        "together: cosine, norm, 3 x 3, divided by 255, flip",
        "together: cosine, norm, 3 x 3, divided by 255",
        "together: cosine, norm, 3 x 3, divided by 255, half, flip",
        "together: cosine, norm, 3 x 3",
        "together: cosine, norm, 3 x 3, divided by 255, half",
    ),
}
"""The five configurations of each kind with the best short runs, in the order of their validation accuracy at full
length: the first one is the best network of Fashion-MNIST, the first three go to CIFAR-10."""


def plan(model):
    """Returns what a saved model is: dataset, kind of network, name of its configuration (three str)."""
    dataset, network, which = model.split("_")
    place = 0 if which == "best" else int(which) - 1 if which.isdigit() else None
    return dataset, network, "reference" if place is None else FINALISTS[network][place]


MODELS = [
    *(f"fashion_{network}_{which}" for which in ("reference", "best") for network in NETWORKS),
    *(f"cifar_{network}_{place}" for network in NETWORKS for place in (1, 2, 3)),
]

# ---------------------------------------------------------------------------------------------------------------- data


class Split(NamedTuple):
    """Labelled pictures.

    Attributes:
        images: uint8 (n, height, width, channels), 0 to 255.
        labels: int64 (n,), 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


def to_grey(images):
    """Returns the brightness of colour pictures: uint8 (n, height, width, 3) to (n, height, width, 1)."""
    return np.rint(images @ np.array(GREY_WEIGHTS, "float32")).astype("uint8")[..., None]


def shift(images, most, generator):
    """Moves each picture by up to `most` pixels (int) in both directions; what comes in from outside is black."""
    side = images.shape[1]
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    down, right = generator.integers(0, 2 * most + 1, (2, len(images), 1))
    picture = np.arange(len(images))[:, None, None]
    return padded[picture, (down + np.arange(side))[:, :, None], (right + np.arange(side))[:, None, :]]


def put_on_photographs(images, photographs):
    """Returns clothes with the middle of a grey CIFAR-10 picture wherever they were black; `photographs` are reused."""
    margin = (photographs.shape[1] - images.shape[1]) // 2
    inside = slice(margin, margin + images.shape[1])
    backgrounds = to_grey(photographs[np.arange(len(images)) % len(photographs), inside, inside])
    return np.where(images > 0, images, backgrounds)


def load_splits(name, data_dir, quick=False):
    """Loads a dataset, keeps a tenth of its training pictures for validation, and changes the pictures if so named.

    Args:
        name: key of `DATASET_NAMES`.
        data_dir: `pathlib.Path`.
        quick: bool, whether to take only `QUICK_PICTURES` of each split.

    Returns:
        dict of `Split`, "train" in random order, "validation" with as many pictures of each class, "test"; and the
        `common.datasets.Dataset`.

    Raises:
        UserError: where the dataset is neither there nor to be had.
    """
    source, _, change = name.partition(" ")
    dataset = LOADERS[source](data_dir)
    labels = np.asarray(dataset.train.labels)
    parts = train_test_split(np.arange(len(labels)), test_size=0.1, random_state=SPLIT_SEED, stratify=labels)
    count = QUICK_PICTURES if quick else None
    splits = {
        part: Split(dataset.train.images[chosen[:count]], labels[chosen[:count]])
        for part, chosen in zip(("train", "validation"), parts, strict=True)
    }
    splits["test"] = Split(np.asarray(dataset.test.images[:count]), np.asarray(dataset.test.labels[:count]))
    photographs = load_splits("cifar", data_dir, quick)[0] if change == "cluttered" else None
    for part, split in splits.items():
        if change == "shifted":
            images = shift(split.images, SHIFTED_PIXELS, np.random.default_rng(SPLIT_SEED))
        elif change == "cluttered":
            images = put_on_photographs(split.images, photographs[part].images)
        elif change == "grey":
            images = to_grey(split.images)
        else:
            continue
        splits[part] = split._replace(images=images)
    return splits, dataset


# ------------------------------------------------------------------------------------------------------------ networks


def build_network(recipe, image_shape, images=None):
    """Builds the MLP or the CNN that a recipe describes.

    Args:
        recipe: `Recipe`.
        image_shape: tuple of int, (height, width, channels).
        images: uint8 (n, *image_shape), which a standardising network takes each pixel's mean and deviation from. None
            leaves those to be restored.

    Returns:
        Functional `keras.Model` from pictures (n, *image_shape) in the uint8 range to class probabilities (n, 10).
    """
    initializer = recipe.initializer
    if initializer == "unit_normal":
        initializer = keras.initializers.RandomNormal(stddev=1.0)

    def hidden(features, layer, *arguments, **keywords):
        """A layer with weights, normalised if the recipe wants it, and its activation."""
        regularizer = keras.regularizers.L1L2(recipe.l1, recipe.l2) if recipe.l1 or recipe.l2 else None
        keywords |= {"kernel_initializer": initializer, "kernel_regularizer": regularizer}
        features = layer(*arguments, use_bias=recipe.batch_norm != "layers", **keywords)(features)
        if recipe.batch_norm == "layers":
            features = layers.BatchNormalization()(features)
        return layers.Activation(recipe.activation)(features)

    inputs = keras.Input(image_shape, name="images")
    if recipe.standardize:
        # In full precision, whatever the rest computes in: most of a pixel's range would be lost in rounding.
        standardize = layers.Normalization(axis=(1, 2, 3), dtype="float32", name="standardize")
        if images is not None:
            standardize.adapt(images)
        features = standardize(inputs)
    else:
        features = layers.Rescaling(1 / 255)(inputs)
    for stage, filters in enumerate(recipe.filters):
        for _ in range(recipe.convolutions if stage else 1):
            kernel = recipe.kernel if stage else recipe.first_kernel
            features = hidden(features, layers.Conv2D, filters, kernel, padding="same")
        features = layers.MaxPooling2D(2)(features)
        if recipe.batch_norm == "stages":
            features = layers.BatchNormalization()(features)
    features = layers.Flatten()(features)
    for units in recipe.hidden:
        features = hidden(features, layers.Dense, units)
        if recipe.dropout:
            features = layers.Dropout(recipe.dropout)(features)
    # Softmax in full precision, so that small probabilities survive.
    probabilities = layers.Dense(
        NUM_CLASSES, activation="softmax", kernel_initializer=initializer, dtype="float32", name="probabilities"
    )(features)
    return keras.Model(inputs, probabilities)


def train_network(recipe, split, seed, *, folder, resume, validation=None):
    """Trains one network from scratch, or goes on from its checkpoint.

    Args:
        recipe: `Recipe`.
        split: `Split` to train on.
        seed: int, of weights, order, dropout and augmentation.
        folder: where the checkpoints live.
        resume: bool, whether to go on from the last of them.
        validation: `Split` for the learning curves, or None.

    Returns:
        The trained network in float32 with weights rounded to half precision (`keras.Model`), its learning curves
        (dict of lists), and seconds (float).

    Raises:
        Diverged: where the loss left the finite numbers.
    """
    keras.utils.set_random_seed(seed)
    image_shape = split.images.shape[1:]
    steps = math.ceil(len(split.images) / recipe.batch_size) * recipe.epochs
    # In an MLP this small, converting between precisions costs more than it saves.
    with runs.building_for_speed() if recipe.filters else contextlib.nullcontext("float32") as precision:
        network = build_network(recipe, image_shape, split.images)
    images = keras.Input(image_shape)
    augmented = images
    if "flip" in recipe.augmentation:
        augmented = layers.RandomFlip("horizontal", seed=seed)(augmented)
    if "shift" in recipe.augmentation:
        translation = layers.RandomTranslation(MAX_SHIFT, MAX_SHIFT, "nearest", interpolation="nearest", seed=seed)
        translation.supports_jit = True  # Keras denies it of this layer, and would run every step uncompiled under JAX
        augmented = translation(augmented)
    model = keras.Model(images, network(augmented))
    learning_rate = recipe.learning_rate
    if recipe.schedule == "cosine":
        learning_rate = runs.cosine_schedule(learning_rate, steps)
    model.compile(
        OPTIMIZERS[recipe.optimizer](learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],
        **runs.compile_options(steps),
    )
    curves, seconds = runs.fit(
        model,
        split.images,
        split.labels,
        validation_data=validation and tuple(validation),
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        folder=folder,
        settings={"recipe": json.loads(json.dumps(dataclasses.asdict(recipe))), "seed": seed, "precision": precision},
        resume=resume,
    )
    full_precision = build_network(recipe, image_shape)
    runs.set_weights(full_precision, network.get_weights())
    runs.round_weights(full_precision, "bfloat16")  # ten models shall fit into 25 MB
    return full_precision, curves, seconds


def predict(network, images):
    """Returns class probabilities, float32 (n, 10), for pictures in the uint8 range."""
    return runs.for_prediction(network).predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)


def evaluate(network, split):
    """Returns {"accuracy", "loss"} (float; 0 to 1, and the mean cross-entropy) of a network on a `Split`."""
    probabilities = predict(network, split.images)
    return {
        "accuracy": float(np.mean(probabilities.argmax(1) == split.labels)),
        "loss": float(log_loss(split.labels, probabilities, labels=range(NUM_CLASSES))),
    }


# --------------------------------------------------------------------------------------------------------- experiments


class Run(NamedTuple):
    """One training of the experiments.

    Attributes:
        dataset: key of `DATASET_NAMES`.
        network: "mlp" or "cnn".
        budget: "short" or "full".
        name: key of `recipes(network)`.
        seed: int.
    """

    dataset: str
    network: str
    budget: str
    name: str
    seed: int


def run_of(row):
    """The `Run` that a row of the table is about."""
    return Run(row["dataset"], row["network"], row["budget"], row["name"], int(row["seed"]))


def seed_accuracies(rows, dataset, network, budget, name):
    """Validation accuracy of a configuration with each of its seeds (list of float)."""
    wanted = (dataset, network, budget, name)
    return [float(row["validation_accuracy"]) for row in rows if run_of(row)[:4] == wanted]


def mean_accuracies(rows, dataset, network, budget):
    """Mean validation accuracy over the seeds: dict from the name of a configuration to float, the best one first."""
    names = dict.fromkeys(row["name"] for row in rows if run_of(row)[:3] == (dataset, network, budget))
    means = {name: float(np.mean(seed_accuracies(rows, dataset, network, budget, name))) for name in names}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def carried(rows, network):
    """Names of the configurations whose short runs are repeated on CIFAR-10: evenly spread over the ranking."""
    ranking = list(mean_accuracies(rows, "fashion", network, "short"))
    places = np.linspace(0, len(ranking) - 1, min(NUM_CARRIED, len(ranking))).round().astype(int)
    return [ranking[place] for place in places]


def planned_runs(rows, seed):
    """All runs of the experiments, in order, as far as they are known: what is carried over depends on `rows`."""
    seeds = range(seed, seed + NUM_EXPERIMENT_SEEDS)
    planned = [
        Run("fashion", network, "short", name, each)
        for each in seeds
        for network in NETWORKS
        for name in recipes(network)
        # The single changes of the CNN are most of the time, so they get one seed.
        if each == seed or network == "mlp" or name == "reference" or name.startswith("together")
    ]
    if set(planned) <= {run_of(row) for row in rows}:
        planned += [
            Run("cifar", network, "short", name, each)
            for each in seeds
            for network in NETWORKS
            for name in carried(rows, network)
        ]
        planned += [  # the best configuration on the datasets in between
            Run(dataset, network, "short", carried(rows, network)[0], each)
            for each in seeds
            for network in NETWORKS
            for dataset in DATASET_NAMES
            if dataset not in LOADERS
        ]
    return planned + [
        Run("fashion", network, "full", name, each)
        for network in NETWORKS
        for name in ("reference", *FINALISTS[network])
        for each in range(seed, seed + NUM_SEEDS)
    ]


def full_length_folder(output_dir, dataset, network, name, seed):
    """Where the checkpoints of a training at full length live: the experiments and `--train --resume` share them."""
    plain = "".join(letter if letter.isalnum() else "_" for letter in name)
    return output_dir / "runs" / SCRIPT / f"{dataset}_{network}_{plain}_seed_{seed}"


def time_left(left, rows):
    """Says how long the runs in `left` will take, going by the rows of the same kind; "" where there are none (str)."""
    seconds = {}
    for row in rows:
        seconds.setdefault(run_of(row)[:3], []).append(float(row["seconds"]))
    known = [np.mean(seconds[run[:3]]) for run in left if run[:3] in seconds]
    if not known:
        return ""
    return f", {'about' if len(known) == len(left) else 'at least'} {sum(known) / 60:.0f} minutes"


def run_experiments(arguments):
    """Trains what `planned_runs` says, one row of the table for each, and judges it on the validation pictures."""
    table = runs.experiments_table(arguments.output_dir, SCRIPT)
    loaded = {}
    while True:
        rows = runs.read_rows(table)
        finished = {run_of(row) for row in rows}
        planned = planned_runs(rows, arguments.seed)
        left = [run for run in planned if run not in finished]
        if arguments.quick:  # one of each kind of network
            left = [run for run in left if run.name == "reference" and run.seed == arguments.seed]
            left = [run for run in left if (run.dataset, run.budget) == ("fashion", "short")]
        if not left:
            break
        run = left[0]
        print(f"{len(left)} of {len(planned)} runs left{time_left(left, rows)}: {', '.join(map(str, run))}")
        if run.dataset not in loaded:
            loaded[run.dataset] = load_splits(run.dataset, arguments.data_dir, arguments.quick)[0]
        splits = loaded[run.dataset]
        recipe, training = recipes(run.network)[run.name], splits["train"]
        if run.budget == "short":
            count = SHORT_PICTURES[run.network]
            recipe = dataclasses.replace(recipe, epochs=SHORT_EPOCHS[run.network])
            training = Split(*(array[:count] for array in training))
        recipe = cli.with_flags(recipe, arguments)
        folder = full_length_folder(arguments.output_dir, run.dataset, run.network, run.name, run.seed)
        if run.budget == "short":
            folder = folder.with_name("experiment")
        try:
            network, curves, seconds = train_network(
                recipe,
                training,
                run.seed,
                folder=folder,
                resume=run.budget == "full",
                validation=splits["validation"],
            )
            measured = {
                "parameters": runs.parameter_counts(network)["trainable"],
                "seconds": round(seconds, 1),
                "train_accuracy": round(curves["accuracy"][-1], 5),
                "validation_accuracy": round(curves["val_accuracy"][-1], 5),
                "validation_loss": round(curves["val_loss"][-1], 5),
            }
        except runs.Diverged:  # a result, too: it can but guess
            guess = {"train_accuracy": 1 / NUM_CLASSES, "validation_accuracy": 1 / NUM_CLASSES}
            measured = {"parameters": "", "seconds": 0, **guess, "validation_loss": "not a number"}
        settings = {
            field: " ".join(map(str, value)) if isinstance(value, tuple) else value
            for field, value in dataclasses.asdict(recipe).items()
        }
        runs.append_row(table, {**run._asdict(), **settings, "pictures": len(training.images), **measured})
    print(f"finished runs are in {table}")


# ------------------------------------------------------------------------------------------------------------- figures

SHOWN_BELOW_REFERENCE = 0.06  # accuracies that are further below the reference are drawn at the edge


def draw_factors(rows, network, folder):
    """Every change of one thing, a point per seed, the reference as a line; settings far below it at the left edge."""
    means = mean_accuracies(rows, "fashion", network, "short")
    names = [name for name in recipes(network) if name in means]
    figure, axes = plt.subplots(figsize=(9, 0.2 * len(names) + 1))
    edge = means.get("reference", max(means.values())) - SHOWN_BELOW_REFERENCE
    axes.axvline(edge + SHOWN_BELOW_REFERENCE, color=figures.GREY, linewidth=1)
    best = list(means)[:5]
    for place, name in enumerate(names):
        if means[name] < edge:
            axes.text(edge, place, f"◄ {means[name]:.1%}", color=figures.RED, va="center", fontsize=8)
            continue
        color = figures.GREEN if name in best else figures.BLUE
        points = seed_accuracies(rows, "fashion", network, "short", name)
        axes.scatter(np.maximum(points, edge), [place] * len(points), s=14, color=color)
        axes.scatter(means[name], place, s=60, marker="|", color=color)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(ylim=(len(names) - 0.5, -0.5), xlim=(edge - 0.002, max(means.values()) + 0.01))
    axes.set_xlabel("validation accuracy, a point a seed; line: reference; green: best five")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(True, axis="both")
    axes.set_title(f"{network.upper()} on Fashion-MNIST: what mattered and what did not")
    return figures.save(figure, folder / f"factors_{network}.png")


def draw_learning_curves(cards, folder):
    """Accuracy over the epochs of reference and best network on Fashion-MNIST."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for panel, network in zip(axes, NETWORKS, strict=True):
        for which, color in (("reference", figures.GREY), ("best", figures.BLUE)):
            card = cards.get(f"fashion_{network}_{which}")
            if card is None:
                continue
            for metric, style, label in (("accuracy", "--", "training"), ("val_accuracy", "-", "validation")):
                values = card["curves"][metric]
                panel.plot(range(1, len(values) + 1), values, style, color=color, label=f"{which}, {label}")
        panel.set(xlabel="epoch", title=f"{network.upper()} on Fashion-MNIST", ylim=(0.8, 1.0))
        panel.set_yticks(np.linspace(0.8, 1.0, 6))
        panel.yaxis.set_major_formatter("{x:.0%}")
        panel.legend(loc="lower right", fontsize=8)
    axes[0].set_ylabel("accuracy")
    return figures.save(figure, folder / "learning_curves.png")


def draw_transfer(rows, folder):
    """Rank on Fashion-MNIST against rank on CIFAR-10 of the configurations that were trained on both."""
    figure, axes = plt.subplots(2, 1, figsize=(8.4, 7))
    for panel, network in zip(axes, NETWORKS, strict=True):
        cifar = mean_accuracies(rows, "cifar", network, "short")
        fashion = mean_accuracies(rows, "fashion", network, "short")
        names = [name for name in fashion if name in cifar]
        ranks = [list(cifar).index(name) + 1 for name in names]
        panel.plot([1, len(names)], [1, len(names)], color=figures.GREY, linewidth=1)
        panel.scatter(range(1, len(names) + 1), ranks, color=figures.BLUE, s=40)
        for place, name in enumerate(names, start=1):
            label = f"{place}  {name}: {fashion[name]:.1%}, {cifar[name]:.1%}"
            panel.plot([], [], " ", label=label)
        panel.set(xlabel="rank on Fashion-MNIST", ylabel="rank on CIFAR-10", aspect="equal", anchor="W")
        panel.set(xticks=range(1, len(names) + 1), yticks=range(1, len(names) + 1))
        panel.grid(True, axis="both")
        title = "rank on Fashion-MNIST, configuration, accuracy there and on CIFAR-10"
        legend = {"handlelength": 0, "alignment": "left", "title": title, "title_fontsize": 9}
        panel.legend(loc="center left", fontsize=9, bbox_to_anchor=(1.1, 0.5), **legend)
        panel.set_title(f"{network.upper()}: rank correlation {rank_correlation(rows, network):.2f}")
    return figures.save(figure, folder / "transfer.png")


def draw_between(rows, examples, folder):
    """Accuracy of the best short configurations from Fashion-MNIST by way of our own datasets to CIFAR-10.

    Args:
        rows: list of dict of str, the experiment table.
        examples: dict from the key of each dataset to pictures, uint8 (6, height, width, channels).
        folder: `pathlib.Path` of the figure.
    """
    figure = plt.figure(figsize=(11, 3.8))
    grid = figure.add_gridspec(len(DATASET_NAMES), 12)
    axes = figure.add_subplot(grid[:, :6])
    for network, color in zip(NETWORKS, (figures.GREY, figures.BLUE), strict=True):
        best = next(iter(mean_accuracies(rows, "fashion", network, "short")))
        for place, dataset in enumerate(DATASET_NAMES):
            points = seed_accuracies(rows, dataset, network, "short", best)
            axes.scatter(points, [place] * len(points), s=24, color=color, label=None if place else network.upper())
    axes.set_yticks(range(len(DATASET_NAMES)), DATASET_NAMES.values())
    axes.set(ylim=(len(DATASET_NAMES) - 0.5, -0.5), xlabel="validation accuracy after a short training, a point a seed")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(True, axis="both")
    axes.legend(loc="lower right", fontsize=8)
    for place, dataset in enumerate(DATASET_NAMES):
        for column, image in enumerate(examples[dataset]):
            panel = figure.add_subplot(grid[place, 6 + column])
            figures.picture(panel, image[..., 0] if image.shape[-1] == 1 else image)
    axes.set_title("From Fashion-MNIST to CIFAR-10, one difficulty at a time")
    return figures.save(figure, folder / "between.png")


def draw_confusion(name, split, probabilities, class_names, folder):
    """Which classes the best CNN of a dataset takes for which."""
    counts = confusion_matrix(split.labels, probabilities.argmax(1), labels=range(NUM_CLASSES))
    figure, axes = plt.subplots(figsize=(8.6, 8))
    figures.confusion_matrix(axes, counts, class_names, f"{DATASET_NAMES[name]} test pictures, best CNN")
    return figures.save(figure, folder / f"confusion_{name}.png")


def draw_mistakes(shown, folder):
    """The 14 test pictures of each dataset whose wrong class the best CNN is surest of.

    Args:
        shown: dict from dataset to `Split`, probabilities (n, 10) and class names.
        folder: `pathlib.Path` of the figure.
    """
    figure = plt.figure(figsize=(10, 4.2 * len(shown)))
    parts = np.atleast_1d(figure.subfigures(len(shown), 1))
    for part, (name, (split, probabilities, class_names)) in zip(parts, shown.items(), strict=True):
        answers = probabilities.argmax(1)
        confidence = np.where(answers == split.labels, -1.0, probabilities.max(1))
        for panel, index in zip(part.subplots(2, 7).flat, np.argsort(-confidence)[:14], strict=True):
            image = split.images[index]
            title = f"{class_names[split.labels[index]]}\n{class_names[answers[index]]}?"
            figures.picture(panel, image[..., 0] if image.shape[-1] == 1 else image, title)
        part.suptitle(f"{DATASET_NAMES[name]}: the most confident mistakes, truth above answer", x=0.01, ha="left")
    return figures.save(figure, folder / "mistakes.png")


def draw_filters(networks, folder):
    """First-layer weights: 16 units of an MLP, 16 filters of CNNs, each scaled to its own range.

    Args:
        networks: dict from the title of a part to a restored network.
        folder: `pathlib.Path` of the figure.
    """
    figure = plt.figure(figsize=(10, 1.15 * len(networks)))
    for part, (title, network) in zip(figure.subfigures(len(networks), 1), networks.items(), strict=True):
        first = next(layer for layer in network.layers if isinstance(layer, (layers.Conv2D, layers.Dense)))
        weights = np.asarray(first.get_weights()[0])
        if weights.ndim == 2:
            weights = weights.reshape(*network.input_shape[1:], -1)
        axes = part.subplots(1, 16)
        for panel in axes:
            panel.set_axis_off()
        for panel, kernel in zip(axes, np.moveaxis(weights, -1, 0), strict=False):
            low, high = np.quantile(kernel, [0.01, 0.99])
            kernel = np.clip((kernel - low) / (high - low), 0, 1) * 255
            figures.picture(panel, kernel[..., 0] if kernel.shape[-1] == 1 else kernel.astype("uint8"))
        part.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, folder / "filters.png")


# ---------------------------------------------------------------------------------------------------------------- main


def rank_correlation(rows, network):
    """Spearman's correlation between the accuracies of the same configurations on both datasets; nan without rows."""
    cifar = mean_accuracies(rows, "cifar", network, "short")
    fashion = mean_accuracies(rows, "fashion", network, "short")
    shared = [name for name in cifar if name in fashion]
    if len(shared) < 3:
        return math.nan
    return float(spearmanr([fashion[name] for name in shared], [cifar[name] for name in shared]).statistic)


def train(arguments):
    """Trains the wanted networks with several seeds each, and saves the first seed's with its card.

    The test pictures are read after the last training has ended.
    """
    trained, loaded = [], {}
    for model in [arguments.model] if arguments.model else MODELS:
        dataset, network, name = plan(model)
        if dataset not in loaded:
            loaded[dataset] = load_splits(dataset, arguments.data_dir, arguments.quick)
        splits, _ = loaded[dataset]
        recipe = cli.with_flags(recipes(network)[name], arguments)
        for seed in range(arguments.seed, arguments.seed + (1 if arguments.quick else NUM_SEEDS)):
            print(f"{model} ({name}), seed {seed}")
            folder = full_length_folder(arguments.output_dir, dataset, network, name, seed)
            options = {"folder": folder, "resume": arguments.resume, "validation": splits["validation"]}
            trained.append((model, seed, recipe, *train_network(recipe, splits["train"], seed, **options)))

    cards = {}
    for model, seed, recipe, network, curves, seconds in trained:
        splits, dataset = loaded[plan(model)[0]]
        metrics = {part: evaluate(network, split) for part, split in splits.items()}
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
                dataset={
                    "name": dataset.name,
                    **{part: len(split.images) for part, split in splits.items()},
                    "sha256": dataset.checksums,
                },
                pictures=len(splits["train"].images),
                curves=curves,
                seconds=seconds,
            ),
            "configuration": plan(model)[2],
            "training_precision": runs.fast_precision() if recipe.filters else "float32",
            "metrics": metrics,
            "seeds": [{"seed": seed, **metrics}],
        }
    for model, seed, _, network, _, _ in trained:
        if seed == arguments.seed:
            runs.save_model(network, arguments.output_dir / "saved_models" / SCRIPT / f"{model}.keras", cards[model])


def summarise(cards, measured, rows):
    """Builds what `report/results/fashion_cifar_mlp_cnn.json` holds.

    Args:
        cards: dict from model name to its card.
        measured: dict from model name to its metrics on the test pictures.
        rows: list of dict of str, the experiment table.

    Returns:
        dict: `models` (configuration, test metrics of the saved network, accuracy in % as mean and standard deviation
        of the seeds), `pictures` (how many each split has), `short` (what a short run is), `experiments` (validation
        accuracy, 0 to 1, per dataset, network, budget and configuration: mean, standard deviation and number of the
        seeds), `experiment_hours` and `transfer`.
    """
    models = {}
    for model, card in cards.items():
        accuracies = {
            part: [100 * run[part]["accuracy"] for run in card["seeds"]] for part in ("train", "validation", "test")
        }
        models[model] = {
            "configuration": card["configuration"],
            "test": measured[model],
            "seeds": len(card["seeds"]),
            "mean": {part: float(np.mean(values)) for part, values in accuracies.items()},
            "std": {part: standard_deviation(values) for part, values in accuracies.items()},
            "parameters": card["parameters"]["trainable"],
            "epochs": card["epochs"],
            "minutes": round(card["seconds"] / 60, 1),
            "hardware": card["hardware"],
            "shortened": card["shortened"],
        }
    experiments, transfer = {}, {}
    for dataset, network, budget in sorted({run_of(row)[:3] for row in rows}):
        of_kind = experiments.setdefault(dataset, {}).setdefault(network, {}).setdefault(budget, {})
        for name in mean_accuracies(rows, dataset, network, budget):
            values = seed_accuracies(rows, dataset, network, budget, name)
            of_kind[name] = {"mean": float(np.mean(values)), "std": standard_deviation(values), "seeds": len(values)}
    for network in NETWORKS:
        correlation = rank_correlation(rows, network)
        if not math.isnan(correlation):
            count = len(mean_accuracies(rows, "cifar", network, "short"))
            transfer[network] = {"rank_correlation": correlation, "configurations": count}
    return {
        "script": f"{SCRIPT}.py",
        "models": models,
        "pictures": {
            plan(model)[0]: {part: card["dataset"][part] for part in ("train", "validation", "test")}
            for model, card in cards.items()
        },
        "short": {
            network: {"epochs": SHORT_EPOCHS[network], "pictures": SHORT_PICTURES[network]} for network in NETWORKS
        },
        "experiments": experiments,
        "experiment_hours": sum(float(row["seconds"]) for row in rows) / 3600,
        "transfer": transfer,
    }


def report(arguments):
    """Restores the saved networks, measures them on the test pictures, writes results and figures."""
    folder = runs.saved_models_folder(arguments.output_dir, SCRIPT)
    print(f"models from {folder}")
    networks, cards, measured, loaded = {}, {}, {}, {}
    for model in [arguments.model] if arguments.model else MODELS:
        dataset_name = plan(model)[0]
        networks[model], cards[model] = runs.load_model(folder / f"{model}.keras")
        if dataset_name not in loaded:
            loaded[dataset_name] = load_splits(dataset_name, arguments.data_dir, arguments.quick)
        splits, dataset = loaded[dataset_name]
        measured[model] = evaluate(networks[model], splits["test"])
        print(f"\n{model} ({cards[model]['configuration']}): {cards[model]['parameters']['trainable']:,} parameters")
        runs.print_metrics(measured[model], cards[model])
        if cards[model]["dataset"]["sha256"] != dataset.checksums:
            print("note: the pictures differ from those that the recorded metrics were measured on")
    print(f"\n{KNOWN_RESULTS}")

    report_folder = arguments.output_dir / "report"
    drawings = report_folder / "figures" / SCRIPT
    rows = runs.read_rows(runs.experiments_table(arguments.output_dir, SCRIPT))
    results_file = report_folder / "results" / f"{SCRIPT}.json"
    results = summarise(cards, measured, rows)
    if arguments.model and results_file.exists():  # the other models keep their results
        earlier = json.loads(results_file.read_text())
        results |= {key: {**earlier[key], **results[key]} for key in ("models", "pictures")}
    write_json(results_file, results)
    written = [results_file]
    if rows:
        written += [draw_factors(rows, network, drawings) for network in NETWORKS]
    if any(row["dataset"] == "cifar" for row in rows):
        examples = {
            name: load_splits(name, arguments.data_dir, quick=True)[0]["train"].images[:6] for name in DATASET_NAMES
        }
        written += [draw_transfer(rows, drawings), draw_between(rows, examples, drawings)]
    if not arguments.model:
        shown = {}
        for dataset_name, model in (("fashion", "fashion_cnn_best"), ("cifar", "cifar_cnn_1")):
            splits, dataset = loaded[dataset_name]
            probabilities = predict(networks[model], splits["test"].images)
            shown[dataset_name] = (splits["test"], probabilities, dataset.class_names)
            written.append(draw_confusion(dataset_name, splits["test"], probabilities, dataset.class_names, drawings))
        filters = {
            "Fashion-MNIST, reference MLP: what a hidden unit looks for": networks["fashion_mlp_reference"],
            "Fashion-MNIST, reference CNN: first filters": networks["fashion_cnn_reference"],
            "CIFAR-10, cifar_mlp_1": networks["cifar_mlp_1"],
            "CIFAR-10, cifar_cnn_1: first filters": networks["cifar_cnn_1"],
        }
        written += [
            draw_learning_curves(cards, drawings),
            draw_mistakes(shown, drawings),
            draw_filters(filters, drawings),
        ]
    print("\nwrote", *written, sep="\n  ")


def main(argv=None):
    arguments = cli.parse(cli.parser(__doc__, MODELS), argv)
    if arguments.experiments:
        run_experiments(arguments)
        return
    if arguments.train:
        train(arguments)
    report(arguments)


if __name__ == "__main__":
    cli.run(main)
