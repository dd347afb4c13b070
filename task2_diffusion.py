"""A diffusion model that generates smallNORB images by category and elevation, such as "airplane from 30 degrees".

A U-Net predicts the velocity from a noisy image, conditioned on the noise level and (with 10 % label dropout) on
category and elevation. Sampling starts from Gaussian noise and denoises it in 30 steps. The method is that of Ho, Jain
& Abbeel 2020 (DDPM) and Song, Meng & Ermon 2021 (DDIM) in continuous time, with the velocity target of Salimans & Ho
2022 and the classifier-free guidance of Ho & Salimans 2022.

    python task2_diffusion.py --train             trains the network and the evaluation classifier, measures samples
    python task2_diffusion.py --load              restores both and verifies their metrics, in half an hour
    python task2_diffusion.py --experiments       the comparison behind the choices
    python task2_diffusion.py --load --category airplane --elevation 30 --samples 64    conditional sampling, no dataset

Good samples look like the training images (Fréchet and kernel distance), show what they are conditioned on (an
evaluation classifier agrees), and are not memorised (nearest training images, and those of held-out images).

10,000 samples, n = 1 seed: Fréchet distance to held-out images 1.31 (training images: 0.10), category agreement 97.5 %,
elevation error 4.29 degrees (held-out images: 1.54). Training took 35 minutes on 2 cores of an Intel Xeon with AMX.
"""

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
import functools
import time
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops

from common import cli, diffusion, metrics, models, results, training
from common.datasets import SMALLNORB_CATEGORIES as CATEGORIES
from common.datasets import SMALLNORB_ELEVATION_DEGREES as DEGREES
from common.datasets import area_average, load_smallnorb
from common.errors import UserError
from common.files import replacing
from common.images import write_grid

SCRIPT = "task2_diffusion"
FEATURE_SCRIPT, FEATURE_MODEL, FEATURE_LAYER = "task1_smallnorb_cnn", "plain", "features"  # the space of the distances
IMAGE_SIZE, IMAGE_SHAPE = 48, (48, 48, 1)
PATCH = 2  # pixels: the network works on patches of 2 x 2, at a quarter of the cost
NUM_LABELS = {"category": len(CATEGORIES), "elevation": len(DEGREES)}  # and the label that stands for "unconditional"
EXPERIMENT_METRICS = ["frechet_distance", "category_agreement", "elevation_mae_degrees"]  # in the results file
NUM_CONDITIONS = len(CATEGORIES) * len(DEGREES)  # and the size of small batches: each size is compiled anew
GREY_MEAN, GREY_DEVIATION = 192, 45  # mean and standard deviation of the training images, rounded
NUM_SAMPLES, NUM_SAMPLES_ON_SAMPLE = 10_000, 90  # generated images that are measured, without and with --sample
SPLIT_SEED, PREDICT_BATCH_SIZE = 2024, 256
QUICK_IMAGES, QUICK_STEPS, QUICK_WIDTHS = 320, 3, (16, 32)


@dataclasses.dataclass(frozen=True)
class Config:
    """The diffusion network and its training."""

    standardized: bool = False  # scale images to mean 0 and deviation 1, like the noise (Chen 2023); else to -1 ... 1
    widths: tuple = (48, 96, 160)  # filters at 24, 12 and 6 patches a side
    blocks: int = 1  # residual blocks per resolution, as many on the way down as on the way up
    attention: bool = True  # self-attention at the coarsest resolution
    target: str = "velocity"  # or "noise"
    loss: str = "mse"  # or "mae"
    average: float = 0.999  # momentum of the moving average of the weights; 0 for none
    learning_rate: float = 2e-3  # the highest one of the schedule
    batch_size: int = 64
    epochs: int = 16


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """The training of the evaluation classifier."""

    batch_size: int = 64
    epochs: int = 6


CONFIGS = {"network": Config(), "judge": ClassifierConfig()}  # "judge" is the evaluation classifier
SAMPLING = diffusion.Sampling("ddpm", steps=30, guidance=2.0, spacing=2.0)
# The noise alone determines the image, on every processor and backend. More steps do not improve it (experiments).
DETERMINISTIC_SAMPLING = diffusion.Sampling("ddim", steps=10, guidance=2.0, spacing=2.0)


# ---------------------------------------------------------------------------------------------------------------- data


class LeftViews(NamedTuple):
    """Images of the left camera."""

    images: np.ndarray  # uint8 (n, 48, 48), 0 to 255
    category: np.ndarray  # int64 (n,), 0 to 4, index into `CATEGORIES`
    elevation: np.ndarray  # int64 (n,), 0 to 8, index into `DEGREES`

    def labels(self):
        return {name: getattr(self, name) for name in NUM_LABELS}


def load_images(data_dir, *, sample=False, quick=False):
    """Loads the left views of smallNORB at 48 x 48, of data/samples/ with `sample`, and only some of them with `quick`.

    Returns a dict of `LeftViews`, and the checksums of the dataset. "train" and "validation" are a random split of the
    images of 25 toys, since the network has to do well on these, unlike that of task 1. "test" shows 25 other toys.
    """
    dataset = load_smallnorb(data_dir, sample=sample)
    images = {}
    for part, examples in (("train", dataset.train), ("test", dataset.test)):
        # At least every second one, so that a quick run is never compared with what is recorded for the whole sample.
        step = max(len(examples.images) // QUICK_IMAGES, 2) if quick else 1
        small = area_average(examples.images[::step, :, :, :1], IMAGE_SIZE)[..., 0]
        images[part] = LeftViews(small, examples.category[::step], examples.elevation[::step])
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images["train"].images))
    held_out, kept = np.split(order, [len(order) // 10])
    parts = {"train": np.sort(kept), "validation": np.sort(held_out)}
    split = {part: LeftViews(*(array[chosen] for array in images["train"])) for part, chosen in parts.items()}
    return {**images, **split}, dataset.checksums


def every_condition(count):
    """Returns the conditions of `count` samples, all 45 pairs equally often: category and elevation, int64 (count,)."""
    number = np.arange(count)
    return number % len(CATEGORIES), number // len(CATEGORIES) % len(DEGREES)


def value_range(config):
    """Returns what black and white become for the network."""
    return ((0 - GREY_MEAN) / GREY_DEVIATION, (255 - GREY_MEAN) / GREY_DEVIATION) if config.standardized else (-1, 1)


def normalize(images, value_range):
    """Returns float32 (n, 48, 48, 1) in `value_range` for images (n, 48, 48) in the uint8 range."""
    low, high = value_range
    unit = 255 / (high - low)  # grey levels that make 1
    return (ops.cast(images, "float32")[..., None] + low * unit) / unit


def denormalize(images, value_range):
    """The inverse of `normalize`: returns uint8 (n, 48, 48)."""
    low, high = value_range
    unit = 255 / (high - low)
    return np.rint(np.clip(images[..., 0] * unit - low * unit, 0, 255)).astype("uint8")


# --------------------------------------------------------------------------------------------------------------- model


def build_network(config):
    """Builds the U-Net: from a dict of `noisy` (n, 48, 48, 1), normalised, `time` and labels; see `build_unet`."""
    options = {"patch": PATCH, "widths": config.widths, "blocks": config.blocks, "attention": int(config.attention)}
    return diffusion.build_unet(IMAGE_SHAPE, NUM_LABELS, input_norm=True, **options)


def build_classifier():
    """Builds the evaluation classifier, which predicts what a sample shows.

    The network of task 1 does not fit: it needs the images of both cameras, and samples have one. Returns a functional
    model from images (n, 48, 48) in the uint8 range to a dict of probabilities, `category` (n, 5), `elevation` (n, 9).
    """
    images = keras.Input(IMAGE_SHAPE[:2], name="images")
    features = layers.Rescaling(1 / 255)(layers.Reshape(IMAGE_SHAPE)(images))
    features = layers.LayerNormalization(axis=(1, 2, 3), center=False, scale=False)(features)
    features = diffusion.convolution(32, 5, strides=2, activation="relu")(features)
    for filters in (32, 64, 128):
        features = diffusion.convolution(filters, activation="relu")(features)
        features = layers.MaxPooling2D(2)(diffusion.convolution(filters, use_bias=False)(features))
        features = layers.ReLU()(layers.BatchNormalization()(features))
    features = layers.Dropout(0.2)(layers.GlobalAveragePooling2D()(features))
    heads = {name: layers.Dense(count, "softmax", dtype="float32", name=name) for name, count in NUM_LABELS.items()}
    return keras.Model(images, {name: head(features) for name, head in heads.items()}, name="judge")


# ------------------------------------------------------------------------------------------------- losses and training


def trainer(network, config, seed):
    """Returns what trains a network to predict its target from noisy images, fitted on `LeftViews` as a dict."""
    scaled = functools.partial(normalize, value_range=value_range(config))
    return diffusion.Trainer(network, config, seed, NUM_LABELS, scaled)


def train_network(config, examples, seed, validation=None, **checkpoint):
    """Trains one diffusion network; `checkpoint` are `folder` and `resume` of `training.fit`.

    Returns it in float32 with averaged weights, learning curves, and seconds.
    """
    build, wrap = functools.partial(build_network, config), functools.partial(trainer, config=config, seed=seed)
    optimizer = diffusion.averaging_optimizer(config.average)
    held_out = validation and diffusion.with_fixed_noise(validation._asdict(), IMAGE_SHAPE)
    return diffusion.train_network(build, wrap, optimizer, config, examples._asdict(), seed, held_out, **checkpoint)


def train_classifier(config, examples, seed, validation=None, **checkpoint):
    """Trains the evaluation classifier; as `train_network`, without averaged weights."""
    keras.utils.set_random_seed(seed)
    steps = training.count_steps(len(examples.images), config)
    with training.computing_in(training.fast_precision()) as precision:
        classifier = build_classifier()
    images = keras.Input(IMAGE_SHAPE[:2])
    translation = layers.RandomTranslation(0.05, 0.05, seed=seed)
    translation.supports_jit = True  # Keras denies it of this layer, and would run every step uncompiled under JAX
    model = keras.Model(images, classifier(translation(images[..., None])[..., 0]))
    optimizer = keras.optimizers.AdamW(training.cosine_schedule(3e-3, steps), weight_decay=1e-2)
    loss = dict.fromkeys(classifier.output, "sparse_categorical_crossentropy")
    model.compile(optimizer, loss, metrics=dict.fromkeys(loss, "accuracy"), **training.compile_options(steps))
    (inputs, targets), held_out = (views and (views.images, views.labels()) for views in (examples, validation))
    options = {"config": config, "seed": seed, "precision": precision, "validation_data": held_out, **checkpoint}
    curves, seconds = training.fit(model, inputs, targets, **options)
    full_precision = build_classifier()
    models.set_weights(full_precision, classifier.get_weights())
    return full_precision, curves, seconds


def with_flags(config, arguments):
    """Returns a config with what the command line changes, and the smaller network of a quick run."""
    smaller = {"widths": QUICK_WIDTHS} if arguments.quick and isinstance(config, Config) else {}
    return dataclasses.replace(cli.with_flags(config, arguments), **smaller)


def train(arguments):
    """Trains, measures and saves the wanted models; returns the `SampleEvaluation`, or None without the network."""
    options = {"sample": arguments.sample, "quick": arguments.quick}
    images, checksums = load_images(arguments.data_dir, **options)
    sample, _ = load_images(arguments.data_dir, **options | {"sample": True})
    names = [arguments.model] if arguments.model else ["judge", "network"]
    classifier = None if "judge" in names else restore(arguments, "judge")[0]
    trained, measured, evaluation = {}, {}, None
    for name, seed, folder in results.training_runs(SCRIPT, arguments, names, dict.fromkeys(names, 1)):
        config = with_flags(CONFIGS[name], arguments)
        fit = train_network if name == "network" else train_classifier
        run = fit(config, images["train"], seed, images["validation"], folder=folder, resume=arguments.resume)
        trained[name] = (seed, config, *run)
    if "judge" in trained:
        classifier = trained["judge"][2]
        measured["judge"] = evaluate_classifier(classifier, images)
        measured["judge"] |= evaluate_classifier(classifier, {"sample": sample["test"]})
    if "network" in trained:
        seed, config, network, *_ = trained["network"]
        on_sample = evaluate(network, config, classifier, sample, seed, **options | {"sample": True})
        evaluation = on_sample if arguments.sample else evaluate(network, config, classifier, images, seed, **options)
        measured["network"] = {**evaluation.metrics, "sample": on_sample.metrics["test"]}
    sizes = {part: len(examples.images) for part, examples in {**images, "sample": sample["test"]}.items()}
    dataset = {"name": "smallnorb, left views at 48 x 48", **sizes, "sha256": checksums}
    for name, (seed, config, model, curves, seconds) in trained.items():
        run = {"config": config, "seed": seed, "curves": curves, "seconds": seconds}
        card = models.card(SCRIPT, name, arguments, dataset=dataset, metrics=measured[name], **run)
        if name == "network":
            card["sampling"] = dataclasses.asdict(evaluation.sampler.sampling)
        models.save_model(model, arguments.output_dir / "saved_models" / SCRIPT / f"{name}.keras", card)
    return evaluation


# ---------------------------------------------------------------------------------------------------------- evaluation


def restore(arguments, name):
    """Restores "network" or "judge"; returns the model, its config and its card."""
    return models.restore(models.model_path(arguments.output_dir, SCRIPT, name), SCRIPT, type(CONFIGS[name]))


def build_sampler(network, config, sampling):
    """Returns the `diffusion.Sampler` of a network. It compiles its loop once, so sample everything with the same."""
    return diffusion.Sampler(network, config.target, sampling, NUM_LABELS, value_range(config))


def generate(sampler, category, elevation, seed=0, noise=None, batch_size=PREDICT_BATCH_SIZE):
    """Generates one image for each condition, uint8 (n, 48, 48); `noise` (n, 48, 48, 1) replaces that of `seed`."""
    inputs = diffusion.sampler_inputs({"category": category, "elevation": elevation}, IMAGE_SHAPE, seed, noise)
    return denormalize(sampler.predict(inputs, batch_size=batch_size, verbose=0), sampler.value_range)


def load_feature_network():
    """Restores what maps images to the features in which distances are measured: the plain network of task 1.

    It takes two views, (n, 48, 48, 2), and gets the same image twice. Distances are comparable within this project.
    """
    path = models.models_folder(cli.REPOSITORY, FEATURE_SCRIPT) / f"{FEATURE_MODEL}.keras"
    network, _ = models.load_model(path, FEATURE_SCRIPT)
    return keras.Model(network.input, network.get_layer(FEATURE_LAYER).output)


def extract_features(feature_network, images):
    """Returns float32 (n, 192) for uint8 images (n, 48, 48)."""
    return feature_network.predict(np.repeat(images[..., None], 2, axis=3), batch_size=PREDICT_BATCH_SIZE, verbose=0)


def distances(features, real_features):
    """Returns the Fréchet and the kernel distance between two sets of features, (n, 192) and (m, 192)."""
    return {
        "frechet_distance": metrics.frechet_distance(features, real_features),
        "kernel_distance": metrics.kernel_distance(features, real_features),
    }


def agreement(classifier, images, category, elevation):
    """Returns how well the evaluation classifier's predictions agree with labels, and the predicted categories (n,)."""
    probabilities = classifier.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)
    predicted, predicted_elevation = probabilities["category"].argmax(1), probabilities["elevation"].argmax(1)
    measured = {
        "category_agreement": float(np.mean(predicted == category)),
        "elevation_agreement": float(np.mean(predicted_elevation == elevation)),
        "elevation_mae_degrees": float(np.mean(np.abs(DEGREES[predicted_elevation] - DEGREES[elevation]))),
    }
    return measured, predicted


def evaluate_classifier(classifier, images):
    """Returns the metrics of the evaluation classifier on every part of `images` (dict of `LeftViews`)."""
    classifier = models.for_prediction(classifier, min(len(examples.images) for examples in images.values()))
    return {part: agreement(classifier, *examples)[0] for part, examples in images.items()}


def low_resolution(images):
    """Returns images without details, as a reference: downsampled to 12 x 12 and upsampled. uint8 in and out."""
    small = area_average(images[..., None], IMAGE_SIZE // 4).astype("float32")
    large = ops.convert_to_numpy(ops.image.resize(small, (IMAGE_SIZE, IMAGE_SIZE), interpolation="bilinear"))
    return np.clip(np.rint(large[..., 0]), 0, 255).astype("uint8")


class SampleEvaluation(NamedTuple):
    """Samples, and how they compare with real images."""

    sampler: diffusion.Sampler
    metrics: dict  # from "train", "validation" and "test" to the metrics against those images
    references: dict  # from a name to the metrics of images that no diffusion model generated
    images: np.ndarray  # uint8 (n, 48, 48), the samples
    category: np.ndarray  # int64 (n,), on which the samples are conditioned
    predicted: np.ndarray  # int64 (n,), categories that the evaluation classifier predicts for the samples
    neighbour_distances: dict  # of "samples", "validation", "test": grey levels to the nearest training image (n,)
    nearest: np.ndarray  # int (n,), the nearest training image of each sample


def evaluate(network, config, classifier, images, seed, *, sample, quick):
    """Generates samples and compares them with `images`, a dict of `LeftViews`; returns a `SampleEvaluation`."""
    sampling, count = (DETERMINISTIC_SAMPLING, NUM_SAMPLES_ON_SAMPLE) if sample else (SAMPLING, NUM_SAMPLES)
    if quick:
        sampling, count = dataclasses.replace(sampling, steps=QUICK_STEPS), NUM_CONDITIONS
    print(f"\ngenerating and measuring {count:,} samples: {sampling.steps} steps of {sampling.sampler.upper()}")
    network, classifier, feature_network = (
        models.for_prediction(model, count) for model in (network, classifier, load_feature_network())
    )
    sampler = build_sampler(network, config, sampling)
    category, elevation = every_condition(count)
    samples = generate(sampler, category, elevation, seed, batch_size=NUM_CONDITIONS if sample else PREDICT_BATCH_SIZE)
    agreed, predicted = agreement(classifier, samples, category, elevation)
    real = {part: extract_features(feature_network, examples.images) for part, examples in images.items()}
    features = extract_features(feature_network, samples)
    neighbours, nearest = metrics.nearest_neighbours(samples, images["train"].images)
    neighbour_distances, references = {"samples": neighbours}, {}
    for part in ("validation", "test"):
        neighbour_distances[part], _ = metrics.nearest_neighbours(images[part].images, images["train"].images)
        close = neighbours < np.percentile(neighbour_distances[part], 1)
        agreed[f"closer_than_1st_percentile_of_{part}"] = float(np.mean(close))
        references[f"{part}_pictures"] = {"neighbour_grey_levels": float(np.median(neighbour_distances[part]))}
    agreed["neighbour_grey_levels"] = float(np.median(neighbours))
    measured = {part: distances(features, real[part]) | agreed for part in images}

    # As many training images as samples: what a perfect model of the training images would reach.
    generator = np.random.default_rng(seed)
    chosen = generator.permutation(len(images["train"].images))[:count]
    floor = distances(real["train"][chosen], real["validation"])
    blurred = low_resolution(images["test"].images)
    noise = generator.integers(0, 256, samples.shape, "uint8")
    references |= {  # their names are paths in the results file
        "train_pictures": distances(real["train"][chosen], real["test"])
        | {f"{name}_to_validation": value for name, value in floor.items()},
        "shrunken_test_pictures": distances(extract_features(feature_network, blurred), real["test"]),
        "noise": distances(extract_features(feature_network, noise), real["test"]),
    }
    return SampleEvaluation(sampler, measured, references, samples, category, predicted, neighbour_distances, nearest)


# --------------------------------------------------------------------------------------------------------- experiments


def run_experiments(arguments):
    """Compares configs with a small training budget, then ways of sampling, by samples against validation images."""
    plan = results.optional_module("experiments", SCRIPT)
    if plan is None:
        return
    path = results.table_path(arguments.output_dir, SCRIPT)
    names = plan.QUICK if arguments.quick else plan.EXPERIMENTS
    images, _ = load_images(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    classifier = models.for_prediction(restore(arguments, "judge")[0])
    feature_network = models.for_prediction(load_feature_network())
    real_features = extract_features(feature_network, images["validation"].images)
    category, elevation = every_condition(NUM_CONDITIONS if arguments.quick else plan.NUM_SAMPLES)
    baseline = dataclasses.replace(SAMPLING, steps=QUICK_STEPS) if arguments.quick else SAMPLING
    for run in results.unfinished(path, [{"name": name, "seed": arguments.seed} for name in names]):
        started = time.time()
        if run["name"] in plan.TRAINING:
            config = dataclasses.replace(CONFIGS["network"], **plan.BASELINE | plan.TRAINING[run["name"]])
            config, sampling = with_flags(config, arguments), baseline
            folder = arguments.output_dir / "runs" / SCRIPT / "experiment"
            network, _, _ = train_network(config, images["train"], arguments.seed, folder=folder, resume=False)
        else:
            network, config, _ = restore(arguments, "network")
            sampling = dataclasses.replace(baseline, **plan.SAMPLING[run["name"]])
        sampler = build_sampler(models.for_prediction(network), config, sampling)
        samples = generate(sampler, category, elevation, arguments.seed)
        measured = distances(extract_features(feature_network, samples), real_features)
        measured |= agreement(classifier, samples, category, elevation)[0]
        row = {**run, **dataclasses.asdict(config), **dataclasses.asdict(sampling)}
        row["parameters"] = models.parameter_counts(network)["trainable"]
        row |= {"seconds": round(time.time() - started, 1), "samples": len(samples)}
        results.append_row(path, row | {key: round(value, 5) for key, value in measured.items()})
    print("wrote", *experiment_figures(arguments), path, sep="\n  ")


def read_experiments(arguments):
    """Returns the experiment table as a `pandas.DataFrame`."""
    path, texts = results.recorded_path(arguments, f"{SCRIPT}_experiments.csv"), ("name", "sampler")
    return results.read_table(path, ("steps", "guidance", *EXPERIMENT_METRICS), texts)


def experiment_figures(arguments):
    """Writes the figures of the experiments, as far as the table goes; returns their paths."""
    plots, plan = (results.optional_module(kind, SCRIPT) for kind in ("plots", "experiments"))
    if not plots or not plan:
        return []
    folder, table = arguments.output_dir / "report" / "figures" / SCRIPT, read_experiments(arguments)
    steps, guidance, short = (table[table["name"].isin(names)] for names in (plan.STEPS, plan.GUIDANCE, plan.TRAINING))
    written = [plots.draw_quality(steps, guidance, folder / "quality.png")] if len(steps) and len(guidance) else []
    return [
        *written,
        *([plots.draw_experiments(short, plan.BASELINE["epochs"], folder / "experiments.png")] if len(short) else []),
    ]


# -------------------------------------------------------------------------------------------------------------- report


def report(arguments, evaluation=None):
    """Restores the saved models, measures them, and writes figures; returns the exit code.

    `evaluation` is that of a network trained just now. Results are written after a training run, or to record them.
    """
    options = {"sample": arguments.sample, "quick": arguments.quick}
    names = [arguments.model] if arguments.model else list(CONFIGS)
    restored = {name: restore(arguments, name) for name in dict.fromkeys(["judge", *names])}
    cards = {name: restored[name][2] for name in names}
    images, checksums = load_images(arguments.data_dir, **options)
    classifier = restored["judge"][0]
    measured = {"judge": evaluate_classifier(classifier, images)}
    if "network" in names:
        network, config, card = restored["network"]
        evaluation = evaluation or evaluate(network, config, classifier, images, card["seed"], **options)
        measured["network"] = evaluation.metrics

    rows, written, part = [], [], "sample" if arguments.sample else "test"
    sizes = {name: len(examples.images) for name, examples in images.items()}
    for name in names:
        test = measured[name]["test"]
        rows += results.compare(cards[name], test, part=part, size=sizes["test"], sha256=checksums)
        if arguments.record:
            found = {each: (size, measured[name][each]) for each, size in sizes.items()}
            found = {"sample": found["test"]} if arguments.sample else found
            path = models.models_folder(arguments.output_dir, SCRIPT) / f"{name}.keras"
            results.record_metrics(path, None if arguments.sample else checksums, **found)
    if arguments.train or (arguments.record and not arguments.sample):
        summary = summarise(cards, measured, evaluation, read_experiments(arguments))
        written.append(results.write_results(SCRIPT, arguments, summary))
    plots = results.optional_module("plots", SCRIPT)
    if plots and "network" in names:
        folder = arguments.output_dir / "report" / "figures" / SCRIPT
        sampler = evaluation.sampler  # to be compiled once where it is the same
        if not arguments.sample:
            sampler = build_sampler(models.for_prediction(network), config, DETERMINISTIC_SAMPLING)
        of_network = sampler, config, cards["network"], evaluation
        written += draw_figures(plots, *of_network, images["train"], card["seed"], folder)
        written += experiment_figures(arguments)
    return results.conclude(SCRIPT, arguments, rows, written)


def summarise(cards, measured, evaluation, table):
    """Returns what `report/results/task2_diffusion.json` holds of the models whose `cards` are given."""
    of_models = {
        name: {"parameters": card["parameters"]["trainable"], "minutes": round(card["seconds"] / 60, 1)}
        | {field: card[field] for field in ("epochs", "hardware", "shortened")}
        for name, card in cards.items()
    }
    summary = {"script": f"{SCRIPT}.py", "models": of_models}
    if "network" not in cards:
        return summary
    references = dict(evaluation.references)
    for part, agreed in measured["judge"].items():
        references[f"{part}_pictures"] = references[f"{part}_pictures"] | agreed
    return {
        **summary,
        **evaluation.metrics,
        "references": references,
        "samples": len(evaluation.images),
        "sampling": dataclasses.asdict(evaluation.sampler.sampling),
        "seeds": 1,
        "experiments": table.groupby("name", sort=False)[EXPERIMENT_METRICS].mean().to_dict("index"),
    }


def draw_figures(plots, sampler, config, card, evaluation, training_images, seed, folder):
    """Writes the figures of a network and its samples; returns their paths."""
    shown = 3  # index of the elevation where only one is shown
    # The same noise for each category from each elevation.
    category, elevation = np.divmod(np.arange(NUM_CONDITIONS), len(DEGREES))
    noise = np.random.default_rng(seed).standard_normal((1, *IMAGE_SHAPE), dtype="float32")
    conditions = generate(sampler, category, elevation, seed, np.repeat(noise, len(category), axis=0), NUM_CONDITIONS)

    # From one noise to another along the arc: a linear mixture of two noises would be too weak to be noise.
    pairs, columns = len(CATEGORIES), 9
    first, second = np.random.default_rng(seed).standard_normal((2, pairs, *IMAGE_SHAPE), dtype="float32")
    angle = np.linspace(0, np.pi / 2, columns, dtype="float32")[:, None, None, None]
    noise = np.concatenate([np.cos(angle) * a + np.sin(angle) * b for a, b in zip(first, second, strict=True)])
    category = np.repeat(np.arange(pairs), columns)
    interpolated = generate(sampler, category, np.full(len(category), shown), seed, noise, NUM_CONDITIONS)

    # One image of each category while it is denoised.
    labels = {"category": np.arange(len(CATEGORIES)), "elevation": np.full(len(CATEGORIES), shown)}
    states = sampler.states(diffusion.sampler_inputs(labels, IMAGE_SHAPE, seed))
    denoised = np.stack([denormalize(noisy, sampler.value_range) for noisy in states], axis=1)
    distances, nearest = evaluation.neighbour_distances, training_images.images[evaluation.nearest]
    return [
        plots.draw_network(config.widths, config.blocks, config.attention, config.target, folder / "network.png"),
        plots.draw_learning_curves(card["curves"], config.target, config.loss, folder / "learning_curves.png"),
        plots.draw_conditions(conditions, CATEGORIES, DEGREES, folder / "orders.png"),
        plots.draw_interpolations(interpolated, CATEGORIES, DEGREES[shown], folder / "interpolations.png"),
        plots.draw_denoising(denoised, CATEGORIES, folder / "denoising.png"),
        plots.draw_samples(evaluation.images, training_images, CATEGORIES, DEGREES, folder / "samples.png"),
        plots.draw_nearest(evaluation.images, nearest, distances["samples"], folder / "nearest.png"),
        plots.draw_neighbour_distances(distances, folder / "neighbour_distances.png"),
        plots.draw_agreement(evaluation.category, evaluation.predicted, CATEGORIES, folder / "agreement.png"),
    ]


# ---------------------------------------------------------------------------------------------------------------- main


def sample_conditionally(arguments):
    """Generates what the command line asks for, at random where it leaves something open. Returns the paths it writes.

    The `.npz` holds `images` uint8 (n, 48, 48), `category` (n,), index into `CATEGORIES`, and `elevation` in degrees.
    """
    network, config, _ = restore(arguments, "network")
    generator, count = np.random.default_rng(arguments.seed), arguments.samples or 64
    category, elevation = generator.integers(len(CATEGORIES), size=count), generator.integers(len(DEGREES), size=count)
    if arguments.category:
        category[:] = CATEGORIES.index(arguments.category)
    if arguments.elevation:
        elevation[:] = DEGREES.tolist().index(arguments.elevation)
    changed = {name: getattr(arguments, name) for name in ("sampler", "steps", "guidance")}
    sampling = dataclasses.replace(SAMPLING, **{name: value for name, value in changed.items() if value is not None})
    sampler = build_sampler(models.for_prediction(network), config, sampling)
    images = generate(sampler, category, elevation, arguments.seed)
    name = f"{arguments.category or 'any'}_{arguments.elevation or 'any'}_seed_{arguments.seed}.png"
    path = write_grid(images, arguments.output_dir / "runs" / SCRIPT / name, 2)
    with replacing(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, images=images, category=category, elevation=DEGREES[elevation])
    return path, path.with_suffix(".npz")


def main(argv=None):
    flags = cli.parser(__doc__, list(CONFIGS))
    group = flags.add_argument_group("conditional sampling, with --load; what is left out is random")
    group.add_argument("--category", choices=CATEGORIES)
    group.add_argument("--elevation", type=int, choices=DEGREES.tolist(), metavar="DEGREES", help="30, 35 ... 70")
    count, steps, guidance = cli.number(int, 1, 10_000), cli.number(int, 1, 1000), cli.number(float, 0, 20)
    group.add_argument("--samples", type=count, metavar="N", help="number of images (default: 64)")
    group.add_argument("--steps", type=steps, metavar="N", help=f"of denoising (default: {SAMPLING.steps})")
    guidance_help = f"0 ignores the condition, more than 1 exaggerates it (default: {SAMPLING.guidance:g})"
    group.add_argument("--guidance", type=guidance, metavar="W", help=guidance_help)
    group.add_argument("--sampler", choices=("ddim", "ddpm"), help=f"default: {SAMPLING.sampler}")
    arguments = cli.parse(flags, argv)
    conditional = ("category", "elevation", "samples", "steps", "guidance", "sampler")
    if any(getattr(arguments, name) is not None for name in conditional):
        if not arguments.load:
            raise UserError("conditional sampling needs a trained network; use --load")
        if arguments.record or arguments.quick or arguments.sample or arguments.model == "judge":
            raise UserError("--record, --quick, --sample and --model judge are about metrics; leave them out")
        print("wrote", *sample_conditionally(arguments), sep="\n  ")
        return None
    if arguments.experiments:
        return run_experiments(arguments)
    return report(arguments, train(arguments) if arguments.train else None)


if __name__ == "__main__":
    cli.run(main)
