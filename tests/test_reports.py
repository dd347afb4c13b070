"""The reports say what was measured, and their PDFs are what the briefs ask for."""

import importlib
import json
import re
import sys

import pypdf
import pytest
from conftest import REPOSITORY

from common.errors import UserError

sys.path.insert(0, str(REPOSITORY / "report"))
reports = importlib.import_module("build_reports")

BRIEFS = reports.briefs()
FONT_FILES = ("/FontFile", "/FontFile2", "/FontFile3")


@pytest.fixture(scope="module", params=BRIEFS)
def built(request):
    return request.param, *reports.build(request.param)


def test_every_report_has_a_limit():
    assert BRIEFS
    assert set(BRIEFS) <= set(reports.LIMITS)


def test_committed_files_are_what_the_source_and_the_results_make(built):
    brief, page, printed, _ = built
    assert (REPOSITORY / "report" / f"{brief}.md").read_text() == page, "run `make reports`"
    assert (REPOSITORY / "report" / f"{brief}.pdf").read_bytes() == printed, "run `make reports`"


def test_pages_have_no_traces_of_their_making(built):
    _, page, *_ = built
    assert not re.search(r"\{\{|\}\}|\{%|\bnan\b|\bNone\b|\?\?|\[@|Undefined", page)
    assert page.count("**Figure") == page.count("](figures/")


def fonts(page):
    """Returns the descriptors of all fonts on a page, also of those that are made of others."""
    named = [font.get_object() for font in page["/Resources"].get("/Font", {}).values()]
    parts = [part.get_object() for font in named for part in font.get("/DescendantFonts", [font])]
    return [part["/FontDescriptor"].get_object() for part in parts]


@pytest.mark.parametrize("brief", BRIEFS)
def test_pdfs_have_text_references_and_embedded_fonts(brief):
    reader = pypdf.PdfReader(REPOSITORY / "report" / f"{brief}.pdf")
    texts = [page.extract_text() for page in reader.pages]
    assert any("References" in text for text in texts)
    assert sum(len(text.split()) for text in texts) > 1000
    descriptors = [descriptor for page in reader.pages for descriptor in fonts(page)]
    assert descriptors
    assert all(any(name in descriptor for name in FONT_FILES) for descriptor in descriptors)


def test_limits_are_kept(built):
    brief, _, _, sizes = built
    assert all(0 < sizes[name] <= limit for name, limit in reports.LIMITS[brief].items())


@pytest.fixture
def draft(tmp_path, monkeypatch):
    """Makes a report of a text, which lies where reports lie, with results of its own; returns a function."""
    monkeypatch.setattr(reports, "REPORT", tmp_path / "report")
    monkeypatch.setattr(reports, "REPOSITORY", tmp_path)
    for folder in ("report/results", "report/figures", "report/draft"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("template.typ", "references.bib"):
        (tmp_path / "report" / name).write_text((REPOSITORY / "report" / name).read_text())
    (tmp_path / "report/results/net.json").write_text(json.dumps({"test": {"accuracy": 0.98765, "loss": None}}))
    (tmp_path / "report/results/net_experiments.csv").write_text(
        "name,fold,accuracy\nbase,1,0.5\nbase,2,0.7\nwide,1,0.6\nwide,2,0.9\n"
    )
    (tmp_path / "report/figures/dot.png").write_bytes((REPOSITORY / "data/samples/numerals.png").read_bytes())

    def build(text):
        reports.read.cache_clear()
        (tmp_path / "report/draft/report.md").write_text(f"---\ntitle: A title\nsubtitle: Below\n---\n\n{text}")
        return reports.build("draft")

    yield build
    reports.read.cache_clear()


REFERENCES = "\n\n# References {.unnumbered}\n\n::: {#refs}\n:::\n"


def test_numbers_citations_figures_and_tables_are_filled_in(draft):
    page, printed, sizes = draft(
        """# One

Accuracy {{ pct(results("net").test.accuracy, 2) }} [@liu2022], see {{ see("dot") }} and {{ see("table") }}.

{% call figure("dot", "dot.png", "a dot", 50) %}
A caption
in two lines.
{% endcall %}

| name | mean |
|:-----|-----:|
{% for rows in groups(runs("net"), "name") %}
| {{ rows[0].name }} | {{ pm(mean(column(rows, "accuracy")), std(column(rows, "accuracy")), "pct", 1) }} |
{% endfor %}
{% call caption("table") %}Of all runs.{% endcall %}

{% set more = paired(runs("net", name="wide"), runs("net", name="base"), "fold", "accuracy") %}
Wide gains {{ points(mean(more)) }}."""
        + REFERENCES
    )
    space = reports.SPACE
    assert f"Accuracy 98.77{space}% (Liu et al. 2022), see Figure{space}1 and Table{space}1." in page
    assert f"**Figure{space}1.** A caption in two lines." in page
    assert "![a dot](figures/dot.png)" in page
    assert f"**Table{space}1.** Of all runs." in page
    assert f"| base | 60.0 ± 14.1{space}% |" in page
    assert f"Wide gains 15.0{space}points." in page
    assert "A ConvNet for the 2020s" in " ".join(page.split())
    assert sizes == {"words": 11, "pages": 1}  # those with a letter: neither numbers nor caption
    assert printed.startswith(b"%PDF")


def test_two_builds_give_the_same_bytes(draft):
    assert draft("Some text." + REFERENCES) == draft("Some text." + REFERENCES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{{ pct(results("net").test.acuracy) }}', "net/test has no 'acuracy'; it has 'accuracy', 'loss'"),
        ('{{ pct(results("net").test.loss) }}', "None is no number"),
        ('{{ pct(results("other").test) }}', "other.json does not exist"),
        ('{{ runs("net", name="narrow") }}', "no experiment of net has {'name': 'narrow'}"),
        ("{{ accuracy }}", "'accuracy' is undefined"),
        ("\n{% if %}", "line 7: Expected an expression"),
        ("[@nobody2020]", "nobody2020"),
        ('{{ see("dots") }}', "no figure or table named dots"),
        ('{% call figure("dot", "dot.png", "a dot") %}A caption.{% endcall %}', "the text refers to no dot"),
        ('{% call figure("dot", "line.png", "a line") %}A caption.{% endcall %}', "report/figures/line.png does not"),
    ],
)
def test_mistakes_are_one_line_that_says_where(draft, text, message):
    with pytest.raises(UserError) as error:
        draft(text)
    assert str(error.value).startswith("report/draft/report.md")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [{"words": 4}, {"pages": 1}])
def test_limits_stop_the_build(draft, monkeypatch, limit):
    monkeypatch.setitem(reports.LIMITS, "draft", limit)
    draft("Four words of text.\n\n| a | table |\n|---|---|\n| has | none |\n")
    with pytest.raises(UserError, match=f"draft has . {next(iter(limit))}, more than"):
        draft("Five words are too many.\n\n```{=typst}\n#pagebreak()\n```\n\nMore.")


def test_an_unknown_brief_names_the_known_ones():
    with pytest.raises(UserError, match=f"there is no report/nothing/report.md; the reports are {', '.join(BRIEFS)}"):
        reports.build("nothing")


def test_statistics():
    assert reports.pm(0.9734, 0.0039, "pct", 1) == f"97.3 ± 0.4{reports.SPACE}%"
    assert reports.num(-1234.5, 1) == "\N{MINUS SIGN}1,234.5"
    assert reports.num(-0.001, 2) == "0.00"
    assert reports.pooled_std([[1, 3], [10, 10]]) == pytest.approx(1.0)
    assert reports.rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == {"rho": pytest.approx(1), "p": 2 / 24}
    low, high = (reports.bootstrap([0.0] * 5 + [1.0] * 5, quantile) for quantile in (0.025, 0.975))
    assert low == pytest.approx(0.2, abs=0.05)
    assert high == pytest.approx(0.8, abs=0.05)
