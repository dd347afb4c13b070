"""Builds the reports: `make reports`, or `python report/build_reports.py [BRIEF ...]`.

The source of a report is `report/<brief>/report.md`: Markdown with a Jinja2 expression for every number of ours, taken
from `report/results/` and the cards in `saved_models/`. A name that does not exist there fails the build. Pandoc turns
it into `report/<brief>.md` for the web and, with Typst and `report/template.typ`, into `report/<brief>.pdf`. Both are
committed; the same source always gives the same bytes. References come from `report/references.bib`.

Where the brief asks for LaTeX, the source is `report/<brief>/paper.tex.j2`, with its layout in the same folder, and
`report/latex.py` makes the PDF. It can import other sources of the folder. Jinja's delimiters are `<< >>`, `<% %>` and
`<# #>` there.

What a source can use, besides the language of Jinja2 (docs: https://jinja.palletsprojects.com/templates/):

    results("task1_smallnorb_cnn").seeds.mean     the JSON of a script       card("tell_the_time/best_75").metrics
    runs("task1_smallnorb_cnn", factor="width")   rows of its experiments    groups(rows, "name"), column(rows, "fold")
    pct(0.9734) points(0.021) deg(2.38) num(1e6)  97.3 %, 2.1 points, 2.38°, 1,000,000; then the number of digits
    pm(mean, std, "pct", 2)                       97.34 ± 0.39 %
    paired(rows, others, "fold", "accuracy")      list of differences between rows of the same fold
    root_mean_square(list), median_absolute(list), pooled_std(lists), rank_correlation(list, list).rho and .p
    mean, std, median, minimum, maximum           of a list; bootstrap(list, 0.025) is a quantile of its resampled mean
    {% call figure("name", "script/file.png", "what it shows, for who cannot see it", width=80) %}caption{% endcall %}
    {% call caption("name") %}caption of the table above{% endcall %}
    {{ see("name") }}                             Figure 3, or Table 1

In LaTeX, `<< image("script/file.png") >>` is the path of a figure, `<% call caption("name", "Table") %>` gives a float
its caption, `measured("script")` says whether there are results, and `web` whether the page for the web is being made.
"""

import functools
import io
import itertools
import json
import re
import sys
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import pypandoc
import pypdf
import typst
from scipy.stats import rankdata, spearmanr

REPORT = Path(__file__).resolve().parent
REPOSITORY = REPORT.parent
sys.path.insert(0, str(REPOSITORY))
import latex  # noqa: E402

from common.errors import UserError  # noqa: E402
from common.files import replacing  # noqa: E402

# What a brief allows; what "concise" means is our choice. Words are those of the text: neither captions, tables and
# formulas, nor references and appendix; pages are all of them, or in LaTeX those before the references.
LIMITS = {
    "ann_homework2": {"words": 2250},
    "cosc420_assignment1": {"words": 1750},
    "idl_assignment1": {"pages": 10},
    "minimal_mastery": {"pages": 4},
    "pegasus": {"words": 1000},
}
SPACE = "\N{NO-BREAK SPACE}"
UNITS = {"pct": (100, f"{SPACE}%"), "points": (100, f"{SPACE}points"), "deg": (1, "°"), "num": (1, "")}  # factor, sign
FLOATING = "#figure(placement: auto, image("  # pandoc leaves figures where they are, which tears holes into pages
CREATED = 1735689600  # seconds since 1970: every PDF claims the same time, or no two builds would be alike
READER = "markdown-smart"
MARKDOWN, LATEX = "report.md", "paper.tex.j2"  # the source of a report, in one language or the other
END_OF_TEXT = "references"  # the heading after which words no longer count


# ------------------------------------------------------------------------------------------------------------- numbers


def pm(mean, std, kind="num", digits=2):
    """Returns mean ± standard deviation with the sign of a kind, a key of `UNITS`."""
    factor, sign = UNITS[kind]
    return f"{factor * mean:,.{digits}f} ± {factor * std:,.{digits}f}{sign}"


def quantity(kind, value, digits):
    """Returns one number; raises `UserError` for anything else, so that a gap in the results is never printed."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
        raise UserError(f"{value!r} is no number")
    factor, sign = UNITS[kind]
    # The true minus sign; a result that rounds to zero has none.
    text = f"{factor * value:,.{digits}f}".replace("-", "\N{MINUS SIGN}")
    return (text if any(digit in text for digit in "123456789") else text.lstrip("\N{MINUS SIGN}")) + sign


def pct(value, digits=1):
    return quantity("pct", value, digits)


def deg(value, digits=2):
    return quantity("deg", value, digits)


def num(value, digits=0):
    return quantity("num", value, digits)


def points(value, digits=1):
    return quantity("points", value, digits)


def bootstrap(values, quantile, resamples=10_000):
    """Returns a quantile of the mean of `values` over bootstrap samples of them, with a fixed seed."""
    values = np.asarray(values, float)
    chosen = np.random.default_rng(0).integers(len(values), size=(resamples, len(values)))
    return float(np.quantile(values[chosen].mean(axis=1), quantile))


# ---------------------------------------------------------------------------------------------------------------- data


class Strict(dict):
    """A JSON object in which an unknown key is an error that names it and the file."""

    def __init__(self, values, place):
        super().__init__({key: strict(value, f"{place}/{key}") for key, value in values.items()})
        self._place = place  # Jinja2 looks for attributes first, so no key may have this name

    def __missing__(self, key):
        raise UserError(f"{self._place} has no {key!r}; it has {', '.join(map(repr, self)) or 'nothing'}")


def strict(value, place):
    return Strict(value, place) if isinstance(value, dict) else value


@functools.cache
def read(path):
    if not path.exists():
        raise UserError(f"{path.relative_to(REPOSITORY)} does not exist")
    if path.suffix == ".json":
        return strict(json.loads(path.read_text()), path.stem)
    return [Strict(row, f"a row of {path.stem}") for row in pd.read_csv(path).to_dict("records")]


def results(script):
    return read(REPORT / "results" / f"{script}.json")


def card(model):
    return read(REPOSITORY / "saved_models" / f"{model}.json")


def runs(script, **wanted):
    """Returns the rows of the experiment table of a script that have the `wanted` values; at least one."""
    rows = read(REPORT / "results" / f"{script}_experiments.csv")
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items())]
    if not found:
        raise UserError(f"no experiment of {script} has {wanted}")
    return found


def groups(rows, *names):
    """Returns lists of the rows that agree in the columns `names`, in the order of their first rows."""
    found = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return list(found.values())


def column(rows, name):
    return [row[name] for row in rows]


def paired(rows, baseline, on, name):
    """Returns how much the column `name` of `rows` exceeds that of the `baseline` rows with the same value of `on`.

    One difference for each value of `on` that both have, in the order of the baseline, without missing measurements.
    """
    measured = {row[on]: row[name] for row in rows}
    differences = [measured[row[on]] - row[name] for row in baseline if row[on] in measured]
    return [float(each) for each in differences if np.isfinite(each)]


def root_mean_square(values):
    return float(np.sqrt(np.mean(np.square(values))))


def median_absolute(values):
    return float(np.median(np.abs(values)))


def pooled_std(samples):
    """Returns the standard deviation within samples, lists of two numbers or more, pooled over all of them."""
    squares = sum((len(sample) - 1) * np.var(sample, ddof=1) for sample in samples)
    return float(np.sqrt(squares / sum(len(sample) - 1 for sample in samples)))


def rank_correlation(first, second):
    """Returns Spearman's rank correlation of two short lists, and how likely one as large is by chance (exact)."""
    observed = spearmanr(first, second).statistic
    ranks = rankdata(first)
    found = [np.corrcoef(ranks, order)[0, 1] for order in itertools.permutations(rankdata(second))]
    return {"rho": float(observed), "p": float(np.mean(np.abs(found) >= abs(observed) - 1e-9))}


STATISTICS = (bootstrap, root_mean_square, median_absolute, pooled_std, rank_correlation)
DATA = (results, card, runs, groups, column, paired)
HELPERS = {
    **{function.__name__: function for function in (pct, points, deg, num, pm, *STATISTICS, *DATA)},
    **{"mean": np.mean, "median": np.median, "minimum": np.min, "maximum": np.max},
    "std": functools.partial(np.std, ddof=1),
    **{"zip": zip, "sorted": sorted, "sum": sum, "len": len, "abs": abs, "range": range, "enumerate": enumerate},
}


# --------------------------------------------------------------------------------------------------- figures and tables


class Captions:
    """Numbers figures and tables in the order of the text. It is rendered twice: the second time, numbers are known."""

    def __init__(self):
        self.numbers, self.seen, self.referred = {}, {}, set()

    def number(self, kind, name):
        if name in self.seen:
            raise UserError(f"two figures or tables are named {name!r}")
        count = 1 + sum(label.startswith(kind) for label in self.seen.values())
        self.seen[name] = f"{kind}{SPACE}{count}"
        return self.seen[name]

    def image(self, path):
        if not (REPORT / "figures" / path).exists():
            raise UserError(f"report/figures/{path} does not exist; run its script with --load")
        return f"figures/{path}"

    def figure(self, name, path, alt, width=100, caller=None):
        text = f"**{self.number('Figure', name)}.** {' '.join(caller().split())}"
        return f'\n![{text}]({self.image(path)}){{width={width}% alt="{alt}"}}\n'

    def caption(self, name, caller=None):
        return f"\n: **{self.number('Table', name)}.** {' '.join(caller().split())}\n"

    def see(self, name):
        self.referred.add(name)
        return self.numbers.get(name, "?")

    def finish_pass(self):
        """Ends one rendering; raises `UserError` for references to nothing, and for what the text never refers to."""
        if self.referred - self.seen.keys():
            raise UserError(f"there is no figure or table named {', '.join(sorted(self.referred - self.seen.keys()))}")
        if self.seen.keys() - self.referred:
            raise UserError(f"the text refers to no {', '.join(sorted(self.seen.keys() - self.referred))}")
        self.numbers, self.seen, self.referred = self.seen, {}, set()


class LatexCaptions(Captions):
    """The same in LaTeX, which numbers by itself, except on the page for the web."""

    def __init__(self, web):
        super().__init__()
        self.web, self.images = web, set()

    def image(self, path):
        self.images.add(super().image(path))
        return f"figures/{path}"

    def caption(self, name, kind="Figure", caller=None):
        number, text = self.number(kind, name), " ".join(caller().split())
        return rf"\caption{{\textbf{{{number}.}} {text}}}" if self.web else rf"\caption{{{text}}}\label{{{name}}}"

    def see(self, name):
        kind, _, number = super().see(name).partition(SPACE)
        return f"{kind}~{number}" if self.web else rf"{kind}~\ref{{{name}}}"


# ------------------------------------------------------------------------------------------------------------- building


def sources():
    """Returns the path of the source of every report: dict from brief to path."""
    paths = [path for name in (MARKDOWN, LATEX) for path in REPORT.glob(f"*/{name}")]
    return {path.parent.name: path for path in sorted(paths)}


def briefs():
    """Returns the names of all reports."""
    return list(sources())


def measured(script):
    return (REPORT / "results" / f"{script}.json").exists()


def render(path, web=True):
    """Returns the text of a source with all numbers filled in, and the paths of its images (set) if it is in LaTeX."""
    syntax = {"comment_start_string": "<#", "comment_end_string": "#>"}  # pandoc's {#name} is no comment
    captions, names = Captions(), {}
    if path.name == LATEX:
        syntax |= {"variable_start_string": "<<", "variable_end_string": ">>", "finalize": escaped}
        syntax |= {"block_start_string": "<%", "block_end_string": "%>"}
        captions = LatexCaptions(web)
        names = {"image": captions.image, "measured": measured, "web": web}
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(path.parent),
        trim_blocks=True,
        lstrip_blocks=True,
        **syntax,
    )
    environment.globals |= HELPERS | names
    environment.globals |= {"figure": captions.figure, "caption": captions.caption, "see": captions.see}
    for _ in range(2):
        text = environment.get_template(path.name).render()
        captions.finish_pass()
    return text, getattr(captions, "images", set())


def escaped(value):
    """Returns the value of an expression for LaTeX, which must not take the rest of the line for a comment."""
    return re.sub(r"(?<!\\)%", r"\%", value) if isinstance(value, str) else value


def parse(text, reader=READER):
    """Returns pandoc's document (a dict) with citations resolved."""
    options = ["--citeproc", f"--bibliography={REPORT / 'references.bib'}", "--metadata=lang:en-GB"]
    # A table whose lines are short enough gets columns as wide as their content.
    options += ["--columns=9999", "--fail-if-warnings"]
    return json.loads(pypandoc.convert_text(text, "json", format=reader, extra_args=options))


def write(document, target, **options):
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return pypandoc.convert_text(json.dumps(document), target, format="json", extra_args=arguments)


def metadata(document, name):
    """Returns a line of the head of a source as text."""
    inlines = {"t": "Para", "c": document["meta"][name]["c"]}
    return write({**document, "meta": {}, "blocks": [inlines]}, "plain", wrap="none").strip()


def without_formulas(node):
    """Returns a part of pandoc's document (list, dict or value) without its formulas."""
    if isinstance(node, list):
        return [without_formulas(part) for part in node if not (isinstance(part, dict) and part.get("t") == "Math")]
    return {name: without_formulas(part) for name, part in node.items()} if isinstance(node, dict) else node


def count_words(document):
    """Returns the number of words in paragraphs and lists before the references."""
    text = []
    for block in document["blocks"]:
        if block["t"] == "Header" and block["c"][1][0] == END_OF_TEXT:
            break
        if block["t"] in ("Para", "Plain", "BulletList", "OrderedList", "BlockQuote"):
            text.append(block)
    plain = write({**document, "meta": {}, "blocks": without_formulas(text)}, "plain", wrap="none")
    return sum(any(character.isalpha() for character in word) for word in plain.split())


def markdown(brief, document):
    """Returns the text of `report/<brief>.md`."""
    note = f"<!-- Made from report/{brief}/{sources()[brief].name} by `make reports`; changes belong there. -->"
    head = f"# {metadata(document, 'title')}\n\n*{metadata(document, 'subtitle')}* · [PDF]({brief}.pdf)\n"
    return f"{note}\n\n{head}\n{write(document, 'gfm-raw_html', columns=120)}"


def pdf(document):
    """Returns the bytes of the PDF."""
    source = write(document, "typst-citations", standalone="true", template=REPORT / "template.typ")
    source = source.replace("#figure(image(", FLOATING)
    try:
        return typst.compile(source.encode(), root=str(REPORT), ignore_system_fonts=True, timestamp=CREATED)
    except RuntimeError as error:
        raise UserError(f"Typst: {str(error).splitlines()[0]}") from error


def web_text(path):
    """Returns the LaTeX of the page for the web, with formulas that renderers of Markdown know."""
    text = render(path)[0]
    return text.replace(r"\begin{equation}", r"\[").replace(r"\end{equation}", r"\]")


def latex_files(path):
    """Returns all that the PDF of a source in LaTeX is made from: dict from path to bytes."""
    text, images = render(path, web=False)
    entries = latex.bibliography((REPORT / "references.bib").read_text(), latex.cited(text))
    files = {latex.MAIN: text.encode(), "references.bib": entries.encode()}
    files |= {layout.name: layout.read_bytes() for layout in path.parent.glob("*.sty")}
    return files | {image: (REPORT / image).read_bytes() for image in images}


def latex_pdf(path):
    """Returns the bytes of the PDF of a source in LaTeX: the present one where it is up to date."""
    files, present = latex_files(path), REPORT / f"{path.parent.name}.pdf"
    return present.read_bytes() if latex.is_made_from(present, files) else latex.typeset(files, CREATED)


def build(brief):
    """Returns the text of the Markdown page, the bytes of the PDF, and what `LIMITS` limits, for one report."""
    if brief not in sources():
        raise UserError(f"there is no report/{brief}/{MARKDOWN}; the reports are {', '.join(briefs())}")
    path = sources()[brief]
    place = path.relative_to(REPOSITORY)
    try:
        if path.name == LATEX:
            document, printed = parse(web_text(path), "latex"), latex_pdf(path)
        else:
            document = parse(render(path)[0])
            printed = pdf(document)
    except latex.NoLatexError as error:
        raise type(error)(f"report/{brief}.pdf is older than its source, results or figures, and {error}") from error
    except (jinja2.TemplateError, UserError, RuntimeError) as error:
        if isinstance(error, jinja2.TemplateSyntaxError):
            place = f"{place.with_name(error.name)}, line {error.lineno}"
        raise UserError(f"{place}: {' '.join(str(error).split())}") from error
    reader = pypdf.PdfReader(io.BytesIO(printed))
    pages = latex.pages_of_text(reader) if path.name == LATEX else len(reader.pages)
    sizes = {"words": count_words(document), "pages": pages}
    for name, limit in LIMITS.get(brief, {}).items():
        if sizes[name] > limit:
            raise UserError(f"{brief} has {sizes[name]:,} {name}, more than {limit:,}; shorten {place}")
    return markdown(brief, document), printed, sizes


def main(names):
    """Writes the reports of the briefs `names`, or of all; one that lacks LaTeX is skipped and reported last."""
    skipped = None
    for brief in names or briefs():
        try:
            page, printed, sizes = build(brief)
        except latex.NoLatexError as error:
            skipped = UserError(f"skipped: {error}")
            continue
        for suffix, content in (("md", page.encode()), ("pdf", printed)):
            path = REPORT / f"{brief}.{suffix}"
            if not path.exists() or path.read_bytes() != content:
                with replacing(path) as temporary:
                    temporary.write_bytes(content)
        print(f"report/{brief}.pdf, report/{brief}.md: {sizes['words']:,} words of text, {sizes['pages']} pages")
    if skipped:
        raise skipped


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
