"""Augmentation by operations on tensors."""

import keras
import numpy as np
import pytest
from keras import ops

from common import augmentation

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(-1, 1, (64, 32, 32, 3)).astype("float32")


def seed():
    return keras.random.SeedGenerator(0)


def test_images_move_by_whole_pixels_and_zeros_come_in():
    moved = ops.convert_to_numpy(augmentation.translate(IMAGES, seed(), 2))
    offsets = [(row, column) for row in range(-2, 3) for column in range(-2, 3)]
    found = set()
    for image, result in zip(IMAGES, moved, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        matches = [(r, c) for r, c in offsets if np.allclose(padded[2 + r : 34 + r, 2 + c : 34 + c], result, atol=1e-6)]
        assert len(matches) == 1
        found |= set(matches)
    assert len(found) > 12


def test_half_of_the_images_are_mirrored():
    mirrored = ops.convert_to_numpy(augmentation.mirror(IMAGES, seed()))
    flipped = np.array([np.array_equal(a, b[:, ::-1]) for a, b in zip(mirrored, IMAGES, strict=True)])
    assert np.array_equal(mirrored[~flipped], IMAGES[~flipped])
    assert 20 < flipped.sum() < 44


def test_differentiable_augmentation_cuts_out_and_keeps_the_shape():
    changed = ops.convert_to_numpy(augmentation.differentiable(IMAGES, seed()))
    assert changed.shape == IMAGES.shape
    empty = (changed == 0).all(axis=-1).mean(axis=(1, 2))
    assert (empty > 0.05).all()
    assert empty.max() < 0.7


def test_composites_say_which_classes_they_show():
    """Images of one grey level each, so that the share of both images can be read off the pixels."""
    grey = np.linspace(-1, 1, 500, dtype="float32")
    images = np.broadcast_to(grey[:, None, None, None], (500, 32, 32, 3))
    classes = np.eye(500, dtype="float32")
    mixed, shown = (ops.convert_to_numpy(each) for each in augmentation.composites(images, classes, seed()))
    for number in range(500):
        here, other = grey[number], grey[number - 1]
        share = ((mixed[number, ..., 0] - here) / (other - here)).mean()
        expected = set()
        if share < 0.85:
            expected.add(number)
        if share > 0.15:
            expected.add((number - 1) % 500)
        assert set(np.flatnonzero(shown[number])) == expected
    assert set(np.unique(shown)) == {0, 1}
    counts = shown.sum(axis=1)
    assert 0.3 < np.mean(counts == 2) < 0.75


def test_a_composite_of_one_class_shows_that_class_only():
    _, shown = augmentation.composites(IMAGES, np.eye(10, dtype="float32")[np.full(64, 7)], seed())
    assert ops.convert_to_numpy(shown).tolist() == np.eye(10)[np.full(64, 7)].tolist()


@pytest.mark.parametrize("number", [0, 1])
def test_halves(number):
    first, second = np.zeros((3, 4, 4, 1), "uint8"), np.ones((2, 4, 4, 1), "uint8")
    both = augmentation.halves(first, second)
    assert both.shape == (4, 4, 4, 1)
    assert both[number, :, :2].max() == 0
    assert both[number, :, 2:].min() == 1
    assert both[2 + number, :2].max() == 0
    assert both[2 + number, 2:].min() == 1


def test_some_images_lose_half_of_their_resolution():
    images = GENERATOR.normal(size=(200, 8, 8, 3)).astype("float32")
    blurred = ops.convert_to_numpy(augmentation.blur(images, keras.random.SeedGenerator(0), 0.25))
    changed = (blurred != images).any(axis=(1, 2, 3))
    assert changed.mean() == pytest.approx(0.25, abs=0.1)
    assert np.array_equal(blurred[~changed], images[~changed])
    assert blurred[changed].std() < 0.7 * images[changed].std()
