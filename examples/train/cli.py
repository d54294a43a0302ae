"""The command line of the training program, made from the fields of `Config`."""

import argparse
import dataclasses
import math
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from brelax_jax._command_line import Parser
from examples.runs.settings import flag
from examples.train import mesh
from examples.train.config import PRESETS, Config

DESCRIPTION = """\
Train an image classifier whose weights end up on a quantized set.

python -m examples.experiments prints the published experiments as such commands.
"""
EXAMPLES = (
    "--preset quick --method float --out runs/float",
    "--preset quick --set ternary --warm-start runs/float",
    "--preset short --first float --last uniform8 --granularity channel",
    "--preset paper --method float --out runs/paper-float",
    "--preset paper --warm-start runs/paper-float",
)


def parse(arguments: Sequence[str] | None = None) -> tuple[Config, argparse.Namespace]:
    """The run's settings, and the options that do not change what it computes (`resume`,
    `quiet`).
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    changed = {
        f.name: getattr(given, f.name) for f in dataclasses.fields(Config) if hasattr(given, f.name)
    }
    config = Config(**{**PRESETS.get(given.preset, {}), **changed})
    try:
        check(config)
    except ValueError as error:
        parser.error(str(error))
    return config, given


def check(config: Config) -> None:
    """Raises a ValueError, naming the option, if a number is out of its range."""
    rules = {
        "validation": (0 <= config.validation < 1, "a share from 0 to below 1"),
        "image_size": (config.image_size is None or config.image_size >= 4, "at least 4 pixels"),
        "train_examples": (
            config.train_examples is None or config.train_examples >= 1,
            "at least 1",
        ),
        "epochs": (config.epochs >= 1, "at least 1"),
        "batch": (config.batch >= 1, "at least 1"),
        "lr": (config.lr > 0, "positive"),
        "hold": (0 <= config.hold < 1, "a share from 0 to below 1"),
        "average": (0 <= config.average <= config.epochs, f"from 0 to epochs ({config.epochs})"),
        "hard_lr": (config.hard_lr is None or config.hard_lr > 0, "positive"),
        "momentum": (0 <= config.momentum < 1, "from 0 to below 1"),
        "weight_decay": (config.weight_decay >= 0, "0 or more"),
        "lam_start": (config.lam_start > 0, "positive, because growth cannot leave 0"),
        "lam_end": (config.lam_end >= config.lam_start, "at least lam_start"),
        "lam_growth": (config.lam_growth is None or config.lam_growth >= 1, "at least 1"),
        "lam_steepness": (0 < config.lam_steepness < math.inf, "positive"),
        "hard_from": (
            0 <= config.hard_epoch <= config.epochs,
            f"from 0 to epochs ({config.epochs})",
        ),
        "lr_drops": (
            bool(config.lr_drops) == (config.lr_schedule == "drops"),
            "given with --lr-schedule drops",
        ),
        "checkpoint_every": (config.checkpoint_every >= 1, "at least 1"),
        "statistics_batches": (config.statistics_batches >= 1, "at least 1"),
        "metrics_every": (
            config.metrics_every is None or config.metrics_every >= 0,
            "at least 1, or 0 for none",
        ),
        "mesh": (
            re.fullmatch(mesh.FORM, config.mesh) is not None,
            "two numbers of devices, as in 4x2",
        ),
    }
    for name, (holds, remedy) in rules.items():
        if not holds:
            raise ValueError(f"{flag(name)} must be {remedy}, got {getattr(config, name)!r}.")


def _parser() -> Parser:
    parser = Parser("examples.train", DESCRIPTION, *EXAMPLES)
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
        help="settings to begin with; the other options override them",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from this run's last checkpoint"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar: one line an epoch")
    hints = typing.get_type_hints(Config)
    for field in dataclasses.fields(Config):
        _add(parser.group(field.metadata["group"]), field, hints[field.name])
    return parser


def _add(group: Any, field: dataclasses.Field[Any], hint: Any) -> None:
    """One option; what is not given is left out, so that a preset's value stays."""
    text = field.metadata["help"].replace("%", "%%")
    if field.default not in (None, ()):
        words = {"True": "on", "False": "off"}
        text += f" [{words.get(str(field.default), field.default)}]"
    common = dict(default=argparse.SUPPRESS, help=text, dest=field.name)
    if hint is bool:
        group.add_argument(flag(field.name), action=argparse.BooleanOptionalAction, **common)
    elif field.metadata["choices"]:
        group.add_argument(flag(field.name), choices=field.metadata["choices"], **common)
    else:
        group.add_argument(flag(field.name), type=reader(hint), metavar=_metavar(hint), **common)


def scalar(hint: Any) -> Any:
    """The type of a field itself, for `T | None` too."""
    return (
        next(t for t in typing.get_args(hint) if t is not type(None))
        if isinstance(hint, types.UnionType)
        else hint
    )


def reader(hint: Any) -> Any:
    """From a word to a value of a field."""
    return _numbers if typing.get_origin(hint) is tuple else scalar(hint)


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _metavar(hint: Any) -> str:
    names = {int: "N", float: "X", str: "NAME"}
    return "X,X" if typing.get_origin(hint) is tuple else names[scalar(hint)]
