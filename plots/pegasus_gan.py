"""The figures of pegasus_gan.py. Each function draws what it is handed, and returns the path of the file."""

import itertools
import textwrap

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import FancyArrowPatch
from scipy import ndimage

from common import figures

METHODS = {
    "blend": "Blend",
    "composition": "Composition in space",
    "collage": "Collage of generated images",
    "learned": "Learned from collages",
    "collage_real": "Collage of real images",
}


def grid(axes, images, rows=None, columns=None, title=None):
    """Shows `images` (rows, columns, height, width, 3) with names of rows and columns."""
    shown = figures.tiled(images.reshape(-1, *images.shape[2:]), images.shape[1])
    axes.imshow(shown, interpolation="nearest")
    height, width = shown.shape[0] / len(images), shown.shape[1] / images.shape[1]
    axes.set_yticks((np.arange(len(images)) + 0.5) * height if rows else [], rows)
    axes.set_xticks((np.arange(images.shape[1]) + 0.5) * width if columns else [], columns)
    axes.tick_params(length=0, labelsize=9, top=True, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.grid(False)
    axes.set_title(title)


def square(images, columns=8):
    """Returns as many whole rows of `images` as there are, (rows, columns, ...)."""
    columns = min(columns, len(images))
    return images[: len(images) // columns * columns].reshape(-1, columns, *images.shape[1:])


def draw_pegasus(images, chosen, path):
    """The best candidate of the method `chosen` unmodified and upsampled, and small the best of every method."""
    mosaic = [["pixels", "smooth", method] for method in images]
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(10, 5.1), width_ratios=[4, 4, 1])
    # Enlarged 12 times, pixel by pixel.
    axes["pixels"].imshow(images[chosen].repeat(12, axis=0).repeat(12, axis=1), interpolation="nearest")
    axes["pixels"].set_title(f"Chosen by judge A: {METHODS[chosen].lower()}")
    axes["smooth"].imshow(images[chosen], interpolation="lanczos")
    axes["smooth"].set_title("The same, upsampled (Lanczos)")
    for method, image in images.items():
        axes[method].imshow(image, interpolation="nearest")
        axes[method].set_title(textwrap.fill(METHODS[method], 14), fontsize=8)
    for panel in axes.values():
        panel.set_axis_off()
    return figures.save(figure, path)


def draw_unselected(images, method, path):
    """The first batch of one method, unselected."""
    shown = square(images)
    figure, axes = plt.subplots(figsize=(6, 6 * shown.shape[0] / shown.shape[1] + 0.3))
    grid(axes, shown, title=f"{METHODS[method]}: the first {len(images)}, unselected")
    return figures.save(figure, path)


def draw_way(stages, results, path, rows=4, columns=8):
    """Estimates of the clean image on the way from noise to Pegasus, with the outline of the mask.

    `stages` is a list of (time, images, masks), first to last, and `results` are the images at the end.
    """
    chosen = np.unique(np.linspace(0, len(stages) - 1, columns).round().astype(int))
    rows, scale = min(rows, len(results)), 6
    shown = np.stack([stages[number][1][:rows] for number in chosen] + [results[:rows]], axis=1)
    figure, axes = plt.subplots(figsize=(10, 0.6 + 9.6 * rows / (len(chosen) + 1)))
    names = [f"time {stages[number][0]:.2f}" for number in chosen] + ["result"]
    grid(axes, shown.repeat(scale, axis=2).repeat(scale, axis=3), columns=names)
    side = shown.shape[2] * scale + 2
    for column, number in enumerate(chosen):
        for row in range(rows):
            mask = ndimage.zoom(stages[number][2][row], scale, order=1)
            if mask.max() > 0.5:
                places = np.arange(len(mask)) + 1
                axes.contour(places + column * side, places + row * side, mask, [0.5], colors=figures.ORANGE)
    axes.set_title("Composition: estimates of the image; outline: region guided by the class of the wings")
    return figures.save(figure, path)


def draw_collages(collages, masks, images, path, columns=10):
    """Raw collages, where their wings are, and what denoising makes of them."""
    count = min(columns, len(images))
    painted = collages[:count].astype("float32")
    color = np.array([int(figures.ORANGE[place : place + 2], 16) for place in (1, 3, 5)])
    painted += 0.6 * masks[:count, ..., None] * (color - painted)
    figure, axes = plt.subplots(figsize=(10, 3.5))
    rows = ["raw collage", "mask of the wings", "denoised"]
    shown = np.stack([collages[:count], painted.astype("uint8"), images[:count]])
    grid(axes, shown, rows, title=f"The first {count} collages of generated horses and wings, unselected")
    return figures.save(figure, path)


def draw_nearest(nearest, path, count=8):
    """The best and the first images of each method above their nearest training images, by the features of judge B.

    `nearest` is a dict from the method to images, distances and neighbours.
    """
    figure, panels = plt.subplots(-(-len(nearest) // 2), 2, figsize=(10, 0.2 + 1.95 * -(-len(nearest) // 2)))
    for axes in panels.flat[len(nearest) :]:
        axes.set_axis_off()
    for axes, (method, (images, distances, neighbours)) in zip(panels.flat, nearest.items(), strict=False):
        shown = np.stack([images[:count], neighbours[:count]])
        grid(axes, shown, columns=[f"{distance:.2f}" for distance in distances[:count]], title=METHODS[method])
    figure.suptitle(
        "The best and the first winged horses above their nearest training images; distances in features of judge B",
        x=0.01,
        ha="left",
    )
    return figures.save(figure, path)


def draw_scores(scores, path):
    """Distribution of the score of judge B for every set of images: one point per image, and the mean."""
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(scores) + 0.9))
    for place, (name, values) in enumerate(scores.items()):
        color = figures.BLUE if name in METHODS else figures.ORANGE if name.endswith("_raw") else figures.GREY
        shown = values[:1000]
        height = place + np.random.default_rng(0).uniform(-0.3, 0.3, len(shown))
        axes.scatter(shown, height, s=4, color=color, alpha=0.5, linewidths=0)
        axes.plot([np.mean(values)] * 2, [place - 0.4, place + 0.4], color=figures.BLACK)
    raw = {f"{method}_raw": f"{name}, not denoised" for method, name in METHODS.items()}
    names = METHODS | raw | {"pixel_average": "Pixel averages of horse and bird"}
    names |= {"horse_train": "Real: horse, training images", "horse_samples": "Generated: horse"}
    axes.set_yticks(range(len(scores)), [names.get(name, f"Real: {name}") for name in scores])
    label = r"score of judge B: $\sqrt{p(\mathrm{horse}) \cdot \max(p(\mathrm{bird}), p(\mathrm{airplane}))}$"
    axes.set(xlim=(-0.02, 1.02), ylim=(len(scores) - 0.5, -0.5), xlabel=label)
    axes.set_title("Score of judge B per image; bars mark means")
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    return figures.save(figure, path)


def draw_samples(images, classes, path):
    """Real images and samples of both generators, ten classes with the same number of images each."""
    figure, panels = plt.subplots(1, len(images), figsize=(10, 4.6))
    for number, (axes, (name, shown)) in enumerate(zip(panels, images.items(), strict=True)):
        per_class = len(shown) // len(classes)
        rows = list(classes) if number == 0 else None
        title = "Training images" if number == 0 else f"{name[0].upper()}{name[1:]}, unselected"
        grid(axes, shown.reshape(len(classes), per_class, *shown.shape[1:]), rows, title=title)
    return figures.save(figure, path)


def draw_learning_curves(curves, path):
    """Learning curves of the four networks: dict from name to dict from metric to one value per epoch."""
    figure, panels = plt.subplots(2, 2, figsize=(10, 6.4))
    losses = {"diffusion": "mean squared error of the velocity", "gan": "hinge loss"}
    titles = {"judge_a": "Judge A", "judge_b": "Judge B", "diffusion": "Diffusion network", "gan": "GAN"}
    for axes, (name, values) in zip(panels.flat, curves.items(), strict=True):
        if name == "gan":
            pair, labels = (values["generator_loss"], values["discriminator_loss"]), ("generator", "discriminator")
        else:
            validation = "validation (solid),\naveraged weights" if name == "diffusion" else "validation (solid)"
            pair, labels = (values["loss"], values["val_loss"]), ("training (dashed)", validation)
        figures.learning_curves(axes, pair, labels)
        if name == "gan":
            for line, color in zip(axes.get_lines(), (figures.BLUE, figures.RED), strict=True):
                line.set(color=color, linestyle="-")
        axes.set(title=titles[name], ylabel=losses.get(name, "binary cross-entropy"))
        figures.label_lines(axes)
    return figures.save(figure, path)


def draw_interpolation(images, strengths, path):
    """The same noise with a mask of growing strength: images (rows, columns, height, width, 3)."""
    figure, axes = plt.subplots(figsize=(9, 0.5 + 8.6 * images.shape[0] / images.shape[1]))
    columns = [f"{strength:.2g}" for strength in strengths]
    grid(
        axes,
        images,
        columns=columns,
        title="Composition from the same noise: strength of the mask above each column",
    )
    return figures.save(figure, path)


def draw_experiments(table, path):
    """Scores of judge A, rows of the experiment table: one setting changed at a time, one point per seed."""
    methods = [method for method in ("composition", "collage", "learned") if (table["method"] == method).any()]
    counts = [table[table["method"] == method]["name"].nunique() for method in methods]
    figure, panels = plt.subplots(
        len(methods), 1, figsize=(8, 1.6 + 0.26 * sum(counts)), height_ratios=counts, sharex=True, squeeze=False
    )
    for axes, method in zip(panels[:, 0], methods, strict=True):
        groups = table[table["method"] == method].groupby("name", sort=False)["score"]
        values = {name.removeprefix(f"{method}, "): points.tolist() for name, points in groups}
        baseline = next(iter(values))
        noise = np.std(values[baseline], ddof=1) if len(values[baseline]) > 1 else None
        figures.experiments(axes, values, baseline, "mean score of judge A", noise)
        axes.set_title(f"{METHODS[method].split(' of ')[0]}, compared with the first row")
    for axes in panels[:-1, 0]:
        axes.set_xlabel("")
    return figures.save(figure, path)


# ------------------------------------------------------------------------------------------------ architecture diagrams


SMALL = {"ha": "center", "va": "center", "fontsize": 8, "color": figures.GREY}


def box(axes, x, y, text, color=figures.BLUE):
    frame = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color, "linewidth": 1.5}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame, zorder=2)


def arrow(axes, start, end, text="", place=(0, 0.06), color=figures.GREY):
    """An arrow between the centres of two boxes, drawn behind them, with a text beside its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-", color=color, linewidth=1.3, zorder=0))
    middle = [(a + b) / 2 for a, b in zip(start, end, strict=True)]
    direction = {"arrowstyle": "-|>", "color": color, "linewidth": 0, "mutation_scale": 14}
    nearer = [a + 0.56 * (b - a) for a, b in zip(start, end, strict=True)]
    axes.annotate("", nearer, middle, arrowprops=direction, zorder=0)
    if text:
        x, y = (a + b for a, b in zip(middle, place, strict=True))
        axes.text(x, y, text, **SMALL, zorder=1)


def chain(axes, texts, y, left, right, color=figures.BLUE):
    """A row of boxes joined by arrows; returns where they are."""
    places = np.linspace(left, right, len(texts))
    for x, text in zip(places, texts, strict=True):
        box(axes, x, y, text, color)
    for start, end in itertools.pairwise(places):
        arrow(axes, (start, y), (end, y))
    return places


def draw_network(widths, patch, blocks, path):
    """The U-Net of the diffusion model, one of its residual blocks, and how two predictions are mixed by a mask."""
    figure, axes = plt.subplots(figsize=(10, 9.2))
    sides = [32 // patch // 2**level for level in range(len(widths))]
    last, block = len(widths) - 1, "residual block" if blocks == 1 else f"{blocks} residual blocks"
    edge, inner, bottom = 2.4, 1.75, -1.5 * (len(widths) - 1)
    box(axes, 0, bottom, f"{sides[-1]} × {sides[-1]} × {widths[-1]}\nresidual block")
    conditioned = [(0, bottom)]
    for level, (side, filters) in enumerate(zip(sides, widths, strict=True)):
        y, beside = -1.5 * level, edge if level < last else inner
        for x in (-beside, beside):
            box(axes, x, y, f"{side} × {side} × {filters}\n{block}")
            conditioned.append((x, y))
        if level < last:
            arrow(axes, (-edge, y), (edge, y), "skip connections:\nconcatenation", (-1.42, -0.17))
            below = edge if level + 1 < last else inner
            arrow(axes, (-edge, y), (-below, y - 1.5), "average\npooling", (-0.45, 0))
            arrow(axes, (below, y - 1.5), (edge, y), "upsampling", (0.5, 0))
    arrow(axes, (-inner, bottom), (0, bottom))
    arrow(axes, (0, bottom), (inner, bottom))
    low = bottom - 0.55  # below the box in the middle
    axes.plot([-inner, -inner, inner, inner], [bottom, low, low, bottom], color=figures.GREY, linewidth=1.3, zorder=0)
    arrow(axes, (-inner, low), (inner, low), "skip connection", (-0.9, 0.1))
    box(axes, -edge, 1.5, "noisy image\n32 × 32 × 3", figures.GREEN)
    box(axes, edge, 1.5, "velocity\n32 × 32 × 3", figures.RED)
    arrow(axes, (-edge, 1.5), (-edge, 0), f"{patch} × {patch} pixels become\nchannels, convolution", (-0.75, 0))
    arrow(
        axes,
        (edge, 0),
        (edge, 1.5),
        f"group norm, ReLU, convolution,\nchannels become {patch} × {patch} pixels",
        (0.75, 0),
    )
    text = "condition: embedding of time (sines) + class\nembeddings, mixed by the weights of the classes"
    box(axes, 0, 1.5, text, figures.ORANGE)
    for place in conditioned:
        arrow(axes, (0, 1.5), place, color=figures.ORANGE)

    y = bottom - 1.7
    axes.text(-edge - 1.1, y + 0.75, "A residual block", fontsize=11)
    steps = [
        "input",
        "ReLU",
        "convolution\n3 × 3",
        "group norm, scale\nand shift, ReLU",
        "convolution\n3 × 3",
        "+",
    ]
    places = chain(axes, steps, y, -edge - 0.8, edge + 0.2)
    axes.plot([places[0], places[0], places[-1], places[-1]], [y, y - 0.5, y - 0.5, y], color=figures.GREY, zorder=0)
    axes.text(0, y - 0.62, "identity, or a 1 × 1 convolution where the width changes", **SMALL)
    box(axes, places[3], y + 0.75, "condition", figures.ORANGE)
    arrow(axes, (places[3], y + 0.75), (places[3], y), color=figures.ORANGE)

    y -= 1.8
    axes.text(-edge - 1.1, y + 0.85, "Guidance in space, at each step of sampling", fontsize=11)
    rows = {
        0.4: ("horse", "2 predictions: horse and no class", "1 − mask"),
        -0.4: ("wings", "2 predictions: bird or airplane, and no class", "mask"),
    }
    box(axes, -edge - 0.5, y, "noisy image", figures.GREEN)
    box(axes, edge, y, "velocity,\nmixed", figures.RED)
    for offset, (name, text, weight) in rows.items():
        box(axes, -0.25, y + offset, f"{text}\nextrapolated by the guidance weight of the {name}")
        arrow(axes, (-edge - 0.5, y), (-0.25, y + offset))
        arrow(
            axes,
            (-0.25, y + offset),
            (edge, y),
            f"× ({weight})" if "−" in weight else f"× {weight}",
            (0.4, 0.22 * np.sign(offset)),
        )
    axes.set(xlim=(-edge - 1.3, edge + 1.3), ylim=(y - 0.8, 2.0))
    axes.set_axis_off()
    axes.set_title("The diffusion network: a U-Net of residual blocks, conditioned on time and any mixture of classes")
    return figures.save(figure, path)


def draw_gan(widths, discriminator_widths, path):
    """Generator and projection discriminator of the GAN."""
    figure, axes = plt.subplots(figsize=(10, 7.6))
    steps = [
        "4 × 4 × " + str(widths[0]) + "\ndense",
        *(f"{8 * 2**level} × {8 * 2**level} × {filters}\nresidual block" for level, filters in enumerate(widths)),
    ]
    right = [
        f"32 × 32 × {discriminator_widths[0] // 2}\nconvolution",
        *(
            f"{16 // 2**level} × {16 // 2**level} × {filters}\nresidual block"
            for level, filters in enumerate(discriminator_widths)
        ),
    ]
    height, left, beside = 1.3, -2.0, 2.0
    box(axes, left, height, "noise and embedding\nof the classes", figures.GREEN)
    box(axes, beside, height, "real or generated image\n32 × 32 × 3, augmented", figures.GREEN)
    for number, text in enumerate(steps):
        box(axes, left, -height * number, text)
        label = "nearest upsampling" if number else ""
        arrow(axes, (left, height * (1 - number)), (left, -height * number), label, (-0.62, 0))
    for number, text in enumerate(right):
        box(axes, beside, -height * number, text)
        label = "average pooling" if number else ""
        arrow(axes, (beside, height * (1 - number)), (beside, -height * number), label, (0.55, 0))
    bottom = -height * len(steps)
    box(axes, left, bottom, "generated image\n32 × 32 × 3", figures.RED)
    arrow(axes, (left, bottom + height), (left, bottom), "convolution, tanh", (-0.6, 0))
    box(
        axes,
        beside,
        bottom,
        "score: dense layer of the summed features\n+ their dot product with the class embedding",
        figures.RED,
    )
    arrow(axes, (beside, bottom + height), (beside, bottom), "sum over\nspace", (0.4, 0))
    text = "conditional batch\nnormalisation:\nscale and shift of\nevery filter"
    box(axes, -0.35, -height * 1.5, text, figures.ORANGE)
    for number in range(1, len(steps)):
        arrow(axes, (-0.35, -height * 1.5), (left, -height * number), color=figures.ORANGE)
    arrow(axes, (left, height), (-0.35, -height * 1.5), color=figures.ORANGE)
    axes.text(left, height + 0.6, "Generator", ha="center", fontsize=11)
    axes.text(beside, height + 0.6, "Discriminator, spectral norm of every kernel 1", ha="center", fontsize=11)
    axes.set(xlim=(-3.4, 3.4), ylim=(bottom - 0.5, height + 0.85))
    axes.set_axis_off()
    axes.set_title("The GAN: both networks are conditioned on the weights of the classes")
    return figures.save(figure, path)
