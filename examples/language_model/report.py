"""The table of a language model's networks: bits per character over the seeds."""

from collections.abc import Sequence
from typing import Any

import numpy as np


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
