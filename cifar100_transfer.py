"""CIFAR-100: VGG16 pre-trained on ImageNet, three ways, and networks trained from scratch.

Part 1 of the assignment trains a dense head on the features of VGG16 (Simonyan & Zisserman 2015), then fine-tunes its
last block, then all of it. The images are 32 x 32 pixels, a seventh of the side that VGG16 was trained on, so a fourth
model shows what upsampling to 64 x 64 is worth. Part 2 trains networks of our own with at most 3 million parameters: a
plain one, a residual one with normalisation and augmentation, and what the experiments led to, which borrows from
Jordan, "94 % on CIFAR-10 in 3.29 seconds on a single GPU" (arXiv:2404.00498).

    python cifar100_transfer.py --train            trains seven models; one of them with --model
    python cifar100_transfer.py --load             restores the saved models and verifies their metrics
    python cifar100_transfer.py --experiments      what each technique is worth, on validation images; can be resumed
    python cifar100_transfer.py --predict FILE...  prints the five most probable classes of each image

5,000 of the 50,000 training images, 50 of each class, are held out for validation, and every choice is made there.

Test accuracy of VGG16: frozen 43.6 ± 0.2 % (n = 3 seeds), block 5 tuned 61.5, all blocks tuned 65.9, frozen and with
images of 64 x 64 pixels 66.1 ± 0.2 (n = 2); own networks: 46.8, 60.5, 72.9 ± 0.3 (n = 2), both seeds of the last 75.3.
Training runs took 0.3, 20, 26, 0.4, 12, 10 and 67 minutes, in this order, on 2 shared cores of an Intel Xeon with AMX.
"""

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
import hashlib
import shutil
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
from keras import layers
from keras.utils import to_categorical
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import train_test_split

from common import cli, models, results, training
from common.datasets import Cifar100Images, area_average, load_cifar100, vgg16_weights
from common.errors import UserError, reason
from common.files import replacing
from common.images import predict_each, printable, read_square
from common.metrics import classification_metrics, confident_mistakes, most_probable, reliability, standard_deviation
from common.optimizers import Muon

SCRIPT = "cifar100_transfer"
NUM_CLASSES, NUM_SUPERCLASSES = 100, 20
IMAGE_SIZE = 32  # side in pixels
IMAGE_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
SPLIT_SEED = 100
BLOCKS_1_TO_4 = "vgg_blocks_1_to_4"  # name of the file; block 5 is part of the tail vgg_features
QUICK_IMAGES = 200
PREDICT_BATCH_SIZE = 250
TUNING_SHARE = 0.2  # of the learning rate
ROW_FIELDS = ("name", "seed", "changes", "images", "epochs", "parameters", "seconds")  # of an experiment
ROW_FIELDS += ("train_accuracy", "validation_accuracy", "validation_log_loss", "validation_augmented_accuracy")
CHANNEL_MEANS, CHANNEL_DEVIATIONS = (129.3, 124.1, 112.4), (68.2, 65.4, 70.4)  # of the training images, RGB


@dataclasses.dataclass(frozen=True)
class Config:
    """A network of our own; the defaults are the baseline of the experiments."""

    filters: tuple = (32, 64, 128)  # of each stage: a convolution, max pooling, then more convolutions
    convolutions: tuple = (2, 2, 2)  # in each stage after the pooling
    residual: bool = True  # a shortcut around those
    separable: bool = False  # depthwise-separable convolutions instead of full ones
    batch_norm: bool = True  # after each convolution (after the pooling, where there is one: a quarter of the cost)
    whitening: bool = False  # a fixed first convolution that decorrelates patches of 2 x 2 pixels
    pooling: str = "average"  # or "max", over all places before the classifier
    dropout: float = 0.0  # before the classifier
    augmentation: bool = True  # random mirroring, and shifts by up to 2 pixels
    label_smoothing: float = 0.1
    optimizer: str = "adamw"  # key of OPTIMIZERS
    learning_rate: float = 2e-3  # the highest one
    weight_decay: float = 0.05  # decoupled; not for "muon"
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

    trained: str = "head"  # what is trained: the "head"; after it also the "top block", or "all"
    image_size: int = IMAGE_SIZE  # 64: upsampled, and the pooled outputs of blocks 3, 4 and 5 together
    standardize: bool = False  # each feature to mean 0 and standard deviation 1, before the head
    hidden: tuple = ()  # units of the hidden dense layers of the head
    dropout: float = 0.0  # before each dense layer
    label_smoothing: float = 0.0
    mirrored: bool = False  # the features of mirrored images are trained on, too; images are mirrored and shifted
    optimizer: str = "adamw"  # as in `Config`, like the rest
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    schedule: str = "one cycle"
    batch_size: int = 128
    epochs: int = 20


HEAD = VggConfig(standardize=True)
TUNED = dataclasses.replace(HEAD, mirrored=True, label_smoothing=0.1, learning_rate=1e-4, weight_decay=0.01)
PLAIN = Config(convolutions=(1, 1, 1), residual=False, batch_norm=False, augmentation=False, label_smoothing=0.0)
WIDE = Config((64, 192, 320), convolutions=(1, 1, 2), whitening=True, optimizer="muon", learning_rate=0.1)
CONFIGS = {
    "vgg_features": HEAD,
    "vgg_top_block": dataclasses.replace(TUNED, trained="top block", learning_rate=1e-3, epochs=5),
    "vgg_full": dataclasses.replace(TUNED, trained="all", dropout=0.3, learning_rate=2e-4, batch_size=256, epochs=6),
    "vgg_features_64": dataclasses.replace(HEAD, image_size=64),
    "own_1": dataclasses.replace(
        PLAIN, dropout=0.3, learning_rate=1e-3, weight_decay=1e-3, schedule="plateau", epochs=20
    ),
    "own_2": Config(filters=(48, 96, 192), dropout=0.2, epochs=10),
    "own_3": dataclasses.replace(WIDE, small_size=24, small_epochs=14, epochs=40),
}
MODELS = list(CONFIGS)
NUM_SEEDS = dict.fromkeys(MODELS, 1) | {"vgg_features": 3, "vgg_features_64": 2, "own_3": 2}
SAVED = CONFIGS | {"own_3_seed_1": CONFIGS["own_3"]}  # by the name of the file; the second seed is for the ensemble
BEST, MEMBERS = "own_3", ("own_3", "own_3_seed_1")  # of the ensemble; own_2 lowered its validation accuracy

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


# --------------------------------------------------------------------------------------------------------- model: VGG16


class VggBase(NamedTuple):
    """The convolutional base of VGG16 in two parts, with preprocessing."""

    blocks_1_to_4: keras.Model  # images (n, height, width, 3), 0 to 255, to maps (n, height / 16, width / 16, 512)
    block_5: keras.Model  # those maps to the mean of its output over all places, (n, 512)


def build_base(weights):
    """Returns the `VggBase` with the weights in a file, rounded as they are saved; `UserError` where it is damaged."""
    images, maps = keras.Input((None, None, 3), name="images"), keras.Input((None, None, 512), name="maps")
    try:
        whole = keras.applications.VGG16(include_top=False, weights=weights, input_tensor=preprocess(images))
    except (OSError, ValueError) as error:
        raise UserError(f"{weights} is damaged ({reason(error)}); delete it and try again") from error
    models.round_to_grid(whole)
    features = maps
    for layer in whole.layers[-4:]:  # three convolutions and pooling
        features = layer(features)
    block_5 = keras.Model(maps, layers.GlobalAveragePooling2D()(features), name="block_5")
    return VggBase(keras.Model(images, whole.get_layer("block4_pool").output, name="blocks_1_to_4"), block_5)


def preprocess(images):
    """`keras.applications.vgg16.preprocess_input` out of operations that a saved model may have: RGB to BGR - means."""
    return layers.Rescaling(1.0, [-103.939, -116.779, -123.68], name="preprocess")(images[..., ::-1])


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


def build_vgg(config, base):
    """Returns the head of a `VggConfig`, and the whole network that is saved, which takes `saved_with(config)`.

    The network has copies of those parts of `base` that are trained, and takes the output of the others.
    """

    def copy_of(model, trainable):
        copy = keras.models.clone_model(model)
        copy.set_weights(model.get_weights())
        for layer in copy.layers:
            layer.trainable = trainable
        return copy

    if config.image_size > IMAGE_SIZE:  # the head alone: both files of the base are needed anyway
        head = build_head(config, 1280)
        return head, head
    head = build_head(config, 512)
    maps = keras.Input((2, 2, 512), name="maps")
    tail = keras.Model(maps, head(copy_of(base.block_5, trainable=config.trained != "head")(maps)))
    if config.trained != "all":
        return head, tail
    images = keras.Input(IMAGE_SHAPE, name="images")
    return head, keras.Model(images, tail(copy_of(base.blocks_1_to_4, trainable=True)(images)))


def build_pooled(base, size):
    """Returns a model from images (n, 32, 32, 3) to the means of the outputs of blocks 3, 4 and 5 of VGG16: (n, 1280).

    `size` is the side in pixels that the images are upsampled to.
    """
    images, first = keras.Input(IMAGE_SHAPE, name="images"), base.blocks_1_to_4
    blocks = keras.Model(first.input, [first.get_layer("block3_pool").output, first.output])
    block_3, block_4 = blocks(layers.Resizing(size, size)(images))
    pooled = [layers.GlobalAveragePooling2D()(maps) for maps in (block_3, block_4)]
    return keras.Model(images, layers.Concatenate()([*pooled, base.block_5(block_4)]))


class Features:
    """What the frozen base makes of images: computed once, kept in `folder` as float16."""

    def __init__(self, base, folder):
        self.base, self.folder = base, folder

    def __call__(self, kind, images, mirrored=False):
        """Returns the features of uint8 images (n, 32, 32, 3), or of their mirror images: float16, a memory map.

        `kind` is "maps" for the output of block 4, (n, 2, 2, 512); "block 5" for the mean of its output, (n, 512); or
        "pooled" for the means of blocks 3, 4 and 5 at 64 x 64 pixels, (n, 1280). "images" are returned as they are.
        """
        if kind == "images":
            return images
        digest = hashlib.sha256(np.ascontiguousarray(images))
        for weights in (weights for part in self.base for weights in part.get_weights()):
            digest.update(weights)
        path = self.folder / f"{kind.replace(' ', '_')}_{digest.hexdigest()[:16]}{'_mirrored' * mirrored}.npy"
        if not path.is_file():
            inputs = images[:, :, ::-1] if mirrored else images
            if kind == "block 5":
                inputs = self("maps", images, mirrored)
            print(f"computing the features ({kind}) of {len(images):,} {'mirrored ' * mirrored}images", flush=True)
            network = build_pooled(self.base, 2 * IMAGE_SIZE) if kind == "pooled" else self.base[kind == "block 5"]
            features = predict(network, inputs).astype("float16")
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, features)
        return np.load(path, mmap_mode="r")


def predict(network, inputs):
    """Returns the outputs of a network, float32 (n, ...)."""
    return models.for_prediction(network, len(inputs)).predict(inputs, batch_size=PREDICT_BATCH_SIZE, verbose=0)


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

    images = keras.Input(image_shape, name="images")
    scale, offset = 1 / np.array(CHANNEL_DEVIATIONS), -np.array(CHANNEL_MEANS) / CHANNEL_DEVIATIONS
    features = images
    if config.tuned_epochs and image_shape[0] == IMAGE_SIZE:
        features = layers.Resizing(config.tuned_size, config.tuned_size)(features)
    features = layers.Rescaling(scale.tolist(), offset.tolist(), name="standardize")(features)
    if config.whitening:
        features = layers.ReLU()(layers.Conv2D(24, 2, use_bias=False, trainable=False, name="whitening")(features))
    for filters, convolutions in zip(config.filters, config.convolutions, strict=True):
        features = layers.MaxPooling2D(2)(convolve(features, filters))
        features = shortcut = layers.ReLU()(normalize(features))
        for number in range(convolutions):
            features = normalize(convolve(features, filters))
            if config.residual and number == convolutions - 1:
                features = layers.Add()([features, shortcut])
            features = layers.ReLU()(features)
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


# ------------------------------------------------------------------------------------------------- losses and training


OPTIMIZERS = {  # by name, from learning rate and decoupled weight decay
    "adamw": lambda rate, decay: keras.optimizers.AdamW(rate, weight_decay=decay),
    "sgd": lambda rate, decay: keras.optimizers.SGD(rate, momentum=0.9, nesterov=True, weight_decay=decay),
    "muon": lambda rate, decay: Muon(rate),
}


def plateau_callbacks(folder):
    """Returns callbacks that lower the rate when validation stops improving, stop later, and keep the best weights."""
    return [
        keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.3, patience=1),
        keras.callbacks.EarlyStopping(monitor="val_loss", patience=3),
        keras.callbacks.ModelCheckpoint(
            folder / "best.weights.h5", monitor="val_accuracy", mode="max", save_best_only=True, save_weights_only=True
        ),
    ]


def fit(model, optimizer, config, train, validation, **keywords):
    """Compiles a model and fits it to `train`, (inputs, targets); returns what `training.fit` does."""
    model.compile(
        optimizer,
        loss=keras.losses.CategoricalCrossentropy(label_smoothing=config.label_smoothing),
        metrics=[keras.metrics.CategoricalAccuracy("accuracy")],
        **training.compile_options(training.count_steps(len(train[0]), config)),
    )
    keywords |= {"config": config, "precision": training.fast_precision(), "validation_data": validation}
    return training.fit(model, *train, **keywords)


def build_optimizer(config, num_examples, share=1.0):
    """Returns the optimizer of a training run with a `share` of the learning rate."""
    rate = share * config.learning_rate
    if config.schedule == "one cycle":
        rate = training.cosine_schedule(rate, training.count_steps(num_examples, config))
    optimizer = OPTIMIZERS[config.optimizer](rate, config.weight_decay)
    if optimizer.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    return optimizer


def train_own(config, split, seed, *, folder, resume, validation):
    """Trains a network of our own from scratch, or resumes it from its checkpoints in `folder`.

    `split` and `validation` are uint8 images (n, 32, 32, 3) and labels (n,) below `config.classes`. Returns the network
    in float32 with rounded weights, its learning curves and seconds. Raises `training.Diverged`.
    """
    keras.utils.set_random_seed(seed)
    with training.computing_in(training.fast_precision()):
        network = build_network(config)
    if config.whitening:
        network.get_layer("whitening").set_weights([whitening_kernel(split[0])])
    optimizer = build_optimizer(config, len(split[0]))
    small_epochs = min(config.small_epochs, config.epochs - 1)
    parts = [(config.small_size, small_epochs)] if small_epochs else []
    parts += [(IMAGE_SIZE, config.epochs - small_epochs)]
    parts += [(config.tuned_size, config.tuned_epochs)] if config.tuned_epochs else []
    curves, seconds = {}, 0.0
    for number, (size, epochs) in enumerate(parts):
        part_config = dataclasses.replace(config, epochs=epochs)
        if config.tuned_epochs and number == len(parts) - 1:
            poolings = [number for number, each in enumerate(network.layers) if isinstance(each, layers.MaxPooling2D)]
            for layer in network.layers[: poolings[-1] - 1]:  # all before the convolution of the last stage
                layer.trainable = False
            optimizer = build_optimizer(part_config, len(split[0]), TUNING_SHARE)
        model = build_trained(network, config, size, seed)
        data = [
            (area_average(images, min(size, IMAGE_SIZE)), to_categorical(labels, config.classes))
            for images, labels in (split, validation)
        ]
        part_folder = folder / f"part_{number + 1}_of_{config.epochs}_epochs"
        callbacks = plateau_callbacks(part_folder) if config.schedule == "plateau" else ()
        keywords = {"seed": seed, "folder": part_folder, "resume": resume, "callbacks": callbacks}
        part_curves, part_seconds = fit(model, optimizer, part_config, *data, **keywords)
        curves = {name: curves.get(name, []) + part_curves[name] for name in part_curves}
        seconds += part_seconds
        if config.schedule == "plateau":
            model.load_weights(part_folder / "best.weights.h5")
    full_precision = build_network(config, (IMAGE_SIZE, IMAGE_SIZE, 3))
    models.set_weights(full_precision, network.get_weights())
    models.round_to_grid(full_precision)
    return full_precision, curves, seconds


def mirror_and_shift(images, seed):
    factor = 2 / IMAGE_SIZE
    shift = layers.RandomTranslation(factor, factor, "reflect", interpolation="nearest", seed=seed)  # no blur
    shift.supports_jit = True  # Keras denies it of this layer, and would run every step uncompiled under JAX
    return shift(layers.RandomFlip("horizontal", seed=seed)(images))


def build_trained(network, config, size, seed):
    """Returns a model that takes uint8 images, augments them and gives them to `network` at a size."""
    side = min(size, IMAGE_SIZE)
    images = augmented = keras.Input((side, side, 3), dtype="uint8")
    if config.augmentation:
        augmented = mirror_and_shift(images, seed)
    if size > side:
        augmented = layers.Resizing(size, size)(augmented)
    return keras.Model(images, network(augmented))


def trained_on(config):
    """Returns the kind of `Features` that the trained part of a classifier on VGG16 takes."""
    if config.image_size > IMAGE_SIZE:
        return "pooled"
    return {"head": "block 5", "top block": "maps", "all": "images"}[config.trained]


def saved_with(config):
    """Returns the kind of `Features` that its saved network takes."""
    return "maps" if trained_on(config) == "block 5" else trained_on(config)


def train_vgg(config, splits, features, seed, *, folder, resume):
    """Trains a classifier on VGG16, or resumes it from its checkpoints in `folder`.

    A head of random weights would send large gradients into the base, so it comes first, on frozen features (Chollet
    2021, section 8.3.2). `splits` is a dict of `Cifar100Images`. Returns the network, the learning curves of its last
    part, and the seconds of all parts, without those of computing `Features`.
    """
    keras.utils.set_random_seed(seed)
    head, network = build_vgg(config, features.base)
    parts = [(head, config if config.trained == "head" else HEAD)]
    if config.trained != "head":
        parts.append((network, config))
    seconds = 0.0
    for number, (part, part_config) in enumerate(parts):
        kind = trained_on(part_config)
        (inputs, targets), validation = (
            (features(kind, splits[name].images), to_categorical(splits[name].labels, NUM_CLASSES))
            for name in ("train", "validation")
        )
        fast = models.for_prediction(part)  # which computes in bfloat16 where that is faster
        images = augmented = keras.Input(part.input_shape[1:])
        if part_config.mirrored and kind == "images":
            augmented = mirror_and_shift(images, seed)
        elif part_config.mirrored:
            inputs = np.concatenate([inputs, features(kind, splits["train"].images, mirrored=True)])
            targets = np.concatenate([targets, targets])
        optimizer = build_optimizer(part_config, len(inputs))
        keywords = {"seed": seed, "folder": folder / f"part_{number + 1}", "resume": resume}
        model = keras.Model(images, fast(augmented))
        curves, part_seconds = fit(model, optimizer, part_config, (inputs, targets), validation, **keywords)
        models.set_weights(part, fast.get_weights())
        models.round_to_grid(part)
        seconds += part_seconds
    return network, curves, seconds


def train_one(config, splits, features, seed, *, folder, resume):
    """Trains the network of either kind of config; returns it with its learning curves and seconds."""
    if not resume:  # `fit` removes the checkpoints of its own part only
        shutil.rmtree(folder, ignore_errors=True)
    if isinstance(config, VggConfig):
        return train_vgg(config, splits, features, seed, folder=folder, resume=resume)
    split, validation = (select(splits[part], config.classes) for part in ("train", "validation"))
    return train_own(config, split, seed, folder=folder, resume=resume, validation=validation)


def select(split, classes):
    """Returns images and labels of `Cifar100Images` for a network with so many `classes` (see `Config`)."""
    if classes == 20:
        return split.images, split.coarse_labels
    chosen = split.labels < classes
    return split.images[chosen], split.labels[chosen]


def get_features(arguments):
    """Returns the `Features` of the saved base with --load, and with --quick if there is one, else of VGG16."""
    folder = models.models_folder(arguments.output_dir, SCRIPT)
    if arguments.load or (arguments.quick and (folder / f"{BLOCKS_1_TO_4}.keras").is_file()):
        saved = [models.load_model(folder / f"{name}.keras", SCRIPT)[0] for name in (BLOCKS_1_TO_4, "vgg_features")]
        base = VggBase(saved[0], saved[1].get_layer("block_5"))
    else:
        base = build_base(vgg16_weights(arguments.data_dir))
    return Features(base, arguments.output_dir / "runs" / SCRIPT / "features")


def train(arguments):
    """Trains the selected models, saves those of `SAVED`, the first seed whatever its metrics; returns `Features`."""
    names = [arguments.model] if arguments.model else MODELS
    splits, dataset = load_splits(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    features = get_features(arguments) if any(isinstance(CONFIGS[name], VggConfig) for name in names) else None
    runs = {name: [] for name in names}
    for name, seed, folder in results.training_runs(SCRIPT, arguments, names, NUM_SEEDS):
        config = cli.with_flags(CONFIGS[name], arguments)
        run = train_one(config, splits, features, seed, folder=folder, resume=arguments.resume)
        runs[name].append((config, seed, *run))

    # The test images are read after the last training run has ended.
    if arguments.sample:
        splits["sample"] = splits.pop("test")
    else:
        splits["sample"] = load_splits(arguments.data_dir, sample=True)[0]["test"]
    sizes = {part: len(split.images) for part, split in splits.items()}
    about = {"name": dataset.name, "sha256": dataset.checksums, **sizes}

    def save(network, name, seeds=(), **facts):
        path = arguments.output_dir / "saved_models" / SCRIPT / f"{name}.keras"
        card = models.card(SCRIPT, name, arguments, dataset=about, **facts) | {"seeds": list(seeds)}
        card["steps"] *= 1 + (name == "vgg_top_block")  # trained on features of mirrored images as well
        models.save_model(network, path, card, 1 if arguments.quick else 9)  # three minutes for all models together

    for name in names:
        seeds = []
        for config, seed, network, curves, seconds in runs[name]:
            metrics = {part: evaluate(network, config, features, split)[0] for part, split in splits.items()}
            seeds.append({"seed": seed, "seconds": round(seconds, 1), "curves": curves, **metrics})
        for number, (config, seed, network, curves, seconds) in enumerate(runs[name]):
            file_name = f"{name}_seed_{number}" if number else name
            if file_name in SAVED:
                facts = {"config": config, "seed": seed, "curves": curves, "seconds": seconds}
                facts["metrics"] = {part: seeds[number][part] for part in splits}
                save(network, file_name, [] if number else seeds, **facts)
    if features:
        untrained = {"config": dataclasses.replace(HEAD, epochs=0), "curves": {}, "seconds": 0.0, "metrics": {}}
        save(features.base.blocks_1_to_4, BLOCKS_1_TO_4, seed=arguments.seed, **untrained)
    return features


# ---------------------------------------------------------------------------------------------------------- evaluation


def augmented_views(images):
    """Yields the images, and their mirror images, unmodified and shifted by a pixel along a diagonal, both ways."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    side = images.shape[1]
    for first in (1, 0, 2):
        view = padded[:, first : first + side, first : first + side]
        yield view
        yield view[:, :, ::-1]


def evaluate(network, config, features, split):
    """Returns the metrics of a network on a split of images, and its probabilities.

    Those of our own networks include the accuracy of the mean probabilities of the `augmented_views`.
    """
    if isinstance(config, VggConfig):
        probabilities = predict(network, features(saved_with(config), split.images))
        return classification_metrics(probabilities, split.labels), probabilities
    images, labels = select(split, config.classes)
    views = [predict(network, view) for view in augmented_views(images)]
    augmented = float((np.mean(views, axis=0).argmax(1) == labels).mean())
    return classification_metrics(views[0], labels) | {"augmented_accuracy": augmented}, views[0]


# --------------------------------------------------------------------------------------------------------- experiments


def run_experiments(arguments):
    """Trains what the experiments plan, one row of the table for each run, and measures it on the validation images."""
    plan = results.optional_module("experiments", SCRIPT)
    if plan is None:
        return 0
    table = results.table_path(arguments.output_dir, SCRIPT)
    splits, _ = load_splits(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    whole, labels = splits["train"], splits["validation"].labels
    folder = arguments.output_dir / "runs" / SCRIPT / "experiments"  # probabilities of each run, for the ensembles
    features = get_features(arguments)
    for run in results.unfinished(table, plan.planned_runs(arguments.seed), limit=2 if arguments.quick else None):
        name, seed = run["name"], run["seed"]
        row = dict.fromkeys(ROW_FIELDS, "") | run
        if name in plan.ENSEMBLES:
            members = [folder / f"{member} {seed + offset}.npy" for member, offset in plan.ENSEMBLES[name]]
            row["changes"] = ", ".join(path.stem for path in members)
            measured = classification_metrics(np.mean([np.load(path) for path in members], axis=0), labels)
        else:
            changes = plan.EXPERIMENTS[name]
            row["changes"] = ", ".join(f"{field}={value}" for field, value in changes.items())
            config = dataclasses.replace(VggConfig() if name in plan.VGG else Config(), **changes)
            config = cli.with_flags(config, arguments)
            splits["train"] = Cifar100Images(*(array[: plan.num_images(name)] for array in whole))
            trained = train_one(config, splits, features, seed, folder=folder / "checkpoint", resume=False)
            network, curves, row["seconds"] = trained
            measured, probabilities = evaluate(network, config, features, splits["validation"])
            with replacing(folder / f"{name} {seed}.npy") as temporary, open(temporary, "wb") as file:
                np.save(file, probabilities.astype("float16"))
            row |= {"images": len(splits["train"].images), "epochs": len(curves["loss"])}
            row["parameters"] = models.parameter_counts(network)["trainable"]
            row["train_accuracy"] = curves["accuracy"][-1]
        row |= {f"validation_{metric}": value for metric, value in measured.items() if f"validation_{metric}" in row}
        row = {key: round(each, 4) if isinstance(each, float) else each for key, each in row.items()}
        results.append_row(table, row)
    return 0


# -------------------------------------------------------------------------------------------------------------- report


def confused_pairs(predicted, labels, count):
    """Returns the pairs of classes that are taken for each other most often: (class, class, images) each."""
    counts = confusion_matrix(labels, predicted, labels=range(NUM_CLASSES))
    both = np.triu(counts + counts.T, 1)
    pairs = np.argsort(-both, axis=None, kind="stable")[:count]
    return [(int(a), int(b), int(both[a, b])) for a, b in zip(*np.unravel_index(pairs, both.shape), strict=True)]


def superclass_accuracy(probabilities, split):
    """Returns the share of images of each superclass whose class is right: list of float (20,)."""
    right = probabilities.argmax(1) == split.labels
    return [float(right[split.coarse_labels == number].mean()) for number in range(NUM_SUPERCLASSES)]


def summarise_model(card, measured):
    """Returns what the results say about a model: metrics of the saved network, mean over seeds, cost."""
    accuracies = [run["test"]["accuracy"] for run in card["seeds"] if "test" in run]
    epochs = len(card["curves"]["loss"])
    return {
        "test": measured,
        "seeds": len(accuracies),
        "mean": float(np.mean(accuracies)) if accuracies else None,
        "std": standard_deviation(accuracies),
        "parameters": card["parameters"],
        "epochs": epochs,
        "minutes": round(card["seconds"] / 60, 1),
        "seconds_per_epoch": round(card["seconds"] / epochs, 1),
        "hardware": card["hardware"],
    }


def report(arguments, features=None):
    """Restores the saved models, measures them, and writes results and figures; returns the exit code."""
    folder = models.models_folder(arguments.output_dir, SCRIPT)
    splits, dataset = load_splits(arguments.data_dir, sample=arguments.sample, quick=arguments.quick)
    test, part = splits["test"], "sample" if arguments.sample else "test"
    rows, written, cards, measured, probabilities = [], [], {}, {}, {}
    everything = CONFIGS if arguments.quick else SAVED  # with --quick there is one seed of each
    # The card of the best network has the metrics of the ensemble, too.
    wanted = MEMBERS if arguments.model == BEST else [arguments.model] if arguments.model else everything
    for name in [name for name in wanted if name in everything]:
        network, cards[name] = models.load_model(folder / f"{name}.keras", SCRIPT)
        if isinstance(SAVED[name], VggConfig):
            features = features or get_features(arguments)
        measured[name], probabilities[name] = evaluate(network, SAVED[name], features, test)
    if BEST in measured:
        members = [name for name in MEMBERS if name in everything]
        probabilities["ensemble"] = np.mean([probabilities[name] for name in members], axis=0)
        measured["ensemble"] = classification_metrics(probabilities["ensemble"], test.labels)
        measured[BEST] |= {f"ensemble_{metric}": value for metric, value in measured["ensemble"].items()}
    for name, card in cards.items():
        rows += results.compare(card, measured[name], part=part, size=len(test.images), sha256=dataset.checksums)
        if arguments.record or (arguments.train and name == BEST):
            checksums = None if arguments.sample else dataset.checksums
            results.record_metrics(folder / f"{name}.keras", checksums, **{part: (len(test.images), measured[name])})

    summary = {
        "script": f"{SCRIPT}.py",
        "models": {name: summarise_model(card, measured[name]) for name, card in cards.items()},
        "superclass_accuracy": {name: superclass_accuracy(each, test) for name, each in probabilities.items()},
    }
    if "ensemble" in measured:
        pairs = confused_pairs(probabilities[BEST].argmax(1), test.labels, 10)
        summary["confused_pairs"] = [[dataset.class_names[a], dataset.class_names[b], count] for a, b, count in pairs]
        summary["ensemble"] = {"members": members, "test": measured["ensemble"]}
    plan = results.optional_module("experiments", SCRIPT)
    if plan:
        means = ("train_accuracy", "seconds")
        path = results.recorded_path(arguments, f"{SCRIPT}_experiments.csv")
        table = results.read_table(path, numbers=("seed", "validation_accuracy", *means), texts=("name",))
        summary["experiments"] = results.compare_groups(table, plan.COMPARISONS, "validation_accuracy", means)
    if (arguments.train or arguments.record) and not arguments.sample:
        written.append(results.write_results(SCRIPT, arguments, summary, merged=("models", "superclass_accuracy")))
    plots = results.optional_module("plots", SCRIPT)
    if plots and plan and not arguments.model:  # the figures compare all models
        written += draw_figures(plots, summary, cards, probabilities, test, dataset.class_names, arguments)
    return results.conclude(SCRIPT, arguments, rows, written)


def draw_figures(plots, summary, cards, probabilities, test, class_names, arguments):
    """Writes all figures; returns their paths."""
    folder = arguments.output_dir / "report" / "figures" / SCRIPT
    predicted = probabilities[BEST].argmax(1)
    superclasses = np.zeros(NUM_CLASSES, int)
    superclasses[test.labels] = test.coarse_labels
    counts = confusion_matrix(test.coarse_labels, superclasses[predicted], labels=range(NUM_SUPERCLASSES))
    mistakes = confident_mistakes(probabilities[BEST], test.labels, 16)
    titles = [f"{class_names[test.labels[each]]}\n{class_names[predicted[each]]}?" for each in mistakes]
    pairs, names = {}, np.take(class_names, test.labels)
    for a, b, count in confused_pairs(predicted, test.labels, 6):
        taken = ((test.labels == a) & (predicted == b)) | ((test.labels == b) & (predicted == a))
        pairs[f"{class_names[a]}, {class_names[b]}: {count}"] = test.images[taken][:6], names[taken][:6]
    reliabilities = {name: reliability(probabilities[name], test.labels) for name in (BEST, "ensemble")}
    order = summary["ensemble"]["members"]
    order = [*order, *(name for name in reversed(MODELS) if name not in order)]
    members = np.stack([probabilities[name] for name in order])
    alone_and_together = [(each.argmax(2) == test.labels).mean(1) for each in (members, np.cumsum(members, axis=0))]
    accuracies = {name: summary["superclass_accuracy"][name] for name in ("vgg_full", BEST)}
    return [
        plots.draw_cost(summary["models"], folder / "cost.png"),
        plots.draw_learning_curves({name: cards[name]["curves"] for name in MODELS}, folder / "learning_curves.png"),
        *plots.draw_experiments(summary["experiments"], folder),
        plots.draw_confusion(counts, folder / "superclasses.png"),
        plots.draw_superclass_accuracy(accuracies, folder / "superclass_accuracy.png"),
        plots.draw_pairs(pairs, folder / "confused_pairs.png"),
        plots.draw_mistakes(test.images[mistakes], titles, folder / "mistakes.png"),
        plots.draw_reliability(reliabilities, folder / "calibration.png"),
        plots.draw_ensemble(order, *alone_and_together, folder / "ensemble.png"),
    ]


def predict_files(arguments):
    """Prints the five most probable classes of each image file; returns whether all could be read."""
    network, _ = models.load_model(models.models_folder(arguments.output_dir, SCRIPT) / f"{BEST}.keras", SCRIPT)
    class_names = load_cifar100(arguments.data_dir, sample=True).class_names

    def predict_file(path):
        probabilities = network.predict(read_square(path, "RGB", IMAGE_SIZE)[None], verbose=0)[0]
        print(f"{printable(path)}: {most_probable(probabilities, class_names)}")

    return predict_each(arguments.predict, predict_file)


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    flags = cli.parser(__doc__, MODELS)
    flags.modes.add_argument("--predict", type=Path, nargs="+", metavar="FILE", help="classify image files")
    arguments = cli.parse(flags, argv)
    if arguments.predict:
        return 0 if predict_files(arguments) else 2
    if arguments.experiments:
        return run_experiments(arguments)
    return report(arguments, train(arguments) if arguments.train else None)


if __name__ == "__main__":
    cli.run(main)
