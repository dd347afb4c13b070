"""Checkpoints, exact resume, schedules and precision."""

import concurrent.futures
import dataclasses
import itertools
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY, run_elsewhere

from common import models, training
from common.errors import UserError

INPUTS = np.random.default_rng(0).normal(size=(70, 3)).astype("float32")
TARGETS = INPUTS.sum(axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Config:
    epochs: int = 1
    batch_size: int = 16
    widths: tuple = (4,)


def small_model(seed=0):
    """A model whose training depends on weights, order, noise and dropout."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((3,))
    features = keras.layers.GaussianNoise(0.1)(inputs)
    features = keras.layers.Dropout(0.2)(keras.layers.Dense(4, activation="relu")(features))
    model = keras.Model(inputs, keras.layers.Dense(1)(features))
    model.compile(keras.optimizers.Adam(0.01), "mse", **training.compile_options(1))
    return model


def fit(model, folder, epochs, resume=False, seed=0, **keywords):
    options = {"config": Config(epochs), "seed": seed, "folder": folder, "resume": resume, "verbose": 0}
    return training.fit(model, INPUTS, TARGETS, **options | keywords)


class Stop(keras.callbacks.Callback):
    """Raises in the middle of an epoch, as if the process were killed there."""

    def __init__(self, epoch):
        super().__init__()
        self.stop_epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == self.stop_epoch and batch >= 2:
            raise KeyboardInterrupt


def resumed_and_uninterrupted(folder):
    """Returns the curves and the weights of both."""
    whole = small_model()
    curves, _ = fit(whole, folder / "whole", 5, validation_data=(INPUTS, TARGETS))
    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), folder / "stopped", 5, callbacks=[Stop(3)], validation_data=(INPUTS, TARGETS))
    again = small_model(seed=1)
    resumed, _ = fit(again, folder / "stopped", 5, resume=True, validation_data=(INPUTS, TARGETS))
    return resumed, curves, again.get_weights(), whole.get_weights()


def test_resume_equals_an_uninterrupted_run(tmp_path):
    resumed, curves, weights, expected = resumed_and_uninterrupted(tmp_path)
    assert resumed == curves
    assert len(curves["loss"]) == len(curves["val_loss"]) == 5
    assert all(np.array_equal(*pair) for pair in zip(weights, expected, strict=True))


def test_resume_equals_an_uninterrupted_run_under_jax(tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
import pathlib, numpy as np, test_training
resumed, curves, weights, expected = test_training.resumed_and_uninterrupted(pathlib.Path({str(tmp_path)!r}))
print(resumed == curves and all(np.array_equal(*pair) for pair in zip(weights, expected)))
"""
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.split()[-1] == "True", done.stderr


class OwnLoss(keras.Model):
    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(y - y_pred))


def normalized_model(kind=keras.Model):
    """A model whose training depends on the order and on the statistics of whole batches; nothing else is random."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((3,))
    features = keras.layers.BatchNormalization()(keras.layers.Dense(4, kernel_initializer="he_normal")(inputs))
    model = kind(inputs, keras.layers.Dense(1)(keras.layers.ReLU()(features)))
    own = kind is OwnLoss
    model.compile(keras.optimizers.SGD(0.01, 0.9), None if own else "mse", **training.compile_options(100))
    return model


class PredictAll(keras.callbacks.Callback):
    """Predicts between two epochs, as callbacks of some scripts do."""

    def on_epoch_end(self, epoch, logs):
        logs["predicted"] = float(np.mean(self.model.predict(training.divisible(INPUTS[:33]), verbose=0)[:32]))


def draws_of_each_device():
    """Returns what a layer draws on each of two devices, two times one after the other, under TensorFlow."""
    import tensorflow as tf

    seeds, model = training.EpochSeeds(training.Batches((INPUTS,), 16, seed=0, devices=2)), small_model()
    seeds.set_model(model)
    seeds.on_epoch_begin(1)
    (noise,) = (layer for layer in model.layers if isinstance(layer, keras.layers.GaussianNoise))
    strategy = tf.distribute.get_strategy()

    def draw():
        return keras.random.normal((), seed=noise.seed_generator)

    return [float(part) for _ in range(2) for part in strategy.experimental_local_results(strategy.run(draw))]


def run_on_two_devices(folder):
    """Returns, for the test below, what two devices make of training; the process must have two of them."""
    found, validation = {"errors": []}, (INPUTS[:34], TARGETS[:34])
    for kind in (keras.Model, OwnLoss):
        curves = found[kind.__name__] = []
        for devices in (1, 2):
            with training.running(devices, folder / "logs", folder):
                model, callbacks = normalized_model(kind), [PredictAll()]
                options = {"validation_data": validation, "callbacks": callbacks}
                curves.append(fit(model, folder / f"{kind.__name__}_{devices}", 3, **options)[0])
        on_one_device = models.for_prediction(model, 0)
        predicted = on_one_device.predict(INPUTS[:33], batch_size=16, verbose=0)  # one batch is of a single example
        curves.append({"predicted": float(np.mean(predicted[:32]))})
    found["logs"] = sorted(path.parent.name for path in (folder / "logs" / "Model_2").rglob("events*"))
    with training.running(2, None, None):
        resumed, curves, weights, expected = resumed_and_uninterrupted(folder)
        same = all(np.array_equal(*pair) for pair in zip(weights, expected, strict=True))
        found["resumed"] = resumed == curves and same
        found["draws"] = draws_of_each_device() if keras.backend.backend() == "tensorflow" else []
    for devices, batch_size in ((3, 16), (2, 15)):
        try:
            with training.running(devices, None, None):
                fit(small_model(), folder / "wrong", 1, config=Config(batch_size=batch_size))
        except UserError as error:
            found["errors"].append(str(error))
    return json.dumps(found)


TWO_DEVICES = """
import pathlib, sys
sys.path[:0] = sys.argv[1:3]
import keras
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], two)
import test_training
print(test_training.run_on_two_devices(pathlib.Path(sys.argv[3])))
"""


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_training_on_two_devices_equals_that_on_one(backend, tmp_path):
    pytest.importorskip("tensorboard")
    environment = {
        "KERAS_BACKEND": backend,
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=2 {QUICK_COMPILATION}",
    }
    output = run_elsewhere(TWO_DEVICES, tmp_path, REPOSITORY, REPOSITORY / "tests", tmp_path, **environment)
    found = json.loads(output.splitlines()[-1])
    for kind in ("Model", "OwnLoss"):
        one, two, after = found[kind]
        assert set(one) == {"loss", "val_loss", "predicted"}
        for name, curve in one.items():
            assert two[name] == pytest.approx(curve, rel=1e-4)
        assert after["predicted"] == pytest.approx(two["predicted"][-1], rel=1e-4)
    assert found["resumed"]
    assert len(set(found["draws"])) == len(found["draws"])
    assert found["logs"] == ["train", "validation"]
    missing, indivisible = found["errors"]
    assert re.match(r"--devices 3 is more than there are: cpu:0, cpu:1", missing)
    assert re.match(r"a batch of 15 cannot be shared out among 2 devices; change --batch-size", indivisible)


def run_in_one_of_two_processes(number, folder):
    """Returns, for the test below, the curves of this process by itself and with the other one, and what is refused.

    Together they are interrupted and resumed.
    """
    options, errors = {"validation_data": (INPUTS[:35], TARGETS[:35]), "callbacks": [PredictAll()]}, []
    alone, _ = fit(normalized_model(), folder / "alone", 3, **options)
    with training.running(2, None, None):
        with pytest.raises(KeyboardInterrupt):
            fit(normalized_model(), folder / "together", 3, **options | {"callbacks": [PredictAll(), Stop(1)]})
        together, _ = fit(normalized_model(), folder / "together", 3, resume=True, **options)
        folders = [folder / "together", folder / ("together" if number == 0 else "missing")]
        for batch_size, checkpoint in zip((16 + 2 * number, 16), folders, strict=True):
            try:
                fit(normalized_model(), checkpoint, 3, resume=True, config=Config(3, batch_size))
            except UserError as error:
                errors.append(str(error))
    try:
        with training.running(1, None, None):
            pass
    except UserError as error:
        errors.append(str(error))
    return json.dumps({"curves": [alone, together], "errors": errors})


ONE_OF_TWO_PROCESSES = """
import os, pathlib, sys
sys.path[:0] = sys.argv[1:3]
sys.argv.append("--train")
from common import startup
import test_training
number = int(os.environ["KERAS_DISTRIBUTION_PROCESS_ID"])
print(test_training.run_in_one_of_two_processes(number, pathlib.Path(sys.argv[3]) / str(number)))
"""


def test_training_in_two_processes_equals_that_in_one(tmp_path):
    pytest.importorskip("jax", reason="only JAX trains in several processes")
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        "KERAS_BACKEND": "jax",
        "KERAS_DISTRIBUTION_JOB_ADDRESSES": f"localhost:{port}",
        "KERAS_DISTRIBUTION_NUM_PROCESSES": "2",
        "XLA_FLAGS": QUICK_COMPILATION,
    }
    places = ONE_OF_TWO_PROCESSES, tmp_path, REPOSITORY, REPOSITORY / "tests", tmp_path
    with concurrent.futures.ThreadPoolExecutor() as pool:
        processes = [
            pool.submit(run_elsewhere, *places, **environment, KERAS_DISTRIBUTION_PROCESS_ID=str(number))
            for number in range(2)
        ]
        found = [json.loads(process.result().splitlines()[-1]) for process in processes]
    for each in found:
        alone, together = each["curves"]
        assert set(alone) == {"loss", "val_loss", "predicted"}
        for name, curve in alone.items():
            assert together[name] == pytest.approx(curve, rel=1e-4)
        flags, epochs, devices = each["errors"]
        assert flags == epochs
        assert re.match(r"the processes differ in flags, or in the epoch to resume from; ", epochs)
        assert re.match(r"--devices must be 2 here: 1 in each of 2 processes", devices)
    assert found[0] == found[1]


def test_logged_curves_can_be_read_by_tensorboard(tmp_path):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with training.running(1, tmp_path / "logs", tmp_path):
        for resume in (False, True):  # the second time there is nothing left to train, and nothing is lost
            curves, _ = fit(small_model(), tmp_path / "small_seed_0", 2, resume, validation_data=(INPUTS, TARGETS))
    for part, name in (("train", "loss"), ("validation", "val_loss")):
        events = accumulators.EventAccumulator(str(tmp_path / "logs" / "small_seed_0" / part)).Reload()
        logged = [float(tensorboard_value(event)) for event in events.Tensors("epoch_loss")]
        assert logged == pytest.approx(curves[name])


def tensorboard_value(event):
    from tensorboard.util import tensor_util

    return tensor_util.make_ndarray(event.tensor_proto)


def watching():
    """Callbacks that lower the learning rate after two epochs without an improvement, and stop after three."""
    never = {"monitor": "loss", "min_delta": 100.0}
    return [
        keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=2, **never),
        keras.callbacks.EarlyStopping(patience=3, **never),
    ]


def test_resumed_run_keeps_the_counters_of_callbacks(tmp_path):
    whole = small_model()
    curves, _ = fit(whole, tmp_path / "whole", 9, callbacks=watching())
    assert len(curves["loss"]) == 4
    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), tmp_path / "stopped", 9, callbacks=[*watching(), Stop(2)])
    again = small_model(seed=1)
    resumed, _ = fit(again, tmp_path / "stopped", 9, resume=True, callbacks=watching())
    assert resumed == curves
    assert resumed["learning_rate"][0] != resumed["learning_rate"][-1]


def test_resumed_run_keeps_optimizer_steps_seconds_and_one_checkpoint(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(small_model(), tmp_path, 5, callbacks=[Stop(3)])
    saved = json.loads((tmp_path / "state.json").read_text())
    assert saved["epoch"] == 3
    resumed = small_model(seed=1)
    curves, seconds = fit(resumed, tmp_path, 5, resume=True)
    assert curves["loss"][:3] == saved["history"]["loss"]
    assert int(resumed.optimizer.iterations) == 5 * 5
    assert seconds > saved["seconds"]
    assert [path.name for path in tmp_path.glob("*.h5")] == ["epoch_0005.weights.h5"]


def test_every_epoch_has_an_order_of_its_own_with_every_example_once():
    batches = training.Batches((INPUTS,), 16, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.shuffle(epoch)
        seen = np.concatenate([batches[number][0] for number in range(len(batches))])
        assert np.array_equal(np.sort(seen, axis=0), np.sort(INPUTS, axis=0))
        orders.append(seen)
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])


def test_resuming_a_finished_run_trains_no_more(tmp_path):
    model = small_model()
    first, _ = fit(model, tmp_path, 2)
    again = small_model(seed=1)
    second, _ = fit(again, tmp_path, 2, resume=True)
    assert second == first
    for expected, restored in zip(model.get_weights(), again.get_weights(), strict=True):
        assert np.array_equal(expected, restored)


def test_run_that_a_callback_stops_early_is_finished(tmp_path):
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=1e9, patience=2)  # nothing is an improvement
    model = small_model()
    curves, _ = fit(model, tmp_path, 5, callbacks=[stopping])
    assert len(curves["loss"]) == 3
    again = small_model(seed=1)
    resumed, _ = fit(again, tmp_path, 5, resume=True)
    assert resumed == curves
    assert all(np.array_equal(*pair) for pair in zip(again.get_weights(), model.get_weights(), strict=True))


def test_a_training_step_is_traced_once(tmp_path, monkeypatch):
    """Tracing takes longer than all that a --quick run does; a step that creates variables is traced twice."""
    model = small_model()
    model.compile(keras.optimizers.Adam(0.01), "mse", metrics=["mae"], jit_compile=False)
    calls = []
    step = model.train_step
    monkeypatch.setattr(model, "train_step", lambda data: calls.append(0) or step(data))
    curves, _ = fit(model, tmp_path, 2)
    assert len(calls) == 1
    assert len(curves["mae"]) == 2


def test_pages_of_large_tensors_are_kept_from_step_to_step(tmp_path):
    images = keras.Input((64, 64, 8))
    features = keras.layers.Conv2D(16, 3, activation="relu")(images)
    model = keras.Model(images, keras.layers.GlobalAveragePooling2D()(features))
    model.compile("sgd", "mse", **training.compile_options(1))
    faults = []
    count = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: faults.append(-resource.getrusage(resource.RUSAGE_SELF).ru_minflt),
        on_epoch_end=lambda epoch, logs: faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt),
    )
    inputs, targets = np.zeros((320, 64, 64, 8), "float32"), np.zeros((320, 16), "float32")
    fit_options = {"config": Config(2), "seed": 0, "folder": tmp_path, "resume": False, "verbose": 0}
    training.fit(model, inputs, targets, callbacks=[count], **fit_options)
    pages_of_a_step = 16 * 64 * 64 * (8 + 16) * 4 / 4096
    assert sum(faults[2:]) < 10 * pages_of_a_step  # of 20 steps, each of which would fault several times as many


def test_without_resume_an_old_checkpoint_is_forgotten(tmp_path):
    fit(small_model(), tmp_path, 2)
    curves, _ = fit(small_model(), tmp_path, 1)
    assert len(curves["loss"]) == 1


def test_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(small_model(), tmp_path, 1)
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        fit(small_model(), tmp_path, 1, resume=True, seed=1)
    with pytest.raises(UserError, match=r"other settings \(epochs\)"):
        fit(small_model(), tmp_path, 2, resume=True)
    with pytest.raises(UserError, match=r"other settings \(precision\)"):
        fit(small_model(), tmp_path, 1, resume=True, precision="mixed_bfloat16")
    options = {"config": Config(1), "seed": 0, "folder": tmp_path, "resume": True}
    with pytest.raises(UserError, match=r"other settings \(examples\)"):
        training.fit(small_model(), INPUTS[:4], TARGETS[:4], **options)


def change_state(folder, **fields):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | fields))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").write_bytes(b"damaged"),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "epoch_0001.weights.h5").write_bytes(b"damaged"),
        lambda folder: (folder / "epoch_0001.weights.h5").unlink(),
        lambda folder: change_state(folder, history={}),
        lambda folder: change_state(folder, history={"loss": ["high"]}),
        lambda folder: change_state(folder, epoch="one"),
        lambda folder: change_state(folder, settings=None),
        lambda folder: change_state(folder, weights="../epoch_0001.weights.h5"),
        lambda folder: change_state(folder, weights=1),
    ],
)
def test_damaged_checkpoint_is_a_user_error(damage, tmp_path):
    fit(small_model(), tmp_path, 1)
    damage(tmp_path)
    with pytest.raises(UserError, match=r"damaged.*start over without --resume") as error:
        fit(small_model(), tmp_path, 1, resume=True)
    assert "\n" not in str(error.value)


def test_full_disk_while_saving_is_a_user_error(tmp_path, monkeypatch):
    def fail(path):
        raise RuntimeError("Unable to synchronously create dataset (no space left on device)")

    model = small_model()
    monkeypatch.setattr(model, "save_weights", fail)
    with pytest.raises(UserError, match=r"cannot write .*no space left.*free some space"):
        training.save_weights(model, tmp_path / "a.weights.h5")
    assert not list(tmp_path.iterdir())


def test_loss_that_is_no_longer_finite_is_told_apart_and_a_user_error(tmp_path):
    model = small_model()
    model.optimizer.learning_rate = 1e30
    with pytest.raises(training.Diverged, match="no longer a finite number"):
        fit(model, tmp_path, 9)
    assert issubclass(training.Diverged, UserError)


def test_kill_9_in_the_middle_of_an_epoch(tmp_path):
    """A process that is killed loses the epoch under way and nothing else."""
    code = f"""
import sys, time
sys.path[:0] = [{str(REPOSITORY)!r}, {str(REPOSITORY / "tests")!r}]
import keras, test_training
class Slow(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        time.sleep(0.05)
test_training.fit(test_training.small_model(), {str(tmp_path)!r}, 500, callbacks=[Slow()])
"""
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.time() + 60
    while not (tmp_path / "state.json").exists() or json.loads((tmp_path / "state.json").read_text())["epoch"] < 2:
        assert process.poll() is None
        assert time.time() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    state = json.loads((tmp_path / "state.json").read_text())
    epochs = state["epoch"] + 2  # 500 would take too long
    change_state(tmp_path, settings={**state["settings"], "epochs": epochs})
    model = small_model(seed=1)
    curves, _ = fit(model, tmp_path, epochs, resume=True)
    assert curves["loss"][: state["epoch"]] == state["history"]["loss"]
    assert len(curves["loss"]) == epochs
    assert int(model.optimizer.iterations) == 5 * epochs


def test_cosine_schedule_rises_then_falls_to_zero():
    schedule = training.cosine_schedule(0.5, 100)
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[0] == 0
    assert rates[5] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-6)
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))


@pytest.mark.parametrize("steps", [1, 2, 30, 100])
def test_cosine_schedule_equals_that_of_keras(steps):
    schedule, warmup_steps = training.cosine_schedule(0.003, steps), max(steps // 20, 1)
    expected = keras.optimizers.schedules.CosineDecay(
        0.0, max(steps - warmup_steps, 1), warmup_target=0.003, warmup_steps=warmup_steps
    )
    again = type(schedule).from_config(schedule.get_config())
    for step in range(steps + 3):
        assert float(schedule(step)) == pytest.approx(float(expected(step)), abs=0.003 * 1e-7)
        assert float(again(step)) == float(schedule(step))


def test_steps_count_the_last_small_batch():
    assert training.count_steps(25, Config(epochs=3, batch_size=10)) == 9


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_every_step_is_compiled_under_jax(backend, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: backend)
    assert training.compile_options(1)["jit_compile"] is (backend == "jax")


def test_precision_is_one_that_keras_knows():
    assert training.fast_precision() in ("float32", "mixed_bfloat16")


def test_layers_compute_in_the_precision_of_the_innermost_block():
    with training.computing_in("mixed_bfloat16") as precision:
        assert precision == "mixed_bfloat16"
        with training.computing_in("float32"):
            assert keras.layers.Dense(1).compute_dtype == "float32"
        assert keras.layers.Dense(1).compute_dtype == "bfloat16"
    assert keras.layers.Dense(1).compute_dtype == "float32"
