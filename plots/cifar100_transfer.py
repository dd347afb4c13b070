"""The figures of cifar100_transfer.py. Each function draws what it is handed, and returns the path of the file."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from common import figures

NAMES = {  # of the models, as a reader expects them
    "vgg_features": "VGG16, frozen",
    "vgg_top_block": "VGG16, block 5 tuned",
    "vgg_full": "VGG16, all tuned",
    "vgg_features_64": "VGG16, frozen, 64 × 64",
    "own_1": "plain",
    "own_2": "residual",
    "own_3": "best",
    "own_3_seed_1": "best, second seed",
    "ensemble": "ensemble of own networks",
}
SUPERCLASSES = (
    "aquatic mammals",
    "fish",
    "flowers",
    "food containers",
    "fruit and vegetables",
    "electrical devices",
    "furniture",
    "insects",
    "large carnivores",
    "large man-made things",
    "large natural scenes",
    "large herbivores",
    "medium mammals",
    "other invertebrates",
    "people",
    "reptiles",
    "small mammals",
    "trees",
    "vehicles 1",
    "vehicles 2",
)


def color_of(name):
    """VGG16 in orange, networks of our own in blue."""
    return figures.ORANGE if name.startswith("vgg") else figures.BLUE


def draw_cost(of_models, path):
    """Test accuracy of every model against its trainable parameters and against the minutes of its training run."""
    shown = {name: each for name, each in of_models.items() if name != "own_3_seed_1"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, label, value_of in (
        (panels[0], "trainable parameters", lambda each: each["parameters"]["trainable"]),
        (panels[1], "minutes of training", lambda each: each["minutes"]),
    ):
        values = {name: max(value_of(each), 0.1) for name, each in shown.items()}
        middle = np.exp(np.mean(np.log([min(values.values()), max(values.values())])))
        accuracies = {name: each["test"]["accuracy"] for name, each in shown.items()}
        for name, accuracy in accuracies.items():
            axes.scatter(values[name], accuracy, color=color_of(name), s=30)
            right = values[name] < middle
            # A label moves away from one that is almost as high and on the same side of its point.
            apart = [accuracies[other] - accuracy for other in shown if (values[other] < middle) == right]
            near = [distance for distance in apart if 0 < abs(distance) < 0.02]
            axes.annotate(
                NAMES[name],
                (values[name], accuracy),
                xytext=(6 if right else -6, 0),
                textcoords="offset points",
                ha="left" if right else "right",
                va="center" if not near else "top" if near[0] > 0 else "bottom",
                fontsize=8,
                color=color_of(name),
            )
        axes.set(xscale="log", xlabel=label)
    panels[0].set_ylabel("test accuracy")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    figure.suptitle(
        "Test accuracy and its cost: VGG16 (orange) and networks trained from scratch (blue)", x=0.01, ha="left"
    )
    return figures.save(figure, path)


def draw_learning_curves(curves, path):
    """Training (dashed) and validation (solid) accuracy per epoch: dict from model to its curves, a panel each."""
    columns = 4
    rows = -(-len(curves) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(10, 2.4 * rows), sharey=True, squeeze=False)
    for axes in panels.flat[len(curves) :]:
        axes.set_axis_off()
    for axes, (name, each) in zip(panels.flat, curves.items(), strict=False):
        figures.learning_curves(axes, (each["accuracy"], each["val_accuracy"]), color=color_of(name))
        axes.set_title(NAMES[name])
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in panels[:, 0]:
        axes.set_ylabel("accuracy")
    figure.suptitle("Learning curves: training (dashed) and validation (solid)", x=0.01, ha="left")
    return figures.save(figure, path)


def draw_experiments(compared, folder):
    """One figure for our own network, one for VGG16; `compared` is a dict from comparison to dicts by experiment."""
    own, vgg = ["our own network", "our own network with Muon"], ["heads on VGG16", "tuned block of VGG16"]
    groups = {"techniques": own, "vgg16": vgg}
    paths = []
    for file_name, titles in groups.items():
        shown = {title: compared[title] for title in titles if title in compared}
        if not shown:
            continue
        heights = [len(rows) + 1.5 for rows in shown.values()]
        figure, panels = plt.subplots(
            len(shown), 1, figsize=(9, 0.22 * sum(heights) + 1), height_ratios=heights, squeeze=False
        )
        for axes, (title, rows) in zip(panels[:, 0], shown.items(), strict=True):
            baseline = next(iter(rows))
            accuracies = {name: row["values"] for name, row in rows.items()}
            label = f"validation accuracy, one point per seed; line and band: {baseline} ± standard deviation"
            figures.experiments(axes, accuracies, baseline, label, rows[baseline]["noise"], percent=True)
            axes.set_title(f"What each change is worth: {title}")
        paths.append(figures.save(figure, folder / f"{file_name}.png"))
    return paths


def draw_confusion(counts, path):
    """Confusion matrix of the 20 superclasses."""
    figure, axes = plt.subplots(figsize=(7.2, 6.8))
    title = f"Superclasses of {counts.sum():,} test images (counts), our best network"
    figures.confusion_matrix(
        axes, counts, SUPERCLASSES, title, ("true superclass", "superclass of the predicted class")
    )
    return figures.save(figure, path)


def draw_superclass_accuracy(accuracies, path):
    """Share of right classes per superclass of two models: dict from model to 20 numbers, sorted by the second."""
    (first, first_values), (second, second_values) = accuracies.items()
    order = np.argsort(second_values)
    figure, axes = plt.subplots(figsize=(8, 5.5))
    for place, number in enumerate(order):
        axes.plot([first_values[number], second_values[number]], [place, place], color=figures.GREY, linewidth=1)
    for name, values in ((first, first_values), (second, second_values)):
        axes.scatter(np.array(values)[order], range(len(order)), color=color_of(name), label=NAMES[name], zorder=3)
    axes.set_yticks(range(len(order)), [SUPERCLASSES[number] for number in order])
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlabel="test images whose class (one of 100) is right", title="Accuracy per superclass")
    axes.legend(loc="lower right")
    return figures.save(figure, path)


def draw_pairs(pairs, path):
    """The most confused pairs of classes: dict from title to up to six test images and their classes, a block each."""
    figure = plt.figure(figsize=(10, 2.6))
    for part, (title, (images, names)) in zip(figure.subfigures(2, 3).flat, pairs.items(), strict=False):
        for axes in part.subplots(1, 6):
            axes.set_axis_off()
        for axes, image, name in zip(part.axes, images, names, strict=False):
            figures.show_image(axes, image, name.replace(" ", "\n"))
        part.suptitle(title, x=0.02, ha="left", fontsize=9)
    title = "Classes most often taken for each other: number of mistakes, and the first six with their true class"
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_mistakes(images, titles, path):
    """The most confident mistakes, with true class and predicted class."""
    title = "The most confident mistakes of our best network: true class, and below it the predicted one"
    return figures.save(figures.image_grid(images, 8, titles, title=title), path)


def draw_reliability(reliabilities, path):
    """Accuracy against confidence: dict from model to the confidence and the accuracy of ten groups."""
    figure, axes = plt.subplots(figsize=(5.2, 4.6))
    axes.plot([0, 1], [0, 1], color=figures.GREY, linewidth=0.8)
    for (name, (confidence, accuracy)), color in zip(reliabilities.items(), (figures.BLUE, figures.GREEN), strict=True):
        gap = np.abs(confidence - accuracy).mean()
        axes.plot(confidence, accuracy, "o-", color=color, label=f"{NAMES[name]}: mean gap {gap:.1%}")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(xlabel="mean confidence of a tenth of the test images", ylabel="accuracy of that tenth", aspect="equal")
    axes.set_title("Above the diagonal: underconfident")
    axes.legend(loc="lower right")
    return figures.save(figure, path)


def draw_ensemble(order, singles, ensembles, path):
    """Test accuracy of the mean probabilities of the first models of a list, and of each model alone."""
    figure, axes = plt.subplots(figsize=(8, 4))
    places = np.arange(1, len(order) + 1)
    axes.scatter(places, singles, color=figures.GREY, label="this model alone")
    axes.plot(places, ensembles, "o-", color=figures.GREEN, label="this and all models to the left together")
    axes.set_xticks(places, [NAMES[name].replace(", ", ",\n") for name in order], fontsize=8)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set(ylabel="test accuracy", title="Ensembles of the first models of the list")
    axes.legend()
    return figures.save(figure, path)
