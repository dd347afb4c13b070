"""Every number in README.md and the index of the saved models is the measured one."""

import json
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


def test_the_readme_table_has_one_row_per_script_and_no_number_of_its_own():
    assert sorted(numbers.ROWS) == SCRIPTS
    for _, _, ours, _ in numbers.ROWS.values():
        assert not re.search(r"\d", numbers.NUMBER.sub("", ours))


def test_numbers_are_filled_in_and_wrong_ones_found(monkeypatch, tmp_path):
    monkeypatch.setattr(numbers, "lookup", lambda file, path: {("net", "test/accuracy"): 0.98765}[file, path])
    monkeypatch.setattr(numbers, "ROWS", {"net": ("task", "accuracy", "{test/accuracy *100 .2f} %", "none")})
    about = {"hardware": "a CPU", "precision": "float32", "backend": "jax"}
    net = {"model": "wide", "images_per_second": 1234.5, "ratio": 1.006, "load_seconds": 7.6, "load_gigabytes": 1.94}
    other = {"images_per_second": 30.0, "load_seconds": 5, "load_gigabytes": 0.48, "sampling_seconds": 12.4}
    two = {"model": "wide", "images_per_second": 1234.5, "devices": 2, "on_devices": 2345.6}
    bench = {"net": net | about, "net --devices 2": two | about, "other": other | about | {"precision": "bfloat16"}}
    (tmp_path / "bench.json").write_text(json.dumps({"scripts": bench}))
    monkeypatch.setattr(numbers, "RESULTS", tmp_path)
    tables = [f"{start}\n| 1.00 % |\n{end}" for start, end in (numbers.RESULTS_MARKERS, numbers.BENCH_MARKERS)]
    text = f"before\n{tables[0]}\nbetween\n{tables[1]}\nafter"
    filled = numbers.fill_readme(text)
    assert "| task | accuracy | 98.77 % | none | `python net.py --load` |" in filled
    assert "| `net.py` | `wide` | 1,234 | 1.01 | 8 s | 1.9 GB | – |" in filled
    assert "| `net.py --devices 2` | `wide` | 1,234; 2,346 on 2 devices | – | – | – | – |\n" in filled
    assert "| `other.py` | – | 30 | – | 5 s | 0.5 GB | 12 s |\n\njax, float32, a CPU: `net.py`, `net.py --dev" in filled
    assert "; jax, bfloat16, a CPU: `other.py`.\n" in filled
    assert (filled.startswith("before\n"), filled.endswith("\nafter"), "1.00" in filled) == (True, True, False)
    assert numbers.fill_readme(filled) == filled


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
