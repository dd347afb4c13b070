"""Checkpoints, saved models with cards, and experiment tables."""

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from conftest import REPOSITORY

from common import runs
from common.cli import UserError

INPUTS = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")
TARGETS = INPUTS.sum(axis=1, keepdims=True)


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), "mse", jit_compile=False)
    return model


def fit(model, folder, epochs, resume=False, settings=None, **keywords):
    return runs.fit(
        model,
        INPUTS,
        TARGETS,
        epochs=epochs,
        batch_size=16,
        folder=folder,
        settings=settings or {"seed": 0},
        resume=resume,
        verbose=0,
        **keywords,
    )


class Stop(keras.callbacks.Callback):
    """Raises in the middle of an epoch, as if the process were killed there."""

    def __init__(self, epoch):
        super().__init__()
        self.stop_epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.stop_epoch and batch == 2:
            raise KeyboardInterrupt


def test_resuming_continues_weights_optimizer_and_curves(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), tmp_path, 5, callbacks=[Stop(3)])
    saved = json.loads((tmp_path / "state.json").read_text())
    assert saved["epoch"] == 3
    resumed = small_model(seed=1)
    curves, seconds = fit(resumed, tmp_path, 5, resume=True)
    assert len(curves["loss"]) == 5
    assert curves["loss"][:3] == saved["history"]["loss"]
    assert curves["loss"][3] < curves["loss"][0]
    assert int(resumed.optimizer.iterations) == 5 * 4
    assert seconds > saved["seconds"]
    assert [path.name for path in tmp_path.glob("*.h5")] == ["epoch_0005.weights.h5"]


def test_resuming_a_finished_training_trains_no_more(tmp_path):
    model = small_model()
    first, _ = fit(model, tmp_path, 2)
    again = small_model(seed=1)
    second, _ = fit(again, tmp_path, 2, resume=True)
    assert second == first
    for expected, restored in zip(model.get_weights(), again.get_weights(), strict=True):
        assert np.array_equal(expected, restored)


def test_a_training_step_is_traced_once(tmp_path, monkeypatch):
    """Tracing takes longer than all that a --quick training does; a step that creates variables is traced twice."""
    model = small_model()
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], jit_compile=False)
    calls = []
    step = model.train_step
    monkeypatch.setattr(model, "train_step", lambda data: calls.append(0) or step(data))
    curves, _ = fit(model, tmp_path, 2)
    assert len(calls) == 1
    assert len(curves["mae"]) == 2


def test_without_resume_an_old_checkpoint_is_forgotten(tmp_path):
    fit(small_model(), tmp_path, 2)
    curves, _ = fit(small_model(), tmp_path, 1)
    assert len(curves["loss"]) == 1


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(small_model(), tmp_path, 1)
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        fit(small_model(), tmp_path, 1, resume=True, settings={"seed": 1})
    with pytest.raises(UserError, match=r"other settings \(epochs\)"):
        fit(small_model(), tmp_path, 2, resume=True)


@pytest.mark.parametrize("name", ["state.json", "epoch_0001.weights.h5"])
def test_damaged_checkpoint_is_a_user_error(name, tmp_path):
    fit(small_model(), tmp_path, 1)
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged; start over without --resume"):
        fit(small_model(), tmp_path, 1, resume=True)


def test_loss_that_leaves_the_finite_numbers_is_told_apart_and_a_user_error(tmp_path):
    model = small_model()
    model.optimizer.learning_rate = 1e30
    with pytest.raises(runs.Diverged, match="no longer a finite number"):
        fit(model, tmp_path, 9)
    assert issubclass(runs.Diverged, UserError)


def test_kill_9_in_the_middle_of_an_epoch(tmp_path):
    """A process that is killed loses the epoch under way and nothing else; --resume reaches the same epoch count."""
    code = f"""
import sys, time
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
import keras, test_runs
class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.05)
test_runs.fit(test_runs.small_model(), {str(tmp_path)!r}, 500, callbacks=[Slow()])
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.time() + 60
    while not (tmp_path / "state.json").exists() or json.loads((tmp_path / "state.json").read_text())["epoch"] < 2:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = json.loads((tmp_path / "state.json").read_text())
    state["settings"]["epochs"] = state["epoch"] + 2  # 500 would take too long
    (tmp_path / "state.json").write_text(json.dumps(state))
    model = small_model(seed=1)
    curves, _ = fit(model, tmp_path, state["epoch"] + 2, resume=True)
    assert curves["loss"][: state["epoch"]] == state["history"]["loss"]
    assert len(curves["loss"]) == state["epoch"] + 2
    assert int(model.optimizer.iterations) == 4 * (state["epoch"] + 2)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved_models" / "script" / "model.keras"
    runs.save_model(small_model(), path, {"metrics": {"test": {"accuracy": 1.0}}})
    return path


def test_saved_model_comes_back_without_optimizer(saved):
    model, card = runs.load_model(saved)
    assert np.array_equal(model.predict(INPUTS, verbose=0), small_model().predict(INPUTS, verbose=0))
    assert getattr(model, "optimizer", None) is None
    assert card["parameters"] == {"trainable": 21, "total": 21}
    assert card["metrics"]["test"]["accuracy"] == 1.0


@pytest.mark.parametrize(("precision", "bits", "share"), [("float16", 11, 0.7), ("bfloat16", 8, 0.55)])
def test_rounded_weights_have_fewer_bits_and_compress(precision, bits, share, tmp_path):
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(500)])
    runs.save_model(model, tmp_path / "full.keras", {})
    before = model.get_weights()[0]
    runs.round_weights(model, precision)
    after = model.get_weights()[0]
    assert after.dtype == "float32"
    mantissas = np.frexp(after)[0] * 2**bits
    assert np.array_equal(mantissas, np.rint(mantissas))
    assert 0 < np.abs(after - before).max() < 2**-bits * np.abs(before).max() * 1.01
    runs.save_model(model, tmp_path / "rounded.keras", {})
    assert (tmp_path / "rounded.keras").stat().st_size < share * (tmp_path / "full.keras").stat().st_size
    assert np.array_equal(runs.load_model(tmp_path / "rounded.keras")[0].get_weights()[0], after)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"model\.keras is missing"),
        (lambda path: path.with_suffix(".json").unlink(), r"model\.json is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "damaged"),
        (lambda path: path.with_suffix(".json").write_text("{}"), "not the card"),
        (lambda path: path.with_suffix(".json").write_text("{"), "not the card"),
    ],
)
def test_missing_or_damaged_model_is_a_user_error(damage, message, saved):
    damage(saved)
    with pytest.raises(UserError, match=message) as error:
        runs.load_model(saved)
    assert "\n" not in str(error.value)


def test_file_that_is_no_model_is_a_user_error(saved):
    saved.write_bytes(b"not a model")
    card = json.loads(saved.with_suffix(".json").read_text())
    card["weights_sha256"] = runs.sha256(saved)
    saved.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(UserError, match="cannot open"):
        runs.load_model(saved)


def test_models_are_read_from_the_output_dir_where_it_has_some(saved, tmp_path):
    assert runs.saved_models_folder(tmp_path, "script") == saved.parent
    assert runs.saved_models_folder(tmp_path, "other") == REPOSITORY / "saved_models" / "other"


def test_metrics_that_differ_are_marked(capsys):
    card = {**runs.environment(), "metrics": {"test": {"accuracy": 0.50001, "error": 2.0}}}
    runs.print_metrics({"accuracy": 0.5, "error": 2.005}, card)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "accuracy    0.5000    0.5000"
    assert lines[2] == "error       2.0050    2.0000  differs"
    runs.print_metrics({"error": 2.005}, {**card, "backend": "another"})
    lines = capsys.readouterr().out.splitlines()
    assert "half a per cent" in lines[0]
    assert lines[2] == "error    2.0050    2.0000"


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_only_bfloat16_is_rounded_differently_by_another_processor(precision, capsys, monkeypatch):
    monkeypatch.setattr(runs, "fast_precision", lambda: precision)
    card = {**runs.environment(), "hardware": "another", "metrics": {"test": {"error": 2.0}}}
    runs.print_metrics({"error": 2.005}, card)
    printed = capsys.readouterr().out
    assert ("on another;" in printed) == (precision == "mixed_bfloat16")
    assert ("differs" in printed) == (precision == "float32")


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_every_step_is_compiled_under_jax(backend, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    assert runs.compile_options(1)["jit_compile"] is (backend == "jax")


def test_cards_say_how_long_a_training_was_and_whether_it_was_whole():
    @dataclasses.dataclass
    class Recipe:
        epochs: int = 3
        batch_size: int = 10

    arguments = argparse.Namespace(command="script.py --train", quick=False)
    about = {"recipe": Recipe(), "seed": 7, "dataset": {}, "pictures": 25, "curves": {"loss": [1.0]}, "seconds": 1.23}
    card = runs.card("script", "model", arguments, **about)
    assert card["steps"] == 3 * 3  # the last batch of an epoch is a small one
    assert (card["script"], card["command"], card["seed"]) == ("script.py", "script.py --train", 7)
    assert card["recipe"] == {"epochs": 3, "batch_size": 10}
    assert card["shortened"] is None
    assert runs.card("script", "model", argparse.Namespace(command="", quick=True), **about)["shortened"]


def test_copied_weights_are_those_that_standardise():
    pictures = np.random.default_rng(0).normal(3, 2, size=(50, 4)).astype("float32")
    first, second = (keras.Sequential([keras.Input((4,)), keras.layers.Normalization()]) for _ in range(2))
    first.layers[0].adapt(pictures)
    runs.set_weights(second, first.get_weights())
    standardised = second.predict(pictures, verbose=0)
    assert np.allclose(standardised, first.predict(pictures, verbose=0))
    assert np.allclose(standardised.std(axis=0), 1, atol=1e-3)


def test_model_for_prediction_differs_by_rounding(monkeypatch):
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 1))
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(images))
    model = keras.Model(images, {"value": keras.layers.Dense(1, name="value")(features)})
    pictures = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype("float32")
    expected = model.predict(pictures, verbose=0)["value"]
    monkeypatch.setattr(runs, "fast_precision", lambda: "mixed_bfloat16")
    fast = runs.for_prediction(model)
    assert fast.layers[1].compute_dtype == "bfloat16"
    assert fast.layers[-1].compute_dtype == "float32"
    difference = np.abs(fast.predict(pictures, verbose=0)["value"] - expected).max()
    assert 0 < difference < 0.02
    monkeypatch.setattr(runs, "fast_precision", lambda: "float32")
    assert runs.for_prediction(model) is model


def test_environment_names_what_a_number_depends_on():
    environment = runs.environment()
    assert environment["backend"] == keras.backend.backend()
    assert environment["versions"]["keras"] == keras.__version__
    assert environment["versions"]["numpy"] == np.__version__
    assert len(environment["hardware"]) > 5


def test_precision_is_one_keras_knows():
    assert runs.fast_precision() in ("float32", "mixed_bfloat16")


def test_rows_are_added_and_read_back(tmp_path):
    table = tmp_path / "experiments.csv"
    assert runs.read_rows(table) == []
    runs.append_row(table, {"name": "a, b", "seed": 0})
    runs.append_row(table, {"name": "c", "seed": 1})
    assert runs.read_rows(table) == [{"name": "a, b", "seed": "0"}, {"name": "c", "seed": "1"}]


def test_damaged_table_is_a_user_error(tmp_path):
    table = tmp_path / "experiments.csv"
    table.write_text("name,seed\na,0\nb")
    with pytest.raises(UserError, match="different lengths"):
        runs.read_rows(table)


def test_some_layers_are_built_in_float32_inside_of_a_faster_network(monkeypatch):
    monkeypatch.setattr(runs, "fast_precision", lambda: "mixed_bfloat16")
    with runs.building_for_speed():
        with runs.building_in_float32():
            assert keras.layers.Dense(1).compute_dtype == "float32"
        assert keras.layers.Dense(1).compute_dtype == "bfloat16"
    assert keras.layers.Dense(1).compute_dtype == "float32"
