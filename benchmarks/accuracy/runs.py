"""The runs of the accuracy grid: their settings and names.

A run's name says every setting in which it differs from the base, so that runs of a study and
those of the grid never meet, and a run that both need is trained once.
"""

import argparse
import dataclasses
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from examples.runs import studies
from examples.train.cli import check, reader
from examples.train.config import ELSEWHERE, Config, without_places
from examples.train.models import MODELS
from examples.train.optimizer import layer_sets

# The float run that the others of its seed start from.
BASE = Config(
    dataset="cifar10", model="resnet8", image_size=16, validation=0.1, epochs=15, method="float",
    batch=128, lr=0.1, lr_schedule="cosine", momentum=0.9, weight_decay=1e-4, metrics_every=0,
    lam_schedule="geometric",
)  # fmt: skip

# What the names leave unsaid, by method: as published. It stays as it is when METHODS changes, so
# that no name ever means two things.
UNSAID: dict[str, dict[str, Any]] = {
    "parq": {"lam_schedule": "sigmoid"},
    "proxquant": {"lam_schedule": "linear"},
}

# What each method changes. `hard_share` is phase II's share of the epochs.
METHODS: dict[str, dict[str, Any]] = {
    "float-continued": {"method": "float"},
    "binary_connect": {"method": "binary_connect"},
    "binary_relax": {
        "method": "binary_relax",
        "lam_schedule": None,  # linear from scratch, else geometric
        "lam_start": 1.0,
        "lam_end": 100.0,
        "hard_share": 0.25,
    },
    "parq": {"method": "parq", "lam_schedule": "sigmoid", "hard_share": 0.25},
    "proxquant": {"method": "proxquant", "lam_schedule": "linear", "hard_share": 0.25},
}
MAIN = ("float-continued", "binary_connect", "binary_relax", "parq")
START = "float"  # the method of a float start

SETS = {"binary": "binary", "ternary": "ternary", "2bits": "levels:-3,-1,1,3"}

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
OF_SCHEDULE = {"geometric": ("lam_start", "lam_end", "lam_growth"), "sigmoid": ("lam_steepness",)}
NAMED = ("method", "set", "seed", "epochs", "warm_start", *ELSEWHERE)  # not as a difference
OPTIONS = ("method", "set", "seed", "epochs", "granularity", "out")  # have options of their own


@dataclasses.dataclass(frozen=True)
class Run:
    """A run of the grid: its method as `METHODS` names it, its settings, and its float start."""

    method: str
    config: Config
    start: "Run | None" = None

    @property
    def name(self) -> str:
        """The name of the run's directory and of its line."""
        return Path(self.config.directory).name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings without the places."""
        return settings_of(self.config.to_json())

    @property
    def revision(self) -> int | None:
        """The revision of the algorithm that the run depends on."""
        return None if self.config.method == "float" else studies.REVISION


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """Settings without the places, and with those of a later version at their defaults."""
    start = config.get("warm_start")
    whole = {**Config().to_json(), **config, "warm_start": start and Path(start).name}
    return without_places(whole)


def float_start(base: Config, seed: int, changes: dict[str, Any], runs: str) -> Run:
    """The float run of a seed; of the changes it has those of the data and of the model."""
    its_own = {n: v for n, v in changes.items() if FIELDS[n].metadata["group"] in ("data", "model")}
    config = dataclasses.replace(base, seed=seed, **its_own)
    return placed(START, config, base, runs)


def make_run(
    base: Config, method: str, word: str, seed: int, epochs: int, changes: dict[str, Any], runs: str
) -> Run:
    """A run of a method, a set, a seed and a number of epochs.

    Args:
      base: the settings of the float start.
      method: one of `METHODS`.
      word: the set.
      seed: its seed, and that of its float start.
      epochs: its length.
      changes: other settings that differ from those of the base and of the method.
      runs: the directory of all runs.

    Raises:
      ValueError: if a setting is out of its range.
    """
    start = float_start(base, seed, changes, runs)
    its_own = dict(METHODS[method])
    share = its_own.pop("hard_share", 0.25)
    if share != 0.25:  # what Config does by itself
        its_own["hard_from"] = (1 - share) * epochs
    settings = {"set": SETS.get(word, word), "seed": seed, "epochs": epochs}
    settings |= {"metrics_every": None, "warm_start": start.config.out}
    config = dataclasses.replace(base, **{**settings, **its_own, **changes})
    config = dataclasses.replace(config, lam_schedule=config.lam_shape)
    neutral = neutral_settings(base, method)
    config = dataclasses.replace(config, **{n: getattr(neutral, n) for n in _idle(config)})
    check(config)
    if config.model not in MODELS:
        raise ValueError(f"Unknown model {config.model!r}. Known: {', '.join(MODELS)}.")
    layer_sets(config)
    return placed(method, config, neutral, runs, start if config.warm_start else None)


def neutral_settings(base: Config, method: str) -> Config:
    """The settings that a method's names leave unsaid."""
    return dataclasses.replace(base, metrics_every=None, **UNSAID.get(method, {}))


def _idle(config: Config) -> list[str]:
    """Settings that change nothing in this run."""
    names: list[str] = []
    pulled = config.method not in ("float", "binary_connect")
    for schedule, its_own in OF_SCHEDULE.items():
        if not pulled or config.lam_schedule != schedule:
            names += its_own
    if not pulled:
        names.append("lam_schedule")
    has_phases = pulled or config.hard_lr or config.lr_schedule == "restart"
    if not has_phases or config.hard_from == 0.75 * config.epochs:
        names.append("hard_from")
    if config.method == "float":
        names += ["set", "granularity", "tolerance", "first", "last", "hold"]
    return names


def plan(options: argparse.Namespace, base: Config = BASE) -> list[Run]:
    """The runs that the options name, all of a seed before the next.

    Raises:
      ValueError: if a name is not known.
    """
    if unknown := [name for name in options.methods if name not in METHODS]:
        raise ValueError(f"Unknown method {unknown[0]!r}. Known: {', '.join(METHODS)}.")
    changes = {"granularity": options.granularity, **parse_changes(options.override)}
    runs = [
        make_run(base, method, word, seed, options.epochs, {**changes, **rate}, options.runs)
        for seed in options.seeds
        for word in options.sets
        for method in options.methods
        for rate in [{"lr": lr} for lr in options.learning_rates] or [{}]
    ]
    return list({run.name: run for run in runs}.values())


def placed(method: str, config: Config, base: Config, runs: str, start: Run | None = None) -> Run:
    """The run in its directory, whose name says the settings that are not the base's.

    From the second revision of the algorithm on, quantized runs are in a directory of its own, so
    that none goes on from another revision's checkpoint.
    """
    words = [method]
    if method != START:
        words = [] if config.method == "float" else [set_name(config.set)]
        words += [method, f"{config.epochs}ep"]
    if method != START and config.warm_start is None:
        words.append("scratch")
    for name in FIELDS:
        value = getattr(config, name)
        if name not in NAMED and value != getattr(base, name):
            words.append(_word(name, value))
    name = re.sub(r"[/:]", "_", "-".join([*words, f"seed{config.seed}"]))
    if config.method != "float" and studies.REVISION > 1:
        runs = f"{runs}/revision{studies.REVISION}"
    return Run(method, dataclasses.replace(config, out=f"{runs}/{name}"), start)


def _word(name: str, value: Any) -> str:
    """A setting as part of a name."""
    if isinstance(value, tuple):
        return name + "-".join(map(_number, value))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{name}-{value}"
    return name + _number(value)


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def set_name(word: str) -> str:
    """How the table and the names call a set."""
    return {of: name for name, of in SETS.items()}.get(word, word)


def with_starts(runs: Sequence[Run]) -> list[Run]:
    """The runs, and before them the float starts that they need."""
    starts = {run.start.name: run.start for run in runs if run.start}
    return [*starts.values(), *runs]


def parse_changes(pairs: Sequence[str]) -> dict[str, Any]:
    """Settings from `NAME=VALUE`, as `lr=0.03`; `none` where there may be none."""
    hints = typing.get_type_hints(Config)
    known = [name for name in FIELDS if name not in OPTIONS]
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if name not in known or not equals:
            raise ValueError(f"Unknown override {pair!r}: NAME=VALUE with {', '.join(known)}.")
        found[name] = _value(name, text, hints[name])
    return found


def _value(name: str, text: str, hint: Any) -> Any:
    field = FIELDS[name]
    if text.lower() == "none" and type(None) in typing.get_args(hint):
        return None
    if name == "warm_start":
        raise ValueError("Override warm_start: only none, to train from scratch.")
    choices = field.metadata["choices"] or (("true", "false") if hint is bool else None)
    if choices and text not in choices:
        raise ValueError(f"Unknown {name} {text!r}. Known: {', '.join(choices)}.")
    try:
        return text == "true" if hint is bool else reader(hint)(text)
    except ValueError as error:
        raise ValueError(f"Override {name}: {error}.") from None
