"""The planned comparison of fashion_cifar_mlp_cnn.py: what is changed, with which budget, and what goes to CIFAR-10.

A configuration is "reference" or "<factor>: <change>", the reference of the script with the fields changed that stand
here.
"""

import numpy as np


def _optimizers(**learning_rates):
    return {
        f"{name} {rate:g}": {"optimizer": name, "learning_rate": rate}
        for name, rates in learning_rates.items()
        for rate in rates
    }


SHARED = {
    "initialisation": {
        "He": {"initializer": "he_normal"},
        "LeCun": {"initializer": "lecun_normal"},
        "normal with deviation 1, bad on purpose": {"initializer": "unit_normal"},
    },
    "activation": {name: {"activation": name} for name in ("elu", "selu", "silu", "gelu", "tanh", "sigmoid")},
}
SINGLE_CHANGES = {
    "mlp": {
        **SHARED,
        "optimiser": _optimizers(
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
        **SHARED,
        "optimiser": _optimizers(
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
# Chosen after the single changes with the first seed: what helped most on validation images, combined step by step.
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


def _named(factors):
    return {f"{factor}: {name}": change for factor, changes in factors.items() for name, change in changes.items()}


EXPERIMENTS = {
    network: _named({**SINGLE_CHANGES[network], "together": TOGETHER[network]}) for network in SINGLE_CHANGES
}

# A short run: epochs, and how many of the training images, always the same ones (None: all).
SHORT = {"mlp": {"epochs": 6, "images": None}, "cnn": {"epochs": 4, "images": 10_000}}
NUM_SEEDS = 2  # of a short run
ONE_SEED = {"mlp": (), "cnn": tuple(_named(SINGLE_CHANGES["cnn"]))}  # those of the CNN take most of the time

# The five configurations of each kind with the best short runs, in the order of their validation accuracy with the full
# training budget: the first one is the best network of Fashion-MNIST, the first three are trained on CIFAR-10.
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

REFERENCE_SEEDS = {"mlp": 3, "cnn": 1}  # of the references on CIFAR-10, to see what tuning gains there
NUM_TRANSFERRED = 8  # configurations of each kind whose short runs are repeated on CIFAR-10
SHIFTED_PIXELS = 6
SHIFT_SEED = 10
GREY_WEIGHTS = (0.299, 0.587, 0.114)  # of red, green and blue in brightness, ITU-R BT.601


def rgb_to_grayscale(images):
    """Returns the brightness of colour images: uint8 (n, height, width, 3) to (n, height, width, 1)."""
    return np.rint(images @ np.array(GREY_WEIGHTS, "float32")).astype("uint8")[..., None]


def shift(images, most, generator):
    """Moves each image by up to `most` pixels in both directions; what comes in from outside is black."""
    side = images.shape[1]
    padded = np.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    down, right = generator.integers(0, 2 * most + 1, (2, len(images), 1))
    number = np.arange(len(images))[:, None, None]
    return padded[number, (down + np.arange(side))[:, :, None], (right + np.arange(side))[:, None, :]]


def put_on_photographs(images, photographs):
    """Fills the black pixels of clothes with the centre of a grey CIFAR-10 image; `photographs` are reused in turn."""
    margin = (photographs.shape[1] - images.shape[1]) // 2
    inside = slice(margin, margin + images.shape[1])
    backgrounds = rgb_to_grayscale(photographs[np.arange(len(images)) % len(photographs), inside, inside])
    return np.where(images > 0, images, backgrounds)


# Between the two datasets lie three of our own, each with one of the things that make CIFAR-10 harder: the dataset that
# the images come from, how they are changed, with images of CIFAR-10 at hand, and its name in figures.
DATASETS = {
    "fashion": ("fashion", None, "Fashion-MNIST"),
    "fashion shifted": (
        "fashion",
        lambda images, _: shift(images, SHIFTED_PIXELS, np.random.default_rng(SHIFT_SEED)),
        "Fashion-MNIST, shifted",
    ),
    "fashion cluttered": ("fashion", put_on_photographs, "Fashion-MNIST on photographs"),
    "cifar grey": ("cifar", lambda images, _: rgb_to_grayscale(images), "CIFAR-10 in grey"),
    "cifar": ("cifar", None, "CIFAR-10"),
}
