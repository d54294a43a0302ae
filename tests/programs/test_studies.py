"""A study's file: processes that share it or are killed, and lines that are wrong."""

import os
import re
import signal
import sys

import pytest

from examples.runs import studies
from examples.runs.studies import Study
from tests.helpers import forked

LINES = 12  # of each process


def line(name, revision=1, **more):
    return {"name": name, "revision": revision, **more}


def add(path, first, kill):
    """Adds lines; SIGKILL at the first change to a file that matches a pattern."""

    def hook(event, args):
        if kill and args and re.search(kill, f"{event} {args[0]}"):
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for number in range(first, first + LINES):
        Study(path).add(line(f"run{number:03d}"))


class Adding:
    """A process that adds lines."""

    def __init__(self, path, first, kill=""):
        self.directory = path.parent / f"from-{first}"
        self.directory.mkdir()
        self.process = forked.start(self.directory, add, path, first, kill)

    def ended(self):
        """Its status, and what it said."""
        return forked.ended(self.process), (self.directory / "printed").read_text()


def test_lines_are_in_the_order_of_their_names_and_come_back(tmp_path):
    study = Study(tmp_path / "new" / "study.jsonl")
    assert study.read() == []
    records = [line("a", None, x=[1, 0.1]), line("b", 1), line("b", 2, text="é\u2028"), line("c")]
    for record in reversed(records):
        study.add(record)
    assert study.read() == records
    before = study.path.read_bytes()
    study.add(records[1])  # is there already
    assert study.path.read_bytes() == before
    assert [*study.path.parent.iterdir()] == [study.path]


def test_processes_that_add_lines_at_the_same_time_lose_none(tmp_path):
    path = tmp_path / "study.jsonl"
    processes = [Adding(path, first) for first in (0, 100, 200)]
    assert [process.ended() for process in processes] == [(0, "")] * 3
    expected = {f"run{first + i:03d}" for first in (0, 100, 200) for i in range(LINES)}
    assert [record["name"] for record in Study(path).read()] == sorted(expected)


@pytest.mark.parametrize("moment", ["open .*new", "os.rename .*new"])
def test_a_process_that_is_killed_loses_no_line(tmp_path, moment):
    """And whoever adds lines next is not kept waiting."""
    path = tmp_path / "study.jsonl"
    Study(path).add(line("first"))
    before = path.read_bytes()
    assert Adding(path, 0, moment).ended() == (-signal.SIGKILL, "")
    assert path.read_bytes() == before
    Study(path).add(line("second"))
    assert [record["name"] for record in Study(path).read()] == ["first", "second"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"x": 2', '"x": 3'), "line 2 (b), has been altered"),
        (lambda text: text.replace('"revision": 1, "x": 2', '"revision": 2, "x": 2'), "line 2 (b)"),
        (lambda text: text[:-90], "line 3 (c), cannot be read"),
        (lambda text: text.replace('"name": "b"', '"nam": "b"'), "line 2 (no name), cannot"),
        (lambda text: text.replace("\n", "\n\n", 1), "line 2 (no name), cannot be read"),
        (lambda text: text.replace('"x": 2', '"x": \ud800'), "line 2 (b), cannot be read"),
        (lambda text: text + text.splitlines(True)[0], "has two lines of a: remove one"),
        (lambda text: text + "[1]\n", "line 4 (no name), cannot be read"),
    ],
)
def test_wrong_lines_are_named(tmp_path, change, message):
    study = Study(tmp_path / "study.jsonl")
    for x, name in enumerate("abc", start=1):
        study.add(line(name, x=x))
    study.path.write_text(change(study.path.read_text()), errors="surrogatepass")
    before = study.path.read_bytes()
    for action in (study.read, lambda: study.add(line("d"))):
        with pytest.raises(ValueError, match=re.escape(str(study.path))) as error:
            action()
        assert message in str(error.value)
    assert study.path.read_bytes() == before


def test_another_line_of_the_same_run_is_refused(tmp_path):
    study = Study(tmp_path / "study.jsonl")
    study.add(line("a", x=1))
    with pytest.raises(ValueError, match="holds another line of a: remove one of the two"):
        study.add(line("a", x=2))
    study.add(line("a", 2, x=2))
    assert [record["x"] for record in study.read()] == [1, 2]


def test_lines_of_other_revisions_are_named(monkeypatch):
    records = [line("a"), line("b", None), line("c", 2)]
    assert studies.other_revisions(records[:2]) == ""
    assert studies.other_revisions(records).endswith("(1): c (revision 2).")
    monkeypatch.setattr(studies, "REVISION", 2)
    assert [record["name"] for record in records if studies.current(record)] == ["b", "c"]
