"""The Python snippets of the README and of the pages in docs/, and the cells of its notebooks."""

import functools
import re
import warnings
from pathlib import Path

from tests.helpers import quick

quick.install()

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
)
GALLERY = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("docs/gallery/*.md"))
SNIPPET = re.compile(r"^```(?:python|\{code-cell\}(?:\n:[^\n]*)*)\n(.*?)^```$", re.M | re.S)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def snippets(page):
    """Each snippet of a page, with the number of lines above it."""
    text = read(page)
    return [(text.count("\n", 0, found.start(1)), found[1]) for found in SNIPPET.finditer(text)]


def prose(page):
    """What is left of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", read(page), flags=re.M | re.S)


@functools.cache
def run(page):
    """Runs a page's snippets, one after the other, and returns the names that they define.

    Tracebacks show the lines of the page.
    """
    names = {}
    for lines_above, snippet in snippets(page):
        exec(compile("\n" * lines_above + snippet, ROOT / page, "exec"), names)
    return names


def run_strictly(page):
    """Warnings are errors."""
    warnings.simplefilter("error")
    run(page)
