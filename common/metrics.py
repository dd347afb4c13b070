"""Metrics that Keras and scikit-learn lack: the spread of seeds, and distances between two sets of images."""

import math

import numpy as np
from scipy.spatial.distance import pdist
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, top_k_accuracy_score

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 50, 1000


def standard_deviation(values):
    """Returns the sample standard deviation of a few results, 0 for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def classification_metrics(probabilities, labels):
    """Returns accuracy, top-5 accuracy, log loss and calibration error of probabilities (n, classes): dict of float.

    The calibration error is the mean gap between confidence and accuracy (Guo et al. 2017, section 2).
    """
    classes = np.arange(probabilities.shape[1])
    probabilities = probabilities.astype("float64")
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    confidence, accuracy = reliability(probabilities, labels)
    return {
        "accuracy": float((probabilities.argmax(1) == labels).mean()),
        "top_5_accuracy": float(top_k_accuracy_score(labels, probabilities, k=5, labels=classes)),
        "log_loss": float(log_loss(labels, probabilities, labels=classes)),
        "calibration_error": float(np.abs(confidence - accuracy).mean()),
    }


def reliability(probabilities, labels, bins=10):
    """Returns mean confidence and accuracy of `bins` groups of equal size, by confidence: float (bins,) each."""
    right = probabilities.argmax(1) == labels
    accuracy, confidence = calibration_curve(right, probabilities.max(1), n_bins=bins, strategy="quantile")
    return confidence, accuracy


def most_probable(probabilities, class_names, count=5):
    """Returns text such as "cat 93%, dog 4%": the `count` most probable classes of `probabilities` (classes,)."""
    return ", ".join(f"{class_names[each]} {probabilities[each]:.0%}" for each in np.argsort(-probabilities)[:count])


def confident_mistakes(probabilities, labels, count):
    """Returns the indices of at most `count` misclassified examples, the most confident first."""
    wrong = np.flatnonzero(probabilities.argmax(1) != labels)
    return wrong[np.argsort(-probabilities[wrong].max(1), kind="stable")[:count]]


def frechet_distance(first, second):
    """Fréchet distance between normal distributions with the means and covariances of two sets of features.

    With the features of an Inception network it is known as FID (Heusel et al. 2017, section 2). It is biased upwards
    for few images, so compare sets of equal size. The sets are (n, features) and (m, features), n and m above 1.
    """
    first, second = _checked(first, second)
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    first_covariance, second_covariance = (np.atleast_2d(covariance) for covariance in covariances)
    # The trace of the square root of the product of both, from a symmetric matrix with the same eigenvalues.
    values, vectors = np.linalg.eigh(first_covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ second_covariance @ root)
    trace = np.trace(first_covariance) + np.trace(second_covariance) - 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return max(float(difference @ difference + trace), 0.0)


def kernel_distance(first, second):
    """Squared maximum mean discrepancy of two sets of features under the kernel (x · y / features + 1)³.

    Known as KID (Bińkowski et al. 2018, section 4): unbiased, so that it may be slightly negative, and the mean over
    random subsets of 1,000, or of as many as there are. Arguments as `frechet_distance`.
    """
    first, second = _checked(first, second)
    generator = np.random.default_rng(0)
    size = min(KERNEL_SUBSET_SIZE, len(first), len(second))

    def kernel(a, b):
        similarity = a @ b.T / a.shape[1] + 1
        return similarity * similarity * similarity  # ten times as fast as a power

    def without_diagonal(matrix):
        return (matrix.sum() - np.trace(matrix)) / (size * (size - 1))

    values = []
    for _ in range(KERNEL_SUBSETS):
        a, b = (features[generator.permutation(len(features))[:size]] for features in (first, second))
        values.append(without_diagonal(kernel(a, a)) + without_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean())
    return float(np.mean(values))


def nearest_neighbours(images, training_images):
    """Finds the training image that each image is most like, pixel by pixel; both are uint8 (n or m, ...).

    Returns the root mean squared difference in grey levels, float (n,), and the index of the training image, int (n,).
    """
    training = training_images.reshape(len(training_images), -1).astype("float32")
    squares = np.sum(np.square(training), axis=1)
    distance, index = np.empty(len(images)), np.empty(len(images), int)
    for start in range(0, len(images), 500):
        chunk = images[start : start + 500].reshape(-1, training.shape[1]).astype("float32")
        index[start : start + 500] = nearest = (squares - 2 * chunk @ training.T).argmin(1)
        # Measured again at the nearest one: the short formula above cancels where two images are almost the same.
        distance[start : start + 500] = np.sqrt(np.mean(np.square(chunk - training[nearest]), axis=1))
    return distance, index


def mean_distance(images):
    """Returns the mean root mean squared difference between any two images, uint8 (n, ...), in grey levels."""
    return float(pdist(images.reshape(len(images), -1)).mean() / math.sqrt(images[0].size))


def _checked(first, second):
    first, second = np.asarray(first, "float64"), np.asarray(second, "float64")
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"features of shapes {first.shape} and {second.shape} cannot be compared")
    return first, second
