"""Images per second of `--train` beside those of a bare `model.fit` on the same arrays: `make bench`.

Both train the joint network of task1_smallnorb_cnn.py, in the same precision and batch size, on the same in-memory
images of smallNORB. The bare one has no augmentation and Keras' defaults, ours is fed as `common.training.fit` does it.
The two take turns, because other work on the machine slows either down from time to time; what counts is the ratio of
their best runs.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import keras

import task1_smallnorb_cnn as task
from common import cli, training

IMAGES = 6400
ROUNDS = 8
CONFIG = task.CONFIGS["joint"]


def build_bare_fit(pairs):
    """Returns a function that trains the joint network for one epoch as Keras does by default."""
    network, heads = task.build_network(CONFIG)
    network.compile(
        keras.optimizers.AdamW(CONFIG.learning_rate),
        loss={"category": keras.losses.CategoricalCrossentropy(), "elevation": keras.losses.MeanAbsoluteError()},
        metrics={"category": "accuracy", "elevation": "mae"},
        jit_compile="auto" if keras.backend.backend() == "jax" else False,
    )
    targets = task.training_targets(pairs, {name: heads[name] for name in CONFIG.outputs})
    return lambda: network.fit(pairs.images, targets, batch_size=CONFIG.batch_size, verbose=0)


def build_our_fit(pairs):
    """Returns a function that trains the joint network for one epoch as `--train` does."""
    network, heads = task.build_network(CONFIG)
    steps = training.count_steps(len(pairs.images), CONFIG)
    model = task.compile_for_training(network, heads, CONFIG, steps, seed=0)
    batches = training.Batches((pairs.images, task.training_targets(pairs, heads)), CONFIG.batch_size, seed=0)
    callbacks = [keras.callbacks.TerminateOnNaN(), training.EpochSeeds(batches)]
    return lambda: model.fit(batches, shuffle=False, callbacks=callbacks, verbose=0)


def main(argv=None):
    arguments = cli.parse(cli.parser(__doc__, ["joint"]), argv or ["--train"])
    pairs = task.prepare(task.load_smallnorb(arguments.data_dir).train).take(slice(IMAGES))
    with training.computing_in(training.fast_precision()):
        fits = {"bare model.fit": build_bare_fit(pairs), "--train": build_our_fit(pairs)}
    speeds = {name: [] for name in fits}
    for turn in range(ROUNDS + 1):
        for name, fit in fits.items():
            start = time.perf_counter()
            fit()
            if turn:  # the first one compiles
                speeds[name].append(len(pairs.images) / (time.perf_counter() - start))
    for name, values in speeds.items():
        spread = f"{ROUNDS} runs: {min(values):,.0f} to {max(values):,.0f}"
        print(f"{name:15} {statistics.median(values):7,.0f} images/s ({spread})")
    bare_speed, our_speed = (max(values) for values in speeds.values())
    print(f"--train feeds at {our_speed / bare_speed:.1%} of the speed of a bare model.fit (best of {ROUNDS} each)")


if __name__ == "__main__":
    cli.run(main)
