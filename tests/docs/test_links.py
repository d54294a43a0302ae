"""What the README and the other pages refer to is there."""

import re

import pytest

from tests.helpers.snippets import ROOT, prose

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
FOLDERS = "benchmarks|brelax_jax|docs|examples|results|tests"


def anchors(page):
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ +(.*?) *$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_images(page):
    targets = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", prose(page))
    for target in map("".join, targets):
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists(), f"{page} links to {target}"
        if anchor:
            name = found.resolve().relative_to(ROOT).as_posix()
            assert anchor in anchors(name), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named(page):
    for path in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", prose(page)):
        assert (ROOT / path).exists(), f"{page} names {path}"
