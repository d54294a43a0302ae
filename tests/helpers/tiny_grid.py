"""A grid of the accuracy benchmark that takes seconds, in the working directory."""

from pathlib import Path

from benchmarks.accuracy import __main__ as accuracy
from examples.train.config import Config
from tests.helpers.killed import TINY

TINY_BASE = Config(
    dataset="digits", model=TINY, train_examples=96, batch=32, epochs=1, method="float",
    augment=False, statistics_batches=2, metrics_every=0, lam_schedule="geometric",
)  # fmt: skip
RUNS, RESULTS, PAGE = Path("runs/accuracy"), Path("results/accuracy"), Path("docs/accuracy.md")
START, CONNECT, PARQ = "float-seed0", "binary-binary_connect-2ep-seed0", "binary-parq-2ep-seed0"
OPTIONS = ["--quiet", "--epochs=2", "--seeds", "0", "--sets", "binary"]
OPTIONS += ["--methods", "binary_connect", "parq"]


def grid(*more, base=TINY_BASE):
    return accuracy.main([*OPTIONS, *more], base)


def json_of(name):
    return RESULTS / f"{name}.json"


def table_of(text):
    """The rows of the first Markdown table."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
