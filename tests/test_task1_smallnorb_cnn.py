"""The smallNORB script: its data handling, augmentation and networks, and its command line on both backends."""

import dataclasses
import json
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from conftest import REPOSITORY, run_elsewhere, run_script

import task1_smallnorb_cnn as task
from common import cli, runs
from common.datasets import StereoImages

GENERATOR = np.random.default_rng(0)
SAVED = REPOSITORY / "saved_models" / task.SCRIPT


def random_pairs(count=8, size=48):
    return GENERATOR.integers(0, 256, (count, size, size, 2), dtype=np.uint8)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("toy", task.TRAINING_TOYS)
def test_no_toy_is_on_both_sides_of_a_split(toy):
    count = np.arange(100)
    pictures = task.Pictures(
        random_pairs(100), count % 5, np.full(100, 30.0), np.array(task.TRAINING_TOYS)[count // 20]
    )
    rest, held_out = task.hold_out_toy(pictures, toy)

    def toys(part):
        return set(zip(part.category.tolist(), part.instance.tolist(), strict=True))

    assert not toys(rest) & toys(held_out)
    assert toys(held_out) == {(category, toy) for category in range(5)}
    assert len(rest.images) + len(held_out.images) == 100


def test_training_and_test_toys_are_different_on_the_real_data(real_data_dir):
    dataset = task.load_smallnorb(real_data_dir)
    assert set(dataset.train.instance.tolist()) == set(task.TRAINING_TOYS)
    assert not set(dataset.test.instance.tolist()) & set(task.TRAINING_TOYS)


def scene(level, toy=60):
    """A toy of one grey on an even background, with the given background level."""
    images = np.full((1, 48, 48, 2), level, np.uint8)
    images[:, 16:32, 16:32] = toy
    return images


def test_background_level_is_that_of_the_border():
    assert task.background_level(scene(180)).ravel().tolist() == [180, 180]


def test_shift_moves_the_whole_picture():
    shifted = task.shift_background(scene(180))
    assert shifted.dtype == np.uint8
    assert shifted[0, 0, 0, 0] == task.COMMON_BACKGROUND
    assert shifted[0, 20, 20, 0] == 60 + task.COMMON_BACKGROUND - 180


def test_repainting_leaves_the_toy():
    repainted = task.repaint_background(scene(130))
    assert repainted[0, 0, 0, 0] == task.COMMON_BACKGROUND
    assert repainted[0, 20, 20, 0] == 60


# -------------------------------------------------------------------------------------------------------- augmentation


def augment(images, *augmentations, seed=0):
    layer = task.StereoAugmentation(augmentations, seed)
    return keras.ops.convert_to_numpy(layer(images, training=True))


@pytest.mark.parametrize("augmentations", [(), *((name,) for name in task.AUGMENTATIONS), task.AUGMENTATIONS])
def test_augmentation_does_nothing_outside_training(augmentations):
    images = random_pairs()
    layer = task.StereoAugmentation(augmentations, 0)
    assert np.array_equal(keras.ops.convert_to_numpy(layer(images, training=False)), images)


@pytest.mark.parametrize("name", task.AUGMENTATIONS)
def test_every_augmentation_changes_pictures_and_keeps_their_range(name):
    images = np.roll(np.repeat(scene(180), 32, axis=0) + random_pairs(32) // 32, 5, axis=2)
    changed = augment(images, name)
    assert changed.shape == images.shape
    assert np.abs(changed - images).max() > 10
    assert changed.min() >= 0
    assert changed.max() <= 255
    assert np.array_equal(changed, augment(images, name))  # the seed decides
    assert not np.array_equal(changed, augment(images, name, seed=1))


def test_stereo_flip_swaps_the_views():
    images = random_pairs(64)
    mirrored = images[:, :, ::-1, ::-1]
    flipped = augment(images, "flip")
    is_same = [np.array_equal(a, b) for a, b in zip(flipped, images, strict=True)]
    is_mirrored = [np.array_equal(a, b) for a, b in zip(flipped, mirrored, strict=True)]
    assert all(a != b for a, b in zip(is_same, is_mirrored, strict=True))
    assert 16 < sum(is_mirrored) < 48


@pytest.mark.parametrize("name", ["shift", "scale", "rotation"])
def test_both_views_move_alike(name):
    one_view = random_pairs(16)[..., :1]
    moved = augment(np.repeat(one_view, 2, axis=3), name)
    assert np.array_equal(moved[..., 0], moved[..., 1])


def test_shift_is_a_shift_of_at_most_its_limit():
    images = np.full((64, 48, 48, 2), 200, np.uint8)
    images[:, 20:28, 20:28] = 0
    dark = 200 - augment(images, "shift")[..., 0]
    rows = (dark.sum(axis=2) * np.arange(48)).sum(axis=1) / dark.sum(axis=(1, 2))
    columns = (dark.sum(axis=1) * np.arange(48)).sum(axis=1) / dark.sum(axis=(1, 2))
    offsets = np.abs(np.concatenate([rows, columns]) - 23.5)
    assert 0.5 * task.MAX_SHIFT * 48 < offsets.max() <= task.MAX_SHIFT * 48 + 0.01


def test_random_background_leaves_the_toy():
    images = np.repeat(scene(180, toy=60), 64, axis=0)
    repainted = augment(images, "background")
    assert np.abs(repainted[:, 20:28, 20:28] - 60).max() < 0.1
    levels = repainted[16:48, 0, 0, 0]
    assert levels.std() > 20
    assert np.abs(repainted[:16, 0, 0] - 180).max() == 0


def test_cutout_hides_a_square():
    images = np.repeat(scene(180, toy=60), 32, axis=0)
    images[:, 4:44, 4:44] = 60
    hidden = (augment(images, "cutout") == 180)[:, 4:44, 4:44].sum(axis=(1, 2))
    assert hidden.max() == (48 * task.CUTOUT_SIDE) ** 2


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.mark.parametrize("architecture", [*task.ARCHITECTURES, "plain+convnext"])
@pytest.mark.parametrize("image_size", [48, 64, 96])
def test_networks_are_small_and_return_probabilities_and_degrees(architecture, image_size):
    network = task.build_network(task.Recipe(architecture=architecture, image_size=image_size))
    assert network.count_params() <= 1_000_000
    outputs = network(random_pairs(3, image_size).astype("float32"))
    category = keras.ops.convert_to_numpy(outputs["category"])
    assert category.shape == (3, 5)
    assert np.allclose(category.sum(axis=1), 1, atol=1e-5)
    assert outputs["elevation"].shape == (3, 1)


def test_elevation_can_be_the_expectation_of_nine_classes():
    recipe = task.Recipe(elevation_loss="expectation", augmentations=())
    network = task.build_network(recipe)
    elevation = keras.ops.convert_to_numpy(network(random_pairs(3).astype("float32"))["elevation"])
    assert ((elevation > 30) & (elevation < 70)).all()
    model = task.compile_for_training(network, recipe, 10, 0)
    assert set(model.output) == {"category", "elevation", "elevation_probabilities"}
    before = network.get_layer("elevation").get_weights()[0]
    pictures = task.Pictures(random_pairs(8), np.arange(8) % 5, np.full(8, 35, "float32"), np.arange(8))
    model.fit(pictures.images, task.training_targets(pictures, model), verbose=0)
    assert np.array_equal(network.get_layer("elevation").get_weights()[0], before)


def test_columns_answer_each_for_itself_and_the_network_with_their_mean():
    recipe = task.Recipe(architecture="plain+convnext", width=8, elevation_loss="expectation", augmentations=())
    network = task.build_network(recipe)
    questions = [
        f"{column}_{name}" for column in ("plain", "convnext") for name in task.QUESTIONS if name != "elevation"
    ]
    columns = keras.Model(network.input, {name: network.get_layer(name).output for name in questions})
    images = random_pairs(3).astype("float32")
    answers = {name: keras.ops.convert_to_numpy(values) for name, values in columns(images).items()}
    predictions = task.predict(network, images)
    mean = (answers["plain_category"] + answers["convnext_category"]) / 2
    assert np.allclose(predictions["category"], mean, atol=1e-6)
    mean = (answers["plain_elevation_probabilities"] + answers["convnext_elevation_probabilities"]) / 2
    assert np.allclose(predictions["elevation"], mean @ task.SMALLNORB_ELEVATION_DEGREES, atol=1e-3)

    pictures = task.Pictures(random_pairs(8), np.arange(8) % 5, np.full(8, 35, "float32"), np.arange(8))
    model = task.compile_for_training(network, recipe, 10, 0)
    logs = model.evaluate(pictures.images, task.training_targets(pictures, model), verbose=0, return_dict=True)
    learnt = [logs[f"{name}_loss"] * (recipe.elevation_weight if "elevation" in name else 1) for name in questions]
    assert math.isclose(logs["loss"], sum(learnt), rel_tol=1e-4)


def test_standardised_networks_do_not_see_brightness():
    network = task.build_network(task.Recipe())
    images = random_pairs(4).astype("float32")
    for name, values in task.predict(network, images + 60).items():
        assert np.allclose(values, task.predict(network, images)[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"outputs": ("category",), "architecture": "plain+convnext"},
        {"outputs": ("elevation",)},
        {"views": 1, "elevation_loss": "mse", "optimizer": "adam"},
        {"local_contrast": (5,), "elevation_loss": "huber", "optimizer": "nadam", "schedule": "plateau"},
        {"standardize": False, "optimizer": "sgd", "schedule": "constant"},
    ],
)
def test_every_choice_trains(change, tmp_path):
    recipe = dataclasses.replace(task.Recipe(width=8, epochs=1), **change)
    labels = np.arange(32)
    elevation = task.SMALLNORB_ELEVATION_DEGREES[labels % 9].astype("float32")
    pictures = task.Pictures(random_pairs(32), labels % 5, elevation, labels)
    network, curves, _ = task.train_network(recipe, pictures, 0, folder=tmp_path, resume=False, held_out=pictures)
    assert math.isfinite(curves["loss"][0])
    assert math.isfinite(curves["val_loss"][0])
    assert network.compute_dtype == "float32"
    metrics, predictions = task.evaluate(network, pictures)
    assert set(predictions) == set(recipe.outputs)
    assert all(math.isfinite(value) for value in metrics.values())


def test_evaluate_measures_the_replaced_backgrounds(monkeypatch):
    class Brightness:
        """Predicts the mean grey of the left view as elevation, so that the metrics are known."""

        def predict(self, images, **_):
            return {"elevation": images[..., 0].mean(axis=(1, 2), keepdims=True)[..., 0]}

    monkeypatch.setattr(runs, "for_prediction", lambda network: network)
    images = np.full((2, 48, 48, 2), 50, np.uint8)
    pictures = task.Pictures(images, np.zeros(2, int), np.full(2, 50.0), np.zeros(2, int))
    metrics, _ = task.evaluate(Brightness(), pictures)
    assert metrics["elevation_mae_degrees"] == 0
    assert metrics["elevation_mae_degrees_background_shifted"] == task.COMMON_BACKGROUND - 50
    assert metrics["elevation_mae_degrees_background_replaced"] == task.COMMON_BACKGROUND - 50


def test_results_put_the_seeds_together():
    seeds = [{"seed": seed, "category_accuracy": accuracy} for seed, accuracy in enumerate((0.9, 0.8, 1.0))]
    card = {"metrics": {"train": {}}, "seeds": seeds, "parameters": {"total": 7}, "epochs": 1, "seconds": 90.0}
    card |= {"hardware": "", "shortened": None}
    results = task.summarise({"joint": card}, {"joint": {"category_accuracy": 0.9}}, {}, [])
    assert results["test"] == {"category_accuracy": 0.9}
    assert results["seeds"]["number"] == 3
    assert math.isclose(results["seeds"]["mean"]["category_accuracy"], 0.9)
    assert math.isclose(results["seeds"]["std"]["category_accuracy"], 0.1)
    assert results["models"]["joint"]["minutes"] == 1.5


def test_train_saves_the_first_seed_and_measures_all(tmp_path, monkeypatch):
    monkeypatch.setitem(task.RECIPES, "plain", task.Recipe(width=8))
    number = np.arange(64)
    images = np.random.default_rng(0).integers(0, 256, (64, 96, 96, 2), dtype=np.uint8)
    examples = StereoImages(images, number % 5, 0 * number, number % 9, azimuth=0 * number, lighting=0 * number)
    dataset = SimpleNamespace(name="smallnorb", train=examples, test=examples, checksums={})
    flags = ["--train", "--model", "plain", "--epochs", "1", "--output-dir", str(tmp_path)]
    task.train(cli.parse(cli.parser("", task.MODELS), flags), dataset)
    network, card = runs.load_model(tmp_path / "saved_models" / task.SCRIPT / "plain.keras")
    assert [run["seed"] for run in card["seeds"]] == [0, 1, 2] == list(range(task.NUM_SEEDS["plain"]))
    assert card["seeds"][0] == {"seed": 0, **card["metrics"]["test"]}
    errors = [run["elevation_mae_degrees"] for run in card["seeds"]]
    assert len(set(errors)) == 3
    metrics, _ = task.evaluate(network, task.prepare(examples, 48, quick=False))
    assert math.isclose(metrics["elevation_mae_degrees"], errors[0], rel_tol=1e-6)


def test_accuracy_per_toy(tmp_path):
    labels = np.repeat(np.arange(5), 4)
    toys = np.tile([0, 0, 3, 3], 5)
    guess = labels.copy()
    guess[1] = 4  # one of the two pictures of the first toy
    accuracy = task.accuracy_per_toy(task.Pictures(None, labels, None, toys), {"category": np.eye(5)[guess]})
    assert accuracy["animal"] == {"0": 0.5, "3": 1.0}
    assert accuracy["car"] == {"0": 1.0, "3": 1.0}
    pictures = task.Pictures(random_pairs(20), labels, None, toys)
    assert task.draw_test_toys(pictures, accuracy, tmp_path).stat().st_size > 10_000


def test_experiments_change_one_factor_each():
    baseline = dataclasses.asdict(task.BASELINE)
    names = [name for recipes in task.EXPERIMENTS.values() for name in recipes]
    assert len(names) == len(set(names)) >= 25
    for factor, recipes in task.EXPERIMENTS.items():
        for name, recipe in recipes.items():
            changed = {key for key, value in dataclasses.asdict(recipe).items() if value != baseline[key]}
            if factor not in ("baseline", "full length", task.EVERY_TOY):
                assert changed == {"optimizer", "learning_rate"} or len(changed) == 1, name


def test_architectures_meet_on_every_toy():
    folds = {}
    for factor, name, _, toy in task.planned_runs():
        folds.setdefault((factor, name), []).append(toy)
    for (factor, _), toys in folds.items():
        assert toys == list(task.TRAINING_TOYS if factor == task.EVERY_TOY else task.EXPERIMENT_TOYS)
    assert sum(factor == task.EVERY_TOY for factor, _ in folds) == 3


def test_figure_of_every_toy(tmp_path):
    labels = np.array([(category, toy) for category in range(5) for toy in task.TRAINING_TOYS])
    images = np.random.default_rng(0).integers(0, 256, (25, 96, 96, 2), dtype=np.uint8)
    same = np.full(25, 2)
    examples = StereoImages(images, labels[:, 0], labels[:, 1], elevation=same, azimuth=0 * same, lighting=same)
    rows = [
        {"name": name, "held_out_toy": str(toy), **dict.fromkeys(task.METRIC_COLUMNS, "0.9")}
        for name in task.EXPERIMENTS[task.EVERY_TOY]
        for toy in task.TRAINING_TOYS
    ]
    assert task.draw_every_toy(rows, examples, tmp_path).stat().st_size > 10_000


# -------------------------------------------------------------------------------------------------------- command line


def command(backend, data_dir, output_dir, *flags, **options):
    return run_script(task.SCRIPT, backend, *flags, "--data-dir", data_dir, "--output-dir", output_dir, **options)


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def quick(request, fake_data_dir, tmp_path_factory):
    """A finished `--train --quick`: its backend, its output folder, its models.

    Each kind of network once: of two columns, with one question, of one column. JAX compiles for long: one will do.
    """
    output_dir = tmp_path_factory.mktemp(request.param)
    models = ["plain"] if request.param == "jax" else ["joint", "elevation"]
    flags = ["--model", *models] if request.param == "jax" else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "MODELS", models)
        done = command(request.param, fake_data_dir, output_dir, "--train", "--quick", *flags)
    assert done.returncode == 0, done.stderr
    return request.param, output_dir, models


def test_load_reproduces_the_metrics_of_train(quick, fake_data_dir):
    backend, output_dir, models = quick
    path = output_dir / "report" / "results" / f"{task.SCRIPT}.json"
    trained = json.loads(path.read_text())
    path.unlink()
    # The joint network is what --load restores where none is named; the other one has to leave its results alone.
    loads = [["--model", "plain"]] if backend == "jax" else [[], ["--model", "elevation"]]
    for flags in loads:
        done = command(backend, fake_data_dir, output_dir, "--load", "--quick", *flags, fresh=True)
        assert done.returncode == 0, done.stderr
        assert "differs" not in done.stdout
    loaded = json.loads(path.read_text())
    assert set(loaded["models"]) == ({"plain"} if backend == "jax" else {"joint", "elevation"})
    for model, results in loaded["models"].items():
        assert results == trained["models"][model]
    assert {**loaded, "models": None} == {**trained, "models": None}
    if backend == "jax":
        return
    assert set(trained["models"]) == set(models)
    assert trained["seeds"]["number"] == 1
    for figure in ("samples", "learning_curves", "confusion_matrix", "elevation", "test_toys", "mistakes", "shortcut"):
        assert (output_dir / "report" / "figures" / task.SCRIPT / f"{figure}.png").stat().st_size > 10_000


def test_cards_say_where_the_models_come_from(quick):
    backend, output_dir, models = quick
    for model in models:
        card = json.loads((output_dir / "saved_models" / task.SCRIPT / f"{model}.json").read_text())
        assert card["model"] == model
        assert card["backend"] == backend
        assert card["shortened"].startswith("--quick")
        assert card["dataset"]["train"] == 24300
        assert len(card["curves"]["loss"]) == card["epochs"] == 1
        assert set(card["metrics"]) == {"train", "validation", "test"}


def test_stock_keras_opens_the_saved_models_from_an_empty_directory(quick, tmp_path):
    backend, output_dir, models = quick
    code = """
import sys, keras, numpy as np
for path in sys.argv[1:]:
    model = keras.saving.load_model(path, safe_mode=True, compile=False)
    outputs = model.predict(np.zeros((2, 48, 48, 2), "uint8"), verbose=0)
    print({name: values.shape for name, values in outputs.items()})
"""
    paths = [output_dir / "saved_models" / task.SCRIPT / f"{model}.keras" for model in models]
    printed = run_elsewhere(code, tmp_path, *paths, KERAS_BACKEND=backend).strip().splitlines()[-len(models) :]
    for model, line in zip(models, printed, strict=True):
        assert ("'category': (2, 5)" in line) == (model != "elevation")
        assert ("'elevation': (2, 1)" in line) == (model != "category")


def test_resume_after_the_end_only_evaluates_again(quick, fake_data_dir):
    backend, output_dir, models = quick
    done = command(backend, fake_data_dir, output_dir, "--train", "--quick", "--resume", "--model", models[-1])
    assert done.returncode == 0, done.stderr
    assert "resuming after epoch 1 of 1" in done.stdout


def test_experiments_resume_where_they_stopped(fake_data_dir, tmp_path):
    for count in (2, 4):
        done = command("tensorflow", fake_data_dir, tmp_path, "--experiments", "--quick", "--epochs", "1")
        assert done.returncode == 0, done.stderr
        rows = runs.read_rows(tmp_path / "report" / "results" / f"{task.SCRIPT}_experiments.csv")
        assert len(rows) == count
    assert len({(row["name"], row["held_out_toy"]) for row in rows}) == 4


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_missing_and_corrupt_weights_are_one_line(damage, fake_data_dir, tmp_path):
    path = tmp_path / "saved_models" / task.SCRIPT / "joint.keras"
    path.parent.mkdir(parents=True)
    if damage == "corrupt":
        path.write_bytes(b"PK")
        path.with_suffix(".json").write_text('{"weights_sha256": "0"}')
    done = command("tensorflow", fake_data_dir, tmp_path, "--load")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert damage.replace("corrupt", "damaged") in done.stderr


# ---------------------------------------------------------------------------------------------------------- saved ones


@pytest.mark.parametrize("model", task.MODELS)
def test_saved_model_is_what_its_card_says(model):
    network, card = runs.load_model(SAVED / f"{model}.keras")
    assert card["shortened"] is None
    assert card["parameters"]["total"] == network.count_params() <= 1_000_000
    assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(task.RECIPES[model])))
    assert network.input_shape == (None, 48, 48, 2)
    assert set(network.output) == set(task.RECIPES[model].outputs)


def test_saved_network_keeps_its_accuracy(real_data_dir):
    """On every 40th test picture the saved network is about as good as its card says of all of them."""
    network, card = runs.load_model(SAVED / "joint.keras")
    examples = task.load_smallnorb(real_data_dir).test
    every = StereoImages(*(np.array(array[::40]) for array in examples))
    metrics, _ = task.evaluate(network, task.prepare(every, 48, quick=False))
    recorded = card["metrics"]["test"]
    assert abs(metrics["category_accuracy"] - recorded["category_accuracy"]) < 0.03
    assert abs(metrics["elevation_mae_degrees"] - recorded["elevation_mae_degrees"]) < 0.3
