"""Puts the measured numbers into README.md and the reports: `python report/numbers_in_texts.py`, or `make numbers`.

A number in a text is followed by an HTML comment, invisible on the page, that says where it comes from:

    97.86<!-- task1_smallnorb_cnn test/category_accuracy *100 .2f --> %

names `report/results/task1_smallnorb_cnn.json`, the path of the value in it, an optional factor and a format. A text
value stands between backticks. The test suite fails when a text and the results disagree.
"""

import json
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
MARKED = re.compile(
    r"(?P<number>[-+\d.,]+|`[^`]*`)<!-- (?P<file>\w+) (?P<path>[^*]+?)(?: \*(?P<factor>[\d.]+))? (?P<format>\S+) -->"
)


def texts():
    """Returns the paths of README.md and the reports."""
    return [REPOSITORY / "README.md", *sorted((REPOSITORY / "report").glob("*.md"))]


def lookup(file, path, results=REPOSITORY / "report" / "results"):
    """Returns the value at `path`, keys with slashes between them, in `<file>.json`; raises KeyError without one."""
    value = json.loads((results / f"{file}.json").read_text())
    for key in path.split("/"):
        value = value[key]
    return value


def fill(text):
    """Returns `text` with every marked number replaced by the one in the results."""

    def number(match):
        value = lookup(match["file"], match["path"])
        if match["factor"]:
            value *= float(match["factor"])
        text = f"`{value}`" if isinstance(value, str) else f"{value:{match['format']}}"
        return text + match[0][len(match["number"]) :]

    return MARKED.sub(number, text)


if __name__ == "__main__":
    for path in texts():
        before = path.read_text()
        after = fill(before)
        if after != before:
            path.write_text(after)
            print(f"updated {path}", file=sys.stderr)
