"""Image files: reading what `--predict` is given, where its results go, and grids of generated images."""

import itertools
import math
import os
import stat
import sys
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from common.cli import silent_stderr
from common.errors import UserError, reason
from common.files import replacing

MAX_PIXELS = 67_000_000  # segmenting needs about 50 bytes per pixel


def read_image(path, mode):
    """Reads an image file as a `PIL.Image` of `mode` "L" or "RGB", as a viewer shows it.

    The EXIF orientation is applied, transparency is composited on white, and 16-bit greyscale is scaled to 8 bits.
    Raises `UserError` where there is no such file, it is no image or damaged, or it has more than `MAX_PIXELS` pixels.
    """
    name = printable(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its writer
            raise UserError(f"{name} is a folder or a device; name image files")
        with warnings.catch_warnings(action="ignore"), silent_stderr(), Image.open(path) as file:
            if file.width * file.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            file.load()
            return _convert(ImageOps.exif_transpose(file), mode)
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist; check its name") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has more than {MAX_PIXELS:,} pixels; shrink it first") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that can be read; convert it to PNG or JPEG") from error
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        trouble = printable(reason(error))
        raise UserError(f"{name} cannot be read ({trouble}); check it or convert it to PNG or JPEG") from error


def read_square(path, mode, size):
    """Reads an image file as `read_image` does; returns the square in its middle, uint8 (size, size[, 3])."""
    return np.asarray(ImageOps.fit(read_image(path, mode), (size, size), Image.Resampling.BILINEAR))


def _convert(image, mode):
    if min(image.size) < 1:
        raise ValueError("it has no pixels")
    if image.mode == "F":
        raise ValueError("the range of its floating-point pixels is unknown")
    if image.mode.startswith("I"):  # Pillow clips at 255 where it converts these
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError("its pixels have more than 16 bits")
        image = Image.fromarray(np.rint(pixels / np.float32(257)).astype("uint8"))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert(mode)


def output_paths(path, suffixes):
    """Returns where the results for the image file at `path` go: `dog.jpg` and "mask" give `dog_mask.png` beside it.

    Where one of these files exists, all get a number (`dog_2_mask.png`, ...), so that no file of the user, no earlier
    results, nor those for `dog.png`, are ever overwritten. Call it just before writing.
    """
    path = Path(path)
    for number in itertools.count(1):
        stem = path.stem if number == 1 else f"{path.stem}_{number}"
        paths = [path.with_name(f"{stem}_{suffix}.png") for suffix in suffixes]
        if not any(map(os.path.lexists, paths)):
            return paths


def write_grid(images, path, scale):
    """Writes images, uint8 (n, side, side) or (n, side, side, 3), to `path` as a square grid; returns `path`.

    Each pixel becomes `scale` pixels a side. The rest of the last row is white.
    """
    columns, (side, *channels) = math.ceil(math.sqrt(len(images))), images.shape[2:]
    white = np.full((-len(images) % columns, side, side, *channels), 255, "uint8")
    grid = np.concatenate([images, white]).reshape(-1, columns, side, side, *channels).swapaxes(1, 2)
    grid = grid.reshape(-1, columns * side, *channels).repeat(scale, axis=0).repeat(scale, axis=1)
    with replacing(path) as temporary:
        Image.fromarray(grid).save(temporary, format="PNG")
    return path


def predict_each(paths, predict):
    """Calls `predict` on each path and prints one line on stderr per `UserError`; returns whether there was none."""
    succeeded = True
    for path in paths:
        try:
            predict(path)
        except UserError as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            succeeded = False
    return succeeded


def printable(path):
    """Returns a file name as text of one line: line breaks and control characters are escaped as in Python."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))
