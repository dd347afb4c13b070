"""One loader per dataset: from the official download, or from the tracked samples, to named NumPy arrays.

`load_smallnorb(data_dir)` and its siblings return a `Dataset`. The first call lets TensorFlow Datasets download and
prepare the data and copies every array to `data_dir/cache/<name>/` as `.npy`. Later calls compare those files with
their recorded SHA-256 and memory-map them, which imports neither TensorFlow nor TensorFlow Datasets. With `sample=True`
the images in `data/samples/` are returned instead, which needs no network.

A cache is built in a temporary folder that is renamed when it is complete. A damaged cache is rebuilt from the prepared
dataset. Every other failure is a `UserError` that names the dataset, its official page and the folder for official
files that were downloaded by hand.
"""

import concurrent.futures
import dataclasses
import hashlib
import http.client
import io
import json
import os
import threading
import urllib.error
import urllib.request
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import REPOSITORY
from common.errors import UserError
from common.files import building, read_json, sha256

SAMPLES = REPOSITORY / "data" / "samples"
RESTORE_SAMPLES = "restore it from the repository: git checkout -- data/samples"
NETWORK_TIMEOUT_SECONDS = 8
BATCH_SIZE = 500
SMALLNORB_ELEVATION_DEGREES = np.arange(30, 75, 5)
"""Camera elevation above the table for the elevation labels 0 to 8 (LeCun, Huang & Bottou 2004, section 2)."""

SMALLNORB_CATEGORIES = ("animal", "human", "airplane", "truck", "car")
"""Short names of the five classes of smallNORB, in the order of their labels."""


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
    download_url: str  # one of the files that TensorFlow Datasets downloads, to find out whether the server answers
    archives: tuple  # the official files, for a download by hand
    examples: type  # the `NamedTuple` type of a split
    features: dict  # from field of `examples` to the feature in TensorFlow Datasets; image features become channels
    classes: dict  # from label field to the number of its classes; the first field indexes `Dataset.class_names`
    image_shape: tuple
    sizes: dict  # from split to number of examples
    sample_sizes: dict  # the same of data/samples/


_IDX_ARCHIVES = tuple(
    f"{split}-{content}-ubyte.gz" for split in ("train", "t10k") for content in ("images-idx3", "labels-idx1")
)
_SMALLNORB_ARCHIVES = tuple(
    f"smallnorb-5x{toys}x9x18x6x2x96x96-{split}-{content}.mat.gz"
    for toys, split in (("46789", "training"), ("01235", "testing"))
    for content in ("dat", "cat", "info")
)

SOURCES = {
    source.name: source
    for source in (
        Source(
            name="smallnorb",
            page="https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/",
            download_url=f"https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/{_SMALLNORB_ARCHIVES[1]}",
            archives=_SMALLNORB_ARCHIVES,
            examples=StereoImages,
            features={
                "images": ("image", "image2"),
                "category": "label_category",
                "instance": "instance",
                "elevation": "label_elevation",
                "azimuth": "label_azimuth",
                "lighting": "label_lighting",
            },
            classes={"category": 5, "instance": 10, "elevation": 9, "azimuth": 18, "lighting": 6},
            image_shape=(96, 96, 2),
            sizes={"train": 24300, "test": 24300},
            sample_sizes={"train": 100, "test": 150},
        ),
        Source(
            name="mnist",
            page="http://yann.lecun.com/exdb/mnist/",
            download_url="https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz",
            archives=_IDX_ARCHIVES,
            examples=LabelledImages,
            features={"images": ("image",), "labels": "label"},
            classes={"labels": 10},
            image_shape=(28, 28, 1),
            sizes={"train": 60000, "test": 10000},
            sample_sizes={"train": 300, "test": 300},
        ),
        Source(
            name="fashion_mnist",
            page="https://github.com/zalandoresearch/fashion-mnist",
            download_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-labels-idx1-ubyte.gz",
            archives=_IDX_ARCHIVES,
            examples=LabelledImages,
            features={"images": ("image",), "labels": "label"},
            classes={"labels": 10},
            image_shape=(28, 28, 1),
            sizes={"train": 60000, "test": 10000},
            sample_sizes={"train": 300, "test": 300},
        ),
        Source(
            name="cifar10",
            page="https://www.cs.toronto.edu/~kriz/cifar.html",
            download_url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            archives=("cifar-10-binary.tar.gz",),
            examples=LabelledImages,
            features={"images": ("image",), "labels": "label"},
            classes={"labels": 10},
            image_shape=(32, 32, 3),
            sizes={"train": 50000, "test": 10000},
            sample_sizes={"train": 250, "test": 250},
        ),
        Source(
            name="cifar100",
            page="https://www.cs.toronto.edu/~kriz/cifar.html",
            download_url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            archives=("cifar-100-binary.tar.gz",),
            examples=Cifar100Images,
            features={"images": ("image",), "labels": "label", "coarse_labels": "coarse_label"},
            classes={"labels": 100, "coarse_labels": 20},
            image_shape=(32, 32, 3),
            sizes={"train": 50000, "test": 10000},
            sample_sizes={"train": 300, "test": 300},
        ),
    )
}


def load_smallnorb(data_dir, sample=False):
    """smallNORB: 24,300 + 24,300 stereo pairs of 50 toys in `StereoImages` (LeCun, Huang & Bottou, CVPR 2004).

    With `sample`, the tracked sample in data/samples/, wherever `data_dir` is. Raises `UserError` where the data is
    neither present nor can be downloaded.
    """
    return _load("smallnorb", data_dir, sample)


def load_mnist(data_dir, sample=False):
    """MNIST: 60,000 + 10,000 handwritten digits in `LabelledImages`. Otherwise like `load_smallnorb`."""
    return _load("mnist", data_dir, sample)


def load_fashion_mnist(data_dir, sample=False):
    """Fashion-MNIST: 60,000 + 10,000 articles of clothing in `LabelledImages`. Otherwise like `load_smallnorb`."""
    return _load("fashion_mnist", data_dir, sample)


def load_cifar10(data_dir, sample=False):
    """CIFAR-10: 50,000 + 10,000 colour images in `LabelledImages`. Otherwise like `load_smallnorb`."""
    return _load("cifar10", data_dir, sample)


def load_cifar100(data_dir, sample=False):
    """CIFAR-100: 50,000 + 10,000 colour images in `Cifar100Images`. Otherwise like `load_smallnorb`."""
    return _load("cifar100", data_dir, sample)


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
        rows = np.tensordot(
            images[start : start + 1000].astype("float32"), weights, (1, 1)
        )  # (n, column, channel, row)
        small[start : start + 1000] = np.rint(np.tensordot(rows, weights, (1, 1)).transpose(0, 2, 3, 1))
    return small


# --------------------------------------------------------------------------------------------------- caches and samples


def data_folder(data_dir):
    """Returns `data_dir` as a `pathlib.Path`. Raises `UserError` where it is a file."""
    data_dir = Path(data_dir)
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"{data_dir} is a file; give the folder for datasets with --data-dir or DATA_DIR")
    return data_dir


def write_cache(cache, arrays, **about):
    """Writes (name, array) pairs to the folder `cache` as `<name>.npy`, with `about` and checksums in `manifest.json`.

    Raises OSError where the disk is full or the folder cannot be written.
    """
    with building(cache) as folder:
        checksums = {}
        for name, array in arrays:
            path = folder / f"{name}.npy"
            with open(path, "wb") as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                # Neither a memory map, which dies of SIGBUS on a full disk, nor np.save, which loses the reason.
                file.write(np.ascontiguousarray(array).view(np.uint8))
            checksums[name] = sha256(path)
        (folder / "manifest.json").write_text(json.dumps({**about, "sha256": checksums}, indent=2) + "\n")


def read_cache(cache, names):
    """Memory-maps the arrays `names` of a folder that `write_cache` wrote; returns them in a dict, and the manifest.

    Raises FileNotFoundError where there is no cache, and ValueError where one of its files is damaged.
    """
    if not cache.is_dir():
        raise FileNotFoundError(cache)
    try:
        manifest = read_json(cache / "manifest.json", "delete the cache")
    except UserError as damage:
        raise ValueError(str(damage).rpartition(";")[0]) from damage
    recorded = manifest.get("sha256")
    if not isinstance(recorded, dict) or not set(names) <= recorded.keys():
        raise ValueError(f"{cache / 'manifest.json'} lacks checksums")
    paths = {name: cache / f"{name}.npy" for name in names}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        try:
            checksums = dict(zip(names, pool.map(sha256, paths.values()), strict=True))
        except OSError as error:
            raise ValueError(f"{error.filename or cache} cannot be read ({error.strerror or error})") from error
    arrays = {}
    for name, path in paths.items():
        if checksums[name] != recorded[name]:
            raise ValueError(f"{path.name} differs from its recorded checksum")
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a header that makes no sense raises a dozen kinds, from ValueError to TokenError
            raise ValueError(f"{path.name} is no array ({type(error).__name__})") from error
        if not isinstance(arrays[name], np.ndarray):
            raise ValueError(f"{path.name} is an .npz archive")
    return arrays, manifest


def check_array(name, array, shape, dtype, num_classes=None):
    """Raises ValueError unless `array` has this shape and type and, with `num_classes`, only labels below that."""
    if array.shape != shape or array.dtype != dtype:
        raise ValueError(f"{name} holds {array.dtype} {array.shape} instead of {np.dtype(dtype)} {shape}")
    if num_classes and array.size and not 0 <= array.min() <= array.max() < num_classes:
        raise ValueError(f"{name} holds labels outside 0 to {num_classes - 1}")


def checked_samples(prefix):
    """Returns the folder of the samples after a check of its files whose path begins with `prefix`.

    Raises `UserError` where one is missing or differs from its checksum in `sha256.json`.
    """
    recorded = read_json(SAMPLES / "sha256.json", RESTORE_SAMPLES)
    chosen = {SAMPLES / name: checksum for name, checksum in recorded.items() if name.startswith(prefix)}
    if not chosen:
        raise UserError(f"{SAMPLES / 'sha256.json'} is damaged (nothing of {prefix}); {RESTORE_SAMPLES}")
    for path, checksum in chosen.items():
        try:
            found = sha256(path)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror or error}); {RESTORE_SAMPLES}") from error
        if found != checksum:
            raise UserError(f"{path} is damaged; {RESTORE_SAMPLES}")
    return SAMPLES


def _load(name, data_dir, sample):
    source = SOURCES[name]
    if sample:
        return _open_sample(source)
    data_dir = data_folder(data_dir)
    cache = data_dir / "cache" / name
    try:
        return _open_cache(source, cache)
    except FileNotFoundError:
        pass  # the usual first start
    except ValueError as damage:
        print(f"{name}: {damage}; building {cache} again")
    _build_cache(source, data_dir, cache)
    try:
        return _open_cache(source, cache)
    except (FileNotFoundError, ValueError) as damage:
        raise _error(source, data_dir, f"{cache} is damaged right after it was written ({damage})") from damage


def _open_cache(source, cache):
    """Raises FileNotFoundError where there is no cache, ValueError where it is damaged or of another dataset."""
    arrays, manifest = read_cache(cache, [f"{split}_{field}" for split in source.sizes for field in source.features])
    if manifest.get("dataset") != source.name:
        raise ValueError(f"{cache} holds the dataset {manifest.get('dataset')}")
    return _dataset(source, source.sizes, arrays, manifest.get("class_names"), manifest["sha256"])


def _open_sample(source):
    path = checked_samples(f"{source.name}.npz") / f"{source.name}.npz"
    arrays, checksums = {}, {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                content, name = archive.read(member), member.removesuffix(".npy")
                arrays[name] = np.load(io.BytesIO(content), allow_pickle=False)
                arrays[name].flags.writeable = False
                checksums[name] = hashlib.sha256(content).hexdigest()
        class_names, _ = arrays.pop("class_names").tolist(), checksums.pop("class_names")
        return _dataset(source, source.sample_sizes, arrays, class_names, checksums)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is damaged ({error}); {RESTORE_SAMPLES}") from error


def _dataset(source, sizes, arrays, class_names, checksums):
    """Raises ValueError where the arrays or the class names are not what `source` says."""
    splits = {}
    for split, size in sizes.items():
        for field in source.features:
            name = f"{split}_{field}"
            if name not in arrays:
                raise ValueError(f"{name} is missing")
            check_array(name, arrays[name], *_expected(source, field, size), source.classes.get(field))
        splits[split] = source.examples(**{field: arrays[f"{split}_{field}"] for field in source.features})
    number = next(iter(source.classes.values()))
    if not isinstance(class_names, list) or [type(name) for name in class_names] != [str] * number:
        raise ValueError(f"there are not {number} class names")
    return Dataset(source.name, splits["train"], splits["test"], tuple(class_names), checksums)


def _expected(source, field, size):
    """Shape and type of one array of a split."""
    return ((size, *source.image_shape), np.uint8) if field == "images" else ((size,), np.int64)


# ------------------------------------------------------------------------------------------------- the full datasets


def _build_cache(source, data_dir, cache):
    """Copies the prepared dataset into `.npy` files, downloading and preparing it first where needed."""
    prepared = any((data_dir / source.name).glob("*/dataset_info.json"))
    by_hand = all((_by_hand(source, data_dir) / archive).is_file() for archive in source.archives)
    if not prepared and not by_hand:
        trouble = connection_trouble(source.download_url)  # TFDS alone would retry for minutes
        if trouble:
            raise _error(source, data_dir, f"not in {data_dir}, and {trouble}")
        print(f"{source.name}: not in {data_dir} yet, downloading it with TensorFlow Datasets")
    try:
        splits, info = _prepare(source, data_dir)
        names = info.features[source.features[next(iter(source.classes))]].names
        arrays = _read_prepared(source, data_dir, splits)
        write_cache(cache, arrays, dataset=source.name, class_names=names)
    except OSError as error:
        raise UserError(
            f"dataset {source.name}: cannot write {cache} ({error.strerror or error}); free some space, choose another "
            f"--data-dir, or add --sample"
        ) from error


def _prepare(source, data_dir):
    """Returns the splits as `tf.data.Dataset`, and the `tfds.core.DatasetInfo`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow_datasets as tfds  # slow to import, and only the first start needs it

    try:
        return tfds.load(
            source.name,
            data_dir=data_dir,
            with_info=True,
            # Official files in the folder for them are checked and used instead of a download.
            download_and_prepare_kwargs={
                "download_config": tfds.download.DownloadConfig(manual_dir=_by_hand(source, data_dir))
            },
        )
    except Exception as error:  # TFDS and TensorFlow raise dozens of kinds
        raise _tfds_error(source, data_dir, error) from error


def _read_prepared(source, data_dir, splits):
    """Yields the name and the array of every split and field."""
    for split, size in source.sizes.items():
        arrays = {field: np.empty(*_expected(source, field, size)) for field in source.features}
        start = 0
        try:
            for batch in splits[split].batch(BATCH_SIZE).as_numpy_iterator():
                stop = start + len(next(iter(batch.values())))
                for field, feature in source.features.items():
                    values = (
                        np.concatenate([batch[each] for each in feature], axis=-1)
                        if field == "images"
                        else batch[feature]
                    )
                    if stop > size or values.shape[1:] != arrays[field].shape[1:]:
                        found = f"{stop} x {values.shape[1:]} instead of {arrays[field].shape}"
                        raise _error(source, data_dir, f"the {split} {field} are {found}")
                    arrays[field][start:stop] = values
                start = stop
        except UserError:
            raise
        except Exception as error:
            raise _tfds_error(source, data_dir, error) from error
        if start != size:
            raise _error(source, data_dir, f"the prepared {split} split has {start} examples instead of {size}")
        for field in list(arrays):
            yield f"{split}_{field}", arrays.pop(field)  # so that memory is freed as soon as it is written


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


def _tfds_error(source, data_dir, error):
    reason = (str(error).strip().splitlines() or [""])[0][:200]
    return _error(source, data_dir, f"TensorFlow Datasets failed ({type(error).__name__}: {reason})")


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
