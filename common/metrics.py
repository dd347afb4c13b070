"""Metrics that Keras and scikit-learn do not have: the spread of seeds, and how far two sets of pictures are apart."""

import numpy as np

KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = 50, 1000


def standard_deviation(values):
    """Estimates how far apart seeds are from the results of a few (list of float): float, 0 for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def frechet_distance(first, second):
    """The Fréchet distance between two normal distributions with the means and covariances of two sets of features.

    With the features of an Inception network it is known as FID (Heusel et al. 2017, section 2). Few pictures make it
    too large, so compare sets of equal size.

    Args:
        first, second: (n, features) and (m, features), at least two rows each.

    Returns:
        float, 0 or more.

    Raises:
        ValueError: where the sets have different features or fewer than two rows.
    """
    first, second = _checked(first, second)
    difference = first.mean(axis=0) - second.mean(axis=0)
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    first_covariance, second_covariance = (np.atleast_2d(covariance) for covariance in covariances)
    # The trace of the root of the product of both, by way of a symmetric matrix with the same eigenvalues.
    values, vectors = np.linalg.eigh(first_covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ second_covariance @ root)
    trace = np.trace(first_covariance) + np.trace(second_covariance) - 2 * np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return max(float(difference @ difference + trace), 0.0)


def kernel_distance(first, second, seed=0):
    """The squared maximum mean discrepancy of two sets of features under the kernel (x · y / features + 1)³.

    Known as KID (Bińkowski et al. 2018, section 4): unbiased, so that it may be slightly negative, and the mean over
    subsets of 1,000, or of as many as there are.

    Args:
        first, second: (n, features) and (m, features), at least two rows each.
        seed: int, of the subsets.

    Returns:
        float.

    Raises:
        ValueError: where the sets have different features or fewer than two rows.
    """
    first, second = _checked(first, second)
    generator = np.random.default_rng(seed)
    size = min(KERNEL_SUBSET_SIZE, len(first), len(second))

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def without_diagonal(matrix):
        return (matrix.sum() - np.trace(matrix)) / (size * (size - 1))

    values = []
    for _ in range(KERNEL_SUBSETS):
        a, b = (features[generator.permutation(len(features))[:size]] for features in (first, second))
        values.append(without_diagonal(kernel(a, a)) + without_diagonal(kernel(b, b)) - 2 * kernel(a, b).mean())
    return float(np.mean(values))


def _checked(first, second):
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"features of shapes {first.shape} and {second.shape} cannot be compared")
    return first, second
