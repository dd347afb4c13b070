import matplotlib.pyplot as plt
import numpy as np

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


def test_picture_uses_the_whole_grey_range():
    _, axes = plt.subplots()
    figures.picture(axes, np.full((4, 4), 100, np.uint8), "grey")
    assert axes.images[0].get_clim() == (0, 255)
    assert axes.get_title() == "grey"
    plt.close("all")
