"""Images per second of `--train` beside those of a bare `model.fit` on the same arrays: `make bench`.

Both train the joint network of task1_smallnorb_cnn.py, then the best one of cifar100_transfer.py, in the same precision
and batch size, on the same in-memory images. The bare one has no augmentation and Keras' defaults, ours is fed as
`common.training.fit` does it. The two take turns, because other work on the machine slows either down from time to
time; what counts is the ratio of their best runs.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import cifar100_transfer as cifar100
import keras

import task1_smallnorb_cnn as smallnorb
from common import cli, training

IMAGES = 6400
ROUNDS = 8


def bare_fit(network, optimizer, images, targets, batch_size, losses, metrics):
    """Returns a function that trains a network for one epoch as Keras does by default."""
    jit_compile = "auto" if keras.backend.backend() == "jax" else False
    network.compile(optimizer, loss=losses, metrics=metrics, jit_compile=jit_compile)
    return lambda: network.fit(images, targets, batch_size=batch_size, verbose=0)


def our_fit(model, images, targets, batch_size):
    """Returns a function that trains a compiled model for one epoch as `--train` does."""
    batches = training.Batches((images, targets), batch_size, seed=0)
    callbacks = [training.KeepMemory(), keras.callbacks.TerminateOnNaN(), training.EpochSeeds(batches)]
    return lambda: model.fit(batches, shuffle=False, callbacks=callbacks, verbose=0)


def smallnorb_fits(data_dir):
    config = smallnorb.CONFIGS["joint"]
    pairs = smallnorb.prepare(smallnorb.load_smallnorb(data_dir).train).take(slice(IMAGES))
    network, heads = smallnorb.build_network(config)
    targets = smallnorb.training_targets(pairs, {name: heads[name] for name in config.outputs})
    losses = {"category": keras.losses.CategoricalCrossentropy(), "elevation": keras.losses.MeanAbsoluteError()}
    metrics = {"category": "accuracy", "elevation": "mae"}
    optimizer = keras.optimizers.AdamW(config.learning_rate)
    bare = bare_fit(network, optimizer, pairs.images, targets, config.batch_size, losses, metrics)
    network, heads = smallnorb.build_network(config)
    model = smallnorb.compile_for_training(network, heads, config, training.count_steps(IMAGES, config), seed=0)
    return bare, our_fit(model, pairs.images, smallnorb.training_targets(pairs, heads), config.batch_size)


def cifar100_fits(data_dir):
    config = cifar100.CONFIGS[cifar100.BEST]
    splits, _ = cifar100.load_splits(data_dir)
    images = splits["train"].images[:IMAGES]
    targets = keras.utils.to_categorical(splits["train"].labels[:IMAGES], cifar100.NUM_CLASSES)
    network = cifar100.build_network(config)
    optimizer = cifar100.build_optimizer(config, IMAGES)
    bare = bare_fit(network, optimizer, images, targets, config.batch_size, "categorical_crossentropy", ["accuracy"])
    model = cifar100.build_trained(cifar100.build_network(config), config, cifar100.IMAGE_SIZE, seed=0)
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing)
    options = training.compile_options(training.count_steps(IMAGES, config))
    model.compile(cifar100.build_optimizer(config, IMAGES), loss=loss, metrics=["accuracy"], **options)
    return bare, our_fit(model, images, targets, config.batch_size)


def main(argv=None):
    arguments = cli.parse(cli.parser(__doc__, ["joint"]), argv or ["--train"])
    for name, build in (("smallNORB", smallnorb_fits), ("CIFAR-100", cifar100_fits)):
        with training.computing_in(training.fast_precision()):
            fits = dict(zip(("bare model.fit", "--train"), build(arguments.data_dir), strict=True))
        speeds = {label: [] for label in fits}
        for turn in range(ROUNDS + 1):
            for label, fit in fits.items():
                start = time.perf_counter()
                fit()
                if turn:  # the first one compiles
                    speeds[label].append(IMAGES / (time.perf_counter() - start))
        for label, values in speeds.items():
            spread = f"{ROUNDS} runs: {min(values):,.0f} to {max(values):,.0f}"
            print(f"{name}, {label:15} {statistics.median(values):7,.0f} images/s ({spread})")
        bare_speed, our_speed = (max(values) for values in speeds.values())
        print(f"{name}: --train feeds at {our_speed / bare_speed:.1%} of the speed of a bare model.fit (best runs)")


if __name__ == "__main__":
    cli.run(main)
