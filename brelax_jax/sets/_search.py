"""The search for the scale: the global minimizer of the squared error over s.

For magnitudes 0 ≤ m₁ < … < m_K and a = |w| let E(s) = Σᵢ min_l (aᵢ − s·m_l)². E has many local
minima, so descending from a start (alternating minimization, "Lloyd") is not enough. But

    h(s) = (Σ a² − E(s)) / s = Σᵢ max_l (2·aᵢ·m_l − s·m_l²)

is a sum of maxima of lines, hence convex. Between two scales at which E is known, h lies below its
chord, which gives a lower bound of E on the interval in closed form, tight to second order in the
width. So branch and bound needs one reduction over the weights for each evaluation of E and no
sort. It goes from the least scale up: where the bound shows that an interval holds nothing better
than the best scale known, it moves on, else it splits the interval. What it remembers is a short
stack of scales ahead at which E is known; the farthest are forgotten when it is full, which costs
an evaluation later. It ends with a certificate: no scale anywhere has an error below the best one
found by more than `TOLERANCE`, relative, or by more than the tolerance of a scale that is kept.

Where only some scales are allowed, it evaluates no others, and an interval with none inside is
passed.

This is the search of one array, one scale a round, which is fastest on CPU. For small groups
`_sweep.py` takes its place, and on accelerators `_together.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._weights import Unit, Weights, error, gains, refitted

INTERVALS = 4  # to begin with, geometrically spaced
STACK = 8  # scales ahead that are remembered
ADVANCES = 3  # intervals that an evaluation may leave behind, at most
ROUNDS = 2000  # evaluations of E at most; ternary takes about 10, Uniform(8) up to 400
TOLERANCE = 1e-6  # of the squared error
FLOOR = 1e-12  # of the sum of squares: errors below are rounding

Known: TypeAlias = Array  # scales, and the errors at them, along a first axis of two


class Goal(NamedTuple):
    """What is wanted of each group.

    Attributes:
      energy: the sum of a² over the group.
      kept: the scale to keep while it is nearly the best; −1 if there is none.
      tolerance: how far the error of the answer may be above the least, relative.
    """

    energy: Array
    kept: Known
    tolerance: Array

    def search_below(self, best: Known) -> Array:
        """The error below which a scale is worth searching for."""
        return (1 - self.tolerance) * best[1] - FLOOR * self.energy

    def replace_below(self, best: Known) -> Array:
        """The error below which another scale replaces the best one."""
        return jnp.where(best[0] == self.kept[0], self.search_below(best), best[1])


class Problem(NamedTuple):
    """What the search of one array is given.

    Attributes:
      a: magnitudes of weights, less than 2.
      peak: the largest of each group.
      magnitudes: those of the levels, ascending.
      group: which entries of `a` form a group.
      unit: what the weights were divided by.
      goal: what is wanted.
    """

    a: Array
    peak: Array
    magnitudes: Sequence[float]
    group: Group
    unit: Unit
    goal: Goal

    def known(self, scale: Array) -> Known:
        """A scale with its error, from one pass over the weights."""
        return jnp.stack([scale, error(self.a, scale, self.magnitudes, self.group)])

    def refitted(self, scale: Array) -> Array:
        """The least-squares scale for the codes that are nearest at `scale`."""
        return refitted(scale, *map(self.group.sum, gains(self.a, scale, self.magnitudes)))


class Search(NamedTuple):
    """What the loop carries.

    Attributes:
      below: up to here there is nothing better than the best.
      ahead: larger scales, ascending along the first axis; at the end repeats of the largest.
      end: the largest scale.
      best: the scale of the least error so far.
      rounds: evaluations so far.
    """

    below: Known
    ahead: Known
    end: Known
    best: Known
    rounds: Array


def problem_of(magnitudes: Sequence[float], weights: Weights, peak: Array) -> Problem:
    """The problem for weights with this largest magnitude in each group."""
    if weights.allowed is None:
        unit = Unit(jnp.where(peak > 0, peak, 1), None)
    else:
        unit = Unit.of(peak, weights.allowed)
    a = unit.divided(jnp.abs(weights.w))
    energy = weights.group.sum(jnp.square(a))
    none = jnp.stack([jnp.full_like(energy, -1), jnp.full_like(energy, jnp.inf)])
    least = jnp.full_like(energy, TOLERANCE)
    goal = Goal(energy, none, least)
    problem = Problem(a, unit.divided(peak), magnitudes, weights.group, unit, goal)
    if weights.kept is None:
        return problem
    is_known = weights.kept > 0  # not in the first step
    kept = unit.nearest(problem.refitted(unit.divided(weights.kept)))
    tolerance = jnp.maximum(least, jnp.where(is_known, weights.tolerance, 0))
    goal = Goal(energy, problem.known(jnp.where(is_known, kept, jnp.nan)), tolerance)
    return problem._replace(goal=goal)


def branch_and_bound(problem: Problem) -> Search:
    """The search at its end."""
    start = _advance(problem, _start(problem))
    return lax.while_loop(_is_uncertain, partial(_split, problem), start)


def searched_scale(
    magnitudes: Sequence[float],
    weights: Weights,
    search: Callable[[Problem], Any] = branch_and_bound,
) -> Array:
    """argmin over the allowed s ≥ 0 of Σ min_l (|w| − s·m_l)², for each group.

    Args:
      magnitudes: those of the levels, ascending.
      weights: the weights.
      search: gives an object whose `best` is the best scale, with its error.

    Returns:
      Scales of w's dtype that broadcast against it: 0 for groups of zeros, NaN for groups that hold
      one or an infinity.
    """
    peak = weights.group.max(jnp.abs(weights.w))
    problem = problem_of(magnitudes, weights, peak)
    best = search(problem).best[0]
    if weights.allowed is None:
        best = problem.refitted(best)
    return problem.unit.scales(best, peak)


def first_nodes(problem: Problem) -> tuple[Known, Known]:
    """The least scale, the largest and some between, along a first axis; and the best of them, or
    the scale to keep.
    """
    a, unit = problem.a, problem.unit
    low, high = bounds(problem.magnitudes, problem.group.mean(a), problem.peak, unit)
    fractions = np.linspace(0, 1, INTERVALS + 1)
    step = jnp.asarray(fractions, a.dtype).reshape(-1, *[1] * a.ndim)
    nodes = lax.map(problem.known, between(low, high, step, unit))
    least = jnp.argmin(nodes[:, 1], axis=0)[None, None]
    best = jnp.take_along_axis(nodes, least, axis=0)[0]
    far = best[1] >= problem.goal.search_below(problem.goal.kept)
    return nodes, jnp.where(far, problem.goal.kept, best)


def _start(problem: Problem) -> Search:
    """The first intervals, and the best of their ends or the scale to keep."""
    nodes, best = first_nodes(problem)
    end = nodes[-1:]
    return Search(
        below=nodes[0],
        ahead=jnp.concatenate([nodes[1:], *[end] * (STACK - INTERVALS)]),
        end=end,
        best=best,
        rounds=jnp.zeros((), jnp.int32),
    )


def bounds(
    magnitudes: Sequence[float], mean: Array, peak: Array, unit: Unit
) -> tuple[Array, Array]:
    """The scales between which the best one is, for magnitudes with this mean and largest one.

    Outside of them every entry has the largest magnitude, or E falls toward them.
    """
    low = jnp.maximum(mean, jnp.finfo(mean.dtype).tiny) / magnitudes[-1]
    high = jnp.maximum(peak / next(m for m in magnitudes if m > 0), low)
    if unit.allowed is None:
        return low, high
    return unit.at_most(low), unit.at_most(unit.after(unit.at_most(high)))


def between(low: Array, high: Array, step: Array, unit: Unit) -> Array:
    """Scales from one to another, geometrically spaced: low at step 0 and high at step 1."""
    spaced = unit.at_most(jnp.exp(jnp.log(low) * (1 - step) + jnp.log(high) * step))
    return jnp.where(step == 0, low, jnp.where(step == 1, high, spaced))


def _is_uncertain(search: Search) -> Array:
    return (search.rounds < ROUNDS) & jnp.any(search.below[0] < search.end[0, 0])


def _split(problem: Problem, search: Search) -> Search:
    """After evaluating a scale inside the first interval of each group."""
    head, unit = search.ahead[0], problem.unit
    scale = unit.at_most(interval(search.below, head, problem.goal.energy)[1])
    if unit.allowed is not None:
        scale = jnp.clip(scale, unit.after(search.below[0]), head[0])
    middle = problem.known(scale)
    better = middle[1] < problem.goal.replace_below(search.best)
    search = search._replace(
        ahead=jnp.concatenate([middle[None], search.ahead[:-1]]),
        best=jnp.where(better, middle, search.best),
        rounds=search.rounds + 1,
    )
    # A loop, so that the program holds it once: it compiles in two thirds of the time.
    return lax.fori_loop(0, ADVANCES, lambda _, search: _advance(problem, search), search)


def _advance(problem: Problem, search: Search) -> Search:
    """Past the first interval, in the groups where it holds nothing better."""
    head = search.ahead[0]
    passed = ~is_open(search.below, head, search.best, problem.goal, problem.unit)
    rest = jnp.concatenate([search.ahead[1:], search.end])
    return search._replace(
        below=jnp.where(passed, head, search.below), ahead=jnp.where(passed, rest, search.ahead)
    )


def is_open(left: Known, right: Known, best: Known, goal: Goal, unit: Unit) -> Array:
    """Whether a scale between two others may be better than the best."""
    is_wide = right[0] > unit.after(left[0])
    return is_wide & (interval(left, right, goal.energy)[0] < goal.search_below(best))


def interval(left: Known, right: Known, energy: Array) -> tuple[Array, Array]:
    """A lower bound of E between two scales, and the scale at which to split their interval.

    With s = s₀·(1 + t·(r − 1)), r = s₁/s₀, the chord of h gives
    E(s) ≥ (1−t)·(s/s₀)·E₀ + t·(s/s₁)·E₁ − t·(1−t)·((r−1)²/r)·Σa², a quadratic in t.
    """
    (low, e0), (high, e1) = left, right
    ratio = high / low
    growth = ratio - 1
    slack = energy * growth * growth / ratio
    linear = e0 * (growth - 1) + e1 / ratio - slack
    square = (e1 / ratio - e0) * growth + slack
    vertex = jnp.where(
        square > 0, -linear / jnp.where(square > 0, 2 * square, 1), jnp.where(e1 < e0, 1.0, 0.0)
    )
    t = jnp.clip(vertex, 0, 1)
    bound = jnp.minimum(jnp.minimum(e0, e1), e0 + t * (linear + t * square))
    return jnp.maximum(bound, 0), low + (high - low) * jnp.clip(t, 0.1, 0.9)
