"""Every number in README.md and the reports is the measured one."""

import re
import sys

import pytest
from conftest import REPOSITORY

sys.path.insert(0, str(REPOSITORY / "report"))
import numbers_in_texts as numbers


@pytest.mark.parametrize("path", numbers.texts(), ids=lambda path: path.name)
def test_numbers_equal_the_results(path):
    text = path.read_text()
    assert numbers.MARKED.search(text), "no number of this text is tied to a result"
    wrong = [
        f"{found[0]} should be {numbers.fill(found[0])}"
        for found in numbers.MARKED.finditer(text)
        if numbers.fill(found[0]) != found[0]
    ]
    assert not wrong


def test_every_number_of_ours_in_the_results_table_is_tied_to_a_result():
    table = numbers.MARKED.sub("", (REPOSITORY / "README.md").read_text()).split("## Results")[1].split("\n\n")[1]
    for row in table.splitlines()[2:]:
        cells = row.split("|")
        ours = cells[3:6] + cells[7:9]  # all but the task, the metric, the reference and the command
        assert not re.search(r"[02-9]", "|".join(ours)), row  # a lone 1 is the number of seeds


def test_numbers_are_filled_in_and_wrong_ones_found(tmp_path, monkeypatch):
    text = "is 1.00<!-- task1_smallnorb_cnn test/category_accuracy *100 .2f --> %"
    monkeypatch.setattr(numbers, "lookup", lambda file, path: {"test/category_accuracy": 0.98765}[path])
    assert numbers.fill(text) == "is 98.77<!-- task1_smallnorb_cnn test/category_accuracy *100 .2f --> %"
    assert numbers.fill(numbers.fill(text)) == numbers.fill(text)


def test_linked_files_exist():
    for path in [*numbers.texts(), REPOSITORY / "data" / "README.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"
