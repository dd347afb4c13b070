"""One loader per dataset: from the official download, or from the tracked samples, to named NumPy arrays.

`load_smallnorb(data_dir)` and its siblings return a `Dataset`. The first call lets TensorFlow Datasets download and
prepare the data and copies every array to `data_dir/cache/<name>/`. Later calls compare those files with their recorded
SHA-256 and memory-map them, without TensorFlow. A damaged cache is built again from the prepared dataset. With
`sample=True` the images in `data/samples/` are returned instead, which needs no network.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import hashlib
import http.client
import json
import math
import os
import shutil
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import REPOSITORY
from common.errors import UserError, reason
from common.files import building, read_json, sha256

SAMPLES = REPOSITORY / "data" / "samples"
RESTORE_SAMPLES = "restore it from the repository: git checkout -- data/samples"
NETWORK_TIMEOUT_SECONDS = 8
BATCH_SIZE = 500
VGG16_URL = "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/"  # as `keras.applications` has it
VGG16_URL += "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
VGG16_MD5 = "6d6bbae143d832006294945121d1f1fc"
SMALLNORB_ELEVATION_DEGREES = np.arange(30, 75, 5)  # above the table, by label (LeCun, Huang & Bottou 2004, section 2)
SMALLNORB_CATEGORIES = ("animal", "human", "airplane", "truck", "car")  # short names, by label


class LabelledImages(NamedTuple):
    """Images with one label each."""

    images: np.ndarray  # uint8 (n, height, width, channels), 0 to 255
    labels: np.ndarray  # int64 (n,), index into `Dataset.class_names`


class Cifar100Images(NamedTuple):
    """CIFAR-100: each of the 100 classes belongs to one of 20 coarse classes."""

    images: np.ndarray  # uint8 (n, 32, 32, 3), 0 to 255
    labels: np.ndarray  # int64 (n,), 0 to 99, index into `Dataset.class_names`
    coarse_labels: np.ndarray  # int64 (n,), 0 to 19, in alphabetical order of the coarse classes


class StereoImages(NamedTuple):
    """smallNORB: each toy is photographed by two cameras at once, from 9 elevations, 18 azimuths, in 6 lightings."""

    images: np.ndarray  # uint8 (n, 96, 96, 2), 0 to 255; channel 0 is the left camera, channel 1 the right one
    category: np.ndarray  # int64 (n,), 0 to 4, index into `Dataset.class_names`
    instance: np.ndarray  # int64 (n,), 0 to 9, one of ten toys per category; 4, 6, 7, 8, 9 are in the training set
    elevation: np.ndarray  # int64 (n,), 0 to 8, index into `SMALLNORB_ELEVATION_DEGREES`
    azimuth: np.ndarray  # int64 (n,), 0 to 17, times 20 degrees
    lighting: np.ndarray  # int64 (n,), 0 to 5


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset in read-only arrays."""

    name: str  # as in the TensorFlow Datasets catalogue
    train: NamedTuple  # `LabelledImages`, `Cifar100Images` or `StereoImages`
    test: NamedTuple  # the same type as `train`
    class_names: tuple
    checksums: dict  # from array name, such as "train_images", to the SHA-256 of the array as an `.npy` file


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a dataset comes from and what its arrays look like."""

    name: str  # in the TensorFlow Datasets catalogue
    page: str  # the official page
    server: str  # where TensorFlow Datasets downloads the archives from
    archives: tuple  # the official files
    image_shape: tuple
    sizes: dict  # from split to number of examples
    sample_sizes: dict  # the same of data/samples/
    examples: type = LabelledImages  # of a split
    # From field of `examples` to its feature in the catalogue and its number of classes; the first has `class_names`.
    labels: dict = dataclasses.field(default_factory=lambda: {"labels": ("label", 10)})

    def layout(self, sizes):
        """Returns a dict from the name of each array, such as "train_images", to its shape and type."""
        return {
            f"{split}_{field}": ((size, *self.image_shape), np.uint8) if field == "images" else ((size,), np.int64)
            for split, size in sizes.items()
            for field in self.examples._fields
        }


_MNIST = {
    "archives": tuple(
        f"{split}-{part}-ubyte.gz" for split in ("train", "t10k") for part in ("images-idx3", "labels-idx1")
    ),
    "image_shape": (28, 28, 1),
    "sizes": {"train": 60000, "test": 10000},
    "sample_sizes": {"train": 300, "test": 300},
}
_CIFAR = {
    "page": "https://www.cs.toronto.edu/~kriz/cifar.html",
    "server": "https://www.cs.toronto.edu/~kriz/",
    "image_shape": (32, 32, 3),
    "sizes": {"train": 50000, "test": 10000},
}
_SOURCES = (
    Source(
        "smallnorb",
        page="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",
        server="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",
        archives=tuple(
            f"smallnorb-5x{toys}x9x18x6x2x96x96-{split}-{content}.mat.gz"
            for toys, split in (("46789", "training"), ("01235", "testing"))
            for content in ("dat", "cat", "info")
        ),
        image_shape=(96, 96, 2),
        sizes={"train": 24300, "test": 24300},
        sample_sizes={"train": 100, "test": 150},
        examples=StereoImages,
        labels={
            "category": ("label_category", 5),
            "instance": ("instance", 10),
            "elevation": ("label_elevation", 9),
            "azimuth": ("label_azimuth", 18),
            "lighting": ("label_lighting", 6),
        },
    ),
    Source(
        "mnist",
        page="http://yann.lecun.com/exdb/mnist/",
        server="https://storage.googleapis.com/cvdf-datasets/mnist/",
        **_MNIST,
    ),
    Source(
        "fashion_mnist",
        page="https://github.com/zalandoresearch/fashion-mnist",
        server="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        **_MNIST,
    ),
    Source("cifar10", archives=("cifar-10-binary.tar.gz",), sample_sizes={"train": 250, "test": 250}, **_CIFAR),
    Source(
        "cifar100",
        archives=("cifar-100-binary.tar.gz",),
        sample_sizes={"train": 300, "test": 300},
        examples=Cifar100Images,
        labels={"labels": ("label", 100), "coarse_labels": ("coarse_label", 20)},
        **_CIFAR,
    ),
)
SOURCES = {source.name: source for source in _SOURCES}


def load(name, data_dir, sample=False):
    """Returns a `Dataset`: that of `data_dir`, or with `sample` the tracked one in data/samples/.

    Raises `UserError` where the data is neither present nor can be downloaded.
    """
    source = SOURCES[name]
    if sample:
        return _open_sample(source)
    data_dir = Path(data_dir)

    def interpret(arrays, manifest):
        if manifest.get("dataset") != name:
            raise ValueError(f"the cache holds the dataset {manifest.get('dataset')}")
        return _dataset(source, source.sizes, arrays, manifest.get("class_names"), manifest["sha256"])

    build = functools.partial(_prepare, source, data_dir)
    return open_cache(name, data_dir / "cache" / name, source.layout(source.sizes), interpret, build)


load_smallnorb = functools.partial(load, "smallnorb")  # LeCun, Huang & Bottou, CVPR 2004
load_mnist = functools.partial(load, "mnist")
load_fashion_mnist = functools.partial(load, "fashion_mnist")
load_cifar10 = functools.partial(load, "cifar10")
load_cifar100 = functools.partial(load, "cifar100")


def area_average(images, size):
    """Downsamples square images: each new pixel is the mean of the area that it covers, cut pixels included.

    `images` is uint8 (n, side, side, channels) and `size` at most side; returns uint8 (n, size, size, channels).
    """
    side = images.shape[1]
    if size == side:
        return np.asarray(images)
    edges = np.arange(size + 1) * side / size
    pixels = np.arange(side)
    # overlap[i, j]: how much of the old pixel j lies within the new pixel i
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    weights = (np.clip(overlap, 0, None) * size / side).astype("float32")
    small = np.empty((len(images), size, size, images.shape[3]), "uint8")
    for start in range(0, len(images), 1000):  # so that the float copies stay small
        chunk = images[start : start + 1000].astype("float32")
        rows = np.tensordot(chunk, weights, (1, 1))  # (n, column, channel, row)
        small[start : start + 1000] = np.rint(np.tensordot(rows, weights, (1, 1)).transpose(0, 2, 3, 1))
    return small


# ----------------------------------------------------------------------------------------------------- caches of arrays


def open_cache(title, cache, names, interpret, build):
    """Returns `interpret(arrays, manifest)` of the arrays `names` in the folder `cache`, memory-mapped.

    Where the cache is missing, damaged, or `interpret` raises ValueError, it is written with what `build` returns: the
    arguments `layout`, `chunks` and `about` of `write_cache`. `title` begins every message.
    """
    try:
        return interpret(*_read_cache(cache, names))
    except FileNotFoundError:
        pass  # the usual first start
    except ValueError as damage:
        print(f"{title}: {damage}; building {cache} again")
    layout, chunks, about = build()
    try:
        write_cache(cache, layout, chunks, about)
        return interpret(*_read_cache(cache, names))
    except OSError as error:
        way_out = "free some space, choose another --data-dir, or add --sample"
        raise UserError(f"{title}: cannot write {cache} ({reason(error)}); {way_out}") from error
    except ValueError as damage:
        raise UserError(f"{title}: {damage}, right after it was written; check the disk, or add --sample") from damage


def write_cache(cache, layout, chunks, about):
    """Writes arrays to the folder `cache` as `<name>.npy`, with the dict `about` and checksums in `manifest.json`.

    `layout` is a dict from name to shape and type; `chunks` yields a name and the next rows of that array, in any order
    of the arrays. Raises OSError where the disk is full or the folder cannot be written.
    """
    with building(cache) as folder:
        needed = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in layout.values())
        if shutil.disk_usage(folder).free < needed:  # said before minutes of work
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with contextlib.ExitStack() as opened:
            files = {name: opened.enter_context(open(folder / f"{name}.npy", "wb")) for name in layout}
            for name, (shape, dtype) in layout.items():
                descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
                header = {"descr": descr, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(files[name], header)
            for name, rows in chunks:
                # Neither a memory map, which dies of SIGBUS on a full disk, nor np.save, which loses the reason.
                files[name].write(np.ascontiguousarray(rows, layout[name][1]).view(np.uint8))
        checksums = {name: sha256(folder / f"{name}.npy") for name in layout}
        (folder / "manifest.json").write_text(json.dumps({**about, "sha256": checksums}, indent=2) + "\n")


def _read_cache(cache, names):
    """Returns a dict of arrays, and the manifest. Raises FileNotFoundError, or ValueError where a file is damaged."""
    if not cache.is_dir():
        raise FileNotFoundError(cache)
    try:
        manifest = read_json(cache / "manifest.json", "")
    except UserError as damage:
        raise ValueError(str(damage).rpartition(";")[0]) from damage
    recorded = manifest.get("sha256")
    if not isinstance(recorded, dict) or not set(names) <= recorded.keys():
        raise ValueError(f"{cache / 'manifest.json'} lacks checksums")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        opened = pool.map(open_array, (cache / f"{name}.npy" for name in names), (recorded[name] for name in names))
        return dict(zip(names, opened, strict=True)), manifest


def open_array(path, checksum=None):
    """Memory-maps a `.npy` file, whose SHA-256 must be `checksum` where that is given.

    Raises ValueError where the file is missing or damaged, or holds what needs pickle.
    """
    try:
        if checksum is not None and sha256(path) != checksum:
            raise ValueError("its checksum is not the recorded one")
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a header that makes no sense raises a dozen kinds, from ValueError to TokenError
        raise ValueError(f"{path.name} is missing or damaged ({reason(error)})") from error


def check_array(name, array, shape, dtype, num_classes=None):
    """Raises ValueError unless `array` has this shape and type and, with `num_classes`, only labels below that."""
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} holds {array.dtype} {array.shape} instead of {np.dtype(dtype)} {shape}")
    if num_classes and array.size and not 0 <= array.min() <= array.max() < num_classes:
        raise ValueError(f"{name} holds labels outside 0 to {num_classes - 1}")


def _dataset(source, sizes, arrays, class_names, checksums):
    """Raises ValueError where the arrays or the class names are not what `source` says."""
    for name, (shape, dtype) in source.layout(sizes).items():
        if name not in arrays:
            raise ValueError(f"{name} is missing")
        _, num_classes = source.labels.get(name.partition("_")[2], (None, None))
        check_array(name, arrays[name], shape, dtype, num_classes)
    _, number = next(iter(source.labels.values()))
    if not isinstance(class_names, list) or [type(name) for name in class_names] != [str] * number:
        raise ValueError(f"there are not {number} class names")
    fields = source.examples._fields
    train, test = (source.examples(*(arrays[f"{split}_{field}"] for field in fields)) for split in sizes)
    return Dataset(source.name, train, test, tuple(name.replace("_", " ") for name in class_names), checksums)


# -------------------------------------------------------------------------------------------------------------- samples


def checked_samples(prefix):
    """Returns the folder of the samples after a check of its files whose path begins with `prefix`.

    Raises `UserError` where one is missing or differs from its checksum in `sha256.json`.
    """
    recorded = read_json(SAMPLES / "sha256.json", RESTORE_SAMPLES)
    chosen = {SAMPLES / name: checksum for name, checksum in recorded.items() if name.startswith(prefix)}
    if not chosen:
        raise UserError(f"{SAMPLES / 'sha256.json'} is damaged (nothing of {prefix}); {RESTORE_SAMPLES}")
    for path, checksum in chosen.items():
        if not path.is_file() or sha256(path) != checksum:
            raise UserError(f"{path} is missing or damaged; {RESTORE_SAMPLES}")
    return SAMPLES


def _open_sample(source):
    path = checked_samples(f"{source.name}.npz") / f"{source.name}.npz"
    try:
        with np.load(path) as archive:
            arrays = dict(archive)
            checksums = {name: hashlib.sha256(archive.zip.read(f"{name}.npy")).hexdigest() for name in arrays}
        for array in arrays.values():
            array.flags.writeable = False
        class_names, _ = arrays.pop("class_names").tolist(), checksums.pop("class_names")
        return _dataset(source, source.sample_sizes, arrays, class_names, checksums)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); {RESTORE_SAMPLES}") from error


# --------------------------------------------------------------------------------------------------- official datasets


def _prepare(source, data_dir):
    """Has TensorFlow Datasets download and prepare a dataset where needed; returns what `write_cache` takes."""
    prepared = any((data_dir / source.name).glob("*/dataset_info.json"))
    by_hand = all((_by_hand(source, data_dir) / archive).is_file() for archive in source.archives)
    if not prepared and not by_hand:
        trouble = connection_trouble(source.server + source.archives[-1])  # TFDS alone would retry for minutes
        if trouble:
            raise _error(source, data_dir, f"not in {data_dir}, and {trouble}")
        print(f"{source.name}: not in {data_dir} yet, downloading it with TensorFlow Datasets")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _tfds_errors(source, data_dir):
        import tensorflow_datasets as tfds  # slow to import, and only the first start needs it

        # Official files in the folder for them are checked and used instead of a download.
        download = tfds.download.DownloadConfig(manual_dir=_by_hand(source, data_dir))
        options = {"download_and_prepare_kwargs": {"download_config": download}}
        splits, info = tfds.load(source.name, data_dir=data_dir, with_info=True, **options)
    feature, _ = next(iter(source.labels.values()))
    about = {"dataset": source.name, "class_names": info.features[feature].names}
    return source.layout(source.sizes), _batches(source, data_dir, splits), about


def _batches(source, data_dir, splits):
    """Yields the name and the next rows of every array."""
    for split, size in source.sizes.items():
        found = 0
        with _tfds_errors(source, data_dir):
            for batch in splits[split].batch(BATCH_SIZE).as_numpy_iterator():
                images = np.concatenate([batch[camera] for camera in ("image", "image2") if camera in batch], axis=-1)
                if images.shape[1:] != source.image_shape:
                    raise ValueError(f"the {split} images are {images.shape[1:]} instead of {source.image_shape}")
                yield f"{split}_images", images
                for field, (feature, _) in source.labels.items():
                    yield f"{split}_{field}", batch[feature]
                found += len(batch["image"])
        if found != size:
            raise _error(source, data_dir, f"the prepared {split} split has {found} examples instead of {size}")


@contextlib.contextmanager
def _tfds_errors(source, data_dir):
    try:
        yield
    except Exception as error:  # TFDS and TensorFlow raise dozens of kinds
        trouble = f"TensorFlow Datasets failed ({type(error).__name__}: {reason(error)})"
        raise _error(source, data_dir, trouble) from error


def connection_trouble(url):
    """Returns why a download of `url` cannot begin, "" where the server has the file.

    Takes at most `NETWORK_TIMEOUT_SECONDS`.
    """
    outcome = concurrent.futures.Future()

    def probe():
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_SECONDS):
                outcome.set_result("")
        except urllib.error.HTTPError as error:
            outcome.set_result(f"its server answers {error.code} {error.reason}")
        except (OSError, http.client.HTTPException) as error:
            outcome.set_result(f"its server cannot be reached ({getattr(error, 'reason', error)})")

    # A daemon thread, because looking up a host name ignores every timeout that Python can set.
    threading.Thread(target=probe, daemon=True).start()
    try:
        return outcome.result(timeout=NETWORK_TIMEOUT_SECONDS)
    except concurrent.futures.TimeoutError:
        return f"its server does not answer within {NETWORK_TIMEOUT_SECONDS} seconds"


def vgg16_weights(data_dir):
    """Returns the path of the ImageNet weights of VGG16 without its classifier, which are downloaded once.

    They are those in `data_dir`, else the ones of `keras.applications`. Raises `UserError` where there are none.
    """
    folder = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"
    path, downloaded = Path(data_dir) / "vgg16_imagenet_notop.weights.h5", folder / Path(VGG16_URL).name
    for found in (path, downloaded):
        if found.is_file():
            return found
    trouble = connection_trouble(VGG16_URL)
    import keras  # here, since loading a dataset needs no backend

    if not trouble:
        try:
            return Path(keras.utils.get_file(origin=VGG16_URL, cache_subdir="models", file_hash=VGG16_MD5))
        except Exception as error:  # urllib raises many kinds, and Keras others where the checksum is wrong
            trouble = reason(error)
    raise UserError(
        f"the ImageNet weights of VGG16 are neither {path} nor {downloaded}: {trouble}; try again later, download "
        f"{VGG16_URL} by hand into {folder}, or add --quick --sample"
    )


def _error(source, data_dir, trouble):
    """The one line that says what is wrong with a dataset and how to fix it."""
    prepared = data_dir / source.name
    delete = f"delete {prepared} if it is damaged, " if prepared.exists() else ""
    return UserError(
        f"dataset {source.name}: {trouble}; try again later, {delete}download {', '.join(source.archives)} from "
        f"{source.page} by hand into {_by_hand(source, data_dir)}, or add --sample"
    )


def _by_hand(source, data_dir):
    """The folder for official files that were downloaded by hand. Its own per dataset: some share file names."""
    return data_dir / "downloads" / "manual" / source.name
