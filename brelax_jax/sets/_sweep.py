"""The search for the scales of small groups: all groups at once, and little to remember.

The bound and the certificate are those of `_search.py`, but a group has few entries. So what is
remembered of each costs as much as evaluating E, and a reduction along so short an axis more. Here
the entries of the groups are rows, which are added. Nothing is remembered of what is ahead: the
search goes up from the least scale by steps, as far as the bound is expected to allow. Where it
does not, the next step is a shorter one.

On CPU a round evaluates one scale. On accelerators it evaluates a few, because there reading the
weights and launching kernels cost more than arithmetic: the scales of the next steps, were they
all as long as the first.
"""

import functools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._problem import (
    Goal,
    Pair,
    Problem,
    Source,
    interval,
    is_open,
    problem_of,
)
from brelax_jax.sets._search import ROUNDS, first_scales
from brelax_jax.sets._weights import Weights

GROWTH = 1.5  # of a step, at least, after one that the bound allowed
FEW = 4  # scales a round, on accelerators


class Sweep(NamedTuple):
    """What the loop carries.

    Attributes:
      below: up to here there is nothing better than the best.
      ahead: the larger ones to evaluate next, ascending; none is evaluated beyond the end.
      best: the scale of the least error so far.
      end: the largest scale.
      rounds: so far.
    """

    below: Pair
    ahead: list[Array]
    best: Pair
    end: Array
    rounds: Array


def swept_scales(
    magnitudes: Sequence[float],
    arrays: Sequence[Weights],
    scales: int,
    before: Array | None = None,
) -> list[Array]:
    """As `searched_scale`, for each of some arrays in rows, in one loop; scales keep the shape of
    rows.

    Args:
      magnitudes: those of the levels, ascending.
      arrays: the weights.
      scales: to evaluate in each group in each round.
      before: see `Source.of`.
    """
    problems = [problem_of(magnitudes, Source.of(each, before)) for each in arrays]
    return [
        problem.scales(search.best[0])
        for problem, search in zip(problems, sweeps(problems, scales), strict=True)
    ]


def sweeps(problems: Sequence[Problem], scales: int) -> tuple[Sweep, ...]:
    """The searches at their end."""

    def is_uncertain(searches: tuple[Sweep, ...]) -> Array:
        any_open = [jnp.any(each.below[0] < each.end) for each in searches]
        return (searches[0].rounds < ROUNDS) & functools.reduce(jnp.logical_or, any_open)

    def step(searches: tuple[Sweep, ...]) -> tuple[Sweep, ...]:
        return tuple(map(_step, problems, searches))

    return lax.while_loop(is_uncertain, step, tuple(map(partial(_start, scales), problems)))


def _start(scales: int, problem: Problem) -> Sweep:
    first = first_scales(problem.low, problem.high, problem.unit)

    def evaluated(nodes: tuple[Pair, Pair], scale: Array) -> tuple[tuple[Pair, Pair], None]:
        below, best = nodes
        node = scale, problem.errors([scale])[0]
        below = _where(scale <= below[0], node, below)
        return (below, _where(node[1] < best[1], node, best)), None

    unknown = first[0], jnp.full_like(first[0], jnp.inf)
    (below, best), _ = lax.scan(evaluated, (unknown, unknown), first)
    best = _best_of(best, problem.goal)
    ahead = _ahead(scales, below, _onward(problem, below, best))
    return Sweep(below, ahead, best, first[-1], jnp.zeros((), jnp.int32))


def _ahead(scales: int, below: Pair, first: Array) -> list[Array]:
    """Some scales to evaluate next, from the first one on."""
    step = first - below[0]
    return [first + i * step for i in range(scales)]


@jax.jit
def _best_of(least: Pair, goal: Goal) -> Pair:
    """The best scale so far, or the scale to keep."""
    kept = goal.kept[0], goal.kept[1]
    return _where((kept[0] > 0) & (least[1] >= goal.search_below(kept)), kept, least)


def _step(problem: Problem, sweep: Sweep) -> Sweep:
    """After evaluating the next scales of each group."""
    below, best, end, goal, unit = sweep.below, sweep.best, sweep.end, problem.goal, problem.unit
    scales = [below[0]]
    for scale in sweep.ahead:
        scale = jnp.minimum(scale, end)
        if unit.allowed is not None:
            scale = jnp.clip(unit.at_most(scale), unit.after(scales[-1]), end)
        scales.append(scale)
    # The barriers keep XLA from computing what is used several times as often.
    scales = lax.optimization_barrier(scales[1:])
    nodes = list(zip(scales, lax.optimization_barrier(problem.errors(scales)), strict=True))
    for node in nodes:
        best = _where(node[1] < goal.replace_below(best), node, best)
    best = lax.optimization_barrier(best)
    passed, step, shorter, low = jnp.ones_like(end, bool), below[0], below[0], below
    for node in nodes:
        shorter = jnp.where(passed, interval(low, node, goal.energy)[1], shorter)
        passed &= ~is_open(low, node, best, goal, unit)
        step = jnp.where(passed, node[0] - low[0], step)
        below = _where(passed, node, below)
        low = node
    onward = jnp.maximum(_onward(problem, below, best), below[0] + GROWTH * step)
    passed, onward, shorter = lax.optimization_barrier((passed, onward, shorter))
    ahead = _ahead(len(nodes), below, jnp.where(passed, onward, shorter))
    return Sweep(below, ahead, best, end, sweep.rounds + 1)


def _where(condition: Array, one: Pair, other: Pair) -> Pair:
    return jnp.where(condition, one[0], other[0]), jnp.where(condition, one[1], other[1])


def _onward(problem: Problem, head: Pair, best: Pair) -> Array:
    """The scale up to which the bound would allow a step, were E the same there.

    With e₀ = e₁ the bound of `interval` is about E − ¼(r − 1)²·Σa².
    """
    goal = problem.goal
    excess = jnp.maximum(head[1] - goal.search_below(best), 0)
    return head[0] * (1 + 2 * jnp.sqrt(excess / goal.energy))
