"""Figures of voc_segmentation.py."""

import math

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import MaxNLocator

from common import figures

VOID = 255
MASK_COLORS = np.array([[255, 255, 255], [0, 114, 178], [230, 159, 0]], "uint8")  # background, object, void
NAMES = {
    "unet_transposed": "U-Net, transposed",
    "unet_bilinear": "U-Net, bilinear",
    "encoder_decoder": "encoder-decoder",
}
COLORS = dict(zip(NAMES, (figures.RED, figures.BLUE, figures.GREY), strict=True))
UNETS = {"unet_transposed": "transposed", "unet_bilinear": "bilinear"}


def color_mask(mask):
    """Returns a mask of class labels in colours, uint8 (side, side, 3): white background, blue objects, orange void."""
    return MASK_COLORS[np.where(mask == VOID, 2, np.minimum(mask, 1))]


def draw_data(examples, classes, path):
    """The first twelve images in two rows, each above its mask, with the names of the classes that are in it."""
    images, masks = examples.images[:12], examples.masks[:12]
    names = [", ".join(classes[label] for label in np.unique(mask) if label not in (0, VOID)) for mask in masks]
    columns = math.ceil(len(images) / 2)
    grid, titles = [], []
    for row in (slice(columns), slice(columns, None)):
        grid += [*images[row], *map(color_mask, masks[row])]
        titles += [*names[row], *[""] * len(names[row])]
    title = "Training images and their masks: objects blue, void orange, background white"
    return figures.save(figures.image_grid(grid, columns, titles, title=title), path)


def show_probability(axes, probability):
    axes.imshow(probability, vmin=0, vmax=1, cmap="Blues")
    axes.set_axis_off()


def draw_predictions(examples, probabilities, chosen, title, path, notes=None, blocks=2):
    """Images beside their masks and the probabilities that networks predict, in `blocks` from left to right.

    `probabilities` is a dict from model to (n, side, side), `chosen` are indices, `notes` the titles of their images.
    """
    rows, width = math.ceil(len(chosen) / blocks), 2 + len(probabilities)
    height = rows * (10 / (blocks * width) + (0.22 if notes else 0.04)) + 0.55
    figure, axes = plt.subplots(rows, blocks * width, figsize=(10, height), squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    for place, number in enumerate(chosen):
        row, left = place % rows, place // rows * width
        panels = axes[row, left : left + width]
        figures.show_image(panels[0], examples.images[number], notes[place] if notes else None)
        figures.show_image(panels[1], color_mask(examples.masks[number]), None if row else "mask")
        for panel, (model, probability) in zip(panels[2:], probabilities.items(), strict=True):
            show_probability(panel, probability[number])
            if row == 0:
                panel.set_title(NAMES[model], fontsize=8, loc="center")
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_first(test, probabilities, path):
    """The first twelve test images."""
    title = "The first twelve test images, and the predicted probability of an object"
    return draw_predictions(test, probabilities, range(min(12, len(test.images))), title, path)


def draw_extremes(test, probability, chosen, iou, path):
    """Test images with the best, median and worst IoU, of the U-Net with bilinear upsampling."""
    title = "Test images with the best (left), median (middle) and worst (right) IoU"
    notes = [f"IoU {iou[number]:.2f}" for number in chosen]
    return draw_predictions(test, {"unet_bilinear": probability}, chosen, title, path, notes, blocks=3)


def draw_disagreement(test, probability, chosen, dice, boundary, path):
    """The test images whose overlap and outline rank most differently."""
    title = "Test images that overlap (Dice) and outline (boundary F-score) rank most differently"
    notes = [f"Dice {dice[number]:.2f}, boundary {boundary[number]:.2f}" for number in chosen]
    return draw_predictions(test, {"unet_bilinear": probability}, chosen, title, path, notes)


def draw_upsampling(test, probabilities, cards, path):
    """Test scores of all seeds of both U-Nets, above the centre of the first images and of their probabilities."""
    titles = {
        "foreground_iou": "foreground IoU",
        "boundary_f_score": "boundary F-score",
        "checkerboard": "energy at a period of 2 pixels, %",
    }
    columns, crop = min(6, len(test.images)), slice(32, 96)
    figure = plt.figure(figsize=(10, 8))
    above, below = figure.subfigures(2, 1, height_ratios=(1, 2))
    for panel, (metric, title) in zip(above.subplots(1, 3), titles.items(), strict=True):
        for place, model in enumerate(UNETS):
            scale = 100 if metric == "checkerboard" else 1
            values = [scale * seed["metrics"]["test"][metric] for seed in cards[model]["seeds"]]
            panel.scatter([place] * len(values), values, color=COLORS[model])
        panel.set_xticks([0, 1], UNETS.values())
        panel.set(xlim=(-0.5, 1.5), title=title)
    axes = below.subplots(3, columns, squeeze=False)
    for column in range(columns):
        figures.show_image(axes[0, column], test.images[column, crop, crop])
        for panel, model in zip(axes[1:, column], UNETS, strict=True):
            probability = probabilities[model][column, crop, crop]
            show_probability(panel, probability)
            panel.contour(probability, [0.5], colors=figures.ORANGE, linewidths=0.8)
    for panel, name in zip(axes[:, 0], ("image", *UNETS.values()), strict=True):
        panel.set_title(name, fontsize=9, loc="left")
    above.suptitle("Two U-Nets that differ in their upsampling: test scores, one point per seed", x=0.01, ha="left")
    title = f"Centre of the first {columns} test images, predicted probability of an object, and outline of the mask"
    below.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_classes(groups, path):
    """IoU of the test images by the class of their largest object; `groups` is a dict from class to values."""
    groups = dict(sorted(groups.items(), key=lambda item: np.median(item[1])))
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(groups) + 1.2))
    axes.boxplot(list(groups.values()), orientation="horizontal", widths=0.6, medianprops={"color": figures.RED})
    axes.set_yticks(range(1, len(groups) + 1), [f"{name} ({len(values)})" for name, values in groups.items()])
    axes.grid(axis="x")
    axes.grid(axis="y", visible=False)
    axes.set(
        xlim=(-0.02, 1.02),
        xlabel="IoU of a test image (box: quartiles, red: median)",
        ylabel="class of the largest object",
    )
    axes.set_title("U-Net, bilinear: IoU by class (number of test images)")
    return figures.save(figure, path)


def draw_precision_recall(curves, calibrations, path):
    """Precision over recall, and calibration, of the pixels of the test images.

    Both are dicts from model: `curves` to arrays of precision and recall, `calibrations` to arrays with one value per
    bin: mean "probability", "frequency" of objects and "share" of all pixels.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    for model, (precision, recall) in curves.items():
        left.plot(recall, precision, color=COLORS[model], label=NAMES[model])
        bins = calibrations[model]
        shown = bins["share"] > 0.001
        right.plot(bins["probability"][shown], bins["frequency"][shown], "o-", color=COLORS[model], label=NAMES[model])
    left.set(xlabel="recall", ylabel="precision", title="Pixels of the test images, every threshold", ylim=(0, 1.02))
    left.legend(loc="lower left")
    right.plot([0, 1], [0, 1], color=figures.BLACK, linewidth=0.8, label="perfect calibration")
    right.set(xlabel="predicted probability of an object", ylabel="frequency of objects", title="Calibration")
    right.legend(loc="upper left")
    return figures.save(figure, path)


def draw_learning_curves(cards, path):
    """Training loss and validation Dice over the epochs, from the cards of the models."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for model, card in cards.items():
        curves, labels = card["curves"], 2 * [NAMES[model]]
        figures.learning_curves(left, (curves["loss"], None), labels, COLORS[model])
        figures.learning_curves(right, (None, curves["validation_dice"]), labels, COLORS[model])
    left.set(ylabel="cross-entropy + Dice loss", title="Training: loss on augmented images")
    right.set(ylabel="mean Dice of an image", title="Validation: the weights of the best epoch are kept")
    left.legend(loc="upper right")
    right.legend(loc="lower right")
    return figures.save(figure, path)


def draw_experiments(table, noise, path):
    """Short training runs, one change at a time.

    `table` is the `pandas.DataFrame` of the runs; `noise` the baseline's standard deviation by metric.
    """
    metrics = {
        "foreground_iou": "foreground IoU",
        "dice_per_picture": "mean Dice of an image",
        "calibration_error": "calibration error",
    }
    runs = table.groupby("name", sort=False)
    figure, panels = plt.subplots(1, len(metrics), figsize=(11, 0.34 * len(runs) + 1.3), sharey=True)
    for panel, (metric, label) in zip(panels, metrics.items(), strict=True):
        values = {name: group[metric].tolist() for name, group in runs}
        figures.experiments(panel, values, "baseline", label, noise=noise[metric])
        panel.xaxis.set_major_locator(MaxNLocator(4))
    title = f"One change at a time: U-Net, bilinear, {table['epochs'].iloc[0]} epochs, validation images"
    figure.suptitle(f"{title}; one point per seed, line: baseline", x=0.01, ha="left")
    return figures.save(figure, path)
