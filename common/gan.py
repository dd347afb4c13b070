"""Generative adversarial networks (Goodfellow et al. 2014): class-conditional, with the hinge loss."""

import keras
import numpy as np
from keras import layers, ops

from common import augmentation


def modulated(features, condition):
    """Batch normalisation whose scale and shift depend on the condition (Dumoulin et al. 2017)."""
    features = layers.BatchNormalization(center=False, scale=False, momentum=0.95)(features)
    scale, shift = (layers.Dense(features.shape[-1])(condition)[:, None, None] for _ in range(2))
    return layers.ReLU()(features * (1 + scale) + shift)


class UnitSpectralNorm(keras.constraints.Constraint):
    """Divides a kernel by its largest singular value after every step, found by power iteration.

    Miyato et al. 2018 differentiate through the division; a projection is stateless and bounds the kernels as well.
    """

    def __call__(self, kernel):
        matrix = ops.reshape(kernel, (-1, kernel.shape[-1]))
        right = np.random.default_rng(0).standard_normal((kernel.shape[-1], 1), dtype="float32")
        for _ in range(8):
            left = ops.normalize(ops.matmul(matrix, right), axis=0)
            right = ops.normalize(ops.matmul(ops.transpose(matrix), left), axis=0)
        return kernel / ops.norm(ops.matmul(matrix, right))


def projection_score(features, unconditional, embedding):
    """Returns the score of a projection discriminator (Miyato & Koyama 2018): (n, 1) for features (n, filters)."""
    return unconditional + ops.sum(features * embedding, axis=1, keepdims=True)


class Trainer(keras.Model):
    """Trains generator and discriminator at once with the hinge loss (Lim & Ye 2017).

    It is fitted on a dict of `images` and `classes`, weights (n, classes). All images that the discriminator sees are
    augmented as in Zhao et al. 2020, so that it does not memorise the real ones.

    Args:
        generator: `keras.Model` from a dict of `noise` (n, size) and `classes` to images.
        discriminator: `keras.Model` from a dict of `images` and `classes` to scores (n, 1), real ones high.
        normalize: function from the images of the dataset to the range of generated ones, around 0.
    """

    def __init__(self, generator, discriminator, seed, normalize):
        super().__init__()
        self.generator, self.discriminator, self.normalize = generator, discriminator, normalize
        self.seed_generator = keras.random.SeedGenerator(seed)
        self.trackers = [keras.metrics.Mean(name=f"{name}_loss") for name in ("generator", "discriminator")]
        self.built = True  # all its variables exist, without which a checkpoint cannot be restored

    def call(self, inputs, training=False):
        """Returns the scores of real images, of generated ones, and of generated ones as the generator sees them."""
        seed, classes = self.seed_generator, inputs["classes"]
        real = augmentation.mirror(self.normalize(inputs["images"]), seed)
        size = self.generator.input["noise"].shape[1]
        noise = keras.random.normal((ops.shape(classes)[0], size), seed=seed)
        generated = self.generator({"noise": noise, "classes": classes}, training=training)
        real, generated = (augmentation.differentiable(images, seed) for images in (real, generated))
        images = ops.concatenate([real, ops.stop_gradient(generated)])
        scores = self.discriminator({"images": images, "classes": ops.concatenate([classes, classes])})
        # The generator learns from a discriminator that does not, which lets one optimizer train both.
        frozen = [ops.stop_gradient(variable.value) for variable in self.discriminator.trainable_variables]
        seen, _ = self.discriminator.stateless_call(frozen, [], {"images": generated, "classes": classes})
        return *ops.split(scores, 2), seen

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        real, generated, seen = y_pred
        losses = -ops.mean(seen), ops.mean(ops.relu(1 - real)) + ops.mean(ops.relu(1 + generated))
        for tracker, loss in zip(self.trackers, losses, strict=True):
            tracker.update_state(loss)
        return losses[0] + losses[1]
