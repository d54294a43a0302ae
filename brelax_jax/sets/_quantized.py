"""Quantized weights: integer codes and one scale a group."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from brelax_jax.sets._levels import at_index


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scale", "spacing"],
    meta_fields=["magnitudes", "dtype", "has_zero"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array on a quantized set: sign(code) · magnitudes[|code|] · scale.

    A pytree whose leaves are `codes`, `scale` and, where there is one, `spacing`.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> quantized = brx.Ternary().quantize(jnp.array([0.1, -1.0, 3.0, 2.0]))
    >>> quantized.codes
    Array([0, 0, 1, 1], dtype=int8)
    >>> quantized.scale, quantized.magnitudes
    (Array([2.5], dtype=float32), (0.0, 1.0))

    Attributes:
      codes: int8, of the weight's shape.
      scale: at least float32, of the weight's rank: one entry per group (size 1 along the axes that
        a group spans, n/size along a block axis).
      magnitudes: the nonnegative levels, ascending from 0 (which a set without the level 0 lists,
        but never uses).
      dtype: the weight's dtype.
      spacing: shaped like `scale`, the distance of the points to which weights are rounded; None
        for no rounding. Params in training are rounded if the levels are not integers.
      has_zero: whether 0 is a level, so that a code may be 0.
    """

    codes: Array
    scale: Array
    magnitudes: tuple[float, ...]
    dtype: DTypeLike
    spacing: Array | None = None
    has_zero: bool = True

    def dequantize(self) -> Array:
        """The weights, of the codes' shape and of `dtype`.

        Bit for bit what the function that made this returns unquantized, such as `project`.
        """
        return _dequantized(self)


@jax.jit
def _dequantized(quantized: Quantized) -> Array:
    shape, scale = quantized.codes.shape, quantized.scale
    codes = quantized.codes.astype(scale.dtype)
    magnitude = at_index(jnp.abs(codes), quantized.magnitudes)
    w = jnp.where(codes < 0, -magnitude, magnitude) * _expanded(scale, shape)
    if quantized.spacing is not None:
        spacing = _expanded(quantized.spacing, shape)
        w = jnp.round(w * (1 / spacing)) * spacing
    return without_negative_zero(w.astype(quantized.dtype))


def _expanded(scale: Array, shape: tuple[int, ...]) -> Array:
    """One entry per group, repeated along a block axis so that it broadcasts against codes."""
    for axis, (entries, groups) in enumerate(zip(shape, scale.shape, strict=True)):
        if groups not in (1, entries):
            scale = jnp.repeat(scale, entries // groups, axis=axis, total_repeat_length=entries)
    return scale


def without_negative_zero(w: Array) -> Array:
    """0 in place of −0, which no sum of params and updates ends at."""
    return jnp.where(w == 0, jnp.zeros_like(w), w)
