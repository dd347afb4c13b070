"""One loader per dataset: from the official download to named NumPy arrays.

`load_smallnorb(data_dir)` and its siblings return a `Dataset`. The first call lets TensorFlow Datasets download and
prepare the data and copies every array to `data_dir/cache/<name>/` as `.npy`. Every later call memory-maps those files:
that takes milliseconds and imports neither TensorFlow nor TensorFlow Datasets.

Nothing is trusted that may be half-written. The cache is built in a temporary folder that is renamed when it is
complete, and the shapes, types and sizes of its files are checked on every start. A cache that fails the check is built
again from the prepared dataset. Whatever cannot be mended here ends in a `UserError` that names the dataset, its
official page and the folder that accepts the official files when they are fetched by hand.
"""

import concurrent.futures
import dataclasses
import json
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.cli import UserError
from common.files import building, sha256, write_json

NETWORK_TIMEOUT_SECONDS = 8
BATCH_SIZE = 500
SMALLNORB_ELEVATION_DEGREES = np.arange(30, 75, 5)
"""Camera elevation above the table for the elevation labels 0 to 8 (LeCun, Huang & Bottou 2004, section 2)."""

SMALLNORB_CATEGORIES = ("animal", "human", "airplane", "truck", "car")
"""Short names of the five classes of smallNORB, in the order of their labels."""


class LabelledImages(NamedTuple):
    """Pictures with one label each.

    Attributes:
        images: uint8 (n, height, width, channels), 0 to 255.
        labels: int64 (n,), index into `Dataset.class_names`.
    """

    images: np.ndarray
    labels: np.ndarray


class Cifar100Images(NamedTuple):
    """CIFAR-100: each of the 100 classes belongs to one of 20 coarse classes.

    Attributes:
        images: uint8 (n, 32, 32, 3), 0 to 255.
        labels: int64 (n,), 0 to 99, index into `Dataset.class_names`.
        coarse_labels: int64 (n,), 0 to 19, in alphabetical order of the coarse classes.
    """

    images: np.ndarray
    labels: np.ndarray
    coarse_labels: np.ndarray


class StereoImages(NamedTuple):
    """smallNORB: each toy is photographed by two cameras at once, from 9 elevations, 18 azimuths, in 6 lightings.

    Attributes:
        images: uint8 (n, 96, 96, 2), 0 to 255; channel 0 is the left camera, channel 1 the right one.
        category: int64 (n,), 0 to 4, index into `Dataset.class_names`.
        instance: int64 (n,), 0 to 9: which of the ten toys of the category. 4, 6, 7, 8, 9 are in the training set.
        elevation: int64 (n,), 0 to 8; `SMALLNORB_ELEVATION_DEGREES[elevation]` is in degrees.
        azimuth: int64 (n,), 0 to 17, times 20 degrees.
        lighting: int64 (n,), 0 to 5.
    """

    images: np.ndarray
    category: np.ndarray
    instance: np.ndarray
    elevation: np.ndarray
    azimuth: np.ndarray
    lighting: np.ndarray


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset in memory-mapped, read-only arrays.

    Attributes:
        name: str, as in the TensorFlow Datasets catalogue.
        train: `LabelledImages`, `Cifar100Images` or `StereoImages`.
        test: the same type as `train`.
        class_names: tuple of str.
        checksums: dict from array name, such as "train_images", to the SHA-256 of its `.npy` file.
    """

    name: str
    train: NamedTuple
    test: NamedTuple
    class_names: tuple
    checksums: dict


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a dataset comes from and what its arrays look like.

    Attributes:
        name: str, in the TensorFlow Datasets catalogue.
        page: str, the official page.
        download_url: str, one of the files TensorFlow Datasets downloads: asked first whether it answers.
        archives: tuple of str, the official files to fetch by hand where the download fails.
        examples: the `NamedTuple` type of a split.
        features: dict from field of `examples` to the feature in TensorFlow Datasets, or to a tuple of picture
            features that become channels.
        image_shape: tuple of int.
        sizes: dict from split to number of examples.
    """

    name: str
    page: str
    download_url: str
    archives: tuple
    examples: type
    features: dict
    image_shape: tuple
    sizes: dict


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
            image_shape=(96, 96, 2),
            sizes={"train": 24300, "test": 24300},
        ),
        Source(
            name="mnist",
            page="http://yann.lecun.com/exdb/mnist/",
            download_url="https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz",
            archives=_IDX_ARCHIVES,
            examples=LabelledImages,
            features={"images": ("image",), "labels": "label"},
            image_shape=(28, 28, 1),
            sizes={"train": 60000, "test": 10000},
        ),
        Source(
            name="fashion_mnist",
            page="https://github.com/zalandoresearch/fashion-mnist",
            download_url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-labels-idx1-ubyte.gz",
            archives=_IDX_ARCHIVES,
            examples=LabelledImages,
            features={"images": ("image",), "labels": "label"},
            image_shape=(28, 28, 1),
            sizes={"train": 60000, "test": 10000},
        ),
        Source(
            name="cifar10",
            page="https://www.cs.toronto.edu/~kriz/cifar.html",
            download_url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            archives=("cifar-10-binary.tar.gz",),
            examples=LabelledImages,
            features={"images": ("image",), "labels": "label"},
            image_shape=(32, 32, 3),
            sizes={"train": 50000, "test": 10000},
        ),
        Source(
            name="cifar100",
            page="https://www.cs.toronto.edu/~kriz/cifar.html",
            download_url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            archives=("cifar-100-binary.tar.gz",),
            examples=Cifar100Images,
            features={"images": ("image",), "labels": "label", "coarse_labels": "coarse_label"},
            image_shape=(32, 32, 3),
            sizes={"train": 50000, "test": 10000},
        ),
    )
}


def load_smallnorb(data_dir):
    """smallNORB: 24,300 + 24,300 stereo pairs of 50 toys (LeCun, Huang & Bottou, CVPR 2004).

    Args:
        data_dir: str or `pathlib.Path`, the folder that holds prepared datasets and the cache.

    Returns:
        `Dataset` of `StereoImages`; five class names.

    Raises:
        UserError: where the data is neither there nor to be had.
    """
    return _load(SOURCES["smallnorb"], data_dir)


def load_mnist(data_dir):
    """MNIST: 60,000 + 10,000 handwritten digits, images (n, 28, 28, 1). Otherwise like `load_smallnorb`."""
    return _load(SOURCES["mnist"], data_dir)


def load_fashion_mnist(data_dir):
    """Fashion-MNIST: 60,000 + 10,000 pieces of clothing, images (n, 28, 28, 1). Otherwise like `load_smallnorb`."""
    return _load(SOURCES["fashion_mnist"], data_dir)


def load_cifar10(data_dir):
    """CIFAR-10: 50,000 + 10,000 colour pictures, images (n, 32, 32, 3). Otherwise like `load_smallnorb`."""
    return _load(SOURCES["cifar10"], data_dir)


def load_cifar100(data_dir):
    """CIFAR-100: 50,000 + 10,000 colour pictures in `Cifar100Images`. Otherwise like `load_smallnorb`."""
    return _load(SOURCES["cifar100"], data_dir)


def area_average(images, size):
    """Shrinks square pictures: each new pixel is the mean of the area it covers, also where that cuts pixels.

    Args:
        images: uint8 (n, side, side, channels).
        size: int, at most side.

    Returns:
        uint8 (n, size, size, channels), rounded.
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


def _load(source, data_dir):
    data_dir = Path(data_dir)
    cache = data_dir / "cache" / source.name
    try:
        return _open_cache(source, cache)
    except FileNotFoundError:
        pass  # the usual first start
    except ValueError as damage:
        print(f"{source.name}: {damage}; building {cache} again")
    _build_cache(source, data_dir, cache)
    try:
        return _open_cache(source, cache)
    except (FileNotFoundError, ValueError) as damage:
        raise _error(source, data_dir, f"{cache} is damaged right after it was written ({damage})") from damage


def _open_cache(source, cache):
    """Memory-maps the arrays of a cache folder.

    Raises:
        FileNotFoundError: where there is no cache.
        ValueError: where the cache is not what its manifest and `source` say.
    """
    if not cache.is_dir():
        raise FileNotFoundError(cache)
    try:
        manifest = json.loads((cache / "manifest.json").read_text())
        class_names, checksums = tuple(manifest["class_names"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"unreadable manifest ({error})") from error
    splits = {}
    for split, size in source.sizes.items():
        arrays = {}
        for field in source.features:
            shape, dtype = _expected(source, field, size)
            name = f"{split}_{field}"
            try:
                array = np.load(cache / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise ValueError(f"{name}.npy is missing or truncated") from error
            if array.shape != shape or array.dtype != dtype or name not in checksums:
                raise ValueError(f"{name}.npy holds {array.dtype} {array.shape} instead of {dtype} {shape}")
            arrays[field] = array
        splits[split] = source.examples(**arrays)
    return Dataset(source.name, splits["train"], splits["test"], class_names, checksums)


def _expected(source, field, size):
    """Shape and type of one array of a split."""
    if field == "images":
        return (size, *source.image_shape), np.dtype(np.uint8)
    return (size,), np.dtype(np.int64)


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
        with building(cache) as folder:
            _write_arrays(source, data_dir, folder)
    except UserError:
        raise
    except OSError as error:
        raise _error(source, data_dir, f"cannot write {cache} ({error.strerror or error})") from error
    except Exception as error:  # TFDS and TensorFlow raise dozens of kinds; each is reported, none is swallowed
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise _error(source, data_dir, f"TensorFlow Datasets failed ({type(error).__name__}: {reason})") from error


def _write_arrays(source, data_dir, folder):
    """Writes `<split>_<field>.npy` for every split and field, then `manifest.json`, into `folder`."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow_datasets as tfds  # slow to import, and only the first start needs it

    # Official files that lie in the folder for them are checked and used instead of a download.
    config = tfds.download.DownloadConfig(manual_dir=_by_hand(source, data_dir))
    splits, info = tfds.load(
        source.name,
        data_dir=data_dir,
        with_info=True,
        download_and_prepare_kwargs={"download_config": config},
    )
    checksums = {}
    for split, size in source.sizes.items():
        arrays = {}
        for field in source.features:
            shape, dtype = _expected(source, field, size)
            arrays[field] = np.lib.format.open_memmap(folder / f"{split}_{field}.npy", "w+", dtype, shape)
        start = 0
        for batch in splits[split].batch(BATCH_SIZE).as_numpy_iterator():
            stop = start + len(next(iter(batch.values())))
            for field, feature in source.features.items():
                values = np.concatenate([batch[f] for f in feature], axis=-1) if field == "images" else batch[feature]
                if stop > size or values.shape[1:] != arrays[field].shape[1:]:
                    raise _error(
                        source,
                        data_dir,
                        f"the {split} {field} are {stop} x {values.shape[1:]} instead of {arrays[field].shape}",
                    )
                arrays[field][start:stop] = values
            start = stop
        if start != size:
            raise _error(source, data_dir, f"the prepared {split} split has {start} examples instead of {size}")
        for field, array in arrays.items():
            array.flush()
            checksums[f"{split}_{field}"] = sha256(folder / f"{split}_{field}.npy")
    label_feature = list(source.features.values())[1]
    write_json(
        folder / "manifest.json",
        {"dataset": source.name, "class_names": info.features[label_feature].names, "sha256": checksums},
    )


def connection_trouble(url):
    """Finds out within `NETWORK_TIMEOUT_SECONDS` whether a download can begin.

    Args:
        url: str.

    Returns:
        What is wrong (str), "" where the server answers and has the file.
    """
    answer = concurrent.futures.Future()

    def ask():
        try:
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=NETWORK_TIMEOUT_SECONDS):
                answer.set_result("")
        except urllib.error.HTTPError as error:
            answer.set_result(f"its server answers {error.code} {error.reason}")
        except OSError as error:
            answer.set_result(f"its server cannot be reached ({getattr(error, 'reason', error)})")

    # A daemon thread, because looking up a host name ignores every timeout that Python can set.
    threading.Thread(target=ask, daemon=True).start()
    try:
        return answer.result(timeout=NETWORK_TIMEOUT_SECONDS)
    except concurrent.futures.TimeoutError:
        return f"its server does not answer within {NETWORK_TIMEOUT_SECONDS} seconds"


def _error(source, data_dir, trouble):
    """The one line that says what is wrong with a dataset and how to mend it."""
    return UserError(
        f"dataset {source.name}: {trouble}; try again later, or fetch {', '.join(source.archives)} from {source.page} "
        f"by hand into {_by_hand(source, data_dir)} (and delete {data_dir / source.name} if it is damaged)"
    )


def _by_hand(source, data_dir):
    """The folder for official files that were fetched by hand. Its own per dataset: some share file names."""
    return data_dir / "downloads" / "manual" / source.name
