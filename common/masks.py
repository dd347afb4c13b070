"""Objects found in small images by code: where they are, where something can be added to them, and cutting it out.

Masks are bool (n, side, side); what is made of them without edges is float32, 0 to 1. NumPy and SciPy only.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import ndimage


def largest_regions(masks):
    """Keeps the largest connected region of each mask, bool (n, side, side)."""
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = True
    numbers, count = ndimage.label(masks, in_plane)
    sizes = np.bincount(numbers.ravel(), minlength=count + 1)
    sizes[0] = 0
    areas = sizes[numbers]
    return masks & (areas == areas.max(axis=(1, 2), keepdims=True))


def smooth(masks, sigma=1.0):
    """Returns masks with soft edges, float32 (n, side, side), 0 to 1."""
    return np.clip(ndimage.gaussian_filter(np.asarray(masks, "float32"), (0, sigma, sigma)), 0, 1)


def enlarged(evidence, side):
    """Scales evidence, float (n, size, size), to 0 to 1 in each image, and enlarges it to (n, side, side), smoothly."""
    low, high = evidence.min(axis=(1, 2), keepdims=True), evidence.max(axis=(1, 2), keepdims=True)
    evidence, zoom = (evidence - low) / np.maximum(high - low, 1e-6), side / evidence.shape[1]
    return smooth(ndimage.zoom(evidence, (1, zoom, zoom), order=1, mode="nearest", grid_mode=True), 1.5)


def stands_out(images):
    """Returns how much each pixel differs from the left, right and upper border, float (n, side, side), 0 to 1.

    The border is mostly background (Wei et al. 2012). The lower one is left out, since legs reach it.
    """
    side = images.shape[1]
    rows, columns = np.mgrid[:side, :side]
    places = np.stack([rows, columns], axis=-1).reshape(-1, 2) / side
    border = np.flatnonzero((rows.ravel() == 0) | (columns.ravel() % (side - 1) == 0))
    # Colours far away count less: sky above is no evidence against a horse below that has its colour.
    apart = np.square(places[:, None] - places[border]).sum(-1)
    differences = np.empty((len(images), side * side))
    for number, image in enumerate(images.reshape(len(images), -1, 3) / np.float32(255)):
        distances = np.square(image[:, None] - image[border]).sum(-1) + 0.15 * apart
        differences[number] = np.sqrt(np.partition(distances, 3, axis=1)[:, 3])  # a few border pixels may be object
    differences /= np.maximum(np.quantile(differences, 0.95, axis=1, keepdims=True), 1e-6)
    return np.clip(differences, 0, 1).reshape(len(images), side, side)


def find_objects(images, evidence):
    """Finds the object in each image, bool (n, side, side), by where evidence is, by the border, and by its colours.

    `evidence` of its class, float (n, side, side), 0 to 1, is coarse. Together with what stands out from the border and
    a preference for the middle it is the prior of a few rounds of expectation maximisation, in which object and
    background have a normal distribution of colours each. The largest connected region is kept.
    """
    places = (np.arange(images.shape[1]) + 0.5) / images.shape[1] - 0.5
    middle = np.exp(-np.square(places / 0.33)[:, None] / 2 - np.square(places / 0.33) / 2)
    prior = smooth((0.4 + 0.6 * evidence) * middle * (0.2 + 0.8 * stands_out(images)), 0.7)
    prior /= np.quantile(prior, 0.97, axis=(1, 2), keepdims=True)
    prior = np.clip(prior, 0.03, 0.97).reshape(len(images), -1).astype("float64")
    colors, share = images.reshape(len(images), -1, 3).astype("float64") / 255, prior
    for _ in range(3):
        likelihoods = []
        for weights in (share, 1 - share):
            weights = weights[..., None] / weights.sum(axis=1)[:, None, None]
            mean = (weights * colors).sum(axis=1, keepdims=True)
            covariance = np.einsum("npi,npj->nij", weights * (colors - mean), colors - mean) + 4e-3 * np.eye(3)
            distance = np.einsum("npi,nij,npj->np", colors - mean, np.linalg.inv(covariance), colors - mean)
            likelihoods.append(-(distance + np.linalg.slogdet(covariance)[1][:, None]) / 2)
        # Tempered, since neighbouring pixels are not independent.
        odds = 0.5 * (likelihoods[0] - likelihoods[1]) + 1.5 * np.log(prior / (1 - prior))
        share = smooth((1 / (1 + np.exp(-np.clip(odds, -30, 30)))).reshape(evidence.shape), 0.7).reshape(prior.shape)
        share = np.clip(share, 0.01, 0.99).astype("float64")
    return largest_regions(share.reshape(evidence.shape) > 0.5)


def find_pose(bodies):
    """Reads off bodies, bool (n, side, side), where the horses stand.

    Returns row and middle column of the back, and the width of the body, in pixels; -1 where the head is on the left,
    else 1; and whether the horse is seen from the front, much higher than wide: (n,) each.
    """
    area, side = np.maximum(bodies.sum(axis=(1, 2)), 1), bodies.shape[1]
    rows, columns = np.arange(side)[:, None], np.arange(side)[None]
    row, column = ((bodies * places).sum(axis=(1, 2)) / area for places in (rows, columns))
    height, width = (
        4 * np.sqrt((bodies * np.square(places - middle[:, None, None])).sum(axis=(1, 2)) / area)
        for places, middle in ((rows, row), (columns, column))
    )
    top = np.where(bodies.any(axis=1), bodies.argmax(axis=1), side)  # first row of each column
    near = np.argsort(np.abs(columns - column[:, None]), axis=1, kind="stable")[:, :7]
    back = np.median(np.take_along_axis(top, near, axis=1), axis=1)
    # Of a horse only head and neck are higher than the back.
    upper = bodies & (rows < back[:, None, None])
    head = np.where((upper * (columns - column[:, None, None])).sum(axis=(1, 2)) < 0, -1, 1)
    return back, column, width, head, width < 0.7 * height


def lift(masks, pixels):
    """Moves masks (n, side, side) up by so many pixels; what leaves the image is lost."""
    lifted = np.zeros_like(masks)
    lifted[:, : masks.shape[1] - pixels] = masks[:, pixels:]
    return lifted


def wing_bands(bodies, height):
    """Returns where wings go, bool (n, side, side): up to `height` pixels above the middle of each body."""
    _, column, width, _, _ = find_pose(bodies)
    middle = np.abs(np.arange(bodies.shape[1]) - column[:, None]) <= 0.3 * width[:, None]
    raised = np.logical_or.reduce([lift(bodies, pixels) for pixels in range(1, height + 1)])
    return raised & ~bodies & middle[:, None]


def room_needed(bodies, height, most):
    """Returns by how many rows each body must move down so that `height` fits above its back: int (n,), 0 to `most`."""
    return np.clip(np.rint(height - find_pose(bodies)[0]), 0, most).astype(int)


def move_down(images, pixels):
    """Moves each image (n, side, side, channels), or mask, down by its number of `pixels` (n,).

    Above it the first row is repeated, smoothed from side to side, since without that one sees its stripes.
    """
    rows = np.arange(images.shape[1]) - pixels[:, None]
    moved = images[np.arange(len(images))[:, None], np.maximum(rows, 0)]
    if images.ndim < 4:
        return moved
    first = ndimage.gaussian_filter1d(images[:, :1].astype("float32"), 2.5, axis=2, mode="nearest").astype(images.dtype)
    return np.where((rows < 0)[:, :, None, None], first, moved)


def best_seen(bodies, count):
    """Returns which `count` bodies show a whole horse best, int (count,), in order: wide ones with room above them."""
    back, _, width, _, _ = find_pose(bodies)
    area = np.maximum(bodies.sum(axis=(1, 2)), 1)
    cut_off = (bodies[:, 0].sum(axis=1) + bodies[:, :, [0, -1]].sum(axis=(1, 2))) / np.sqrt(area)
    quality = width - 0.5 * np.abs(back - bodies.shape[1] / 3) - 10 * cut_off
    return np.sort(np.argsort(-quality, kind="stable")[:count])


class Wings(NamedTuple):
    """Wings that were cut out of images: the longer half of each object, from its middle to its tip."""

    sources: np.ndarray  # uint8 (n, side, side, 4), images they are from and, as the last channel, masks, 0 or 255
    roots: np.ndarray  # float (n, 2), row and column of the middle of the object
    axes: np.ndarray  # float (n, 2), unit vector from root to tip, row and column
    lengths: np.ndarray  # float (n,), pixels from root to tip


def cut_wings(images, objects, count):
    """Cuts wings out of images (n, side, side, 3) with one object each, a mask; returns the best `count`, best first.

    The best objects are long, differ from the background, touch no border, and are neither tiny nor huge.
    """
    area = np.maximum(objects.sum(axis=(1, 2)), 1)
    places = np.stack(np.mgrid[: images.shape[1], : images.shape[2]], axis=-1).astype(float)
    roots = np.einsum("nyx,yxc->nc", objects, places) / area[:, None]
    offsets = places - roots[:, None, None]
    spread = np.einsum("nyx,nyxi,nyxj->nij", objects, offsets, offsets) / area[:, None, None] + 0.1 * np.eye(2)
    variances, vectors = np.linalg.eigh(spread)
    along = np.where(objects, np.einsum("nyxc,nc->nyx", offsets, vectors[..., -1]), 0)
    sign = np.where(along.max(axis=(1, 2)) >= -along.min(axis=(1, 2)), 1, -1)
    along *= sign[:, None, None]
    inside, outside = (
        (each[..., None] * images).sum(axis=(1, 2)) / np.maximum(each.sum(axis=(1, 2)), 1)[:, None]
        for each in (objects, ~objects)
    )
    border = objects[:, [0, -1]].any(axis=(1, 2)) | objects[:, :, [0, -1]].any(axis=(1, 2))
    quality = np.linalg.norm(inside - outside, axis=1) * np.sqrt(variances[:, 1] / variances[:, 0])
    share = area / objects[0].size
    quality *= np.where(~border & (share > 0.04) & (share < 0.4), 1, 1e-3)
    best = np.argsort(-quality, kind="stable")[:count]
    sources = np.concatenate([images, np.where(along > 0, 255, 0).astype("uint8")[..., None]], axis=-1)
    axes, lengths = vectors[..., -1] * sign[:, None], np.maximum(along.max(axis=(1, 2)), 1)
    return Wings(sources[best], roots[best], axes[best], lengths[best])


def place_wings(horses, bodies, wings, length, seed):
    """Pastes a random one of the `Wings` onto the back of each horse; one on each side where it is seen from the front.

    `horses` are uint8 (n, side, side, 3) and `length` is that of the pasted wings in pixels, give or take a fifth.
    Returns the collages, uint8, and where the wings are, float32 (n, side, side), 0 to 1.
    """
    draws, collages, pasted = np.random.default_rng(seed), horses.astype("float32"), np.zeros(bodies.shape, "float32")
    for number, (back, column, _, head, frontal) in enumerate(zip(*find_pose(bodies), strict=True)):
        wing = draws.integers(len(wings.sources))
        source, axis = wings.sources[wing].astype("float32"), wings.axes[wing]
        tilt, scale = draws.uniform(0.25, 0.9), wings.lengths[wing] / (length * draws.uniform(0.8, 1.2))
        for side in (-head, head) if frontal else (-head,):  # tilted towards the tail
            target = np.array([-math.cos(tilt), side * math.sin(tilt)])
            # From pixels of the collage to those of the source: along the wing and, mirrored by side, across it.
            across = np.outer([-axis[1], axis[0]], [-target[1], target[0]])
            matrix = scale * (np.outer(axis, target) + side * across)
            origin = wings.roots[wing] - matrix @ (back + 1, column)
            channels = np.moveaxis(source, -1, 0)
            *colors, mask = (ndimage.affine_transform(channel, matrix, origin, order=1) for channel in channels)
            alpha = np.clip(ndimage.gaussian_filter(mask / 255, 0.4), 0, 1)
            collages[number] += alpha[..., None] * (np.stack(colors, axis=-1) - collages[number])
            pasted[number] = np.maximum(pasted[number], alpha)
    return np.rint(np.clip(collages, 0, 255)).astype("uint8"), pasted
