"""The figures of addnist_classifier.py."""

from matplotlib import pyplot as plt

from common import figures

MODEL_COLORS = {"shared": figures.BLUE, "ordinary": figures.ORANGE}
CHANNEL_NAMES = ("red", "green", "blue")


def as_rgb(image, channel=None):
    """(3, 28, 28) to (28, 28, 3), with black in place of the other channels where one is named."""
    image = image.copy()
    for other in range(3):
        if channel not in (None, other):
            image[other] = 0
    return image.transpose(1, 2, 0)


def draw_samples(images, labels, digits, path):
    """Items as the network sees them, and below each its three channels.

    `images` are uint8 (n, 3, 28, 28), `labels` (n,), `digits` (n, 3) or None.
    """
    figure, axes = plt.subplots(4, len(images), figsize=(10, 4.7))
    for column, image in enumerate(images):
        figures.show_image(axes[0, column], as_rgb(image), f"class {labels[column]}")
        for channel, name in enumerate(CHANNEL_NAMES):
            title = name if digits is None else f"{name} {digits[column][channel]}"
            figures.show_image(axes[1 + channel, column], as_rgb(image, channel), title)
    figure.suptitle("Training items and their channels: class = red + green + blue - 1", x=0.01, ha="left")
    return figures.save(figure, path)


def draw_curves(curves, path):
    """Accuracy and loss over the steps; `curves` is a dict from network to the curves of its card."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    styles = {"train_accuracy": ":", "valid_accuracy": "--", "test_accuracy": "-"}
    for model, of_model in curves.items():
        for (name, style), part in zip(styles.items(), ("training", "validation", "test"), strict=True):
            color, label = MODEL_COLORS[model], f"{model}, {part}"
            left.plot(of_model["step"], of_model[name], style, color=color, label=label)
        right.plot(of_model["step"], of_model["loss"], color=MODEL_COLORS[model], label=model)
    left.set(xlabel="optimisation step", ylabel="accuracy", ylim=(0.8, 1))
    left.yaxis.set_major_formatter("{x:.0%}")
    left.legend(loc="lower right")
    left.set_title("Accuracy of the averaged weights")
    right.set(xlabel="optimisation step", ylabel="cross-entropy of the augmented training items", yscale="log")
    figures.label_lines(right)
    right.set_title("Training loss")
    return figures.save(figure, path)


def draw_confusion(counts, model, path):
    """Confusion matrix of the classes; `counts` is int (20, 20)."""
    figure, axes = plt.subplots(figsize=(7.5, 7.5))
    correct = counts.trace() / counts.sum()
    title = f"{model.capitalize()} network: {correct:.2%} of the test items correct"
    figures.confusion_matrix(axes, counts, range(20), title)
    return figures.save(figure, path)


def draw_mistakes(images, labels, predicted, digits, path):
    """Mistakes: items, uint8 (n, 3, 28, 28), their classes, predicted ones, and digits (n, 3) or None."""
    figure, axes = plt.subplots(2, 10, figsize=(10, 3))
    for panel in axes.flat:
        panel.set_axis_off()
    for number, (panel, image) in enumerate(zip(axes.flat, images, strict=False)):
        sums = "" if digits is None else " + ".join(map(str, digits[number])) + "\n"
        figures.show_image(panel, as_rgb(image), f"{sums}{labels[number]}, not {predicted[number]}", figures.RED)
    figure.suptitle("The most confident mistakes on test items: digits, true class, predicted class", x=0.01, ha="left")
    return figures.save(figure, path)


def draw_digits(counts, path):
    """Confusion matrix of the digits that the shared network sees in single channels; `counts` is int (10, 10)."""
    figure, axes = plt.subplots(figsize=(6, 6))
    correct = counts.trace() / counts.sum()
    title = f"{correct:.2%} of the digits are recognised, without a label of any"
    figures.confusion_matrix(
        axes, counts, list(range(len(counts))), title, ("digit in the channel", "digit recognised")
    )
    return figures.save(figure, path)


def draw_scaling(compared, path):
    """Validation accuracy against the number of parameters and of steps.

    `compared` is what `compare_experiments` of the script returns.
    """
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    sizes = {"parameters": ("widths", "Filters of the encoders varied"), "steps": ("steps", "Training steps varied")}
    for panel, (column, (field, title)) in zip(panels, sizes.items(), strict=True):
        for model, color in MODEL_COLORS.items():
            of_model = [found for name, found in compared.items() if name.startswith(f"{model}, ")]
            alone = [found for found in of_model if found["changed"] in ([], [field])]
            points = sorted((found[column], found["valid_accuracy"]) for found in alone)
            if points:
                panel.plot(*zip(*points, strict=True), "o-", color=color, label=model)
        panel.set(xscale="log", xlabel="parameters" if column == "parameters" else "optimisation steps", title=title)
        panel.yaxis.set_major_formatter("{x:.0%}")
        panel.legend(loc="lower right")
    panels[0].set_ylabel("validation accuracy")
    return figures.save(figure, path)


def draw_experiments(compared, path):
    """What each part is worth: validation accuracy of the variants that do not vary filters or steps alone."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 3.6))
    for panel, model in zip(panels, MODEL_COLORS, strict=True):
        of_model = {name.partition(", ")[2]: found for name, found in compared.items() if name.startswith(f"{model}, ")}
        values = {
            n: found["values"] for n, found in of_model.items() if found["changed"] not in (["widths"], ["steps"])
        }
        noise = of_model["baseline"]["noise"] if "baseline" in of_model else None
        figures.experiments(panel, values, "baseline", "validation accuracy", noise, percent=True)
        panel.set_title(f"{model.capitalize()} network")
    return figures.save(figure, path)
