"""The search for the scales of many small groups on CPU: a part of them after the other.

A part stays in a core's cache. Its last group takes twice as many rounds as most do. So a part is
left when few of its groups are open, and the open ones of several parts are one more part.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._joined import are_local
from brelax_jax.sets._problem import Source, problem_of
from brelax_jax.sets._search import ROUNDS
from brelax_jax.sets._sweep import Sweep, start, step, swept_scales
from brelax_jax.sets._weights import Weights

GROUPS_OF_A_PART = 2**14
PARTS_OF_ONE = 16  # at most, whose open groups are one more part


def swept_in_parts(magnitudes: Sequence[float], rows: Weights, before: Array) -> Array:
    """As `swept_scales` for one array, one scale a round."""
    groups = rows.w.shape[-1]
    parts = -(-groups // GROUPS_OF_A_PART) if are_local() and isinstance(groups, int) else 1
    if parts == 1:
        return swept_scales(magnitudes, [rows], 1, before)[0]
    each = -(-groups // parts)
    few = each // min(parts, PARTS_OF_ONE)
    late = -(-parts * few // each)

    def after(turn: Array, so_far: tuple[Array, Array]) -> tuple[Array, Array]:
        scales, found = so_far
        is_late = turn >= parts
        first = jnp.minimum(turn * each, groups - each)  # the last part would end late
        places = lax.cond(
            is_late,
            lambda: jnp.nonzero(found[0], size=each, fill_value=groups)[0].astype(jnp.int32),
            lambda: _as_varying(first + jnp.arange(each, dtype=jnp.int32), found),
        )

        def of_this_part(x: Array) -> Array:
            return lax.cond(
                is_late,
                lambda: jnp.take(x, places, axis=-1, mode="clip"),
                lambda: lax.dynamic_slice_in_dim(x, first, each, axis=-1),
            )

        own = jax.tree.map(of_this_part, (rows.w, rows.kept, found))
        w, kept, known = lax.optimization_barrier(own)
        problem = problem_of(magnitudes, Source.of(rows._replace(w=w, kept=kept), before))
        begin = start(1, problem)
        begin = lax.cond(is_late, lambda: _going_on(begin, known), lambda: begin)
        most_open = jnp.where(is_late, 0, few)
        end = lax.while_loop(
            lambda search: (search.rounds < ROUNDS) & (jnp.sum(search.is_open) > most_open),
            partial(step, problem),
            begin,
        )
        own_scales = problem.scales(end.best[0]).reshape(-1)
        scales = scales.at[places].set(own_scales, mode="drop")
        return scales, found.at[:, places].set(_known(end), mode="drop")

    zeros = jnp.zeros_like(rows.w[(0,) * (rows.w.ndim - 1)])
    return lax.fori_loop(0, parts + late, after, (zeros, jnp.stack([zeros] * 6)))[0]


def _as_varying(x: Array, like: Array) -> Array:
    """x as another array's type has it inside `jax.shard_map`: different on each device."""
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return lax.pcast(x, axes, to="varying") if axes else x


def _known(search: Sweep) -> Array:
    """What is known of each group, along a first axis: whether it is open, and what a search needs
    to go on.
    """
    [ahead] = search.ahead
    known = search.is_open.astype(ahead.dtype), ahead, *search.below, *search.best
    return jnp.stack([x.reshape(-1) for x in known])


def _going_on(begin: Sweep, known: Array) -> Sweep:
    """A search that has begun before."""
    _, ahead, *rest = known.reshape(-1, *begin.end.shape)
    return begin._replace(ahead=[ahead], below=tuple(rest[:2]), best=tuple(rest[2:]))
