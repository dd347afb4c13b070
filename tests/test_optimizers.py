"""Muon and the constraint of the spectral norm, checked against their definitions by singular values."""

import keras
import numpy as np
import pytest

from common.optimizers import Muon, UnitSpectralNorm, orthogonalize


@pytest.mark.parametrize("shape", [(3, 3, 4, 16), (3, 3, 2, 32)])
def test_orthogonalised_kernels_have_singular_values_near_1(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype("float32") * 7
    update = keras.ops.convert_to_numpy(orthogonalize(kernel))
    assert update.shape == shape
    values = np.linalg.svd(update.reshape(-1, shape[-1]), compute_uv=False)
    assert values.min() > 0.5
    assert values.max() < 1.3
    left, expected, right = np.linalg.svd(kernel.reshape(-1, shape[-1]), full_matrices=False)
    expected /= np.sqrt(np.sum(expected**2))
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    np.testing.assert_allclose(update.reshape(-1, shape[-1]), left * expected @ right, atol=1e-4)


def test_kernels_keep_their_length_and_other_weights_follow_adam():
    layer = keras.layers.Conv2D(8, 3)
    layer.build((None, 8, 8, 4))
    kernel, bias = layer.get_weights()
    optimizer, adam = Muon(0.1), keras.optimizers.Adam(0.1 * Muon.adam_share)
    gradients = [keras.ops.ones(variable.shape) for variable in layer.trainable_variables]
    optimizer.apply(gradients, layer.trainable_variables)
    kernel_after, bias_after = layer.get_weights()
    same_bias = keras.Variable(bias)
    adam.apply([gradients[1]], [same_bias])
    np.testing.assert_allclose(bias_after, same_bias.numpy(), rtol=1e-6)
    # A step of length at most 0.1 per singular value from a kernel of length sqrt(8): it goes down, and a little only.
    change = kernel_after - kernel * np.sqrt(8) / np.linalg.norm(kernel)
    assert 0 < np.linalg.norm(change) < 0.1 * np.sqrt(8) * 1.3
    assert np.sum(change) < 0


@pytest.mark.parametrize("shape", [(3, 3, 16, 24), (40, 7), (12, 1)])
def test_kernels_get_a_spectral_norm_close_to_1(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype("float32")
    bounded = keras.ops.convert_to_numpy(UnitSpectralNorm()(kernel)).reshape(-1, shape[-1])
    # Power iteration approaches the largest singular value from below; random kernels have many that are close to it.
    assert 1 - 1e-4 < np.linalg.norm(bounded, 2) < 1.15
    assert np.allclose(bounded / np.linalg.norm(bounded), kernel.reshape(bounded.shape) / np.linalg.norm(kernel))
