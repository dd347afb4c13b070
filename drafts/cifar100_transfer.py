"""CIFAR-100: VGG16 pre-trained on ImageNet, three ways, and networks trained from scratch.

Part 1 of the assignment takes VGG16 (Simonyan & Zisserman 2015) as it is and trains a dense head on its features, then
fine-tunes its last block, then all of it. The images are 32 x 32 pixels, a seventh of what VGG16 was trained on, so a
fourth model shows what upsampling to 64 x 64 is worth. Part 2 trains networks of our own with at most 3 million
parameters: a plain one, a residual one with normalisation and augmentation, and what the experiments led to, which
borrows from Jordan, "94 % on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv:2404.00498).

    python cifar100_transfer.py --train          trains seven models; one of them with --model
    python cifar100_transfer.py --load           restores the saved models and verifies their metrics
    python cifar100_transfer.py --experiments    what each technique is worth, on validation images; can be resumed

5,000 of the 50,000 training images, 50 of each class, are held out for validation, and every choice is made there. The
test images are read for the saved models alone.
"""

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
import hashlib
import math
import os
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers, ops
from sklearn.metrics import log_loss, top_k_accuracy_score
from sklearn.model_selection import train_test_split

from common import cli, models, results, training
from common.datasets import Cifar100Images, area_average, connection_trouble, load_cifar100
from common.errors import UserError
from common.files import read_json, replacing

SCRIPT = "cifar100_transfer"
NUM_CLASSES = 100
IMAGE_SIZE = 32  # side in pixels
SPLIT_SEED = 100
BASE_PARTS = ("vgg_blocks_1_to_4", "vgg_block_5")  # names of the files that hold the frozen base
VGG16_URL = (
    "https://storage.googleapis.com/tensorflow/keras-applications/vgg16/"
    "vgg16_weights_tf_dim_ordering_tf_kernels_notop.h5"
)
VGG16_MD5 = "6d6bbae143d832006294945121d1f1fc"
QUICK_IMAGES = 200
PREDICT_BATCH_SIZE = 250
TUNING_SHARE = 0.2  # of the learning rate
VALIDATION_CURVES = ("val_accuracy", "val_loss")
METRICS = ("accuracy", "top_5_accuracy", "log_loss", "augmented_accuracy")
ROW_FIELDS = ("name", "seed", "changes", "images", "epochs", "parameters", "seconds", "train_accuracy")
CHANNEL_MEANS, CHANNEL_DEVIATIONS = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)  # of the training images, RGB


@dataclasses.dataclass(frozen=True)
class Config:
    """A network of our own; the defaults are the baseline of the experiments."""

    filters: tuple = (32, 64, 128)  # of each stage: a convolution, max pooling, then more convolutions
    convolutions: tuple = (2, 2, 2)  # in each stage after the pooling
    residual: bool = True  # a shortcut around those
    separable: bool = False  # depthwise-separable convolutions instead of full ones
    batch_norm: bool = True  # after each convolution (after the pooling, where there is one: a quarter of the cost)
    activation: str = "relu"
    whitening: bool = False  # a fixed first convolution that decorrelates patches of 2 x 2 pixels
    identity: bool = False  # the first filters of each convolution start as the identity
    pooling: str = "average"  # or "max", over all places before the classifier
    dropout: float = 0.0  # before the classifier
    augmentation: tuple = ("mirror", "shift")  # "mirror" or "alternate" (every image in turn), "shift" by 2 pixels
    label_smoothing: float = 0.1
    optimizer: str = "adamw"  # key of OPTIMIZERS
    learning_rate: float = 2e-3  # the highest one
    weight_decay: float = 0.05  # decoupled; not for "muon"
    averaging: float = 0.0  # momentum of the moving average of the weights; 0 for none
    schedule: str = "one cycle"  # warm-up, then a cosine to 0; or "plateau" (with early stopping)
    small_size: int = 0  # side in pixels of the images in the first part of the training run; 0 for no such part
    small_epochs: int = 0  # length of that part
    tuned_size: int = 0  # side of the upsampled images in a last part, where only the last stage is trained
    tuned_epochs: int = 0  # length of that part, which `epochs` does not count
    classes: int = NUM_CLASSES  # the first so many classes; 20 stands for the superclasses
    batch_size: int = 128
    epochs: int = 5


@dataclasses.dataclass(frozen=True)
class VggConfig:
    """A classifier on VGG16; the defaults are the first head on frozen features."""

    trained: str = "head"  # what is trained: the "head", also the "top block", or "all"
    image_size: int = IMAGE_SIZE  # 64: upsampled, and the pooled outputs of blocks 3, 4 and 5 together
    standardize: bool = False  # each feature to mean 0 and standard deviation 1, before the head
    hidden: tuple = ()  # units of the hidden dense layers of the head
    dropout: float = 0.0  # before each dense layer
    label_smoothing: float = 0.0
    mirrored: bool = False  # whether the features of mirrored images are trained on, too
    learning_rate: float = 1e-3  # the highest one, of AdamW
    weight_decay: float = 1e-4
    batch_size: int = 128
    epochs: int = 20


HEAD = VggConfig(standardize=True, hidden=(1024,), dropout=0.5)
CONFIGS = {
    "vgg_features": dataclasses.replace(HEAD, mirrored=True),
    "vgg_top_block": dataclasses.replace(
        HEAD, trained="top block", mirrored=True, label_smoothing=0.1, learning_rate=1e-4, weight_decay=0.01, epochs=5
    ),
    "vgg_full": dataclasses.replace(
        HEAD, trained="all", mirrored=True, label_smoothing=0.1, learning_rate=1e-4, weight_decay=0.01, epochs=3
    ),
    "vgg_features_64": dataclasses.replace(HEAD, image_size=64),
    "own_1": Config(
        convolutions=(1, 1, 1),
        residual=False,
        batch_norm=False,
        dropout=0.3,
        augmentation=(),
        label_smoothing=0.0,
        learning_rate=1e-3,
        weight_decay=1e-3,
        schedule="plateau",
        epochs=20,
    ),
    "own_2": Config(filters=(48, 96, 192), dropout=0.2, epochs=10),
    "own_3": Config(
        filters=(64, 192, 320),
        convolutions=(1, 1, 2),
        activation="gelu",
        whitening=True,
        identity=True,
        pooling="max",
        augmentation=("alternate", "shift"),
        label_smoothing=0.2,
        optimizer="muon",
        learning_rate=0.2,
        averaging=0.98,
        small_size=24,
        small_epochs=11,
        batch_size=500,
        epochs=22,
    ),
}
MODELS = list(CONFIGS)
NUM_SEEDS = {
    "vgg_features": 3,
    "vgg_top_block": 1,
    "vgg_full": 1,
    "vgg_features_64": 2,
    "own_1": 1,
    "own_2": 1,
    "own_3": 2,
}

# ---------------------------------------------------------------------------------------------------------------- data


def load_splits(data_dir, *, sample=False, quick=False):
    """Loads CIFAR-100 and holds out a tenth of its training images, or one per class if that is more.

    Returns a dict of `Cifar100Images`, "train" in random order, "validation" with as many images of each class, and
    "test"; and the `common.datasets.Dataset`. With `quick` each has at most `QUICK_IMAGES`.
    """
    dataset = load_cifar100(data_dir, sample)
    labels = np.asarray(dataset.train.labels)
    held_out = max(len(labels) // 10, NUM_CLASSES)
    chosen = train_test_split(np.arange(len(labels)), test_size=held_out, random_state=SPLIT_SEED, stratify=labels)
    count = QUICK_IMAGES if quick else None
    splits = {
        part: Cifar100Images(*(array[indices[:count]] for array in dataset.train))
        for part, indices in zip(("train", "validation"), chosen, strict=True)
    }
    splits["test"] = Cifar100Images(*(np.asarray(array[:count]) for array in dataset.test))
    return splits, dataset


def one_hot(labels, classes=NUM_CLASSES):
    """Returns targets for cross-entropy with label smoothing: float32 (n, classes)."""
    return np.eye(classes, dtype="float32")[labels]


# --------------------------------------------------------------------------------------------------------- model: VGG16


class VggBase(NamedTuple):
    """The convolutional base of VGG16 in two parts, neither of them trainable."""

    blocks_1_to_4: keras.Model  # images (n, height, width, 3), 0 to 255, to maps (n, height / 16, width / 16, 512)
    block_5: keras.Model  # those maps to its output, one place for four


def load_vgg16(data_dir):
    """Returns the `VggBase` with ImageNet weights, rounded as they are saved.

    The weights are those in `data_dir`, else Keras' own, which are downloaded once. Raises `UserError` where there are
    none, or where they are damaged.
    """
    path = Path(data_dir) / "vgg16_imagenet_notop.weights.h5"
    base = keras.applications.VGG16(include_top=False, weights=None, input_shape=(None, None, 3))
    if not path.is_file():
        keras_home = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras"))
        wanted, path = path, keras_home / "models" / VGG16_URL.rpartition("/")[2]
        trouble = "" if path.is_file() else connection_trouble(VGG16_URL)
        try:
            if not trouble:
                keras.utils.get_file(path.name, VGG16_URL, cache_subdir="models", file_hash=VGG16_MD5)
        except Exception as error:  # urllib and Keras raise many kinds
            trouble = (str(error).splitlines() or [type(error).__name__])[0][:100]
        if trouble:
            raise UserError(
                f"the ImageNet weights of VGG16 are neither {wanted} nor {path}, and {trouble}; try again later, or "
                f"download {VGG16_URL} by hand into {path.parent}"
            )
    try:
        base.load_weights(path)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({str(error).splitlines()[0][:100]}); delete it and try again") from error
    round_to_grid(base)
    return split_base(base)


def split_base(base):
    """Returns the `VggBase` with the weights of `keras.applications.VGG16(include_top=False)`."""
    images, maps = keras.Input((None, None, 3), name="images"), keras.Input((None, None, 512), name="maps")
    parts = VggBase(
        keras.Model(images, copy_blocks(preprocess(images), base, (1, 2, 3, 4)), name="blocks_1_to_4"),
        keras.Model(maps, copy_blocks(maps, base, (5,)), name="block_5"),
    )
    for part in parts:
        part.trainable = False
    return parts


def round_to_grid(model):
    """Rounds each kernel to multiples of a power of two, at most 1/16 of its standard deviation, in place.

    The rounded weights are exact in 16 bits and compress to about 1.1 bytes: 44 million of them have to fit into 55 MB.
    The error is below 2 % of the standard deviation.
    """

    def rounded(weights):
        if weights.ndim < 2 or weights.std() == 0:
            return weights
        step = 2.0 ** np.floor(np.log2(weights.std() / 16))
        return (np.rint(weights / step) * step).astype("float32")

    models.set_weights(model, [rounded(weights) for weights in model.get_weights()])


def checksum(base):
    """Returns the SHA-256 of all weights of a `VggBase`, in hexadecimal digits."""
    digest = hashlib.sha256()
    for weights in [weights for part in base for weights in part.get_weights()]:
        digest.update(weights.tobytes())
    return digest.hexdigest()


def preprocess(images):
    """`keras.applications.vgg16.preprocess_input` out of operations that a saved model may have: RGB to BGR - means."""
    return layers.Rescaling(1.0, [-103.939, -116.779, -123.68], name="preprocess")(images[..., ::-1])


def copy_blocks(features, base, blocks):
    """Applies trainable copies of the layers of some blocks of `base`, weights included, to a symbolic tensor."""
    for layer in base.layers:
        if layer.name.startswith(tuple(f"block{block}" for block in blocks)):
            copy = type(layer).from_config({**layer.get_config(), "trainable": True})
            features = copy(features)
            copy.set_weights(layer.get_weights())
    return features


def build_head(config, num_features):
    """Returns the classifier: features (n, num_features) to probabilities (n, 100)."""
    features = hidden = keras.Input((num_features,), name="features")
    if config.standardize:
        hidden = layers.BatchNormalization(center=False, scale=False)(hidden)
    for units in config.hidden:
        hidden = layers.Dropout(config.dropout)(hidden)
        hidden = layers.Dense(units, activation="relu", kernel_initializer="he_normal")(hidden)
    hidden = layers.Dropout(config.dropout)(hidden)
    probabilities = layers.Dense(NUM_CLASSES, activation="softmax", dtype="float32", name="probabilities")(hidden)
    return keras.Model(features, probabilities, name="head")


def build_pooled(base, size):
    """Returns a model from images (n, 32, 32, 3) to the means of the outputs of blocks 3, 4 and 5 of VGG16: (n, 1280).

    `size` is the side in pixels that the images are upsampled to.
    """
    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), name="images")
    block_3 = base.blocks_1_to_4.get_layer("block3_pool").output
    blocks = keras.Model(base.blocks_1_to_4.input, [block_3, base.blocks_1_to_4.output])
    block_3, block_4 = blocks(layers.Resizing(size, size)(images))
    pooled = [layers.GlobalAveragePooling2D()(maps) for maps in (block_3, block_4, base.block_5(block_4))]
    return keras.Model(images, layers.Concatenate()(pooled))


class Features:
    """What the frozen base makes of the images of each split: computed once, kept in `folder` as float16."""

    def __init__(self, base, splits, folder):
        self.base, self.splits, self.folder = base, splits, folder
        self.checksum = checksum(base)

    def __call__(self, kind, part, mirrored=False):
        """Returns the features of a split, or of its mirrored images: float16, a memory map.

        `kind` is "maps" for the output of block 4, (n, 2, 2, 512); "block 5" for the mean of its output, (n, 512); or
        "pooled" for the means of blocks 3, 4 and 5 at 64 x 64 pixels, (n, 1280).
        """
        images = self.splits[part].images
        key = hashlib.sha256(np.ascontiguousarray(images)).hexdigest()[:12]
        path = self.folder / f"{kind.replace(' ', '_')}_{self.checksum[:12]}_{key}{'_mirrored' * mirrored}.npy"
        if not path.is_file():
            inputs = images[:, :, ::-1] if mirrored else images
            if kind == "block 5":
                inputs = self("maps", part, mirrored)
            print(f"computing the {kind} features of {len(images):,} {'mirrored ' * mirrored}{part} images", flush=True)
            features = predict(self._model(kind), inputs).astype("float16")
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, features)
        return np.load(path, mmap_mode="r")

    def _model(self, kind):
        if kind == "maps":
            return self.base.blocks_1_to_4
        if kind == "pooled":
            return build_pooled(self.base, 2 * IMAGE_SIZE)
        return keras.Model(self.base.block_5.input, layers.GlobalAveragePooling2D()(self.base.block_5.output))


def predict(network, inputs):
    """Returns the outputs of a network, float32 (n, ...)."""
    return models.for_prediction(network).predict(inputs, batch_size=PREDICT_BATCH_SIZE, verbose=0)


# --------------------------------------------------------------------------------------------------- model: our own


def build_network(config, image_shape=(None, None, 3)):
    """Builds a network of our own: images (n, *image_shape), 0 to 255, to probabilities (n, classes).

    Stages of a convolution, max pooling and further convolutions, with or without a shortcut around those, then pooling
    over all places: the network takes images of any size.
    """

    def convolve(features, filters):
        layer = layers.SeparableConv2D if config.separable else layers.Conv2D
        names = ("depthwise_initializer", "pointwise_initializer") if config.separable else ("kernel_initializer",)
        initializers = dict.fromkeys(names, "he_normal")
        return layer(filters, 3, padding="same", use_bias=not config.batch_norm, **initializers)(features)

    def normalize(features):
        # Statistics of the last ten batches or so, for there are few steps.
        return layers.BatchNormalization(momentum=0.9)(features) if config.batch_norm else features

    def activate(features):
        return layers.Activation(config.activation)(features)

    images = keras.Input(image_shape, name="images")
    scale, offset = 1 / np.array(CHANNEL_DEVIATIONS), -np.array(CHANNEL_MEANS) / CHANNEL_DEVIATIONS
    features = images
    if config.tuned_epochs and image_shape[0] == IMAGE_SIZE:
        features = layers.Resizing(config.tuned_size, config.tuned_size)(features)
    features = layers.Rescaling(scale.tolist(), offset.tolist(), name="standardize")(features)
    if config.whitening:
        features = layers.Conv2D(24, 2, use_bias=False, trainable=False, name="whitening")(features)
        features = activate(features)
    for filters, convolutions in zip(config.filters, config.convolutions, strict=True):
        features = layers.MaxPooling2D(2)(convolve(features, filters))
        features = shortcut = activate(normalize(features))
        for number in range(convolutions):
            features = normalize(convolve(features, filters))
            if config.residual and number == convolutions - 1:
                features = layers.Add()([features, shortcut])
            features = activate(features)
    pool = layers.GlobalMaxPooling2D if config.pooling == "max" else layers.GlobalAveragePooling2D
    features = layers.Dropout(config.dropout)(pool(name="features")(features))
    # Softmax in full precision, so that small probabilities survive.
    probabilities = layers.Dense(config.classes, activation="softmax", dtype="float32", name="probabilities")(features)
    return keras.Model(images, probabilities)


def whitening_kernel(images, num_images=5000):
    """Returns filters that decorrelate patches of 2 x 2 pixels and give them unit variance: float32 (2, 2, 3, 24).

    The eigenvectors of the covariance of patches over the roots of their eigenvalues, and their negatives, because what
    follows is not symmetric (Jordan 2024, section 3.2). `images` are uint8 (n, height, width, 3).
    """
    images = (images[:num_images] - np.array(CHANNEL_MEANS, "float32")) / np.array(CHANNEL_DEVIATIONS, "float32")
    patches = np.lib.stride_tricks.sliding_window_view(images, (2, 2), axis=(1, 2))  # (n, height, width, 3, 2, 2)
    patches = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 12)
    values, vectors = np.linalg.eigh(np.cov(patches, rowvar=False))
    filters = (vectors / np.sqrt(values + 5e-4)).reshape(2, 2, 3, 12)
    return np.concatenate([filters, -filters], axis=-1).astype("float32")


def initialize(network, config, images):
    """Sets the weights of a new network that Keras' initialisers cannot: whitening and identity."""
    if config.whitening:
        network.get_layer("whitening").set_weights([whitening_kernel(images)])
    for layer in network.layers if config.identity else []:
        if isinstance(layer, layers.Conv2D) and layer.name != "whitening":
            kernel, *bias = layer.get_weights()
            same = min(kernel.shape[2:])
            kernel[..., :same] = 0
            kernel[1, 1, range(same), range(same)] = 1
            layer.set_weights([kernel, *bias])


# ------------------------------------------------------------------------------------------------- losses and training


class AlternatingMirror(layers.Layer):
    """Mirrors half of the images in one epoch and the other half in the next (Jordan 2024, section 3.6).

    Every image is seen both ways in two epochs, where random mirroring shows a quarter of them the same way twice. The
    half that an image belongs to is the parity of the sum of its pixels.
    """

    def __init__(self, **keywords):
        super().__init__(**keywords)
        self.epoch = self.add_weight(shape=(), dtype="int32", initializer="zeros", trainable=False, name="epoch")

    def call(self, images, training=False):
        if not training:
            return images
        parity = (ops.sum(ops.cast(images, "int32"), axis=(1, 2, 3), keepdims=True) + self.epoch) % 2
        return ops.where(parity == 0, ops.flip(images, axis=2), images)


class Muon(keras.optimizers.Adam):
    """Momentum with orthogonal updates for the kernels of convolutions, Adam for all other weights.

    Jordan et al., "Muon: an optimizer for hidden layers" (2024). The kernels must be followed by normalisation: their
    length is kept at the root of the number of filters, so that the learning rate is a relative one.
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
    """Brings all singular values of a kernel (height, width, in, filters), seen as a matrix, near 1.

    Newton-Schulz iteration with the coefficients of Jordan et al. (2024): values between 0.7 and 1.2 after five steps.
    """
    matrix = ops.reshape(kernel, (-1, kernel.shape[-1]))
    is_wide = matrix.shape[0] < matrix.shape[1]
    matrix = ops.transpose(matrix) if not is_wide else matrix
    matrix = matrix / (ops.sqrt(ops.sum(ops.square(matrix))) + 1e-7)
    for _ in range(steps):
        gram = ops.matmul(matrix, ops.transpose(matrix))
        matrix = 3.4445 * matrix + ops.matmul(-4.7750 * gram + 2.0315 * ops.matmul(gram, gram), matrix)
    return ops.reshape(matrix if is_wide else ops.transpose(matrix), kernel.shape)


OPTIMIZERS = {
    "adamw": lambda rate, decay, **average: keras.optimizers.AdamW(rate, weight_decay=decay, **average),
    "sgd": lambda rate, decay, **average: keras.optimizers.SGD(
        rate, momentum=0.9, nesterov=True, weight_decay=decay, **average
    ),
    "muon": lambda rate, decay, **average: Muon(rate, **average),
}


class FromCurve:
    """Lets a callback that watches a metric rebuild its counters from the learning curve of a resumed run."""

    def __init__(self, curve, **keywords):
        super().__init__(**keywords)
        self.curve = curve

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        rate = float(self.model.optimizer.learning_rate)
        for epoch, value in enumerate(self.curve):
            self.on_epoch_end(epoch, {self.monitor: value})
        self.model.optimizer.learning_rate = rate  # that of the checkpoint


class Plateau(FromCurve, keras.callbacks.ReduceLROnPlateau):
    pass


class Stopping(FromCurve, keras.callbacks.EarlyStopping):
    pass


def plateau_callbacks(folder, resume):
    """Returns callbacks that lower the rate when validation stops improving, stop later, and keep the best weights."""
    state = folder / "state.json"
    curves = read_json(state, "start over without --resume")["history"] if resume and state.is_file() else {}
    losses, accuracies = curves.get("val_loss", []), curves.get("val_accuracy", [])
    return [
        Plateau(losses, monitor="val_loss", factor=0.3, patience=1),
        Stopping(losses, monitor="val_loss", patience=3),
        keras.callbacks.ModelCheckpoint(
            folder / "best.weights.h5",
            monitor="val_accuracy",
            mode="max",
            save_best_only=True,
            save_weights_only=True,
            initial_value_threshold=max(accuracies, default=None),
        ),
    ]


def compile_model(model, optimizer, label_smoothing, steps):
    model.compile(
        optimizer,
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=label_smoothing),
        metrics=[keras.metrics.CategoricalAccuracy("accuracy")],
        **training.compile_options(steps),
    )


class EpochNumber(keras.callbacks.Callback):
    """Tells an `AlternatingMirror` which epoch it is, counted from `first`."""

    def __init__(self, layer, first):
        super().__init__()
        self.layer, self.first = layer, first

    def on_epoch_begin(self, epoch, logs=None):
        self.layer.epoch.assign(epoch + self.first)


def build_optimizer(config, num_examples, share=1.0):
    """Returns the optimizer of a training run with a `share` of the learning rate."""
    rate = share * config.learning_rate
    if config.schedule == "one cycle":
        rate = training.cosine_schedule(rate, training.count_steps(num_examples, config))
    average = {"use_ema": config.averaging > 0, "ema_momentum": config.averaging}
    optimizer = OPTIMIZERS[config.optimizer](rate, config.weight_decay, **average)
    if optimizer.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


def train_own(config, split, seed, *, folder, resume, validation):
    """Trains a network of our own from scratch, or resumes it from its checkpoints in `folder`.

    `split` and `validation` are uint8 images (n, 32, 32, 3) and labels (n,) below `config.classes`. Returns the network
    in float32 with rounded weights, its learning curves and seconds. Raises `training.Diverged`.
    """
    keras.utils.set_random_seed(seed)
    with training.computing_in(training.fast_precision()) as precision:
        network = build_network(config)
    initialize(network, config, split[0])
    optimizer = build_optimizer(config, len(split[0]))
    small_epochs = min(config.small_epochs, config.epochs - 1)
    sizes = [(config.small_size, small_epochs)] if small_epochs else []
    sizes += [(IMAGE_SIZE, config.epochs - small_epochs)]
    sizes += [(config.tuned_size, config.tuned_epochs)] if config.tuned_epochs else []
    curves, seconds = {}, 0.0
    for number, (size, epochs) in enumerate(sizes):
        tuning = config.tuned_epochs and number == len(sizes) - 1
        shortened = dataclasses.replace(config, epochs=epochs)
        if tuning:
            for layer in early_layers(network):
                layer.trainable = False
            optimizer = build_optimizer(shortened, len(split[0]), TUNING_SHARE)
        model, callbacks = build_trained(network, config, size, seed, first_epoch=len(curves.get("loss", ())))
        part_folder = folder / f"part_{number + 1}"
        if config.schedule == "plateau":
            callbacks += plateau_callbacks(part_folder, resume)
        compile_model(model, optimizer, config.label_smoothing, training.count_steps(len(split[0]), shortened))
        targets, validation_targets = (one_hot(labels, config.classes) for labels in (split[1], validation[1]))
        part_curves, part_seconds = training.fit(
            model,
            area_average(split[0], min(size, IMAGE_SIZE)),
            targets,
            config=shortened,
            seed=seed,
            folder=part_folder,
            resume=resume,
            precision=precision,
            validation_data=(area_average(validation[0], min(size, IMAGE_SIZE)), validation_targets),
            callbacks=callbacks,
        )
        optimizer.finalize_variable_values(model.trainable_variables)  # fit does it, unless this part was finished
        curves = {name: curves.get(name, []) + part_curves[name] for name in ("accuracy", "loss", *VALIDATION_CURVES)}
        seconds += part_seconds
        if config.schedule == "plateau":
            model.load_weights(part_folder / "best.weights.h5")
    full_precision = build_network(config, (IMAGE_SIZE, IMAGE_SIZE, 3))
    models.set_weights(full_precision, network.get_weights())
    round_to_grid(full_precision)
    return full_precision, curves, seconds


def build_trained(network, config, size, seed, first_epoch):
    """Returns a model that augments images and gives them to `network` at a size, and the callbacks that it needs."""
    side = min(size, IMAGE_SIZE)
    images = augmented = keras.Input((side, side, 3), dtype="uint8")
    callbacks = []
    if "alternate" in config.augmentation:
        alternate = AlternatingMirror()
        augmented = alternate(augmented)
        callbacks.append(EpochNumber(alternate, first_epoch))
    if "mirror" in config.augmentation:
        augmented = layers.RandomFlip("horizontal", seed=seed)(augmented)
    if "shift" in config.augmentation:
        factor = 2 / IMAGE_SIZE
        shift = layers.RandomTranslation(factor, factor, "reflect", interpolation="nearest", seed=seed)  # no blur
        shift.supports_jit = True  # Keras denies it of this layer, and would run every step uncompiled under JAX
        augmented = shift(augmented)
    if size > side:
        augmented = layers.Resizing(size, size)(augmented)
    return keras.Model(images, network(augmented)), callbacks


def early_layers(network):
    """Returns all layers of a network of ours before its last stage."""
    poolings = [number for number, layer in enumerate(network.layers) if isinstance(layer, layers.MaxPooling2D)]
    return network.layers[: poolings[-1] - 1]  # the convolution before the last pooling is part of the last stage


def input_kind(config):
    """Returns what a model on VGG16 takes: "images", or the kind of `Features`."""
    if config.image_size > IMAGE_SIZE:
        return "pooled"
    return {"head": "block 5", "top block": "maps", "all": "images"}[config.trained]


def build_vgg(config, base):
    """Returns the part of a classifier on VGG16 that is trained, from `input_kind` to probabilities (n, 100)."""
    kind = input_kind(config)
    if kind in ("pooled", "block 5"):
        return build_head(config, 1280 if kind == "pooled" else 512)
    if kind == "images":
        inputs = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), name="images")
        maps = copy_blocks(preprocess(inputs), base.blocks_1_to_4, (1, 2, 3, 4))
    else:
        inputs = maps = keras.Input((2, 2, 512), name="maps")
    features = layers.GlobalAveragePooling2D()(copy_blocks(maps, base.block_5, (5,)))  # of a single place
    return keras.Model(inputs, build_head(config, 512)(features))


def train_vgg(config, splits, features, seed, *, folder, resume):
    """Trains a classifier on VGG16, or resumes it from its checkpoint in `folder`.

    `splits` is a dict of `Cifar100Images`, `features` are the `Features` of them. Returns as `build_vgg`, and the
    learning curves and seconds, without those of computing features.
    """
    keras.utils.set_random_seed(seed)
    network, kind = build_vgg(config, features.base), input_kind(config)
    labels = {part: one_hot(splits[part].labels) for part in ("train", "validation")}
    images = augmented = keras.Input(network.input_shape[1:])
    if kind == "images":
        inputs = {part: splits[part].images for part in labels}
        if config.mirrored:
            augmented = layers.RandomFlip("horizontal", seed=seed)(images)
    else:
        inputs = {part: features(kind, part) for part in labels}
        if config.mirrored:
            inputs["train"] = np.concatenate([inputs["train"], features(kind, "train", mirrored=True)])
            labels["train"] = np.concatenate([labels["train"], labels["train"]])
    steps = training.count_steps(len(inputs["train"]), config)
    rate = training.cosine_schedule(config.learning_rate, steps)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=config.weight_decay)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model = keras.Model(images, network(augmented))
    compile_model(model, optimizer, config.label_smoothing, steps)
    curves, seconds = training.fit(
        model,
        inputs["train"],
        labels["train"],
        config=config,
        seed=seed,
        folder=folder,
        resume=resume,
        validation_data=(inputs["validation"], labels["validation"]),
    )
    round_to_grid(network)
    return network, curves, seconds


def select(split, classes):
    """Returns images and labels of `Cifar100Images` for a network with so many `classes` (see `Config`)."""
    if classes == 20:
        return split.images, split.coarse_labels
    chosen = split.labels < classes
    return split.images[chosen], split.labels[chosen]


def get_base(arguments):
    """Returns the `VggBase`: with --quick the saved one, where there is one, which needs no download."""
    folder = models.models_folder(arguments.output_dir, SCRIPT)
    if arguments.quick and (folder / f"{BASE_PARTS[0]}.keras").is_file():
        return restore_base(folder)
    return load_vgg16(arguments.data_dir)


def train(arguments):
    """Trains the wanted models and saves the one of the first seed, with a card that has the metrics of all seeds."""
    names = [arguments.model] if arguments.model else MODELS
    splits, dataset = load_splits(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    cache = arguments.output_dir / "runs" / SCRIPT / "features"
    is_vgg = [name for name in names if isinstance(CONFIGS[name], VggConfig)]
    features = Features(get_base(arguments), splits, cache) if is_vgg else None
    trained = {name: [] for name in names}
    for name, seed, folder in results.training_runs(SCRIPT, arguments, names, NUM_SEEDS):
        config = cli.with_flags(CONFIGS[name], arguments)
        checkpoint = {"folder": folder, "resume": arguments.resume}
        if isinstance(config, VggConfig):
            run = train_vgg(config, splits, features, seed, **checkpoint)
        else:
            selected = {part: select(splits[part], config.classes) for part in ("train", "validation")}
            run = train_own(config, selected["train"], seed, validation=selected["validation"], **checkpoint)
        trained[name].append((config, seed, *run))

    # The test images are read after the last training run has ended.
    if arguments.sample:
        splits["sample"] = splits.pop("test")
    else:
        splits["sample"] = load_splits(arguments.data_dir, sample=True)[0]["test"]
    about = {"name": dataset.name, **{part: len(split.images) for part, split in splits.items()}}
    about["sha256"] = dataset.checksums
    compresslevel = 1 if arguments.quick else 9  # which takes three minutes for all models together
    folder = arguments.output_dir / "saved_models" / SCRIPT
    for name, runs in trained.items():
        measured = []
        for config, _, network, _, _ in runs:
            parts = splits if not measured else {part: splits[part] for part in splits if part != "train"}
            measured.append(evaluate_parts(network, config, parts, features))
        config, seed, network, curves, seconds = runs[0]  # the first seed is saved, whatever its metrics
        made = {"config": config, "seed": seed, "curves": curves, "seconds": seconds}
        card = models.card(SCRIPT, name, arguments, dataset=about, metrics=measured[0], **made)
        card["seeds"] = [
            {"seed": run[1], "seconds": round(run[4], 1), "curves": run[3], **metrics}
            for run, metrics in zip(runs, measured, strict=True)
        ]
        if isinstance(config, VggConfig):
            card["base_sha256"] = features.checksum
        models.save_model(network, folder / f"{name}.keras", card, compresslevel)
    for name, part in zip(BASE_PARTS, features.base, strict=True) if is_vgg else ():
        config = dataclasses.replace(CONFIGS[is_vgg[0]], epochs=0)
        made = {"config": config, "seed": arguments.seed, "curves": {}, "seconds": 0.0, "metrics": {}}
        card = models.card(SCRIPT, name, arguments, dataset=about, **made)
        card["base_sha256"] = features.checksum
        models.save_model(part, folder / f"{name}.keras", card, compresslevel)


# ---------------------------------------------------------------------------------------------------------- evaluation


def restore_base(folder):
    """Returns the saved `VggBase`; raises `UserError` where it is missing or damaged."""
    return VggBase(*(models.load_model(folder / f"{name}.keras", SCRIPT)[0] for name in BASE_PARTS))


def augmented_views(images):
    """Yields the images, and their mirror images, unmodified and shifted by a pixel along both diagonals."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    side = images.shape[1]
    for first in (1, 0, 2):
        view = padded[:, first : first + side, first : first + side]
        yield view
        yield view[:, :, ::-1]


def predict_augmented(network, images):
    """Returns the probabilities of `network`, averaged over the `augmented_views` of images: float32 (n, classes)."""
    return np.mean([predict(network, view) for view in augmented_views(images)], axis=0)


def classification_metrics(probabilities, labels):
    """Returns accuracy, top-5 accuracy and mean log loss of probabilities (n, classes): dict of float."""
    classes = np.arange(probabilities.shape[1])
    probabilities = probabilities.astype("float64")
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return {
        "accuracy": float((probabilities.argmax(1) == labels).mean()),
        "top_5_accuracy": float(top_k_accuracy_score(labels, probabilities, k=5, labels=classes)),
        "log_loss": float(log_loss(labels, probabilities, labels=classes)),
    }


def evaluate(network, config, features, part, split, augmented=True):
    """Returns the metrics of a network on a split, and its probabilities.

    Those of our own networks include the accuracy with `predict_augmented`, unless `augmented` is False.
    """
    if isinstance(config, VggConfig):
        kind = input_kind(config)
        probabilities = predict(network, split.images if kind == "images" else features(kind, part))
        return classification_metrics(probabilities, split.labels), probabilities
    images, labels = select(split, config.classes)
    probabilities = predict(network, images)
    metrics = classification_metrics(probabilities, labels)
    if augmented:
        metrics["augmented_accuracy"] = float((predict_augmented(network, images).argmax(1) == labels).mean())
    return metrics, probabilities


def evaluate_parts(network, config, splits, features):
    """Returns the metrics of a network on each split: dict of dicts. Augmentation is left out on training images."""
    if features is not None:
        features.splits = splits
    return {
        part: evaluate(network, config, features, part, split, augmented=part != "train")[0]
        for part, split in splits.items()
    }


# --------------------------------------------------------------------------------------------------------- experiments


def run_experiments(arguments):
    """Trains what the experiments plan, one row of the table for each run, and measures it on the validation images."""
    plan = results.optional_module("experiments", SCRIPT)
    if plan is None:
        return 0
    table = results.table_path(arguments.output_dir, SCRIPT)
    splits, _ = load_splits(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    whole = splits["train"]
    folder = arguments.output_dir / "runs" / SCRIPT
    features = None
    planned = plan.planned_runs(arguments.seed)
    for run in results.unfinished(table, planned, limit=2 if arguments.quick else None):
        changes = plan.EXPERIMENTS[run["name"]]
        baseline = VggConfig() if run["name"] in plan.VGG else Config()
        config = cli.with_flags(dataclasses.replace(baseline, **changes), arguments)
        count = None if run["name"] in plan.ALL_IMAGES else plan.IMAGES
        splits["train"] = Cifar100Images(*(array[:count] for array in whole))
        checkpoint = {"folder": folder / "experiment", "resume": False}
        try:
            if isinstance(config, VggConfig):
                features = features or Features(get_base(arguments), splits, folder / "features")
                network, curves, seconds = train_vgg(config, splits, features, run["seed"], **checkpoint)
            else:
                selected = {part: select(splits[part], config.classes) for part in ("train", "validation")}
                network, curves, seconds = train_own(
                    config, selected["train"], run["seed"], validation=selected["validation"], **checkpoint
                )
            measured, _ = evaluate(network, config, features, "validation", splits["validation"])
            row = {
                **run,
                "changes": ", ".join(f"{name}={value}" for name, value in changes.items()),
                "images": len(splits["train"].images),
                "epochs": len(curves["loss"]),
                "parameters": models.parameter_counts(network)["trainable"],
                "seconds": round(seconds, 1),
                "train_accuracy": round(curves["accuracy"][-1], 4),
                **{f"validation_{name}": round(measured.get(name, math.nan), 4) for name in METRICS},
            }
        except training.Diverged:
            row = {**dict.fromkeys([*ROW_FIELDS, *(f"validation_{name}" for name in METRICS)], ""), **run}
        results.append_row(table, row)
    return 0


# -------------------------------------------------------------------------------------------------------------- report


def report(arguments):
    """Restores the saved models, measures them, and writes figures; returns the exit code."""
    folder = models.models_folder(arguments.output_dir, SCRIPT)
    print(f"models from {folder}")
    splits, dataset = load_splits(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    test, part = splits["test"], "sample" if arguments.sample else "test"
    features, rows, measured, cards = None, [], {}, {}
    for name in [arguments.model] if arguments.model else MODELS:
        path = folder / f"{name}.keras"
        network, card = models.load_model(path, SCRIPT)
        config = CONFIGS[name]
        if isinstance(config, VggConfig) and features is None:
            cache = arguments.output_dir / "runs" / SCRIPT / "features"
            features = Features(restore_base(folder), {"test": test}, cache)
        if isinstance(config, VggConfig) and card.get("base_sha256") != features.checksum:
            raise UserError(f"{path} was trained on another base than that in {folder}; train it again")
        measured[name], _ = evaluate(network, config, features, "test", test)
        cards[name] = card
        rows += results.compare(card, measured[name], part=part, size=len(test.images), sha256=dataset.checksums)
        if arguments.record:
            results.record_metrics(path, **{part: (len(test.images), measured[name])})
    written = []
    if (arguments.train or arguments.record) and not arguments.sample:
        summary = {"script": f"{SCRIPT}.py", "models": {}}
        for name, card in cards.items():
            summary["models"][name] = {"test": measured[name], "parameters": card["parameters"]["trainable"]}
        written.append(results.write_results(SCRIPT, arguments, summary))
    results.optional_module("plots", SCRIPT)
    return results.conclude(SCRIPT, arguments, rows, written)


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    arguments = cli.parse(cli.parser(__doc__, MODELS), argv)
    if arguments.experiments:
        return run_experiments(arguments)
    if arguments.train:
        train(arguments)
    return report(arguments)


if __name__ == "__main__":
    cli.run(main)
