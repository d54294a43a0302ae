"""What would be deployed: how many values each layer holds, and how many bits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import brelax_jax as brx


@dataclasses.dataclass(frozen=True)
class Layer:
    """A quantized layer: its path, how many weights, groups and levels it has, the bits of a scale,
    and the most distinct values that a scale group holds.
    """

    path: str
    weights: int
    groups: int
    scale_bits: int
    levels: int
    distinct: int

    @property
    def bits(self) -> float:
        """Bits a weight: those that tell the levels apart, and a share of the scales'."""
        return math.log2(self.levels) + self.scale_bits * self.groups / self.weights


def leaves(params: Any) -> dict[str, Any]:
    """The leaves of a tree by their '/'-joined paths."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}


def quantized_layers(params: Any, selection: brx.Selection) -> list[Layer]:
    """The layers that a selection quantizes, with what they hold in these params."""
    found, arrays = [], leaves(params)
    for path, qset in selection.assign(params).items():
        leaf = np.asarray(arrays[path])
        groups = qset.granularity.groups(leaf.shape)
        rows = np.moveaxis(leaf.reshape(groups.view), groups.axes, range(-len(groups.axes), 0))
        rows = rows.reshape(math.prod(groups.scale), -1)
        distinct = max(len(np.unique(row)) for row in rows)
        scale_bits = 8 * jnp.dtype(qset.scale_dtype or "float32").itemsize
        found.append(Layer(path, leaf.size, len(rows), scale_bits, len(qset.levels), distinct))
    return found


def bits_per_weight(layers: list[Layer]) -> float:
    """Over all quantized layers; 32 if there are none."""
    weights = sum(layer.weights for layer in layers)
    return sum(layer.bits * layer.weights for layer in layers) / weights if weights else 32.0


def size_in_bytes(params: Any, layers: list[Layer]) -> float:
    """Of all params: the quantized layers at their bits, the rest in float32."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    quantized = sum(layer.weights for layer in layers)
    return (sum(layer.bits * layer.weights for layer in layers) + 32 * (total - quantized)) / 8


def table(rows: list[dict[str, str]]) -> str:
    """Rows as text, in columns as wide as needed; all but the first to the right."""
    names = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in names]

    def line(cells: list[str]) -> str:
        padded = [
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(padded).rstrip()

    return "\n".join(
        [line(names), line(["-" * w for w in widths]), *(line(list(row.values())) for row in rows)]
    )
