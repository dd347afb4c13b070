"""The experiments of task1_smallnorb_cnn.py, and the branches that lost.

Each change starts from `Config()`, the baseline: the plain branch with 32 filters and all augmentations, two epochs. A
run trains on four of the five folds and is measured on the fifth.
"""

from keras import layers

FULL_BUDGET = "full training budget"  # the factor whose learning curves are kept
EVERY_FOLD = "every fold"  # the factor that is run on all five folds
FOLDS = (4, 7)  # of every other factor
ALL_FOLDS = (4, 6, 7, 8, 9)
AUGMENTATIONS = ("shift", "scale", "rotation", "flip", "brightness", "background", "cutout")

# The augmentations that helped or cost nothing, and are fast enough (see `make bench`).
FULL = {"augmentations": ("shift", "scale", "rotation", "flip", "background"), "epochs": 20}
FINAL = {**FULL, "elevation_loss": "expectation", "elevation_weight": 0.5, "epochs": 6}

EXPERIMENTS = {
    "baseline": {"baseline": {}},
    "views": {"left view only": {"views": 1}},
    "image size": {"64 x 64": {"image_size": 64}},
    "input": {
        "not standardised": {"standardize": False},
        "local contrast channels": {"local_contrast": (5, 13)},
    },
    "augmentation": {
        "none": {"augmentations": ()},
        **{f"{name} alone": {"augmentations": (name,)} for name in AUGMENTATIONS},
    },
    "architecture": {
        "residual": {"branches": ("residual",)},
        "separable": {"branches": ("separable",)},
        "convnext": {"branches": ("convnext",)},
    },
    "width": {"width 16": {"width": 16}, "width 48": {"width": 48}},
    "heads": {"category only": {"outputs": ("category",)}, "elevation only": {"outputs": ("elevation",)}},
    "elevation loss": {
        "mean squared error": {"elevation_loss": "mse"},
        "Huber": {"elevation_loss": "huber"},
        "expectation of 9 classes": {"elevation_loss": "expectation"},
    },
    "optimizer": {
        "Nadam": {"optimizer": "nadam"},
        "SGD, momentum": {"optimizer": "sgd", "learning_rate": 0.05},
    },
    "learning rate": {"constant": {"schedule": "constant"}},
    "regularisation": {
        "no weight decay": {"weight_decay": 0.0},
        "weight decay 0.1": {"weight_decay": 0.1},
        "no dropout": {"dropout": 0.0},
        "dropout 0.5": {"dropout": 0.5},
        "no label smoothing": {"label_smoothing": 0.0},
    },
    FULL_BUDGET: {
        "20 epochs": FULL,
        "20 epochs, expectation of 9 classes": {**FULL, "elevation_loss": "expectation"},
    },
    # Which fold is held out matters more than any setting, so two branches, and both side by side in a network of about
    # as many parameters as a network of each can have, are compared on all of them.
    EVERY_FOLD: {
        "6 epochs, 48 filters, plain": {**FINAL, "branches": ("plain",), "width": 48},
        "6 epochs, 48 filters, convnext": {**FINAL, "branches": ("convnext",), "width": 48},
        "6 epochs, 40 filters, plain+convnext": {**FINAL, "branches": ("plain", "convnext"), "width": 40},
    },
}

LABELS = {  # what a figure calls an experiment, where that is not its name
    "convnext": "ConvNeXt",
    "width 16": "16 filters",
    "width 48": "48 filters",
    "6 epochs, 48 filters, plain": "plain CNN",
    "6 epochs, 48 filters, convnext": "ConvNeXt",
    "6 epochs, 40 filters, plain+convnext": "both branches",
}


def planned_runs(seed):
    """Returns every run in order, a list of dicts; the folds of a config follow each other, to be comparable early."""
    return [
        {"factor": factor, "name": name, "fold": fold, "seed": seed}
        for factor, changes in EXPERIMENTS.items()
        for name in changes
        for fold in (ALL_FOLDS if factor == EVERY_FOLD else FOLDS)
    ]


def labels(every_fold):
    """Returns what figures call the experiments: a dict from (factor, name), of `EVERY_FOLD` or of all others."""
    return {
        (factor, name): LABELS.get(name, name)
        if factor in (name, EVERY_FOLD)
        else f"{factor}: {LABELS.get(name, name)}"
        for factor, changes in EXPERIMENTS.items()
        for name in changes
        if (factor == EVERY_FOLD) == every_fold
    }


def convolution(filters, kernel_size, **keywords):
    return layers.Conv2D(filters, kernel_size, padding="same", kernel_initializer="he_normal", **keywords)


def build_residual(features, width):
    """Three residual blocks, each followed by a pooling (He et al. 2016). Shapes as in `build_plain`."""
    features = convolution(width, 5, strides=2, activation="relu")(features)
    for filters in (width, 2 * width, 4 * width):
        shortcut = convolution(filters, 1, use_bias=False)(features)
        features = convolution(filters, 3, use_bias=False)(features)
        features = layers.BatchNormalization()(features)
        features = layers.ReLU()(features)
        features = convolution(filters, 3, use_bias=False)(features)
        features = layers.BatchNormalization()(features)
        features = layers.Add()([features, shortcut])
        features = layers.ReLU()(features)
        features = layers.MaxPooling2D(2)(features)
    return features


def build_separable(features, width):
    """`build_plain` with depthwise-separable convolutions (Chollet 2017): a ninth of the multiplications."""
    features = convolution(width, 5, strides=2, activation="relu")(features)
    for filters in (width, 2 * width, 4 * width):
        features = layers.SeparableConv2D(filters, 3, padding="same", activation="relu")(features)
        features = layers.SeparableConv2D(filters, 3, padding="same", use_bias=False)(features)
        features = layers.MaxPooling2D(2)(features)
        features = layers.BatchNormalization()(features)
        features = layers.ReLU()(features)
    return features


BRANCHES = {"residual": build_residual, "separable": build_separable}
