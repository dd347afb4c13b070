"""The figures of task1_smallnorb_cnn.py. `pairs` are its `StereoPairs`; every function returns the path."""

import matplotlib.pyplot as plt
import numpy as np

from common import figures

POOR_ACCURACY = 0.9  # below which a test toy is marked
# From a metric of the experiments to the label of its axis and to the number that is shown.
SHOWN_METRICS = {
    "category_accuracy": ("category error\n(%)", lambda values: 100 * (1 - np.array(values))),
    "elevation_mae_degrees": ("elevation error\n(°)", np.array),
    "elevation_mae_degrees_background_repainted": ("with repainted\nbackground (°)", np.array),
}


def draw_samples(pairs, names, path):
    """Draws `pairs`, sorted by category, four of them a row, both views of each."""
    titles = [
        f"{view}, {degrees:.0f}°"
        for category, degrees in zip(pairs.category, pairs.elevation, strict=True)
        for view in (names[category], "right view")
    ]
    views = pairs.images.transpose(0, 3, 1, 2).reshape(-1, *pairs.images.shape[1:3])
    title = "Training toys as the two cameras see them, with the elevation of the cameras"
    return figures.save(figures.image_grid(views, 8, titles, title=title, width=8.0), path)


def draw_learning_curves(curves, held_out_curves, path):
    """Draws errors per epoch: of the saved network on its training set, and of networks with one fold held out.

    `curves` is a dict from metric to list, `held_out_curves` one from fold to such a dict, also with validation.
    """
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6))
    shown = (
        ("category_accuracy", "category error in %", lambda values: 100 * (1 - np.array(values))),
        ("elevation_mae", "elevation error (MAE) in degrees", np.array),
    )
    for panel, (metric, label, convert) in zip(axes, shown, strict=True):
        networks = {"saved network": curves} | {f"fold {fold}": each for fold, each in held_out_curves.items()}
        for color, (name, each) in zip(figures.COLORS, networks.items(), strict=False):
            pair = [convert(each[key]).tolist() if key in each else None for key in (metric, f"val_{metric}")]
            figures.learning_curves(panel, pair, color=color, name=name)
        panel.set(yscale="log", ylabel=label)
        panel.yaxis.set_major_formatter("{x:g}")
        if metric == "elevation_mae":  # less than two decades leave room for more numbers
            panel.yaxis.set_minor_formatter("{x:g}")
        figures.label_lines(panel)
    axes[0].set_title("Category: training (dashed) and validation (solid)")
    axes[1].set_title("Elevation")
    if held_out_curves:
        title = (
            "The saved network, trained on all folds, and plain CNNs with 32 filters, trained with one fold held out"
        )
        figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_confusion_matrix(counts, names, path):
    """Draws the confusion matrix of the categories of the test images."""
    figure, axes = plt.subplots(figsize=(5.6, 5.2))
    title = f"{np.trace(counts) / counts.sum():.2%} of {counts.sum():,} test images are right"
    figures.confusion_matrix(axes, counts, names, title)
    return figures.save(figure, path)


def draw_elevation(true, predicted, errors, path):
    """Draws the distribution of the predicted elevation for each true one, and the mean error of each category."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), width_ratios=(2, 1))
    degrees = np.unique(true)
    parts = left.violinplot(
        [predicted[true == each] for each in degrees], degrees, widths=4, showmedians=True, showextrema=False
    )
    parts["cmedians"].set_color(figures.BLACK)
    left.plot([27, 73], [27, 73], color=figures.GREY, linewidth=0.8, zorder=0)
    left.set(xlabel="true elevation in degrees", ylabel="predicted elevation in degrees", xlim=(27, 73))
    left.set_xticks(degrees)
    left.set_title("Predicted elevation of test images: distribution and median")
    bars = right.barh(list(errors), list(errors.values()), color=figures.BLUE)
    right.bar_label(bars, fmt="%.2f°", padding=3)
    right.set(xlabel="elevation error (MAE) in degrees", title="Error of each category")
    right.margins(x=0.15)
    right.grid(False)
    right.invert_yaxis()
    return figures.save(figure, path)


def draw_predictions(pairs, categories, elevations, names, path):
    """Draws the left views of test pairs with the truth and the prediction."""
    titles, colors = [], []
    for category, degrees, guess, elevation in zip(
        pairs.category, pairs.elevation, categories, elevations, strict=True
    ):
        titles.append(f"{names[category]}, {degrees:.0f}°\n→ {guess}, {elevation:.1f}°")
        colors.append(figures.BLACK if guess == names[category] else figures.RED)
    title = "Test images, the first ones in a random order: truth → prediction (left view of each pair)"
    return figures.save(figures.image_grid(pairs.images[..., 0], 8, titles, colors, title), path)


def draw_test_toys(images, accuracies, path):
    """Draws the left view of every test toy with its accuracy, {category: {instance: float}}; one category a row."""
    toys = [(f"{name} {toy}", share) for name, of_name in accuracies.items() for toy, share in of_name.items()]
    titles = [f"{toy}: {share:.1%}" for toy, share in toys]
    colors = [figures.RED if share < POOR_ACCURACY else figures.BLACK for _, share in toys]
    columns = max(len(of_name) for of_name in accuracies.values())
    title = f"Test toys, and the share of their images whose category is right (coloured: below {POOR_ACCURACY:.0%})"
    return figures.save(figures.image_grid(images[..., 0], columns, titles, colors, title, width=7.5), path)


def draw_mistakes(pairs, categories, confidences, names, path):
    """Draws pairs whose category is wrong: the left view with the truth, the right one with the prediction."""
    figure, axes = plt.subplots(4, 8, figsize=(10, 6))
    for panel in axes.flat:
        panel.set_axis_off()
    for number, (left, right) in enumerate(zip(axes.flat[::2], axes.flat[1::2], strict=True)):
        if number < len(categories):
            image, truth = pairs.images[number], f"{names[pairs.category[number]]} {pairs.instance[number]}"
            figures.show_image(left, image[..., 0], truth)
            prediction = f"{categories[number]}? {confidences[number]:.0%}"
            figures.show_image(right, image[..., 1], prediction, figures.RED)
    title = "The most confident mistakes, two per toy at most: truth (left view) and prediction (right view)"
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_shortcut(images, metrics, references, path):
    """Draws test images with other backgrounds, {kind: images}, and the elevation errors with and without them."""
    figure = plt.figure(figsize=(10, 4.2))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.6))
    axes = left.subplots(3, len(images))
    for column, (kind, versions) in zip(axes.T, images.items(), strict=True):
        for row, (panel, image) in enumerate(zip(column, versions, strict=True)):
            figures.show_image(panel, image[..., 0], kind if row == 0 else None)
    bars = {
        "predicting the mean": references["mean_elevation_mae_degrees"],
        "lookup on the background": references["background_lookup_mae_degrees"],
        "network, unmodified": metrics["elevation_mae_degrees"],
        "network, background shifted": metrics["elevation_mae_degrees_background_shifted"],
        "network, background repainted": metrics["elevation_mae_degrees_background_repainted"],
    }
    panel = right.subplots()
    drawn = panel.barh(list(bars), list(bars.values()), color=2 * [figures.GREY] + 3 * [figures.BLUE])
    panel.bar_label(drawn, fmt="%.2f°", padding=3)
    panel.margins(x=0.12)
    panel.invert_yaxis()
    panel.grid(False)
    panel.set(xlabel="elevation error (MAE) on test toys in degrees", title="With and without the background")
    return figures.save(figure, path)


def draw_experiments(values, path):
    """Draws every experiment with one point per fold. `values` is {metric: {experiment: one number per fold}}."""
    count = len(next(iter(values.values())))
    figure, axes = plt.subplots(1, len(SHOWN_METRICS), figsize=(8.5, 0.22 * count + 1.3), sharey=True)
    for panel, (metric, (label, convert)) in zip(axes, SHOWN_METRICS.items(), strict=True):
        shown = {name: convert(folds) for name, folds in values[metric].items()}
        figures.experiments(panel, shown, "baseline", label)
    title = "Each change from the baseline (grey line): one point per fold held out, and their mean"
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_every_fold(images, names, folds, values, path):
    """Draws the training toys, fold by fold, and the errors of three networks on each fold when it is held out.

    `images` are those of `folds` in turn, one per category; `values` as in `draw_experiments`.
    """
    figure = plt.figure(figsize=(12, 4.6))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.5))
    grid = left.subplots(len(folds), len(names))
    for number, (panel, image) in enumerate(zip(grid.flat, images, strict=True)):
        figures.show_image(panel, image[..., 0], names[number] if number < len(names) else None)
    for panel, fold in zip(grid[:, 0], folds, strict=True):
        panel.text(-0.1, 0.5, f"fold {fold}", transform=panel.transAxes, ha="right", va="center", fontsize=9)
    panels = right.subplots(1, len(SHOWN_METRICS), sharey=True)
    for panel, (metric, (label, convert)) in zip(panels, SHOWN_METRICS.items(), strict=True):
        for (name, errors), color, marker in zip(values[metric].items(), figures.COLORS, "osD", strict=False):
            panel.plot(convert(errors), range(len(errors)), marker, color=color, label=name, alpha=0.85)
        panel.set(xlabel=label, xlim=(0, 1.1 * panel.get_xlim()[1]))
        panel.grid(True, axis="both")
    panels[0].set_yticks(range(len(folds)), [f"fold {fold}" for fold in folds])
    panels[0].invert_yaxis()
    panels[0].set_title("Errors on each fold when it is held out")
    right.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figures.save(figure, path)
