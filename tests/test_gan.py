"""The parts of generative adversarial networks."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from common import gan

GENERATOR = np.random.default_rng(0)


def test_the_projection_term_is_the_dot_product_with_the_class_embedding():
    features, embedding = np.array([[1.0, 2.0], [3.0, -1.0]]), np.array([[0.5, 1.0], [2.0, 2.0]])
    score = gan.projection_score(features, np.array([[10.0], [20.0]]), embedding)
    assert ops.convert_to_numpy(score).tolist() == [[12.5], [24.0]]


@pytest.mark.parametrize("shape", [(3, 3, 16, 24), (40, 7), (12, 1)])
def test_kernels_get_the_spectral_norm_1(shape):
    kernel = GENERATOR.normal(size=shape).astype("float32")
    bounded = ops.convert_to_numpy(gan.UnitSpectralNorm()(kernel)).reshape(-1, shape[-1])
    assert np.linalg.norm(bounded, 2) == pytest.approx(1, abs=0.06)
    assert np.allclose(bounded / np.linalg.norm(bounded), kernel.reshape(bounded.shape) / np.linalg.norm(kernel))


def dense_gan():
    """The smallest generator and discriminator of images of 8 x 8."""
    keras.utils.set_random_seed(0)
    noise, classes = keras.Input((3,), name="noise"), keras.Input((2,), name="classes")
    made = layers.Reshape((8, 8, 3))(layers.Dense(192, activation="tanh")(layers.Concatenate()([noise, classes])))
    generator = keras.Model({"noise": noise, "classes": classes}, made)
    images, classes = keras.Input((8, 8, 3), name="images"), keras.Input((2,), name="classes")
    bounded = {"kernel_initializer": "orthogonal", "kernel_constraint": gan.UnitSpectralNorm()}
    features = layers.Dense(4, **bounded)(layers.Flatten()(images))
    score = gan.projection_score(features, layers.Dense(1)(features), layers.Dense(4, use_bias=False)(classes))
    return gan.Trainer(generator, keras.Model({"images": images, "classes": classes}, score), 0, lambda images: images)


def data(count=8):
    images = GENERATOR.uniform(-1, 1, (count, 8, 8, 3)).astype("float32")
    return {"images": images, "classes": np.eye(2, dtype="float32")[np.arange(count) % 2]}


def test_the_loss_is_the_hinge_loss_of_both_networks():
    real, generated = np.array([[2.0], [0.5]], "float32"), np.array([[-3.0], [0.0]], "float32")
    seen = np.array([[1.0], [2.0]], "float32")
    trainer = dense_gan()
    loss = float(trainer.compute_loss(y_pred=(real, generated, seen)))
    assert loss == pytest.approx(-1.5 + 0.25 + 0.5)
    assert [float(tracker.result()) for tracker in trainer.trackers] == pytest.approx([-1.5, 0.75])


def test_both_networks_learn_and_kernels_stay_bounded():
    trainer = dense_gan()
    trainer.compile(keras.optimizers.Adam(0.01, 0.0, 0.9), jit_compile=False)
    before = [[weights.copy() for weights in each.get_weights()] for each in (trainer.generator, trainer.discriminator)]
    trainer.fit(data(), epochs=2, batch_size=4, verbose=0)
    for network, weights in zip((trainer.generator, trainer.discriminator), before, strict=True):
        moved = [np.abs(new - old).max() for new, old in zip(network.get_weights(), weights, strict=True)]
        assert min(moved) > 0
    (kernel,) = (w for w in trainer.discriminator.get_weights() if w.shape == (192, 4))
    assert np.linalg.norm(kernel, 2) == pytest.approx(1, abs=0.05)


def test_the_loss_of_the_generator_does_not_move_the_discriminator(monkeypatch):
    monkeypatch.setattr(gan.Trainer, "compute_loss", lambda self, x, y, y_pred, *_, **__: -ops.mean(y_pred[2]))
    trainer = dense_gan()
    trainer.compile(keras.optimizers.SGD(0.1), jit_compile=False)
    networks = trainer.generator, trainer.discriminator
    before = [[weights.copy() for weights in each.get_weights()] for each in networks]
    trainer.fit(data(), epochs=1, batch_size=8, verbose=0)
    moved = [
        max(np.abs(new - old).max() for new, old in zip(each.get_weights(), weights, strict=True))
        for each, weights in zip(networks, before, strict=True)
    ]
    assert moved[0] > 1e-4
    assert moved[1] < 1e-4  # but for the constraint
