"""The script of the winged horses: data, networks, the four methods, evaluation, and its command line."""

import dataclasses
import functools
import shutil
import types

import keras
import numpy as np
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY, read_verification, run_elsewhere, run_script
from keras import layers, ops

import pegasus_gan as script
from common import diffusion, models
from common.datasets import LabelledImages
from common.optimizers import UnitSpectralNorm
from experiments import pegasus_gan as plan

GENERATOR = np.random.default_rng(0)
TINY = script.Config(widths=(8, 8), blocks=1)
SETTINGS = diffusion.Composition(steps=4)  # the back is looked for before the second step


# ---------------------------------------------------------------------------------------------------------------- data


def test_splits_have_no_image_in_common():
    splits, dataset = script.load_splits(None, sample=True)
    assert [len(splits[part].images) for part in ("train", "validation", "test")] == [200, 50, 250]
    images = [image.tobytes() for split in splits.values() for image in split.images]
    assert len(set(images)) == 500
    assert tuple(dataset.class_names) == script.CLASSES


def test_some_classes_come_twice_as_often():
    labels = np.arange(20) % 10
    split = LabelledImages(np.zeros((20, 32, 32, 3), "uint8"), labels)
    collages = LabelledImages(np.ones((4, 32, 32, 3), "uint8"), np.array([10, 10, 10, 11]))
    found = script.examples(split, collages)
    counts, names = found["classes"].sum(axis=0), np.array(script.CLASSES)
    assert set(names[counts[:10] == 4]) == {"horse", "bird", "airplane", "deer"}
    assert set(counts[:10]) == {2, 4}
    assert counts[10:].tolist() == [3, 1]
    assert (found["images"][found["classes"][:, 10:].any(axis=1)] == 1).all()
    assert script.examples(split)["classes"].argmax(1).tolist() == labels.tolist()


def test_images_are_normalised_and_back():
    images = GENERATOR.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert np.array_equal(script.denormalize(ops.convert_to_numpy(script.normalize(images))), images)
    assert script.denormalize([-9.0, 9.0]).tolist() == [0, 255]


# ------------------------------------------------------------------------------------------------------------ networks


def test_networks_are_small_enough_and_have_the_right_outputs():
    network = script.build_network(script.CONFIGS["diffusion"])
    assert models.parameter_counts(network)["trainable"] <= 4_000_000
    config = script.CONFIGS["gan"]
    generator, discriminator = script.build_generator(config), script.build_discriminator(config)
    assert sum(models.parameter_counts(each)["trainable"] for each in (generator, discriminator)) <= 4_000_000
    classes = script.one_hot([7, 2])
    images = generator({"noise": np.zeros((2, config.noise), "float32"), "classes": classes})
    assert images.shape == (2, 32, 32, 3)
    assert discriminator({"images": np.asarray(images), "classes": classes}).shape == (2, 1)
    kernels = [layer for layer in discriminator.layers if hasattr(layer, "kernel")]
    assert len(kernels) > 10
    assert all(isinstance(layer.kernel_constraint, UnitSpectralNorm) for layer in kernels)


def test_the_projection_term_is_the_dot_product_with_the_class_embedding():
    discriminator = script.build_discriminator(script.GanConfig(discriminator_widths=(8, 8, 8)))
    embedding, unconditional = (layer for layer in discriminator.layers if isinstance(layer, layers.Dense))
    images = {"images": GENERATOR.uniform(-1, 1, (3, 32, 32, 3)).astype("float32")}
    features = ops.convert_to_numpy(keras.Model(discriminator.input["images"], unconditional.input)(images["images"]))
    without = ops.convert_to_numpy(discriminator({**images, "classes": np.zeros((3, 12), "float32")}))
    of_classes = ops.convert_to_numpy(discriminator({**images, "classes": script.one_hot([7, 2, 0])}))
    expected = (features * ops.convert_to_numpy(embedding.kernel)[[7, 2, 0]]).sum(axis=1)
    assert np.allclose((of_classes - without)[:, 0], expected, atol=1e-4 * np.abs(features).max())
    assert np.allclose(without, unconditional(features), atol=1e-4 * np.abs(features).max())


@pytest.mark.parametrize("name", ["judge_a", "judge_b"])
def test_a_judge_pools_its_evidence(name):
    config = dataclasses.replace(script.CONFIGS[name], widths=(8, 16))
    judge = script.build_judge(config)
    images = GENERATOR.integers(0, 256, (3, 32, 32, 3)).astype("float32")
    evidence = keras.Model(judge.input, judge.get_layer("evidence").output)(images)
    evidence = ops.convert_to_numpy(evidence)
    assert evidence.shape == (3, 8, 8, 10)
    mean = evidence.mean(axis=(1, 2)) if name == "judge_b" else np.log(np.exp(evidence).mean(axis=(1, 2)))
    assert np.allclose(judge(images), 1 / (1 + np.exp(-mean)), atol=1e-5)


# ------------------------------------------------------------------------------------------------- losses and training


def dense_gan():
    """The smallest generator and discriminator of images of 8 x 8."""
    keras.utils.set_random_seed(0)
    noise, classes = keras.Input((3,), name="noise"), keras.Input((2,), name="classes")
    made = layers.Reshape((8, 8, 3))(layers.Dense(192, activation="tanh")(layers.Concatenate()([noise, classes])))
    generator = keras.Model({"noise": noise, "classes": classes}, made)
    images, classes = keras.Input((8, 8, 3), name="images"), keras.Input((2,), name="classes")
    bounded = {"kernel_initializer": "orthogonal", "kernel_constraint": UnitSpectralNorm()}
    features = layers.Dense(4, **bounded)(layers.Flatten()(images))
    score = layers.Dense(1)(layers.Concatenate()([features, layers.Dense(4, use_bias=False)(classes)]))
    return script.GanTrainer(generator, keras.Model({"images": images, "classes": classes}, score), 0)


def data(count=8):
    images = GENERATOR.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
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
    assert np.linalg.norm(kernel, 2) == pytest.approx(1, abs=0.15)


def test_the_loss_of_the_generator_does_not_move_the_discriminator(monkeypatch):
    monkeypatch.setattr(script.GanTrainer, "compute_loss", lambda self, x, y, y_pred, *_, **__: -ops.mean(y_pred[2]))
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


# ------------------------------------------------------------------------------------------------------------ methods


def test_blends_of_weight_0_and_1_are_the_pure_classes():
    wings = script.wing_classes(3)
    assert np.array_equal(script.blend(wings, 0.0), script.one_hot([script.HORSE] * 3))
    assert np.array_equal(script.blend(wings, 1.0), script.one_hot(wings))
    half = script.blend(wings, 0.5)
    assert half[0, script.HORSE] == half[0, script.WINGED["bird"]] == 0.5


def test_learned_classes_are_those_of_the_collages():
    wings = np.array([script.WINGED["airplane"], script.WINGED["bird"]])
    named = [script.CONDITIONS[index] for index in script.learned(wings).argmax(axis=1)]
    assert named == ["horse with airplane wings", "horse with bird wings"]


def test_the_learned_classes_are_guided_away_from_plain_horses(tools):
    classes = script.learned(WINGS)
    images = script.draw(tools, "learned", WINGS, 0).images
    horse = script.one_hot([script.HORSE] * 2)
    sampling = dataclasses.replace(script.LEARNED_SAMPLING, steps=script.QUICK_STEPS, guidance=1.0)
    unguided = script.build_sampler(tools.plain.network, TINY, sampling)
    unguided.run_eagerly = True
    horses, expected = (script.sample(each, horse, 0, 2).astype(int) for each in (tools.learned, unguided))
    assert np.abs(horses - expected).max() <= 1  # from horses, nothing leads away
    assert not np.array_equal(images, script.sample(tools.sampler, classes, 0, 2))


def test_wings_come_from_one_class_or_from_both_in_turn():
    bird, airplane = script.WINGED["bird"], script.WINGED["airplane"]
    assert script.wing_classes(3).tolist() == [bird, airplane, bird]
    assert script.wing_classes(2, "airplane").tolist() == [airplane, airplane]


@pytest.fixture(scope="module")
def tools():
    """Tools of untrained networks whose weights are random, run eagerly: faster than compiling for a few steps."""
    keras.utils.set_random_seed(0)
    network = script.build_network(TINY)
    network.set_weights([GENERATOR.normal(size=weights.shape) * 0.2 for weights in network.get_weights()])
    judge = script.build_judge(script.JudgeConfig(widths=(8, 16)))
    tools = script.make_tools(network, judge, TINY, quick=True)
    for model in tools:
        model.run_eagerly = True
    return tools


WINGS = script.wing_classes(2)


def test_objects_are_found_where_the_judge_has_evidence():
    class Maps:
        def predict(self, images, **_):
            evidence = np.zeros((len(images), 8, 8, 10))
            evidence[:, 2:6, 4:8, script.HORSE] = 1
            return evidence

    images = GENERATOR.integers(100, 110, (2, 32, 32, 3), dtype=np.uint8)
    found = script.find_objects(Maps(), images, np.full(2, script.HORSE))
    assert found.shape == (2, 32, 32)
    assert np.nonzero(found)[2].mean() > 17  # on the right, although the images show nothing


def test_composition_finds_a_band_and_depends_on_wings_and_strength(tools):
    drawn = script.draw_composition(tools, WINGS, 0, SETTINGS)
    assert drawn.images.shape == (2, 32, 32, 3)
    assert drawn.images.dtype == np.uint8
    assert len(drawn.stages) == 4
    assert not drawn.stages[0].mask.any()  # all is horse at first
    assert drawn.stages[1].mask.any()
    assert all(stage.mask.min() >= 0 and stage.mask.max() <= 1 for stage in drawn.stages)
    again = script.draw_composition(tools, WINGS, 0, SETTINGS)
    assert np.array_equal(drawn.images, again.images)
    without, others = (
        script.draw_composition(tools, wings, 0, SETTINGS, strength=strength).images
        for wings, strength in ((WINGS, 0.0), (WINGS[::-1], 1.0))
    )
    assert not np.array_equal(drawn.images, without)
    assert not np.array_equal(drawn.images, others)


def test_a_mask_that_vanishes_gives_what_no_mask_gives(tools):
    """From the same noise: also that of the correctors."""
    images = [script.draw_composition(tools, WINGS, 0, SETTINGS, strength=s).images.astype(int) for s in (0.0, 1e-6)]
    assert np.abs(images[0] - images[1]).max() <= 1


def test_composition_of_strength_0_ignores_the_wings(tools):
    images = [script.draw_composition(tools, wings, 0, SETTINGS, strength=0.0).images for wings in (WINGS, WINGS[::-1])]
    assert np.array_equal(*images)


@pytest.fixture(scope="module")
def real():
    splits, _ = script.load_splits(None, sample=True)
    return splits["train"]


def test_a_collage_needs_no_hand_and_is_reproducible(tools, real):
    settings = dataclasses.replace(script.COLLAGE, steps=2, start=0.6)
    first, again = (script.draw_collage(tools, WINGS, 3, settings, real) for _ in range(2))
    assert np.array_equal(first.images, again.images)
    assert np.array_equal(first.collages, again.collages)
    other = script.draw_collage(tools, WINGS, 4, settings, real)
    assert not np.array_equal(first.collages, other.collages)
    assert first.pasted.any()
    assert not first.stages[0].mask.any()
    composed = script.draw_collage(tools, WINGS, 3, settings, real, composed=True)
    assert composed.stages[0].mask.any()
    assert np.array_equal(composed.collages, first.collages)
    assert not np.array_equal(composed.images, first.images)


def test_collages_to_learn_from_are_the_best_of_each_horse(tools, real, monkeypatch):
    judge = script.build_judge(script.JudgeConfig(widths=(8, 16)))
    seen = []

    def score(_, images):
        seen.append(images)
        return images.mean(axis=(1, 2, 3))

    monkeypatch.setattr(script, "score", score)
    monkeypatch.setattr(script, "WINGS_TRIED", 3)
    monkeypatch.setattr(script, "WINGS_KEPT", 1)
    made = script.make_collages(judge, real, 0)
    count = round(script.BEST_HORSES * (real.labels == script.HORSE).sum())
    assert made.labels.tolist() == [10] * count + [11] * count
    for number in range(2):
        tries = np.stack(seen[3 * number : 3 * number + 3])
        best = tries.mean(axis=(2, 3, 4)).argmax(axis=0)
        assert np.array_equal(made.images[made.labels == 10 + number], tries[best, np.arange(count)])
    again = script.make_collages(judge, real, 0)
    assert np.array_equal(again.images, made.images)


@pytest.fixture
def colored(monkeypatch):
    """A split of grey horses, green birds and blue airplanes; every object is found in the same place."""
    colors = {script.HORSE: (90, 90, 90), script.WINGED["bird"]: (0, 200, 0), script.WINGED["airplane"]: (0, 0, 200)}
    labels = np.repeat(list(colors), 12)
    images = np.broadcast_to(np.array([colors[label] for label in labels], "uint8")[:, None, None], (36, 32, 32, 3))

    def find_objects(maps, images, labels):
        objects = np.zeros(images.shape[:3], bool)
        objects[:, 14:24, 4:28] = True
        return objects

    monkeypatch.setattr(script, "find_objects", find_objects)
    return LabelledImages(images, labels)


def assert_wings_have_the_color_of_their_class(images, pasted, wings):
    for image, mask, wing in zip(images, pasted, wings, strict=True):
        _, green, blue = image[mask > 0.9].mean(axis=0)
        assert (green > blue) == (wing == script.WINGED["bird"])


def test_a_collage_has_the_wings_that_it_is_conditioned_on(tools, colored):
    wings = script.wing_classes(6)
    drawn = script.draw_collage(tools, wings, 3, dataclasses.replace(script.COLLAGE, start=0.0), colored)
    assert_wings_have_the_color_of_their_class(drawn.collages, drawn.pasted, wings)


def test_collages_to_learn_from_are_labelled_with_their_wings(colored, monkeypatch):
    monkeypatch.setattr(script, "score", lambda judge, images: np.zeros(len(images)))
    made = script.make_collages(script.build_judge(script.JudgeConfig(widths=(8, 16))), colored, 0)
    changed = np.abs(made.images.astype(int) - 90).max(axis=-1) > 80
    wings = [list(script.WINGED.values())[label - 10] for label in made.labels]
    assert_wings_have_the_color_of_their_class(made.images, changed, wings)


def test_sdedit_from_no_noise_returns_the_collages(tools, real):
    settings = dataclasses.replace(script.COLLAGE, start=0.0)
    for source in (real, None):
        drawn = script.draw_collage(tools, WINGS, 3, settings, source)
        assert np.array_equal(drawn.images, drawn.collages)
        assert drawn.stages == []


# ---------------------------------------------------------------------------------------------------------- evaluation


class Judge:
    """Sees as much horse as the red of an image and as much bird as its green."""

    def predict(self, images, **_):
        probabilities = np.zeros((len(images), 10))
        probabilities[:, script.HORSE] = images[..., 0].mean(axis=(1, 2)) / 255
        probabilities[:, script.WINGED["bird"]] = images[..., 1].mean(axis=(1, 2)) / 255
        return probabilities


def grey(*color):
    return np.broadcast_to(np.array(color, "uint8"), (4, 32, 32, 3))


def test_the_score_needs_horse_and_wings():
    assert script.score(Judge(), grey(255, 0, 0)).tolist() == [0] * 4
    assert script.score(Judge(), grey(0, 255, 0)).tolist() == [0] * 4
    assert script.score(Judge(), grey(255, 255, 0)).tolist() == [1] * 4
    assert script.score(Judge(), grey(255, 51, 0)) == pytest.approx(0.2**0.5)


def test_a_judge_that_knows_both_is_perfect():
    labels = np.repeat([script.HORSE, script.WINGED["bird"], script.CLASSES.index("dog")], 4)
    split = LabelledImages(np.concatenate([grey(255, 0, 0), grey(0, 255, 0), grey(0, 0, 0)]), labels)
    measured = script.measure_judge(Judge(), split)
    assert measured["copresence_auc"] == 1
    assert measured["accuracy"] == pytest.approx(8 / 12)


def test_the_best_of_all_candidates_is_found_measured_and_drawn_again(tools, monkeypatch):
    splits, _ = script.load_splits(None, sample=True)
    monkeypatch.setattr(script, "BATCH", 4)
    monkeypatch.setattr(script, "NUM_BATCHES", 2)
    monkeypatch.setattr(script, "METHODS", ("blend", "learned"))  # the fastest ones
    judges = {name: script.build_judge(script.JudgeConfig(widths=(8, 16))) for name in ("judge_a", "judge_b")}
    arguments = types.SimpleNamespace(quick=False, seed=1)
    found = script.evaluate_pegasus(tools, judges, splits, arguments, on_sample=False)
    for method, best in found.best.items():
        batches = [script.draw(tools, method, script.wing_classes(4), seed, splits["train"]) for seed in (1000, 1001)]
        scores = np.array([script.score(judges["judge_a"], batch.images) for batch in batches])
        assert best["score"] == pytest.approx(scores.max(), abs=1e-5)
        assert scores[best["seed"] - 1000, best["index"]] == pytest.approx(scores.max(), abs=1e-5)
        own = script.score(judges["judge_b"], batches[0].images)
        assert found.metrics[f"{method}_score"] == pytest.approx(own.mean(), abs=1e-5)
        above = own > np.percentile(found.scores["horse"], 95)
        assert found.metrics[f"{method}_above_horses"] == above.mean()
    again = script.evaluate_pegasus(tools, judges, splits, arguments, on_sample=False, best=found.best)
    assert again.metrics == pytest.approx(found.metrics, abs=1e-5)
    for method, image in found.best_images.items():
        assert np.abs(again.best_images[method].astype(int) - image).max() <= 1


# --------------------------------------------------------------------------------------------------------- experiments


def test_experiments_change_what_exists():
    fields = {field.name for field in dataclasses.fields(diffusion.Composition)}
    for name, (method, changed, options) in plan.EXPERIMENTS.items():
        assert method in script.METHODS
        known = {field.name for field in dataclasses.fields(diffusion.Sampling)} if method == "learned" else fields
        assert changed.keys() <= known
        assert options.keys() <= {"height", "composed", "away_from"}
        assert changed or options or name in plan.BASELINES
    runs = plan.runs(5, quick=False)
    for name in plan.BASELINES:
        assert [run["seed"] for run in runs if run["name"] == name] == [5, 6, 7, 8, 9]
    assert len({tuple(run.values()) for run in runs}) == len(runs)


# -------------------------------------------------------------------------------------------------------- command line


command = functools.partial(run_script, script.SCRIPT)


verification = functools.partial(read_verification, script.SCRIPT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output directory of a quick training run of all four networks."""
    folder = tmp_path_factory.mktemp("trained")
    done = command("tensorflow", "--train", "--quick", "--sample", "--batch-size", "16", "--output-dir", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_training_saves_models_cards_results_and_figures(trained):
    folder = trained / "saved_models" / script.SCRIPT
    names = {path.name for path in folder.glob("*.keras")}
    assert names == {"diffusion.keras", "gan_generator.keras", "judge_a.keras", "judge_b.keras"}
    card = models.read_card(folder / "diffusion.keras")
    splits, _ = script.load_splits(None, sample=True, quick=True)
    again = len(script.of_class(splits["train"], *script.OVERSAMPLED))
    assert {"class_agreement", *(f"{method}_score" for method in script.METHODS)} <= card["metrics"]["sample"].keys()
    assert "--quick" in card["shortened"]
    assert card["steps"] == card["epochs"] * -(-(script.QUICK_IMAGES + again + card["dataset"]["collages"]) // 16)
    curves = models.read_card(folder / "gan_generator.keras")["curves"]
    assert np.isfinite([curves["generator_loss"], curves["discriminator_loss"]]).all()
    figures = {path.name for path in (trained / "report" / "figures" / script.SCRIPT).glob("*.png")}
    assert {"pegasus.png", "way.png", "scores.png", "diffusion_network.png", "gan_networks.png"} <= figures
    assert (trained / "report" / "results" / f"{script.SCRIPT}.json").exists()


def test_recording_on_the_full_dataset_keeps_which_candidates_are_best(trained, tmp_path, monkeypatch):
    shutil.copytree(trained / "saved_models", tmp_path / "saved_models")
    best = {method: {"seed": 3, "index": 1, "score": 0.5} for method in script.METHODS}
    evaluation = script.PegasusEvaluation({}, None, {}, best, {}, {}, {})
    seen = []

    def measure(name, model, config, splits, arguments, on_sample, best=None):
        seen.append(best)
        return {"composition_score": 0.5}, evaluation

    loader = functools.partial(script.load_splits, None, sample=True, quick=True)
    monkeypatch.setattr(script, "measure", measure)
    monkeypatch.setattr(script, "load_splits", lambda *_, **__: loader())
    monkeypatch.setattr(script.results, "optional_module", lambda *_: None)
    monkeypatch.setattr(script.fid, "scale", lambda *_: {})
    for flags in (["--record"], [], ["--record"]):
        script.main(["--load", *flags, "--model", "diffusion", "--output-dir", str(tmp_path)])
    card = models.read_card(tmp_path / "saved_models" / script.SCRIPT / "diffusion.keras")
    assert card["metrics"]["test"] == {"composition_score": 0.5}
    assert card["best"] == best
    assert seen == [None, best, None]  # recording looks for the best candidates again


@pytest.fixture(scope="module")
def first_verification(trained):
    return verification(trained)


@pytest.mark.parametrize("model", ["gan", "diffusion"])
def test_load_reproduces_the_metrics_and_writes_no_results(trained, first_verification, model):
    path = trained / "report" / "results" / f"{script.SCRIPT}.json"
    path.unlink(missing_ok=True)
    done = command("tensorflow", "--load", "--quick", "--sample", "--model", model, "--output-dir", trained)
    assert done.returncode == 0, done.stderr
    rows = verification(trained)
    assert rows
    assert all(row["agrees"] for row in rows)
    recorded = [row["measured"] for row in first_verification if row["model"] == script.FILES[model]]
    assert [row["measured"] for row in rows] == recorded
    assert not path.exists()


def test_a_finished_run_is_restored_with_averaged_weights(trained):
    saved, card = models.load_model(trained / "saved_models" / script.SCRIPT / "gan_generator.keras", script.SCRIPT)
    splits, _ = script.load_splits(None, sample=True, quick=True)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in card["config"].items()}
    checkpoint = {"folder": trained / "runs" / script.SCRIPT / "gan_seed_0", "resume": True}
    count = card["dataset"]["collages"]  # a finished run does not see them, but counts its steps with them
    collages = LabelledImages(np.zeros((count, 32, 32, 3), "uint8"), np.full(count, 10))
    again, curves, _ = script.train_network("gan", script.GanConfig(**fields), splits, collages, 0, **checkpoint)
    assert curves == card["curves"]
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(saved.get_weights(), again.get_weights(), strict=True))


@pytest.mark.parametrize(
    ("flags", "stem", "key"),
    [
        (("--method", "collage", "--wings", "bird"), "diffusion_collage_bird_seed_0", "wings"),
        (("--class", "horse", "--model", "gan"), "gan_horse_any_seed_0", "class"),
    ],
)
def test_drawing_needs_no_dataset(trained, flags, stem, key):
    options = ["--samples", "3", "--data-dir", trained / "none", "--output-dir", trained]
    done = command("tensorflow", "--load", *flags, *options)
    assert done.returncode == 0, done.stderr
    folder = trained / "runs" / script.SCRIPT
    arrays = np.load(folder / f"{stem}.npz")
    assert arrays["images"].shape == (3, 32, 32, 3)
    assert arrays["images"].dtype == np.uint8
    assert arrays["score"].shape == (3,)
    assert arrays[key].tolist() == [script.CLASSES.index(flags[-1] if key == "wings" else "horse")] * 3
    assert (folder / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / f"{stem}_best.png").exists() == (key == "wings")


def test_experiments_are_resumed(trained):
    for _ in range(2):
        done = command("tensorflow", "--experiments", "--quick", "--output-dir", trained)
        assert done.returncode == 0, done.stderr
    rows = (trained / "report" / "results" / f"{script.SCRIPT}_experiments.csv").read_text().splitlines()
    assert len(rows) == 1 + len(plan.QUICK) * plan.SEEDS


def test_stock_keras_opens_the_saved_models_from_an_empty_directory(trained, tmp_path):
    code = (
        "import sys, keras, numpy as np\n"
        "diffusion, gan, judge = (keras.saving.load_model(p, safe_mode=True, compile=False) for p in sys.argv[1:])\n"
        "classes, images = np.eye(12)[[7, 2]], np.zeros((2, 32, 32, 3))\n"
        "print(diffusion({'noisy': images, 'time': np.ones((2, 1)), 'classes': classes}).shape)\n"
        "print(gan({'noise': np.zeros((2, 128)), 'classes': classes}).shape, judge(images).shape)"
    )
    folder = trained / "saved_models" / script.SCRIPT
    names = ("diffusion", "gan_generator", "judge_a")
    printed = run_elsewhere(code, tmp_path, *(folder / f"{name}.keras" for name in names), KERAS_BACKEND="jax")
    assert printed.splitlines() == ["(2, 32, 32, 3)", "(2, 32, 32, 3) (2, 10)"]


def test_gan_trains_compiled_under_jax(tmp_path):
    """The trainer of the diffusion model is tried in the tests of `task2_diffusion`; judges use plain `fit`."""
    code = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
import dataclasses, numpy as np, pegasus_gan as script
splits, _ = script.load_splits(None, sample=True, quick=True)
collages = script.LabelledImages(splits["train"].images[:2], np.array([10, 11]))
config = dataclasses.replace(script.smaller(script.CONFIGS["gan"]), epochs=1, batch_size=64)
_, curves, _ = script.train_network("gan", config, splits, collages, 0, folder={str(tmp_path)!r}, resume=False)
print(len(curves["generator_loss"]), np.isfinite(list(curves.values())).all())
"""
    done = run_elsewhere(code, tmp_path, KERAS_BACKEND="jax", XLA_FLAGS=QUICK_COMPILATION)
    assert done.splitlines()[-1] == "1 True"


@pytest.mark.parametrize(
    ("flags", "trouble"),
    [
        (["--load", "--class", "unicorn"], "invalid choice"),
        (["--load", "--method", "magic"], "invalid choice"),
        (["--load", "--samples", "0"], "--samples: '0' is not a whole number from 1 to 10000"),
        (["--train", "--samples", "4"], "use --load"),
        (["--load", "--method", "learned", "--class", "horse"], "not allowed with"),
        (["--load", "--model", "gan", "--method", "collage"], "use --method blend or learned"),
        (["--load", "--samples", "4", "--model", "judge_a"], "needs a trained generator"),
        (["--load", "--samples", "4", "--sample"], "are about metrics"),
        (["--load", "--samples", "4", "--record"], "are about metrics"),
        (["--load", "--class", "horse", "--wings", "bird"], "leave out --class or --wings"),
    ],
)
def test_drawing_that_makes_no_sense_is_one_line(flags, trouble, tmp_path):
    (tmp_path / "saved_models").mkdir()  # without it, --record is refused before
    done = command("tensorflow", *flags, "--output-dir", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert trouble in line
