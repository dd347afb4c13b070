"""Begins a third stage of training of cifar100_generator.py from its saved weights: writes the checkpoint to resume.

    PYTHONPATH=. python drafts/third_stage.py && python cifar100_generator.py --train --resume

CONFIG must be that of the whole training, with `steps=50_000` and `restarts=(16_000, 26_000)`. Learning
curves and seconds of the first two stages are those of the card.
"""

import dataclasses
import json
import sys

import jax
import numpy as np

import cifar100_generator as task

REPOSITORY, SEED = task.REPOSITORY, 0


def main():
    (weights, *_), card = task.load_network(REPOSITORY / "saved_models" / task.SCRIPT / f"{task.MODEL}.npz")
    steps = card["steps"]
    if steps not in task.CONFIG.restarts:
        sys.exit(f"error: CONFIG.restarts is {task.CONFIG.restarts}, but the saved network ended after step {steps}")
    # The random numbers of later steps are those of one uninterrupted run.
    key = jax.lax.fori_loop(0, steps, lambda _, key: jax.random.split(key, 6)[0], jax.random.PRNGKey(SEED))
    state = task.start(weights, key, steps, task.CONFIG)
    splits, _ = task.load_data(REPOSITORY / "data")
    settings = json.loads(json.dumps(dataclasses.asdict(task.CONFIG)))
    settings |= {"seed": SEED, "data": task.checksum_of([splits["train"]])}
    about = json.dumps({"settings": settings, "curves": card["curves"], "seconds": card["seconds"]})
    arrays = {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
    path = REPOSITORY / "runs" / task.SCRIPT / f"{task.MODEL}_seed_{SEED}" / "checkpoint.npz"
    print(f"wrote {task.write_file(path, {'about': np.array(about), **arrays})}")


if __name__ == "__main__":
    main()
