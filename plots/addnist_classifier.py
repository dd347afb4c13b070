"""The figures of addnist_classifier.py: what they alone need is selected and counted here, all else is handed in."""

import matplotlib.pyplot as plt
import numpy as np

from common import figures

MODEL_COLORS = {"shared": figures.BLUE, "ordinary": figures.ORANGE}
CURVE_STYLES = {
    "train_accuracy": ("training", ":"),
    "valid_accuracy": ("validation", "--"),
    "test_accuracy": ("test", "-"),
}


def draw(compared, splits, predicted, curves, folder):
    """Draws every figure into `folder` and returns their paths.

    Args:
        compared: dict, what `compare` in experiments/ returned; may be empty.
        splits: dict of `Split`, of which "train" and "test" are shown.
        predicted: dict from network to what it says of "test": log probabilities (n, 20), and digits (n, 3) or None.
        curves: dict from network to the learning curves on its card.
    """
    test = splits["test"]
    written = [draw_samples(splits["train"], folder / "samples.png")]
    if len(curves) == len(MODEL_COLORS):  # both networks share a figure
        written.append(draw_curves(curves, folder / "curves.png"))
    for model, (classes, digits) in predicted.items():
        written.append(draw_confusion(test.labels, classes.argmax(1), model, folder / f"confusion_{model}.png"))
        if model == "shared":
            written.append(draw_mistakes(test, classes, folder / "mistakes.png"))
        if digits is not None and test.digits is not None:
            written.append(draw_digits(test.digits, digits, folder / "digits.png"))
    if compared:
        written.append(draw_scaling(compared, folder / "scaling.png"))
        written.append(draw_experiments(compared, folder / "experiments.png"))
    return written


def as_rgb(image, channel=None):
    """(3, 28, 28) to (28, 28, 3), with black in place of the other channels where one is given."""
    kept = image if channel is None else image * (np.arange(3) == channel)[:, None, None].astype("uint8")
    return np.moveaxis(kept, 0, -1)


def counts_of(truth, predicted, size):
    return np.bincount(truth.ravel() * size + predicted.ravel(), minlength=size**2).reshape(size, size)


def draw_samples(train, path):
    """The first training items, and below each its three channels."""
    images, titles = [], []
    for channel in (None, 0, 1, 2):
        images += [as_rgb(image, channel) for image in train.images[:10]]
        if channel is None:
            titles += [f"class {label}" for label in train.labels[:10]]
        else:
            titles += [""] * 10 if train.digits is None else [str(digit) for digit in train.digits[:10, channel]]
    title = "Training items and their channels: class = red + green + blue - 1"
    return figures.save(figures.image_grid(images, 10, titles, title=title), path)


def draw_curves(curves, path):
    """Accuracy and loss over the optimisation steps."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for model, color in MODEL_COLORS.items():
        steps = curves[model]["step"]
        for name, (part, style) in CURVE_STYLES.items():
            left.plot(steps, curves[model][name], style, color=color, label=f"{model}, {part}")
        right.plot(steps, curves[model]["loss"], color=color, label=model)
    final = min(of_model["test_accuracy"][-1] for of_model in curves.values())
    left.set(xlabel="optimisation step", ylabel="accuracy", ylim=(max(0, final - 0.12), 1.002))
    left.yaxis.set_major_formatter("{x:.0%}")
    left.legend(loc="lower right")
    left.set_title("Accuracy of the averaged weights")
    right.set(xlabel="optimisation step", ylabel="cross-entropy of augmented items", yscale="log")
    right.set_title("Training loss")
    figures.label_lines(right)
    return figures.save(figure, path)


def draw_confusion(truth, predicted, model, path):
    """Which classes are taken for which."""
    figure, axes = plt.subplots(figsize=(7.5, 7.5))
    title = f"{model.capitalize()} network, test items: {np.mean(truth == predicted):.2%} correct (numbers are counts)"
    figures.confusion_matrix(axes, counts_of(truth, predicted, 20), range(20), title)
    return figures.save(figure, path)


def draw_digits(truth, predicted, path):
    """Which digits the shared network recognises in single channels."""
    figure, axes = plt.subplots(figsize=(7, 7))
    title = (
        f"Digits in single channels, learnt from the labels of sums alone: {np.mean(truth == predicted):.2%} correct"
    )
    names = ("digit in the channel", "digit recognised")
    figures.confusion_matrix(axes, counts_of(truth, predicted, 10), range(10), title, names)
    return figures.save(figure, path)


def draw_mistakes(test, classes, path):
    """The 20 mistakes with the highest probability of the predicted class."""
    predicted = classes.argmax(1)
    wrong = np.flatnonzero(predicted != test.labels)
    wrong = wrong[np.argsort(-classes[wrong].max(1))][:20]
    sums = [""] * len(wrong) if test.digits is None else [" + ".join(map(str, test.digits[i])) + "\n" for i in wrong]
    titles = [f"{text}{test.labels[i]}, not {predicted[i]}" for text, i in zip(sums, wrong, strict=True)]
    title = "Most confident mistakes of the shared network on test items: digits; class, not the predicted one"
    images = [as_rgb(test.images[i]) for i in wrong]
    return figures.save(figures.image_grid(images, 10, titles, [figures.RED] * len(wrong), title=title), path)


def draw_scaling(compared, path):
    """Validation error against the number of parameters and of steps, where nothing else is changed."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    ticks = {"parameters": (5000, 10_000, 20_000, 50_000, 100_000), "steps": (1000, 2000, 5000, 10_000)}
    texts = {
        "parameters": ("widths", "parameters", "More filters"),
        "steps": ("steps", "optimisation steps", "More steps"),
    }
    for panel, (column, (field, label, title)) in zip(panels, texts.items(), strict=True):
        panel.axvline(ticks[column][-1], color=figures.GREY, linestyle=":", label="limit of the assignment")
        for model, color in MODEL_COLORS.items():
            of_model = [found for name, found in compared.items() if name.startswith(f"{model}, ")]
            alone = [found for found in of_model if found["changed"] in ([], [field])]
            points = sorted((found[column], 1 - found["valid_accuracy"]) for found in alone)
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=color, label=f"{model} network")
        panel.set(xscale="log", yscale="log", xlabel=label, title=title)
        panel.set_xticks(ticks[column], [f"{tick:,}" for tick in ticks[column]], minor=False)
        panel.set_xticks([], minor=True)
    panels[0].set_yticks((0.01, 0.02, 0.05, 0.1, 0.2, 0.5), ("1%", "2%", "5%", "10%", "20%", "50%"))
    panels[0].set_yticks([], minor=True)
    panels[0].set_ylabel("validation error")
    panels[1].legend(loc="upper right", bbox_to_anchor=(0.97, 1))
    return figures.save(figure, path)


def draw_experiments(compared, path):
    """Validation accuracy of the variants that change more than the number of filters or steps."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.6))
    for panel, model in zip(panels, MODEL_COLORS, strict=True):
        of_model = {name.partition(", ")[2]: e for name, e in compared.items() if name.startswith(f"{model}, ")}
        values = {name: e["values"] for name, e in of_model.items() if e["changed"] not in (["widths"], ["steps"])}
        if not values:
            panel.set_axis_off()
            continue
        noise = of_model["baseline"]["noise"] if "baseline" in of_model else None
        figures.experiments(panel, values, "baseline", "validation accuracy", noise, percent=True)
        panel.set_title(f"{model.capitalize()} network")
        panel.locator_params(axis="x", nbins=4)
        lowest = max(np.min(np.concatenate(list(values.values()))), max(map(max, values.values())) - 0.03) - 0.001
        panel.set_xlim(lowest, None)
        for place, points in enumerate(values.values()):
            if np.mean(points) < lowest:  # so far off that the others would shrink to one point
                panel.text(lowest, place, f" ← {np.mean(points):.1%}", va="center", color=figures.BLUE)
    figure.suptitle(
        "One point per seed; shaded, where there are several: standard deviation of the baseline", x=0.01, ha="left"
    )
    return figures.save(figure, path)
