"""Training that survives being killed, and resumes as if it had never stopped."""

import contextlib
import contextvars
import ctypes
import dataclasses
import functools
import json
import math
import shutil
import time
import zlib
from pathlib import Path

import keras
import numpy as np

from common.errors import UserError, reason
from common.files import H5PY_ERRORS, read_json, replacing, write_json

STEPS_PER_EXECUTION = 16  # optimisation steps between two returns to Python, which otherwise cost a tenth of the time
DRAWS_PER_EPOCH = 1_000_000  # more random draws than a layer makes in one epoch
SEEDS_PER_DEVICE = 1_000_003  # more than the layers of a model that draw
COUNTERS = ("best", "wait", "cooldown_counter")  # of Keras' callbacks that watch a metric
RUN = contextvars.ContextVar("run", default=(1, None, None))  # what `running` was given
MALLOPT = getattr(ctypes.CDLL(None), "mallopt", None)  # of glibc; other C libraries have none


class Diverged(UserError):
    """The loss of a training run is no longer a finite number."""


class Batches(keras.utils.PyDataset):
    """Batches of arrays in an order that depends on the seed and the epoch alone.

    Keras' own shuffling continues a random stream, which a resumed process cannot rejoin. `arrays` is a tuple of
    `inputs` or `(inputs, targets)`, each an array or a dict of arrays. The number of examples in an epoch is a multiple
    of `devices`: a few are left out, others in every epoch. Each of several processes has its part of every batch.
    """

    def __init__(self, arrays, batch_size, seed, devices=1):
        super().__init__()
        self.arrays, self.batch_size, self.seed, self.devices = arrays, batch_size, seed, devices
        self.num_examples = len(keras.tree.flatten(arrays)[0])
        share = keras.distribution.distribution()  # only JAX has one
        self.parts, self.part = (share.num_processes, share.data_shard_id) if share else (1, 0)
        self.shuffle(0)

    def shuffle(self, epoch):
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)
        self.order = order[: self.num_examples // self.devices * self.devices]

    def __len__(self):
        return math.ceil(len(self.order) / self.batch_size)

    def __getitem__(self, number):
        chosen = np.split(self.order[number * self.batch_size : (number + 1) * self.batch_size], self.parts)[self.part]
        return keras.tree.map_structure(lambda array: array[chosen], self.arrays)


class EpochSeeds(keras.callbacks.Callback):
    """Makes the order and everything random in an epoch (augmentation, dropout, noise) depend on its number alone."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        self.batches.shuffle(epoch)
        states = [variable for variable in self.model.variables if variable.name == "seed_generator_state"]
        for number, state in enumerate(states):
            # Mirrored by TensorFlow, a state is one on each device, which may differ. JAX draws for the whole batch.
            for device, part in enumerate(getattr(state.value, "values", [state])):
                numbers = self.batches.seed + number + device * SEEDS_PER_DEVICE, epoch * DRAWS_PER_EPOCH
                part.assign((np.array(numbers) % 2**32).astype("uint32"))


class KeepMemory(keras.callbacks.Callback):
    """Keeps freed memory in the process for the next tensors, instead of giving it back to the system in every step.

    TensorFlow makes the C library do that where a dataset is a Python generator. Getting the pages of large tensors
    again took 40 % of a training run on a CPU. Other C libraries than glibc are left alone.
    """

    def on_train_batch_end(self, batch, logs=None):
        if MALLOPT is not None:
            trim_threshold, mmap_threshold = -1, -3  # names of the parameters in malloc.h
            MALLOPT(trim_threshold, 2**31 - 1)
            MALLOPT(mmap_threshold, 2**30)


class Checkpoint(keras.callbacks.Callback):
    """After every epoch writes weights, optimizer state, learning curves and seconds to `folder`.

    `keras.callbacks.BackupAndRestore` keeps no learning curves, and may be killed between weights and epoch number.
    Here `state.json` names the weights it belongs to and is renamed into place last, so that a kill at any moment costs
    at most the epoch under way. `settings` is a dict of what makes this training run different from another one. The
    counters of `callbacks` that watch a metric are kept, too.
    """

    def __init__(self, folder, settings, callbacks=()):
        super().__init__()
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))  # as it is read back
        self.callbacks, self.counters = callbacks, []
        self.epoch, self.history, self.seconds = 0, {}, 0.0
        self.stopped = False  # by a callback, such as `keras.callbacks.EarlyStopping`

    def restore(self, model):
        """Puts the last checkpoint, where there is one, into a compiled `model`.

        Raises `UserError` where it is damaged or belongs to a training run with other settings or in another process.
        """
        path, advice = self.folder / "state.json", "start over without --resume"
        state = read_json(path, advice) if path.exists() else {}
        _check_alike(self.settings, state.get("epoch", 0))
        if not path.exists():
            return
        try:
            settings, weights, history = state["settings"], state["weights"], state["history"]
            epoch, seconds = int(state["epoch"]), float(state["seconds"])
            curves = {name: [float(value) for value in values] for name, values in history.items()}
            complete = epoch > 0 and "loss" in curves and all(len(values) == epoch for values in curves.values())
            if not complete or Path(weights).name != weights:
                raise ValueError("its parts do not belong together")
            counters = [{name: float(value) for name, value in each.items()} for each in state.get("counters", [])]
            changed = [name for name in self.settings if settings.get(name) != self.settings[name]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is damaged ({reason(error)}); {advice}") from error
        if changed:
            trouble = f"was made with other settings ({', '.join(changed)})"
            raise UserError(f"the checkpoint in {self.folder} {trouble}; use those again, or {advice}")
        try:
            model.load_weights(self.folder / weights)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"the checkpoint in {self.folder} is damaged ({reason(error)}); {advice}") from error
        self.epoch, self.history, self.seconds = epoch, curves, seconds
        self.stopped, self.counters = bool(state.get("stopped")), counters

    def on_train_begin(self, logs=None):
        self.started = time.time() - self.seconds
        for callback, counters in zip(self.callbacks, self.counters, strict=False):  # they have just reset theirs
            vars(callback).update(counters)

    def on_epoch_end(self, epoch, logs=None):
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        self.epoch, self.seconds = epoch + 1, time.time() - self.started
        self.stopped = bool(self.model.stop_training)
        self.counters = [
            {name: float(value) for name, value in vars(callback).items() if name in COUNTERS and value is not None}
            for callback in self.callbacks
        ]
        weights = self.folder / f"epoch_{self.epoch:04d}.weights.h5"
        save_weights(self.model, weights)
        state = {
            name: getattr(self, name) for name in ("epoch", "seconds", "stopped", "settings", "history", "counters")
        }
        write_json(self.folder / "state.json", {"weights": weights.name, **state})
        for old in self.folder.glob("epoch_*.weights.h5"):
            if old != weights:
                old.unlink()


def _check_alike(*values):
    """Raises `UserError` where another process has other `values`: they would wait for ever, or train badly."""
    distribution = keras.distribution.distribution()
    if distribution and distribution.num_processes > 1:
        from jax.experimental.multihost_utils import process_allgather

        if len(set(process_allgather(np.uint32(zlib.crc32(repr(values).encode()))).tolist())) > 1:
            raise UserError("the processes differ in flags, or in the epoch to resume from; give all of them the same")


def save_weights(model, path):
    """Writes weights and optimizer state of `model` to `path`, which ends in ".weights.h5"."""
    with replacing(path, H5PY_ERRORS) as temporary:
        model.save_weights(temporary)


def fit(model, inputs, targets, *, config, seed, folder, resume, precision="float32", callbacks=(), **keywords):
    """`keras.Model.fit` that can be killed at any moment and resumed, with the same curves as an uninterrupted run.

    `inputs` and `targets` are an array or a dict of arrays each, `targets` None for a model with a loss of its own. The
    checkpoint in `folder` stays after the end, so that a script that trains several models skips the finished ones when
    it is resumed; it must be of the same `config` (with `epochs` and `batch_size`), `seed`, `precision` and number of
    examples. A callback that sets `model.stop_training` ends the run for good. Further `keywords` go to
    `keras.Model.fit`.

    Returns the learning curves, a dict from metric name to one float per epoch, and the seconds of all epochs. Raises
    `Diverged` where the loss is no longer finite, and `UserError` where the checkpoint cannot be used.
    """
    folder, (devices, logdir, root) = Path(folder), RUN.get()
    logs = logdir and logdir / folder.relative_to(root)
    if config.batch_size % devices:
        raise UserError(
            f"a batch of {config.batch_size} cannot be shared out among {devices} devices; change --batch-size"
        )
    for old in [] if resume else filter(None, (folder, logs)):
        shutil.rmtree(old, ignore_errors=True)
    settings = {**dataclasses.asdict(config), "seed": seed, "precision": precision}
    settings["examples"] = len(keras.tree.flatten(inputs)[0])  # another dataset nearly always has another number
    settings |= {"devices": devices} if devices > 1 else {}
    checkpoint = Checkpoint(folder, settings, callbacks)
    if logs:
        callbacks = [*callbacks, keras.callbacks.TensorBoard(logs, write_graph=False)]
    _create_variables(model, inputs, targets)
    checkpoint.restore(model)
    if checkpoint.epoch:
        print(f"resuming after epoch {checkpoint.epoch} of {config.epochs}")
    if checkpoint.epoch < config.epochs and not checkpoint.stopped:
        batches = Batches((inputs,) if targets is None else (inputs, targets), config.batch_size, seed, devices)
        if keywords.get("validation_data"):
            keywords["validation_data"] = divisible(keywords["validation_data"])
        standard = [KeepMemory(), keras.callbacks.TerminateOnNaN(), EpochSeeds(batches)]
        with _sharing_out(model, devices) as more:
            model.fit(
                batches,
                initial_epoch=checkpoint.epoch,
                epochs=config.epochs,
                shuffle=False,  # the batches are shuffled already
                validation_batch_size=config.batch_size,
                callbacks=[*standard, *more, *callbacks, checkpoint],
                **keywords,
            )
    if not np.isfinite(checkpoint.history["loss"][-1]) or not (checkpoint.stopped or checkpoint.epoch == config.epochs):
        raise Diverged("the loss is no longer a finite number; lower the learning rate or try another --seed")
    return checkpoint.history, checkpoint.seconds


def _create_variables(model, inputs, targets):
    """Creates the state of optimizer, losses and metrics before the first step.

    The optimizer's must exist before it is restored, and TensorFlow traces a step twice that creates variables.
    """
    model.optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "tensorflow" and targets is not None:
        one, target = keras.tree.map_structure(lambda array: array[:1], (inputs, targets))
        predicted = model(one)
        model.compute_loss(one, target, predicted)
        model.compute_metrics(one, target, predicted)
        model.reset_metrics()


class CosineSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up to `learning_rate`, then a cosine down to 0 at `steps`.

    Keras' `CosineDecay` gives the same rates, but compiles a branch into every optimisation step.
    """

    def __init__(self, learning_rate, steps, warmup_steps):
        self.learning_rate, self.steps, self.warmup_steps = learning_rate, steps, warmup_steps

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        progress = keras.ops.clip((step - self.warmup_steps) / max(self.steps - self.warmup_steps, 1), 0, 1)
        cosine = 0.5 + 0.5 * keras.ops.cos(math.pi * progress)  # 1 during the warm-up
        return self.learning_rate * keras.ops.minimum(step / self.warmup_steps, cosine)

    def get_config(self):
        return {"learning_rate": self.learning_rate, "steps": self.steps, "warmup_steps": self.warmup_steps}


def cosine_schedule(learning_rate, steps):
    """Returns a `CosineSchedule` whose warm-up takes a twentieth of `steps`."""
    return CosineSchedule(learning_rate, steps, warmup_steps=max(steps // 20, 1))


def count_steps(num_examples, config):
    """Returns the number of optimisation steps of a training run."""
    return math.ceil(num_examples / config.batch_size) * config.epochs


def fast_precision():
    """Returns the Keras dtype policy that trains fastest here: "mixed_bfloat16" or "float32".

    bfloat16 arithmetic, with weights kept in float32, nearly doubles the speed of convolutions on GPUs and on CPUs with
    AMX or of AMD with AVX-512 BF16. It slows every other CPU down, Intel's with AVX-512 BF16 but no AMX included.
    """
    if any("gpu" in device.lower() for device in keras.distribution.list_devices()):
        return "mixed_bfloat16"
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fast = "amx_bf16" in flags or ("avx512_bf16" in flags and "AuthenticAMD" in flags)
    return "mixed_bfloat16" if fast and keras.backend.backend() == "tensorflow" else "float32"


@contextlib.contextmanager
def computing_in(precision):
    """While it is entered, layers are created with the dtype policy `precision`. Yields `precision`."""
    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield precision
    finally:
        keras.config.set_dtype_policy(policy)


class ShareOfBatch(keras.distribution.DataParallel):
    """Shares out a batch under JAX in training alone: those of other data may not be multiples of the devices."""

    is_training = auto_shard_dataset = False  # Keras cannot divide `Batches` among processes, which do it themselves

    def get_data_layout(self, data_shape):
        layout = super().get_data_layout(data_shape)
        axes = layout.axes if self.is_training else [None] * len(data_shape)
        return keras.distribution.TensorLayout(axes, layout.device_mesh)


@functools.cache  # the collective operations of a second one in the process would have the same numbers
def _mirrored_strategy(*names):
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(names)


def num_devices(model):
    """Returns the number of devices that `model` predicts on; TensorFlow fails where one is left without examples."""
    if keras.backend.backend() == "jax":
        return len(model.weights[0].value.devices()) if model.weights else 1
    return model.distribute_strategy.num_replicas_in_sync


@contextlib.contextmanager
def running(devices, logdir, root):
    """While it is entered, models are built on several devices, and `fit` gives each a share of every batch.

    Where `logdir` is not None, `fit` with a folder in `root` writes its curves for TensorBoard to the same one there.
    """
    names, scope = keras.distribution.list_devices(), contextlib.nullcontext()
    if devices > len(names):
        raise UserError(f"--devices {devices} is more than there are: {', '.join(names)}")
    if keras.backend.backend() == "jax":
        import jax

        here, processes = jax.local_device_count(), jax.process_count()
        if processes > 1 and devices != here * processes:
            raise UserError(f"--devices must be {here * processes} here: {here} in each of {processes} processes")
        scope = ShareOfBatch(devices=names[:devices]).scope() if devices > 1 else scope
    elif devices > 1:
        scope = _mirrored_strategy(*(name.upper() for name in names[:devices])).scope()
    token = RUN.set((devices, logdir, root))
    try:
        with scope:
            yield
    finally:
        RUN.reset(token)


def divisible(arrays):
    """Returns the first examples in any structure of arrays: a multiple of the devices, as TensorFlow needs it.

    Where there are fewer examples than devices, they are repeated.
    """
    devices = RUN.get()[0] if keras.backend.backend() == "tensorflow" else 1

    def part(array):
        count = max(len(array) // devices, 1) * devices
        return array[:count] if count <= len(array) else array[np.arange(count) % len(array)]

    return keras.tree.map_structure(part, arrays)


@contextlib.contextmanager
def _sharing_out(model, devices):
    """While it is entered, training on several devices equals that on one, but for rounding and random numbers.

    Yields the callbacks that JAX needs. Under TensorFlow each device would normalise its share of a batch by itself,
    and a loss of the model's own would count once for every device, since their gradients are added up.
    """
    if devices == 1:
        yield []
        return
    if keras.backend.backend() == "jax":
        share = functools.partial(setattr, keras.distribution.distribution(), "is_training")
        starts, ends = (lambda *_, value=value, **__: share(value) for value in (True, False))
        yield [keras.callbacks.LambdaCallback(on_epoch_begin=starts, on_epoch_end=ends, on_test_begin=ends)]
        return
    normalizations = [layer for layer in _layers(model) if isinstance(layer, keras.layers.BatchNormalization)]
    own_loss = model.compute_loss if type(model).compute_loss is not keras.Model.compute_loss else None
    for layer in normalizations:
        layer.synchronized = True
    if own_loss:
        model.compute_loss = lambda *inputs, **options: own_loss(*inputs, **options) / devices
    try:
        yield []
    finally:
        for layer in normalizations:
            layer.synchronized = False
        if own_loss:
            del model.compute_loss


def _layers(layer):
    for part in getattr(layer, "layers", ()):
        yield from (part, *_layers(part))


def compile_options(steps):
    """Returns the arguments of `keras.Model.compile` that make a training run of `steps` steps fastest."""
    mirrored = keras.backend.backend() == "tensorflow" and RUN.get()[0] > 1  # Keras' loop then fails
    return {
        # XLA's convolutions are slower than oneDNN's on a CPU under TensorFlow. Under JAX every step is compiled,
        # unless the `supports_jit` of a layer says no; Keras then only warns.
        "jit_compile": keras.backend.backend() == "jax",
        # A loop takes longer to compile than a single step, which a short training run never earns back.
        "steps_per_execution": STEPS_PER_EXECUTION if steps >= STEPS_PER_EXECUTION and not mirrored else 1,
    }


def without_xla(model):
    """Returns the model, whose `predict` TensorFlow now runs without XLA, which compiles for five times as long."""
    model.jit_compile = compile_options(1)["jit_compile"]
    return model
