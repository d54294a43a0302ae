"""The search for the scale: the global minimizer of the squared error over s.

For magnitudes 0 ≤ m₁ < … < m_K and a = |w| let E(s) = Σᵢ min_l (aᵢ − s·m_l)². E has many local
minima, so descending from a start (alternating minimization, "Lloyd") is not enough. But

    h(s) = (Σ a² − E(s)) / s = Σᵢ max_l (2·aᵢ·m_l − s·m_l²)

is a sum of maxima of lines, hence convex. Between two scales at which E is known, h lies below its
chord, which gives a lower bound of E on the interval in closed form, tight to second order in the
width. So branch and bound needs reductions over the weights, some scales at a time, and no sort.

It keeps a list of the open intervals, ascending: those in which the bound does not exclude a better
scale than the best one known. Each round evaluates E at some scales inside them and keeps of the
parts what is still open. If the list is full, what is known of the farthest is forgotten, which
costs evaluations later. It ends with a certificate: no scale anywhere has an error below the best
one found by more than `TOLERANCE`, relative, or by more than the tolerance of a scale that is kept.

The weights occur in `evaluate` only. All else is done for all groups at once, as vectors.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

ADVANCES = 3  # intervals that one evaluation may leave behind, at most
ROUNDS = 2000  # at most; with one scale each, ternary takes about 10, Uniform(8) up to 400
TOLERANCE = 1e-6  # of the squared error
FLOOR = 1e-12  # of the sum of squares: errors below are rounding

Known: TypeAlias = Array  # scales, and the errors at them, along a first axis of two
Evaluate: TypeAlias = Callable[[Array], Array]  # of E, at some scales a group


class Shape(NamedTuple):
    """How a search proceeds. The certificate is the same for all.

    Attributes:
      start: scales to begin with, geometrically spaced.
      scales: that each round evaluates in each group.
      intervals: that are remembered.
      together: whether all weights are searched for in one round, or one array after the other.
    """

    start: int
    scales: int
    intervals: int
    together: bool


class Problem(NamedTuple):
    """What a search is given: arrays of one entry a group, for weights of about 1 at most.

    Attributes:
      low: the least scale that may be best.
      high: the largest.
      energy: the sum of the squared weights.
      kept: the scale to keep while it is nearly the best, and the error there; −1 if there is none.
      tolerance: how far the error of the answer may be above the least, relative.
    """

    low: Array
    high: Array
    energy: Array
    kept: Known
    tolerance: Array

    def search_below(self, best: Known) -> Array:
        """The error below which a scale is worth searching for."""
        return (1 - self.tolerance) * best[1] - FLOOR * self.energy

    def replace_below(self, best: Known) -> Array:
        """The error below which another scale replaces the best one."""
        return jnp.where(best[0] == self.kept[0], self.search_below(best), best[1])


class Search(NamedTuple):
    """What the loop carries.

    Attributes:
      left: the lower ends of the intervals, ascending along the second axis, then `end`.
      right: their upper ends, then `end`; with one scale a round only that of the first interval,
        because each goes up to the next.
      end: the largest scale.
      best: the scale of the least error so far.
      rounds: so far.
    """

    left: Known
    right: Known
    end: Known
    best: Known
    rounds: Array


def branch_and_bound(
    evaluate: Sequence[Evaluate], problems: Sequence[Problem], shape: Shape
) -> tuple[Search, ...]:
    """The searches of some problems at their end, in one loop.

    Args:
      evaluate: for each problem, the errors at scales, of the shape (scales, *groups).
      problems: the groups.
      shape: how to proceed.
    """

    def is_uncertain(searches: tuple[Search, ...]) -> Array:
        any_open = [jnp.any(each.left[0, 0] < each.right[0, 0]) for each in searches]
        return (searches[0].rounds < ROUNDS) & functools.reduce(jnp.logical_or, any_open)

    def split(searches: tuple[Search, ...]) -> tuple[Search, ...]:
        step = partial(_split_first if shape.scales == 1 else _split, shape)
        return tuple(map(step, evaluate, problems, searches))

    start = tuple(map(partial(_start, shape), problems))
    return lax.while_loop(is_uncertain, split, start)


def _start(shape: Shape, problem: Problem) -> Search:
    """One interval. Its ends have no errors yet, so these are the least that they may be."""
    low, high, kept = problem.low, problem.high, problem.kept
    order = _column(jnp.arange(shape.intervals), low)
    end = jnp.stack([high, jnp.zeros_like(high)])
    left = jnp.where(order == 0, jnp.stack([low, jnp.zeros_like(low)])[:, None], end[:, None])
    right = jnp.broadcast_to(end[:, None], (2, 1 if shape.scales == 1 else len(order), *low.shape))
    unknown = jnp.stack([low, jnp.full_like(low, jnp.inf)])
    best = jnp.where(kept[0] > 0, kept, unknown)
    return Search(left, right, end, best, jnp.zeros((), jnp.int32))


def _split(shape: Shape, evaluate: Evaluate, problem: Problem, search: Search) -> Search:
    """After evaluating scales inside the first intervals of each group."""
    left, right = search.left, search.right
    order = _column(jnp.arange(shape.intervals), problem.low)
    turn = _column(jnp.arange(shape.scales), problem.low)
    # The scales go to the first intervals in equal parts: to which, from which scale on, how many.
    number = jnp.clip(jnp.sum(left[0] < right[0], axis=0), 1, shape.scales)
    owner = turn * number // shape.scales
    first = -(-owner * shape.scales // number)
    quota = -(-(owner + 1) * shape.scales // number) - first
    is_owner = owner == order[:, None]

    def of_owner(x: Array) -> Array:
        return jnp.sum(jnp.where(is_owner, x[:, None], 0), axis=0)

    low, high = of_owner(left[0]), of_owner(right[0])
    middle = of_owner(_bound(left, right, problem.energy)[1])
    spread = low + (high - low) * ((turn - first + 1) / (quota + 1).astype(low.dtype))
    scales = jnp.where(quota == 1, middle, spread)
    scales = _start_scales(shape, problem, search, scales)
    new = jnp.stack([scales, evaluate(scales)])
    # Intervals go up to the first scale inside, from one to the next, and from the last to the end.
    starts = is_owner & (turn == first)
    to_new = jnp.sum(jnp.where(starts, new[:, None], 0), axis=2)
    next_new = jnp.concatenate([new[:, 1:], new[:, -1:]], axis=1)
    ends = turn == first + quota - 1
    from_new = jnp.where(ends, jnp.stack([high, of_owner(right[1])]), next_new)
    parts = _with_new(problem, search, new)._replace(
        left=jnp.concatenate([left, new], axis=1),
        right=jnp.concatenate([jnp.where(order < number, to_new, right), from_new], axis=1),
    )
    return _open(shape, problem, parts)


def _split_first(shape: Shape, evaluate: Evaluate, problem: Problem, search: Search) -> Search:
    """After evaluating one scale inside the first interval of each group."""
    left, right = search.left, search.right
    middle = _bound(left[:, :1], right, problem.energy)[1]
    scales = _start_scales(shape, problem, search, middle)
    new = jnp.stack([scales, evaluate(scales)])
    search = _with_new(problem, search, new)
    end = search.end[:, None]
    rest = jnp.where(left[0] < search.end[0], left, end)[:, 1:]  # at first the end was not known

    def advance(_: int, nodes: Known) -> Known:
        """Past the first interval, in the groups where it is closed."""
        is_open = _is_open(problem, search.best, nodes[:, 0], nodes[:, 1])
        return jnp.where(is_open, nodes, jnp.concatenate([nodes[:, 1:], end], axis=1))

    nodes = jnp.concatenate([left[:, :1], new, rest], axis=1)
    # A loop, so that the program holds it once.
    nodes = lax.fori_loop(0, ADVANCES, advance, nodes)[:, : shape.intervals]
    return search._replace(left=nodes, right=nodes[:, 1:2])


def _with_new(problem: Problem, search: Search, new: Known) -> Search:
    """The search after another round, with the best of the new scales."""
    least = _least(new)
    better = least[1] < problem.replace_below(search.best)
    return search._replace(
        end=jnp.where(search.rounds == 0, new[:, -1], search.end),
        best=jnp.where(better, least, search.best),
        rounds=search.rounds + 1,
    )


def _start_scales(shape: Shape, problem: Problem, search: Search, otherwise: Array) -> Array:
    """Both ends and what is between them, geometrically spaced, in the first rounds.

    One at a time it is both ends first, then downward, because intervals are split from below.
    """
    low, high = problem.low, problem.high
    steps = np.linspace(0, 1, shape.start)
    if shape.scales == 1:
        steps = np.concatenate([[1, 0], steps[-2:0:-1]])
    rounds = steps.size // shape.scales
    fractions = jnp.asarray(steps.reshape(rounds, shape.scales), low.dtype)
    step = _column(fractions[jnp.minimum(search.rounds, rounds - 1)], low)
    between = jnp.exp(jnp.log(low) * (1 - step) + jnp.log(high) * step)
    scales = jnp.where(step == 0, low, jnp.where(step == 1, high, between))
    inside = (search.left[0, 0] <= scales) & (scales <= search.right[0, 0])
    return jnp.where((search.rounds < rounds) & inside, scales, otherwise)


def _open(shape: Shape, problem: Problem, search: Search) -> Search:
    """The search with only those of its intervals that are open, in order."""
    left, right = search.left, search.right
    is_open = _is_open(problem, search.best, left, right)
    before = is_open & (left[0] < left[0][:, None])
    rank = jnp.where(is_open, jnp.sum(before, axis=1), -1)
    number = jnp.sum(is_open, axis=0)
    order = _column(jnp.arange(shape.intervals), problem.low)
    is_here = rank == order[:, None]
    end = search.end[:, None]

    def in_order(x: Known) -> Known:
        return jnp.where(order < number, jnp.sum(jnp.where(is_here, x[:, None], 0), axis=2), end)

    is_forgotten = (number > shape.intervals) & (order == shape.intervals - 1)
    return search._replace(left=in_order(left), right=jnp.where(is_forgotten, end, in_order(right)))


def _is_open(problem: Problem, best: Known, left: Known, right: Known) -> Array:
    """Whether a scale between two others may be better than the best."""
    is_open = _bound(left, right, problem.energy)[0] < problem.search_below(best)
    return is_open & (right[0] > left[0] * (1 + 4 * jnp.finfo(left.dtype).eps))


def _least(nodes: Known) -> Known:
    """The scale of the least error."""
    order = _column(jnp.arange(nodes.shape[1]), nodes[0, 0])
    is_least = order == jnp.argmin(nodes[1], axis=0)
    return jnp.sum(jnp.where(is_least, nodes, 0), axis=1)


def _column(x: Array, groups: Array) -> Array:
    """A vector as it broadcasts against groups, along a first axis."""
    return x.reshape(-1, *[1] * groups.ndim)


def _bound(left: Known, right: Known, energy: Array) -> tuple[Array, Array]:
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
