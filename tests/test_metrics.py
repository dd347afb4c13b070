"""Spreads and distances that are known."""

import numpy as np
import pytest

from common import metrics

GENERATOR = np.random.default_rng(0)


def test_standard_deviation_is_that_of_a_sample():
    assert metrics.standard_deviation([1.0, 3.0]) == pytest.approx(2**0.5)
    assert metrics.standard_deviation([4.0]) == 0


def test_frechet_distance_of_a_set_from_itself_is_zero():
    features = GENERATOR.normal(size=(200, 12)) @ GENERATOR.normal(size=(12, 12))
    assert metrics.frechet_distance(features, features) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_a_shift_is_its_square():
    features = GENERATOR.normal(size=(200, 3))
    assert metrics.frechet_distance(features, features + np.array([1.0, 2.0, 2.0])) == pytest.approx(9)


def test_frechet_distance_of_a_stretch():
    features = GENERATOR.normal(size=(200, 4))
    features = (features - features.mean(axis=0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(features, rowvar=False)).T)
    # Covariances 1 and 9 along each of four axes: 4 (1 + 9 - 2 · 3).
    assert metrics.frechet_distance(features, 3 * features) == pytest.approx(16)


def test_frechet_distance_is_symmetric_and_works_with_fewer_images_than_features():
    first, second = GENERATOR.normal(size=(10, 30)), GENERATOR.normal(size=(20, 30)) * 2
    distance = metrics.frechet_distance(first, second)
    assert distance == pytest.approx(metrics.frechet_distance(second, first))
    assert distance > 1


def test_kernel_distance_is_zero_for_the_same_distribution_and_grows_with_the_shift():
    first, second = GENERATOR.normal(size=(2, 3000, 5))
    near, far, farther = (metrics.kernel_distance(first, second + shift) for shift in (0.0, 0.5, 1.0))
    assert abs(near) < 0.01
    assert 10 * abs(near) < far < farther


def test_kernel_distance_by_hand():
    first, second = np.array([[1.0], [2.0]]), np.array([[0.0], [3.0]])
    # Kernels (x y + 1)³: 27 within the first set, 1 within the second, and 1, 64, 1, 343 between them.
    assert metrics.kernel_distance(first, second) == pytest.approx(27 + 1 - 2 * (1 + 64 + 1 + 343) / 4)


@pytest.mark.parametrize("shapes", [((5, 3), (5, 4)), ((1, 3), (5, 3)), ((5,), (5, 3))])
def test_sets_that_cannot_be_compared(shapes):
    for distance in (metrics.frechet_distance, metrics.kernel_distance):
        with pytest.raises(ValueError, match="cannot be compared"):
            distance(*(np.zeros(shape) for shape in shapes))


def test_nearest_neighbours_are_found_and_their_distance_does_not_round():
    training_images = GENERATOR.integers(0, 256, (40, 6, 6), dtype=np.uint8)
    images = training_images[[7, 3]].copy()
    images[1, 0, 0] ^= 1  # one grey level off in one of 36 pixels
    distance, index = metrics.nearest_neighbours(images, training_images)
    assert index.tolist() == [7, 3]
    assert distance == pytest.approx([0, (1 / 36) ** 0.5])


def test_the_mean_distance_of_images():
    images = np.stack([np.full((2, 2, 3), value, "uint8") for value in (0, 10, 30)])
    assert metrics.mean_distance(images) == pytest.approx((10 + 20 + 30) / 3)


def test_classification_metrics_of_a_known_case():
    probabilities = np.full((20, 100), 0.5 / 99)
    labels = np.arange(20)
    probabilities[labels, labels] = 0.5
    probabilities[:, 99] += 1e-6
    labels[10:] = 98  # wrong, but as probable as all others
    measured = metrics.classification_metrics(probabilities, labels)
    assert measured["accuracy"] == 0.5
    assert measured["log_loss"] == pytest.approx((np.log(2) + np.log(99 / 0.5)) / 2, abs=1e-4)
    assert measured["calibration_error"] == pytest.approx(0, abs=1e-4)
    assert metrics.confident_mistakes(probabilities, labels, 3).tolist() == [10, 11, 12]
