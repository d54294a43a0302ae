"""What is in a file: a row for each leaf."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from brelax_jax.export._file import read
from brelax_jax.export._format import Leaf, symbols_of

MOST_SHARES = 9  # levels whose shares are printed


class Row(NamedTuple):
    """A leaf of a network in a file.

    Attributes:
      layer: its path.
      shape: its shape.
      set: the name of its set, or its dtype.
      granularity: what shares a scale, '' for leaves that are not quantized.
      bytes: what it takes, scales and all.
      weights: how many entries it has.
      shares: the share of weights at each level; {} for leaves that are not quantized.
    """

    layer: str
    shape: tuple[int, ...]
    set: str
    granularity: str
    bytes: int
    weights: int
    shares: dict[float, float]

    @property
    def bits(self) -> float:
        """Bits a weight, with its part of the scales."""
        return 8 * self.bytes / max(self.weights, 1)


def rows_of(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a file of ours; raises as `load`."""
    return [_row(leaf) for leaf in read(path)]


def _row(leaf: Leaf) -> Row:
    packed = leaf.value
    if leaf.granularity is None:
        size, kind = packed.nbytes, packed.dtype.name
        return Row(leaf.name, packed.shape, kind, "", size, packed.size, {})
    symbols = symbols_of(packed)
    parts = (packed.data, packed.scale, packed.spacing)
    size = sum(part.nbytes for part in parts if part is not None)
    positive = packed.magnitudes[1:]
    levels = [-m for m in reversed(positive)] + [0.0] * packed.has_zero + [*positive]
    shares = np.bincount(symbols, minlength=len(levels)) / len(symbols)
    return Row(
        leaf.name,
        packed.shape,
        str(leaf.qset),
        repr(leaf.granularity).replace("axis_name=None", "").replace(", )", ")"),
        size,
        len(symbols),
        dict(zip(levels, shares.tolist(), strict=True)),
    )


Reader: TypeAlias = Callable[[str | os.PathLike[str]], Sequence[Row]]


def report(path: str | os.PathLike[str], readers: Mapping[str, Reader]) -> dict[str, Any]:
    """The rows of a file, as `--json` prints them, and their totals.

    Args:
      path: of the file.
      readers: of other formats than ours, by the ending of a file's name.

    Raises:
      ValueError: if the file is not what it should be; it names it.
    """
    rows = readers.get(Path(path).suffix, rows_of)(path)
    weights, size = sum(row.weights for row in rows), sum(row.bytes for row in rows)
    on_sets = [row for row in rows if row.shares]
    return {
        "file": os.fspath(path),
        "file_bytes": Path(path).stat().st_size,
        "leaves": [
            {
                **row._asdict(),
                "bits": row.bits,
                "shares": [[level, share] for level, share in row.shares.items()],
            }
            for row in rows
        ],
        "weights": weights,
        "quantized_weights": sum(row.weights for row in on_sets),
        "bytes": size,
        "bits": 8 * size / max(weights, 1),
        "float32_ratio": 4 * weights / max(size, 1),
    }


def table(report: dict[str, Any]) -> str:
    """A report as a table for people."""
    heads = ("layer", "shape", "set", "scales", "bits", "bytes", "weights at each level")
    lines = [heads] + [
        (
            leaf["layer"],
            "×".join(map(str, leaf["shape"])),
            leaf["set"],
            leaf["granularity"],
            f"{leaf['bits']:.2f}",
            f"{leaf['bytes']:,}",
            _shares(leaf["shares"]),
        )
        for leaf in report["leaves"]
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join(
            cell.rjust(width) if head in ("bits", "bytes") else cell.ljust(width)
            for head, cell, width in zip(heads, line, widths, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join(
        [
            *text,
            "",
            f"{report['weights']:,} weights, {report['quantized_weights']:,} of them on sets, in "
            f"{report['bytes']:,} bytes ({report['file_bytes']:,} with the header): "
            f"{report['bits']:.2f} bits a weight, {report['float32_ratio']:.1f} times less than "
            "float32.",
        ]
    )


def _shares(shares: Sequence[tuple[float, float]]) -> str:
    shown = shares
    if len(shares) > MOST_SHARES:  # the outermost ones and the middle
        shown = [shares[0], shares[len(shares) // 2], shares[-1]]
    text = ", ".join(f"{level:g}: {100 * share:.1f} %" for level, share in shown)
    return text if len(shown) == len(shares) else f"of {len(shares)} levels, {text}"
