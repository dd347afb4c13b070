"""The clock renderer, measured in its pictures, and the loader of clock pictures."""

import numpy as np
import pytest

from common import clocks
from common.cli import UserError

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
def test_hands_in_the_picture_point_where_the_label_says(time):
    (image,) = clocks.render(plain_scene([time]), SIZE)
    minute = dark_angle(image, 0.6, 0.75)  # no hour hand is so long
    assert apart(minute, 6 * time[1]) < 1
    hour = dark_angle(image, 0.25, 0.45, skip=minute)
    assert apart(hour, 30 * (time[0] + time[1] / 60)) < 1


@pytest.mark.parametrize("property_name", ["turn", "roll"])
def test_turning_clock_or_camera_turns_the_picture(property_name):
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
    assert atlas.shape[1:] == (12, clocks.GLYPH_SIDE, clocks.GLYPH_SIDE)
    for style in atlas:
        assert len({cell.tobytes() for cell in style}) == 12
        height = np.nonzero(style[8].max(axis=1) > 0.4)[0]
        assert abs(np.ptp(height) + 1 - clocks.GLYPH_SIDE / 2) <= 5
        width = [np.ptp(np.nonzero(style[number].max(axis=0) > 0.4)[0]) for number in (8, 10)]
        assert width[1] > 1.3 * width[0]


def test_rendering_is_reproducible():
    times = [(1, 2), (7, 33), (11, 59)]
    first, again, other = (clocks.render_times(times, seed) for seed in (5, 5, 6))
    for size in clocks.SIZES:
        assert first[size].shape == (3, size, size)
        assert first[size].dtype == np.uint8
        assert np.array_equal(first[size], again[size])
        assert not np.array_equal(first[size], other[size])


def test_both_sizes_show_the_same_scene():
    pictures = clocks.render_times([(hour, 10) for hour in range(12)], 0)
    small = clocks._averaged(pictures[150], 75).astype(float)
    assert np.abs(small - pictures[75]).mean() < 12
    assert np.abs(small - pictures[75][::-1]).mean() > 30


def test_the_scenes_vary():
    images = clocks.render_times([(4, 50)] * 40, 0)[75].astype(float)
    assert images.std(axis=0).min() > 8


# --------------------------------------------------------------------------------------------------------------- course


@pytest.fixture
def course(tmp_path):
    """A data folder with two files like the course's; returns it with the arrays."""
    labels = np.array([[0, 0], [5, 45], [11, 59]])
    images = clocks.render_times(labels, 0)[150]
    (tmp_path / "clocks").mkdir()
    np.save(tmp_path / "clocks" / "images.npy", images)
    np.save(tmp_path / "clocks" / "labels.npy", labels)
    return tmp_path, images, labels


def test_course_files_are_used(course):
    data_dir, images, labels = course
    loaded = clocks.load_clocks(data_dir, 150)
    assert loaded.source == "course"
    assert np.array_equal(loaded.images, images)
    assert np.array_equal(loaded.labels, labels)
    small = clocks.load_clocks(data_dir, 75)
    assert small.images.shape == (3, 75, 75)
    assert abs(small.images.mean() - images.mean()) < 1


@pytest.mark.parametrize(
    ("file", "change", "complaint"),
    [
        ("images", lambda images: images[:2], "2 pictures but 3 labels"),
        ("images", lambda images: images[:, :100, :100], "pictures of"),
        ("images", lambda images: images.astype("float32"), "float32"),
        ("images", lambda images: images[0], "images.npy holds"),
        ("images", lambda images: images[:, ::2, ::2], "75 pixels, and 150 are needed"),
        ("labels", lambda labels: labels[:, 0], "labels.npy holds"),
        ("labels", lambda labels: labels.astype(float), "instead of integers"),
        ("labels", lambda labels: labels + np.array([1, 0]), "times that are none"),
        ("labels", lambda labels: labels - np.array([0, 1]), "times that are none"),
    ],
)
def test_course_files_that_do_not_fit_are_refused(course, file, change, complaint):
    data_dir, images, labels = course
    np.save(data_dir / "clocks" / f"{file}.npy", change({"images": images, "labels": labels}[file]))
    with pytest.raises(UserError, match=complaint) as caught:
        clocks.load_clocks(data_dir, 150)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["images", "labels"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_damaged_course_files_are_refused(course, file, damage):
    path = course[0] / "clocks" / f"{file}.npy"
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not an array")
    with pytest.raises(UserError, match=rf"{file}.npy is missing or damaged"):
        clocks.load_clocks(course[0], 150)


# ---------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def few(monkeypatch):
    """Makes the whole set 24 pictures in chunks of 10."""
    monkeypatch.setattr(clocks, "all_labels", lambda: np.array([[hour, 30] for hour in range(12)] * 2))
    monkeypatch.setattr(clocks, "CHUNK", 10)


def forbid_rendering(monkeypatch):
    def fail(*_):
        raise AssertionError("rendered again")

    monkeypatch.setattr(clocks, "render_times", fail)


def test_rendered_clocks_are_cached(few, tmp_path, monkeypatch):
    first = clocks.load_clocks(tmp_path, 150)
    assert first.source == "rendered"
    assert first.images.shape == (24, 150, 150)
    again = clocks._averaged(clocks.render_times(clocks.all_labels()[:10], [clocks.VERSION, 0])[150], 75)
    assert np.array_equal(again, clocks._averaged(first.images[:10], 75))
    forbid_rendering(monkeypatch)
    assert clocks.load_clocks(tmp_path, 75).images.shape == (24, 75, 75)
    assert clocks.load_clocks(tmp_path, 75, 6).images.shape == (6, 75, 75)
    assert clocks.load_clocks(tmp_path, 150).checksum == first.checksum


@pytest.mark.parametrize("damage", ["no manifest", "truncated", "another version"])
def test_a_damaged_cache_is_rendered_again(few, tmp_path, damage):
    images = np.array(clocks.load_clocks(tmp_path, 75).images)
    folder = tmp_path / "cache" / "clocks"
    manifest = folder / "manifest.json"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "another version":
        manifest.write_text(manifest.read_text().replace(f'"version": {clocks.VERSION}', '"version": 0'))
    else:
        path = folder / "images_75.npy"
        path.write_bytes(path.read_bytes()[:5000])
    assert np.array_equal(clocks.load_clocks(tmp_path, 75).images, images)


def test_a_killed_rendering_leaves_nothing_under_the_final_name(few, tmp_path, monkeypatch):
    render_times = clocks.render_times

    def stop(labels, seed):
        if seed[1] == 20:
            raise KeyboardInterrupt
        return render_times(labels, seed)

    monkeypatch.setattr(clocks, "render_times", stop)
    with pytest.raises(KeyboardInterrupt):
        clocks.load_clocks(tmp_path, 75)
    assert not (tmp_path / "cache" / "clocks").exists()
    monkeypatch.setattr(clocks, "render_times", render_times)
    clocks.load_clocks(tmp_path, 75)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["clocks"]


def test_no_space_is_one_line(few, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    with pytest.raises(UserError, match="No space left on device"):
        clocks.load_clocks(tmp_path, 75)


def test_a_few_clocks_are_rendered_without_a_cache(tmp_path):
    pictures = clocks.load_clocks(tmp_path, 75, 24)
    assert pictures.images.shape == (24, 75, 75)
    assert pictures.labels[::2].tolist() == [[hour, 0] for hour in range(12)]
    assert not (tmp_path / "cache").exists()


def test_all_labels_are_those_of_the_course():
    labels = clocks.all_labels()
    assert labels.shape == (18000, 2)
    assert (labels[:25] == 0).all()
    assert labels[-1].tolist() == [11, 59]
