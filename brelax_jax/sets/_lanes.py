"""Blocks along the last axis, on TPUs.

A TPU keeps the last two axes of an array in tiles of 8 × 128. A view whose last axis is a short
block has other tiles. So XLA would copy whatever is computed with it: params, float weights,
momentum and gradients. Here a number of each block is repeated for its entries within the array's
own tiles, and groups are reduced in one transposed copy.
"""

from collections.abc import Sequence
from functools import partial

import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._joined import are_local

LANES = 128
SUBLANES = 8
MOST_PARTS = 8  # blocks that share 128 lanes: programs grow with them
UPRIGHT = Group((1,))


def lies_across(view: Array, group: Group) -> bool:
    """Whether groups lie along the last axis of a view with others before the last two, all of
    which is on one device.
    """
    return (
        view.ndim > 2
        and group == Group((view.ndim - 1,))
        and are_local()
        and all(isinstance(size, int) for size in view.shape)
    )


def upright(view: Array) -> Array:
    """A view in blocks along its last axis, (…, blocks, entries), as (blocks, entries, …) with one
    axis for all others; or so the numbers of its blocks.

    XLA chooses the layout of an array by what is done with it, and would choose the transposed one
    for all that is added to the weights too. It cannot do that through a vector, which has only
    one. The entries of this vector are in the order in which they are in memory.
    """
    blocks, entries = view.shape[-2:]
    x = view.reshape(-1, blocks * entries)
    if x.shape[0] % SUBLANES == 0 and x.shape[1] % LANES == 0:
        tiles = x.reshape(-1, SUBLANES, x.shape[1] // LANES, LANES).swapaxes(1, 2)
        flat = lax.optimization_barrier(tiles.reshape(-1))
        x = flat.reshape(tiles.shape).swapaxes(1, 2).reshape(x.shape)
    else:
        x = lax.optimization_barrier(x.reshape(-1)).reshape(x.shape)
    # The barriers keep the two steps apart, and what follows from being done before the copy.
    x = lax.optimization_barrier(x).T.reshape(blocks, entries, -1)
    return lax.optimization_barrier(x)


def laid_back(numbers: Array, shape: Sequence[int]) -> Array:
    """Numbers of upright blocks as they broadcast against the view: the reverse of `upright`."""
    return numbers.reshape(numbers.shape[0], -1).T.reshape(shape)


def repeated(numbers: Array, size: int) -> Array:
    """Numbers of blocks along the last axis, each as often as its block has entries."""
    anywhere = partial(_repeated, size)
    if not _is_in_tiles(numbers, size):
        return anywhere(numbers)
    in_tiles = partial(repeated_in_tiles, size)
    return lax.platform_dependent(numbers, tpu=in_tiles, default=anywhere)


def _repeated(size: int, numbers: Array) -> Array:
    *before, blocks = numbers.shape
    beside = jnp.broadcast_to(numbers[..., None], (*numbers.shape, size))
    return beside.reshape(*before, blocks * size)


def _is_in_tiles(numbers: Array, size: int) -> bool:
    """Whether all tiles of the array are full, and blocks do not cross them."""
    shape = numbers.shape
    return (
        len(shape) > 1
        and are_local()
        and all(isinstance(each, int) for each in shape)
        and shape[-2] % SUBLANES == 0
        and shape[-1] * size % LANES == 0
        and (LANES % size == 0 or size % LANES == 0)
        and LANES // size <= MOST_PARTS
    )


def repeated_in_tiles(size: int, numbers: Array) -> Array:
    """As `repeated`. The reshapes change nothing in memory, and XLA computes the result where it is
    used.
    """
    *before, rows, blocks = numbers.shape
    rows = *before, rows // SUBLANES, SUBLANES
    tiles = *rows, blocks * size // LANES, LANES
    # Blocks first: a last axis of one entry takes 128 in memory.
    numbers = jnp.moveaxis(numbers, -1, 0)
    if size > LANES:
        numbers = jnp.repeat(numbers, size // LANES, axis=0)
    parts = max(LANES // size, 1)  # of a tile, each of another block
    numbers = lax.optimization_barrier([numbers[i::parts] for i in range(parts)])
    part = lax.broadcasted_iota(jnp.int32, tiles, len(tiles) - 1) // size
    found = jnp.zeros(tiles, numbers[0].dtype)
    for i, each in enumerate(numbers):
        each = jnp.moveaxis(each, 0, -1).reshape(*rows, -1, 1)
        found = jnp.where(part == i, each, found)
    return found.reshape(*before, -1, blocks * size)
