"""The loaders on the tracked samples and on small datasets in TensorFlow Datasets' format, and every fault of both."""

import dataclasses
import errno
import gzip
import hashlib
import http.server
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from common import datasets
from common.errors import UserError
from report import make_samples

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


def expect_small(monkeypatch):
    """Makes the loaders expect the small sizes and forbids the network."""
    for name, source in datasets.SOURCES.items():
        monkeypatch.setitem(datasets.SOURCES, name, dataclasses.replace(source, sizes=SIZES))
    monkeypatch.setattr(datasets.urllib.request, "urlopen", no_network)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """An empty data folder for loaders that expect the small sizes."""
    expect_small(monkeypatch)
    return tmp_path / "data"


def no_network(*_, **__):
    raise datasets.urllib.error.URLError(OSError(errno.ENETUNREACH, "Network is unreachable"))


@pytest.fixture(scope="module")
def prepared_smallnorb(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        expect_small(monkeypatch)
        prepare_small("smallnorb", data_dir)
        datasets.load_smallnorb(data_dir)
    return data_dir


@pytest.fixture
def smallnorb(small, prepared_smallnorb):
    """A data folder with the small smallNORB prepared and cached."""
    shutil.copytree(prepared_smallnorb, small)
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
        # TensorFlow Datasets shuffles as it prepares; every example has its own image, which finds it again.
        order = [
            next(i for i in range(size) if np.array_equal(image, image_of(name, i))) for image in np.array(part.images)
        ]
        assert sorted(order) == list(range(size))
        for field, (feature, _) in source.labels.items():
            values = getattr(part, field)
            assert values.dtype == np.int64
            assert values.tolist() == [example(name, i)[feature] for i in order]
    assert len(dataset.class_names) == {"smallnorb": 5, "cifar100": 100}.get(name, 10)
    assert not [each for each in dataset.class_names if "_" in each]  # they are shown to people
    path = small / "cache" / name / "test_images.npy"
    assert dataset.checksums["test_images"] == hashlib.sha256(path.read_bytes()).hexdigest()


def image_of(name, index):
    features = example(name, index)
    return np.concatenate([features[camera] for camera in ("image", "image2") if camera in features], axis=-1)


@pytest.mark.parametrize("sample", [False, True])
def test_second_start_is_fast_and_imports_no_tensorflow(sample, smallnorb):
    code = (
        "import dataclasses, sys, time; from common import datasets;"
        f"source = dataclasses.replace(datasets.SOURCES['smallnorb'], sizes={SIZES});"
        "datasets.SOURCES['smallnorb'] = source; start = time.perf_counter();"
        f"d = datasets.load_smallnorb({str(smallnorb)!r}, {sample}); d.train.images[6].sum(); d.test.category[0];"
        "print(time.perf_counter() - start, 'tensorflow' in sys.modules, 'tensorflow_datasets' in sys.modules)"
    )
    seconds, *imported = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert float(seconds) < 1
    assert imported == ["False", "False"]


# -------------------------------------------------------------------------------------------------------------- faults


def truncate(cache):
    path = cache / "train_images.npy"
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(cache):
    path = cache / "test_images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(cache):
    (cache / "test_category.npy").write_bytes(b"")


def remove(cache):
    (cache / "train_instance.npy").unlink()


def remove_manifest(cache):
    (cache / "manifest.json").unlink()


def truncate_manifest(cache):
    (cache / "manifest.json").write_text('{"class_names": ')


def list_manifest(cache):
    (cache / "manifest.json").write_text("[]")


def edit_manifest(cache, **changes):
    path = cache / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def scalar_checksums(cache):
    edit_manifest(cache, sha256=3)


def forget_checksum(cache):
    checksums = json.loads((cache / "manifest.json").read_text())["sha256"]
    del checksums["train_images"]
    edit_manifest(cache, sha256=checksums)


def number_class_names(cache):
    edit_manifest(cache, class_names=[1, 2, 3, 4, 5])


def lose_class_name(cache):
    edit_manifest(cache, class_names=["animals", "humans", "planes", "trucks"])


def rename_dataset(cache):
    edit_manifest(cache, dataset="mnist")


DAMAGES = [truncate, flip_a_bit, empty, remove, remove_manifest, truncate_manifest, list_manifest, scalar_checksums]
DAMAGES += [forget_checksum, number_class_names, lose_class_name, rename_dataset]

# Files whose checksums agree, so that only their content tells that they are wrong.
WRONG_ARRAYS = {
    "shape": ("train_images", np.zeros((7, 96, 96, 1), np.uint8)),
    "type": ("test_elevation", np.zeros(5, np.float32)),
    "nan": ("test_elevation", np.full(5, np.nan)),
    "pickled": ("test_category", np.array([None] * 5)),
    "0-d": ("test_category", np.array(3)),
    "too few": ("train_azimuth", np.zeros(6, np.int64)),
    "label too high": ("train_lighting", np.full(7, 6)),
    "label below zero": ("train_lighting", np.full(7, -1)),
    "text": ("train_lighting", np.array(["left"] * 7)),
}


def write_wrong(kind, cache):
    if kind in WRONG_ARRAYS:
        name, array = WRONG_ARRAYS[kind]
        np.save(cache / f"{name}.npy", array, allow_pickle=True)
    else:
        name = "train_category"
        if kind == "npz":
            np.savez(cache / "archive.npz", category=np.zeros(7, np.int64))
            os.replace(cache / "archive.npz", cache / f"{name}.npy")
        elif kind == "header":
            (cache / f"{name}.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00{'descr': [[[[[[(\n")
        else:
            (cache / f"{name}.npy").write_bytes(b"no array")
    checksums = json.loads((cache / "manifest.json").read_text())["sha256"]
    edit_manifest(cache, sha256={**checksums, name: datasets.sha256(cache / f"{name}.npy")})


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_is_built_again(damage, smallnorb, capsys):
    damage(smallnorb / "cache" / "smallnorb")
    dataset = datasets.load_smallnorb(smallnorb)
    assert dataset.train.images.shape == (7, 96, 96, 2)
    assert "building" in capsys.readouterr().out
    assert dataset.train.instance.max() == 6


@pytest.mark.parametrize("kind", [*WRONG_ARRAYS, "npz", "header", "other"])
def test_arrays_of_the_wrong_kind_are_named_and_built_again(kind, smallnorb, capsys):
    write_wrong(kind, smallnorb / "cache" / "smallnorb")
    name = WRONG_ARRAYS[kind][0] if kind in WRONG_ARRAYS else "train_category"
    dataset = datasets.load_smallnorb(smallnorb)
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 1
    assert output.startswith(f"smallnorb: {name}")
    assert "building" in output
    assert dataset.train.instance.max() == 6
    assert dataset.train.lighting.max() == 5


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_cache_without_source_is_one_clear_line(damage, smallnorb):
    damage(smallnorb / "cache" / "smallnorb")
    shutil.rmtree(smallnorb / "smallnorb")
    assert_helpful(lambda: datasets.load_smallnorb(smallnorb), smallnorb, "Network is unreachable")


def test_a_killed_build_leaves_nothing_that_is_taken_for_a_cache(smallnorb):
    shutil.move(smallnorb / "cache" / "smallnorb", smallnorb / "cache" / ".123.smallnorb")
    (smallnorb / "cache" / ".123.smallnorb" / "test_images.npy").unlink()
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
    assert message.endswith("or add --sample")


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
    source = dataclasses.replace(datasets.SOURCES["smallnorb"], server=f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setitem(datasets.SOURCES, "smallnorb", source)
    assert_helpful(lambda: datasets.load_smallnorb(small), small, "its server answers 403")
    server.shutdown()
    server.server_close()


def test_server_that_never_answers(small, monkeypatch):
    monkeypatch.undo()
    silent = socket.create_server(("127.0.0.1", 0))
    source = dataclasses.replace(datasets.SOURCES["smallnorb"], server=f"http://127.0.0.1:{silent.getsockname()[1]}/")
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
    with pytest.raises(UserError, match="train split has 9 examples instead of 7"):
        datasets.load_mnist(small)


def test_prepared_dataset_of_the_wrong_shape(small, monkeypatch):
    prepare_small("mnist", small)
    source = dataclasses.replace(datasets.SOURCES["mnist"], image_shape=(32, 32, 1))
    monkeypatch.setitem(datasets.SOURCES, "mnist", source)
    with pytest.raises(UserError, match=r"the train images are \(28, 28, 1\) instead of \(32, 32, 1\)"):
        datasets.load_mnist(small)
    assert not list((small / "cache").iterdir())


def test_full_disk(small, monkeypatch):
    prepare_small("smallnorb", small)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(UserError, match=r"smallnorb: cannot write .*No space left on device.*--data-dir"):
        datasets.load_smallnorb(small)
    assert not list((small / "cache").iterdir())


def test_file_size_limit_is_an_error_and_no_signal(tmp_path):
    """Writing through a memory map died of SIGBUS here."""
    code = (
        "import resource, sys, numpy as np; from pathlib import Path; from common.datasets import write_cache;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "images = np.zeros((50, 96, 96), np.uint8); layout = {'images': (images.shape, images.dtype)};"
        "write_cache(Path(sys.argv[1]), layout, [('images', images)], {})"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "cache"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_damaged_right_after_it_was_written_is_one_line(small, monkeypatch):
    prepare_small("smallnorb", small)
    batches = datasets._batches

    def wrong(*arguments):
        for name, rows in batches(*arguments):
            yield name, rows + 10 if name == "test_category" else rows

    monkeypatch.setattr(datasets, "_batches", wrong)
    with pytest.raises(UserError, match="smallnorb: test_category holds labels outside 0 to 4, right after"):
        datasets.load_smallnorb(small)


def test_chunks_of_several_arrays_are_written_as_np_save_writes_them(tmp_path):
    arrays = {"images": np.arange(24, dtype=np.uint8).reshape(4, 3, 2), "names": np.array(["a", "bc", "def", "g"])}
    layout = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    chunks = [(name, array[start : start + 2]) for start in (0, 2) for name, array in arrays.items()]
    datasets.write_cache(tmp_path / "cache", layout, chunks, {"version": 1})
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["version"] == 1
    for name, array in arrays.items():
        np.save(tmp_path / "expected.npy", array)
        assert (tmp_path / "cache" / f"{name}.npy").read_bytes() == (tmp_path / "expected.npy").read_bytes()
        assert manifest["sha256"][name] == datasets.sha256(tmp_path / "expected.npy")


def test_official_files_put_there_by_hand(monkeypatch, tmp_path):
    """Files in the folder for them are enough: TensorFlow Datasets checks and reads them, and asks no network."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.download.checksums import UrlInfo
    from tensorflow_datasets.image_classification import mnist

    folder = tmp_path / "downloads" / "manual" / "mnist"
    folder.mkdir(parents=True)
    labels = (np.arange(100) % 10).astype(np.uint8)
    contents = {"images": (2051, [28, 28], np.repeat(labels, 784)), "labels": (2049, [], labels)}
    checksums = {}
    for split, repeats in (("train", 6), ("t10k", 1)):
        for content, (magic, shape, values) in contents.items():
            header = np.array([magic, 100 * repeats, *shape], ">i4").tobytes()
            path = folder / f"{split}-{content}-idx{1 + len(shape)}-ubyte.gz"
            path.write_bytes(gzip.compress(header + np.tile(values, repeats).tobytes()))
            url = f"https://storage.googleapis.com/cvdf-datasets/mnist/{path.name}"
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            checksums[url] = UrlInfo(path.stat().st_size, digest, path.name)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "url_infos", property(lambda self: checksums))
    sizes = {"train": 600, "test": 100}  # preparing the official 70,000 takes half a minute
    monkeypatch.setattr(mnist, "_TRAIN_EXAMPLES", sizes["train"])
    monkeypatch.setattr(mnist, "_TEST_EXAMPLES", sizes["test"])
    monkeypatch.setitem(datasets.SOURCES, "mnist", dataclasses.replace(datasets.SOURCES["mnist"], sizes=sizes))
    monkeypatch.setattr(datasets.urllib.request, "urlopen", no_network)
    dataset = datasets.load_mnist(tmp_path)
    assert dataset.train.images.shape == (600, 28, 28, 1)
    assert np.array_equal(dataset.test.images[:, 5, 5, 0], dataset.test.labels)
    assert np.bincount(dataset.train.labels).tolist() == [60] * 10


def test_shared_archive_names_do_not_collide(small):
    folders = {datasets._by_hand(source, small) for source in datasets.SOURCES.values()}
    assert len(folders) == len(datasets.SOURCES)


# ------------------------------------------------------------------------------------------------------------- samples


@pytest.mark.parametrize("name", list(datasets.SOURCES))
def test_every_sample_is_small_balanced_and_like_the_dataset(name, monkeypatch):
    monkeypatch.setattr(datasets.urllib.request, "urlopen", no_network)
    dataset = getattr(datasets, f"load_{name}")("/nowhere", sample=True)
    source = datasets.SOURCES[name]
    assert dataset.name == name
    assert len(dataset.class_names) == {"smallnorb": 5, "cifar100": 100}.get(name, 10)
    assert not [each for each in dataset.class_names if "_" in each]  # they are shown to people
    assert all(type(each) is str for each in dataset.class_names)
    for split, size in source.sample_sizes.items():
        part = getattr(dataset, split)
        assert 100 <= size <= 300
        assert part.images.shape == (size, *source.image_shape)
        assert part.images.dtype == np.uint8
        assert len(np.unique(part.images.reshape(size, -1), axis=0)) == size
        for field, array in part._asdict().items():
            assert not array.flags.writeable
            assert checksum(array) == dataset.checksums[f"{split}_{field}"]
        for field in ("category",) if name == "smallnorb" else source.labels:
            counts = np.bincount(getattr(part, field))
            assert len(counts) == source.labels[field][1]
            assert len(set(counts)) == 1
    assert dataset.checksums.keys() == {f"{split}_{field}" for split in source.sizes for field in part._fields}


def checksum(array):
    content = io.BytesIO()
    np.save(content, np.array(array))
    return hashlib.sha256(content.getvalue()).hexdigest()


def test_sample_of_smallnorb_shows_every_toy_from_everywhere():
    dataset = datasets.load_smallnorb("/nowhere", sample=True)
    for split, toys, pairs in ((dataset.train, [4, 6, 7, 8, 9], 4), (dataset.test, [0, 1, 2, 3, 5], 6)):
        counts = np.zeros((5, 10), int)
        np.add.at(counts, (split.category, split.instance), 1)
        assert (counts[:, toys] == pairs).all()
        assert counts.sum() == 25 * pairs
        assert np.bincount(split.elevation).min() >= len(split.images) // 9
        assert np.bincount(split.lighting, minlength=6).min() >= len(split.images) // 8
    assert len(np.unique(dataset.test.azimuth)) == 18


def test_samples_are_complete_and_under_six_megabytes():
    files = [path for path in datasets.SAMPLES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 6e6
    recorded = json.loads((datasets.SAMPLES / "sha256.json").read_text())
    unrecorded = {path.relative_to(datasets.SAMPLES).as_posix() for path in files} - recorded.keys()
    assert unrecorded == {"sha256.json"}


@pytest.fixture
def samples(tmp_path, monkeypatch):
    """A copy of the samples that a test may damage."""
    copy = tmp_path / "samples"
    shutil.copytree(datasets.SAMPLES, copy)
    monkeypatch.setattr(datasets, "SAMPLES", copy)
    return copy


def cut_sample(folder):
    path = folder / "mnist.npz"
    path.write_bytes(path.read_bytes()[:50_000])


def empty_sample(folder):
    (folder / "mnist.npz").write_bytes(b"")


def remove_sample(folder):
    (folder / "mnist.npz").unlink()


def remove_checksums(folder):
    (folder / "sha256.json").unlink()


def cut_checksums(folder):
    (folder / "sha256.json").write_text('{"mnist.npz": ')


def unknown_sample(folder):
    (folder / "sha256.json").write_text("{}")


SAMPLE_DAMAGES = [cut_sample, empty_sample, remove_sample, remove_checksums, cut_checksums, unknown_sample]


@pytest.mark.parametrize("damage", SAMPLE_DAMAGES)
def test_damaged_sample_is_one_line_that_says_how_to_restore_it(damage, samples):
    damage(samples)
    assert_restorable(samples)


def assert_restorable(samples, *parts):
    with pytest.raises(UserError) as error:
        datasets.load_mnist("/nowhere", sample=True)
    message = str(error.value)
    assert "\n" not in message
    assert str(samples) in message
    for part in parts:
        assert part in message
    assert message.endswith("git checkout -- data/samples")


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("train_images", None),
        ("train_images", np.zeros((300, 28, 28), np.uint8)),
        ("train_images", np.full((300, 28, 28, 1), np.nan)),
        ("test_labels", np.array([None] * 300)),
        ("test_labels", np.array(3)),
        ("test_labels", np.full(300, 10)),
        ("test_labels", np.zeros(299, np.int64)),
        ("class_names", None),
        ("class_names", np.array(["0", "1"])),
        ("class_names", np.arange(10)),
    ],
)
def test_sample_with_wrong_arrays_is_refused(name, array, samples):
    path = samples / "mnist.npz"
    with np.load(path) as archive:
        arrays = {each: archive[each] for each in archive if each != name}
    if array is not None:
        arrays[name] = array
    np.savez(path, **arrays)
    (samples / "sha256.json").write_text(json.dumps({"mnist.npz": datasets.sha256(path)}))
    assert_restorable(samples, "mnist.npz is damaged")


def test_sample_that_is_no_archive_is_refused(samples):
    path = samples / "mnist.npz"
    path.write_text("no archive")
    (samples / "sha256.json").write_text(json.dumps({"mnist.npz": datasets.sha256(path)}))
    assert_restorable(samples, "mnist.npz is damaged")


def test_the_choice_of_samples_is_balanced_and_reproducible():
    labels = np.random.default_rng(0).integers(0, 10, 1000)
    chosen, again = (make_samples.balanced(labels, 50, np.random.default_rng(1)) for _ in range(2))
    assert np.array_equal(chosen, again)
    assert np.bincount(labels[chosen]).tolist() == [5] * 10
    views = np.stack(np.meshgrid(*[range(n) for n in (5, 2, 9, 18, 6)], indexing="ij")).reshape(5, -1)
    examples = datasets.StereoImages(None, *views)
    chosen = make_samples.spread_views(examples, 60)
    assert len(np.unique(chosen)) == 60
    toys = views[0, chosen] * 2 + views[1, chosen]
    assert np.bincount(toys).tolist() == [6] * 10
    for toy in range(10):
        assert len(np.unique(views[2, chosen][toys == toy])) == 6


# ------------------------------------------------------------------------------------------------------- full datasets


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


def test_no_vgg16_weights_and_no_network_is_one_line_that_says_where_to_put_them(tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr(datasets, "connection_trouble", lambda url: "its server cannot be reached")
    with pytest.raises(UserError, match="by hand into") as error:
        datasets.vgg16_weights(tmp_path)
    assert str(tmp_path / "models") in str(error.value)
    assert "\n" not in str(error.value)
    (tmp_path / "vgg16_imagenet_notop.weights.h5").write_bytes(b"")
    assert datasets.vgg16_weights(tmp_path) == tmp_path / "vgg16_imagenet_notop.weights.h5"
