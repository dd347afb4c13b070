"""Distances between two sets of images in 768 features of the network that FID is defined with, in JAX.

The network is Inception of 2015-12-05 (Szegedy et al. 2016; Apache 2.0) up to its last 17 x 17 maps, with its batch
normalisation folded into the convolutions; the means of these maps are the features that torchmetrics calls 768. The
official FID uses 2,048 features of two further blocks and has another scale: always write "FID (768-d)".
"""

import hashlib
import importlib.util
import os
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from common.errors import UserError
from common.files import replacing
from common.metrics import frechet_distance, kernel_distance, mean_distance, nearest_neighbours

WEIGHTS = "inception_fid768.npz"
PUBLISHED = Path(__file__).resolve().parent.parent / "saved_models" / "inception_fid768" / WEIGHTS
INPUT_SIZE, NUM_FEATURES, NUM_CONVOLUTIONS = 299, 768, 70
MIN_IMAGES = NUM_FEATURES + 1  # with fewer, the covariance matrix is singular
BATCH_SIZE = 8  # a seventh faster than 64 on a CPU, whose cache holds the maps of so few images


def load_network(data_dir):
    """Returns the weights, dict from "<layer>/kernel" and "<layer>/bias" to float32 arrays.

    They are looked for in `data_dir`, then in saved_models/inception_fid768/. Raises `UserError` where they are missing
    or damaged.
    """
    path = next((path for path in (Path(data_dir) / WEIGHTS, PUBLISHED) if path.exists()), None)
    if path is None:
        raise UserError(f"{WEIGHTS} is missing; get {PUBLISHED.parent} from the repository, or put it into {data_dir}")
    try:
        with np.load(path) as file:
            weights = {name: file[name].astype("float32") for name in file.files}
        jax.eval_shape(_features, weights, jax.ShapeDtypeStruct((1, 32, 32, 3), np.uint8))
        if len(weights) != 2 * NUM_CONVOLUTIONS or not all(np.isfinite(array).all() for array in weights.values()):
            raise ValueError("unknown arrays, or numbers that are not finite")
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zipfile.zlib.error) as error:
        raise UserError(f"{path} is damaged ({error!r:.100}); get it again from the repository") from error
    return weights


def features(weights, images, name=""):
    """Returns the features, float32 (n, 768), of images, uint8 (n, height, width, 3).

    They are resized to 299 x 299 as in clean-fid (Parmar et al. 2022): bicubic with the kernel of Pillow, in floating
    point, clipped to 0 to 255. Progress is printed under `name`, where one is given.
    """
    weights, parts = jax.device_put(weights), []
    for start in range(0, len(images), BATCH_SIZE):
        batch = np.asarray(images[start : start + BATCH_SIZE])
        missing = min(BATCH_SIZE, len(images)) - len(batch)  # all batches have one size: one compilation
        padded = np.pad(batch, ((0, missing), (0, 0), (0, 0), (0, 0)))
        parts.append(np.asarray(_jitted_features(weights, padded))[: len(batch)])
        if name:
            print(f"\rInception features of {name}: {start + len(batch):,} of {len(images):,}", end="", flush=True)
    if name:
        print()
    return np.concatenate(parts)


def cached_features(weights, images, data_dir, name=""):
    """Returns `features` of a fixed set, which are kept in `data_dir`/cache/inception_fid768/."""
    known = hashlib.sha256(str(images.shape).encode() + np.ascontiguousarray(images).tobytes())
    for layer in sorted(weights):
        known.update(weights[layer].tobytes())
    path = Path(data_dir) / "cache" / "inception_fid768" / f"{known.hexdigest()[:16]}.npy"
    if path.exists():
        try:
            found = np.load(path)
            if found.shape != (len(images), NUM_FEATURES) or not np.isfinite(found).all():
                raise ValueError(f"shape {found.shape}")
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error!r:.100}); delete it") from error
        return found
    found = features(weights, images, name)
    try:
        with replacing(path) as temporary:
            np.save(temporary, found)
    except UserError as error:  # they are here all the same
        print(f"the features of {name} are not kept: {error}")
    return found


def compare(samples, reference):
    """Compares the features (n, 768) of generated images with those of real ones, (m, 768).

    Returns a dict of float: `fid_768` (Fréchet distance), `kernel_distance`, `precision` and `recall`. The Fréchet
    distance falls as images are added, so that their number must be equal and stated; ValueError below 769.
    """
    if min(len(samples), len(reference)) < MIN_IMAGES:
        raise ValueError(f"FID (768-d) needs {MIN_IMAGES} images of each kind, not {len(samples)} and {len(reference)}")
    precision, recall = precision_and_recall(samples, reference)
    distances = frechet_distance(samples, reference), kernel_distance(samples, reference)
    return dict(zip(("fid_768", "kernel_distance"), distances, strict=True), precision=precision, recall=recall)


def comparison(data_dir, real, classifier_path=None):
    """Returns a function from generated images and a name in `real`, a dict of real images, to what `compare` says.

    Where it is handed the classes that the images were generated for as well, it adds what `by_classifier` says.
    """
    weights = load_network(data_dir)

    def compare_images(images, name, labels=None):
        found = compare(features(weights, images, "samples"), cached_features(weights, real[name], data_dir, name))
        classifier = load_classifier(classifier_path) if labels is not None else None
        return found | (by_classifier(classifier, images, labels, real[name]) if classifier else {})

    return compare_images


def scale(data_dir, training, test):
    """Returns the FID (768-d) to test images of images that are not generated: dict from what they are to float.

    They are as many `training` images; the test images blurred; CIFAR-10, where `data_dir` holds the cache of the other
    scripts and these are other images; and uniform noise.
    """
    count, path = min(len(training), len(test)), Path(data_dir) / "cache" / "cifar10" / "test_images.npy"
    others = {"training images": training[:count], "blurred test images": blurred(test[:count])}
    if path.exists():
        try:
            cifar10 = np.load(path)[:count]
        except (OSError, EOFError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error!r:.100}); delete {path.parent}") from error
        if not np.array_equal(cifar10, test[:count]):
            others["CIFAR-10 test images"] = cifar10
    others["uniform noise"] = np.random.default_rng(0).integers(0, 256, test[:count].shape, dtype=np.uint8)
    weights = load_network(data_dir)
    reference = cached_features(weights, test[:count], data_dir, "test images")
    return {
        name: frechet_distance(cached_features(weights, images, data_dir, name), reference)
        for name, images in others.items()
    }


def blurred(images, deviation=1.0):
    """Blurs images, uint8 (n, height, width, 3), with a Gaussian of `deviation` pixels."""
    height, width = images.shape[1:3]

    def kernel(size):
        distances = np.arange(size)[:, None] - np.arange(size)
        weights = np.exp(-np.square(distances / deviation) / 2)
        return (weights / weights.sum(axis=1, keepdims=True)).astype("float32")

    blurry = np.einsum("yi,nijc,xj->nyxc", kernel(height), images.astype("float32"), kernel(width), optimize=True)
    return np.rint(blurry).astype("uint8")


def novelty(images, real, training):
    """Returns mean distances, root mean squared differences in grey levels, of few generated and real images.

    `nearest_distance` to the nearest of the `training` images, and `pairwise_distance` between the images themselves;
    those of the real ones are named `real_...`.
    """
    found = {}
    for prefix, own in (("", images), ("real_", real)):
        found[f"{prefix}nearest_distance"] = float(nearest_neighbours(own, training)[0].mean())
        found[f"{prefix}pairwise_distance"] = mean_distance(own)
    return found


def load_classifier(path):
    """Returns a function from images to penultimate features and class probabilities of a saved Keras classifier.

    None, with one line, where there is no such file or no Keras. Keras runs on JAX here, unless it has been imported
    before. Raises `UserError` where the file is damaged.
    """
    if not (Path(path).exists() and importlib.util.find_spec("keras")):
        print(f"the metrics by our own classifier are skipped: {path} or Keras is missing")
        return None
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras  # slow, and not needed otherwise

    try:
        model = keras.saving.load_model(path, compile=False)
        model = keras.Model(model.inputs, [model.layers[-1].input, model.output])
    except Exception as error:  # Keras raises many kinds for a damaged file
        raise UserError(f"{path} is damaged ({error!r:.100}); get it again from the repository") from error
    return lambda images: model.predict(images, batch_size=500, verbose=0)


def by_classifier(classifier, images, labels, real):
    """Compares images generated for `labels` (n,) with real ones by what `load_classifier` returned.

    Returns a dict: `class_agreement`, the share of images that are taken for the class they were generated for,
    `classes_covered`, the number of classes that occur, and `classifier_frechet`, the Fréchet distance of features.
    """
    (own, probabilities), (other, _) = classifier(images), classifier(real)
    predicted = probabilities.argmax(axis=1)
    found = {"class_agreement": float(np.mean(predicted == labels)), "classes_covered": len(np.unique(predicted))}
    return found | {"classifier_frechet": frechet_distance(own, other)}


def precision_and_recall(samples, reference, neighbours=3):
    """Returns the share of generated images near a real one, and of real ones near a generated one.

    An image is near another one that is no further away than that one's third nearest neighbour in its own set
    (Kynkäänniemi et al. 2019).
    """
    samples, reference = (np.asarray(array, "float32") for array in (samples, reference))

    def radii(own):  # the nearest of all is the image itself
        return np.concatenate([np.partition(rows, neighbours)[:, neighbours] for rows in _squared_distances(own, own)])

    def share_near(first, second):
        squared_radii = radii(second)
        return float(np.mean(np.concatenate([(r <= squared_radii).any(1) for r in _squared_distances(first, second)])))

    return share_near(samples, reference), share_near(reference, samples)


def _squared_distances(first, second):
    """Yields rows of the matrix of squared distances, some hundred at a time."""
    squares = np.sum(np.square(second), axis=1)
    for start in range(0, len(first), 500):
        rows = first[start : start + 500]
        yield np.maximum(np.sum(np.square(rows), axis=1)[:, None] + squares - 2 * rows @ second.T, 0)


def _features(weights, images):
    """The network, layer by layer, under the names of torchvision."""

    def bias_and_relu(maps, layer):
        return jax.nn.relu(maps + weights[f"{layer}/bias"])

    def convolution(maps, layer, stride=1, padding="SAME"):
        # Without padding, XLA takes three times as long on a CPU: pad by one output place each side, and crop these.
        padded = "SAME" if padding == "SAME" else ((stride, stride), (stride, stride))
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "precision": "highest"}  # on a GPU, no TF32
        maps = jax.lax.conv_general_dilated(maps, weights[f"{layer}/kernel"], (stride, stride), padded, **options)
        return bias_and_relu(maps if padding == "SAME" else maps[:, 1:-1, 1:-1], layer)

    def chain(maps, block, branch, first, last):
        for number in range(first, last + 1):
            maps = convolution(maps, f"{block}/{branch}_{number}")
        return maps

    def pool(maps):
        return jax.lax.reduce_window(maps, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")

    def mean_of_neighbours(maps):  # over 3 x 3 places, of which those outside do not count
        def total(array):
            return jax.lax.reduce_window(array, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")

        return total(maps) / total(jnp.ones((1, *maps.shape[1:3], 1)))

    def heads(maps, block, branches):
        """The 1 x 1 convolutions that read the same maps, as one matrix product; pooling comes behind its own one."""
        kernels = [weights[f"{block}/{branch}/kernel"][0, 0] for branch in branches]
        outputs = jnp.matmul(maps, jnp.concatenate(kernels, axis=1), precision="highest")
        parts = jnp.split(outputs, np.cumsum([kernel.shape[1] for kernel in kernels])[:-1], axis=-1)
        parts = [mean_of_neighbours(p) if name == "branch_pool" else p for p, name in zip(parts, branches, strict=True)]
        return [bias_and_relu(part, f"{block}/{branch}") for part, branch in zip(parts, branches, strict=True)]

    maps = jax.image.resize(images.astype("float32"), (len(images), INPUT_SIZE, INPUT_SIZE, 3), "cubic")
    maps = (jnp.clip(maps, 0, 255) - 128) / 128
    maps = convolution(maps, "conv2d_1a_3x3", 2, "VALID")
    maps = convolution(maps, "conv2d_2a_3x3", 1, "VALID")
    maps = pool(convolution(maps, "conv2d_2b_3x3"))
    maps = convolution(maps, "conv2d_3b_1x1")
    maps = pool(convolution(maps, "conv2d_4a_3x3", 1, "VALID"))
    for block in ("mixed_5b", "mixed_5c", "mixed_5d"):
        branches = ("branch1x1", "branch5x5_1", "branch3x3dbl_1", "branch_pool")
        one, five, three, pooled = heads(maps, block, branches)
        five, three = chain(five, block, "branch5x5", 2, 2), chain(three, block, "branch3x3dbl", 2, 3)
        maps = jnp.concatenate([one, five, three, pooled], axis=-1)
    double = chain(maps, "mixed_6a", "branch3x3dbl", 1, 2)
    double = convolution(double, "mixed_6a/branch3x3dbl_3", 2, "VALID")
    single = convolution(maps, "mixed_6a/branch3x3", 2, "VALID")
    maps = jnp.concatenate([single, double, pool(maps)], axis=-1)
    for block in ("mixed_6b", "mixed_6c", "mixed_6d", "mixed_6e"):
        branches = ("branch1x1", "branch7x7_1", "branch7x7dbl_1", "branch_pool")
        one, seven, double, pooled = heads(maps, block, branches)
        seven, double = chain(seven, block, "branch7x7", 2, 3), chain(double, block, "branch7x7dbl", 2, 5)
        maps = jnp.concatenate([one, seven, double, pooled], axis=-1)
    return maps.mean(axis=(1, 2))


_jitted_features = jax.jit(_features)
