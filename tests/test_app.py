"""The page in the browser: every handler on good and bad input, and every tab in a real browser."""

import importlib
import re
import shutil
import socket
import types

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

import cifar100_transfer
import fashion_cifar_mlp_cnn
import tell_the_time
import voc_segmentation
from common import clocks
from common.errors import UserError

gr = pytest.importorskip("gradio", reason="Gradio is not installed; `make app` installs it")
app = importlib.import_module("app")  # ends the process where there is no Gradio

SCREENSHOTS = REPOSITORY / "runs" / "app"
TIMEOUT = 300_000  # milliseconds in the browser, as on a busy computer


def one_line(error):
    """Whether a `gr.Error` is one line without a folder of ours, and prints no traceback."""
    message = error.value.message
    return "\n" not in message and "/tmp" not in message and error.value.print_exception is False


@pytest.fixture(scope="module")
def clock_file(tmp_path_factory):
    """A photo of a clock that shows 4:37, wider than high."""
    image = clocks.render_times([[4, 37]], 1)[150][0]
    path = tmp_path_factory.mktemp("clock") / "clock.png"
    Image.fromarray(np.pad(image, [(0, 0), (40, 40)], mode="edge")).save(path)
    return path


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "<b>notes.png"
    path.write_text("no image")
    return path


def test_a_clock_is_read_from_a_file_as_the_command_does(clock_file, capsys):
    image, text = app.read_clock_file(str(clock_file))
    assert image.shape == (300, 300)
    assert text == "## 04:37"
    assert tell_the_time.main(["--predict", str(clock_file)]) == 0
    assert capsys.readouterr().out.split()[-1] == "04:37"


def test_a_rendered_clock_is_read():
    flat, text = app.read_rendered_clock(10, 9, 0, 0, 3)
    assert text.startswith("## 10:09\n")
    assert "error of 0 min" in text
    bright, _ = app.read_rendered_clock(10, 9, 0, 300, 3)
    tilted, _ = app.read_rendered_clock(10, 9, 46, 0, 3)
    assert bright.mean() > flat.mean() + 2
    assert not np.array_equal(tilted, flat)


@pytest.mark.parametrize("call", [
    app.read_clock_file,
    lambda path: app.classify("cifar", None, path),
    lambda path: app.segment_photo(path, "unet_bilinear"),
])  # fmt: skip
def test_a_file_that_is_no_image_gives_one_line(call, text_file):
    with pytest.raises(gr.Error, match="not an image") as error:
        call(str(text_file))
    assert one_line(error)
    assert "&lt;b&gt;notes.png" in error.value.message  # the browser takes the text for HTML
    assert all(part in (None, "") for part in call(None))  # the file was removed


def test_a_toy_keeps_its_elevation_before_another_background():
    for number in (0, 24):
        *images, text = app.classify_toy(number, 120)
        assert images[0].shape == images[1].shape
        assert np.median(images[1][4:8, 4:-4]) == 120
        elevations = [float(line.split("|")[3].strip(" *°")) for line in text.splitlines()[2:]]
        assert np.ptp(elevations) < 12
    assert app.classify_toy(None, 120) == (None, None, "Click on a toy.")


def test_noise_becomes_the_toys_of_the_command(tmp_path):
    steps = list(app.generate_toys("airplane", 35, 2, 4))
    images, texts = zip(*steps[1:], strict=True)
    text, command = texts[-1].split("\n\n")
    assert text == "Step 30 of 30"
    written = run_command(command, tmp_path)
    np.testing.assert_allclose(images[-1][2:194:4, 2:194:4].astype(int), written["images"][0], atol=2)
    assert len(images) == 31
    spread = [np.abs(np.diff(image.astype(int), axis=1)[:, 8:180]).mean() for image in images]
    assert spread[-1] < spread[0] / 3  # noise has the largest differences between neighbours


def test_digits_are_added_and_read():
    image, text = app.add_digits(3, 7, 5, 0)
    assert image.shape == (144, 4 * 144, 3)
    shared = text.splitlines()[3]
    assert [cell.split()[0] for cell in shared.split("|")[2:6]] == ["3:", "7:", "5:", "15:"]
    for wrong in ((0, 0, 0), (9, 9, 9)):
        with pytest.raises(gr.Error, match="sum from 1 to 20") as error:
            app.add_digits(*wrong, 0)
        assert one_line(error)


@pytest.mark.parametrize(
    ("name", "number_of_networks", "side"), [("fashion", 4, 28), ("cifar", 6, 32), ("cifar100", 8, 32)]
)
def test_all_networks_of_a_dataset_classify_side_by_side(name, number_of_networks, side, tmp_path):
    image, text = app.classify(name, 5, None)
    assert image.shape[:2] == (8 * side, 8 * side)
    lines = text.splitlines()[4:]
    assert len(lines) == number_of_networks
    dataset = app.tracked(name)
    first, label = dataset.test.images[5], dataset.class_names[dataset.test.labels[5]]
    assert f"**{label}**" in text
    # A file with the same pixels gives the same table, below no true class.
    Image.fromarray(first.squeeze()).save(tmp_path / "image.png")
    again, other = app.classify(name, None, str(tmp_path / "image.png"))
    np.testing.assert_array_equal(again, image)
    assert other.splitlines()[4:] == lines
    script = cifar100_transfer if name == "cifar100" else fashion_cifar_mlp_cnn
    model, most_probable = (cell.strip(" `") for cell in lines[-1].split("|")[1:4:2])
    best = script.predict(app.restored(script, model), first[None])[0].argmax()
    assert most_probable.startswith(f"{dataset.class_names[best]}: ")
    assert app.classify(name, None, None) == (None, "")


def test_networks_on_vgg16_classify_as_in_their_script(tmp_path):
    features = cifar100_transfer.get_features(types.SimpleNamespace(load=True, output_dir=REPOSITORY))
    features.folder = tmp_path
    dataset = app.tracked("cifar100")
    _, text = app.classify("cifar100", 0, None)
    for line in text.splitlines()[4:]:
        model, most_probable = (cell.strip(" `") for cell in line.split("|")[1:4:2])
        config = cifar100_transfer.SAVED[model]
        if isinstance(config, cifar100_transfer.VggConfig):
            inputs = features(cifar100_transfer.saved_with(config), dataset.test.images[:1])
            probabilities = cifar100_transfer.predict(app.restored(cifar100_transfer, model), inputs)[0]
            name, percent = most_probable.rstrip(" %").split(": ")
            assert name == dataset.class_names[probabilities.argmax()]
            assert float(percent) == pytest.approx(100 * probabilities.max(), abs=0.3)


def run_command(text, folder):
    """Runs the command between backquotes in a text of the page; returns the arrays that it writes."""
    script, *flags = text.split("`")[1].removeprefix("python ").split()
    module = importlib.import_module(script.removesuffix(".py"))
    (folder / "saved_models").symlink_to(REPOSITORY / "saved_models")
    module.main([*flags, "--output-dir", str(folder)])
    (path,) = folder.glob("runs/*/*.npz")
    with np.load(path) as file:
        return dict(file)


def test_winged_horses_are_drawn_as_the_command_does(tmp_path):
    images, best, text = app.draw_pegasus("composition", "bird", 4, 3)
    assert images.shape[:2] == (2 * (3 * 32 + 4), 2 * (3 * 32 + 4))
    assert best.shape == (12 * 32, 12 * 32, 3)
    assert text.startswith("Scores from 0.")
    np.testing.assert_array_equal(images[2:98:3, 2:98:3], run_command(text, tmp_path)["images"][0])


def test_images_of_two_seeds_and_between_are_generated(tmp_path):
    script, (image, text) = app.cifar100_generator, app.generate_cifar100("tiger", 3, 4)
    assert image.shape == (2 * (5 * 32 + 4), 4 * (5 * 32 + 4), 3)
    network, card = app.cifar100_network()
    noise = np.concatenate([script.draw_noise(1, seed)[0] for seed in (3, 4)])
    ends = script.sample(*network, noise, script.ONE_HOT[[card["class_names"].index("tiger")] * 2])
    shown = image[2:162:5, 2:162:5], image[166:326:5, 494:654:5]
    np.testing.assert_allclose(np.stack(shown).astype(int), ends, atol=1)
    assert text.startswith("Row by row from seed 3 to seed 4")
    np.testing.assert_allclose(shown[0].astype(int), run_command(text, tmp_path)["images"][0], atol=1)


def test_a_photo_is_segmented_as_the_command_does(tmp_path):
    shutil.copy(app.photos()[0], tmp_path / "photo.jpg")
    overlay, mask, text = app.segment_photo(str(tmp_path / "photo.jpg"), "unet_transposed")
    network = app.models.for_prediction(app.restored(voc_segmentation, "unet_transposed"))
    written, _ = voc_segmentation.predict_file(network, tmp_path / "photo.jpg")
    with Image.open(written) as expected:
        np.testing.assert_array_equal(np.asarray(mask), np.asarray(expected))
    assert overlay.size == mask.size
    assert text.startswith(f"{100 * np.mean(np.asarray(mask) > 0):.0f} % ")
    Image.new("RGB", (4000, 500)).save(tmp_path / "wide.png")
    assert app.segment_photo(str(tmp_path / "wide.png"), "unet_bilinear")[0].size == (1600, 200)


def test_a_damaged_model_gives_one_line(monkeypatch, tmp_path):
    folder = tmp_path / "tell_the_time"
    folder.mkdir()
    (folder / "best_150.keras").write_bytes(b"damaged")
    monkeypatch.setattr(app.models, "models_folder", lambda output_dir, script: tmp_path / script)
    app.restored.cache_clear()
    with pytest.raises(gr.Error, match="git checkout") as error:
        app.read_rendered_clock(1, 2, 0, 0, 0)
    assert "\n" not in error.value.message


def test_every_tab_names_its_models_cards_scores_and_command():
    page = app.build_page()
    texts = [block.value for block in page.blocks.values() if isinstance(block, gr.Markdown) and block.value]
    described = [text for text in texts if "in a terminal" in text]
    assert len(described) == len(app.TABS)
    for text in described:
        assert ".json`" in text
        assert "test images" in text
        assert "`python " in text
        assert any(character.isdigit() for character in text)
        for card in re.findall(r"card `(.*?)`", text):
            assert (REPOSITORY / card).exists()
    assert page._queue.max_size == app.MAX_WAITING
    uses_networks = [each for each in page.fns.values() if each.concurrency_id == "networks"]
    assert len(uses_networks) >= len(app.TABS)
    assert all(each.concurrency_limit == 1 and each.queue for each in uses_networks)


def test_a_port_that_is_no_number_gives_one_line():
    with pytest.raises(UserError, match="'http' is not a whole number from 1 to 65535"):
        app.main(["--port", "http"])


def test_a_port_that_is_taken_gives_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="choose another one"):
            app.serve(taken.getsockname()[1])


# ------------------------------------------------------------------------------------------------------ in the browser


@pytest.fixture(scope="module")
def browser_page():
    """A page of a headless Chromium that shows the app."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = app.serve(port)
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(TIMEOUT)
        page.goto(served.local_url)
        yield page
        browser.close()
    served.close()


def test_every_tab_works_in_a_browser(browser_page, clock_file, text_file):
    page, expect = browser_page, pytest.importorskip("playwright.sync_api").expect
    expect.set_options(timeout=TIMEOUT)
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    failures, visited = [], []
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("request", lambda request: visited.append(request.url))

    def open_tab(title):
        page.get_by_role("tab", name=title).click()
        return page.get_by_role("tabpanel").filter(visible=True)

    def shot(name):
        page.wait_for_timeout(700)  # animations
        page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=True)

    tab = open_tab("Read a clock")
    tab.locator("input[type=file]").set_input_files(clock_file)
    expect(tab.get_by_role("heading", name="04:37")).to_be_visible()
    expect(tab.locator(".file-preview")).to_have_count(1)
    shot("clock_file")
    tab.get_by_role("button", name="Render and read").click()
    expect(tab.get_by_text("The clock shows 10:09")).to_be_visible()
    expect(tab.locator(".file-preview")).to_have_count(0)  # the uploaded file is gone
    shot("clock_rendered")
    tab.get_by_role("slider", name="Minute").press("ArrowRight")
    expect(tab.get_by_text("The clock shows 10:10")).to_be_visible()
    tab.locator("input[type=file]").set_input_files(clock_file)
    expect(tab.get_by_role("heading", name="04:37")).to_be_visible()
    tab.get_by_role("spinbutton", name="Minute").click()  # which changes nothing
    tab.get_by_role("spinbutton", name="Hour").click()
    page.wait_for_timeout(700)
    expect(tab.locator(".file-preview")).to_have_count(1)

    tab = open_tab("Classify smallNORB")
    tab.locator(".grid-container button").nth(7).click()
    expect(tab.get_by_role("cell", name="background 120")).to_be_visible()
    shot("toy_classified")
    tab.get_by_role("slider").press("ArrowLeft")
    expect(tab.get_by_role("cell", name="background 119")).to_be_visible()

    tab = open_tab("Generate smallNORB")
    tab.get_by_role("button", name="Generate").click()
    expect(tab.get_by_text(re.compile(r"Step (1|2)\d of 30"))).to_be_visible()
    page.screenshot(path=SCREENSHOTS / "toys_half_way.png")
    expect(tab.get_by_text("Step 30 of 30")).to_be_visible()
    shot("toys_generated")

    tab = open_tab("Add digits")
    tab.get_by_role("button", name="Add").click()
    expect(tab.get_by_role("cell", name="ordinary")).to_be_visible()
    shot("digits_added")

    tab = open_tab("Fashion-MNIST and CIFAR")
    tab.locator(".grid-container button").nth(3).click()
    expect(tab.get_by_role("cell", name="fashion_cnn_best")).to_be_visible()
    expect(tab.locator(".grid-container .selected")).to_have_count(1)
    shot("fashion")
    page.set_viewport_size({"width": 600, "height": 900})
    shot("fashion_narrow")
    page.set_viewport_size({"width": 1280, "height": 900})
    tab.get_by_label("CIFAR-10", exact=True).check()
    expect(tab.get_by_role("cell", name="fashion_cnn_best")).to_be_hidden()
    tab.locator("input[type=file]").set_input_files(app.photos()[0])
    expect(tab.get_by_role("cell", name="cifar_cnn_3")).to_be_visible()
    expect(tab.locator(".grid-container .selected")).to_have_count(0)
    shot("cifar")
    tab.locator(".grid-container button").nth(3).click()
    expect(tab.get_by_text("True class: ship")).to_be_visible()
    expect(tab.locator(".file-preview")).to_have_count(0)
    tab.get_by_label("CIFAR-100", exact=True).check()
    expect(tab.get_by_role("cell", name="cifar_cnn_3")).to_be_hidden()
    tab.locator(".grid-container button").nth(3).click()
    expect(tab.get_by_role("cell", name="own_3_seed_1")).to_be_visible()
    shot("cifar100")
    tab.get_by_label("Fashion-MNIST", exact=True).check()
    expect(tab.get_by_role("cell", name="own_3_seed_1")).to_be_hidden()

    tab = open_tab("Segment a photo")
    large = {"name": "large.png", "mimeType": "image/png", "buffer": bytes(21_000_000)}
    tab.locator("input[type=file]").set_input_files(large)
    expect(page.get_by_text("maximum allowed size")).to_be_visible()
    tab.locator("input[type=file]").set_input_files(text_file)
    expect(page.get_by_text("is not an image that can be read")).to_be_visible()
    shot("bad_file")
    tab.locator(".grid-container button").nth(2).click()
    expect(tab.get_by_text("belongs to objects")).to_be_visible()
    assert tab.locator(".enlarged img").first.bounding_box()["width"] > 400  # small photos are enlarged
    shot("segmented")
    before = tab.locator(".enlarged img").first.get_attribute("src")
    tab.get_by_label("unet_transposed").check()
    expect(tab.locator(".enlarged img").first).not_to_have_attribute("src", before)

    tab = open_tab("Draw a Pegasus")
    tab.get_by_role("button", name="Draw").click()
    expect(tab.get_by_text("Scores from 0.")).to_be_visible()
    shot("pegasus")

    tab = open_tab("Generate CIFAR-100")
    tab.get_by_label("Class").fill("lawn mower")
    tab.get_by_label("Class").press("Enter")
    tab.get_by_role("button", name="Generate").click()
    expect(tab.get_by_text("--class lawn_mower")).to_be_visible()
    shot("cifar100_generated")

    assert not failures
    assert not [url for url in visited if not url.startswith(("http://127.0.0.1", "blob:", "data:"))]
