"""Programs that are started without the packages of their extra: one line says what to install."""

import contextlib
import importlib.abc
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import examples

ROOT = Path(examples.__file__).parents[1]
PROGRAMS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for folder in ("examples", "benchmarks")
    for path in [*(ROOT / folder).glob("*.py"), *(ROOT / folder).glob("*/__main__.py")]
    if path.name != "__init__.py"
)
ABSENT = {
    "PIL", "array_record", "flax", "importlib_resources", "matplotlib", "orbax", "sklearn",
    "tensorboardX", "tensorflow", "tensorflow_datasets", "torch", "torchao", "tqdm",
}  # fmt: skip


class Absent(importlib.abc.MetaPathFinder):
    """Hides packages, as if they were not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def python(*arguments, path=""):
    """A process of this interpreter, with a path that comes before the repository's."""
    environment = os.environ | {"PYTHONPATH": f"{path}{os.pathsep}{ROOT}"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_program_names_its_extra_in_one_line():
    ended = python("-m", "tests.programs.test_extras", *PROGRAMS)
    printed = json.loads(ended.stdout)
    assert printed.keys() == {*PROGRAMS}
    assert {"examples.train", "examples.two_dimensions", "benchmarks.accuracy"} < printed.keys()
    help_text = printed.pop("examples.experiments")  # needs none
    assert help_text.startswith("usage: python -m examples.experiments")
    assert help_text.endswith("status 0")
    for program, text in printed.items():
        package, _, remedy = text.partition(" is missing: ")
        assert package in ABSENT, program
        assert remedy == 'in a clone, pip install ".[examples]"\n', program


def test_the_status_is_that_of_an_error(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['flax'] = None  # as if it were not installed\n"
    )
    ended = python("-m", "benchmarks.accuracy", "--help", path=tmp_path)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == 'flax is missing: in a clone, pip install ".[examples]"\n'


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("gguf", "export"),
        ("libtpu", "tpu"),
        ("tensorflow.data", "prepare"),
        ("torch", "parq"),
        ("torchao.prototype", "parq"),
        ("xllamacpp", "export-test"),
    ],
)
def test_other_extras(name, extra, capsys):
    error = ModuleNotFoundError(f"No module named {name!r}", name=name)
    examples.name_extra(type(error), error, None)
    package = name.partition(".")[0]
    assert (
        capsys.readouterr().err == f'{package} is missing: in a clone, pip install ".[{extra}]"\n'
    )


@pytest.mark.parametrize(
    "error",
    [
        ValueError("wrong"),
        ModuleNotFoundError("No module named 'fcntl'", name="fcntl"),  # not on every system
        ModuleNotFoundError("No module named 'examples.lost'", name="examples.lost"),
    ],
)
def test_other_errors_are_reported_as_ever(error, monkeypatch):
    reported = []
    monkeypatch.setattr(examples, "report_error", lambda *args: reported.append(args))
    examples.name_extra(type(error), error, None)
    assert reported == [(type(error), error, None)]


def shown(program):
    """What a program shows when it is asked for help."""
    output = io.StringIO()
    sys.argv = [program, "--help"]
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            output.write(f"status {end.code}")
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
    return output.getvalue()


if __name__ == "__main__":
    sys.meta_path.insert(0, Absent())
    print(json.dumps({program: shown(program) for program in sys.argv[1:]}))
