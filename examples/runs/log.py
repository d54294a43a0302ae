"""The log of a run: JSON lines, the first with the settings and versions, then one an epoch."""

import importlib.metadata
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import brelax_jax

PACKAGES = ("brelax_jax", "jax", "jaxlib", "optax", "flax", "numpy")


class Log:
    """The file log.jsonl in a run's directory. A line's `kind` is header, epoch, metrics, weights
    or result.

    A process may be killed at any moment: the file is there with its header or not at all, and
    loses no line that a checkpoint counts on. Its last line may be half written until it is `cut`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / "log.jsonl"
        self._follow: Callable[[dict[str, Any]], None] | None = None

    def start(self, config: dict[str, Any], **facts: Any) -> None:
        """Begins the log anew, with the settings of the run."""
        versions = {name: _version(name) for name in PACKAGES}
        header = dict(kind="header", config=config, versions=versions)
        self._replace([_plain({**header, "device": str(jax.devices()[0]), **facts})])

    def cut(self, epoch: int) -> None:
        """Drops what was written after an epoch, so that a resumed run writes it again."""
        lines = read(self.path)
        self._replace(
            [line for line in lines if line.get("epoch", 0) <= epoch and line["kind"] != "result"]
        )

    def write(self, kind: str, **values: Any) -> None:
        """Appends a line."""
        line = _plain({"kind": kind, **values})
        with self.path.open("a") as file:
            file.write(_json(line))
        if self._follow is not None:
            self._follow(line)

    def follow(self, function: Callable[[dict[str, Any]], None]) -> None:
        """Calls a function with each line, with those that are there at once."""
        for line in read(self.path):
            function(line)
        self._follow = function

    def _replace(self, lines: list[dict[str, Any]]) -> None:
        """Puts these lines in the file's place, at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".new")
        beside.write_text("".join(map(_json, lines)))
        os.replace(beside, self.path)


def read(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that was not written whole is left out."""
    lines = []
    for line in Path(path).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _version(package: str) -> str:
    if package == brelax_jax.__name__:  # also where it is on the path and not installed
        return brelax_jax.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _json(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    """As JSON can keep it: floats of six digits, infinity and NaN as words."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value
