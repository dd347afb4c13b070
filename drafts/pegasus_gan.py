"""A winged horse out of CIFAR-10, which has horses, birds and airplanes, but no winged horse.

Two class-conditional generators are trained on CIFAR-10 alone: a diffusion model and, for comparison, a GAN. The first
draws winged horses in three ways: conditioned on a mixture of horse and bird (blend); guided by the bird in a band over
the horse's back (composition); and from a collage of a horse and a wing, noised and denoised. Two classifiers, trained
on composites of two images, say how much horse and bird or airplane is in an image: judge A ranks, judge B reports.

    python pegasus_gan.py --train                  trains the four networks, draws and measures candidates
    python pegasus_gan.py --load                   restores the networks and verifies their metrics
    python pegasus_gan.py --experiments            the comparison behind the choices, by judge A
    python pegasus_gan.py --load --method collage  draws 64 winged horses, no dataset
    python pegasus_gan.py --load --class horse     draws images of one class, no dataset

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
from common.files import replacing
from common.images import write_grid

SCRIPT = "pegasus_gan"
IMAGE_SIZE, IMAGE_SHAPE = 32, (32, 32, 3)
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HORSE, WINGED = CLASSES.index("horse"), {name: CLASSES.index(name) for name in ("bird", "airplane")}
OVERSAMPLED = ("horse", "bird", "airplane", "deer")  # the generators see these classes twice per epoch
NULL = {"classes": 0.0}  # weights of the classes that stand for "unconditional"
WAYS = ("blend", "composition", "collage", "collage_real")  # the last one with real horses and wings
NUM_VALIDATION, SPLIT_SEED = 2000, 10
BATCH, NUM_BATCHES = 64, 32  # candidates drawn together, and how many times per way; the first batch is the unselected
NUM_SAMPLES, NUM_SAMPLES_ON_SAMPLE = 10_000, 100  # of all classes, without and with --sample
HEIGHT, WING_LENGTH, MAX_DROP = 9, 13, 6  # pixels: of the band, of pasted wings, a horse is moved down for them at most
NUM_WINGS, PREDICT_BATCH_SIZE = 24, 250  # wings that are kept of those cut out for a batch
QUICK_IMAGES, QUICK_BATCH, QUICK_STEPS, SAMPLE_BATCH = 96, 4, 4, 16


@dataclasses.dataclass(frozen=True)
class Config:
    """The diffusion network and its training."""

    widths: tuple = (96, 144)  # filters at 16 and 8 patches a side
    patch: int = 2  # pixels a side; the network works at a quarter of the cost
    blocks: int = 2  # residual blocks per resolution, as many on the way down as on the way up
    target: str = "velocity"  # what it predicts, or "noise"
    loss: str = "mse"  # or "mae"
    average: float = 0.999  # momentum of the moving average of the weights
    learning_rate: float = 1e-3  # the highest one of the schedule
    batch_size: int = 128
    epochs: int = 32  # of 67,200 images: 48,000, and those of `OVERSAMPLED` once more


@dataclasses.dataclass(frozen=True)
class GanConfig:
    """Generator, discriminator, and their training."""

    widths: tuple = (128, 64, 32)  # filters of the generator at 8, 16 and 32 pixels a side
    discriminator_widths: tuple = (64, 128, 128)  # filters at 16, 8 and 4 pixels a side
    noise: int = 128  # size of the noise vector
    embedding: int = 64  # size of the embedding of the classes
    average: float = 0.999  # momentum of the moving average of the weights
    learning_rate: float = 3e-4  # the highest one of the schedule
    batch_size: int = 64
    epochs: int = 18


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """A multi-label classifier and its training."""

    widths: tuple = (80, 160)  # filters at 16 and 8 pixels a side
    kernel: int = 3  # side of the first filters
    pooling: str = "logsumexp"  # of evidence over space: a smooth maximum (Pinheiro & Collobert 2015); or "mean"
    learning_rate: float = 2e-3  # the highest one of the schedule
    batch_size: int = 128
    epochs: int = 18


CONFIGS = {  # in the order of training: judge B measures the generators
    "judge_a": JudgeConfig(),
    "judge_b": JudgeConfig(widths=(64, 192), kernel=5, pooling="mean"),
    "diffusion": Config(),
    "gan": GanConfig(),
}
FILES = {name: "gan_generator" if name == "gan" else name for name in CONFIGS}  # of the saved models
SAMPLING = diffusion.Sampling("ddpm", steps=25, guidance=1.5, spacing=1.5)  # of samples that are measured
DETERMINISTIC_SAMPLING = diffusion.Sampling("ddim", steps=10, guidance=1.5, spacing=1.5)  # of few images: exact
TYPICAL_SAMPLING = diffusion.Sampling("ddim", steps=20, guidance=3.0, spacing=1.5)  # of horses, birds and blends
MIXTURE = 0.5  # weight of bird or airplane in the blend
COMPOSITION = Composition()
COLLAGE = Composition(start=0.55, layout=1.0, steps=16, spacing=1.0, shift=0, correctors=0)

# ---------------------------------------------------------------------------------------------------------------- data


def load_splits(data_dir, *, sample=False, quick=False):
    """Returns a dict of `LabelledImages`, "train", "validation" and "test", which only measures, and the `Dataset`."""
    dataset = load_cifar10(data_dir, sample=sample)
    labels, size = np.asarray(dataset.train.labels), min(NUM_VALIDATION, len(dataset.train.labels) // 5)
    parts = train_test_split(np.arange(len(labels)), test_size=size, random_state=SPLIT_SEED, stratify=labels)
    count = QUICK_IMAGES if quick else None
    splits = {
        part: LabelledImages(dataset.train.images[np.sort(chosen[:count])], labels[np.sort(chosen[:count])])
        for part, chosen in zip(("train", "validation"), parts, strict=True)
    }
    return splits | {"test": LabelledImages(*(np.asarray(array[:count]) for array in dataset.test))}, dataset


def one_hot(labels):
    """Returns weights of the classes, float32 (n, 10), for labels (n,)."""
    return np.eye(len(CLASSES), dtype="float32")[labels]


def examples(split, oversampled=False):
    """Returns what the networks are fitted on: dict of `images` and `classes`; `OVERSAMPLED` twice where wanted."""
    chosen = np.arange(len(split.labels))
    if oversampled:
        chosen = np.append(chosen, np.flatnonzero(np.isin(split.labels, [CLASSES.index(name) for name in OVERSAMPLED])))
    return {"images": split.images[chosen], "classes": one_hot(split.labels[chosen])}


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
    """Builds the U-Net of the diffusion model: from `noisy`, `time` and `classes` (n, 10), weights, all 0 for none."""
    # No attention: convolutions see all of the coarser map, and it would take a quarter of the time.
    options = {name: getattr(config, name) for name in ("patch", "widths", "blocks")}
    return diffusion.build_unet(IMAGE_SHAPE, {"classes": len(CLASSES)}, attention=0, mixtures=True, **options)


def modulated(features, condition):
    """Batch normalisation whose scale and shift depend on the condition (Dumoulin et al. 2017), and ReLU."""
    features = layers.BatchNormalization(center=False, scale=False, momentum=0.95)(features)
    scale, shift = (layers.Dense(features.shape[-1])(condition)[:, None, None] for _ in range(2))
    return layers.ReLU()(features * (1 + scale) + shift)


class UnitSpectralNorm(keras.constraints.Constraint):
    """Divides a kernel by its largest singular value after every step (Miyato et al. 2018 differentiate through it)."""

    def __call__(self, kernel):
        matrix = ops.reshape(kernel, (-1, kernel.shape[-1]))
        right = np.random.default_rng(0).standard_normal((kernel.shape[-1], 1), dtype="float32")
        for _ in range(8):
            left = ops.normalize(ops.matmul(matrix, right), axis=0)
            right = ops.normalize(ops.matmul(ops.transpose(matrix), left), axis=0)
        return kernel / ops.norm(ops.matmul(matrix, right))


def build_generator(config):
    """Builds the generator of the GAN: from a dict of `noise` (n, noise) and `classes` (n, 10) to images, -1 to 1."""
    noise, classes = keras.Input((config.noise,), name="noise"), keras.Input((len(CLASSES),), name="classes")
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
    """Builds the discriminator of the GAN: from `images`, -1 to 1, and `classes` to scores (n, 1), real ones high."""
    images, classes = keras.Input(IMAGE_SHAPE, name="images"), keras.Input((len(CLASSES),), name="classes")
    bounded = {"kernel_initializer": "orthogonal", "kernel_constraint": UnitSpectralNorm()}
    features = convolution(config.discriminator_widths[0] // 2, **bounded)(images)
    for filters in config.discriminator_widths:
        inside = convolution(filters, **bounded)(layers.LeakyReLU(0.2)(features))
        inside = layers.LeakyReLU(0.2)(layers.AveragePooling2D(2)(inside))
        inside = convolution(filters, **bounded)(inside)
        features = layers.Add()([layers.AveragePooling2D(2)(convolution(filters, 1, **bounded)(features)), inside])
    features = ops.sum(ops.cast(layers.LeakyReLU(0.2)(features), "float32"), axis=(1, 2))
    embedding = layers.Dense(features.shape[-1], use_bias=False, dtype="float32", **bounded)(classes)
    # A projection discriminator (Miyato & Koyama 2018): the embedding of the classes is one more direction of evidence.
    projection = ops.sum(features * embedding, axis=1, keepdims=True)
    score = layers.Dense(1, dtype="float32", **bounded)(features) + projection
    return keras.Model({"images": images, "classes": classes}, score, name="discriminator")


def build_judge(config):
    """Builds a judge: from images in the uint8 range to the probability that each class is there, (n, 10).

    Its layers "evidence", logits of every class (n, 8, 8, 10), and "maps", features (n, 8, 8, filters), are used too.
    """
    images = keras.Input(IMAGE_SHAPE, name="images")

    def normalized(features, filters, kernel=3):
        return layers.BatchNormalization()(convolution(filters, kernel, use_bias=False)(features))

    features = layers.ReLU()(normalized(layers.Rescaling(1 / 127.5, -1)(images), config.widths[0] // 2, config.kernel))
    for filters, pooled in zip((*config.widths, config.widths[-1]), (True, True, False), strict=True):
        features = layers.MaxPooling2D(2)(features) if pooled else features
        inside = normalized(layers.ReLU()(normalized(features, filters)), filters)
        features = layers.ReLU()(layers.Add()([normalized(features, filters, 1), inside]))
    features = layers.Activation("linear", name="maps")(features)
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
        images, shown = augmentation.composites(images, inputs["classes"], seed)
        images = augmentation.blur(images, seed, 0.15)  # as estimates of the diffusion model are at first
        return self.judge((images + 1) * 127.5, training=training), shown

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return ops.mean(keras.losses.binary_crossentropy(y_pred[1], y_pred[0]))


class GanTrainer(keras.Model):
    """Trains generator and discriminator at once with the hinge loss (Lim & Ye 2017).

    It is fitted on a dict of `images` and `classes`. All images that the discriminator sees are augmented as in Zhao et
    al. 2020, so that it does not memorise the real ones.
    """

    def __init__(self, generator, discriminator, seed):
        super().__init__()
        self.generator, self.discriminator = generator, discriminator
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.trackers = [keras.metrics.Mean(name=f"{name}_loss") for name in ("generator", "discriminator")]
        self.built = True  # all its variables exist, without which a checkpoint cannot be restored

    def call(self, inputs, training=False):
        """Returns the scores of real images, of generated ones, and of generated ones as the generator sees them."""
        seed, classes = self.seed_generator, inputs["classes"]
        real = augmentation.mirror(normalize(inputs["images"]), seed)
        noise = keras.random.normal((ops.shape(classes)[0], self.generator.input["noise"].shape[1]), seed=seed)
        generated = self.generator({"noise": noise, "classes": classes}, training=training)
        real, generated = (augmentation.differentiable(images, seed) for images in (real, generated))
        images = ops.concatenate([real, ops.stop_gradient(generated)])
        scores = self.discriminator({"images": images, "classes": ops.concatenate([classes, classes])})
        # The generator learns from a discriminator that does not, which lets one optimizer train both.
        frozen = [ops.stop_gradient(variable.value) for variable in self.discriminator.trainable_variables]
        seen, _ = self.discriminator.stateless_call(frozen, [], {"images": generated, "classes": classes})
        return *ops.split(scores, 2), seen

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        real, generated, seen = y_pred
        losses = -ops.mean(seen), ops.mean(ops.relu(1 - real)) + ops.mean(ops.relu(1 + generated))
        for tracker, loss in zip(self.trackers, losses, strict=True):
            tracker.update_state(loss)
        return losses[0] + losses[1]


def train_network(name, config, splits, seed, **checkpoint):
    """Trains one of the four networks, a key of `CONFIGS`; returns it in float32, learning curves, and seconds."""
    data, held_out = examples(splits["train"], "judge" not in name), examples(splits["validation"])
    if "judge" in name:
        build, wrap = build_judge, functools.partial(JudgeTrainer, seed=seed)
        optimizer = functools.partial(keras.optimizers.AdamW, weight_decay=0.02)
    elif name == "diffusion":
        build, optimizer = build_network, diffusion.averaging_optimizer(config.average, global_clipnorm=1.0)
        options = {"null_labels": NULL, "normalize": normalize, "flip": True}
        wrap = functools.partial(diffusion.Trainer, config=config, seed=seed, **options)
        held_out = diffusion.with_fixed_noise(held_out, IMAGE_SHAPE)
    else:
        build, held_out = build_generator, None  # its losses say nothing about other images
        average = {"use_ema": True, "ema_momentum": config.average}
        optimizer = functools.partial(keras.optimizers.Adam, beta_1=0.0, beta_2=0.9, **average)
        keras.utils.set_random_seed(seed)
        with training.computing_in(training.fast_precision()):
            discriminator = build_discriminator(config)
        wrap = functools.partial(GanTrainer, discriminator=discriminator, seed=seed)
    parts = functools.partial(build, config), wrap, optimizer, config, data, seed, held_out
    network, curves, seconds = diffusion.train_network(*parts, **checkpoint)
    if name == "gan":  # batch normalisation has the statistics of the last weights, not of the averaged ones
        draws = np.random.default_rng(seed)
        for _ in range(min(training.count_steps(len(data["images"]), config), 100)):
            noise = draws.standard_normal((BATCH, config.noise), dtype="float32")
            network({"noise": noise, "classes": one_hot(draws.integers(10, size=BATCH))}, training=True)
    return compiled_fast(network), curves, seconds


# ---------------------------------------------------------------------------------------------------------- three ways


def sample(sampler, classes, seed, batch_size=BATCH):
    """Draws one image for each row of `classes`, float32 (n, 10), weights; returns uint8 (n, 32, 32, 3)."""
    inputs = diffusion.sampler_inputs({"classes": classes}, IMAGE_SHAPE, seed)
    return denormalize(sampler.predict(inputs, batch_size=batch_size, verbose=0))


def find_objects(maps, images, labels):
    """Finds the object of the class `labels` (n,) in each image by class activation `maps` (Zhou et al. 2016)."""
    evidence = maps.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)[np.arange(len(images)), ..., labels]
    return masks.find_objects(images, masks.enlarged(evidence, IMAGE_SIZE))


class Tools(NamedTuple):
    """What draws winged horses. Every model compiles once per batch size."""

    sampler: diffusion.Sampler  # conditioned on the same classes everywhere
    plain: diffusion.SpatialGuidance  # one step of that
    spatial: diffusion.SpatialGuidance  # one step, conditioned on two classes by a mask
    maps: keras.Model  # see `find_objects`


def make_tools(network, judge, config, quick=False):
    """Returns the `Tools` of a diffusion network and judge A."""
    guidance = functools.partial(diffusion.SpatialGuidance, network, config.target, (-1, 1))
    maps = keras.Model(judge.input, judge.get_layer("evidence").output)
    parts = guidance(False), guidance(True), maps
    return Tools(build_sampler(network, config, TYPICAL_SAMPLING, quick), *map(compiled_fast, parts))


def build_sampler(network, config, sampling, quick=False):
    sampling = dataclasses.replace(sampling, steps=QUICK_STEPS) if quick else sampling
    return compiled_fast(diffusion.Sampler(network, config.target, sampling, NULL, (-1, 1)))


def compiled_fast(model):
    """Returns the model, which under TensorFlow is not compiled by XLA: that takes five times as long."""
    model.jit_compile = training.compile_options(1)["jit_compile"]
    return model


def batch_seeds(arguments, count):  # of candidates; 500 more is the seed of the sources of wings
    return [arguments.seed * 1000 + number for number in range(count)]


class Drawn(NamedTuple):
    """A batch of winged horses, and how they came about."""

    images: np.ndarray  # uint8 (n, 32, 32, 3)
    stages: list = ()  # of `diffusion.Stage`
    collages: np.ndarray | None = None  # uint8, what was noised


def wing_classes(count, wings=None):
    """Returns the class of the wings of each image: "bird", "airplane", or for None one after the other; int (n,)."""
    return np.resize([WINGED[wings]] if wings else list(WINGED.values()), count)


def blend(wings, mixture=MIXTURE):
    """Returns weights of the classes, (n, 10): `mixture` of the class of `wings` (n,), and the rest of horse."""
    return (1 - mixture) * one_hot(np.full(len(wings), HORSE)) + mixture * one_hot(wings)


def draw_composition(tools, wings, seed, settings=COMPOSITION, height=HEIGHT, strength=1.0):
    """Draws horses from noise, and `wings` (n,), a class each, in a band above the back that is found on the way.

    The horse is moved down if there is no room above its back. `strength`, 0 to 1, multiplies the mask.
    """
    horse, bodies = np.full(len(wings), HORSE), None

    def find_band(image):
        nonlocal bodies
        first, bodies = bodies is None, find_objects(tools.maps, denormalize(image), horse)
        if first:
            drop = masks.room_needed(bodies, height, MAX_DROP)
            image, bodies = masks.move_down(image, drop), masks.move_down(bodies, drop)
        return image, strength * masks.smooth(masks.wing_bands(bodies, height))

    noise = np.random.default_rng([seed, 1]).standard_normal((len(wings), *IMAGE_SHAPE), dtype="float32")
    parts = one_hot(horse), one_hot(wings), settings, [seed, 2], find_band
    images, stages = diffusion.compose(tools.plain, tools.spatial, noise, *parts)
    return Drawn(denormalize(images), stages)


def draw_collage(tools, wings, seed, settings=COLLAGE, real=None):
    """Pastes wings onto horses by code, noises the collages to `settings.start`, and denoises them (SDEdit).

    Horses and wings are generated, or from `real`, `LabelledImages`: of four times as many horses those seen best.
    """
    draws, count, horse = np.random.default_rng([seed, 1]), len(wings), np.full(len(wings), HORSE)
    if real is None:
        horses, sources = (
            sample(tools.sampler, one_hot(each), seed + more, count) for each, more in ((horse, 0), (wings, 500))
        )
    else:
        labels = np.concatenate([wings, horse, horse, horse, horse])
        images = real.images[[draws.choice(np.flatnonzero(real.labels == label)) for label in labels]]
        sources, horses = images[:count], images[count:]
    cut = masks.cut_wings(sources, find_objects(tools.maps, sources, wings), NUM_WINGS)
    bodies = find_objects(tools.maps, horses, np.full(len(horses), HORSE))
    best = masks.best_seen(bodies, count)
    horses, bodies = horses[best], bodies[best]
    drop = masks.room_needed(bodies, WING_LENGTH, MAX_DROP)
    horses, bodies = masks.move_down(horses, drop), masks.move_down(bodies, drop)
    collages, pasted = masks.place_wings(horses, bodies, cut, WING_LENGTH, [seed, 3])
    mask = masks.smooth(pasted > 0.1)
    clean = collages / np.float32(127.5) - 1
    noisy = diffusion.noised(clean, settings.start, draws.standard_normal(clean.shape, dtype="float32"))
    parts = one_hot(horse), one_hot(wings), settings, [seed, 2], lambda image: (image, mask)
    images, stages = diffusion.compose(tools.plain, tools.spatial, noisy, *parts)
    return Drawn(denormalize(images), stages, collages)


def draw(tools, way, wings, seed, real=None, quick=False):
    """Draws one batch of winged horses in one of `WAYS`; `real` are the images of "collage_real"."""
    if way == "blend":
        return Drawn(sample(tools.sampler, blend(wings), seed, len(wings)))
    fewer = {"steps": QUICK_STEPS} if quick else {}
    if way == "composition":
        return draw_composition(tools, wings, seed, dataclasses.replace(COMPOSITION, **fewer))
    return draw_collage(tools, wings, seed, dataclasses.replace(COLLAGE, **fewer), real if way == WAYS[3] else None)


# ---------------------------------------------------------------------------------------------------------- evaluation


def restore(arguments, name):
    """Restores a model, a key of `CONFIGS`; returns it, its config and its card."""
    path = models.model_path(arguments.output_dir, SCRIPT, FILES[name])
    model, config, card = models.restore(path, SCRIPT, type(CONFIGS[name]))
    return compiled_fast(model), config, card


def predict(judge, images):
    """Returns the probability that each class is in the image, float32 (n, 10)."""
    return judge.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)


def score(judge, images):
    """Returns how much horse and wings each image shows: the root of the product of both probabilities, (n,)."""
    probabilities = predict(judge, images)
    return np.sqrt(probabilities[:, HORSE] * probabilities[:, list(WINGED.values())].max(axis=1))


def extract_features(judge, images):
    """Returns what the judge knows about images, float32 (n, filters): the mean of its last features."""
    maps = compiled_fast(keras.Model(judge.input, judge.get_layer("maps").output))
    return maps.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0).mean(axis=(1, 2))


def measure_judge(judge, split):
    """Returns accuracy, and how well the score tells halves of horse and winged from others (area under the ROC)."""
    horses, winged = of_class(split, "horse"), of_class(split, *WINGED)
    without_wings = of_class(split, "deer", "dog", "truck", "ship")
    both, mixed = (augmentation.halves(horses, each) for each in (winged, without_wings))
    others = np.concatenate([horses, winged, mixed])
    scores = score(judge, np.concatenate([both, others]))
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
    """Returns the metrics of class-conditional samples, as many of each class: agreement of judge B, FID (768-d)."""
    count = 20 if arguments.quick else NUM_SAMPLES_ON_SAMPLE if on_sample else NUM_SAMPLES
    labels, sampling = np.arange(count) % len(CLASSES), DETERMINISTIC_SAMPLING if on_sample else SAMPLING
    images = generate(name, model, config, one_hot(labels), arguments.seed, sampling, arguments.quick)
    measured = {"class_agreement": float(np.mean(predict(judge, images).argmax(1) == labels))}
    if on_sample or count < fid.MIN_IMAGES:
        return measured
    compare = fid.comparison(arguments.data_dir, {"test images": split.images[:count]})
    return measured | compare(images, "test images")


class PegasusEvaluation(NamedTuple):
    """Winged horses, and how they compare with real images."""

    metrics: dict
    tools: Tools
    drawn: dict  # from each of `WAYS` to the first batch, a `Drawn`, unselected
    best: dict  # from each way to "seed", "index" and "score" of the best candidate by judge A
    best_images: dict  # from each way to that image
    scores: dict  # from the name of a set of images to their scores by judge B (n,)
    nearest: dict  # from each way to distances (n,) and nearest training images of the first batch, by their features


def evaluate_pegasus(tools, judges, splits, arguments, on_sample, best=None):
    """Draws candidates in every way, finds the best by judge A unless `best` says so, and measures them by judge B."""
    count = QUICK_BATCH if arguments.quick else SAMPLE_BATCH if on_sample else BATCH
    train, test, judge = splits["train"], splits["test"], judges["judge_b"]
    sets = {name: of_class(test, name) for name in ("horse", "bird", "airplane")}
    pairs = min(map(len, sets.values()))
    sets["pixel_average"] = np.rint((sets["horse"][:pairs].astype(float) + sets["bird"][:pairs]) / 2).astype("uint8")
    drawn, found, best_images, nearest, measured = {}, {}, {}, {}, {}
    for way in WAYS:
        first, *others = batch_seeds(arguments, 1 if arguments.quick or on_sample else NUM_BATCHES)
        seeds = {first, best[way]["seed"]} if best else [first, *others]
        batches = {seed: draw(tools, way, wing_classes(count), seed, train, arguments.quick) for seed in seeds}
        scores = {seed: score(judges["judge_a"], batch.images) for seed, batch in batches.items()}
        seed = max(seeds, key=lambda seed: scores[seed].max())
        index = int(scores[seed].argmax())
        found[way] = best[way] if best else {"seed": seed, "index": index, "score": float(scores[seed][index])}
        drawn[way], best_images[way] = batches[first], batches[found[way]["seed"]].images[found[way]["index"]]
        sets[way] = drawn[way].images
        if drawn[way].collages is not None:
            sets[f"{way}, pasted"] = drawn[way].collages
    scores = {name: score(judge, images) for name, images in sets.items()}
    known, held_out = (extract_features(judge, split.images) for split in (train, test))
    of_test = [metrics.nearest_neighbours(*pair)[0] for pair in ((test.images, train.images), (held_out, known))]
    for way, (images, *_) in drawn.items():
        by_pixels, _ = metrics.nearest_neighbours(images, train.images)
        by_features, index = metrics.nearest_neighbours(extract_features(judge, images), known)
        nearest[way] = by_features, train.images[index]
        measured |= {
            f"{way}_score": float(scores[way].mean()),
            f"{way}_above_horses": float(np.mean(scores[way] > np.percentile(scores["horse"], 95))),
            f"{way}_best_score": float(score(judge, best_images[way][None])[0]),
            f"{way}_nearer_than_test_pixels": float(np.mean(by_pixels < np.percentile(of_test[0], 1))),
            f"{way}_nearer_than_test_features": float(np.mean(by_features < np.percentile(of_test[1], 1))),
            f"{way}_realism": float(np.median(by_features) / np.median(of_test[1])),  # 1: as near as test images
            f"{way}_diversity": metrics.mean_distance(images) / metrics.mean_distance(of_class(train, "horse")[:count]),
        }
    measured |= {f"{name}_score": float(scores[name].mean()) for name in ("horse", "bird", "pixel_average")}
    return PegasusEvaluation(measured, tools, drawn, found, best_images, scores, nearest)


def measure(name, model, config, judges, splits, arguments, on_sample, best=None):
    """Returns the metrics of a model on the test images, or on the sample, and the `PegasusEvaluation` of diffusion."""
    if not on_sample:  # metrics of few images must not depend on the processor
        judges, model = {key: models.for_prediction(each) for key, each in judges.items()}, models.for_prediction(model)
    if "judge" in name:
        return measure_judge(model, splits["test"]), None
    measured = measure_generator(name, model, config, judges["judge_b"], splits["test"], arguments, on_sample)
    if name == "gan":
        images = generate(name, model, config, blend(wing_classes(BATCH)), arguments.seed)
        return measured | {"blend_score": float(score(judges["judge_b"], images).mean())}, None
    tools = make_tools(model, judges["judge_a"], config, arguments.quick)
    evaluation = evaluate_pegasus(tools, judges, splits, arguments, on_sample, None if on_sample else best)
    return measured | evaluation.metrics, evaluation


def needed_judges(arguments, name, trained):
    """Returns the judges that measure a model, those in `trained` (dict) or restored."""
    names = [] if "judge" in name else ["judge_b"] if name == "gan" else ["judge_a", "judge_b"]
    return {judge: trained[judge] if judge in trained else restore(arguments, judge)[0] for judge in names}


def smaller(config):
    """Returns a config with the narrowest network, and the shallowest, for a quick run."""
    widths = {key: (8,) * len(value) for key, value in dataclasses.asdict(config).items() if "widths" in key}
    return dataclasses.replace(config, **widths, **({"blocks": 1} if hasattr(config, "blocks") else {}))


def train(arguments):
    """Trains, measures and saves the wanted models one by one; returns what `measure` says of each."""
    load = functools.partial(load_splits, arguments.data_dir, quick=arguments.quick)
    (splits, dataset), (few, _) = load(sample=arguments.sample), load(sample=True)
    names = [arguments.model] if arguments.model else list(CONFIGS)
    trained, measured = {}, {}
    for name, seed, folder in results.training_runs(SCRIPT, arguments, names, dict.fromkeys(names, 1)):
        config = cli.with_flags(smaller(CONFIGS[name]) if arguments.quick else CONFIGS[name], arguments)
        run = train_network(name, config, splits, seed, folder=folder, resume=arguments.resume)
        trained[name], curves, seconds = run
        parts = name, trained[name], config, needed_judges(arguments, name, trained)
        on_sample = measure(*parts, few, arguments, True)
        measured[name] = on_sample if arguments.sample else measure(*parts, splits, arguments, False)
        sizes = {part: len(split.images) for part, split in {**splits, "sample": few["test"]}.items()}
        about = {"dataset": {"name": dataset.name, **sizes, "sha256": dataset.checksums}, "curves": curves}
        about["metrics"] = {"test": measured[name][0], "sample": on_sample[0]}
        card = models.card(SCRIPT, name, arguments, config=config, seed=seed, seconds=seconds, **about)
        card |= {"best": measured[name][1].best} if measured[name][1] else {}
        models.save_model(trained[name], arguments.output_dir / "saved_models" / SCRIPT / f"{FILES[name]}.keras", card)
    return measured


# --------------------------------------------------------------------------------------------------------- experiments


def run_experiments(arguments):
    """Draws winged horses with one setting changed at a time, several seeds each, and scores them by judge A."""
    plan = results.optional_module("experiments", SCRIPT)
    if plan is None:
        return
    (network, config, _), (judge, _, _) = (restore(arguments, name) for name in ("diffusion", "judge_a"))
    tools = make_tools(models.for_prediction(network), models.for_prediction(judge), config, arguments.quick)
    path, count = results.table_path(arguments.output_dir, SCRIPT), QUICK_BATCH if arguments.quick else BATCH
    for run in results.unfinished(path, plan.runs(arguments.seed, arguments.quick)):
        way, changed, options = plan.EXPERIMENTS[run["name"]]
        function, settings = (draw_composition, COMPOSITION) if way == "composition" else (draw_collage, COLLAGE)
        settings = dataclasses.replace(settings, **changed | ({"steps": QUICK_STEPS} if arguments.quick else {}))
        scores = score(judge, function(tools, wing_classes(count), run["seed"], settings, **options).images)
        row = {**run, "way": way, **dataclasses.asdict(settings), "height": options.get("height", HEIGHT)}
        row |= {"score": round(float(scores.mean()), 5), "above_half": round(float(np.mean(scores > 0.5)), 5)}
        results.append_row(path, row | {"samples": count})


# -------------------------------------------------------------------------------------------------------------- report


def report(arguments, measured=None):
    """Restores the saved models, measures them unless `measured` just now, writes figures; returns the exit code."""
    splits, dataset = load_splits(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    folder, part = arguments.output_dir / "report" / "figures" / SCRIPT, "sample" if arguments.sample else "test"
    names, size = [arguments.model] if arguments.model else list(CONFIGS), len(splits["test"].images)
    rows, written, restored, measured = [], [], {name: restore(arguments, name) for name in names}, measured or {}
    for name, (model, config, card) in restored.items():
        parts = model, config, needed_judges(arguments, name, {key: each for key, (each, *_) in restored.items()})
        if name not in measured:
            measured[name] = measure(name, *parts, splits, arguments, arguments.sample, card.get("best"))
        (found, _), sums, values = measured[name], dataset.checksums, {part: (size, measured[name][0])}
        rows += results.compare(card, found, part=part, size=size, sha256=sums)
        if arguments.record:
            path = models.model_path(arguments.output_dir, SCRIPT, FILES[name])
            results.record_metrics(path, None if arguments.sample else sums, **values)
    if arguments.train or (arguments.record and not arguments.sample):
        kept = ("epochs", "hardware", "shortened", "seconds", "parameters")
        of_models = {name: {key: card[key] for key in kept} for name, (*_, card) in restored.items()}
        of_models = {name: values | {part: measured[name][0]} for name, values in of_models.items()}
        summary = {"script": f"{SCRIPT}.py", "models": of_models, "seeds": 1}
        if {"diffusion", "gan"} & set(names) and not arguments.sample and not arguments.quick:
            summary["fid_scale"] = fid.scale(arguments.data_dir, splits["train"].images, splits["test"].images)
        written.append(results.write_results(SCRIPT, arguments, summary))
    plots = results.optional_module("plots", SCRIPT)
    path, numbers = results.recorded_path(arguments, f"{SCRIPT}_experiments.csv"), ("score", "above_half")
    table = results.read_table(path, numbers, ("name", "way"))
    if plots and len(table):
        written.append(plots.draw_experiments(table, folder / "experiments.png"))
    if plots and not arguments.model:  # the figures compare all models
        written += draw_figures(plots, restored, measured["diffusion"][1], splits, arguments, folder)
    return results.conclude(SCRIPT, arguments, rows, written)


def draw_figures(plots, restored, evaluation, splits, arguments, folder):
    """Writes the figures; returns their paths."""
    (network, config, _), (gan_network, gan_config, _) = restored["diffusion"], restored["gan"]
    strengths, steps = np.linspace(0, 1, 7), QUICK_STEPS if arguments.quick else COMPOSITION.steps
    parts = evaluation.tools, wing_classes(4), *batch_seeds(arguments, 1), dataclasses.replace(COMPOSITION, steps=steps)
    between = [draw_composition(*parts, strength=strength).images for strength in strengths]
    labels, real = np.repeat(np.arange(len(CLASSES)), 8), [of_class(splits["train"], name) for name in CLASSES]
    plain = {
        "training images": np.concatenate([each.take(range(8), 0, mode="wrap") for each in real]),
        "diffusion": generate("diffusion", network, config, one_hot(labels), arguments.seed, quick=arguments.quick),
        "GAN": generate("gan", gan_network, gan_config, one_hot(labels), arguments.seed),
    }
    curves = {name: card["curves"] for name, (*_, card) in restored.items()}
    best = max(WAYS, key=lambda way: evaluation.best[way]["score"])
    stages = [(each.time, denormalize(each.image), each.mask) for each in evaluation.drawn["composition"].stages]
    collage, unselected = evaluation.drawn["collage"], {way: each.images for way, each in evaluation.drawn.items()}
    return [
        plots.draw_pegasus(evaluation.best_images, best, folder / "pegasus.png"),
        *(plots.draw_unselected(images, way, folder / f"unselected_{way}.png") for way, images in unselected.items()),
        plots.draw_way(stages, evaluation.drawn["composition"].images, folder / "way.png"),
        plots.draw_collages(collage.collages, collage.stages[0].mask, collage.images, folder / "collages.png"),
        plots.draw_network(config.widths, config.patch, config.blocks, folder / "diffusion_network.png"),
        plots.draw_gan(gan_config.widths, gan_config.discriminator_widths, folder / "gan_networks.png"),
        plots.draw_nearest(unselected, evaluation.nearest, folder / "nearest.png"),
        plots.draw_scores(evaluation.scores, folder / "scores.png"),
        plots.draw_samples(plain, CLASSES, folder / "samples.png"),
        plots.draw_learning_curves(curves, folder / "learning_curves.png"),
        plots.draw_interpolation(np.stack(between, axis=1), strengths, folder / "interpolation.png"),
    ]


# ---------------------------------------------------------------------------------------------------------------- main


def draw_asked(arguments):
    """Draws what the command line asks for, writes grid, best image by judge A, and arrays; returns the paths."""
    name, count = arguments.model or "diffusion", arguments.samples or BATCH
    (network, config, card), (judge, _, _) = restore(arguments, name), restore(arguments, "judge_a")
    folder, method = arguments.output_dir / "runs" / SCRIPT, arguments.method or "composition"
    labels, best = wing_classes(count, arguments.wings), None
    if arguments.class_name or name == "gan":
        labels = np.full(count, CLASSES.index(arguments.class_name)) if arguments.class_name else labels
        classes = one_hot(labels) if arguments.class_name else blend(labels)
        images = generate(name, network, config, classes, arguments.seed, TYPICAL_SAMPLING)
        stem = f"{name}_{arguments.class_name or 'blend'}"
    else:
        tools, stem = make_tools(models.for_prediction(network), judge, config), f"{method}_{arguments.wings or 'any'}"
        first, known = labels[:BATCH], card.get("best", {}).get(method)
        batches = [draw(tools, method, first, seed) for seed in batch_seeds(arguments, math.ceil(count / BATCH))]
        images = np.concatenate([batch.images for batch in batches])[:count]
        if known and not arguments.wings and count >= BATCH:  # the best of all candidates, as recorded
            best = draw(tools, method, first, known["seed"]).images[known["index"]]
    scores, stem = score(judge, images), f"{stem}_seed_{arguments.seed}"
    written = [write_grid(images, folder / f"{stem}.png", 2)]
    if not arguments.class_name:
        best = images[scores.argmax()] if best is None else best
        written.append(write_grid(best[None], folder / f"{stem}_best.png", 12))
    kind = "class" if arguments.class_name else "wings"
    with replacing(folder / f"{stem}.npz") as temporary:
        np.savez_compressed(temporary, images=images, score=scores, **{kind: labels})
    return [*written, folder / f"{stem}.npz"]


def main(argv=None):
    flags = cli.parser(__doc__, list(CONFIGS))
    group = flags.add_argument_group("drawing, with --load; needs no dataset")
    group.add_argument("--samples", type=cli.number(int, 1, 10_000), metavar="N", help="images (default: 64)")
    group.add_argument("--method", choices=WAYS[:3], help="of drawing winged horses (default: composition)")
    group.add_argument("--wings", choices=list(WINGED), help="where they come from (default: both in turn)")
    group.add_argument("--class", choices=CLASSES, dest="class_name", help="draws this class instead")
    arguments = cli.parse(flags, argv)
    if any(getattr(arguments, name) is not None for name in ("samples", "method", "wings", "class_name")):
        if not arguments.load or "judge" in (arguments.model or ""):
            raise UserError("drawing needs a trained generator; use --load, with --model diffusion or gan")
        print("wrote", *draw_asked(arguments), sep="\n  ")
        return None
    if arguments.experiments:
        return run_experiments(arguments)
    return report(arguments, train(arguments) if arguments.train else None)


if __name__ == "__main__":
    cli.run(main)
