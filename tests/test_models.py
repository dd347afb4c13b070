"""Saved models, their cards, and what restoring them refuses."""

import argparse
import dataclasses
import json
import subprocess

import keras
import numpy as np
import pytest
from conftest import REPOSITORY

from common import models
from common.errors import UserError
from common.files import sha256

INPUTS = np.random.default_rng(0).normal(size=(64, 3)).astype("float32")


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 3
    batch_size: int = 10


def small_model(seed=0):
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((3,)), keras.layers.Dense(4, activation="relu"), keras.layers.Dense(1)])


def make_card(quick=False, sample=False):
    arguments = argparse.Namespace(command="script.py --train", quick=quick, sample=sample)
    return models.card(
        "script",
        "model",
        arguments,
        config=Config(),
        seed=7,
        dataset={"name": "noise", "train": 25, "test": 64, "sha256": "0"},
        curves={"loss": [1.0, 0.9]},
        seconds=1.23,
        metrics={"test": {"accuracy": 1.0}},
    )


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "saved_models" / "script" / "model.keras"
    models.save_model(small_model(), path, make_card())
    return path


def test_cards_say_what_was_trained_how_long_and_whether_it_was_whole():
    card = make_card()
    assert card["epochs"] == 2  # instead of three, as something ended it early
    assert card["steps"] == 2 * 3  # the last batch of an epoch is a small one
    assert (card["script"], card["command"], card["seed"]) == ("script.py", "script.py --train", 7)
    assert card["config"] == {"epochs": 3, "batch_size": 10}
    assert card["shortened"] is None
    assert "--quick" in make_card(quick=True)["shortened"]
    assert "--sample" in make_card(sample=True)["shortened"]


def test_saved_model_comes_back_without_optimizer(saved):
    model, card = models.load_model(saved, "script", (3,))
    assert np.array_equal(model.predict(INPUTS, verbose=0), small_model().predict(INPUTS, verbose=0))
    assert getattr(model, "optimizer", None) is None
    assert card["parameters"] == {"trainable": 21, "total": 21}
    assert card["metrics"]["test"]["accuracy"] == 1.0


@pytest.mark.parametrize(("precision", "bits", "share"), [("float16", 11, 0.7), ("bfloat16", 8, 0.55)])
def test_rounded_weights_have_fewer_bits_and_compress(precision, bits, share, tmp_path):
    model = keras.Sequential([keras.Input((100,)), keras.layers.Dense(500)])
    models.save_model(model, tmp_path / "full.keras", make_card())
    before = model.get_weights()[0]
    models.round_weights(model, precision)
    after = model.get_weights()[0]
    assert after.dtype == "float32"
    mantissas = np.frexp(after)[0] * 2**bits
    assert np.array_equal(mantissas, np.rint(mantissas))
    assert 0 < np.abs(after - before).max() < 2**-bits * np.abs(before).max() * 1.01
    models.save_model(model, tmp_path / "rounded.keras", make_card())
    assert (tmp_path / "rounded.keras").stat().st_size < share * (tmp_path / "full.keras").stat().st_size
    assert np.array_equal(models.load_model(tmp_path / "rounded.keras", "script")[0].get_weights()[0], after)


def change_card(path, **fields):
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps({**card, **fields}))


def replace_weights(path, content):
    path.write_bytes(content)
    change_card(path, weights_sha256=sha256(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"model\.keras is missing"),
        (lambda path: path.with_suffix(".json").unlink(), r"model\.json is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "checksums differ.*--train --resume"),
        (lambda path: path.with_suffix(".json").write_text("{}"), "not the card of a model"),
        (lambda path: path.with_suffix(".json").write_text("{"), "is damaged"),
        (lambda path: change_card(path, metrics=None), r"not the card of a model \(missing or wrong: metrics\)"),
        (lambda path: change_card(path, script="other.py"), r"was made by other\.py"),
        (lambda path: replace_weights(path, b"not a model"), "cannot open"),
        (lambda path: replace_weights(path, b""), "cannot open"),
    ],
)
def test_missing_or_damaged_model_is_a_user_error(damage, message, saved):
    damage(saved)
    with pytest.raises(UserError, match=message) as error:
        models.load_model(saved, "script")
    assert "\n" not in str(error.value)


def test_model_for_other_inputs_is_a_user_error(saved):
    with pytest.raises(UserError, match=r"takes inputs of shape \(3,\) instead of \(4,\)"):
        models.load_model(saved, "script", (4,))


def test_full_disk_while_saving_is_a_user_error_and_leaves_the_old_model(saved, monkeypatch):
    def fail(path):
        raise RuntimeError("Unable to synchronously write (no space left on device)")

    before = saved.read_bytes()
    model = small_model()
    monkeypatch.setattr(model, "save", fail)
    with pytest.raises(UserError, match=r"cannot write .*no space left"):
        models.save_model(model, saved, make_card())
    assert saved.read_bytes() == before


def test_models_are_read_from_the_output_dir_where_it_has_some(saved, tmp_path):
    assert models.models_folder(tmp_path, "script") == saved.parent
    assert models.models_folder(tmp_path, "other") == REPOSITORY / "saved_models" / "other"


def test_a_model_is_restored_with_its_config(saved):
    @dataclasses.dataclass
    class Other:
        unknown: int

    path = models.model_path(saved.parents[2], "script", "model")
    assert path == saved
    config_type = dataclasses.make_dataclass("Config", models.read_card(saved)["config"])
    model, config, card = models.restore(path, "script", config_type)
    assert dataclasses.asdict(config) == card["config"]
    assert model.count_params() == card["parameters"]["total"]
    with pytest.raises(UserError, match="has another config"):
        models.restore(path, "script", Other)
    missing = models.model_path(saved.parents[2], "script", "other")
    assert missing == REPOSITORY / "saved_models" / "script" / "other.keras"


def test_copied_weights_are_those_that_standardise():
    images = np.random.default_rng(0).normal(3, 2, size=(50, 4)).astype("float32")
    first, second = (keras.Sequential([keras.Input((4,)), keras.layers.Normalization()]) for _ in range(2))
    first.layers[0].adapt(images)
    models.set_weights(second, first.get_weights())
    standardised = second.predict(images, verbose=0)
    assert np.allclose(standardised, first.predict(images, verbose=0))
    assert np.allclose(standardised.std(axis=0), 1, atol=1e-3)


def test_model_for_prediction_differs_by_rounding(monkeypatch):
    keras.utils.set_random_seed(0)
    images = keras.Input((8, 8, 1))
    features = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(4, 3)(images))
    model = keras.Model(images, {"value": keras.layers.Dense(1, name="value")(features)})
    batch = np.random.default_rng(0).normal(size=(5, 8, 8, 1)).astype("float32")
    expected = model.predict(batch, verbose=0)["value"]
    monkeypatch.setattr(models, "fast_precision", lambda: "mixed_bfloat16")
    fast = models.for_prediction(model)
    assert fast.layers[1].compute_dtype == "bfloat16"
    assert fast.layers[-1].compute_dtype == "float32"
    difference = np.abs(fast.predict(batch, verbose=0)["value"] - expected).max()
    assert 0 < difference < 0.02
    assert models.for_prediction(model, num_images=250) is model
    monkeypatch.setattr(models, "fast_precision", lambda: "float32")
    assert models.for_prediction(model) is model


def test_environment_names_what_a_number_depends_on():
    environment = models.environment()
    assert environment["backend"] == keras.backend.backend()
    assert environment["versions"]["keras"] == keras.__version__
    assert environment["versions"]["numpy"] == np.__version__
    assert len(environment["hardware"]) > 5


@pytest.mark.parametrize(
    ("outcome", "words"),
    [
        (FileNotFoundError("git"), "git is not installed"),
        (subprocess.CompletedProcess([], 128, ""), "not a git checkout"),
    ],
)
def test_without_git_the_card_says_so(outcome, words, monkeypatch):
    def run(*arguments, **keywords):
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(models.subprocess, "run", run)
    assert models.git_commit.__wrapped__() == f"unknown: {words}"


def test_every_committed_card_is_whole_and_belongs_to_its_weights():
    cards = sorted((REPOSITORY / "saved_models").glob("*/*.keras"))
    assert len(cards) > 30
    for path in cards:
        card = models.read_card(path)
        assert card["script"] == f"{path.parent.name}.py"
        assert card["model"] == path.stem
        assert card["weights_sha256"] == sha256(path)
        assert card["shortened"] is None
        if path.stem != "vgg_blocks_1_to_4":  # which classifies nothing by itself
            assert card["metrics"]["sample"]
            assert card["metrics"]["test"]
        assert "recipe" not in card


def test_filters_rounded_to_a_grid_are_close_and_exact_in_16_bits():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)])
    kernel, bias = model.get_weights()
    kernel[:, :32] /= 100  # filters of very different sizes
    model.set_weights([kernel, bias])
    models.round_to_grid(model)
    after = model.get_weights()[0]
    assert np.array_equal(after, after.astype("float16"))
    assert (np.abs(after - kernel).max(axis=0) <= kernel.std(axis=0) / 32).all()
    assert not np.array_equal(after, kernel)
