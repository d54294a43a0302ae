"""Why `params` are quantized bit for bit although Optax adds updates to them.

`optax.apply_updates` computes p + (w − p), with two roundings, and often lands one unit in the last
place beside w. The sum is exact if p and w are multiples of one spacing, a power of two, and no
larger than its multiples that the dtype holds. So near phase II and in it all emitted weights lie
on a grid:

- The grid of a scale group follows from its scale alone: the largest level is below 2^top, and the
  spacing is 2^(top − digits + 1 + headroom), where the dtype's significand has `digits` bits. Then
  differences of two weights up to 2^headroom times the largest level are exact, and so are steps in
  which the scale grows or shrinks as much.
- The stored scale is rounded to the grid, so that level × scale is on it; for levels that are small
  integers over a power of two, to a grid that is as much coarser. Other levels times scale are
  rounded.
- The last `LEAD` updates of phase I round w to the grid and clip it to `reach`, far outside the
  levels. Where p + (w − p) would miss w, because p is not on the grid yet, p itself is rounded to
  the grid: that is exact, since the two are within a factor of two of one another (or it goes to 0,
  if they differ by less than the least normal number, which devices flush to zero), and the
  next update reaches w. `LANDING` updates suffice; the others are for scales that jump meanwhile.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from brelax_jax.sets import Fit, QuantizedSet
from brelax_jax.sets._scale_dtype import leading_bit

LANDING = 2  # updates that it takes from anywhere onto the grid
LEAD = 4  # and of phase I that do
MOST_INTEGER = 256  # that a level may be over a power of two, for it to cost a scale bits


class Grid(NamedTuple):
    """The grid of each scale group; all fields have the scale's shape and are powers of two.

    Attributes:
      spacing: the distance of neighbouring points.
      density: its reciprocal.
      reach: at least the largest level.
    """

    spacing: Array
    density: Array
    reach: Array

    def round(self, w: Array) -> Array:
        """The nearest point of the grid."""
        return jnp.round(w * self.density) * self.spacing


@functools.partial(jax.jit, static_argnums=(1, 2))
def grid_of(scale: Array, qset: QuantizedSet, dtype: DTypeLike) -> Grid:
    """The grid for params of this dtype, for each entry of a scale."""
    shape = _Shape.of(qset, dtype)
    unit = leading_bit(scale)
    spacing = jnp.maximum(unit * 2.0**shape.finest, _least(dtype))
    return Grid(spacing, 1 / spacing, unit * 2.0**shape.reach)


def grid_beside(fit: Fit, qset: QuantizedSet, shape: tuple[int, ...], dtype: DTypeLike) -> Grid:
    """The grid of a fit, as it broadcasts against an array of this shape."""
    return grid_of(qset.granularity.groups(shape).spread(fit.scale, shape), qset, dtype)


class _Shape(NamedTuple):
    """Exponents of a grid, in units of the scale's leading bit.

    Attributes:
      digits: bits of the dtype's significand.
      finest: of the spacing.
      fraction: of that of scales, in spacings: levels are integers over 2^fraction.
      top: of a bound of the largest level.
      reach: of the largest weight near phase II.
    """

    digits: int
    finest: int
    fraction: int
    top: int
    reach: int

    @staticmethod
    def of(qset: QuantizedSet, dtype: DTypeLike) -> "_Shape":
        digits = jnp.finfo(dtype).nmant + 1
        headroom = 4 if digits > 16 else 1
        top = 1 + math.ceil(math.log2(qset.magnitudes[-1]))
        fraction = _fraction_of(qset) or 0
        # The scale's leading bit is kept: the 16-bit dtypes hold no more for many levels.
        finest = min(top - (digits - 1 - headroom), -fraction)
        return _Shape(digits, finest, fraction, top, top + headroom // 2)


@functools.partial(jax.jit, static_argnums=(0, 1))
def rounded_scale(
    qset: QuantizedSet, dtype: DTypeLike, scale: Array, most: Array | None = None
) -> Array:
    """A scale on its grid, and no larger than `most`."""
    grid = grid_of(scale, qset, dtype)
    unit = 2.0 ** _Shape.of(qset, dtype).fraction
    density, spacing = grid.density / unit, grid.spacing * unit
    rounded = jnp.round(scale * density) * spacing
    if most is None:
        return rounded
    return jnp.where(rounded > most, jnp.floor(most * density) * spacing, rounded)


def scale_digits(qset: QuantizedSet, dtype: DTypeLike) -> int:
    """To how many significant bits `rounded_scale` rounds a scale."""
    shape = _Shape.of(qset, dtype)
    return 1 - shape.finest - shape.fraction


def has_exact_levels(qset: QuantizedSet) -> bool:
    """Whether every level times a rounded scale is on the grid."""
    return _fraction_of(qset) is not None


def _fraction_of(qset: QuantizedSet) -> int | None:
    """The least k for which every level is an integer over 2^k; None if these are large."""
    k = 0
    while not all((m * 2**k).is_integer() for m in qset.magnitudes):
        k += 1
        if qset.magnitudes[-1] * 2**k > MOST_INTEGER:
            return None
    return k


def has_room(qset: QuantizedSet, dtype: DTypeLike) -> bool:
    """Whether the dtype holds the levels at a scale and at twice that scale on one grid."""
    shape = _Shape.of(qset, dtype)
    return 2.0 ** (shape.digits + shape.finest) - 2.0**shape.reach >= 2.0 ** (shape.top + 1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def limit_scale_jump(fit: Fit, last: Fit, qset: QuantizedSet, dtype: DTypeLike) -> Fit:
    """A rounded fit as near to `fit` as steps from the levels of `last` to its own are exact.

    It differs from `fit` only where a scale jumps beyond the headroom: then it grows as far as
    there is room, or keeps fewer bits, and the next updates catch up. Sets that leave a 16-bit
    dtype no room at all are not held back.
    """
    if not has_room(qset, dtype):
        return fit
    shape = _Shape.of(qset, dtype)
    old = grid_of(last.scale, qset, dtype)
    # Both old and new weights are within their reach; in units of the old scale's leading bit:
    widest = math.floor(math.log2(2.0 ** (shape.digits + shape.finest) - 2.0**shape.reach))
    most = old.reach * 2.0 ** (widest - shape.reach - shape.top + 1)
    spacing = jnp.maximum(old.reach * 2.0 ** (1 - shape.digits), _least(dtype))
    if has_exact_levels(qset):
        spacing *= 2.0**shape.fraction
        least = jnp.maximum(jnp.round(fit.scale / spacing), 1) * spacing
    else:  # their weights are rounded to the grid of the scale itself; no weight is beyond a level
        least = jnp.maximum(fit.scale, spacing * 2.0 ** (shape.top - shape.reach - shape.finest))
    nearest = jnp.where(fit.scale < last.scale, least, jnp.minimum(fit.scale, most))
    return fit._replace(scale=jnp.where((last.scale > 0) & (fit.scale > 0), nearest, fit.scale))


def place_on_grid(y: Array, fit: Fit, qset: QuantizedSet, grid: Grid) -> Array:
    """The quantized weights for float weights y, a rounded fit and the grid beside y."""
    w = qset.place(y, fit)
    return w if has_exact_levels(qset) else grid.round(w)


def landing_point(w: Array, p: Array, grid: Grid, is_on_grid: Array) -> Array:
    """Where to send p: to w on the grid, or onto the grid if p is off it and cannot arrive, to 0 if
    the nearest point is so near that the difference is flushed to zero.

    Args:
      w: the weights wanted, at least float32.
      p: the weights now, in the dtype of the params.
      grid: that of w; broadcasts against it.
      is_on_grid: whether p is known to be on it.
    """
    info = jnp.finfo(p.dtype)

    def stored(x: Array) -> Array:
        return lax.reduce_precision(x, info.nexp, info.nmant)

    now = p.astype(w.dtype)
    goal = jnp.clip(grid.round(w), -grid.reach, grid.reach)

    def arrives(point: Array) -> Array:
        return stored(now + stored(point - now)) == point

    snapped = jnp.clip(grid.round(now), -grid.reach, grid.reach)
    onto = jnp.where(arrives(snapped), snapped, 0)
    return jnp.where(is_on_grid | arrives(goal), goal, onto)


def _least(dtype: DTypeLike) -> float:
    """The finest spacing: the wider dtypes, but not float16, lose subnormals on some devices."""
    info = jnp.finfo(dtype)
    return float(info.smallest_subnormal if info.nexp < 8 else info.tiny)
