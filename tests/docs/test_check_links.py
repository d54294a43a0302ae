"""The check of the built site finds what leads nowhere."""

import runpy

import pytest

from tests.helpers.snippets import ROOT

CHECK = str(ROOT / "docs/check_links.py")
broken = runpy.run_path(CHECK)["broken"]

GOOD = """<html><body><h1 id="start">Start</h1><a name="old"></a>
<a href="#start">here</a> <a href="#">up</a> <a href="">again</a> <a href="guide/">guide</a>
<a href="guide/index.html#caf%C3%A9">anchor</a> <img src="a%20picture.png?v=1">
<a href="https://example.org/lost#x">elsewhere</a> <a href="mailto:a@example.org">mail</a>
</body></html>"""
GUIDE = '<p id="café"><a href="../index.html#old">back</a></p>'


@pytest.fixture
def site(tmp_path):
    (tmp_path / "guide").mkdir()
    (tmp_path / "index.html").write_text(GOOD, encoding="utf-8")
    (tmp_path / "guide" / "index.html").write_text(GUIDE, encoding="utf-8")
    (tmp_path / "a picture.png").touch()
    return tmp_path


def test_a_whole_site(site):
    (site / "_static").mkdir()
    (site / "_static" / "template.html").write_text("<img src='{{ picture }}'>")
    assert broken(site) == []
    assert broken(site / "lost") == [f"{site}/lost holds no page."]


@pytest.mark.parametrize(
    ("tag", "reason"),
    [
        ('<a href="lost.html">', "there is no such file"),
        ('<a href="guide/lost/">', "there is no such file"),
        ('<a href="#lost">', "that page has no such anchor"),
        ('<a href="guide/#start">', "that page has no such anchor"),
        ('<img src="lost.png">', "there is no such file"),
        ('<script src="_static/lost.js?v=1"></script>', "there is no such file"),
        ('<link href="lost.css" rel="stylesheet">', "there is no such file"),
        ('<video poster="lost.png"></video>', "there is no such file"),
    ],
)
def test_what_leads_nowhere_is_named_with_its_line(site, tag, reason):
    target = tag.split('"')[1]
    (site / "index.html").write_text(f"{GOOD}\n{tag}", encoding="utf-8")
    assert broken(site) == [f"index.html:6: {target}: {reason}"]


@pytest.mark.parametrize(("more", "status"), [("", 0), ('<img src="lost.png">', 1)])
def test_the_status_of_the_program(site, more, status, monkeypatch, capsys):
    (site / "index.html").write_text(GOOD + more, encoding="utf-8")
    monkeypatch.setattr("sys.argv", [CHECK, str(site)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(CHECK, run_name="__main__")
    assert end.value.code == status
    assert ("lost.png" in capsys.readouterr().out) == bool(status)
