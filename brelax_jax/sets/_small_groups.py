"""Ternary scales of small groups: from all entries in order, for all groups at once.

The best support of a group is its k largest entries for some k. So with the entries sorted there
are as many errors to compare as entries. The entries of each group are rows: sorting them is a
fixed sequence of minima and maxima, and nothing is reduced along a short axis.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._arrays import Unit, Weights
from brelax_jax.sets._search import FLOOR, TOLERANCE

MOST_ENTRIES = 32  # of a group: programs grow faster than it


def is_small(magnitudes: Sequence[float], weights: Weights) -> bool:
    """Whether `small_scales` is for these weights."""
    w, group = weights.w, weights.group
    spec = (*jax.typeof(w).sharding.spec, *[None] * w.ndim)
    return (
        len(magnitudes) == 2
        and magnitudes[0] == 0
        and len(group.axes) < w.ndim
        and not group.axis_names
        and all(spec[axis] is None for axis in group.axes)
        and group.size(w) <= MOST_ENTRIES
    )


def small_scales(magnitudes: Sequence[float], weights: Weights) -> Array:
    """As `searched_scales`, for one array."""

    def scales(w: Array, kept: Array | None) -> Array:
        return _scales(magnitudes, weights._replace(w=w, kept=kept))

    def scales_first(w: Array, kept: Array | None) -> Array:
        """XLA on CPU would compute a scale anew for each weight that it is multiplied with, but
        not what stands in a branch.
        """
        return lax.cond(jnp.any(w != 0), scales, lambda *x: jnp.zeros_like(scales(*x)), w, kept)

    return lax.platform_dependent(weights.w, weights.kept, cpu=scales_first, default=scales)


def _scales(magnitudes: Sequence[float], weights: Weights) -> Array:
    """argmin over s ≥ 0 of Σ min(|w|, ||w| − s·m|)² for each group, m the one magnitude but 0."""
    w, group, kept, _ = weights
    rows = [jnp.abs(w)]
    for axis in group.axes:
        rows = [part for row in rows for part in jnp.split(row, w.shape[axis], axis)]
    for i, j in sorting_network(len(rows)):
        rows[i], rows[j] = jnp.maximum(rows[i], rows[j]), jnp.minimum(rows[i], rows[j])
    peak = rows[0]
    unit, inverse = Unit.of(peak)
    rows = [row * inverse for row in rows]
    scale, error = _best(rows)
    if kept is not None:
        again, its_error = _refitted(rows, kept * (magnitudes[1] * inverse))
        energy = _sum(list(map(jnp.square, rows)))
        goal = (1 - max(weights.tolerance, TOLERANCE)) * its_error - FLOOR * energy
        scale = jnp.where((kept > 0) & (error >= goal), again, scale)
    scale = jnp.where(peak > 0, unit * scale / magnitudes[1], peak)
    return jnp.where(jnp.isfinite(peak), scale, jnp.nan)


def _best(rows: Sequence[Array]) -> tuple[Array, Array]:
    """The mean of the k largest entries for the best k, and its error, for sorted rows.

    Errors are sums of squares, because a difference of such sums would lose what is left of them.
    """
    beyond = [jnp.zeros_like(rows[0])]  # the squares of all entries after the first k
    for row in reversed(rows):
        beyond.append(beyond[-1] + jnp.square(row))
    mean = within = jnp.zeros_like(rows[0])
    best, least = mean, beyond.pop()
    for k, row in enumerate(rows, start=1):
        step = row - mean
        mean += step * (1 / k)
        within += jnp.square(step) * ((k - 1) / k)
        error = within + beyond.pop()
        best, least = jnp.where(error < least, mean, best), jnp.minimum(error, least)
    return best, least


def _refitted(rows: Sequence[Array], scale: Array) -> tuple[Array, Array]:
    """The mean of the entries nearer to a scale than to 0, and its error as a scale."""
    above = [(row > scale / 2).astype(scale.dtype) for row in rows]
    missing = _sum([(row - scale) * each for row, each in zip(rows, above, strict=True)])
    number = _sum(above)
    scale = jnp.where(number > 0, scale + missing / jnp.maximum(number, 1), scale)
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
