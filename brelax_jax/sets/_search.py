"""The search for the scale: branch and bound.

It needs one reduction over the weights for each evaluation of E and no sort, and a bound of E
between two scales (`_problem.py`). It goes from the least scale up: where the bound shows that an
interval holds nothing better than the best scale known, it moves on, else it splits the interval.
What it remembers is a short stack of scales ahead at which E is known; the farthest are forgotten
when it is full, which costs an evaluation later.

Where only some scales are allowed, it evaluates no others, and an interval with none inside is
passed.

This is the search of one array, one scale a round, which is fastest on CPU; large arrays have bins
before it (`_bins.py`). On accelerators `_together.py` takes its place, and for small groups
`_sweep.py`, everywhere.

What is computed of each group, and not of each weight, is jitted: it is traced once for all arrays
with as many groups.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from brelax_jax.sets._problem import (
    Goal,
    Known,
    Problem,
    Source,
    interval,
    is_open,
    may_be_better,
    problem_of,
)
from brelax_jax.sets._weights import Unit

INTERVALS = 4  # to begin with, geometrically spaced
STACK = 8  # scales ahead that are remembered
ADVANCES = 3  # intervals that an evaluation may leave behind, at most
ROUNDS = 10_000  # at most, so that every search ends; ternary takes about 10, Uniform(8) up to 400


class Search(NamedTuple):
    """What the loop carries.

    Attributes:
      below: up to here there is nothing better than the best.
      ahead: larger scales, ascending along the first axis; at the end repeats of the largest.
      end: the largest scale.
      best: the scale of the least error so far.
      rounds: evaluations so far, but for the first scales, which are evaluated in negative rounds.
      left: with a goal in doubt, the least and the largest scale that may be better than the best.
    """

    below: Known
    ahead: Known
    end: Known
    best: Known
    rounds: Array
    left: Array | None = None


def branch_and_bound(problem: Problem) -> Search:
    """The search at its end."""
    first = first_scales(problem.low, problem.high, problem.unit)
    return lax.while_loop(_is_uncertain, partial(_split, problem, first), _start(problem))


def searched_scale(
    magnitudes: Sequence[float],
    source: Source,
    search: Callable[[Problem], Any] = branch_and_bound,
) -> Array:
    """argmin over the allowed s ≥ 0 of Σ min_l (|w| − s·m_l)², for each group.

    Args:
      magnitudes: those of the levels, ascending.
      source: the weights.
      search: gives an object whose `best` is the best scale, with its error.

    Returns:
      Scales of w's dtype, one a group: 0 for groups of zeros, NaN for groups that hold one or an
      infinity.
    """
    problem = problem_of(magnitudes, source)
    return problem.scales(search(problem).best[0])


@jax.jit
def first_scales(low: Array, high: Array, unit: Unit) -> Array:
    """The least scale, the largest and some between, along a first axis."""
    fractions = np.linspace(0, 1, INTERVALS + 1)
    step = jnp.asarray(fractions, low.dtype).reshape(-1, *[1] * low.ndim)
    return between(low, high, step, unit)


def _start(problem: Problem) -> Search:
    """Before anything is evaluated."""
    low, high, goal = problem.low, problem.high, problem.goal
    below, end = jnp.stack([low, goal.energy]), jnp.stack([high, goal.energy])[None]
    return Search(
        below=below,
        ahead=jnp.concatenate([end] * STACK),
        end=end,
        best=goal.kept,
        rounds=jnp.full((), -(INTERVALS + 1), jnp.int32),
        left=None if goal.doubt is None else jnp.stack([high, low]),
    )


def between(low: Array, high: Array, step: Array, unit: Unit) -> Array:
    """Scales from one to another, geometrically spaced: low at step 0 and high at step 1."""
    spaced = unit.at_most(jnp.exp(jnp.log(low) * (1 - step) + jnp.log(high) * step))
    return jnp.where(step == 0, low, jnp.where(step == 1, high, spaced))


def _is_uncertain(search: Search) -> Array:
    is_open = jnp.any(search.below[0] < search.end[0, 0])
    return (search.rounds < 0) | ((search.rounds < ROUNDS) & is_open)


def _split(problem: Problem, first: Array, search: Search) -> Search:
    """After evaluating a scale inside the first interval of each group; to begin with, one of the
    first scales, from the largest down.
    """
    goal, unit = problem.goal, problem.unit
    return _after(goal, unit, search, problem.known(_next_scale(goal, unit, first, search)))


@jax.jit
def _next_scale(goal: Goal, unit: Unit, first: Array, search: Search) -> Array:
    scale = unit.at_most(interval(search.below, search.ahead[0], goal.energy)[1])
    if unit.allowed is not None:
        scale = jnp.clip(scale, unit.after(search.below[0]), search.ahead[0, 0])
    return jnp.where(search.rounds < 0, first[jnp.maximum(-1 - search.rounds, 0)], scale)


@jax.jit
def _after(goal: Goal, unit: Unit, search: Search, middle: Known) -> Search:
    best = search.best
    better = ~(middle[1] >= goal.replace_below(best))  # than a scale whose error is NaN, too
    # Where all errors overflow, the least scale is the best one.
    better |= jnp.isinf(best[1]) & ((best[0] <= 0) | (middle[0] < best[0]))
    is_largest = search.rounds == -(INTERVALS + 1)
    search = search._replace(
        ahead=jnp.concatenate([middle[None], search.ahead[:-1]]),
        end=jnp.where(is_largest, middle, search.end),
        best=jnp.where(better, middle, best),
        rounds=search.rounds + 1,
    )
    # A loop, so that the program holds it once: it compiles in two thirds of the time.
    return lax.fori_loop(0, ADVANCES, lambda _, search: _advance(goal, unit, search), search)


def _advance(goal: Goal, unit: Unit, search: Search) -> Search:
    """Past the first interval, in the groups where it holds nothing better."""
    head = search.ahead[0]
    passed = ~is_open(search.below, head, search.best, goal, unit) & (search.rounds >= 0)
    rest = jnp.concatenate([search.ahead[1:], search.end])
    left = search.left
    if left is not None:
        better = may_be_better(search.below, head, search.best, goal) & passed
        least, largest = jnp.minimum(left[0], search.below[0]), jnp.maximum(left[1], head[0])
        left = jnp.where(better, jnp.stack([least, largest]), left)
    return search._replace(
        below=jnp.where(passed, head, search.below),
        ahead=jnp.where(passed, rest, search.ahead),
        left=left,
    )
