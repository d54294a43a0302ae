"""Which search finds the scales of which array."""

from collections.abc import Hashable, Sequence
from functools import partial

import jax
from jax import Array, lax

from brelax_jax.sets._in_turn import in_turn
from brelax_jax.sets._small_groups import is_small, small_scales
from brelax_jax.sets._together import at_once, shape_of
from brelax_jax.sets._weights import Weights


def searched_scales(
    magnitudes: Sequence[float], arrays: Sequence[Weights], forced: bool | None = None
) -> list[Array]:
    """As `searched_scale`, for each of some arrays.

    Args:
      magnitudes: those of the levels, ascending.
      arrays: the weights.
      forced: for tests, whether to search together, whatever the platform.
    """
    loops: dict[Hashable, list[int]] = {}
    scales: dict[int, Array] = {}
    for i, each in enumerate(arrays):
        if is_small(magnitudes, each):
            scales[i] = small_scales(magnitudes, each)
        else:
            loops.setdefault(_loop_of(each), []).append(i)
    for members in loops.values():
        own = [arrays[i] for i in members]
        operands = [(each.w, each.kept) for each in own]
        searches = partial(in_turn, magnitudes, own), partial(at_once, magnitudes, own)
        if forced is not None:
            found = searches[forced](operands)
        else:
            found = lax.platform_dependent(operands, cpu=searches[0], default=searches[1])
        scales |= zip(members, found, strict=True)
    return [scales[i] for i in range(len(arrays))]


def _loop_of(weights: Weights) -> Hashable:
    """Arrays for which this is the same may share a loop.

    Inside `jax.shard_map` devices that share a group must do the same number of rounds.
    """
    names = weights.group.axis_names
    varying = jax.typeof(weights.w).manual_axis_type.varying - set(names)
    return weights.w.dtype, names, varying, weights.kept is None, weights.allowed, shape_of(weights)
