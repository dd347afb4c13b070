"""Pictures per second of `--train` beside those of a bare `model.fit` on the same arrays: `make bench`.

Both train the joint network of task1_smallnorb_cnn.py, in the same precision and batch size, on the same in-memory
pictures of smallNORB. The bare one has no augmentation and Keras' defaults. The two take turns, because other work on
the machine slows either down from time to time; what counts is the ratio of their best runs.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import quiet  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import keras

import task1_smallnorb_cnn as task
from common import cli, runs

PICTURES = 6400
ROUNDS = 8


def main(argv=None):
    arguments = cli.parse(cli.parser(__doc__, ["joint"]), argv or ["--train"])
    pictures = task.prepare(task.load_smallnorb(arguments.data_dir).train, task.FINAL.image_size, quick=False)
    pictures = pictures.take(slice(PICTURES))
    recipe = task.FINAL
    keras.config.set_dtype_policy(runs.fast_precision())
    network = task.build_network(recipe)
    bare = keras.Model(network.input, network.output)
    bare.compile(
        keras.optimizers.AdamW(recipe.learning_rate),
        loss={"category": keras.losses.CategoricalCrossentropy(), "elevation": keras.losses.MeanAbsoluteError()},
        metrics={"category": "accuracy", "elevation": "mae"},
        jit_compile="auto" if keras.backend.backend() == "jax" else False,
    )
    network = task.build_network(recipe)
    augmented = task.compile_for_training(network, recipe, PICTURES // recipe.batch_size, 0)
    targets = task.training_targets(pictures, augmented)
    speeds = {"bare model.fit": [], "--train": []}
    for turn in range(ROUNDS + 1):
        for name, model in zip(speeds, (bare, augmented), strict=True):
            wanted = {head: targets[head] for head in model.output}
            start = time.perf_counter()
            model.fit(pictures.images, wanted, batch_size=recipe.batch_size, verbose=0)
            if turn:  # the first one compiles
                speeds[name].append(PICTURES / (time.perf_counter() - start))
    for name, values in speeds.items():
        spread = f"{ROUNDS} runs: {min(values):,.0f} to {max(values):,.0f}"
        print(f"{name:15} {statistics.median(values):7,.0f} pictures/s ({spread})")
    bare_speed, our_speed = (max(values) for values in speeds.values())
    print(f"--train feeds at {our_speed / bare_speed:.1%} of the speed of a bare model.fit (best of {ROUNDS} each)")


if __name__ == "__main__":
    cli.run(main)
