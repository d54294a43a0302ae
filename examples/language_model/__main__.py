"""A ternary language model: a small transformer that writes Shakespeare, character by character.

For each seed a float network is trained. From its weights start a network whose kernels become
ternary by BinaryRelax, one scale for each output channel, and, to compare with it, one by
BinaryConnect and the float network with as many further steps; beside them stands the float network
made ternary at once. In the end: bits per character (fewer are better), and what each one writes.
"""

import argparse
import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import flax.serialization
import jax
import numpy as np
import optax

import brelax_jax as brx
from examples.language_model.text import load
from examples.language_model.training import START, Settings, Trainer, flag
from examples.runs.progress import Progress
from examples.runs.report import bits_per_weight, quantized_layers, size_in_bytes, table
from examples.train.config import differences

VERSIONS = {package.__name__: package.__version__ for package in (brx, jax, optax, flax)}


class Run:
    """One seed in a directory: a JSON file of results, and beside it the params of each network.

    Each is replaced at once, the params first: a run that was killed goes on after the last network
    that is in the JSON.

    Raises:
      ValueError: if the file is there without `resume`, or of other settings, or no such file.
    """

    def __init__(self, out: str, seed: int, settings: Settings, resume: bool) -> None:
        self.seed, self.path = seed, Path(out) / f"seed{seed}.json"
        self.results: dict[str, dict[str, Any]] = {}
        self._settings = dataclasses.asdict(settings)
        if not self.path.exists():
            return
        if not resume:
            raise ValueError(f"{self.path} is there: go on with --resume, or give another --out.")
        try:
            found = json.loads(self.path.read_text())
            theirs, self.results = found["settings"], found["networks"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.path} cannot be read: remove it to start this seed again."
            ) from None
        if changed := differences(theirs, self._settings):
            raise ValueError(
                f"{self.path} is of another configuration:\n  "
                + "\n  ".join(changed)
                + "\nGive the settings that it was made with, or another --out."
            )

    def save(self, name: str, params: Any, result: dict[str, Any]) -> None:
        """Keeps a network that is trained."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace(self._params_path(name), flax.serialization.to_bytes(params))
        self.results[name] = result
        content = dict(
            seed=self.seed, settings=self._settings, versions=VERSIONS, networks=self.results
        )
        replace(self.path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def params(self, name: str, like: Any) -> Any:
        """The params of a network that is kept."""
        path = self._params_path(name)
        try:
            return flax.serialization.from_bytes(like, path.read_bytes())
        except Exception as error:  # what is damaged raises errors of many kinds
            raise ValueError(
                f"{path} cannot be read ({error}): remove {self.path} to start this seed again."
            ) from None

    def _params_path(self, name: str) -> Path:
        return self.path.with_name(f"{self.path.stem}-{re.sub(r'[, ]+', '-', name)}.msgpack")


def replace(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    beside = path.with_name(path.name + ".new")
    beside.write_bytes(content)
    os.replace(beside, path)


def run(trainer: Trainer, kept: Run, progress: Progress) -> dict[str, dict[str, Any]]:
    """Trains the networks of a seed that are not kept yet; the results of all by their names."""
    missing = [name for name in trainer.networks if name not in kept.results]
    progress.skip(sum(n.steps for name, n in trainer.networks.items() if name not in missing))
    start = trainer.init(kept.seed) if missing else None
    if missing and START not in missing:
        start = kept.params(START, start)
    for name in missing:
        network = trainer.networks[name]
        begin = time.perf_counter()
        params, state = trainer.train(name, start, kept.seed, progress)
        if network.ternary:
            params = trainer.quantized(state, params)
        if name == START:
            start = params
        kept.save(name, params, measured(trainer, name, params, kept.seed))
        bits, seconds = kept.results[name]["validation"], time.perf_counter() - begin
        progress.line(
            f"seed {kept.seed}  {name:<14}  {shown(bits)} bits per character  {seconds:.0f} s"
        )
    return kept.results


def measured(trainer: Trainer, name: str, params: Any, seed: int) -> dict[str, Any]:
    """What the table says of a network, and what it writes."""
    network = trainer.networks[name]
    layers = quantized_layers(params, trainer.rules) if network.ternary else []
    bits = {
        split: finite(trainer.bits_per_character(params, getattr(trainer.text, split)))
        for split in ("held_out", "validation", "test")
    }
    return {
        "steps": network.before + network.steps,
        **bits,
        "values": max((layer.distinct for layer in layers), default=None),
        "bits_per_weight": bits_per_weight(layers),
        "bytes": size_in_bytes(params, layers),
        "sample": trainer.sample(params, seed),
    }


def finite(bits: float) -> float | None:
    """What JSON can keep: None where training has diverged."""
    return round(bits, 5) if math.isfinite(bits) else None


def shown(bits: float | None) -> str:
    """Bits per character as text."""
    return "diverged" if bits is None else f"{bits:.3f}"


def spread(bits: Sequence[float | None]) -> str:
    """Mean ± standard deviation over the seeds."""
    known = [each for each in bits if each is not None]
    if len(known) < len(bits) or len(bits) == 1:
        return shown(min(known) if len(known) == len(bits) else None)
    return f"{np.mean(known):.3f} ± {np.std(known, ddof=1):.3f}"


def row(name: str, runs: Sequence[dict[str, dict[str, Any]]]) -> dict[str, str]:
    """A line of the table."""
    results = [run[name] for run in runs]
    values = [result["values"] for result in results if result["values"] is not None]
    return {
        "network": name,
        "steps": str(results[0]["steps"]),
        "validation": spread([result["validation"] for result in results]),
        "by seed": ", ".join(shown(result["validation"]) for result in results),
        "test": spread([result["test"] for result in results]),
        "values a channel": str(max(values, default="all")),
        "bits per weight": f"{results[0]['bits_per_weight']:.2f}",
        "size (KiB)": f"{results[0]['bytes'] / 1024:.0f}",
    }


def parse(arguments: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """The settings, and the options beside them (`seeds`, `out`, `resume`, `quiet`)."""
    parser = argparse.ArgumentParser(prog="python -m examples.language_model", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], metavar="N", help="of the runs [0]"
    )
    parser.add_argument(
        "--out", default="runs/language-model", help="directory of the runs [%(default)s]"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    for field in dataclasses.fields(Settings):
        choices = field.metadata["choices"]
        parser.add_argument(
            flag(field.name),
            type=type(field.default),
            default=field.default,
            choices=choices,
            metavar=None if choices else "N" if isinstance(field.default, int) else "X",
            help=field.metadata["help"] + " [%(default)s]",
        )
    given = parser.parse_args(arguments)
    settings = Settings(**{f.name: getattr(given, f.name) for f in dataclasses.fields(Settings)})
    try:
        settings.check()
        if min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
            raise ValueError(f"--seeds must be different numbers from 0 on, got {given.seeds}.")
    except ValueError as error:
        parser.error(str(error))
    return settings, given


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    settings, options = parse(arguments)
    try:
        trainer = Trainer(settings, load())
        kept = [Run(options.out, seed, settings, options.resume) for seed in options.seeds]
        steps = sum(network.steps for network in trainer.networks.values())
        progress = Progress(len(kept) * steps, options.quiet, unit="step")
        runs = [run(trainer, each, progress) for each in kept]
        progress.close()
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print("\nBits per character; mean and standard deviation over the seeds:\n")
    print(table([row(name, runs) for name in trainer.networks]))
    prompt = trainer.text.decode(trainer.text.validation[: settings.context])
    print(f"\nHow each network of seed {kept[0].seed} goes on after {prompt!r}:")
    for name, result in runs[0].items():
        print(f"\n--- {name}\n{result['sample']}")
    print(f"\nwritten: {', '.join(str(each.path) for each in kept)}, and beside them the params")
    return 0


if __name__ == "__main__":
    sys.exit(main())
