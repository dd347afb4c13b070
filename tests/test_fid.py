"""Distances between sets of images: the Inception network against others, and each distance against known cases."""

import os
import re
import sys
import zipfile
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY
from PIL import Image

os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)  # read when JAX is first used

from common import fid
from common.errors import UserError

GENERATOR = np.random.default_rng(0)
DATA_DIR = Path(os.environ.get("DATA_DIR", REPOSITORY / "data"))
EARLY = {"branch1x1": 1, "branch5x5": 2, "branch3x3dbl": 3, "branch_pool": 1}  # branches and their convolutions
LATE = {"branch1x1": 1, "branch7x7": 3, "branch7x7dbl": 5, "branch_pool": 1}
REDUCTION = {"branch3x3": 1, "branch3x3dbl": 3}
BLOCKS = {"5b": EARLY, "5c": EARLY, "5d": EARLY, "6a": REDUCTION, "6b": LATE, "6c": LATE, "6d": LATE, "6e": LATE}
LAYERS = ["conv2d_1a_3x3", "conv2d_2a_3x3", "conv2d_2b_3x3", "conv2d_3b_1x1", "conv2d_4a_3x3"] + [
    f"mixed_{block}/{branch}" + (f"_{number}" if count > 1 else "")
    for block, branches in BLOCKS.items()
    for branch, count in branches.items()
    for number in range(1, count + 1)
]


@pytest.fixture(scope="module")
def networks():
    """The network of Keras with random weights, and these weights as ours takes them."""
    whole = keras.applications.InceptionV3(weights=None, include_top=False, input_shape=(299, 299, 3))
    model = keras.Model(whole.input, keras.ops.mean(whole.get_layer("mixed7").output, axis=(1, 2)))

    def numbered(kind):
        found = [layer for layer in model.layers if isinstance(layer, kind)]
        return sorted(
            found, key=lambda layer: int(re.findall(r"\d+", layer.name)[-1]) if layer.name[-1].isdigit() else 0
        )

    weights = {}
    convolutions, norms = numbered(keras.layers.Conv2D), numbered(keras.layers.BatchNormalization)
    for name, convolution, norm in zip(LAYERS, convolutions, norms, strict=True):
        bias = GENERATOR.normal(0, 0.1, norm.beta.shape).astype("float32")
        norm.beta.assign(bias)
        weights[f"{name}/kernel"] = np.asarray(convolution.kernel) / np.sqrt(1 + norm.epsilon, dtype="float32")
        weights[f"{name}/bias"] = bias
    return model, weights


def test_features_are_those_of_the_inception_of_keras(networks):
    model, weights = networks
    images = np.kron(GENERATOR.integers(0, 256, (2, 8, 8, 3)), np.ones((1, 4, 4, 1))).astype("uint8")
    resized = np.empty((2, 299, 299, 3), "float32")
    for place in np.ndindex(2, 3):
        channel = Image.fromarray(images[place[0], ..., place[1]].astype("float32"))
        resized[place[0], ..., place[1]] = channel.resize((299, 299), Image.Resampling.BICUBIC)
    expected = np.asarray(model((np.clip(resized, 0, 255) - 128) / 128, training=False))
    found = fid.features(weights, images)
    assert found.shape == (2, fid.NUM_FEATURES)
    assert found.std() > 0.01
    assert np.allclose(found, expected, atol=1e-4 * expected.max())


def test_published_weights_give_the_recorded_features():
    if not any((folder / fid.WEIGHTS).exists() for folder in (DATA_DIR, fid.PUBLISHED.parent)):
        pytest.skip(f"{fid.WEIGHTS} is not there")
    with np.load(REPOSITORY / "data" / "samples" / "cifar100.npz") as file:
        images = file["test_images"][:3]
    found = fid.features(fid.load_network(DATA_DIR), images)
    # The same code reproduced features that had been computed with PyTorch to 1e-6.
    recorded = [
        [0.17925, 0.122025, 0.068578, 0.059913, 0.110216, 0.02728, 0.153177, 0.082139],
        [0.132187, 0.025361, 0.075691, 0.04376, 0.156998, 0.04904, 0.013291, 0.037074],
        [0.067641, 0.013611, 0.071208, 0.085182, 0.079439, 0.064264, 0.060935, 0.033759],
    ]
    assert np.allclose(found[:, :8], recorded, atol=1e-4)
    assert np.allclose(found.mean(axis=1), [0.051104, 0.044896, 0.045165], atol=1e-4)


@pytest.fixture
def constant_network(monkeypatch):
    """Features that are the mean of each image, without a network; returns the sizes of the batches."""
    sizes = []

    def features(weights, images):
        sizes.append(len(images))
        return np.repeat(images.mean(axis=(1, 2, 3))[:, None], fid.NUM_FEATURES, axis=1).astype("float32")

    monkeypatch.setattr(fid, "_jitted_features", features)
    return sizes


def test_batches_have_one_size_and_their_order(constant_network, capsys):
    images = np.arange(150, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    assert fid.features({}, images, "numbers")[:, 0].tolist() == list(range(150))
    assert constant_network == [fid.BATCH_SIZE] * 19
    assert capsys.readouterr().out.endswith("150 of 150\n")


def test_features_of_fixed_sets_are_kept(constant_network, tmp_path):
    images, weights = np.full((3, 2, 2, 3), 7, np.uint8), {"a": np.ones(2)}
    first = fid.cached_features(weights, images, tmp_path)
    assert np.array_equal(fid.cached_features(weights, images, tmp_path), first)
    assert len(constant_network) == 1
    fid.cached_features({"a": np.zeros(2)}, images, tmp_path)  # other weights
    fid.cached_features(weights, images + 1, tmp_path)  # other images
    assert len(constant_network) == 3
    for path in (tmp_path / "cache" / "inception_fid768").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match=r"damaged .*; delete it"):
        fid.cached_features(weights, images, tmp_path)


def test_features_are_returned_where_they_cannot_be_kept(constant_network, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    images = np.full((3, 2, 2, 3), 7, np.uint8)
    found = fid.cached_features({"a": np.ones(2)}, images, tmp_path, "test images")
    assert found.shape == (3, fid.NUM_FEATURES)
    assert "features of test images are not kept: cannot write" in capsys.readouterr().out


def test_missing_and_damaged_weights(tmp_path, monkeypatch, networks):
    monkeypatch.setattr(fid, "PUBLISHED", tmp_path / "published" / fid.WEIGHTS)
    with pytest.raises(UserError, match=rf"is missing; get .*published .*put it into {tmp_path}$"):
        fid.load_network(tmp_path)
    path = tmp_path / fid.WEIGHTS
    path.write_bytes(b"broken")
    with pytest.raises(UserError, match="damaged"):
        fid.load_network(tmp_path)
    np.savez(path, **networks[1])
    assert len(fid.load_network(tmp_path)) == 2 * fid.NUM_CONVOLUTIONS
    for spoiled in (
        {"mixed_6a/branch3x3/bias": np.full(384, np.nan)},
        {"mixed_6a/branch3x3/bias": np.zeros(7)},
        {"more": np.zeros(3)},
    ):
        np.savez(path, **{**networks[1], **spoiled})
        with pytest.raises(UserError, match=r"damaged .*; get it again"):
            fid.load_network(tmp_path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    with pytest.raises((UserError, zipfile.BadZipFile), match="damaged"):
        fid.load_network(tmp_path)


def test_distances_of_known_gaussians():
    standard = GENERATOR.normal(size=(2000, 3))
    same = fid.compare(GENERATOR.normal(size=(2000, 3)), standard)
    assert same["fid_768"] < 0.01
    assert abs(same["kernel_distance"]) < 0.05
    assert same["precision"] > 0.9
    assert same["recall"] > 0.9
    # Fréchet: the squared distance of the means, and (1 - 3)² for each of three standard deviations.
    other = fid.compare(3 * GENERATOR.normal(size=(2000, 3)) + [2, 0, 0], standard)
    assert other["fid_768"] == pytest.approx(4 + 3 * 4, rel=0.05)
    assert other["precision"] < 0.5 < other["recall"]
    with pytest.raises(ValueError, match="needs 769 images"):
        fid.compare(standard[:768], standard)


def test_precision_and_recall_of_a_mode_that_is_dropped():
    left, right = GENERATOR.normal(size=(2, 800, 2)) + np.array([[[-20, 0]], [[20, 0]]])
    precision, recall = fid.precision_and_recall(
        GENERATOR.normal(size=(800, 2)) - [20, 0], np.concatenate([left, right])
    )
    assert precision > 0.9
    assert recall == pytest.approx(0.5, abs=0.05)


def test_blur_keeps_flat_images_and_spreads_a_point_as_a_gaussian_does():
    flat = np.full((1, 32, 32, 3), 93, np.uint8)
    assert np.array_equal(fid.blurred(flat), flat)
    point = np.zeros((1, 33, 33, 3), np.uint8)
    point[:, 16, 16] = 255
    spread = fid.blurred(point, 1.0)[0, :, :, 0]
    assert spread[16, 16] == round(255 / (2 * np.pi))
    assert spread[16, 17] == spread[15, 16] == round(255 / (2 * np.pi) * np.exp(-0.5))


def test_scale_orders_images_by_what_was_done_to_them(constant_network, tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", a=1)
    monkeypatch.setattr(fid, "load_network", lambda data_dir: {})
    images = GENERATOR.integers(0, 100, (2, 6, 32, 32, 3), dtype=np.uint8)
    found = fid.scale(tmp_path, images[0], images[1][:5])
    assert set(found) == {"training images", "blurred test images", "uniform noise"}
    assert found["uniform noise"] > found["training images"]
    (tmp_path / "cache" / "cifar10").mkdir(parents=True)
    np.save(tmp_path / "cache" / "cifar10" / "test_images.npy", images[0])
    assert fid.scale(tmp_path, images[0], images[1])["CIFAR-10 test images"] == pytest.approx(
        fid.scale(tmp_path, images[0], images[1])["training images"]
    )
    assert "CIFAR-10 test images" not in fid.scale(tmp_path, images[1], images[0])  # whose test images they are


def test_novelty_tells_copies_from_new_images():
    training = GENERATOR.integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    real = np.stack([np.full((4, 4, 3), grey, np.uint8) for grey in (10, 20, 40)])
    found = fid.novelty(training[3:6], real, training)
    assert found["nearest_distance"] == 0
    assert found["real_nearest_distance"] > 50
    assert found["real_pairwise_distance"] == pytest.approx((10 + 30 + 20) / 3)


def test_classifier_agreement_and_coverage(tmp_path, capsys, monkeypatch):
    assert fid.load_classifier(tmp_path / "none.keras") is None
    assert "is missing" in capsys.readouterr().out
    inputs = keras.Input((2, 2, 1))
    features = keras.layers.Dropout(0.5)(keras.layers.Flatten()(inputs))
    keras.Model(inputs, keras.layers.Dense(4, "softmax", use_bias=False)(features)).save(tmp_path / "model.keras")
    classifier = fid.load_classifier(tmp_path / "model.keras")
    images = GENERATOR.integers(0, 256, (30, 2, 2, 1), dtype=np.uint8)
    features, probabilities = classifier(images)
    assert np.array_equal(features, images.reshape(30, 4))
    labels = probabilities.argmax(axis=1)
    found = fid.by_classifier(classifier, images, labels, images)
    assert found == {
        "class_agreement": 1.0,
        "classes_covered": len(set(labels.tolist())),
        "classifier_frechet": pytest.approx(0, abs=1e-3),
    }
    assert fid.by_classifier(classifier, images, (labels + 1) % 4, images[::-1])["class_agreement"] == 0
    monkeypatch.setitem(sys.modules, "keras", None)
    assert fid.load_classifier(tmp_path / "model.keras") is None


def test_comparison_adds_the_classifier_where_classes_are_known(constant_network, tmp_path, monkeypatch):
    monkeypatch.setattr(fid, "load_network", lambda data_dir: {})
    monkeypatch.setattr(fid, "compare", lambda *features: {"fid_768": float(features[0].mean() - features[1].mean())})
    monkeypatch.setattr(fid, "load_classifier", lambda path: lambda images: (images.reshape(4, -1), np.eye(4)))
    images = GENERATOR.integers(0, 256, (4, 2, 2, 3), dtype=np.uint8)
    compare = fid.comparison(tmp_path, {"test": images})
    assert compare(images, "test") == {"fid_768": 0.0}
    assert compare(images, "test", np.arange(4))["class_agreement"] == 1
