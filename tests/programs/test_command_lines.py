"""The command line of every program: what `--help` shows, and what follows a misspelt option."""

import re
import runpy
import sys

import pytest

from brelax_jax._command_line import Parser
from tests.programs.test_extras import PROGRAMS

PROGRAMS = ["brelax_jax", *PROGRAMS]


@pytest.fixture
def ended(monkeypatch, capsys):
    """The status, the output and the errors of a program that stops at its command line."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def start(program, *arguments):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_module(program, run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return start


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_help_and_a_misspelt_option(program, ended):
    status, shown, errors = ended(program, "--help")
    assert (status, errors) == (0, "")
    assert re.search(rf"\nexamples:\n  python -m {re.escape(program)}\b", shown)
    needed = ["info", "network"] if program == "brelax_jax" else []
    status, shown, errors = ended(program, *needed, "--hepl")
    assert (status, shown) == (2, "")
    assert errors.startswith("unknown option --hepl: did you mean --help?\n")
    assert len(errors.splitlines()) == 2


@pytest.fixture
def parser():
    parser = Parser("program", "What it does:\n  two lines.", "--epochs 3", "--seeds 1 2 --quiet")
    parser.group("training").add_argument("--epochs", type=int, default=10, help="passes")
    parser.group("training").add_argument("--seeds", nargs="+", default=[0, 1], help="of 100 %%")
    parser.group("training").add_argument("--start", type=int, default=0, help="first one")
    parser.group("output").add_argument("--quiet", action="store_true", help="no bar")
    parser.group("output").add_argument("--name", help="of a file")
    return parser


def test_help_has_groups_defaults_and_examples(parser, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = parser.format_help()
    assert "What it does:\n  two lines." in shown
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    start = lines.index("training:")
    assert lines[start:] == [
        "training:",
        "--epochs EPOCHS passes [10]",
        "--seeds SEEDS [SEEDS ...] of 100 % [0 1]",
        "--start START first one [0]",
        "",
        "output:",
        "--quiet no bar",
        "--name NAME of a file",
        "",
        "examples:",
        "python -m program --epochs 3",
        "python -m program --seeds 1 2 --quiet",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epoch", "3"], "unknown option --epoch: did you mean --epochs?"),
        (["--epoch=3"], "unknown option --epoch: did you mean --epochs?"),
        (["--seed", "3"], "unknown option --seed: did you mean --seeds?"),
        (["--xyz"], "unknown option --xyz"),
        (["quiet"], "unexpected argument quiet: did you mean --quiet?"),
        (["--epochs", "many"], "argument --epochs: invalid int value: 'many'"),
    ],
)
def test_errors_say_what_was_meant(parser, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(arguments)
    assert end.value.code == 2
    found = capsys.readouterr().err
    assert found == f"{message}\npython -m program --help lists the options.\n"


def test_what_is_right_is_parsed(parser):
    options = parser.parse_args(["--epochs", "3"])
    assert (options.epochs, options.seeds, options.quiet) == (3, [0, 1], False)
