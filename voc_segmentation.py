"""PASCAL VOC 2012: which pixels belong to an object, and which to the background?

Three networks are trained from scratch on pictures of 128 x 128 pixels. The starting point is the encoder-decoder of
Chollet's "Deep Learning with Python" (2nd edition, chapter 9). Two U-Nets with skip connections differ in nothing but
the way they enlarge their maps: with a transposed convolution, or with bilinear interpolation and a convolution. A
fourth one, by choice, has an encoder that knows ImageNet.

    python voc_segmentation.py --train               both U-Nets and the starting point
    python voc_segmentation.py --load                restores the saved networks: same metrics, same figures
    python voc_segmentation.py --experiments         losses and augmentation, compared on validation pictures
    python voc_segmentation.py --predict dog.jpg     writes dog_mask.png and dog_overlay.png beside your picture
    python voc_segmentation.py --train --model mobilenet_unet     downloads an encoder that knows ImageNet

The test pictures are the validation list of the challenge, whose own test set has no public masks. A tenth of the
training list is kept for validation, where losses and learning rates are compared. "Void" pixels, the 5-pixel border
that annotators left undecided and what pads a picture to a square, count neither in the loss nor in any metric.
"""

from common import quiet  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
import hashlib
import json
import math
import socket
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import keras
import matplotlib.pyplot as plt
import numpy as np
from keras import layers, ops
from PIL import Image, UnidentifiedImageError
from scipy.ndimage import binary_erosion, distance_transform_edt
from sklearn.metrics import average_precision_score, precision_recall_curve

from common import cli, figures, runs
from common.cli import UserError
from common.datasets import connection_trouble
from common.files import building, replacing, write_json
from common.metrics import standard_deviation

SCRIPT = "voc_segmentation"
IMAGE_SIZE = 128
BACKGROUND, VOID = 0, 255  # labels; 1 to 20 are the classes of objects
CLASSES = (
    "background",
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "dining table",
    "dog",
    "horse",
    "motorbike",
    "person",
    "potted plant",
    "sheep",
    "sofa",
    "train",
    "tv",
)
ARCHIVE = "VOCtrainval_11-May-2012.tar"
ARCHIVE_MD5 = "6cd6e144f989b92b3379bac3b3de84fd"
ARCHIVE_SOURCES = (
    f"http://host.robots.ox.ac.uk/pascal/VOC/voc2012/{ARCHIVE}",
    f"https://pjreddie.com/media/files/{ARCHIVE}",
)
NETWORK_TIMEOUT_SECONDS = 15
SPLIT_SEED = 12
NUM_SEEDS = 3  # of the U-Nets
PREDICT_BATCH_SIZE = 64
BOUNDARY_TOLERANCE = 2  # pixels
QUICK_PICTURES = 48
MAX_LOG_SCALE, MAX_SHIFT = 0.35, 0.15  # between exp(-0.35) = 0.7 and exp(0.35) = 1.4 times as large; of the side
MAX_BRIGHTNESS, MAX_LOG_CONTRAST, MAX_LOG_SATURATION = 30.0, 0.3, 0.4  # grey levels; natural logarithms of factors


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that an experiment varies; the defaults are the baseline.

    Attributes:
        network: "transposed" or "bilinear" (U-Nets that differ in how maps are enlarged), "book" (no skip connections)
            or "mobilenet" (U-Net whose encoder was trained on ImageNet).
        widths: filters of a U-Net at 128, 64, 32, 16 and 8 pixels a side.
        loss: "cross-entropy", "dice" or "both", their sum.
        augment: whether pictures are flipped, scaled, shifted and recoloured at random.
        learning_rate: highest learning rate.
        batch_size: pictures per step.
        epochs: passes over the training pictures; the weights of the best one on validation are kept.
    """

    network: str = "bilinear"
    widths: tuple = (16, 32, 64, 128, 256)
    loss: str = "both"
    augment: bool = True
    learning_rate: float = 1e-3
    batch_size: int = 16
    epochs: int = 20


RECIPES = {
    "unet_transposed": Recipe("transposed"),
    "unet_bilinear": Recipe("bilinear"),
    "encoder_decoder": Recipe("book", learning_rate=3e-4, epochs=8),
    "mobilenet_unet": Recipe("mobilenet", (16, 32, 48, 64, 96), learning_rate=3e-4, epochs=12),
}
MODELS = list(RECIPES)
FROM_SCRATCH = MODELS[:3]  # what is trained and restored where --model names none


# ---------------------------------------------------------------------------------------------------------------- data


class Pictures(NamedTuple):
    """Pictures with their masks, brought to 128 x 128 pixels.

    Attributes:
        images: uint8 (n, 128, 128, 3), 0 to 255; black where a picture that is not square was padded.
        masks: uint8 (n, 128, 128): 0 background, 1 to 20 objects, 255 void.
        names: str (n,), the names that VOC gives its pictures.
    """

    images: np.ndarray
    masks: np.ndarray
    names: np.ndarray

    def take(self, indices):
        """Returns the pictures at `indices` (integers, a slice or a mask)."""
        return Pictures(*(array[indices] for array in self))


def voc_folder(data_dir):
    """Returns `data_dir`/VOCdevkit/VOC2012, downloaded where it is not there.

    Raises:
        UserError: where it is neither there nor to be had.
    """
    folder = data_dir / "VOCdevkit" / "VOC2012"
    if (folder / "JPEGImages").is_dir():
        return folder
    archive = data_dir / "downloads" / ARCHIVE
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_SECONDS)
    try:
        for source in ARCHIVE_SOURCES:
            trouble = "" if archive.exists() else connection_trouble(source)
            if trouble:
                continue
            try:
                archive.parent.mkdir(parents=True, exist_ok=True)
                keras.utils.get_file(
                    ARCHIVE, source, file_hash=ARCHIVE_MD5, cache_dir=data_dir, cache_subdir=archive.parent.name
                )
                break
            except Exception as error:  # a bare Exception is what Keras raises for a failed download
                trouble = str(error).splitlines()[0][:150]
        else:
            raise UserError(
                f"PASCAL VOC 2012 could not be downloaded ({trouble}); get {ARCHIVE} (2 GB) from "
                f"{' or '.join(ARCHIVE_SOURCES)} and put it by hand into {archive.parent}, or unpack it to {folder}"
            )
    finally:
        socket.setdefaulttimeout(before)
    print(f"unpacking {archive}")
    try:
        with building(folder) as temporary, tarfile.open(archive) as members:
            wanted = ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation")
            for member in members:
                inside = member.name.partition("VOC2012/")[2]
                if inside.startswith(wanted):
                    member.name = inside
                    members.extract(member, temporary, filter="data")
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); delete it or free some space") from error
    return folder


def read_pair(folder, masks_folder, name):
    """Reads one picture and its mask.

    Returns:
        Two `PIL.Image`, RGB and palette.

    Raises:
        ValueError: where one of them is missing, damaged, or they differ in size; says which.
    """
    pair = []
    for path in (folder / "JPEGImages" / f"{name}.jpg", masks_folder / f"{name}.png"):
        try:
            with Image.open(path) as image:
                image.load()
                pair.append(image)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing") from error
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{path} is damaged") from error
    image, mask = pair
    if image.size != mask.size:
        raise ValueError(f"{name}: picture and mask have different sizes, {image.size} and {mask.size}")
    if mask.mode not in ("P", "L"):
        raise ValueError(f"{masks_folder / name}.png is no palette picture ({mask.mode})")
    return image.convert("RGB"), mask


def place_in_square(image):
    """Returns the rows and the columns (two slices) that a `PIL.Image` takes up of the square that a network sees.

    Its longer side becomes `IMAGE_SIZE`, and what is left of the square lies half on either side of it.
    """
    sides = [max(1, round(side * IMAGE_SIZE / max(image.size))) for side in (image.height, image.width)]
    return tuple(slice((IMAGE_SIZE - side) // 2, (IMAGE_SIZE - side) // 2 + side) for side in sides)


def fit_square(image, resampling, fill):
    """Shrinks or enlarges a `PIL.Image` and pads it around with `fill`: uint8 (128, 128) or (128, 128, 3)."""
    rows, columns = place_in_square(image)
    small = np.asarray(image.resize((columns.stop - columns.start, rows.stop - rows.start), resampling))
    square = np.full((IMAGE_SIZE, IMAGE_SIZE, *small.shape[2:]), fill, "uint8")
    square[rows, columns] = small
    return square


def read_list(folder, names_file, masks_folder):
    """Reads all pictures that a list names; those that cannot be used are named and left out.

    Returns:
        `Pictures`.
    """
    images, masks, names = [], [], []
    left_out = 0
    for name in names_file.read_text().split():
        try:
            image, mask = read_pair(folder, masks_folder, name)
        except ValueError as trouble:
            print(f"left out: {trouble}", file=sys.stderr)
            left_out += 1
            continue
        # Shrinking averages over what a new pixel covers; labels have no average, so a mask takes the nearest pixel.
        images.append(fit_square(image, Image.Resampling.BILINEAR, 0))
        masks.append(fit_square(mask, Image.Resampling.NEAREST, VOID))
        names.append(name)
    if left_out:
        print(f"{left_out} of {left_out + len(names)} pictures of {names_file.name} were left out", file=sys.stderr)
    if not names:
        raise UserError(f"no picture of {names_file} can be used; unpack VOC 2012 again into {folder.parent.parent}")
    return Pictures(np.stack(images), np.stack(masks), np.array(names))


def load_pictures(data_dir, quick=False):
    """Loads PASCAL VOC 2012 at 128 x 128 pixels, from the cache where there is one.

    Args:
        data_dir: `pathlib.Path`.
        quick: bool, whether to take only `QUICK_PICTURES` of each split.

    Returns:
        dict of `Pictures`, "train", "validation" and "test", and the SHA-256 of the arrays (dict of str).

    Raises:
        UserError: where the dataset is neither there nor to be had.
    """
    cache = data_dir / "cache" / f"{SCRIPT}_{IMAGE_SIZE}"
    try:
        read = open_cache(cache)
    except (OSError, ValueError, KeyError):
        folder = voc_folder(data_dir)
        lists = folder / "ImageSets" / "Segmentation"
        extended = folder / "SegmentationClassAug"
        masks_folder = extended if extended.is_dir() else folder / "SegmentationClass"
        training_list = lists / "trainaug.txt" if (lists / "trainaug.txt").exists() else lists / "train.txt"
        for path in (training_list, lists / "val.txt"):
            if not path.exists():
                raise UserError(f"{path} is missing; unpack VOC 2012 again into {data_dir}") from None
        print(f"reading the pictures of {training_list.name} and val.txt")
        read = {
            "training": read_list(folder, training_list, masks_folder),
            "test": read_list(folder, lists / "val.txt", masks_folder),
        }
        write_cache(cache, read)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(read["training"].names))
    tenth = len(order) // 10
    pictures = {
        "train": read["training"].take(np.sort(order[tenth:])),
        "validation": read["training"].take(np.sort(order[:tenth])),
        "test": read["test"],
    }
    checksums = {
        part: hashlib.sha256(some.images.tobytes() + some.masks.tobytes()).hexdigest()
        for part, some in pictures.items()
    }
    if quick:
        pictures = {part: some.take(slice(QUICK_PICTURES)) for part, some in pictures.items()}
    return pictures, checksums


def write_cache(cache, read):
    with building(cache) as temporary:
        for part, pictures in read.items():
            for field, array in pictures._asdict().items():
                np.save(temporary / f"{part}_{field}.npy", array)


def open_cache(cache):
    """Returns what `write_cache` wrote: dict of `Pictures`. Raises OSError or ValueError where it is not whole."""
    read = {}
    for part in ("training", "test"):
        arrays = {field: np.load(cache / f"{part}_{field}.npy", allow_pickle=False) for field in Pictures._fields}
        read[part] = Pictures(**arrays)
        count = len(read[part].names)
        if read[part].images.shape != (count, IMAGE_SIZE, IMAGE_SIZE, 3) or len(read[part].masks) != count:
            raise ValueError(f"{cache} has arrays of the wrong shape")
    return read


class Augmentation(layers.Layer):
    """Random changes of pictures; those that move anything move the mask alike. Does nothing outside training.

    What enters a picture from outside is black in it and void in the mask.

    Args:
        seed: int.

    Call arguments:
        images: uint8 (n, side, side, 3).
        masks: uint8 (n, side, side).
        training: bool.

    Returns:
        float32 (n, side, side, 3), 0 to 255, and float32 (n, side, side) with the labels of `masks`.
    """

    def __init__(self, seed, **keywords):
        super().__init__(**keywords)
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, masks, training=False):
        images, masks = ops.cast(images, "float32"), ops.cast(masks, "float32")
        if not training:
            return images, masks
        count, side = ops.shape(images)[0], images.shape[1]
        scale = ops.exp(self._uniform((count,), -MAX_LOG_SCALE, MAX_LOG_SCALE))
        mirror = ops.where(self._uniform((count,), 0, 1) < 0.5, -1.0, 1.0)
        center = (side - 1) / 2
        # Where each new pixel comes from: x' = a x + c, y' = e y + f, scaled and mirrored about the picture's centre.
        a, e = mirror / scale, 1 / scale
        c = center - a * center + self._uniform((count,), -MAX_SHIFT * side, MAX_SHIFT * side)
        f = center - e * center + self._uniform((count,), -MAX_SHIFT * side, MAX_SHIFT * side)
        zero = ops.zeros_like(a)
        transforms = ops.stack([a, zero, c, zero, e, f, zero, zero], axis=1)
        images = ops.image.affine_transform(images, transforms, interpolation="bilinear", fill_mode="constant")
        masks = ops.image.affine_transform(
            masks[..., None], transforms, interpolation="nearest", fill_mode="constant", fill_value=VOID
        )[..., 0]
        return self._recolour(images), masks

    def _uniform(self, shape, low, high):
        return keras.random.uniform(shape, low, high, seed=self.seed_generator)

    def _recolour(self, images):
        """Random brightness, contrast and saturation."""
        shape = (ops.shape(images)[0], 1, 1, 1)
        contrast = ops.exp(self._uniform(shape, -MAX_LOG_CONTRAST, MAX_LOG_CONTRAST))
        saturation = ops.exp(self._uniform(shape, -MAX_LOG_SATURATION, MAX_LOG_SATURATION))
        brightness = self._uniform(shape, -MAX_BRIGHTNESS, MAX_BRIGHTNESS)
        grey = ops.mean(images, axis=3, keepdims=True)
        mean = ops.mean(grey, axis=(1, 2), keepdims=True)
        images = grey + (images - grey) * saturation
        return ops.clip((images - mean) * contrast + mean + brightness, 0.0, 255.0)


# ------------------------------------------------------------------------------------------------------------ networks


def convolution(filters, kernel_size=3, **keywords):
    return layers.Conv2D(filters, kernel_size, padding="same", kernel_initializer="he_normal", **keywords)


def build_unet(images, widths, upsampling):
    """Builds a U-Net (Ronneberger, Fischer & Brox 2015).

    Args:
        images: symbolic tensor (n, side, side, 3), about -1 to 1.
        widths: filters of each resolution, the finest first.
        upsampling: "transposed" (Conv2DTranspose) or "bilinear" (UpSampling2D, then Conv2D). Both have the same
            number of parameters, and nothing else differs.

    Returns:
        Symbolic tensor (n, side, side, widths[0]).
    """

    def double_convolution(features, filters):
        # One normalisation for two convolutions: on a CPU it costs as much as they do.
        features = convolution(filters, activation="relu")(features)
        features = layers.BatchNormalization()(convolution(filters, use_bias=False)(features))
        return layers.ReLU()(features)

    def enlarge(features, filters):
        if upsampling == "transposed":
            enlarged = layers.Conv2DTranspose(
                filters, 3, strides=2, padding="same", kernel_initializer="he_normal", name=f"enlarge_{filters}"
            )
            return enlarged(features)
        features = layers.UpSampling2D(2, interpolation="bilinear")(features)
        return convolution(filters, name=f"enlarge_{filters}")(features)

    features, skipped = images, []
    for level, filters in enumerate(widths):
        if level:
            features = layers.MaxPooling2D(2)(features)
        features = double_convolution(features, filters)
        skipped.append(features)
    skipped.pop()
    for filters in reversed(widths[:-1]):
        features = layers.Concatenate()([enlarge(features, filters), skipped.pop()])
        features = double_convolution(features, filters)
    return features


def build_book(images):
    """Builds the encoder-decoder of Chollet's chapter 9, section 2. Arguments and result as `build_unet`."""
    features = images
    for filters in (64, 128, 256):
        features = convolution(filters, strides=2, activation="relu")(features)
        features = convolution(filters, activation="relu")(features)
    for filters in (256, 128, 64):
        options = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
        features = layers.Conv2DTranspose(filters, 3, **options)(features)
        features = layers.Conv2DTranspose(filters, 3, strides=2, **options)(features)
    return features


def build_mobilenet_unet(images, widths):
    """Builds a U-Net on an encoder trained on ImageNet (MobileNetV2; Sandler et al. 2018).

    Arguments and result as `build_unet`.

    Raises:
        UserError: where the weights of the encoder cannot be downloaded.
    """
    try:
        encoder = keras.applications.MobileNetV2(
            input_tensor=images, input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3), include_top=False, weights="imagenet"
        )
    except Exception as error:  # a bare Exception is what Keras raises for a failed download
        raise UserError(
            f"the ImageNet weights of MobileNetV2 could not be downloaded ({str(error).splitlines()[0][:150]}); "
            f"try again with a network, or choose another --model, of {', '.join(FROM_SCRATCH)}"
        ) from error
    # The last map of 64, 32, 16 and 8 pixels a side; the picture itself is handed over at 128.
    names = ("block_1_expand_relu", "block_3_expand_relu", "block_6_expand_relu", "block_13_expand_relu")
    skipped = [images, *(encoder.get_layer(name).output for name in names)]
    features = encoder.get_layer("block_16_project").output
    for filters in reversed(widths):
        features = layers.UpSampling2D(2, interpolation="bilinear")(features)
        features = layers.Concatenate()([features, skipped.pop()])
        features = layers.BatchNormalization()(convolution(filters, use_bias=False)(features))
        features = layers.ReLU()(features)
    return features


def build_network(recipe):
    """Builds the network of a recipe.

    Returns:
        Functional `keras.Model` from pictures (n, 128, 128, 3) in the uint8 range to the probability that a pixel
        belongs to an object, float32 (n, 128, 128, 1).

    Raises:
        UserError: where the weights of the "mobilenet" encoder cannot be downloaded.
    """
    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), name="images")
    scaled = layers.Rescaling(1 / 127.5, offset=-1)(images)
    if recipe.network == "book":
        features = build_book(scaled)
    elif recipe.network == "mobilenet":
        features = build_mobilenet_unet(scaled, recipe.widths)
    else:
        features = build_unet(scaled, recipe.widths, recipe.network)
    probability = layers.Activation("sigmoid", dtype="float32", name="probability")
    return keras.Model(images, probability(convolution(1)(features)))


# ------------------------------------------------------------------------------------------------------------ training


def cross_entropy(probability, foreground, valid):
    """Mean binary cross-entropy over the pixels that are not void.

    Args:
        probability: float32 (n, side, side).
        foreground: float32 (n, side, side), 1 for objects.
        valid: float32 (n, side, side), 0 for void.
    """
    probability = ops.clip(probability, 1e-6, 1 - 1e-6)
    losses = -foreground * ops.log(probability) - (1 - foreground) * ops.log(1 - probability)
    return ops.sum(losses * valid) / ops.maximum(ops.sum(valid), 1.0)


def dice_loss(probability, foreground, valid):
    """1 - soft Dice score of each picture, averaged (Milletari, Navab & Ahmadi 2016). Arguments as `cross_entropy`."""

    def area(values):
        return ops.sum(values * valid, axis=(1, 2))

    # One pixel's worth is added above and below, so that an empty answer to an empty truth is right.
    score = (2 * area(probability * foreground) + 1) / (area(probability) + area(foreground) + 1)
    return ops.mean(1 - score)


class SegmentationModel(keras.Model):
    """Functional model from pictures and masks to probabilities and the masks as they were augmented."""

    losses_of = ("cross-entropy", "dice")

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        probability, masks = y_pred
        probability = ops.cast(probability, "float32")[..., 0]
        valid = ops.cast(masks != VOID, "float32")
        foreground = ops.cast(masks != BACKGROUND, "float32") * valid
        loss = 0.0
        if "cross-entropy" in self.losses_of:
            loss += cross_entropy(probability, foreground, valid)
        if "dice" in self.losses_of:
            loss += dice_loss(probability, foreground, valid)
        return loss


class ValidationScore(keras.callbacks.Callback):
    """Measures Dice on validation pictures after every epoch and keeps the best weights, also beyond a resume.

    Args:
        network: the `keras.Model` whose weights are kept.
        pictures: `Pictures`.
        folder: `pathlib.Path`, where the weights are kept.
    """

    def __init__(self, network, pictures, folder):
        super().__init__()
        self.network, self.pictures = network, pictures
        self.weights, self.score = folder / "best.weights.h5", folder / "best.json"

    def on_epoch_end(self, epoch, logs):
        dice, _ = overlaps(predict(self.network, self.pictures.images) >= 0.5, self.pictures.masks)
        logs["validation_dice"] = float(np.nanmean(dice))
        print(f" - {logs['validation_dice']:.4f} Dice on validation")
        best = json.loads(self.score.read_text())["validation_dice"] if self.score.exists() else -1
        if logs["validation_dice"] > best:
            with replacing(self.weights) as temporary:
                self.network.save_weights(temporary)
            write_json(self.score, {"epoch": epoch + 1, "validation_dice": logs["validation_dice"]})


def train_network(recipe, pictures, seed, *, folder, resume, validation):
    """Trains one network from scratch, or goes on from its checkpoint.

    Args:
        recipe: `Recipe`.
        pictures: `Pictures` to train on.
        seed: int, of weights, order and augmentation.
        folder: `pathlib.Path`, where the checkpoints live.
        resume: bool, whether to go on from the last of them.
        validation: `Pictures`; the weights of the epoch with the best Dice on them are the ones that are returned.

    Returns:
        The trained network in float32 (`keras.Model`), its learning curves (dict of lists), and seconds (float).
    """
    keras.utils.set_random_seed(seed)
    steps = math.ceil(len(pictures.images) / recipe.batch_size) * recipe.epochs
    with runs.building_for_speed() as precision:
        network = build_network(recipe)
    images = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), dtype="uint8", name="images")
    masks = keras.Input((IMAGE_SIZE, IMAGE_SIZE), dtype="uint8", name="masks")
    if recipe.augment:
        seen, wanted = Augmentation(seed)(images, masks)
    else:
        seen, wanted = ops.cast(images, "float32"), ops.cast(masks, "float32")
    model = SegmentationModel({"images": images, "masks": masks}, (network(seen), wanted))
    model.losses_of = ("cross-entropy", "dice") if recipe.loss == "both" else (recipe.loss,)
    model.compile(
        keras.optimizers.AdamW(runs.cosine_schedule(recipe.learning_rate, steps), weight_decay=1e-3),
        **runs.compile_options(steps),
    )
    best = ValidationScore(network, validation, folder / "best")
    curves, seconds = runs.fit(
        model,
        {"images": pictures.images, "masks": pictures.masks},
        None,
        epochs=recipe.epochs,
        batch_size=recipe.batch_size,
        folder=folder,
        settings={"recipe": json.loads(json.dumps(dataclasses.asdict(recipe))), "seed": seed, "precision": precision},
        resume=resume,
        callbacks=[best],
    )
    network.load_weights(best.weights)
    full_precision = build_network(recipe)
    runs.set_weights(full_precision, network.get_weights())
    runs.round_weights(full_precision)  # three networks have to fit into 20 MB
    return full_precision, curves, seconds


# ---------------------------------------------------------------------------------------------------------- evaluation


def predict(network, images):
    """Returns the probability that a pixel belongs to an object, float32 (n, 128, 128), for uint8 pictures."""
    return network.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)[..., 0]


def overlaps(answers, masks):
    """Dice score and intersection over union of the foreground of each picture.

    Args:
        answers: bool (n, side, side), True for objects.
        masks: uint8 (n, side, side): 0 background, 1 to 20 objects, 255 void.

    Returns:
        Two float (n,), 0 to 1. Both are 1 where neither answer nor truth has any foreground, and nan for pictures that
        are void all over.
    """
    valid = masks != VOID
    truth = (masks != BACKGROUND) & valid
    answers = answers & valid
    both = np.sum(answers & truth, axis=(1, 2))
    sizes = np.sum(answers, axis=(1, 2)) + np.sum(truth, axis=(1, 2))
    with np.errstate(invalid="ignore"):
        dice = np.where(sizes > 0, 2 * both / sizes, 1.0)
        union = np.where(sizes > 0, both / (sizes - both), 1.0)
    void = ~valid.any(axis=(1, 2))
    return np.where(void, np.nan, dice), np.where(void, np.nan, union)


def boundary_score(answer, mask, tolerance=BOUNDARY_TOLERANCE):
    """How well the outline fits: F-score of the boundary pixels within `tolerance` (Csurka et al. 2013).

    An outline lies where object meets background, and not where either meets void, which goes all around most objects.
    So void pixels first get the answer and the truth of the nearest pixel that is not void.

    Args:
        answer: bool (side, side).
        mask: uint8 (side, side).
        tolerance: pixels.

    Returns:
        float, 0 to 1; 1 where neither has a boundary, nan for a picture that is void all over.
    """
    valid = mask != VOID
    if not valid.any():
        return np.nan
    distance, nearest = distance_transform_edt(~valid, return_indices=True)
    shapes = [shape[tuple(nearest)] for shape in (answer, mask != BACKGROUND)]
    # Eroding with what lies beyond the picture counted as object leaves out the picture's own edge.
    outlines = [shape & ~binary_erosion(shape, border_value=1) & (distance <= tolerance) for shape in shapes]
    counts = [outline.sum() for outline in outlines]
    if not any(counts):
        return 1.0
    if not all(counts):
        return 0.0
    near = [
        np.mean(distance_transform_edt(~other)[outline] <= tolerance)
        for outline, other in zip(outlines, reversed(outlines), strict=True)
    ]
    return float(2 * near[0] * near[1] / (near[0] + near[1])) if sum(near) else 0.0


def calibration(probability, masks, bins=10):
    """How often pixels are objects, by the probability that the network gives them.

    Returns:
        dict of lists, one value a bin: mean `probability`, `frequency`, `share` of all pixels; and the mean distance of
        the first two (float), weighted with the third (expected calibration error; Guo et al. 2017).
    """
    valid = masks != VOID
    probability, truth = probability[valid], masks[valid] != BACKGROUND
    place = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    mean, frequency = (
        np.bincount(place, weights=values, minlength=bins) / np.maximum(count, 1) for values in (probability, truth)
    )
    share = count / count.sum()
    curve = {"probability": mean.tolist(), "frequency": frequency.tolist(), "share": share.tolist()}
    return curve, float(np.sum(share * np.abs(mean - frequency)))


def measure(probability, masks):
    """Every metric of the answers `probability` >= 0.5.

    Args:
        probability: float (n, side, side), 0 to 1.
        masks: uint8 (n, side, side).

    Returns:
        dict of float.
    """
    valid = masks != VOID
    truth, answers = (masks != BACKGROUND)[valid], (probability >= 0.5)[valid]
    both, either = np.sum(answers & truth), np.sum(answers | truth)
    neither = np.sum(~answers & ~truth)
    dice, union = overlaps(probability >= 0.5, masks)
    foreground_iou = both / either if either else 1.0
    background_iou = neither / (neither + either - both) if neither + either - both else 1.0
    return {
        "foreground_iou": float(foreground_iou),
        "dice": float(2 * both / (answers.sum() + truth.sum())) if either else 1.0,
        "mean_iou": float((foreground_iou + background_iou) / 2),
        "pixel_accuracy": float(np.mean(answers == truth)),
        "precision": float(both / answers.sum()) if answers.any() else 1.0,
        "recall": float(both / truth.sum()) if truth.any() else 1.0,
        "foreground_iou_per_picture": float(np.nanmean(union)),
        "dice_per_picture": float(np.nanmean(dice)),
        "boundary_f_score": float(
            np.nanmean([boundary_score(answer, mask) for answer, mask in zip(probability >= 0.5, masks, strict=True)])
        ),
        "average_precision": float(average_precision_score(truth, probability[valid])) if truth.any() else 0.0,
        "calibration_error": calibration(probability, masks)[1],
    }


def evaluate(network, pictures):
    """Measures a network on `Pictures`.

    Returns:
        Metrics (dict of float), those of `measure` and `checkerboard`, and the probabilities, float32 (n, 128, 128).
    """
    probability = predict(runs.for_prediction(network), pictures.images)
    return {**measure(probability, pictures.masks), "checkerboard": checkerboard(probability)}, probability


def checkerboard(probability):
    """How much of the unevenness of probability maps alternates from pixel to pixel.

    Transposed convolutions with a stride of 2 write every second pixel with other weights (Odena, Dumoulin & Olah
    2016). That shows at the highest frequency a row or a column can have.

    Args:
        probability: float (n, side, side), an even number of pixels a side.

    Returns:
        float: energy at a period of two pixels along rows or columns, as a share of all energy but that of the mean.
    """
    energy = np.square(np.abs(np.fft.fft2(probability)))
    half = probability.shape[1] // 2
    energy[:, 0, 0] = 0
    fastest = energy[:, half, :].sum() + energy[:, :, half].sum() - energy[:, half, half].sum()
    return float(fastest / energy.sum()) if energy.any() else 0.0


def baselines(training, test):
    """Metrics of answers that look at no picture: all background, all foreground, the average training mask.

    The average mask is cut at the height that gives the best foreground IoU on the training pictures.
    """
    valid = training.masks != VOID
    truth = (training.masks != BACKGROUND) & valid
    average = truth.sum(axis=0) / np.maximum(valid.sum(axis=0), 1)

    def iou_on_training(height):
        answer = (average >= height) & valid
        return np.sum(answer & truth) / np.sum(answer | truth)

    shape = test.masks.shape
    cut = average >= max(np.linspace(0.05, average.max(), 20), key=iou_on_training)
    answers = {
        "all_background": np.zeros(shape),
        "all_foreground": np.ones(shape),
        "average_mask": np.broadcast_to(cut, shape).astype(float),
    }
    return {name: measure(probability, test.masks) for name, probability in answers.items()}


def dominant_class(masks):
    """Returns the class of the largest object of each picture, int (n,), 0 where there is none."""
    areas = np.stack([np.sum(masks == label, axis=(1, 2)) for label in range(1, len(CLASSES))], axis=1)
    return np.where(areas.any(axis=1), areas.argmax(axis=1) + 1, 0)


# --------------------------------------------------------------------------------------------------------- experiments

EXPERIMENT_EPOCHS = 5
BASELINE = Recipe(epochs=EXPERIMENT_EPOCHS)
EXPERIMENTS = {
    "baseline": BASELINE,
    "cross-entropy alone": dataclasses.replace(BASELINE, loss="cross-entropy"),
    "Dice loss alone": dataclasses.replace(BASELINE, loss="dice"),
    "no augmentation": dataclasses.replace(BASELINE, augment=False),
    "learning rate 0.0003": dataclasses.replace(BASELINE, learning_rate=3e-4),
    "learning rate 0.003": dataclasses.replace(BASELINE, learning_rate=3e-3),
}
METRICS = ("foreground_iou", "dice", "dice_per_picture", "calibration_error")


def run_experiments(arguments):
    """Trains every recipe of `EXPERIMENTS`, measures it on the validation pictures, and adds a row a run."""
    table = runs.experiments_table(arguments.output_dir, SCRIPT)
    finished = {(row["name"], int(row["seed"])) for row in runs.read_rows(table)}
    left = [name for name in EXPERIMENTS if (name, arguments.seed) not in finished][: 2 if arguments.quick else None]
    pictures, _ = load_pictures(arguments.data_dir, arguments.quick)
    for number, name in enumerate(left):
        print(f"{len(left) - number} of {len(EXPERIMENTS)} runs left: {name}")
        recipe = cli.with_flags(EXPERIMENTS[name], arguments)
        network, _, seconds = train_network(
            recipe,
            pictures["train"],
            arguments.seed,
            folder=arguments.output_dir / "runs" / SCRIPT / "experiment",
            resume=False,
            validation=pictures["validation"],
        )
        measured, _ = evaluate(network, pictures["validation"])
        row = {"name": name, "seed": arguments.seed, **dataclasses.asdict(recipe), "seconds": round(seconds, 1)}
        runs.append_row(table, row | {metric: round(measured[metric], 5) for metric in METRICS})
    print(f"finished runs are in {table}")


# ------------------------------------------------------------------------------------------------------------- figures

MASK_COLORS = np.array([[255, 255, 255], [0, 114, 178], [230, 159, 0]], "uint8")  # background, object, void


def painted(mask):
    """Returns a mask in colours, uint8 (side, side, 3): white background, blue objects, orange void."""
    return MASK_COLORS[np.where(mask == VOID, 2, np.minimum(mask, 1))]


def draw_data(pictures, folder):
    """The first 12 training pictures with their masks."""
    figure, axes = plt.subplots(4, 6, figsize=(10, 7))
    for number in range(12):
        pair = axes[number // 6 * 2 : number // 6 * 2 + 2, number % 6]
        labels = np.unique(pictures.masks[number])
        names = [CLASSES[label] for label in labels if label not in (BACKGROUND, VOID)]
        figures.picture(pair[0], pictures.images[number], ", ".join(names))
        figures.picture(pair[1], painted(pictures.masks[number]))
    figure.suptitle("Training pictures and masks: objects blue, void orange", x=0.01, ha="left")
    return figures.save(figure, folder / "data.png")


def draw_rows(pictures, columns, chosen, title, path, notes=None):
    """Pictures side by side with their truth and the answers to them.

    Args:
        pictures: `Pictures`.
        columns: dict from the title of a column to probabilities (n, side, side).
        chosen: integers, which of the pictures.
        title: str.
        path: `pathlib.Path` of the figure.
        notes: list of str, one for each chosen picture, or None.
    """
    blocks = 2
    per_block = math.ceil(len(chosen) / blocks)
    width = 2 + len(columns)
    figure, axes = plt.subplots(per_block, blocks * width, figsize=(10, 10 / (blocks * width) * per_block * 1.15 + 0.4))
    axes = np.atleast_2d(axes)
    for panel in axes.flat:
        panel.set_axis_off()
    for place, number in enumerate(chosen):
        row, left = place % per_block, place // per_block * width
        figures.picture(axes[row, left], pictures.images[number], notes[place] if notes else None)
        figures.picture(axes[row, left + 1], painted(pictures.masks[number]), "truth" if row == 0 else None)
        for offset, (name, probability) in enumerate(columns.items(), start=2):
            panel = axes[row, left + offset]
            panel.imshow(probability[number], vmin=0, vmax=1, cmap="Blues")
            panel.set_axis_off()
            if row == 0:
                panel.set_title(name, fontsize=8, loc="center")
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, path)


def draw_upsampling(pictures, probabilities, results, folder):
    """Transposed convolution against bilinear interpolation: scores of all seeds, and probability maps up close."""
    figure = plt.figure(figsize=(10, 5.6))
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.3))
    metrics = {
        "foreground_iou": "foreground IoU",
        "boundary_f_score": "boundary F-score",
        "checkerboard": "checkerboard",
    }
    for panel, (metric, label) in zip(above.subplots(1, 3), metrics.items(), strict=True):
        for place, model in enumerate(("unet_transposed", "unet_bilinear")):
            values = results["models"][model]["seeds"][metric]["values"]
            panel.scatter([place] * len(values), values, color=(figures.RED, figures.BLUE)[place])
        panel.set_xticks([0, 1], ["transposed", "bilinear"])
        panel.set(xlim=(-0.5, 1.5), title=label)
    axes = below.subplots(2, 6)
    for column in range(6):
        for row, model in enumerate(("unet_transposed", "unet_bilinear")):
            panel = axes[row, column]
            panel.imshow(probabilities[model][column, 32:96, 32:96], vmin=0, vmax=1, cmap="Blues")
            panel.set_axis_off()
            if column == 0:
                panel.set_title(model.removeprefix("unet_"), fontsize=9)
    above.suptitle("Two ways to enlarge a map: one point per seed", x=0.01, ha="left")
    below.suptitle("The middle of the first six test pictures, probability of an object", x=0.01, ha="left")
    return figures.save(figure, folder / "upsampling.png")


def draw_classes(pictures, probability, folder):
    """IoU per picture by the class of its largest object."""
    _, union = overlaps(probability >= 0.5, pictures.masks)
    classes = dominant_class(pictures.masks)
    groups = {
        CLASSES[label]: union[classes == label] for label in range(1, len(CLASSES)) if np.sum(classes == label) >= 3
    }
    groups = dict(sorted(groups.items(), key=lambda item: np.median(item[1])))
    figure, axes = plt.subplots(figsize=(8, 0.32 * len(groups) + 1))
    axes.boxplot(list(groups.values()), orientation="horizontal", widths=0.6, medianprops={"color": figures.RED})
    axes.set_yticks(range(1, len(groups) + 1), [f"{name} ({len(values)})" for name, values in groups.items()])
    axes.set(xlabel="IoU of a test picture", title="Which objects are hard: pictures by their largest object (number)")
    return figures.save(figure, folder / "classes.png")


def draw_curves(pictures, probabilities, folder):
    """Precision against recall of the pixels, and how far the probabilities can be taken at their word."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2))
    valid = pictures.masks != VOID
    truth = (pictures.masks != BACKGROUND)[valid]
    for (model, probability), color in zip(
        probabilities.items(), (figures.RED, figures.BLUE, figures.GREY), strict=True
    ):
        precision, recall, _ = precision_recall_curve(truth, np.round(probability[valid], 3), drop_intermediate=True)
        left.plot(recall, precision, color=color, label=model.replace("_", " "))
        curve, error = calibration(probability, pictures.masks)
        shown = np.array(curve["share"]) > 0.001
        right.plot(
            np.array(curve["probability"])[shown],
            np.array(curve["frequency"])[shown],
            "o-",
            color=color,
            label=f"{model.replace('_', ' ')}: off by {error:.1%} on average",
        )
    left.set(xlabel="recall", ylabel="precision", title="Every threshold, pixels of the test pictures", ylim=(0, 1.02))
    left.legend(loc="lower left")
    right.plot([0, 1], [0, 1], color=figures.BLACK, linewidth=0.8)
    right.set(xlabel="probability that the network gives", ylabel="share that are objects", title="Calibration")
    right.legend(loc="upper left", fontsize=8)
    return figures.save(figure, folder / "precision_recall.png")


def draw_learning_curves(cards, folder):
    """Loss and validation Dice over the epochs."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for (model, card), color in zip(cards.items(), (figures.RED, figures.BLUE, figures.GREY), strict=True):
        epochs = range(1, len(card["curves"]["loss"]) + 1)
        style = {"color": color, "marker": "o", "markersize": 3, "label": model.replace("_", " ")}
        left.plot(epochs, card["curves"]["loss"], **style)
        right.plot(epochs, card["curves"]["validation_dice"], **style)
    for panel in (left, right):
        panel.xaxis.get_major_locator().set_params(integer=True)
    left.set(xlabel="epoch", ylabel="loss on augmented training pictures")
    right.set(xlabel="epoch", ylabel="mean Dice of a validation picture")
    right.legend(loc="lower right")
    left.set_title("Learning curves; the epoch with the best Dice is kept")
    return figures.save(figure, folder / "learning_curves.png")


def draw_experiments(rows, folder):
    """Short trainings, one change at a time."""
    names = [name for name in EXPERIMENTS if any(row["name"] == name for row in rows)]
    shown = METRICS[:1] + METRICS[2:]
    figure, panels = plt.subplots(1, len(shown), figsize=(11, 0.34 * len(names) + 1.3), sharey=True)
    for panel, metric in zip(panels, shown, strict=True):
        panel.scatter([float(row[metric]) for row in rows], [names.index(row["name"]) for row in rows], s=28)
        panel.set(xlabel=metric.replace("_", " "))
        panel.grid(True, axis="x")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    title = f"One change at a time, {EXPERIMENT_EPOCHS} epochs, validation pictures, a point a seed"
    figure.suptitle(title, x=0.01, ha="left")
    return figures.save(figure, folder / "experiments.png")


# ------------------------------------------------------------------------------------------------------- your pictures


def predict_file(network, path):
    """Segments one picture file and writes `NAME_mask.png` (0 and 255, original size) and `NAME_overlay.png` beside it.

    Args:
        network: what `runs.load_model` returned.
        path: `pathlib.Path` of anything that Pillow reads.

    Returns:
        The paths of both files.

    Raises:
        UserError: where the file is no picture.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} cannot be read as a picture; give a JPEG or PNG file") from error
    square = fit_square(image, Image.Resampling.BILINEAR, 0)
    probability = predict(network, square[None])[0]
    # Undo the padding, then enlarge the probability, whose edges are softer than those of a mask.
    inside = Image.fromarray(probability[place_in_square(image)])
    foreground = np.asarray(inside.resize(image.size, Image.Resampling.BILINEAR)) >= 0.5
    pixels = np.asarray(image).astype("float32")
    overlay = np.where(foreground[..., None], 0.5 * pixels + 0.5 * MASK_COLORS[1], 0.4 * pixels + 0.6 * 255)
    written = []
    for kind, array in (("mask", foreground * np.uint8(255)), ("overlay", overlay.astype("uint8"))):
        target = path.with_name(f"{path.stem}_{kind}.png")
        with replacing(target) as temporary:
            Image.fromarray(array).save(temporary, format="PNG")
        written.append(target)
    return written


def predict_files(arguments):
    """Segments every file of the command line; names those that cannot be read at the end."""
    folder = runs.saved_models_folder(arguments.output_dir, SCRIPT)
    network = runs.for_prediction(runs.load_model(folder / f"{arguments.model or 'unet_bilinear'}.keras")[0])
    troubles = []
    for path in arguments.predict:
        try:
            print("wrote", *predict_file(network, path))
        except UserError as trouble:
            troubles.append(str(trouble))
    if troubles:
        raise UserError("; ".join(troubles))


# ---------------------------------------------------------------------------------------------------------------- main


def train(arguments):
    """Trains the wanted networks, the U-Nets with several seeds, and saves the first seed's with its card."""
    pictures, checksums = load_pictures(arguments.data_dir, arguments.quick)
    trained = []
    for model in [arguments.model] if arguments.model else FROM_SCRATCH:
        recipe = cli.with_flags(RECIPES[model], arguments)
        number_of_seeds = NUM_SEEDS if model.startswith("unet") and not arguments.quick else 1
        for seed in range(arguments.seed, arguments.seed + number_of_seeds):
            print(f"{model}, seed {seed}")
            options = {"folder": arguments.output_dir / "runs" / SCRIPT / f"{model}_seed_{seed}"}
            options |= {"resume": arguments.resume, "validation": pictures["validation"]}
            trained.append((model, seed, recipe, *train_network(recipe, pictures["train"], seed, **options)))
    cards = {}
    # The test pictures are read from here on, after the last training.
    for model, seed, recipe, network, curves, seconds in trained:
        metrics = {part: evaluate(network, some)[0] for part, some in pictures.items()}
        about = {"seed": seed, "seconds": round(seconds, 1), "metrics": metrics}
        if seed != arguments.seed:
            cards[model]["seeds"].append(about)
            continue
        cards[model] = {
            **runs.card(
                SCRIPT,
                model,
                arguments,
                recipe=recipe,
                seed=seed,
                dataset={
                    "name": f"PASCAL VOC 2012 at {IMAGE_SIZE} x {IMAGE_SIZE}",
                    **{part: len(some.images) for part, some in pictures.items()},
                    "sha256": checksums,
                },
                pictures=len(pictures["train"].images),
                curves=curves,
                seconds=seconds,
            ),
            "kept_epoch": int(np.argmax(curves["validation_dice"])) + 1,
            "metrics": metrics,
            "seeds": [about],
        }
    for model, seed, _, network, _, _ in trained:
        if seed == arguments.seed:
            runs.save_model(network, arguments.output_dir / "saved_models" / SCRIPT / f"{model}.keras", cards[model])


def summarise(cards, measured, references, rows):
    """Builds what `report/results/voc_segmentation.json` holds."""
    models = {}
    for model, card in cards.items():
        seeds = {}
        for metric in measured[model]:
            values = [seed["metrics"]["test"][metric] for seed in card["seeds"]]
            seeds[metric] = {
                "values": values,
                "mean": float(np.mean(values)),
                "std": standard_deviation(values),
            }
        models[model] = {
            "test": measured[model],
            "over_average_mask": measured[model]["foreground_iou"] - references["average_mask"]["foreground_iou"],
            "validation": card["metrics"]["validation"],
            "train": card["metrics"]["train"],
            "number_of_seeds": len(card["seeds"]),
            "seeds": seeds,
            "seconds_per_epoch": float(np.mean([seed["seconds"] for seed in card["seeds"]])) / card["epochs"],
            "parameters": card["parameters"]["trainable"],
            "epochs": card["epochs"],
            "kept_epoch": card["kept_epoch"],
            "minutes": round(card["seconds"] / 60, 1),
            "hardware": card["hardware"],
            "shortened": card["shortened"],
        }
    dataset = next(iter(cards.values()))["dataset"]
    experiments = {row["name"]: {metric: float(row[metric]) for metric in METRICS} for row in rows}
    return {
        "script": f"{SCRIPT}.py",
        "pictures": {part: dataset[part] for part in ("train", "validation", "test")},
        "models": models,
        "references": references,
        "experiments": experiments,
    }


def report(arguments):
    """Restores the saved networks, measures them on the test pictures, writes results and figures."""
    folder = runs.saved_models_folder(arguments.output_dir, SCRIPT)
    print(f"models from {folder}")
    names = [arguments.model] if arguments.model else FROM_SCRATCH
    restored = {model: runs.load_model(folder / f"{model}.keras") for model in names}
    pictures, checksums = load_pictures(arguments.data_dir, arguments.quick)
    test = pictures["test"]
    probabilities, measured, cards = {}, {}, {}
    for model, (network, card) in restored.items():
        cards[model] = card
        measured[model], probabilities[model] = evaluate(network, test)
        print(f"\n{model}: {card['parameters']['trainable']:,} parameters")
        runs.print_metrics(measured[model], card)
        if card["dataset"]["sha256"] != checksums:
            print("note: the pictures differ from those that the recorded metrics were measured on")
    references = baselines(pictures["train"], test)
    print("\nWithout looking at the picture, foreground IoU:")
    runs.print_metrics({name: values["foreground_iou"] for name, values in references.items()})

    report_folder = arguments.output_dir / "report"
    drawings = report_folder / "figures" / SCRIPT
    rows = runs.read_rows(runs.experiments_table(arguments.output_dir, SCRIPT))
    results_file = report_folder / "results" / f"{SCRIPT}.json"
    results = summarise(cards, measured, references, rows)
    if arguments.model and results_file.exists():  # the other models keep their results
        results["models"] = {**json.loads(results_file.read_text())["models"], **results["models"]}
    write_json(results_file, results)
    written = [results_file, draw_data(pictures["train"], drawings)]
    if not arguments.model:
        written += draw_answers(test, probabilities, drawings)
        written += [
            draw_upsampling(test, probabilities, results, drawings),
            draw_classes(test, probabilities["unet_bilinear"], drawings),
            draw_curves(test, probabilities, drawings),
            draw_learning_curves(cards, drawings),
        ]
    if rows:
        written.append(draw_experiments(rows, drawings))
    print("\nwrote", *written, sep="\n  ")


def draw_answers(test, probabilities, folder):
    """The first test pictures, the best, middling and worst ones, and those that metrics disagree about."""
    best = probabilities["unet_bilinear"]
    dice, union = overlaps(best >= 0.5, test.masks)
    boundary = np.array([boundary_score(p >= 0.5, mask) for p, mask in zip(best, test.masks, strict=True)])
    order = np.argsort(union)
    middle = len(order) // 2
    chosen = [*order[::-1][:4], *order[middle - 2 : middle + 2], *order[:4]]
    # Overlap and outline disagree most where their ranks are furthest apart.
    ranks = np.argsort(np.argsort(union)) - np.argsort(np.argsort(boundary))
    disputed = [ranks.argmax(), ranks.argmin()]
    columns = {model.replace("_", " "): probability for model, probability in probabilities.items()}
    return [
        draw_rows(test, columns, range(12), "The first twelve test pictures", folder / "predictions.png"),
        draw_rows(
            test,
            {"bilinear": best},
            chosen,
            "Best, middling and worst test pictures by IoU, U-Net with bilinear interpolation",
            folder / "best_and_worst.png",
            [f"IoU {union[number]:.2f}" for number in chosen],
        ),
        draw_rows(
            test,
            {"bilinear": best},
            disputed,
            "Two pictures that overlap and outline disagree about",
            folder / "disagreement.png",
            [f"Dice {dice[number]:.2f}, boundary {boundary[number]:.2f}" for number in disputed],
        ),
    ]


def main(argv=None):
    flags = cli.parser(__doc__, MODELS)
    flags.modes.add_argument(
        "--predict", nargs="+", type=Path, metavar="FILE", help="segment your own pictures; writes a mask beside each"
    )
    arguments = cli.parse(flags, argv)
    if arguments.predict:
        predict_files(arguments)
    elif arguments.experiments:
        run_experiments(arguments)
    else:
        if arguments.train:
            train(arguments)
        report(arguments)


if __name__ == "__main__":
    cli.run(main)
