"""Arrays whose groups are computed with together: what a search needs of the weights, and how the
numbers of their groups lie side by side.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._levels import COMPARED, are_consecutive, at_index, level_index

ROUNDED = 3  # beyond so many consecutive magnitudes, multiplying by one reciprocal is faster


class Weights(NamedTuple):
    """An array whose scales are searched for.

    Attributes:
      w: a view of floats, at least float32.
      group: which of its entries form a group.
      kept: scales to keep where they are nearly the best, 0 where there is none; or None.
      tolerance: how far the error of a scale that is kept may be above the least one, relative.
    """

    w: Array
    group: Group
    kept: Array | None = None
    tolerance: float = 0.0


class Layout(NamedTuple):
    """How the numbers of the groups of some arrays lie side by side.

    Attributes:
      views: the shape of the scales of each array, as they broadcast against it.
      is_stacked: whether each array has a row of its own, of the length of the longest.
    """

    views: tuple[tuple[int, ...], ...]
    is_stacked: bool

    def join(self, parts: Sequence[Array]) -> Array:
        """The numbers of all arrays, each of its view's shape, perhaps after other axes.

        One array's keep their shape: it may be sharded.
        """
        if len(self.views) == 1:
            return parts[0]
        vectors = [
            x.reshape(*x.shape[: x.ndim - len(view)], -1)
            for x, view in zip(parts, self.views, strict=True)
        ]
        if not self.is_stacked:
            return jnp.concatenate(vectors, axis=-1)
        return jnp.stack(list(map(self.pad, vectors)), axis=-2)

    def split(self, joined: Array) -> list[Array]:
        """The reverse of `join`."""
        if len(self.views) == 1:
            return [joined]
        sizes = list(map(math.prod, self.views))
        if self.is_stacked:
            vectors = [joined[..., i, :size] for i, size in enumerate(sizes)]
        else:
            ends = [sum(sizes[: i + 1]) for i in range(len(sizes) - 1)]
            vectors = jnp.split(joined, ends, axis=-1)
        return [
            x.reshape(*x.shape[:-1], *view) for x, view in zip(vectors, self.views, strict=True)
        ]

    def pad(self, vector: Array) -> Array:
        """A vector of one array as long as the longest, with ones."""
        missing = max(map(math.prod, self.views)) - vector.shape[-1]
        return jnp.pad(vector, [(0, 0)] * (vector.ndim - 1) + [(0, missing)], constant_values=1)


class Unit(NamedTuple):
    """What the weights of each group are divided by.

    Attributes:
      unit: a power of two near the largest magnitude, so that dividing is exact.
      inverse: one over it.
    """

    unit: Array
    inverse: Array

    @staticmethod
    def of(peak: Array) -> "Unit":
        """The unit of groups with this largest magnitude."""
        info = jnp.finfo(peak.dtype)
        bits = jnp.dtype(f"uint{info.bits}")
        mask = ~jnp.array(2**info.nmant - 1, bits)
        leading = lax.bitcast_convert_type(lax.bitcast_convert_type(peak, bits) & mask, peak.dtype)
        unit = jnp.where(peak > 0, jnp.clip(leading, info.tiny, 1 / float(info.tiny)), 1)
        return Unit(unit, 1 / unit)


def errors(a: Array, scales: Array, magnitudes: Sequence[float], group: Group) -> Array:
    """Σ min_l (a − s·m_l)² of each group, for some scales along a first axis."""
    if len(scales) == 1:
        return group.sum(jnp.square(_residual(a, scales[0], magnitudes)))[None]
    group = group._replace(axes=tuple(axis + 1 for axis in group.axes))
    return group.sum(jnp.square(_residual(a[None], scales, magnitudes)))


def gain_of(a: Array, scale: Array, magnitudes: Sequence[float], group: Group) -> Array:
    """⟨q, a − s·q⟩ and ⟨q, q⟩ of each group, along a first axis: for the codes q that are nearest
    at s, the least-squares scale is above s by their quotient.
    """
    q = at_index(level_index(a, scale, magnitudes), magnitudes)
    return jnp.stack([group.sum(q * (a - scale * q)), group.sum(jnp.square(q))])


def _residual(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """a − the nearest of scale·magnitudes, or its absolute value."""
    if len(magnitudes) > ROUNDED and are_consecutive(magnitudes):
        return a - scale * jnp.minimum(jnp.round(a * (1 / scale)), magnitudes[-1])
    if len(magnitudes) > COMPARED:
        return a - scale * at_index(level_index(a, scale, magnitudes), magnitudes)
    distances = [jnp.abs(a - scale * m) if m else a for m in magnitudes]
    return jax.tree.reduce(jnp.minimum, distances)
