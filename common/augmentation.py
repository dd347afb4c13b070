"""Augmentation as operations on tensors, differentiable and the same on every backend.

Images are (n, side, side, channels), around 0. What is random is drawn per image, from a `keras.random.SeedGenerator`.
"""

import numpy as np
from keras import ops, random


def random_uniform(images, seed, low=0.0, high=1.0):
    """Returns one number per image, (n, 1, 1, 1)."""
    return random.uniform((ops.shape(images)[0], 1, 1, 1), low, high, seed=seed)


def translate(images, seed, pixels):
    """Moves each image by up to so many `pixels` both ways, by matrices of zeros and ones; zeros come in."""
    places = ops.arange(images.shape[1], dtype="float32")
    for axes in ("nij,njwc->niwc", "nij,nhjc->nhic"):
        moved = ops.floor(random_uniform(images, seed, -pixels, pixels + 1))[..., 0]
        images = ops.einsum(axes, ops.cast(places[:, None] + moved == places, images.dtype), images)
    return images


def differentiable(images, seed):
    """Changes brightness, saturation and contrast, moves, and cuts out: DiffAugment of Zhao et al. 2020."""
    images = images + random_uniform(images, seed, -0.5, 0.5)
    grey = ops.mean(images, axis=3, keepdims=True)
    images = grey + (images - grey) * random_uniform(images, seed, 0, 2)
    mean = ops.mean(images, axis=(1, 2, 3), keepdims=True)
    side = images.shape[1]
    images = translate(mean + (images - mean) * random_uniform(images, seed, 0.5, 1.5), seed, side // 8)
    places = ops.arange(side, dtype="float32")
    row, column = (ops.abs(places - random_uniform(images, seed, 0, side)[..., 0, 0]) < side // 4 for _ in range(2))
    return ops.where(row[:, :, None, None] & column[:, None, :, None], 0.0, images)


def mirror(images, seed):
    """Mirrors half of the images."""
    return ops.where(random_uniform(images, seed) < 0.5, ops.flip(images, axis=2), images)


def blur(images, seed, share):
    """Halves the resolution of some of the images."""
    blurred = ops.image.resize(ops.average_pool(images, 2, 2), images.shape[1:3], interpolation="bilinear")
    return ops.where(random_uniform(images, seed) < share, blurred, images)


def composites(images, classes, seed):
    """Returns images that are often made of two, and which classes they show, like `classes` (n, classes), 0 or 1.

    The second one is the next of the batch: in a rectangle (CutMix, Yun et al. 2019), in smooth blobs, or both in a
    mosaic of four small images. A class counts where its image covers at least 15 %.
    """
    others, other_classes = ops.roll(images, 1, axis=0), ops.roll(classes, 1, axis=0)
    side, inside = images.shape[1], []
    places = ops.arange(side, dtype="float32")
    for _ in range(2):
        length = random_uniform(images, seed, 0.3 * side, 0.9 * side)[..., 0, 0]
        first = random_uniform(images, seed)[..., 0, 0] * (side - length)
        inside.append(ops.cast((places >= first) & (places < first + length), "float32"))
    rectangle = inside[0][:, :, None, None] * inside[1][:, None, :, None]
    heights = random.normal((ops.shape(images)[0], 4, 4, 1), seed=seed)
    blobs = ops.sigmoid(8 * ops.image.resize(heights, (side, side), interpolation="bicubic"))
    kind = random_uniform(images, seed)
    mask = ops.where(kind < 0.3, 0.0, ops.where(kind < 0.6, rectangle, blobs))
    share = ops.mean(mask, axis=(1, 2))
    small, other_small = (ops.average_pool(each, 2, 2) for each in (images, others))
    rows = [ops.concatenate(pair, axis=2) for pair in ((small, other_small), (other_small, small))]
    mosaic = kind > 0.85
    mixed = ops.where(mosaic, ops.concatenate(rows, axis=1), images * (1 - mask) + others * mask)
    mosaic = mosaic[:, 0, 0]
    shown = ops.where((share < 0.85) | mosaic, classes, 0.0), ops.where((share > 0.15) | mosaic, other_classes, 0.0)
    return mixed, ops.maximum(*shown)


def halves(first, second):
    """Returns arrays of images made of two halves, left and right, then top and bottom, as many as both sets have."""
    count, middle = min(len(first), len(second)), first.shape[1] // 2
    first, second = first[:count], second[:count]
    beside = np.concatenate([first[:, :, :middle], second[:, :, middle:]], axis=2)
    return np.concatenate([beside, np.concatenate([first[:, :middle], second[:, middle:]], axis=1)])
