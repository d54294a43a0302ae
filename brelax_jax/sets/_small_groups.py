"""Ternary scales of small groups: from all entries in order, for all groups at once.

The best support of a group is its k largest entries for some k. So with the entries sorted there
are as many errors to compare as entries. The entries of each group are rows: sorting them is a
fixed sequence of minima and maxima, and nothing is reduced along a short axis.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._problem import FLOOR, TOLERANCE
from brelax_jax.sets._rows import has_rows
from brelax_jax.sets._scale_dtype import Scales
from brelax_jax.sets._weights import Unit, Weights

MOST_ENTRIES = 32  # of a group: programs grow faster than it


def is_small(magnitudes: Sequence[float], weights: Weights) -> bool:
    """Whether `small_scales` is for these weights."""
    is_ternary = len(magnitudes) == 2 and magnitudes[0] == 0
    return is_ternary and has_rows(weights, MOST_ENTRIES)


def small_scales(magnitudes: Sequence[float], weights: Weights) -> Array:
    """As `searched_scale`."""
    w, group, kept, *settings = weights
    return _scales(tuple(magnitudes), group, *settings, w, kept)


def small_scales_on_cpu(magnitudes: Sequence[float], weights: Weights) -> Array:
    """As `small_scales`. XLA on CPU would compute a scale anew for each weight that it is
    multiplied with, but not what stands in a branch.
    """

    def scales(w: Array, kept: Array | None) -> Array:
        return small_scales(magnitudes, weights._replace(w=w, kept=kept))

    def zeros(w: Array, kept: Array | None) -> Array:
        return jnp.zeros_like(scales(w, kept))

    return lax.cond(jnp.any(weights.w != 0), scales, zeros, weights.w, weights.kept)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _scales(
    magnitudes: Sequence[float],
    group: Group,
    tolerance: float,
    allowed: Scales | None,
    w: Array,
    kept: Array | None,
) -> Array:
    """argmin over s ≥ 0 of Σ min(|w|, ||w| − s·m|)² for each group, m the one magnitude but 0.

    Traced once for arrays of equal shapes.
    """
    rows = [jnp.abs(w)]
    for axis in group.axes:
        rows = [part for row in rows for part in jnp.split(row, w.shape[axis], axis)]
    for i, j in sorting_network(len(rows)):
        rows[i], rows[j] = jnp.maximum(rows[i], rows[j]), jnp.minimum(rows[i], rows[j])
    peak = rows[0]
    unit = Unit.of(peak, allowed)
    rows = list(map(unit.divided, rows))

    def nearest(scale: Array) -> Array:
        """The nearest point m·s to which entries may be rounded."""
        return unit.nearest(scale / magnitudes[1]) * magnitudes[1]

    scale, error = _best(rows, nearest)
    if kept is not None:
        again, its_error = _refitted(rows, unit.divided(kept) * magnitudes[1], nearest)
        energy = _sum(list(map(jnp.square, rows)))
        goal = (1 - max(tolerance, TOLERANCE)) * its_error - FLOOR * energy
        scale = jnp.where((kept > 0) & (error >= goal), again, scale)
    return unit.scales(scale / magnitudes[1], peak)


def _best(rows: Sequence[Array], nearest: Callable[[Array], Array]) -> tuple[Array, Array]:
    """The nearest to the mean of the k largest entries, for the best k, and its error, for sorted
    rows.

    Errors are sums of squares, because a difference of such sums would lose what is left of them.
    """
    beyond = [jnp.zeros_like(rows[0])]  # the squares of all entries after the first k
    for row in reversed(rows):
        beyond.append(beyond[-1] + jnp.square(row))
    beyond.pop()
    mean = within = jnp.zeros_like(rows[0])
    best, least = nearest(rows[0]), jnp.full_like(mean, jnp.inf)
    for k, row in enumerate(rows, start=1):
        step = row - mean
        mean += step * (1 / k)
        within += jnp.square(step) * ((k - 1) / k)
        point = nearest(mean)
        error = within + beyond.pop() + k * jnp.square(point - mean)
        best, least = jnp.where(error < least, point, best), jnp.minimum(error, least)
    return best, least


def _refitted(
    rows: Sequence[Array], scale: Array, nearest: Callable[[Array], Array]
) -> tuple[Array, Array]:
    """The nearest to the mean of the entries that a scale is nearer to than 0, and its error."""
    above = [(row > scale / 2).astype(scale.dtype) for row in rows]
    missing = _sum([(row - scale) * each for row, each in zip(rows, above, strict=True)])
    number = _sum(above)
    scale = nearest(jnp.where(number > 0, scale + missing / jnp.maximum(number, 1), scale))
    return scale, _sum([jnp.square(jnp.minimum(row, jnp.abs(row - scale))) for row in rows])


def _sum(rows: Sequence[Array]) -> Array:
    return functools.reduce(jnp.add, rows)


def sorting_network(n: int) -> list[tuple[int, int]]:
    """Which of n entries to compare, one pair after the other: Batcher's odd-even merge sort."""
    pairs: list[tuple[int, int]] = []
    width = 1
    while width < n:
        distance = width
        while distance:
            for start in range(distance % width, n - distance, 2 * distance):
                for i in range(start, min(start + distance, n - distance)):
                    if i // (2 * width) == (i + distance) // (2 * width):
                        pairs.append((i, i + distance))
            distance //= 2
        width *= 2
    return pairs
