"""The segmentation script: augmentation, networks, losses and metrics, and its command line."""

import dataclasses
import importlib
import json

import keras
import numpy as np
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY, read_verification, run_elsewhere, run_script
from PIL import Image

import voc_segmentation as task
from common import models, results, voc
from common.errors import UserError

SAVED = REPOSITORY / "saved_models" / task.SCRIPT
SIDE = task.IMAGE_SIZE
VOID = voc.VOID
SMALL = task.Config(widths=(4, 8), batch_size=8, epochs=3)
plan = importlib.import_module(f"experiments.{task.SCRIPT}")


@pytest.fixture(scope="module")
def sample():
    """The tracked sample: 15 training images, 1 for validation and 24 for testing."""
    return task.load_voc("/nowhere", SIDE, sample=True)[0]


# ---------------------------------------------------------------------------------------------------------------- data


def test_augmentation_moves_image_and_mask_alike():
    images = np.zeros((16, SIDE, SIDE, 3), np.uint8)
    images[:, 40:70, 50:60] = 255
    masks = np.where(images[..., 0] > 0, 5, 0).astype(np.uint8)
    layer = task.Augmentation(0)
    moved, labels = (keras.ops.convert_to_numpy(each) for each in layer(images, masks, training=True))
    # Recolouring keeps the order of brightness, so the object is what is brighter than half of its image's range.
    low, high = moved.min(axis=(1, 2, 3), keepdims=True), moved.max(axis=(1, 2, 3), keepdims=True)
    bright = (moved > (low + high) / 2).all(axis=3)
    assert set(np.unique(labels)) == {0, 5, VOID}
    assert np.mean(bright == (labels == 5)) > 0.995
    centers = np.array([np.argwhere(label == 5).mean(axis=0) for label in labels])
    assert np.ptp(centers, axis=0).min() > 10  # they were moved, and not all the same way


def test_augmentation_does_nothing_outside_training():
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    masks = np.full((2, SIDE, SIDE), VOID, np.uint8)
    same, labels = task.Augmentation(0)(images, masks, training=False)
    assert np.array_equal(same, images)
    assert np.array_equal(labels, masks)


# --------------------------------------------------------------------------------------------------------------- model


def test_the_two_unets_differ_in_the_upsampling_alone():
    transposed, bilinear = (task.build_network(task.CONFIGS[f"unet_{name}"]) for name in ("transposed", "bilinear"))
    assert transposed.count_params() == bilinear.count_params()

    def others(network):
        kinds = [type(layer).__name__ for layer in network.layers if not layer.name.startswith("upsample")]
        return [kind for kind in kinds if kind != "UpSampling2D"]

    assert others(transposed) == others(bilinear)
    upsampling = [layer for layer in transposed.layers if layer.name.startswith("upsample")]
    assert {type(layer) for layer in upsampling} == {keras.layers.Conv2DTranspose}
    for layer in upsampling:
        twin = bilinear.get_layer(layer.name)
        assert isinstance(twin, keras.layers.Conv2D)
        assert twin.kernel_size == layer.kernel_size
        assert twin.count_params() == layer.count_params()


@pytest.mark.parametrize("model", task.FROM_SCRATCH)
def test_networks_are_small_and_predict_probabilities(model):
    network = task.build_network(task.CONFIGS[model])
    assert network.count_params() <= 3_000_000
    probability = keras.ops.convert_to_numpy(network(np.full((1, SIDE, SIDE, 3), 255, np.uint8)))
    assert probability.shape == (1, SIDE, SIDE, 1)
    assert probability.dtype == np.float32
    assert 0 <= probability.min() <= probability.max() <= 1


def test_the_pretrained_encoder_without_a_network_is_one_line(monkeypatch):
    def refuse(*arguments, **keywords):
        raise Exception("URL fetch failure on https://storage.googleapis.com/...")

    monkeypatch.setattr(keras.applications, "MobileNetV2", refuse)
    with pytest.raises(UserError, match=r"could not be downloaded.*choose another --model"):
        task.build_network(task.CONFIGS["mobilenet_unet"])


def test_the_pretrained_encoder_gets_a_decoder_of_the_full_size(monkeypatch):
    build = keras.applications.MobileNetV2
    monkeypatch.setattr(keras.applications, "MobileNetV2", lambda **keywords: build(**{**keywords, "weights": None}))
    network = task.build_network(task.CONFIGS["mobilenet_unet"])
    assert network.output_shape == (None, SIDE, SIDE, 1)
    assert network.count_params() <= 3_000_000


def test_losses_by_hand():
    probability = np.array([[[0.5, 0.5], [0.9, 0.2]]], "float32")
    foreground = np.array([[[1.0, 0.0], [1.0, 0.0]]], "float32")
    valid = np.array([[[1.0, 1.0], [1.0, 0.0]]], "float32")
    assert float(task.cross_entropy(probability, foreground, valid)) == pytest.approx(
        -(2 * np.log(0.5) + np.log(0.9)) / 3, rel=1e-5
    )
    assert float(task.dice_loss(probability, foreground, valid)) == pytest.approx(1 - (2 * 1.4 + 1) / (1.9 + 2 + 1))
    nothing = np.zeros_like(probability)
    assert float(task.dice_loss(nothing, nothing, valid)) == 0
    assert float(task.cross_entropy(probability, foreground, nothing)) == 0


# ---------------------------------------------------------------------------------------------------------- evaluation


def mask_of(rows):
    return np.array([[{".": 0, "#": 7, "?": VOID}[character] for character in row] for row in rows], np.uint8)


TRUTH = mask_of(["##..", "##..", "....", "???."])
PREDICTED = mask_of(["#...", "##..", "#...", "###."]) == 7  # 3 of 4 found, one too many; what is void does not count


def test_metrics_by_hand():
    measured = task.measure(np.where(PREDICTED, 0.8, 0.1)[None], TRUTH[None])
    assert measured["foreground_iou"] == pytest.approx(3 / 5)
    assert measured["dice"] == pytest.approx(6 / 8)
    assert measured["pixel_accuracy"] == pytest.approx(11 / 13)
    assert measured["mean_iou"] == pytest.approx((3 / 5 + 8 / 10) / 2)
    assert measured["precision"] == measured["recall"] == pytest.approx(3 / 4)
    assert measured["foreground_iou_per_picture"] == pytest.approx(3 / 5)
    assert measured["dice_per_picture"] == pytest.approx(6 / 8)
    assert measured["calibration_error"] == pytest.approx((4 * abs(0.8 - 3 / 4) + 9 * abs(0.1 - 1 / 9)) / 13)


def test_per_image_and_over_all_pixels_are_different_means():
    large, small = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    large[:8], small[0, 0] = 3, 3
    predicted = np.stack([large > 0, np.zeros((10, 10), bool)])
    measured = task.measure(predicted.astype(float), np.stack([large, small]))
    assert measured["foreground_iou"] == pytest.approx(80 / 81)
    assert measured["foreground_iou_per_picture"] == pytest.approx(0.5)


def test_empty_predictions_empty_masks_and_void_images():
    empty, void = np.zeros((4, 4), np.uint8), np.full((4, 4), VOID, np.uint8)
    nothing = np.zeros((4, 4), bool)
    predicted = np.stack([nothing, nothing, PREDICTED, PREDICTED])
    dice, iou = task.overlaps(predicted, np.stack([TRUTH, empty, empty, void]))
    assert dice[:3].tolist() == iou[:3].tolist() == [0, 1, 0]
    assert np.isnan(dice[3])
    assert np.isnan(iou[3])
    assert task.boundary_score(nothing, empty) == 1
    assert task.boundary_score(nothing, TRUTH) == task.boundary_score(PREDICTED, empty) == 0
    assert np.isnan(task.boundary_score(PREDICTED, void))
    measured = task.measure(np.zeros((1, 4, 4)), empty[None])
    assert measured["foreground_iou"] == measured["dice"] == measured["precision"] == measured["recall"] == 1
    with_void = task.measure(predicted[2:].astype(float), np.stack([TRUTH, void]))
    alone = task.measure(predicted[2:3].astype(float), TRUTH[None])
    assert with_void == alone


def test_outlines_match_within_two_pixels():
    truth = np.zeros((40, 40), np.uint8)
    truth[10:30, 10:30] = 1
    for shift, score in ((0, 1.0), (2, 1.0)):
        predicted = np.roll(truth, shift, 0) > 0
        assert task.boundary_score(predicted, truth) == pytest.approx(score), shift
    assert 0.3 < task.boundary_score(np.roll(truth, 5, 0) > 0, truth) < 0.9
    small = np.zeros((40, 40), bool)
    small[2:6, 2:6] = True  # nowhere near
    assert task.boundary_score(small, truth) == 0


def test_outlines_are_not_where_void_begins():
    truth = np.zeros((40, 60), np.uint8)
    truth[:8] = truth[-8:] = VOID  # padding
    truth[15:30, 15:30] = VOID  # the border that annotators leave
    truth[17:28, 17:28] = 4
    square = np.zeros((40, 60), bool)
    square[16:29, 16:29] = True
    assert task.boundary_score(square, truth) == 1
    junk = square.copy()
    junk[:8, ::2] = True  # in the padding, where nobody looks
    assert task.boundary_score(junk, truth) == 1
    assert task.boundary_score(np.ones((40, 60), bool), truth) == 0
    assert task.boundary_score(np.zeros((40, 60), bool), truth) == 0


def test_checkerboards_are_told_from_smooth_maps():
    rows = np.arange(16)
    stripes = np.broadcast_to(rows % 2, (1, 16, 16)).astype(float)
    assert task.checkerboard(stripes) == pytest.approx(1)
    assert task.checkerboard((rows[:, None] + rows) % 2 * np.ones((1, 1, 1))) == pytest.approx(1)
    smooth = np.broadcast_to(np.sin(2 * np.pi * rows / 16), (1, 16, 16))
    assert task.checkerboard(smooth) == pytest.approx(0, abs=1e-9)
    assert task.checkerboard(np.zeros((1, 16, 16))) == 0


def test_the_average_mask_is_cut_where_it_fits_the_training_images():
    masks = np.zeros((4, SIDE, SIDE), np.uint8)
    masks[:, 30:90, 30:90] = 1
    masks[0, :20] = 1  # seen once in four: not worth calling it foreground
    examples = voc.SegmentationImages(np.zeros((4, SIDE, SIDE, 3), np.uint8), masks, np.array(list("abcd")))
    measured = task.baselines(examples, examples.take(slice(1, 4)))
    assert measured["average_mask"]["foreground_iou"] == 1
    assert measured["all_background"]["foreground_iou"] == 0
    assert measured["all_foreground"]["foreground_iou"] == pytest.approx(3600 / SIDE**2)


def test_the_largest_object_gives_an_image_its_class():
    masks = np.stack([mask_of(["#..", "...", "..."]), mask_of(["???", "...", "..."])])
    masks[0, 1:] = 15
    assert task.dominant_class(masks).tolist() == [15, 0]


def test_experiments_change_one_factor_each_and_the_baseline_has_five_seeds():
    for name, changes in plan.EXPERIMENTS.items():
        assert len(changes) == (name != "baseline"), name
        assert dataclasses.replace(task.Config(), **changes) != task.Config() or name == "baseline", name
    names = [name for name, _ in plan.RUNS]
    assert names[:5] == ["baseline"] * 5
    assert {name: names.count(name) for name in names[5:]} == dict.fromkeys(list(plan.EXPERIMENTS)[1:], 2)


# ------------------------------------------------------------------------------------------------------------ training


def test_the_best_epoch_is_kept_also_beyond_a_resume(sample, tmp_path, monkeypatch):
    network = keras.Sequential([keras.Input((SIDE, SIDE, 3)), keras.layers.Conv2D(1, 1, activation="sigmoid")])

    def epoch(number, probability):
        monkeypatch.setattr(task, "predict", lambda network, images: np.full(images.shape[:3], probability))
        network.set_weights([np.full_like(each, number) for each in network.get_weights()])
        task.BestEpoch(network, sample["validation"], tmp_path).on_epoch_end(number, {})

    epoch(0, 0.0)
    epoch(1, 1.0)  # calling everything an object is better than nothing
    epoch(2, 0.0)
    assert task.BestEpoch(network, sample["validation"], tmp_path).restore() == 2
    assert {float(each.ravel()[0]) for each in network.get_weights()} == {1.0}
    assert json.loads((tmp_path / "best.json").read_text())["epoch"] == 2


@pytest.fixture(scope="module")
def trained(sample, tmp_path_factory):
    """What `train_network` returned for a small U-Net, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return task.train_network(SMALL, sample, 0, folder, resume=False), folder


def test_a_run_that_was_stopped_resumes_as_if_it_had_not(sample, trained, tmp_path, monkeypatch):
    predict, calls = task.predict, []

    def stop(network, images):
        calls.append(images)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(network, images)

    with monkeypatch.context() as patch:
        patch.setattr(task, "predict", stop)
        with pytest.raises(KeyboardInterrupt):
            task.train_network(SMALL, sample, 0, tmp_path, resume=False)
    resumed = task.train_network(SMALL, sample, 0, tmp_path, resume=True)
    whole, _ = trained
    assert len(whole[2]["curves"]["loss"]) == len(whole[2]["curves"]["validation_dice"]) == 3
    assert resumed[2]["curves"] == whole[2]["curves"]
    assert resumed[1] == whole[1] == np.argmax(whole[2]["curves"]["validation_dice"]) + 1
    assert all(np.array_equal(*pair) for pair in zip(resumed[0].get_weights(), whole[0].get_weights(), strict=True))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("best.json", None),
        ("best.json", ""),
        ("best.json", "[]"),
        ("best.json", '{"epoch": true, "validation_dice": 0.5}'),
        ("best.json", '{"epoch": 0, "validation_dice": 0.5}'),
        ("best.json", '{"epoch": 1, "validation_dice": NaN}'),
        ("best.weights.h5", "no weights"),
    ],
)
def test_a_damaged_best_epoch_is_one_line(name, content, sample, trained):
    path = trained[1] / "best" / name
    before = path.read_bytes()
    path.unlink() if content is None else path.write_text(content)
    try:
        with pytest.raises(UserError, match=r"is (damaged|missing).*start over without --resume$") as error:
            task.train_network(SMALL, sample, 0, trained[1], resume=True)
    finally:
        path.write_bytes(before)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_the_loss_of_a_config_is_what_is_minimised(sample):
    class Inputs(keras.layers.Layer):
        def call(self, inputs):
            return inputs["images"][..., :1] / 255, inputs["masks"]

    shapes = {"images": (SIDE, SIDE, 3), "masks": (SIDE, SIDE)}
    inputs = {name: keras.Input(shape, name=name) for name, shape in shapes.items()}
    some = sample["test"].take(slice(2))
    data = {"images": some.images.astype("float32"), "masks": some.masks.astype("float32")}
    values = {}
    for loss, functions in task.LOSSES.items():
        model = task.SegmentationModel(inputs, Inputs()(inputs), functions)
        values[loss] = float(model.compute_loss(y_pred=model(data)))
    assert values["both"] == pytest.approx(values["cross-entropy"] + values["dice"], rel=1e-5)
    assert values["cross-entropy"] != pytest.approx(values["dice"], rel=0.01)


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """A finished `--train --quick --sample` with smaller U-Nets: its flags and its folder."""
    output_dir = tmp_path_factory.mktemp("quick")
    flags = ["--quick", "--sample", "--output-dir", output_dir]
    with pytest.MonkeyPatch.context() as patch:
        for model in ("unet_transposed", "unet_bilinear"):
            patch.setitem(task.CONFIGS, model, dataclasses.replace(task.CONFIGS[model], widths=SMALL.widths))
        done = run_script(task.SCRIPT, "tensorflow", "--train", *flags)
    assert done.returncode == 0, done.stderr
    assert "DIFFERS" not in done.stdout
    return flags, output_dir


def test_train_writes_cards_results_and_figures(quick):
    _, output_dir = quick
    trained = json.loads((output_dir / "report" / "results" / f"{task.SCRIPT}.json").read_text())
    assert trained["pictures"] == {"train": 15, "validation": 1, "test": 24}
    assert list(trained["models"]) == list(task.FROM_SCRATCH)
    assert trained["models"]["unet_bilinear"]["number_of_seeds"] == 1
    for model in task.FROM_SCRATCH:
        card = models.read_card(output_dir / "saved_models" / task.SCRIPT / f"{model}.keras")
        assert card["metrics"].keys() == {"train", "validation", "test", "sample"}
        assert card["metrics"]["sample"] == card["metrics"]["test"] == trained["models"][model]["test"]
        assert card["dataset"]["sample"] == 24
        assert card["kept_epoch"] == 1
    folder = output_dir / "report" / "figures" / task.SCRIPT
    figures = ("data", "predictions", "best_and_worst", "disagreement", "upsampling", "classes", "precision_recall")
    for figure in (*figures, "learning_curves"):
        assert (folder / f"{figure}.png").stat().st_size > 10_000


def test_load_reproduces_the_metrics_of_train_and_records_nothing(quick, monkeypatch):
    flags, output_dir = quick
    kept = [path for folder in ("saved_models", "report") for path in (output_dir / folder).rglob("*.*")]
    before = {path: path.read_bytes() for path in kept}
    monkeypatch.setattr(results, "optional_module", lambda kind, script: None)  # figures were drawn before
    done = run_script(task.SCRIPT, "tensorflow", "--load", *flags)
    assert done.returncode == 0, done.stderr
    rows = read_verification(task.SCRIPT, output_dir)
    assert [row["agrees"] for row in rows] == [True] * len(task.FROM_SCRATCH) * 12
    assert {path: path.read_bytes() for path in kept} == before


def test_jax_trains_what_stock_keras_opens_from_an_empty_directory(tmp_path):
    code = f"""
import sys, dataclasses
sys.path.insert(0, {str(REPOSITORY)!r})
import voc_segmentation as task
task.CONFIGS["unet_bilinear"] = dataclasses.replace(task.CONFIGS["unet_bilinear"], widths=(4, 8))
task.report = lambda arguments: 0
flags = ["--train", "--quick", "--sample", "--model", "unet_bilinear", "--output-dir", {str(tmp_path)!r}]
print("exit code", task.main(flags))
"""
    printed = run_elsewhere(code, tmp_path, KERAS_BACKEND="jax", XLA_FLAGS=QUICK_COMPILATION)
    assert "exit code 0" in printed
    code = (
        "import sys, keras, numpy as np; m = keras.saving.load_model(sys.argv[1], safe_mode=True, compile=False);"
        "print(keras.backend.backend(), m.predict(np.zeros((2, 128, 128, 3), 'uint8'), verbose=0).shape)"
    )
    path = tmp_path / "saved_models" / task.SCRIPT / "unet_bilinear.keras"
    assert "tensorflow (2, 128, 128, 1)" in run_elsewhere(code, tmp_path, path, KERAS_BACKEND="tensorflow")


def test_experiments_resume_where_they_stopped(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "Config", lambda **changes: dataclasses.replace(SMALL, **changes))
    flags = ["--quick", "--sample", "--output-dir", tmp_path]
    for count in (2, 4):
        if count == 4:  # that the network is trained was seen with the first two
            monkeypatch.setattr(task, "train_network", lambda *arguments, **keywords: trained[0])
        done = run_script(task.SCRIPT, "tensorflow", "--experiments", *flags)
        assert done.returncode == 0, done.stderr
        table = results.read_table(results.table_path(tmp_path, task.SCRIPT), numbers=task.METRICS, texts=("name",))
        assert [*zip(table["name"], table["seed"].astype(int), strict=True)] == list(plan.RUNS)[:count]


# ---------------------------------------------------------------------------------------------------- images of users


def test_predict_writes_masks_of_the_original_size_and_overwrites_nothing(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 120, 3), dtype=np.uint8))
    noise.save(tmp_path / "tall.jpg")
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    noise.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "words.txt").write_text("no image")
    (tmp_path / "tall_mask.png").write_text("of the user")
    files = [tmp_path / name for name in ("words.txt", "tall.jpg", "turned.jpg")]
    done = run_script(task.SCRIPT, "tensorflow", "--output-dir", tmp_path / "empty", "--predict", *files)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "words.txt is not an image" in done.stderr
    assert (tmp_path / "tall_mask.png").read_text() == "of the user"
    for name, shape in (("tall_2", (301, 120)), ("turned", (120, 301))):
        mask = np.asarray(Image.open(tmp_path / f"{name}_mask.png"))
        assert mask.shape == shape
        assert set(np.unique(mask)) <= {0, 255}
        assert Image.open(tmp_path / f"{name}_overlay.png").size == shape[::-1]


def test_a_prediction_lands_where_the_object_is(tmp_path):
    """A network that calls red things objects marks the red part of an image that is not square."""
    images = keras.Input((SIDE, SIDE, 3))
    red = keras.layers.Conv2D(1, 1, activation="sigmoid", use_bias=False)
    network = keras.Model(images, red(images))
    red.set_weights([np.array([1.0, -1.0, -1.0]).reshape(1, 1, 3, 1)])
    pixels = np.full((50, 200, 3), 200, np.uint8)
    pixels[10:30, 20:80] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    mask, overlay = task.predict_file(network, tmp_path / "wide.png")
    found = np.asarray(Image.open(mask)) == 255
    truth = np.zeros((50, 200), bool)
    truth[10:30, 20:80] = True
    assert np.sum(found & truth) / np.sum(found | truth) > 0.9
    colors = np.asarray(Image.open(overlay)).astype(int)
    assert np.abs(colors[20, 50] - (127, 57, 89)).max() <= 1  # half red, half the colour of objects
    assert np.abs(colors[40, 150] - (233, 233, 233)).max() <= 1  # faded


# -------------------------------------------------------------------------------------------------------- saved models


@pytest.mark.parametrize("model", task.FROM_SCRATCH)
def test_saved_model_is_what_its_card_says(model, sample):
    network, card = models.load_model(SAVED / f"{model}.keras", task.SCRIPT, task.INPUT_SHAPE)
    assert card["parameters"]["total"] == network.count_params() <= 3_000_000
    config = dataclasses.asdict(task.CONFIGS[model])
    assert card["config"] == {**config, "widths": list(config["widths"])}
    assert [each["seed"] for each in card["seeds"]] == list(range(task.NUM_SEEDS[model]))
    measured = task.evaluate(network, sample["test"])[0]
    rows = results.compare(card, measured, part="sample", size=24, sha256=None)
    assert [row["agrees"] for row in rows] == [True] * 12
    # Layers are named otherwise than when it was saved; their order and shapes are the same.
    rebuilt = task.build_network(task.CONFIGS[model])
    rebuilt.set_weights(network.get_weights())
    few = sample["test"].images[:2]
    assert np.allclose(rebuilt(few), network(few), atol=1e-6)


def test_results_are_what_cards_and_experiments_say():
    recorded = json.loads((REPOSITORY / "report" / "results" / f"{task.SCRIPT}.json").read_text())
    cards = {model: models.read_card(SAVED / f"{model}.keras") for model in task.FROM_SCRATCH}
    measured = {model: card["metrics"]["test"] for model, card in cards.items()}
    path = results.table_path(REPOSITORY, task.SCRIPT)
    table = results.read_table(path, numbers=task.METRICS, texts=("name", "seed", "epochs"))
    assert task.summarise(cards, measured, recorded["references"], table) == recorded


def test_saved_models_are_small_together():
    assert sum(path.stat().st_size for path in SAVED.iterdir()) < 20e6
