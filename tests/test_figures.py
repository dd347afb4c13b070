import matplotlib.pyplot as plt
import numpy as np
import pytest

from common import figures


def test_save_writes_200_dpi_and_closes(tmp_path):
    figure = plt.figure(figsize=(2, 1))
    path = figures.save(figure, tmp_path / "a" / "figure.png")
    assert plt.imread(path).shape[:2] == (200, 400)
    assert not plt.fignum_exists(figure.number)


def test_labels_of_lines_keep_apart():
    _, axes = plt.subplots()
    for number in range(3):
        axes.plot([0, 1], [0, 1 + number / 1000], label=f"line {number}")
    axes.plot([0, 1], [1, 0], label="_hidden")
    figures.label_lines(axes)
    heights = [text.xy[1] for text in axes.texts]
    assert [text.get_text() for text in axes.texts] == ["line 0", "line 1", "line 2"]
    assert np.diff(heights).min() > 0.05
    plt.close("all")


def test_labels_of_lines_stay_at_their_ends_where_the_scale_is_small():
    _, axes = plt.subplots()
    for number in range(2):
        axes.plot([0, 1], [0.5, 0.1 + number / 1000], label=f"line {number}")
    figures.label_lines(axes)
    assert [text.xy[1] for text in axes.texts] == pytest.approx([0.1, 0.122], abs=0.01)
    plt.close("all")


def test_labels_of_lines_keep_apart_on_a_log_axis():
    _, axes = plt.subplots()
    axes.set_yscale("log")
    for number in range(3):
        axes.plot([0, 1], [100, 1 + number / 1000], label=f"line {number}")
    figures.label_lines(axes)
    pixels = [axes.transData.transform(text.xy)[1] for text in axes.texts]
    assert np.diff(pixels).min() > 8
    plt.close("all")


def test_confusion_matrix_shows_shares_and_counts():
    _, axes = plt.subplots()
    figures.confusion_matrix(axes, np.array([[3, 1], [0, 2]]), ["cat", "dog"], "title")
    assert [text.get_text() for text in axes.texts] == ["75.0%\n3", "25.0%\n1", "0.0%\n0", "100.0%\n2"]
    plt.close("all")


def test_confusion_matrix_of_many_classes_shows_counts_of_what_occurs():
    _, axes = plt.subplots()
    figures.confusion_matrix(axes, np.eye(20, dtype=int) * 5, range(20), "title", ("true digit", "predicted digit"))
    assert [text.get_text() for text in axes.texts] == ["5"] * 20
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true digit", "predicted digit")
    plt.close("all")


def test_image_grid_shows_every_image_with_its_title():
    images = np.zeros((5, 8, 8, 3), np.uint8)
    figure = figures.image_grid(images, 3, list("abcde"), [figures.RED] * 5, "five")
    panels = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in panels] == list("abcde")
    assert panels[0].title.get_color() == figures.RED
    assert not figure.axes[5].axison
    plt.close("all")


def test_experiments_show_every_seed_and_the_noise_around_the_baseline():
    _, axes = plt.subplots()
    figures.experiments(axes, {"baseline": [0.8, 0.9], "wider": [0.95]}, "baseline", "accuracy", noise=0.07)
    assert [len(points.get_offsets()) for points in axes.collections] == [2, 1, 1, 1]
    assert axes.lines[0].get_xdata()[0] == np.mean([0.8, 0.9])
    assert len(axes.patches) == 1  # the shaded noise
    assert [label.get_text() for label in axes.get_yticklabels()] == ["baseline", "wider"]
    plt.close("all")


def test_learning_curves_label_training_and_validation_of_one_network():
    _, axes = plt.subplots()
    figures.learning_curves(axes, ([3.0, 2.0, 1.0], [3.0, 2.5, 2.4]), name="CNN")
    assert [line.get_label() for line in axes.lines] == ["CNN, training", "CNN, validation"]
    assert axes.lines[0].get_xdata().tolist() == [1, 2, 3]
    plt.close("all")


def test_show_image_uses_the_whole_grey_range():
    _, axes = plt.subplots()
    figures.show_image(axes, np.full((4, 4), 100, np.uint8), "grey")
    assert axes.images[0].get_clim() == (0, 255)
    assert axes.get_title() == "grey"
    plt.close("all")


def test_tiled_images_keep_their_order():
    images = np.arange(3, dtype="uint8")[:, None, None, None] * np.ones((1, 2, 2, 3), "uint8")
    shown = figures.tiled(images, 2)
    assert shown.shape == (8, 8, 3)
    assert [shown[1, 1, 0], shown[1, 5, 0], shown[5, 1, 0], shown[5, 5, 0]] == [0, 1, 2, 255]
    assert (shown[[0, 3, 4, 7]] == 255).all()
