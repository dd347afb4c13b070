"""Diffusion models in continuous time: noise schedule, training targets, guidance, and the samplers DDIM and DDPM.

A noisy image is `signal_rate * image + noise_rate * noise`, with standard normal noise and images scaled to a range
around 0. Times run from 0 (no noise) to 1 (almost only noise).
"""

import dataclasses
import math

import keras
import numpy as np
from keras import ops

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


def less_noisy(sampler, noisy, image, rates, next_rates, seed):
    """Returns the noisy image after one step: equation 12 of Song, Meng & Ermon 2021, with eta = 0 (DDIM) or 1 (DDPM).

    `image` is the estimate of the clean image in `noisy`; `rates` and `next_rates` are the signal rate and noise rate
    of `noisy` and of what is returned; `seed` is that of the fresh noise.
    """
    (signal_rate, noise_rate), (next_signal_rate, next_noise_rate) = rates, next_rates
    noise = (noisy - signal_rate * image) / noise_rate
    if sampler == "ddim":
        return next_signal_rate * image + next_noise_rate * noise
    lost = ops.sqrt(ops.maximum(1 - ops.square(signal_rate / next_signal_rate), 0.0))
    fresh_rate = next_noise_rate / noise_rate * lost
    kept_rate = ops.sqrt(ops.maximum(ops.square(next_noise_rate) - ops.square(fresh_rate), 0.0))
    fresh = keras.random.normal(ops.shape(noisy), seed=seed)
    return next_signal_rate * image + kept_rate * noise + fresh_rate * fresh


class Sampler(keras.Model):
    """Generates images from noise, all steps in one compiled loop; it is called with what `sampler_inputs` returns.

    Args:
        network: `keras.Model` from a dict of `noisy` (n, height, width, channels), `time` (n, 1) and labels (n,) to its
            prediction of the `target` (see `training_target`), like `noisy`.
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
        seed = StatelessSeed(inputs["seed"][0], number)
        return less_noisy(self.sampling.sampler, noisy, image, rates, next_rates, seed)

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

    def trajectory(self, inputs):
        """Returns what `states` yields, a list."""
        return list(self.states(inputs))


def sampler_inputs(labels, image_shape, seed, noise=None):
    """Returns the inputs of a `Sampler`: noise of `seed`, or the `noise` given, and `labels` (dict of integers (n,)).

    The first image of a batch decides on the fresh noise of all its images.
    """
    count = len(next(iter(labels.values())))
    generator = np.random.default_rng(seed)
    first_noise = generator.standard_normal((count, *image_shape), dtype="float32")
    seeds = generator.integers(2**31, size=count, dtype="int32")
    labels = {name: label.astype("int32") for name, label in labels.items()}
    return {"noise": first_noise if noise is None else noise, "seed": seeds, **labels}
