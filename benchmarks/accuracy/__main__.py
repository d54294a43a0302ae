"""Compares methods, sets and seeds on CIFAR-10: `python -m benchmarks.accuracy`.

Runs differ only in the method. Each starts from the float run of its seed, which is trained first.
A run is a directory in runs/accuracy with a checkpoint for each epoch, and at the end one line in
the file of its study in results/accuracy. If it is interrupted, the same command goes on. Several
processes may share the work, best with different seeds. `--report` draws tables and plots from the
lines alone. JSON files of one run each, as earlier versions wrote them, become such lines.
"""

import argparse
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.accuracy.budget import budget, done
from benchmarks.accuracy.grid import Grid
from benchmarks.accuracy.learned import scales_are_learned
from benchmarks.accuracy.records import Results
from benchmarks.accuracy.report import report, study
from benchmarks.accuracy.runs import BASE, MAIN, METHODS, SETS, Run, plan, with_starts
from brelax_jax._command_line import Parser
from examples.runs.progress import Progress
from examples.train.config import Config
from examples.train.data.load import load


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(
        "benchmarks.accuracy",
        __doc__,
        "--sets ternary --seeds 0 --epochs 5",
        "--override warm_start=none",
        "--report",
    )
    grid = parser.group("which runs")
    add = functools.partial(grid.add_argument, nargs="+")
    add("--methods", default=MAIN, metavar="NAME", help=f"of {', '.join(METHODS)}")
    add("--sets", default=tuple(SETS), metavar="NAME", help=f"{', '.join(SETS)}, or others")
    add("--seeds", type=int, default=[0, 1, 2], metavar="N", help="one float run for each")
    grid.add_argument("--epochs", type=int, default=10, metavar="N", help="epochs of every run")
    add("--learning-rates", type=float, default=[], metavar="X", help=f"instead of {BASE.lr:g}")
    grid.add_argument("--granularity", default="tensor", help="weights that share a scale")
    add("--override", default=[], metavar="NAME=VALUE", help="settings of every run")
    grid.add_argument(
        "--together",
        action="store_true",
        help="train runs that differ only in seed and learning rate as one program, for a GPU",
    )
    grid.add_argument(
        "--learn-scales",
        type=float,
        metavar="X",
        help="train the scales too, as LSQ does, at X times the learning rate of the weights; give "
        "--runs and --results too",
    )
    add = functools.partial(parser.group("in place of training").add_argument, action="store_true")
    add("--budget", help="only say what is done and missing")
    add("--report", help="only draw the table and the plots")
    add("--study", help="only tabulate all runs by validation accuracy")
    output = parser.group("output")
    add = functools.partial(output.add_argument, metavar="DIRECTORY")
    add("--runs", default="runs/accuracy", help="logs and checkpoints")
    add("--results", default="results/accuracy", help="a line for each run")
    add("--docs", default="docs", help="where the report goes")
    output.add_argument("--quiet", action="store_true", help="no progress bar: a line an epoch")
    options = parser.parse_args(arguments)
    shared = [n for n in ("runs", "results") if getattr(options, n) == parser.get_default(n)]
    if options.learn_scales is not None and shared:
        parser.error(
            f"--learn-scales needs a directory of its own: give --{shared[0]}. The settings of a "
            "run do not say that its scales are learned."
        )
    return options


def main(arguments: Sequence[str] | None = None, base: Config = BASE) -> int:
    """Runs the program; returns its exit status."""
    options = parse(arguments)
    try:
        runs = plan(options, base)
        results = Results(options.results)
        results.import_jsons()
        if options.budget:
            print(budget(runs, results))
        elif options.study:
            place = "-".join([*of_results(options), "study"])
            print(study(results, base, options.docs, place))
        elif options.report and len(options.learning_rates) > 1:
            raise ValueError(
                f"A report is of one learning rate, got {options.learning_rates}: give one."
            )
        elif options.report:
            print(report(runs, results, options.docs, tag(options)))
        else:
            with scales_are_learned(options.learn_scales):
                run_grid(runs, results, options.quiet, options.together)
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on.", file=sys.stderr)
        return 130
    return 0


def tag(options: argparse.Namespace) -> str:
    """What the report is of, for its place on the page and its pictures' names."""
    words = [*of_results(options), f"{options.epochs}ep"]
    if options.granularity != "tensor":
        words.append(options.granularity)
    words += [f"lr{rate:g}" for rate in options.learning_rates] + options.override
    return re.sub(r"[^\w.]+", "-", "-".join(words))


def of_results(options: argparse.Namespace) -> list[str]:
    """The directory of the results as a word of a name, if it is not the usual one."""
    directory = Path(options.results).name
    return [] if directory == "accuracy" else [directory]


def run_grid(runs: Sequence[Run], results: Results, quiet: bool, together: bool) -> None:
    """Trains what is missing."""
    config = runs[0].config
    settings = (config.dataset, config.image_size, config.validation, config.train_examples)
    data = functools.cache(lambda: load(*settings, progress=not quiet, stream=config.stream))
    missing = [run for run in with_starts(runs) if not done(run, results)]
    images = [run.config.epochs * run.config.images_per_epoch(len(data().train)) for run in missing]
    progress = Progress(sum(images), quiet=quiet)
    grid = Grid(results, data, progress)
    left = grid.work_together(runs) if together else grid.work(runs)
    progress.close()
    print(f"{len(runs) - len(left)} of {len(runs)} runs are done.")
    if left:
        print("At work elsewhere: " + ", ".join(run.name for run in left))


if __name__ == "__main__":
    sys.exit(main())
