"""Methods × sets × seeds on CIFAR-10, equal in all but the method: `python -m benchmarks.accuracy`.

Every run starts from the float run of its seed, which is trained first. A run is a directory in
runs/accuracy, with a checkpoint an epoch, and in the end a small JSON in results/accuracy: so a
grid that is interrupted, anywhere, goes on with the same command. Several processes may share the
work, best with seeds of their own. `--report` draws tables and plots from the JSONs alone.
"""

import argparse
import contextlib
import fcntl
import functools
import re
import statistics
import sys
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from benchmarks.accuracy.records import collect, finished, read_record, write_record
from benchmarks.accuracy.report import report, study
from benchmarks.accuracy.runs import (
    BASE,
    MAIN,
    METHODS,
    SETS,
    Run,
    make_run,
    parse_changes,
    with_starts,
)
from examples.runs.log import Log, read
from examples.runs.progress import Progress
from examples.runs.report import table
from examples.train.config import Config
from examples.train.data.load import Data, load
from examples.train.loop import run as train

SECONDS = {16: 18.0, 32: 80.0}  # an epoch of ResNet-8 on one core, by the side of the images
Load = Callable[[], Data]


def plan(options: argparse.Namespace, base: Config = BASE) -> list[Run]:
    """The runs that the options name, all of a seed before the next.

    Raises:
      ValueError: if a name is not known.
    """
    if unknown := [name for name in options.methods if name not in METHODS]:
        raise ValueError(f"Unknown method {unknown[0]!r}. Known: {', '.join(METHODS)}.")
    changes = {"granularity": options.granularity, **parse_changes(options.override)}
    runs = [
        make_run(base, method, word, seed, options.epochs, changes, options.runs)
        for seed in options.seeds
        for word in options.sets
        for method in options.methods
    ]
    return list({run.name: run for run in runs}.values())


class Grid:
    """Trains runs, each once, whoever else is at work in the same directories.

    Args:
      results: the directory of the JSONs.
      data: loads the data.
      progress: where lines go.
    """

    def __init__(self, results: str, data: Load, progress: Progress) -> None:
        self.results, self.data, self.progress = Path(results), data, progress

    def work(self, runs: Sequence[Run]) -> list[Run]:
        """Trains what is not done; returns the runs that other processes are still at work on."""
        left, before = list(runs), len(runs) + 1
        while left and len(left) < before:  # what was taken may have been left half done
            before = len(left)
            left = [run for run in left if not self.settle(run)]
        return left

    def settle(self, run: Run, weights: bool = False) -> bool:
        """Whether there is the JSON of a run, and its weights if they are needed, after training it
        if need be; not if another process is at work on it or on its float start.
        """
        if self._done(run, weights):
            return True
        if run.start is not None and not self.settle(run.start, weights=not finished(run)):
            return False
        with claimed(run) as ours:
            if not ours:
                self.progress.line(f"{run.name}: another process is at work on it")
            elif not self._done(run, weights):
                self._train(run)
        return ours

    def _done(self, run: Run, weights: bool) -> bool:
        path = self.results / f"{run.name}.json"
        if not path.exists():
            return False
        read_record(path, run)
        return finished(run) or not weights

    def _train(self, run: Run) -> None:
        if not finished(run):
            self.progress.line(run.name)
            train(run.config, self.data(), self.progress, resume=True)
        record = collect(run)
        path = self.results / f"{run.name}.json"
        if not path.exists():
            write_record(path, record)
        end = "diverged" if record["diverged"] else f"test {record['test_deployed']:.2%}"
        self.progress.line(f"{run.name}: {end}, written: {path}")


@contextlib.contextmanager
def claimed(run: Run) -> Generator[bool, None, None]:
    """Whether the run is this process's alone, until the end of the block or of the process."""
    directory = Path(run.config.directory)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def done(run: Run, results: str) -> bool:
    """Whether a run need not be trained."""
    return (Path(results) / f"{run.name}.json").exists() or finished(run)


def epochs_done(run: Run, results: str) -> int:
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


def budget(runs: Sequence[Run], results: str) -> str:
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = functools.partial(parser.add_argument, nargs="+")
    add("--methods", default=MAIN, metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--sets", default=tuple(SETS), metavar="NAME", help=f"{', '.join(SETS)}, or others")
    add("--seeds", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--epochs", type=int, default=10, metavar="N", help="of every run [10]")
    parser.add_argument("--granularity", default="tensor", help="weights that share a scale")
    add("--override", default=[], metavar="NAME=VALUE", help="settings of every run")
    parser.add_argument("--runs", default="runs/accuracy", metavar="DIRECTORY")
    parser.add_argument("--results", default="results/accuracy", metavar="DIRECTORY")
    parser.add_argument("--budget", action="store_true", help="only say what is done and missing")
    parser.add_argument("--report", action="store_true", help="only draw the table and the plots")
    parser.add_argument(
        "--study", action="store_true", help="only tabulate all JSONs by validation accuracy"
    )
    parser.add_argument("--docs", default="docs", metavar="DIRECTORY", help="where the report goes")
    parser.add_argument("--quiet", action="store_true", help="no progress bar: a line an epoch")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None, base: Config = BASE) -> int:
    """Runs the program; returns its exit status."""
    options = parse(arguments)
    try:
        runs = plan(options, base)
        if options.budget:
            print(budget(runs, options.results))
        elif options.study:
            print(study(options.results, base, options.docs))
        elif options.report:
            print(report(runs, options.results, options.docs, tag(options)))
        else:
            run_grid(runs, options)
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on.", file=sys.stderr)
        return 130
    return 0


def tag(options: argparse.Namespace) -> str:
    """What the report is of, for its place on the page and its pictures' names."""
    words = [] if options.granularity == "tensor" else [options.granularity]
    words = [f"{options.epochs}ep", *words, *options.override]
    return re.sub(r"[^\w.]+", "-", "-".join(words))


def run_grid(runs: Sequence[Run], options: argparse.Namespace) -> None:
    """Trains what is missing."""
    config = runs[0].config
    settings = (config.dataset, config.image_size, config.validation, config.train_examples)
    data = functools.cache(
        lambda: load(*settings, progress=not options.quiet, stream=config.stream)
    )
    missing = [run for run in with_starts(runs) if not done(run, options.results)]
    images = [run.config.epochs * run.config.images_per_epoch(len(data().train)) for run in missing]
    progress = Progress(sum(images), quiet=options.quiet)
    grid = Grid(options.results, data, progress)
    left = grid.work(runs)
    progress.close()
    print(f"{len(runs) - len(left)} of {len(runs)} runs are done.")
    if left:
        print("At work elsewhere: " + ", ".join(run.name for run in left))


if __name__ == "__main__":
    sys.exit(main())
