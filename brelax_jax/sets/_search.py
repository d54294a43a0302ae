"""The search for the scale: the global minimizer of the squared error over s.

For magnitudes 0 ≤ m₁ < … < m_K and a = |w| let E(s) = Σᵢ min_l (aᵢ − s·m_l)². E has many local
minima, so descending from a start (alternating minimization, "Lloyd") is not enough. But

    h(s) = (Σ a² − E(s)) / s = Σᵢ max_l (2·aᵢ·m_l − s·m_l²)

is a sum of maxima of lines, hence convex. Between two scales at which E is known, h lies below its
chord, which gives a lower bound of E on the interval in closed form, tight to second order in the
width. Best-first branch and bound on that bound needs one reduction over the weights for each
evaluation of E and no sort. Where it ends before `ROUNDS`, no scale anywhere has an error below the
best one found by more than `TOLERANCE`, relative. With 6 bits and more it often does not: the error
is then at most that of the scale max |w| / m_K.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

INTERVALS = 8  # to begin with, geometrically spaced
SLOTS = 32  # intervals held at once; beyond that the one with the worst bound is dropped
ROUNDS = 96  # splits at most; a single-basin E takes 10 to 30
TOLERANCE = 1e-6  # of the squared error, before the last polish
POLISH = 3  # alternating steps from the best scale, to the bottom of its basin

COMPARED = 8  # up to so many magnitudes, comparing with each is faster than dividing


def level_index(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """The index of the magnitude for which |a − scale·magnitude| is least, as a float of a's dtype.

    Args:
      a: nonnegative floats.
      scale: nonnegative, broadcasts against `a`.
      magnitudes: ascending and nonnegative.
    """
    if len(magnitudes) > COMPARED and tuple(magnitudes) == tuple(range(len(magnitudes))):
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
    if tuple(magnitudes) == tuple(range(len(magnitudes))):
        return index
    values = jnp.full_like(index, magnitudes[0])
    for position, magnitude in enumerate(magnitudes[1:], start=1):
        values = jnp.where(index >= position, magnitude, values)
    return values


def least_squares_scale(w: Array, magnitudes: Sequence[float], axes: tuple[int, ...]) -> Array:
    """argmin over s ≥ 0 of Σ min_l (|w| − s·m_l)², for each group along `axes`.

    Args:
      w: floats, at least float32.
      magnitudes: ascending and nonnegative, the last one positive.
      axes: the axes of `w` that form a group.

    Returns:
      Scales of w's dtype, of size one along `axes`: 0 for groups of zeros, NaN for groups that hold
      one or an infinity.
    """
    if len(magnitudes) == 1:
        scale = mean_magnitude(w, axes) / magnitudes[0]
    else:
        a = jnp.abs(w)
        peak = jnp.max(a, axis=axes, keepdims=True)
        unit = jnp.where(peak > 0, peak, 1)
        shift = shift_of(unit)
        scale = unit * _branch_and_bound((a * shift) / (unit * shift), magnitudes, axes)
        scale = jnp.where(peak > 0, scale, peak)  # 0, or NaN
    return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


class _Intervals(NamedTuple):
    """Intervals of s and the error at their ends; the first axis counts them, then the groups."""

    low: Array
    high: Array
    low_error: Array
    high_error: Array


class _Search(NamedTuple):
    """What the loop carries."""

    intervals: _Intervals
    best: Array
    best_error: Array
    rounds: Array


def _branch_and_bound(a: Array, magnitudes: Sequence[float], axes: tuple[int, ...]) -> Array:
    """As `least_squares_scale`, for groups whose largest entry is 1."""

    def error(scale: Array) -> Array:
        return jnp.sum(jnp.square(_residual(a, scale, magnitudes)), axis=axes, keepdims=True)

    energy = jnp.sum(jnp.square(a), axis=axes, keepdims=True)
    # Outside [low, high] every entry has the largest magnitude, or E falls toward the interval.
    low = (
        jnp.maximum(jnp.mean(a, axis=axes, keepdims=True), jnp.finfo(a.dtype).tiny) / magnitudes[-1]
    )
    high = jnp.ones_like(low) / next(m for m in magnitudes if m > 0)
    steps = jnp.arange(INTERVALS + 1, dtype=a.dtype).reshape(-1, *([1] * a.ndim)) / INTERVALS
    nodes = jnp.exp(jnp.log(low) * (1 - steps) + jnp.log(high) * steps)
    errors = lax.map(error, nodes)

    def padded(x: Array, fill: float) -> Array:
        return jnp.concatenate([x, jnp.full((SLOTS - INTERVALS, *x.shape[1:]), fill, x.dtype)])

    # A slot that is free holds an interval of infinite error, whose bound is never the least.
    intervals = _Intervals(
        padded(nodes[:-1], 1.0),
        padded(nodes[1:], 1.0),
        padded(errors[:-1], jnp.inf),
        padded(errors[1:], jnp.inf),
    )
    starts = jnp.concatenate([nodes, jnp.full_like(low, 1 / magnitudes[-1])[None]])  # and max |w|
    start_errors = jnp.concatenate([errors, error(starts[-1])[None]])
    first = jnp.argmin(start_errors, axis=0)
    start = _Search(
        intervals, _take(starts, first), _take(start_errors, first), jnp.zeros((), jnp.int32)
    )

    def uncertain(search: _Search) -> Array:
        least = jnp.min(_bound(search.intervals, energy)[0], axis=0)
        return (search.rounds < ROUNDS) & jnp.any(least < (1 - TOLERANCE) * search.best_error)

    def split(search: _Search) -> _Search:
        bounds, points = _bound(search.intervals, energy)
        chosen, dropped = jnp.argmin(bounds, axis=0), jnp.argmax(bounds, axis=0)
        parent = _Intervals(*(_take(end, chosen) for end in search.intervals))
        middle = _take(points, chosen)
        middle_error = error(middle)
        left = parent._replace(high=middle, high_error=middle_error)
        right = parent._replace(low=middle, low_error=middle_error)
        better = middle_error < search.best_error
        return _Search(
            _Intervals(
                *(
                    _put(_put(ends, dropped, new_right), chosen, new_left)
                    for ends, new_left, new_right in zip(search.intervals, left, right, strict=True)
                )
            ),
            jnp.where(better, middle, search.best),
            jnp.where(better, middle_error, search.best_error),
            search.rounds + 1,
        )

    scale = lax.while_loop(uncertain, split, start).best
    for _ in range(POLISH if len(magnitudes) <= COMPARED else 4 * POLISH):
        q = at_index(level_index(a, scale, magnitudes), magnitudes)
        gain = jnp.sum(q * (a - scale * q), axis=axes, keepdims=True)
        norm = jnp.sum(jnp.square(q), axis=axes, keepdims=True)
        scale += gain / jnp.where(norm > 0, norm, 1)
    return scale


def _bound(intervals: _Intervals, energy: Array) -> tuple[Array, Array]:
    """For each interval, a lower bound of E on it, and the scale at which to split it.

    With s = s₀·(1 + t·(r − 1)), r = s₁/s₀, the chord of h gives
    E(s) ≥ (1−t)·(s/s₀)·E₀ + t·(s/s₁)·E₁ − t·(1−t)·((r−1)²/r)·Σa², a quadratic in t.
    """
    low, high, low_error, high_error = intervals
    ratio = high / low
    growth = ratio - 1
    slack = energy * growth * growth / ratio
    free = jnp.isinf(low_error)
    e0, e1 = jnp.where(free, 0, low_error), jnp.where(free, 0, high_error)
    linear = e0 * (growth - 1) + e1 / ratio - slack
    square = (e1 / ratio - e0) * growth + slack
    vertex = jnp.where(
        square > 0, -linear / jnp.where(square > 0, 2 * square, 1), jnp.where(e1 < e0, 1.0, 0.0)
    )
    t = jnp.clip(vertex, 0, 1)
    bound = jnp.minimum(jnp.minimum(e0, e1), e0 + t * (linear + t * square))
    return jnp.where(free, jnp.inf, bound), low + (high - low) * jnp.clip(t, 0.1, 0.9)


def _residual(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """|a − the nearest of scale·magnitudes|."""
    if len(magnitudes) > COMPARED:
        return a - scale * at_index(level_index(a, scale, magnitudes), magnitudes)
    distances = [jnp.abs(a - scale * m) if m else a for m in magnitudes]
    return jax.tree.reduce(jnp.minimum, distances)


def mean_magnitude(w: Array, axes: tuple[int, ...]) -> Array:
    """The mean of |w| along `axes`, which stay; if the plain sum overflows, by other passes."""
    size = math.prod(w.shape[axis] for axis in axes)
    total = jnp.sum(jnp.abs(w), axis=axes, keepdims=True)
    return lax.cond(
        jnp.all(jnp.isfinite(total)),
        lambda: total / size,
        lambda: jnp.minimum(
            2 * jnp.sum(jnp.abs(w) / (2 * size), axis=axes, keepdims=True),
            jnp.max(jnp.abs(w), axis=axes, keepdims=True),
        ),
    )


def _take(x: Array, index: Array) -> Array:
    return jnp.take_along_axis(x, index[None], axis=0)[0]


def _put(x: Array, index: Array, value: Array) -> Array:
    slots = jnp.arange(x.shape[0]).reshape(-1, *([1] * (x.ndim - 1)))
    return jnp.where(slots == index, value, x)
