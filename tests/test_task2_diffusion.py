"""The diffusion script: data, networks, training, evaluation, and its command line on both backends."""

import dataclasses
import functools
import json
import math

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY, read_verification, run_elsewhere, run_script
from keras import ops

import task2_diffusion as task
from common import cli, datasets, diffusion, models
from common.diffusion import Sampling

GENERATOR = np.random.default_rng(0)
SAVED = REPOSITORY / "saved_models" / task.SCRIPT
TINY = task.Config(widths=(8, 8, 16), epochs=1, batch_size=16)


def random_views(count=32):
    images = GENERATOR.integers(0, 256, (count, 48, 48), dtype=np.uint8)
    return task.LeftViews(images, np.arange(count) % 5, np.arange(count) % 9)


# ---------------------------------------------------------------------------------------------------------------- data


def test_images_are_split_without_overlap():
    images, _ = task.load_images(None, sample=True)
    train, validation, test = (images[part].images for part in ("train", "validation", "test"))
    assert len(validation) == (len(train) + len(validation)) // 10
    assert train.shape[1:] == (48, 48)
    known = {image.tobytes() for image in train}
    assert len(known) == len(train)  # no two are alike
    assert not known & {image.tobytes() for image in [*validation, *test]}
    again, _ = task.load_images(None, sample=True)
    assert np.array_equal(again["train"].images, train)
    assert np.array_equal(again["train"].elevation, images["train"].elevation)


def test_images_are_the_left_views():
    images, checksums = task.load_images(None, sample=True)
    dataset = datasets.load_smallnorb(None, sample=True)
    assert np.array_equal(images["test"].images[0], datasets.area_average(dataset.test.images[:1], 48)[0, :, :, 0])
    assert np.array_equal(images["test"].category, dataset.test.category)
    assert checksums == dataset.checksums


def test_a_quick_run_never_has_as_many_images_as_the_sample():
    quick, _ = task.load_images(None, sample=True, quick=True)
    whole, _ = task.load_images(None, sample=True)
    assert all(len(quick[part].images) < len(whole[part].images) for part in whole)


def test_every_condition_comes_equally_often():
    pairs = list(zip(*task.every_condition(90), strict=True))
    assert len(set(pairs)) == 45
    assert all(pairs.count(pair) == 2 for pair in set(pairs))


@pytest.mark.parametrize("standardized", [False, True])
def test_images_are_normalised_and_back(standardized):
    value_range = task.value_range(dataclasses.replace(TINY, standardized=standardized))
    images = random_views(4).images
    normalised = ops.convert_to_numpy(task.normalize(images, value_range))
    assert normalised.shape == (4, 48, 48, 1)
    extremes = (-192 / 45, 63 / 45) if standardized else (-1, 1)
    assert (normalised.min(), normalised.max()) == pytest.approx(extremes)
    assert np.array_equal(task.denormalize(normalised, value_range), images)
    assert task.denormalize(np.array([[[[-99.0], [99.0]]]]), value_range).tolist() == [[[0, 255]]]


# --------------------------------------------------------------------------------------------------------------- model


@pytest.fixture(scope="module")
def tiny_network():
    keras.utils.set_random_seed(0)
    network = task.build_network(TINY)
    # A new network predicts 0 for everything, since its last layers start at 0.
    network.set_weights([GENERATOR.normal(size=weights.shape) * 0.2 for weights in network.get_weights()])
    return network


def test_the_network_starts_at_zero_and_is_small():
    network = task.build_network(task.CONFIGS["network"])
    assert models.parameter_counts(network)["trainable"] <= 4_000_000
    inputs = {"noisy": np.ones((1, 48, 48, 1)), "time": np.ones((1, 1)), "category": [0], "elevation": [0]}
    prediction = network({name: np.asarray(values) for name, values in inputs.items()})
    assert prediction.shape == (1, 48, 48, 1)
    assert np.abs(ops.convert_to_numpy(prediction)).max() == 0


@pytest.mark.parametrize(("row", "column"), [(12, 31), (3, 3), (40, 20)])
def test_patches_are_cut_and_put_together_again(row, column):
    """A bright pixel moves the prediction around itself most."""
    keras.utils.set_random_seed(0)
    network = task.build_network(TINY)
    last = [layer for layer in network.layers if isinstance(layer, keras.layers.Conv2D)][-1]  # starts at 0
    last.set_weights([np.random.default_rng(0).normal(size=weights.shape) for weights in last.get_weights()])
    black = {"noisy": np.zeros((1, 48, 48, 1)), "time": np.zeros((1, 1)), "category": [5], "elevation": [9]}
    black = {name: np.asarray(values) for name, values in black.items()}
    pixel = {**black, "noisy": black["noisy"].copy()}
    pixel["noisy"][0, row, column] = 3
    change = np.abs(ops.convert_to_numpy(network(pixel)) - ops.convert_to_numpy(network(black)))[0, ..., 0]
    most = np.unravel_index(change.argmax(), change.shape)
    assert np.abs(np.subtract(most, (row, column))).max() <= 6


# ------------------------------------------------------------------------------------------------- losses and training


@pytest.mark.parametrize("target", ["velocity", "noise"])
def test_the_right_prediction_gives_the_image_back(target):
    views, config = random_views(), dataclasses.replace(TINY, target=target)
    inputs, prediction = task.trainer(None, config, 0).add_noise(**views._asdict())
    rates = diffusion.diffusion_schedule(inputs["time"][:, :, None, None])
    found = ops.convert_to_numpy(diffusion.clean_image(target, inputs["noisy"], prediction, *rates))
    assert np.array_equal(task.denormalize(found, task.value_range(config)), views.images)


def test_labels_are_dropped_together_and_as_often_as_said():
    count = 5000
    category, elevation = task.every_condition(count)
    images = np.zeros((count, 2, 2), np.uint8)
    inputs, _ = task.trainer(None, TINY, 0).add_noise(images, category=category, elevation=elevation)
    dropped = ops.convert_to_numpy(inputs["category"]) == task.NUM_LABELS["category"]
    assert np.array_equal(dropped, ops.convert_to_numpy(inputs["elevation"]) == task.NUM_LABELS["elevation"])
    assert np.array_equal(ops.convert_to_numpy(inputs["category"])[~dropped], category[~dropped])
    assert dropped.mean() == pytest.approx(diffusion.LABEL_DROPOUT, abs=0.02)


@pytest.mark.parametrize(("loss", "expected"), [("mse", 2.5), ("mae", 1.5)])
def test_the_loss_is_the_one_of_the_config(loss, expected):
    trainer = task.trainer(None, dataclasses.replace(TINY, loss=loss), 0)
    prediction, target = np.array([1.0, 2.0], "float32"), np.array([2.0, 0.0], "float32")
    assert float(trainer.compute_loss(y_pred=(prediction, target))) == expected


def test_every_other_choice_trains(tmp_path):
    config = dataclasses.replace(TINY, target="noise", loss="mae", average=0.0, attention=False, blocks=2, widths=(8,))
    network, curves, _ = task.train_network(config, random_views(), 0, random_views(16), folder=tmp_path, resume=False)
    assert np.isfinite(curves["loss"][0])
    assert np.isfinite(curves["val_loss"][0])
    assert network.dtype_policy.name == "float32"


# ---------------------------------------------------------------------------------------------------------- evaluation


def eager_sampler(network, sampling):
    sampler = task.build_sampler(network, TINY, sampling)
    sampler.run_eagerly = True  # for three steps faster than compiling
    return sampler


def test_ddim_is_decided_by_the_noise_and_ddpm_is_not(tiny_network):
    conditions = task.every_condition(4)
    noise = GENERATOR.standard_normal((4, 48, 48, 1)).astype("float32")

    def samples(name):
        sampler = eager_sampler(tiny_network, Sampling(name, 3, 1.0, 2.0))
        return [task.generate(sampler, *conditions, seed, noise) for seed in (0, 1)]

    assert np.array_equal(*samples("ddim"))
    assert not np.array_equal(*samples("ddpm"))


def test_samples_depend_on_the_condition(tiny_network):
    noise = np.repeat(GENERATOR.standard_normal((1, 48, 48, 1)).astype("float32"), 3, axis=0)
    category, elevation = np.array([0, 1, 0]), np.array([0, 0, 1])
    sampler = eager_sampler(tiny_network, Sampling("ddpm", 3, 2.0, 2.0))
    images = task.generate(sampler, category, elevation, noise=noise)
    assert images.dtype == np.uint8
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


class Classifier:
    """Predicts category 2 at 40 degrees for everything."""

    def predict(self, images, **_):
        return {"category": np.eye(5)[[2] * len(images)], "elevation": np.eye(9)[[2] * len(images)]}


def test_agreement():
    measured, predicted = task.agreement(
        Classifier(), random_views(4).images, np.array([2, 2, 2, 0]), np.array([2, 3, 0, 2])
    )
    assert measured == {"category_agreement": 0.75, "elevation_agreement": 0.5, "elevation_mae_degrees": 3.75}
    assert predicted.tolist() == [2, 2, 2, 2]


def test_low_resolution_keeps_flat_areas_and_loses_details():
    flat = np.full((1, 48, 48), 90, np.uint8)
    assert np.unique(task.low_resolution(flat)).tolist() == [90]
    noise = random_views(1).images
    assert task.low_resolution(noise).shape == noise.shape
    assert task.low_resolution(noise).std() < 0.4 * noise.std()


# -------------------------------------------------------------------------------------------------------- saved models


def test_saved_models_were_trained_by_their_configs(tmp_path):
    arguments = cli.parse(cli.parser("", list(task.CONFIGS)), ["--load", "--output-dir", str(tmp_path)])
    _, config, card = task.restore(arguments, "network")
    assert config == task.CONFIGS["network"]
    assert card["shortened"] is None
    assert card["epochs"] == len(card["curves"]["loss"]) == config.epochs
    assert card["sampling"] == dataclasses.asdict(task.SAMPLING)
    assert task.restore(arguments, "judge")[1] == task.CONFIGS["judge"]


def test_a_card_with_another_config_is_a_user_error(tmp_path):
    folder = tmp_path / "saved_models" / task.SCRIPT
    folder.mkdir(parents=True)
    (folder / "network.keras").symlink_to(SAVED / "network.keras")
    card = json.loads((SAVED / "network.json").read_text())
    (folder / "network.json").write_text(json.dumps({**card, "config": {"depth": 3}}))
    done = command("tensorflow", "--load", "--steps", "1", "--output-dir", tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the card of {folder / 'network.keras'} has another config")
    assert len(done.stderr.splitlines()) == 1


def test_stock_keras_opens_the_saved_models_from_an_empty_directory(tmp_path):
    code = (
        "import sys, keras, numpy as np\n"
        "network, judge = (keras.saving.load_model(p, safe_mode=True, compile=False) for p in sys.argv[1:])\n"
        "one = np.ones(2)\n"
        "print(network({'noisy': np.zeros((2, 48, 48, 1)), 'time': np.ones((2, 1)), 'category': one,"
        " 'elevation': one}).shape)\n"
        "print(judge(np.zeros((2, 48, 48)))['category'].shape)"
    )
    printed = run_elsewhere(code, tmp_path, *(SAVED / f"{name}.keras" for name in task.CONFIGS))
    assert printed.splitlines() == ["(2, 48, 48, 1)", "(2, 5)"]


# -------------------------------------------------------------------------------------------------------- command line


command = functools.partial(run_script, task.SCRIPT)


verification = functools.partial(read_verification, task.SCRIPT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output directory of a quick training run, the weights before they were averaged, and the verification."""
    folder = tmp_path_factory.mktemp("trained")
    raw = []
    finalize = keras.optimizers.AdamW.finalize_variable_values

    def spy(optimizer, variables):
        raw.append([ops.convert_to_numpy(variable) for variable in variables])
        finalize(optimizer, variables)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.optimizers.AdamW, "finalize_variable_values", spy)
        flags = [
            "--quick",
            "--sample",
            "--batch-size",
            "16",
            "--output-dir",
            folder,
        ]  # several steps: else nothing to average
        done = command("tensorflow", "--train", *flags)
    assert done.returncode == 0, done.stderr
    networks = [weights for weights in raw if len(weights) > 50]  # the classifier has fewer variables
    return folder, networks[0], verification(folder)


def test_training_measures_and_writes_results_and_figures(trained):
    folder, _, rows = trained
    results = json.loads((folder / "report" / "results" / f"{task.SCRIPT}.json").read_text())
    assert results["samples"] == task.NUM_CONDITIONS
    assert math.isfinite(results["test"]["frechet_distance"])
    committed = json.loads((REPOSITORY / "report" / "results" / f"{task.SCRIPT}.json").read_text())
    assert results.keys() == committed.keys()
    for part in ("test", "validation", "train", "references", "models", "sampling"):
        assert results[part].keys() == committed[part].keys()
    assert {row["model"] for row in rows} == {"network", "judge"}
    names = {path.name for path in (folder / "report" / "figures" / task.SCRIPT).glob("*.png")}
    assert {"samples.png", "orders.png", "nearest.png", "agreement.png"} <= names
    for name in task.CONFIGS:
        card = models.read_card(folder / "saved_models" / task.SCRIPT / f"{name}.keras")
        assert card["metrics"]["sample"] == card["metrics"]["test"]
        assert card["dataset"]["sample"] == 75
        assert "--quick" in card["shortened"]


def test_load_reproduces_the_metrics_of_train_and_writes_no_results(trained):
    folder, _, before = trained
    path = folder / "report" / "results" / f"{task.SCRIPT}.json"
    path.unlink()
    done = command("tensorflow", "--load", "--quick", "--sample", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    assert "DIFFERS" not in done.stdout
    rows = verification(folder)
    assert all(row["agrees"] for row in rows)
    assert [row["measured"] for row in rows] == [row["measured"] for row in before]
    assert not path.exists()


def test_the_saved_weights_are_the_averaged_ones_also_after_a_resume(trained):
    folder, raw, _ = trained
    network, card = models.load_model(folder / "saved_models" / task.SCRIPT / "network.keras", task.SCRIPT)
    config = task.Config(**card["config"] | {"widths": tuple(card["config"]["widths"])})
    views, _ = task.load_images(None, sample=True, quick=True)
    checkpoint = folder / "runs" / task.SCRIPT / "network_seed_0"
    again, _, _ = task.train_network(config, views["train"], 0, folder=checkpoint, resume=True)

    def distance(first, second):
        return max(np.abs(a - b).max() for a, b in zip(first, second, strict=True))

    saved = [ops.convert_to_numpy(variable) for variable in network.trainable_variables]
    assert distance(network.get_weights(), again.get_weights()) == 0
    assert distance(saved, raw) > 0


def test_experiments_are_resumed(trained):
    folder, _, _ = trained
    for _ in range(2):
        done = command("tensorflow", "--experiments", "--quick", "--sample", "--output-dir", folder)
        assert done.returncode == 0, done.stderr
    table = pd.read_csv(folder / "report" / "results" / f"{task.SCRIPT}_experiments.csv")
    assert table["name"].tolist() == ["baseline", "ddpm, 5 steps"]
    assert table["steps"].tolist() == [task.QUICK_STEPS, 5]
    assert list(table) == list(pd.read_csv(REPOSITORY / "report/results" / f"{task.SCRIPT}_experiments.csv"))


def test_both_networks_train_compiled_and_samples_are_the_same_under_jax(tmp_path):
    noise = GENERATOR.standard_normal((2, 48, 48, 1)).astype("float32")
    np.save(tmp_path / "noise.npy", noise)
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import dataclasses, numpy as np, task2_diffusion as task
from common import models
from pathlib import Path
folder = Path({str(tmp_path)!r})
views, _ = task.load_images(None, sample=True, quick=True)
config = dataclasses.replace(task.CONFIGS["network"], widths=(8,), attention=False, epochs=1)
options = {{"folder": folder / "checkpoint", "resume": False}}
network, curves, _ = task.train_network(config, views["train"], 0, views["validation"], **options)
_, more, _ = task.train_classifier(task.ClassifierConfig(epochs=1), views["train"], 0, **options)
print(np.isfinite([*curves["loss"], *curves["val_loss"], *more["loss"]]).all())
sampler = task.build_sampler(network, config, dataclasses.replace(task.DETERMINISTIC_SAMPLING, steps=2))
np.save(folder / "images.npy", task.generate(sampler, *task.every_condition(2), noise=np.load(folder / "noise.npy")))
models.save_model(network, folder / "network.keras", {{}})
"""
    done = run_elsewhere(code, tmp_path, KERAS_BACKEND="jax", XLA_FLAGS=QUICK_COMPILATION)
    assert done.splitlines()[-1] == "True"
    network = keras.saving.load_model(tmp_path / "network.keras", compile=False)
    sampler = eager_sampler(network, dataclasses.replace(task.DETERMINISTIC_SAMPLING, steps=2))
    images = task.generate(sampler, *task.every_condition(2), noise=noise).astype(int)
    assert np.abs(images - np.load(tmp_path / "images.npy")).max() <= 1  # grey level


def test_conditional_sampling_needs_no_dataset(tmp_path):
    condition = ["--category", "airplane", "--elevation", "30", "--samples", "3", "--steps", "2", "--guidance", "2"]
    for seed in ("1", "2"):
        folders = ["--data-dir", tmp_path / "none", "--output-dir", tmp_path]
        done = command("tensorflow", "--load", *condition, "--seed", seed, *folders)
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
        (["--load", "--elevation", "31"], "invalid choice: 31 (choose from 30, 35, 40"),
        (["--load", "--steps", "0"], "--steps: '0' is not a whole number from 1 to 1000"),
        (["--load", "--samples", "10001"], "--samples: '10001' is not a whole number from 1 to 10000"),
        (["--load", "--guidance", "-1"], "--guidance: '-1' is not a number from 0 to 20"),
        (["--load", "--guidance", "nan"], "--guidance: 'nan' is not a number from 0 to 20"),
        (["--train", "--samples", "4"], "use --load"),
    ],
)
def test_conditions_that_make_no_sense_are_one_line(flags, trouble, tmp_path):
    done = command("tensorflow", *flags, "--output-dir", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert trouble in line
