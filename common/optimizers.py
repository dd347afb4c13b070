"""What Keras lacks for optimisation: Muon for the kernels of convolutions, and a constraint of their spectral norm."""

import math

import keras
import numpy as np
from keras import ops


class Muon(keras.optimizers.Adam):
    """Momentum with orthogonal updates for the kernels of convolutions, Adam for all other weights.

    Jordan et al., "Muon: an optimizer for hidden layers" (2024); Keras' own leaves out kernels of four dimensions. The
    kernels must be followed by normalisation: their length is kept at the root of the number of filters, so that the
    learning rate is relative to it.
    """

    momentum, adam_share = 0.6, 0.02  # the second one is the learning rate of Adam relative to that of the kernels

    def update_step(self, gradient, variable, learning_rate):
        if len(variable.shape) != 4:
            super().update_step(gradient, variable, learning_rate * self.adam_share)
            return
        momentum = self._momentums[self._get_variable_index(variable)]
        self.assign(momentum, self.momentum * momentum + gradient)
        update = orthogonalize(gradient + self.momentum * momentum)
        length = ops.sqrt(ops.sum(ops.square(variable)))
        scale = math.sqrt(variable.shape[-1]) / length
        self.assign(variable, scale * variable - learning_rate * update)


def orthogonalize(kernel, steps=5):
    """Brings singular values of kernels (height, width, in, filters), as matrices of a column per filter, close to 1.

    Newton-Schulz iteration with the coefficients of Jordan et al. (2024): all but the smallest values end between 0.7
    and 1.2. It is iterated on the product of the matrix with its transpose, which is smaller, and applied once.
    """
    matrix = ops.reshape(kernel, (-1, kernel.shape[-1]))
    is_wide = matrix.shape[0] < matrix.shape[1]
    matrix = matrix if is_wide else ops.transpose(matrix)
    matrix = matrix / (ops.sqrt(ops.sum(ops.square(matrix))) + 1e-7)
    gram, identity = ops.matmul(matrix, ops.transpose(matrix)), ops.eye(matrix.shape[0])
    factor = identity
    for _ in range(steps):
        step = 3.4445 * identity - 4.7750 * gram + 2.0315 * ops.matmul(gram, gram)
        factor, gram = ops.matmul(step, factor), ops.matmul(ops.matmul(step, gram), step)
    matrix = ops.matmul(factor, matrix)
    return ops.reshape(matrix if is_wide else ops.transpose(matrix), kernel.shape)


class UnitSpectralNorm(keras.constraints.Constraint):
    """Divides a kernel by its largest singular value after every step (Miyato et al. 2018 differentiate through it)."""

    def __call__(self, kernel):
        matrix = ops.reshape(kernel, (-1, kernel.shape[-1]))
        right = np.random.default_rng(0).standard_normal((kernel.shape[-1], 1), dtype="float32")
        for _ in range(8):
            left = ops.normalize(ops.matmul(matrix, right), axis=0)
            right = ops.normalize(ops.matmul(ops.transpose(matrix), left), axis=0)
        return kernel / ops.norm(ops.matmul(matrix, right))
