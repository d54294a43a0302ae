"""Small groups as rows: the entries of a group lie along the first axes.

So what is summed over a group is a sum of arrays, and nothing is reduced along a short axis. On a
single device the groups of several arrays are one array, if they have as many entries and the same
tolerance: whatever is done with them is in the program once, and is launched once.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax.sets._group import Group
from brelax_jax.sets._joined import Layout, are_local
from brelax_jax.sets._weights import Weights

MOST_ROWS = 64  # programs grow with them
MOST_WEIGHTS = 2**24  # of arrays that lie side by side, or share a loop: all are copied meanwhile


class Rows(Group):
    """Groups of few entries, which lie along the first axes."""

    def _reduced(self, combine: Callable[[Array, Array], Array], x: Array) -> Array:
        return functools.reduce(combine, self._each(x))

    def _each(self, x: Array) -> list[Array]:
        rows = [x]
        for axis in self.axes:
            rows = [part for row in rows for part in jnp.split(row, x.shape[axis], axis)]
        return rows

    def sum(self, x: Array) -> Array:
        """See `Group.sum`."""
        return self._reduced(jnp.add, x)

    def mean(self, x: Array) -> Array:
        """See `Group.mean`."""
        return self.sum(x) / self.size(x)

    def max(self, x: Array, initial: float | None = None) -> Array:
        """See `Group.max`."""
        largest = self._reduced(jnp.maximum, x)
        return largest if initial is None else jnp.maximum(largest, initial)

    def peak(self, w: Array) -> Array:
        """See `Group.peak`."""
        return self.max(jnp.abs(w))


class RowsOneByOne(Rows):
    """The same for CPUs, where what is computed of all rows would be written to memory before it
    is added.
    """

    def sum_of(self, function: Callable[[Array], Array], x: Array) -> Array:
        """See `Group.sum_of`."""
        return functools.reduce(jnp.add, map(function, self._each(x)))


def has_rows(weights: Weights, most: int = MOST_ROWS) -> bool:
    """Whether each group has at most so many entries, and is not known to be on several devices."""
    w, group = weights.w, weights.group
    spec = (*jax.typeof(w).sharding.spec, *[None] * w.ndim)
    return (
        len(group.axes) < w.ndim
        and not group.axis_names
        and all(spec[axis] is None for axis in group.axes)
        and group.size(w) <= most
    )


def in_rows(weights: Weights, rows: type[Rows] = Rows) -> Weights:
    """The weights with the axes of a group first, and one axis of all groups behind them."""
    axes = weights.group.axes
    first = tuple(range(len(axes)))

    def moved(x: Array) -> Array:
        x = jnp.moveaxis(x, axes, first)
        # Without a short last axis programs are faster, but XLA would move sharded groups.
        return x.reshape(*x.shape[: len(first)], -1) if are_local() else x

    w, kept = jax.tree.map(moved, (weights.w, weights.kept))
    return weights._replace(w=w, kept=kept, group=rows(first))


class Joined(NamedTuple):
    """The groups of some arrays, side by side where they are on one device.

    Attributes:
      members: which of the arrays.
      views: the shape of the scales of each, as they broadcast against it.
      weights: all groups, in rows.
    """

    members: list[int]
    views: tuple[tuple[int, ...], ...]
    weights: Weights

    def split(self, scales: Array) -> list[Array]:
        """The scales of each array, from those of all groups."""
        if len(self.views) == 1:
            return [scales.reshape(self.views[0])]
        return Layout(self.views).split(scales.reshape(-1))


def joined_rows(arrays: Sequence[Weights]) -> list[Joined]:
    """Arrays that have rows, those together that may be, up to `MOST_WEIGHTS`."""
    alike: dict[Hashable, list[int]] = {}
    for i, each in enumerate(arrays):
        # XLA would move one of those that are sharded differently.
        alone = None if are_local() and isinstance(each.w.size, int) else i
        alike.setdefault((each.entries, each.tolerance, alone), []).append(i)
    sizes = [each.w.size for each in arrays]
    members = [part for each in alike.values() for part in in_parts(each, sizes)]
    return [_joined(part, [arrays[i] for i in part]) for part in members]


def in_parts(members: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Members in parts of at most `MOST_WEIGHTS`, or of one; one whose size has only a name is
    alone.
    """
    parts: list[list[int]] = []
    total = None
    for i in members:
        is_known = isinstance(sizes[i], int)
        if total is None or not is_known or total + sizes[i] > MOST_WEIGHTS:
            parts.append([])
            total = 0
        parts[-1].append(i)
        total = total + sizes[i] if is_known else None
    return parts


def _joined(members: list[int], arrays: Sequence[Weights]) -> Joined:
    rows = [in_rows(each) for each in arrays]
    views = tuple(each.group.numbers(each.w) for each in arrays)
    if len(rows) == 1:
        return Joined(members, views, rows[0])

    def beside(parts: Sequence[Array]) -> Array:
        return jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in parts], axis=1)

    kept = [each.kept for each in rows if each.kept is not None]
    w, kept = beside([each.w for each in rows]), beside(kept) if kept else None
    return Joined(members, views, rows[0]._replace(w=w, kept=kept, group=Rows((0,))))
