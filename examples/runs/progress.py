"""Progress on a terminal: one bar with what goes on and the time left; elsewhere plain lines."""

import sys
import time
from typing import Any

from tqdm import tqdm

BAR = "{desc} {percentage:3.0f}%|{bar}| {remaining} left, {elapsed} so far, {rate_fmt}{postfix}"


class Progress:
    """One bar over all images, or steps, of one or several runs.

    Args:
      total: how many there are.
      quiet: no bar, as where the output is not a terminal.
      unit: what is counted.
    """

    def __init__(self, total: int, quiet: bool = False, unit: str = "img") -> None:
        self.shown = sys.stderr.isatty() and not quiet
        self._bar = tqdm(
            total=total,
            desc="getting ready",  # until the first figures
            bar_format=BAR,
            unit=unit,
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self.shown,
            smoothing=0.05,
        )
        self._refreshed = 0.0

    def skip(self, count: int) -> None:
        """Counts what an earlier run has done."""
        if self.shown:
            self._bar.initial += count
            self._bar.n += count

    def advance(self, count: int) -> None:
        """Counts what a step has done."""
        self._bar.update(count)

    def due(self, seconds: float = 0.5) -> bool:
        """Whether the bar is shown and its figures are older than this; reading them waits for the
        device.
        """
        now = time.monotonic()
        if not self.shown or now - self._refreshed < seconds:
            return False
        self._refreshed = now
        return True

    def figures(self, label: str, **values: Any) -> None:
        """Shows figures at the bar."""
        self._bar.set_description_str(label, refresh=False)
        self._bar.set_postfix_str(" ".join(f"{name} {value:.3g}" for name, value in values.items()))

    def line(self, text: str) -> None:
        """Prints a line above the bar."""
        if self.shown:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self._bar.close()
