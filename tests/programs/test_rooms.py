"""The programs' files and folders: imports go one way."""

import ast
import graphlib
from pathlib import Path

import pytest

import examples

ROOT = Path(examples.__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for folder in ("examples", "benchmarks")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
}


def imported(path):
    """The files of the programs that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            yield from FILES.keys() & {*names}


GRAPH = {name: {*imported(path)} for name, path in FILES.items()}


def room(name):
    """The folder of a file; what is in no folder of its own is a program."""
    folder = name.rpartition(".")[0]
    return name if folder in ("examples", "benchmarks") else folder


def test_no_imports_in_a_circle():
    graphlib.TopologicalSorter(GRAPH).prepare()
    rooms = {room(name): set() for name in GRAPH}
    for name, others in GRAPH.items():
        rooms[room(name)] |= {room(other) for other in others} - {room(name)}
    assert rooms["examples.train"] == {"examples.runs", "examples.train.data"}
    graphlib.TopologicalSorter(rooms).prepare()


@pytest.mark.parametrize(
    ("start", "allowed"),
    [
        ("examples.runs", ("examples.runs",)),
        ("examples.train", ("examples.train", "examples.runs")),
        ("examples.language_model", ("examples.language_model", "examples.runs")),
        ("examples", ("examples",)),
    ],
)
def test_what_is_shared_knows_no_program(start, allowed):
    for name, others in GRAPH.items():
        if name.startswith(start):
            assert all(other.startswith(allowed) for other in others), name


def test_no_file_imports_a_program():
    programs = {name for name in FILES if name.endswith("__main__")}
    assert {name for name, others in GRAPH.items() if others & programs} == set()
