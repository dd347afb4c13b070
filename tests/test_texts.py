"""Every number in README.md, the index of the saved models and the pages of scripts is the measured one."""

import re
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "report"))
import numbers_and_tables as numbers

REPORTS = sorted((REPOSITORY / "report").glob("*.md"))
SCRIPTS = sorted(path.stem for path in REPOSITORY.glob("*.py") if path.stem != "app")


@pytest.mark.parametrize("path", numbers.texts(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_texts_equal_the_results(path):
    assert path.read_text() == numbers.texts()[path], "run `make numbers`"


@pytest.mark.parametrize("path", numbers.pages(), ids=lambda path: path.name)
def test_pages_have_numbers_tied_to_results(path):
    assert numbers.MARKED.search(path.read_text())


def test_the_readme_table_has_one_row_per_script_and_no_number_of_its_own():
    assert sorted(numbers.ROWS) == SCRIPTS
    for _, _, ours, _ in numbers.ROWS.values():
        assert not re.search(r"\d", numbers.NUMBER.sub("", ours))


def test_numbers_are_filled_in_and_wrong_ones_found(monkeypatch):
    text = "is 1.00<!-- task1_smallnorb_cnn test/category_accuracy *100 .2f --> %"
    monkeypatch.setattr(numbers, "lookup", lambda file, path: {"test/category_accuracy": 0.98765}[path])
    filled = numbers.fill_reports(text)
    assert filled == "is 98.77<!-- task1_smallnorb_cnn test/category_accuracy *100 .2f --> %"
    assert numbers.fill_reports(filled) == filled


def test_the_index_names_every_saved_model():
    text = (REPOSITORY / "saved_models" / "README.md").read_text()
    weights = [path for path in (REPOSITORY / "saved_models").glob("*/*") if path.suffix in (".keras", ".npz")]
    assert len(weights) > 30
    assert all(f"`{path.name}`" in text for path in weights)


def test_linked_files_exist():
    pages = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "data/README.md", "saved_models/README.md")]
    for path in [*pages, *REPORTS]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_packages_for_a_gpu_have_the_pinned_versions():
    pinned = (REPOSITORY / "requirements.txt").read_text().split()
    named = re.findall(r"([a-z]+)\[[a-z0-9-]+\]==([0-9.]*[0-9])", (REPOSITORY / "README.md").read_text())
    assert {name for name, _ in named} == {"tensorflow", "jax"}
    assert all(f"{name}=={version}" in pinned for name, version in named)
