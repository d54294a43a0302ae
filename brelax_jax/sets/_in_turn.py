"""The least-squares scales of many arrays on CPU: one after the other, one scale a round.

XLA compiles a search for as long as some ten steps of training take. So arrays with as many groups
share one: it is a loop over them, and each pass over weights is a choice among the arrays. Whatever
is not such a pass is in the program once.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from brelax_jax.sets._bins import Large, has_bins, search_with_bins
from brelax_jax.sets._group import Group
from brelax_jax.sets._joined import are_local
from brelax_jax.sets._problem import Source, in_units
from brelax_jax.sets._rows import RowsOneByOne, has_rows, in_rows
from brelax_jax.sets._scale_dtype import Scales
from brelax_jax.sets._search import branch_and_bound, searched_scale
from brelax_jax.sets._sweep import swept_scales
from brelax_jax.sets._weights import Unit, Weights

MOST_ARRAYS = 32  # of one loop: each choice has as many branches, and each branch gets all arrays
GROUPS_OF_A_PART = 2**14  # small ones, which are searched together
# Of one loop of several arrays: all are kept in units. So many take less than 32 MB in float32.
# Larger temporaries go back to the system after each update, with glibc, and are zeroed anew.
MOST_WEIGHTS = 6 * 2**20


def in_turn(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    """As `searched_scale`, for each of some arrays.

    Args:
      magnitudes: those of the levels, ascending.
      arrays: the weights, of one dtype and with the same allowed scales.
    """
    magnitudes = tuple(magnitudes)
    scales: dict[int, Array] = {}
    last = jnp.zeros(())
    for members in _loops(arrays):
        found = _searched(magnitudes, [arrays[i] for i in members], last)
        scales |= zip(members, found, strict=True)
        last = jnp.max(found[-1])
    return [scales[i] for i in range(len(arrays))]


def _loops(arrays: Sequence[Weights]) -> list[list[int]]:
    """The places of the arrays that share a loop, for each loop."""
    loops: dict[Hashable, list[list[int]]] = {}
    for i, each in enumerate(arrays):
        # XLA would move one of those that are sharded differently.
        alone = has_rows(each) or not are_local()
        alike = loops.setdefault((each.groups, each.tolerance, i if alone else None), [[]])
        weights = each.w.size + sum(arrays[k].w.size for k in alike[-1])
        if alike[-1] and (len(alike[-1]) == MOST_ARRAYS or weights > MOST_WEIGHTS):
            alike.append([])
        alike[-1].append(i)
    return [members for alike in loops.values() for members in alike]


def _searched(magnitudes: Sequence[float], arrays: Sequence[Weights], before: Array) -> list[Array]:
    """The scales of arrays with as many groups."""
    if len(arrays) > 1:
        return _by_one_program(magnitudes, arrays, before)
    _, group, _, *settings = arrays[0]
    return [_searched_alone(magnitudes, group, *settings, before, arrays[0].w, arrays[0].kept)]


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _searched_alone(
    magnitudes: Sequence[float],
    group: Group,
    tolerance: float,
    allowed: Scales | None,
    before: Array,
    w: Array,
    kept: Array | None,
) -> Array:
    """Traced once for arrays of equal shapes."""
    weights = Weights(w, group, kept, tolerance, allowed)
    if has_rows(weights):
        return _swept_in_parts(magnitudes, in_rows(weights, RowsOneByOne), before).reshape(
            group.numbers(w)
        )
    search = search_with_bins if has_bins(weights) else branch_and_bound
    return searched_scale(magnitudes, Source.of(weights, before), search)


def _swept_in_parts(magnitudes: Sequence[float], rows: Weights, before: Array) -> Array:
    """The scales of small groups, a part of them after the other: it stays in a core's cache, and
    its search ends with its own last group.
    """
    groups = rows.w.shape[-1]
    parts = -(-groups // GROUPS_OF_A_PART) if are_local() and isinstance(groups, int) else 1
    if parts == 1:
        return swept_scales(magnitudes, [rows], 1, before)[0]
    each = -(-groups // parts)

    def searched(i: Array) -> Array:
        def of_this_part(x: Array) -> Array:  # the last one starts earlier, where it would end late
            return lax.dynamic_slice_in_dim(x, i * each, each, axis=-1)

        w, kept = lax.optimization_barrier(jax.tree.map(of_this_part, (rows.w, rows.kept)))
        own = rows._replace(w=w, kept=kept)
        return swept_scales(magnitudes, [own], 1, before)[0].reshape(-1)

    found = lax.map(searched, jnp.arange(parts))
    return jnp.concatenate([found[:-1].reshape(-1), found[-1][parts * each - groups :]])


def _by_one_program(
    magnitudes: Sequence[float], arrays: Sequence[Weights], before: Array
) -> list[Array]:
    """A loop over the arrays: whatever is not a pass over weights is in the program once."""
    in_turn = [in_units(each, before) for each in arrays]
    passes = [partial(_one_pass, a, x.group) for x, (*_, a) in zip(arrays, in_turn, strict=True)]
    is_large = np.array([has_bins(each) for each in arrays])
    large_passes = [each for each, is_one in zip(passes, is_large, strict=True) if is_one]

    def search(turn: _Turn) -> Array:
        unit = Unit.of(turn.peak, arrays[0].allowed)
        over = partial(_switch, turn.place, passes)
        source = Source(over, turn.peak, unit, turn.kept, arrays[0].tolerance)
        if not large_passes:
            return searched_scale(magnitudes, source)
        large = Large(turn.is_large, partial(_switch, turn.place_of_large, large_passes))
        return searched_scale(magnitudes, source, partial(search_with_bins, large=large))

    peaks = jnp.stack([peak.reshape(-1) for peak, *_ in in_turn])
    kept = [each.kept.reshape(-1) for each in arrays if each.kept is not None]
    places = jnp.arange(len(arrays)), jnp.asarray(np.cumsum(is_large) - is_large)
    turns = _Turn(*places, jnp.asarray(is_large), peaks, jnp.stack(kept) if kept else None)
    found = lax.map(search, turns)
    return [x.reshape(peak.shape) for x, (peak, *_) in zip(found, in_turn, strict=True)]


class _Turn(NamedTuple):
    """One array of a loop.

    Attributes:
      place: of it among all.
      place_of_large: of it among those that have bins, if it is one.
      is_large: whether it is.
      peak, kept: see `Source`.
    """

    place: Array
    place_of_large: Array
    is_large: Array
    peak: Array
    kept: Array | None


def _switch(
    place: Array,
    passes: Sequence[Callable[..., Any]],
    function: Callable[..., Any],
    *numbers: Array,
) -> Any:
    return lax.switch(place, [partial(each, function) for each in passes], *numbers)


@partial(jax.jit, static_argnums=(1, 2))
def _one_pass(a: Array, group: Group, function: Callable[..., Any], *numbers: Array) -> Any:
    """A pass over `a` whose numbers are vectors. Traced once for arrays of equal shapes."""
    found = function(a, group, *(x.reshape(group.numbers(a)) for x in numbers))
    return jax.tree.map(jnp.ravel, found)
