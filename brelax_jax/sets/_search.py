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

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group

INTERVALS = 4  # to begin with, geometrically spaced
STACK = 8  # scales ahead that are remembered
ADVANCES = 3  # intervals that an evaluation may leave behind, at most
ROUNDS = 2000  # evaluations of E at most; ternary takes about 10, Uniform(8) up to 400
TOLERANCE = 1e-6  # of the squared error
FLOOR = 1e-12  # of the sum of squares: errors below are rounding

COMPARED = 8  # up to so many magnitudes, comparing with each is faster than dividing,
ROUNDED = 3  # but not in the search, where multiplying by one reciprocal is exact enough


def level_index(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """The index of the magnitude for which |a − scale·magnitude| is least, as a float of a's dtype.

    Args:
      a: nonnegative floats.
      scale: nonnegative, broadcasts against `a`.
      magnitudes: ascending and nonnegative.
    """
    if len(magnitudes) > COMPARED and _consecutive(magnitudes):
        unit = jnp.where(scale > 0, scale, 1)
        shift = shift_of(unit)
        nearest = jnp.round((a * shift) / (unit * shift))
        return jnp.minimum(nearest, float(len(magnitudes) - 1))
    index = jnp.zeros_like(a)
    for lower, upper in itertools.pairwise(magnitudes):
        index += (a > scale * ((lower + upper) / 2)).astype(a.dtype)
    return index


def shift_of(unit: Array) -> Array:
    """What to multiply a divisor by, so that its reciprocal is not subnormal if it is huge."""
    return jnp.where(unit > 1, 2.0**-8, 1)


def at_index(index: Array, magnitudes: Sequence[float]) -> Array:
    """The magnitudes at these (float) indices, elementwise and without a gather."""
    if _consecutive(magnitudes):
        return index
    values = jnp.full_like(index, magnitudes[0])
    for position, magnitude in enumerate(magnitudes[1:], start=1):
        values = jnp.where(index >= position, magnitude, values)
    return values


class Kept(NamedTuple):
    """The scales of weights from which the present ones came by a small step.

    Attributes:
      scale: of the shape of a group's sums.
      tolerance: how far the squared error may be above the least one, relative. Within it the scale
        of the same codes, fitted anew, is kept.
    """

    scale: Array
    tolerance: float


def least_squares_scale(
    w: Array, magnitudes: Sequence[float], group: Group, kept: Kept | None = None
) -> Array:
    """argmin over s ≥ 0 of Σ min_l (|w| − s·m_l)², for each group.

    Args:
      w: floats, at least float32.
      magnitudes: ascending and nonnegative, the last one positive.
      group: which entries of `w` form a group.
      kept: scales to keep where they are nearly the best.

    Returns:
      Scales of w's dtype that broadcast against it: 0 for groups of zeros, NaN for groups that hold
      one or an infinity.
    """
    if len(magnitudes) == 1:
        scale = mean_magnitude(w, group) / magnitudes[0]
    else:
        a = jnp.abs(w)
        peak = group.max(a)
        unit = jnp.where(peak > 0, peak, 1)
        shift = shift_of(unit)
        a = (a * shift) / (unit * shift)
        if kept is not None:
            kept = kept._replace(scale=(kept.scale * shift) / (unit * shift))
        best = branch_and_bound(a, magnitudes, group, kept).best.scale
        scale = unit * _refitted(a, best, magnitudes, group)
        scale = jnp.where(peak > 0, scale, peak)  # 0, or NaN
    return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


class _Known(NamedTuple):
    """Scales and the errors at them."""

    scale: Array
    error: Array


class Search(NamedTuple):
    """What the loop carries.

    Attributes:
      below: up to here there is nothing better than the best.
      ahead: larger scales, ascending along the first axis; at the end repeats of the largest.
      best: the scale of the least error so far.
      rounds: evaluations so far.
    """

    below: _Known
    ahead: _Known
    best: _Known
    rounds: Array


def branch_and_bound(
    a: Array, magnitudes: Sequence[float], group: Group, kept: Kept | None = None
) -> Search:
    """The search at its end, for magnitudes of weights of which the largest in each group is 1."""
    tolerance = TOLERANCE if kept is None else max(kept.tolerance, TOLERANCE)

    def known(scale: Array) -> _Known:
        residual = _residual(a, scale, magnitudes)
        return _Known(scale, group.sum(jnp.square(residual)))

    energy = group.sum(jnp.square(a))
    # Outside [low, high] every entry has the largest magnitude, or E falls toward the interval.
    mean = group.mean(a)
    low = jnp.maximum(mean, jnp.finfo(a.dtype).tiny) / magnitudes[-1]
    high = jnp.ones_like(low) / next(m for m in magnitudes if m > 0)
    steps = jnp.arange(INTERVALS + 1, dtype=a.dtype).reshape(-1, *([1] * a.ndim)) / INTERVALS
    nodes = lax.map(known, jnp.exp(jnp.log(low) * (1 - steps) + jnp.log(high) * steps))
    least = jnp.argmin(nodes.error, axis=0)[None]
    last = _each(lambda x: x[-1], nodes)
    best = _each(lambda x: jnp.take_along_axis(x, least, axis=0)[0], nodes)
    old = _Known(jnp.full_like(low, -1), jnp.full_like(low, jnp.inf))  # none
    if kept is not None:
        old = known(_refitted(a, kept.scale, magnitudes, group))

    def goal(best: _Known) -> Array:
        """The error below which a scale is worth searching for."""
        return (1 - tolerance) * best.error - FLOOR * energy

    def bar(best: _Known) -> Array:
        """The error below which another scale replaces the best one."""
        return jnp.where(best.scale == old.scale, goal(best), best.error)

    best = _each(lambda x, y: jnp.where(best.error >= goal(old), x, y), old, best)

    def advanced(search: Search) -> Search:
        """Past the first interval, in the groups where it holds nothing better."""
        head = _each(lambda x: x[0], search.ahead)
        passed = _bound(search.below, head, energy)[0] >= goal(search.best)
        passed |= head.scale <= search.below.scale * (1 + 4 * jnp.finfo(a.dtype).eps)
        rest = _each(lambda x, end: jnp.concatenate([x[1:], end[None]]), search.ahead, last)
        return search._replace(
            below=_each(lambda x, y: jnp.where(passed, x, y), head, search.below),
            ahead=_each(lambda x, y: jnp.where(passed, x, y), rest, search.ahead),
        )

    def uncertain(search: Search) -> Array:
        return (search.rounds < ROUNDS) & jnp.any(search.below.scale < last.scale)

    def split(search: Search) -> Search:
        head = _each(lambda x: x[0], search.ahead)
        middle = known(_bound(search.below, head, energy)[1])
        better = middle.error < bar(search.best)
        search = Search(
            below=search.below,
            ahead=_each(lambda x, y: jnp.concatenate([x[None], y[:-1]]), middle, search.ahead),
            best=_each(lambda x, y: jnp.where(better, x, y), middle, search.best),
            rounds=search.rounds + 1,
        )
        # A loop, so that the program holds it once: it compiles in two thirds of the time.
        return lax.fori_loop(0, ADVANCES, lambda _, search: advanced(search), search)

    start = Search(
        below=_each(lambda x: x[0], nodes),
        ahead=_each(lambda x, end: jnp.stack([*x[1:], *[end] * (STACK - INTERVALS)]), nodes, last),
        best=best,
        rounds=jnp.zeros((), jnp.int32),
    )
    return lax.while_loop(uncertain, split, advanced(start))


def _refitted(a: Array, scale: Array, magnitudes: Sequence[float], group: Group) -> Array:
    """The least-squares scale for the codes that are nearest at `scale`."""
    q = at_index(level_index(a, scale, magnitudes), magnitudes)
    norm = group.sum(jnp.square(q))
    gain = group.sum(q * (a - scale * q))
    return scale + gain / jnp.where(norm > 0, norm, 1)


def _bound(below: _Known, above: _Known, energy: Array) -> tuple[Array, Array]:
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


def _each(function: Callable[..., Array], *known: _Known) -> _Known:
    return _Known(*map(function, *known))


def _residual(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """a − the nearest of scale·magnitudes, or its absolute value."""
    if len(magnitudes) > ROUNDED and _consecutive(magnitudes):
        return a - scale * jnp.minimum(jnp.round(a * (1 / scale)), magnitudes[-1])
    if len(magnitudes) > COMPARED:
        return a - scale * at_index(level_index(a, scale, magnitudes), magnitudes)
    distances = [jnp.abs(a - scale * m) if m else a for m in magnitudes]
    return jax.tree.reduce(jnp.minimum, distances)


def _consecutive(magnitudes: Sequence[float]) -> bool:
    """Whether they are 0, 1, 2, …"""
    return tuple(magnitudes) == tuple(range(len(magnitudes)))


def mean_magnitude(w: Array, group: Group) -> Array:
    """The mean of |w| over each group; if the plain sum overflows, by other passes."""
    size = group.size(w)
    total = group.sum(jnp.abs(w))
    return lax.cond(
        jnp.all(jnp.isfinite(total)),
        lambda: total / size,
        lambda: jnp.minimum(
            2 * group.sum(jnp.abs(w) / (2 * size)),
            group.max(jnp.abs(w)),
        ),
    )
