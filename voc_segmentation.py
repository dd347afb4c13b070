"""Foreground segmentation of PASCAL VOC 2012: which pixels belong to an object, and which to the background?

Three networks are trained from scratch on images of 128 x 128 pixels: the encoder-decoder of Chollet's "Deep Learning
with Python" (2nd edition, section 9.2), and two U-Nets that differ in nothing but their upsampling, a transposed
convolution or bilinear interpolation and a convolution. A fourth, optional one has an encoder pretrained on ImageNet.

    python voc_segmentation.py --train               both U-Nets and the encoder-decoder
    python voc_segmentation.py --load                restores the saved networks and measures them again
    python voc_segmentation.py --experiments         losses, augmentation and learning rates on validation images
    python voc_segmentation.py --predict dog.jpg     writes dog_mask.png and dog_overlay.png beside the image
    python voc_segmentation.py --train --model mobilenet_unet     downloads the pretrained encoder

Foreground IoU on the 445 of 1,449 test images that our copy of the dataset holds: U-Net, transposed 0.667 ± 0.009,
bilinear 0.663 ± 0.006 (n = 3 seeds each), encoder-decoder 0.565 (n = 1), average training mask 0.380. 21, 24 and 8
minutes per training run on 2 cores of an Intel Xeon.

The test images are the validation list of the challenge, whose own test set has no public masks. "Void" pixels, the
border that annotators left undecided and the padding to a square, count neither in a loss nor in a metric.
"""

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import dataclasses
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops
from PIL import Image
from scipy.ndimage import binary_erosion, distance_transform_edt
from sklearn.metrics import average_precision_score, precision_recall_curve

from common import cli, models, results, training
from common.errors import UserError, reason
from common.files import read_json, replacing, write_json
from common.images import output_paths, predict_each, printable, read_image
from common.metrics import standard_deviation
from common.voc import BACKGROUND, CLASSES, VOID, fit_square, load_voc, place_in_square

SCRIPT = "voc_segmentation"
IMAGE_SIZE = 128
INPUT_SHAPE = (IMAGE_SIZE, IMAGE_SIZE, 3)
QUICK_IMAGES = 48  # of each part, with --quick
PREDICT_BATCH_SIZE = 64
BOUNDARY_TOLERANCE = 2  # pixels
MAX_LOG_SCALE, MAX_SHIFT = 0.35, 0.15  # between exp(-0.35) = 0.7 and exp(0.35) = 1.4 times as large; of the side
MAX_BRIGHTNESS, MAX_LOG_CONTRAST, MAX_LOG_SATURATION = 30.0, 0.3, 0.4  # grey levels; natural logarithms of factors
METRICS = ("foreground_iou", "dice", "dice_per_picture", "calibration_error")  # in the table of experiments
OBJECT_COLOR = (0, 114, 178)  # in the overlays of --predict


@dataclasses.dataclass(frozen=True)
class Config:
    network: str = "bilinear"  # U-Net with "bilinear" or "transposed" upsampling, "encoder_decoder" or "mobilenet"
    widths: tuple = (16, 32, 64, 128, 256)  # filters of a U-Net at 128, 64, 32, 16 and 8 pixels a side
    loss: str = "both"  # "cross-entropy", "dice" or "both", their sum
    augment: bool = True  # flip, scale, shift and recolour images at random
    learning_rate: float = 1e-3  # highest of the schedule
    batch_size: int = 16  # images per step
    epochs: int = 20  # passes over the training images; the weights of the best one on validation are kept


CONFIGS = {
    "unet_transposed": Config("transposed"),
    "unet_bilinear": Config("bilinear"),
    "encoder_decoder": Config("encoder_decoder", learning_rate=3e-4, epochs=8),
    "mobilenet_unet": Config("mobilenet", (16, 32, 48, 64, 96), learning_rate=3e-4, epochs=12),
}
FROM_SCRATCH = ("unet_transposed", "unet_bilinear", "encoder_decoder")  # trained and restored without --model
NUM_SEEDS = {"unet_transposed": 3, "unet_bilinear": 3, "encoder_decoder": 1, "mobilenet_unet": 1}


# ---------------------------------------------------------------------------------------------------------------- data


def load_data(arguments):
    """Returns the `SegmentationImages` of each part ("train", "validation", "test") and their checksums."""
    parts, checksums = load_voc(arguments.data_dir, IMAGE_SIZE, sample=arguments.sample)
    if arguments.quick:
        parts = {part: examples.take(slice(QUICK_IMAGES)) for part, examples in parts.items()}
    return parts, checksums


class Augmentation(layers.Layer):
    """Changes images (n, side, side, 3) and masks (n, side, side), uint8, at random in training; returns float32.

    What enters from outside is black in the image, before colours change, and void in the mask.
    """

    def __init__(self, seed):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(seed)

    def call(self, images, masks, training=False):
        images, masks = ops.cast(images, "float32"), ops.cast(masks, "float32")
        if not training:
            return images, masks
        count, side = ops.shape(images)[0], images.shape[1]
        scale = ops.exp(self._uniform((count,), -MAX_LOG_SCALE, MAX_LOG_SCALE))
        mirror = ops.where(self._uniform((count,), 0, 1) < 0.5, -1.0, 1.0)
        center = (side - 1) / 2
        # Where each new pixel comes from: x' = a x + c, y' = e y + f, scaled and mirrored about the image's centre.
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


# --------------------------------------------------------------------------------------------------------------- model


def convolution(filters, kernel_size=3, **keywords):
    return layers.Conv2D(filters, kernel_size, padding="same", kernel_initializer="he_normal", **keywords)


def build_unet(inputs, widths, upsampling):
    """U-Net (Ronneberger, Fischer & Brox 2015) from (n, side, side, 3), about -1 to 1, to (n, side, side, widths[0]).

    `upsampling` is "transposed" (Conv2DTranspose) or "bilinear" (UpSampling2D, then Conv2D), with the same number of
    parameters; nothing else differs.
    """

    def double_convolution(features, filters):
        # One normalisation for two convolutions: on a CPU it costs as much as they do.
        features = convolution(filters, activation="relu")(features)
        features = layers.BatchNormalization()(convolution(filters, use_bias=False)(features))
        return layers.ReLU()(features)

    def upsample(features, filters):
        name = f"upsample_{filters}"
        if upsampling == "transposed":
            options = {"strides": 2, "padding": "same", "kernel_initializer": "he_normal", "name": name}
            return layers.Conv2DTranspose(filters, 3, **options)(features)
        features = layers.UpSampling2D(2, interpolation="bilinear")(features)
        return convolution(filters, name=name)(features)

    features, skipped = inputs, []
    for level, filters in enumerate(widths):
        if level:
            features = layers.MaxPooling2D(2)(features)
        features = double_convolution(features, filters)
        skipped.append(features)
    skipped.pop()
    for filters in reversed(widths[:-1]):
        features = layers.Concatenate()([upsample(features, filters), skipped.pop()])
        features = double_convolution(features, filters)
    return features


def build_encoder_decoder(inputs):
    """The encoder-decoder of Chollet's section 9.2; inputs and result as in `build_unet`."""
    features = inputs
    for filters in (64, 128, 256):
        features = convolution(filters, strides=2, activation="relu")(features)
        features = convolution(filters, activation="relu")(features)
    for filters in (256, 128, 64):
        options = {"padding": "same", "activation": "relu", "kernel_initializer": "he_normal"}
        features = layers.Conv2DTranspose(filters, 3, **options)(features)
        features = layers.Conv2DTranspose(filters, 3, strides=2, **options)(features)
    return features


def build_mobilenet_unet(inputs, widths):
    """A U-Net decoder on MobileNetV2 (Sandler et al. 2018), pretrained on ImageNet; otherwise as `build_unet`."""
    try:
        encoder = keras.applications.MobileNetV2(
            input_tensor=inputs, input_shape=INPUT_SHAPE, include_top=False, weights="imagenet"
        )
    except Exception as error:  # a bare Exception is what Keras raises for a failed download
        raise UserError(
            f"the ImageNet weights of MobileNetV2 could not be downloaded ({reason(error)}); try again with a network, "
            f"or choose another --model, of {', '.join(FROM_SCRATCH)}"
        ) from error
    # The last features of 64, 32, 16 and 8 pixels a side; at 128 the skip connection is the image itself.
    names = ("block_1_expand_relu", "block_3_expand_relu", "block_6_expand_relu", "block_13_expand_relu")
    skipped = [inputs, *(encoder.get_layer(name).output for name in names)]
    features = encoder.get_layer("block_16_project").output
    for filters in reversed(widths):
        features = layers.UpSampling2D(2, interpolation="bilinear")(features)
        features = layers.Concatenate()([features, skipped.pop()])
        features = layers.BatchNormalization()(convolution(filters, use_bias=False)(features))
        features = layers.ReLU()(features)
    return features


def build_network(config):
    """Returns a functional model from images (n, 128, 128, 3), 0 to 255, to the probability (n, 128, 128, 1)."""
    inputs = keras.Input(INPUT_SHAPE, name="images")
    scaled = layers.Rescaling(1 / 127.5, offset=-1)(inputs)
    if config.network == "encoder_decoder":
        features = build_encoder_decoder(scaled)
    elif config.network == "mobilenet":
        features = build_mobilenet_unet(scaled, config.widths)
    else:
        features = build_unet(scaled, config.widths, config.network)
    probability = layers.Activation("sigmoid", dtype="float32", name="probability")
    return keras.Model(inputs, probability(convolution(1)(features)))


# -------------------------------------------------------------------------------------------------- losses and training


def cross_entropy(probability, foreground, valid):
    """Mean binary cross-entropy of the pixels where `valid` is 1; all arguments are float32 (n, side, side)."""
    probability = ops.clip(probability, 1e-6, 1 - 1e-6)
    losses = -foreground * ops.log(probability) - (1 - foreground) * ops.log(1 - probability)
    return ops.sum(losses * valid) / ops.maximum(ops.sum(valid), 1.0)


def dice_loss(probability, foreground, valid):
    """Mean of 1 - soft Dice score per image (Milletari, Navab & Ahmadi 2016); arguments as in `cross_entropy`."""

    def area(values):
        return ops.sum(values * valid, axis=(1, 2))

    # One pixel is added above and below, so that an empty prediction of an empty mask is right.
    score = (2 * area(probability * foreground) + 1) / (area(probability) + area(foreground) + 1)
    return ops.mean(1 - score)


LOSSES = {"cross-entropy": (cross_entropy,), "dice": (dice_loss,), "both": (cross_entropy, dice_loss)}


class SegmentationModel(keras.Model):
    """Functional model with the outputs (probability, augmented mask); minimises the sum of `loss_functions`."""

    def __init__(self, inputs, outputs, loss_functions):
        super().__init__(inputs, outputs)
        self.loss_functions = loss_functions

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        probability, masks = y_pred
        probability = ops.cast(probability, "float32")[..., 0]
        valid = ops.cast(masks != VOID, "float32")
        foreground = ops.cast(masks != BACKGROUND, "float32") * valid
        return sum(loss(probability, foreground, valid) for loss in self.loss_functions)


class BestEpoch(keras.callbacks.Callback):
    """Measures Dice on validation images after every epoch, and keeps the best weights in `folder`."""

    def __init__(self, network, validation, folder):
        super().__init__()
        self.network, self.validation = network, validation
        self.weights, self.score = folder / "best.weights.h5", folder / "best.json"

    def on_epoch_end(self, epoch, logs):
        dice, _ = overlaps(predict(self.network, self.validation.images) >= 0.5, self.validation.masks)
        logs["validation_dice"] = float(np.nanmean(dice))
        print(f" - {logs['validation_dice']:.4f} Dice on validation")
        best = self.read()["validation_dice"] if epoch else -1.0
        if logs["validation_dice"] > best:
            training.save_weights(self.network, self.weights)
            write_json(self.score, {"epoch": epoch + 1, "validation_dice": logs["validation_dice"]})

    def read(self):
        """Returns the best epoch (1 is the first) and its score; `UserError` where the file is missing or damaged."""
        advice = "start over without --resume"
        best = read_json(self.score, advice)
        epoch, dice = best.get("epoch"), best.get("validation_dice")
        if type(epoch) is not int or type(dice) is not float or epoch < 1 or not 0 <= dice <= 1:
            raise UserError(f"{self.score} is damaged (no epoch with its score); {advice}")
        return best

    def restore(self):
        """Puts the best weights into the network and returns the number of their epoch."""
        epoch = self.read()["epoch"]
        try:
            self.network.load_weights(self.weights)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"{self.weights} is damaged ({reason(error)}); start over without --resume") from error
        return epoch


def train_network(config, parts, seed, folder, resume):
    """Trains a network on parts["train"], or resumes from the checkpoint in `folder`.

    Returns the network in float32 with the weights of the best epoch on parts["validation"], the number of that epoch,
    and seed, learning curves and seconds as the card has them.
    """
    keras.utils.set_random_seed(seed)
    examples = parts["train"]
    steps = training.count_steps(len(examples.names), config)
    with training.computing_in(training.fast_precision()) as precision:
        network = build_network(config)
    inputs = {
        "images": keras.Input(INPUT_SHAPE, dtype="uint8", name="images"),
        "masks": keras.Input((IMAGE_SIZE, IMAGE_SIZE), dtype="uint8", name="masks"),
    }
    if config.augment:
        augmented, masks = Augmentation(seed)(inputs["images"], inputs["masks"])
    else:
        augmented, masks = (ops.cast(each, "float32") for each in inputs.values())
    model = SegmentationModel(inputs, (network(augmented), masks), LOSSES[config.loss])
    schedule = training.cosine_schedule(config.learning_rate, steps)
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=1e-3), **training.compile_options(steps))
    best = BestEpoch(network, training.divisible(parts["validation"]), folder / "best")
    data = {"images": examples.images, "masks": examples.masks}
    curves, seconds = training.fit(
        model, data, None, config=config, seed=seed, folder=folder, resume=resume, precision=precision, callbacks=[best]
    )
    epoch = best.restore()
    full_precision = build_network(config)
    models.set_weights(full_precision, network.get_weights())
    models.round_weights(full_precision)  # three networks have to fit into 20 MB
    return full_precision, epoch, {"seed": seed, "curves": curves, "seconds": round(seconds, 1)}


def train(arguments):
    """Trains every network with all its seeds, measures them, and saves that of the first seed with its card."""
    parts, checksums = load_data(arguments)
    names, trained = [arguments.model] if arguments.model else FROM_SCRATCH, {}
    for model, seed, folder in results.training_runs(SCRIPT, arguments, names, NUM_SEEDS):
        config = cli.with_flags(CONFIGS[model], arguments)
        trained.setdefault(model, []).append(train_network(config, parts, seed, folder, arguments.resume))
    # The test images are read from here on, after the last training run.
    parts["sample"] = load_voc(arguments.data_dir, IMAGE_SIZE, sample=True)[0]["test"]
    sizes = {part: len(examples.names) for part, examples in parts.items()}
    dataset = {"name": f"PASCAL VOC 2012 at {IMAGE_SIZE} x {IMAGE_SIZE}", **sizes, "sha256": checksums}
    for model, runs in trained.items():
        for network, _, run in runs:
            run["metrics"] = {part: evaluate(network, examples)[0] for part, examples in parts.items()}
        network, epoch, first = runs[0]
        config = cli.with_flags(CONFIGS[model], arguments)
        card = models.card(SCRIPT, model, arguments, config=config, dataset=dataset, **first)
        seeds = [{field: run[field] for field in ("seed", "seconds", "metrics")} for _, _, run in runs]
        path = arguments.output_dir / "saved_models" / SCRIPT / f"{model}.keras"
        models.save_model(network, path, {**card, "kept_epoch": epoch, "seeds": seeds})


# ---------------------------------------------------------------------------------------------------------- evaluation


def predict(network, images):
    """Returns the probability that a pixel belongs to an object, float32 (n, 128, 128), for uint8 images."""
    return network.predict(images, batch_size=PREDICT_BATCH_SIZE, verbose=0)[..., 0]


def overlaps(predicted, masks):
    """Dice score and intersection over union of the foreground of each image.

    `predicted` is bool and `masks` uint8, both (n, side, side). Returns two float (n,), 0 to 1: 1 where neither
    prediction nor mask has any foreground, NaN for images that are void all over.
    """
    valid = masks != VOID
    truth = (masks != BACKGROUND) & valid
    predicted = predicted & valid
    both = np.sum(predicted & truth, axis=(1, 2))
    sizes = np.sum(predicted, axis=(1, 2)) + np.sum(truth, axis=(1, 2))
    with np.errstate(invalid="ignore"):
        dice = np.where(sizes > 0, 2 * both / sizes, 1.0)
        iou = np.where(sizes > 0, both / (sizes - both), 1.0)
    return tuple(np.where(valid.any(axis=(1, 2)), values, np.nan) for values in (dice, iou))


def boundary_score(predicted, mask):
    """F-score of the boundary pixels within 2 pixels of each other (Csurka et al. 2013) of one image; as `overlaps`.

    A boundary lies where object meets background, and not where either meets void, which surrounds most objects. So
    void pixels first get the prediction and the truth of the nearest pixel that is not void.
    """
    valid = mask != VOID
    if not valid.any():
        return np.nan
    distance, nearest = distance_transform_edt(~valid, return_indices=True)
    shapes = [shape[tuple(nearest)] for shape in (predicted, mask != BACKGROUND)]
    # Eroding with everything beyond the image counted as object leaves out the edge of the image.
    outlines = [shape & ~binary_erosion(shape, border_value=1) & (distance <= BOUNDARY_TOLERANCE) for shape in shapes]
    present = [outline.any() for outline in outlines]
    if not all(present):
        return 0.0 if any(present) else 1.0
    near = [
        np.mean(distance_transform_edt(~other)[outline] <= BOUNDARY_TOLERANCE)
        for outline, other in zip(outlines, reversed(outlines), strict=True)
    ]
    return float(2 * near[0] * near[1] / (near[0] + near[1])) if sum(near) else 0.0


def boundary_scores(predicted, masks):
    return np.array([boundary_score(*pair) for pair in zip(predicted, masks, strict=True)])


def calibration(probability, masks, bins=10):
    """How often pixels are objects, by their predicted probability.

    Returns a dict of arrays with one value per bin (mean "probability", "frequency" of objects, "share" of all pixels),
    and the expected calibration error (Guo et al. 2017, section 2).
    """
    valid = masks != VOID
    probability, truth = probability[valid], masks[valid] != BACKGROUND
    place = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    mean, frequency = (
        np.bincount(place, weights=values, minlength=bins) / np.maximum(count, 1) for values in (probability, truth)
    )
    share = count / count.sum()
    error = float(np.sum(share * np.abs(mean - frequency)))
    return {"probability": mean, "frequency": frequency, "share": share}, error


def checkerboard(probability):
    """Energy of probability maps (n, side, side) at a period of two pixels, as a share of all but that of the mean.

    Transposed convolutions with a stride of 2 write every second pixel with other weights (Odena, Dumoulin & Olah
    2016), which shows at the highest frequency of rows and columns. `side` is even.
    """
    energy = np.square(np.abs(np.fft.fft2(probability)))
    half = probability.shape[1] // 2
    energy[:, 0, 0] = 0
    fastest = energy[:, half, :].sum() + energy[:, :, half].sum() - energy[:, half, half].sum()
    return float(fastest / energy.sum()) if energy.any() else 0.0


def measure(probability, masks):
    """Returns every metric (dict of float) of the predictions `probability` >= 0.5, both (n, side, side)."""
    valid = masks != VOID
    truth, predicted = (masks != BACKGROUND)[valid], (probability >= 0.5)[valid]
    both, neither, wrong = np.sum(truth & predicted), np.sum(~truth & ~predicted), np.sum(truth != predicted)
    dice, iou = overlaps(probability >= 0.5, masks)

    def share(part, whole):
        return float(part / whole) if whole else 1.0

    return {
        "foreground_iou": share(both, both + wrong),
        "dice": share(2 * both, 2 * both + wrong),
        "mean_iou": (share(both, both + wrong) + share(neither, neither + wrong)) / 2,
        "pixel_accuracy": share(both + neither, both + neither + wrong),
        "precision": share(both, predicted.sum()),
        "recall": share(both, truth.sum()),
        "foreground_iou_per_picture": float(np.nanmean(iou)),
        "dice_per_picture": float(np.nanmean(dice)),
        "boundary_f_score": float(np.nanmean(boundary_scores(probability >= 0.5, masks))),
        "average_precision": float(average_precision_score(truth, probability[valid])) if truth.any() else 0.0,
        "calibration_error": calibration(probability, masks)[1],
    }


def evaluate(network, examples):
    """Returns the metrics of `measure` and `checkerboard` (dict of float) and the probabilities of `examples`."""
    probability = predict(models.for_prediction(network, len(examples.images)), examples.images)
    return {**measure(probability, examples.masks), "checkerboard": checkerboard(probability)}, probability


def baselines(examples, test):
    """Metrics without a network; the average mask of `examples` is cut where its foreground IoU on them is best."""
    valid = examples.masks != VOID
    truth = (examples.masks != BACKGROUND) & valid
    average = truth.sum(axis=0) / np.maximum(valid.sum(axis=0), 1)

    def iou_on_training(height):
        predicted = (average >= height) & valid
        return np.sum(predicted & truth) / np.sum(predicted | truth)

    cut = average >= max(np.linspace(0.05, average.max(), 20), key=iou_on_training)
    predictions = {"all_background": 0, "all_foreground": 1, "average_mask": cut}
    return {
        name: measure(np.broadcast_to(np.float64(predicted), test.masks.shape), test.masks)
        for name, predicted in predictions.items()
    }


def dominant_class(masks):
    """Returns the class of the largest object of each image, int (n,), 0 where there is none."""
    areas = np.stack([np.sum(masks == label, axis=(1, 2)) for label in range(1, len(CLASSES))], axis=1)
    return np.where(areas.any(axis=1), areas.argmax(axis=1) + 1, 0)


# --------------------------------------------------------------------------------------------------------- experiments


def run_experiments(arguments):
    """Trains what experiments/voc_segmentation.py plans, and measures it on the validation images."""
    if not (plan := results.optional_module("experiments", SCRIPT)):
        return
    parts, _ = load_data(arguments)
    table = results.table_path(arguments.output_dir, SCRIPT)
    planned = [{"name": name, "seed": arguments.seed + seed} for name, seed in plan.RUNS]
    for run in results.unfinished(table, planned, limit=2 if arguments.quick else None):
        config = cli.with_flags(Config(epochs=plan.EPOCHS, **plan.EXPERIMENTS[run["name"]]), arguments)
        folder = arguments.output_dir / "runs" / SCRIPT / "experiment"
        try:
            network, _, about = train_network(config, parts, run["seed"], folder, resume=False)
        except training.Diverged as error:
            print(f"{run['name']}, seed {run['seed']}, gets no row: {error}")
            continue
        measured, _ = evaluate(network, parts["validation"])
        row = {**run, **dataclasses.asdict(config), "seconds": about["seconds"]}
        results.append_row(table, row | {metric: round(measured[metric], 5) for metric in METRICS})


# -------------------------------------------------------------------------------------------------------------- report


def summarise(cards, measured, references, table):
    """Returns what `report/results/voc_segmentation.json` holds; `table` is that of the experiments."""
    summary = {}
    for model, card in cards.items():
        seeds = {}
        for metric in measured[model]:
            values = [seed["metrics"]["test"][metric] for seed in card["seeds"]]
            seeds[metric] = {"values": values, "mean": float(np.mean(values)), "std": standard_deviation(values)}
        summary[model] = {
            "test": measured[model],
            "over_average_mask": measured[model]["foreground_iou"] - references["average_mask"]["foreground_iou"],
            "validation": card["metrics"]["validation"],
            "train": card["metrics"]["train"],
            "number_of_seeds": len(card["seeds"]),
            "seeds": seeds,
            "seconds_per_epoch": float(np.mean([seed["seconds"] for seed in card["seeds"]])) / card["epochs"],
            "parameters": card["parameters"]["trainable"],
            "minutes": round(card["seconds"] / 60, 1),
            **{field: card[field] for field in ("epochs", "kept_epoch", "hardware", "shortened")},
        }
    dataset = next(iter(cards.values()))["dataset"]
    return {
        "script": f"{SCRIPT}.py",
        "pictures": {part: dataset[part] for part in ("train", "validation", "test")},
        "models": summary,
        "references": references,
        "experiments": table.groupby("name", sort=False)[list(METRICS)].mean().to_dict("index"),
    }


def report(arguments):
    """Restores the saved networks, measures them on the test images, compares, and writes results and figures."""
    folder = models.models_folder(arguments.output_dir, SCRIPT)
    print(f"models from {folder}")
    parts, checksums = load_data(arguments)
    test, part = parts["test"], "sample" if arguments.sample else "test"
    rows, cards, measured, probabilities = [], {}, {}, {}
    for model in [arguments.model] if arguments.model else FROM_SCRATCH:
        path = folder / f"{model}.keras"
        network, cards[model] = models.load_model(path, SCRIPT, INPUT_SHAPE)
        measured[model], probabilities[model] = evaluate(network, test)
        rows += results.compare(cards[model], measured[model], part=part, size=len(test.names), sha256=checksums)
        if arguments.record:
            found = {part: (len(test.names), measured[model])}
            results.record_metrics(path, None if arguments.sample else checksums, **found)
    references = baselines(parts["train"], test)
    ious = [f"{values['foreground_iou']:.4f} ({name.replace('_', ' ')})" for name, values in references.items()]
    print(f"foreground IoU without a network: {', '.join(ious)}")
    table = results.recorded_path(arguments, f"{SCRIPT}_experiments.csv")
    table = results.read_table(table, numbers=METRICS, texts=("name", "seed", "epochs"))
    summary, written = summarise(cards, measured, references, table), []
    if arguments.train or (arguments.record and not arguments.sample):
        written.append(results.write_results(SCRIPT, arguments, summary))
    if plots := results.optional_module("plots", SCRIPT):
        figures = arguments.output_dir / "report" / "figures" / SCRIPT
        written += draw_figures(plots, parts, probabilities, cards, table, figures)
    return results.conclude(SCRIPT, arguments, rows, written)


def draw_figures(plots, parts, probabilities, cards, table, folder):
    """Computes what the figures show and draws them, with --model only those without networks. Returns the paths."""
    test, written = parts["test"], [plots.draw_data(parts["train"], CLASSES, folder / "data.png")]
    if len(table):
        noise = table.loc[table["name"] == "baseline", list(METRICS)].std()
        written.append(plots.draw_experiments(table, noise, folder / "experiments.png"))
    if not set(FROM_SCRATCH) <= set(probabilities):
        return written
    shown = probabilities["unet_bilinear"]
    dice, iou = overlaps(shown >= 0.5, test.masks)
    boundary = boundary_scores(shown >= 0.5, test.masks)
    order = np.argsort(iou)[: np.isfinite(iou).sum()]
    middle = len(order) // 2
    extremes = [*order[::-1][:4], *order[middle - 2 : middle + 2], *order[:4]]
    # Overlap and outline disagree most where their ranks are furthest apart.
    ranks = np.argsort(np.argsort(iou)) - np.argsort(np.argsort(boundary))
    disputed = [ranks.argmax(), ranks.argmin()]
    classes = dominant_class(test.masks)
    groups = {name: iou[classes == label] for label, name in enumerate(CLASSES) if label and sum(classes == label) > 2}
    valid = test.masks != VOID
    truth = (test.masks != BACKGROUND)[valid]
    curves, calibrations = {}, {}
    for model, probability in probabilities.items():
        curves[model] = precision_recall_curve(truth, np.round(probability[valid], 3), drop_intermediate=True)[:2]
        calibrations[model], _ = calibration(probability, test.masks)
    return [
        *written,
        plots.draw_first(test, probabilities, folder / "predictions.png"),
        plots.draw_extremes(test, shown, extremes, iou, folder / "best_and_worst.png"),
        plots.draw_disagreement(test, shown, disputed, dice, boundary, folder / "disagreement.png"),
        plots.draw_upsampling(test, probabilities, cards, folder / "upsampling.png"),
        plots.draw_classes(groups, folder / "classes.png"),
        plots.draw_precision_recall(curves, calibrations, folder / "precision_recall.png"),
        plots.draw_learning_curves(cards, folder / "learning_curves.png"),
    ]


# ------------------------------------------------------------------------------------------------------ images of users


def segment(network, image):
    """Segments an RGB `PIL.Image`; returns the mask (mode "L", 0 and 255) and an overlay, both of the same size."""
    square = fit_square(image, IMAGE_SIZE, Image.Resampling.BILINEAR, 0)
    probability = predict(network, square[None])[0]
    # Undo the padding, then resize the probability, whose edges are softer than those of a mask.
    inside = Image.fromarray(probability[place_in_square(image, IMAGE_SIZE)])
    mask = Image.fromarray((np.asarray(inside.resize(image.size, Image.Resampling.BILINEAR)) >= 0.5) * np.uint8(255))
    tinted = Image.blend(image, Image.new("RGB", image.size, OBJECT_COLOR), 0.5)
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.6)
    return mask, Image.composite(tinted, faded, mask)


def predict_file(network, path):
    """Segments an image file; writes a mask and an overlay of the original size beside it, returns both paths."""
    segmented = segment(network, read_image(path, "RGB"))
    written = output_paths(path, ("mask", "overlay"))
    for target, result in zip(written, segmented, strict=True):
        with replacing(target) as temporary:
            result.save(temporary, format="PNG")
    print("wrote", *map(printable, written))
    return written


# ---------------------------------------------------------------------------------------------------------------- main


def main(argv=None):
    flags = cli.parser(__doc__, list(CONFIGS))
    flags.modes.add_argument(
        "--predict", nargs="+", type=Path, metavar="FILE", help="segment image files; writes a mask beside each"
    )
    arguments = cli.parse(flags, argv)
    if arguments.predict:
        path = models.models_folder(arguments.output_dir, SCRIPT) / f"{arguments.model or 'unet_bilinear'}.keras"
        network = models.for_prediction(models.load_model(path, SCRIPT, INPUT_SHAPE)[0])
        return 0 if predict_each(arguments.predict, lambda file: predict_file(network, file)) else 2
    if arguments.experiments:
        return run_experiments(arguments)
    if arguments.train:
        train(arguments)
    return report(arguments)


if __name__ == "__main__":
    cli.run(main)
