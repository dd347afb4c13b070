"""Every archive holds what its brief asks for, and what it holds runs where nothing else is."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
import zipfile

import nbformat
import numpy as np
import pytest
from conftest import QUICK_COMPILATION, REPOSITORY, run_elsewhere

from common.errors import UserError

sys.path.insert(0, str(REPOSITORY / "report"))
submission = importlib.import_module("make_submission")

PACKED = ("ann_homework2", "cosc420_assignment1", "idl_assignment1", "pegasus")  # the other one needs LaTeX
NAME = "abcd12"
SCRIPT = '''"""The title of {script}.

    python {script}.py --train    trains
"""

from common import cli

SCRIPT = "{script}"

# ---------------------------------------------------------------------------------------------------------------- data


def main(argv=None):
    return 0


if __name__ == "__main__":
    cli.run(main)
'''
SUPPORT = {"README.md", "LICENSE", "requirements.txt", "data/README.md", "common/__init__.py", "common/cli.py"}
SUPPORT |= {"common/errors.py"}  # which common/cli.py imports


def supporting(script):
    """What travels with a script of the stand-in."""
    folders = {f"{folder}/{script}.py" for folder in ("plots", "experiments")}
    weights = {f"saved_models/{script}/net.{suffix}" for suffix in ("keras", "json")}
    return folders | weights | {f"report/results/{script}.json", f"report/results/{script}_experiments.csv"}


CONTENTS = {
    "ann_homework2": {
        *("report.pdf", "cifar100_transfer.ipynb", "voc_segmentation.ipynb"),
        *SUPPORT | supporting("cifar100_transfer") | supporting("voc_segmentation"),
        *("data/samples/sha256.json", "data/samples/cifar100.npz", "data/samples/VOCdevkit/VOC2012/list.txt"),
    },
    "cosc420_assignment1": {
        *("report.pdf", "task1_smallnorb_cnn.py", "task2_diffusion.py"),
        *SUPPORT | supporting("task1_smallnorb_cnn") | supporting("task2_diffusion"),
    },
    "idl_assignment1": {
        *("report.pdf", "fashion_cifar_mlp_cnn.ipynb", "tell_the_time.ipynb"),
        *("fashion_cifar_mlp_cnn.py", "tell_the_time.py"),
        *SUPPORT | supporting("fashion_cifar_mlp_cnn") | supporting("tell_the_time"),
        *("data/samples/sha256.json", "data/samples/fashion_mnist.npz", "data/samples/cifar10.npz"),
        "data/samples/numerals.png",
    },
    "minimal_mastery": {"abcd12-paper.pdf", "abcd12-classifier.py", "abcd12-generative-model.py"},
    "pegasus": {
        *("report.pdf", "pegasus.py", "data/samples/sha256.json", "data/samples/cifar10.npz"),
        *SUPPORT | supporting("pegasus_gan"),
    },
}
FOLDERS = {"ann_homework2": "abcd12/", "cosc420_assignment1": "abcd12/", "idl_assignment1": "abcd12/"}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A repository in which all five briefs are finished, as far as their files are concerned. Returns its path."""
    repository = tmp_path / "repository"
    texts = {
        "LICENSE": "",
        "requirements.txt": "",
        "data/README.md": "",
        "data/cache/train_images.npy": "training data",
    }
    texts |= {"common/__init__.py": "", "common/errors.py": "", "common/cli.py": "from common.errors import UserError"}
    texts |= {"common/other.py": "import common.cli", "saved_models/README.md": "", "README.md": "of the repository"}
    samples = ("sha256.json", "cifar10.npz", "cifar100.npz", "fashion_mnist.npz", "mnist.npz", "smallnorb.npz")
    for sample in (*samples, "numerals.png", "VOCdevkit/VOC2012/list.txt"):
        texts[f"data/samples/{sample}"] = sample
    for brief, bundle in submission.BUNDLES.items():
        texts |= {f"report/{brief}.pdf": f"PDF of {brief}", f"report/{brief}.md": brief}
        for script in bundle.scripts:
            texts |= dict.fromkeys(supporting(script), "") | {f"{script}.py": SCRIPT.format(script=script)}
            texts |= {f"plots/{script}.py": "def draw():\n    from common.cli import parser\n"}
            texts |= {f"saved_models/{script}/.123.net.keras": "left over", f"report/figures/{script}/x.png": ""}
    for path, text in texts.items():
        (repository / path).parent.mkdir(parents=True, exist_ok=True)
        (repository / path).write_text(text)
    monkeypatch.setattr(submission, "REPOSITORY", repository)
    monkeypatch.setattr(submission, "execute", lambda path: None)
    monkeypatch.setattr(submission.build_reports, "build", lambda brief: (brief, f"PDF of {brief}".encode(), {}))
    return repository


def names(path):
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        return set(archive.namelist())


def read(path, name):
    with zipfile.ZipFile(path) as archive:
        return archive.read(name).decode()


def test_every_brief_is_known():
    briefs = REPOSITORY.parent / "shared" / "briefs"
    assert CONTENTS.keys() == submission.BUNDLES.keys()
    assert {path.stem for path in briefs.glob("*.txt")} <= CONTENTS.keys()  # where the briefs lie beside the checkout


@pytest.mark.parametrize("brief", CONTENTS)
def test_archives_hold_what_the_brief_asks_for_and_nothing_else(brief, stand_in, tmp_path):
    path = submission.build(brief, NAME, tmp_path)
    assert path == tmp_path / brief / "abcd12.zip"
    folder = FOLDERS.get(brief, "")
    assert names(path) == {f"{folder}{name}" for name in CONTENTS[brief]}
    report = f"{folder}{submission.BUNDLES[brief].report}".format(name=NAME)
    assert read(path, report) == f"PDF of {brief}"


def test_two_archives_are_alike(stand_in, tmp_path):
    paths = [submission.build("idl_assignment1", NAME, tmp_path / each) for each in ("a", "b")]
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(
    ("brief", "file", "title", "name"),
    [
        ("minimal_mastery", "abcd12-classifier.py", "addnist_classifier", "abcd12-classifier"),
        ("pegasus", "pegasus.py", "pegasus_gan", "pegasus_gan"),  # under which its saved models are found
    ],
)
def test_scripts_call_themselves_by_the_name_of_their_file(brief, file, title, name, stand_in, tmp_path):
    text = read(submission.build(brief, NAME, tmp_path), file)
    assert f"python {file} --train" in text
    assert f"{title}.py" not in text
    assert f'SCRIPT = "{name}"' in text


def test_the_readme_names_what_is_there(stand_in, tmp_path):
    text = read(submission.build("idl_assignment1", NAME, tmp_path), "abcd12/README.md")
    assert (
        "| `tell_the_time.ipynb` | The title of tell_the_time |\n| `tell_the_time.py` | the same as a script |" in text
    )
    assert "| `data/samples/` |" in text
    assert "pip install -r requirements.txt jupyterlab" in text
    assert "python tell_the_time.py --load           restores" in text
    text = read(submission.build("cosc420_assignment1", NAME, tmp_path), "abcd12/README.md")
    assert "samples" not in text
    assert "jupyterlab" not in text
    assert "\n\n\n" not in text


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (),
            "needs both; choose BRIEF from ann_homework2, cosc420_assignment1, idl_assignment1, minimal_mastery, peg",
        ),
        (("pegasus", ""), "NAME=... needs both"),
        (
            ("unicorn", NAME),
            "'unicorn'; choose BRIEF from ann_homework2, cosc420_assignment1, idl_assignment1, minimal",
        ),
        (("pegasus", "../x"), "'../x' is no NAME"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        submission.main(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("brief", "gone", "message"),
    [
        ("pegasus", ["pegasus_gan.py"], "pegasus_gan.py does not exist yet"),
        ("pegasus", ["pegasus_gan.py", "report/pegasus.pdf"], "pegasus_gan.py and report/pegasus.pdf do not exist yet"),
        ("minimal_mastery", ["cifar100_generator.py"], "cifar100_generator.py does not exist yet"),
        ("ann_homework2", ["report/ann_homework2.md"], "report/ann_homework2.md is older than its source, results"),
        (
            "idl_assignment1",
            [f"saved_models/tell_the_time/net.{suffix}" for suffix in ("keras", "json")],
            "saved_models/tell_the_time/ is empty; run python tell_the_time.py --train",
        ),
    ],
)
def test_what_is_missing_is_one_line(brief, gone, message, stand_in, tmp_path):
    for path in gone:
        (stand_in / path).unlink()
    with pytest.raises(UserError, match=message):
        submission.build(brief, NAME, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


@pytest.mark.parametrize("suffix", ["md", "pdf"])
def test_a_report_that_is_older_than_its_results_is_not_packed(suffix, stand_in, tmp_path):
    path = stand_in / "report" / f"pegasus.{suffix}"
    path.write_text("Accuracy 97 %")
    with pytest.raises(UserError, match=f"report/pegasus.{suffix} is older than .*; run make reports"):
        submission.build("pegasus", NAME, tmp_path / "dist")
    assert not (tmp_path / "dist").exists()


def test_an_error_is_one_line_of_a_process_that_ends_with_2():
    command = [sys.executable, REPOSITORY / "report" / "make_submission.py", "unicorn", NAME]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no brief 'unicorn'")
    assert done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------------------------- finished briefs


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Packs briefs, with notebooks that are not executed; returns a dict from brief to a folder."""
    dist, folders = tmp_path_factory.mktemp("dist"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(submission, "execute", lambda path: None)
        for brief in PACKED:
            with zipfile.ZipFile(submission.build(brief, NAME, dist)) as archive:
                archive.extractall(folder := tmp_path_factory.mktemp("nb"))
            folders[brief] = folder / FOLDERS.get(brief, "")
    return folders


IMPORT_ALL = """
import importlib, pathlib, sys
from common import startup
from common.models import load_model
for script in sys.argv[1:]:
    modules = [importlib.import_module(f"{package}{script}") for package in ("", "plots.", "experiments.")]
    print(*(pathlib.Path(module.__file__).relative_to(pathlib.Path.cwd()) for module in modules))
network, card = load_model(pathlib.Path("saved_models/task2_diffusion/judge.keras"), "task2_diffusion")
print(network.count_params() == card["parameters"]["total"])
"""


def test_the_code_for_toy_images_works_without_the_repository_and_without_training_data(unpacked):
    folder = unpacked["cosc420_assignment1"]
    scripts = ("task1_smallnorb_cnn", "task2_diffusion")
    *imported, restored = run_elsewhere(IMPORT_ALL, folder, *scripts).splitlines()
    assert imported == [f"{script}.py plots/{script}.py experiments/{script}.py" for script in scripts]
    assert restored == "True"  # one of the saved models; all are those of the repository, says the next test
    assert {path.name for path in (folder / "data").rglob("*")} == {"README.md"}
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 40e6


def test_packed_files_are_those_of_the_repository(unpacked):
    for brief, folder in unpacked.items():
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        renamed = ("README.md", "report.pdf", "pegasus.py")
        generated = {path for path in files if path.suffix == ".ipynb" or path.name in renamed}
        for path in set(files) - generated:
            assert (folder / path).read_bytes() == (REPOSITORY / path).read_bytes(), path
        assert (folder / "report.pdf").read_bytes() == (REPOSITORY / "report" / f"{brief}.pdf").read_bytes()


@pytest.mark.parametrize(
    ("brief", "script"),
    [(brief, script) for brief in ("ann_homework2", "idl_assignment1") for script in submission.BUNDLES[brief].scripts],
)
def test_notebooks_are_the_scripts(brief, script, unpacked):
    notebook = nbformat.read(unpacked[brief] / f"{script}.ipynb", as_version=4)
    nbformat.validate(notebook)
    text = (REPOSITORY / f"{script}.py").read_text()
    headings = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    assert headings[0].startswith(f"# {text[3 : text.index(chr(10))].rstrip('.')}\n")
    sections = submission.SECTION.split(text)[1::2]
    shown = [heading.lower() for heading in headings[1 : len(sections) + 1]]
    assert shown == [f"## {each}".lower() for each in sections]
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"][: len(sections) + 1]
    code = submission.SECTION.sub("", text.split('"""\n', 1)[1]).removesuffix(
        'if __name__ == "__main__":\n    cli.run(main)\n'
    )
    assert "".join("".join(cells).split()) == "".join(code.split())


def test_the_pegasus_script_draws_among_the_files_of_its_archive(unpacked):
    command = [sys.executable, "pegasus.py", "--load", "--method", "blend", "--wings", "bird", "--samples", "4"]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        command, cwd=unpacked["pegasus"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = (unpacked["pegasus"] / "runs").rglob("*.npz")
    with np.load(path) as file:
        assert file["images"].shape == (4, 32, 32, 3)
        assert file["images"].std() > 20


def test_a_notebook_runs_among_the_files_of_its_archive(unpacked):
    path = unpacked["idl_assignment1"] / "tell_the_time.ipynb"
    flags = '"--load", "--sample", '
    text = path.read_text().replace(json.dumps(flags)[1:-1], json.dumps(f'{flags}"--model", "classes_24", ')[1:-1])
    path.write_text(text)
    submission.execute(path)
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert "agrees" in printed
    assert "DIFFERS" not in printed
    assert "WARNING" not in printed
    assert str(path.parent) not in path.read_text()  # nothing about whose machine it was
    tables = [output.data["text/plain"] for output in outputs if output.output_type == "execute_result"]
    assert any("best_150" in table and "mean minutes" in table for table in tables)
    figures = [output.data["image/png"] for output in outputs if output.output_type == "display_data"]
    assert len(figures) == len(list((path.parent / "runs/sample/report/figures/tell_the_time").glob("*.png"))) > 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys\nsys.exit(1)", "x.ipynb fails: SystemExit: 1; fix its script"),
        ("import os\nos._exit(1)", "x.ipynb fails: Kernel died; close other programs and try again"),
    ],
)
def test_a_notebook_that_fails_is_one_line(code, message, tmp_path):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)]), tmp_path / "x.ipynb")
    with pytest.raises(UserError) as error:
        submission.execute(tmp_path / "x.ipynb")
    assert str(error.value) == message


# --------------------------------------------------------------------------------------------------------- single files


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """A folder of datasets with the samples of MNIST and CIFAR-100 in their places."""
    data = tmp_path_factory.mktemp("data")
    for dataset in ("mnist", "cifar100"):
        folder, checksums = data / "cache" / dataset, {}
        folder.mkdir(parents=True)
        with np.load(REPOSITORY / "data" / "samples" / f"{dataset}.npz") as sample:
            for name in ("train_images", "train_labels", "test_images", "test_labels"):
                np.save(folder / f"{name}.npy", sample[name])
                checksums[name] = hashlib.sha256((folder / f"{name}.npy").read_bytes()).hexdigest()
            about = {"sha256": checksums, "class_names": [str(name) for name in sample.get("class_names", ())]}
        (folder / "manifest.json").write_text(json.dumps(about))
    return data


@pytest.mark.parametrize(
    ("script", "flags"), [("addnist_classifier", ["--model", "shared"]), ("cifar100_generator", ["--batch-size", "8"])]
)
def test_the_single_files_run_alone_in_an_empty_folder(script, flags, datasets, tmp_path):
    bundle = submission.BUNDLES["minimal_mastery"]
    name = bundle.scripts[script].format(name=NAME)
    (tmp_path / f"{name}.py").write_text(submission.source(script, bundle, NAME))
    command = [sys.executable, f"{name}.py", "--train", "--quick", "--data-dir", datasets, *flags]
    environment = {**os.environ, "PYTHONPATH": "", "XLA_FLAGS": QUICK_COMPILATION}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "figures are skipped" in done.stdout
    (card,) = tmp_path.glob(f"runs/quick/saved_models/{name}/*.json")
    assert json.loads(card.read_text())["script"] == f"{name}.py"
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.py", "runs"}
