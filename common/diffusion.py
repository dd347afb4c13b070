"""Diffusion models in continuous time: noise schedule, network, training, guidance, and the samplers DDIM and DDPM.

A noisy image is `signal_rate * image + noise_rate * noise`, with standard normal noise and images scaled to a range
around 0. Times run from 0 (no noise) to 1 (almost only noise).
"""

import dataclasses
import itertools
import math
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops

from common import augmentation, models, training

CONDITION_WIDTH = 128  # size of the embedding of noise level and labels
LABEL_DROPOUT = 0.1  # how often the labels are dropped in training (Ho & Salimans 2022, section 3.2)
CORRECTOR_STEP = 0.08  # of Langevin dynamics in `compose`, see `langevin_step`
SIGNAL_AT_END = 0.02  # signal rate at time 1; a noise prediction divided by 0 would say nothing about the image


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How images are sampled."""

    sampler: str  # "ddim" (the noise determines the image) or "ddpm" (fresh noise at every step)
    steps: int
    guidance: float  # 0 ignores the conditions, 1 is the conditional model, more exaggerates the conditions
    spacing: float  # step i of n ends at time (1 - i / n) ** spacing: 1 for equal steps, more for ever shorter ones


class StatelessSeed(keras.random.SeedGenerator):
    """A seed made of two integer tensors. Drawing with it changes no state, which a compiled loop does not allow."""

    def __init__(self, first, second):
        self.seed = ops.stack([ops.cast(number, "uint32") for number in (first, second)])

    def next(self, ordered=True):
        return self.seed


def diffusion_schedule(time):
    """Returns signal rate and noise rate at `time`: the cosine schedule (Nichol & Dhariwal 2021), written as an arc.

    The squares of both rates add up to 1.
    """
    angle = time * math.acos(SIGNAL_AT_END)
    return ops.cos(angle), ops.sin(angle)


def step_time(number, sampling):
    """Returns the time after `number` steps (int or integer tensor) of `sampling`."""
    left = ops.maximum(1 - ops.cast(number, "float32") / sampling.steps, 0.0)
    return ops.power(left, sampling.spacing)


def training_target(target, image, noise, signal_rate, noise_rate):
    """Returns what a network learns to predict: the "noise", or the "velocity" of Salimans & Ho 2022 (section 4)."""
    return noise if target == "noise" else signal_rate * noise - noise_rate * image


def clean_image(target, noisy, prediction, signal_rate, noise_rate):
    """Returns the estimate of the clean image in `noisy`, given the `prediction` of its `training_target`."""
    if target == "noise":
        return (noisy - noise_rate * prediction) / signal_rate
    return signal_rate * noisy - noise_rate * prediction


# -------------------------------------------------------------------------------------------------------------- network


def convolution(filters, kernel_size=3, **keywords):
    return layers.Conv2D(filters, kernel_size, padding="same", **{"kernel_initializer": "he_normal"} | keywords)


def activated(features):
    # ReLU where such networks usually have SiLU, which takes as much time on a CPU as all the convolutions.
    return layers.ReLU()(layers.GroupNormalization(8)(features))


def build_unet(image_shape, num_labels, *, patch, widths, blocks, attention, mixtures=False, input_norm=False):
    """Builds a U-Net (Ronneberger et al. 2015) of residual blocks, conditioned on time and labels.

    Args:
        image_shape: (side, side, channels).
        num_labels: dict from the name of each label to the number of its values.
        patch: side of the square patches of pixels that become the channels of one position.
        widths: filters at each resolution, the finest one first; every next one halves the side.
        blocks: residual blocks per resolution, as many on the way down as on the way up.
        attention: number of resolutions with self-attention, counted from the coarsest one.
        mixtures: labels are weights of the values (n, number), all 0 for none, which allows any mixture of values;
            otherwise they are integers (n,), and the number itself stands for none.
        input_norm: whether blocks normalise their input as well, which takes half as much time again on a CPU.

    Returns a functional model of built-in layers, from a dict of `noisy` (n, *image_shape), `time` (n, 1), 0 to 1, and
    the labels, to velocity or noise, like `noisy`.
    """
    noisy, time = keras.Input(image_shape, name="noisy"), keras.Input((1,), name="time")
    labels = {
        name: keras.Input((number,) if mixtures else (), dtype="float32" if mixtures else "int32", name=name)
        for name, number in num_labels.items()
    }
    # Sines of the time, from half a turn to 50 turns (Vaswani et al. 2017, section 3.5).
    angles = time * np.geomspace(math.pi, 100 * math.pi, CONDITION_WIDTH // 2).astype("float32")
    condition = layers.Concatenate()([ops.sin(angles), ops.cos(angles)])
    condition = layers.Dense(CONDITION_WIDTH, activation="silu")(condition)
    embeddings = [layers.Dense(CONDITION_WIDTH)(condition)]
    for name, number in num_labels.items():
        # Weights times a matrix are the mixture of its rows, which are the embeddings of the values.
        of_mixtures = layers.Dense(CONDITION_WIDTH, use_bias=False) if mixtures else None
        embeddings.append((of_mixtures or layers.Embedding(number + 1, CONDITION_WIDTH))(labels[name]))
    condition = layers.Activation("silu")(layers.Add()(embeddings))

    def residual_block(features, filters):
        """Two convolutions; between them the condition scales and shifts every filter (Perez et al. 2018)."""
        shortcut = features if features.shape[-1] == filters else convolution(filters, 1)(features)
        features = convolution(filters)(activated(features) if input_norm else layers.ReLU()(features))
        # The condition scales and shifts anyway; the saved network of task 2 has a scale and a shift here as well.
        features = layers.GroupNormalization(8, center=input_norm, scale=input_norm)(features)
        scale, shift = (layers.Dense(filters)(condition)[:, None, None] for _ in range(2))
        features = layers.ReLU()(features * (1 + scale) + shift)
        # Blocks start as identities, so that a deep network trains like a shallow one at first.
        return layers.Add()([shortcut, convolution(filters, kernel_initializer="zeros")(features)])

    def self_attention(features):
        size, filters = features.shape[1], features.shape[-1]
        tokens = layers.Reshape((size * size, filters))(layers.GroupNormalization(8)(features))
        tokens = layers.MultiHeadAttention(4, filters // 4)(tokens, tokens)
        return layers.Add()([features, layers.Reshape((size, size, filters))(tokens)])

    def stage(features, level):
        features = residual_block(features, widths[level])
        return self_attention(features) if level >= len(widths) - attention else features

    # The pixels of each patch become channels.
    side, channels = image_shape[0] // patch, image_shape[-1]
    features = layers.Reshape((side, patch, side, patch, channels))(noisy)
    features = layers.Reshape((side, side, patch**2 * channels))(layers.Permute((1, 3, 2, 4, 5))(features))
    features = convolution(widths[0])(features)
    skipped = []
    for level in range(len(widths)):
        if level:
            features = layers.AveragePooling2D(2)(features)
        for _ in range(blocks):
            features = stage(features, level)
            skipped.append(features)
    features = residual_block(features, widths[-1])
    for level in reversed(range(len(widths))):
        for _ in range(blocks):
            features = stage(layers.Concatenate()([features, skipped.pop()]), level)
        if level:
            features = layers.UpSampling2D(2)(features)
    features = convolution(patch**2 * channels, kernel_initializer="zeros", dtype="float32")(activated(features))
    features = layers.Reshape((side, side, patch, patch, channels))(features)
    features = layers.Reshape(image_shape)(layers.Permute((1, 3, 2, 4, 5))(features))
    return keras.Model({"noisy": noisy, "time": time, **labels}, features, name="diffusion")


# ------------------------------------------------------------------------------------------------------------- training


class Trainer(keras.Model):
    """Trains a network to predict its target from noisy images. It is fitted on a dict of `images` and labels.

    Args:
        network: see `Sampler`.
        config: dataclass instance with `target` (see `training_target`) and `loss`, "mse" or "mae".
        null_labels: see `Sampler`.
        normalize: function from the images of the dataset to (n, height, width, channels) around 0.
        flip: whether half of the images are mirrored.
    """

    def __init__(self, network, config, seed, null_labels, normalize, flip=False):
        super().__init__()
        self.network, self.config, self.null_labels = network, config, null_labels
        self.normalize, self.flip = normalize, flip
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.built = True  # all its variables exist, without which a checkpoint cannot be restored

    def add_noise(self, images, time=None, noise=None, **labels):
        """Returns the inputs of the network, noisy images with some labels dropped, and its target.

        Where `time` and `noise` are given (see `with_fixed_noise`), nothing is random.
        """
        image, count = self.normalize(images), ops.shape(images)[0]
        if noise is None:
            image = augmentation.mirror(image, self.seed_generator) if self.flip else image
            time = keras.random.uniform((count, 1), seed=self.seed_generator)
            noise = keras.random.normal(ops.shape(image), seed=self.seed_generator)
            dropped = keras.random.uniform((count,), seed=self.seed_generator) < LABEL_DROPOUT
            for name, label in labels.items():
                of_label = ops.reshape(dropped, (-1, *[1] * (len(label.shape) - 1)))
                labels[name] = ops.where(of_label, self.null_labels[name], label)
        signal_rate, noise_rate = diffusion_schedule(time[:, :, None, None])
        target = training_target(self.config.target, image, noise, signal_rate, noise_rate)
        return {"noisy": signal_rate * image + noise_rate * noise, "time": time, **labels}, target

    def call(self, inputs):
        noisy, target = self.add_noise(**inputs)
        return self.network(noisy), target

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        prediction, target = y_pred
        difference = ops.cast(prediction, "float32") - target
        return ops.mean(ops.square(difference) if self.config.loss == "mse" else ops.abs(difference))


def with_fixed_noise(examples, image_shape):
    """Adds `time` (n, 1), evenly spread, and `noise` (n, *image_shape) to a dict of `images` and labels.

    Measured on the same noise after every epoch, a validation loss shows small differences between the epochs.
    """
    draws, count = np.random.default_rng(0), len(examples["images"])
    time = draws.permutation((np.arange(count, dtype="float32") + 0.5) / count)[:, None]
    return {**examples, "time": time, "noise": draws.standard_normal((count, *image_shape), dtype="float32")}


def train_network(build, wrap, optimizer, config, examples, seed, validation=None, **checkpoint):
    """Trains a network within a model that has a loss of its own, such as `Trainer`.

    Args:
        build: function that returns a new network.
        wrap: function from the network to the `keras.Model` that is fitted.
        optimizer: function from a learning rate schedule to the optimizer, which may average the weights.
        config: dataclass instance with, among others, `learning_rate`, the highest one of the schedule.
        examples, validation: dicts of arrays.
        checkpoint: `folder` and `resume` of `training.fit`.

    Returns the network in float32, learning curves, and seconds. Where the optimizer averages the weights, the network
    and the validation curves are those of the averaged ones.
    """
    keras.utils.set_random_seed(seed)
    steps = training.count_steps(len(examples["images"]), config)
    with training.computing_in(training.fast_precision()) as precision:
        network = build()
    model = wrap(network)
    model.compile(optimizer(training.cosine_schedule(config.learning_rate, steps)), **training.compile_options(steps))
    averaged = [keras.callbacks.SwapEMAWeights()] if model.optimizer.use_ema else []
    options = {"config": config, "seed": seed, "precision": precision, "callbacks": averaged, **checkpoint}
    curves, seconds = training.fit(model, examples, None, validation_data=validation and (validation,), **options)
    # Keras replaces the weights by their average at the end of `fit`, but not where a finished run was restored.
    model.optimizer.finalize_variable_values(model.trainable_variables)
    full_precision = build()
    models.set_weights(full_precision, network.get_weights())
    return full_precision, curves, seconds


def averaging_optimizer(average, **options):
    """Returns the function from a schedule to AdamW with a moving average of the weights; momentum 0 for none."""
    options = {"weight_decay": 1e-3, "use_ema": average > 0, "ema_momentum": average, **options}
    return lambda schedule: keras.optimizers.AdamW(schedule, **options)


# ------------------------------------------------------------------------------------------------------------- sampling


def less_noisy(sampler, noisy, image, rates, next_rates, fresh=None):
    """Returns the noisy image after one step: equation 12 of Song, Meng & Ermon 2021, with eta = 0 (DDIM) or 1 (DDPM).

    `image` is the estimate of the clean image in `noisy`; `rates` and `next_rates` are the signal rate and noise rate
    of `noisy` and of what is returned; `fresh` is the standard normal noise that DDPM needs.
    """
    (signal_rate, noise_rate), (next_signal_rate, next_noise_rate) = rates, next_rates
    noise = (noisy - signal_rate * image) / noise_rate
    if sampler == "ddim":
        return next_signal_rate * image + next_noise_rate * noise
    lost = ops.sqrt(ops.maximum(1 - ops.square(signal_rate / next_signal_rate), 0.0))
    fresh_rate = next_noise_rate / noise_rate * lost
    kept_rate = ops.sqrt(ops.maximum(ops.square(next_noise_rate) - ops.square(fresh_rate), 0.0))
    return next_signal_rate * image + kept_rate * noise + fresh_rate * fresh


class Sampler(keras.Model):
    """Generates images from noise, all steps in one compiled loop; it is called with what `sampler_inputs` returns.

    Args:
        network: `keras.Model` from a dict of `noisy` (n, height, width, channels), `time` (n, 1) and labels (n, ...) to
            its prediction of the `target` (see `training_target`), like `noisy`.
        null_labels: dict from the name of each label to the value that stands for "unconditional".
        value_range: darkest and brightest value of an image.
    """

    def __init__(self, network, target, sampling, null_labels, value_range):
        super().__init__()
        self.network, self.target, self.sampling = network, target, sampling
        self.null_labels, self.value_range = null_labels, value_range

    def predict_target(self, noisy, time, labels):
        """Returns the prediction with classifier-free guidance (Ho & Salimans 2022, equation 6)."""
        guidance = self.sampling.guidance
        conditions = [] if guidance == 0 else [labels]
        if guidance != 1:
            conditions.append({name: ops.full_like(label, self.null_labels[name]) for name, label in labels.items()})
        # All in one batch: the loop then holds the network once, and compiles in half of the time.
        stacked = {name: ops.concatenate([each[name] for each in conditions]) for name in labels}
        noisy = ops.concatenate([noisy] * len(conditions))
        times = ops.full((ops.shape(noisy)[0], 1), 1.0) * time
        predictions = self.network({"noisy": noisy, "time": times, **stacked}, training=False)
        predictions = ops.split(ops.cast(predictions, "float32"), len(conditions))
        if len(conditions) == 1:
            return predictions[0]
        conditional, unconditional = predictions
        return unconditional + guidance * (conditional - unconditional)

    def step(self, number, noisy, inputs):
        """Returns the noisy images after step `number`, counted from 0, where `noisy` are those before it."""
        time = step_time(number, self.sampling)
        rates, next_rates = diffusion_schedule(time), diffusion_schedule(step_time(number + 1, self.sampling))
        labels = {name: inputs[name] for name in self.null_labels}
        prediction = self.predict_target(noisy, time, labels)
        image = ops.clip(clean_image(self.target, noisy, prediction, *rates), *self.value_range)
        fresh = None
        if self.sampling.sampler == "ddpm":
            fresh = keras.random.normal(ops.shape(noisy), seed=StatelessSeed(inputs["seed"][0], number))
        return less_noisy(self.sampling.sampler, noisy, image, rates, next_rates, fresh)

    def call(self, inputs):
        def body(number, noisy):
            return self.step(number, noisy, inputs)

        return ops.fori_loop(0, self.sampling.steps, body, inputs["noise"])

    def states(self, inputs):
        """Yields the noisy images before the first step and after every step, as arrays."""
        inputs = {name: ops.convert_to_tensor(values) for name, values in inputs.items()}
        noisy = inputs["noise"]
        yield ops.convert_to_numpy(noisy)
        for number in range(self.sampling.steps):
            noisy = self.step(number, noisy, inputs)
            yield ops.convert_to_numpy(noisy)


def sampler_inputs(labels, image_shape, seed, noise=None):
    """Returns the inputs of a `Sampler`: noise of `seed`, or the `noise` given, and `labels` (dict of arrays (n, ...)).

    The first image of a batch decides on the fresh noise of all its images.
    """
    count = len(next(iter(labels.values())))
    generator = np.random.default_rng(seed)
    first_noise = generator.standard_normal((count, *image_shape), dtype="float32")
    seeds = generator.integers(2**31, size=count, dtype="int32")
    labels = {name: label.astype("int32" if label.dtype.kind == "i" else "float32") for name, label in labels.items()}
    return {"noise": first_noise if noise is None else noise, "seed": seeds, **labels}


# ------------------------------------------------------------------------------------------------- composition in space


@dataclasses.dataclass(frozen=True)
class Composition:
    """How images are denoised with one class in some places and another one in the others."""

    start: float = 1.0  # time of the first step; less than 1 starts from a noised image (SDEdit of Meng et al. 2022)
    layout: float = 0.75  # down to this time the first class is everywhere
    heal: float = 0.2  # from this time on nothing is conditional, so that seams heal
    steps: int = 24
    spacing: float = 1.5  # step i of n ends at time start * (1 - i / n) ** spacing
    first: float = 2.5  # guidance weight of the first class
    second: float = 5.0  # guidance weight of the second class
    shift: int = 6  # pixels by which the network sees the image lower where it predicts the second class
    correctors: int = 1  # Langevin steps after every step in which the second class takes part


class Stage(NamedTuple):
    """One step of `compose`."""

    time: float
    image: np.ndarray  # float32 (n, height, width, channels), estimate of the clean images
    mask: np.ndarray  # float32 (n, height, width), 0 to 1, where the second class holds


class SpatialGuidance(keras.Model):
    """Estimates the clean images in noisy ones, conditioned on one mixture of classes here and on another one there.

    It is called with a dict of `noisy` (n, height, width, channels), `time` (n, 1), weights of the classes `first` and
    `second` (n, classes), `mask` (n, height, width, 1), 0 to 1, where the second one holds, the guidance weights of
    both, `first_guidance` and `second_guidance` (n, 1), and `shift` (n,), int, alike for all: by so many rows the
    network sees everything lower when it predicts with the second one. Both predictions are guided by themselves and
    then mixed by the mask.

    Args:
        network, target, value_range: see `Sampler`; the network takes `classes`, weights that are all 0 for none.
        spatial: False ignores the second mixture and spares half of the time.
    """

    def __init__(self, network, target, value_range, spatial=True):
        super().__init__()
        self.network, self.target, self.value_range, self.spatial = network, target, value_range, spatial

    def call(self, inputs):
        noisy, first = inputs["noisy"], inputs["first"]
        rows = ops.arange(noisy.shape[1])
        shift = ops.cast(inputs["shift"][0], rows.dtype)
        frames, classes = [noisy, noisy], [first, ops.zeros_like(first)]
        if self.spatial:
            lowered = ops.take(noisy, ops.mod(rows - shift, noisy.shape[1]), axis=1)
            frames, classes = [*frames, lowered, lowered], [*classes, inputs["second"], ops.zeros_like(first)]
        stacked = {"noisy": ops.concatenate(frames), "classes": ops.concatenate(classes)}
        stacked["time"] = ops.concatenate([inputs["time"]] * len(frames))
        predictions = ops.split(ops.cast(self.network(stacked, training=False), "float32"), len(frames))

        def guided(conditional, unconditional, weight):
            return unconditional + weight[:, :, None, None] * (conditional - unconditional)

        prediction = guided(*predictions[:2], inputs["first_guidance"])
        if self.spatial:
            second = guided(*predictions[2:], inputs["second_guidance"])
            second = ops.take(second, ops.mod(rows + shift, noisy.shape[1]), axis=1)
            prediction = (1 - inputs["mask"]) * prediction + inputs["mask"] * second
        rates = diffusion_schedule(inputs["time"][:, :, None, None])
        return ops.clip(clean_image(self.target, noisy, prediction, *rates), *self.value_range)


def langevin_step(noisy, image, rates, size, fresh):
    """Returns noisy images after a step of Langevin dynamics, which corrects them at the same noise level.

    Corrector of Song et al. 2021 (section 4.2). `image` is the estimate of the clean image, `size` that of the step in
    units of the variance of the noise, and `fresh` standard normal noise.
    """
    signal_rate, noise_rate = rates
    noise = (noisy - signal_rate * image) / noise_rate
    return noisy - size * noise_rate * noise + math.sqrt(2 * size) * noise_rate * fresh


def noised(images, time, noise):
    """Returns clean images with `noise` up to a time, float32."""
    signal_rate, noise_rate = (float(rate) for rate in diffusion_schedule(time))
    return np.asarray(signal_rate * images + noise_rate * noise, "float32")


def compose(plain, spatial, noisy, first, second, settings, seed, find_mask):
    """Denoises images of the classes `first` that are of the classes `second` where a mask says so.

    Args:
        plain, spatial: `SpatialGuidance` without and with the second class.
        noisy: float32 (n, height, width, channels), at the time `settings.start`.
        first, second: weights of the classes, float32 (n, classes).
        settings: `Composition`.
        seed: of the fresh noise.
        find_mask: function from the estimate of the clean images to the mask that holds from then on. It may also
            change the estimate the first time: it returns (image, mask), and another image is noised anew.

    Returns clean images, and a list with one `Stage` per step. They do not depend on the backend but for rounding.
    """
    draws, count, stages = np.random.default_rng(seed), len(noisy), []
    mask = np.zeros(noisy.shape[:3], "float32")
    times = settings.start * (1 - np.arange(settings.steps + 1) / settings.steps) ** settings.spacing

    def rates(time):
        return tuple(float(rate) for rate in diffusion_schedule(time))

    def fresh():
        return draws.standard_normal(noisy.shape, dtype="float32")

    def estimate(time):
        healing = time <= settings.heal
        inputs = {"noisy": noisy, "first": first, "second": second, "mask": mask[..., None]}
        numbers = {"time": time, "first_guidance": settings.first, "second_guidance": settings.second}
        for name, number in numbers.items():
            inputs[name] = np.full((count, 1), 0 if healing and name != "time" else number, "float32")
        inputs["shift"] = np.full(count, settings.shift, "int32")
        return (spatial if mask.any() and not healing else plain).predict_on_batch(inputs)

    for time, next_time in itertools.pairwise(times.tolist() if settings.start > 0 else ()):
        image = estimate(time)
        located = settings.heal < time <= settings.layout
        if located:
            changed, mask = find_mask(image)
            if changed is not image:
                image, noisy = changed, noised(changed, time, fresh())
        stages.append(Stage(time, image, mask))
        step = less_noisy("ddpm", noisy, image, rates(time), rates(next_time), fresh())
        noisy = ops.convert_to_numpy(step).astype("float32")
        for _ in range(settings.correctors if located and next_time > settings.heal else 0):
            step = langevin_step(noisy, estimate(next_time), rates(next_time), CORRECTOR_STEP, fresh())
            noisy = step.astype("float32")
    return noisy, stages
