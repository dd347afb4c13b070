"""The clock renderer, measured in its images, and the loader of clock images."""

import errno
import hashlib
import os
import resource
import types

import numpy as np
import pytest
from conftest import REPOSITORY, run_elsewhere

from common import clocks, datasets
from common.errors import UserError
from common.files import sha256
from report import make_numerals

SIZE = 150


def plain_scene(times, **changes):
    """Scenes seen straight from above, bare of everything but dial, rim and hands; `changes` set their properties."""
    labels = np.array(times)
    scene = clocks.sample_scenes(labels, np.random.default_rng(0))
    properties = {"tilt": 0, "roll": 0, "turn": 0, "offset_right": 0, "offset_up": 0, "dial_share": 0.9}
    properties |= {"glare": 0, "glint": 0, "gradient": 0, "hand_shadow": 0, "hand_height": 0, "noise": 0, "blur": 0}
    properties |= {"dial_tone": 220, "mark_tone": 220, "numeral_tone": 220, "hand_tone": 40, "shadow": 0}
    properties |= {"minute_length": 0.8, "hour_length": 0.5, "tail": 0.05, "contrast": 1, "brightness": 0}
    properties |= {"camera_distance": 5, "softness": 1}
    for name, value in {**properties, **changes}.items():
        setattr(scene, name, np.full((len(labels), 1, 1), value, "float32"))
    return scene


def dark_angle(image, inner, outer, skip=None):
    """Direction of the dark pixels between two radii of the dial, in degrees clockwise from above.

    `skip` leaves out what lies within 15 degrees of a direction.
    """
    offset = np.arange(SIZE) - (SIZE - 1) / 2
    right, up = np.meshgrid(offset / (0.45 * SIZE), -offset / (0.45 * SIZE))
    radius, angle = np.hypot(right, up), np.arctan2(right, up)
    chosen = (radius > inner) & (radius < outer) & (image < 130)
    if skip is not None:
        chosen &= np.cos(angle - np.radians(skip)) < np.cos(np.radians(15))
    assert chosen.any()
    return np.degrees(np.arctan2(np.sin(angle[chosen]).mean(), np.cos(angle[chosen]).mean())) % 360


def apart(first, second):
    return abs((first - second + 180) % 360 - 180)


def test_hand_angles():
    hour, minute = clocks.hand_angles([3, 6, 0, 11], [0, 30, 0, 59])
    assert np.allclose(np.degrees(hour), [90, 195, 0, 359.5])
    assert np.allclose(np.degrees(minute), [0, 180, 0, 354])


@pytest.mark.parametrize("time", [(3, 0), (5, 45), (10, 21), (0, 40), (8, 5), (11, 30)])
def test_hands_in_the_image_point_where_the_label_says(time):
    (image,) = clocks.render(plain_scene([time]), SIZE)
    minute = dark_angle(image, 0.6, 0.75)  # no hour hand is so long
    assert apart(minute, 6 * time[1]) < 1
    hour = dark_angle(image, 0.25, 0.45, skip=minute)
    assert apart(hour, 30 * (time[0] + time[1] / 60)) < 1


@pytest.mark.parametrize("property_name", ["turn", "roll"])
def test_turning_clock_or_camera_turns_the_image(property_name):
    (image,) = clocks.render(plain_scene([(10, 21)]), SIZE)
    (turned,) = clocks.render(plain_scene([(10, 21)], **{property_name: np.pi / 2}), SIZE)
    turn = dark_angle(turned, 0.6, 0.75) - dark_angle(image, 0.6, 0.75)
    assert apart(abs(turn), 90) < 1


def test_tilt_flattens_the_dial_in_perspective():
    (image,) = clocks.render(plain_scene([(3, 0)], tilt=np.radians(45), camera_distance=4), SIZE)
    rows, columns = np.nonzero(image > 200)
    ratio = (rows.max() - rows.min()) / (columns.max() - columns.min())
    assert 0.62 < ratio < 0.8
    center = (SIZE - 1) / 2  # where the centre of the dial is seen: its far half looks smaller than its near half
    assert rows.max() - center > 1.1 * (center - rows.min())


def test_numerals_differ_and_fill_their_cells():
    atlas = clocks.numeral_atlas()
    assert atlas.shape[1:] == (12, clocks.GLYPH_SIZE, clocks.GLYPH_SIZE)
    for style in atlas:
        assert len({cell.tobytes() for cell in style}) == 12
        height = np.nonzero(style[8].max(axis=1) > 0.4)[0]
        assert abs(np.ptp(height) + 1 - clocks.GLYPH_SIZE / 2) <= 5
        width = [np.ptp(np.nonzero(style[number].max(axis=0) > 0.4)[0]) for number in (8, 10)]
        assert width[1] > 1.3 * width[0]


def test_numerals_can_be_drawn_again():
    drawn = make_numerals.draw_atlas()
    kept = clocks.numeral_atlas().swapaxes(1, 2).reshape(drawn.shape) * 255
    # Other versions of Pillow and matplotlib may move an edge.
    assert np.abs(drawn - kept).mean() < 1


def test_rendering_is_reproducible():
    times = [(1, 2), (7, 33), (11, 59)]
    first, again, other = (clocks.render_times(times, seed) for seed in (5, 5, 6))
    for size in clocks.SIZES:
        assert first[size].shape == (3, size, size)
        assert first[size].dtype == np.uint8
        assert np.array_equal(first[size], again[size])
        assert not np.array_equal(first[size], other[size])


def test_both_sizes_show_the_same_scene():
    images = clocks.render_times([(hour, 10) for hour in range(12)], 0)
    small = clocks._downsample(images[150], 75).astype(float)
    assert np.abs(small - images[75]).mean() < 12
    assert np.abs(small - images[75][::-1]).mean() > 30


def test_the_scenes_vary():
    images = clocks.render_times([(4, 50)] * 40, 0)[75].astype(float)
    assert images.std(axis=0).min() > 8


# --------------------------------------------------------------------------------------------------------------- course


@pytest.fixture(scope="module")
def course_arrays():
    labels = np.array([[0, 0], [2, 7], [5, 45], [11, 59]])
    return clocks.render_times(labels, 0)[150].repeat(30, axis=0), labels.repeat(30, axis=0)


@pytest.fixture
def course(course_arrays, tmp_path):
    """A data folder with two files like the course's; returns it with the arrays."""
    images, labels = course_arrays
    (tmp_path / "clocks").mkdir()
    np.save(tmp_path / "clocks" / "images.npy", images)
    np.save(tmp_path / "clocks" / "labels.npy", labels)
    return tmp_path, images, labels


def refusal(data_dir, size=150):
    """The one line with which the course's files are refused."""
    with pytest.raises(UserError) as caught:
        clocks.load_clocks(data_dir, size)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith("or remove the folder to use rendered clocks")
    return message


def test_course_files_are_used(course):
    data_dir, images, labels = course
    loaded = clocks.load_clocks(data_dir, 150)
    assert loaded.source == "course"
    assert loaded.checksum == sha256(data_dir / "clocks" / "images.npy")
    assert loaded.labels.dtype == np.int64
    assert np.array_equal(loaded.images, images)
    assert np.array_equal(loaded.labels, labels)
    small = clocks.load_clocks(data_dir, 75)
    assert small.images.shape == (120, 75, 75)
    assert abs(small.images.mean() - images.mean()) < 1
    few = clocks.load_clocks(data_dir, 150, 4)
    assert few.source == "course"
    assert few.labels.tolist() == [[0, 0], [2, 7], [5, 45], [11, 59]]
    assert np.array_equal(few.images, images[::30])
    assert len(clocks.load_clocks(data_dir, 150, 500).images) == 120
    assert not (data_dir / "cache").exists()


def replaced(array, index, value):
    array = array.copy()
    array[index] = value
    return array


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("images", lambda images: images[:110], "110 images but 120 labels"),
        ("images", lambda images: images[:, :100, :100], r"images.npy holds uint8 \(120, 100, 100\) instead of"),
        ("images", lambda images: images.astype("float32"), "images.npy holds float32"),
        ("images", lambda images: np.full(images.shape, np.nan, "float16"), "images.npy holds float16"),
        ("images", lambda images: images[0], "images.npy holds"),
        ("images", lambda images: np.uint8(3), r"images.npy holds uint8 \(\)"),
        ("images", lambda images: images[:, ::2, ::2], "75 pixels, and 150 are needed"),
        ("labels", lambda labels: labels[:, 0], "labels.npy holds"),
        ("labels", lambda labels: np.int64(0), r"labels.npy holds int64 \(\)"),
        ("labels", lambda labels: labels.astype(float), "instead of integers"),
        ("labels", lambda labels: replaced(labels.astype(float), 3, np.nan), "instead of integers"),
        ("labels", lambda labels: replaced(labels, 50, (12, 0)), "hours outside 0 to 11"),
        ("labels", lambda labels: replaced(labels, 50, (0, 60)), "minutes outside 0 to 59"),
        ("labels", lambda labels: replaced(labels, 50, (0, -1)), "minutes outside 0 to 59"),
        ("labels", lambda labels: replaced(labels.astype("uint64"), 50, 2**64 - 1), "hours outside 0 to 11"),
    ],
)
def test_course_files_that_do_not_fit_are_refused(course, file, change, complaint):
    data_dir, images, labels = course
    np.save(data_dir / "clocks" / f"{file}.npy", change({"images": images, "labels": labels}[file]))
    with pytest.raises(UserError, match=complaint):
        clocks.load_clocks(data_dir, 150)
    refusal(data_dir)


def test_too_few_course_images_are_refused(course):
    data_dir, images, labels = course
    np.save(data_dir / "clocks" / "images.npy", images[:99])
    np.save(data_dir / "clocks" / "labels.npy", labels[:99])
    assert "99 images, and 100 are needed" in refusal(data_dir)


@pytest.mark.parametrize("file", ["images", "labels"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "header", "empty", "text", "pickled", "npz", "folder"])
def test_damaged_course_files_are_refused(course, file, damage, tmp_path):
    path = course[0] / "clocks" / f"{file}.npy"
    content = path.read_bytes()
    path.unlink()
    if damage == "pickled":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif damage == "npz":
        np.savez(tmp_path / "archive.npz", images=np.zeros(3))
        (tmp_path / "archive.npz").rename(path)
    elif damage == "folder":
        path.mkdir()
    elif damage != "missing":
        header = content.replace(b"'shape': (", b"'shape': ((")
        damaged = {"truncated": content[: len(content) // 2], "header": header, "empty": b"", "text": b"not an array"}
        path.write_bytes(damaged[damage])
    assert f"{file}.npy is missing or damaged (" in refusal(course[0])


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def few(monkeypatch):
    """Makes the full set 12 images in chunks of 5."""
    monkeypatch.setattr(clocks, "all_labels", lambda: np.array([[hour, 30] for hour in range(12)]))
    monkeypatch.setattr(clocks, "CHUNK", 5)
    monkeypatch.setattr(clocks, "_render_few", clocks._render_few.__wrapped__)


def forbid_rendering(monkeypatch):
    def fail(*_):
        raise AssertionError("rendered again")

    monkeypatch.setattr(clocks, "render_times", fail)


def test_rendered_clocks_are_cached(few, tmp_path, monkeypatch):
    first = clocks.load_clocks(tmp_path, 150)
    assert first.source == "rendered"
    assert first.images.shape == (12, 150, 150)
    for start in (0, 5, 10):
        chunk = clocks.render_times(clocks.all_labels()[start : start + 5], [clocks.SEED, start])[150]
        assert np.array_equal(first.images[start : start + 5], chunk)
    assert first.checksum == sha256(tmp_path / "cache" / "clocks" / "images_150.npy")
    np.save(tmp_path / "same.npy", first.images)
    assert sha256(tmp_path / "same.npy") == first.checksum
    forbid_rendering(monkeypatch)
    assert clocks.load_clocks(tmp_path, 75).images.shape == (12, 75, 75)
    assert clocks.load_clocks(tmp_path, 150).checksum == first.checksum


DAMAGES = {
    "no manifest": ("manifest.json", None),
    "empty manifest": ("manifest.json", lambda content: b""),
    "truncated manifest": ("manifest.json", lambda content: content[:30]),
    "manifest without checksums": ("manifest.json", lambda content: b'{"version": 2}'),
    "manifest of another type": ("manifest.json", lambda content: b'{"version": 2, "sha256": [1, 2]}'),
    "another version": ("manifest.json", lambda content: content.replace(b'"version": 2', b'"version": 1')),
    "no images": ("images_75.npy", None),
    "empty": ("images_75.npy", lambda content: b""),
    "truncated": ("images_75.npy", lambda content: content[:5000]),
    "another pixel": ("images_75.npy", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rendered_again(few, tmp_path, damage, capsys):
    images = np.array(clocks.load_clocks(tmp_path, 75).images)
    assert "again" not in capsys.readouterr().out
    name, change = DAMAGES[damage]
    path = tmp_path / "cache" / "clocks" / name
    content = path.read_bytes()
    path.unlink()  # not written over: an open memory map still shows it
    if change is not None:
        path.write_bytes(change(content))
    assert np.array_equal(clocks.load_clocks(tmp_path, 75).images, images)
    assert f"building {path.parent} again" in capsys.readouterr().out
    assert path.read_bytes() == content


def test_a_killed_rendering_leaves_nothing_under_the_final_name(few, tmp_path, monkeypatch):
    render_times = clocks.render_times

    def stop(labels, seed):
        if seed[1] == 10:
            raise KeyboardInterrupt
        return render_times(labels, seed)

    monkeypatch.setattr(clocks, "render_times", stop)
    with pytest.raises(KeyboardInterrupt):
        clocks.load_clocks(tmp_path, 75)
    assert not (tmp_path / "cache" / "clocks").exists()
    monkeypatch.setattr(clocks, "render_times", render_times)
    clocks.load_clocks(tmp_path, 75)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["clocks"]


def cache_failure(data_dir):
    """The one line that says that the cache cannot be written; nothing of it may be left."""
    with pytest.raises(UserError) as caught:
        clocks.load_clocks(data_dir, 75)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("clocks: cannot write ")
    assert message.endswith("choose another --data-dir, or add --sample")
    assert not list(data_dir.glob("cache/*clocks*"))
    return message


def test_a_full_disk_is_said_before_rendering(few, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=100_000))
    forbid_rendering(monkeypatch)
    assert "No space left on device" in cache_failure(tmp_path)


def test_a_disk_that_fills_up_is_one_line(few, tmp_path, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(datasets, "sha256", full)
    assert "No space left on device" in cache_failure(tmp_path)


def test_a_file_size_limit_is_one_line(few, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        message = cache_failure(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in message


def test_a_data_folder_that_is_a_file_is_one_line(few, tmp_path):
    (tmp_path / "data").write_text("")
    assert "Not a directory" in cache_failure(tmp_path / "data")


# --------------------------------------------------------------------------------------------------------------- sample


def test_a_few_clocks_are_rendered_without_a_cache(tmp_path):
    loaded = clocks.load_clocks(tmp_path, 75, 24)
    assert loaded.source == "rendered"
    assert loaded.images.shape == (24, 75, 75)
    assert loaded.labels[::2].tolist() == [[hour, 0] for hour in range(12)]
    assert not list(tmp_path.iterdir())
    assert not loaded.images.flags.writeable


def test_a_sample_depends_on_nothing_but_its_size(few, course, monkeypatch):
    sample = clocks.load_clocks("absent", 75, 12, sample=True)
    assert sample.source == "rendered"
    again = clocks.load_clocks(course[0], 75, 12, sample=True)
    assert np.array_equal(sample.images, again.images)
    assert np.array_equal(sample.labels, again.labels)
    assert sample.checksum == again.checksum != clocks.load_clocks("absent", 75, 11).checksum
    monkeypatch.setattr(clocks, "SAMPLE_COUNT", 12)
    assert clocks.load_clocks("absent", 75, sample=True).checksum == sample.checksum
    assert clocks.load_clocks("absent", 150, sample=True).images.shape == (12, 150, 150)


def test_a_sample_shows_other_scenes_than_the_full_set(few, tmp_path):
    full = clocks.load_clocks(tmp_path, 75)
    few_of_them = clocks.load_clocks(tmp_path, 75, 12)
    assert np.array_equal(few_of_them.labels, full.labels)
    for image in few_of_them.images.astype(float):
        assert np.abs(full.images - image).mean((1, 2)).min() > 5


def test_all_labels_are_those_of_the_course():
    labels = clocks.all_labels()
    assert labels.shape == (18000, 2)
    assert (labels[:25] == 0).all()
    assert labels[-1].tolist() == [11, 59]


def test_rendered_pixels_are_the_same_on_every_processor(tmp_path):
    """NumPy computes float32 functions with the instructions that it finds, which round differently."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from common import clocks; import hashlib\n"
    code += "images = clocks.render_times([(hour, 7 * hour) for hour in range(12)], 0)[150]\n"
    code += "print(hashlib.sha256(images).hexdigest())"
    images = clocks.render_times([(hour, 7 * hour) for hour in range(12)], 0)[150]
    fewer = {"NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3 X86_V3", "PYTHONWARNINGS": "ignore"}
    printed = run_elsewhere(code, tmp_path, REPOSITORY, **fewer)
    assert printed.strip() == hashlib.sha256(images).hexdigest()
