"""The reports say what was measured, and their PDFs are what the briefs ask for."""

import importlib
import json
import re
import shutil
import sys

import pypdf
import pytest
from conftest import REPOSITORY

from common.errors import UserError

sys.path.insert(0, str(REPOSITORY / "report"))
reports = importlib.import_module("build_reports")
latex = importlib.import_module("latex")

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
    assert any("references" in "".join(text.split()).lower() for text in texts)  # small capitals come in pieces
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

    build.report = tmp_path / "report"
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


# --------------------------------------------------------------------------------------------------------------- LaTeX

PAPER = r"""\documentclass{article}
\usepackage[utf8]{inputenc}
\usepackage{conference, graphicx}
\title{A title}
\subtitle{Below}
\author{Nobody}
\begin{document}
\maketitle
<% import "half.tex.j2" as half with context %>
TEXT << half.text() >>
<% if web %>
\section*{References}
<% else %>
\hypertarget{end-of-text}{}
\bibliography{references}
<% endif %>
\end{document}
"""
TEXT = r"""Accuracy << pct(results("net").test.accuracy, 2) >> with more text \citep{liu2022}, see << see("dot") >>.
<% if measured("net") %>Measured.<% endif %><% if measured("other") %>Not measured.<% endif %>

\begin{equation} a = b \end{equation}
\begin{figure}
\includegraphics[width=1cm]{<< image("dot.png") >>}
<% call caption("dot") %>A
caption.<% endcall %>
\end{figure}"""
needs_latex = pytest.mark.skipif(not shutil.which("latexmk"), reason="LaTeX is not installed")


@pytest.fixture
def paper(draft):
    """Makes a report of LaTeX like `draft`; returns a function."""
    folder = draft.report / "draft"
    layout = "report/minimal_mastery/conference.sty"
    (folder / "conference.sty").write_text((REPOSITORY / layout).read_text())
    (folder / "half.tex.j2").write_text(
        r"<% macro text() %>Also << num(results('net').test.accuracy, 1) >>.<% endmacro %>"
    )

    def build(text=TEXT):
        reports.read.cache_clear()
        (folder / "paper.tex.j2").write_text(PAPER.replace("TEXT", text))
        return reports.build("draft")

    build.report, build.pdf = draft.report, draft.report / "draft.pdf"
    return build


@pytest.fixture
def without_latex(monkeypatch):
    monkeypatch.setattr(latex.shutil, "which", lambda program: None)


@needs_latex
def test_a_paper_has_numbers_citations_and_figures_filled_in(paper, tmp_path):
    page, printed, sizes = paper()
    space = reports.SPACE
    assert f"Accuracy 98.77{space}% with more text (Liu et al. 2022), see Figure{space}1. Measured." in page
    assert "Not measured" not in page
    assert "Also 1.0." in page
    assert f"**Figure{space}1.** A caption." in page
    assert "](figures/dot.png)" in page
    assert "\n``` math\na = b\n```\n" in page
    assert "A ConvNet for the 2020s" in " ".join(page.split())
    assert sizes["pages"] == 1
    paper.pdf.write_bytes(printed)
    (printed_page,) = pypdf.PdfReader(paper.pdf).pages
    text = " ".join(printed_page.extract_text().split())
    assert re.search(r"98\.77 ?% with more text \(Liu et al\., 2022\), see Figure 1\. Measured", text)
    assert "Figure 1: A caption." in text
    assert printed_page.mediabox.upper_right == (612, 792)  # US letter


@needs_latex
def test_two_papers_have_the_same_bytes(paper):
    assert paper() == paper()


@needs_latex
def test_pages_before_the_references_are_limited(paper, monkeypatch):
    monkeypatch.setitem(reports.LIMITS, "draft", {"pages": 1})
    references = r"\citep{liu2022} \enlargethispage{-8in}"  # which leaves no place for them
    *_, sizes = paper(f"One page. {references}")
    assert sizes["pages"] == 1
    with pytest.raises(UserError, match=r"draft has 2 pages, more than 1; shorten report/draft/paper.tex.j2"):
        paper(r"One page. \newpage Two pages. \citep{liu2022}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('<< pct(results("net").test.acuracy) >>', "net/test has no 'acuracy'; it has 'accuracy', 'loss'"),
        ("\n<% if %>", "paper.tex.j2, line 11: Expected an expression"),
        (r"\citep{liu2022, nobody2020}", "nobody2020"),
        ('<< see("dots") >>', "no figure or table named dots"),
        ('<< image("line.png") >>', "report/figures/line.png does not exist"),
        pytest.param(r"\citep{liu2022} \nonsense", "LaTeX: Undefined control sequence. (line 9 of", marks=needs_latex),
        pytest.param(r"\citep{liu2022} $\ref{dots}$", "LaTeX: there is no reference dots", marks=needs_latex),
    ],
)
def test_mistakes_in_a_paper_are_one_line_that_says_where(paper, text, message):
    with pytest.raises(UserError) as error:
        paper(text)
    assert str(error.value).startswith("report/draft/paper.tex.j2")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_paper_needs_latex_where_it_has_changed(paper, without_latex):
    with pytest.raises(UserError) as error:
        paper()
    assert str(error.value) == (
        "report/draft.pdf is older than its source, results or figures, and LaTeX is missing; "
        "install it (apt-get install latexmk texlive-latex-extra texlive-fonts-recommended) or keep the committed PDF"
    )


@needs_latex
def test_a_paper_that_is_up_to_date_is_kept_without_latex(paper, monkeypatch):
    _, printed, _ = paper()
    paper.pdf.write_bytes(printed)
    monkeypatch.setattr(latex.shutil, "which", lambda program: None)
    assert paper()[1] == printed
    for path, old, new in (
        ("results/net.json", "0.98765", "0.98665"),
        ("references.bib", "A {ConvNet} for the 2020s", "A {ConvNet} for the 2030s"),
        ("draft/conference.sty", "9in", "8in"),
    ):
        text = (paper.report / path).read_text()
        (paper.report / path).write_text(text.replace(old, new))
        with pytest.raises(UserError, match="older than its source"):
            paper()
        (paper.report / path).write_text(text)
    (paper.report / "references.bib").write_text((paper.report / "references.bib").read_text() + "\n@misc{new,\n}\n")
    assert paper()[1] == printed  # which does not cite it
    paper.pdf.write_bytes(b"not a PDF")
    with pytest.raises(UserError, match="older than its source"):
        paper()


def test_the_others_are_built_where_latex_is_missing(paper, without_latex, capsys):
    with pytest.raises(UserError):
        paper()
    other = paper.report / "other" / "report.md"
    other.parent.mkdir()
    other.write_text("---\ntitle: A title\nsubtitle: Below\n---\n\nSome text.\n" + REFERENCES)
    (paper.report / "draft" / "report.md").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"skipped: report/draft.pdf is older than .* LaTeX is missing; install it"):
        reports.main([])
    assert (paper.report / "other.pdf").exists()
    assert not paper.pdf.exists()
    assert "report/other.pdf, report/other.md: 2 words of text, 1 pages" in capsys.readouterr().out


def test_the_half_that_is_not_trained_says_so():
    text, _ = reports.render(REPOSITORY / "report/minimal_mastery/paper.tex.j2")
    assert ("not trained yet" in text) != reports.measured("cifar100_generator")
    assert "Total penalty expected: 0." in text


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
