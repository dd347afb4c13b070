"""The planned comparisons of cifar100_transfer.py: the fields of a config that each one changes.

Networks of our own start from `Config()`, the baseline, and see 12,500 training images for five epochs; classifiers on
VGG16 start from `VggConfig()`. All are measured on the 5,000 validation images.
"""

IMAGES = 12_500  # always the same ones, in random order
TUNED_BLOCK = {
    "trained": "top block",
    "standardize": True,
    "hidden": (1024,),
    "dropout": 0.5,
    "learning_rate": 1e-4,
    "weight_decay": 0.01,
    "epochs": 6,
}
WIDE_HEAD = {"standardize": True, "hidden": (1024,), "dropout": 0.5}

VGG = {
    # Three iterations of the head: nothing but a classifier; the features on one scale; a hidden layer with dropout.
    "head 1: softmax": {},
    "head 2: standardised features": {"standardize": True},
    "head 3: hidden layer": WIDE_HEAD,
    "head 3, mirrored features": {**WIDE_HEAD, "mirrored": True, "epochs": 10},
    "tuned block": TUNED_BLOCK,
    "tuned block, mirrored features": {**TUNED_BLOCK, "mirrored": True, "epochs": 3},  # twice the images: as many steps
    "tuned block, usual learning rate": {**TUNED_BLOCK, "learning_rate": 1e-3},
}
ALL_IMAGES = [name for name in VGG if name.startswith("head")]  # frozen features are cheap to train on

OWN = {
    "baseline": {},
    "no shortcuts": {"residual": False},
    "no augmentation": {"augmentation": ()},
    "separable convolutions": {"separable": True},
    "no normalisation": {"batch_norm": False},
    "no label smoothing": {"label_smoothing": 0.0},
    "plateau schedule": {"schedule": "plateau"},
    "SGD with momentum": {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 5e-3},
    "Muon": {"optimizer": "muon", "learning_rate": 0.1},
    "Muon, twice the rate": {"optimizer": "muon", "learning_rate": 0.2},
    "batches of 512": {"batch_size": 512, "learning_rate": 4e-3},
    "averaged weights": {"averaging": 0.98},
    "whitening": {"whitening": True},
    "alternating mirror": {"augmentation": ("alternate", "shift")},
    "small images first": {"small_size": 24, "small_epochs": 2},
    "dropout": {"dropout": 0.3},
    "2 more epochs": {"tuned_size": 32, "tuned_epochs": 2},
    "2 more epochs at 48 x 48": {"tuned_size": 48, "tuned_epochs": 2},
    "20 superclasses": {"classes": 20},
    "50 classes": {"classes": 50, "epochs": 10},  # half the images: as many steps
    "25 classes": {"classes": 25, "epochs": 20},
}
EXPERIMENTS = {**OWN, **VGG}
NUM_SEEDS, NUM_BASELINE_SEEDS = 2, 5


def planned_runs(seed):
    """Returns every run in order: the baseline, then each experiment with the first seed, then with the next one."""
    baseline = [("baseline", seed + number) for number in range(NUM_BASELINE_SEEDS)]
    others = [(name, seed + number) for number in range(NUM_SEEDS) for name in EXPERIMENTS if name != "baseline"]
    return [{"name": name, "seed": each} for name, each in baseline + others]
