"""The diffusion script: its schedule, samplers and judgement, and its command line on both backends."""

import dataclasses
import functools
import json
import math

import keras
import numpy as np
import pytest
from conftest import REPOSITORY, run_elsewhere, run_script
from keras import ops

import task2_diffusion as task
from common import datasets, runs

GENERATOR = np.random.default_rng(0)
SAVED = REPOSITORY / "saved_models" / task.SCRIPT
TINY = task.Recipe(widths=(8, 8, 16), epochs=1, batch_size=16)


def random_pictures(count=32):
    images = GENERATOR.integers(0, 256, (count, 48, 48), dtype=np.uint8)
    return task.Pictures(images, np.arange(count) % 5, np.arange(count) % 9)


# ---------------------------------------------------------------------------------------------------------------- data


def test_pictures_are_split_without_overlap(fake_data_dir):
    pictures, _ = task.load_pictures(fake_data_dir, quick=True)
    train, validation, test = (pictures[part].images for part in ("train", "validation", "test"))
    assert len(validation) == (len(train) + len(validation)) // 10
    assert train.shape[1:] == (48, 48)
    known = {image.tobytes() for image in train}
    assert len(known) == len(train)  # noise, so that no two are alike
    assert not known & {image.tobytes() for image in [*validation, *test]}
    again, _ = task.load_pictures(fake_data_dir, quick=True)
    assert np.array_equal(again["train"].images, train)


def test_pictures_are_the_left_views(fake_data_dir):
    pictures, _ = task.load_pictures(fake_data_dir, quick=True)
    pairs = datasets.load_smallnorb(fake_data_dir).test.images[:1]
    assert np.array_equal(pictures["test"].images[0], datasets.area_average(pairs, 48)[0, :, :, 0])


def test_every_label_asks_for_all_pairs_equally_often():
    pairs = list(zip(*task.every_label(90), strict=True))
    assert len(set(pairs)) == 45
    assert all(pairs.count(pair) == 2 for pair in set(pairs))


# ----------------------------------------------------------------------------------------------------------- diffusion


def test_rates_lie_on_a_circle_from_all_picture_to_almost_all_noise():
    signal_rate, noise_rate = task.rates(ops.linspace(0.0, 1.0, 11))
    signal_rate, noise_rate = ops.convert_to_numpy(signal_rate), ops.convert_to_numpy(noise_rate)
    assert np.allclose(signal_rate**2 + noise_rate**2, 1, atol=1e-6)
    assert (signal_rate[0], noise_rate[0]) == (1, 0)
    assert signal_rate[-1] == pytest.approx(task.SIGNAL_AT_END, abs=1e-6)
    assert (np.diff(signal_rate) < 0).all()


@pytest.mark.parametrize("target", ["velocity", "noise"])
def test_the_right_prediction_gives_the_picture_back(target):
    pictures = random_pictures()
    recipe = dataclasses.replace(TINY, target=target)
    noisy, time, *_, wanted = task.AddNoise(recipe, 0)(pictures.images, pictures.category, pictures.elevation)
    signal_rate, noise_rate = task.rates(time[:, :, None, None])
    found = ops.convert_to_numpy(task.clean_picture(target, noisy, wanted, signal_rate, noise_rate))
    assert np.array_equal(task.to_grey(found, recipe), pictures.images)


@pytest.mark.parametrize("standardized", [False, True])
def test_pictures_are_scaled_and_turned_back(standardized):
    recipe = dataclasses.replace(TINY, standardized=standardized)
    images = random_pictures(4).images
    picture = ops.convert_to_numpy(task.to_picture(images, recipe))
    assert picture.shape == (4, 48, 48, 1)
    extremes = (-192 / 45, 63 / 45) if standardized else (-1, 1)
    assert (picture.min(), picture.max()) == pytest.approx(extremes)
    assert np.array_equal(task.to_grey(picture, recipe), images)
    assert task.to_grey(np.array([[[[-99.0], [99.0]]]]), recipe).tolist() == [[[0, 255]]]


def test_a_ddim_step_moves_along_the_arc_to_the_next_time():
    """From time 1, two steps: the first ends at (1 - 1 / 2) squared, which is a quarter of the way to all noise."""
    sampler = task.Sampler(OnePicture(), TINY, task.Sampling("ddim", 2, 1.0, spacing=2.0))
    inputs = task.sampler_inputs(np.array([0]), np.array([0]), 0)
    after = ops.convert_to_numpy(sampler.step(0, inputs["noise"], inputs))
    angle = math.acos(task.SIGNAL_AT_END)
    noise = (inputs["noise"] - math.cos(angle) * 0.5) / math.sin(angle)
    assert np.allclose(after, math.cos(angle / 4) * 0.5 + math.sin(angle / 4) * noise, atol=1e-4)


def test_labels_are_withheld_together_and_as_often_as_said():
    count = 5000
    images = np.zeros((count, 48, 48), np.uint8)
    category, elevation = task.every_label(count)
    _, _, told_category, told_elevation, _ = task.AddNoise(TINY, 0)(images, category, elevation)
    withheld = ops.convert_to_numpy(told_category) == task.ANY_CATEGORY
    assert np.array_equal(withheld, ops.convert_to_numpy(told_elevation) == task.ANY_ELEVATION)
    assert np.array_equal(ops.convert_to_numpy(told_category)[~withheld], category[~withheld])
    assert withheld.mean() == pytest.approx(task.CONDITION_DROPOUT, abs=0.02)


class OnePicture:
    """A network that knows the only picture there is, a grey 0.5 for category 0 and -0.5 for every other label."""

    def __call__(self, inputs, training):
        signal_rate, noise_rate = task.rates(inputs["time"][:, :, None, None])
        grey = ops.where(ops.equal(inputs["category"], 0), 0.5, -0.5)
        picture = ops.reshape(grey, (-1, 1, 1, 1))
        # The velocity that leads from the noisy picture to that one.
        return (signal_rate * inputs["noisy"] - picture) / noise_rate


def draw_one_picture(sampling):
    inputs = task.sampler_inputs(np.array([0, 1, 2]), np.zeros(3), 0)
    inputs = {name: ops.convert_to_tensor(values) for name, values in inputs.items()}
    return ops.convert_to_numpy(task.Sampler(OnePicture(), TINY, sampling)(inputs))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_perfect_network_leads_to_its_picture_in_any_number_of_steps(sampler, steps):
    drawn = draw_one_picture(task.Sampling(sampler, steps, guidance=1.0))
    assert np.allclose(drawn[0], 0.5, atol=1e-3)
    assert np.allclose(drawn[1:], -0.5, atol=1e-3)


def test_guidance_ignores_obeys_and_overdoes_the_order():
    grey = [draw_one_picture(task.Sampling("ddim", 10, guidance))[0].mean() for guidance in (0.0, 0.5, 1.0, 1.4)]
    assert grey == pytest.approx([-0.5, 0.0, 0.5, 0.9], abs=1e-3)


@pytest.fixture(scope="module")
def tiny_network():
    keras.utils.set_random_seed(0)
    network = task.build_network(TINY)
    # Fresh networks answer 0 whatever they are asked, since their last layers start at 0.
    network.set_weights([GENERATOR.normal(size=weights.shape) * 0.2 for weights in network.get_weights()])
    return network


def test_ddim_is_decided_by_the_noise_and_ddpm_is_not(tiny_network):
    category, elevation = task.every_label(4)
    noise = GENERATOR.standard_normal((4, 48, 48, 1)).astype("float32")

    def draw(name):
        sampler = task.Sampler(tiny_network, TINY, task.Sampling(name, steps=3, guidance=1.0))
        return [task.draw_samples(sampler, category, elevation, seed, noise) for seed in (0, 1)]

    assert np.array_equal(*draw("ddim"))
    assert not np.array_equal(*draw("ddpm"))


def test_samples_depend_on_the_order(tiny_network):
    noise = np.repeat(GENERATOR.standard_normal((1, 48, 48, 1)).astype("float32"), 3, axis=0)
    category, elevation = np.array([0, 1, 0]), np.array([0, 0, 1])
    sampler = task.Sampler(tiny_network, TINY, task.Sampling(steps=3))
    images = task.draw_samples(sampler, category, elevation, noise=noise)
    assert images.dtype == np.uint8
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


# ------------------------------------------------------------------------------------------------------------ networks


def test_the_network_starts_at_zero_and_is_small():
    network = task.build_network(task.FINAL)
    assert runs.parameter_counts(network)["trainable"] <= 4_000_000
    inputs = {"noisy": np.ones((1, 48, 48, 1)), "time": np.ones((1, 1)), "category": [0], "elevation": [0]}
    prediction = network({name: np.asarray(values) for name, values in inputs.items()})
    assert prediction.shape == (1, 48, 48, 1)
    assert np.abs(ops.convert_to_numpy(prediction)).max() == 0


def test_patches_are_cut_and_put_together_again(tiny_network):
    """A bright pixel moves the prediction around itself most."""
    black = {"noisy": np.zeros((1, 48, 48, 1)), "time": np.zeros((1, 1)), "category": [5], "elevation": [9]}
    black = {name: np.asarray(values) for name, values in black.items()}
    pixel = {**black, "noisy": black["noisy"].copy()}
    pixel["noisy"][0, 12, 31] = 3
    # The last convolution alone, so that nothing but the patches stands between the input and the output.
    change = np.abs(ops.convert_to_numpy(tiny_network(pixel)) - ops.convert_to_numpy(tiny_network(black)))[0, ..., 0]
    row, column = np.unravel_index(change.argmax(), change.shape)
    assert abs(row - 12) <= 6
    assert abs(column - 31) <= 6


def test_every_other_choice_trains(tmp_path):
    recipe = dataclasses.replace(TINY, target="noise", loss="mae", average=0.0, attention=False, blocks=2)
    network, curves, _ = task.train_network(
        recipe, random_pictures(), 0, folder=tmp_path, resume=False, validation=random_pictures(16)
    )
    assert np.isfinite(curves["loss"][0])
    assert np.isfinite(curves["val_loss"][0])
    assert network.dtype_policy.name == "float32"


def test_the_saved_weights_are_the_averaged_ones_also_after_a_resume(tmp_path):
    recipe, pictures = dataclasses.replace(TINY, widths=(8,), attention=False), random_pictures()
    options = {"folder": tmp_path / "averaged", "validation": None}
    network, _, _ = task.train_network(recipe, pictures, 0, resume=False, **options)
    again, _, _ = task.train_network(recipe, pictures, 0, resume=True, **options)
    unaveraged = dataclasses.replace(recipe, average=0.0)
    raw, _, _ = task.train_network(unaveraged, pictures, 0, folder=tmp_path / "raw", resume=False)

    def distance(first, second):
        pairs = zip(first.get_weights(), second.get_weights(), strict=True)
        return max(np.abs(a - b).max() for a, b in pairs)

    assert distance(network, again) == 0
    assert distance(network, raw) > 0


# ------------------------------------------------------------------------------------------------------------- judging


def test_nearest_neighbours_finds_copies():
    training = random_pictures(40).images
    images = np.concatenate([training[[7, 3]], np.clip(training[[5]].astype(int) + 2, 0, 255).astype(np.uint8)])
    distance, index = task.nearest_neighbours(images, training)
    assert index.tolist() == [7, 3, 5]
    assert distance[:2].tolist() == [0, 0]
    assert 1.9 < distance[2] <= 2


class Judge:
    """Sees category 2 at 40 degrees in everything."""

    def predict(self, images, **_):
        return {"category": np.eye(5)[[2] * len(images)], "elevation": np.eye(9)[[2] * len(images)]}


def test_agreement():
    measured, seen, seen_elevation = task.agreement(
        Judge(), random_pictures(4).images, np.array([2, 2, 2, 0]), np.array([2, 3, 0, 2])
    )
    assert measured == {"category_agreement": 0.75, "elevation_agreement": 0.5, "elevation_mae_degrees": 3.75}
    assert seen.tolist() == seen_elevation.tolist() == [2, 2, 2, 2]


def test_shrunken_pictures_keep_flat_areas_and_lose_details():
    flat = np.full((1, 48, 48), 90, np.uint8)
    assert np.unique(task.shrunken(flat)).tolist() == [90]
    noise = random_pictures(1).images
    assert task.shrunken(noise).shape == noise.shape
    assert task.shrunken(noise).std() < 0.4 * noise.std()


# -------------------------------------------------------------------------------------------------------- saved models


def test_saved_model_was_trained_by_its_recipe():
    card = json.loads((SAVED / "network.json").read_text())
    assert task.Recipe(**{**card["recipe"], "widths": tuple(card["recipe"]["widths"])}) == task.FINAL
    assert card["shortened"] is None
    assert card["epochs"] == len(card["curves"]["loss"]) == task.FINAL.epochs


def test_stock_keras_opens_the_saved_models_from_an_empty_directory(tmp_path):
    code = (
        "import sys, keras, numpy as np\n"
        "network, judge = (keras.saving.load_model(p, safe_mode=True, compile=False) for p in sys.argv[1:])\n"
        "one = np.ones(2)\n"
        "print(network({'noisy': np.zeros((2, 48, 48, 1)), 'time': np.ones((2, 1)), 'category': one,"
        " 'elevation': one}).shape)\n"
        "print(judge(np.zeros((2, 48, 48)))['category'].shape)"
    )
    printed = run_elsewhere(code, tmp_path, *(SAVED / f"{name}.keras" for name in task.MODELS))
    assert printed.splitlines() == ["(2, 48, 48, 1)", "(2, 5)"]


# -------------------------------------------------------------------------------------------------------- command line


command = functools.partial(run_script, task.SCRIPT)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_load_reproduces_the_metrics_of_train(backend, fake_data_dir, tmp_path):
    flags = ["--quick", "--data-dir", fake_data_dir, "--output-dir", tmp_path]
    done = command(backend, "--train", *flags)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}.json"
    trained = json.loads(path.read_text())
    assert trained["samples"] == task.QUICK_JUDGED
    assert math.isfinite(trained["test"]["frechet_distance"])
    assert "jit_compile" not in done.stderr  # Keras would say that it trains uncompiled
    if backend == "jax":  # compiles for long on a CPU; the other backend shows that restoring works
        return
    path.unlink()
    done = command(backend, "--load", *flags, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "differs" not in done.stdout
    assert json.loads(path.read_text()) == trained
    done = command(backend, "--experiments", *flags)
    assert done.returncode == 0, done.stderr
    done = command(backend, "--experiments", *flags)
    assert done.returncode == 0, done.stderr
    rows = runs.read_rows(tmp_path / "report" / "results" / f"{task.SCRIPT}_experiments.csv")
    assert [row["name"] for row in rows] == ["baseline", "ddpm, 5 steps"]


def test_drawing_to_order_needs_no_dataset(tmp_path):
    order = ["--category", "airplane", "--elevation", "30", "--samples", "3", "--steps", "2", "--guidance", "2"]
    for seed in ("1", "2"):
        folders = ["--data-dir", tmp_path / "none", "--output-dir", tmp_path]
        done = command("tensorflow", "--load", *order, "--seed", seed, *folders)
        assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / task.SCRIPT
    first, second = (np.load(folder / f"airplane_30_seed_{seed}.npz") for seed in (1, 2))
    assert first["images"].shape == (3, 48, 48)
    assert first["images"].dtype == np.uint8
    assert first["category"].tolist() == [2, 2, 2]
    assert first["elevation"].tolist() == [30, 30, 30]
    assert not np.array_equal(first["images"], second["images"])
    assert (folder / "airplane_30_seed_1.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "trouble"),
    [
        (["--load", "--category", "boat"], "invalid choice"),
        (["--load", "--elevation", "31"], "invalid choice"),
        (["--load", "--steps", "0"], "positive"),
        (["--load", "--guidance", "-1"], "guidance"),
        (["--train", "--samples", "4"], "use --load"),
    ],
)
def test_orders_that_make_no_sense_are_one_line(flags, trouble):
    done = command("tensorflow", *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert trouble in line
