"""What of a grid is done and what is missing, and how long that takes."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.records import Results, finished
from benchmarks.accuracy.runs import Run, with_starts
from examples.runs.log import Log, read
from examples.runs.report import table

SECONDS = {16: 18.0, 32: 80.0}  # an epoch of ResNet-8 on one core, by the side of the images


def done(run: Run, results: Results) -> bool:
    """Whether a run need not be trained."""
    return results.find(run) is not None or finished(run)


def epochs_done(run: Run, results: Results) -> int:
    """The epochs that need not be trained again."""
    if done(run, results):
        return run.config.epochs
    checkpoints = Path(run.config.directory).glob("checkpoints/[0-9]*")
    return max((int(path.name) for path in checkpoints if path.name.isdecimal()), default=0)


def seconds_an_epoch(runs: Sequence[Run]) -> float:
    """The median over the epochs that are logged, or else as measured with ResNet-8."""
    logs = [Log(run.config.directory).path for run in runs]
    found = [
        line["seconds"]
        for path in logs
        if path.exists()
        for line in read(path)
        if line["kind"] == "epoch"
    ]
    return statistics.median(found) if found else SECONDS.get(runs[0].config.image_size or 32, 80.0)


def budget(runs: Sequence[Run], results: Results) -> str:
    """What is done and missing, and how long it takes."""
    every = with_starts(runs)
    seconds = seconds_an_epoch(every)
    counts = [epochs_done(run, results) for run in every]
    rows = [
        {
            "run": run.name,
            "epochs": f"{count}/{run.config.epochs}",
            "state": "done" if done(run, results) else "half done" if count else "missing",
        }
        for run, count in zip(every, counts, strict=True)
    ]
    total = sum(run.config.epochs for run in every)
    missing = total - sum(counts)
    return (
        f"{table(rows)}\n\n{len(every)} runs of {total} epochs, {missing} of them missing; at "
        f"{seconds:.1f} s an epoch on one core {missing * seconds / 3600:.1f} of "
        f"{total * seconds / 3600:.1f} hours"
    )
