"""Reading image files of the user, and where the results for them go."""

import os

import numpy as np
import pytest
from PIL import Image

from common import images
from common.errors import UserError
from common.images import output_paths, predict_each, printable, read_image, read_square, write_grid


def refusal(path):
    """The message with which `path` is refused; one line that starts with its name."""
    with pytest.raises(UserError) as caught:
        read_image(path, "RGB")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(printable(path))
    assert "; " in message
    return message


def pixels(path, mode):
    image = read_image(path, mode)
    assert image.mode == mode
    return np.asarray(image).tolist()


# -------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(("mode", "shape"), [("L", (4, 4)), ("RGB", (4, 4, 3))])
def test_the_square_in_the_middle_is_resized(tmp_path, mode, shape):
    array = np.zeros((8, 20), "uint8")
    array[:, 2:10], array[:, 10:18] = 100, 200
    Image.fromarray(array).save(tmp_path / "wide.png")
    square = read_square(tmp_path / "wide.png", mode, 4)
    assert square.shape == shape
    assert square.dtype == np.uint8
    assert np.all(square[:, 0] == 100)
    assert np.all(square[:, -1] == 200)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_an_ordinary_image_is_unchanged(tmp_path, mode):
    array = np.random.default_rng(0).integers(256, size=(5, 7) if mode == "L" else (5, 7, 3), dtype="uint8")
    Image.fromarray(array).save(tmp_path / "image.png")
    assert np.array_equal(read_image(tmp_path / "image.png", mode), array)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, [[0, 100], [200, 200]]),
        (2, [[100, 0], [200, 200]]),
        (3, [[200, 200], [100, 0]]),
        (6, [[200, 0], [200, 100]]),
        (8, [[100, 200], [0, 200]]),
    ],
)
def test_the_exif_orientation_is_applied(tmp_path, orientation, upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.array([[0, 100], [200, 200]], "uint8")).save(tmp_path / "image.png", exif=exif)
    assert pixels(tmp_path / "image.png", "L") == upright


def test_the_exif_orientation_swaps_the_sides(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "image.jpg", exif=exif)
    assert read_image(tmp_path / "image.jpg", "RGB").size == (20, 30)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(tmp_path, suffix):
    array = np.arange(0, 65536, 257, dtype="uint16").reshape(16, 16)
    path = tmp_path / f"image.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + array.astype(">u2").tobytes())
    else:
        Image.fromarray(array).save(path)
    assert np.ravel(pixels(path, "L")).tolist() == list(range(256))
    assert np.array_equal(pixels(path, "RGB"), np.array(pixels(path, "L"))[..., None].repeat(3, axis=2))


@pytest.mark.parametrize("array", [np.full((2, 2), 70000, "int32"), np.full((2, 2), 0.5, "float32")])
def test_pixels_of_unknown_range_are_refused(tmp_path, array):
    Image.fromarray(array).save(tmp_path / "image.tif")
    assert "its" in refusal(tmp_path / "image.tif")


def test_transparency_is_composited_on_white(tmp_path):
    Image.fromarray(np.array([[[0, 0, 0, 0], [10, 20, 30, 255], [0, 0, 0, 51]]], "uint8")).save(tmp_path / "rgba.png")
    assert pixels(tmp_path / "rgba.png", "RGB") == [[[255, 255, 255], [10, 20, 30], [204, 204, 204]]]
    Image.fromarray(np.array([[[0, 0], [90, 255]]], "uint8")).save(tmp_path / "la.png")
    assert pixels(tmp_path / "la.png", "L") == [[255, 90]]
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "key.png", transparency=(9, 8, 7))
    assert pixels(tmp_path / "key.png", "RGB") == [[[255, 255, 255]]]


def test_palette_and_other_modes(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "opaque.png")
    palette.save(tmp_path / "transparent.png", transparency=1)
    assert pixels(tmp_path / "opaque.png", "RGB") == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert pixels(tmp_path / "transparent.png", "RGB") == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    Image.new("1", (2, 1), 1).save(tmp_path / "bits.png")
    assert pixels(tmp_path / "bits.png", "L") == [[255, 255]]
    Image.new("CMYK", (8, 8), (0, 0, 0, 255)).save(tmp_path / "cmyk.jpg")
    assert np.max(pixels(tmp_path / "cmyk.jpg", "RGB")) < 10


# --------------------------------------------------------------------------------------------------------------- faults


def test_what_is_no_image_is_refused(tmp_path):
    assert "does not exist" in refusal(tmp_path / "missing.png")
    assert "is a folder" in refusal(tmp_path)
    assert "is a folder or a device" in refusal(os.devnull)
    os.mkfifo(tmp_path / "pipe")
    assert "is a folder or a device" in refusal(tmp_path / "pipe")
    assert "too long" in refusal(tmp_path / ("a" * 300))
    for name, content in (("empty.png", b""), ("text.jpg", b"no image")):
        (tmp_path / name).write_bytes(content)
        assert "not an image" in refusal(tmp_path / name)


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("jpg", {}), ("tif", {"compression": "tiff_lzw"})])
def test_truncated_images_are_refused_in_silence(tmp_path, capfd, suffix, options):
    path = tmp_path / f"image.{suffix}"
    array = np.random.default_rng(0).integers(256, size=(60, 60, 3), dtype="uint8")
    Image.fromarray(array).save(path, **options)
    content = path.read_bytes()
    for length in range(50, len(content) - 100, len(content) // 20):
        path.write_bytes(content[:length])
        refusal(path)
    assert capfd.readouterr() == ("", "")


def test_damaged_images_print_nothing_of_their_own(tmp_path, capfd):
    path = tmp_path / "image.tif"  # libtiff writes its messages past `sys.stderr`
    Image.new("L", (60, 60)).save(path, compression="tiff_lzw")
    content = bytearray(path.read_bytes())
    content[12:16] = b"\xff\xff\xff\xff"
    path.write_bytes(content)
    assert "cannot be read" in refusal(path)
    assert capfd.readouterr().err == ""
    os.write(2, b"back")
    assert capfd.readouterr().err == "back"


def test_images_without_pixels_are_refused(tmp_path):
    for name, content in (("a.pgm", b"P5 0 5 255\n"), ("b.gif", b"GIF89a" + bytes(7) + b"," + bytes(9) + b"\x02\x00;")):
        (tmp_path / name).write_bytes(content)
        refusal(tmp_path / name)


def test_the_number_of_pixels_is_limited(tmp_path, monkeypatch, recwarn):
    Image.new("L", (40, 25)).save(tmp_path / "image.png")
    monkeypatch.setattr(images, "MAX_PIXELS", 1000)
    assert read_image(tmp_path / "image.png", "L").size == (40, 25)
    monkeypatch.setattr(images, "MAX_PIXELS", 999)
    assert "has more than 999 pixels" in refusal(tmp_path / "image.png")
    assert not recwarn.list


@pytest.mark.parametrize("side", [9_000, 60_000])  # below and beyond what Pillow itself calls a decompression bomb
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    Image.new("1", (64, 64)).save(tmp_path / "bomb.bmp")
    content = bytearray((tmp_path / "bomb.bmp").read_bytes())
    content[18:22] = content[22:26] = side.to_bytes(4, "little")
    (tmp_path / "bomb.bmp").write_bytes(content)
    assert "has more than 67,000,000 pixels" in refusal(tmp_path / "bomb.bmp")


def test_file_names_with_control_characters_stay_on_one_line(tmp_path):
    assert printable(tmp_path / "plain name é.png") == str(tmp_path / "plain name é.png")
    assert printable("a\nb\x1b[31m\t\u2028.png") == r"a\nb\x1b[31m\t\u2028.png"
    assert printable(os.fsdecode(b"\xff.png")) == r"\udcff.png"
    assert r"two\nlines.png does not exist" in refusal(tmp_path / "two\nlines.png")
    Image.new("L", (2, 2)).save(tmp_path / "two\nlines.png")
    assert read_image(tmp_path / "two\nlines.png", "L").size == (2, 2)


# -------------------------------------------------------------------------------------------------------------- results


def names(paths):
    return [path.name for path in paths]


def test_results_lie_beside_the_image(tmp_path):
    paths = output_paths(tmp_path / "my.dog.jpg", ["mask", "overlay"])
    assert paths == [tmp_path / "my.dog_mask.png", tmp_path / "my.dog_overlay.png"]
    assert output_paths(str(tmp_path / "dog.jpg"), ["mask"]) == [tmp_path / "dog_mask.png"]


def test_no_file_is_overwritten(tmp_path):
    (tmp_path / "dog_overlay.png").write_text("the user's own")
    assert names(output_paths(tmp_path / "dog.jpg", ["mask", "overlay"])) == ["dog_2_mask.png", "dog_2_overlay.png"]
    (tmp_path / "dog_2_mask.png").symlink_to("nowhere")
    assert names(output_paths(tmp_path / "dog.jpg", ["mask", "overlay"])) == ["dog_3_mask.png", "dog_3_overlay.png"]


def test_images_that_differ_in_their_suffix_do_not_collide(tmp_path):
    written = []
    for name in ("same.jpg", "same.png", "./same.jpg"):
        (path,) = output_paths(tmp_path / name, ["mask"])
        path.touch()
        written.append(path.name)
    assert written == ["same_mask.png", "same_2_mask.png", "same_3_mask.png"]


def test_a_bad_file_does_not_stop_the_others(tmp_path, capsys):
    Image.new("L", (3, 2)).save(tmp_path / "good.png")
    paths = [tmp_path / "good.png", tmp_path / "missing\n1", tmp_path, tmp_path / "good.png"]

    def predict(path):
        print(read_image(path, "L").size)

    assert predict_each(paths, predict) is False
    out, err = capsys.readouterr()
    assert out == "(3, 2)\n(3, 2)\n"
    assert err.splitlines() == [
        f"error: {tmp_path}/missing\\n1 does not exist; check its name",
        f"error: {tmp_path} is a folder or a device; name image files",
    ]
    assert predict_each(paths[:1], predict) is True


def test_bugs_in_the_prediction_are_not_hidden():
    def predict(path):
        raise KeyError(path)

    with pytest.raises(KeyError):
        predict_each(["a.png"], predict)


@pytest.mark.parametrize("shape", [(2, 2), (2, 2, 3)])
def test_a_grid_is_filled_row_by_row_and_with_white(shape, tmp_path):
    images = np.arange(5, dtype="uint8").reshape(5, *[1] * len(shape)) * np.ones(shape, "uint8")
    grid = np.asarray(Image.open(write_grid(images, tmp_path / "grid.png", 2)))
    assert grid.shape == (8, 12, *shape[2:])
    corners = grid[::4, ::4].reshape(6, -1)[:, 0]
    assert corners.tolist() == [0, 1, 2, 3, 4, 255]
    assert (grid[4:, 8:] == 255).all()
