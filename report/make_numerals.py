"""Makes data/samples/numerals.png, the numerals on the dials of rendered clocks: python -m report.make_numerals

Three weights of a stroke font, and fonts that come with matplotlib and Pillow; each sharp and slightly blurred. The
bytes depend on the versions of these packages, so the file is kept, and its checksum is in sha256.json.
"""

import functools
from pathlib import Path

import numpy as np
from matplotlib import font_manager
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from common.clocks import GLYPH_SIZE
from common.datasets import SAMPLES
from common.files import read_json, replacing, sha256, write_json

# A stroke font: digits in a box 6 wide and 10 high, y downwards. "line" joins points; "arc" takes a box and two angles
# in degrees, clockwise from 3 o'clock. The 1 is a bare stroke, as on the course's clock.
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


def _draw_strokes(text, thickness):
    """A cell with `text` in the stroke font, white on black."""
    size = 4 * GLYPH_SIZE  # downsampled at the end, for smooth edges
    unit = size / 20
    advances = [2.0 if digit == "1" else 6.0 for digit in text]
    left = -(sum(advances) + 2.4 * (len(text) - 1)) / 2
    cell = Image.new("L", (size, size))
    draw = ImageDraw.Draw(cell)
    width = round(thickness * unit)
    for digit, advance in zip(text, advances, strict=True):
        origin = left - (2.0 if digit == "1" else 0.0)
        for kind, *shape in STROKES[digit]:
            points = shape if kind == "line" else (shape[0][:2], shape[0][2:])
            points = [(size / 2 + (origin + x) * unit, size / 2 + (y - 5) * unit) for x, y in points]
            if kind == "line":
                draw.line(points, 255, width, joint="curve")
            else:
                draw.arc(points, *shape[1:], 255, width)
        left += advance + 2.4
    return cell.resize((GLYPH_SIZE, GLYPH_SIZE), Image.Resampling.LANCZOS)


def _draw_text(text, font):
    """A cell with `text` in a PIL font, white on black."""
    cell = Image.new("L", (GLYPH_SIZE, GLYPH_SIZE))
    left, top, right, bottom = font.getbbox(text)
    corner = (GLYPH_SIZE - left - right) / 2, (GLYPH_SIZE - top - bottom) / 2
    ImageDraw.Draw(cell).text(corner, text, 255, font)
    return cell


def _font(open_font):
    """A font at the size that makes its digits half a cell high."""
    _, top, _, bottom = open_font(100).getbbox("8")
    return open_font(round(100 * GLYPH_SIZE / 2 / (bottom - top)))


def draw_atlas():
    """Returns the numerals 12, 1, ..., 11, one style per row of cells: uint8 (768, 768)."""
    folder = Path(font_manager.findfont("DejaVu Sans")).parent
    fonts = [_font(functools.partial(ImageFont.truetype, folder / name)) for name in ("DejaVuSans.ttf", "cmss10.ttf")]
    fonts.append(_font(ImageFont.load_default))
    numerals = ["12", *map(str, range(1, 12))]
    styles = [[_draw_strokes(text, thickness) for text in numerals] for thickness in (1.0, 1.35, 1.8)]
    styles += [[_draw_text(text, font) for text in numerals] for font in fonts]
    rows = [
        np.hstack([np.asarray(cell.filter(ImageFilter.GaussianBlur(radius))) for cell in cells])
        for cells in styles
        for radius in (0.6, 1.8)
    ]
    return np.vstack(rows)


def main():
    path = SAMPLES / "numerals.png"
    with replacing(path) as temporary:
        Image.fromarray(draw_atlas()).save(temporary)
    checksums = read_json(SAMPLES / "sha256.json", "make it with python -m report.make_samples")
    write_json(SAMPLES / "sha256.json", checksums | {path.name: sha256(path)})


if __name__ == "__main__":
    main()
