"""The runs of one seed: training what is missing, and keeping what each network has come to."""

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax
import jax
import optax

import brelax_jax as brx
from examples.language_model.config import Settings
from examples.language_model.networks import START, rules
from examples.language_model.report import shown
from examples.language_model.trainer import Trained, Trainer
from examples.runs import studies
from examples.runs.progress import Progress
from examples.runs.report import bits_per_weight, quantized_layers, size_in_bytes
from examples.runs.settings import differences
from examples.runs.studies import Study, current

VERSIONS = {package.__name__: package.__version__ for package in (brx, jax, optax, flax)}


class Seed:
    """The networks of a seed: a line of the study for each, and beside the study its params.

    The params are written first, so that a run that was killed goes on after the last network that
    has its line.

    Raises:
      ValueError: if there are lines without `resume`, or of other settings, or altered.
    """

    def __init__(self, out: str, seed: int, settings: Settings, resume: bool) -> None:
        self.seed, self.study = seed, Study(Path(out) / "networks.jsonl")
        self._settings = {n: v for n, v in vars(settings).items() if n != "sets"}
        lines = [line for line in self.study.read() if line["seed"] == seed]
        if lines and not resume:
            raise ValueError(
                f"{self.study.path} has seed {seed}: go on with --resume, or give another --out."
            )
        for line in lines:
            if changed := differences(line["settings"], self._settings, vars(Settings())):
                raise ValueError(
                    f"{self.study.path}: {line['name']} is of another configuration:\n  "
                    + "\n  ".join(changed)
                    + "\nGive the settings that it was made with, or another --out."
                )
        self.other_revisions = [line for line in lines if not current(line)]
        self.results: dict[str, dict[str, Any]] = {
            line["network"]: line["result"] for line in lines if current(line)
        }

    def save(self, name: str, word: str | None, trained: Trained, result: dict[str, Any]) -> None:
        """Keeps a network that is trained."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if word is None:
            brx.save(path, trained.params, rules=brx.select(default=None))
        else:
            brx.save(path, trained.params, trained.state)
        self.study.add(
            {
                "name": self._name(name),
                "revision": studies.REVISION if word else None,
                "versions": VERSIONS,
                "settings": self._settings,
                "seed": self.seed,
                "network": name,
                "result": result,
            }
        )
        self.results[name] = result

    def network(self, name: str, packed: bool = False) -> Any:
        """A network that is kept: its params, or with its kernels packed."""
        path = self.path(name)
        try:
            return brx.load(path, packed)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}): remove the lines of seed {self.seed} from "
                f"{self.study.path} to start this seed again."
            ) from None

    def path(self, name: str) -> Path:
        """The file of a network."""
        return self.study.path.with_name(f"{self._name(name)}.safetensors")

    def _name(self, network: str) -> str:
        return f"{re.sub(r'[^a-zA-Z0-9_.]+', '-', network)}-seed{self.seed}"


def train_missing(trainer: Trainer, kept: Sequence[Seed], progress: Progress) -> None:
    """Trains what the seeds lack, each network for all of them together."""
    for name, network in trainer.networks.items():
        lacking = [each for each in kept if name not in each.results]
        progress.skip((len(kept) - len(lacking)) * network.steps)
        if not lacking:
            continue
        if name == START:
            starts = [trainer.init(each.seed) for each in lacking]
        else:
            starts = [each.network(START) for each in lacking]
        begin = time.perf_counter()
        found = trainer.train(name, starts, [each.seed for each in lacking], progress)
        seconds = (time.perf_counter() - begin) / len(lacking)
        for each, trained in zip(lacking, found, strict=True):
            result = measured(trainer, name, trained, each.seed)
            each.save(name, network.word, trained, result)
            progress.line(
                f"seed {each.seed}  {name:<24}  {shown(result['validation'])} bits per character  "
                f"{seconds:.0f} s"
            )


def measured(trainer: Trainer, name: str, trained: Trained, seed: int) -> dict[str, Any]:
    """What the table says of a network, and what it writes."""
    network, params = trainer.networks[name], trained.params
    layers = quantized_layers(params, rules(network.word)) if network.word else []
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
        "curve": {str(step): finite(each) for step, each in trained.curve.items()},
        "sample": trainer.sample(params, seed),
    }


def finite(bits: float) -> float | None:
    """What JSON can keep: None where training has diverged."""
    return round(bits, 5) if math.isfinite(bits) else None
