"""Which search finds the scales of which array."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._in_turn import in_turn
from brelax_jax.sets._rows import has_rows, in_parts, joined_rows
from brelax_jax.sets._small_groups import is_small, small_scales, small_scales_on_cpu
from brelax_jax.sets._sweep import FEW, swept_scales
from brelax_jax.sets._together import at_once, shape_of
from brelax_jax.sets._weights import Weights

Search: TypeAlias = Callable[[Sequence[float], Sequence[Weights]], list[Array]]
Operands: TypeAlias = Sequence[tuple[Array, Array | None]]  # weights, and the scales to keep


def searched_scales(
    magnitudes: Sequence[float], arrays: Sequence[Weights], forced: bool | None = None
) -> list[Array]:
    """As `searched_scale`, for each of some arrays.

    Args:
      magnitudes: those of the levels, ascending.
      arrays: the weights.
      forced: for tests, whether to search as on accelerators, whatever the platform.
    """

    def by(search: Search, operands: Operands) -> list[Array]:
        given = zip(arrays, operands, strict=True)
        return search(magnitudes, [x._replace(w=w, kept=kept) for x, (w, kept) in given])

    operands = [(each.w, each.kept) for each in arrays]
    searches = partial(by, on_cpu), partial(by, on_accelerators)
    if forced is not None:
        return searches[forced](operands)
    return lax.platform_dependent(operands, cpu=searches[0], default=searches[1])


def on_cpu(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    """One array after the other, one scale a round."""
    small = [i for i, each in enumerate(arrays) if is_small(magnitudes, each)]
    scales = {i: small_scales_on_cpu(magnitudes, arrays[i]) for i in small}
    for members in _alike(arrays, [i for i in range(len(arrays)) if i not in small], by=shape_of):
        found = in_turn(magnitudes, [arrays[i] for i in members])
        scales |= zip(members, found, strict=True)
    return [scales[i] for i in range(len(arrays))]


def on_accelerators(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    """In as few kernels as can be: small groups in rows, side by side, and other arrays in one
    loop.
    """
    scales: dict[int, Array] = {}
    in_rows = [i for i, each in enumerate(arrays) if has_rows(each)]
    for members in _alike(arrays, in_rows):
        found = _scales_of_rows(magnitudes, [arrays[i] for i in members])
        scales |= zip(members, found, strict=True)
    rest = [i for i in range(len(arrays)) if i not in in_rows]
    for members in _alike(arrays, rest, by=shape_of):
        found = at_once(magnitudes, [arrays[i] for i in members])
        scales |= zip(members, found, strict=True)
    return [scales[i] for i in range(len(arrays))]


def _scales_of_rows(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    parts = joined_rows(arrays)
    found: dict[int, Array] = {}
    for i, part in enumerate(parts):
        if is_small(magnitudes, part.weights):
            # So that XLA computes them once, and not anew for each weight of a group.
            found[i] = lax.optimization_barrier(small_scales(magnitudes, part.weights))
    swept = [i for i in range(len(parts)) if i not in found]
    last = jnp.zeros(())  # so that one loop waits for the other: all copies at once are too many
    for members in in_parts(swept, [part.weights.w.size for part in parts]):
        own = [parts[i].weights for i in members]
        found |= zip(members, swept_scales(magnitudes, own, FEW, last), strict=True)
        last = jnp.max(found[members[-1]])
    scales: dict[int, Array] = {}
    for i, part in enumerate(parts):
        scales |= zip(part.members, part.split(found[i]), strict=True)
    return [scales[i] for i in range(len(arrays))]


def _alike(
    arrays: Sequence[Weights],
    members: Sequence[int],
    by: Callable[[Weights], Hashable] | None = None,
) -> list[list[int]]:
    """Those of the arrays that may share a loop, by their places; `by` is to be equal too.

    Inside `jax.shard_map` devices that share a group must do the same number of rounds.
    """
    loops: dict[Hashable, list[int]] = {}
    for i in members:
        weights = arrays[i]
        names = weights.group.axis_names
        varying = jax.typeof(weights.w).manual_axis_type.varying - set(names)
        kind = weights.w.dtype, names, varying, weights.kept is None, weights.allowed
        loops.setdefault((*kind, by and by(weights)), []).append(i)
    return list(loops.values())
