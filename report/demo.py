"""Restores every model, measures it on the samples, and shows the numbers beside the recorded ones: `make demo`.

Runs every script with `--load --sample --output-dir runs/demo`, which needs no dataset and no network, prints one table
and writes `runs/demo/index.html` with that table and all figures. Exit code 1 where a number does not agree.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jinja2

REPOSITORY = Path(__file__).resolve().parent.parent
OUTPUT = REPOSITORY / "runs" / "demo"
# One row per script in the table that is printed: task, model, metric. The page shows all metrics.
HEADLINES = {
    "task1_smallnorb_cnn": ("smallNORB: category", "joint", "category_accuracy"),
    "task2_diffusion": ("smallNORB: diffusion", "network", "category_agreement"),
    "fashion_cifar_mlp_cnn": ("Fashion-MNIST: CNN", "fashion_cnn_best", "accuracy"),
    "cifar100_transfer": ("CIFAR-100", "own_3", "accuracy"),
    "tell_the_time": ("reading a clock", "best_150", "mean_minutes"),
    "voc_segmentation": ("VOC: foreground", "unet_bilinear", "foreground_iou"),
    "pegasus_gan": ("winged horses", "diffusion", "learned_score"),
    "addnist_classifier": ("AddNIST", "shared", "accuracy"),
    "cifar100_generator": ("CIFAR-100: generation", "diffusion", "loss"),
}


def run_script(script):
    """Runs `--load --sample` of a script and returns its rows of measured and recorded numbers."""
    print(f"{script}.py ... ", end="", flush=True)
    verification = OUTPUT / "runs" / script / "verification.json"
    verification.unlink(missing_ok=True)
    started = time.time()
    command = [sys.executable, f"{script}.py", "--load", "--sample", "--output-dir", str(OUTPUT)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    print(f"{time.time() - started:.0f} s")
    if not verification.exists():  # written last, also where numbers differ
        sys.exit(done.stderr.strip() or f"error: {script}.py ended with exit code {done.returncode}")
    return json.loads(verification.read_text())["rows"]


def verdict(row):
    return {True: "yes", False: "NO", None: "not recorded"}[row["agrees"]]


def main():
    rows = {script: run_script(script) for script in HEADLINES}
    table = []
    for script, (task, model, metric) in HEADLINES.items():
        row = next(row for row in rows[script] if (row["model"], row["metric"]) == (model, metric))
        table.append({**row, "task": task, "verdict": verdict(row)})
    print(f"\n{'task':22}{'metric':20}{'measured':>10}{'recorded':>10}  agrees")
    for row in table:
        recorded = "" if row["recorded"] is None else f"{row['recorded']:.4f}"
        print(f"{row['task']:22}{row['metric']:20}{row['measured']:10.4f}{recorded:>10}  {row['verdict']}")
    compared = [row["agrees"] for each in rows.values() for row in each if row["agrees"] is not None]
    print(f"\n{sum(compared)} of all {len(compared)} numbers agree with the cards of the saved models")

    figures = {
        script: sorted(path.relative_to(OUTPUT) for path in (OUTPUT / "report" / "figures" / script).glob("*.png"))
        for script in HEADLINES
    }
    template = jinja2.Template((REPOSITORY / "report" / "demo.html.j2").read_text(), autoescape=True)
    page = template.render(table=table, rows=rows, figures=figures, verdict=verdict)
    temporary = OUTPUT / f".{os.getpid()}.index.html"
    temporary.write_text(page)
    temporary.replace(OUTPUT / "index.html")
    print(f"figures and all numbers: {OUTPUT / 'index.html'}")
    return int(not all(compared))


if __name__ == "__main__":
    sys.exit(main())
