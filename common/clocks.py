"""Images of an analog clock with known times: a renderer, and the loader of the course's images.

The clock is the one of the course "Introduction to Deep Learning": a round wall clock that lies on grey planks, seen by
a camera above it. `render` intersects the line of sight of every pixel with the planks, the dial and the rim (pinhole
camera, full perspective) and composites them from back to front. All lengths are in radii of the dial; the centre of
the dial is the origin, and the camera looks at it.
"""

import concurrent.futures
import functools
import hashlib
import os
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from common.datasets import check_array, checked_samples, open_array, open_cache
from common.errors import UserError
from common.files import sha256

MINUTES = 720  # times that a dial of twelve hours can show
IMAGES_PER_MINUTE = 25
SIZES = (75, 150)  # pixels, the two sizes of the course's images
SAMPLE_COUNT = 400
MIN_COURSE_IMAGES = 100  # fewer cannot be split and trained on
CHUNK = 60  # images rendered at once; another number renders other images
SEED = 1  # of all scenes
VERSION = 2  # of the rendered images; a cache of another version is rendered again

# Every property of a scene is uniform in a range. The ranges cover what the course's images show, and more.
# Lengths are in radii of the dial, tones in grey levels, angles in degrees.
RANGES = {
    "tilt": (0.0, 46.0),  # between the line of sight and the axis of the clock; 46 degrees make an axis ratio of 0.7
    "camera_distance": (2.7, 6.5),
    "dial_share": (0.66, 1.0),  # width of the dial as a fraction of the image's
    "dial_tone": (182.0, 240.0),
    "gradient": (-22.0, 22.0),  # change of the dial's tone from its centre to its edge
    "gradient_direction": (0.0, 360.0),
    "rim_width": (0.11, 0.21),
    "rim_top": (0.03, 0.13),  # height above the dial
    "rim_bottom": (0.06, 0.26),  # depth of the planks below the dial
    "rim_tone": (38.0, 105.0),
    "light_direction": (0.0, 360.0),
    "light_height": (35.0, 75.0),  # above the horizon
    "shadow": (0.1, 0.6),  # fraction of the light that the shadow takes
    "mark_tone": (20.0, 110.0),  # ticks and dots
    "numeral_tone": (25.0, 140.0),
    "numeral_height": (0.125, 0.18),
    "numeral_radius": (0.72, 0.80),
    "tick_start": (0.855, 0.895),
    "tick_length": (0.05, 0.10),
    "tick_width": (0.014, 0.036),
    "dot_radius": (0.007, 0.017),
    "hand_tone": (25.0, 85.0),
    "minute_length": (0.68, 0.83),
    "hour_length": (0.48, 0.63),
    "minute_width": (0.042, 0.078),
    "hour_width": (0.046, 0.084),
    "tail": (0.03, 0.16),
    "hub_radius": (0.0, 0.065),
    "hand_height": (0.0, 0.035),
    "hand_shadow": (0.0, 0.22),
    "wood_tone": (75.0, 150.0),
    "wood_contrast": (6.0, 30.0),
    "wood_direction": (0.0, 360.0),
    "grain": (0.6, 2.2),  # frequency of the grain
    "plank_width": (0.8, 2.0),
    "plank_offset": (0.0, 1.0),
    "gap_width": (0.02, 0.075),
    "glare_distance": (0.1, 1.1),
    "glare_direction": (0.0, 360.0),
    "glare_radius": (0.10, 0.30),
    "glint_sharpness": (40.0, 300.0),
    "glint": (0.0, 300.0),
    "softness": (0.35, 1.5),  # width of an edge in pixels: aliased below 1, smooth above
    "blur": (0.0, 0.14),  # weight of each neighbour in a row or column
    "noise": (0.5, 4.5),  # standard deviation
    "contrast": (0.82, 1.12),
    "brightness": (-14.0, 14.0),
}
P_GLARE = 0.55
P_ANY_ROLL = 0.2  # otherwise the camera is held nearly level, as in the course's images
P_ALIASED = 0.3  # at 75 pixels: one sample per pixel; otherwise the average of 2 x 2 pixels of the image at 150
P_UPSAMPLED = 0.2  # at 150 pixels: the image at 75, upsampled


class ClockImages(NamedTuple):
    images: np.ndarray  # uint8 (n, size, size)
    labels: np.ndarray  # int64 (n, 2), hour 0 to 11 and minute 0 to 59, sorted by time where they are rendered
    source: str  # "course" or "rendered"
    checksum: str  # SHA-256 of the file of images; of the array of images where a few were rendered


# --------------------------------------------------------------------------------------------------------------- scenes


def hand_angles(hour, minute):
    """Returns the angles of hour and minute hand in radians, clockwise from 12; the hour hand moves continuously."""
    minute = np.asarray(minute, float)
    return 2 * np.pi * (np.asarray(hour) + minute / 60) / 12, 2 * np.pi * minute / 60


def sample_scenes(labels, generator):
    """Samples one scene per label, (n, 2), from a `numpy.random.Generator`.

    Returns a namespace with a float32 array (n, 1, 1) per name in `RANGES`, angles in radians, and what is not uniform.
    """
    count = len(labels)
    values = {name: generator.uniform(low, high, count) for name, (low, high) in RANGES.items()}
    for name in ("tilt", "gradient_direction", "light_direction", "light_height", "wood_direction", "glare_direction"):
        values[name] = np.radians(values[name])
    values["turn"] = generator.uniform(0, 2 * np.pi, count)  # of the clock on the planks
    any_roll = generator.random(count) < P_ANY_ROLL
    level_roll = generator.normal(0, np.radians(9), count)
    values["roll"] = np.where(any_roll, generator.uniform(-np.pi, np.pi, count), level_roll)
    values["glare"] = np.where(generator.random(count) < P_GLARE, generator.uniform(20, 330, count), 0)
    for name in ("offset_right", "offset_up"):  # of the dial's centre, in halves of the image
        values[name] = np.clip(generator.normal(0, 0.045, count), -0.1, 0.1)
    values["hour_angle"], values["minute_angle"] = hand_angles(labels[:, 0], labels[:, 1])
    scene = types.SimpleNamespace(**{name: array.astype("float32")[:, None, None] for name, array in values.items()})
    scene.font = generator.integers(len(numeral_atlas()), size=(count, 1, 1))
    scene.texture = generator.integers(len(wood_textures()), size=(count, 1, 1))
    scene.plank_tones = generator.normal(0, 9, (count, 8)).astype("float32")
    scene.aliased = generator.random(count) < P_ALIASED
    scene.upsampled = generator.random(count) < P_UPSAMPLED
    scene.noise_seed = int(generator.integers(2**31))
    return scene


# ------------------------------------------------------------------------------------------------- numerals and planks

GLYPH_SIZE = 64  # pixels of a numeral's cell, which is two numeral heights wide and high


@functools.cache
def numeral_atlas():
    """The numerals 12, 1, ..., 11 in six fonts, each sharp and slightly blurred: float32 (12, 12, 64, 64), 0 to 1.

    Read from a file made by `report/make_numerals.py`, since versions of Pillow and fonts draw them differently.
    """
    path = checked_samples("numerals.png") / "numerals.png"
    with Image.open(path) as image:
        cells = np.asarray(image, "float32").reshape(12, GLYPH_SIZE, 12, GLYPH_SIZE).swapaxes(1, 2)
    return cells / 255


@functools.cache
def wood_textures():
    """Periodic wood grain along the columns: float32 (6, 512, 512), mean 0, standard deviation 1."""
    generator = np.random.default_rng(20241001)
    frequency = np.fft.fftfreq(512) * 512
    along, across = frequency[None, :], frequency[:, None]
    textures = []
    for _ in range(6):
        texture = np.zeros((512, 512))
        # Broad bands, the grain proper and fine streaks: noise that varies slowly along and quickly across the plank.
        for weight, length, breadth in ((0.7, 3.0, 16.0), (1.0, 7.0, 70.0), (0.8, 24.0, 200.0)):
            noise = np.fft.fft2(generator.normal(size=(512, 512)))
            band = np.fft.ifft2(noise * np.exp(-np.square(along / length) - np.square(across / breadth))).real
            texture += weight * band / band.std()
        textures.append((texture - texture.mean()) / texture.std())
    return np.array(textures, "float32")


# ------------------------------------------------------------------------------------------------------------- renderer


def _reproducible(function, *arguments):
    """Evaluates in float64 and rounds to float32: processors disagree in the last digit of a float32 sine or power."""
    return function(*(np.asarray(argument, "float64") for argument in arguments)).astype("float32")


def _coverage(distance, edge):
    """Fraction of a pixel inside an outline, from its signed distance (negative inside) and the width of the edge."""
    return np.clip(0.5 - distance / edge, 0, 1)


def _over(image, tone, alpha):
    return image + alpha * (tone - image)


def _rotate(x, y, angle):
    cosine, sine = _reproducible(np.cos, angle), _reproducible(np.sin, angle)
    return x * cosine + y * sine, y * cosine - x * sine


def _radius(x, y):
    return np.sqrt(x * x + y * y)


def lines_of_sight(scene, size):
    """Returns a function from a height above the dial to the points where the lines of sight meet that plane.

    The points are two float32 arrays (n, size, size): x to the right and y away from the camera.
    """
    centers = ((np.arange(size, dtype="float32") + 0.5) * 2 / size - 1)[None]
    right = centers[:, None, :] - scene.offset_right
    up = -centers[:, :, None] - scene.offset_up
    right, up = _rotate(right, up, scene.roll)
    focal_length = scene.dial_share * scene.camera_distance
    cosine, sine = _reproducible(np.cos, scene.tilt), _reproducible(np.sin, scene.tilt)
    away = up * cosine + focal_length * sine
    down = focal_length * cosine - up * sine

    def meet(height):
        steps = (scene.camera_distance * cosine - height) / down
        return steps * right, steps * away - scene.camera_distance * sine

    return meet


def _planks(scene, x, y):
    """Tone of the planks."""
    along, across = _rotate(x, y, scene.wood_direction)
    position = across / scene.plank_width + scene.plank_offset
    plank = np.floor(position)
    number = plank.astype(int) % 8
    tone = scene.wood_tone + scene.plank_tones[np.arange(len(number))[:, None, None], number]
    # Each plank shows another part of the texture. Nearest-neighbour sampling keeps the grain rough.
    column = (along * scene.grain * 60 + plank * 137).astype(int) % 512
    row = (across * scene.grain * 90 + plank * 61).astype(int) % 512
    tone = tone + scene.wood_contrast * wood_textures()[scene.texture, row, column]
    to_gap = np.abs(position - np.rint(position)) * scene.plank_width
    return tone * (1 - 0.75 * np.clip(1.5 - 2 * to_gap / scene.gap_width, 0, 1))


def _rim(scene, image, meet, light, halfway, edge, levels):
    """Composites the rim, a ring with a rounded profile, as flat rings at `levels` from -1 (the planks) to 1."""
    middle, half_height = (scene.rim_top - scene.rim_bottom) / 2, (scene.rim_top + scene.rim_bottom) / 2
    half_width = scene.rim_width / 2
    center = 1 + half_width
    for level in levels:
        x, y = meet(middle + level * half_height)
        radius = _radius(x, y)
        bulge = half_width * np.sqrt(1 - level * level)
        if level < 0:  # below its middle only the outside of the rim is visible
            distance = radius - center - bulge
            outwards, upwards = np.sqrt(1 - level * level), level
        else:
            distance = np.abs(radius - center) - np.maximum(bulge, 0.25 * half_width)
            outwards = np.clip((radius - center) / half_width, -1, 1)
            upwards = np.sqrt(1 - outwards * outwards)
        scale = outwards / np.maximum(radius, 1e-3)
        diffuse, specular = (
            np.clip(scale * (x * right + y * away) + upwards * up, 0, 1) for right, away, up in (light, halfway)
        )
        tone = scene.rim_tone * (0.55 + 0.65 * diffuse)
        tone = tone + scene.glint * _reproducible(np.power, specular, scene.glint_sharpness)
        image = _over(image, tone, _coverage(distance, edge))
    return image


def _dial(scene, x, y, radius, edge):
    """Tone of the dial with numerals, ticks and dots; y points to 12."""
    angle = _reproducible(np.arctan2, x, y)
    hour = np.rint(angle * (6 / np.pi))
    minute = np.rint(angle * (30 / np.pi))
    hour_angle = hour * (np.pi / 6)
    # Ticks: the distance from the ray through the nearest hour and from the ring of the ticks.
    from_ring = radius - scene.tick_start - scene.tick_length / 2
    across = np.abs(_reproducible(np.sin, angle - hour_angle)) * radius - scene.tick_width / 2
    marks = _coverage(np.maximum(across, np.abs(from_ring) - scene.tick_length / 2), edge)
    # Dots: the distance from the nearest minute on that ring. A dot smaller than a pixel fades instead of vanishing.
    beside = _reproducible(np.sin, angle - minute * (np.pi / 30)) * radius
    from_dot = np.sqrt(np.square(from_ring) + np.square(beside))
    dots = _coverage(from_dot - scene.dot_radius, edge) * np.minimum(2 * scene.dot_radius / edge + 0.35, 1)
    marks = np.maximum(marks, dots)
    # Numerals: the position in the cell of the nearest hour.
    column = (x - scene.numeral_radius * _reproducible(np.sin, hour_angle)) / scene.numeral_height
    row = -(y - scene.numeral_radius * _reproducible(np.cos, hour_angle)) / scene.numeral_height
    inside = np.maximum(np.abs(column), np.abs(row)) < 0.99
    column, row = (np.where(inside, (part + 1) * (GLYPH_SIZE / 2), 0).astype(int) for part in (column, row))
    numerals = numeral_atlas()[scene.font, hour.astype(int) % 12, row, column] * inside
    return _over(_over(scene.dial_tone, scene.mark_tone, marks), scene.numeral_tone, numerals)


def _hands(scene, x, y, edge):
    """Coverage by the hands and the hub; y points to 12."""

    def hand(angle, length, width):
        forward, across = _rotate(y, x, angle)
        return np.maximum(
            np.abs(forward - (length - scene.tail) / 2) - (length + scene.tail) / 2, np.abs(across) - width / 2
        )

    hour = hand(scene.hour_angle, scene.hour_length, scene.hour_width)
    minute = hand(scene.minute_angle, scene.minute_length, scene.minute_width)
    hub = _radius(x, y) - scene.hub_radius
    return _coverage(np.minimum(np.minimum(hour, minute), hub), edge)


def render(scene, size):
    """Renders the scenes of `sample_scenes`: uint8 (n, size, size)."""
    meet = lines_of_sight(scene, size)
    edge = scene.softness * 2 / (size * scene.dial_share)
    cosine, sine = _reproducible(np.cos, scene.light_height), _reproducible(np.sin, scene.light_height)
    light = *_rotate(cosine, 0, -scene.light_direction), sine
    # Halfway between the directions to light and camera: where the rim faces it, it glints (Blinn 1977).
    halfway = light[0], light[1] - _reproducible(np.sin, scene.tilt), light[2] + _reproducible(np.cos, scene.tilt)
    length = np.sqrt(sum(np.square(part) for part in halfway))
    halfway = tuple(part / length for part in halfway)

    def shadow_of(x, y, height):
        return x + height * light[0] / light[2], y + height * light[1] / light[2]

    x, y = meet(-scene.rim_bottom)
    image = _planks(scene, x, y)
    from_shadow = _radius(*shadow_of(x, y, scene.rim_top + scene.rim_bottom)) - (1 + scene.rim_width)
    image = image * (1 - scene.shadow * _coverage(from_shadow, 0.2))
    image = _rim(scene, image, meet, light, halfway, edge, (-0.95, -0.6, -0.2))

    x, y = meet(0.0)
    radius = _radius(x, y)
    dial = _dial(scene, *_rotate(x, y, scene.turn), radius, edge)
    dial = dial + scene.gradient * _rotate(x, y, scene.gradient_direction)[0]
    from_rim_shadow = _radius(x + scene.rim_top * light[0], y + scene.rim_top * light[1]) - 1
    dial = dial * (1 - 0.5 * scene.shadow * _coverage(from_rim_shadow, 0.08))
    hand_shadow = _hands(scene, *_rotate(*shadow_of(x, y, 0.05), scene.turn), 3 * edge)
    dial = dial * (1 - scene.hand_shadow * hand_shadow)
    glare_x, glare_y = _rotate(scene.glare_distance, 0, -scene.glare_direction)
    glare_x, glare_y = x - glare_x, y - glare_y
    squared = (np.square(glare_x) + np.square(glare_y)) / np.square(scene.glare_radius)
    glare = scene.glare * (0.7 * _reproducible(np.exp, -squared) + 0.3 / (1 + squared))
    image = _over(image, dial, _coverage(radius - 1 - scene.rim_width / 2, edge))

    x, y = meet(scene.hand_height)
    image = _over(image, scene.hand_tone, _hands(scene, *_rotate(x, y, scene.turn), edge))
    image = image + glare * np.where(radius < 1, 1, 0.35)
    image = _rim(scene, image, meet, light, halfway, edge, (0.1, 0.35, 0.6, 0.8, 0.95))

    image = (image - 128) * scene.contrast + 128 + scene.brightness
    image = _blur(np.clip(image, 0, 255), scene.blur)
    noise = np.random.default_rng([scene.noise_seed, size]).standard_normal(image.shape, "float32")
    return np.clip(np.rint(image + scene.noise * noise), 0, 255).astype("uint8")


def _blur(image, weight):
    """Separable blur over rows, then columns: each neighbour gets `weight`."""
    padded = np.pad(image, ((0, 0), (1, 1), (0, 0)), "edge")
    image = image + weight * (padded[:, :-2] + padded[:, 2:] - 2 * image)
    padded = np.pad(image, ((0, 0), (0, 0), (1, 1)), "edge")
    return image + weight * (padded[:, :, :-2] + padded[:, :, 2:] - 2 * image)


def _upsample(images, size):
    """Upsamples uint8 (n, side, side) to (n, size, size), alternately bilinearly and by repeating pixels."""
    filters = (Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
    upsampled = [Image.fromarray(image).resize((size, size), filters[i % 2]) for i, image in enumerate(images)]
    return np.array(upsampled, "uint8").reshape(-1, size, size)


def _downsample(images, size):
    """Averages 2 x 2 pixels of uint8 (n, 2 size, 2 size)."""
    return images.reshape(len(images), size, 2, size, 2).mean((2, 4), dtype="float32").round().astype("uint8")


def render_times(labels, seed):
    """Renders one scene per label, (n, 2), reproducibly; `seed` is an int or a sequence of int.

    Returns a dict from each of `SIZES` to the images of that size, uint8 (n, size, size).
    """
    small_size, large_size = SIZES
    scene = sample_scenes(np.asarray(labels), np.random.default_rng(seed))
    large = render(scene, large_size)
    small = np.where(scene.aliased[:, None, None], render(scene, small_size), _downsample(large, small_size))
    large[scene.upsampled] = _upsample(small[scene.upsampled], large_size)
    return {small_size: small, large_size: large}


def _render_chunks(labels, first_seed):
    """Renders `labels` on all cores and yields what `render_times` returns for each `CHUNK` of them, in order."""
    starts = range(0, len(labels), CHUNK)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            yield from pool.map(
                lambda start: render_times(labels[start : start + CHUNK], [SEED, first_seed + start]), starts
            )
        finally:  # Ctrl-C waits for the chunks at work only
            pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------- loading


def all_labels():
    """Labels of the full set in its order: int64 (18000, 2), each minute from 0:00 to 11:59 25 times."""
    minutes = np.repeat(np.arange(MINUTES), IMAGES_PER_MINUTE)
    return np.stack([minutes // 60, minutes % 60], axis=1)


def load_clocks(data_dir, size, count=None, sample=False):
    """Returns the course's images in `data_dir/clocks/`, else 18,000 rendered ones, cached, as `ClockImages`.

    `size` is 75 or 150 pixels. With `count`, at most so many images, evenly spread over the dial, are taken of the
    course's or rendered without a cache; with `sample`, `SAMPLE_COUNT` (or `count`) are rendered, whatever `data_dir`
    holds. Those show other scenes than the full set. Raises `UserError` where the course's files are damaged or the
    cache cannot be written.
    """
    course, labels, name = Path(data_dir) / "clocks", all_labels(), f"images_{size}"
    if not sample and any(os.path.lexists(course / file) for file in ("images.npy", "labels.npy")):
        loaded = _load_course(course, size)
        return loaded._replace(images=_spread(loaded.images, count), labels=_spread(loaded.labels, count))
    if sample or count:
        count = count or SAMPLE_COUNT
        images = _render_few(count)[size]
        return ClockImages(images, _spread(labels, count), "rendered", hashlib.sha256(images).hexdigest())

    def interpret(arrays, manifest):
        if manifest.get("version") != VERSION:
            raise ValueError("the cache is of another version")
        check_array(name, arrays[name], (len(labels), size, size), np.uint8)
        return ClockImages(arrays[name], labels, "rendered", manifest["sha256"][name])

    return open_cache("clocks", Path(data_dir) / "cache" / "clocks", [name], interpret, _full_set)


def _spread(array, count):
    """Returns `count` evenly spaced items of `array`, or all of them where it is None or there are no more."""
    if count is None or count >= len(array):
        return array
    return array[np.arange(count) * len(array) // count]


@functools.cache
def _render_few(count):
    labels = all_labels()
    chunks = list(_render_chunks(_spread(labels, count), first_seed=len(labels)))  # the seeds after the full set's
    images = {size: np.concatenate([chunk[size] for chunk in chunks]) for size in SIZES}
    for array in images.values():
        array.flags.writeable = False  # it is shared
    return images


def _full_set():
    """Returns what `datasets.write_cache` takes; the images are rendered while they are written."""
    import keras  # for its progress bar

    labels = all_labels()
    print(f"rendering {len(labels):,} clocks ({len(labels) * sum(size**2 for size in SIZES) / 1e6:.0f} MB)")
    bar = keras.utils.Progbar(len(labels), unit_name="image")

    def chunks():
        for chunk in _render_chunks(labels, first_seed=0):
            yield from ((f"images_{size}", images) for size, images in chunk.items())
            bar.add(len(chunk[SIZES[0]]))

    layout = {f"images_{size}": ((len(labels), size, size), np.uint8) for size in SIZES}
    return layout, chunks(), {"version": VERSION}


def _load_course(folder, size):
    def require(condition, problem):
        if not condition:
            raise ValueError(problem)

    try:
        images, labels = (open_array(folder / f"{name}.npy") for name in ("images", "labels"))
        fits = images.dtype == np.uint8 and images.shape[1:] in {(side, side) for side in SIZES}
        require(fits, f"images.npy holds {images.dtype} {images.shape} instead of uint8 (n, 75, 75) or (n, 150, 150)")
        fits = np.issubdtype(labels.dtype, np.integer) and labels.ndim == 2 and labels.shape[1] == 2
        require(fits, f"labels.npy holds {labels.dtype} {labels.shape} instead of integers (n, 2)")
        require(len(images) == len(labels), f"{len(images)} images but {len(labels)} labels")
        require(len(images) >= MIN_COURSE_IMAGES, f"{len(images)} images, and {MIN_COURSE_IMAGES} are needed at least")
        in_range = ((labels >= 0) & (labels < (12, 60))).all()
        require(in_range, "labels.npy holds hours outside 0 to 11 or minutes outside 0 to 59")
        require(images.shape[1] >= size, f"images.npy holds images of {images.shape[1]} pixels, and {size} are needed")
    except ValueError as problem:
        advice = f"put both files of the course into {folder}, or remove the folder to use rendered clocks"
        raise UserError(f"{folder}: {problem}; {advice}") from problem
    checksum = sha256(folder / "images.npy")
    if images.shape[1] > size:
        images = _downsample(images, size)
    return ClockImages(images, labels.astype("int64"), "course", checksum)
