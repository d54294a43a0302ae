"""Progress on a terminal: one bar, with time left; elsewhere plain lines."""

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """One bar over all images of one or several runs.

    Args:
      images: how many there are to train on.
      quiet: no bar, as where the output is not a terminal.
    """

    def __init__(self, images: int, quiet: bool = False) -> None:
        self.shown = sys.stderr.isatty() and not quiet
        self._bar = tqdm(
            total=images,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            disable=not self.shown,
            smoothing=0.05,
        )
        self._refreshed = 0.0

    def skip(self, images: int) -> None:
        """Counts images that an earlier run has trained on."""
        if self.shown:
            self._bar.initial += images
            self._bar.n += images

    def advance(self, images: int) -> None:
        """Counts the images of a step."""
        self._bar.update(images)

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
