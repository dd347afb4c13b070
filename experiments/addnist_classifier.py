"""The planned comparisons of addnist_classifier.py: what is each choice worth, and do size and steps limit it?

One change at a time from a baseline, judged on validation. The baselines run with five seeds, whose standard deviation
is the noise; a variant is compared with the baseline on the seeds that both have.
"""

import csv
import io
import math
import statistics

NUM_SEEDS = 5  # of the baselines
SAME = {
    "batch_size": 64,
    "weight_decay": 1e-2,
    "shift": True,
    "rotation": 0.0,
    "scale": 0.0,
    "permute": False,
    "average": 0.995,
}
BASELINES = {
    "shared": {
        "model": "shared",
        "widths": (16, 32, 48, 64),
        "steps": 5000,
        "learning_rate": 3e-3,
        "hidden": 0,
        **SAME,
    },
    "ordinary": {
        "model": "ordinary",
        "widths": (12, 24, 36, 48),
        "hidden": 96,
        "steps": 10_000,
        "learning_rate": 1e-2,
        **SAME,
    },
}
BOTH = {
    "no shifts": {"shift": False},
    "rotation 10°, scale 10 %": {"rotation": 10.0, "scale": 0.1},
    "rotation 15°, scale 15 %": {"rotation": 15.0, "scale": 0.15},
    "batches of 128": {"batch_size": 128},
    "1,000 steps": {"steps": 1000},
    "2,500 steps": {"steps": 2500},
}
VARIANTS = {
    "shared": {
        **BOTH,
        "10,000 steps": {"steps": 10_000},
        "filters 6 12 16 24": {"widths": (6, 12, 16, 24)},
        "filters 12 24 32 48": {"widths": (12, 24, 32, 48)},
        "filters 24 48 64 80": {"widths": (24, 48, 64, 80)},
    },
    "ordinary": {
        **BOTH,
        "5,000 steps": {"steps": 5000},
        "filters 4 8 12 16": {"widths": (4, 8, 12, 16)},
        "filters 6 12 16 24": {"widths": (6, 12, 16, 24)},
        "filters 8 16 24 32": {"widths": (8, 16, 24, 32)},
        "one encoder for all channels": {"model": "mixed", "widths": (24, 48, 64, 80)},
        "channels in random order": {"permute": True},
    },
}
CONFIG_COLUMNS = (
    *("model", "widths", "hidden", "steps", "batch_size", "learning_rate", "weight_decay"),
    *("shift", "rotation", "scale", "permute", "average"),
)


def read_rows(text):
    """Returns the rows (list of dict of str) of a table; raises ValueError where a column or a number is missing."""
    rows = list(csv.DictReader(io.StringIO(text), strict=True))
    for row in rows:
        if not {"name", *CONFIG_COLUMNS} <= row.keys() or None in row or None in row.values():
            raise ValueError("its columns are not those of this version")
        numbers = int(row["seed"]), int(row["steps"]), int(row["parameters"]), float(row["valid_accuracy"])
        if not all(map(math.isfinite, numbers)):
            raise ValueError("it has numbers that are not finite")
    return rows


def with_row(text, row):
    """Returns a table (str) with one more row."""
    table = io.StringIO()
    writer = csv.DictWriter(table, list(row), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*read_rows(text), row])
    return table.getvalue()


def unfinished(text, models, seed):
    """Returns (name, seed, fields of the config) of the planned runs that a table has no row of."""
    planned = [(f"{model}, baseline", number, BASELINES[model]) for number in range(NUM_SEEDS) for model in models]
    for model in models:
        planned += [(f"{model}, {name}", seed, BASELINES[model] | change) for name, change in VARIANTS[model].items()]
    finished = {(row["name"], int(row["seed"])) for row in read_rows(text)}
    return [run for run in planned if run[:2] not in finished]


def compare(text):
    """Compares every experiment with the baseline of its network.

    Returns a dict from name to parameters, steps, valid_accuracy (mean), values (one per seed), difference (mean over
    the seeds that both have), noise (standard deviation of the baseline), resolved (whether the difference exceeds
    twice the noise of such a mean) and changed (fields of the config); None where that cannot be said yet.
    """
    runs, compared = {}, {}
    for row in read_rows(text):
        runs.setdefault(row["name"], {})[row["seed"]] = row
    for name, own in runs.items():
        baseline = runs.get(name.partition(", ")[0] + ", baseline", {})  # names are "<network>, <what is changed>"
        values, reference = ([float(row["valid_accuracy"]) for row in some.values()] for some in (own, baseline))
        differences = [
            float(own[s]["valid_accuracy"]) - float(baseline[s]["valid_accuracy"]) for s in own if s in baseline
        ]
        noise = statistics.stdev(reference) if len(reference) > 1 else None
        difference = statistics.fmean(differences) if differences else None
        known = differences and noise is not None
        first, usual = next(iter(own.values())), next(iter(baseline.values()), {})
        compared[name] = {
            "parameters": int(first["parameters"]),
            "steps": int(first["steps"]),
            "valid_accuracy": statistics.fmean(values),
            "values": values,
            "difference": difference,
            "noise": noise,
            "resolved": abs(difference) > 2 * noise * math.sqrt(2 / len(differences)) if known else None,
            "changed": [column for column in CONFIG_COLUMNS if first[column] != usual.get(column)],
        }
    return compared


def summary(compared):
    """Returns a table (str) of what `compare` returned."""
    lines = [f"\n{'experiment':40} seeds  validation  difference from the baseline"]
    for name, found in compared.items():
        lines.append(f"{name:40} {len(found['values']):5}  {found['valid_accuracy']:10.2%}")
        if found["difference"] is not None and not name.endswith(", baseline"):
            lines[-1] += f"  {found['difference']:+10.2%}" + ("" if found["resolved"] else "  not resolved")
    return "\n".join(lines)
