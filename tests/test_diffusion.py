"""The noise schedule, training targets and samplers."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from common import diffusion
from common.diffusion import Sampling

GENERATOR = np.random.default_rng(0)
SHAPE = (6, 5, 1)


def test_schedule_lies_on_a_circle_from_all_image_to_almost_all_noise():
    signal_rate, noise_rate = diffusion.diffusion_schedule(ops.linspace(0.0, 1.0, 11))
    signal_rate, noise_rate = ops.convert_to_numpy(signal_rate), ops.convert_to_numpy(noise_rate)
    assert np.allclose(signal_rate**2 + noise_rate**2, 1, atol=1e-6)
    assert (signal_rate[0], noise_rate[0]) == (1, 0)
    assert signal_rate[-1] == pytest.approx(diffusion.SIGNAL_AT_END, abs=1e-6)
    assert (np.diff(signal_rate) < 0).all()


@pytest.mark.parametrize("spacing", [1.0, 2.0])
def test_steps_lead_from_time_1_to_0_and_get_shorter_with_spacing(spacing):
    sampling = Sampling("ddim", 4, 1.0, spacing)
    times = np.array([float(diffusion.step_time(number, sampling)) for number in range(5)])
    assert times.tolist() == [(1 - number / 4) ** spacing for number in range(5)]
    assert (np.diff(-times)[:-1] > np.diff(-times)[1:]).all() == (spacing > 1)


@pytest.mark.parametrize("target", ["velocity", "noise"])
def test_the_target_gives_the_image_back(target):
    image, noise = GENERATOR.normal(size=(2, 3, 4))
    signal_rate, noise_rate = math.cos(1.2), math.sin(1.2)
    noisy = signal_rate * image + noise_rate * noise
    prediction = diffusion.training_target(target, image, noise, signal_rate, noise_rate)
    assert np.allclose(diffusion.clean_image(target, noisy, prediction, signal_rate, noise_rate), image)
    assert np.allclose(prediction, noise) == (target == "noise")


def test_a_stateless_seed_draws_the_same_again_and_other_numbers_for_another_step():
    first, again, other = (keras.random.normal((50,), seed=diffusion.StatelessSeed(7, step)) for step in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


class OneImage:
    """A network for which there is only one image, 0.5 everywhere for category 0 and -0.5 for every other label."""

    def __call__(self, inputs, training):
        signal_rate, noise_rate = diffusion.diffusion_schedule(inputs["time"][:, :, None, None])
        grey = ops.where(ops.equal(inputs["category"], 0), 0.5, -0.5)
        image = ops.reshape(grey, (-1, 1, 1, 1))
        # The velocity that leads from the noisy image to that one.
        return (signal_rate * inputs["noisy"] - image) / noise_rate


def one_image_sampler(*sampling):
    return diffusion.Sampler(OneImage(), "velocity", Sampling(*sampling), {"category": 5}, (-1, 1))


def sample_one_image(*sampling):
    inputs = diffusion.sampler_inputs({"category": np.array([0, 1, 2])}, SHAPE, 0)
    inputs = {name: ops.convert_to_tensor(values) for name, values in inputs.items()}
    return ops.convert_to_numpy(one_image_sampler(*sampling)(inputs))


def test_a_ddim_step_moves_along_the_arc_to_the_next_time():
    """From time 1, two steps: the first ends at (1 - 1 / 2) squared, which is a quarter of the way to all noise."""
    inputs = diffusion.sampler_inputs({"category": np.array([0])}, SHAPE, 0)
    after = ops.convert_to_numpy(one_image_sampler("ddim", 2, 1.0, 2.0).step(0, inputs["noise"], inputs))
    angle = math.acos(diffusion.SIGNAL_AT_END)
    noise = (inputs["noise"] - math.cos(angle) * 0.5) / math.sin(angle)
    assert np.allclose(after, math.cos(angle / 4) * 0.5 + math.sin(angle / 4) * noise, atol=1e-4)


def test_a_ddpm_step_keeps_the_variance_and_replaces_part_of_the_noise():
    rates, next_rates = ((math.cos(angle), math.sin(angle)) for angle in (1.2, 0.8))
    image, noise = np.zeros((100, 100), "float32"), GENERATOR.normal(size=(100, 100)).astype("float32")
    seed = diffusion.StatelessSeed(0, 0)
    after = np.asarray(diffusion.less_noisy("ddpm", rates[1] * noise, image, rates, next_rates, seed))
    assert after.std() == pytest.approx(next_rates[1], rel=0.02)
    lost = 1 - (rates[0] / next_rates[0]) ** 2  # the share of fresh noise in the variance is that times a ratio
    kept = math.sqrt(1 - lost / rates[1] ** 2)
    assert np.corrcoef(after.ravel(), noise.ravel())[0, 1] == pytest.approx(kept, abs=0.03)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_perfect_network_leads_to_its_image_in_any_number_of_steps(sampler, steps):
    images = sample_one_image(sampler, steps, 1.0, 2.0)
    assert np.allclose(images[0], 0.5, atol=1e-3)
    assert np.allclose(images[1:], -0.5, atol=1e-3)


def test_guidance_ignores_obeys_and_exaggerates_the_condition():
    grey = [sample_one_image("ddim", 10, guidance, 2.0)[0].mean() for guidance in (0.0, 0.5, 1.0, 1.4)]
    assert grey == pytest.approx([-0.5, 0.0, 0.5, 0.9], abs=1e-3)


def test_images_stay_in_their_range():
    assert sample_one_image("ddim", 10, 3.0, 2.0)[0].mean() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_the_trajectory_ends_with_the_sample(name):
    inputs = diffusion.sampler_inputs({"category": np.array([0, 1])}, SHAPE, 0)
    sampler = one_image_sampler(name, 4, 2.0, 1.0)
    states = sampler.trajectory(inputs)
    assert len(states) == 5
    assert np.array_equal(states[0], inputs["noise"])
    assert np.allclose(states[-1], sampler.predict(inputs, verbose=0), atol=1e-6)


def test_inputs_depend_on_the_seed_unless_noise_is_given():
    labels = {"category": np.array([3, 1])}
    first, again, other = (diffusion.sampler_inputs(labels, SHAPE, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert first["category"].tolist() == [3, 1]
    assert first["noise"].shape == (2, *SHAPE)
    assert not np.array_equal(first["noise"], other["noise"])
    given = diffusion.sampler_inputs(labels, SHAPE, 0, other["noise"])
    assert np.array_equal(given["noise"], other["noise"])
    assert np.array_equal(given["seed"], first["seed"])
