"""The log of a run: JSON lines, the first with the settings and versions, then one an epoch."""

import importlib.metadata
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from examples.config import Config

PACKAGES = ("brelax_jax", "jax", "jaxlib", "optax", "flax", "numpy")


class Log:
    """The file log.jsonl in a run's directory. A line's `kind` is header, epoch, weights or
    result.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / "log.jsonl"

    def start(self, config: Config, **facts: Any) -> None:
        """Begins the log anew."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("")
        versions = {name: _version(name) for name in PACKAGES}
        self.write(
            "header",
            config=config.to_json(),
            versions=versions,
            device=str(jax.devices()[0]),
            **facts,
        )

    def cut(self, epoch: int) -> None:
        """Drops what was written after an epoch, so that a resumed run writes it again."""
        lines = [
            line
            for line in read(self.path)
            if line.get("epoch", 0) <= epoch and line["kind"] != "result"
        ]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def write(self, kind: str, **values: Any) -> None:
        """Appends a line."""
        with self.path.open("a") as file:
            file.write(json.dumps(_plain({"kind": kind, **values}), allow_nan=False) + "\n")


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
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


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
