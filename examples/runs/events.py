"""TensorBoard's event file of a run: a copy of its log, in scalars by step."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

FILES = "events.out.tfevents.*"
MOST_LEVELS = 8  # sets of more levels would fill the page with the shares of each


class Events:
    """The event file in a run's directory.

    It is made anew, from the log, by every process that goes on with the run: so no point is lost
    where one was killed, and none is there twice. A TensorBoard that is open drops the old points.
    """

    def __init__(self, directory: str | Path) -> None:
        for file in Path(directory).glob(FILES):
            file.unlink()
        self._writer = SummaryWriter(str(directory), purge_step=0, flush_secs=10)

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line of the log."""
        for name, value in scalars(line):
            if isinstance(value, int | float) and math.isfinite(value):  # λ = ∞ is a word there
                self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The names and values that TensorBoard shows of a line."""
    if line["kind"] == "epoch":
        for name in ("loss", "learning_rate", "lam", "strength", "images_per_second"):
            if name in line:
                yield name, line[name]
        for name in ("accuracy", *(n for n in line if n.startswith(("validation_", "test_")))):
            yield f"accuracy/{'train' if name == 'accuracy' else name}", line[name]
    if line["kind"] == "metrics":
        for layer, values in line["layers"].items():
            for name in ("distance", "flips", "scale"):
                yield f"{name}/{layer}", values[name]
            if len(values["levels"]) <= MOST_LEVELS:
                for level, share in zip(values["levels"], values["occupancy"], strict=True):
                    yield f"occupancy/{layer}/{level:g}", share
