"""The sums of two arrays that are computed of the same weights.

On accelerators they are one reduction. XLA on CPU takes two, and first writes to memory what both
have in common. Of a large array that takes longer than the sums, the more so because the memory is
new: the C library gives large blocks back to the system after each program. So there a large array
is taken in pieces, which stay in the cache of a core.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._joined import are_local

PIECE = 2**16  # weights

Function: TypeAlias = Callable[..., tuple[Array, Array]]  # of weights and of numbers, elementwise
Sums: TypeAlias = Callable[..., tuple[Array, Array]]  # of a function, as the two below


def sums_at_once(
    function: Function, group: Group, w: Array, *numbers: Array
) -> tuple[Array, Array]:
    """The sums over each group of both arrays that function(w, *numbers) gives.

    Args:
      function: elementwise.
      group: the reductions over a group.
      w: the weights.
      *numbers: one a group, as reductions give them.
    """
    return group.sums(*function(w, *numbers))


def sums_in_pieces(
    function: Function, group: Group, w: Array, *numbers: Array
) -> tuple[Array, Array]:
    """As `sums_at_once`, as is fast on CPU."""
    is_one_group = len(group.axes) == w.ndim and not group.axis_names
    if not is_one_group or w.size < 2 * PIECE or not are_local():
        one, other = function(w, *numbers)
        return group.sum(one), group.sum(other)
    flat, shape = w.reshape(-1), group.numbers(w)
    numbers = tuple(x.reshape(()) for x in numbers)

    def add(i: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
        one, other = function(lax.dynamic_slice(flat, (i * PIECE,), (PIECE,)), *numbers)
        return total[0] + jnp.sum(one), total[1] + jnp.sum(other)

    pieces, rest = divmod(w.size, PIECE)
    one, other = function(flat[w.size - rest :], *numbers)
    one, other = lax.fori_loop(0, pieces, add, (jnp.sum(one), jnp.sum(other)))
    return one.reshape(shape), other.reshape(shape)
