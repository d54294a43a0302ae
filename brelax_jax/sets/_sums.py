"""The sums of two arrays that are computed of the same weights.

On accelerators they are one reduction. XLA on CPU takes two, and first writes to memory what both
have in common. Of a large array that takes longer than the sums, the more so because the memory is
new: the C library gives large blocks back to the system after each program. So there a large array
is taken in pieces, which stay in the cache of a core.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._joined import are_local

PIECE = 2**16  # weights

Function: TypeAlias = Callable[..., tuple[Array, Array]]


def sums(function: Function, group: Group, w: Array, *numbers: Array) -> tuple[Array, Array]:
    """The sums over each group of both arrays that function(w, *numbers) gives.

    Args:
      function: elementwise.
      group: the reductions over a group.
      w: the weights, in a view that has these groups.
      *numbers: one a group, as reductions give them.
    """
    return lax.platform_dependent(
        w,
        *numbers,
        cpu=partial(_in_pieces, function, group),
        default=lambda w, *numbers: group.sums(*function(w, *numbers)),
    )


def _in_pieces(function: Function, group: Group, w: Array, *numbers: Array) -> tuple[Array, Array]:
    """A large array whose groups lie along its first axes is taken in pieces."""
    shape = group.numbers(w)
    per_row = math.prod(shape)  # weights, one of each group
    lies_along = group.axes == tuple(range(len(group.axes))) and not group.axis_names
    is_large = isinstance(w.size, int) and w.size >= 2 * PIECE  # else it has only a name
    if not (lies_along and is_large and per_row <= PIECE and are_local()):
        one, other = function(w, *numbers)
        return group.sum(one), group.sum(other)
    rows = PIECE // per_row  # of a piece
    row = () if per_row == 1 else (per_row,)
    w, numbers = w.reshape(-1, *row), tuple(x.reshape(row) for x in numbers)

    def add(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        one, other = function(lax.dynamic_slice_in_dim(w, i * rows, rows), *numbers)
        return total[0] + jnp.sum(one, axis=0), total[1] + jnp.sum(other, axis=0)

    pieces, rest = divmod(len(w), rows)
    one, other = function(w[len(w) - rest :], *numbers)
    total = lax.fori_loop(0, pieces, add, (jnp.sum(one, axis=0), jnp.sum(other, axis=0)))
    return total[0].reshape(shape), total[1].reshape(shape)
