"""The AddNIST script: its counters, the distribution of sums, the data config, and its command line."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

import addnist_classifier as task

GENERATOR = np.random.default_rng(0)
SAVED = REPOSITORY / "saved_models" / task.SCRIPT


# ------------------------------------------------------------------------------------------------------------ counters


@pytest.mark.parametrize(
    ("parameters", "steps", "marks"),
    [
        (99_999, 10_000, 0),
        (100_000, 10_000, 5),
        (110_000, 10_000, 5),
        (150_000, 10_000, 25),
        (50_000, 11_000, 5),
        (50_000, 15_000, 25),
        (110_000, 11_000, 10),
        (50_000, 10_001, 5),
    ],
)
def test_penalty_by_the_examples_of_the_brief(parameters, steps, marks):
    assert task.penalty(parameters, steps) == marks


@pytest.mark.parametrize("model", task.MODELS)
def test_networks_keep_to_the_budget(model):
    config = task.CONFIGS[model]
    parameters = task.init_model(jax.random.key(0), config)
    # By hand: four convolutions with a gain and a bias per filter, one reader or three; then the dense layers.
    filters = [1, *config.widths]
    pairs = zip((25, 9, 9, 9), filters, filters[1:], strict=False)
    one_reader = sum(size * a * b + 2 * b for size, a, b in pairs)
    by_hand = one_reader + (64 + 1) * 10
    if model == "ordinary":
        by_hand = 3 * one_reader + 3 * 48 * 96 + 2 * 96 + (96 + 1) * 20
    assert task.count_parameters(parameters) == by_hand < task.PARAMETER_LIMIT
    assert config.steps <= task.STEP_LIMIT
    finished = task.calibrated(parameters, np.zeros((2, 3, 28, 28), np.uint8), model)
    assert task.count_parameters(finished) < task.PARAMETER_LIMIT
    assert task.penalty(task.count_parameters(finished), config.steps) == 0


# -------------------------------------------------------------------------------------------------------------- models


def test_sum_distribution_against_brute_force():
    probabilities = GENERATOR.dirichlet(np.ones(10), size=(4, 3))
    expected = np.zeros((4, 28))
    for digits in np.ndindex(10, 10, 10):
        expected[:, sum(digits)] += np.prod([probabilities[:, c, digit] for c, digit in enumerate(digits)], axis=0)
    classes = expected[:, 1:21] / expected[:, 1:21].sum(axis=1, keepdims=True)
    found = np.exp(task.sum_log_probabilities(np.log(probabilities)))
    assert np.allclose(found, classes, atol=1e-5)
    assert np.allclose(found.sum(axis=1), 1, atol=1e-5)


def test_certain_digits_make_a_certain_class():
    sure = np.full((1, 3, 10), -30.0)
    for channel, digit in enumerate((4, 0, 9)):
        sure[0, channel, digit] = 0
    assert task.sum_log_probabilities(sure).argmax() == 4 + 0 + 9 - 1


def test_the_shared_network_does_not_care_for_the_order_of_channels():
    parameters = task.init_model(jax.random.key(0), task.Config("shared"))
    parameters["dense"] = GENERATOR.normal(size=parameters["dense"].shape)
    images = GENERATOR.integers(0, 256, (5, 3, 28, 28), dtype=np.uint8)
    found = task.predict(parameters, images, "shared")
    assert found.std() > 0.01
    assert np.allclose(found, task.predict(parameters, images[:, [2, 0, 1]], "shared"), atol=1e-4)


def test_a_calibrated_network_judges_each_picture_by_itself():
    parameters = task.init_model(jax.random.key(0), task.Config("ordinary", (4, 4, 4, 4), hidden=8))
    parameters["dense"] = GENERATOR.normal(size=parameters["dense"].shape).astype("float32")
    images = GENERATOR.integers(0, 256, (8, 3, 28, 28), dtype=np.uint8)
    finished = task.calibrated(parameters, images, "ordinary")
    together = task.predict(finished, images, "ordinary")
    assert np.allclose(task.predict(parameters, images, "ordinary"), together, atol=1e-4)
    assert np.allclose(task.predict(finished, images[:1], "ordinary"), together[:1], atol=1e-4)
    assert not np.allclose(task.predict(parameters, images[:1], "ordinary"), together[:1], atol=1e-2)


def test_permutations_keep_the_channels_of_each_picture_and_differ_between_pictures():
    images = np.arange(100 * 3, dtype=np.uint8).reshape(100, 3, 1, 1) * np.ones((1, 1, 28, 28), np.uint8)
    moved = np.asarray(task.permuted(images, jax.random.key(0)))
    assert np.array_equal(np.sort(moved[:, :, 0, 0], axis=1), np.sort(images[:, :, 0, 0], axis=1))
    assert np.array_equal(moved, np.broadcast_to(moved[:, :, :1, :1], moved.shape))
    orders = {tuple(order) for order in moved[:, :, 0, 0].argsort(axis=1)}
    assert len(orders) == 6


@pytest.mark.parametrize(("size", "stride", "side"), [(5, 2, 28), (3, 2, 14), (3, 2, 7), (3, 1, 4)])
def test_convolution_is_the_one_of_jax(size, stride, side):
    features = GENERATOR.normal(size=(2, side, side, 3)).astype("float32")
    kernel = GENERATOR.normal(size=(size, size, 3, 4)).astype("float32")
    expected = jax.lax.conv_general_dilated(
        features, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert np.allclose(task.convolution(features, kernel, stride), expected, atol=1e-4)


def test_shifts_move_every_digit_by_itself_and_no_further_than_said():
    images = np.zeros((200, 3, 28, 28), np.uint8)
    images[:, :, 14, 14] = 255
    moved = np.asarray(task.shifted(images, jax.random.key(0)))
    _, channel, rows, columns = np.nonzero(moved)
    assert len(rows) == 600
    assert set(rows - 14) == set(columns - 14) == set(range(-task.MAX_SHIFT, task.MAX_SHIFT + 1))
    assert (rows[channel == 0] != rows[channel == 1]).any()


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def mnist_dir(tmp_path_factory):
    """A data folder with the four MNIST files in their official format, smaller ones, and their checksums."""
    data_dir = tmp_path_factory.mktemp("data")
    (data_dir / "mnist").mkdir()
    checksums = {}
    for prefix, count in (("train", 3000), ("t10k", 1000)):
        digits = np.arange(count, dtype=np.uint8) % 10
        images = GENERATOR.integers(0, 40, (count, 28, 28), dtype=np.uint8)
        for digit in range(10):  # a bright bar whose place tells the digit
            images[digits == digit, 2 * digit + 4] = 255
        for name, header, values in (("images-idx3", 16, images), ("labels-idx1", 8, digits)):
            content = gzip.compress(bytes(header) + values.tobytes())
            (data_dir / "mnist" / f"{prefix}-{name}-ubyte.gz").write_bytes(content)
            checksums[f"{prefix}-{name}-ubyte.gz"] = hashlib.md5(content).hexdigest()
    return data_dir, checksums


@pytest.fixture
def small_mnist(mnist_dir, monkeypatch):
    data_dir, checksums = mnist_dir
    monkeypatch.setattr(task, "MNIST_FILES", checksums)
    return data_dir


def test_there_are_915_triples_of_digits():
    triples = task.digit_triples()
    assert len({tuple(triple) for triple in triples.tolist()}) == 915
    assert set((triples.sum(axis=1) - 1).tolist()) == set(range(20))


def test_config_is_balanced_and_true(small_mnist):
    splits = task.build_from_mnist(small_mnist, {"train": 6000, "valid": 2000, "test": 1000})
    for name, count in (("train", 6000), ("valid", 2000), ("test", 1000)):
        split = splits[name]
        assert np.bincount(split.labels).tolist() == [count // 20] * 20
        assert (split.digits.sum(axis=1) - 1 == split.labels).all()
        assert split.images.shape == (count, 3, 28, 28)
        shown = split.images.mean(axis=3).argmax(axis=2)
        assert (shown == 2 * split.digits + 4).all()
    # Class 1 has six triples, 0 + 0 + 2 and 0 + 1 + 1 in every order, which are equally likely.
    pairs, counts = np.unique(splits["train"].digits[splits["train"].labels == 1], axis=0, return_counts=True)
    assert len(pairs) == 6
    assert counts.min() > 25


def test_no_two_splits_share_a_picture_of_a_digit(small_mnist):
    splits = task.build_from_mnist(small_mnist, dict.fromkeys(task.SIZES, 2000))
    pictures = {name: {image.tobytes() for image in split.images.reshape(-1, 28, 28)} for name, split in splits.items()}
    assert not pictures["train"] & pictures["valid"]
    assert not (pictures["train"] | pictures["valid"]) & pictures["test"]


def test_damaged_and_missing_mnist_files(small_mnist, tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(b"broken")
    with pytest.raises(task.UserError, match="damaged"):
        task.load_mnist(tmp_path)
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").unlink()
    monkeypatch.setattr(task, "MNIST_MIRRORS", ("http://127.0.0.1:9/", "http://127.0.0.1:9/"))
    with pytest.raises(task.UserError, match="by hand"):
        task.load_mnist(tmp_path)


def write_official(folder, splits):
    folder.mkdir(parents=True)
    for name, split in splits.items():
        normalized = (split.images / 255 - task.MNIST_MEAN) / task.MNIST_DEVIATION
        np.save(folder / f"{name}_x.npy", normalized.astype("float32"))
        np.save(folder / f"{name}_y.npy", split.labels)


def test_official_arrays_are_read_as_they_were_before_they_were_normalised(small_mnist, tmp_path):
    splits = task.build_from_mnist(small_mnist, dict.fromkeys(task.SIZES, 40))
    write_official(tmp_path / "addnist", splits)
    read, source = task.load_data(tmp_path)
    assert source == "official"
    for name in splits:
        assert np.array_equal(read[name].images, splits[name].images)
        assert np.array_equal(read[name].labels, splits[name].labels)


def spoil_shape(folder):
    np.save(folder / "test_x.npy", np.zeros((40, 28, 28), "float32"))


def spoil_labels(folder):
    np.save(folder / "test_y.npy", np.full(40, 20))


def spoil_range(folder):
    np.save(folder / "test_x.npy", np.full((40, 3, 28, 28), 100.0, "float32"))


def spoil_file(folder):
    (folder / "test_x.npy").write_bytes(b"broken")


def spoil_by_removing(folder):
    (folder / "test_x.npy").unlink()


@pytest.mark.parametrize(
    ("spoil", "trouble"),
    [
        (spoil_shape, "shapes"),
        (spoil_labels, "0 to 19"),
        (spoil_range, "normalised"),
        (spoil_file, "damaged"),
        (spoil_by_removing, "missing"),
    ],
)
def test_wrong_official_arrays(small_mnist, tmp_path, spoil, trouble):
    write_official(tmp_path / "addnist", task.build_from_mnist(small_mnist, dict.fromkeys(task.SIZES, 40)))
    spoil(tmp_path / "addnist")
    with pytest.raises(task.UserError, match=trouble):
        task.load_data(tmp_path)


# ------------------------------------------------------------------------------------------------------------ training


def test_a_stopped_training_goes_on_where_it_was(small_mnist, tmp_path, monkeypatch):
    splits = task.build_from_mnist(small_mnist, dict.fromkeys(task.SIZES, 100))
    monkeypatch.setattr(task, "STEPS_PER_CALL", 5)
    config = task.Config(widths=(4, 4, 4, 4), steps=10, batch_size=8)
    whole, curves, _ = task.train_network(config, splits, 0, folder=tmp_path / "whole", resume=False)

    save = task.save_checkpoint

    def save_and_die(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(task, "save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        task.train_network(config, splits, 0, folder=tmp_path / "stopped", resume=False)
    monkeypatch.setattr(task, "save_checkpoint", save)
    resumed, resumed_curves, _ = task.train_network(config, splits, 0, folder=tmp_path / "stopped", resume=True)
    assert resumed_curves["step"] == curves["step"] == [5, 10]
    assert resumed_curves["loss"] == pytest.approx(curves["loss"])
    for name in whole:
        assert np.allclose(whole[name], resumed[name], atol=1e-6)
    changed = task.Config(widths=(4, 4, 4, 4), steps=10, batch_size=4)
    with pytest.raises(task.UserError, match="batch_size"):
        task.train_network(changed, splits, 0, folder=tmp_path / "stopped", resume=True)
    (tmp_path / "stopped" / "checkpoint.npz").write_bytes(b"broken")
    with pytest.raises(task.UserError, match="damaged"):
        task.train_network(config, splits, 0, folder=tmp_path / "stopped", resume=True)


# -------------------------------------------------------------------------------------------------------- command line


def command(*flags):
    script = REPOSITORY / f"{task.SCRIPT}.py"
    return subprocess.run([sys.executable, script, *flags], capture_output=True, text=True, check=False)


def test_imports_no_other_library():
    text = (REPOSITORY / f"{task.SCRIPT}.py").read_text()
    imported = set(re.findall(r"^(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    assert imported == {"jax", "matplotlib", "numpy", "optax"}


def test_load_reproduces_the_metrics_of_train(small_mnist, tmp_path):
    data_dir = tmp_path / "data"
    write_official(data_dir / "addnist", task.build_from_mnist(small_mnist, dict.fromkeys(task.SIZES, 500)))
    flags = ["--quick", "--data-dir", data_dir, "--output-dir", tmp_path]
    done = command("--train", *flags)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}.json"
    trained = json.loads(path.read_text())
    assert set(trained["models"]) == set(task.MODELS)
    path.unlink()
    done = command("--load", *flags)
    assert done.returncode == 0, done.stderr
    assert "differs" not in done.stdout
    assert json.loads(path.read_text()) == trained
    (tmp_path / "saved_models" / task.SCRIPT / "shared.npz").write_bytes(b"broken")
    done = command("--load", *flags)
    assert done.returncode == 2
    assert "checksum" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("model", task.MODELS)
def test_saved_weights(model):
    parameters, card = task.load_weights(SAVED / f"{model}.npz")
    assert card["parameters"]["trainable"] == task.count_parameters(parameters) < task.PARAMETER_LIMIT
    assert card["steps"] == task.CONFIGS[model].steps <= task.STEP_LIMIT
    assert card["penalty"] == 0
    assert card["shortened"] is None
    assert len(card["seeds"]) == task.NUM_SEEDS
    assert (SAVED / f"{model}.npz").stat().st_size < 500_000


def test_saved_weights_read_new_pictures(tmp_path):
    """On test pictures that are drawn anew from real MNIST digits, the accuracy is the recorded one."""
    data_dir = REPOSITORY / "data" if "DATA_DIR" not in os.environ else task.Path(os.environ["DATA_DIR"])
    if not (data_dir / "cache" / "mnist" / "manifest.json").exists():
        pytest.skip(f"MNIST is not prepared in {data_dir}")
    _, _, images, digits = task.load_mnist(data_dir)
    split = task.build_split(images, digits, 2000, seed=7)
    parameters, card = task.load_weights(SAVED / "shared.npz")
    recorded = card["metrics"]["test"]["accuracy"]
    assert task.accuracy(parameters, split, "shared") == pytest.approx(recorded, abs=0.015)
