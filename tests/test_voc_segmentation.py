"""The segmentation script: its data handling, losses, metrics and networks, and its command line on both backends."""

import dataclasses
import hashlib
import json
import os
import tarfile
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import REPOSITORY, run_elsewhere, run_script
from PIL import Image

import voc_segmentation as task
from common import runs
from common.cli import UserError

SAVED = REPOSITORY / "saved_models" / task.SCRIPT
SIDE = task.IMAGE_SIZE


def write_voc(folder, training=24, test=14, size=(60, 40)):
    """Writes a folder in VOC's layout: grey pictures in which a red square is the object, with a void border."""
    generator = np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for part, count in (("train", training), ("val", test)):
        names = [f"{part}_{number:03}" for number in range(count)]
        for name in names:
            pixels = np.full((size[1], size[0], 3), 128, np.uint8)
            mask = np.zeros((size[1], size[0]), np.uint8)
            top, left = generator.integers(2, 18, 2)
            mask[top - 1 : top + 17, left - 1 : left + 17] = task.VOID
            mask[top : top + 16, left : left + 16] = 12
            pixels[mask == 12] = (220, 30, 30)
            Image.fromarray(pixels).save(folder / "JPEGImages" / f"{name}.jpg")
            Image.fromarray(mask).save(folder / "SegmentationClass" / f"{name}.png")
        (folder / "ImageSets/Segmentation" / f"{part}.txt").write_text("\n".join(names) + "\n")
    return folder


@pytest.fixture(scope="module")
def voc_dir(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("voc")
    write_voc(data_dir / "VOCdevkit" / "VOC2012")
    return data_dir


# ---------------------------------------------------------------------------------------------------------------- data


def test_pictures_and_masks_are_squares_with_void_around(voc_dir):
    pictures, _ = task.load_pictures(voc_dir)
    assert [len(pictures[part].names) for part in ("train", "validation", "test")] == [22, 2, 14]
    some = pictures["test"]
    assert some.images.shape == (14, SIDE, SIDE, 3)
    assert some.masks.shape == (14, SIDE, SIDE)
    assert set(np.unique(some.masks)) == {0, 12, task.VOID}
    padding = (SIDE - round(40 * SIDE / 60)) // 2
    assert (some.masks[:, :padding] == task.VOID).all()
    assert (some.masks[:, padding + 4, 0] == 0).all()
    assert (some.images[:, :padding] == 0).all()
    red = some.images[..., 0].astype(int) - some.images[..., 1]
    assert red[some.masks == 12].mean() > 150
    assert red[some.masks == 0].mean() < 5


def test_validation_is_the_same_every_time_and_apart_from_training(voc_dir):
    first, checksums = task.load_pictures(voc_dir)
    second, again = task.load_pictures(voc_dir)
    assert first["validation"].names.tolist() == second["validation"].names.tolist()
    assert checksums == again
    parts = [set(first[part].names.tolist()) for part in ("train", "validation", "test")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_the_cache_is_enough_and_a_damaged_one_is_made_again(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2012", 10, 2)
    before, _ = task.load_pictures(tmp_path)
    folder.rename(tmp_path / "elsewhere")
    after, _ = task.load_pictures(tmp_path)
    assert np.array_equal(before["test"].images, after["test"].images)
    (tmp_path / "elsewhere").rename(folder)
    cached = tmp_path / "cache" / f"{task.SCRIPT}_{SIDE}" / "test_masks.npy"
    cached.write_bytes(cached.read_bytes()[:1000])
    again, _ = task.load_pictures(tmp_path)
    assert np.array_equal(before["test"].masks, again["test"].masks)


def test_longer_lists_and_their_masks_are_preferred(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2012", 10, 2)
    lists = folder / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").write_text((lists / "train.txt").read_text() + "val_001\n")
    (folder / "SegmentationClass").rename(folder / "SegmentationClassAug")
    pictures, _ = task.load_pictures(tmp_path)
    assert len(pictures["train"].names) + len(pictures["validation"].names) == 11


def test_unusable_files_are_named_and_left_out(tmp_path, capsys):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2012", 12, 2)
    masks = folder / "SegmentationClass"
    (masks / "train_001.png").unlink()
    damaged = folder / "JPEGImages" / "train_002.jpg"
    damaged.write_bytes(damaged.read_bytes()[:300])
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(masks / "train_003.png")
    Image.new("RGB", (60, 40)).save(masks / "train_004.png")
    pictures, _ = task.load_pictures(tmp_path)
    assert len(pictures["train"].names) + len(pictures["validation"].names) == 8
    *lines, count = capsys.readouterr().err.splitlines()
    assert len(lines) == 4
    for line, words in zip(lines, ("001.png is missing", "002.jpg is damaged", "003", "palette"), strict=True):
        assert line.startswith("left out: ")
        assert words in line
    assert count == "4 of 12 pictures of train.txt were left out"


def test_a_folder_without_lists_or_without_pictures_is_one_line(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2012", 2, 1)
    for path in (folder / "JPEGImages").glob("train*"):
        path.unlink()
    with pytest.raises(UserError, match=r"no picture of .*train\.txt can be used"):
        task.load_pictures(tmp_path)
    (folder / "ImageSets" / "Segmentation" / "val.txt").unlink()
    with pytest.raises(UserError, match=r"val\.txt is missing"):
        task.load_pictures(tmp_path)


@pytest.fixture
def official_archive(tmp_path, monkeypatch):
    """An archive in place of the official one, at the second of its addresses; the first does not answer."""
    write_voc(tmp_path / "made" / "VOCdevkit" / "VOC2012", 10, 2)
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as members:
        members.add(tmp_path / "made" / "VOCdevkit", "VOCdevkit")
    monkeypatch.setattr(task, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(task, "ARCHIVE_SOURCES", ((tmp_path / "none.tar").as_uri(), archive.as_uri()))
    return archive


def test_the_archive_is_downloaded_checked_and_unpacked(official_archive, tmp_path):
    folder = task.voc_folder(tmp_path / "data")
    assert folder == tmp_path / "data" / "VOCdevkit" / "VOC2012"
    assert len(list((folder / "JPEGImages").iterdir())) == 12
    assert len(task.load_pictures(tmp_path / "data")[0]["test"].names) == 2


def test_an_archive_put_there_by_hand_needs_no_network(official_archive, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "ARCHIVE_SOURCES", ((tmp_path / "none.tar").as_uri(),))
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    official_archive.rename(downloads / task.ARCHIVE)
    assert (task.voc_folder(tmp_path / "data") / "SegmentationClass" / "val_000.png").exists()


def test_a_wrong_checksum_is_refused(official_archive, tmp_path, monkeypatch):
    monkeypatch.setattr(task, "ARCHIVE_MD5", "0" * 32)
    with pytest.raises(UserError, match="by hand into"):
        task.voc_folder(tmp_path / "data")
    assert not (tmp_path / "data" / "VOCdevkit").exists()


def test_augmentation_moves_picture_and_mask_alike():
    images = np.zeros((16, SIDE, SIDE, 3), np.uint8)
    images[:, 40:70, 50:60] = 255
    masks = np.where(images[..., 0] > 0, 5, 0).astype(np.uint8)
    layer = task.Augmentation(0)
    moved, labels = (keras.ops.convert_to_numpy(each) for each in layer(images, masks, training=True))
    # Recolouring keeps the order of brightness, so the object is what is brighter than half of its picture's range.
    low, high = moved.min(axis=(1, 2, 3), keepdims=True), moved.max(axis=(1, 2, 3), keepdims=True)
    bright = (moved > (low + high) / 2).all(axis=3)
    assert set(np.unique(labels)) == {0, 5, task.VOID}
    assert np.mean(bright == (labels == 5)) > 0.995
    centers = np.array([np.argwhere(label == 5).mean(axis=0) for label in labels])
    assert np.ptp(centers, axis=0).min() > 10  # they were moved, and not all the same way


def test_augmentation_does_nothing_outside_training():
    images = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE, 3), dtype=np.uint8)
    masks = np.full((2, SIDE, SIDE), task.VOID, np.uint8)
    same, labels = task.Augmentation(0)(images, masks, training=False)
    assert np.array_equal(same, images)
    assert np.array_equal(labels, masks)


# ------------------------------------------------------------------------------------------------------------ networks


def test_the_two_unets_differ_in_the_upsampling_alone():
    transposed, bilinear = (task.build_network(task.RECIPES[f"unet_{name}"]) for name in ("transposed", "bilinear"))
    assert transposed.count_params() == bilinear.count_params()

    def others(network):
        kinds = [type(layer).__name__ for layer in network.layers if not layer.name.startswith("enlarge")]
        return [kind for kind in kinds if kind != "UpSampling2D"]

    assert others(transposed) == others(bilinear)
    enlarging = [layer for layer in transposed.layers if layer.name.startswith("enlarge")]
    assert {type(layer) for layer in enlarging} == {keras.layers.Conv2DTranspose}
    for layer in enlarging:
        twin = bilinear.get_layer(layer.name)
        assert isinstance(twin, keras.layers.Conv2D)
        assert twin.kernel_size == layer.kernel_size
        assert twin.count_params() == layer.count_params()


@pytest.mark.parametrize("model", task.FROM_SCRATCH)
def test_networks_are_small_and_answer_with_probabilities(model):
    network = task.build_network(task.RECIPES[model])
    assert network.count_params() <= 3_000_000
    answer = keras.ops.convert_to_numpy(network(np.full((1, SIDE, SIDE, 3), 255, np.uint8)))
    assert answer.shape == (1, SIDE, SIDE, 1)
    assert answer.dtype == np.float32
    assert 0 <= answer.min() <= answer.max() <= 1


def test_the_pretrained_encoder_without_a_network_is_one_line(monkeypatch):
    def refuse(*arguments, **keywords):
        raise Exception("URL fetch failure on https://storage.googleapis.com/...")

    monkeypatch.setattr(keras.applications, "MobileNetV2", refuse)
    with pytest.raises(UserError, match=r"could not be downloaded.*choose another --model"):
        task.build_network(task.RECIPES["mobilenet_unet"])


def test_the_pretrained_encoder_gets_a_decoder_of_the_full_size(monkeypatch):
    build = keras.applications.MobileNetV2
    monkeypatch.setattr(keras.applications, "MobileNetV2", lambda **keywords: build(**{**keywords, "weights": None}))
    network = task.build_network(task.RECIPES["mobilenet_unet"])
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
    return np.array([[{".": 0, "#": 7, "?": task.VOID}[character] for character in row] for row in rows], np.uint8)


TRUTH = mask_of(["##..", "##..", "....", "???."])
ANSWER = mask_of(["#...", "##..", "#...", "###."]) == 7  # 3 of 4 found, one too many; what is void does not count


def test_metrics_by_hand():
    measured = task.measure(np.where(ANSWER, 0.8, 0.1)[None], TRUTH[None])
    assert measured["foreground_iou"] == pytest.approx(3 / 5)
    assert measured["dice"] == pytest.approx(6 / 8)
    assert measured["pixel_accuracy"] == pytest.approx(11 / 13)
    assert measured["mean_iou"] == pytest.approx((3 / 5 + 8 / 10) / 2)
    assert measured["precision"] == measured["recall"] == pytest.approx(3 / 4)
    assert measured["foreground_iou_per_picture"] == pytest.approx(3 / 5)
    assert measured["dice_per_picture"] == pytest.approx(6 / 8)
    assert measured["calibration_error"] == pytest.approx((4 * abs(0.8 - 3 / 4) + 9 * abs(0.1 - 1 / 9)) / 13)


def test_per_picture_and_over_all_pixels_are_different_means():
    large, small = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    large[:8], small[0, 0] = 3, 3
    answers = np.stack([large > 0, np.zeros((10, 10), bool)])
    measured = task.measure(answers.astype(float), np.stack([large, small]))
    assert measured["foreground_iou"] == pytest.approx(80 / 81)
    assert measured["foreground_iou_per_picture"] == pytest.approx(0.5)


def test_empty_answers_empty_truths_and_void_pictures():
    empty, void = np.zeros((4, 4), np.uint8), np.full((4, 4), task.VOID, np.uint8)
    nothing = np.zeros((4, 4), bool)
    answers = np.stack([nothing, nothing, ANSWER, ANSWER])
    dice, union = task.overlaps(answers, np.stack([TRUTH, empty, empty, void]))
    assert dice[:3].tolist() == union[:3].tolist() == [0, 1, 0]
    assert np.isnan(dice[3])
    assert np.isnan(union[3])
    assert task.boundary_score(nothing, empty) == 1
    assert task.boundary_score(nothing, TRUTH) == task.boundary_score(ANSWER, empty) == 0
    assert np.isnan(task.boundary_score(ANSWER, void))
    measured = task.measure(np.zeros((1, 4, 4)), empty[None])
    assert measured["foreground_iou"] == measured["dice"] == measured["precision"] == measured["recall"] == 1
    with_void = task.measure(answers[2:].astype(float), np.stack([TRUTH, void]))
    alone = task.measure(answers[2:3].astype(float), TRUTH[None])
    assert with_void == alone


def test_outlines_match_within_two_pixels():
    truth = np.zeros((40, 40), np.uint8)
    truth[10:30, 10:30] = 1
    for shift, score in ((0, 1.0), (2, 1.0)):
        answer = np.roll(truth, shift, 0) > 0
        assert task.boundary_score(answer, truth) == pytest.approx(score), shift
    assert 0.3 < task.boundary_score(np.roll(truth, 5, 0) > 0, truth) < 0.9
    small = np.zeros((40, 40), bool)
    small[2:6, 2:6] = True  # nowhere near
    assert task.boundary_score(small, truth) == 0


def test_outlines_are_not_where_void_begins():
    truth = np.zeros((40, 60), np.uint8)
    truth[:8] = truth[-8:] = task.VOID  # padding
    truth[15:30, 15:30] = task.VOID  # the border that annotators leave
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


def test_the_average_mask_is_cut_where_it_fits_the_training_pictures():
    masks = np.zeros((4, SIDE, SIDE), np.uint8)
    masks[:, 30:90, 30:90] = 1
    masks[0, :20] = 1  # seen once in four: not worth calling it foreground
    pictures = task.Pictures(np.zeros((4, SIDE, SIDE, 3), np.uint8), masks, np.array(list("abcd")))
    measured = task.baselines(pictures, pictures.take(slice(1, 4)))
    assert measured["average_mask"]["foreground_iou"] == 1
    assert measured["all_background"]["foreground_iou"] == 0
    assert measured["all_foreground"]["foreground_iou"] == pytest.approx(3600 / SIDE**2)


def test_the_largest_object_gives_a_picture_its_class():
    masks = np.stack([mask_of(["#..", "...", "..."]), mask_of(["???", "...", "..."])])
    masks[0, 1:] = 15
    assert task.dominant_class(masks).tolist() == [15, 0]


def test_the_best_epoch_is_kept_also_beyond_a_resume(voc_dir, tmp_path, monkeypatch):
    pictures, _ = task.load_pictures(voc_dir)
    network = keras.Sequential([keras.Input((SIDE, SIDE, 3)), keras.layers.Conv2D(1, 1, activation="sigmoid")])

    def epoch(number, answer):
        monkeypatch.setattr(task, "predict", lambda network, images: np.full(images.shape[:3], answer))
        network.set_weights([np.full_like(each, number) for each in network.get_weights()])
        task.ValidationScore(network, pictures["validation"], tmp_path).on_epoch_end(number, {})

    epoch(0, 0.0)
    epoch(1, 1.0)  # calling everything an object is better than nothing
    epoch(2, 0.0)
    network.load_weights(tmp_path / "best.weights.h5")
    assert {float(each.ravel()[0]) for each in network.get_weights()} == {1.0}
    assert json.loads((tmp_path / "best.json").read_text())["epoch"] == 2


def test_experiments_change_one_factor_each():
    baseline = dataclasses.asdict(task.BASELINE)
    for name, recipe in task.EXPERIMENTS.items():
        changed = [key for key, value in dataclasses.asdict(recipe).items() if value != baseline[key]]
        assert len(changed) == (name != "baseline"), name


# -------------------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module", params=["tensorflow", "jax"])
def quick(request, voc_dir, tmp_path_factory):
    """A finished `--train --quick`: its backend, its folders, its models. JAX compiles for long: one model will do."""
    output_dir = tmp_path_factory.mktemp(request.param)
    models = ["unet_bilinear"] if request.param == "jax" else task.FROM_SCRATCH
    flags = ["--quick", "--data-dir", voc_dir, "--output-dir", output_dir]
    flags += ["--model", *models] if request.param == "jax" else []
    done = run_script(task.SCRIPT, request.param, "--train", *flags)
    assert done.returncode == 0, done.stderr
    return request.param, output_dir, flags, models


def test_load_reproduces_the_metrics_of_train(quick):
    backend, output_dir, flags, _ = quick
    path = output_dir / "report" / "results" / f"{task.SCRIPT}.json"
    trained = json.loads(path.read_text())
    assert trained["models"]["unet_bilinear"]["number_of_seeds"] == 1
    if backend == "jax":  # compiles for long on a CPU; the other backend shows that restoring works
        return
    path.unlink()
    done = run_script(task.SCRIPT, backend, "--load", *flags, fresh=True)
    assert done.returncode == 0, done.stderr
    assert "differs" not in done.stdout
    assert json.loads(path.read_text()) == trained
    drawings = output_dir / "report" / "figures" / task.SCRIPT
    for figure in ("data", "predictions", "best_and_worst", "disagreement", "upsampling", "learning_curves"):
        assert (drawings / f"{figure}.png").stat().st_size > 10_000


def test_stock_keras_opens_the_saved_models_from_an_empty_directory(quick, tmp_path):
    _, output_dir, _, models = quick
    code = (
        "import sys, keras, numpy as np; m = keras.saving.load_model(sys.argv[1], safe_mode=True, compile=False);"
        "print(m.predict(np.zeros((2, 128, 128, 3), 'uint8'), verbose=0).shape)"
    )
    path = output_dir / "saved_models" / task.SCRIPT / f"{models[-1]}.keras"
    # TensorFlow for both: it starts sooner, and opens what was trained on JAX.
    assert "(2, 128, 128, 1)" in run_elsewhere(code, tmp_path, path, KERAS_BACKEND="tensorflow")


def test_experiments_resume_where_they_stopped(voc_dir, tmp_path, monkeypatch):
    small = {name: dataclasses.replace(recipe, widths=(4, 8)) for name, recipe in task.EXPERIMENTS.items()}
    monkeypatch.setattr(task, "EXPERIMENTS", small)
    flags = ["--quick", "--data-dir", voc_dir, "--output-dir", tmp_path]
    for count in (2, 4):
        done = run_script(task.SCRIPT, "tensorflow", "--experiments", *flags)
        assert done.returncode == 0, done.stderr
        rows = runs.read_rows(runs.experiments_table(tmp_path, task.SCRIPT))
        assert [row["name"] for row in rows] == list(task.EXPERIMENTS)[:count]


def test_predict_writes_masks_of_the_original_size(quick, tmp_path):
    backend, output_dir, _, _ = quick
    if backend == "jax":
        return
    tall = tmp_path / "tall.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 120, 3), dtype=np.uint8)).save(tall)
    (tmp_path / "words.txt").write_text("no picture")
    files = [tmp_path / "words.txt", tall]
    done = run_script(task.SCRIPT, backend, "--output-dir", output_dir, "--predict", *files)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "words.txt cannot be read" in done.stderr
    mask = np.asarray(Image.open(tmp_path / "tall_mask.png"))
    assert mask.shape == (301, 120)
    assert set(np.unique(mask)) <= {0, 255}
    assert Image.open(tmp_path / "tall_overlay.png").size == (120, 301)


def test_an_answer_lands_where_the_object_is(tmp_path):
    """A network that calls red things objects marks the red part of a picture that is not square."""
    images = keras.Input((SIDE, SIDE, 3))
    red = keras.layers.Conv2D(1, 1, activation="sigmoid", use_bias=False)
    network = keras.Model(images, red(images))
    red.set_weights([np.array([1.0, -1.0, -1.0]).reshape(1, 1, 3, 1)])
    pixels = np.full((50, 200, 3), 200, np.uint8)
    pixels[10:30, 20:80] = (255, 0, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    mask, _ = task.predict_file(network, tmp_path / "wide.png")
    found = np.asarray(Image.open(mask)) == 255
    truth = np.zeros((50, 200), bool)
    truth[10:30, 20:80] = True
    assert np.sum(found & truth) / np.sum(found | truth) > 0.9


# ---------------------------------------------------------------------------------------------------------- saved ones


@pytest.mark.parametrize("model", task.FROM_SCRATCH)
def test_saved_model_is_what_its_card_says(model):
    network, card = runs.load_model(SAVED / f"{model}.keras")
    assert card["parameters"]["total"] == network.count_params() <= 3_000_000
    assert card["recipe"] == json.loads(json.dumps(dataclasses.asdict(task.RECIPES[model])))
    assert [each["seed"] for each in card["seeds"]] == list(range(task.NUM_SEEDS if model.startswith("unet") else 1))
    assert network.input_shape == (None, SIDE, SIDE, 3)


def test_saved_network_keeps_its_score():
    """On every tenth test picture the saved network is about as good as its card says of all of them."""
    data_dir = Path(os.environ.get("DATA_DIR", REPOSITORY / "data"))
    if not (data_dir / "VOCdevkit" / "VOC2012" / "JPEGImages").is_dir():
        pytest.skip(f"PASCAL VOC 2012 is not installed in {data_dir}")
    network, card = runs.load_model(SAVED / "unet_bilinear.keras")
    some = task.load_pictures(data_dir)[0]["test"].take(slice(None, None, 10))
    measured = task.measure(task.predict(runs.for_prediction(network), some.images), some.masks)
    assert abs(measured["dice"] - card["metrics"]["test"]["dice"]) < 0.08


def test_saved_models_are_small_together():
    assert sum(path.stat().st_size for path in SAVED.iterdir()) < 20e6
