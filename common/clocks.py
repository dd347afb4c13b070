"""Pictures of an analog clock with known times: a renderer, and a loader for the pictures of the course.

The clock is the one of the course "Introduction to Deep Learning": a round wall clock that lies on grey planks, seen by
a camera from somewhere above it. `render` computes, for every pixel, where its line of sight meets the planks, the dial
and the rim (pinhole camera, true perspective), and paints what it finds there from back to front. Everything is
measured in radii of the dial, with the centre of the dial at the origin and the camera looking at it.

`load_clocks` returns the course's own pictures where they lie in `data/clocks/`, else 18,000 rendered ones in the same
format, which it renders once and keeps under `data/cache/`.
"""

import concurrent.futures
import functools
import json
import os
import types
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from common.cli import UserError
from common.files import building, sha256, write_json

MINUTES = 720  # times that a dial of twelve hours can show
PICTURES_PER_MINUTE = 25
SIZES = (75, 150)  # pixels, the two sizes of the course's pictures
CHUNK = 60  # pictures rendered at once: small enough for the processor's cache
VERSION = 1  # of the pictures; a cache of another version is rendered again

# Every property of a scene is drawn from a range, evenly. The ranges hold what the course's pictures show, and more.
# Lengths are in radii of the dial, tones in grey levels, angles in degrees.
RANGES = {
    "tilt": (0.0, 46.0),  # between the line of sight and the axis of the clock; 46 degrees make an axis ratio of 0.7
    "camera_distance": (2.7, 6.5),
    "dial_share": (0.66, 1.0),  # width of the dial in widths of the picture
    "dial_tone": (182.0, 240.0),
    "gradient": (-22.0, 22.0),  # change of the dial's tone from its centre to its edge
    "gradient_direction": (0.0, 360.0),
    "rim_width": (0.11, 0.21),
    "rim_top": (0.03, 0.13),  # height above the dial
    "rim_bottom": (0.06, 0.26),  # depth of the planks below the dial
    "rim_tone": (38.0, 105.0),
    "light_direction": (0.0, 360.0),
    "light_height": (35.0, 75.0),  # above the horizon
    "shadow": (0.1, 0.6),  # share of the light that the shadow takes
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
    "grain": (0.6, 2.2),  # fineness of the grain
    "plank_width": (0.8, 2.0),
    "plank_offset": (0.0, 1.0),
    "gap_width": (0.02, 0.075),
    "glare_distance": (0.1, 1.1),
    "glare_direction": (0.0, 360.0),
    "glare_radius": (0.10, 0.30),
    "glint_sharpness": (40.0, 300.0),
    "glint": (0.0, 300.0),
    "softness": (0.35, 1.5),  # width of an edge in pixels: rough below 1, smooth above
    "blur": (0.0, 0.14),  # weight of each neighbour in a row or column
    "noise": (0.5, 4.5),
    "contrast": (0.82, 1.12),
    "brightness": (-14.0, 14.0),
}
SHARE_WITH_GLARE = 0.55
SHARE_WITH_ANY_ROLL = 0.2  # the others hold the camera nearly level, as in the course's pictures
SHARE_ROUGH = 0.3  # of the pictures at 75 pixels: one sample a pixel; the others average four pixels of the large one
SHARE_ENLARGED = 0.2  # of the pictures at 150 pixels: the one at 75, enlarged


class ClockImages(NamedTuple):
    """Pictures of clocks.

    Attributes:
        images: uint8 (n, size, size), 0 to 255.
        labels: int64 (n, 2), hour 0 to 11 and minute 0 to 59.
        source: "course" or "rendered".
        checksum: str, SHA-256 of the file with the pictures.
    """

    images: np.ndarray
    labels: np.ndarray
    source: str
    checksum: str


# --------------------------------------------------------------------------------------------------------------- scenes


def hand_angles(hour, minute):
    """Where the hands of a clock point; the hour hand moves on continuously.

    Args:
        hour: array of integers, 0 to 11.
        minute: array of numbers, 0 to below 60.

    Returns:
        Two float arrays: the angles of hour and minute hand in radians, clockwise from 12.
    """
    minute = np.asarray(minute, float)
    return 2 * np.pi * (np.asarray(hour) + minute / 60) / 12, 2 * np.pi * minute / 60


def sample_scenes(labels, generator):
    """Draws one scene for each time.

    Args:
        labels: integers (n, 2), hour and minute.
        generator: `numpy.random.Generator`.

    Returns:
        Namespace of float32 arrays (n, 1, 1), one for each name in `RANGES` and some more, angles in radians.
    """
    count = len(labels)
    values = {name: generator.uniform(low, high, count) for name, (low, high) in RANGES.items()}
    for name in ("tilt", "gradient_direction", "light_direction", "light_height", "wood_direction", "glare_direction"):
        values[name] = np.radians(values[name])
    values["turn"] = generator.uniform(0, 2 * np.pi, count)  # of the clock on the planks
    any_roll = generator.random(count) < SHARE_WITH_ANY_ROLL
    level_roll = generator.normal(0, np.radians(9), count)
    values["roll"] = np.where(any_roll, generator.uniform(-np.pi, np.pi, count), level_roll)
    values["glare"] = np.where(generator.random(count) < SHARE_WITH_GLARE, generator.uniform(20, 330, count), 0)
    for name in ("offset_right", "offset_up"):  # of the dial's centre, in halves of the picture
        values[name] = np.clip(generator.normal(0, 0.045, count), -0.1, 0.1)
    hour, minute = hand_angles(labels[:, 0], labels[:, 1])
    scene = {name: value.astype("float32")[:, None, None] for name, value in values.items()}
    scene["hour_angle"], scene["minute_angle"] = (angle.astype("float32")[:, None, None] for angle in (hour, minute))
    scene["font"] = generator.integers(len(numeral_atlas()), size=(count, 1, 1))
    scene["texture"] = generator.integers(len(wood_textures()), size=(count, 1, 1))
    scene["plank_tones"] = generator.normal(0, 9, (count, 8)).astype("float32")
    scene["rough"] = generator.random(count) < SHARE_ROUGH
    scene["enlarged"] = generator.random(count) < SHARE_ENLARGED
    scene["noise_seed"] = int(generator.integers(2**31))
    return types.SimpleNamespace(**scene)


# ------------------------------------------------------------------------------------------------- numerals and planks

# A font of our own: digits of plain strokes in a box 6 wide and 10 high, y downwards. "line" joins points; "arc" takes
# a box and two angles in degrees, clockwise from 3 o'clock. The 1 is a bare stroke, as on the course's clock.
STROKES = {
    "0": [("arc", (0, 0, 6, 10), 0, 360)],
    "1": [("line", (3, 0), (3, 10))],
    "2": [("arc", (0, 0, 6, 6), 180, 400), ("line", (5.3, 4.9), (0, 10), (6, 10))],
    "3": [("arc", (0.4, 0, 5.6, 5), 190, 450), ("arc", (0, 4.6, 6, 10), 270, 530)],
    "4": [("line", (4.6, 10), (4.6, 0), (0, 7), (6, 7))],
    "5": [("line", (5.5, 0), (1, 0), (0.6, 4.5)), ("arc", (0, 3.8, 6, 10), 215, 500)],
    "6": [("arc", (0, 3.8, 6, 10), 0, 360), ("line", (0.2, 6.2), (4.2, 0))],
    "7": [("line", (0, 0), (6, 0), (2.2, 10))],
    "8": [("arc", (0.5, 0, 5.5, 4.7), 0, 360), ("arc", (0, 4.7, 6, 10), 0, 360)],
    "9": [("arc", (0, 0, 6, 6.2), 0, 360), ("line", (5.8, 3.8), (1.8, 10))],
}
GLYPH_SIDE = 64  # pixels of a numeral's cell, which is two numeral heights wide and high


def _draw_strokes(text, thickness):
    """Draws `text` in our own font, in the middle of a cell. Returns a PIL picture, white on black."""
    enlarge = 4  # drawn large, then shrunk, for smooth edges
    side = GLYPH_SIDE * enlarge
    unit = side / 20  # the cell is two numeral heights high
    widths = [2.0 if digit == "1" else 6.0 for digit in text]
    pen = -(sum(widths) + 2.4 * (len(text) - 1)) / 2
    picture = Image.new("L", (side, side))
    draw = ImageDraw.Draw(picture)
    width = round(thickness * unit)
    for digit, digit_width in zip(text, widths, strict=True):
        left = pen - (2.0 if digit == "1" else 0.0)

        def place(x, y, left=left):
            return side / 2 + (left + x) * unit, side / 2 + (y - 5) * unit

        for kind, *points in STROKES[digit]:
            if kind == "line":
                draw.line([place(*point) for point in points], 255, width, joint="curve")
            else:
                (x0, y0, x1, y1), start, end = points
                draw.arc([place(x0, y0), place(x1, y1)], start, end, 255, width)
        pen += digit_width + 2.4
    return picture.resize((GLYPH_SIDE, GLYPH_SIDE), Image.Resampling.LANCZOS)


def _draw_text(text, font):
    """Draws `text` in a PIL font whose digits are half a cell high. Returns a PIL picture, white on black."""
    picture = Image.new("L", (GLYPH_SIDE, GLYPH_SIDE))
    left, top, right, bottom = font.getbbox(text)
    corner = (GLYPH_SIDE - left - right) / 2, (GLYPH_SIDE - top - bottom) / 2
    ImageDraw.Draw(picture).text(corner, text, 255, font)
    return picture


def _font(open_font):
    """Opens a font at the size that makes its digits half a cell high."""
    _, top, _, bottom = open_font(100).getbbox("8")
    return open_font(round(100 * GLYPH_SIDE / 2 / (bottom - top)))


@functools.cache
def numeral_atlas():
    """The numerals 1 to 12 in every style: float32 (styles, 12, 64, 64), 0 to 1; numeral 12 comes first.

    Our own strokes in three weights, the fonts that come with matplotlib and Pillow, each sharp and slightly soft.
    """
    from matplotlib import font_manager

    styles = [functools.partial(_draw_strokes, thickness=thickness) for thickness in (1.0, 1.35, 1.8)]
    folder = Path(font_manager.findfont("DejaVu Sans")).parent
    for name in ("DejaVuSans.ttf", "cmss10.ttf"):
        styles.append(functools.partial(_draw_text, font=_font(functools.partial(ImageFont.truetype, folder / name))))
    styles.append(functools.partial(_draw_text, font=_font(ImageFont.load_default)))
    numerals = [str(number or 12) for number in range(12)]
    cells = []
    for style in styles:
        pictures = [style(text) for text in numerals]
        for radius in (0.6, 1.8):
            cells.append([np.asarray(picture.filter(ImageFilter.GaussianBlur(radius))) for picture in pictures])
    return np.array(cells, "float32") / 255


@functools.cache
def wood_textures():
    """Grain of planks that repeats itself seamlessly: float32 (6, 512, 512), mean 0, deviation 1, along the columns."""
    generator = np.random.default_rng(20241001)
    frequency = np.fft.fftfreq(512) * 512
    along, across = frequency[None, :], frequency[:, None]
    textures = []
    for _ in range(6):
        texture = np.zeros((512, 512))
        # Broad bands, the grain proper, and fine streaks: noise that varies slowly along and quickly across the plank.
        for weight, length, breadth in ((0.7, 3.0, 16.0), (1.0, 7.0, 70.0), (0.8, 24.0, 200.0)):
            noise = np.fft.fft2(generator.normal(size=(512, 512)))
            band = np.fft.ifft2(noise * np.exp(-np.square(along / length) - np.square(across / breadth))).real
            texture += weight * band / band.std()
        textures.append((texture - texture.mean()) / texture.std())
    return np.array(textures, "float32")


# ------------------------------------------------------------------------------------------------------------- renderer


def _covered(distance, edge):
    """Share of a pixel that lies inside an outline: `distance` outside of it, `edge` the width of the soft edge."""
    return np.clip(0.5 - distance / edge, 0, 1)


def _over(picture, tone, share):
    """Paints `tone` over `picture` where `share` (0 to 1) says."""
    return picture + share * (tone - picture)


def lines_of_sight(scene, size):
    """Directions in which the pixels look.

    Returns:
        Function from a height above the dial, (n, 1, 1) or float, to the coordinates (x, y) where the lines of sight
        meet the plane at that height: two float32 arrays (n, size, size). x points right and y away from the camera.
    """
    centers = ((np.arange(size, dtype="float32") + 0.5) * 2 / size - 1)[None]
    right = centers[:, None, :] - scene.offset_right
    up = -centers[:, :, None] - scene.offset_up
    cosine, sine = np.cos(scene.roll), np.sin(scene.roll)
    right, up = right * cosine + up * sine, up * cosine - right * sine
    focal_length = scene.dial_share * scene.camera_distance
    cosine, sine = np.cos(scene.tilt), np.sin(scene.tilt)
    away = up * cosine + focal_length * sine
    down = focal_length * cosine - up * sine

    def meet(height):
        steps = (scene.camera_distance * cosine - height) / down
        return steps * right, steps * away - scene.camera_distance * sine

    return meet


def _planks(scene, x, y):
    """Tone of the planks at table coordinates (x, y)."""
    cosine, sine = np.cos(scene.wood_direction), np.sin(scene.wood_direction)
    along, across = x * cosine + y * sine, y * cosine - x * sine
    position = across / scene.plank_width + scene.plank_offset
    plank = np.floor(position)
    number = plank.astype(int) % 8
    tone = scene.wood_tone + scene.plank_tones[np.arange(len(number))[:, None, None], number]
    # Each plank shows another stretch of the texture. Reading the nearest pixel makes the grain rough, as it should be.
    column = (along * scene.grain * 60 + plank * 137).astype(int) % 512
    row = (across * scene.grain * 90 + plank * 61).astype(int) % 512
    tone = tone + scene.wood_contrast * wood_textures()[scene.texture, row, column]
    to_gap = np.abs(position - np.rint(position)) * scene.plank_width
    return tone * (1 - 0.75 * np.clip(1.5 - 2 * to_gap / scene.gap_width, 0, 1))


def _rim(scene, picture, meet, light, halfway, edge, heights):
    """Paints the rim, a ring with a rounded profile, as a stack of flat rings from the lowest of `heights` up."""
    middle, half_height = (scene.rim_top - scene.rim_bottom) / 2, (scene.rim_top + scene.rim_bottom) / 2
    half_width = scene.rim_width / 2
    center = 1 + half_width
    for share in heights:  # from -1, the planks, to 1, the top of the rim
        x, y = meet(middle + share * half_height)
        radius = np.sqrt(x * x + y * y)
        bulge = half_width * np.sqrt(1 - share * share)
        distance = np.abs(radius - center) - np.maximum(bulge, 0.25 * half_width)
        if share < 0:  # below its middle only the outside of the rim can be seen
            distance = radius - center - bulge
            sideways, upwards = np.sqrt(1 - share * share), share
        else:
            sideways = np.clip((radius - center) / half_width, -1, 1)
            upwards = np.sqrt(1 - sideways * sideways)
        scale = sideways / np.maximum(radius, 1e-3)

        def facing(direction, x=x, y=y, scale=scale, upwards=upwards):
            return np.clip(scale * (x * direction[0] + y * direction[1]) + upwards * direction[2], 0, 1)

        tone = scene.rim_tone * (0.55 + 0.65 * facing(light))
        tone = tone + scene.glint * facing(halfway) ** scene.glint_sharpness
        picture = _over(picture, tone, _covered(distance, edge))
    return picture


def _dial(scene, x, y, radius, edge):
    """Tone of the dial with its numerals, ticks and dots at dial coordinates (x, y), y towards 12."""
    tone = scene.dial_tone
    angle = np.arctan2(x, y)
    hour = np.rint(angle * (6 / np.pi))
    minute = np.rint(angle * (30 / np.pi))
    # Ticks: how far from the ray through the nearest hour, and between which radii.
    aside = np.abs(np.sin(angle - hour * (np.pi / 6))) * radius - scene.tick_width / 2
    lengthwise = np.abs(radius - scene.tick_start - scene.tick_length / 2) - scene.tick_length / 2
    marks = _covered(np.maximum(aside, lengthwise), edge)
    # Dots: how far from the nearest minute on their circle.
    from_dot = np.sqrt(
        np.square(radius - scene.tick_start - scene.tick_length / 2)
        + np.square(np.sin(angle - minute * (np.pi / 30)) * radius)
    )
    # A dot smaller than a pixel fades instead of vanishing.
    dot = _covered(from_dot - scene.dot_radius, edge) * np.minimum(2 * scene.dot_radius / edge + 0.35, 1)
    marks = np.maximum(marks, dot)
    # Numerals: where in the cell of the nearest hour.
    center = hour * (np.pi / 6)
    column = (x - scene.numeral_radius * np.sin(center)) / scene.numeral_height
    row = -(y - scene.numeral_radius * np.cos(center)) / scene.numeral_height
    inside = np.maximum(np.abs(column), np.abs(row)) < 0.99
    column = np.where(inside, (column + 1) * (GLYPH_SIDE / 2), 0).astype(int)
    row = np.where(inside, (row + 1) * (GLYPH_SIDE / 2), 0).astype(int)
    numerals = numeral_atlas()[scene.font, hour.astype(int) % 12, row, column] * inside
    return _over(_over(tone, scene.mark_tone, marks), scene.numeral_tone, numerals)


def _hand_distance(x, y, angle, length, tail, width):
    """How far (x, y) lies outside of a bar that points to `angle` from the centre."""
    cosine, sine = np.cos(angle), np.sin(angle)
    forward, aside = x * sine + y * cosine, x * cosine - y * sine
    return np.maximum(np.abs(forward - (length - tail) / 2) - (length + tail) / 2, np.abs(aside) - width / 2)


def _hands(scene, x, y, edge):
    """Share of each pixel that the hands and the hub cover at dial coordinates (x, y)."""
    hour = _hand_distance(x, y, scene.hour_angle, scene.hour_length, scene.tail, scene.hour_width)
    minute = _hand_distance(x, y, scene.minute_angle, scene.minute_length, scene.tail, scene.minute_width)
    hub = np.sqrt(x * x + y * y) - scene.hub_radius
    return _covered(np.minimum(np.minimum(hour, minute), hub), edge)


def render(scene, size):
    """Takes the pictures of the clocks.

    Args:
        scene: what `sample_scenes` returned.
        size: int, side of the pictures in pixels.

    Returns:
        uint8 (n, size, size).
    """
    meet = lines_of_sight(scene, size)
    edge = scene.softness * 2 / (size * scene.dial_share)
    sideways = np.cos(scene.light_height)
    light = (
        sideways * np.cos(scene.light_direction),
        sideways * np.sin(scene.light_direction),
        np.sin(scene.light_height),
    )
    # Halfway between the directions to light and camera: where the rim faces it, it glints (Blinn 1977).
    halfway = light[0], light[1] - np.sin(scene.tilt), light[2] + np.cos(scene.tilt)
    length = np.sqrt(sum(np.square(part) for part in halfway))
    halfway = tuple(part / length for part in halfway)

    x, y = meet(-scene.rim_bottom)
    picture = _planks(scene, x, y)
    height = scene.rim_top + scene.rim_bottom
    aside = [height * part / light[2] for part in light[:2]]
    from_shadow = np.hypot(x + aside[0], y + aside[1]) - (1 + scene.rim_width)
    picture = picture * (1 - scene.shadow * _covered(from_shadow, 0.2))
    picture = _rim(scene, picture, meet, light, halfway, edge, (-0.95, -0.6, -0.2))

    x, y = meet(0.0)
    radius = np.sqrt(x * x + y * y)
    cosine, sine = np.cos(scene.turn), np.sin(scene.turn)
    dial = _dial(scene, x * cosine + y * sine, y * cosine - x * sine, radius, edge)
    dial = dial + scene.gradient * (x * np.cos(scene.gradient_direction) + y * np.sin(scene.gradient_direction))
    rim_shadow = np.hypot(x + scene.rim_top * light[0], y + scene.rim_top * light[1]) - 1
    dial = dial * (1 - 0.5 * scene.shadow * _covered(rim_shadow, 0.08))
    cast = [0.05 * part / light[2] for part in light[:2]]
    shadow_x, shadow_y = x + cast[0], y + cast[1]
    hand_shadow = _hands(scene, shadow_x * cosine + shadow_y * sine, shadow_y * cosine - shadow_x * sine, 3 * edge)
    dial = dial * (1 - scene.hand_shadow * hand_shadow)
    glare_x = x - scene.glare_distance * np.cos(scene.glare_direction)
    glare_y = y - scene.glare_distance * np.sin(scene.glare_direction)
    squared = (np.square(glare_x) + np.square(glare_y)) / np.square(scene.glare_radius)
    glare = scene.glare * (0.7 * np.exp(-squared) + 0.3 / (1 + squared))
    picture = _over(picture, dial, _covered(radius - 1 - scene.rim_width / 2, edge))

    x, y = meet(scene.hand_height)
    hands = _hands(scene, x * cosine + y * sine, y * cosine - x * sine, edge)
    picture = _over(picture, scene.hand_tone, hands) + glare * np.where(radius < 1, 1, 0.35)
    picture = _rim(scene, picture, meet, light, halfway, edge, (0.1, 0.35, 0.6, 0.8, 0.95))

    picture = (picture - 128) * scene.contrast + 128 + scene.brightness
    picture = _blur(np.clip(picture, 0, 255), scene.blur)
    noise = np.random.default_rng([scene.noise_seed, size]).standard_normal(picture.shape, "float32")
    return np.clip(np.rint(picture + scene.noise * noise), 0, 255).astype("uint8")


def _blur(picture, weight):
    """Mixes each pixel with its four neighbours, rows first, then columns; each gets `weight`."""
    for axis in (1, 2):
        padded = np.pad(picture, [(0, 0), *((1, 1) if i == axis else (0, 0) for i in (1, 2))], mode="edge")
        before, after = (np.take(padded, range(i, i + picture.shape[axis]), axis) for i in (0, 2))
        picture = picture + weight * (before + after - 2 * picture)
    return picture


def _enlarge(images, size):
    """Enlarges uint8 (n, side, side) to `size`, every second picture smoothly and the others by repeating pixels."""
    filters = (Image.Resampling.BILINEAR, Image.Resampling.NEAREST)
    pictures = [Image.fromarray(image).resize((size, size), filters[i % 2]) for i, image in enumerate(images)]
    return np.array(pictures, "uint8").reshape(-1, size, size)


def _averaged(images, size):
    """Shrinks uint8 (n, 2 size, 2 size) to (n, size, size), each pixel the mean of four."""
    return images.reshape(len(images), size, 2, size, 2).mean((2, 4), dtype="float32").round().astype("uint8")


def render_times(labels, seed):
    """Renders one scene for each time, at both sizes, reproducibly.

    Args:
        labels: integers (n, 2), hour and minute.
        seed: int or sequence of int.

    Returns:
        dict from 75 and 150 to the pictures at that size, uint8 (n, size, size).
    """
    small_size, large_size = SIZES
    scene = sample_scenes(np.asarray(labels), np.random.default_rng(seed))
    large = render(scene, large_size)
    small = np.where(scene.rough[:, None, None], render(scene, small_size), _averaged(large, small_size))
    large[scene.enlarged] = _enlarge(small[scene.enlarged], large_size)
    return {small_size: small, large_size: large}


def all_labels():
    """Labels of the whole set in its order: int64 (18000, 2), 25 times each minute from 0:00 to 11:59."""
    minutes = np.repeat(np.arange(MINUTES), PICTURES_PER_MINUTE)
    return np.stack([minutes // 60, minutes % 60], axis=1)


# ------------------------------------------------------------------------------------------------------------- loading


def load_clocks(data_dir, size, count=None):
    """Loads the course's pictures, or rendered ones where those are absent.

    Args:
        data_dir: `pathlib.Path`. `data_dir/clocks/images.npy` and `labels.npy`, where they exist, are the course's.
        size: int, 75 or 150. Course pictures of 150 pixels are averaged to 75; those of 75 cannot be had at 150.
        count: int, for about so many pictures, spread evenly over the dial, or None for all. Where nothing has been
            rendered yet, no more than these are.

    Returns:
        `ClockImages`, sorted by time; memory-mapped where it is the whole set.

    Raises:
        UserError: where the course's files are damaged or do not fit together, or the disk is full.
    """
    data_dir = Path(data_dir)
    if any((data_dir / "clocks" / name).exists() for name in ("images.npy", "labels.npy")):
        pictures = _load_course(data_dir / "clocks", size)
    else:
        folder = data_dir / "cache" / "clocks"
        pictures = _open_cache(folder, size)
        if pictures is None and count:
            labels = all_labels()[:: MINUTES * PICTURES_PER_MINUTE // count]
            return ClockImages(render_times(labels, VERSION)[size], labels, "rendered", f"{len(labels)} pictures only")
        if pictures is None:
            _render_all(folder)
            pictures = _open_cache(folder, size)
    if count:
        step = max(len(pictures.images) // count, 1)
        pictures = pictures._replace(images=pictures.images[::step], labels=pictures.labels[::step])
    return pictures


def _open_cache(folder, size):
    """Memory-maps the rendered pictures; returns None where they are absent, damaged or of another version."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        images = np.load(folder / f"images_{size}.npy", mmap_mode="r", allow_pickle=False)
        checksum = manifest["sha256"][str(size)]
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None
    labels = all_labels()
    if manifest["version"] != VERSION or images.shape != (len(labels), size, size) or images.dtype != np.uint8:
        return None
    return ClockImages(images, labels, "rendered", checksum)


def _load_course(folder, size):
    arrays = {}
    for name in ("images", "labels"):
        path = folder / f"{name}.npy"
        try:
            arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path} is missing or damaged; put both files of the course there, or remove {folder} to use "
                "rendered clocks"
            ) from error
    images, labels = arrays["images"], arrays["labels"]

    def require(condition, trouble):
        if not condition:
            raise UserError(f"{folder}: {trouble}; get the course's files again, or remove the folder")

    side = images.shape[-1]
    require(images.ndim == 3 and images.dtype == np.uint8, f"images.npy holds {images.dtype} {images.shape}")
    require(images.shape[1:] in {(s, s) for s in SIZES}, f"images.npy holds pictures of {images.shape[1:]} pixels")
    require(labels.ndim == 2 and labels.shape[1] == 2, f"labels.npy holds {labels.dtype} {labels.shape}")
    require(np.issubdtype(labels.dtype, np.integer), f"labels.npy holds {labels.dtype} instead of integers")
    require(len(images) == len(labels) > 0, f"{len(images)} pictures but {len(labels)} labels")
    labels = labels.astype("int64")
    in_range = (labels >= 0).all() and (labels[:, 0] < 12).all() and (labels[:, 1] < 60).all()
    require(in_range, "labels.npy holds times that are none")
    require(side >= size, f"images.npy holds pictures of {side} pixels, and {size} are needed")
    checksum = sha256(folder / "images.npy")
    if side == 2 * size:
        images = _averaged(images, size)
    return ClockImages(images, labels, "course", checksum)


def _render_all(folder):
    """Renders the whole set at both sizes into `folder`, which gets its name when everything is there."""
    import keras  # for its progress bar

    labels = all_labels()
    print(f"rendering {len(labels):,} clocks into {folder}")

    def fill(start):
        chunk = slice(start, start + CHUNK)
        for size, pictures in render_times(labels[chunk], [VERSION, start]).items():
            images[size][chunk] = pictures
        return min(start + CHUNK, len(labels))

    try:
        with building(folder) as temporary:
            paths = {size: temporary / f"images_{size}.npy" for size in SIZES}
            images = {
                size: np.lib.format.open_memmap(path, "w+", np.uint8, (len(labels), size, size))
                for size, path in paths.items()
            }
            bar = keras.utils.Progbar(len(labels), unit_name="picture")
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                for done in pool.map(fill, range(0, len(labels), CHUNK)):
                    bar.update(done)
            for array in images.values():
                array.flush()
            checksums = {str(size): sha256(path) for size, path in paths.items()}
            write_json(temporary / "manifest.json", {"version": VERSION, "sha256": checksums})
    except OSError as error:
        raise UserError(f"cannot write {folder} ({error.strerror or error}); free some space") from error
