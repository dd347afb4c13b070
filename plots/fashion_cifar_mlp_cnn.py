"""The figures of fashion_cifar_mlp_cnn.py. Each function draws what it is handed, and returns the path of the file."""

import matplotlib.pyplot as plt
import numpy as np

from common import figures

SHOWN_BELOW_REFERENCE = 0.06  # configurations that are further below the reference are drawn at the edge
NAMES = {  # as they are written, for the words of the experiments
    "elu": "ELU",
    "selu": "SELU",
    "silu": "SiLU",
    "gelu": "GELU",
    "sgd": "SGD",
    "nesterov": "Nesterov momentum",
    "rmsprop": "RMSprop",
    "adam": "Adam",
    "nadam": "Nadam",
    "adamw": "AdamW",
    "x": "×",
}


def readable(name):
    """Returns the name of a configuration as a reader expects it: "optimiser: SGD 0.1"."""
    return " ".join(NAMES.get(word, word) for word in name.split(" "))


def draw_factors(accuracies, best, noise, title, path):
    """Validation accuracy of every configuration, those far below the reference at the left edge.

    Args:
        accuracies: dict from the name of a configuration, one of them "reference", to one number per seed, 0 to 1.
        best: names that are emphasised.
        noise: standard deviation of the reference over its seeds.
    """
    figure, axes = plt.subplots(figsize=(9, 0.2 * len(accuracies) + 1.2))
    label = "validation accuracy after a short training run, one point per seed\n"
    label += "line and band: reference ± standard deviation; green: best five"
    named = {readable(name): values for name, values in accuracies.items()}
    figures.experiments(axes, named, "reference", label, noise)
    edge = np.mean(accuracies["reference"]) - SHOWN_BELOW_REFERENCE
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.set_xlim(edge - 0.002, max(max(values) for values in accuracies.values()) + 0.005)
    for place, (name, tick) in enumerate(zip(accuracies, axes.get_yticklabels(), strict=True)):
        tick.set_fontsize(8)
        if name in best:
            tick.set(color=figures.GREEN, fontweight="bold")
        if np.mean(accuracies[name]) < edge:
            axes.text(edge, place, f"◄ {np.mean(accuracies[name]):.1%}", color=figures.RED, va="center", fontsize=8)
    axes.set_title(title)
    return figures.save(figure, path)


def draw_learning_curves(curves, path):
    """Training and validation accuracy per epoch: dict from panel to dict from network to a pair of lists."""
    figure, axes = plt.subplots(1, len(curves), figsize=(8.5, 3.5), sharey=True)
    for panel, (title, networks) in zip(axes, curves.items(), strict=True):
        for color, (name, pair) in zip((figures.GREY, figures.BLUE), networks.items(), strict=False):
            figures.learning_curves(panel, pair, color=color, name=name)
        panel.set(title=title, ylim=(0.8, 1.0), yticks=np.arange(0.8, 1.01, 0.04))
        panel.yaxis.set_major_formatter("{x:.0%}")
        panel.legend(loc="lower right", fontsize=9)
    axes[0].set_ylabel("accuracy")
    return figures.save(figure, path)


def draw_transfer(rankings, path):
    """The same configurations ranked on both datasets, one line each.

    `rankings` is a dict from panel title to a `pandas.DataFrame` indexed by configuration, best on Fashion-MNIST first,
    with the columns rank (on CIFAR-10, from 1), fashion and cifar (accuracies).
    """
    figure, axes = plt.subplots(len(rankings), 1, figsize=(8, 2.9 * len(rankings)))
    for panel, (title, ranked) in zip(axes, rankings.items(), strict=True):
        right = panel.twinx()
        for rank, other in enumerate(ranked["rank"], start=1):
            color = figures.ORANGE if abs(other - rank) > 1 else figures.BLUE
            panel.plot([0, 1], [rank, other], "o-", color=color, markersize=4)
        labels = [
            f"{readable(name).removeprefix('together: ').removesuffix(', bad on purpose')}   {accuracy:.1%}"
            for name, accuracy in ranked["fashion"].items()
        ]
        panel.set_yticks(range(1, len(ranked) + 1), labels, fontsize=9)
        right.set_yticks(ranked["rank"], [f"{accuracy:.1%}" for accuracy in ranked["cifar"]], fontsize=9)
        for side in (panel, right):
            side.set(ylim=(len(ranked) + 0.5, 0.5), xlim=(-0.03, 1.03))
            side.grid(False)
            side.spines[:].set_visible(False)
            side.tick_params(length=0)
        panel.set_xticks([0, 1], ["Fashion-MNIST", "CIFAR-10"])
        panel.set_title(title)
    figure.get_layout_engine().set(hspace=0.08)
    title = "Rank and validation accuracy after short training runs; orange: two ranks or more apart"
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_between(accuracies, examples, path):
    """Accuracy of one MLP and one CNN on the datasets from Fashion-MNIST to CIFAR-10, beside images of each.

    Args:
        accuracies: dict from network to dict from dataset to one number per seed, 0 to 1.
        examples: dict from dataset, in the same order, to uint8 images (n, height, width, channels).
    """
    count = len(next(iter(examples.values())))
    figure = plt.figure(figsize=(11, 3.8))
    grid = figure.add_gridspec(len(examples), 2 * count)
    axes = figure.add_subplot(grid[:, :count])
    for (network, points), color, offset in zip(
        accuracies.items(), (figures.ORANGE, figures.BLUE), (-0.1, 0.1), strict=True
    ):
        places = [place + offset for place, values in enumerate(points.values()) for _ in values]
        axes.scatter([value for values in points.values() for value in values], places, s=24, color=color)
        last = list(points.values())[-1]
        axes.annotate(
            network,
            (max(last), places[-1]),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            fontweight="bold",
        )
    axes.set_yticks(range(len(examples)), list(examples))
    axes.set(ylim=(len(examples) - 0.5, -0.5), xlabel="validation accuracy, short training runs (one point per seed)")
    axes.xaxis.set_major_formatter("{x:.0%}")
    axes.grid(True, axis="both")
    for place, images in enumerate(examples.values()):
        for number, image in enumerate(images):
            figures.show_image(figure.add_subplot(grid[place, count + number]), image)
    figure.suptitle("Validation accuracy on Fashion-MNIST, CIFAR-10 and three datasets between them", x=0.01, ha="left")
    return figures.save(figure, path)


def draw_confusion(confusions, path):
    """Confusion matrices side by side: dict from title to counts, int (10, 10), row the true class, and class names."""
    figure, panels = plt.subplots(1, len(confusions), figsize=(4.5 * len(confusions), 4.3))
    for axes, (title, (counts, class_names)) in zip(np.atleast_1d(panels), confusions.items(), strict=True):
        figures.confusion_matrix(axes, counts, class_names, title)
    return figures.save(figure, path)


def draw_mistakes(mistakes, path):
    """Misclassified images of several datasets: dict from title to a pair of images and their titles."""
    columns = 7
    figure = plt.figure(figsize=(6.8, 2.75 * len(mistakes)))
    parts = np.atleast_1d(figure.subfigures(len(mistakes), 1))
    for part, (title, (images, titles)) in zip(parts, mistakes.items(), strict=True):
        axes = part.subplots(2, columns)
        for panel in axes.flat:
            panel.set_axis_off()
        for panel, image, text in zip(axes.flat, images, titles, strict=False):
            figures.show_image(panel, image, text)
        part.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_filters(kernels, path):
    """First-layer weights as images: dict from title to uint8 (n, height, width, channels), one row each."""
    figure = plt.figure(figsize=(10, 1.05 * len(kernels)))
    for part, (title, images) in zip(figure.subfigures(len(kernels), 1), kernels.items(), strict=True):
        for panel, image in zip(part.subplots(1, len(images)), images, strict=True):
            figures.show_image(panel, image)
        part.suptitle(title, x=0.005, ha="left", fontsize=9)
    return figures.save(figure, path)
