"""The runs of one seed: training what is missing, and keeping what each network has come to."""

import dataclasses
import math
import os
import re
import time
from pathlib import Path
from typing import Any

import flax
import flax.serialization
import jax
import optax

import brelax_jax as brx
from examples.language_model.config import Settings
from examples.language_model.networks import START
from examples.language_model.report import shown
from examples.language_model.trainer import Trainer
from examples.runs import studies
from examples.runs.progress import Progress
from examples.runs.report import bits_per_weight, quantized_layers, size_in_bytes
from examples.runs.settings import differences
from examples.runs.studies import Study, current

EARLIER = {"architecture": "alibi"}  # settings of lines that lack them
VERSIONS = {package.__name__: package.__version__ for package in (brx, jax, optax, flax)}


class Seed:
    """The networks of a seed: a line of the study for each, and beside the study its params.

    The params are written first, so that a seed that was killed goes on after the last network that
    has its line.

    Raises:
      ValueError: if there are lines without `resume`, or of other settings, or altered.
    """

    def __init__(self, out: str, seed: int, settings: Settings, resume: bool) -> None:
        self.seed, self.study = seed, Study(Path(out) / f"{settings.set}.jsonl")
        self._settings = dataclasses.asdict(settings)
        lines = [line for line in self.study.read() if line["seed"] == seed]
        if lines and not resume:
            raise ValueError(
                f"{self.study.path} has seed {seed}: go on with --resume, or give another --out."
            )
        for line in lines:
            if changed := differences(line["settings"], self._settings, EARLIER):
                raise ValueError(
                    f"{self.study.path}: {line['name']} is of another configuration:\n  "
                    + "\n  ".join(changed)
                    + "\nGive the settings that it was made with, or another --out."
                )
        self.other_revisions = [line for line in lines if not current(line)]
        self.results: dict[str, dict[str, Any]] = {
            line["network"]: line["result"] for line in lines if current(line)
        }

    def save(self, name: str, ternary: bool, params: Any, result: dict[str, Any]) -> None:
        """Keeps a network that is trained."""
        path = self._params_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".new")
        beside.write_bytes(flax.serialization.to_bytes(params))
        os.replace(beside, path)
        self.study.add(
            {
                "name": self._name(name),
                "revision": studies.REVISION if ternary else None,
                "versions": VERSIONS,
                "settings": self._settings,
                "seed": self.seed,
                "network": name,
                "result": result,
            }
        )
        self.results[name] = result

    def params(self, name: str, like: Any) -> Any:
        """The params of a network that is kept."""
        path = self._params_path(name)
        try:
            return flax.serialization.from_bytes(like, path.read_bytes())
        except Exception as error:  # what is damaged raises errors of many kinds
            raise ValueError(
                f"{path} cannot be read ({error}): remove the lines of seed {self.seed} from "
                f"{self.study.path} to start this seed again."
            ) from None

    def _params_path(self, name: str) -> Path:
        return self.study.path.with_name(f"{self.study.path.stem}-{self._name(name)}.msgpack")

    def _name(self, network: str) -> str:
        return f"{re.sub(r'[, ]+', '-', network)}-seed{self.seed}"


def train_missing(trainer: Trainer, kept: Seed, progress: Progress) -> dict[str, dict[str, Any]]:
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
        kept.save(name, network.ternary, params, measured(trainer, name, params, kept.seed))
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
