"""The script on Géron's networks: their exact shapes, the tuning and its bookkeeping, and the command line."""

import dataclasses
import functools
import itertools
import json
import math

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, read_verification, run_elsewhere, run_script
from keras import ops
from PIL import Image

import fashion_cifar_mlp_cnn as task
from common import models, results, training
from common.datasets import Dataset, LabelledImages
from experiments import fashion_cifar_mlp_cnn as plan

GENERATOR = np.random.default_rng(0)
SAVED = REPOSITORY / "saved_models" / task.SCRIPT
RESULTS = REPOSITORY / "report" / "results" / f"{task.SCRIPT}.json"
TABLE = results.read_table(
    results.table_path(REPOSITORY, task.SCRIPT), numbers=("validation_accuracy", "seconds"), texts=task.Run._fields
)
NETWORKS = list(task.CONFIGS)


def random_split(count=64, shape=(28, 28, 1)):
    return LabelledImages(GENERATOR.integers(0, 256, (count, *shape), dtype=np.uint8), np.arange(count) % 10)


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize(("network", "parameters"), [("mlp", 266_610), ("cnn", 1_413_834)])
def test_references_have_the_parameters_of_the_book(network, parameters):
    model = task.build_network(task.CONFIGS[network]["reference"], (28, 28, 1))
    assert models.parameter_counts(model)["trainable"] == parameters


def test_reference_mlp_is_the_one_of_the_book():
    kinds = [type(layer).__name__ for layer in task.build_network(task.Config(), (28, 28, 1)).layers]
    assert kinds == ["InputLayer", "Rescaling", "Flatten", *("Dense", "Activation") * 2, "Dense"]


def test_reference_cnn_is_the_one_of_the_book():
    model = task.build_network(task.BOOK_CNN, (28, 28, 1))
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


@pytest.mark.parametrize("network", NETWORKS)
def test_every_configuration_builds(network):
    same = {"learning_rate": 1.0, "schedule": "", "augmentation": (), "batch_size": 1, "epochs": 1, "optimizer": ""}
    architectures = {}
    for name, config in task.configurations(network, plan).items():
        assert config.optimizer in task.OPTIMIZERS, name
        architectures[dataclasses.replace(config, **same)] = name
    for config, name in architectures.items():
        model = task.build_network(config, (28, 28, 1))
        assert model.output_shape == (None, 10), name
        assert model.layers[-1].activation is keras.activations.softmax, name


@pytest.mark.parametrize("network", NETWORKS)
def test_references_give_probabilities_of_colour_images(network):
    model = task.build_network(task.CONFIGS[network]["reference"], (32, 32, 3))
    probabilities = ops.convert_to_numpy(model(np.zeros((2, 32, 32, 3))))
    assert probabilities.shape == (2, 10)
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)


def test_standardised_networks_take_mean_and_deviation_from_the_images():
    images = random_split().images
    model = task.build_network(task.BOOK_CNN, (28, 28, 1), images)
    first = keras.Model(model.input, model.get_layer("standardize").output)
    standardised = ops.convert_to_numpy(first(images.astype("float32")))
    assert np.abs(standardised.mean(axis=0)).max() < 1e-3
    assert np.abs(standardised.std(axis=0) - 1).max() < 1e-3


def test_batch_norm_after_pooling_is_one_a_stage():
    config = dataclasses.replace(task.BOOK_CNN, batch_norm="stages")
    kinds = [type(layer).__name__ for layer in task.build_network(config, (28, 28, 1)).layers]
    followers = [after for before, after in itertools.pairwise(kinds) if before == "MaxPooling2D"]
    assert followers == ["BatchNormalization"] * 3
    assert kinds.count("BatchNormalization") == 3


def test_augmentation_and_batch_norm_train(tmp_path):
    config = task.Config(
        hidden=(8,),
        batch_norm="layers",
        l2=1e-4,
        dropout=0.2,
        schedule="cosine",
        augmentation=("flip", "shift"),
        epochs=2,
    )
    network, curves, _ = task.train_network(config, random_split(), 0, folder=tmp_path, resume=False)
    assert len(curves["loss"]) == 2
    assert [type(layer).__name__ for layer in network.layers].count("BatchNormalization") == 1
    measured = task.evaluate(network, {"test": random_split(20)})["test"]
    assert 0 <= measured["accuracy"] <= 1


@pytest.mark.parametrize("network", NETWORKS)
def test_a_trained_network_is_as_good_as_its_learning_curve_says(network, tmp_path):
    small = {
        "hidden": (32,),
        "dropout": 0.0,
        "standardize": True,
        "optimizer": "adam",
        "learning_rate": 0.01,
        "epochs": 3,
    }
    small |= {"filters": (4,), "first_kernel": 3} if network == "cnn" else {}
    config = dataclasses.replace(task.CONFIGS[network]["reference"], **small)
    labels = np.arange(400) % 10
    images = GENERATOR.integers(0, 60, (400, 28, 28, 1)) + labels[:, None, None, None] * 15
    split = LabelledImages(images.astype(np.uint8), labels)
    trained, curves, _ = task.train_network(config, split, 0, folder=tmp_path, resume=False, validation=split)
    assert curves["val_accuracy"][-1] > 0.2
    accuracy = task.evaluate(trained, {"train": split})["train"]["accuracy"]
    assert accuracy == pytest.approx(curves["val_accuracy"][-1], abs=0.03)


def test_mlps_train_in_float32_on_every_machine(monkeypatch):
    monkeypatch.setattr(training, "fast_precision", lambda: "mixed_bfloat16")
    assert {task.training_precision(config) for config in task.CONFIGS["mlp"].values()} == {"float32"}
    assert {task.training_precision(config) for config in task.CONFIGS["cnn"].values()} == {"mixed_bfloat16"}


# ---------------------------------------------------------------------------------------------------------------- data


def test_splits_do_not_overlap_and_are_the_same_every_time(monkeypatch):
    numbered = np.arange(60_000)[:, None, None, None]
    train, test = (LabelledImages(numbered[:count], np.arange(count) % 500 % 10) for count in (60_000, 10_000))
    dataset = Dataset("numbers", train, test, tuple("0123456789"), {})
    monkeypatch.setitem(task.LOADERS, "fashion", lambda data_dir, sample: dataset)
    splits, _ = task.load_splits("fashion", None)
    again, _ = task.load_splits("fashion", None)
    assert len(splits["train"].images) == 54_000
    assert len(splits["validation"].images) == 6_000
    assert not set(splits["train"].images.flat) & set(splits["validation"].images.flat)
    assert np.bincount(splits["validation"].labels).tolist() == [600] * 10
    for part in ("train", "validation"):
        assert np.array_equal(splits[part].images, again[part].images)
        assert np.array_equal(splits[part].labels, splits[part].images.ravel() % 500 % 10)


def test_shift_moves_whole_images():
    images = random_split(50).images
    images[:, :, :2] = images[:, :, -2:] = images[:, :2] = images[:, -2:] = 0  # so that nothing is lost
    shifted = plan.shift(images, 2, np.random.default_rng(0))
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
    images = plan.put_on_photographs(clothes, photographs)
    assert np.array_equal(images[clothes > 0], clothes[clothes > 0])
    assert set(images[clothes == 0]) == {59}  # 0.587 times 100


@pytest.mark.parametrize("name", plan.DATASETS)
def test_datasets_in_between_keep_labels_and_sizes(name):
    source, change, _ = plan.DATASETS[name]
    splits = task.load_changed_splits(source, change, None, sample=True)
    originals, _ = task.load_splits(source, None, sample=True)
    for part, split in splits.items():
        channels = 1 if name == "cifar grey" else originals[part].images.shape[3]
        assert split.images.shape == (*originals[part].images.shape[:3], channels)
        assert split.images.dtype == np.uint8
        assert np.array_equal(split.labels, originals[part].labels)
        assert (name in task.LOADERS) == np.array_equal(split.images, originals[part].images)


# --------------------------------------------------------------------------------------------------------- experiments


def test_every_change_is_one_change():
    for network in NETWORKS:
        reference = task.CONFIGS[network]["reference"]
        for factor, changes in plan.SINGLE_CHANGES[network].items():
            for name, change in changes.items():
                changed = [field for field, value in change.items() if value != getattr(reference, field)]
                assert changed, name
                if factor not in ("optimiser", "filters"):  # an optimiser comes with its learning rate
                    assert len(changed) == 1, name


@pytest.mark.parametrize("network", NETWORKS)
def test_no_two_configurations_are_the_same(network):
    configs = list(task.configurations(network, plan).values())
    assert len(set(configs)) == len(configs)


@pytest.mark.parametrize("network", NETWORKS)
def test_configs_are_what_the_experiments_call_them(network):
    configurations = task.configurations(network, plan)
    for name, config in task.CONFIGS[network].items():
        assert configurations[name] == config
    assert list(task.CONFIGS[network]) == ["reference", *plan.FINALISTS[network][:3]]


@pytest.mark.parametrize("network", NETWORKS)
def test_models_are_the_reference_and_the_best_finalists(network):
    finalists = plan.FINALISTS[network]
    assert task.MODELS[f"fashion_{network}_reference"] == ("fashion", network, "reference")
    assert task.MODELS[f"fashion_{network}_best"] == ("fashion", network, finalists[0])
    for place in (1, 2, 3):
        assert task.MODELS[f"cifar_{network}_{place}"] == ("cifar", network, finalists[place - 1])


@pytest.mark.parametrize("network", NETWORKS)
def test_finalists_are_the_five_best_in_the_order_of_their_full_budget(network):
    best = task.ranking(TABLE, "fashion", network, "short").index[:5]
    assert set(plan.FINALISTS[network]) == set(best)
    full = task.ranking(TABLE, "fashion", network, "full").index
    assert [name for name in full if name != "reference"] == list(plan.FINALISTS[network])


def table(*rows):
    """An experiment table from (name, accuracy) and other columns that differ."""
    default = {"dataset": "fashion", "network": "mlp", "budget": "short", "seed": "0"}
    return pd.DataFrame([{**default, "name": name, "validation_accuracy": value, **more} for name, value, more in rows])


def test_configurations_are_ranked_by_their_mean_over_the_seeds():
    again = {"seed": "1"}
    rows = [("a", 0.8, {}), ("b", 0.9, {}), ("a", 0.9, again), ("b", 0.7, again), ("c", 1.0, {"network": "cnn"})]
    ranked = task.ranking(table(*rows), "fashion", "mlp", "short")
    assert ranked["mean"].to_dict() == pytest.approx({"a": 0.85, "b": 0.8})
    assert list(ranked.index) == ["a", "b"]
    assert ranked["accuracies"]["b"] == [0.9, 0.7]
    assert ranked["seeds"].tolist() == [2, 2]
    assert ranked["std"]["b"] == pytest.approx(math.sqrt(0.02))


def test_rank_correlation_of_known_rankings():
    fashion = [(name, value, {}) for name, value in zip("abcd", (0.9, 0.8, 0.7, 0.6), strict=True)]

    def transfer(*accuracies):
        cifar = [(name, value, {"dataset": "cifar"}) for name, value in zip("abcd", accuracies, strict=False)]
        rows = table(*fashion, *cifar).assign(seconds=1.0)
        return task.summarise({}, {}, rows, plan)["transfer"]

    assert transfer(0.5, 0.4, 0.3, 0.2) == {"mlp": {"rank_correlation": pytest.approx(1), "configurations": 4}}
    # Spearman: 1 - 6 (1 + 1) / (4 (16 - 1))
    assert transfer(0.4, 0.5, 0.3, 0.2)["mlp"]["rank_correlation"] == pytest.approx(0.8)
    assert transfer() == {}


def test_ranks_of_both_datasets():
    rows = [("a", 0.9, {}), ("b", 0.8, {}), ("c", 0.7, {}), ("d", 0.6, {})]
    rows += [(name, value, {"dataset": "cifar"}) for name, value in (("d", 0.1), ("a", 0.3), ("c", 0.4))]
    both = task.compare_datasets(table(*rows), "mlp")
    assert both["rank"].to_dict() == {"a": 2, "c": 1, "d": 3}
    assert list(both.index) == ["a", "c", "d"]
    assert both["cifar"].tolist() == [0.3, 0.4, 0.1]


def test_transfer_candidates_span_the_ranking():
    rows = table(*[(name, value, {}) for name, value in zip("abcde", (0.5, 0.9, 0.6, 0.8, 0.7), strict=True)])
    assert task.transfer_candidates(rows, "mlp", 3) == ["b", "e", "a"]


def test_runs_on_cifar_depend_on_those_on_fashion():
    tuning = task.tuning_runs(plan, 0)
    assert {run.dataset for run in tuning} == {"fashion"}
    assert len(set(tuning)) == len(tuning)
    rows = table(*[(run.name, 0.5, {"network": run.network}) for run in tuning if run.budget == "short"])
    later = task.transfer_runs(plan, rows, 0)
    references = [run for run in later if run.budget == "full"]
    assert {run[:4] for run in references} == {("cifar", network, "full", "reference") for network in NETWORKS}
    on_cifar = [run for run in later if run.dataset == "cifar" and run.budget == "short"]
    assert len(on_cifar) == plan.NUM_TRANSFERRED * plan.NUM_SEEDS * len(NETWORKS)
    between = [run for run in later if run.dataset not in task.LOADERS]
    assert len(between) == 3 * plan.NUM_SEEDS * len(NETWORKS)


def test_the_committed_table_holds_every_planned_run():
    planned = task.tuning_runs(plan, 0) + task.transfer_runs(plan, TABLE, 0)
    finished = set(zip(*(TABLE[name] for name in task.Run._fields), strict=True))
    assert {tuple(map(str, run)) for run in planned} == finished


# -------------------------------------------------------------------------------------------------------- saved models


@pytest.mark.parametrize("model", task.MODELS)
def test_saved_models_were_trained_by_their_configs(model):
    card = models.read_card(SAVED / f"{model}.json")
    _, network, name = task.MODELS[model]
    assert card["config"] == json.loads(json.dumps(dataclasses.asdict(task.CONFIGS[network][name])))
    assert card["configuration"] == name
    assert card["shortened"] is None
    assert len(card["seeds"]) == task.NUM_SEEDS
    assert len(card["curves"]["loss"]) == card["config"]["epochs"]
    assert set(card["metrics"]) == {"train", "validation", "test", "sample"}
    assert all(isinstance(card["dataset"][part], int) for part in card["metrics"])


def test_recorded_results_follow_from_the_cards_and_the_table():
    cards = {model: models.read_card(SAVED / f"{model}.json") for model in task.MODELS}
    summary = task.summarise(cards, {model: card["metrics"]["test"] for model, card in cards.items()}, TABLE, plan)
    recorded = json.loads(RESULTS.read_text())
    assert set(recorded["models"]) == set(task.MODELS)
    for (path, expected), (other, value) in zip(leaves(recorded), leaves(summary), strict=True):
        assert path == other
        # Other processors round the test metrics of the saved networks differently.
        assert value == (pytest.approx(expected, abs=2e-4) if isinstance(expected, float) else expected), path


def leaves(tree, path=""):
    """Returns the (path, value) pairs of nested dicts."""
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for key, value in tree.items() for leaf in leaves(value, f"{path}/{key}")]


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
QUICK = ("--quick", "--sample")


verification = functools.partial(read_verification, task.SCRIPT)


def test_saved_models_reach_what_their_cards_say(tmp_path):
    before = RESULTS.read_bytes()
    done = command("tensorflow", "--load", "--sample", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = verification(tmp_path)
    assert {row["model"] for row in rows} == set(task.MODELS)
    assert all(row["agrees"] for row in rows)
    for row in rows:
        if "_mlp_" in row["model"]:  # computed in float32 everywhere
            assert row["measured"] == pytest.approx(row["recorded"], abs=2e-4), row
    assert RESULTS.read_bytes() == before
    assert not (tmp_path / "report" / "results").exists()
    figures = {path.stem for path in (tmp_path / "report" / "figures" / task.SCRIPT).iterdir()}
    of_models = {"learning_curves", "confusion", "mistakes", "filters"}
    assert figures == {*of_models, "factors_mlp", "factors_cnn", "transfer", "between"}


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """An output directory after `--train` of one network of each kind."""
    folder = tmp_path_factory.mktemp("trained")
    for model in ("fashion_mlp_best", "cifar_cnn_3"):
        done = command("tensorflow", "--train", *QUICK, "--model", model, "--output-dir", folder)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_results_of_models_that_are_trained_one_by_one_are_merged(trained_folder):
    trained = json.loads((trained_folder / "report" / "results" / f"{task.SCRIPT}.json").read_text())
    assert set(trained["models"]) == {"fashion_mlp_best", "cifar_cnn_3"}
    assert set(trained["pictures"]) == {"fashion", "cifar"}
    assert all(math.isfinite(model["test"]["loss"]) for model in trained["models"].values())
    assert all("--quick, --sample" in model["shortened"] for model in trained["models"].values())


def test_load_reproduces_the_metrics_of_train(trained_folder):
    path = trained_folder / "report" / "results" / f"{task.SCRIPT}.json"
    trained = path.read_bytes()
    done = command("tensorflow", "--load", *QUICK, "--model", "cifar_cnn_3", "--output-dir", trained_folder, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["agrees"] for row in verification(trained_folder)] == [True, True]
    assert path.read_bytes() == trained


def experiment_rows(folder):
    return results.read_table(results.table_path(folder, task.SCRIPT), numbers=("validation_accuracy", "seconds"))


def test_experiments_do_not_run_a_finished_row_again(tmp_path):
    for _ in range(2):
        done = command("tensorflow", "--experiments", *QUICK, "--output-dir", tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    rows = experiment_rows(tmp_path)
    assert rows[["network", "name"]].to_numpy().tolist() == [["mlp", "reference"], ["cnn", "reference"]]
    assert rows["parameters"].tolist() == ["266610", "1413834"]
    assert list(rows) == list(TABLE)


def test_a_diverged_run_is_a_result(monkeypatch, tmp_path):
    def diverge(*arguments, **keywords):
        raise training.Diverged("the loss is no longer a finite number")

    monkeypatch.setattr(task, "train_network", diverge)
    done = command("tensorflow", "--experiments", *QUICK, "--output-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = experiment_rows(tmp_path)
    assert rows["validation_accuracy"].tolist() == [0.1, 0.1]
    assert task.ranking(rows, "fashion", "mlp", "short")["mean"].to_dict() == {"reference": 0.1}


# ---------------------------------------------------------------------------------------------------- images of users


def test_predict_names_the_classes_of_image_files(tmp_path):
    for name, key in (("cifar_cnn_1", "cifar"), ("fashion_cnn_best", "fashion")):
        dataset = task.LOADERS[key](None, sample=True)
        Image.fromarray(dataset.test.images[0].squeeze()).save(tmp_path / f"{key}.png")
        network, _ = models.load_model(SAVED / f"{name}.keras", task.SCRIPT, dataset.test.images.shape[1:])
        probabilities = task.predict(network, dataset.test.images[:1])[0]
        flags = [] if name == task.BEST["cifar"] else ["--model", name]
        done = run_script(
            task.SCRIPT, "tensorflow", *flags, "--predict", tmp_path / f"{key}.png", tmp_path / "none.png"
        )
        assert done.returncode == 2
        assert "none.png" in done.stderr
        best = probabilities.argmax()
        assert done.stdout.startswith(f"{tmp_path / key}.png: {dataset.class_names[best]} {probabilities[best]:.0%}, ")
        assert done.stdout.count("%") == 5
