"""The saved models in a browser: read a clock, classify, generate, add digits, segment a photo, draw a Pegasus.

    make app              installs what is needed (requirements-app.txt) and serves http://localhost:7860

The page is served to this computer only, and needs neither a dataset nor a network. A function in `TABS`,
whose docstring introduces a tab, makes it of the functions of a script. Models are restored when they are first used.
"""

from common import startup  # isort: skip  # noqa: F401  (before Keras is imported anywhere)

import argparse
import contextlib
import functools
import html
import math
import os
import sys
import time
import types
from pathlib import Path

import numpy as np

import addnist_classifier
import cifar100_generator
import cifar100_transfer
import fashion_cifar_mlp_cnn
import pegasus_gan
import task1_smallnorb_cnn
import task2_diffusion
import tell_the_time
import voc_segmentation
from common import cli, clocks, diffusion, models
from common.datasets import SAMPLES, checked_samples, load_cifar100, load_smallnorb
from common.errors import UserError
from common.files import read_json
from common.images import read_image, read_square

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # otherwise Gradio reports every start to its makers
try:
    import gradio as gr
except ModuleNotFoundError:
    print("error: Gradio is not installed; start the page with `make app`", file=sys.stderr)
    sys.exit(2)

MAX_UPLOAD = "20mb"
MAX_WAITING = 20  # requests in the queue
MAX_SIDE = 1600  # pixels of a segmented photo as it is shown
CSS = ".enlarged .block:not(.fullscreen) :is(.image-frame, img) {width: 100%; max-height: 420px; object-fit: contain}"
slider = functools.partial(gr.Slider, step=1, precision=0)  # of whole numbers


# ---------------------------------------------------------------------------------------------- what all tabs share


@contextlib.contextmanager
def shown_errors(path=None):
    """Turns a `UserError` into one line in the browser, in which the uploaded file at `path` has its own name."""
    try:
        yield
    except (UserError, addnist_classifier.UserError, cifar100_generator.UserError) as error:
        text = str(error).replace(f"{Path(path).parent}{os.sep}", "") if path else str(error)
        raise gr.Error(html.escape(text, quote=False), print_exception=False) from error


def model_path(script, model):
    return models.models_folder(cli.REPOSITORY, script.SCRIPT) / f"{model}.keras"


@functools.cache
def restored(script, model):
    """Restores a Keras model of a script (module)."""
    return models.load_model(model_path(script, model), script.SCRIPT)[0]


def scored(script, model, score):
    """Returns the text `score`, with metrics and number of test images in braces, filled in from the card."""
    card = read_json(model_path(script, model).with_suffix(".json"), models.RESTORE)
    return score.format(**card["metrics"]["test"], images=card["dataset"]["test"]).replace("%", " %")


def about(script, scores, command):
    """Says which models a tab uses, where their cards are, what they scored, and what to type in a terminal."""
    lines = []
    for model, score in scores.items():
        path = model_path(script, model).with_suffix(".json").relative_to(cli.REPOSITORY)
        lines.append(f"- model `{model}`, card `{path}`: {scored(script, model, score)}")
    gr.Markdown("\n".join([*lines, f"- in a terminal: `{command}`"]))


# One call at a time on the whole page, since every network uses all cores; of several events, the last one counts.
QUEUED = {"concurrency_id": "networks", "concurrency_limit": 1, "trigger_mode": "always_last"}


def in_terminal(command):
    """Returns the line that says what to type for the images that are shown."""
    return f"\n\nThe same in a terminal: `python {command}`"


def output_image(caption, buttons=("fullscreen", "download")):
    with gr.Column(min_width=240):
        gr.Markdown(caption)
        return gr.Image(label=caption, show_label=False, format="png", interactive=False, buttons=list(buttons))


def examples(images, columns, height):
    """Returns a gallery to choose from, the number of the chosen image, as state, and the event of its choice."""
    options = {"show_label": False, "format": "png", "allow_preview": False, "buttons": [], "interactive": False}
    gallery, number = gr.Gallery(images, columns=columns, height=height, **options), gr.State()
    return gallery, number, gallery.select(chosen, None, number).then


def chosen(event: gr.SelectData):
    return event.index


def enlarged(images, factor):
    """Repeats every pixel of images (n, height, width[, channels])."""
    return np.asarray(images).repeat(factor, axis=1).repeat(factor, axis=2)


def tiled(images, columns, factor):
    """Puts enlarged images side by side, and below each other, with white lines between them."""
    images = enlarged(images, factor)
    padding = [(0, -len(images) % columns), (2, 2), (2, 2), (0, 0)]
    images = np.pad(images, padding[: images.ndim], constant_values=255)
    return np.concatenate([np.concatenate(list(images[i : i + columns]), 1) for i in range(0, len(images), columns)])


def most_probable(probabilities, names, count):
    """Returns a list of texts such as "cat: 93.1 %", the most probable first."""
    return [f"{names[i]}: {100 * probabilities[i]:.1f} %" for i in np.argsort(-probabilities)[:count]]


def table(header, rows):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *rows])


# ------------------------------------------------------------------------------------------------- reading a clock

CLOCK = tell_the_time.CONFIGS[tell_the_time.FINAL]


def read_time(image):
    """Returns the minutes since 12 o'clock on a square image of a clock."""
    network = restored(tell_the_time, tell_the_time.FINAL)
    return tell_the_time.read_clocks(network, image[None], CLOCK.representation)[0]


def read_clock_file(path):
    """Reads the clock on an uploaded photo; returns the image that the network gets, and the time."""
    with shown_errors(path):
        if path is None:
            return None, ""
        image = read_square(path, "L", CLOCK.size)
        return enlarged(image[None], 2)[0], f"## {tell_the_time.clock_time(read_time(image))}"


def read_rendered_clock(hour, minute, tilt, glare, seed):
    """Renders a clock, reads it, and returns the image and the times. Tilt is in degrees, glare in grey levels."""
    with shown_errors():
        scene = clocks.sample_scenes(np.array([[hour, minute]]), np.random.default_rng(seed))
        scene.tilt[:], scene.glare[:] = np.radians(tilt), glare
        image = clocks.render(scene, CLOCK.size)[0]
        minutes, true = read_time(image), hour * 60 + minute
        text = f"## {tell_the_time.clock_time(minutes)}\nThe clock shows {tell_the_time.clock_time(true)}: an error of "
        return enlarged(image[None], 2)[0], f"{text}{tell_the_time.common_sense_error(minutes, true):.0f} min."


def tab_tell_the_time():
    """A network reads the time on a photo of an analog clock. It was trained on rendered clocks alone."""
    score = "mean error {mean_minutes:.2f} min, {within_5_minutes:.1%} within 5 min, on {images:,} rendered test "
    score += "images; on photos it has not been measured"
    about(tell_the_time, {tell_the_time.FINAL: score}, "python tell_the_time.py --predict clock.jpg")
    with gr.Row():
        with gr.Column():
            gr.Markdown("A photo of an analog clock; the square in its middle is used")
            file = gr.File(show_label=False, height=130)
            gr.Markdown("Or render one")
            sliders = [
                slider(0, 11, 10, label="Hour (0 is 12 o'clock)"),
                slider(0, 59, 9, label="Minute"),
                slider(*clocks.RANGES["tilt"], 20, label="Tilt of the camera, degrees"),
                slider(0, 330, 0, step=10, label="Glare on the dial, grey levels"),
                slider(0, 999, 0, label="Scene (seed of everything else)"),
            ]
            button = gr.Button("Render and read", variant="primary")
        with gr.Column():
            outputs = [output_image("What the network sees"), gr.Markdown()]
    gr.on([file.upload, file.clear], read_clock_file, file, outputs, **QUEUED)
    render = [button.click, *(each.change for each in sliders)]
    gr.on(render, read_rendered_clock, sliders, outputs, **QUEUED)
    gr.on(render, lambda: None, None, file)


# -------------------------------------------------------------------------------------------- classifying smallNORB


@functools.cache
def toys():
    """One stereo pair of each of the 25 test toys, as the network takes them."""
    pairs = task1_smallnorb_cnn.prepare(load_smallnorb(None, sample=True).test)
    _, first = np.unique(pairs.category * 10 + pairs.instance, return_index=True)
    return pairs.take(first)


def classify_toy(number, level):
    """Classifies a toy, unmodified and before a background of the grey `level`; returns both images, and a table."""
    if number is None:
        return None, None, "Click on a toy."
    with shown_errors():
        toy, names = toys().take([number]), task1_smallnorb_cnn.CATEGORIES
        repainted = task1_smallnorb_cnn.repaint_background(toy.images, level)
        pairs = {"unmodified": toy.images[0], f"background {level:.0f}": repainted[0]}
        predicted = task1_smallnorb_cnn.predict(restored(task1_smallnorb_cnn, "joint"), np.stack(list(pairs.values())))
        rows = [["**truth**", f"**{names[toy.category[0]]}**", f"**{toy.elevation[0]:.0f}°**"]]
        for kind, category, elevation in zip(pairs, predicted["category"], predicted["elevation"], strict=True):
            rows.append([kind, ", ".join(most_probable(category, names, 2)), f"{elevation:.1f}°"])
        shown = [tiled(np.moveaxis(pair, -1, 0), 2, 4) for pair in pairs.values()]
        return *shown, table(["image", "category", "elevation of the camera"], rows)


def tab_task1_smallnorb_cnn():
    """A network names the category of a toy on two small photos, and estimates the elevation of the cameras."""
    score = "accuracy {category_accuracy:.2%}, elevation error {elevation_mae_degrees:.2f}° (backgrounds repainted: "
    score += "{elevation_mae_degrees_background_repainted:.2f}°), on {images:,} test images"
    about(task1_smallnorb_cnn, {"joint": score}, "python task1_smallnorb_cnn.py --load --sample --model joint")
    with gr.Row():
        with gr.Column():
            gr.Markdown("Click on one of the test toys, which the network has not seen in training")
            _, number, choice = examples(list(enlarged(toys().images[..., 0], 2)), columns=5, height=600)
        with gr.Column():
            level = slider(*task1_smallnorb_cnn.BACKGROUND_LEVELS, 120, label="Grey of the new background")
            with gr.Row():
                outputs = [output_image(text, ()) for text in ("Left and right camera", "Background repainted")]
            outputs.append(gr.Markdown())
    choice(classify_toy, [number, level], outputs, **QUEUED)
    level.change(classify_toy, [number, level], outputs, **QUEUED)


# -------------------------------------------------------------------------------------------- generating smallNORB


@functools.cache
def toy_sampler():
    network, config, _ = task2_diffusion.restore(types.SimpleNamespace(output_dir=cli.REPOSITORY), "network")
    return task2_diffusion.build_sampler(models.for_prediction(network), config, task2_diffusion.SAMPLING)


def generate_toys(category, elevation, count, seed):
    """Yields the images after every step of denoising, tiled, and how far it is."""
    with shown_errors():
        yield None, "Restoring the network ..."
        flags, sampler = f"--category {category} --elevation {elevation} --samples {count} --seed {seed}", toy_sampler()
        command = in_terminal(f"task2_diffusion.py --load {flags}")
        labels = {
            "category": np.full(count, task2_diffusion.CATEGORIES.index(category)),
            "elevation": np.full(count, task2_diffusion.DEGREES.tolist().index(elevation)),
        }
        inputs = diffusion.sampler_inputs(labels, task2_diffusion.IMAGE_SHAPE, seed)
        for step, noisy in enumerate(sampler.states(inputs)):
            images = task2_diffusion.denormalize(noisy, sampler.value_range)
            yield tiled(images, math.ceil(math.sqrt(count)), 4), f"Step {step} of {sampler.sampling.steps}{command}"


def tab_task2_diffusion():
    """A diffusion model turns noise into images of toys of a chosen category, seen from a chosen elevation."""
    score = "a classifier names the category of {category_agreement:.1%} of 10,000 generated images, and an elevation "
    score += "{elevation_mae_degrees:.1f}° off; Fréchet distance {frechet_distance:.2f} to {images:,} test images, of "
    score += "other toys"
    about(task2_diffusion, {"network": score}, "python task2_diffusion.py --load --category car --elevation 30")
    with gr.Row():
        with gr.Column():
            degrees = task2_diffusion.DEGREES.tolist()
            inputs = [
                gr.Radio(task2_diffusion.CATEGORIES, value="car", label="Category"),
                gr.Radio(degrees, value=degrees[0], label="Elevation of the camera, degrees"),
                slider(1, 9, 4, label="Number of images"),
                slider(0, 999, 0, label="Seed"),
            ]
            button = gr.Button("Generate", variant="primary")
        with gr.Column():
            outputs = [output_image("From noise to toys"), gr.Markdown()]
    # The image itself is the progress; the text shows the place in the queue.
    button.click(generate_toys, inputs, outputs, **QUEUED, show_progress="minimal", show_progress_on=outputs[1])


# --------------------------------------------------------------------------------------------------------- AddNIST


@functools.cache
def digits():
    return addnist_classifier.load_data(None, sample=True)[0]["test"]


@functools.cache
def addnist_weights(model):
    return addnist_classifier.load_network(model_path(addnist_classifier, model).with_suffix(".npz"))[0]


def add_digits(red, green, blue, seed):
    """Has an image of three digits classified; returns its channels and the image itself, tiled, and a table."""
    with shown_errors():
        wanted, total, highest = (red, green, blue), red + green + blue, addnist_classifier.NUM_CLASSES
        if not 1 <= total <= highest:
            raise UserError(f"the digits add up to {total}; choose some with a sum from 1 to {highest}")
        test, generator = digits(), np.random.default_rng(seed)
        image = np.stack([generator.choice(test.images[test.digits == digit]) for digit in wanted])
        colours = np.concatenate([np.eye(3, dtype="uint8"), np.ones((1, 3), "uint8")])
        tiles = np.moveaxis(image, 0, -1) * colours[:, None, None]
        classes, read, _ = addnist_classifier.forward(addnist_weights("shared"), image[None], "shared")
        ordinary, _ = addnist_classifier.predict(addnist_weights("ordinary"), image[None], "ordinary")
        sums = [most_probable(np.exp(each[0]), range(1, highest + 1), 2) for each in (classes, ordinary)]
        of_channels = [most_probable(each, range(addnist_classifier.NUM_DIGITS), 1)[0] for each in np.exp(read[0])]
        rows = [[f"**{text}**" for text in ("truth", *wanted, total)], ["shared", *of_channels, ", ".join(sums[0])]]
        rows.append(["ordinary", *["–"] * len(wanted), ", ".join(sums[1])])
        return tiled(tiles, 4, 5), table(["network", "red", "green", "blue", "sum"], rows)


def tab_addnist_classifier():
    """Networks add three handwritten digits, one in each colour channel. In training only sums were labelled."""
    scores = dict.fromkeys(addnist_classifier.MODELS, "accuracy {accuracy:.2%} on {images:,} test images")
    about(addnist_classifier, scores, "python addnist_classifier.py --load --sample")
    gr.Markdown("The shared network has learnt from sums what a digit is, and tells what it has read in each channel.")
    with gr.Row():
        with gr.Column():
            names = {"Red channel": 3, "Green channel": 7, "Blue channel": 5}
            inputs = [slider(0, 9, digit, label=name) for name, digit in names.items()]
            inputs.append(slider(0, 999, 0, label="Handwriting (seed)"))
            button = gr.Button("Add", variant="primary")
        with gr.Column():
            outputs = [output_image("The three channels, and the image that they make", ()), gr.Markdown()]
    gr.on([button.click, *(each.change for each in inputs)], add_digits, inputs, outputs, **QUEUED)


# ------------------------------------------------------------------------------------------- Fashion-MNIST and CIFAR


@functools.cache
def tracked(name):
    return (fashion_cifar_mlp_cnn.LOADERS | {"cifar100": load_cifar100})[name](None, sample=True)


@functools.cache
def vgg_base(kind):
    """Returns the model from images to the `kind` of features that a network for CIFAR-100 is saved with."""
    script = cifar100_transfer
    blocks, features = (restored(script, model) for model in (script.BLOCKS_1_TO_4, "vgg_features"))
    base = script.VggBase(blocks, features.get_layer("block_5"))
    return script.build_pooled(base, 2 * script.IMAGE_SIZE) if kind == "pooled" else blocks


def networks(name):
    """Returns the script and the names of the saved networks for a dataset."""
    script = fashion_cifar_mlp_cnn
    if name == "cifar100":
        return cifar100_transfer, list(cifar100_transfer.SAVED)
    return script, [model for model, (key, *_) in script.MODELS.items() if key == name]


def describe(name):
    """Returns what there is to say about the networks for a dataset."""
    (script, names), best = networks(name), fashion_cifar_mlp_cnn.BEST.get(name)
    scores = ", ".join(f"`{model}` {scored(script, model, '{accuracy:.1%}')}" for model in names)
    command = f"python {script.SCRIPT}.py --predict image.png" + (f" --model {best}" if best else "")
    return (
        f"- models, with the accuracy on 10,000 test images: {scores}\n"
        f"- cards: `saved_models/{script.SCRIPT}/<model>.json`\n- in a terminal, with the best network: `{command}`"
    )


def classify(name, number, path, progress=gr.Progress()):  # noqa: B008  (how Gradio learns that progress is reported)
    """Has all networks classify a test image, or the uploaded one at `path`; returns what they see, and a table."""
    with shown_errors(path):
        if number is None and path is None:
            return None, ""
        dataset, truth, rows = tracked(name), "", []
        if path is None:
            image, label = dataset.test.images[number], dataset.test.labels[number]
            truth = f"True class: **{dataset.class_names[label]}**"
        else:
            shape = dataset.test.images.shape[1:]
            image = read_square(path, "RGB" if shape[2] == 3 else "L", shape[0]).reshape(shape)
        (script, names), features = networks(name), {"images": image[None]}
        for model in progress.tqdm(names, unit="networks"):
            config = cifar100_transfer.SAVED.get(model)
            kind = script.saved_with(config) if isinstance(config, cifar100_transfer.VggConfig) else "images"
            if kind not in features:
                features[kind] = script.predict(vgg_base(kind), image[None])
            (probabilities,) = script.predict(restored(script, model), features[kind])
            best = most_probable(probabilities, dataset.class_names, 5)
            rows.append([f"`{model}`", scored(script, model, "{accuracy:.2%}"), *best])
        header = ["network", "test accuracy", "most probable", "2nd", "3rd", "4th", "5th"]
        return enlarged(image[None], 8)[0].squeeze(), f"{truth}\n\n{table(header, rows)}"


def example_images(name):
    return list(enlarged(tracked(name).test.images[:28].squeeze(), 3))


def tab_classifiers():
    """Networks name what is on a small image; every row of the table is one of them."""
    description = gr.Markdown(describe("fashion"))
    labels = fashion_cifar_mlp_cnn.DATASET_NAMES | {"cifar100": "CIFAR-100"}
    name = gr.Radio([(label, key) for key, label in labels.items()], value="fashion", label="Dataset")
    with gr.Row():
        with gr.Column(scale=2):
            gr.Markdown("Click on one of the test images")
            gallery, number, choice = examples(example_images("fashion"), columns=7, height="auto")
        with gr.Column(scale=1):
            gr.Markdown("Or an image of yours; Fashion-MNIST has bright clothes on black")
            file = gr.File(show_label=False, height=130)
            shown = output_image("What the networks see", ())
    result = gr.Markdown()
    running = [
        choice(classify, [name, number, gr.State()], [shown, result], **QUEUED),
        gr.on([file.upload, file.clear], classify, [name, gr.State(), file], [shown, result], **QUEUED),
    ]

    def change_dataset(key):
        return describe(key), gr.Gallery(example_images(key), selected_index=None), None, None, None, ""

    name.change(change_dataset, name, [description, gallery, number, file, shown, result], cancels=running)
    choice(lambda: None, None, file)
    gr.on([file.upload, file.clear], lambda: gr.Gallery(selected_index=None), None, gallery)


# ------------------------------------------------------------------------------------------------------- PASCAL VOC


@functools.cache
def photos():
    """The paths of the tracked photos of the validation list, which no network was trained on."""
    folder = checked_samples("VOCdevkit/") / "VOCdevkit" / "VOC2012"
    names = (folder / "ImageSets" / "Segmentation" / "val.txt").read_text().split()
    return [str(folder / "JPEGImages" / f"{name}.jpg") for name in names]


@functools.cache
def segmenter(model):
    return models.for_prediction(restored(voc_segmentation, model))


def segment_photo(path, model):
    """Returns overlay and mask of a photo, no larger than `MAX_SIDE`, and how much of it belongs to objects."""
    with shown_errors(path):
        if path is None:
            return None, None, ""
        network = segmenter(model)
        mask, overlay = voc_segmentation.segment(network, read_image(path, "RGB"))
        share = np.mean(np.asarray(mask) > 0)
        for image in (mask, overlay):
            image.thumbnail((MAX_SIDE, MAX_SIDE))
        return overlay, mask, f"{100 * share:.0f} % of the photo belongs to objects."


def tab_voc_segmentation():
    """Networks mark objects of 20 classes on a photo: people, animals, vehicles and household objects."""
    scores = dict.fromkeys(voc_segmentation.FROM_SCRATCH, "foreground IoU {foreground_iou:.3f} on {images} test images")
    about(voc_segmentation, scores, "python voc_segmentation.py --predict dog.jpg --model unet_bilinear")
    with gr.Row():
        with gr.Column():
            model = gr.Radio(voc_segmentation.FROM_SCRATCH, value="unet_bilinear", label="Network")
            gr.Markdown("The photo: one of yours")
            file = gr.File(show_label=False, height=130)
            gr.Markdown("Or one of PASCAL VOC that no network was trained on; click on it")
            gallery, number, choice = examples(photos(), columns=5, height="auto")
        with gr.Column(elem_classes="enlarged"):
            share = gr.Markdown()
            outputs = [output_image("Objects in blue"), output_image("Mask"), share]
    gr.on([file.upload, file.clear], lambda: gr.Gallery(selected_index=None), None, gallery)
    choice(lambda number: photos()[number], number, file)
    gr.on([file.change, model.change], segment_photo, [file, model], outputs, **QUEUED)


# -------------------------------------------------------------------------------------------------- winged horses


@functools.cache
def pegasus_tools():
    """Returns what draws winged horses, and judge A."""
    repository = types.SimpleNamespace(output_dir=cli.REPOSITORY)
    (network, config, _), (judge, _, _) = (pegasus_gan.restore(repository, name) for name in ("diffusion", "judge_a"))
    network, judge = models.for_prediction(network), models.for_prediction(judge)
    return pegasus_gan.make_tools(network, judge, config), judge


def draw_pegasus(method, wings, count, seed):
    """Draws winged horses; returns them, tiled, the best one by judge A, and how long it took."""
    with shown_errors():
        started = time.time()
        tools, judge = pegasus_tools()
        first = seed * pegasus_gan.STRIDE  # as in the script
        images = pegasus_gan.draw(tools, method, pegasus_gan.wing_classes(count, wings), first).images
        scores = pegasus_gan.score(judge, images)
        seconds, flags = time.time() - started, f" --wings {wings}" if wings else ""
        text = f"Scores from {scores.min():.2f} to {scores.max():.2f} by judge A, drawn in {seconds:.0f} s"
        text += in_terminal(f"pegasus_gan.py --load --method {method}{flags} --samples {count} --seed {seed}")
        return tiled(images, math.ceil(math.sqrt(count)), 3), enlarged(images[[scores.argmax()]], 12)[0], text


def tab_pegasus_gan():
    """A diffusion model that has seen horses, birds and airplanes draws horses with wings."""
    score = "mean score of 64 unselected images by judge B (0 to 1, how much horse and wings they show): learned "
    score += "{learned_score:.2f}, collage {collage_score:.2f}, composition {composition_score:.2f}, blend "
    score += "{blend_score:.2f}; horses among {images:,} test images {horse_score:.2f}"
    judge = "accuracy {accuracy:.1%} on {images:,} test images; area under the ROC curve {copresence_auc:.2f} for "
    judge += "images put together from halves of a horse and of an image with wings, against others"
    command = "python pegasus_gan.py --load --method learned --wings bird"
    about(pegasus_gan, {"diffusion": score, "judge_a": judge}, command)
    with gr.Row():
        with gr.Column():
            methods = {
                "Learned: a class of its own, trained on collages": "learned",
                "Collage: wings pasted, noised, denoised": "collage",
                "Composition: wings in a band above the back": "composition",
                "Blend: half horse, half wings, everywhere": "blend",
            }
            inputs = [
                gr.Radio(list(methods.items()), value="learned", label="Method"),
                gr.Radio([*pegasus_gan.WINGED, ("both in turn", None)], value="bird", label="Wings of"),
                slider(4, 64, 16, step=4, label="Number of images"),
                slider(0, 999, 0, label="Seed"),
            ]
            button = gr.Button("Draw", variant="primary")
        with gr.Column():
            outputs = [output_image("All of them"), output_image("The best one, by judge A"), gr.Markdown()]
    button.click(draw_pegasus, inputs, outputs, **QUEUED)


# ----------------------------------------------------------------------------------------------- generating CIFAR-100

STEPS_BETWEEN = 8  # images from one seed to the other


@functools.cache
def cifar100_network():
    """Returns weights, config and sampling of the saved network, in a list, and its card."""
    return cifar100_generator.load_network(model_path(cifar100_generator, "diffusion").with_suffix(".npz"))


def generate_cifar100(name, first, second):
    """Generates images of a class from the noise of two seeds, and from noise in between; returns them, and a text."""
    with shown_errors():
        started = time.time()
        network, card = cifar100_network()
        (start, _), (end, _) = (cifar100_generator.draw_noise(1, seed) for seed in (first, second))
        angles = np.linspace(0, np.pi / 2, STEPS_BETWEEN, dtype="float32")[:, None, None, None]
        # Noise of two seeds is close to orthogonal: on this arc it keeps its deviation of 1.
        noise = np.cos(angles) * start + np.sin(angles) * end
        conditions = np.repeat(cifar100_generator.ONE_HOT[[card["class_names"].index(name)]], STEPS_BETWEEN, axis=0)
        images = tiled(cifar100_generator.sample(*network, noise, conditions), 4, 5)
        command = f"python cifar100_generator.py --load --class {name} --samples 1 --seed {first}"
        text = f"Row by row from seed {first} to seed {second}, drawn in {time.time() - started:.0f} s"
        return images, f"{text}\n\nThe first one in a terminal: `{command}`"


def tab_cifar100_generator():
    """A network with fewer than a million parameters turns noise into images of one of 100 classes."""
    score = "another network names the class of {class_agreement:.1%} of 10,000 generated images; FID (768-d) "
    score += "{fid_768:.2f} to {images:,} test images"
    about(cifar100_generator, {"diffusion": score}, "python cifar100_generator.py --load --class apple --samples 64")
    with gr.Row():
        with gr.Column():
            card = read_json(model_path(cifar100_generator, "diffusion").with_suffix(".json"), models.RESTORE)
            names = [(name.replace("_", " "), name) for name in card["class_names"]]
            inputs = [
                gr.Dropdown(names, value="apple", label="Class"),
                slider(0, 999, 0, label="Seed of the first image"),
                slider(0, 999, 1, label="Seed of the last image"),
            ]
            button = gr.Button("Generate", variant="primary")
        with gr.Column():
            outputs = [output_image("From the first seed to the last"), gr.Markdown()]
    button.click(generate_cifar100, inputs, outputs, **QUEUED)


# --------------------------------------------------------------------------------------------------------- the page

TABS = {
    "Read a clock": tab_tell_the_time,
    "Classify smallNORB": tab_task1_smallnorb_cnn,
    "Generate smallNORB": tab_task2_diffusion,
    "Add digits": tab_addnist_classifier,
    "Fashion-MNIST and CIFAR": tab_classifiers,
    "Segment a photo": tab_voc_segmentation,
    "Draw a Pegasus": tab_pegasus_gan,
    "Generate CIFAR-100": tab_cifar100_generator,
}


def build_page():
    """Returns the `gr.Blocks` with all tabs; uploads are deleted after an hour."""
    with gr.Blocks(title="Deep-learning coursework", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown("# Deep-learning coursework in Keras: the saved models\nNo image leaves this computer.")
        for title, tab in TABS.items():
            with gr.Tab(title):
                gr.Markdown(tab.__doc__)
                tab()
    return page.queue(max_size=MAX_WAITING)


def serve(port):
    """Serves the page on this computer and returns it; raises `UserError` where the port is taken."""
    options = {"max_file_size": MAX_UPLOAD, "allowed_paths": [str(SAMPLES)], "footer_links": [], "css": CSS}
    page = build_page()
    try:
        page.launch(
            server_name="127.0.0.1", server_port=port, share=False, quiet=True, prevent_thread_lock=True, **options
        )
    except OSError as error:
        raise UserError(f"port {port} cannot be used; choose another one, such as make app PORT={port + 1}") from error
    return page


def main(argv=None):
    flags = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--port", type=cli.number(int, 1, 65535), default=7860, help="default: 7860")
    page = serve(flags.parse_args(argv).port)
    print(f"the page is on {page.local_url}; Ctrl-C ends it", flush=True)
    page.block_thread()


if __name__ == "__main__":
    cli.run(main)
