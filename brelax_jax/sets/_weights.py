"""Weights whose scale is searched for, and the reductions over them that a search needs."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax.sets._group import Group
from brelax_jax.sets._levels import COMPARED, are_consecutive, nearest_magnitude
from brelax_jax.sets._scale_dtype import Scales, leading_bit

ROUNDED = 3  # beyond so many consecutive magnitudes, multiplying by one reciprocal is faster


class Weights(NamedTuple):
    """An array whose scales are searched for.

    Attributes:
      w: a view of floats, at least float32.
      group: which of its entries form a group.
      kept: scales to keep where they are nearly the best, 0 where there is none; or None.
      tolerance: how far the error of a scale that is kept may be above the least one, relative.
      allowed: the scales that there are; None for all.
    """

    w: Array
    group: Group
    kept: Array | None = None
    tolerance: float = 0.0
    allowed: Scales | None = None

    @property
    def entries(self) -> int:
        """How many a group has here."""
        return math.prod(self.w.shape[axis] for axis in self.group.axes)

    @property
    def groups(self) -> int:
        """How many there are here."""
        return self.w.size // self.entries


class Unit(NamedTuple):
    """What the weights of each group are divided by.

    Attributes:
      unit: a power of two near the largest magnitude, so that dividing is exact.
      inverse: one over it.
      allowed: the scales that there are; None for all.
    """

    unit: Array
    inverse: Array
    allowed: Scales | None = None

    @staticmethod
    def of(peak: Array, allowed: Scales | None = None) -> "Unit":
        """The unit of groups with this largest magnitude."""
        unit, inverse = _unit_and_inverse(peak)
        return Unit(unit, inverse, allowed)

    def divided(self, x: Array) -> Array:
        """x in units."""
        return x * self.inverse

    def at_most(self, scale: Array) -> Array:
        """The largest scale that there is up to this one, in units."""
        if self.allowed is None:
            return scale
        return self.divided(self.allowed.at_most(scale * self.unit))

    def nearest(self, scale: Array) -> Array:
        """The nearest scale that there is, in units."""
        if self.allowed is None:
            return scale
        return self.divided(self.allowed.nearest(scale * self.unit))

    def after(self, scale: Array) -> Array:
        """The scale after which a search goes on: the next one, or one that is far enough off for
        floats to tell the two apart.
        """
        if self.allowed is None:
            return scale * (1 + 4 * jnp.finfo(scale.dtype).eps)
        return self.divided(self.allowed.after(scale * self.unit))

    def scales(self, best: Array, peak: Array) -> Array:
        """The scales of the weights, from the best ones in units."""
        scale = jnp.where(peak > 0, self.unit * best, peak)  # 0, or NaN
        return jnp.where(jnp.isfinite(peak) & jnp.isfinite(scale), scale, jnp.nan)


@jax.jit
def _unit_and_inverse(peak: Array) -> tuple[Array, Array]:
    tiny = float(jnp.finfo(peak.dtype).tiny)
    unit = jnp.where(peak > 0, jnp.clip(leading_bit(peak), tiny, 1 / tiny), 1)
    return unit, 1 / unit


@functools.cache
def bound(function: Callable[..., Any], setting: Any) -> Callable[..., Any]:
    """`partial(function, setting)`, the same object for the same arguments: so JAX sees that it has
    traced it before.
    """
    return functools.partial(function, setting)


def errors(magnitudes: Sequence[float], a: Array, group: Group, scales: Array) -> Array:
    """Σ min_l (a − s·m_l)² of each group, for some scales along a first axis."""
    group = group._replace(axes=tuple(axis + 1 for axis in group.axes))
    return group.sum(jnp.square(_residual(a[None], scales, magnitudes)))


def error(magnitudes: Sequence[float], a: Array, group: Group, scale: Array) -> Array:
    """Σ min_l (a − s·m_l)² of each group."""
    return group.sum_of(lambda a: jnp.square(_residual(a, scale, magnitudes)), a)


def gains(a: Array, scale: Array, magnitudes: Sequence[float]) -> tuple[Array, Array]:
    """q·(a − s·q) and q·q of each entry: for the codes q that are nearest at s, the least-squares
    scale is above s by the quotient of their sums.
    """
    q = nearest_magnitude(a, scale, magnitudes)
    return q * (a - scale * q), jnp.square(q)


def refitted(scale: Array, gain: Array, norm: Array) -> Array:
    """The least-squares scale of codes from the sums of their `gains`."""
    return scale + gain / jnp.where(norm > 0, norm, 1)


def _residual(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """a − the nearest of scale·magnitudes, or its absolute value."""
    if len(magnitudes) > ROUNDED and are_consecutive(magnitudes):
        return a - scale * jnp.minimum(jnp.round(a * (1 / scale)), magnitudes[-1])
    if len(magnitudes) > COMPARED:
        return a - scale * nearest_magnitude(a, scale, magnitudes)
    distances = [jnp.abs(a - scale * m) if m else a for m in magnitudes]
    return jax.tree.reduce(jnp.minimum, distances)
