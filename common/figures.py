"""The look of every figure, and the plots that several scripts need."""

import matplotlib
import numpy as np

from common.files import replacing

matplotlib.use("Agg")  # figures are files; no window, no display needed
import matplotlib.pyplot as plt

# The colour-blind-safe palette of Okabe and Ito (2008), without its yellow, which is too pale on white.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
GREY = "#888888"
COLORS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK)

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
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_") and len(line.get_ydata())]
    ends = [(line, axes.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))) for line in lines]
    gap = axes.bbox.height * 0.055
    last = -np.inf
    for line, (x, y) in sorted(ends, key=lambda end: end[1][1]):
        last = max(y, last + gap * (1 + line.get_label().count("\n")))
        x, height = axes.transData.inverted().transform((x, last))
        axes.annotate(
            line.get_label(),
            (x, height),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=line.get_color(),
            annotation_clip=False,
        )


def picture(axes, image, title=None, color=BLACK):
    """Shows one grey picture, uint8 range (height, width), without ticks or frame."""
    axes.imshow(image, vmin=0, vmax=255)
    axes.set_axis_off()
    if title is not None:
        axes.set_title(title, fontsize=8, loc="center", color=color)


def confusion_matrix(axes, counts, class_names, title):
    """Draws a confusion matrix as row percentages with the counts of mistakes.

    Args:
        axes: matplotlib axes.
        counts: int (num_classes, num_classes), row the true class, column the predicted one.
        class_names: list of str.
        title: str.
    """
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # The square root keeps mistakes of a few per mille visible beside a diagonal near 100 %.
    axes.imshow(np.sqrt(share), cmap="Blues", vmin=0, vmax=1)
    for row in range(len(counts)):
        for column in range(len(counts)):
            text = f"{share[row, column]:.1%}\n{counts[row, column]:,}"
            color = "white" if share[row, column] > 0.4 else "black"
            axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(counts)), class_names, rotation=30, ha="right")
    axes.set_yticks(range(len(counts)), class_names)
    axes.set(xlabel="predicted category", ylabel="true category", title=title)
    axes.grid(False)
