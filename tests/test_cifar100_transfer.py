"""VGG16 and our own networks on CIFAR-100."""

import dataclasses

import keras
import numpy as np
import pytest
from conftest import REPOSITORY, read_verification, run_script

import cifar100_transfer as script
from common import training
from common.errors import UserError

SCRIPT = script.SCRIPT
DATA_DIR = REPOSITORY / "data"
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), "uint8")
SMALL = script.Config(filters=(4, 6, 8), batch_size=20, epochs=3)


@pytest.fixture(scope="module")
def base():
    """The base of VGG16 with the weights that Keras starts with, which need no download."""
    keras.utils.set_random_seed(0)
    return script.build_base(None)


@pytest.fixture(scope="module")
def splits():
    return script.load_splits(DATA_DIR, sample=True)[0]


# ---------------------------------------------------------------------------------------------------------------- data


def test_split_holds_out_as_many_images_of_each_class_and_none_twice(splits):
    for part in ("train", "validation"):
        assert set(np.bincount(splits[part].labels, minlength=100)) == {len(splits[part].labels) // 100}
    images = {part: {image.tobytes() for image in splits[part].images} for part in splits}
    assert len(images["train"]) + len(images["validation"]) == 300
    assert not images["train"] & images["validation"]
    assert not images["test"] & (images["train"] | images["validation"])


def test_split_is_the_same_every_time(splits):
    again, _ = script.load_splits(DATA_DIR, sample=True)
    assert all(np.array_equal(splits[part].images, again[part].images) for part in splits)


def test_fewer_classes_are_the_first_ones_or_the_superclasses(splits):
    images, labels = script.select(splits["train"], 25)
    assert set(labels) == set(range(25))
    assert len(images) == len(labels) == 50
    images, labels = script.select(splits["train"], 20)
    assert set(labels) == set(range(20))
    assert len(images) == 200


# --------------------------------------------------------------------------------------------------------------- VGG16


def test_preprocessing_is_that_of_keras():
    images = keras.Input((32, 32, 3))
    model = keras.Model(images, script.preprocess(images))
    expected = keras.applications.vgg16.preprocess_input(IMAGES.astype("float32"))
    np.testing.assert_allclose(model.predict(IMAGES, verbose=0), expected, atol=1e-4)


def test_tail_on_maps_equals_the_whole_network(base):
    head, tail = script.build_vgg(script.CONFIGS["vgg_features"], base)
    head_of_whole, whole = script.build_vgg(script.CONFIGS["vgg_full"], base)
    head_of_whole.set_weights(head.get_weights())
    maps = base.blocks_1_to_4.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(tail.predict(maps, verbose=0), whole.predict(IMAGES, verbose=0), atol=1e-5)


def test_base_is_vgg16_and_copies_of_it_are_trained(base):
    keras.utils.set_random_seed(0)
    expected = keras.applications.VGG16(include_top=False, weights=None, input_shape=(None, None, 3))
    script.models.round_to_grid(expected)
    images = keras.applications.vgg16.preprocess_input(IMAGES.astype("float32"))
    features = base.block_5.predict(base.blocks_1_to_4.predict(IMAGES, verbose=0), verbose=0)
    np.testing.assert_allclose(features, expected.predict(images, verbose=0)[:, 0, 0], rtol=1e-4, atol=1e-4)
    _, whole = script.build_vgg(script.CONFIGS["vgg_full"], base)
    before = [weights.copy() for part in base for weights in part.get_weights()]
    whole.set_weights([weights + 1 for weights in whole.get_weights()])
    after = [weights for part in base for weights in part.get_weights()]
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))


def test_features_are_those_of_the_base_and_computed_once(base, tmp_path, monkeypatch):
    features = script.Features(base, tmp_path)
    maps = features("maps", IMAGES)
    expected = base.blocks_1_to_4.predict(IMAGES, verbose=0)
    np.testing.assert_allclose(maps, expected, rtol=1e-3, atol=1e-3)
    top = base.block_5.predict(expected, verbose=0)
    np.testing.assert_allclose(features("block 5", IMAGES), top, rtol=5e-3, atol=5e-3)
    pooled = features("pooled", IMAGES)
    assert pooled.shape == (6, 1280)
    mirrored = base.blocks_1_to_4.predict(IMAGES[:, :, ::-1], verbose=0)
    np.testing.assert_allclose(features("maps", IMAGES, mirrored=True), mirrored, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(script, "predict", None)
    assert np.array_equal(features("pooled", IMAGES), pooled)


def test_features_are_computed_again_for_other_images_and_other_weights(base, tmp_path):
    first = script.Features(base, tmp_path)("maps", IMAGES)
    other = script.Features(base, tmp_path)("maps", 255 - IMAGES)
    assert not np.array_equal(first, other)
    kernel = base.blocks_1_to_4.get_layer("block4_conv3").bias
    old = kernel.numpy()
    kernel.assign(old + 1)
    changed = script.Features(base, tmp_path)("maps", IMAGES)
    kernel.assign(old)
    assert not np.array_equal(first, changed)


def test_trainable_parameters_of_the_vgg_models(base):
    head = 512 * 100 + 100
    block_5 = 3 * (512 * 512 * 9 + 512)
    _, frozen = script.build_vgg(script.CONFIGS["vgg_features"], base)  # whose block 5 is what --load finds
    restored = script.VggBase(base.blocks_1_to_4, frozen.get_layer("block_5"))
    counts = {
        name: script.models.parameter_counts(script.build_vgg(config, restored)[1])["trainable"]
        for name, config in script.CONFIGS.items()
        if isinstance(config, script.VggConfig)
    }
    assert counts == {
        "vgg_features": head,
        "vgg_top_block": head + block_5,
        "vgg_full": head + 14_714_688,
        "vgg_features_64": head + (1280 - 512) * 100,
    }


def test_head_is_trained_before_the_blocks_below_it(base, splits, tmp_path, monkeypatch):
    fitted = []
    monkeypatch.setattr(
        script, "fit", lambda model, *_, **keywords: (fitted.append(model.input_shape[1:]), ({}, 1.0))[1]
    )
    features = script.Features(base, tmp_path / "features")
    few = {part: script.Cifar100Images(*(array[:6] for array in splits[part])) for part in ("train", "validation")}
    for name, expected in (("vgg_features", [(512,)]), ("vgg_top_block", [(512,), (2, 2, 512)])):
        fitted.clear()
        config = dataclasses.replace(script.CONFIGS[name], mirrored=False)
        _, _, seconds = script.train_vgg(config, few, features, 0, folder=tmp_path, resume=False)
        assert fitted == expected
        assert seconds == len(expected)


def test_damaged_weights_are_one_line(tmp_path):
    damaged = tmp_path / "vgg16_imagenet_notop.weights.h5"
    damaged.write_bytes(b"no HDF5")
    with pytest.raises(UserError, match="damaged") as error:
        script.build_base(script.vgg16_weights(tmp_path))
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------- our own networks


@pytest.mark.parametrize("name", ["own_1", "own_2", "own_3"])
def test_own_networks_have_at_most_3_million_parameters_and_take_images_of_any_size(name):
    network = script.build_network(script.CONFIGS[name])
    assert network.count_params() <= 3_000_000
    for size in (24, 48):
        probabilities = network.predict(np.zeros((2, size, size, 3)), verbose=0)
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def test_whitened_patches_are_uncorrelated_with_unit_variance(splits):
    images = splits["train"].images
    network = script.build_network(dataclasses.replace(SMALL, whitening=True))
    network.get_layer("whitening").set_weights([script.whitening_kernel(images)])
    patches = keras.Model(network.input, network.get_layer("whitening").output).predict(images, verbose=0)
    covariance = np.cov(patches.reshape(-1, 24), rowvar=False)
    # The eigenvalues below the 5e-4 that is added to them are not brought to 1.
    np.testing.assert_allclose(covariance[:12, :12], np.diag(np.diag(covariance)[:12]), atol=1e-3)
    assert np.diag(covariance)[6:12] == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(patches[..., :12], -patches[..., 12:], atol=1e-4)


def train(config, folder, resume=False, callbacks=()):
    splits, _ = script.load_splits(DATA_DIR, sample=True)
    parts = {part: script.select(splits[part], config.classes) for part in ("train", "validation")}
    return script.train_own(config, parts["train"], 0, folder=folder, resume=resume, validation=parts["validation"])


@pytest.mark.parametrize(
    "changes",
    [
        {"schedule": "plateau", "learning_rate": 0.5, "augmentation": False, "epochs": 6},
        {"optimizer": "muon", "small_size": 24, "small_epochs": 2, "whitening": True},
    ],
    ids=["plateau", "parts"],
)
def test_resumed_run_equals_an_uninterrupted_one(changes, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, **changes)
    network, curves, _ = train(config, tmp_path / "whole")
    stop_at, count = len(curves["loss"]) - 1, []

    def stop(*_):
        count.append(1)
        if len(count) == stop_at + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        original = training.EpochSeeds.on_epoch_begin
        patch.setattr(training.EpochSeeds, "on_epoch_begin", lambda self, *rest: (stop(), original(self, *rest)))
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped")
    resumed, resumed_curves, _ = train(config, tmp_path / "stopped", resume=True)
    assert resumed_curves == curves
    assert all(np.array_equal(*pair) for pair in zip(resumed.get_weights(), network.get_weights(), strict=True))


def test_a_new_run_removes_all_parts_of_an_earlier_one(splits, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "train_own", lambda *arguments, **keywords: "trained")
    stale = tmp_path / "part_2_of_3_epochs" / "checkpoint.keras"
    stale.parent.mkdir()
    for resume in (True, False):
        stale.touch()
        assert script.train_one(SMALL, splits, None, 0, folder=tmp_path, resume=resume) == "trained"
        assert stale.exists() == resume


def test_last_part_trains_the_last_stage_alone_on_upsampled_images(tmp_path):
    config = dataclasses.replace(SMALL, epochs=1)
    first, _, _ = train(config, tmp_path / "first")
    config = dataclasses.replace(config, tuned_size=48, tuned_epochs=1)
    tuned, curves, _ = train(config, tmp_path / "tuned")
    assert len(curves["loss"]) == 2
    assert tuned.input_shape == (None, 32, 32, 3)
    pairs = [
        (a.get_weights()[0], b.get_weights()[0])
        for a, b in zip(*([each for each in net.layers if each.get_weights()] for net in (first, tuned)), strict=True)
    ]
    changed = [not np.array_equal(*pair) for pair in pairs]
    assert changed.index(True) > len(changed) / 2
    assert all(changed[changed.index(True) :])


# ---------------------------------------------------------------------------------------------------- evaluation


def test_confused_pairs_of_a_known_case():
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([1, 0, 0, 1, 5])
    assert script.confused_pairs(predicted, labels, 2) == [(0, 1, 2), (2, 5, 1)]


def test_ensemble_of_experiments_is_the_mean_of_their_probabilities(tmp_path, monkeypatch):
    plan = script.results.optional_module("experiments", SCRIPT)
    splits, _ = script.load_splits(DATA_DIR, sample=True)
    labels = splits["validation"].labels
    right, wrong = np.eye(100)[labels], np.eye(100)[(labels + 1) % 100]
    folder = tmp_path / "runs" / SCRIPT / "experiments"
    folder.mkdir(parents=True)
    for name, probabilities in (("baseline", right), ("other", 0.6 * wrong + 0.4 * right), ("third", wrong)):
        np.save(folder / f"{name} 0.npy", probabilities)
    monkeypatch.setattr(
        plan, "ENSEMBLES", {"two": [("baseline", 0), ("other", 0)], "all": [("other", 0), ("third", 0)]}
    )
    monkeypatch.setattr(plan, "planned_runs", lambda seed: [{"name": name, "seed": 0} for name in plan.ENSEMBLES])
    monkeypatch.setattr(script, "get_features", lambda arguments: None)
    script.main(["--experiments", "--sample", "--output-dir", str(tmp_path)])
    table = script.results.read_table(script.results.table_path(tmp_path, SCRIPT), numbers=("validation_accuracy",))
    assert table["validation_accuracy"].tolist() == [1.0, 0.0]
    assert table["changes"].tolist() == ["baseline 0, other 0", "other 0, third 0"]


def test_plan_compares_experiments_that_are_planned():
    plan = script.results.optional_module("experiments", SCRIPT)
    planned = [tuple(run.values()) for run in plan.planned_runs(0)]
    assert len(planned) == len(set(planned))
    names = {name for name, _ in planned}
    assert all(set(members) <= names for members in plan.COMPARISONS.values())
    for members in plan.ENSEMBLES.values():
        assert {(name, seed + offset) for name, seed in members for offset in range(plan.NUM_SEEDS)} <= set(planned)
    for name, changes in plan.EXPERIMENTS.items():
        dataclasses.replace(script.VggConfig() if name in plan.VGG else script.Config(), **changes)


def test_views_are_the_image_its_mirror_image_and_shifted_copies():
    views = list(script.augmented_views(IMAGES))
    assert len(views) == 6
    assert np.array_equal(views[0], IMAGES)
    assert np.array_equal(views[1], IMAGES[:, :, ::-1])
    assert np.array_equal(views[2][:, 1:, 1:], IMAGES[:, :-1, :-1])
    assert np.array_equal(views[4][:, :-1, :-1], IMAGES[:, 1:, 1:])


# --------------------------------------------------------------------------------------------------- the command line


def test_trained_network_is_restored_with_the_same_metrics(tmp_path):
    flags = ["--quick", "--sample", "--model", "own_1", "--output-dir", tmp_path]
    assert run_script(SCRIPT, "tensorflow", "--train", *flags).returncode == 0
    done = run_script(SCRIPT, "tensorflow", "--load", *flags)
    assert done.returncode == 0
    assert "DIFFERS" not in done.stdout
    rows = read_verification(SCRIPT, tmp_path)
    assert [row["metric"] for row in rows] == [
        "accuracy",
        "top_5_accuracy",
        "log_loss",
        "calibration_error",
        "augmented_accuracy",
    ]
    assert all(row["agrees"] for row in rows)


def test_one_network_on_vgg16_is_trained_and_measured_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "vgg16_weights", lambda data_dir: None)  # those that Keras starts with
    flags = ["--quick", "--sample", "--model", "vgg_top_block", "--output-dir", tmp_path]
    done = run_script(SCRIPT, "tensorflow", "--train", *flags)
    assert done.returncode == 0, done.stderr
    card = script.models.read_card(tmp_path / "saved_models" / SCRIPT / "vgg_top_block.keras")
    assert card["steps"] == 2 * -(-card["dataset"]["train"] // card["batch_size"])  # mirrored images, too
    assert all(row["agrees"] for row in read_verification(SCRIPT, tmp_path))
