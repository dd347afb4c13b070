"""The figures of cifar100_generator.py: what they alone need is selected and arranged here, all else is handed in."""

import matplotlib.pyplot as plt
import numpy as np

from common import figures

NUM_CLASSES = 100
SHOWN, PAIRS, BETWEEN, NEIGHBOURS = 64, 8, 9, 16  # unselected samples; interpolated pairs, images between; neighbours
FID = "FID (768-d) to held-out images"


def draw(compared, splits, card, generate, noise, classifier, folder):
    """Draws every figure into `folder` and returns their paths.

    Args:
        compared: dict, what `compare` in experiments/ returned; may be empty.
        splits: dict of `Split`, of which "train" and "valid" are shown.
        card: of the network.
        generate: function from noise and class weights to images.
        noise: standard normal noise (n, 32, 32, 3) and classes (n,), of at least 64 + 100 images.
        classifier: function from images to features and class probabilities, or None.
    """
    (noise, labels), one_hot = noise, np.eye(NUM_CLASSES + 1, dtype="float32")
    between, conditions = interpolations(noise, one_hot[labels])
    of_classes = noise[SHOWN : SHOWN + NUM_CLASSES]
    inputs = [noise[:SHOWN], of_classes, between], [one_hot[labels[:SHOWN]], one_hot[:NUM_CLASSES], conditions]
    images = generate(*(np.concatenate(parts) for parts in inputs))  # at once, as batches have a fixed size
    batch, classes, between = np.split(images, [SHOWN, SHOWN + NUM_CLASSES])
    rows = neighbours(batch, splits["train"].images, classifier)
    written = [
        draw_architecture(card, folder / "architecture.png"),
        draw_curves(card, folder / "curves.png"),
        draw_samples(batch, splits["valid"].images, folder / "samples.png"),
        draw_classes(classes, card["class_names"], folder / "classes.png"),
        draw_interpolations(between, folder / "interpolations.png"),
        draw_neighbours({name: images[:NEIGHBOURS] for name, images in rows.items()}, folder / "nearest.png"),
        draw_neighbours(rows, folder / "nearest_all.png"),
    ]
    if card["choices"]:
        written.append(draw_choices(card["choices"], card["sampling"], folder / "choices.png"))
    if card["scale"]:
        written.append(
            draw_scale(card["scale"] | {"samples": card["metrics"]["test"]["fid_768"]}, folder / "scale.png")
        )
    if compared:
        written.append(draw_experiments(compared, folder / "experiments.png"))
    return written


def interpolations(noise, conditions):
    """Returns noise and class weights between image i and image i + 8 of a batch: 8 rows of 9 images.

    The noise is interpolated on the sphere (Song, Meng & Ermon 2021, appendix D.5), the class weights linearly.
    """
    noises, weights = [], []
    for first, second in zip(range(PAIRS), range(PAIRS, 2 * PAIRS), strict=True):
        a, b = noise[first], noise[second]
        angle = np.arccos(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
        for share in np.linspace(0, 1, BETWEEN):
            noises.append((np.sin((1 - share) * angle) * a + np.sin(share * angle) * b) / np.sin(angle))
            weights.append((1 - share) * conditions[first] + share * conditions[second])
    return np.array(noises, "float32"), np.array(weights, "float32")


def show(axes, images, columns, title):
    """Shows images as one grid; faster than an axes for each."""
    figures.show_image(axes, figures.tiled(images, columns))
    axes.set_title(title)


def draw_samples(images, real, path):
    """The unselected batch beside real images that were held out."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 5.3))
    show(left, images, 8, f"The first {len(images)} samples, unselected, of random classes")
    show(right, real[: len(images)], 8, f"The first {len(images)} held-out images")
    return figures.save(figure, path)


def draw_classes(images, names, path):
    """One sample of every class, with its name."""
    titles = [name.replace("_", " ") for name in names]
    title = "The first sample of each of the 100 classes, unselected"
    return figures.save(figures.image_grid(images, 10, titles, title=title), path)


def draw_interpolations(images, path):
    """Interpolations of latent noise and class, beside pixelwise blends of their ends."""
    rows = images.reshape(PAIRS, BETWEEN, *images.shape[1:])
    share = np.linspace(0, 1, BETWEEN)[:, None, None, None]
    blends = np.rint((1 - share) * rows[:, :1] + share * rows[:, -1:]).astype("uint8")
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.8))
    show(left, images, BETWEEN, "Interpolation of noise and class: every image is sampled")
    show(right, blends.reshape(images.shape), BETWEEN, "For comparison: the same ends, blended pixel by pixel")
    return figures.save(figure, path)


def nearest(vectors, others):
    """Returns the index of the row of `others` (m, k) that each row of `vectors` (n, k) is nearest to."""
    vectors, squares = vectors.astype("float32"), []
    for start in range(0, len(others), 5000):
        part = others[start : start + 5000].astype("float32")
        squares.append(np.square(part).sum(axis=1) - 2 * vectors @ part.T)
    return np.concatenate(squares, axis=1).argmin(axis=1)


def neighbours(images, training, classifier):
    """Returns images and the training images they are most like: dict from what is shown to images (n, 32, 32, 3)."""
    flat = (each.reshape(len(each), -1) for each in (images, training))
    rows = {"sample": images, "nearest training image, pixels": training[nearest(*flat)]}
    if classifier:
        features = (classifier(each)[0] for each in (images, training))
        rows["nearest training image, features"] = training[nearest(*features)]
    return rows


def draw_neighbours(rows, path):
    """Samples above the training images they are most like, in blocks of `NEIGHBOURS` columns; see `neighbours`."""
    count = len(rows["sample"])
    blocks, height = count // NEIGHBOURS, rows["sample"].shape[1] + 2
    figure, panels = plt.subplots(blocks, 1, figsize=(10, (0.55 * len(rows) + 0.2) * blocks + 0.4), squeeze=False)
    for block, axes in enumerate(panels[:, 0]):
        part = slice(block * NEIGHBOURS, (block + 1) * NEIGHBOURS)
        figures.show_image(axes, figures.tiled(np.concatenate([images[part] for images in rows.values()]), NEIGHBOURS))
        for number, name in enumerate(rows):
            axes.text(-6, (number + 0.5) * height, name, ha="right", va="center", fontsize=9)
    panels[0, 0].set_title(f"The first {count} samples and the training images that are most like them")
    return figures.save(figure, path)


def draw_curves(card, path):
    """Loss over the optimisation steps, and FID where it was measured."""
    curves, over_time = card["curves"], [row for row in card["choices"] if row["varied"] == "training"]
    figure, panels = plt.subplots(1, 2 if over_time else 1, figsize=(11 if over_time else 7, 4), squeeze=False)
    left = panels[0, 0]
    left.plot(curves["step"], curves["train_loss"], "--", color=figures.BLUE, label="training")
    left.plot(curves["step"], curves["valid_loss"], color=figures.ORANGE, label="held out")
    left.set(xlabel="optimisation step", ylabel="weighted squared error of denoised images")
    # The first points, where the average is still young, would shrink the rest to one line.
    late = np.concatenate([curves[name][len(curves["step"]) // 20 :] for name in ("train_loss", "valid_loss")])
    left.set_ylim(late.min() - 0.1 * np.ptp(late) - 1e-3, late.max() + 0.1 * np.ptp(late) + 1e-3)
    restarts = [step for step in card["config"]["restarts"] if step < curves["step"][-1]]
    for number, step in enumerate(restarts):
        label = "" if number else "restart, higher noise levels"
        left.axvline(step, color=figures.GREY, linestyle=":", label=label)
    left.legend(loc="upper right")
    left.set_title(f"Averaged weights (momentum {card['config']['averages'][0]:g}), fixed noise")
    left.xaxis.set_major_formatter("{x:,.0f}")
    if over_time:
        right = panels[0, 1]
        right.plot([row["step"] for row in over_time], [row["fid_768"] for row in over_time], "o-", color=figures.BLUE)
        right.set(xlabel="optimisation step", ylabel=FID, ylim=(0, None))
        right.set_title("FID over training, 1,000 samples each")
        right.xaxis.set_major_formatter("{x:,.0f}")
    return figures.save(figure, path)


def draw_choices(choices, chosen, path):
    """FID and class agreement against guidance, and FID against steps of the sampler; `chosen` is marked."""
    rows_of = {}
    for row in choices:
        rows_of.setdefault(row["varied"], []).append(row)
    panels_of = [("guidance", "fid_768", FID), ("guidance", "class_agreement", "class agreement")]
    panels_of = [
        panel for panel in [*panels_of, ("steps", "fid_768", FID)] if panel[1] in rows_of.get(panel[0], [{}])[0]
    ]
    figure, panels = plt.subplots(1, len(panels_of), figsize=(4 * len(panels_of), 3.8), squeeze=False)
    for panel, (varied, metric, label) in zip(panels[0], panels_of, strict=True):
        rows = rows_of[varied]
        points = [row[varied] for row in rows], [row[metric] for row in rows]
        panel.plot(*points, "o-", color=figures.BLUE, label=interval_of(rows[0]))
        marked = zip(rows_of.get("interval", []), "s^", (figures.ORANGE, figures.GREEN), strict=False)
        for row, marker, color in marked if varied == "guidance" else ():
            panel.plot(row[varied], row[metric], marker, color=color, label=interval_of(row))
        panel.set(xlabel=varied if varied == "guidance" else "steps of the sampler", ylabel=label, ylim=(0, None))
        panel.set_xticks(points[0], [f"{place:g}" for place in points[0]])
        panel.axvline(chosen[varied], color=figures.GREY, linestyle=":", zorder=0, label="chosen")
    panels[0, 0].legend(title="guidance at noise levels", loc="lower left")
    figure.suptitle("1,000 samples against held-out images: the weakest guidance near the lowest FID was chosen")
    return figures.save(figure, path)


def interval_of(row):
    everywhere = row["low"] < 0.002 and row["high"] > 80
    return "all" if everywhere else f"{row['low']:g} to {row['high']:g}"


def draw_scale(values, path):
    """FID of "samples" beside that of images that are not generated: dict from what they are to float."""
    values = dict(sorted(values.items(), key=lambda item: item[1]))
    figure, axes = plt.subplots(figsize=(8, 0.45 * len(values) + 1.1))
    colors = [figures.ORANGE if name == "samples" else figures.BLUE for name in values]
    axes.scatter(list(values.values()), range(len(values)), color=colors, s=60, zorder=2)
    for place, value in enumerate(values.values()):
        axes.text(value, place, f"   {value:.3f}", va="center")
    axes.set_yticks(range(len(values)), list(values))
    axes.set(ylim=(len(values) - 0.4, -0.6), xscale="log", xlabel="FID (768-d) to the 10,000 test images (log scale)")
    axes.set_xlim(min(values.values()) / 1.5, max(values.values()) * 2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(True, axis="x")
    axes.set_title("Samples (orange) on the scale of images that are not generated")
    return figures.save(figure, path)


def draw_architecture(card, path):
    """The U-Net: blocks of each resolution, skip connections, and where noise level and class enter."""
    config, count = card["config"], card["parameters"]["trainable"]
    widths, blocks, last = config["widths"], config["blocks"], len(config["widths"]) - 1
    figure, axes = plt.subplots(figsize=(10, 4.6))

    def box(x, y, text, color=figures.BLUE):
        frame = {"boxstyle": "round,pad=0.5", "facecolor": "white", "edgecolor": color, "linewidth": 1.5}
        return axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=frame)

    def connect(start, end, text="", shift=(0, 0), **style):
        ends = {"patchA": start.get_bbox_patch(), "patchB": end.get_bbox_patch(), "shrinkA": 0, "shrinkB": 1}
        arrow = {"arrowstyle": "->", "color": figures.GREY} | ends | style
        axes.annotate("", end.get_position(), start.get_position(), arrowprops=arrow, zorder=0)
        places = zip(start.get_position(), end.get_position(), shift, strict=True)
        middle = [(a + b) / 2 + more for a, b, more in places]
        axes.text(*middle, text, ha="center", va="center", fontsize=8, color=figures.GREY)

    side, edge, down, up = 32 // config["patch"], last + 0.9, [], []
    for level, (width, number) in enumerate(zip(widths, blocks, strict=True)):
        size, x, y = side // 2**level, edge - level, -1.35 * level
        text = f"{size} × {size} × {width}\n{number} residual block{'s' if number > 1 else ''}"
        text += "\nself-attention" if size == config["attention"] else ""
        down.append(box(-x, y, text))
        up.append(box(x, y, text))
        connect(down[-1], up[-1], "" if level else "skip connections: 1 × 1 convolution, added", (0, -0.14))
        if level:
            connect(down[-2], down[-1], "2 × 2 convolution,\nstride 2", (-0.75, 0))
            connect(up[-1], up[-2], "1 × 1 convolution,\nnearest-neighbour upsampling", (1, 0))
    first = box(-edge, 1.4, "scaled noisy image, 32 × 32 × 3", figures.GREEN)
    last_box = box(edge, 1.4, "F, 32 × 32 × 3: with the noisy image,\nit makes the denoised one", figures.RED)
    condition = box(
        0, 1.4, "noise level (sines) and class (embedding):\nscale and shift in every block", figures.ORANGE
    )
    for block in (down[0], up[0]):
        connect(condition, block, color=figures.ORANGE, linestyle="--")
    squares = "2 × 2 pixels become channels,\n" if config["patch"] == 2 else ""
    connect(first, down[0], f"{squares}3 × 3 convolution", (-0.8, 0))
    back = "3 × 3 convolution" + (",\nchannels become 2 × 2 pixels" if squares else "")
    connect(up[0], last_box, back, (0.8, 0))
    axes.set(xlim=(-edge - 1.5, edge + 1.5), ylim=(-1.35 * last - 0.6, 1.9))
    axes.set_axis_off()
    axes.set_title(f"A U-Net with {count:,} parameters")
    figure.canvas.draw()  # boxes have a size from now on, at which arrows end
    return figures.save(figure, path)


def draw_experiments(compared, path):
    """Held-out loss of every variant of the training."""
    figure, axes = plt.subplots(figsize=(9, 0.33 * len(compared) + 1.3))
    values = {name: found["values"] for name, found in compared.items()}
    noise = compared["baseline"]["noise"] if "baseline" in compared else None
    figures.experiments(axes, values, "baseline", "weighted squared error of denoised held-out images", noise)
    axes.set_title("Lower is better. One point per seed; shaded: standard deviation of the baseline")
    return figures.save(figure, path)
