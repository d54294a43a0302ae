"""A language model in few bits: a small Llama that writes Shakespeare, character by character.

For each seed it trains a float network. Others start from its weights: a float one with as many
further steps, and for each set one whose kernels end on it by BinaryRelax and one by BinaryConnect.
The float network that is rounded at once is compared too. At the end it prints bits per character
(fewer are better), and what each network writes.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brelax_jax._command_line import Parser
from examples.language_model import llama_cpp
from examples.language_model.config import Settings
from examples.language_model.report import row
from examples.language_model.seeds import Seed, train_missing
from examples.language_model.text import load
from examples.language_model.trainer import Trainer
from examples.runs.progress import Progress
from examples.runs.report import table
from examples.runs.settings import flag
from examples.runs.studies import other_revisions

METAVARS: dict[Any, str] = {int: "N", float: "X", tuple: "SET"}


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """The settings, and the options beside them (`seeds`, `out`, `resume`, …)."""
    parser = Parser(
        "examples.language_model", __doc__, "--seeds 0 1 2", "--steps 200 --further-steps 200"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="seeds of the runs"
    )
    parser.add_argument("--out", default="runs/language-model", help="directory of the runs")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    parser.add_argument(
        "--export-gguf",
        type=Path,
        metavar="FILE",
        help="write the first seed's BinaryRelax networks as files for llama.cpp",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    for field in dataclasses.fields(Settings):
        choices, several = field.metadata["choices"], isinstance(field.default, tuple)
        parser.group(field.metadata["group"]).add_argument(
            flag(field.name),
            type=str if several else type(field.default),
            nargs="+" if several else None,
            default=field.default,
            choices=choices,
            metavar=None if choices else METAVARS[type(field.default)],
            help=field.metadata["help"],
        )
    given = parser.parse_args(arguments)
    given.sets = tuple(given.sets)
    settings = Settings(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Settings)})
    try:
        settings.check()
        if min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
            raise ValueError(f"--seeds must be different numbers from 0 on, got {given.seeds}.")
        if given.export_gguf:
            llama_cpp.check(settings)
    except ValueError as error:
        parser.error(str(error))
    return settings, given


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    settings, options = parse(arguments)
    try:
        trainer = Trainer(settings, load())
        kept = [Seed(options.out, seed, settings, options.resume) for seed in options.seeds]
        steps = sum(network.steps for network in trainer.networks.values())
        progress = Progress(len(kept) * steps, options.quiet, unit="step")
        train_missing(trainer, kept, progress)
        runs = [each.results for each in kept]
        progress.close()
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print("\nBits per character; mean and standard deviation over the seeds:\n")
    print(table([row(name, runs) for name in trainer.networks]))
    prompt = trainer.text.decode(trainer.text.validation[: settings.context])
    print(f"\nHow each network of seed {kept[0].seed} goes on after {prompt!r}:")
    for name in trainer.networks:
        print(f"\n--- {name}\n{runs[0][name]['sample']}")
    print(f"\nwritten: {kept[0].study.path}, and beside it the params")
    if options.export_gguf:
        print(llama_cpp.exported(trainer, kept[0], options.export_gguf))
    if left_out := other_revisions([line for each in kept for line in each.other_revisions]):
        print(left_out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
