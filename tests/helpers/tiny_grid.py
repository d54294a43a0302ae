"""A grid of the accuracy benchmark that takes seconds, in the working directory."""

from pathlib import Path

from benchmarks.accuracy import __main__ as accuracy
from benchmarks.accuracy import runs
from benchmarks.accuracy.records import Results
from examples.train.config import Config
from tests.helpers.killed import TINY

TINY_BASE = Config(
    dataset="digits", model=TINY, train_examples=96, batch=32, epochs=1, method="float",
    augment=False, statistics_batches=2, metrics_every=0, lam_schedule="geometric",
)  # fmt: skip
RUNS, RESULTS = Path("runs/accuracy"), Path("results/accuracy")
PAGE = Path("docs/accuracy_tables.md")
START, CONNECT, PARQ = "float-seed0", "binary-binary_connect-2ep-seed0", "binary-parq-2ep-seed0"
OPTIONS = ["--quiet", "--epochs=2", "--seeds", "0", "--sets", "binary"]
OPTIONS += ["--methods", "binary_connect", "parq"]


def grid(*more, base=TINY_BASE):
    return accuracy.main([*OPTIONS, *more], base)


def plan(*more, base=TINY_BASE):
    return runs.plan(accuracy.parse([*OPTIONS, *more]), base)


def lines():
    """The lines of all runs by their names."""
    return {record["name"]: record for record in Results(RESULTS).every()}


def study_of(name):
    """The file that a run's line is in."""
    return Results(RESULTS).study(lines()[name]).path


def drop(name):
    """Takes a run's line out of its study; returns it."""
    record, path = lines()[name], study_of(name)
    kept = [text for text in path.read_text().splitlines(True) if f'"name": "{name}"' not in text]
    path.write_text("".join(kept))
    return record


def table_of(text):
    """The rows of the first Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
