"""The clock-reading script: representations, network, and its command line on both backends."""

import argparse
import dataclasses
import functools
import json

import keras
import numpy as np
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY, read_verification, run_elsewhere, run_script
from PIL import Image

import tell_the_time as task
from common import clocks, results
from experiments import tell_the_time as plan

ALL_MINUTES = np.arange(task.MINUTES)
SAVED = REPOSITORY / "saved_models" / task.SCRIPT
GENERATOR = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------ representations


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        ((11, 55), (0, 5), 10),
        ((0, 0), (6, 0), 360),
        ((3, 15), (3, 15), 0),
        ((1, 0), (11, 30), 90),
        ((0, 0), (11, 59), 1),
    ],
)
def test_common_sense_error_takes_the_shorter_way(first, second, error):
    first, second = (np.array([hour * 60 + minute]) for hour, minute in (first, second))
    assert task.common_sense_error(first, second) == error
    assert task.common_sense_error(second, first) == error
    assert task.common_sense_error(first + task.MINUTES, second) == error


def perfect_outputs(representation, minutes):
    """The outputs of a network that is certain of the right times."""
    targets = representation.encode(minutes)
    assert set(targets) == set(representation.heads)
    outputs = {}
    for name, head in representation.heads.items():
        target = targets[name]
        if target.ndim == 1:  # classes
            assert 0 <= target.min() <= target.max() < head.units
            outputs[name] = np.eye(head.units)[target]
        else:
            assert target.shape == (len(minutes), head.units)
            outputs[name] = target
    return outputs


@pytest.mark.parametrize("name", task.REPRESENTATIONS)
def test_every_representation_round_trips_for_all_times(name):
    representation = task.REPRESENTATIONS[name]
    decoded = representation.decode(**perfect_outputs(representation, ALL_MINUTES))
    assert decoded.shape == (task.MINUTES,)
    errors = task.common_sense_error(decoded, ALL_MINUTES)
    if name.startswith("classes_"):
        width = task.MINUTES // int(name.removeprefix("classes_"))
        assert errors.max() == (width - 1) / 2  # a class is decoded as the middle of its interval
    else:
        assert errors.max() < 1e-3


def test_every_representation_has_a_label_and_a_config():
    assert list(task.LABELS) == list(task.REPRESENTATIONS)
    for name in task.REPRESENTATIONS:
        assert task.CONFIGS[name].representation == name


def test_24_classes_cannot_do_better_than_seven_and_a_half_minutes():
    representation = task.REPRESENTATIONS["classes_24"]
    decoded = representation.decode(**perfect_outputs(representation, ALL_MINUTES))
    assert task.common_sense_error(decoded, ALL_MINUTES).mean() == 7.5


def test_points_anywhere_on_a_ray_are_the_same_time():
    minutes = np.array([0.0, 100, 359.5, 719])
    points = task.to_circle(minutes, task.MINUTES)
    assert np.allclose(np.hypot(*points.T), 1)
    for scale in (0.01, 1, 30):
        assert np.allclose(task.from_circle(points * scale, task.MINUTES), minutes, atol=0.01)


@pytest.mark.parametrize(
    ("coarse", "minute", "time"), [(185, 58, 178), (175, 2, 182), (3, 57, 717), (718, 4, 4), (330, 30, 330)]
)
def test_the_minute_refines_the_coarse_time(coarse, minute, time):
    refined = task.refine(np.array([coarse]), np.array([minute]))
    assert task.common_sense_error(refined, [time]) == 0


def test_likeliest_hour_across_the_full_hour():
    probabilities = np.full((2, 24), 0.01)
    probabilities[:, 6] = 0.5  # from 3:00 to 3:29
    times = task.likeliest_hour(probabilities, np.array([59.0, 1.0]))
    assert times.tolist() == [179.0, 181.0]  # 2:59 and not 3:59, because 3:00 is the nearer one


def test_likeliest_time_multiplies_half_hour_and_minute():
    half_hours = np.full((3, 24), 0.01)
    half_hours[:, 6] = 0.5  # from 3:00 to 3:29
    minutes = np.full((3, 60), 0.001)
    minutes[0, 59] = minutes[1, 10] = 0.9
    minutes[2, [10, 50]] = 0.4, 0.5  # 3:10 fits the half hour, 3:50 and 2:50 lie far from its middle
    assert task.likeliest_time(half_hours, minutes).tolist() == [179, 190, 190]


def test_interpolation_between_classes_goes_around_the_dial():
    half_hours = np.eye(24)[:1]  # from 12:00 to 12:29, the middle is 12:15
    between = task.interpolate_classes(half_hours, np.array([[15, 0, 705, 30, 360]]))
    assert between.tolist() == [[1.0, 0.5, 0.0, 0.5, 0.0]]


def test_periodic_loss_is_smooth_across_twelve_o_clock():
    def loss(true, predicted):
        return float(task.periodic_loss(keras.ops.array([[true]]), keras.ops.array([[predicted]]))[0])

    assert loss(0.1, 11.9) == pytest.approx(loss(0.1, 0.3), abs=1e-5)
    assert loss(3.0, 9.0) == pytest.approx(2)
    assert loss(5.5, 5.5) == pytest.approx(0, abs=1e-6)


# ---------------------------------------------------------------------------------------------------------------- data


def numbered(size, count=100):
    """Images that carry their number in their first pixel."""
    images = np.zeros((count, size, size), np.uint8)
    images[:, 0, 0] = np.arange(count)
    labels = np.stack([np.arange(count) % 12, np.arange(count) % 60], axis=1)
    return clocks.ClockImages(images, labels, "rendered", "")


@pytest.mark.parametrize(
    ("size", "sizes"), [(75, {"train": 80, "validation": 10, "test": 10}), (150, {"train": 80, "test": 20})]
)
def test_splits_are_shuffled_and_share_no_image(size, sizes):
    splits = task.split_images(numbered(size))
    assert {name: len(split.images) for name, split in splits.items()} == sizes
    numbers = {name: split.images[:, 0, 0] for name, split in splits.items()}
    assert np.array_equal(np.sort(np.concatenate(list(numbers.values()))), np.arange(100))
    assert np.ptp(numbers["test"]) > 50
    for name, split in splits.items():
        assert np.array_equal(split.minutes, numbers[name] % 12 * 60.0 + numbers[name] % 60)


def test_no_validation_image_is_a_test_image_at_150():
    chosen_by = task.split_images(numbered(75))["validation"].images[:, 0, 0]
    assert not set(chosen_by) & set(task.split_images(numbered(150))["test"].images[:, 0, 0])


def test_augmentation_does_nothing_outside_training():
    images = GENERATOR.integers(0, 256, (4, 75, 75), dtype=np.uint8)
    assert np.array_equal(keras.ops.convert_to_numpy(task.ClockAugmentation(0)(images, training=False)), images)


def test_augmentation_resamples_half_of_the_images_and_keeps_their_range():
    images = np.repeat(clocks.render_times([(2, 20)], 0)[75], 32, axis=0)
    changed = keras.ops.convert_to_numpy(task.ClockAugmentation(0)(images, training=True))
    assert changed.shape == images.shape
    assert 0 <= changed.min() <= changed.max() <= 255
    alike = [np.corrcoef(before.ravel(), after.ravel())[0, 1] for before, after in zip(images, changed, strict=True)]
    assert max(alike[:16]) < 0.95 < min(alike[16:])
    assert np.array_equal(changed, keras.ops.convert_to_numpy(task.ClockAugmentation(0)(images, training=True)))


def test_augmentation_never_mirrors():
    """The dark bars of an L-shaped figure keep their order around the centre, however the image is turned."""
    image = np.full((75, 75), 255, np.uint8)
    image[10:38, 36:39] = 0  # upwards, and
    image[36:39, 36:52] = 0  # half as far to the right: a quarter turn clockwise
    changed = keras.ops.convert_to_numpy(task.ClockAugmentation(1)(np.repeat(image[None], 64, axis=0), training=True))
    offset = np.arange(75) - 37
    for turned in changed[:32]:
        right, up = np.meshgrid(offset, -offset)
        dark = turned < turned.min() + 60
        far = dark & (np.hypot(right, up) > 20) & (np.hypot(right, up) < 28)
        near = dark & (np.hypot(right, up) < 13)
        long_arm = np.array([right[far].mean(), up[far].mean()])
        both_arms = np.array([right[near].mean(), up[near].mean()])
        assert long_arm[0] * both_arms[1] - long_arm[1] * both_arms[0] < 0  # clockwise from the long arm


# -------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("size", clocks.SIZES)
def test_a_quarter_turn_moves_the_polar_map_by_a_quarter(size):
    image = GENERATOR.random((task.UPSAMPLING * size, task.UPSAMPLING * size))
    samples = task.polar_samples(size)
    assert samples.shape == (task.RINGS, task.SECTORS, task.SAMPLES_PER_CELL_SIDE[size] ** 2)
    polar, turned = image.ravel()[samples], np.rot90(image, -1).ravel()[samples]  # clockwise
    assert np.isclose(np.roll(polar, task.SECTORS // 4, axis=1), turned).mean() > 0.98  # but for ties in rounding
    middle = (task.UPSAMPLING * size - 1) / 2
    row, column = np.divmod(samples, task.UPSAMPLING * size)
    radius = np.hypot(row - middle, column - middle)
    assert (np.diff(radius.mean(axis=(1, 2))) > 0).all()
    assert radius.max() <= middle + 1


def test_circular_padding_repeats_the_other_end():
    features = np.arange(5.0)[None, None, :, None]
    padded = keras.ops.convert_to_numpy(task.pad_circular(features, 2))
    assert padded[0, 0, :, 0].tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize("size", clocks.SIZES)
def test_outputs_do_not_depend_on_the_rotation_of_the_clock(size):
    keras.utils.set_random_seed(0)
    network = task.build_network(task.Config(size=size))
    images = clocks.render_times([(4, 40), (9, 12)], 0)[size]
    upright, turned, other = (
        {name: keras.ops.convert_to_numpy(output) for name, output in network(given).items()}
        for given in (images, np.rot90(images, 1, (1, 2)).copy(), images[::-1].copy())
    )
    for name in upright:
        change = np.abs(upright[name] - turned[name]).max()
        assert change < 0.1 * np.abs(upright[name] - other[name]).max()


TRAIN_SMALL = """
import sys, tempfile
sys.path.insert(0, {repository!r})
import numpy as np
import tell_the_time as task
config = task.Config(width=4, epochs=1)
images = np.random.default_rng(0).integers(0, 256, (32, config.size, config.size), dtype=np.uint8)
split = task.Split(images, np.arange(32) * 20)
parts = {{"train": split, "validation": split}}
network, curves, _ = task.train_network(config, parts, 0, folder=tempfile.mkdtemp(), resume=False)
minutes = task.read_clocks(network, split.images, config.representation)
error = task.common_sense_error(minutes, split.minutes).mean()
print(task.keras.backend.backend(), curves["loss"][0] < 100, abs(curves["validation_minutes"][0] / error - 1) < 0.2)
"""


def test_network_trains_on_jax(tmp_path):
    code = TRAIN_SMALL.format(repository=str(REPOSITORY))
    printed = run_elsewhere(code, tmp_path, KERAS_BACKEND="jax", XLA_FLAGS=QUICK_COMPILATION)
    assert printed.splitlines()[-1] == "jax True True"


def test_choices_that_lost_train_as_well(tmp_path):
    """The values of these fields that the saved models have are trained below."""
    config = task.Config(width=4, epochs=1, polar=False, pooling="max", augment=False)
    split = task.Split(GENERATOR.integers(0, 256, (32, config.size, config.size), dtype=np.uint8), np.arange(32) * 20)
    parts = {"train": split, "validation": split}
    network, curves, _ = task.train_network(config, parts, 0, folder=tmp_path, resume=False)
    assert np.isfinite(curves["loss"][0])
    assert network.compute_dtype == "float32"
    minutes = task.read_clocks(network, split.images, config.representation)
    assert curves["validation_minutes"][0] == pytest.approx(
        task.common_sense_error(minutes, split.minutes).mean(), rel=0.2
    )
    assert ((minutes >= 0) & (minutes <= task.MINUTES)).all()


def test_every_experiment_changes_one_field_of_the_baseline():
    baseline = task.Config(**plan.BASELINE)
    for name, change in plan.EXPERIMENTS.items():
        config = task.Config(**plan.BASELINE | change)
        changed = [field for field, value in dataclasses.asdict(config).items() if value != getattr(baseline, field)]
        assert len(changed) == (name != "baseline")
        assert plan.NUM_SEEDS[name] >= 2


@pytest.mark.parametrize("name", task.REPRESENTATIONS)
def test_networks_are_small(name):
    network = task.build_network(task.Config(name))
    assert network.count_params() <= 2_000_000
    assert {key: value.shape[1] for key, value in network.output.items()} == {
        key: head.units for key, head in task.REPRESENTATIONS[name].heads.items()
    }


def test_measure():
    metrics = task.measure(np.array([0.0, 719, 30, 100]), np.array([1, 1, 34, 400]))
    assert metrics["mean_minutes"] == pytest.approx((1 + 2 + 4 + 300) / 4)
    assert metrics["median_minutes"] == 3
    assert [metrics[f"within_{limit}_minutes"] for limit in (1, 5, 10)] == [0.25, 0.75, 0.75]


# --------------------------------------------------------------------------------------------------------- saved models


def saved_models():
    return sorted(path.stem for path in SAVED.glob("*.keras"))


def test_every_model_is_saved_and_all_are_small():
    assert saved_models() == sorted(task.CONFIGS)
    assert sum(path.stat().st_size for path in SAVED.iterdir()) < 25e6


@pytest.mark.parametrize("name", task.CONFIGS)
def test_saved_models_were_trained_with_their_configs(name):
    card = json.loads((SAVED / f"{name}.json").read_text())
    assert card["config"] == dataclasses.asdict(task.CONFIGS[name])
    assert card["shortened"] is None
    assert card["epochs"] == len(card["curves"]["loss"]) == task.CONFIGS[name].epochs
    large = task.CONFIGS[name].size == task.LARGE
    assert card["dataset"]["sample"] == (80 if large else 40)
    assert set(card["metrics"]) == {"train", "test", "sample"} | (set() if large else {"validation"})


def test_best_representation_was_chosen_on_validation():
    errors = {
        name: json.loads((SAVED / f"{name}.json").read_text())["metrics"]["validation"]["mean_minutes"]
        for name in task.REPRESENTATIONS
    }
    assert errors[task.BEST] < 1.1 * min(errors.values())  # a difference that another seed may turn


def test_stock_keras_opens_the_saved_models_from_an_empty_directory(tmp_path):
    code = (
        "import sys, keras, numpy as np\n"
        "for path in sys.argv[1:]:\n"
        "    m = keras.saving.load_model(path, safe_mode=True, compile=False)\n"
        "    o = m(np.zeros((2, *m.input_shape[1:]), 'uint8'))\n"
        "    print(all(v.shape[0] == 2 for v in o.values()))"
    )
    printed = run_elsewhere(code, tmp_path, *(SAVED / f"{name}.keras" for name in task.CONFIGS))
    assert printed.split() == ["True"] * len(task.CONFIGS)


# -------------------------------------------------------------------------------------------------------- command line


command = functools.partial(run_script, task.SCRIPT)


TRAINED = ["classes_24", "best_150"]


def no_module(kind, script):
    """In place of `results.optional_module` where figures are not what is tested: they take seconds."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An output directory with what `--train --quick --sample` writes of narrow networks, but for the figures."""
    output_dir = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "FEW_MODELS", TRAINED)
        patch.setattr(results, "optional_module", no_module)
        patch.setitem(task.CONFIGS, "classes_24", task.Config("classes_24", width=4))
        # Augmentation is tried at 75 pixels; at 150 it takes most of the time.
        patch.setitem(task.CONFIGS, "best_150", task.Config(task.BEST, size=150, width=4, augment=False))
        done = command("tensorflow", "--train", "--quick", "--sample", "--output-dir", output_dir)
    assert done.returncode == 0, done.stderr
    return output_dir


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr(results, "optional_module", no_module)


def card_path(output_dir, model):
    return output_dir / "saved_models" / task.SCRIPT / f"{model}.json"


verification = functools.partial(read_verification, task.SCRIPT)


def test_train_writes_models_and_results(trained):
    summary = json.loads((trained / "report" / "results" / f"{task.SCRIPT}.json").read_text())
    assert set(summary["models"]) == set(TRAINED)
    assert summary["test"] == summary["models"]["best_150"]["test"]
    card = json.loads(card_path(trained, "best_150").read_text())
    assert card["backend"] == "tensorflow"
    assert card["dataset"]["name"] == "rendered clocks of 150 x 150 pixels"
    assert card["dataset"]["train"] == 4 * card["dataset"]["test"] == 320
    assert card["metrics"]["sample"] == card["metrics"]["test"]  # with --sample they are the same images
    card = json.loads(card_path(trained, "classes_24").read_text())
    (error,) = card["curves"]["validation_minutes"]
    assert error == pytest.approx(card["metrics"]["validation"]["mean_minutes"], rel=0.2)


def test_load_reproduces_the_metrics_of_train(trained, without_figures, monkeypatch):
    monkeypatch.setattr(task, "FEW_MODELS", TRAINED)
    files = [*trained.glob("saved_models/*/*"), *trained.glob("report/results/*")]
    before = [path.read_bytes() for path in files]
    done = command("tensorflow", "--load", "--quick", "--sample", "--output-dir", trained)
    assert done.returncode == 0, done.stderr
    assert "DIFFERS" not in done.stdout
    assert [row["model"] for row in verification(trained)[::6]] == TRAINED
    assert all(row["agrees"] for row in verification(trained))
    assert [path.read_bytes() for path in files] == before


def test_record_writes_what_load_measures(trained, without_figures):
    path = card_path(trained, "classes_24")
    before = json.loads(path.read_text())
    card = json.loads(path.read_text())
    del card["metrics"]["sample"], card["dataset"]["sample"]
    path.write_text(json.dumps(card))
    flags = ["--record", "--sample", "--model", "classes_24"]
    done = command("tensorflow", "--load", *flags, "--output-dir", trained)
    assert done.returncode == 0, done.stderr
    after = json.loads(path.read_text())
    assert after["metrics"] == before["metrics"]
    assert after["dataset"] == before["dataset"]


def test_committed_models_agree_with_their_cards_on_the_sample(tmp_path):
    done = command("tensorflow", "--load", "--sample", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stdout
    assert [row["model"] for row in verification(tmp_path)[::6]] == task.FEW_MODELS
    assert all(row["agrees"] for row in verification(tmp_path))
    drawn = list((tmp_path / "report" / "figures" / task.SCRIPT).iterdir())
    assert {path.stem for path in drawn} >= {
        *("rendered", "predictions", "worst", "hours"),
        *("representations", "error_by_time", "learning_curves"),
    }
    assert all(path.suffix == ".png" and path.stat().st_size > 10_000 for path in drawn)


def test_course_images_replace_rendered_ones_but_in_the_sample(tmp_path):
    sample = clocks.load_clocks(tmp_path, 150, sample=True)
    (tmp_path / "clocks").mkdir()
    np.save(tmp_path / "clocks" / "images.npy", 255 - sample.images)
    np.save(tmp_path / "clocks" / "labels.npy", sample.labels)

    def load(**flags):
        arguments = argparse.Namespace(**{"data_dir": tmp_path, "quick": True, "sample": False, **flags})
        return task.load_splits(arguments, [150])[150]

    course, _, name = load()
    assert name == "course clocks of 150 x 150 pixels"
    assert {part: len(split.images) for part, split in course.items()} == {"train": 320, "test": 80}
    rendered, _, name = load(sample=True)
    assert name == "rendered clocks of 150 x 150 pixels"
    assert np.array_equal(rendered["test"].images, 255 - course["test"].images)


def test_experiments_add_rows_and_resume(tmp_path, monkeypatch):
    def build(config, parts, seed, *, folder, resume):
        assert {"train", "validation"} < set(parts)
        return task.build_network(config), {}, 1.0

    monkeypatch.setattr(task, "train_network", build)  # training is tested above
    monkeypatch.setitem(plan.BASELINE, "width", 4)
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}_experiments.csv"
    for rows in (2, 4):
        done = command("tensorflow", "--experiments", "--quick", "--sample", "--output-dir", tmp_path)
        assert done.returncode == 0, done.stderr
        table = path.read_text().splitlines()
        assert len(table) == rows + 1
    assert len({row.split(",")[0] for row in table}) == 5
    committed = REPOSITORY / "report" / "results" / path.name
    assert table[0] == committed.read_text().splitlines()[0]


def test_predict_reads_good_files_and_names_bad_ones(tmp_path):
    times = [(hour, 5 * hour + 2) for hour in range(12)]
    good = []
    for number, image in enumerate(clocks.render_times(times, 3)[150]):
        path = tmp_path / f"clock {number}.{'png' if number % 2 else 'jpg'}"
        clock = Image.fromarray(image)
        if number % 3 == 0:
            clock = clock.convert("RGB").resize((400, 400))
        clock.save(path)
        good.append(path)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "half.png").write_bytes(good[1].read_bytes()[:2000])
    bad = [tmp_path / "text.png", tmp_path / "half.png", tmp_path / "missing.png"]
    done = command("tensorflow", "--predict", bad[0], *good, *bad[1:])
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert [line.startswith("error: ") for line in errors] == [True] * 3
    assert all(str(path) in line for path, line in zip(bad, errors, strict=True))
    printed = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    assert [path for path, _ in printed] == [str(path) for path in good]
    predicted = np.array([int(time[:2]) * 60 + int(time[3:]) for _, time in printed])
    true = np.array([hour * 60 + minute for hour, minute in times])
    assert np.median(task.common_sense_error(predicted, true)) <= 2
    assert command("tensorflow", "--predict", good[0]).returncode == 0


def test_predict_stands_alone():
    done = command("tensorflow", "--predict", "clock.png", "--load")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_damaged_course_files_are_one_line(tmp_path):
    (tmp_path / "clocks").mkdir()
    (tmp_path / "clocks" / "images.npy").write_bytes(b"broken")
    done = command("tensorflow", "--load", "--data-dir", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "images.npy is missing or damaged" in line
