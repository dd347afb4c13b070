"""The planned comparisons of cifar100_transfer.py: the fields of a config that each one changes.

Networks of our own start from `Config()`, the baseline, and see 12,500 training images for five epochs; classifiers on
VGG16 start from `VggConfig()`. All are measured on the 5,000 validation images.
"""

IMAGES = 12_500  # always the same ones, in random order; frozen features are cheap, so heads see all 45,000

HIDDEN = {"standardize": True, "hidden": (1024,), "dropout": 0.5}
HEADS = {  # three iterations: nothing but a classifier; the features on one scale; a hidden layer with dropout
    "head 1: softmax": {},
    "head 2: standardised features": {"standardize": True},
    "head 3: hidden layer": HIDDEN,
    "head 2, mirrored features": {"standardize": True, "mirrored": True, "epochs": 10},  # as many steps
}
BLOCK = {"standardize": True, "trained": "top block", "learning_rate": 1e-4, "weight_decay": 0.01, "epochs": 4}
BLOCK |= {"label_smoothing": 0.1}
TUNED = {
    "tuned block": BLOCK,
    "tuned block, mirrored features": {**BLOCK, "mirrored": True, "epochs": 2},  # as many steps
    "tuned block, ten times the rate": {**BLOCK, "learning_rate": 1e-3},
}
VGG = {**HEADS, **TUNED}
OWN = {  # the questions of the assignment
    "baseline": {},
    "no shortcuts": {"residual": False},
    "no augmentation": {"augmentation": False},
    "separable convolutions": {"separable": True},
    "no normalisation": {"batch_norm": False},
    "no label smoothing": {"label_smoothing": 0.0},
    "dropout": {"dropout": 0.3},
    "plateau schedule": {"schedule": "plateau"},
    "SGD with momentum": {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-3},
    "Muon": {"optimizer": "muon", "learning_rate": 0.1},
}
MUON = OWN["Muon"]
FAST = {  # what is known to pay in short training runs, with the optimiser that pays most
    "Muon, twice the rate": {**MUON, "learning_rate": 0.2},
    "Muon, batches of 256": {**MUON, "batch_size": 256},
    "Muon, whitening": {**MUON, "whitening": True},
    "Muon, maximum at the end": {**MUON, "pooling": "max"},
    "Muon, no shortcuts": {**MUON, "residual": False},
    "Muon, small images first": {**MUON, "small_size": 24, "small_epochs": 2},
    "Muon, 2 more epochs": {**MUON, "tuned_size": 32, "tuned_epochs": 2},
    "Muon, 2 more epochs at 48 x 48": {**MUON, "tuned_size": 48, "tuned_epochs": 2},
}
CLASSES = {  # with as many optimisation steps each
    "20 superclasses": {"classes": 20},
    "50 classes": {"classes": 50, "epochs": 10},
    "25 classes": {"classes": 25, "epochs": 20},
}
EXPERIMENTS = {**OWN, **FAST, **CLASSES, **VGG}
NUM_SEEDS, NUM_BASELINE_SEEDS = 2, 5
COMPARISONS = {  # title -> names, the first one of which is the baseline
    "our own network": list(OWN),
    "number of classes": ["baseline", *CLASSES],
    "our own network with Muon": ["Muon", *FAST],
    "heads on VGG16": list(HEADS),
    "tuned block of VGG16": list(TUNED),
    "ensembles": ["Muon", "ensemble of 4 seeds", "ensemble of 4 designs"],
}
BASELINES = ("baseline", "Muon", "head 1: softmax", "tuned block")

# Means of the probabilities of four runs, named by experiment and seed (relative to that of the ensemble).
ENSEMBLES = {
    "ensemble of 4 seeds": [("Muon", seed) for seed in range(4)],
    "ensemble of 4 designs": [
        (f"Muon{change}", 0) for change in ("", ", whitening", ", no shortcuts", ", maximum at the end")
    ],
}


def num_images(name):
    """Returns the number of training images of an experiment, None for all."""
    return None if name in HEADS else IMAGES


def planned_runs(seed):
    """Returns every run in order: the baselines, then each experiment with the first seed, then with the next one."""
    names = [name for name in EXPERIMENTS if name not in BASELINES]
    runs = [(name, seed + number) for name in BASELINES for number in range(NUM_BASELINE_SEEDS)]
    runs += [(name, seed + number) for number in range(NUM_SEEDS) for name in (*names, *ENSEMBLES)]
    return [{"name": name, "seed": each} for name, each in runs]
