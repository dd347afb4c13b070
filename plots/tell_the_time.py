"""The figures of tell_the_time.py."""

import matplotlib.pyplot as plt
import numpy as np

from common import figures

FLOOR = 0.05  # minutes; smaller errors are drawn here on a logarithmic axis


def _clock_text(minutes):
    hour, minute = divmod(round(float(minutes)) % 720, 60)
    return f"{hour}:{minute:02d}"


def _draw_clocks(images, true, predicted, errors, title, path):
    titles = [f"{_clock_text(a)} → {_clock_text(b)}" for a, b in zip(true, predicted, strict=True)]
    colors = [figures.RED if error > 5 else figures.BLACK for error in errors]
    return figures.save(figures.image_grid(images, 8, titles, colors, title, width=8.0), path)


def draw_predictions(images, true, predicted, errors, chosen, path):
    """Test clocks with their true and predicted times in minutes; `chosen` are the indices of those to show."""
    title = "Test clocks, not selected: true time → predicted time"
    return _draw_clocks(images[chosen], true[chosen], predicted[chosen], errors[chosen], title, path)


def draw_worst(images, true, predicted, errors, chosen, path):
    """As `draw_predictions`, for the largest errors."""
    title = f"The {len(chosen)} largest errors of {len(images):,} test clocks: true time → predicted time"
    return _draw_clocks(images[chosen], true[chosen], predicted[chosen], errors[chosen], title, path)


def draw_rendered(images, minutes, path):
    """Rendered clocks with their times."""
    title = "Rendered clocks, not selected, with their times"
    titles = [_clock_text(each) for each in minutes]
    return figures.save(figures.image_grid(images, 8, titles, title=title, width=7.0), path)


def draw_hours(counts, path):
    """Confusion matrix of the hours; `counts` is int (12, 12)."""
    figure, axes = plt.subplots(figsize=(7.6, 7.2))
    title = f"{100 * counts.trace() / counts.sum():.1f} % of the hours are correct at 150 x 150 pixels; "
    title += "in cells: % of each true hour"
    figures.confusion_matrix(axes, counts, list(range(12)), title, names=("true hour", "predicted hour"))
    return figures.save(figure, path)


def draw_representations(errors, cards, labels, path):
    """Distribution of the errors of each representation, in minutes, with the cost of its training from the cards."""
    figure, axes = plt.subplots(figsize=(8.6, 0.39 * len(labels) + 1.1))
    columns = {"median": 42, "mean": 84, "training": 136, "parameters": 200}  # right edges, in points from the axes

    def write_row(place, texts, color):
        for offset, text in zip(columns.values(), texts, strict=True):
            at = {"xytext": (offset, 0), "textcoords": "offset points", "annotation_clip": False}
            position = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "center", "fontsize": 9}
            axes.annotate(text, (1, place), color=color, **at, **position)

    write_row(-0.8, columns, figures.GREY)
    for place, (values, card) in enumerate(zip(errors, cards, strict=True)):
        mean, median = np.mean(values), np.median(values)
        logarithms = np.log10(np.maximum(values, FLOOR))
        parts = axes.violinplot(logarithms, [place], orientation="horizontal", widths=0.85, showextrema=False)
        parts["bodies"][0].set(facecolor=figures.BLUE, alpha=0.45)
        axes.plot(np.log10(max(median, FLOOR)), place, "|", color=figures.BLACK, markersize=11)
        axes.plot(np.log10(max(mean, FLOOR)), place, "o", color=figures.RED, markersize=5)
        cost = f"{card['seconds'] / 60:.1f} min", f"{card['parameters']['trainable'] / 1000:.0f} k"
        write_row(place, (f"{median:.1f}", f"{mean:.1f}", *cost), figures.BLACK)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_xticks([np.log10(FLOOR), 0, 1, 2, np.log10(360)], [f"≤ {FLOOR:g}", "1", "10", "100", "360"])
    axes.set(xlim=(-1.4, np.log10(360)), ylim=(len(labels) - 0.4, -1.2), xlabel="common-sense error in minutes")
    axes.grid(True, axis="x")
    axes.set_title("Errors on test clocks of 75 x 75 pixels: median (|) and mean (dot)")
    return figures.save(figure, path)


def draw_error_by_time(errors, minutes, labels, path):
    """Error in minutes of every test clock over its true time, one panel per representation."""
    columns = min(len(labels), 4)
    rows = -(-len(labels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(9.5, 1.8 * rows + 0.6), sharex=True, sharey=True, squeeze=False)
    for panel, values, label in zip(axes.flat, errors, labels, strict=False):
        panel.plot(minutes / 60, values, ".", color=figures.BLUE, markersize=4, alpha=0.45, markeredgewidth=0)
        panel.set_title(label, fontsize=8.5 if len(label) < 32 else 7.5)
        panel.set_yscale("symlog", linthresh=1)
        panel.set(xlim=(0, 12), ylim=(-0.1, 400))
        panel.set_xticks(range(0, 13, 3))
        panel.set_yticks([0, 1, 10, 100, 360], ["0", "1", "10", "100", "360"])
        panel.tick_params(labelbottom=True)
    for panel in axes.flat[len(labels) :]:
        panel.set_axis_off()
    figure.supxlabel("true time in hours", fontsize=10)
    figure.supylabel("common-sense error in minutes", fontsize=10)
    figure.suptitle("Error of each test clock of 75 x 75 pixels over the time that it shows", x=0.01, ha="left")
    return figures.save(figure, path)


def draw_learning_curves(curves, labels, path):
    """Losses, and errors in minutes on the validation images, of one network per representation, the best one first."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 4.5))
    styles = [style + color for style in ("-", ":") for color in figures.COLORS]
    right.set(yscale="log", ylim=(1, 400))
    ends = []
    for of_network, label, style in zip(curves, labels, styles, strict=False):
        epochs = np.arange(1, len(of_network["loss"]) + 1)
        left.plot(epochs, of_network["val_loss"], style[0], color=style[1:])
        right.plot(epochs, of_network["validation_minutes"], style[0], color=style[1:])
        ends.append((of_network["validation_minutes"][-1], label, style))
    best = curves[0]["loss"]
    left.plot(np.arange(1, len(best) + 1), best, "--", color=figures.COLORS[0], label=f"training loss of\n{labels[0]}")
    height = 0.0
    for value, label, style in sorted(ends):  # labels keep apart, each joined to the end of its line
        height = max(height + 0.06, np.log(max(value, 1)) / np.log(400))
        color, place = style[1:], {"transform": right.transAxes, "clip_on": False}
        right.plot([1.14, 1.21], [height, height], style[0], color=color, **place)
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        at = {"xytext": (1.14, height), "textcoords": "axes fraction", "annotation_clip": False}
        right.annotate("", (len(best), value), arrowprops=line, **at)
        right.text(1.225, height, label, color=color, va="center", fontsize=9, **place)
    left.set(yscale="log", xlabel="epoch", ylabel="loss on validation images")
    left.set_ylim(top=4 * left.get_ylim()[1])  # room for the legend
    right.set(xlabel="epoch", ylabel="mean error in minutes, validation images")
    right.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend(loc="upper right")
    left.set_title("Loss (not comparable)")
    right.set_title("Common-sense error (comparable)")
    return figures.save(figure, path)


def draw_experiments(values, noise, path):
    """Mean validation error of every experiment; `values` is a dict from its name to one error per seed."""
    figure, axes = plt.subplots(figsize=(8, 0.34 * len(values) + 1.2))
    label = "mean common-sense error on validation images in minutes"
    figures.experiments(axes, values, "baseline", label, noise)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_title("Both hands on circles, 4 epochs: one change at a time")
    return figures.save(figure, path)
