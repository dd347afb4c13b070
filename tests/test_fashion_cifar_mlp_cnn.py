"""The script on Géron's networks: their exact shapes, the tuning and its bookkeeping, and the command line."""

import dataclasses
import functools
import itertools
import json
import math
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import REPOSITORY, run_elsewhere, run_script
from keras import ops

import fashion_cifar_mlp_cnn as task
from common import runs

GENERATOR = np.random.default_rng(0)
SAVED = REPOSITORY / "saved_models" / task.SCRIPT
TABLE = runs.experiments_table(REPOSITORY, task.SCRIPT)


def random_split(count=64, shape=(28, 28, 1)):
    return task.Split(GENERATOR.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % 10)


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(("network", "parameters"), [("mlp", 266_610), ("cnn", 1_413_834)])
def test_references_have_the_parameters_of_the_book(network, parameters):
    model = task.build_network(task.REFERENCES[network], (28, 28, 1))
    assert runs.parameter_counts(model)["trainable"] == parameters


def test_reference_mlp_is_the_one_of_the_book():
    kinds = [type(layer).__name__ for layer in task.build_network(task.REFERENCES["mlp"], (28, 28, 1)).layers]
    assert kinds == ["InputLayer", "Rescaling", "Flatten", *("Dense", "Activation") * 2, "Dense"]


def test_reference_cnn_is_the_one_of_the_book():
    model = task.build_network(task.REFERENCES["cnn"], (28, 28, 1))
    kinds = [type(layer).__name__ for layer in model.layers if type(layer).__name__ != "Activation"]
    expected = ["InputLayer", "Normalization", "Conv2D", "MaxPooling2D", *("Conv2D", "Conv2D", "MaxPooling2D") * 2]
    assert kinds == [*expected, "Flatten", "Dense", "Dropout", "Dense", "Dropout", "Dense"]
    convolutions = [layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    assert [(layer.filters, layer.kernel_size[0]) for layer in convolutions] == [
        (64, 7),
        (128, 3),
        (128, 3),
        (256, 3),
        (256, 3),
    ]


@pytest.mark.parametrize("network", task.NETWORKS)
def test_every_configuration_builds(network):
    for name, recipe in task.recipes(network).items():
        model = task.build_network(recipe, (28, 28, 1))
        assert model.output_shape == (None, 10), name
        assert model.layers[-1].activation is keras.activations.softmax, name


@pytest.mark.parametrize("network", task.NETWORKS)
def test_references_give_probabilities_of_colour_pictures(network):
    model = task.build_network(task.REFERENCES[network], (32, 32, 3))
    probabilities = ops.convert_to_numpy(model(np.zeros((2, 32, 32, 3))))
    assert probabilities.shape == (2, 10)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_standardised_networks_take_mean_and_deviation_from_the_pictures():
    images = random_split().images
    model = task.build_network(task.REFERENCES["cnn"], (28, 28, 1), images)
    first = keras.Model(model.input, model.get_layer("standardize").output)
    standardised = ops.convert_to_numpy(first(images.astype("float32")))
    assert np.abs(standardised.mean(axis=0)).max() < 1e-3
    assert np.abs(standardised.std(axis=0) - 1).max() < 1e-3


def test_every_change_is_one_change():
    for network in task.NETWORKS:
        reference = dataclasses.asdict(task.REFERENCES[network])
        for name, recipe in task.recipes(network).items():
            changed = [field for field, value in dataclasses.asdict(recipe).items() if value != reference[field]]
            if not name.startswith(("reference", "together", "optimiser", "filters")):
                assert len(changed) == 1, name
            assert (not changed) == (name == "reference")


def test_batch_norm_after_pooling_is_one_a_stage():
    recipe = dataclasses.replace(task.REFERENCES["cnn"], batch_norm="stages")
    kinds = [type(layer).__name__ for layer in task.build_network(recipe, (28, 28, 1)).layers]
    followers = [after for before, after in itertools.pairwise(kinds) if before == "MaxPooling2D"]
    assert followers == ["BatchNormalization"] * 3
    assert kinds.count("BatchNormalization") == 3


def test_augmentation_and_batch_norm_train(tmp_path):
    recipe = dataclasses.replace(
        task.REFERENCES["mlp"],
        hidden=(8,),
        batch_norm="layers",
        l2=1e-4,
        dropout=0.2,
        schedule="cosine",
        augmentation=("flip", "shift"),
        epochs=2,
    )
    network, curves, _ = task.train_network(recipe, random_split(), 0, folder=tmp_path, resume=False)
    assert len(curves["loss"]) == 2
    assert [type(layer).__name__ for layer in network.layers].count("BatchNormalization") == 1
    measured = task.evaluate(network, random_split(20))
    assert 0 <= measured["accuracy"] <= 1


@pytest.mark.parametrize("network", task.NETWORKS)
def test_a_trained_network_is_as_good_as_its_learning_curve_says(network, tmp_path):
    small = {"hidden": (8,), "standardize": True, "optimizer": "adam", "learning_rate": 0.01, "epochs": 3}
    small |= {"filters": (4,), "first_kernel": 3} if network == "cnn" else {}
    recipe = dataclasses.replace(task.REFERENCES[network], **small)
    labels = np.arange(400) % 10
    images = GENERATOR.integers(0, 60, (400, 28, 28, 1)) + labels[:, None, None, None] * 15
    split = task.Split(images.astype(np.uint8), labels)
    trained, curves, _ = task.train_network(recipe, split, 0, folder=tmp_path, resume=False, validation=split)
    assert curves["val_accuracy"][-1] > 0.2
    assert task.evaluate(trained, split)["accuracy"] == pytest.approx(curves["val_accuracy"][-1], abs=0.03)


# ---------------------------------------------------------------------------------------------------------------- data


def test_splits_do_not_overlap_and_are_the_same_every_time(fake_labelled_dir, monkeypatch):
    dataset = task.load_fashion_mnist(fake_labelled_dir)
    numbered = np.arange(60_000, dtype=np.int64)[:, None, None, None]
    train = dataset.train._replace(images=numbered)
    monkeypatch.setitem(task.LOADERS, "fashion", lambda _: dataclasses.replace(dataset, train=train))
    splits, _ = task.load_splits("fashion", fake_labelled_dir)
    again, _ = task.load_splits("fashion", fake_labelled_dir)
    assert len(splits["train"].images) == 54_000
    assert len(splits["validation"].images) == 6_000
    assert not set(splits["train"].images.flat) & set(splits["validation"].images.flat)
    assert np.bincount(splits["validation"].labels).tolist() == [600] * 10
    for part in ("train", "validation"):
        assert np.array_equal(splits[part].images, again[part].images)
        assert np.array_equal(splits[part].labels, splits[part].images.ravel() % 500 % 10)


def test_shift_moves_whole_pictures():
    images = random_split(50).images
    images[:, :, :2] = images[:, :, -2:] = images[:, :2] = images[:, -2:] = 0  # so that nothing is lost
    shifted = task.shift(images, 2, np.random.default_rng(0))
    assert shifted.shape == images.shape
    assert np.array_equal(shifted.sum(axis=(1, 2, 3), dtype=int), images.sum(axis=(1, 2, 3), dtype=int))
    moves = {
        (down, right)
        for before, after in zip(images, shifted, strict=True)
        for down in range(-2, 3)
        for right in range(-2, 3)
        if np.array_equal(np.roll(before, (down, right), (0, 1)), after)
    }
    assert {down for down, _ in moves} == {right for _, right in moves} == {-2, -1, 0, 1, 2}


def test_clothes_on_photographs_stay_whole():
    clothes = np.zeros((3, 28, 28, 1), np.uint8)
    clothes[:, 10:20, 10:20] = 200
    photographs = np.full((2, 32, 32, 3), (0, 100, 0), np.uint8)
    photographs[:, :2] = 255  # the margin that is cut off
    images = task.put_on_photographs(clothes, photographs)
    assert np.array_equal(images[clothes > 0], clothes[clothes > 0])
    assert set(images[clothes == 0]) == {59}  # 0.587 times 100


@pytest.mark.parametrize("name", task.DATASET_NAMES)
def test_datasets_in_between_keep_labels_and_sizes(name, fake_labelled_dir):
    source, _, change = name.partition(" ")
    splits, _ = task.load_splits(name, fake_labelled_dir, quick=True)
    originals, _ = task.load_splits(source, fake_labelled_dir, quick=True)
    for part, split in splits.items():
        channels = 1 if change == "grey" else originals[part].images.shape[3]
        assert split.images.shape == (*originals[part].images.shape[:3], channels)
        assert split.images.dtype == np.uint8
        assert np.array_equal(split.labels, originals[part].labels)
        assert bool(change) != np.array_equal(split.images, originals[part].images)


# --------------------------------------------------------------------------------------------------------- bookkeeping


def row(name, accuracy, *, dataset="fashion", network="mlp", budget="short", seed=0, seconds=10):
    run = task.Run(dataset, network, budget, name, seed)._asdict()
    return {key: str(value) for key, value in {**run, "validation_accuracy": accuracy, "seconds": seconds}.items()}


def test_configurations_are_ranked_by_their_mean_over_the_seeds():
    rows = [row("a", 0.8), row("b", 0.9), row("a", 0.9, seed=1), row("b", 0.7, seed=1), row("c", 1.0, network="cnn")]
    assert task.mean_accuracies(rows, "fashion", "mlp", "short") == pytest.approx({"a": 0.85, "b": 0.8})
    assert list(task.mean_accuracies(rows, "fashion", "mlp", "short")) == ["a", "b"]


def test_rank_correlation_of_known_rankings():
    fashion = [row(name, accuracy) for name, accuracy in zip("abcd", (0.9, 0.8, 0.7, 0.6), strict=True)]
    same = [row(name, accuracy, dataset="cifar") for name, accuracy in zip("abcd", (0.5, 0.4, 0.3, 0.2), strict=True)]
    swapped = [
        row(name, accuracy, dataset="cifar") for name, accuracy in zip("abcd", (0.4, 0.5, 0.3, 0.2), strict=True)
    ]
    assert task.rank_correlation(fashion + same, "mlp") == pytest.approx(1)
    # Spearman: 1 - 6 (1 + 1) / (4 (16 - 1))
    assert task.rank_correlation(fashion + swapped, "mlp") == pytest.approx(0.8)
    assert math.isnan(task.rank_correlation(fashion, "mlp"))


def test_carried_configurations_span_the_ranking(monkeypatch):
    monkeypatch.setattr(task, "NUM_CARRIED", 3)
    rows = [row(name, accuracy) for name, accuracy in zip("abcde", (0.5, 0.9, 0.6, 0.8, 0.7), strict=True)]
    assert task.carried(rows, "mlp") == ["b", "e", "a"]


def test_runs_on_cifar_are_planned_once_the_others_are_finished():
    planned = task.planned_runs([], 0)
    assert {run.dataset for run in planned} == {"fashion"}
    assert len(set(planned)) == len(planned)
    rows = [row(run.name, 0.5, network=run.network, seed=run.seed) for run in planned if run.budget == "short"]
    later = task.planned_runs(rows, 0)
    carried = [run for run in later if run.dataset == "cifar"]
    assert len(carried) == task.NUM_CARRIED * task.NUM_EXPERIMENT_SEEDS * len(task.NETWORKS)
    between = [run for run in later if run.dataset not in task.LOADERS]
    assert len(between) == 3 * task.NUM_EXPERIMENT_SEEDS * len(task.NETWORKS)


def test_time_left():
    rows = [row("a", 0.5, seconds=60), row("b", 0.5, seconds=120)]
    left = [task.Run("fashion", "mlp", "short", "c", 0)] * 4
    unknown = task.Run("cifar", "mlp", "short", "c", 0)
    assert task.time_left(left, rows) == ", about 6 minutes"
    assert task.time_left([*left, unknown], rows) == ", at least 6 minutes"
    assert task.time_left([unknown], rows) == ""


# --------------------------------------------------------------------------------------- saved models and choices


@pytest.mark.parametrize("network", task.NETWORKS)
def test_finalists_are_the_five_best_in_the_order_of_their_full_length(network):
    rows = runs.read_rows(TABLE)
    best = list(task.mean_accuracies(rows, "fashion", network, "short"))[:5]
    assert set(task.FINALISTS[network]) == set(best)
    full = task.mean_accuracies(rows, "fashion", network, "full")
    assert [name for name in full if name != "reference"] == list(task.FINALISTS[network])


@pytest.mark.parametrize("model", task.MODELS)
def test_saved_models_were_trained_by_their_recipes(model):
    card = json.loads((SAVED / f"{model}.json").read_text())
    _, network, name = task.plan(model)
    recipe = json.loads(json.dumps(dataclasses.asdict(task.recipes(network)[name])))
    assert card["recipe"] == recipe
    assert card["shortened"] is None
    assert len(card["seeds"]) == task.NUM_SEEDS
    assert len(card["curves"]["loss"]) == recipe["epochs"]


@pytest.mark.parametrize("model", ["fashion_mlp_reference", "fashion_mlp_best"])
def test_saved_mlps_reach_what_their_cards_say(model):
    data_dir = Path(os.environ.get("DATA_DIR", REPOSITORY / "data"))
    if not any((data_dir / "fashion_mnist").glob("*/dataset_info.json")):
        pytest.skip(f"Fashion-MNIST is not prepared in {data_dir}")
    network, card = runs.load_model(SAVED / f"{model}.keras")
    splits, _ = task.load_splits("fashion", data_dir)
    assert task.evaluate(network, splits["test"]) == pytest.approx(card["metrics"]["test"], abs=2e-4)


def test_saved_models_are_small():
    assert sum(path.stat().st_size for path in SAVED.iterdir()) < 25e6


def test_stock_keras_opens_the_saved_models_from_an_empty_directory(tmp_path):
    code = (
        "import sys, keras, numpy as np\n"
        "for path in sys.argv[1:]:\n"
        "    network = keras.saving.load_model(path, safe_mode=True, compile=False)\n"
        "    print(network(np.zeros((2, *network.input_shape[1:]))).shape)"
    )
    printed = run_elsewhere(code, tmp_path, *(SAVED / f"{model}.keras" for model in task.MODELS))
    assert printed.splitlines() == ["(2, 10)"] * len(task.MODELS)


# -------------------------------------------------------------------------------------------------------- command line


command = functools.partial(run_script, task.SCRIPT)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_load_reproduces_the_metrics_of_train(backend, fake_labelled_dir, tmp_path):
    flags = ["--quick", "--data-dir", fake_labelled_dir, "--output-dir", tmp_path]
    flags += ["--model", "fashion_cnn_best"] if backend == "jax" else []
    done = command(backend, "--train", *flags)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}.json"
    trained = json.loads(path.read_text())
    assert all(math.isfinite(model["test"]["loss"]) for model in trained["models"].values())
    if backend == "jax":
        return
    assert set(trained["models"]) == set(task.MODELS)
    path.unlink()
    done = command(backend, "--load", *flags, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "differs" not in done.stdout
    assert json.loads(path.read_text()) == trained


def test_experiments_do_not_run_a_finished_row_again(fake_labelled_dir, tmp_path):
    for _ in range(2):
        done = command(
            "tensorflow", "--experiments", "--quick", "--data-dir", fake_labelled_dir, "--output-dir", tmp_path
        )
        assert done.returncode == 0, done.stderr
    rows = runs.read_rows(runs.experiments_table(tmp_path, task.SCRIPT))
    assert [(row["network"], row["name"]) for row in rows] == [("mlp", "reference"), ("cnn", "reference")]
    assert [row["parameters"] for row in rows] == ["266610", "1413834"]
