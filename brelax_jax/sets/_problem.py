"""What a search for scales is given: the weights, what is wanted, and a bound.

The scale that is searched for is the global minimizer of the squared error over s. For magnitudes
0 ≤ m₁ < … < m_K and a = |w| let E(s) = Σᵢ min_l (aᵢ − s·m_l)². E has many local minima, so
descending from a start (alternating minimization, "Lloyd") is not enough. But

    h(s) = (Σ a² − E(s)) / s = Σᵢ max_l (2·aᵢ·m_l − s·m_l²)

is a sum of maxima of lines, hence convex. Between two scales at which E is known, h lies below its
chord, which gives a lower bound of E on the interval in closed form, tight to second order in the
width (`interval`). With it a search ends with a certificate: no scale anywhere has an error below
the best one found by more than `TOLERANCE`, relative, and `FLOOR` of Σ a²; or by more than the
tolerance of a scale that is kept.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax.sets._group import Group
from brelax_jax.sets._weights import Unit, Weights, bound, error, gains, refitted

TOLERANCE = 1e-6  # of the squared error
FLOOR = 1e-12  # of the sum of squares: errors below are rounding

Known: TypeAlias = Array  # scales, and the errors at them, along a first axis of two
Pair: TypeAlias = tuple[Array, Array]  # the same in two arrays


class Goal(NamedTuple):
    """What is wanted of each group.

    Attributes:
      energy: the sum of a² over the group.
      kept: the scale to keep while it is nearly the best; −1 if there is none.
      tolerance: how far the error of the answer may be above the least, relative.
      doubt: None, or the errors given are lower bounds, by at most doubt·s too low. Then the search
        narrows down where the best scale may be.
    """

    energy: Array
    kept: Known
    tolerance: Array
    doubt: Array | None = None

    def search_below(self, best: Known | Pair) -> Array:
        """The error below which a scale is worth searching for."""
        if self.doubt is not None:
            return best[1] + self.doubt * best[0]
        return (1 - self.tolerance) * best[1] - FLOOR * self.energy

    def resolution(self, scale: Array) -> Array:
        """How far the bound of an interval from here, relative, is off by half of the doubt."""
        if self.doubt is None:
            return jnp.zeros_like(scale)
        return jnp.sqrt(2 * self.doubt * scale / self.energy)

    def replace_below(self, best: Known | Pair) -> Array:
        """The error below which another scale replaces the best one."""
        return jnp.where(best[0] == self.kept[0], self.search_below(best), best[1])


class Source(NamedTuple):
    """The weights of one array, as a search sees them.

    Attributes:
      over: over(function, *numbers) is function(a, group, *numbers), from a pass over the
        magnitudes a of the weights, in units. Numbers are one a group.
      peak: the largest magnitude in each group.
      unit: a power of two near it.
      kept: scales to keep where they are nearly the best, 0 where there is none; or None.
      tolerance: how far the error of a scale that is kept may be above the least one, relative.
    """

    over: Callable[..., Any]
    peak: Array
    unit: Unit
    kept: Array | None
    tolerance: float

    @staticmethod
    def of(weights: Weights, before: Array | None = None) -> "Source":
        """A source for one array.

        Args:
          weights: the array.
          before: a scalar, never negative, that is to be known before the search begins. XLA on
            CPU runs independent ones side by side. That takes more memory, and so more time.
        """
        peak, unit, a = in_units(weights, before)
        over = partial(_over, a, weights.group)
        return Source(over, peak, unit, weights.kept, weights.tolerance)


def in_units(weights: Weights, before: Array | None = None) -> tuple[Array, Unit, Array]:
    """The largest magnitude in each group, a power of two near it, and magnitudes in this unit."""
    peak = weights.group.peak(weights.w)
    if before is not None:
        peak = jnp.where(before < 0, 0, peak)
    unit = Unit.of(peak, weights.allowed)
    return peak, unit, unit.divided(jnp.abs(weights.w))


def _over(a: Array, group: Group, function: Callable[..., Any], *numbers: Array) -> Any:
    return function(a, group, *numbers)


class Problem(NamedTuple):
    """What the search of one array is given.

    Attributes:
      magnitudes: those of the levels, ascending.
      source: the weights.
      low, high: the scales between which the best one is.
      goal: what is wanted.
    """

    magnitudes: tuple[float, ...]
    source: Source
    low: Array
    high: Array
    goal: Goal

    @property
    def unit(self) -> Unit:
        """See `Source`."""
        return self.source.unit

    def known(self, scale: Array) -> Known:
        """A scale with its error, from one pass over the weights."""
        return jnp.stack([scale, self.source.over(bound(error, self.magnitudes), scale)])

    def errors(self, scales: Sequence[Array]) -> list[Array]:
        """The errors at some scales, from one pass over the weights."""
        return self.source.over(bound(_errors, self.magnitudes), *scales)

    def refitted(self, scale: Array) -> Array:
        """The least-squares scale for the codes that are nearest at `scale`."""
        return refitted(scale, *self.source.over(bound(_gain_and_norm, self.magnitudes), scale))

    def scales(self, best: Array) -> Array:
        """The scales of the weights, from the best ones in units."""
        if self.unit.allowed is None:
            best = self.refitted(best)
        return self.unit.scales(best, self.source.peak)


def _errors(magnitudes: Sequence[float], a: Array, group: Group, *scales: Array) -> list[Array]:
    return [error(magnitudes, a, group, scale) for scale in scales]


def _gain_and_norm(
    magnitudes: Sequence[float], a: Array, group: Group, scale: Array
) -> tuple[Array, Array]:
    if len(magnitudes) == 2 and magnitudes[0] == 0:
        # The same codes without a selection: then XLA on CPU writes one array in place of two.
        q = magnitudes[1] * jnp.sign(jnp.maximum(a - scale * (magnitudes[1] / 2), 0))
        gain, norm = q * (a - scale * q), jnp.square(q)
    else:
        gain, norm = gains(a, scale, magnitudes)
    return group.sum(gain), group.sum(norm)


def _energy_and_mean(a: Array, group: Group) -> tuple[Array, Array]:
    return group.sum(jnp.square(a)), group.mean(a)


def problem_of(magnitudes: Sequence[float], source: Source) -> Problem:
    """The problem for weights."""
    energy, mean = source.over(_energy_and_mean)
    none = jnp.stack([jnp.full_like(energy, -1), jnp.full_like(energy, jnp.inf)])
    least = jnp.full_like(energy, TOLERANCE)
    low, high = bounds(magnitudes, mean, source.unit.divided(source.peak), source.unit)
    problem = Problem(tuple(magnitudes), source, low, high, Goal(energy, none, least))
    if source.kept is None:
        return problem
    is_known = source.kept > 0  # not in the first step
    kept = source.unit.nearest(problem.refitted(source.unit.divided(source.kept)))
    tolerance = jnp.maximum(least, jnp.where(is_known, source.tolerance, 0))
    known = jnp.where(is_known, problem.known(kept), none)
    return problem._replace(goal=Goal(energy, known, tolerance))


@partial(jax.jit, static_argnums=0)
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


def is_open(
    left: Known | Pair, right: Known | Pair, best: Known | Pair, goal: Goal, unit: Unit
) -> Array:
    """Whether an interval is to be split: a scale in it may be better than the best."""
    after = jnp.maximum(unit.after(left[0]), left[0] * (1 + goal.resolution(left[0])))
    return (right[0] > after) & may_be_better(left, right, best, goal)


def may_be_better(left: Known | Pair, right: Known | Pair, best: Known | Pair, goal: Goal) -> Array:
    """Whether a scale between two others may be better than the best."""
    return interval(left, right, goal.energy)[0] < goal.search_below(best)


@jax.jit
def interval(left: Known | Pair, right: Known | Pair, energy: Array) -> tuple[Array, Array]:
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
