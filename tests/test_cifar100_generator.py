"""The CIFAR-100 generator: its counters, network, sampler, data, training, every file that it reads, command line."""

import argparse
import csv
import dataclasses
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY

os.environ.setdefault("XLA_FLAGS", QUICK_COMPILATION)  # read when JAX is first used

import cifar100_generator as task
from experiments import cifar100_generator as experiments
from plots import cifar100_generator as plots

GENERATOR = np.random.default_rng(0)
TINY = {"patch": 8, "widths": (8,), "blocks": (1,), "attention": 4, "embedding": 8, "steps": 4, "batch_size": 8}
CONFIG = task.Config(**TINY)
RESTARTED = dataclasses.replace(CONFIG, restarts=(2,))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(task, "BATCH", 20)


@pytest.fixture(scope="module")
def splits():
    images = GENERATOR.integers(0, 256, (3, 40, 32, 32, 3), dtype=np.uint8)
    labels = GENERATOR.integers(0, 100, (3, 40)).astype("int32")
    return {name: task.Split(*of) for name, *of in zip(("train", "valid", "test"), images, labels, strict=True)}


@pytest.fixture(scope="module")
def parameters():
    """A tiny network whose output is not zero, as it is at first."""
    found = task.init_model(0, CONFIG)
    return {name: array + 0.05 * GENERATOR.normal(size=array.shape).astype("float32") for name, array in found.items()}


# ------------------------------------------------------------------------------------------------------------ counters


@pytest.mark.parametrize(
    ("parameters", "steps", "marks"),
    [
        (999_999, 50_000, 0),
        (1_000_000, 50_000, 5),
        (1_100_000, 50_000, 5),
        (1_500_000, 50_000, 25),
        (500_000, 55_000, 5),
        (500_000, 75_000, 25),
        (1_100_000, 55_000, 10),
        (500_000, 50_001, 5),
    ],
)
def test_penalty_by_the_examples_of_the_brief(parameters, steps, marks):
    assert task.penalty(parameters, steps) == marks


def test_the_network_keeps_to_the_budget():
    config = task.CONFIG
    count, marks, text = task.budget(config)
    # By hand: residual blocks with attention where maps are 8 x 8, the way down, the way up, the ends, the embedding.
    by_hand, side, units = 0, 32 // config.patch, config.embedding
    for level, (width, blocks) in enumerate(zip(config.widths, config.blocks, strict=True)):
        block = 2 * (9 * width**2 + width) + 2 * width + (units + 1) * 2 * width
        block += (4 * width**2 + 4 * width) * (side // 2**level == config.attention)
        by_hand += 2 * blocks * block
        if level:
            above = config.widths[level - 1]
            by_hand += (4 * above * width + width) + (width * above + above) + (above**2 + above)
    channels, first = 3 * config.patch**2, config.widths[0]
    by_hand += (9 * channels * first + first) + 2 * first + (9 * first * channels + channels)
    by_hand += 101 * units + (32 * units + units) + (units**2 + units)
    assert count == by_hand < task.PARAMETER_LIMIT
    assert config.steps <= task.STEP_LIMIT
    assert marks == 0
    assert f"{count:,}" in text


def test_initial_weights_depend_on_the_seed_and_keep_the_variance_of_maps():
    found = task.init_model(0, CONFIG)
    assert {array.dtype for array in found.values()} == {np.dtype("float32")}
    assert not np.array_equal(found["noise_kernel"], task.init_model(1, CONFIG)["noise_kernel"])
    kernel = task.init_model(0, task.CONFIG)["down_2_kernel"]  # 2 x 2 x 80 inputs
    assert kernel.std() == pytest.approx(1 / np.sqrt(2 * 2 * 80), rel=0.05)


# -------------------------------------------------------------------------------------------------------------- network


def test_preconditioning_has_the_limits_of_the_paper():
    skip, out, scale = task.preconditioning(jnp.array([1e-6, 0.5, 1e6]), "edm")
    assert np.allclose(skip, [1, 0.5, 0], atol=1e-5)
    assert np.allclose(out, [0, 0.5 / np.sqrt(2), 0.5], atol=1e-5)
    assert np.allclose(scale**2 * (np.array([1e-6, 0.5, 1e6]) ** 2 + 0.25), 1, rtol=1e-5)


@pytest.mark.parametrize("sigma", [0.01, 0.5, 20.0])
def test_the_velocity_of_a_known_image_gives_that_image(sigma):
    image, noise = GENERATOR.normal(size=(2, 5))
    skip, out, scale = task.preconditioning(sigma, "velocity")
    noisy = image + sigma * noise
    assert np.allclose(skip * noisy + out * (noise - image), image)
    time = sigma / (1 + sigma)
    assert np.allclose(scale * noisy, (1 - time) * image + time * noise)


def test_a_new_network_returns_zero_and_so_the_denoised_image_is_the_noisy_one_scaled():
    noisy, sigma = GENERATOR.normal(size=(2, 32, 32, 3)).astype("float32"), np.array([0.5, 0.5], "float32")
    fresh = task.init_model(0, CONFIG)
    found = task.denoise(fresh, noisy, sigma, task.ONE_HOT[[3, 4]], 1.0, CONFIG, False)
    assert np.allclose(found, noisy / 2, atol=1e-5)


def test_noise_level_class_and_last_pixel_matter_to_a_network_of_two_levels():
    config = dataclasses.replace(CONFIG, widths=(8, 8), blocks=(1, 1))
    parameters = task.init_model(0, config)
    parameters = {n: a + 0.05 * GENERATOR.normal(size=a.shape).astype("float32") for n, a in parameters.items()}
    noisy = np.repeat(GENERATOR.normal(size=(1, 32, 32, 3)), 4, axis=0).astype("float32")
    noisy[1, 31, 31] += 1  # in a corner of the second image
    sigma, labels = jnp.array([0.5, 0.5, 0.6, 0.5]), [3, 3, 3, 4]
    found = np.asarray(task.predict(parameters, noisy, sigma, task.ONE_HOT[labels], config)[0])
    assert found.shape == noisy.shape
    assert np.abs(found[0]).max() > 0.01
    assert (np.abs(found[1:] - found[0]).max(axis=(1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize(("size", "stride"), [(3, 1), (2, 2)])
def test_products_of_matrices_are_the_convolutions_of_the_library(size, stride, monkeypatch):
    maps = GENERATOR.normal(size=(2, 8, 8, 3)).astype("float32")
    kernel = GENERATOR.normal(size=(size, size, 3, 5)).astype("float32")
    monkeypatch.setattr(task, "CPU", True)
    found = task.convolve(maps, kernel, stride)
    monkeypatch.setattr(task, "CPU", False)
    np.testing.assert_allclose(found, task.convolve(maps, kernel, stride), atol=1e-5)


def test_gradients_of_parts_of_a_batch_add_up_to_those_of_the_batch(splits, monkeypatch):
    images, labels = (jnp.asarray(array) for array in splits["train"])
    results = []
    for part in (4, CONFIG.batch_size):
        monkeypatch.setattr(task, "PART", part)
        config = dataclasses.replace(CONFIG, steps=100 + part)  # another one, so that the step is compiled again
        results.append(task.advance(new_state(config), images, labels, config, 1))
    (parts, first), (whole, second) = results
    assert float(first) == pytest.approx(float(second), rel=1e-5)
    for one, other in zip(jax.tree.leaves(parts.optimizer), jax.tree.leaves(whole.optimizer), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-6)


def test_guidance_extrapolates_from_no_class_to_the_class(parameters):
    noisy, sigma = GENERATOR.normal(size=(2, 32, 32, 3)).astype("float32"), np.full(2, 0.7, "float32")

    def denoised(labels, guidance, guided):
        return np.asarray(task.denoise(parameters, noisy, sigma, task.ONE_HOT[labels], guidance, CONFIG, guided))

    conditional, unconditional = denoised([3, 4], 1.0, False), denoised([100, 100], 1.0, False)
    assert np.abs(conditional - unconditional).max() > 1e-3
    assert np.allclose(denoised([3, 4], 1.0, True), conditional, atol=1e-4)
    assert np.allclose(denoised([3, 4], 0.0, True), unconditional, atol=1e-4)
    assert np.allclose(denoised([3, 4], 2.0, True), 2 * conditional - unconditional, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------- sampling


def test_noise_levels_fall_from_the_highest_to_none():
    levels = task.noise_levels(18)
    assert len(levels) == 19
    assert levels[0] == pytest.approx(80)
    assert levels[-2] == pytest.approx(0.002)
    assert levels[-1] == 0
    assert (np.diff(levels) < 0).all()


def test_heun_solves_a_known_equation_with_an_error_of_second_order():
    # Of normally distributed data with deviation 0.5, the best denoiser and the end of every path are known.
    start = np.linspace(-2, 2, 9) * 80
    exact = start * 0.5 / np.sqrt(80**2 + 0.25)

    def error(steps):
        levels = task.noise_levels(steps).astype(float)
        found = task.heun(lambda noisy, level: noisy * 0.25 / (0.25 + level**2), start, levels)
        return np.abs(found - exact).max()

    assert error(64) < 5e-3
    assert 3 < error(32) / error(64) < 5


def test_guidance_applies_within_its_interval_only(parameters, monkeypatch):
    calls = []

    def denoise(parameters, noisy, sigma, conditions, guidance, config, guided):
        calls.append((float(sigma[0]), guided))
        return noisy

    monkeypatch.setattr(task, "denoise", denoise)
    noise = task.draw_noise(1, 0)[0]
    task.sample(parameters, CONFIG, task.Sampling(low=0.2, high=3.0), noise, task.ONE_HOT[[3]])
    assert len(calls) == 2 * 18 - 1
    assert all(guided == (0.2 <= level <= 3) for level, guided in calls)
    assert 0 < sum(guided for _, guided in calls) < len(calls)
    calls.clear()
    task.sample(parameters, CONFIG, task.Sampling(guidance=1.0), noise, task.ONE_HOT[[3]])
    assert not any(guided for _, guided in calls)


def test_samples_depend_on_the_seed_alone_and_not_on_their_number(parameters):
    network = parameters, CONFIG, task.Sampling(steps=3)

    def images(count, seed):
        noise, labels = task.draw_noise(count, seed)
        return task.sample(*network, noise, task.ONE_HOT[labels])

    few, many = images(3, 0), images(23, 0)
    assert few.shape == (3, 32, 32, 3)
    assert few.dtype == np.uint8
    assert np.array_equal(few, many[:3])
    assert np.array_equal(many, images(23, 0))
    assert not np.array_equal(few, images(3, 1))


def test_what_was_measured_before_a_run_was_stopped_is_not_measured_again(parameters, tmp_path, monkeypatch):
    network, memory, calls = (parameters, CONFIG, task.Sampling(steps=2)), tmp_path / "measured.json", []

    def compare(images, part, labels):
        calls.append((images, part, labels))
        return {"fid_768": float(len(calls))}

    assert task.fid_of(compare, memory, network, 3, 0, "test") == {"fid_768": 1}
    images, part, labels = calls[0]
    assert np.array_equal(images, task.sample(*network, task.draw_noise(3, 0)[0], task.ONE_HOT[[0, 1, 2]]))
    assert (part, labels.tolist()) == ("test", [0, 1, 2])
    assert task.fid_of(compare, memory, network, 3, 0, "test") == {"fid_768": 1}
    changed = {name: array + 1 for name, array in parameters.items()}, CONFIG, network[2]
    guided = parameters, CONFIG, dataclasses.replace(network[2], guidance=2.0)
    others = [(network, 3, 0, "valid"), (network, 4, 0, "test"), (network, 3, 1, "test"), (changed, 3, 0, "test")]
    for number, other in enumerate([*others, (guided, 3, 0, "test")], start=2):
        assert task.fid_of(compare, memory, *other) == {"fid_768": number}
    assert calls[1][2].tolist() == [0, 1, 2]
    assert task.fid_of(compare, None, network, 3, 0, "test") == {"fid_768": 7}
    memory.write_text(memory.read_text()[:-9])
    with pytest.raises(task.UserError, match=r"measured\.json is damaged .*; delete it"):
        task.fid_of(compare, memory, network, 3, 0, "test")


def test_interpolations_start_and_end_at_the_pairs_and_keep_the_length_of_noise():
    noise, labels = task.draw_noise(16, 0)
    between, conditions = plots.interpolations(noise, task.ONE_HOT[labels])
    between, conditions = between.reshape(8, 9, 32, 32, 3), conditions.reshape(8, 9, 101)
    assert np.allclose(between[:, 0], noise[:8], atol=1e-5)
    assert np.allclose(between[:, -1], noise[8:], atol=1e-5)
    assert np.array_equal(conditions[:, 0].argmax(1), labels[:8])
    assert np.array_equal(conditions[:, -1].argmax(1), labels[8:])
    assert np.allclose(conditions.sum(axis=-1), 1)
    assert np.allclose(np.square(between).mean((2, 3, 4)), 1, atol=0.1)


# ---------------------------------------------------------------------------------------------------------------- data


@pytest.fixture(scope="module")
def arrays():
    """Ten training images and two test images of each class, whose first byte tells the class."""
    found = {"class_names": [f"class_{number}" for number in range(100)]}
    for part, count in (("train", 1000), ("test", 200)):
        found[f"{part}_images"] = GENERATOR.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        found[f"{part}_labels"] = np.arange(count) % 100
        found[f"{part}_images"][:, 0, 0, 0] = found[f"{part}_labels"]
    return found


@pytest.fixture
def archive(arrays, tmp_path, monkeypatch):
    """A data folder with an archive in the official format, and its checksum."""
    path, files = tmp_path / "cifar100" / "cifar-100-binary.tar.gz", {}
    path.parent.mkdir()
    for part in ("train", "test"):
        labels = arrays[f"{part}_labels"].astype("uint8")[:, None]
        pixels = arrays[f"{part}_images"].transpose(0, 3, 1, 2).reshape(len(labels), -1)
        files[f"{part}.bin"] = np.concatenate([labels // 5, labels, pixels], axis=1).tobytes()
    files["fine_label_names.txt"] = "\n".join(arrays["class_names"]).encode()
    with tarfile.open(path, "w:gz") as file:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-100-binary/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(task, "ARCHIVE_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def write_cache(folder, arrays, order):
    """The `.npy` cache of the other scripts, with the training images in another order."""
    folder.mkdir(parents=True)
    checksums = {}
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.save(folder / f"{name}.npy", arrays[name][order] if name.startswith("train") else arrays[name])
        checksums[name] = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
    manifest = {"class_names": arrays["class_names"], "sha256": checksums}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_archive_and_cache_give_the_same_splits_whatever_their_order(archive, arrays, tmp_path):
    splits, names = task.load_data(tmp_path)
    assert names == arrays["class_names"]
    assert {name: len(split.labels) for name, split in splits.items()} == {"train": 900, "valid": 100, "test": 200}
    for split in splits.values():
        assert np.array_equal(split.images[:, 0, 0, 0], split.labels)
        assert len(set(np.bincount(split.labels).tolist())) == 1
    assert not {i.tobytes() for i in splits["train"].images} & {i.tobytes() for i in splits["valid"].images}
    write_cache(tmp_path / "cached" / "cache" / "cifar100", arrays, np.arange(1000)[::-1])
    cached, _ = task.load_data(tmp_path / "cached")
    assert task.checksum_of(cached.values()) == task.checksum_of(splits.values())


def test_damaged_data_is_one_line(archive, arrays, tmp_path):
    write_cache(tmp_path / "cached" / "cache" / "cifar100", arrays, np.arange(1000))
    path = tmp_path / "cached" / "cache" / "cifar100" / "test_labels.npy"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(task.UserError, match=r"checksum of test_labels\.npy.*or add --sample$"):
        task.load_data(tmp_path / "cached")
    archive.write_bytes(archive.read_bytes()[:-8])
    with pytest.raises(task.UserError, match=r"checksum of cifar-100-binary\.tar\.gz.*or add --sample$"):
        task.load_data(tmp_path)


def test_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(task, "ARCHIVE", "http://127.0.0.1:9/cifar-100-binary.tar.gz")
    with pytest.raises(task.UserError, match=r"by hand into .*cifar100, or add --sample$"):
        task.load_data(tmp_path)


def test_sample_needs_no_other_file(tmp_path):
    splits, names = task.load_data(tmp_path, sample=True)
    assert {name: len(split.labels) for name, split in splits.items()} == {"train": 200, "valid": 100, "test": 300}
    assert names[:2] == ["apple", "aquarium_fish"]


# ------------------------------------------------------------------------------------------------------------ training


def new_state(config, parameters=None):
    return task.start(parameters or task.init_model(0, config), jax.random.PRNGKey(1), 0, config)


@pytest.mark.parametrize("target", ["edm", "velocity"])
def test_the_first_loss_is_that_of_a_network_that_returns_zero(splits, target):
    config = dataclasses.replace(CONFIG, target=target, batch_size=64)
    _, loss = task.advance(new_state(config), *map(jnp.asarray, splits["train"]), config, 1)
    square = np.square(splits["train"].images / 127.5 - 1).mean()
    variance = np.exp(2 * (-1.2 + 1.2 * np.random.default_rng(0).standard_normal(100_000)))  # of the noise
    edm = np.mean((variance * square + 0.5**4) / (variance + 0.25) / 0.25)
    assert float(loss) == pytest.approx(edm if target == "edm" else 1 + square, rel=0.02)


def test_the_rarest_random_number_does_not_make_the_noise_infinite(splits, monkeypatch):
    config = dataclasses.replace(CONFIG, batch_size=64, steps=77)  # another one, so that the step is compiled again
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, **_: jnp.full(shape, 1 - 2**-23))
    assert np.isfinite(task.advance(new_state(config), *map(jnp.asarray, splits["train"]), config, 1)[1])


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_classes_are_withheld_from_a_share_of_images(splits, parameters, share):
    config = dataclasses.replace(CONFIG, label_dropout=share)
    state, _ = task.advance(new_state(config, parameters), *map(jnp.asarray, splits["train"]), config, 2)
    changed = np.flatnonzero((np.asarray(state.parameters["classes"]) != parameters["classes"]).any(axis=1))
    assert (changed.tolist() == [100]) if share else (100 not in changed and len(changed) > 3)


def test_many_steps_in_one_call_are_the_same_steps(splits):
    images, labels = (jnp.asarray(array) for array in splits["train"])
    together, mean = task.advance(new_state(CONFIG), images, labels, CONFIG, 2)
    one, first = task.advance(new_state(CONFIG), images, labels, CONFIG, 1)
    one, second = task.advance(one, images, labels, CONFIG, 1)
    assert int(one.step) == int(together.step) == 2
    assert float(mean) == pytest.approx((float(first) + float(second)) / 2, rel=1e-4)
    for name, array in one.parameters.items():
        assert np.allclose(array, together.parameters[name], atol=1e-4)
    # The first step has a learning rate of 0; in the second one, a young average keeps 2 / 11 of what it was.
    expected = (2 * task.init_model(0, CONFIG)["output_kernel"] + 9 * one.parameters["output_kernel"]) / 11
    np.testing.assert_allclose(one.averages[0]["output_kernel"], expected, atol=1e-6)
    assert not np.allclose(expected, one.parameters["output_kernel"], atol=1e-6)


@pytest.fixture(scope="module")
def stopped(splits, tmp_path_factory):
    """The checkpoint of a training run that was killed after it, and what the run gives if it is not."""
    folder = tmp_path_factory.mktemp("runs")
    write = task.write_file

    def write_and_die(path, content):
        write(path, content)
        if path.name == "checkpoint.npz":
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "STEPS_PER_CHECKPOINT", 3)  # but calls end where training begins anew
        patch.setattr(task, "SNAPSHOT_STEPS", 2)
        patch.setattr(task, "BATCH", 20)
        whole = task.train_network(RESTARTED, splits, 0, name="tiny", folder=folder / "whole", resume=False)
        patch.setattr(task, "write_file", write_and_die)
        with pytest.raises(KeyboardInterrupt):
            task.train_network(RESTARTED, splits, 0, name="tiny", folder=folder / "stopped", resume=False)
    return folder / "stopped" / "checkpoint.npz", whole


def test_a_resumed_training_run_equals_an_uninterrupted_one(splits, stopped, tmp_path, capsys):
    checkpoint, (averages, curves, _) = stopped
    (tmp_path / "checkpoint.npz").write_bytes(checkpoint.read_bytes())
    resumed, resumed_curves, _ = task.train_network(RESTARTED, splits, 0, name="tiny", folder=tmp_path, resume=True)
    assert "resuming after step 2" in capsys.readouterr().out
    assert resumed_curves == curves
    assert curves["step"] == [2, 4]
    assert len(averages) == len(resumed) == len(CONFIG.averages)
    for one, other in zip(averages, resumed, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    with np.load(checkpoint.parent / "snapshot_00002.npz") as file:
        assert file.files == list(averages[0])
    changed = dataclasses.replace(RESTARTED, batch_size=4)
    with pytest.raises(task.UserError, match=r"other settings .*batch_size"):
        task.train_network(changed, splits, 0, name="tiny", folder=tmp_path, resume=True)


def test_training_begins_anew_from_averaged_weights_with_other_noise(splits, stopped):
    images, labels = map(jnp.asarray, splits["train"])
    state = task.start(task.init_model(0, RESTARTED), jax.random.PRNGKey(0), 0, RESTARTED)
    state, first = task.advance(state, images, labels, RESTARTED, 2)
    average = jax.tree.map(np.array, state.averages[0])
    state = task.start(average, state.key, 2, RESTARTED)
    assert all(np.array_equal(of[name], average[name]) for of in (state.parameters, *state.averages) for name in of)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))
    key = jnp.array(state.key)
    state, second = task.advance(state, images, labels, RESTARTED, 2, 2)
    whole, curves, _ = stopped[1]
    assert curves["loss"] == [first, second]
    for one, other in zip(whole, state.averages, strict=True):
        assert all(np.array_equal(one[name], other[name]) for name in one)
    usual = dataclasses.replace(RESTARTED, restart_noise=(RESTARTED.noise_mean, RESTARTED.noise_deviation))
    assert task.advance(task.start(average, key, 2, usual), images, labels, usual, 2, 2)[1] != second


@pytest.mark.parametrize("damage", ["truncated", "an array is missing", "not a number"])
def test_damaged_checkpoint(splits, stopped, tmp_path, damage):
    content = stopped[0].read_bytes()
    if damage == "truncated":
        (tmp_path / "checkpoint.npz").write_bytes(content[:-100])
    else:
        arrays = dict(np.load(io.BytesIO(content)))
        arrays["0"] = arrays["0"] * np.float32(np.nan)
        np.savez(tmp_path / "checkpoint.npz", **{n: a for n, a in arrays.items() if n != "3" or damage[0] == "n"})
    with pytest.raises(task.UserError, match=r"damaged .*; start over without --resume"):
        task.train_network(RESTARTED, splits, 0, name="tiny", folder=tmp_path, resume=True)


def test_loss_is_measured_at_fixed_noise_and_is_that_of_a_network_that_knows_nothing(splits):
    fresh = task.init_model(0, CONFIG)
    loss = task.denoising_loss(fresh, splits["valid"], CONFIG)
    assert loss == task.denoising_loss(fresh, splits["valid"], dataclasses.replace(CONFIG, noise_mean=3.0))
    clean = splits["valid"].images / 127.5 - 1
    # The error of the scaled noisy image in units of the factor of the output, averaged over all noise levels.
    levels = np.exp(-1.2 + 1.2 * np.random.default_rng(0).normal(size=20_000))
    out, total = levels * 0.5 / np.sqrt(levels**2 + 0.25), levels**2 + 0.25
    expected = np.mean(((levels**2 / total) ** 2 * np.mean(clean**2) + (0.25 * levels / total) ** 2) / out**2)
    assert loss == pytest.approx(expected, rel=0.1)


TRAIN_ALONE = """
import sys
import numpy as np, pathlib
import cifar100_generator as task
config = task.Config(**eval(sys.argv[1]))
split = task.Split(np.zeros((20, 32, 32, 3), np.uint8), np.zeros(20, np.int32))
folder = pathlib.Path(sys.argv[2])
task.BATCH = 20
task.train_network(config, {"train": split, "valid": split}, 0, name="tiny", folder=folder, resume=False)
print(sorted({name.split(".")[0] for name in sys.modules} & {"keras", "tensorflow", "common", "plots", "experiments"}))
"""


def test_training_imports_nothing_but_numpy_jax_and_optax(tmp_path):
    text = (REPOSITORY / f"{task.SCRIPT}.py").read_text()
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.M)) - set(sys.stdlib_module_names)
    assert imported == {"jax", "numpy", "optax"}
    command = [sys.executable, "-c", TRAIN_ALONE, repr(TINY | {"steps": 1}), tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": QUICK_COMPILATION}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.splitlines()[-1] == "[]"
    assert (tmp_path / "checkpoint.npz").exists()


# ---------------------------------------------------------------------------------------------------------- experiments


def row(name, seed, loss):
    return {
        "name": name,
        "seed": seed,
        **experiments.BASELINE,
        "parameters": 5,
        "valid_loss": loss,
        "average_losses": (1, 2, loss),
    }


def table(*rows):
    text = ""
    for each in rows:
        text = experiments.with_row(text, each)
    return text


def test_planned_experiments_name_every_field_of_the_config_and_keep_to_the_budget():
    assert set(task.Config.__dataclass_fields__) == set(experiments.BASELINE)
    runs = experiments.unfinished("", 3)
    assert [run[:2] for run in runs[:5]] == [("baseline", seed) for seed in range(3, 8)]
    assert {run[1] for run in runs[5:]} == {3}
    for name, fields in {name: fields for name, _, fields in runs}.items():
        config = task.Config(**fields)
        assert task.budget(config)[0] < task.PARAMETER_LIMIT
        assert (config == task.Config(**experiments.BASELINE)) == (name == "baseline")
    assert experiments.unfinished(table(row("baseline", 3, 0.5)), 3) == runs[1:]


def test_experiments_are_compared_on_common_seeds():
    baseline = [row("baseline", seed, loss) for seed, loss in enumerate((0.50, 0.52, 0.54))]
    text = table(*baseline, row("better", 0, 0.40), row("better", 1, 0.42), row("close", 2, 0.55), row("other", 9, 0.1))
    compared = experiments.compare(text)
    assert compared["baseline"]["noise"] == pytest.approx(0.02)
    assert compared["better"]["difference"] == pytest.approx(-0.1)
    assert compared["better"]["resolved"]
    uneven = table(*baseline, row("uneven", 0, 0.40), row("uneven", 1, 0.60))
    assert experiments.compare(uneven)["uneven"]["resolved"] is False  # as its two seeds disagree
    assert compared["close"]["resolved"] is False
    assert compared["other"]["difference"] is None
    assert "not resolved" in experiments.summary(compared)


@pytest.mark.parametrize(
    "damage", [("0.5", "nan"), ("0.5", "high"), ("patch", "patches"), (",0.5", ""), ("a,0,", "a,0.0,")]
)
def test_damaged_table_of_experiments(tmp_path, damage):
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}_experiments.csv"
    path.parent.mkdir(parents=True)
    path.write_text(table(row("a", 0, 0.5)).replace(*damage))
    with pytest.raises(task.UserError, match=r"experiments\.csv is damaged .*; move it away"):
        task.compared_experiments(tmp_path)


def test_finished_experiments_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiments, "VARIANTS", {"velocity": {"target": "velocity"}})
    monkeypatch.setattr(experiments, "NUM_SEEDS", 2)
    monkeypatch.setattr(experiments, "VARIANT_SEEDS", 1)
    losses = {0.98: 0.7, 0.99: 0.6, 0.995: 0.8}

    def train_network(config, splits, seed, *, name, folder, resume):
        assert not resume
        return config.averages, {"loss": [0.9]}, 1.0

    monkeypatch.setattr(task, "train_network", train_network)
    monkeypatch.setattr(task, "denoising_loss", lambda average, split, config: losses[average])
    flags = ["--experiments", "--sample", "--output-dir", str(tmp_path)]
    task.main(flags)
    path = tmp_path / "report" / "results" / f"{task.SCRIPT}_experiments.csv"
    with open(path, newline="") as file:
        rows = [(row["name"], row["seed"], row["target"], row["valid_loss"]) for row in csv.DictReader(file)]
    baseline = [("baseline", "0", "edm", "0.6"), ("baseline", "1", "edm", "0.6")]
    assert rows == [*baseline, ("velocity", "0", "velocity", "0.6")]
    content = path.read_text()
    assert "velocity" in capsys.readouterr().out
    averages = {"0.98": 0.7, "0.99": pytest.approx(0.6), "0.995": pytest.approx(0.8)}
    assert task.compared_experiments(tmp_path)["baseline"]["averages"] == averages
    monkeypatch.setattr(task, "train_network", None)
    task.main(flags)
    assert path.read_text() == content
    with pytest.raises(task.UserError, match="leave them out"):
        task.main([*flags, "--epochs", "1"])
    monkeypatch.setitem(sys.modules, f"experiments.{task.SCRIPT}", None)
    with pytest.raises(task.UserError, match="experiments/ is needed"):
        task.main(flags)


@pytest.mark.parametrize(("recognised", "guidance"), [(0.0, 3.0), (0.09, 3.0), (0.06, 5.0)])
def test_guidance_is_chosen_by_the_lowest_fid_of_recognised_samples(tmp_path, monkeypatch, recognised, guidance):
    config = dataclasses.replace(CONFIG, steps=3)
    np.savez(tmp_path / "snapshot_00002.npz", a=np.full(1, 5, "f2"))
    monkeypatch.setattr(task, "SNAPSHOT_STEPS", 1)  # of which the first was left on another machine

    def fid(network, count, seed, part):  # best with guidance 3, worse with few steps
        assert part == "valid"
        parameters, _, sampling = network
        found = {"fid_768": abs(parameters["a"][0] - 1) + abs(sampling.guidance - 3) + 1 / sampling.steps}
        return found | {"class_agreement": recognised * sampling.guidance}

    sampling, rows = experiments.choose(task, {"a": np.ones(1)}, config, fid, tmp_path)
    assert sampling == dataclasses.replace(task.Sampling(), guidance=guidance)
    assert {row["varied"] for row in rows} == {"guidance", "interval", "steps", "training"}
    at_two, at_the_end = (row for row in rows if row["varied"] == "training")
    assert at_the_end["step"] == 3
    assert at_two["step"] == 2
    assert at_two["fid_768"] == pytest.approx(4 + guidance - 3 + 1 / 18)
    assert plots.draw_choices(rows, dataclasses.asdict(sampling), tmp_path / "choices.png").exists()


# -------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize(
    ("flags", "trouble"),
    [
        (["--train", "--batch-size", "0"], "--batch-size 0 is not a whole number from 1 to 100000"),
        (["--train", "--seed", "-1"], "--seed -1 is not a whole number"),
        (["--load", "--guidance", "nan"], "--guidance nan is not a number from 0 to 20"),
        (["--load", "--steps", "1"], "--steps 1 is not a whole number from 2"),
        (["--load", "--resume"], "never trains"),
        (["--train", "--record"], "use it with --load"),
        (["--load", "--quick", "--record"], "without --quick"),
        (["--train", "--class", "tiger"], "add --load"),
        (["--load", "--samples", "2", "--record"], "are about metrics"),
        (["--load", "--train"], "not allowed with"),
        ([], "required"),
    ],
)
def test_flags_that_make_no_sense(flags, trouble):
    with pytest.raises(task.UserError, match=trouble):
        task.main(flags)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output of a training run of a tiny network on the sample."""
    output = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(task, "BATCH", 20)
        patch.setattr(task, "CONFIG", CONFIG)
        patch.setitem(sys.modules, f"plots.{task.SCRIPT}", None)
        assert task.main(["--train", "--sample", "--output-dir", str(output)]) == 0
    return output


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_cards_say_what_was_trained_and_measured(trained):
    card = json.loads((trained / "saved_models" / task.SCRIPT / "diffusion.json").read_text())
    assert set(card["metrics"]) == {"train", "valid", "test", "sample"}
    assert set(card["metrics"]["sample"]) == {
        *("loss", "nearest_distance", "pairwise_distance"),
        *("real_nearest_distance", "real_pairwise_distance"),
    }
    assert card["parameters"]["trainable"] == task.budget(CONFIG)[0]
    assert (card["steps"], card["penalty"], len(card["class_names"])) == (4, 0, 100)
    results = json.loads((trained / "report" / "results" / f"{task.SCRIPT}.json").read_text())
    assert results["test"] == card["metrics"]["test"]
    assert results["parameters"] == card["parameters"]


def test_load_reproduces_train_and_records_only_when_told(trained, tmp_path, monkeypatch, capsys):
    for name, content in contents(trained).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    monkeypatch.setitem(sys.modules, f"plots.{task.SCRIPT}", None)
    flags = ["--load", "--sample", "--output-dir", str(tmp_path)]
    assert task.main(flags) == 0
    output = capsys.readouterr().out
    assert output.count("agrees") == 5
    assert "figures are skipped" in output
    changed = {name for name, content in contents(tmp_path).items() if content != contents(trained)[name]}
    assert changed <= {task.Path("runs", task.SCRIPT, "verification.json")}
    path = tmp_path / "saved_models" / task.SCRIPT / "diffusion.json"
    card = json.loads(path.read_text())
    right = card["metrics"]["sample"]["loss"]
    card["metrics"]["sample"]["loss"] += 0.1
    path.write_text(json.dumps(card))
    assert task.main(flags) == 1
    assert task.main([*flags, "--record"]) == 1  # off, and therefore recorded
    assert json.loads(path.read_text())["metrics"]["sample"]["loss"] == pytest.approx(right)
    assert task.main(flags) == 0


def test_fid_decides_is_measured_and_is_recorded(arrays, tmp_path, monkeypatch, capsys):
    """The whole of --train and --load --record, with a stand-in for the Inception network."""
    fid, drawn = importlib.import_module("common.fid"), []

    def comparison(data_dir, real, classifier_path):
        return lambda images, part, labels=None: {"fid_768": float(images.std()), "compared": float(len(real[part]))}

    monkeypatch.setattr(fid, "comparison", comparison)
    monkeypatch.setattr(fid, "scale", lambda data_dir, training, test: {"training images": 0.02})
    monkeypatch.setattr(fid, "load_classifier", lambda path: None)
    monkeypatch.setattr(plots, "draw", lambda *handed: drawn.append(handed) or [])
    monkeypatch.setattr(experiments, "NUM_SAMPLES", 20)
    monkeypatch.setattr(task, "MEASURED_ITEMS", 20)
    monkeypatch.setattr(task, "CONFIG", CONFIG)
    write_cache(tmp_path / "cache" / "cifar100", arrays, np.arange(1000))
    flags = ["--data-dir", str(tmp_path), "--output-dir", str(tmp_path)]
    assert task.main(["--train", "--seed", "3", *flags]) == 0
    path = tmp_path / "saved_models" / task.SCRIPT / "diffusion.json"
    card = json.loads(path.read_text())
    with np.load(tmp_path / "runs" / task.SCRIPT / "diffusion_seed_3" / "checkpoint.npz") as file:
        of_run = [file[name] for name in file.files if file[name].shape == (101, 8)]  # and averages
    saved = np.load(path.with_suffix(".npz"))["classes"]
    assert np.array_equal(saved, of_run[1 + CONFIG.averages.index(card["average"])])
    rows = {row["varied"]: row for row in card["choices"]}
    assert rows.keys() == {"guidance", "interval", "steps", "training"}
    assert {row["compared"] for row in card["choices"]} == {20}
    assert card["metrics"]["test"]["fid_768"] != card["second_seed"]["fid_768"]
    assert card["scale"] == {"training images": 0.02}
    path.write_text(json.dumps(card | {"second_seed": {}, "scale": {}}))
    assert task.main(["--load", "--record", *flags]) == 0  # with the seed of the card
    assert json.loads(path.read_text()) == card
    results = json.loads((tmp_path / "report" / "results" / f"{task.SCRIPT}.json").read_text())
    assert results["second_seed"] == card["second_seed"]
    assert all(np.array_equal(handed[4][0], task.draw_noise(200, 3)[0]) for handed in drawn)
    assert len(drawn) == 2
    memory = tmp_path / "runs" / task.SCRIPT / "measured.json"
    arguments = argparse.Namespace(load=False, train=True, quick=False, sample=False)
    arguments.data_dir = arguments.output_dir = tmp_path
    for arguments.resume in (True, False):  # without it, nothing measured earlier may be used
        task.parts_of(arguments, task.load_data(tmp_path)[0])
        assert memory.exists() == arguments.resume
    capsys.readouterr()
    changed = arrays | {"test_images": arrays["test_images"][:, ::-1].copy()}
    write_cache(tmp_path / "other" / "cache" / "cifar100", changed, np.arange(1000))
    assert task.main(["--load", *flags, "--data-dir", str(tmp_path / "other")]) == 0
    output = capsys.readouterr().out
    assert "not compared" in output
    assert "agrees" not in output
    with pytest.raises(task.UserError, match="trained with other data"):
        task.main(["--load", "--record", *flags, "--data-dir", str(tmp_path / "other")])
    assert json.loads(path.read_text()) == card


def test_a_script_that_is_alone_trains_and_says_what_it_cannot_measure(tmp_path, monkeypatch, capsys):
    sample = task.load_data(None, sample=True)
    monkeypatch.setattr(task, "load_data", lambda *_, **__: sample)
    monkeypatch.setattr(task, "CONFIG", CONFIG)
    monkeypatch.setattr(task, "SAMPLE", tmp_path / "missing.npz")
    for module in ("common.fid", f"plots.{task.SCRIPT}", f"experiments.{task.SCRIPT}"):
        monkeypatch.setitem(sys.modules, module, None)
    assert task.main(["--train", "--output-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert "FID and novelty are skipped" in output
    assert "figures are skipped" in output
    card = json.loads((tmp_path / "saved_models" / task.SCRIPT / "diffusion.json").read_text())
    assert {part: list(metrics) for part, metrics in card["metrics"].items()} == {key: ["loss"] for key in sample[0]}


@pytest.mark.parametrize("damage", ["weights", "card", "another network", "no seed", "no card"])
def test_damaged_network(trained, tmp_path, damage):
    folder = trained / "saved_models" / task.SCRIPT
    weights, text = (folder / "diffusion.npz").read_bytes(), (folder / "diffusion.json").read_text()
    (tmp_path / "diffusion.npz").write_bytes(weights[: -1 if damage == "weights" else None])
    text = text.replace('"model": "diffusion"', '"model": "other"') if damage == "another network" else text
    text = text.replace('"seed"', '"seeds"') if damage == "no seed" else text
    if damage != "no card":
        (tmp_path / "diffusion.json").write_text(text[:-50] if damage == "card" else text)
    with pytest.raises(task.UserError, match=r"(is damaged|is missing).*get it again from the repository"):
        task.load_network(tmp_path / "diffusion.npz")


def test_images_are_generated_without_a_dataset(trained, tmp_path, capsys):
    flags = ["--load", "--output-dir", str(trained), "--data-dir", str(tmp_path), "--steps", "2", "--seed", "5"]
    task.main([*flags, "--samples", "5", "--class", "tiger", "--guidance", "2", "--export", str(tmp_path / "png")])
    assert "tiger_seed_5.png" in capsys.readouterr().out
    path = trained / "runs" / task.SCRIPT / "tiger_seed_5.npz"
    with np.load(path) as file:
        assert file["images"].shape == (5, 32, 32, 3)
        assert file["class_names"][file["label"]].tolist() == ["tiger"] * 5
        tigers = file["images"]
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    single = plots.plt.imread(tmp_path / "png" / "00004.png")[..., :3]
    assert np.array_equal(np.rint(single * 255).astype("uint8"), tigers[4])
    with pytest.raises(task.UserError, match=r"png is not an empty folder"):
        task.main([*flags, "--samples", "4", "--export", str(tmp_path / "png")])
    with pytest.raises(task.UserError, match=r"no class lynx; choose one of apple"):
        task.main([*flags, "--class", "lynx"])


def test_every_figure_is_drawn(tmp_path):
    """With made-up numbers, since what there is to show comes from a training run of hours."""
    usual = {"low": 0.2, "high": 20.0, "fid_768": 0.5, "class_agreement": 0.3, "step": 4, "guidance": 2.0, "steps": 18}
    choices = [{"varied": varied, **usual} for varied in ("guidance", "interval", "steps", "training")]
    choices += [{**usual, "varied": "guidance", "guidance": 1.0}, {**usual, "varied": "interval", "high": 3.0}]
    choices += [{**usual, "varied": "steps", "steps": 9}, {**usual, "varied": "training", "step": 2}]
    card = {"config": dataclasses.asdict(task.CONFIG), "choices": choices, "sampling": {"guidance": 2.0, "steps": 18}}
    card |= {"parameters": {"trainable": 947_836}, "class_names": [f"class_{number}" for number in range(100)]}
    card |= {"curves": {"step": [1, 2, 3], "loss": [3, 2, 1], "train_loss": [3, 2, 1], "valid_loss": [3, 2.1, 1.2]}}
    card |= {"scale": {"training images": 0.02, "uniform noise": 3.6}, "metrics": {"test": {"fid_768": 0.2}}}
    split = task.Split(GENERATOR.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8), None)
    shown = card, lambda noise, conditions: (noise * 40 + 128).clip(0, 255).astype("uint8")
    compared = experiments.compare(table(row("baseline", 0, 0.5), row("baseline", 1, 0.6), row("better", 0, 0.4)))

    def classifier(images):
        return images.reshape(len(images), -1)[:, :5], None

    splits = {"train": split, "valid": split}
    written = plots.draw(compared, splits, *shown, task.draw_noise(200, 0), classifier, tmp_path)
    assert {path.stem for path in written} == {
        *("architecture", "choices", "classes", "curves", "experiments"),
        *("interpolations", "nearest", "nearest_all", "samples", "scale"),
    }
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)


def test_nearest_training_images_are_found():
    training = GENERATOR.integers(0, 256, (30, 12), dtype=np.uint8)
    assert plots.nearest(training[[4, 0, 29]], training).tolist() == [4, 0, 29]
