"""The figures of task2_diffusion.py. Each function draws what it is handed, and returns the path of the file."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from common import figures

NAMES = {"ddim": "DDIM", "ddpm": "DDPM", "standardised pictures": "standardised images"}  # for those of the tables
FRECHET = "Fréchet distance to held-out images"
AGREEMENT = "category agreement"


def grid(axes, images, rows=None, columns=None, title=None):
    """Shows `images` (rows, columns, height, width) with names of rows and columns, as one image: much faster."""
    framed = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=255)
    height, width = framed.shape[2:]
    axes.imshow(framed.transpose(0, 2, 1, 3).reshape(len(framed) * height, -1), vmin=0, vmax=255)
    axes.set_yticks((np.arange(len(rows)) + 0.5) * height if rows else [], rows)
    axes.set_xticks((np.arange(len(columns)) + 0.5) * width if columns else [], columns)
    axes.tick_params(length=0, labelsize=9, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.set_title(title)


def degrees(elevations):
    return [f"{elevation}°" for elevation in elevations]


def draw_network(widths, blocks, attention, target, path):
    """The U-Net: residual blocks at each resolution, skip connections, and where time and labels enter."""
    figure, axes = plt.subplots(figsize=(10, 4.6))
    last, sides = len(widths) - 1, [24 // 2**level for level in range(len(widths))]
    block = "residual block" if blocks == 1 else f"{blocks} residual blocks"

    def box(x, y, text, color=figures.BLUE):
        frame = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color, "linewidth": 1.5}
        axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame)

    def connect(start, end, text="", shift=(0, 0)):
        axes.plot(*zip(start, end, strict=True), color=figures.GREY, zorder=0)
        middle = [(a + b) / 2 + more for a, b, more in zip(start, end, shift, strict=True)]
        axes.text(*middle, text, ha="center", va="bottom", fontsize=8, color=figures.GREY)

    for level, (side, filters) in enumerate(zip(sides, widths, strict=True)):
        extra = "\nself-attention" if level == last and attention else ""
        y = -1.3 * level
        for x in (level - last - 1.2, last + 1.2 - level):
            box(x, y, f"{side} × {side} × {filters}\n{block}{extra}")
        connect(
            (level - last - 1.2, y),
            (last + 1.2 - level, y),
            "" if level else "skip connections: concatenation",
            (0, 0.04),
        )
        if level < last:
            connect((level - last - 1.2, y), (level - last - 0.2, y - 1.3), "average\npooling", (-0.5, -0.25))
            connect((last + 0.2 - level, y - 1.3), (last + 1.2 - level, y), "upsampling", (0.5, -0.1))
    box(0, -1.3 * last, f"{sides[-1]} × {sides[-1]} × {widths[-1]}\nresidual block")
    edge = last + 1.2
    box(-edge, 1.4, "noisy image, 48 × 48", figures.GREEN)
    box(edge, 1.4, f"{target}, 48 × 48", figures.RED)
    connect((-edge, 1.4), (-edge, 0), "2 × 2 pixels\nbecome channels,\nconvolution", (-0.55, -0.3))
    connect((edge, 0), (edge, 1.4), "convolution,\nchannels become\n2 × 2 pixels", (0.55, -0.3))
    condition = "time (sines), category, elevation (embeddings):\nscale and shift of every filter in every block"
    box(0, 1.4, condition, figures.ORANGE)
    axes.set(xlim=(-edge - 1, edge + 1), ylim=(-1.3 * last - 0.6, 1.9))
    axes.set_axis_off()
    axes.set_title("The network: a U-Net of residual blocks, conditioned on noise level, category and elevation")
    return figures.save(figure, path)


def draw_learning_curves(curves, target, loss, path):
    """Training and validation loss per epoch."""
    figure, axes = plt.subplots(figsize=(8, 4))
    labels = ("training (dashed)", "validation (solid),\nweights not averaged")
    figures.learning_curves(axes, (curves["loss"], curves["val_loss"]), labels)
    error = {"mse": "mean squared error", "mae": "mean absolute error"}[loss]
    axes.set(ylabel=f"loss: {error} of the {target}", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_title("Learning curves of the diffusion network")
    figures.label_lines(axes)
    return figures.save(figure, path)


def draw_samples(samples, training, categories, elevations, path):
    """The first samples, one per condition, beside the first training image of each condition.

    `training` has `images`, `category` and `elevation`. Conditions without a training image stay white.
    """
    shape = len(elevations), len(categories), *samples.shape[1:]
    real = np.full(shape, 255, "uint8")
    for row, column in np.ndindex(shape[:2]):
        found = np.flatnonzero((training.category == column) & (training.elevation == row))
        if len(found):
            real[row, column] = training.images[found[0]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 9.3))
    count = len(elevations) * len(categories)
    title = f"The first {count} samples, unselected"
    grid(left, samples[:count].reshape(shape), degrees(elevations), categories, title)
    grid(right, real, None, categories, "Real training images, same conditions")
    return figures.save(figure, path)


def draw_conditions(images, categories, elevations, path):
    """Samples (categories x elevations, height, width) that start from the same noise."""
    figure, axes = plt.subplots(figsize=(10, 5.7))
    shape = len(categories), len(elevations), *images.shape[1:]
    grid(axes, images.reshape(shape), categories, degrees(elevations), "The same noise under every condition (DDIM)")
    return figures.save(figure, path)


def draw_denoising(images, categories, path):
    """One image per category before the first step and after every step: (categories, steps + 1, height, width)."""
    shown = np.unique(np.linspace(0, images.shape[1] - 1, 11).round().astype(int))
    figure, axes = plt.subplots(figsize=(10, 4.75))
    columns = ["noise", *(f"step {step}" for step in shown[1:])]
    grid(axes, images[:, shown], categories, columns, "Denoising, one image of each category (DDIM)")
    return figures.save(figure, path)


def draw_interpolations(images, rows, elevation, path):
    """Samples between two noises, (rows x columns, height, width); `rows` are names of categories."""
    figure, axes = plt.subplots(figsize=(10, 5.45))
    images = images.reshape(len(rows), -1, *images.shape[1:])
    title = f"Between two noises (left and right), with the same condition: {elevation}° and the category on the left"
    grid(axes, images, rows, title=title)
    return figures.save(figure, path)


def draw_nearest(samples, nearest, distances, path, count=12):
    """The first samples and those nearest to a training image, each above it, with the distance in grey levels."""
    figure, panels = plt.subplots(2, 1, figsize=(10, 4.6))
    titles = (f"The first {count} samples", f"The {count} samples with the smallest distance")
    for axes, chosen, title in zip(panels, (np.arange(count), np.argsort(distances)[:count]), titles, strict=True):
        columns = [f"{distance:.1f}" for distance in distances[chosen]]
        title += " above their nearest training images; distance in grey levels"
        grid(axes, np.stack([samples[chosen], nearest[chosen]]), columns=columns, title=title)
    return figures.save(figure, path)


def draw_neighbour_distances(distances, path):
    """Distributions of the distance to the nearest training image: of samples, held-out images, and test images."""
    figure, axes = plt.subplots(figsize=(8, 4))
    edges = np.geomspace(1, 60, 60)
    labels = {
        "validation": ("held-out images of the training toys", figures.BLUE),
        "test": ("images of the test toys", figures.GREY),
        "samples": ("samples", figures.RED),
    }
    for place, (part, (label, color)) in enumerate(labels.items()):
        counts, _ = np.histogram(np.clip(distances[part], edges[0], edges[-1]), edges)
        axes.stairs(counts / len(distances[part]), edges, color=color, linewidth=2)
        axes.text(0.02, 0.92 - 0.07 * place, label, color=color, transform=axes.transAxes)
    axes.set(xscale="log", xlabel="distance to the nearest training image (RMS, grey levels)", ylabel="share of images")
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.set_title("Memorised samples would lie left of the held-out images")
    return figures.save(figure, path)


def draw_agreement(category, predicted, categories, path):
    """Confusion matrix of conditions and predictions of the evaluation classifier, both integers (n,)."""
    counts = np.zeros((len(categories), len(categories)), int)
    np.add.at(counts, (category, predicted), 1)
    figure, axes = plt.subplots(figsize=(6, 5.4))
    names = ("condition of the sample", "prediction of the evaluation classifier")
    figures.confusion_matrix(axes, counts, categories, "Do samples show the category of their condition?", names)
    return figures.save(figure, path)


def draw_quality(steps, guidance, path):
    """Sample quality against the number of steps and the guidance weight; rows of the experiment table."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for sampler, rows in steps.sort_values("steps").groupby("sampler"):
        left.plot(rows["steps"], rows["frechet_distance"], "o-", label=NAMES[sampler])
    left.set(xscale="log", yscale="log", xlabel="sampling steps", ylabel=FRECHET, title="Number of steps")
    ticks = sorted(set(steps["steps"].astype(int)))
    left.set_xticks(ticks, ticks)
    left.minorticks_off()
    left.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    left.yaxis.set_major_formatter("{x:g}")
    figures.label_lines(left)
    rows = guidance.sort_values("guidance")
    right.plot(rows["frechet_distance"], rows["category_agreement"], "-", color=figures.GREY, linewidth=1)
    right.scatter(rows["frechet_distance"], rows["category_agreement"], color=figures.BLUE, zorder=3)
    for weight, x, y in zip(rows["guidance"], rows["frechet_distance"], rows["category_agreement"], strict=True):
        right.annotate(
            f"{weight:g}", (x, y), xytext=(-5, 6 if weight >= 2 else -13), textcoords="offset points", ha="right"
        )
    right.set(xlabel=FRECHET, ylabel=AGREEMENT, ylim=(0, 1.12), title="Guidance weight: 0 ignores the condition")
    right.margins(x=0.08)
    right.yaxis.set_major_formatter("{x:.0%}")
    return figures.save(figure, path)


def draw_experiments(table, epochs, path):
    """Short training runs, rows of the experiment table."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True)
    for panel, column, label in zip(
        panels, ("frechet_distance", "category_agreement"), (FRECHET, AGREEMENT), strict=True
    ):
        groups = table.groupby("name", sort=False)[column]
        values = {NAMES.get(name, name): points.tolist() for name, points in groups}
        values = {"baseline": values.pop("baseline", []), **values} if "baseline" in values else values
        figures.experiments(panel, values, "baseline", label, percent=column == "category_agreement")
        panel.xaxis.set_major_locator(MaxNLocator(5))
    panels[1].tick_params(axis="y", length=0)
    figure.suptitle(f"One change at a time, {epochs} epochs of training, one point per seed", x=0.01, ha="left")
    return figures.save(figure, path)
