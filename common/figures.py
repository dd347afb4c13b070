"""The look of every figure, and the plots that several scripts need."""

import matplotlib
import numpy as np
from sklearn.metrics import ConfusionMatrixDisplay

from common.files import replacing

matplotlib.use("Agg")  # figures are files; no window, no display needed
import matplotlib.pyplot as plt

# The colour-blind-safe palette of Okabe and Ito (2008), without its yellow, which is too pale on white.
COLORS = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000"
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = COLORS
GREY = "#888888"

plt.rcParams.update(
    {
        "savefig.dpi": 200,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "figure.titlesize": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.prop_cycle": matplotlib.cycler(color=COLORS),
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "image.cmap": "gray",
    }
)


def save(figure, path):
    """Writes `figure` to `path` (PNG, 200 dpi), never half, and closes it. Returns `path`."""
    with replacing(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)
    return path


def label_lines(axes):
    """Writes the label of each line at its last point, in its colour, instead of a legend; labels keep apart."""
    axes.autoscale_view()  # which matplotlib puts off; places in the figure depend on it
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_") and len(line.get_ydata())]
    ends = [(line, axes.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))) for line in lines]
    gap = axes.bbox.height * 0.055
    last = -np.inf
    for line, (x, y) in sorted(ends, key=lambda end: end[1][1]):
        last = max(y, last + gap * (1 + line.get_label().count("\n")))
        x, height = axes.transData.inverted().transform((x, last))
        place = {"xy": (x, height), "xytext": (5, 0), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(line.get_label(), **place, va="center", color=line.get_color())


def show_image(axes, image, title=None, color=BLACK):
    """Shows one image, uint8 range (height, width) or (height, width, 1 or 3), without ticks or frame."""
    axes.imshow(image, vmin=0, vmax=255)
    axes.set_axis_off()
    if title is not None:
        axes.set_title(title, fontsize=8, loc="center", color=color)


def tiled(images, columns):
    """Returns colour images, uint8 (n, height, width, 3), as one, row by row, with white lines between them."""
    framed = np.pad(images, ((0, -len(images) % columns), (1, 1), (1, 1), (0, 0)), constant_values=255)
    height, width = framed.shape[1:3]
    rows = framed.reshape(-1, columns, height, width, 3).transpose(0, 2, 1, 3, 4)
    return rows.reshape(-1, columns * width, 3)


def image_grid(images, columns, titles=None, colors=None, title=None, width=10.0):
    """Returns a figure, `width` inches wide, with `images` row by row and a title and colour for each where given."""
    rows = -(-len(images) // columns)
    line_height = 0.2 * max((text.count("\n") + 1 for text in titles or [] if text), default=0)
    height = rows * (width / columns * images[0].shape[0] / images[0].shape[1] + line_height) + 0.35
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    for panel in axes.flat:
        panel.set_axis_off()
    for number, (panel, image) in enumerate(zip(axes.flat, images, strict=False)):
        show_image(panel, image, titles and titles[number], colors[number] if colors else BLACK)
    if title:
        figure.suptitle(title, x=0.01, ha="left")
    return figure


def confusion_matrix(axes, counts, class_names, title, names=("true class", "predicted class")):
    """Draws a confusion matrix: row percentages, of few classes with counts, which stand alone for more than twelve.

    `counts` is int (num_classes, num_classes); `names` says what its rows and columns are.
    """
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    display = ConfusionMatrixDisplay(shares, display_labels=class_names)
    # The square root of the scale keeps mistakes of a few per mille visible beside a diagonal near 100 %.
    norm = matplotlib.colors.PowerNorm(0.5, 0, 1)
    display.plot(ax=axes, cmap="Blues", colorbar=False, include_values=False, im_kw={"norm": norm})
    few, many = len(counts) <= 5, len(counts) > 12
    for (row, column), share in np.ndenumerate(shares):
        text = f"{share:.1%}\n{counts[row, column]:,}" if few else counts[row, column] if many else f"{100 * share:.0f}"
        if few or text not in (0, "0"):
            color = "white" if share > 0.4 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=6 if many else 8, color=color)
    short = max(len(str(name)) for name in class_names) <= 3
    axes.set_xticks(range(len(counts)), class_names, rotation=0 if short else 30, ha="center" if short else "right")
    axes.set(ylabel=names[0], xlabel=names[1], title=title)
    axes.grid(False)


def learning_curves(axes, curves, labels=("training", "validation"), color=BLUE, name=""):
    """Draws training (dashed) and validation (solid) values of one network, a pair of lists (or None), over the epochs.

    Legend or direct labels are left to the caller.
    """
    for values, label, style in zip(curves, labels, ("--", "-"), strict=True):
        if values:
            epochs = np.arange(1, len(values) + 1)
            axes.plot(epochs, values, style, color=color, label=f"{name}, {label}" if name else label)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)


def experiments(axes, values, baseline, label, noise=None, percent=False):
    """Draws experiments as one line each: a point per seed (or fold), a tick for the mean, the baseline as a line.

    `values` is a dict from the name of an experiment to its measurements, top to bottom, and `noise` the standard
    deviation of the baseline over its seeds, shaded around its mean. `percent` is for shares.
    """
    if baseline in values:
        mean = np.mean(values[baseline])
        if noise is not None and np.isfinite(noise):
            axes.axvspan(mean - noise, mean + noise, color=GREY, alpha=0.2, linewidth=0)
        axes.axvline(mean, color=GREY, linewidth=0.8, zorder=0)
    for place, points in enumerate(values.values()):
        axes.scatter(points, [place] * len(points), s=18, color=BLUE)
        axes.scatter(np.mean(points), place, marker="|", s=90, color=BLACK)
    axes.set_yticks(range(len(values)), list(values))
    axes.set(ylim=(len(values) - 0.5, -0.5), xlabel=label)
    axes.grid(True, axis="both")
    if percent:
        axes.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=None))
