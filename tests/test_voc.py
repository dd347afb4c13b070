"""The loader of PASCAL VOC on the tracked sample and on small folders in VOC's layout, and every fault of both."""

import hashlib
import json
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from common import datasets, voc
from common.errors import UserError
from report import make_samples

SIZE = 128


def write_voc(folder, training=24, test=14, size=(60, 40)):
    """Writes a folder in VOC's layout: grey images in which a red square is the object, with a void border."""
    generator = np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for part, count in (("train", training), ("val", test)):
        names = [f"{part}_{number:03}" for number in range(count)]
        for name in names:
            pixels = np.full((size[1], size[0], 3), 128, np.uint8)
            mask = np.zeros((size[1], size[0]), np.uint8)
            top, left = generator.integers(2, 18, 2)
            mask[top - 1 : top + 17, left - 1 : left + 17] = voc.VOID
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


def sizes(parts):
    return [len(parts[part].names) for part in ("train", "validation", "test")]


def test_images_and_masks_are_squares_with_void_around(voc_dir):
    parts, _ = voc.load_voc(voc_dir, SIZE)
    assert sizes(parts) == [22, 2, 14]
    test = parts["test"]
    assert test.images.shape == (14, SIZE, SIZE, 3)
    assert test.masks.shape == (14, SIZE, SIZE)
    assert set(np.unique(test.masks)) == {0, 12, voc.VOID}
    padding = (SIZE - round(40 * SIZE / 60)) // 2
    assert (test.masks[:, :padding] == voc.VOID).all()
    assert (test.masks[:, padding + 4, 0] == 0).all()
    assert (test.images[:, :padding] == 0).all()
    red = test.images[..., 0].astype(int) - test.images[..., 1]
    assert red[test.masks == 12].mean() > 150
    assert red[test.masks == 0].mean() < 5


def test_image_size_is_the_side_of_the_squares(voc_dir):
    parts, _ = voc.load_voc(voc_dir, 32)
    assert parts["test"].images.shape == (14, 32, 32, 3)
    assert (voc_dir / "cache" / "voc_32").is_dir()


def test_validation_is_the_same_every_time_and_apart_from_training(voc_dir):
    first, checksums = voc.load_voc(voc_dir, SIZE)
    second, again = voc.load_voc(voc_dir, SIZE)
    assert first["validation"].names.tolist() == second["validation"].names.tolist()
    assert checksums == again
    parts = [set(first[part].names.tolist()) for part in ("train", "validation", "test")]
    assert not parts[0] & parts[1] | parts[0] & parts[2] | parts[1] & parts[2]


def test_split_and_checksums_are_those_of_the_saved_models(voc_dir):
    """Cards of saved models record checksums of this definition, and this split of the training list."""
    parts, checksums = voc.load_voc(voc_dir, SIZE)
    order = np.random.default_rng(12).permutation(24)
    assert parts["validation"].names.tolist() == [f"train_{number:03}" for number in sorted(order[:2])]
    for part, examples in parts.items():
        content = np.array(examples.images).tobytes() + np.array(examples.masks).tobytes()
        assert checksums[part] == hashlib.sha256(content).hexdigest()


# --------------------------------------------------------------------------------------------------------------- cache


def test_the_cache_is_enough_and_a_damaged_one_is_made_again(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2012", 10, 2)
    before, _ = voc.load_voc(tmp_path, SIZE)
    folder.rename(tmp_path / "elsewhere")
    after, _ = voc.load_voc(tmp_path, SIZE)
    assert np.array_equal(before["test"].images, after["test"].images)
    (tmp_path / "elsewhere").rename(folder)
    cached = tmp_path / "cache" / f"voc_{SIZE}" / "test_masks.npy"
    content = cached.read_bytes()
    cached.unlink()  # not written over: an open memory map still shows it
    cached.write_bytes(content[:1000])
    again, _ = voc.load_voc(tmp_path, SIZE)
    assert np.array_equal(before["test"].masks, again["test"].masks)


WRONG_ARRAYS = {
    "shape": ("training_images", np.zeros((10, 16, 16, 1), np.uint8)),
    "type": ("training_images", np.full((10, 16, 16, 3), np.nan)),
    "too few": ("test_masks", np.zeros((1, 16, 16), np.uint8)),
    "label": ("test_masks", np.full((2, 16, 16), 21, np.uint8)),
    "pickled": ("test_names", np.array([None, None])),
    "numbers as names": ("test_names", np.arange(2)),
    "0-d": ("test_names", np.array("name")),
}


@pytest.mark.parametrize("kind", list(WRONG_ARRAYS))
def test_arrays_of_the_wrong_kind_are_named_and_made_again(kind, tmp_path, capsys):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", 10, 2)
    _, checksums = voc.load_voc(tmp_path, 16)
    cache = tmp_path / "cache" / "voc_16"
    name, array = WRONG_ARRAYS[kind]
    np.save(cache / f"{name}.npy", array, allow_pickle=True)
    manifest = json.loads((cache / "manifest.json").read_text())
    manifest["sha256"][name] = datasets.sha256(cache / f"{name}.npy")
    (cache / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert voc.load_voc(tmp_path, 16)[1] == checksums
    assert capsys.readouterr().out.startswith(f"PASCAL VOC 2012: {name}")


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    write_voc(tmp_path / "VOCdevkit" / "VOC2012", 10, 2)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets, "write_cache", full)
    with pytest.raises(UserError, match=r"cannot write .*No space left on device.*--data-dir, or add --sample$"):
        voc.load_voc(tmp_path, 16)


# ------------------------------------------------------------------------------------------------------ lists and pairs


def test_longer_lists_and_their_masks_are_preferred(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2012", 10, 2)
    lists = folder / "ImageSets" / "Segmentation"
    (lists / "trainaug.txt").write_text((lists / "train.txt").read_text() + "val_001\n")
    (folder / "SegmentationClass").rename(folder / "SegmentationClassAug")
    parts, _ = voc.load_voc(tmp_path, SIZE)
    assert len(parts["train"].names) + len(parts["validation"].names) == 11


def damage_files(folder, damage):
    """Damages the training files of a VOC folder in one way."""
    masks = folder / "SegmentationClass"
    damaged = folder / "JPEGImages" / "train_002.jpg"
    if damage == "missing mask":
        (masks / "train_001.png").unlink()
    elif damage == "truncated image":
        damaged.write_bytes(damaged.read_bytes()[:300])
    elif damage == "no image":
        damaged.write_text("no image")
    elif damage == "another size":
        Image.fromarray(np.zeros((30, 30), np.uint8)).save(masks / "train_003.png")
    elif damage == "no palette":
        Image.new("RGB", (60, 40)).save(masks / "train_004.png")
    elif damage == "unknown label":
        Image.fromarray(np.full((40, 60), 21, np.uint8)).save(masks / "train_005.png")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing mask", r"train_001\.png is missing"),
        ("truncated image", r"train_002\.jpg is damaged"),
        ("no image", r"train_002\.jpg is damaged"),
        ("another size", r"train_003\.png is damaged \(L \(30, 30\) is no mask of an image \(60, 40\)\)"),
        ("no palette", r"train_004\.png is damaged \(RGB"),
        ("unknown label", r"train_005\.png is damaged \(it holds labels other than 0 to 20"),
    ],
)
def test_the_first_unusable_file_is_named(damage, message, tmp_path):
    """Leaving images out would change every number that is measured."""
    damage_files(write_voc(tmp_path / "VOCdevkit" / "VOC2012", 12, 2), damage)
    with pytest.raises(UserError, match=message) as error:
        voc.load_voc(tmp_path, SIZE)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"unpack VOC 2012 again into {tmp_path}, or add --sample")
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_lists_or_without_images_is_one_line(tmp_path):
    folder = write_voc(tmp_path / "VOCdevkit" / "VOC2012", 2, 1)
    lists = folder / "ImageSets" / "Segmentation"
    for name, content, message in (
        ("train.txt", b"", "is damaged \\(it is empty\\)"),
        ("train.txt", b"absent", "absent.jpg is missing"),
        ("val.txt", b"\xff\xfe\x00", "is damaged"),
        ("val.txt", None, "is missing"),
    ):
        whole = (lists / name).read_bytes()
        (lists / name).unlink()
        if content is not None:
            (lists / name).write_bytes(content)
        with pytest.raises(UserError, match=message):
            voc.load_voc(tmp_path, SIZE)
        (lists / name).write_bytes(whole)


# ------------------------------------------------------------------------------------------------------------ download


@pytest.fixture
def official_archive(tmp_path, monkeypatch):
    """An archive in place of the official one, at the second of its addresses; the first does not answer."""
    write_voc(tmp_path / "made" / "VOCdevkit" / "VOC2012", 10, 2)
    archive = tmp_path / "archive.tar"
    with tarfile.open(archive, "w") as members:
        members.add(tmp_path / "made" / "VOCdevkit", "VOCdevkit")
    monkeypatch.setattr(voc, "ARCHIVE_MD5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(voc, "ARCHIVE_SOURCES", ((tmp_path / "none.tar").as_uri(), archive.as_uri()))
    return archive


def test_the_archive_is_downloaded_checked_and_unpacked(official_archive, tmp_path):
    folder = voc.voc_folder(tmp_path / "data")
    assert folder == tmp_path / "data" / "VOCdevkit" / "VOC2012"
    assert len(list((folder / "JPEGImages").iterdir())) == 12
    assert len(voc.load_voc(tmp_path / "data", SIZE)[0]["test"].names) == 2


def test_an_archive_put_there_by_hand_needs_no_network(official_archive, tmp_path, monkeypatch):
    monkeypatch.setattr(voc, "ARCHIVE_SOURCES", ((tmp_path / "none.tar").as_uri(),))
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    official_archive.rename(downloads / voc.ARCHIVE)
    assert (voc.voc_folder(tmp_path / "data") / "SegmentationClass" / "val_000.png").exists()


def test_a_wrong_checksum_is_refused(official_archive, tmp_path, monkeypatch):
    monkeypatch.setattr(voc, "ARCHIVE_MD5", "0" * 32)
    with pytest.raises(UserError, match="by hand into") as error:
        voc.voc_folder(tmp_path / "data")
    assert str(error.value).endswith("or add --sample")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "data" / "VOCdevkit").exists()


def test_an_archive_that_is_none_is_one_line(official_archive, tmp_path, monkeypatch):
    official_archive.write_bytes(official_archive.read_bytes()[:20_000])
    monkeypatch.setattr(voc, "ARCHIVE_MD5", hashlib.md5(official_archive.read_bytes()).hexdigest())
    with pytest.raises(UserError, match=r"cannot be unpacked .*; delete it"):
        voc.voc_folder(tmp_path / "data")
    assert not (tmp_path / "data" / "VOCdevkit" / "VOC2012").exists()


# -------------------------------------------------------------------------------------------------------------- sample


def test_the_sample_is_a_miniature_of_the_dataset():
    parts, checksums = voc.load_voc("/nowhere", SIZE, sample=True)
    assert sizes(parts) == [15, 1, 24]
    assert checksums.keys() == parts.keys()
    for examples in parts.values():
        assert examples.images.shape == (len(examples.names), SIZE, SIZE, 3)
        assert examples.images.dtype == examples.masks.dtype == np.uint8
        for mask in examples.masks:
            labels = set(np.unique(mask).tolist())
            assert voc.BACKGROUND in labels
            assert labels - {voc.BACKGROUND, voc.VOID}


@pytest.fixture
def sample_folder(tmp_path, monkeypatch):
    """A copy of the samples that a test may damage."""
    copy = tmp_path / "samples"
    shutil.copytree(datasets.SAMPLES, copy)
    monkeypatch.setattr(datasets, "SAMPLES", copy)
    return copy / "VOCdevkit" / "VOC2012"


@pytest.mark.parametrize("damage", ["image", "mask", "list", "missing"])
def test_a_damaged_sample_is_one_line_that_says_how_to_restore_it(damage, sample_folder):
    path = {
        "image": next((sample_folder / "JPEGImages").iterdir()),
        "mask": next((sample_folder / "SegmentationClass").iterdir()),
        "list": sample_folder / "ImageSets" / "Segmentation" / "val.txt",
        "missing": next((sample_folder / "JPEGImages").iterdir()),
    }[damage]
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError) as error:
        voc.load_voc("/nowhere", SIZE, sample=True)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.endswith("git checkout -- data/samples")


def test_reading_the_sample_writes_nothing(sample_folder):
    before = sorted(sample_folder.parent.parent.rglob("*"))
    voc.load_voc("/nowhere", SIZE, sample=True)
    assert sorted(sample_folder.parent.parent.rglob("*")) == before


@pytest.mark.parametrize("masks", ["SegmentationClass", "SegmentationClassAug"])
def test_samples_are_copied_from_either_folder_of_masks(masks, tmp_path):
    source = write_voc(tmp_path / "VOC2012", 30, 30)
    (source / "SegmentationClass").rename(source / masks)
    make_samples.copy_voc(source, tmp_path / "copy")
    for part, count in (("train", 16), ("val", 24)):
        names = (tmp_path / "copy" / "ImageSets" / "Segmentation" / f"{part}.txt").read_text().split()
        assert len(set(names)) == count
        for name in names:
            mask = (tmp_path / "copy" / "SegmentationClass" / f"{name}.png").read_bytes()
            assert mask == (source / masks / f"{name}.png").read_bytes()
            assert (tmp_path / "copy" / "JPEGImages" / f"{name}.jpg").exists()


# ------------------------------------------------------------------------------------------------------------- squares


@pytest.mark.parametrize("size", [(60, 40), (40, 60), (50, 50), (300, 1)])
def test_an_image_fills_the_middle_of_its_square(size):
    image = Image.new("RGB", size, (9, 9, 9))
    square = voc.fit_square(image, 64, Image.Resampling.BILINEAR, 0)
    rows, columns = voc.place_in_square(image, 64)
    assert square.shape == (64, 64, 3)
    assert (square[rows, columns] == 9).all()
    assert (square == 9).sum() == 3 * (rows.stop - rows.start) * (columns.stop - columns.start)
    assert max(rows.stop - rows.start, columns.stop - columns.start) == 64
    assert abs(rows.start - (64 - rows.stop)) <= 1
