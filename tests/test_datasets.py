"""The loaders on small datasets in TensorFlow Datasets' own format, and everything that can be wrong with them."""

import dataclasses
import errno
import gzip
import hashlib
import http.server
import json
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from common import datasets
from common.cli import UserError

SIZES = {"train": 7, "test": 5}


def example(name, index):
    """One example dict of the dataset `name`, different for each index."""
    generator = np.random.default_rng(index)
    image = generator.integers(0, 256, datasets.SOURCES[name].image_shape, dtype=np.uint8)
    if name == "smallnorb":
        return {
            "image": image[..., :1],
            "image2": image[..., 1:],
            "label_category": index % 5,
            "instance": index % 10,
            "label_elevation": index % 9,
            "label_azimuth": index % 18,
            "label_lighting": index % 6,
        }
    features = {"image": image, "label": index % 10}
    if name.startswith("cifar"):
        features["id"] = f"example_{index}"
    if name == "cifar100":
        features |= {"label": index % 100, "coarse_label": index % 20}
    return features


def prepare_small(name, data_dir, sizes=None):
    """Writes a small dataset to `data_dir` as TensorFlow Datasets itself would after a download."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    official = tfds.builder(name, data_dir=data_dir)

    def information(self):
        return tfds.core.DatasetInfo(builder=self, features=official.info.features)

    def splits(self, dl_manager):
        return {split: self._generate_examples(split) for split in SIZES}

    def generate(self, split):
        for index in range((sizes or SIZES)[split]):
            yield index, example(name, index)

    with registered.skip_registration():  # the official builder keeps the name
        members = {
            "name": name,
            "VERSION": official.version,
            "_info": information,
            "_split_generators": splits,
            "_generate_examples": generate,
            "__module__": __name__,
        }
        type("Small", (tfds.core.GeneratorBasedBuilder,), members)(data_dir=data_dir).download_and_prepare()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Makes the loaders expect the small sizes and forbids the network. Returns an empty data folder."""
    for name, source in datasets.SOURCES.items():
        monkeypatch.setitem(datasets.SOURCES, name, dataclasses.replace(source, sizes=SIZES))
    monkeypatch.setattr(datasets.urllib.request, "urlopen", no_network)
    return tmp_path / "data"


def no_network(*_, **__):
    raise datasets.urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is unreachable"))


@pytest.fixture
def smallnorb(small):
    """A data folder with the small smallNORB prepared and cached."""
    prepare_small("smallnorb", small)
    datasets.load_smallnorb(small)
    return small


@pytest.mark.parametrize("name", list(datasets.SOURCES))
def test_every_loader_returns_what_was_prepared(name, small):
    prepare_small(name, small)
    dataset = getattr(datasets, f"load_{name}")(small)
    source = datasets.SOURCES[name]
    assert dataset.name == name
    for split, size in SIZES.items():
        part = getattr(dataset, split)
        assert part.images.shape == (size, *source.image_shape)
        assert part.images.dtype == np.uint8
        assert not part.images.flags.writeable
        # TensorFlow Datasets shuffles as it prepares; every example has its own picture, which finds it again.
        order = [
            next(i for i in range(size) if np.array_equal(image, picture_of(name, i)))
            for image in np.array(part.images)
        ]
        assert sorted(order) == list(range(size))
        for field, feature in list(source.features.items())[1:]:
            values = getattr(part, field)
            assert values.dtype == np.int64
            assert values.tolist() == [example(name, i)[feature] for i in order]
    assert len(dataset.class_names) == {"smallnorb": 5, "cifar100": 100}.get(name, 10)
    path = small / "cache" / name / "test_images.npy"
    assert dataset.checksums["test_images"] == hashlib.sha256(path.read_bytes()).hexdigest()


def picture_of(name, index):
    features = example(name, index)
    return np.concatenate([features[f] for f in datasets.SOURCES[name].features["images"]], axis=-1)


def test_second_start_is_fast_and_imports_no_tensorflow(fake_data_dir):
    code = (
        "import sys, time; from common.datasets import load_smallnorb; start = time.perf_counter();"
        f"d = load_smallnorb({str(fake_data_dir)!r}); d.train.images[24299].sum(); d.test.category[0];"
        "print(time.perf_counter() - start, 'tensorflow' in sys.modules, 'tensorflow_datasets' in sys.modules)"
    )
    seconds, *imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 1
    assert imported == ["False", "False"]


def truncate(cache):
    path = cache / "train_images.npy"
    path.write_bytes(path.read_bytes()[:-10])


def empty(cache):
    (cache / "test_category.npy").write_bytes(b"")


def reshape(cache):
    np.save(cache / "train_images.npy", np.zeros((7, 96, 96, 1), np.uint8))


def retype(cache):
    np.save(cache / "test_elevation.npy", np.zeros(5, np.float32))


def remove(cache):
    (cache / "train_instance.npy").unlink()


def half_written(cache):
    (cache / "manifest.json").unlink()


def scramble_manifest(cache):
    (cache / "manifest.json").write_text('{"class_names": ')


DAMAGES = [truncate, empty, reshape, retype, remove, half_written, scramble_manifest]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_built_again(damage, smallnorb, capsys):
    damage(smallnorb / "cache" / "smallnorb")
    dataset = datasets.load_smallnorb(smallnorb)
    assert dataset.train.images.shape == (7, 96, 96, 2)
    assert "building" in capsys.readouterr().out
    assert dataset.train.instance.max() == 6


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_without_source_is_one_clear_line(damage, smallnorb):
    damage(smallnorb / "cache" / "smallnorb")
    shutil.rmtree(smallnorb / "smallnorb")
    assert_helpful(lambda: datasets.load_smallnorb(smallnorb), smallnorb, "Network is unreachable")


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_cache(smallnorb):
    shutil.move(smallnorb / "cache" / "smallnorb", smallnorb / "cache" / ".smallnorb.123")
    (smallnorb / "cache" / ".smallnorb.123" / "test_images.npy").unlink()
    assert datasets.load_smallnorb(smallnorb).test.images.shape == (5, 96, 96, 2)


def assert_helpful(action, data_dir, *parts):
    with pytest.raises(UserError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    for part in ("dataset smallnorb", "https://cs.nyu.edu/~ylclab/data/norb-v1.0-small/", *parts):
        assert part in message
    assert str(data_dir / "downloads" / "manual" / "smallnorb") in message
    assert "smallnorb-5x46789x9x18x6x2x96x96-training-dat.mat.gz" in message


def test_no_network_and_no_data(small):
    assert_helpful(lambda: datasets.load_smallnorb(small), small, "cannot be reached", "Network is unreachable")
    assert not list(small.rglob("*.npy"))


def test_server_that_refuses(small, monkeypatch):
    monkeypatch.undo()

    class Refuse(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(403)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = dataclasses.replace(
        datasets.SOURCES["smallnorb"], download_url=f"http://127.0.0.1:{server.server_port}/file"
    )
    monkeypatch.setitem(datasets.SOURCES, "smallnorb", source)
    assert_helpful(lambda: datasets.load_smallnorb(small), small, "its server answers 403")
    server.shutdown()
    server.server_close()


def test_server_that_never_answers(small, monkeypatch):
    monkeypatch.undo()
    silent = socket.create_server(("127.0.0.1", 0))
    source = dataclasses.replace(
        datasets.SOURCES["smallnorb"], download_url=f"http://127.0.0.1:{silent.getsockname()[1]}/file"
    )
    monkeypatch.setitem(datasets.SOURCES, "smallnorb", source)
    monkeypatch.setattr(datasets, "NETWORK_TIMEOUT_SECONDS", 0.5)
    start = time.perf_counter()
    assert_helpful(lambda: datasets.load_smallnorb(small), small, "its server")
    assert time.perf_counter() - start < 3
    silent.close()


def test_network_is_given_up_early_enough():
    assert datasets.NETWORK_TIMEOUT_SECONDS < 15


def test_truncated_prepared_dataset(small):
    prepare_small("smallnorb", small)
    record = next((small / "smallnorb").glob("*/*train.tfrecord*"))
    record.write_bytes(record.read_bytes()[:-100])
    assert_helpful(lambda: datasets.load_smallnorb(small), small, "TensorFlow Datasets failed", "delete")
    assert not list((small / "cache").iterdir())


def test_prepared_dataset_of_the_wrong_size(small):
    prepare_small("smallnorb", small, {"train": 3, "test": 5})
    assert_helpful(lambda: datasets.load_smallnorb(small), small, "train split has 3 examples instead of 7")
    prepare_small("mnist", small, {"train": 9, "test": 5})
    with pytest.raises(UserError, match=r"9 x \(28, 28, 1\) instead of \(7, 28, 28, 1\)"):
        datasets.load_mnist(small)


def test_full_disk(small, monkeypatch):
    prepare_small("smallnorb", small)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    assert_helpful(lambda: datasets.load_smallnorb(small), small, "No space left on device")
    assert not list((small / "cache").iterdir())


def test_official_files_put_there_by_hand(monkeypatch, tmp_path):
    """Files in the folder for them are enough: TensorFlow Datasets checks and reads them, and asks no network."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo

    folder = tmp_path / "downloads" / "manual" / "mnist"
    folder.mkdir(parents=True)
    labels = (np.arange(10000) % 10).astype(np.uint8)
    contents = {"images": (2051, [28, 28], np.repeat(labels, 784)), "labels": (2049, [], labels)}
    checksums = {}
    for split, repeats in (("train", 6), ("t10k", 1)):
        for content, (magic, shape, values) in contents.items():
            header = np.array([magic, 10000 * repeats, *shape], ">i4").tobytes()
            path = folder / f"{split}-{content}-idx{1 + len(shape)}-ubyte.gz"
            path.write_bytes(gzip.compress(header + np.tile(values, repeats).tobytes()))
            url = f"https://storage.googleapis.com/cvdf-datasets/mnist/{path.name}"
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            checksums[url] = UrlInfo(path.stat().st_size, digest, path.name)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "url_infos", property(lambda self: checksums))
    monkeypatch.setattr(datasets.urllib.request, "urlopen", no_network)
    dataset = datasets.load_mnist(tmp_path)
    assert dataset.train.images.shape == (60000, 28, 28, 1)
    assert np.array_equal(dataset.test.images[:, 5, 5, 0], dataset.test.labels)
    assert np.bincount(dataset.train.labels).tolist() == [6000] * 10


def test_shared_archive_names_do_not_collide(small):
    folders = {datasets._by_hand(source, small) for source in datasets.SOURCES.values()}
    assert len(folders) == len(datasets.SOURCES)


def test_real_smallnorb(real_data_dir):
    dataset = datasets.load_smallnorb(real_data_dir)
    for split, toys in ((dataset.train, [4, 6, 7, 8, 9]), (dataset.test, [0, 1, 2, 3, 5])):
        assert split.images.shape == (24300, 96, 96, 2)
        assert np.unique(split.instance).tolist() == toys
        assert np.bincount(split.category).tolist() == [4860] * 5
        assert np.bincount(split.elevation).tolist() == [2700] * 9
        assert np.bincount(split.lighting).tolist() == [4050] * 6
    assert dataset.class_names[2] == "airplanes"
    manifest = json.loads((real_data_dir / "cache" / "smallnorb" / "manifest.json").read_text())
    assert manifest["sha256"] == dataset.checksums


def test_area_average_by_a_whole_factor_is_the_mean_of_blocks():
    images = np.random.default_rng(0).integers(0, 256, (8, 96, 96, 2), dtype=np.uint8)
    blocks = images.reshape(8, 48, 2, 48, 2, 2).mean(axis=(2, 4))
    assert np.abs(datasets.area_average(images, 48) - blocks).max() <= 0.5
    assert np.array_equal(datasets.area_average(images, 96), images)


def test_area_average_by_a_broken_factor_weighs_cut_pixels():
    images = np.zeros((1, 96, 96, 2), np.uint8)
    images[0, 1, 0] = 180  # half of this pixel lies within the first of 64 x 64, which is 1.5 x 1.5 pixels large
    small = datasets.area_average(images, 64)
    assert small.shape == (1, 64, 64, 2)
    assert small[0, 0, 0, 0] == round(180 * 0.5 / 1.5**2)
    assert small[0, 1, 0, 0] == round(180 * 0.5 / 1.5**2)
    assert small[0, 2:].max() == 0
    flat = np.full((2, 96, 96, 2), 137, np.uint8)
    assert np.unique(datasets.area_average(flat, 64)).tolist() == [137]
