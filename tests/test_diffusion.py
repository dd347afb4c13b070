"""The noise schedule, training targets and samplers."""

import dataclasses
import functools
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


# --------------------------------------------------------------------------------------------------- network, training


@dataclasses.dataclass(frozen=True)
class Config:
    target: str = "velocity"
    loss: str = "mse"
    learning_rate: float = 1e-3
    batch_size: int = 4
    epochs: int = 1


def build_tiny(mixtures, label="category"):
    options = {"patch": 2, "widths": (8, 16), "blocks": 1, "attention": 1, "mixtures": mixtures}
    return diffusion.build_unet((8, 8, 3), {label: 3}, **options)


def randomised(network):
    """A new network predicts 0 for everything, since its last layers start at 0."""
    network.set_weights([GENERATOR.normal(size=weights.shape) * 0.3 for weights in network.get_weights()])
    return network


def test_a_mixture_of_one_value_is_that_value_and_no_weights_are_none():
    integers, mixtures = randomised(build_tiny(False)), build_tiny(True)
    weights = integers.get_weights()
    (of_labels,) = (number for number, each in enumerate(weights) if each.shape == (4, diffusion.CONDITION_WIDTH))
    weights[of_labels][3] = 0  # the row of "none"
    integers.set_weights(weights)
    mixtures.set_weights([each[:3] if number == of_labels else each for number, each in enumerate(weights)])
    inputs = {"noisy": GENERATOR.normal(size=(4, 8, 8, 3)).astype("float32"), "time": np.full((4, 1), 0.5, "float32")}
    expected = integers({**inputs, "category": np.array([0, 1, 2, 3])})
    given = np.eye(4, 3, dtype="float32")
    assert np.allclose(mixtures({**inputs, "category": given}), expected, atol=1e-5)
    assert not np.allclose(mixtures({**inputs, "category": given[[1, 0, 2, 3]]}), expected, atol=1e-2)


def test_pixels_of_a_patch_are_put_back_where_they_were():
    """With the channels of patches passed on unchanged, what comes out is what goes in."""
    network = build_tiny(False)
    shaping = [layer for layer in network.layers if isinstance(layer, (keras.layers.Reshape, keras.layers.Permute))]
    image = inside = GENERATOR.normal(size=(2, 8, 8, 3)).astype("float32")
    cut, joined = shaping[:3], shaping[-3:]
    for layer in [*cut, *joined]:
        inside = layer(inside)
    assert np.array_equal(inside, image)


def trainer(flip=False, **changed):
    config = dataclasses.replace(Config(), **changed)
    return diffusion.Trainer(None, config, 0, {"category": 3}, lambda images: ops.cast(images, "float32"), flip)


def test_labels_are_dropped_together_and_as_often_as_said():
    category, images = np.arange(5000) % 3, np.zeros((5000, 2, 2, 1))
    both = diffusion.Trainer(None, Config(), 0, {"first": 3, "second": 9}, lambda images: images)
    inputs, _ = both.add_noise(images, first=category, second=category)
    dropped = ops.convert_to_numpy(inputs["first"]) == 3
    assert np.array_equal(dropped, ops.convert_to_numpy(inputs["second"]) == 9)
    assert np.array_equal(ops.convert_to_numpy(inputs["first"])[~dropped], category[~dropped])
    assert dropped.mean() == pytest.approx(diffusion.LABEL_DROPOUT, abs=0.02)


def test_weights_of_labels_are_dropped_as_a_whole():
    mixtures = diffusion.Trainer(None, Config(), 0, {"category": 0.0}, lambda images: images)
    inputs, _ = mixtures.add_noise(np.zeros((1000, 2, 2, 1)), category=np.full((1000, 4), 0.25, "float32"))
    sums = ops.convert_to_numpy(ops.sum(inputs["category"], axis=1))
    assert set(sums.tolist()) == {0, 1}


def test_half_of_the_images_are_mirrored():
    images = np.tile(np.array([0.0, 1.0], "float32")[None, None, :, None], (400, 2, 1, 1))
    inputs, target = trainer(flip=True).add_noise(images, category=np.zeros(400, int))
    rates = diffusion.diffusion_schedule(inputs["time"][:, :, None, None])
    found = ops.convert_to_numpy(diffusion.clean_image("velocity", inputs["noisy"], target, *rates))
    mirrored = found[:, 0, 0, 0] > 0.5
    assert np.allclose(found[mirrored], images[mirrored][:, :, ::-1], atol=1e-4)
    assert mirrored.mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("loss", "expected"), [("mse", 2.5), ("mae", 1.5)])
def test_the_loss_is_the_one_of_the_config(loss, expected):
    prediction, target = np.array([1.0, 2.0], "float32"), np.array([2.0, 0.0], "float32")
    assert float(trainer(loss=loss).compute_loss(y_pred=(prediction, target))) == expected


def test_a_network_trains_and_comes_back_in_full_precision_with_averaged_weights(tmp_path):
    images = np.random.default_rng(0).normal(size=(8, 8, 8, 3)).astype("float32")
    examples = {"images": images, "category": np.arange(8) % 3}
    held_out, config = diffusion.with_fixed_noise(examples, (8, 8, 3)), Config(learning_rate=0.05, epochs=3)

    def wrap(network):
        return diffusion.Trainer(network, config, 0, {"category": 3}, lambda images: images)

    def train(average):
        checkpoint = {"folder": tmp_path, "resume": False}
        optimizer = diffusion.averaging_optimizer(average)
        parts = functools.partial(build_tiny, False), wrap, optimizer, config, examples, 0, held_out
        network, curves, _ = diffusion.train_network(*parts, **checkpoint)
        trainer = wrap(network)
        return network, curves, float(trainer.compute_loss(y_pred=trainer(held_out)))

    network, curves, loss = train(0.9)
    assert network.dtype_policy.name == "float32"
    assert np.isfinite([*curves["loss"], *curves["val_loss"]]).all()
    # The noise is the same after every epoch, and the weights are those that are returned, but for bfloat16.
    assert curves["val_loss"][-1] == pytest.approx(loss, rel=2e-3)
    _, last, loss = train(0.0)
    assert last["val_loss"][-1] == pytest.approx(loss, rel=2e-3)
    assert last["loss"] == pytest.approx(curves["loss"], rel=1e-3)  # averaging and measuring leave training alone
    assert last["val_loss"][-1] - curves["val_loss"][-1] > 0.01


# ------------------------------------------------------------------------------------------------------------ sampling


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
    fresh = GENERATOR.normal(size=(100, 100)).astype("float32")
    after = np.asarray(diffusion.less_noisy("ddpm", rates[1] * noise, image, rates, next_rates, fresh))
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
    states = list(sampler.states(inputs))
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


# ------------------------------------------------------------------------------------------------ composition in space


@pytest.fixture(scope="module")
def mixing_network():
    return randomised(build_tiny(True, "classes"))


def spatial_inputs(**changed):
    one = np.eye(3, dtype="float32")
    inputs = {
        "noisy": GENERATOR.normal(size=(2, 8, 8, 3)).astype("float32"),
        "time": np.full((2, 1), 0.6, "float32"),
        "first": one[[0, 0]],
        "second": one[[1, 1]],
        "mask": GENERATOR.uniform(size=(2, 8, 8, 1)).astype("float32"),
        "first_guidance": np.full((2, 1), 2, "float32"),
        "second_guidance": np.full((2, 1), 2, "float32"),
        "shift": np.zeros(2, "int32"),
    }
    return inputs | changed


def estimate(network, spatial=True, **changed):
    guidance = diffusion.SpatialGuidance(network, "velocity", (-9, 9), spatial)
    return ops.convert_to_numpy(guidance(spatial_inputs(**changed)))


def test_composition_of_equal_classes_is_plain_guidance(mixing_network):
    inputs = spatial_inputs()
    inputs["second"] = inputs["first"]
    sampler = diffusion.Sampler(mixing_network, "velocity", Sampling("ddim", 4, 2.0, 1.0), {"classes": 0.0}, (-9, 9))
    rates = diffusion.diffusion_schedule(0.6)
    prediction = sampler.predict_target(inputs["noisy"], 0.6, {"classes": inputs["first"]})
    plain = ops.convert_to_numpy(diffusion.clean_image("velocity", inputs["noisy"], prediction, *rates))
    assert np.allclose(estimate(mixing_network, **inputs), plain, atol=1e-4)
    assert np.allclose(estimate(mixing_network, spatial=False, **inputs), plain, atol=1e-4)


def test_each_class_holds_where_the_mask_says(mixing_network):
    inputs = spatial_inputs()
    mask = np.zeros((2, 8, 8, 1), "float32")
    mask[:, :3] = 1
    both = estimate(mixing_network, **inputs | {"mask": mask})
    first, second = (estimate(mixing_network, **inputs | {"mask": np.full_like(mask, value)}) for value in (0, 1))
    assert np.allclose(both[:, :3], second[:, :3], atol=1e-5)
    assert np.allclose(both[:, 3:], first[:, 3:], atol=1e-5)
    assert not np.allclose(first, second, atol=1e-2)


def test_the_shifted_class_sees_the_image_lower(mixing_network):
    """Where the second class holds everywhere, a shift equals moving the image down, predicting, and moving it back."""
    inputs = spatial_inputs(mask=np.ones((2, 8, 8, 1), "float32"))
    lowered = inputs | {"noisy": np.roll(inputs["noisy"], 2, axis=1)}
    expected = np.roll(estimate(mixing_network, **lowered), -2, axis=1)
    assert np.allclose(estimate(mixing_network, **inputs | {"shift": np.full(2, 2, "int32")}), expected, atol=1e-4)


def test_langevin_steps_keep_the_noise_level_of_a_known_image():
    rates, image = (math.cos(1.0), math.sin(1.0)), np.zeros((200, 200))
    noisy = rates[1] * GENERATOR.normal(size=image.shape)
    for _ in range(30):
        noisy = diffusion.langevin_step(noisy, image, rates, 0.05, GENERATOR.normal(size=image.shape))
    assert noisy.std() == pytest.approx(rates[1], rel=0.04)
