"""What all scripts do alike with numbers: seeds, comparison with the card, results JSON, experiment tables."""

import csv
import importlib
import time
from pathlib import Path

import numpy as np
import pandas as pd

from common.cli import REPOSITORY
from common.errors import UserError, reason
from common.files import read_json, replacing, write_json
from common.models import conditions, read_card
from common.training import running

EXACT, ROUNDED, FEW_IMAGES = 5e-5, 0.005, 0.02  # tolerances, relative to the recorded value where that exceeds 1
START_OVER = "move it away to start the experiments over"


def training_runs(script, arguments, models, num_seeds):
    """Yields (model, seed, folder of the checkpoints) for every training run, and says which one it is.

    `num_seeds` is a dict from model to its number of seeds; there is one with `--quick`. Until the next one is asked
    for, models are built on `--devices`, and `training.fit` logs to `--logdir`.
    """
    seeds = {model: 1 if arguments.quick else num_seeds[model] for model in models}
    runs = [(model, arguments.seed + number) for model in models for number in range(seeds[model])]
    for number, (model, seed) in enumerate(runs, start=1):
        print(f"\n{model}, seed {seed} (training run {number} of {len(runs)})")
        folder = arguments.output_dir / "runs" / script / f"{model}_seed_{seed}"
        with running(arguments.devices, arguments.logdir, folder.parent):
            yield model, seed, folder


def optional_module(kind, script):
    """Returns the module `<kind>.<script>` of "plots" or "experiments", or None, with one line, where it is missing."""
    try:
        return importlib.import_module(f"{kind}.{script}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith(kind):
            raise
        print(f"{kind}/{script}.py is missing: {'figures' if kind == 'plots' else 'experiments'} are skipped")
        return None


# --------------------------------------------------------------------------------------------------------- verification


def compare(card, measured, *, part, size, sha256):
    """Puts the metrics `measured` on `size` images of a dataset beside those that a card records of "test" or "sample".

    Returns a list of dicts with model, metric, measured, recorded and agrees. The last two are None where the card says
    nothing about these images. On the recorded backend, precision and, with bfloat16, processor, numbers have to agree
    to the printed digits, otherwise within `ROUNDED`, or `FEW_IMAGES` on the sample.
    """
    dataset = card["dataset"]
    same_arrays = part == "sample" or _checksums_of(part, sha256) == _checksums_of(part, dataset.get("sha256"))
    same_data = size == dataset.get(part) and same_arrays
    recorded = (card["metrics"].get(part) or {}) if same_data else {}
    if not recorded:
        print(f"{card['model']}: not compared, since its card says nothing about these {size:,} images")
    here, there = conditions(), card | card.get("measured_on", {}).get(part, {})
    decisive = here if here["precision"] == "mixed_bfloat16" else ("backend", "precision")
    tolerance = EXACT
    if any(there[field] != here[field] for field in decisive):
        tolerance = FEW_IMAGES if part == "sample" else ROUNDED
    rows = []
    for metric, value in measured.items():
        row = {"model": card["model"], "metric": metric, "measured": float(value), "recorded": None, "agrees": None}
        if isinstance(recorded.get(metric), int | float):
            row["recorded"] = float(recorded[metric])
            row["agrees"] = bool(abs(value - row["recorded"]) <= tolerance * max(1, abs(row["recorded"])))
            row["tolerance"] = tolerance
        rows.append(row)
    return rows


def _checksums_of(part, sha256):
    """The checksums of the arrays of one part where they are told apart, else all; other arrays do not matter."""
    if isinstance(sha256, dict):
        return {name: value for name, value in sha256.items() if name.split("_")[0] == part} or sha256
    return sha256


def conclude(script, arguments, rows, written):
    """Prints the table of `rows` (see `compare`) and the files in `written`; returns the exit code, 1 on disagreement.

    The rows also go to `<output_dir>/runs/<script>/verification.json`, and figures to `--logdir`.
    """
    print()
    table = [("model", "metric", "measured  recorded")]
    for row in rows:
        numbers = f"{row['measured']:8.4f}"
        if row["recorded"] is not None:
            numbers += f"  {row['recorded']:8.4f}  {'agrees' if row['agrees'] else 'DIFFERS'}"
        table.append((row["model"], row["metric"], numbers))
    model_width, metric_width = (max(len(line[column]) for line in table) for column in (0, 1))
    print(*(f"{model:{model_width}}  {metric:{metric_width}}  {numbers}" for model, metric, numbers in table), sep="\n")
    tolerance = max([row["tolerance"] for row in rows if "tolerance" in row], default=EXACT)
    if tolerance > EXACT:
        print(f"other hardware, backend or precision than recorded: differences up to {tolerance:.1%} are rounding")
    path = arguments.output_dir / "runs" / script / "verification.json"
    write_json(path, {"script": f"{script}.py", "command": arguments.command, "rows": rows})
    print("\nwrote", *written, path, sep="\n  ")
    if arguments.logdir:
        import tensorflow as tf

        figures = {Path(each).stem: Path(each).read_bytes() for each in written if Path(each).suffix == ".png"}
        with tf.summary.create_file_writer(str(arguments.logdir / script)).as_default():
            for name, png in figures.items():
                tf.summary.image(name, tf.io.decode_png(png, channels=3)[None], step=0)
    return int(any(row["agrees"] is False for row in rows))


def record_metrics(path, sha256=None, **parts):
    """Writes re-measured metrics of some parts, such as `sample=(250, {"accuracy": 0.9})`, onto the card at `path`.

    `sha256` are the checksums of the full dataset, where that was measured on. "measured_on" of the card says on which
    machine that was, since the fields of the same names are about the training run.
    """
    card = read_card(path)
    for part, (size, metrics) in parts.items():
        card["metrics"][part] = metrics
        card["dataset"][part] = size
        card.setdefault("measured_on", {})[part] = conditions()
    if sha256 is not None:
        card["dataset"]["sha256"] = sha256
    write_json(Path(path).with_suffix(".json"), card)


def write_results(script, arguments, results, merged=("models",)):
    """Writes `report/results/<script>.json` and returns its path.

    With `--model`, what the file says about other models stays; the dicts named in `merged` are merged key by key.
    """
    path = arguments.output_dir / "report" / "results" / f"{script}.json"
    if arguments.model and path.exists():
        previous = read_json(path, "restore it with `git checkout`, or write it anew with --load --record")
        both = {name: {**previous.get(name, {}), **results[name]} for name in merged if name in results}
        results = {**previous, **results, **both}
    write_json(path, results)
    return path


# ---------------------------------------------------------------------------------------------------------- experiments


def table_path(output_dir, script):
    """Returns the path of the CSV table of a script's experiments."""
    return Path(output_dir) / "report" / "results" / f"{script}_experiments.csv"


def recorded_path(arguments, name):
    """Returns `report/results/<name>` of the output directory; with `--load`, else that of the repository."""
    path = arguments.output_dir / "report" / "results" / name
    return path if path.exists() or not arguments.load else REPOSITORY / "report" / "results" / name


def read_table(path, numbers=(), texts=()):
    """Returns an experiment table as a `pandas.DataFrame`, empty where there is no file yet.

    The columns `numbers` are float (NaN where empty), all others str. Raises `UserError` where the file is damaged or
    one of the columns `numbers` or `texts` is missing.
    """
    path = Path(path)
    if not path.exists():
        return pd.DataFrame(columns=[*texts, *numbers])
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file, strict=True)
        if any(len(row) != len(header) for row in rows):  # pandas would fill them up
            raise ValueError("rows of different lengths")
        table = pd.DataFrame(rows, columns=header, dtype=str)
        missing = [name for name in [*texts, *numbers] if name not in table]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        for name in numbers:
            table[name] = pd.to_numeric(table[name].replace("", np.nan))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({reason(error)}); {START_OVER}") from error
    return table


def append_row(path, row):
    """Adds `row` (dict; tuples are joined by spaces) to the table; the file is replaced as a whole, never half."""
    row = {name: " ".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in row.items()}
    table = read_table(path)
    if len(table) and list(table) != list(row):
        raise UserError(f"{path} has other columns than this version writes; {START_OVER}")
    table = pd.concat([table, pd.DataFrame([row])]) if len(table) else pd.DataFrame([row])
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")


def unfinished(path, planned, limit=None):
    """Yields those of the `planned` runs (dicts with the same keys, which are columns) that the table has no row of.

    Says which run it is and how long the rest takes. No more than `limit` are yielded.
    """
    table = read_table(path, texts=list(planned[0]) if planned else ())
    finished = set(zip(*(table[key] for key in planned[0]), strict=True)) if planned else set()
    left = [run for run in planned if tuple(map(str, run.values())) not in finished]
    started = time.time()
    for number, run in enumerate(left[:limit]):
        minutes = (time.time() - started) / max(number, 1) * (len(left) - number) / 60
        duration = f", about {minutes:.0f} minutes" if number else ""
        print(f"\n{len(left) - number} of {len(planned)} runs left{duration}: {', '.join(map(str, run.values()))}")
        yield run
    print(f"finished runs are in {path}")


def paired_comparison(table, metric, baseline="baseline"):
    """Compares every experiment in the column "name" with the one called `baseline`, on the seeds that both have.

    Returns a `pandas.DataFrame` indexed by name, in the order of the table: `mean` of the metric, `difference` from the
    baseline (mean over the pairs), `pairs` (number), `noise` (standard deviation of the baseline over its runs, NaN for
    a single one), and `resolved`: whether the difference exceeds twice its standard error, by noise and by pairs.
    """
    runs = table.pivot(index="seed", columns="name", values=metric)[table["name"].unique()]
    differences = runs.sub(runs[baseline], axis="index")
    compared = pd.DataFrame({"mean": runs.mean(), "difference": differences.mean(), "pairs": differences.count()})
    compared["noise"] = runs[baseline].std()
    spread = np.maximum(np.sqrt(2) * compared["noise"], differences.std().fillna(0))  # of one pair
    compared["resolved"] = compared["difference"].abs() > 2 * spread / np.sqrt(compared["pairs"])
    return compared


def compare_groups(table, groups, metric, means=()):
    """Compares experiments with the first one of their group: dict from title to dicts by name, as results hold them.

    `groups` is a dict from title to names. Beside the fields of `paired_comparison` each has the `values` of the
    metric, one per seed, and the means of the columns `means`. A group whose first experiment has no row is left out.
    """
    compared = {}
    for title, names in groups.items():
        rows = table[table["name"].isin(names) & table[metric].notna()]
        if names[0] in set(rows["name"]):
            paired = paired_comparison(rows, metric, baseline=names[0]).join(rows.groupby("name")[list(means)].mean())
            paired["values"] = rows.groupby("name")[metric].agg(list)
            compared[title] = paired.reindex([name for name in names if name in paired.index]).to_dict("index")
    return compared
