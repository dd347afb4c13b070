"""Loader of PASCAL VOC 2012: images with segmentation masks, in squares of one size.

The test images are the validation list of the challenge, whose own test set has no public masks. A tenth of the
training list is held out for validation.
"""

import hashlib
import socket
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.datasets import RESTORE_SAMPLES, check_array, checked_samples, connection_trouble, open_cache
from common.errors import UserError, reason
from common.files import building

BACKGROUND, VOID = 0, 255  # labels; 1 to 20 are the classes of objects
CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table",
    "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv",
)  # fmt: skip
ARCHIVE = "VOCtrainval_11-May-2012.tar"
ARCHIVE_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
ARCHIVE_SOURCES = (
    f"http://host.robots.ox.ac.uk/pascal/VOC/voc2012/{ARCHIVE}",
    f"https://pjreddie.com/media/files/{ARCHIVE}",
)
NETWORK_TIMEOUT_SECONDS = 15
SPLIT_SEED = 12


class SegmentationImages(NamedTuple):
    """Images with their masks, resized and padded to squares."""

    images: np.ndarray  # uint8 (n, size, size, 3), 0 to 255; padding is black
    masks: np.ndarray  # uint8 (n, size, size): 0 background, 1 to 20 index into `CLASSES`, 255 void or padding
    names: np.ndarray  # str (n,), the names of VOC

    def take(self, indices):
        """Returns the images at `indices` (integers, a slice or a boolean mask)."""
        return SegmentationImages(*(array[indices] for array in self))


def load_voc(data_dir, image_size, sample=False):
    """Returns a dict of `SegmentationImages` ("train", "validation", "test"), and the SHA-256 of each part.

    A missing dataset is downloaded to `data_dir/VOCdevkit/VOC2012/`; with `sample`, the miniature of that tree in
    data/samples/ is read. Raises `UserError` where the download fails or a file is damaged.
    """
    if sample:
        lists = _read_lists(checked_samples("VOCdevkit/") / "VOCdevkit" / "VOC2012", image_size, RESTORE_SAMPLES)
    else:
        lists = _load_lists(Path(data_dir), image_size)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(lists["training"].names))
    tenth = len(order) // 10
    parts = {
        "train": lists["training"].take(np.sort(order[tenth:])),
        "validation": lists["training"].take(np.sort(order[:tenth])),
        "test": lists["test"],
    }
    checksums = {}
    for part, examples in parts.items():
        digest = hashlib.sha256(np.ascontiguousarray(examples.images))
        digest.update(np.ascontiguousarray(examples.masks))
        checksums[part] = digest.hexdigest()
    return parts, checksums


def place_in_square(image, size):
    """Returns the rows and columns (slices) that a `PIL.Image` takes up of a square of `size` pixels.

    Its longer side fills the square; the rest lies half on either side of it.
    """
    sides = [max(1, round(side * size / max(image.size))) for side in (image.height, image.width)]
    return tuple(slice((size - side) // 2, (size - side) // 2 + side) for side in sides)


def fit_square(image, size, resampling, fill):
    """Resizes a `PIL.Image` and pads it with `fill`: uint8 (size, size) or (size, size, 3)."""
    rows, columns = place_in_square(image, size)
    small = np.asarray(image.resize((columns.stop - columns.start, rows.stop - rows.start), resampling))
    square = np.full((size, size, *small.shape[2:]), fill, "uint8")
    square[rows, columns] = small
    return square


def voc_folder(data_dir):
    """Returns `data_dir`/VOCdevkit/VOC2012, downloaded where it is missing. Raises `UserError` where that fails."""
    folder = data_dir / "VOCdevkit" / "VOC2012"
    if (folder / "JPEGImages").is_dir():
        return folder
    archive = data_dir / "downloads" / ARCHIVE
    _download(archive, folder)
    print(f"unpacking {archive}")
    try:
        with building(folder) as temporary, tarfile.open(archive) as members:
            for member in members:
                member.name = member.name.partition("VOC2012/")[2]
                if member.name.startswith(("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")):
                    members.extract(member, temporary, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        way_out = "delete it, free some space, or add --sample"
        raise UserError(f"{archive} cannot be unpacked ({reason(error)}); {way_out}") from error
    return folder


def _download(archive, folder):
    """Fetches the archive, and checks its MD5, also where it is already there."""
    import keras  # slow to import, and only the first start needs it

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_SECONDS)
    trouble = ""
    try:
        for source in ARCHIVE_SOURCES:
            trouble = "" if archive.exists() else connection_trouble(source)
            if trouble:
                continue
            try:
                archive.parent.mkdir(parents=True, exist_ok=True)
                keras.utils.get_file(ARCHIVE, source, file_hash=ARCHIVE_MD5, cache_dir=archive.parent, cache_subdir="")
                return
            except Exception as error:  # a bare Exception is what Keras raises for a failed download
                trouble = reason(error)
    finally:
        socket.setdefaulttimeout(before)
    raise UserError(
        f"PASCAL VOC 2012 could not be downloaded ({trouble}); get {ARCHIVE} (2 GB) from "
        f"{' or '.join(ARCHIVE_SOURCES)} and put it by hand into {archive.parent}, unpack it to {folder}, "
        "or add --sample"
    )


def _load_lists(data_dir, image_size):
    """Returns `SegmentationImages` of the lists "training" and "test", from the cache where there is one."""
    fields = SegmentationImages._fields

    def interpret(arrays, _):
        lists = {}
        for part in ("training", "test"):
            images, masks, names = (arrays[f"{part}_{field}"] for field in fields)
            if names.ndim != 1 or names.dtype.kind != "U" or not len(names):
                raise ValueError(f"{part}_names holds {names.dtype} {names.shape} instead of names")
            square = (len(names), image_size, image_size)
            check_array(f"{part}_images", images, (*square, 3), np.uint8)
            check_array(f"{part}_masks", masks, square, np.uint8)
            _check_labels(f"{part}_masks", masks)
            lists[part] = SegmentationImages(images, masks, names)
        return lists

    def build():
        folder = voc_folder(data_dir)
        print(f"reading the images of {folder}")
        lists = _read_lists(folder, image_size, f"unpack VOC 2012 again into {data_dir}, or add --sample")
        arrays = {f"{part}_{field}": array for part, some in lists.items() for field, array in some._asdict().items()}
        layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
        return layout, arrays.items(), {"dataset": "voc2012", "image_size": image_size}

    names = [f"{part}_{field}" for part in ("training", "test") for field in fields]
    return open_cache("PASCAL VOC 2012", data_dir / "cache" / f"voc_{image_size}", names, interpret, build)


def _read_lists(folder, image_size, advice):
    """Reads the longest training list and the masks that go with it, and the test list."""
    listed = folder / "ImageSets" / "Segmentation"
    extended = folder / "SegmentationClassAug"
    masks_folder = extended if extended.is_dir() else folder / "SegmentationClass"
    training_list = listed / "trainaug.txt" if (listed / "trainaug.txt").exists() else listed / "train.txt"
    lists = {"training": training_list, "test": listed / "val.txt"}
    return {part: _read_list(folder, path, masks_folder, image_size, advice) for part, path in lists.items()}


def _read_list(folder, names_file, masks_folder, image_size, advice):
    """Reads all images of a list; the `UserError` names the first file that is missing or damaged."""
    images, masks = [], []
    path = names_file
    try:
        names = names_file.read_text(encoding="utf-8").split()
        if not names:
            raise ValueError("it is empty")
        for name in names:
            path = folder / "JPEGImages" / f"{name}.jpg"
            with Image.open(path) as image:
                images.append(fit_square(image.convert("RGB"), image_size, Image.Resampling.BILINEAR, 0))
            path = masks_folder / f"{name}.png"
            with Image.open(path) as mask:
                if mask.mode not in ("P", "L") or mask.size != image.size:
                    raise ValueError(f"{mask.mode} {mask.size} is no mask of an image {image.size}")
                masks.append(fit_square(mask, image_size, Image.Resampling.NEAREST, VOID))  # labels have no average
            _check_labels("it", masks[-1])
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {advice}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); {advice}") from error
    return SegmentationImages(np.stack(images), np.stack(masks), np.array(names))


def _check_labels(name, masks):
    if ((masks >= len(CLASSES)) & (masks != VOID)).any():
        raise ValueError(f"{name} holds labels other than 0 to {len(CLASSES) - 1} and {VOID}")
