"""Packs what a brief asks to hand in: `make submission BRIEF=pegasus NAME=abcd12` writes dist/pegasus/abcd12.zip.

`BUNDLES` says what each brief asks for. The modules, saved models, recorded results and sample images that the scripts
of a brief need travel with them, unless the brief wants single files. Notebooks are made from the scripts, one cell per
section, and executed in a folder that holds the files of the bundle and nothing else, so that they show output and
figures. A report that is older than its source, the measured results or the figures is not packed.
"""

import ast
import dataclasses
import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

import build_reports  # first of ours: it puts the repository on the path
import jinja2
import jupytext
import nbclient
import nbformat
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

from common.errors import UserError, reason
from common.files import replacing

REPOSITORY = Path(__file__).resolve().parent.parent
TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
SECTION = re.compile(r"^# -{20,} (.+)\n", re.MULTILINE)
PACKAGES = ("common", "plots", "experiments")
MODIFIED = (2025, 1, 1, 0, 0, 0)  # every file in an archive claims the same time, or no two archives would be alike
CELL_SECONDS, START_SECONDS = 1800, 300  # after which a cell, or the start of a kernel, counts as stuck


@dataclasses.dataclass(frozen=True)
class Bundle:
    title: str  # of its README
    scripts: dict  # script -> its name in the bundle without suffix; {name} is whose submission it is
    formats: tuple = ("py",)  # of every script: "py", "ipynb"
    report: str = "report.pdf"  # its name in the bundle
    folder: bool = True  # everything lies in a folder that is named like the archive
    alone: bool = False  # report and scripts, and nothing else
    samples: tuple = ()  # out of data/samples/


BUNDLES = {
    "ann_homework2": Bundle(
        "Image classification and image segmentation",
        {"cifar100_transfer": "cifar100_transfer", "voc_segmentation": "voc_segmentation"},
        formats=("ipynb",),
        samples=("cifar100.npz", "VOCdevkit"),
    ),
    "cosc420_assignment1": Bundle(  # without the sample: no training images, says the brief
        "Neural networks that classify and generate toy images",
        {"task1_smallnorb_cnn": "task1_smallnorb_cnn", "task2_diffusion": "task2_diffusion"},
    ),
    "idl_assignment1": Bundle(
        "Multi-layer perceptrons and convolutional neural networks",
        {"fashion_cifar_mlp_cnn": "fashion_cifar_mlp_cnn", "tell_the_time": "tell_the_time"},
        formats=("ipynb", "py"),
        samples=("fashion_mnist.npz", "cifar10.npz", "numerals.png"),
    ),
    "minimal_mastery": Bundle(
        "Minimal Mastery",
        {"addnist_classifier": "{name}-classifier", "cifar100_generator": "{name}-generative-model"},
        report="{name}-paper.pdf",
        folder=False,
        alone=True,
    ),
    "pegasus": Bundle("A winged horse", {"pegasus_gan": "pegasus"}, folder=False, samples=("cifar10.npz",)),
}
FOLDERS = {
    "common": "what several scripts share",
    "plots": "the figures",
    "experiments": "the comparisons behind the choices",
    "saved_models": "trained weights, each with a card: how they were trained, what was measured",
    "report/results": "the recorded numbers",
    "data/samples": "a few images of each dataset",
}


# --------------------------------------------------------------------------------------------------------------- files


def needed_modules(script):
    """Returns the files of `PACKAGES` that a script imports, directly or not; not the script itself."""
    start = REPOSITORY / f"{script}.py"
    waiting = [start, *(REPOSITORY / package / f"{script}.py" for package in PACKAGES)]  # some are imported by name
    found = set()
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            for package, *module in (name.split(".") for name in names):
                if package in PACKAGES:
                    waiting += [REPOSITORY / package / f"{each}.py" for each in ("__init__", *module[:1])]
    return found - {start}


def supporting_files(bundle):
    """Returns the paths of what the scripts of a bundle need, besides themselves."""
    paths = {REPOSITORY / "requirements.txt", REPOSITORY / "LICENSE", REPOSITORY / "data" / "README.md"}
    for script in bundle.scripts:
        paths |= needed_modules(script)
        weights = list((REPOSITORY / "saved_models" / script).glob("[!.]*"))
        if not weights:
            raise UserError(f"saved_models/{script}/ is empty; run python {script}.py --train")
        paths.update(weights)
        recorded = REPOSITORY / "report" / "results"
        paths.update([*recorded.glob(f"{script}.json"), *recorded.glob(f"{script}_*")])
    samples = REPOSITORY / "data" / "samples"
    for sample in bundle.samples:
        paths.update(path for path in ((samples / sample), *(samples / sample).rglob("*")) if not path.is_dir())
        paths.add(samples / "sha256.json")
    return sorted(paths)


def source(script, bundle, name):
    """Returns the text of a script that calls itself by its name in the bundle."""
    text, new = (REPOSITORY / f"{script}.py").read_text("utf-8"), bundle.scripts[script].format(name=name)
    # Where saved models come along, the folders they lie in keep their names.
    return text.replace(script, new) if bundle.alone else text.replace(f"{script}.py", f"{new}.py")


def readme(bundle, packed):
    """Returns the text of the README of a bundle in which the files `packed` support the scripts."""
    files = {bundle.report: "the report"}
    for script, file in bundle.scripts.items():
        title = introduction((REPOSITORY / f"{script}.py").read_text("utf-8"))[0]
        files |= dict(zip((f"{file}.{each}" for each in bundle.formats), (title, "the same as a script"), strict=False))
    files |= {f"{name}/": text for name, text in FOLDERS.items() if any(each.startswith(f"{name}/") for each in packed)}
    width = max(len(f"{file}.py --train") for file in bundle.scripts.values())
    return TEMPLATES.get_template("submission.md.j2").render(bundle=bundle, files=files, width=width)


def contents(brief, name):
    """Returns what is in the archive, with notebooks that are not executed yet: dict from path to bytes."""
    bundle = BUNDLES[brief]
    files = {bundle.report.format(name=name): (REPOSITORY / "report" / f"{brief}.pdf").read_bytes()}
    for script, file in bundle.scripts.items():
        text = source(script, bundle, name)
        for kind in bundle.formats:
            content = text if kind == "py" else nbformat.writes(notebook(script, text)) + "\n"
            files[f"{file.format(name=name)}.{kind}"] = content.encode()
    if not bundle.alone:
        packed = {path.relative_to(REPOSITORY).as_posix(): path.read_bytes() for path in supporting_files(bundle)}
        files |= packed | {"README.md": readme(bundle, packed).encode()}
    return files


# ----------------------------------------------------------------------------------------------------------- notebooks


def introduction(text):
    """Returns the title of a script and the other lines of its docstring."""
    title, *lines = ast.get_docstring(ast.parse(text)).splitlines()
    return title.removesuffix("."), lines


def sections(text):
    """Returns (heading, code) of each section, without docstring and call of `main`; the first heading is None."""
    statements, lines = ast.parse(text).body, text.splitlines(keepends=True)
    code = "".join(lines[statements[0].end_lineno : statements[-1].lineno - 1])
    first, *rest = SECTION.split(code)
    headings = [None, *(heading[0].upper() + heading[1:] for heading in rest[::2])]
    return [(heading, part.strip()) for heading, part in zip(headings, [first, *rest[1::2]], strict=True)]


def notebook(script, text):
    """Returns the notebook of a script whose text is `text`, not executed."""
    title, lines = introduction(text)
    names = {"script": script, "title": title, "introduction": lines, "sections": sections(text)}
    made = jupytext.reads(TEMPLATES.get_template("notebook.py.j2").render(names), "py:percent")
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", {}  # jupytext draws them at random
    return made


def execute(path):
    """Executes the notebook at `path` in its folder, and writes it back with its output; raises `UserError`."""
    made = nbformat.read(path, as_version=4)
    # The kernel talks through sockets in the file system: those of TCP, the default, are open to other users.
    sockets = Config(KernelManager={"transport": "ipc", "ip": str(path.parent / "kernel")})
    options = {"timeout": CELL_SECONDS, "startup_timeout": START_SECONDS, "record_timing": False, "config": sockets}
    client = nbclient.NotebookClient(made, resources={"metadata": {"path": str(path.parent)}}, **options)
    elsewhere = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        client.execute(env=elsewhere)
    except CellExecutionError as error:
        raise UserError(f"{path.name} fails: {error.ename}: {reason(error.evalue)}; fix its script") from error
    except (RuntimeError, TimeoutError) as error:  # the kernel has died, or does not answer
        raise UserError(f"{path.name} fails: {reason(error)}; close other programs and try again") from error
    nbformat.write(made, path)


# ------------------------------------------------------------------------------------------------------------- archive


def check(brief, name):
    """Raises `UserError` where there is no such brief, or something that belongs into its bundle is missing or old."""
    if brief not in BUNDLES:
        raise UserError(f"there is no brief {brief!r}; choose BRIEF from {', '.join(BUNDLES)}")
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is no NAME for a submission; use letters, digits, hyphens and underscores")
    wanted = [f"{script}.py" for script in BUNDLES[brief].scripts] + [f"report/{brief}.pdf"]
    missing = [path for path in wanted if not (REPOSITORY / path).exists()]
    if missing:
        verb = "do" if len(missing) > 1 else "does"
        raise UserError(
            f"{' and '.join(missing)} {verb} not exist yet; the bundle of {brief} needs {', '.join(wanted)}"
        )
    page, printed, _ = build_reports.build(brief)
    for suffix, content in (("md", page.encode()), ("pdf", printed)):
        path = REPOSITORY / "report" / f"{brief}.{suffix}"
        if not path.exists() or path.read_bytes() != content:
            raise UserError(f"report/{path.name} is older than its source, results or figures; run make reports")


def pack(path, files, folder=""):
    """Writes the archive at `path` with `files`, a dict from path within `folder` to bytes; returns `path`."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{folder}{name}", MODIFIED)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, content)
    return path


def build(brief, name, dist):
    """Returns the path of the archive of a brief, written to the folder `dist` after all checks; raises `UserError`."""
    check(brief, name)
    files = contents(brief, name)
    notebooks = [path for path in files if path.endswith(".ipynb")]
    with tempfile.TemporaryDirectory() as folder:
        for path, content in files.items() if notebooks else ():
            target = Path(folder, path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        for path in notebooks:
            print(f"executing {path}", flush=True)
            execute(Path(folder, path))
            files[path] = Path(folder, path).read_bytes()
    return pack(dist / brief / f"{name}.zip", files, f"{name}/" if BUNDLES[brief].folder else "")


def main(arguments):
    if len(arguments) != 2 or not all(arguments):
        raise UserError(f"make submission BRIEF=... NAME=... needs both; choose BRIEF from {', '.join(BUNDLES)}")
    path = build(*arguments, REPOSITORY / "dist")
    with zipfile.ZipFile(path) as archive:
        print(f"{path.relative_to(REPOSITORY)}: {len(archive.namelist())} files, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
