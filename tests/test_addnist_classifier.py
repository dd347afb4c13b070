"""The AddNIST script: its counters, networks and dataset, training, every file that it reads, and its command line."""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY

os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)  # read when JAX is first used

import addnist_classifier as task
from experiments import addnist_classifier as experiments

GENERATOR = np.random.default_rng(0)
SAVED = REPOSITORY / "saved_models" / task.SCRIPT
TINY = {"widths": (4, 4, 4, 4), "steps": 4, "batch_size": 8}


def count_parameters(parameters):
    return sum(array.size for array in parameters.values())


def no_figures(monkeypatch):
    monkeypatch.setitem(sys.modules, f"plots.{task.SCRIPT}", None)


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
    parameters = jax.eval_shape(lambda: task.init_model(jax.random.key(0), config))
    # By hand: four convolutions with a gain and a bias per filter, one encoder or three; then the dense layers.
    filters = [1, *config.widths]
    pairs = zip((25, 9, 9, 9), filters, filters[1:], strict=False)
    one_encoder = sum(size * a * b + 2 * b for size, a, b in pairs)
    by_hand = one_encoder + (config.widths[-1] + 1) * 10
    if model == "ordinary":
        by_hand = 3 * one_encoder + 3 * config.widths[-1] * config.hidden + 2 * config.hidden + (config.hidden + 1) * 20
    assert count_parameters(parameters) == by_hand < task.PARAMETER_LIMIT
    assert config.steps <= task.STEP_LIMIT
    finished = task.layout(config)
    assert by_hand < count_parameters(finished) < task.PARAMETER_LIMIT
    assert task.penalty(count_parameters(finished), config.steps) == 0


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


def test_the_order_of_channels_does_not_matter_to_the_shared_network():
    parameters = task.init_model(jax.random.key(0), task.Config("shared", **TINY))
    parameters["dense"] = GENERATOR.normal(size=parameters["dense"].shape)
    images = GENERATOR.integers(0, 256, (5, 3, 28, 28), dtype=np.uint8)
    found, digits = task.predict(parameters, images, "shared")
    permuted, permuted_digits = task.predict(parameters, images[:, [2, 0, 1]], "shared")
    assert found.std() > 0.01
    assert np.allclose(found, permuted, atol=1e-4)
    assert np.array_equal(digits[:, [2, 0, 1]], permuted_digits)


def test_predictions_of_a_calibrated_network_do_not_depend_on_the_batch():
    parameters = task.init_model(jax.random.key(0), task.Config("ordinary", **TINY, hidden=8))
    parameters["dense"] = GENERATOR.normal(size=parameters["dense"].shape).astype("float32")
    images = GENERATOR.integers(0, 256, (8, 3, 28, 28), dtype=np.uint8)
    finished = task.calibrated(parameters, images, "ordinary")
    together = task.predict(finished, images, "ordinary")[0]
    assert np.allclose(task.predict(parameters, images, "ordinary")[0], together, atol=1e-4)
    assert np.allclose(task.predict(finished, images[:1], "ordinary")[0], together[:1], atol=1e-4)
    assert not np.allclose(task.predict(parameters, images[:1], "ordinary")[0], together[:1], atol=1e-2)


def augmented(images, **changes):
    config = task.Config(**{"shift": False, **changes})
    return np.asarray(task.augmented(images, jax.random.key(0), jax.random.key(1), config))


def test_permutations_keep_the_channels_of_each_image_and_differ_between_images():
    images = np.arange(100 * 3, dtype=np.uint8).reshape(100, 3, 1, 1) * np.ones((1, 1, 28, 28), np.uint8)
    moved = augmented(images, permute=True)
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
    _, channel, rows, columns = np.nonzero(augmented(images, shift=True))
    assert len(rows) == 600
    assert set(rows - 14) == set(columns - 14) == set(range(-task.MAX_SHIFT, task.MAX_SHIFT + 1))
    assert (rows[channel == 0] != rows[channel == 1]).any()


def test_rotation_and_scale_stay_within_their_range():
    images = np.zeros((200, 3, 28, 28), np.uint8)
    images[:, :, 13:15, 20:22] = 255  # 7 pixels to the right of the centre
    columns, rows = np.meshgrid(np.arange(28) - 13.5, 13.5 - np.arange(28))

    def polar(moved):
        weights = moved.reshape(-1, 28, 28) / moved.reshape(-1, 28, 28).sum(axis=(1, 2), keepdims=True)
        x, y = (weights * columns).sum(axis=(1, 2)), (weights * rows).sum(axis=(1, 2))
        return np.degrees(np.arctan2(y, x)), np.hypot(x, y)

    angles, radii = polar(augmented(images, rotation=20.0))
    assert 15 < angles.max() < 21
    assert -21 < angles.min() < -15
    assert np.allclose(radii, 7, atol=0.3)
    angles, radii = polar(augmented(images, scale=0.2))
    assert np.allclose(angles, 0, atol=3)
    assert 7 / 1.25 < radii.min() < 6.2
    assert 8.2 < radii.max() < 7 / 0.78


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def mnist_dir(tmp_path_factory):
    """A data folder with the four MNIST files in their official format, smaller ones, and their checksums."""
    data_dir = tmp_path_factory.mktemp("data")
    (data_dir / "mnist").mkdir()
    files = {}
    for split, prefix, count in (("train", "train", 3000), ("test", "t10k", 1000)):
        digits = np.arange(count, dtype=np.uint8) % 10
        images = GENERATOR.integers(0, 40, (count, 28, 28), dtype=np.uint8)
        for digit in range(10):  # a bright bar whose place tells the digit
            images[digits == digit, 2 * digit + 4] = 255
        for part, name, header, values in (("images", "images-idx3", 16, images), ("labels", "labels-idx1", 8, digits)):
            content = gzip.compress(bytes(header) + values.tobytes())
            (data_dir / "mnist" / f"{prefix}-{name}-ubyte.gz").write_bytes(content)
            files[f"{split}_{part}"] = f"{prefix}-{name}-ubyte.gz", hashlib.md5(content).hexdigest()
    return data_dir, files


@pytest.fixture
def small_mnist(mnist_dir, monkeypatch):
    data_dir, files = mnist_dir
    monkeypatch.setattr(task, "MNIST_FILES", files)
    return data_dir


def build(data_dir, **sizes):
    return task.build_from_mnist(task.load_mnist(data_dir), sizes)


def test_there_are_915_triples_of_digits():
    assert len({tuple(triple) for triple in task.TRIPLES.tolist()}) == len(task.TRIPLES) == 915
    assert set((task.TRIPLES.sum(axis=1) - 1).tolist()) == set(range(20))


def test_dataset_is_balanced_and_true(small_mnist):
    splits = build(small_mnist, train=6000, valid=2000, test=1000)
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


def test_no_two_splits_share_an_image_of_a_digit(small_mnist):
    splits = build(small_mnist, **dict.fromkeys(task.SIZES, 2000))
    images = {name: {image.tobytes() for image in split.images.reshape(-1, 28, 28)} for name, split in splits.items()}
    assert not images["train"] & images["valid"]
    assert not (images["train"] | images["valid"]) & images["test"]


def test_damaged_and_missing_mnist_files(small_mnist, tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    for name, _ in task.MNIST_FILES.values():
        (tmp_path / "mnist" / name).write_bytes(b"broken")
    with pytest.raises(task.UserError, match=r"damaged.*checksum"):
        task.load_mnist(tmp_path)
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").unlink()
    monkeypatch.setattr(task, "MNIST_MIRROR", "http://127.0.0.1:9/")
    with pytest.raises(task.UserError, match=r"by hand into .*, or add --sample$"):
        task.load_mnist(tmp_path)


def test_sample_makes_a_dataset_without_any_other_file(tmp_path):
    splits, source = task.load_data(tmp_path, sample=True)
    assert source == "built from the MNIST sample"
    for split in splits.values():
        assert split.images.shape == (500, 3, 28, 28)
        assert (split.digits.sum(axis=1) - 1 == split.labels).all()
    assert not list(tmp_path.iterdir())


def archive(array):
    buffer = io.BytesIO()
    np.savez(buffer, x=array)
    return buffer.getvalue()


def saved(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


DAMAGES = {
    "truncated": lambda content: content[:-100],
    "empty": lambda content: b"",
    "other bytes": lambda content: b"broken",
    "a pickle": lambda content: pickle.dumps([1, 2, 3]),
    "objects": lambda content: saved(np.array([{}, None])),
    "an .npz": lambda content: archive(np.zeros(3)),
    "0-d": lambda content: saved(np.array(1.0)),
    "text": lambda content: saved(np.array(["one", "two"])),
}


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "a pickle", "0-d", "an .npz"])
def test_damaged_sample(damage, tmp_path, monkeypatch):
    path = tmp_path / "mnist.npz"
    path.write_bytes(DAMAGES[damage](task.SAMPLE.read_bytes()))
    monkeypatch.setattr(task, "SAMPLE", path)
    with pytest.raises(task.UserError, match=r"mnist\.npz is damaged .*; get it again"):
        task.load_data(tmp_path, sample=True)


@pytest.fixture
def cache(small_mnist, tmp_path):
    """A `.npy` cache as the other scripts write it, and a function that puts a file into it and into its manifest."""
    folder = tmp_path / "cache" / "mnist"
    folder.mkdir(parents=True)
    images, digits, test_images, test_digits = task.load_mnist(small_mnist)
    checksums = {}

    def put(name, content, known=True):
        (folder / f"{name}.npy").write_bytes(content)
        if known:
            checksums[name] = hashlib.sha256(content).hexdigest()
        (folder / "manifest.json").write_text(json.dumps({"sha256": checksums}))

    for name, array in (
        ("train_images", images[..., None]),
        ("train_labels", digits),
        ("test_images", test_images[..., None]),
        ("test_labels", test_digits),
    ):
        put(name, saved(array))
    return SimpleNamespace(folder=folder, put=put, data_dir=tmp_path)


def test_cache_of_the_other_scripts_is_read(cache, small_mnist):
    for found, expected in zip(task.load_mnist(cache.data_dir), task.load_mnist(small_mnist), strict=True):
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache(cache, damage):
    content = DAMAGES[damage]((cache.folder / "train_labels.npy").read_bytes())
    for known, trouble in ((False, "checksum"), (True, "")):
        cache.put("train_labels", content, known)
        with pytest.raises(task.UserError, match=f"damaged .*{trouble}.*; delete .*prepared again"):
            task.load_mnist(cache.data_dir)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("train_labels", np.full(3000, 10)),
        ("train_labels", np.zeros(3000, int)),
        ("train_labels", np.full(3000, np.nan)),
        ("train_labels", np.arange(2999) % 10),
        ("test_images", np.zeros((1000, 28, 28, 1))),
        ("test_images", np.zeros((1000, 32, 32, 1), np.uint8)),
    ],
)
def test_cache_of_something_else(cache, name, array):
    cache.put(name, saved(array))
    with pytest.raises(task.UserError, match="does not hold images"):
        task.load_mnist(cache.data_dir)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '{"sha256": 1}', '{"sha256": {}}'])
def test_damaged_manifest(cache, content):
    (cache.folder / "manifest.json").write_text(content)
    with pytest.raises(task.UserError, match=r"damaged .*; delete"):
        task.load_mnist(cache.data_dir)


def test_missing_array_of_a_cache(cache):
    (cache.folder / "test_images.npy").unlink()
    with pytest.raises(task.UserError, match=r"test_images\.npy is missing; delete"):
        task.load_mnist(cache.data_dir)


def test_mnist_of_tensorflow_datasets_is_found(small_mnist, tmp_path, monkeypatch):
    images, digits, test_images, test_digits = task.load_mnist(small_mnist)
    (tmp_path / "mnist" / "3.0.1").mkdir(parents=True)
    (tmp_path / "mnist" / "3.0.1" / "dataset_info.json").write_text("{}")
    prepared = {
        "train": {"image": images[..., None], "label": digits},
        "test": {"image": test_images[..., None], "label": test_digits},
    }
    library = SimpleNamespace(as_numpy=lambda splits: splits, load=lambda *_, **__: prepared)
    monkeypatch.setattr(task.importlib, "import_module", lambda name: {"tensorflow_datasets": library}[name])
    assert np.array_equal(task.load_mnist(tmp_path)[0], images)

    def fail(*_, **__):
        raise RuntimeError("record 3 is truncated")

    library.load = fail
    with pytest.raises(task.UserError, match=r"damaged .*record 3 is truncated.*; delete"):
        task.load_mnist(tmp_path)


@pytest.fixture
def official(small_mnist, tmp_path, monkeypatch, request):
    """A data folder with the official arrays, 40 items of each split or as many as the parameter says."""
    monkeypatch.setattr(task, "SIZES", dict.fromkeys(task.SIZES, getattr(request, "param", 40)))
    folder = tmp_path / "addnist"
    folder.mkdir()
    splits = build(small_mnist, **task.SIZES)
    for name, split in splits.items():
        normalized = (split.images / 255 - task.MNIST_MEAN) / task.MNIST_DEVIATION
        np.save(folder / f"{name}_x.npy", normalized.astype("float32"))
        np.save(folder / f"{name}_y.npy", split.labels)
    return tmp_path, splits


def test_official_arrays_are_read_as_they_were_before_they_were_normalised(official):
    data_dir, splits = official
    read, source = task.load_data(data_dir)
    assert source == "official"
    for name in splits:
        assert np.array_equal(read[name].images, splits[name].images)
        assert np.array_equal(read[name].labels, splits[name].labels)


@pytest.mark.parametrize(
    ("name", "array", "trouble"),
    [
        ("test_x", np.zeros((40, 28, 28), "float32"), "shapes"),
        ("test_x", np.zeros((39, 3, 28, 28), "float32"), "shapes"),
        ("test_y", np.full(40, 20), "0 to 19"),
        ("test_y", np.full(40, np.nan), "0 to 19"),
        ("test_x", np.full((40, 3, 28, 28), 100.0, "float32"), "normalised"),
        ("test_x", np.full((40, 3, 28, 28), np.nan, "float32"), "normalised"),
    ],
)
def test_wrong_official_arrays(official, name, array, trouble):
    data_dir, _ = official
    np.save(data_dir / "addnist" / f"{name}.npy", array)
    with pytest.raises(task.UserError, match=f"{trouble}.*; get all six"):
        task.load_data(data_dir)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["test_x", "test_y"])
def test_damaged_official_arrays(official, name, damage):
    path = official[0] / "addnist" / f"{name}.npy"
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with pytest.raises(task.UserError, match=r"damaged .*; get all six"):
        task.load_data(official[0])


def test_missing_official_array(official):
    (official[0] / "addnist" / "test_x.npy").unlink()
    with pytest.raises(task.UserError, match=r"test_x\.npy is missing; get all six"):
        task.load_data(official[0])


def test_download_unpacks_the_official_arrays(official, tmp_path, monkeypatch):
    content = io.BytesIO()
    with task.zipfile.ZipFile(content, "w") as files:
        for path in (official[0] / "addnist").iterdir():
            files.write(path, f"AddNIST/{path.name}")
        files.writestr("AddNIST/../../evil.txt", "text")
    monkeypatch.setattr(task.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(content.getvalue()))
    task.main(["--download", "--data-dir", str(tmp_path / "new")])
    assert sorted(path.name for path in (tmp_path / "new" / "addnist").iterdir()) == sorted(
        path.name for path in (official[0] / "addnist").iterdir()
    )
    monkeypatch.setattr(task.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(b"<html>busy</html>"))
    with pytest.raises(task.UserError, match="damaged"):
        task.main(["--download", "--data-dir", str(tmp_path / "other")])


# ------------------------------------------------------------------------------------------------------------ training


@pytest.fixture(scope="module")
def splits():
    images = GENERATOR.integers(0, 256, (3, 100, 3, 28, 28), dtype=np.uint8)
    labels = GENERATOR.integers(0, 20, (3, 100)).astype("int32")
    return {name: task.Split(*arrays, None) for name, *arrays in zip(task.SIZES, images, labels, strict=True)}


CONFIG = task.Config(widths=(4, 4, 4, 4), steps=10, batch_size=8)


@pytest.fixture(scope="module")
def stopped(splits, tmp_path_factory):
    """The folder of a training run that was killed after its first checkpoint, and what it gives if it is not."""
    folder = tmp_path_factory.mktemp("runs")
    write = task.write_file

    def write_and_die(path, content):
        write(path, content)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "STEPS_PER_CALL", 5)
        whole = task.train_network(CONFIG, splits, 0, folder=folder / "whole", resume=False)
        patch.setattr(task, "write_file", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            task.train_network(CONFIG, splits, 0, folder=folder / "stopped", resume=False)
    return folder / "stopped" / "checkpoint.npz", whole


def test_a_resumed_training_run_equals_an_uninterrupted_one(splits, stopped, tmp_path, monkeypatch):
    checkpoint, (snapshots, curves, _) = stopped
    monkeypatch.setattr(task, "STEPS_PER_CALL", 5)
    (tmp_path / "checkpoint.npz").write_bytes(checkpoint.read_bytes())
    resumed, resumed_curves, _ = task.train_network(CONFIG, splits, 0, folder=tmp_path, resume=True)
    assert resumed_curves["step"] == curves["step"] == [5, 10]
    assert resumed_curves["loss"] == pytest.approx(curves["loss"])
    assert resumed_curves == curves
    assert len(resumed) == len(snapshots) == 2
    for name in snapshots[-1]:
        assert np.array_equal(snapshots[-1][name], resumed[-1][name])
    changed = task.Config(widths=(4, 4, 4, 4), steps=10, batch_size=4)
    with pytest.raises(task.UserError, match="batch_size"):
        task.train_network(changed, splits, 0, folder=tmp_path, resume=True)
    with pytest.raises(task.UserError, match=r"other settings \(data\)"):
        task.train_network(CONFIG, splits | {"train": splits["valid"]}, 0, folder=tmp_path, resume=True)


def without(arrays, name):
    return {other: array for other, array in arrays.items() if other != name}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays: without(arrays, "3"),
        lambda arrays: without(arrays, "about"),
        lambda arrays: {**arrays, "more": np.zeros(3)},
        lambda arrays: {**arrays, "0": arrays["0"].astype("float64")},
        lambda arrays: {**arrays, "0": np.float32(1)},
        lambda arrays: {**arrays, "0": arrays["0"] * np.float32(np.nan)},
        lambda arrays: {**arrays, "about": np.array("{}")},
        lambda arrays: {**arrays, "about": np.array(str(arrays["about"]).replace("[5]", "[]"))},
        lambda arrays: {**arrays, "about": np.array(str(arrays["about"]).replace("[5]", "[NaN]"))},
    ],
)
def test_wrong_checkpoint(splits, stopped, tmp_path, spoil):
    with np.load(stopped[0]) as file:
        np.savez(tmp_path / "checkpoint.npz", **spoil(dict(file)))
    with pytest.raises(task.UserError, match=r"damaged .*; start over without --resume"):
        task.train_network(CONFIG, splits, 0, folder=tmp_path, resume=True)


@pytest.mark.parametrize("damage", ["truncated", "empty", "other bytes", "a pickle", "objects", "0-d"])
def test_damaged_checkpoint(splits, stopped, tmp_path, damage):
    (tmp_path / "checkpoint.npz").write_bytes(DAMAGES[damage](stopped[0].read_bytes()))
    with pytest.raises(task.UserError, match=r"damaged .*; start over without --resume"):
        task.train_network(CONFIG, splits, 0, folder=tmp_path, resume=True)


# --------------------------------------------------------------------------------------------------------------- files


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "card.json"
    task.write_file(path, {"old": 1})

    def fill(self, content):
        with open(self, "wb") as file:
            file.write(bytes(content)[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(task.Path, "write_bytes", fill)
    with pytest.raises(task.UserError, match=r"cannot write .*No space left on device; free some space"):
        task.write_file(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["card.json"]


def test_the_place_to_write_is_tried_first_and_leftovers_are_removed(tmp_path):
    folder = tmp_path / "runs" / task.SCRIPT / "shared_seed_0"
    folder.mkdir(parents=True)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    left = folder / f".{dead.stdout.strip()}.checkpoint.npz"
    mine, other = folder / f".{os.getpid()}.checkpoint.npz", folder / ".hidden.txt"
    for path in (left, mine, other):
        path.write_bytes(b"half")
    task.prepare_output(tmp_path)
    assert sorted(folder.iterdir()) == sorted([mine, other])
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that even root cannot write")
def test_a_folder_that_cannot_be_written_is_said_before_training(tmp_path):
    with pytest.raises(task.UserError, match=r"cannot write /proc/\.space\.\d+: .*choose another --output-dir"):
        task.main(["--train", "--quick", "--sample", "--output-dir", "/proc"])
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    try:
        with pytest.raises(task.UserError, match=r"cannot write .*File too large"):
            task.main(["--train", "--quick", "--sample", "--output-dir", str(tmp_path)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flag", ["--data-dir", "--output-dir"])
def test_a_file_in_place_of_a_folder(tmp_path, flag):
    (tmp_path / "file").write_text("")
    flags = ["--output-dir", str(tmp_path)] if flag == "--data-dir" else []
    with pytest.raises(task.UserError, match="file is a file; name a folder"):
        task.main(["--load", *flags, flag, str(tmp_path / "file")])


def test_without_git(monkeypatch):
    assert re.fullmatch("[0-9a-f]{40}|unknown: not a git checkout", task.environment()["git_commit"])
    monkeypatch.setenv("PATH", "")
    found = task.environment()
    assert found["git_commit"] == "unknown: not a git checkout"
    assert found["platform"] == jax.default_backend()


@pytest.fixture
def network(tmp_path):
    """A copy of the saved shared network: path of its weights, and a function that writes its card with changes."""
    path = tmp_path / "saved_models" / task.SCRIPT / "shared.npz"
    path.parent.mkdir(parents=True)
    path.write_bytes((SAVED / "shared.npz").read_bytes())

    def write_card(change=lambda card: None):
        card = json.loads((SAVED / "shared.json").read_text())
        card["weights_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        change(card)
        path.with_suffix(".json").write_text(json.dumps(card))

    write_card()
    return SimpleNamespace(path=path, write_card=write_card)


@pytest.mark.parametrize("field", json.loads((SAVED / "shared.json").read_text()))
def test_card_without_a_field(network, field):
    unused = {"command", "git_commit", "date", "backend", "versions", "epochs", "batch_size"}
    network.write_card(lambda card: card.pop(field))
    if field in unused:
        assert task.load_network(network.path)[1]["model"] == "shared"
        return
    with pytest.raises(task.UserError, match=r"shared\.\* is damaged .*; finish .* --train --resume"):
        task.load_network(network.path)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"script": "voc_segmentation.py"}', "\udcff"])
def test_damaged_card(network, content):
    network.path.with_suffix(".json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(task.UserError, match=r"damaged .*--train --resume"):
        task.load_network(network.path)


@pytest.mark.parametrize(
    "change",
    [
        lambda card: card.update(model="ordinary"),
        lambda card: card["metrics"]["test"].update(accuracy=float("nan")),
        lambda card: card["curves"]["loss"].pop(),
        lambda card: card["config"].update(recipe=1),
        lambda card: card["config"].update(widths=[4, 4, 4, 4]),
        lambda card: card["config"].update(widths=None),
        lambda card: card.update(seeds={}),
    ],
)
def test_card_of_something_else(network, change):
    network.write_card(change)
    with pytest.raises(task.UserError, match=r"damaged .*--train --resume"):
        task.load_network(network.path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda arrays: without(arrays, "dense"),
        lambda arrays: {**arrays, "more": np.zeros(3)},
        lambda arrays: {**arrays, "dense": arrays["dense"].astype("float64")},
        lambda arrays: {**arrays, "dense": np.float32(1)},
        lambda arrays: {**arrays, "dense": arrays["dense"].T},
        lambda arrays: {**arrays, "dense": arrays["dense"] * np.float32(np.nan)},
    ],
)
def test_wrong_weights(network, spoil):
    with np.load(network.path) as file:
        arrays = spoil(dict(file))
    np.savez(network.path, **arrays)
    with pytest.raises(task.UserError, match=r"checksum of the weights .*--train --resume"):
        task.load_network(network.path)
    network.write_card()
    with pytest.raises(task.UserError, match=r"shared\.\* is damaged .*--train --resume"):
        task.load_network(network.path)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_weights(network, damage):
    network.path.write_bytes(DAMAGES[damage](network.path.read_bytes()))
    network.write_card()
    with pytest.raises(task.UserError, match=r"damaged .*--train --resume"):
        task.load_network(network.path)


@pytest.mark.parametrize("suffix", [".npz", ".json"])
def test_missing_weights_or_card(network, suffix):
    network.path.with_suffix(suffix).unlink()
    with pytest.raises(task.UserError, match=f"shared{suffix} is missing; finish .* --train --resume"):
        task.load_network(network.path)


@pytest.mark.parametrize("model", task.MODELS)
def test_saved_weights(model):
    parameters, card = task.load_network(SAVED / f"{model}.npz")
    assert card["parameters"]["trainable"] == count_parameters(parameters) < task.PARAMETER_LIMIT
    assert card["steps"] == task.CONFIGS[model].steps <= task.STEP_LIMIT
    assert task.Config(**{**card["config"], "widths": tuple(card["config"]["widths"])}) == task.CONFIGS[model]
    assert card["penalty"] == 0
    assert card["shortened"] is None
    assert len(card["seeds"]) == task.NUM_SEEDS
    assert (SAVED / f"{model}.npz").stat().st_size < 500_000
    for part, size in {**task.SIZES, "sample": 500}.items():
        assert card["dataset"][part] == size
        assert card["metrics"][part]["accuracy"] > 0.95


def test_saved_weights_read_new_items():
    """On items that are drawn anew from MNIST digits, the accuracy is the recorded one."""
    with np.load(task.SAMPLE) as file:
        split = task.build_split(file["test_images"][..., 0], file["test_labels"], 2000, seed=7)
    parameters, card = task.load_network(SAVED / "shared.npz")
    recorded = card["metrics"]["test"]["accuracy"]
    assert task.accuracy(parameters, split, "shared") == pytest.approx(recorded, abs=0.015)


# --------------------------------------------------------------------------------------------------------- experiments


def table(*rows):
    """An experiment table with (name, seed, accuracy) and what else is changed in each row."""
    text = ""
    for name, seed, score, change in rows:
        row = {"name": name, "seed": seed, **task.dataclasses.asdict(task.Config(**change)), "parameters": 5}
        text = experiments.with_row(
            text, {**row, "seconds": 1, "loss": 1, "train_accuracy": 1, "valid_accuracy": score}
        )
    return text


def test_every_recorded_experiment_is_planned_as_it_was_run():
    path = REPOSITORY / "report" / "results" / f"{task.SCRIPT}_experiments.csv"
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["name"], row["seed"]) for row in rows}) == len(rows) > 10
    planned = {name: fields for seed in range(5) for name, _, fields in experiments.unfinished("", task.MODELS, seed)}
    for row in rows:
        config = task.dataclasses.asdict(task.Config(**planned[row["name"]]))
        assert {name: row[name] for name in config} == {name: str(value) for name, value in config.items()}


def test_planned_experiments_name_every_field_of_the_config():
    assert tuple(task.Config.__dataclass_fields__) == experiments.CONFIG_COLUMNS
    assert all(set(fields) == set(experiments.CONFIG_COLUMNS) for fields in experiments.BASELINES.values())
    runs = experiments.unfinished("", task.MODELS, 3)
    assert [run[:2] for run in runs[:10]] == [(f"{m}, baseline", seed) for seed in range(5) for m in task.MODELS]
    assert {run[1] for run in runs[10:]} == {3}
    assert len({run[:2] for run in runs}) == len(runs)


def test_experiments_are_compared_on_common_seeds():
    baseline = [("shared, baseline", seed, score, {}) for seed, score in enumerate((0.80, 0.82, 0.84))]
    text = table(*baseline, ("shared, better", 1, 0.92, {"shift": False}), ("shared, same", 9, 0.9, {"steps": 1}))
    compared = experiments.compare(text)
    assert compared["shared, baseline"]["valid_accuracy"] == pytest.approx(0.82)
    assert compared["shared, baseline"]["changed"] == []
    better = compared["shared, better"]
    assert better["difference"] == pytest.approx(0.10)
    assert better["noise"] == pytest.approx(0.02)
    assert better["resolved"]
    assert better["changed"] == ["shift"]
    close = experiments.compare(table(*baseline, ("shared, close", 1, 0.85, {"shift": False})))["shared, close"]
    assert close["resolved"] is False
    assert compared["shared, same"]["difference"] is None
    assert compared["shared, same"]["resolved"] is None


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe\x00",
        b"name,seed\nx,1\n",
        table(("a, b", 0, 0.5, {})).encode().replace(b"0.5", b"nan"),
        table(("a, b", 0, 0.5, {})).encode().replace(b"0.5", b"high"),
        table(("a, b", 0, 0.5, {})).encode().replace(b'"a, b",0,', b'"a, b",0.0,'),
        table(("a, b", 0, 0.5, {})).encode().replace(b",0.5", b""),
        table(("a, b", 0, 0.5, {})).encode().replace(b"0.5", b"0.5,7"),
        table(("a, b", 0, 0.5, {})).encode().replace(b'"a, b"', b'"a, b'),
        table(("a, b", 0, 0.5, {})).encode().replace(b"permute", b"permuted"),
    ],
)
def test_damaged_table_of_experiments(tmp_path, content):
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}_experiments.csv"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(task.UserError, match=r"experiments\.csv is damaged .*; move it away"):
        task.compared_experiments(tmp_path)


def test_finished_experiments_are_not_run_again(tmp_path, monkeypatch, capsys):
    tiny = {"model": "shared", **experiments.SAME, **TINY, "hidden": 0, "learning_rate": 1e-3}
    monkeypatch.setattr(experiments, "BASELINES", {"shared": tiny})
    monkeypatch.setattr(experiments, "VARIANTS", {"shared": {"no shifts": {"shift": False}}})
    monkeypatch.setattr(experiments, "NUM_SEEDS", 1)
    flags = ["--experiments", "--sample", "--model", "shared", "--output-dir", str(tmp_path)]
    task.main(flags)
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}_experiments.csv"
    content = path.read_text()
    assert [row["name"] for row in experiments.read_rows(content)] == ["shared, baseline", "shared, no shifts"]
    assert "not resolved" in capsys.readouterr().out
    monkeypatch.setattr(task, "train_network", None)
    task.main(flags)
    assert path.read_text() == content
    with pytest.raises(task.UserError, match="leave them out"):
        task.main([*flags, "--epochs", "1"])
    monkeypatch.setitem(sys.modules, f"experiments.{task.SCRIPT}", None)
    with pytest.raises(task.UserError, match="get experiments/"):
        task.main(flags)


# -------------------------------------------------------------------------------------------------------- command line


def test_imports_no_other_library():
    text = (REPOSITORY / f"{task.SCRIPT}.py").read_text()
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    assert imported == {"jax", "numpy", "optax"}


@pytest.mark.parametrize(
    ("flag", "value", "allowed"),
    [
        ("--batch-size", "0", "from 1 to 100000"),
        ("--batch-size", "1000000000", "from 1 to 100000"),
        ("--epochs", "-1", "from 1 to 100000"),
        ("--epochs", "9" * 30, "from 1 to 100000"),
        ("--seed", "-1", "from 0 to 4294967295"),
        ("--seed", "4294967296", "from 0 to 4294967295"),
    ],
)
def test_numbers_out_of_range(flag, value, allowed):
    with pytest.raises(task.UserError, match=f"{flag} {value} is not a whole number {allowed}$"):
        task.main(["--train", flag, value])


@pytest.mark.parametrize(
    ("flags", "trouble"),
    [
        (["--load", "--resume"], "never trains"),
        (["--train", "--record"], "use it with --load"),
        (["--load", "--quick", "--record"], "without --quick"),
        (["--load", "--epochs", "two"], "invalid int value: 'two'"),
        (["--load", "--train"], "not allowed with"),
        ([], "required"),
    ],
)
def test_flags_that_make_no_sense(flags, trouble):
    with pytest.raises(task.UserError, match=trouble):
        task.main(flags)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("official", [500], indirect=True)  # as many as in the sample: one compilation for both
def test_load_reproduces_train_and_records_only_when_told(official, tmp_path, monkeypatch, capsys):
    data_dir, _ = official
    output = tmp_path / "output"
    monkeypatch.setattr(task, "NUM_SEEDS", 2)
    configs = {"shared": task.Config(**TINY), "ordinary": task.Config("ordinary", **TINY, hidden=8)}
    monkeypatch.setattr(task, "CONFIGS", configs)
    no_figures(monkeypatch)
    flags = ["--data-dir", str(data_dir), "--output-dir", str(output)]
    assert task.main(["--train", *flags]) == 0
    assert capsys.readouterr().out.count("figures are skipped") == 1
    path = output / "report" / "results" / f"{task.SCRIPT}.json"
    trained = json.loads(path.read_text())
    assert set(trained["models"]) == set(task.MODELS)
    assert trained["models"]["shared"]["seeds"]["number"] == 2
    card = json.loads((output / "saved_models" / task.SCRIPT / "shared.json").read_text())
    assert set(card["metrics"]) == {"train", "valid", "test", "sample"}
    assert card["dataset"]["test"] == 500
    assert card["dataset"]["sample"] == 500
    assert len(card["curves"]["test_accuracy"]) == len(card["curves"]["step"])

    before = contents(output)
    assert task.main(["--load", *flags]) == 0
    assert "DIFFERS" not in capsys.readouterr().out
    after = contents(output)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {task.Path("runs", task.SCRIPT, "verification.json")}
    rows = json.loads(after[task.Path("runs", task.SCRIPT, "verification.json")])["rows"]
    assert {(row["task"], row["agrees"]) for row in rows} == {("AddNIST", True)}
    assert {(row["part"], row["metric"]) for row in rows} >= {
        ("train", "accuracy"),
        ("valid", "loss"),
        ("test", "loss"),
    }

    path.unlink()
    assert task.main(["--load", "--record", *flags]) == 0
    assert json.loads(path.read_text()) == trained
    assert task.main(["--load", "--sample", *flags]) == 0
    assert "sample accuracy" in capsys.readouterr().out

    card_path = output / "saved_models" / task.SCRIPT / "shared.json"
    card["metrics"]["test"]["accuracy"] += 0.05
    card["metrics"]["sample"] = {}
    card_path.write_text(json.dumps(card))
    assert task.main(["--load", *flags]) == 1
    assert capsys.readouterr().out.count("DIFFERS") == 1
    results = path.read_text()
    task.main(["--load", "--sample", "--record", *flags])
    recorded = json.loads(card_path.read_text())
    assert recorded["metrics"]["sample"]["accuracy"] == trained_sample(before, "shared")
    assert recorded["metrics"]["test"] == card["metrics"]["test"]
    assert path.read_text() == results

    shifted = np.load(data_dir / "addnist" / "test_y.npy")[::-1]
    np.save(data_dir / "addnist" / "test_y.npy", shifted)
    capsys.readouterr()
    assert task.main(["--load", *flags]) == 0
    assert capsys.readouterr().out.count("not compared") == 2
    with pytest.raises(task.UserError, match="other data"):
        task.main(["--load", "--record", *flags])
    (output / "saved_models" / task.SCRIPT / "shared.npz").write_bytes(b"broken")
    with pytest.raises(task.UserError, match="checksum"):
        task.main(["--load", *flags])


def trained_sample(files, model):
    card = json.loads(files[task.Path("saved_models", task.SCRIPT, f"{model}.json")])
    return card["metrics"]["sample"]["accuracy"]


def test_saved_networks_agree_on_the_sample_and_leave_the_repository_alone(tmp_path, capsys):
    kept = [SAVED / f"{model}.json" for model in task.MODELS]
    kept.append(REPOSITORY / "report" / "results" / f"{task.SCRIPT}.json")
    before = [path.read_bytes() for path in kept]
    assert task.main(["--load", "--sample", "--output-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count("agrees") == 5
    assert [path.read_bytes() for path in kept] == before
    drawn = {path.stem for path in (tmp_path / "report" / "figures" / task.SCRIPT).glob("*.png")}
    assert drawn == {
        *("samples", "curves", "confusion_shared", "confusion_ordinary"),
        *("mistakes", "digits", "scaling", "experiments"),
    }
    for path in (tmp_path / "report").rglob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"
        assert str(path) in output


def command(*flags, code=None, **options):
    """Runs the script, or `code`, in a process of its own."""
    start = [REPOSITORY / f"{task.SCRIPT}.py"] if code is None else ["-c", code, REPOSITORY / f"{task.SCRIPT}.py"]
    return subprocess.Popen([sys.executable, *start, *flags], stderr=subprocess.PIPE, text=True, **options)


def test_interrupt_during_imports_is_one_line(tmp_path):
    (tmp_path / "jax.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with command("--load", env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        lines = process.communicate()[1].split("\n")
    assert process.returncode == 130
    assert [line for line in lines if line] == ["error: interrupted; what was saved stays, continue with --resume"]


INTERRUPTED_COMPILATION = """
import os, runpy, signal, sys
import jax

def scan(*_, **__):  # called while `advance` is compiled
    os.kill(os.getpid(), signal.SIGINT)

jax.lax.scan = scan
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_interrupt_inside_jax_is_one_line(tmp_path):
    flags = ["--train", "--quick", "--sample", "--model", "shared", "--output-dir", tmp_path]
    with command(*flags, code=INTERRUPTED_COMPILATION, stdout=subprocess.DEVNULL) as process:
        errors = process.communicate()[1]
    assert process.returncode == 130
    assert errors.strip() == "error: interrupted; what was saved stays, continue with --resume"


def test_a_closed_pipe_ends_silently_and_a_terminal_may_know_ascii_only(tmp_path):
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}_experiments.csv"
    path.parent.mkdir(parents=True)
    text = ""
    for name, seed, fields in experiments.unfinished("", ["shared"], 0):
        row = {"name": name, "seed": seed, **fields, "parameters": 5, "valid_accuracy": 0.5}
        text = experiments.with_row(text, row)
    path.write_text(text, encoding="utf-8")
    flags = ["--experiments", "--sample", "--model", "shared", "--output-dir", tmp_path]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PATH": ""}
    read, write = os.pipe()
    with (
        command(*flags, env=environment, stdout=subprocess.PIPE) as ascii_only,
        command(*flags, stdout=write) as closed,
    ):
        os.close(write)
        os.close(read)
        output, errors = ascii_only.communicate()
        assert (ascii_only.returncode, errors) == (0, "")
        assert "rotation 10\\xb0, scale 10 %" in output
        assert (closed.wait(), closed.stderr.read()) == (141, "")
