"""Typesets a report that is written in LaTeX, with latexmk, where a TeX distribution is installed.

A PDF carries the checksum of all that it was made from, so that a PDF that is up to date is recognised without LaTeX.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pypdf

from common.errors import UserError

INSTALL = "apt-get install latexmk texlive-latex-extra texlive-fonts-recommended"
MAIN, CHECKSUM, END_OF_TEXT = "paper.tex", "/SourceChecksum", "end-of-text"
# No dates, no random identifier and no version of TeX: the same source gives the same bytes.
HEAD = r"\pdfinfoomitdate=1 \pdftrailerid{} \pdfsuppressptexinfo=-1 \pdfinfo{%s (%s)}"
SECONDS = 180  # after which TeX counts as stuck
TROUBLE = re.compile(r"(Reference|Citation) `([^']+)'.*undefined|(Font shape) `([^']+)' undefined")


class NoLatexError(UserError):
    """The PDF has to be made anew and LaTeX is not installed."""


def cited(text):
    """Returns the keys of all citations in a LaTeX source, in order and once each."""
    groups = re.findall(r"\\cite[a-z]*\*?(?:\[[^\]]*\])*\{([^}]*)\}", text)
    return list(dict.fromkeys(key.strip() for group in groups for key in group.split(",")))


def bibliography(text, keys):
    """Returns the entries of a BibTeX file that have one of the `keys`; raises `UserError` where one is missing."""
    entries = {
        re.match(r"@\w+\{([^,\s]+)", entry)[1]: entry for entry in re.split(r"^(?=@\w+\{)", text, flags=re.M)[1:]
    }
    if missing := [key for key in keys if key not in entries]:
        raise UserError(f"references.bib has no {', '.join(missing)}")
    return "\n".join(entries[key].strip() for key in keys) + "\n"


def checksum(files):
    """Returns the SHA-256 of a dict from path to bytes."""
    known = hashlib.sha256()
    for name, content in sorted(files.items()):
        known.update(f"{name} {len(content)}\n".encode() + content)
    return known.hexdigest()


def is_made_from(path, files):
    """Returns whether the PDF at `path` was made from `files`."""
    try:
        return (pypdf.PdfReader(path).metadata or {}).get(CHECKSUM) == checksum(files)
    except (OSError, pypdf.errors.PyPdfError):  # there is none, or it is damaged
        return False


def pages_of_text(reader):
    """Returns the number of pages before the references, the last of which may hold some of them."""
    destination = reader.named_destinations[END_OF_TEXT]
    return reader.get_destination_page_number(destination) + 1


def typeset(files, created):
    """Returns the bytes of the PDF.

    Args:
        files: dict from path, of which one is `MAIN`, to bytes.
        created: seconds since 1970 that TeX takes for the time.

    Raises `UserError` where LaTeX is missing or stops, or where something that the text refers to does not exist.
    """
    if not shutil.which("latexmk"):
        raise NoLatexError(f"LaTeX is missing; install it ({INSTALL}) or keep the committed PDF")
    head = HEAD % (CHECKSUM, checksum(files))
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        # On the first line, so that TeX counts lines as the source does.
        Path(folder, MAIN).write_bytes(head.encode() + files[MAIN])
        command = ["latexmk", "-norc", "-pdf", "-silent", "-interaction=nonstopmode", "-halt-on-error", MAIN]
        environment = os.environ | {
            "SOURCE_DATE_EPOCH": str(created),
            "FORCE_SOURCE_DATE": "1",
            "max_print_line": "999",
        }
        options = {"cwd": folder, "env": environment, "stdin": subprocess.DEVNULL, "capture_output": True}
        try:
            done = subprocess.run(command, timeout=SECONDS, check=False, **options)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"LaTeX has not ended after {SECONDS} seconds") from error
        log = Path(folder, MAIN).with_suffix(".log")
        trouble = problem(log.read_text("utf-8", errors="replace") if log.exists() else "")
        printed = Path(folder, MAIN).with_suffix(".pdf")
        if trouble or done.returncode or not printed.exists():
            raise UserError(f"LaTeX: {trouble or f'latexmk ended with {done.returncode}'}")
        return printed.read_bytes()


def problem(log):
    """Returns what TeX complains about first (str), or None."""
    if error := re.search(r"^! (.+?)\n(?:.*\n)*?l\.(\d+)", log, re.M):
        return f"{error[1]} (line {error[2]} of the filled-in source)"
    if warning := TROUBLE.search(log):
        return f"there is no {(warning[1] or warning[3]).lower()} {warning[2] or warning[4]}"
