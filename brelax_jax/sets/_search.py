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
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._levels import COMPARED, are_consecutive, at_index, level_index

INTERVALS = 4  # to begin with, geometrically spaced
STACK = 8  # scales ahead that are remembered
ADVANCES = 3  # intervals that an evaluation may leave behind, at most
ROUNDS = 2000  # evaluations of E at most; ternary takes about 10, Uniform(8) up to 400
TOLERANCE = 1e-6  # of the squared error
FLOOR = 1e-12  # of the sum of squares: errors below are rounding
ROUNDED = 3  # beyond so many consecutive magnitudes, multiplying by one reciprocal is faster


class Kept(NamedTuple):
    """The scales of weights from which the present ones came by a small step.

    Attributes:
      scale: of the shape of a group's sums; NaN where there is none.
      tolerance: how far the squared error may be above the least one, relative. Within it the scale
        of the same codes, fitted anew, is kept.
    """

    scale: Array
    tolerance: float


Known: TypeAlias = Array  # scales, and below them along a first axis the errors at them


class Problem(NamedTuple):
    """What a search is given.

    Attributes:
      a: magnitudes of weights, of which the largest in each group is 1.
      magnitudes: those of the levels, ascending.
      group: which entries of `a` form a group.
      energy: the sum of a² over each group.
      kept: the scale to keep while it is nearly the best; −1 if there is none.
      tolerance: how far the error of the answer may be above the least, relative.
      rounds: evaluations at most.
    """

    a: Array
    magnitudes: Sequence[float]
    group: Group
    energy: Array
    kept: Known
    tolerance: float | Array
    rounds: int

    def known(self, scale: Array) -> Known:
        """A scale with its error, from one pass over the weights."""
        residual = _residual(self.a, scale, self.magnitudes)
        return jnp.stack([scale, self.group.sum(jnp.square(residual))])

    def search_below(self, best: Known) -> Array:
        """The error below which a scale is worth searching for."""
        return (1 - self.tolerance) * best[1] - FLOOR * self.energy

    def replace_below(self, best: Known) -> Array:
        """The error below which another scale replaces the best one."""
        is_kept = best[0] == self.kept[0]
        return jnp.where(is_kept, self.search_below(best), best[1])


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


def branch_and_bound(
    a: Array, magnitudes: Sequence[float], group: Group, kept: Kept | None = None
) -> Search:
    """The search at its end, for magnitudes of weights of which the largest in each group is 1."""
    problem = _problem(a, magnitudes, group, kept)
    start = _advance(problem, _start(problem))
    return lax.while_loop(partial(_is_uncertain, problem), partial(_split, problem), start)


def _problem(a: Array, magnitudes: Sequence[float], group: Group, kept: Kept | None) -> Problem:
    energy = group.sum(jnp.square(a))
    none = jnp.stack([jnp.full_like(energy, -1), jnp.full_like(energy, jnp.inf)])
    problem = Problem(a, magnitudes, group, energy, none, TOLERANCE, ROUNDS)
    if kept is None:
        return problem
    return problem._replace(
        kept=problem.known(refitted(a, kept.scale, magnitudes, group)),
        tolerance=jnp.where(jnp.isnan(kept.scale), TOLERANCE, max(kept.tolerance, TOLERANCE)),
    )


def _start(problem: Problem) -> Search:
    """The first intervals, and the best of their ends or the scale to keep."""
    a, magnitudes, group = problem.a, problem.magnitudes, problem.group
    # Outside [low, high] every entry has the largest magnitude, or E falls toward the interval.
    low = jnp.maximum(group.mean(a), jnp.finfo(a.dtype).tiny) / magnitudes[-1]
    high = jnp.ones_like(low) / next(m for m in magnitudes if m > 0)
    steps = jnp.arange(INTERVALS + 1, dtype=a.dtype).reshape(-1, *([1] * a.ndim)) / INTERVALS
    low, high = jnp.log(low)[None], jnp.log(high)[None]
    nodes = lax.map(problem.known, jnp.exp(low * (1 - steps) + high * steps))
    least = jnp.argmin(nodes[:, 1], axis=0)[None, None]
    best = jnp.take_along_axis(nodes, least, axis=0)[0]
    far = best[1] >= problem.search_below(problem.kept)
    end = nodes[-1:]
    return Search(
        below=nodes[0],
        ahead=jnp.concatenate([nodes[1:], *[end] * (STACK - INTERVALS)]),
        end=end,
        best=jnp.where(far, problem.kept, best),
        rounds=jnp.zeros((), jnp.int32),
    )


def _is_uncertain(problem: Problem, search: Search) -> Array:
    return (search.rounds < problem.rounds) & jnp.any(search.below[0] < search.end[0, 0])


def _split(problem: Problem, search: Search) -> Search:
    """After evaluating a scale inside the first interval of each group."""
    scale = _bound(search.below, search.ahead[0], problem.energy)[1]
    middle = problem.known(scale)
    better = middle[1] < problem.replace_below(search.best)
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
    bound = _bound(search.below, head, problem.energy)[0]
    passed = bound >= problem.search_below(search.best)
    passed |= head[0] <= search.below[0] * (1 + 4 * jnp.finfo(problem.a.dtype).eps)
    rest = jnp.concatenate([search.ahead[1:], search.end])
    return search._replace(
        below=jnp.where(passed, head, search.below), ahead=jnp.where(passed, rest, search.ahead)
    )


def refitted(a: Array, scale: Array, magnitudes: Sequence[float], group: Group) -> Array:
    """The least-squares scale for the codes that are nearest at `scale`."""
    q = at_index(level_index(a, scale, magnitudes), magnitudes)
    norm = group.sum(jnp.square(q))
    gain = group.sum(q * (a - scale * q))
    return scale + gain / jnp.where(norm > 0, norm, 1)


def _bound(below: Known, above: Known, energy: Array) -> tuple[Array, Array]:
    """A lower bound of E between two scales, and the scale at which to split their interval.

    With s = s₀·(1 + t·(r − 1)), r = s₁/s₀, the chord of h gives
    E(s) ≥ (1−t)·(s/s₀)·E₀ + t·(s/s₁)·E₁ − t·(1−t)·((r−1)²/r)·Σa², a quadratic in t.
    """
    (low, e0), (high, e1) = below, above
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


def _residual(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """a − the nearest of scale·magnitudes, or its absolute value."""
    if len(magnitudes) > ROUNDED and are_consecutive(magnitudes):
        return a - scale * jnp.minimum(jnp.round(a * (1 / scale)), magnitudes[-1])
    if len(magnitudes) > COMPARED:
        return a - scale * at_index(level_index(a, scale, magnitudes), magnitudes)
    distances = [jnp.abs(a - scale * m) if m else a for m in magnitudes]
    return jax.tree.reduce(jnp.minimum, distances)
