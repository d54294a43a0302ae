"""The grid at work: runs that are trained each once, by one process or several."""

import contextlib
import fcntl
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

from benchmarks.accuracy.records import Results, collect, finished
from benchmarks.accuracy.runs import Run
from benchmarks.accuracy.together import teams, train_together
from examples.runs.progress import Progress
from examples.train.data.load import Data
from examples.train.loop import run as train

Load = Callable[[], Data]


class Grid:
    """Trains runs, each once, whoever else is at work in the same directories.

    Args:
      results: where the runs' lines go.
      data: loads the data.
      progress: where lines go.
    """

    def __init__(self, results: Results, data: Load, progress: Progress) -> None:
        self.results, self.data, self.progress = results, data, progress

    def work(self, runs: Sequence[Run]) -> list[Run]:
        """Trains what is not done; returns the runs that other processes are still at work on."""
        left, before = list(runs), len(runs) + 1
        while left and len(left) < before:  # what was taken may have been left half done
            before = len(left)
            left = [run for run in left if not self.settle(run)]
        return left

    def work_together(self, runs: Sequence[Run]) -> list[Run]:
        """As `work`, but what can be trained together is, all float starts before the others."""
        missing = [run for run in runs if not self._done(run, weights=False)]
        starts = [run.start for run in missing if run.start and not finished(run)]
        for team in teams(list(dict.fromkeys(starts))) + teams(missing):
            with contextlib.ExitStack() as stack:
                ours = [run for run in team if stack.enter_context(claimed(run))]
                # A start that is not there is another process's.
                ours = [run for run in ours if run.start is None or finished(run.start)]
                if fresh := [run for run in ours if not finished(run)]:
                    self.progress.line(f"{fresh[0].name} and {len(fresh) - 1} like it")
                    train_together(fresh, self.data(), self.progress)
                for run in ours:
                    self._collect(run)
        return [run for run in runs if not self._done(run, weights=False)]

    def settle(self, run: Run, weights: bool = False) -> bool:
        """Whether there is the line of a run, and its weights if they are needed, after training it
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
        return self.results.find(run) is not None and (finished(run) or not weights)

    def _train(self, run: Run) -> None:
        if not finished(run):
            self.progress.line(run.name)
            train(run.config, self.data(), self.progress, resume=True)
        self._collect(run)

    def _collect(self, run: Run) -> None:
        record = collect(run)
        if self.results.find(run) is None:
            self.results.add(record)
        end = "diverged" if record["diverged"] else f"test {record['test_deployed']:.2%}"
        self.progress.line(f"{run.name}: {end}, written: {self.results.study(record).path}")


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
