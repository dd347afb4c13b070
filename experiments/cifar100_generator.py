"""The planned comparisons of cifar100_generator.py: what is each choice worth, and how should images be generated?

Training: one choice at a time changed in a baseline with a short budget, judged by the loss on held-out images:
conditional, at the noise levels that the baseline is trained with, by the best of its averages. It says nothing of
guided samples.
The baseline runs with five seeds, whose standard deviation is the noise; a variant shares the first of them.
Sampling: the guidance of a finished network is chosen by FID (768-d) to held-out images,
among those of which our classifier recognises at least a quarter of the samples.

`task` is the module of the script, whose functions train and measure.
"""

import csv
import dataclasses
import io
import math
import statistics

import numpy as np

NUM_SEEDS, VARIANT_SEEDS = 5, 1  # of the baseline, and of each variant: two hours in all on two cores
BASELINE = {
    "patch": 2,
    "widths": (56, 80, 104),
    "blocks": (1, 1, 1),
    "attention": 8,
    "embedding": 64,
    "target": "edm",
    "noise_mean": -1.2,
    "noise_deviation": 1.2,
    "label_dropout": 0.1,
    "steps": 2000,
    "restarts": (),
    "restart_noise": (-0.2, 1.5),
    "batch_size": 32,  # half of that of the saved network, for the time of all these runs
    "learning_rate": 1e-3,
    "averages": (0.98, 0.99, 0.995),  # over fewer steps than in the saved network, as there are few
}
VARIANTS = {
    "widths 64 72 96": {"widths": (64, 72, 96)},
    "widths 48 72 96, two blocks first": {"widths": (48, 72, 96), "blocks": (2, 1, 1)},
    "no attention": {"attention": 0},
    "velocity": {"target": "velocity"},
    "velocity, noise levels about 1": {"target": "velocity", "noise_mean": 0.0, "noise_deviation": 1.0},
    "no label dropout": {"label_dropout": 0.0},
    "label dropout 20 %": {"label_dropout": 0.2},
    "learning rate 0.0005": {"learning_rate": 5e-4},
    "learning rate 0.002": {"learning_rate": 2e-3},
    "patch 1": {"patch": 1},  # the slowest
}
NUM_SAMPLES = 1000  # that guidance and steps are compared with, against all held-out images
GUIDANCE = (1.0, 3.0, 5.0, 8.0, 12.0)
SAME = 0.01  # least difference of FID that counts; of guidances that differ by less, the weakest is chosen
MIN_AGREEMENT = 0.25  # least share of samples that our classifier takes for the class asked for
STEPS = (9, 18, 36)
INTERVALS = {"low": 0.2, "high": 3.0}, {"low": 0.0, "high": 100.0}  # of noise levels that guidance is tried at as well


# ------------------------------------------------------------------------------------------------------------- training
def read_rows(text):
    """Returns the rows (list of dict of str) of a table; raises ValueError where a column or a number is missing."""
    rows = list(csv.DictReader(io.StringIO(text), strict=True))
    for row in rows:
        if not {"name", "average_losses", *BASELINE} <= row.keys() or None in row or None in row.values():
            raise ValueError("its columns are not those of this version")
        numbers = [int(row[name]) for name in ("seed", "steps", "parameters")] + [float(row["valid_loss"])]
        if not all(map(math.isfinite, [*numbers, *losses_of_averages(row).values()])):
            raise ValueError("it has numbers that are not finite")
    return rows


def losses_of_averages(row):
    """Returns a dict from the momentum of each average of a run to its loss on the held-out images."""
    momenta, losses = (map(float, row[name].strip("()").split(", ")) for name in ("averages", "average_losses"))
    return dict(zip(momenta, losses, strict=True))


def with_row(text, row):
    """Returns a table (str) with one more row."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_rows(text), row])
    return table.getvalue()


def unfinished(text, seed):
    """Returns (name, seed, fields of the config) of the planned runs that a table has no row of."""
    planned = [("baseline", seed + number, BASELINE) for number in range(NUM_SEEDS)]
    for number in range(VARIANT_SEEDS):  # every variant once before any a second time
        planned += [(name, seed + number, BASELINE | change) for name, change in VARIANTS.items()]
    finished = {(row["name"], int(row["seed"])) for row in read_rows(text)}
    return [run for run in planned if run[:2] not in finished]


def run(task, arguments):
    """Trains every planned configuration that the table has no row of, and measures it on the held-out images."""
    table = arguments.output_dir / "report" / "results" / f"{task.SCRIPT}_experiments.csv"
    task.compared_experiments(arguments.output_dir)  # raises an error where the table is damaged
    splits, _ = task.load_data(arguments.data_dir, arguments.quick, arguments.sample)
    left = unfinished(read_text(table), arguments.seed)
    for number, (name, seed, fields) in enumerate(left[: 2 if arguments.quick else None]):
        print(f"{len(left) - number} runs left: {name}, seed {seed}")
        config = task.with_flags(task.Config(**fields), arguments, splits)
        folder = arguments.output_dir / "runs" / task.SCRIPT / "experiment"
        trained = task.train_network(config, splits, seed, name=name, folder=folder, resume=False)
        averages, curves, seconds = trained
        losses = [round(task.denoising_loss(average, splits["valid"], config), 5) for average in averages]
        row = {"name": name, "seed": seed, **dataclasses.asdict(config), "parameters": task.budget(config)[0]}
        row |= {"seconds": round(seconds, 1), "loss": round(curves["loss"][-1], 5)}
        row |= {"valid_loss": min(losses), "average_losses": tuple(losses)}
        task.write_file(table, with_row(read_text(table), row).encode())
    print(summary(task.compared_experiments(arguments.output_dir)), f"finished runs are in {table}", sep="\n")
    if (arguments.output_dir / "saved_models" / task.SCRIPT / f"{task.MODEL}.json").exists():
        print(f"wrote {task.write_results(arguments.output_dir)}")


def read_text(path):
    return path.read_text("utf-8") if path.exists() else ""


def compare(text):
    """Compares every experiment with the baseline.

    Returns a dict from name to parameters, valid_loss (mean), values (one per seed), averages (mean by momentum),
    difference (mean over the seeds that both have), noise (standard deviation of the baseline) and resolved (whether
    the difference exceeds twice its standard error, by noise and by pairs); None where that cannot be said yet.
    """
    runs, compared = {}, {}
    for row in read_rows(text):
        runs.setdefault(row["name"], {})[row["seed"]] = row
    baseline = runs.get("baseline", {})
    reference = [float(row["valid_loss"]) for row in baseline.values()]
    noise = statistics.stdev(reference) if len(reference) > 1 else None
    for name, own in runs.items():
        differences = [float(own[s]["valid_loss"]) - float(baseline[s]["valid_loss"]) for s in own if s in baseline]
        difference = statistics.fmean(differences) if differences else None
        known = differences and noise is not None
        of_pairs = statistics.stdev(differences) if len(differences) > 1 else 0.0
        spread = max(math.sqrt(2) * noise, of_pairs) if known else None  # of the difference of one pair
        values = [float(row["valid_loss"]) for row in own.values()]
        averages = [losses_of_averages(row) for row in own.values()]
        compared[name] = {
            "parameters": int(next(iter(own.values()))["parameters"]),
            "valid_loss": statistics.fmean(values),
            "values": values,
            "averages": {str(each): statistics.fmean(of[each] for of in averages) for each in averages[0]},
            "difference": difference,
            "noise": noise,
            "resolved": abs(difference) > 2 * spread / math.sqrt(len(differences)) if known else None,
        }
    return compared


def summary(compared):
    """Returns a table (str) of what `compare` returned."""
    lines = [f"\n{'experiment':36} seeds  held-out loss  difference from the baseline"]
    for name, found in compared.items():
        lines.append(f"{name:36} {len(found['values']):5}  {found['valid_loss']:13.4f}")
        if found["difference"] is not None and name != "baseline":
            lines[-1] += f"  {found['difference']:+10.4f}" + ("" if found["resolved"] else "  not resolved")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- sampling
def choose(task, parameters, config, fid, folder):
    """Chooses the guidance: the lowest FID among those that reach MIN_AGREEMENT, or, if none, among all.

    Args:
        parameters: weights, averaged.
        fid: function from a network, number of samples, seed and "valid" to metrics, a dict with `fid_768`.
        folder: of the training run, with its snapshots, of which some may be missing.

    Returns the `Sampling`, and all that was measured, `others` included: list of dict.
    """
    rows = []

    def measured(varied, sampling, step=config.steps):
        weights = parameters
        if step < config.steps:
            path = folder / f"snapshot_{step:05}.npz"
            with task.reading(path, "start over without --resume"), np.load(path) as file:
                weights = {name: file[name].astype("float32") for name in parameters}
        row = {"varied": varied, "step": step, **dataclasses.asdict(sampling)}
        rows.append(row | fid((weights, config, sampling), NUM_SAMPLES, task.DATA_SEED, "valid"))
        print(", ".join(f"{key} {value:.5g}" for key, value in rows[-1].items() if key != "varied"))
        return rows[-1]

    options = [dataclasses.replace(task.Sampling(), guidance=guidance) for guidance in GUIDANCE]
    found = [measured("guidance", sampling) for sampling in options]
    reached = [row for row in found if row.get("class_agreement", 1) >= MIN_AGREEMENT] or found
    lowest = min(row["fid_768"] for row in reached)
    chosen = options[found.index(next(row for row in reached if row["fid_768"] <= lowest + SAME))]
    for varied, sampling, step in others(task, chosen, config, folder):
        measured(varied, sampling, step)
    return chosen, rows


def others(task, chosen, config, folder):
    """Returns what is measured beside the choice, and decides nothing: list of (varied, `Sampling`, training step)."""
    last = config.steps
    found = [("interval", dataclasses.replace(chosen, **interval), last) for interval in INTERVALS]
    found += [("steps", dataclasses.replace(chosen, steps=steps), last) for steps in STEPS]
    steps = range(task.SNAPSHOT_STEPS, last, task.SNAPSHOT_STEPS)
    kept = [step for step in steps if (folder / f"snapshot_{step:05}.npz").exists()]
    return found + [("training", chosen, step) for step in (*kept, last)]
