"""The notebooks of docs/gallery: `make docs` runs them, and so does `make soak`."""

import re

import matplotlib.pyplot as plt
import pytest

from tests.helpers.snippets import GALLERY, ROOT, prose, read, run, snippets

INDEX = (ROOT / "docs/index.rst").read_text(encoding="utf-8")
NEEDED = {"docs/gallery/collapse.md": "IPython"}  # beside the extra `test`


@pytest.mark.parametrize("page", GALLERY)
def test_a_notebook_is_whole(page):
    """It is on the site, its cells are found and compile, and its pictures are described."""
    assert re.search(rf"^   {page.removeprefix('docs/').removesuffix('.md')}$", INDEX, re.M)
    assert read(page).startswith("---\nfile_format: mystnb\n")
    fences = re.findall(r"^```.*$", read(page), re.M)
    assert fences == ["```{code-cell}", "```"] * len(snippets(page))
    for lines_above, cell in snippets(page):
        compile("\n" * lines_above + cell, ROOT / page, "exec")
        assert max(map(len, cell.splitlines())) <= 100
        if "plt.subplots" in cell or "plt.figure" in cell:
            assert "image: {alt: " in read(page).splitlines()[lines_above - 1]
    assert "](../" in prose(page), "no page says how to do this"


@pytest.mark.soak
@pytest.mark.parametrize("page", GALLERY)
def test_a_notebook_runs(page, monkeypatch, capsys):
    if page in NEEDED:
        pytest.importorskip(NEEDED[page])
    monkeypatch.chdir((ROOT / page).parent)
    with plt.rc_context():
        run(page)
    assert plt.get_fignums(), "it draws nothing"
    plt.close("all")
    assert "False" not in capsys.readouterr().out
