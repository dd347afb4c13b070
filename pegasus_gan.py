"""Winged horses from CIFAR-10, which contains horses, birds and airplanes, but no winged horse.

Two class-conditional generators are trained on CIFAR-10 alone: a diffusion model and, for comparison, a GAN. The first
generates winged horses by four methods: conditioned on a mixture of horse and bird or airplane (blend); guided towards
one of these two in a band above the back (composition); from a collage of a horse and a wing, noised and denoised; and
conditioned on extra classes, learned from automatic collages of training images (learned). Two classifiers, trained on
composites of two images, estimate how much an image shows horse and bird or airplane; judge A ranks candidates, judge B
is used for reporting only.

    python pegasus_gan.py --train                  trains the four networks, draws and measures candidates
    python pegasus_gan.py --load                   restores the networks and verifies their metrics
    python pegasus_gan.py --experiments            the comparison behind the choices, by judge A
    python pegasus_gan.py --load --method collage  draws 64 winged horses, no dataset
    python pegasus_gan.py --load --class horse     draws images of one class, no dataset

FID (768-d) of 10,000 samples to the test images, n = 1: diffusion 0.53, GAN 0.74. Judge B scores 64 unselected winged
horses 0.34 (learned), 0.31 and 0.25 (collages of real and of generated images), 0.18 (blend), 0.17 (composition), and
real horses 0.22. Training took 92 (diffusion), 40 (GAN), 23 and 24 minutes (judges) on 2 cores of a server CPU.

Sources: DDIM (Song, Meng & Ermon 2021), classifier-free guidance (Ho & Salimans 2022), composition of scores (Liu et
al. 2022), SDEdit (Meng et al. 2022), projection discriminator (Miyato & Koyama 2018), DiffAugment (Zhao et al. 2020).
"""

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
import functools
import math
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import train_test_split

from common import augmentation, cli, diffusion, fid, masks, metrics, models, results, training
from common.datasets import LabelledImages, load_cifar10
from common.diffusion import Composition, convolution
from common.errors import UserError
from common.files import replacing, write_json
from common.images import write_grid
from common.optimizers import UnitSpectralNorm

SCRIPT = "pegasus_gan"
IMAGE_SIZE, IMAGE_SHAPE = 32, (32, 32, 3)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HORSE, WINGED = CLASSES.index("horse"), {name: CLASSES.index(name) for name in ("bird", "airplane")}
CONDITIONS = (*CLASSES, *(f"horse with {name} wings" for name in WINGED))  # of the generators
OVERSAMPLED = ("horse", "bird", "airplane", "deer")  # the generators see these classes twice per epoch
NULL = {"classes": 0.0}  # weights of the classes that stand for "unconditional"
PLAIN_HORSE = {"classes": np.eye(len(CONDITIONS), dtype="float32")[HORSE]}
METHODS = ("blend", "composition", "collage", "learned", "collage_real")  # the last one with real horses and wings
NUM_VALIDATION, SPLIT_SEED = 2000, 10
BATCH, NUM_BATCHES, STRIDE = 64, 32, 1000  # candidates per batch, batches per method, batch seeds per --seed
NUM_SAMPLES, NUM_SAMPLES_ON_SAMPLE = 10_000, 100  # of all classes, without and with --sample
BAND_HEIGHT, WING_LENGTH, MAX_SHIFT = 9, 13, 6  # pixels: of the wing band, of pasted wings; of horses, downwards
NUM_WINGS, PREDICT_BATCH_SIZE = 12, 250  # best cut-out wings kept, per batch and wing class
BEST_HORSES, BEST_WINGS = 1 / 3, 1 / 20  # shares of horses and of wing sources used for the training collages
WINGS_TRIED, WINGS_KEPT = 8, 3  # collages made, and kept by judge A, per horse and wing class
QUICK_IMAGES, QUICK_BATCH, QUICK_STEPS, SAMPLE_BATCH = 96, 4, 4, 16


@dataclasses.dataclass(frozen=True)
class Config:
    """The diffusion network and its training."""

    widths: tuple = (64, 128)  # filters at 16 and 8 patches a side
    patch: int = 2  # pixels a side; the network works at a quarter of the cost
    blocks: int = 2  # residual blocks per resolution, as many on the way down as on the way up
    target: str = "velocity"  # what it predicts, or "noise"
    loss: str = "mse"  # or "mae"
    average: float = 0.999  # momentum of the moving average of the weights
    learning_rate: float = 1e-3  # peak of the schedule
    batch_size: int = 128
    epochs: int = 11  # of 76,800 images: 48,000, those of `OVERSAMPLED` once more, and collages


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """Generator, discriminator, and their training."""

    widths: tuple = (128, 64, 32)  # filters of the generator at 8, 16 and 32 pixels a side
    discriminator_widths: tuple = (32, 64, 128)  # filters at 16, 8 and 4 pixels a side
    noise: int = 128  # size of the noise vector
    embedding: int = 64  # size of the embedding of the classes
    average: float = 0.999  # momentum of the moving average of the weights
    learning_rate: float = 3e-4  # peak of the schedule
    batch_size: int = 64
    epochs: int = 5  # of the images that the diffusion network is trained on


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A multi-label classifier and its training."""

    widths: tuple = (80, 160)  # filters at 16 and 8 pixels a side
    kernel: int = 3  # side of the first filters
    pooling: str = "logsumexp"  # of evidence over space: a smooth maximum (Pinheiro & Collobert 2015); or "mean"
    learning_rate: float = 2e-3  # peak of the schedule
    batch_size: int = 128
    epochs: int = 8


CONFIGS = {  # in the order of training: judge B measures the generators
    "judge_a": JudgeConfig(),
    "judge_b": JudgeConfig(widths=(64, 192), kernel=5, pooling="mean"),
    "diffusion": Config(),
    "gan": GanConfig(),
}
FILES = {name: "gan_generator" if name == "gan" else name for name in CONFIGS}  # of the saved models
SAMPLING = diffusion.Sampling("ddpm", steps=25, guidance=1.5, spacing=1.5)  # of samples that are measured
DETERMINISTIC_SAMPLING = diffusion.Sampling("ddim", steps=10, guidance=1.5, spacing=1.5)  # for few images; reproducible
HIGH_GUIDANCE_SAMPLING = diffusion.Sampling("ddim", steps=20, guidance=3.0, spacing=1.5)  # of horses, birds and blends
LEARNED_SAMPLING = diffusion.Sampling("ddim", steps=20, guidance=4.0, spacing=1.5)
COMPOSITION = Composition()
COLLAGE = Composition(start=0.2, layout=1.0, heal=0.0, steps=16, spacing=1.0, shift=0, correctors=0)

# ---------------------------------------------------------------------------------------------------------------- data


def load_splits(data_dir, *, sample=False, quick=False):
    """Returns a dict of `LabelledImages`, "train", "validation" and "test", for measurement only, and the `Dataset`."""
    dataset = load_cifar10(data_dir, sample=sample)
    labels, size = np.asarray(dataset.train.labels), min(NUM_VALIDATION, len(dataset.train.labels) // 5)
    parts = train_test_split(np.arange(len(labels)), test_size=size, random_state=SPLIT_SEED, stratify=labels)
    count = QUICK_IMAGES if quick else None
    train, validation = (LabelledImages(*(array[np.sort(part[:count])] for array in dataset.train)) for part in parts)
    test = LabelledImages(*(np.asarray(array[:count]) for array in dataset.test))
    return {"train": train, "validation": validation, "test": test}, dataset


def one_hot(labels):
    """Returns weights of the `CONDITIONS`, float32 (n, 12), for labels (n,)."""
    return np.eye(len(CONDITIONS), dtype="float32")[labels]


def examples(split, collages=None):
    """Returns what networks are fitted on: dict of `images` and `classes`; with `collages`, `OVERSAMPLED` twice."""
    if collages is not None:
        again = np.isin(split.labels, [CLASSES.index(name) for name in OVERSAMPLED])
        split = LabelledImages(*(np.concatenate([a, a[again], b]) for a, b in zip(split, collages, strict=True)))
    return {"images": split.images, "classes": one_hot(split.labels)}


def of_class(split, *names):
    return split.images[np.isin(split.labels, [CLASSES.index(name) for name in names])]


def normalize(images):
    """Returns float32 -1 to 1 for images in the uint8 range."""
    return ops.cast(images, "float32") / 127.5 - 1


def denormalize(images):
    """The inverse of `normalize`: returns uint8."""
    return np.rint(np.clip((np.asarray(images) + 1) * 127.5, 0, 255)).astype("uint8")


# -------------------------------------------------------------------------------------------------------------- models


def build_network(config):
    """Builds the U-Net of the diffusion model: from `noisy`, `time` and `classes` (n, 12), weights, all 0 for none."""
    # At 8 x 8 stacked convolutions already cover the map, and attention would take a quarter of the time.
    options = {name: getattr(config, name) for name in ("patch", "widths", "blocks")}
    return diffusion.build_unet(IMAGE_SHAPE, {"classes": len(CONDITIONS)}, attention=0, mixtures=True, **options)


def modulated(features, condition):
    """Batch normalisation whose scale and shift depend on the condition (Dumoulin et al. 2017), and ReLU."""
    features = layers.BatchNormalization(center=False, scale=False, momentum=0.95)(features)
    scale, shift = (layers.Dense(features.shape[-1])(condition)[:, None, None] for _ in range(2))
    return layers.ReLU()(features * (1 + scale) + shift)


def build_generator(config):
    """Builds the generator of the GAN: from a dict of `noise` (n, noise) and `classes` (n, 12) to images, -1 to 1."""
    noise, classes = keras.Input((config.noise,), name="noise"), keras.Input((len(CONDITIONS),), name="classes")
    condition = layers.Concatenate()([noise, layers.Dense(config.embedding, use_bias=False)(classes)])
    features = layers.Reshape((4, 4, config.widths[0]))(layers.Dense(16 * config.widths[0])(condition))
    for filters in config.widths:
        enlarged = layers.UpSampling2D(2)(features)
        features = convolution(filters)(modulated(enlarged, condition))
        features = convolution(filters)(modulated(features, condition))
        features = layers.Add()([convolution(filters, 1)(enlarged), features])
    features = layers.ReLU()(layers.BatchNormalization(momentum=0.95)(features))
    images = convolution(3, activation="tanh", dtype="float32")(features)
    return keras.Model({"noise": noise, "classes": classes}, images, name="gan")


def build_discriminator(config):
    """Builds the projection discriminator (Miyato & Koyama 2018): `images`, -1 to 1, and `classes` to scores (n, 1)."""
    images, classes = keras.Input(IMAGE_SHAPE, name="images"), keras.Input((len(CONDITIONS),), name="classes")
    bounded = {"kernel_initializer": "orthogonal", "kernel_constraint": UnitSpectralNorm()}
    features = convolution(config.discriminator_widths[0] // 2, **bounded)(images)
    for filters in config.discriminator_widths:
        residual = convolution(filters, **bounded)(layers.LeakyReLU(0.2)(features))
        residual = convolution(filters, **bounded)(layers.LeakyReLU(0.2)(layers.AveragePooling2D(2)(residual)))
        features = layers.Add()([layers.AveragePooling2D(2)(convolution(filters, 1, **bounded)(features)), residual])
    features = ops.sum(ops.cast(layers.LeakyReLU(0.2)(features), "float32"), axis=(1, 2))
    embedding = layers.Dense(features.shape[-1], use_bias=False, dtype="float32", **bounded)(classes)
    projection = ops.sum(features * embedding, axis=1, keepdims=True)
    score = layers.Dense(1, dtype="float32", **bounded)(features) + projection
    return keras.Model({"images": images, "classes": classes}, score, name="discriminator")


def build_judge(config):
    """Builds a judge: images, 0 to 255, to class probabilities (n, 10); layers "maps" and "evidence" are read too."""
    images = keras.Input(IMAGE_SHAPE, name="images")

    def normalized(features, filters, kernel=3):
        return layers.BatchNormalization()(convolution(filters, kernel, use_bias=False)(features))

    features = layers.ReLU()(normalized(layers.Rescaling(1 / 127.5, -1)(images), config.widths[0] // 2, config.kernel))
    for filters, pooled in zip((*config.widths, config.widths[-1]), (True, True, False), strict=True):
        features = layers.MaxPooling2D(2)(features) if pooled else features
        residual = normalized(layers.ReLU()(normalized(features, filters)), filters)
        last = None if pooled else "maps"
        features = layers.ReLU(name=last)(layers.Add()([normalized(features, filters, 1), residual]))
    evidence = layers.Conv2D(len(CLASSES), 1, dtype="float32", name="evidence")(layers.Dropout(0.1)(features))
    if config.pooling == "mean":
        logits = layers.GlobalAveragePooling2D(dtype="float32")(evidence)
    else:
        logits = ops.logsumexp(evidence, axis=(1, 2)) - math.log(evidence.shape[1] * evidence.shape[2])
    return keras.Model(images, layers.Activation("sigmoid", dtype="float32")(logits), name="judge")


# ------------------------------------------------------------------------------------------------- losses and training


class JudgeTrainer(keras.Model):
    """Trains a judge on composites, with the binary cross-entropy, on a dict of `images` and `classes`."""

    def __init__(self, judge, seed):
        super().__init__()
        self.judge, self.seed_generator = judge, keras.random.SeedGenerator(seed)
        self.built = True  # all its variables exist, without which a checkpoint cannot be restored

    def call(self, inputs, training=False):
        seed = self.seed_generator
        images = augmentation.translate(augmentation.mirror(normalize(inputs["images"]), seed), seed, 4)
        images, shown = augmentation.composites(images, inputs["classes"][:, : len(CLASSES)], seed)
        images = augmentation.blur(images, seed, 0.15)  # like early estimates of the diffusion model
        return self.judge((images + 1) * 127.5, training=training), shown

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(keras.losses.binary_crossentropy(y_pred[1], y_pred[0]))


class GanTrainer(keras.Model):
    """Trains both networks at once with the hinge loss (Lim & Ye 2017), on a dict of `images` and `classes`.

    The discriminator sees augmented images only (Zhao et al. 2020), so that it does not memorise the real ones.
    """

    def __init__(self, generator, discriminator, seed):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.trackers = [keras.metrics.Mean(name=f"{name}_loss") for name in ("generator", "discriminator")]
        self.built = True  # all its variables exist, without which a checkpoint cannot be restored

    def call(self, inputs, training=False):
        """Returns scores of real and of generated images, and of the latter again, to train the generator with."""
        seed, classes = self.seed_generator, inputs["classes"]
        real = augmentation.mirror(normalize(inputs["images"]), seed)
        noise = keras.random.normal((ops.shape(classes)[0], self.generator.input["noise"].shape[1]), seed=seed)
        generated = self.generator({"noise": noise, "classes": classes}, training=training)
        real, generated = (augmentation.differentiable(images, seed) for images in (real, generated))
        images = ops.concatenate([real, ops.stop_gradient(generated)])
        scores = self.discriminator({"images": images, "classes": ops.concatenate([classes, classes])})
        # The generator's loss treats the discriminator as constant, so one optimizer can train both.
        frozen = [ops.stop_gradient(variable.value) for variable in self.discriminator.trainable_variables]
        seen, _ = self.discriminator.stateless_call(frozen, [], {"images": generated, "classes": classes})
        return *ops.split(scores, 2), seen

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        real, generated, seen = y_pred
        losses = -ops.mean(seen), ops.mean(ops.relu(1 - real)) + ops.mean(ops.relu(1 + generated))
        for tracker, loss in zip(self.trackers, losses, strict=True):
            tracker.update_state(loss)
        return losses[0] + losses[1]


def train_network(name, config, splits, collages, seed, **checkpoint):
    """Trains a network, a generator on `collages` as well; returns it in float32, learning curves, and seconds."""
    data, unseen = examples(splits["train"], None if "judge" in name else collages), examples(splits["validation"])
    if "judge" in name:
        build, wrap = build_judge, JudgeTrainer
        optimizer = functools.partial(keras.optimizers.AdamW, weight_decay=0.02)
    elif name == "diffusion":
        build, optimizer = build_network, diffusion.averaging_optimizer(config.average, global_clipnorm=1.0)
        options = {"config": config, "null_labels": NULL, "normalize": normalize, "flip": True}
        wrap, unseen = functools.partial(diffusion.Trainer, **options), diffusion.with_fixed_noise(unseen, IMAGE_SHAPE)
    else:
        build, unseen = build_generator, None  # the losses of a GAN say nothing about held-out images
        average = {"use_ema": True, "ema_momentum": config.average}
        optimizer = functools.partial(keras.optimizers.Adam, beta_1=0.0, beta_2=0.9, **average)
        keras.utils.set_random_seed(seed)
        with training.computing_in(training.fast_precision()):
            wrap = functools.partial(GanTrainer, discriminator=build_discriminator(config))
    build, wrap = functools.partial(build, config), functools.partial(wrap, seed=seed)
    network, curves, seconds = diffusion.train_network(build, wrap, optimizer, config, data, seed, unseen, **checkpoint)
    if name == "gan":  # batch normalisation has the statistics of the last weights, not of the averaged ones
        draws = np.random.default_rng(seed)
        for _ in range(min(training.count_steps(len(data["images"]), config), 100)):
            noise = draws.standard_normal((BATCH, config.noise), dtype="float32")
            network({"noise": noise, "classes": one_hot(draws.integers(len(CONDITIONS), size=BATCH))}, training=True)
    return training.without_xla(network), curves, seconds


# ------------------------------------------------------------------------------------------------------------ methods


def sample(sampler, classes, seed, batch_size=BATCH):
    """Draws one image for each row of `classes`, float32 (n, 12), weights; returns uint8 (n, 32, 32, 3)."""
    inputs = diffusion.sampler_inputs({"classes": classes}, IMAGE_SHAPE, seed)
    return denormalize(sampler.predict(inputs, batch_size=batch_size, verbose=0))


def find_objects(maps, images, labels):
    """Finds the object of its class, one or (n,), in each image by class activation `maps` (Zhou et al. 2016)."""
    evidence = maps.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)[np.arange(len(images)), ..., labels]
    return masks.find_objects(images, masks.enlarged(evidence, IMAGE_SIZE))


def paste_wings(horses, bodies, wings, seed):
    """Pastes `masks.Wings` onto horses, moved down where there is no room; returns collages, and masks of the wings."""
    drop = masks.room_needed(bodies, WING_LENGTH, MAX_SHIFT)
    horses, bodies = (masks.move_down(each, drop) for each in (horses, bodies))
    return masks.place_wings(horses, bodies, wings, WING_LENGTH, seed)


def make_collages(judge, split, seed):
    """Returns the collages that the generators are trained on, `LabelledImages`: real wings pasted onto real horses.

    Only the best-visible horses and the best-cut wings are used; the highest-scoring collages of each horse are kept.
    """
    maps, horses, images = build_maps(judge), of_class(split, "horse"), []
    bodies = find_objects(maps, horses, HORSE)
    best = masks.best_seen(bodies, max(round(BEST_HORSES * len(horses)), 1))
    for number, (name, label) in enumerate(WINGED.items()):
        sources = of_class(split, name)
        wings = masks.cut_wings(sources, find_objects(maps, sources, label), max(round(BEST_WINGS * len(sources)), 1))
        seeds = ([seed, number, each] for each in range(WINGS_TRIED))
        tries = np.stack([paste_wings(horses[best], bodies[best], wings, each)[0] for each in seeds])
        kept = np.argsort([-score(judge, each) for each in tries], axis=0, kind="stable")[:WINGS_KEPT]
        images.append(tries[kept, np.arange(len(best))].reshape(-1, *IMAGE_SHAPE))
    labels = np.repeat(np.arange(len(CLASSES), len(CONDITIONS)), len(images[0]))
    return LabelledImages(np.concatenate(images), labels)


class Tools(NamedTuple):
    """What draws winged horses. Every model compiles once per batch size."""

    sampler: diffusion.Sampler  # conditioned on the same classes everywhere
    learned: diffusion.Sampler  # guided away from `PLAIN_HORSE`, which exaggerates the wings
    plain: diffusion.SpatialGuidance  # one step of that
    spatial: diffusion.SpatialGuidance  # one step, conditioned on two classes by a mask
    maps: keras.Model  # see `find_objects`


def make_tools(network, judge, config, quick=False):
    """Returns the `Tools` of a diffusion network and judge A."""
    guidance = functools.partial(diffusion.SpatialGuidance, network, config.target, (-1, 1))
    parts = training.without_xla(guidance(False)), training.without_xla(guidance(True)), build_maps(judge)
    sampler = build_sampler(network, config, HIGH_GUIDANCE_SAMPLING, quick)
    return Tools(sampler, build_sampler(network, config, LEARNED_SAMPLING, quick, PLAIN_HORSE), *parts)


def build_maps(judge):
    return training.without_xla(keras.Model(judge.input, judge.get_layer("evidence").output))


def build_sampler(network, config, sampling, quick=False, null=NULL):
    """Returns a sampler that is guided away from the condition `null`."""
    sampling = dataclasses.replace(sampling, steps=QUICK_STEPS) if quick else sampling
    return training.without_xla(diffusion.Sampler(network, config.target, sampling, null, (-1, 1)))


class Drawn(NamedTuple):
    """A batch of winged horses with its intermediate results."""

    images: np.ndarray  # uint8 (n, 32, 32, 3)
    stages: list = ()  # of `diffusion.Stage`
    collages: np.ndarray | None = None  # uint8, what was noised
    pasted: np.ndarray | None = None  # float32 (n, 32, 32), 0 to 1: where its wings are


def wing_classes(count, wings=None):
    """Returns the class of the wings of each image: "bird", "airplane", or for None one after the other; int (n,)."""
    return np.resize([WINGED[wings]] if wings else list(WINGED.values()), count)


def blend(wings, mixture=0.5):
    """Returns weights of the `CONDITIONS`, (n, 12): `mixture` of the class of `wings` (n,), and the rest of horse."""
    return (1 - mixture) * one_hot(np.full(len(wings), HORSE)) + mixture * one_hot(wings)


def learned(wings):
    """Returns weights of the `CONDITIONS`, (n, 12), for the class of the collages with `wings` (n,), a class each."""
    return one_hot([len(CLASSES) + list(WINGED.values()).index(label) for label in wings])


CONDITIONED = {"blend": blend, "learned": learned}  # methods that only set the condition


def draw_composition(tools, wings, seed, settings=COMPOSITION, height=BAND_HEIGHT, strength=1.0):
    """Draws horses from noise with `wings` (n,), a class each, in a band above the back; `strength` scales its mask."""
    horse, bodies = np.full(len(wings), HORSE), None

    def find_band(image):
        nonlocal bodies
        first, bodies = bodies is None, find_objects(tools.maps, denormalize(image), horse)
        if first:  # once, horses are moved down that have no room above their backs
            drop = masks.room_needed(bodies, height, MAX_SHIFT)
            image, bodies = masks.move_down(image, drop), masks.move_down(bodies, drop)
        return image, strength * masks.smooth(masks.wing_bands(bodies, height))

    noise = np.random.default_rng([seed, 1]).standard_normal((len(wings), *IMAGE_SHAPE), dtype="float32")
    parts = one_hot(horse), one_hot(wings), settings, [seed, 2], find_band
    images, stages = diffusion.compose(tools.plain, tools.spatial, noise, *parts)
    return Drawn(denormalize(images), stages)


def draw_collage(tools, wings, seed, settings=COLLAGE, real=None, composed=False):
    """Pastes wings onto horses by code, noises the collages to `settings.start`, and denoises them (SDEdit).

    They are denoised as the learned classes or, `composed`, as horses where no wing was pasted. Horses and wings are
    generated, or from `real`, `LabelledImages`: the best-visible of four times as many horses.
    """
    draws, count, horse = np.random.default_rng([seed, 1]), len(wings), np.full(len(wings), HORSE)
    if real is None:
        horses = sample(tools.sampler, one_hot(horse), seed, count)
        sources = sample(tools.sampler, one_hot(wings), seed + STRIDE // 2, count)  # from other noise
    else:
        labels = HORSE, *np.unique(wings)
        shuffled = {label: draws.permutation(np.flatnonzero(real.labels == label)) for label in labels}
        horses = real.images[np.resize(shuffled[HORSE], 4 * count)]
        sources = real.images[[shuffled[label][number % len(shuffled[label])] for number, label in enumerate(wings)]]
    objects, bodies = find_objects(tools.maps, sources, wings), find_objects(tools.maps, horses, HORSE)
    best = masks.best_seen(bodies, count)
    collages, pasted = np.empty_like(sources), np.empty(sources.shape[:3], "float32")
    for label in np.unique(wings):  # each horse gets wings of the class that it is conditioned on
        own = wings == label
        cut = masks.cut_wings(sources[own], objects[own], NUM_WINGS)
        collages[own], pasted[own] = paste_wings(horses[best[own]], bodies[best[own]], cut, [seed, 3, label])
    clean = collages / np.float32(127.5) - 1
    noisy = diffusion.noised(clean, settings.start, draws.standard_normal(clean.shape, dtype="float32"))
    mask = masks.smooth(pasted > 0.1) * np.float32(composed)
    first, second = (one_hot(horse), one_hot(wings)) if composed else (learned(wings), learned(wings))
    parts = first, second, settings, [seed, 2], lambda image: (image, mask)
    images, stages = diffusion.compose(tools.plain, tools.spatial, noisy, *parts)
    return Drawn(denormalize(images), stages, collages, pasted)


def draw(tools, method, wings, seed, real=None, quick=False):
    """Draws one batch of winged horses in one of `METHODS`; `real` are the images of "collage_real"."""
    if method in CONDITIONED:
        sampler = tools.learned if method == "learned" else tools.sampler
        return Drawn(sample(sampler, CONDITIONED[method](wings), seed, len(wings)))
    function, settings = (draw_composition, COMPOSITION) if method == "composition" else (draw_collage, COLLAGE)
    settings = dataclasses.replace(settings, **({"steps": QUICK_STEPS} if quick else {}))
    return function(tools, wings, seed, settings, **({"real": real} if method == "collage_real" else {}))


# ---------------------------------------------------------------------------------------------------------- evaluation


def restore(arguments, name):
    """Restores a model, a key of `CONFIGS`; returns it, its config and its card."""
    path = models.model_path(arguments.output_dir, SCRIPT, FILES[name])
    model, config, card = models.restore(path, SCRIPT, type(CONFIGS[name]))
    return training.without_xla(model), config, card


def predict(judge, images):
    """Returns the probability that each class is in the image, float32 (n, 10)."""
    return judge.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)


def score(judge, images):
    """Returns how much horse and wings each image shows: the root of the product of both probabilities, (n,)."""
    probabilities = predict(judge, images)
    return np.sqrt(probabilities[:, HORSE] * probabilities[:, list(WINGED.values())].max(axis=1))


def extract_features(judge, images):
    """Returns the judge's last feature maps averaged over all places, float32 (n, filters)."""
    pooled = layers.GlobalAveragePooling2D(dtype="float32")(judge.get_layer("maps").output)
    return predict(training.without_xla(keras.Model(judge.input, pooled)), images)


def measure_judge(judge, split):
    """Returns accuracy, and how well the score tells halves of horse and winged from others (area under the ROC)."""
    horses, winged, rest = (of_class(split, *names) for names in (["horse"], WINGED, ["deer", "dog", "truck", "ship"]))
    both, mixed = (augmentation.halves(horses, each) for each in (winged, rest))
    scores = score(judge, np.concatenate([both, horses, winged, mixed]))
    return {
        "accuracy": float(np.mean(predict(judge, split.images).argmax(1) == split.labels)),
        "copresence_auc": float(roc_auc_score(np.arange(len(scores)) < len(both), scores)),
    }


def generate(name, model, config, classes, seed, sampling=SAMPLING, quick=False):
    """Draws one image with "diffusion" or "gan" for each row of `classes`, weights; returns uint8 (n, 32, 32, 3)."""
    if name == "diffusion":
        sampler = build_sampler(model, config, sampling, quick)
        return sample(sampler, classes, seed, min(PREDICT_BATCH_SIZE, len(classes)))
    noise = np.random.default_rng(seed).standard_normal((len(classes), config.noise), dtype="float32")
    return denormalize(model.predict({"noise": noise, "classes": classes}, batch_size=PREDICT_BATCH_SIZE, verbose=0))


def measure_generator(name, model, config, judge, split, arguments, on_sample):
    """Returns the metrics of class-conditional samples, equally many per class: agreement of judge B, FID (768-d)."""
    count = 20 if arguments.quick else NUM_SAMPLES_ON_SAMPLE if on_sample else NUM_SAMPLES
    labels, sampling = np.arange(count) % len(CLASSES), DETERMINISTIC_SAMPLING if on_sample else SAMPLING
    images = generate(name, model, config, one_hot(labels), arguments.seed, sampling, arguments.quick)
    measured = {"class_agreement": float(np.mean(predict(judge, images).argmax(1) == labels))}
    if count >= fid.MIN_IMAGES:  # neither on the sample nor with --quick
        measured |= fid.comparison(arguments.data_dir, {"test images": split.images[:count]})(images, "test images")
    return measured


class PegasusEvaluation(NamedTuple):
    """Winged horses, and how they compare with real images."""

    metrics: dict
    tools: Tools
    drawn: dict  # from each of `METHODS` to the first batch, a `Drawn`, unselected
    best: dict  # from each method to "seed", "index" and "score" of the best candidate by judge A
    best_images: dict  # from each method to that image
    scores: dict  # from the name of a set of images to their scores by judge B (n,)
    nearest: dict  # from each method to its best image and first batch, distances in features, nearest training images


def evaluate_pegasus(tools, judges, splits, arguments, on_sample, best=None):
    """Draws candidates by every method, finds the best by judge A unless `best` says so, and measures by judge B."""
    count = QUICK_BATCH if arguments.quick else SAMPLE_BATCH if on_sample else BATCH
    train, test, judge = splits["train"], splits["test"], judges["judge_b"]
    sets = {name: of_class(test, name) for name in ("horse", "bird", "airplane")}
    pairs = min(map(len, sets.values()))
    sets["pixel_average"] = np.rint((sets["horse"][:pairs].astype(float) + sets["bird"][:pairs]) / 2).astype("uint8")
    seeds = (arguments.seed * STRIDE + np.arange(1 if arguments.quick or on_sample else NUM_BATCHES)).tolist()
    sets["horse_train"] = of_class(train, "horse")
    sets["horse_samples"] = sample(tools.sampler, one_hot(np.full(count, HORSE)), seeds[0], count)
    drawn, found, best_images, nearest = {}, {}, {}, {}
    for method in METHODS:
        for seed in dict.fromkeys([seeds[0], best[method]["seed"]]) if best else seeds:
            batch = draw(tools, method, wing_classes(count), seed, train, arguments.quick)
            drawn.setdefault(method, batch)  # the first one; of the others no more than the best image is kept
            by_a = score(judges["judge_a"], batch.images)
            top = best[method] if best else {"seed": seed, "index": int(by_a.argmax()), "score": float(by_a.max())}
            if seed == top["seed"] and top["score"] > found.get(method, {"score": -1})["score"]:
                found[method], best_images[method] = top, batch.images[top["index"]]
        sets[method] = drawn[method].images
        if drawn[method].collages is not None:
            sets[f"{method}_raw"] = drawn[method].collages
    scores = {name: score(judge, images) for name, images in sets.items()}
    measured = {f"{name}_score": float(each.mean()) for name, each in scores.items()}
    high = measured["high_horse_score"] = float(np.percentile(scores["horse"], 95))
    known, held_out = (extract_features(judge, split.images) for split in (train, test))
    of_test = [metrics.nearest_neighbours(*pair)[0] for pair in ((test.images, train.images), (held_out, known))]
    shown = {method: np.concatenate([best_images[method][None], batch.images]) for method, batch in drawn.items()}
    by_pixels = np.split(metrics.nearest_neighbours(np.concatenate([*shown.values()]), train.images)[0], len(shown))
    of_horses = metrics.mean_distance(of_class(train, "horse")[:count])
    for (method, images), pixels in zip(shown.items(), by_pixels, strict=True):
        features, index = metrics.nearest_neighbours(extract_features(judge, images), known)
        nearest[method] = images, features, train.images[index]
        ratios = pixels / np.median(of_test[0]), features / np.median(of_test[1])  # 1 is real
        measured |= {
            f"{method}_neighbour_ratio": float(np.median(ratios[1][1:])),
            f"{method}_diversity": metrics.mean_distance(images[1:]) / of_horses,
        }
        if not on_sample:  # of few images, shares change in steps
            measured |= {
                f"{method}_best_score": float(score(judge, images[:1])[0]),
                f"{method}_best_score_of_judge_a": float(score(judges["judge_a"], images[:1])[0]),
                f"{method}_best_pixel_ratio": float(ratios[0][0]),
                f"{method}_best_neighbour_ratio": float(ratios[1][0]),
                f"{method}_above_horses": float(np.mean(scores[method] > high)),
                f"{method}_nearer_than_test_pixels": float(np.mean(pixels < np.percentile(of_test[0], 1))),
                f"{method}_nearer_than_test_features": float(np.mean(features < np.percentile(of_test[1], 1))),
            }
    return PegasusEvaluation(measured, tools, drawn, found, best_images, scores, nearest)


def measure(name, model, config, splits, arguments, on_sample, best=None):
    """Returns the metrics of a model on the test images, or on the sample, and the `PegasusEvaluation` of diffusion."""
    judges = {} if "judge" in name else {each: restore(arguments, each)[0] for each in ("judge_a", "judge_b")}
    if not on_sample:  # few images are measured in float32, so that metrics compare across processors
        judges, model = {key: models.for_prediction(each) for key, each in judges.items()}, models.for_prediction(model)
    if "judge" in name:
        return measure_judge(model, splits["test"]), None
    measured = measure_generator(name, model, config, judges["judge_b"], splits["test"], arguments, on_sample)
    if name == "gan":
        for method, condition in CONDITIONED.items():
            images = generate(name, model, config, condition(wing_classes(BATCH)), arguments.seed)
            measured[f"{method}_score"] = float(score(judges["judge_b"], images).mean())
        return measured, None
    tools = make_tools(model, judges["judge_a"], config, arguments.quick)
    evaluation = evaluate_pegasus(tools, judges, splits, arguments, on_sample, None if on_sample else best)
    return measured | evaluation.metrics, evaluation


def smaller(config):
    """Returns a config with the narrowest network, and the shallowest, for a quick run."""
    widths = {key: (8,) * len(value) for key, value in dataclasses.asdict(config).items() if "widths" in key}
    return dataclasses.replace(config, **widths, **({"blocks": 1} if hasattr(config, "blocks") else {}))


def train(arguments):
    """Trains the wanted models, and saves them as measured on the sample; with `--sample`, returns these metrics."""
    load = functools.partial(load_splits, arguments.data_dir, quick=arguments.quick)
    (splits, dataset), (sample_splits, _) = load(sample=arguments.sample), load(sample=True)
    names = [arguments.model] if arguments.model else list(CONFIGS)
    measured, collages = {}, None
    for name, seed, folder in results.training_runs(SCRIPT, arguments, names, dict.fromkeys(names, 1)):
        config = cli.with_flags(smaller(CONFIGS[name]) if arguments.quick else CONFIGS[name], arguments)
        if "judge" not in name and collages is None:
            judge, _ = (restore(arguments, each)[0] for each in ("judge_a", "judge_b"))  # both, before training starts
            collages = make_collages(models.for_prediction(judge), splits["train"], seed)
        run = train_network(name, config, splits, collages, seed, folder=folder, resume=arguments.resume)
        network, curves, seconds = run
        measured[name] = measure(name, network, config, sample_splits, arguments, True)
        sizes = {part: len(split.images) for part, split in {**splits, "sample": sample_splits["test"]}.items()}
        about = {"dataset": {"name": dataset.name, **sizes, "sha256": dataset.checksums}, "curves": curves}
        about["metrics"] = {"sample": measured[name][0]}
        card = models.card(SCRIPT, FILES[name], arguments, config=config, seed=seed, seconds=seconds, **about)
        if "judge" not in name:
            card["dataset"]["collages"] = len(collages.images)
            card["steps"] = training.count_steps(len(examples(splits["train"], collages)["images"]), config)
        models.save_model(network, arguments.output_dir / "saved_models" / SCRIPT / f"{FILES[name]}.keras", card)
    return measured if arguments.sample else {}  # the full dataset takes long to measure on: `report` does it


# --------------------------------------------------------------------------------------------------------- experiments


def run_experiments(arguments):
    """Draws winged horses with one setting changed at a time, several seeds each, and scores them by judge A."""
    plan = results.optional_module("experiments", SCRIPT)
    if plan is None:
        return
    (network, config, _), (judge, _, _) = (restore(arguments, name) for name in ("diffusion", "judge_a"))
    network, judge = models.for_prediction(network), models.for_prediction(judge)
    tools = make_tools(network, judge, config, arguments.quick)
    path, count = results.table_path(arguments.output_dir, SCRIPT), QUICK_BATCH if arguments.quick else BATCH
    for run in results.unfinished(path, plan.runs(arguments.seed, arguments.quick)):
        method, changed, options = plan.EXPERIMENTS[run["name"]]
        wings, seed = wing_classes(count), run["seed"] * STRIDE + STRIDE - 1  # no seed of a reported batch
        if method == "learned":
            sampling = dataclasses.replace(LEARNED_SAMPLING, **changed)
            null = NULL if options.get("away_from") == "no class" else PLAIN_HORSE
            sampler = build_sampler(network, config, sampling, arguments.quick, null)
            images = sample(sampler, learned(wings), seed, count)
        else:
            function, settings = (draw_composition, COMPOSITION) if method == "composition" else (draw_collage, COLLAGE)
            settings = dataclasses.replace(settings, **changed | ({"steps": QUICK_STEPS} if arguments.quick else {}))
            images = function(tools, wings, seed, settings, **options).images
        scores = score(judge, images)
        changed = ", ".join(f"{key}={value}" for key, value in (changed | options).items())
        row = {"score": round(float(scores.mean()), 5), "above_half": round(float(np.mean(scores > 0.5)), 5)}
        results.append_row(path, {**run, "method": method, "changed": changed, **row, "samples": count})


# -------------------------------------------------------------------------------------------------------------- report


def report(arguments, measured=None):
    """Restores the saved models, measures them unless `measured` just now, writes figures; returns the exit code."""
    splits, dataset = load_splits(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    folder, part = arguments.output_dir / "report" / "figures" / SCRIPT, "sample" if arguments.sample else "test"
    names, size = [arguments.model] if arguments.model else list(CONFIGS), len(splits["test"].images)
    rows, written, restored, measured = [], [], {name: restore(arguments, name) for name in names}, measured or {}
    for name, (model, config, card) in restored.items():
        arguments.seed = card["seed"]  # what is drawn to be measured depends on it
        if name not in measured:
            known = None if arguments.record or arguments.quick else card.get("best")
            measured[name] = measure(name, model, config, splits, arguments, arguments.sample, known)
        (found, _), sums, values = measured[name], dataset.checksums, {part: (size, measured[name][0])}
        rows += results.compare(card, found, part=part, size=size, sha256=sums)
        if arguments.record or (arguments.train and not arguments.sample):
            path = models.models_folder(arguments.output_dir, SCRIPT) / f"{FILES[name]}.keras"
            results.record_metrics(path, None if arguments.sample else sums, **values)
            if not (arguments.sample or arguments.quick) and measured[name][1]:
                write_json(path.with_suffix(".json"), models.read_card(path) | {"best": measured[name][1].best})
    if arguments.train or (arguments.record and not arguments.sample):
        kept = ("epochs", "hardware", "shortened", "seconds", "parameters")
        of_models = {name: {key: card[key] for key in kept} for name, (*_, card) in restored.items()}
        of_models = {name: values | {part: measured[name][0]} for name, values in of_models.items()}
        settings = {"composition": COMPOSITION, "collage": COLLAGE, "learned": LEARNED_SAMPLING, "samples": SAMPLING}
        settings = {name: dataclasses.asdict(each) for name, each in settings.items()}
        summary = {"script": f"{SCRIPT}.py", "models": of_models, "seeds": 1, "settings": settings}
        if {"diffusion", "gan"} & set(names) and not arguments.sample and not arguments.quick:
            summary["fid_scale"] = fid.scale(arguments.data_dir, splits["train"].images, splits["test"].images)
        written.append(results.write_results(SCRIPT, arguments, summary))
    plots = results.optional_module("plots", SCRIPT)
    path, numbers = results.recorded_path(arguments, f"{SCRIPT}_experiments.csv"), ("score", "above_half")
    table = results.read_table(path, numbers, ("name", "method"))
    if plots and len(table):
        written.append(plots.draw_experiments(table, folder / "experiments.png"))
    if plots and not arguments.model:  # the figures compare all models
        written += draw_figures(plots, restored, measured["diffusion"][1], splits, arguments, folder)
    return results.conclude(SCRIPT, arguments, rows, written)


def draw_figures(plots, restored, evaluation, splits, arguments, folder):
    """Writes the figures; returns their paths."""
    config, gan_config = restored["diffusion"][1], restored["gan"][1]
    strengths, steps = np.linspace(0, 1, 7), QUICK_STEPS if arguments.quick else COMPOSITION.steps
    settings = dataclasses.replace(COMPOSITION, steps=steps)
    parts = evaluation.tools, wing_classes(4), arguments.seed * STRIDE, settings
    between = [draw_composition(*parts, strength=strength).images for strength in strengths]
    real = [of_class(splits["train"], name).take(range(8), 0, mode="wrap") for name in CLASSES]
    plain, classes = {"training images": np.concatenate(real)}, one_hot(np.repeat(np.arange(len(CLASSES)), 8))
    for title, name in (("diffusion", "diffusion"), ("GAN", "gan")):
        plain[title] = generate(name, *restored[name][:2], classes, arguments.seed, quick=arguments.quick)
    curves = {name: card["curves"] for name, (*_, card) in restored.items()}
    # Of the methods that draw without a dataset; others paste onto images that somebody took.
    best = max(METHODS[:4], key=lambda method: evaluation.best[method]["score"])
    stages = [(each.time, denormalize(each.image), each.mask) for each in evaluation.drawn["composition"].stages]
    collage, unselected = evaluation.drawn["collage"], {name: each.images for name, each in evaluation.drawn.items()}
    return [
        plots.draw_pegasus(evaluation.best_images, best, folder / "pegasus.png"),
        *(plots.draw_unselected(each, name, folder / f"unselected_{name}.png") for name, each in unselected.items()),
        plots.draw_way(stages, evaluation.drawn["composition"].images, folder / "way.png"),
        plots.draw_collages(collage.collages, collage.pasted, collage.images, folder / "collages.png"),
        plots.draw_network(config.widths, config.patch, config.blocks, folder / "diffusion_network.png"),
        plots.draw_gan(gan_config.widths, gan_config.discriminator_widths, folder / "gan_networks.png"),
        plots.draw_nearest(evaluation.nearest, folder / "nearest.png"),
        plots.draw_scores(evaluation.scores, folder / "scores.png"),
        plots.draw_samples(plain, CLASSES, folder / "samples.png"),
        plots.draw_learning_curves(curves, folder / "learning_curves.png"),
        plots.draw_interpolation(np.stack(between, axis=1), strengths, folder / "interpolation.png"),
    ]


# ---------------------------------------------------------------------------------------------------------------- main


def draw_asked(arguments):
    """Draws what the command line asks for, writes grid, best image by judge A, and arrays; returns the paths."""
    name, count, shown = arguments.model or "diffusion", arguments.samples or BATCH, arguments.class_name
    method = arguments.method or "learned"
    (network, config, card), (judge, *_) = restore(arguments, name), restore(arguments, "judge_a")
    network, judge = models.for_prediction(network), models.for_prediction(judge)  # as candidates are drawn and ranked
    labels = np.full(count, CLASSES.index(shown)) if shown else wing_classes(count, arguments.wings)
    if shown or name == "gan":
        classes = one_hot(labels) if shown else CONDITIONED[method](labels)
        images = generate(name, network, config, classes, arguments.seed, HIGH_GUIDANCE_SAMPLING)
    else:
        draw_batch = functools.partial(draw, make_tools(network, judge, config), method, labels[:BATCH])
        first = arguments.seed * STRIDE
        batches = [draw_batch(first + number).images for number in range(math.ceil(count / BATCH))]
        images = np.concatenate(batches)[:count]
    folder, scores = arguments.output_dir / "runs" / SCRIPT, score(judge, images)
    stem = f"{name}_{shown or method}_{arguments.wings or 'any'}_seed_{arguments.seed}"
    written = [write_grid(images, folder / f"{stem}.png", 2)]
    if not shown:
        best, known = images[scores.argmax()], card.get("best", {}).get(method)
        if known and known["seed"] // STRIDE == arguments.seed and count >= BATCH and not arguments.wings:
            best = draw_batch(known["seed"]).images[known["index"]]  # of all candidates that were drawn alike
        written.append(write_grid(best[None], folder / f"{stem}_best.png", 12))
    with replacing(folder / f"{stem}.npz") as temporary:
        np.savez_compressed(temporary, images=images, score=scores, **{"class" if shown else "wings": labels})
    return [*written, folder / f"{stem}.npz"]


def main(argv=None):
    flags = cli.parser(__doc__, list(CONFIGS))
    group = flags.add_argument_group("conditional sampling, with --load; needs no dataset")
    group.add_argument("--samples", type=cli.number(int, 1, 10_000), metavar="N", help="number of images (default: 64)")
    group.add_argument("--wings", choices=list(WINGED), help="class of the wings (default: both in turn)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--method", choices=METHODS[:4], help="how winged horses are generated (default: learned)")
    either.add_argument("--class", choices=CLASSES, dest="class_name", help="generate this class of CIFAR-10 instead")
    arguments = cli.parse(flags, argv)
    if any(getattr(arguments, name) is not None for name in ("samples", "method", "wings", "class_name")):
        if not arguments.load or "judge" in (arguments.model or ""):
            raise UserError("drawing needs a trained generator; use --load, with --model diffusion or gan")
        if arguments.record or arguments.quick or arguments.sample:
            raise UserError("--record, --quick and --sample are about metrics; leave them out, or what is to be drawn")
        if arguments.class_name and arguments.wings:
            raise UserError("--wings is about winged horses; leave out --class or --wings")
        if arguments.model == "gan" and arguments.method not in (None, *CONDITIONED):
            raise UserError(f"the GAN cannot do that; use --method {' or '.join(CONDITIONED)}")
        print("wrote", *draw_asked(arguments), sep="\n  ")
        return None
    if arguments.experiments and (arguments.epochs or arguments.batch_size):
        raise UserError("--experiments draws from trained networks; leave out --epochs and --batch-size")
    if arguments.experiments:
        return run_experiments(arguments)
    return report(arguments, train(arguments) if arguments.train else None)


if __name__ == "__main__":
    cli.run(main)
