"""Which search finds the scales of which array."""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._in_turn import in_turn
from brelax_jax.sets._lanes import UPRIGHT, laid_back, lies_across, upright
from brelax_jax.sets._platform import by_platform
from brelax_jax.sets._rows import Joined, has_rows, in_parts, joined_rows
from brelax_jax.sets._small_groups import is_small, small_scales, small_scales_on_cpu
from brelax_jax.sets._sweep import FEW, swept_scales
from brelax_jax.sets._together import at_once, shape_of
from brelax_jax.sets._weights import Weights

Search: TypeAlias = Callable[[Sequence[float], Sequence[Weights]], list[Array]]
Operands: TypeAlias = Sequence[tuple[Array, Array | None]]  # weights, and the scales to keep


def searched_scales(
    magnitudes: Sequence[float], arrays: Sequence[Weights], forced: str | None = None
) -> list[Array]:
    """As `searched_scale`, for each of some arrays.

    Args:
      magnitudes: those of the levels, ascending.
      arrays: the weights.
      forced: for tests, the platform as on which to search, whatever it is.
    """
    on_others = partial(on_accelerators, forced=forced)
    return _by_platform(magnitudes, arrays, forced, on_others, cpu=on_cpu)


def _by_platform(
    magnitudes: Sequence[float],
    arrays: Sequence[Weights],
    forced: str | None,
    default: Search,
    **searches: Search,
) -> list[Array]:
    """By the search for the platform on which the program will run."""

    def by(search: Search, operands: Operands) -> list[Array]:
        given = zip(arrays, operands, strict=True)
        return search(magnitudes, [x._replace(w=w, kept=kept) for x, (w, kept) in given])

    operands = [(each.w, each.kept) for each in arrays]
    others = {platform: partial(by, search) for platform, search in searches.items()}
    return by_platform(forced, operands, default=partial(by, default), **others)


def on_cpu(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    """One array after the other, one scale a round."""
    small = [i for i, each in enumerate(arrays) if is_small(magnitudes, each)]
    scales = {i: small_scales_on_cpu(magnitudes, arrays[i]) for i in small}
    for members in _alike(arrays, [i for i in range(len(arrays)) if i not in small], by=shape_of):
        found = in_turn(magnitudes, [arrays[i] for i in members])
        scales |= zip(members, found, strict=True)
    return [scales[i] for i in range(len(arrays))]


def on_accelerators(
    magnitudes: Sequence[float], arrays: Sequence[Weights], forced: str | None = None
) -> list[Array]:
    """In as few kernels as can be: small groups by their own search, other arrays in one loop."""
    scales: dict[int, Array] = {}
    small = [i for i, each in enumerate(arrays) if has_rows(each)]
    for members in _alike(arrays, small):
        own = [arrays[i] for i in members]
        found = _by_platform(magnitudes, own, forced, in_joined_rows, tpu=where_they_lie)
        scales |= zip(members, found, strict=True)
    rest = [i for i in range(len(arrays)) if i not in small]
    for members in _alike(arrays, rest, by=shape_of):
        found = at_once(magnitudes, [arrays[i] for i in members])
        scales |= zip(members, found, strict=True)
    return [scales[i] for i in range(len(arrays))]


def in_joined_rows(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    """The scales of small groups: in rows, those of several arrays side by side."""
    scales: dict[int, Array] = {}
    swept: list[Joined] = []
    for part in joined_rows(arrays):
        if is_small(magnitudes, part.weights):
            # So that XLA computes them once, and not anew for each weight of a group.
            found = lax.optimization_barrier(small_scales(magnitudes, part.weights))
            scales |= zip(part.members, part.split(found), strict=True)
        else:
            swept.append(part)
    for part, found in zip(swept, _swept(magnitudes, [x.weights for x in swept]), strict=True):
        scales |= zip(part.members, part.split(found), strict=True)
    return [scales[i] for i in range(len(arrays))]


def where_they_lie(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    """The same on TPUs, which add along a short axis well if it is not the last one. Only what is
    sorted is put in rows, by a copy.
    """
    across = [lies_across(each.w, each.group) for each in arrays]
    moved = [_upright(x) if is_moved else x for x, is_moved in zip(arrays, across, strict=True)]
    rows = [i for i, each in enumerate(moved) if is_small(magnitudes, each)]
    rest = [i for i in range(len(moved)) if i not in rows]
    found = dict(zip(rows, in_joined_rows(magnitudes, [moved[i] for i in rows]), strict=True))
    found |= zip(rest, _swept(magnitudes, [moved[i] for i in rest]), strict=True)
    numbers = [each.group.numbers(each.w) for each in arrays]
    return [laid_back(found[i], numbers[i]) if across[i] else found[i] for i in range(len(arrays))]


def _upright(weights: Weights) -> Weights:
    w, kept = jax.tree.map(upright, (weights.w, weights.kept))
    return weights._replace(w=w, kept=kept, group=UPRIGHT)


def _swept(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    found: dict[int, Array] = {}
    last = jnp.zeros(())  # so that one loop waits for the other: all copies at once are too many
    for members in in_parts(range(len(arrays)), [each.w.size for each in arrays]):
        own = [arrays[i] for i in members]
        found |= zip(members, swept_scales(magnitudes, own, FEW, last), strict=True)
        last = jnp.max(found[members[-1]])
    return [found[i] for i in range(len(arrays))]


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
