"""Two reference networks of Géron's book, tuned on Fashion-MNIST and transferred to CIFAR-10.

The multi-layer perceptron (MLP) of chapter 10 and the convolutional network (CNN) of chapter 14 of "Hands-On Machine
Learning with Scikit-Learn, Keras and TensorFlow" (2nd edition, 2019) are trained as they stand in the book. Then one
thing at a time is changed: initialisation, activation, optimiser, regularisation, layers. What helped is combined, and
the three best configurations of each kind are trained on CIFAR-10, to see whether they are the best ones there too.

    python fashion_cifar_mlp_cnn.py --train          trains ten networks, three seeds each
    python fashion_cifar_mlp_cnn.py --load           restores the saved networks and verifies their metrics
    python fashion_cifar_mlp_cnn.py --experiments    the tuning, on validation images; can be stopped and resumed
    python fashion_cifar_mlp_cnn.py --predict FILE...  prints the most probable CIFAR-10 classes of each image, or with
                                                     --model fashion_cnn_best of bright clothes on black

A tenth of the training images, the same one in every run, is held out for validation, and every choice is made there.
The test images are read for the saved networks alone.

Test accuracy, mean ± standard deviation over 3 seeds, 1 to 12 minutes per training run on 2 cores of an Intel Xeon with
bfloat16 instructions. Fashion-MNIST: MLP 87.82 ± 0.03 %, tuned 89.85 ± 0.02 %; CNN 89.50 ± 0.39 %, tuned 93.43 ±
0.04 %. CIFAR-10: best of three MLPs 53.39 ± 0.16 %, of three CNNs 84.69 ± 0.30 %.
"""

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
import math
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers
from scipy.stats import spearmanr
from sklearn.metrics import confusion_matrix, log_loss
from sklearn.model_selection import train_test_split

from common import cli, models, results, training
from common.datasets import LabelledImages, load_cifar10, load_fashion_mnist
from common.images import predict_each, printable, read_square
from common.metrics import confident_mistakes, most_probable, standard_deviation

SCRIPT = "fashion_cifar_mlp_cnn"
LOADERS = {"fashion": load_fashion_mnist, "cifar": load_cifar10}
DATASET_NAMES = {"fashion": "Fashion-MNIST", "cifar": "CIFAR-10"}
NUM_CLASSES = 10
NUM_SEEDS = 3
SPLIT_SEED = 10
PREDICT_BATCH_SIZE = 500
QUICK_IMAGES = 96  # of every split
MAX_SHIFT = 0.1  # of the image's side, as augmentation


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that an experiment varies; the defaults are the MLP of the book, chapter 10, pages 299 to 307."""

    filters: tuple = ()  # of each stage of convolutions, which ends with max pooling; no stages make an MLP
    first_kernel: int = 7  # side of the filters of the first stage, which has one convolution
    kernel: int = 3  # side of all later filters
    convolutions: int = 2  # per stage after the first
    hidden: tuple = (300, 100)  # units of each hidden dense layer
    activation: str = "relu"  # of every hidden layer
    initializer: str = "glorot_uniform"  # of every kernel, a name that Keras knows, or "unit_normal"
    optimizer: str = "sgd"  # key of `OPTIMIZERS`
    learning_rate: float = 0.01  # constant, or the highest one of the schedule
    schedule: str = "constant"  # or "cosine" (with warm-up)
    l1: float = 0.0  # weight of the penalty on the absolute values of every kernel
    l2: float = 0.0  # the same of their squares
    dropout: float = 0.0  # rate after every hidden dense layer
    batch_norm: str = "none"  # "layers": before every activation (Ioffe & Szegedy 2015); "stages": after pooling only
    standardize: bool = False  # each pixel to mean 0 and standard deviation 1, as the book's CNN; else divided by 255
    augmentation: tuple = ()  # out of "flip" (horizontal) and "shift" (up to `MAX_SHIFT`, whole pixels: no blur)
    batch_size: int = 32  # images per step
    epochs: int = 30  # with the full training budget


BOOK_CNN = Config(  # chapter 14, page 447
    (64, 128, 256), hidden=(128, 64), optimizer="nadam", learning_rate=0.001, dropout=0.5, standardize=True, epochs=10
)
TUNED_MLP = Config(hidden=(500, 200), optimizer="adam", learning_rate=0.001, schedule="cosine", epochs=15)
TUNED_CNN = dataclasses.replace(
    BOOK_CNN, first_kernel=3, schedule="cosine", dropout=0.25, batch_norm="stages", standardize=False
)
CONFIGS = {  # of the saved models, by kind of network and by the name that the experiments give to a configuration
    "mlp": {
        "reference": Config(),
        "together: Adam, cosine, 500, 200": TUNED_MLP,
        "together: Adam, cosine, 500, 200, standardised": dataclasses.replace(TUNED_MLP, standardize=True),
        "together: Adam, cosine": dataclasses.replace(TUNED_MLP, hidden=(300, 100)),
    },
    "cnn": {
        "reference": BOOK_CNN,
        "together: cosine, norm, 3 x 3, divided by 255, flip": dataclasses.replace(TUNED_CNN, augmentation=("flip",)),
        "together: cosine, norm, 3 x 3, divided by 255": TUNED_CNN,
        "together: cosine, norm, 3 x 3, divided by 255, half, flip": dataclasses.replace(
            TUNED_CNN, filters=(32, 64, 128), augmentation=("flip",)
        ),
    },
}
MODELS = {  # dataset, kind of network, configuration
    "fashion_mlp_reference": ("fashion", "mlp", "reference"),
    "fashion_cnn_reference": ("fashion", "cnn", "reference"),
    "fashion_mlp_best": ("fashion", "mlp", "together: Adam, cosine, 500, 200"),
    "fashion_cnn_best": ("fashion", "cnn", "together: cosine, norm, 3 x 3, divided by 255, flip"),
    "cifar_mlp_1": ("cifar", "mlp", "together: Adam, cosine, 500, 200"),
    "cifar_mlp_2": ("cifar", "mlp", "together: Adam, cosine, 500, 200, standardised"),
    "cifar_mlp_3": ("cifar", "mlp", "together: Adam, cosine"),
    "cifar_cnn_1": ("cifar", "cnn", "together: cosine, norm, 3 x 3, divided by 255, flip"),
    "cifar_cnn_2": ("cifar", "cnn", "together: cosine, norm, 3 x 3, divided by 255"),
    "cifar_cnn_3": ("cifar", "cnn", "together: cosine, norm, 3 x 3, divided by 255, half, flip"),
}
BEST = {"fashion": "fashion_cnn_best", "cifar": "cifar_cnn_1"}  # chosen on validation images
OPTIMIZERS = {
    "sgd": keras.optimizers.SGD,
    "nesterov": lambda rate: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True),
    "rmsprop": keras.optimizers.RMSprop,
    "adam": keras.optimizers.Adam,
    "nadam": keras.optimizers.Nadam,
    "adamw": lambda rate: keras.optimizers.AdamW(rate, weight_decay=0.01),
}

# ---------------------------------------------------------------------------------------------------------------- data


def load_splits(name, data_dir, *, sample=False, quick=False):
    """Loads a dataset and holds out a tenth of its training images for validation.

    Args:
        name: key of `LOADERS`.
        sample: use the images in data/samples/.
        quick: take only `QUICK_IMAGES` of each split.

    Returns a dict of `LabelledImages`, "train" in random order, "validation" with as many images of each class, "test";
    and the `common.datasets.Dataset`.
    """
    dataset = LOADERS[name](data_dir, sample=sample)
    labels = np.asarray(dataset.train.labels)
    parts = train_test_split(np.arange(len(labels)), test_size=0.1, random_state=SPLIT_SEED, stratify=labels)
    count = QUICK_IMAGES if quick else None
    splits = {
        part: LabelledImages(dataset.train.images[chosen[:count]], labels[chosen[:count]])
        for part, chosen in zip(("train", "validation"), parts, strict=True)
    }
    splits["test"] = LabelledImages(*(np.asarray(array[:count]) for array in dataset.test))
    return splits, dataset


def load_changed_splits(source, change, data_dir, **options):
    """Returns the splits of a dataset (key of `LOADERS`) after a `change` of the experiments, or unchanged for None."""
    splits, _ = load_splits(source, data_dir, **options)
    if change is None:
        return splits
    photographs, _ = load_splits("cifar", data_dir, **options)
    return {
        part: split._replace(images=change(split.images, photographs[part].images)) for part, split in splits.items()
    }


# --------------------------------------------------------------------------------------------------------------- model


def build_network(config, image_shape, images=None):
    """Builds the MLP or the CNN that a config describes.

    A standardising network takes each pixel's mean and deviation from `images`, uint8 (n, *image_shape); without them
    they are left to be restored. Returns a functional model from images in the uint8 range to class probabilities.
    """
    initializer = config.initializer
    if initializer == "unit_normal":
        initializer = keras.initializers.RandomNormal(stddev=1.0)

    def hidden(features, layer, *arguments, **keywords):
        """A layer with weights, normalised if the config says so, and its activation."""
        regularizer = keras.regularizers.L1L2(config.l1, config.l2) if config.l1 or config.l2 else None
        keywords |= {"kernel_initializer": initializer, "kernel_regularizer": regularizer}
        features = layer(*arguments, use_bias=config.batch_norm != "layers", **keywords)(features)
        if config.batch_norm == "layers":
            features = layers.BatchNormalization()(features)
        return layers.Activation(config.activation)(features)

    inputs = keras.Input(image_shape, name="images")
    if config.standardize:
        # In full precision, whatever the rest computes in: most of a pixel's range would be lost in rounding.
        standardize = layers.Normalization(axis=(1, 2, 3), dtype="float32", name="standardize")
        if images is not None:
            standardize.adapt(images)
        features = standardize(inputs)
    else:
        features = layers.Rescaling(1 / 255)(inputs)
    for stage, filters in enumerate(config.filters):
        for _ in range(config.convolutions if stage else 1):
            kernel = config.kernel if stage else config.first_kernel
            features = hidden(features, layers.Conv2D, filters, kernel, padding="same")
        features = layers.MaxPooling2D(2)(features)
        if config.batch_norm == "stages":
            features = layers.BatchNormalization()(features)
    features = layers.Flatten()(features)
    for units in config.hidden:
        features = hidden(features, layers.Dense, units)
        if config.dropout:
            features = layers.Dropout(config.dropout)(features)
    # Softmax in full precision, so that small probabilities survive.
    probabilities = layers.Dense(
        NUM_CLASSES, activation="softmax", kernel_initializer=initializer, dtype="float32", name="probabilities"
    )(features)
    return keras.Model(inputs, probabilities)


# ------------------------------------------------------------------------------------------------- losses and training


def training_precision(config):
    """Returns the dtype policy; in an MLP this small, converting between precisions costs more than it saves."""
    return training.fast_precision() if config.filters else "float32"


def augment(images, config, seed):
    """Applies the augmentation layers of a config to a symbolic tensor."""
    if "flip" in config.augmentation:
        images = layers.RandomFlip("horizontal", seed=seed)(images)
    if "shift" in config.augmentation:
        translation = layers.RandomTranslation(MAX_SHIFT, MAX_SHIFT, "nearest", interpolation="nearest", seed=seed)
        translation.supports_jit = True  # Keras denies it of this layer, and would run every step uncompiled under JAX
        images = translation(images)
    return images


def train_network(config, split, seed, *, folder, resume, validation=None):
    """Trains one network from scratch, or resumes it from its checkpoint in `folder`.

    Returns the network in float32 with weights rounded to bfloat16, its learning curves, and seconds. Raises
    `training.Diverged` where the loss is no longer finite.
    """
    keras.utils.set_random_seed(seed)
    image_shape = split.images.shape[1:]
    steps = training.count_steps(len(split.images), config)
    with training.computing_in(training_precision(config)) as precision:
        network = build_network(config, image_shape, split.images)
    images = keras.Input(image_shape)
    model = keras.Model(images, network(augment(images, config, seed)))
    learning_rate = config.learning_rate
    if config.schedule == "cosine":
        learning_rate = training.cosine_schedule(learning_rate, steps)
    model.compile(
        OPTIMIZERS[config.optimizer](learning_rate),
        loss="sparse_categorical_crossentropy",
        metrics=[keras.metrics.SparseCategoricalAccuracy("accuracy")],
        **training.compile_options(steps),
    )
    curves, seconds = training.fit(
        model,
        split.images,
        split.labels,
        config=config,
        seed=seed,
        folder=folder,
        resume=resume,
        precision=precision,
        validation_data=validation and tuple(validation),
    )
    full_precision = build_network(config, image_shape)
    models.set_weights(full_precision, network.get_weights())
    models.round_weights(full_precision, "bfloat16")  # ten models shall fit into 25 MB
    return full_precision, curves, seconds


def train(arguments):
    """Trains the wanted networks with several seeds each, and saves the first seed's with its card.

    The test images are read after the last training run.
    """
    options = {"sample": arguments.sample, "quick": arguments.quick}
    loaded, trained = {}, {}
    seeds = dict.fromkeys([arguments.model] if arguments.model else MODELS, NUM_SEEDS)
    for model, seed, folder in results.training_runs(SCRIPT, arguments, list(seeds), seeds):
        dataset_key, kind, configuration = MODELS[model]
        if dataset_key not in loaded:
            loaded[dataset_key] = load_splits(dataset_key, arguments.data_dir, **options)
        splits, _ = loaded[dataset_key]
        config = cli.with_flags(CONFIGS[kind][configuration], arguments)
        keywords = {"folder": folder, "resume": arguments.resume, "validation": splits["validation"]}
        run = train_network(config, splits["train"], seed, **keywords)
        trained.setdefault(model, []).append((seed, config, *run))

    folder = arguments.output_dir / "saved_models" / SCRIPT
    for model, runs in trained.items():
        dataset_key, _, configuration = MODELS[model]
        splits, dataset = loaded[dataset_key]
        sample, _ = load_splits(dataset_key, arguments.data_dir, sample=True, quick=arguments.quick)
        splits = {**splits, "sample": sample["test"]}
        measured = [evaluate(network, splits) for _, _, network, _, _ in runs]
        seed, config, network, curves, seconds = runs[0]
        card = models.card(
            SCRIPT,
            model,
            arguments,
            config=config,
            seed=seed,
            dataset={
                "name": dataset.name,
                **{part: len(split.images) for part, split in splits.items()},
                "sha256": dataset.checksums,
            },
            curves=curves,
            seconds=seconds,
            metrics=measured[0],
        )
        card |= {
            "configuration": configuration,
            "training_precision": training_precision(config),
            "seeds": [{"seed": run[0], **metrics} for run, metrics in zip(runs, measured, strict=True)],
        }
        models.save_model(network, folder / f"{model}.keras", card)


# --------------------------------------------------------------------------------------------------------- experiments


class Run(NamedTuple):
    """One training run of the experiments."""

    dataset: str  # key of `DATASETS` of the experiments
    network: str  # "mlp" or "cnn"
    budget: str  # "short" or "full"
    name: str  # key of `configurations(network)`
    seed: int


def configurations(network, plan):
    """Returns all configs of a kind of network that `plan`, the module of experiments, compares: dict from name."""
    reference = CONFIGS[network]["reference"]
    changes = {"reference": {}, **plan.EXPERIMENTS[network]}
    return {name: dataclasses.replace(reference, **change) for name, change in changes.items()}


def tuning_runs(plan, first_seed):
    """Returns the runs on Fashion-MNIST: all configurations briefly, the finalists with the full training budget."""
    return [
        Run("fashion", network, "short", name, seed)
        for seed in range(first_seed, first_seed + plan.NUM_SEEDS)
        for network in CONFIGS
        for name in configurations(network, plan)
        if seed == first_seed or name not in plan.ONE_SEED[network]
    ] + [
        Run("fashion", network, "full", name, seed)
        for network in CONFIGS
        for name in ("reference", *plan.FINALISTS[network])
        for seed in range(first_seed, first_seed + NUM_SEEDS)
    ]


def transfer_runs(plan, table, first_seed):
    """Returns the runs on the other datasets: short ones, chosen by the ranking in `table`, and the references."""
    runs = []
    for seed in range(first_seed, first_seed + plan.NUM_SEEDS):
        for network in CONFIGS:
            candidates = transfer_candidates(table, network, plan.NUM_TRANSFERRED)
            runs += [Run("cifar", network, "short", name, seed) for name in candidates]
            between = [name for name in plan.DATASETS if name not in LOADERS]  # where the best one alone is trained
            runs += [Run(name, network, "short", candidates[0], seed) for name in between]
    for network, count in plan.REFERENCE_SEEDS.items():
        runs += [Run("cifar", network, "full", "reference", seed) for seed in range(first_seed, first_seed + count)]
    return runs


def transfer_candidates(table, network, count):
    """Returns the names of the configurations to repeat on CIFAR-10: evenly spread over the ranking, best first."""
    names = ranking(table, "fashion", network, "short").index
    return list(names[np.linspace(0, len(names) - 1, min(count, len(names))).round().astype(int)])


def read_experiments(arguments):
    """Returns the experiment table, a `pandas.DataFrame`; with `--load` that of the repository where there is none."""
    path = results.recorded_path(arguments, f"{SCRIPT}_experiments.csv")
    return results.read_table(path, numbers=("seconds", "validation_accuracy"), texts=Run._fields)


def ranking(table, dataset, network, budget):
    """Ranks configurations by their validation accuracy.

    Returns a `pandas.DataFrame` indexed by name, the best one first, with the columns mean, std, seeds (number) and
    accuracies (list, one per seed).
    """
    chosen = table[(table["dataset"] == dataset) & (table["network"] == network) & (table["budget"] == budget)]
    groups = chosen.groupby("name", sort=False)["validation_accuracy"]
    columns = {"mean": "mean", "std": standard_deviation, "seeds": "count", "accuracies": list}
    return groups.agg(**columns).sort_values("mean", ascending=False, kind="stable")


def compare_datasets(table, network):
    """Returns the configurations trained briefly on both datasets, best on Fashion-MNIST first.

    The columns of the `pandas.DataFrame` are fashion and cifar (mean accuracies) and rank (on CIFAR-10, from 1).
    """
    fashion, cifar = (ranking(table, dataset, network, "short")["mean"] for dataset in LOADERS)
    both = fashion.to_frame("fashion").join(cifar.rename("cifar"), how="inner")
    return both.assign(rank=both["cifar"].rank(ascending=False, method="first").astype(int))


def run_experiments(arguments):
    """Trains what the experiments plan, one row of the table for each run, and measures it on the validation images."""
    plan = results.optional_module("experiments", SCRIPT)
    if plan is None:
        return
    planned = tuning_runs(plan, arguments.seed)
    if arguments.quick:  # one of each kind of network
        planned = [run for run in planned if run[2:] == ("short", "reference", arguments.seed)]
    perform(planned, plan, arguments)
    if not arguments.quick:
        perform(transfer_runs(plan, read_experiments(arguments), arguments.seed), plan, arguments)


def perform(planned, plan, arguments):
    """Performs those of the `planned` runs that the table lacks."""
    path = results.table_path(arguments.output_dir, SCRIPT)
    options = {"sample": arguments.sample, "quick": arguments.quick}
    loaded = {}
    for values in results.unfinished(path, [run._asdict() for run in planned]):
        run = Run(**values)
        if run.dataset not in loaded:
            source, change, _ = plan.DATASETS[run.dataset]
            loaded[run.dataset] = load_changed_splits(source, change, arguments.data_dir, **options)
        splits = loaded[run.dataset]
        config, split = configurations(run.network, plan)[run.name], splits["train"]
        if run.budget == "short":
            short = plan.SHORT[run.network]
            config = dataclasses.replace(config, epochs=short["epochs"])
            split = LabelledImages(*(array[: short["images"]] for array in split))
        config = cli.with_flags(config, arguments)
        folder = arguments.output_dir / "runs" / SCRIPT / "experiment"
        try:
            network, curves, seconds = train_network(
                config, split, run.seed, folder=folder, resume=False, validation=splits["validation"]
            )
            measured = {
                "parameters": models.parameter_counts(network)["trainable"],
                "seconds": round(seconds, 1),
                "train_accuracy": round(curves["accuracy"][-1], 5),
                "validation_accuracy": round(curves["val_accuracy"][-1], 5),
                "validation_loss": round(curves["val_loss"][-1], 5),
            }
        except training.Diverged:  # is a result: such a network can only guess
            guess = {"train_accuracy": 1 / NUM_CLASSES, "validation_accuracy": 1 / NUM_CLASSES}
            measured = {"parameters": "", "seconds": 0, **guess, "validation_loss": ""}
        results.append_row(path, {**values, **dataclasses.asdict(config), "images": len(split.images), **measured})


# ---------------------------------------------------------------------------------------------------------- evaluation


def predict(network, images):
    """Returns class probabilities, float32 (n, 10), for images in the uint8 range."""
    fast = models.for_prediction(network, len(images))
    return fast.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)


def classification_metrics(probabilities, labels):
    """Returns accuracy (0 to 1) and mean cross-entropy."""
    return {
        "accuracy": float(np.mean(probabilities.argmax(1) == labels)),
        "loss": float(log_loss(labels, probabilities, labels=range(NUM_CLASSES))),
    }


def evaluate(network, splits):
    """Returns the metrics of a network on every part of `splits`: dict from part to dict."""
    return {
        part: classification_metrics(predict(network, split.images), split.labels) for part, split in splits.items()
    }


def images_of_mistakes(split, probabilities, class_names, count):
    """Returns the misclassified images that the network is most confident of, titles, and the lowest confidence."""
    predicted, chosen = probabilities.argmax(1), confident_mistakes(probabilities, split.labels, count)
    titles = [f"{class_names[split.labels[index]]}\n{class_names[predicted[index]]}?" for index in chosen]
    return split.images[chosen], titles, probabilities[chosen].max(axis=1).min()


def first_layer_kernels(network, count=16):
    """Returns the weights of the first layer as images, each scaled to its own range: uint8 (count, ...)."""
    layer = next(layer for layer in network.layers if isinstance(layer, (layers.Conv2D, layers.Dense)))
    weights = np.asarray(layer.get_weights()[0])
    if weights.ndim == 2:
        weights = weights.reshape(*network.input_shape[1:], -1)
    kernels = np.moveaxis(weights, -1, 0)[:count]
    low, high = np.quantile(kernels, [0.01, 0.99], axis=(1, 2, 3), keepdims=True)
    return np.rint(np.clip((kernels - low) / (high - low), 0, 1) * 255).astype("uint8")


# -------------------------------------------------------------------------------------------------------------- report


def summarise(cards, measured, table, plan):
    """Returns what `report/results/fashion_cifar_mlp_cnn.json` holds.

    Args:
        cards, measured: dicts from model to its card and to its metrics on the test images.
        table: the experiment table.
        plan: the module of experiments, or None.
    """
    of_models, sizes = {}, {}
    for model, card in cards.items():
        parts = ("train", "validation", "test")
        accuracies = {part: [100 * run[part]["accuracy"] for run in card["seeds"]] for part in parts}
        of_models[model] = {
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
        sizes[MODELS[model][0]] = {part: card["dataset"][part] for part in parts}
    experiments, transfer = {}, {}
    for dataset, network, budget in sorted(set(zip(*(table[name] for name in Run._fields[:3]), strict=True))):
        ranked = ranking(table, dataset, network, budget).drop(columns="accuracies")
        experiments.setdefault(dataset, {}).setdefault(network, {})[budget] = ranked.to_dict("index")
    for network in CONFIGS:
        both = compare_datasets(table, network)
        if len(both) > 2:
            correlation = float(spearmanr(both["fashion"], both["cifar"]).statistic)
            transfer[network] = {"rank_correlation": correlation, "configurations": len(both)}
    short = plan.SHORT.items() if plan else ()
    return {
        "script": f"{SCRIPT}.py",
        "models": of_models,
        "pictures": sizes,
        "short": {network: {"epochs": each["epochs"], "pictures": each["images"]} for network, each in short},
        "experiments": experiments,
        "experiment_hours": float(table["seconds"].sum()) / 3600,
        "transfer": transfer,
    }


def experiment_figures(plots, plan, table, summary, loaded, folder):
    """Writes the figures of the experiments, as far as the table goes; returns their paths."""
    written, ranked, between = [], {}, {}
    for network in CONFIGS:
        short = ranking(table, "fashion", network, "short")
        if "reference" in short.index:
            ordered = {name: short["accuracies"][name] for name in configurations(network, plan) if name in short.index}
            title = f"Changes to the {network.upper()} of the book, on Fashion-MNIST"
            path = folder / f"factors_{network}.png"
            written.append(plots.draw_factors(ordered, short.index[:5], short["std"]["reference"], title, path))
        if network in summary["transfer"]:
            both = compare_datasets(table, network)
            # The last one was meant to fail, or does not learn at all, on both datasets.
            correlation = spearmanr(both["fashion"][:-1], both["cifar"][:-1]).statistic
            title = f"{network.upper()}: rank correlation {correlation:.2f} without the last one"
            ranked[title] = both[["rank", "fashion", "cifar"]]
            between[network.upper()] = {
                label: ranking(table, name, network, "short")["accuracies"].get(short.index[0], [])
                for name, (_, _, label) in plan.DATASETS.items()
            }
    if len(ranked) < len(CONFIGS):
        return written
    written.append(plots.draw_transfer(ranked, folder / "transfer.png"))
    if not all(all(accuracies.values()) for accuracies in between.values()):
        return written
    examples = {}
    for source, change, label in plan.DATASETS.values():
        images, photographs = (loaded[name][0]["train"].images[:6] for name in (source, "cifar"))
        examples[label] = change(images, photographs) if change else images
    return [*written, plots.draw_between(between, examples, folder / "between.png")]


def model_figures(plots, networks, cards, probabilities, loaded, folder):
    """Writes the figures of the saved networks; returns their paths."""
    curves = {
        f"{kind.upper()} on Fashion-MNIST": {
            name: [cards[f"fashion_{kind}_{model}"]["curves"][metric] for metric in ("accuracy", "val_accuracy")]
            for name, model in (("book", "reference"), ("tuned", "best"))
        }
        for kind in CONFIGS
    }
    written = [plots.draw_learning_curves(curves, folder / "learning_curves.png")]
    mistakes, confusions = {}, {}
    for dataset_key, model in BEST.items():
        splits, dataset = loaded[dataset_key]
        split, name = splits["test"], DATASET_NAMES[dataset_key]
        predicted = probabilities[model].argmax(1)
        counts = confusion_matrix(split.labels, predicted, labels=range(NUM_CLASSES))
        confusions[f"{name}, best CNN, %"] = counts, dataset.class_names
        *shown, lowest = images_of_mistakes(split, probabilities[model], dataset.class_names, 14)
        confidence = f"with {math.floor(1000 * lowest) / 10:g} % or more"
        mistakes[f"{name}, best CNN: true class; class predicted {confidence}"] = shown
    kernels = {
        "Fashion-MNIST, the book's MLP: weights of 16 hidden units": "fashion_mlp_reference",
        "Fashion-MNIST, the book's CNN: 16 filters of the first layer": "fashion_cnn_reference",
        "CIFAR-10, MLP 1: weights of 16 hidden units": "cifar_mlp_1",
        "CIFAR-10, CNN 1: 16 filters of the first layer": "cifar_cnn_1",
    }
    kernels = {title: first_layer_kernels(networks[model]) for title, model in kernels.items()}
    return [
        *written,
        plots.draw_confusion(confusions, folder / "confusion.png"),
        plots.draw_mistakes(mistakes, folder / "mistakes.png"),
        plots.draw_filters(kernels, folder / "filters.png"),
    ]


def report(arguments):
    """Restores the saved networks, measures them, and writes figures; returns the exit code.

    Results are written after a training run, or to record what was measured.
    """
    models_folder = models.models_folder(arguments.output_dir, SCRIPT)
    part = "sample" if arguments.sample else "test"
    networks, cards, probabilities, measured, loaded, rows, written = {}, {}, {}, {}, {}, [], []
    for model in [arguments.model] if arguments.model else MODELS:
        dataset_key, _, _ = MODELS[model]
        if dataset_key not in loaded:
            options = {"sample": arguments.sample, "quick": arguments.quick}
            loaded[dataset_key] = load_splits(dataset_key, arguments.data_dir, **options)
        splits, dataset = loaded[dataset_key]
        images, labels = splits["test"]
        path = models_folder / f"{model}.keras"
        networks[model], cards[model] = models.load_model(path, SCRIPT, images.shape[1:])
        probabilities[model] = predict(networks[model], images)
        measured[model] = classification_metrics(probabilities[model], labels)
        rows += results.compare(cards[model], measured[model], part=part, size=len(images), sha256=dataset.checksums)
        if arguments.record:
            checksums = None if arguments.sample else dataset.checksums
            results.record_metrics(path, checksums, **{part: (len(images), measured[model])})

    table = read_experiments(arguments)
    plan = results.optional_module("experiments", SCRIPT)
    summary = summarise(cards, measured, table, plan)
    if arguments.train or (arguments.record and not arguments.sample):
        written.append(results.write_results(SCRIPT, arguments, summary, merged=("models", "pictures")))
    plots = results.optional_module("plots", SCRIPT)
    if plots and not arguments.model:  # the figures compare all models
        folder = arguments.output_dir / "report" / "figures" / SCRIPT
        if plan:
            written += experiment_figures(plots, plan, table, summary, loaded, folder)
        written += model_figures(plots, networks, cards, probabilities, loaded, folder)
    return results.conclude(SCRIPT, arguments, rows, written)


def predict_files(arguments):
    """Prints the five most probable classes of each image file; returns whether all could be read."""
    name = arguments.model or BEST["cifar"]
    dataset = LOADERS[MODELS[name][0]](arguments.data_dir, sample=True)
    shape = dataset.test.images.shape[1:]
    network, _ = models.load_model(models.models_folder(arguments.output_dir, SCRIPT) / f"{name}.keras", SCRIPT, shape)

    def predict_file(path):
        image = read_square(path, "RGB" if shape[2] == 3 else "L", shape[0]).reshape(shape)
        print(f"{printable(path)}: {most_probable(predict(network, image[None])[0], dataset.class_names)}")

    return predict_each(arguments.predict, predict_file)


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    flags = cli.parser(__doc__, list(MODELS))
    flags.modes.add_argument("--predict", type=Path, nargs="+", metavar="FILE", help="classify image files")
    arguments = cli.parse(flags, argv)
    if arguments.predict:
        return 0 if predict_files(arguments) else 2
    if arguments.experiments:
        return run_experiments(arguments)
    if arguments.train:
        train(arguments)
    return report(arguments)


if __name__ == "__main__":
    cli.run(main)
