"""Loader of PASCAL VOC 2012: images with segmentation masks, in squares of one size.

`load_voc(data_dir, image_size)` downloads the official archive where the dataset is missing, unpacks what it needs to
`data_dir/VOCdevkit/VOC2012/`, and keeps the squares in `data_dir/cache/voc_<image_size>/`. With `sample=True` it reads
the miniature of that tree in `data/samples/` instead and writes nothing.

The test images are the validation list of the challenge, whose own test set has no public masks. A tenth of the
training list is held out for validation.
"""

import hashlib
import socket
import sys
import tarfile
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.datasets import (
    RESTORE_SAMPLES,
    check_array,
    checked_samples,
    connection_trouble,
    data_folder,
    read_cache,
    write_cache,
)
from common.errors import UserError
from common.files import building

BACKGROUND, VOID = 0, 255  # labels; 1 to 20 are the classes of objects
CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv",
)
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
    """PASCAL VOC 2012: dict of `SegmentationImages` ("train", "validation", "test"), and the SHA-256 of each part.

    With `sample`, the tracked sample in data/samples/, wherever `data_dir` is. Raises `UserError` where the dataset is
    neither present nor can be downloaded.
    """
    if sample:
        lists = _read_sample(checked_samples("VOCdevkit/") / "VOCdevkit" / "VOC2012", image_size)
    else:
        lists = _load_lists(data_folder(data_dir), image_size)
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
            wanted = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
            for member in members:
                inside = member.name.partition("VOC2012/")[2]
                if inside.startswith(wanted):
                    member.name = inside
                    members.extract(member, temporary, filter="data")
    except (OSError, EOFError, tarfile.TarError) as error:
        raise UserError(
            f"{archive} cannot be unpacked ({error}); delete it, free some space, or add --sample"
        ) from error
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
                keras.utils.get_file(
                    ARCHIVE,
                    source,
                    file_hash=ARCHIVE_MD5,
                    cache_dir=archive.parent.parent,
                    cache_subdir=archive.parent.name,
                )
                return
            except Exception as error:  # a bare Exception is what Keras raises for a failed download
                trouble = (str(error).splitlines() or [type(error).__name__])[0][:150]
    finally:
        socket.setdefaulttimeout(before)
    raise UserError(
        f"PASCAL VOC 2012 could not be downloaded ({trouble}); get {ARCHIVE} (2 GB) from "
        f"{' or '.join(ARCHIVE_SOURCES)} and put it by hand into {archive.parent}, unpack it to {folder}, "
        "or add --sample"
    )


def _load_lists(data_dir, image_size):
    """Returns `SegmentationImages` of the lists "training" and "test", from the cache where there is one."""
    cache = data_dir / "cache" / f"voc_{image_size}"
    try:
        return _open_cache(cache, image_size)
    except FileNotFoundError:
        pass  # the usual first start
    except ValueError as damage:
        print(f"PASCAL VOC 2012: {damage}; building {cache} again")
    folder = voc_folder(data_dir)
    listed = folder / "ImageSets" / "Segmentation"
    extended = folder / "SegmentationClassAug"
    masks_folder = extended if extended.is_dir() else folder / "SegmentationClass"
    training_list = listed / "trainaug.txt" if (listed / "trainaug.txt").exists() else listed / "train.txt"
    advice = f"unpack VOC 2012 again into {data_dir}, or add --sample"
    print(f"reading the images of {training_list.name} and val.txt")
    lists = {
        "training": _read_list(folder, training_list, masks_folder, image_size, advice),
        "test": _read_list(folder, listed / "val.txt", masks_folder, image_size, advice),
    }
    arrays = ((f"{part}_{field}", array) for part, some in lists.items() for field, array in some._asdict().items())
    try:
        write_cache(cache, arrays, dataset="voc2012", image_size=image_size)
    except OSError as error:
        raise UserError(
            f"PASCAL VOC 2012: cannot write {cache} ({error.strerror or error}); free some space, choose another "
            f"--data-dir, or add --sample"
        ) from error
    return lists


def _open_cache(cache, image_size):
    """Raises FileNotFoundError where there is no cache, ValueError where it is damaged."""
    fields = SegmentationImages._fields
    arrays, _ = read_cache(cache, [f"{part}_{field}" for part in ("training", "test") for field in fields])
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


def _read_sample(folder, image_size):
    listed, masks_folder = folder / "ImageSets" / "Segmentation", folder / "SegmentationClass"
    return {
        part: _read_list(folder, listed / f"{name}.txt", masks_folder, image_size, RESTORE_SAMPLES)
        for part, name in (("training", "train"), ("test", "val"))
    }


def _read_list(folder, names_file, masks_folder, image_size, advice):
    """Reads all images of a list; those that cannot be used are named on stderr and left out."""
    try:
        listed = names_file.read_text(encoding="utf-8").split()
    except FileNotFoundError as error:
        raise UserError(f"{names_file} is missing; {advice}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{names_file} is damaged; {advice}") from error
    images, masks, names = [], [], []
    for name in listed:
        try:
            image, mask = _read_pair(folder, masks_folder, name)
            square = fit_square(mask, image_size, Image.Resampling.NEAREST, VOID)  # labels have no average
            _check_labels(masks_folder / f"{name}.png", square)
        except ValueError as trouble:
            print(f"left out: {trouble}", file=sys.stderr)
            continue
        images.append(fit_square(image, image_size, Image.Resampling.BILINEAR, 0))
        masks.append(square)
        names.append(name)
    if len(names) < len(listed):
        print(f"{len(listed) - len(names)} of {len(listed)} images of {names_file.name} were left out", file=sys.stderr)
    if not names:
        raise UserError(f"no image of {names_file} can be used; {advice}")
    return SegmentationImages(np.stack(images), np.stack(masks), np.array(names))


def _read_pair(folder, masks_folder, name):
    """Reads an RGB image and its palette mask; ValueError says which is missing, damaged or of another size."""
    pair = []
    for path in (folder / "JPEGImages" / f"{name}.jpg", masks_folder / f"{name}.png"):
        try:
            with Image.open(path) as image:
                image.load()
                pair.append(image)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing") from error
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is damaged") from error
    image, mask = pair
    if image.size != mask.size:
        raise ValueError(f"{name}: image and mask have different sizes, {image.size} and {mask.size}")
    if mask.mode not in ("P", "L"):
        raise ValueError(f"{masks_folder / name}.png is no palette image ({mask.mode})")
    return image.convert("RGB"), mask


def _check_labels(name, masks):
    if ((masks >= len(CLASSES)) & (masks != VOID)).any():
        raise ValueError(f"{name} holds labels other than 0 to {len(CLASSES) - 1} and {VOID}")
