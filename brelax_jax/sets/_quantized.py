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
    data_fields=["codes", "scale"],
    meta_fields=["magnitudes", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """An array on a quantized set: sign(code) · magnitudes[|code|] · scale.

    A pytree whose leaves are `codes` and `scale`.

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
    """

    codes: Array
    scale: Array
    magnitudes: tuple[float, ...]
    dtype: DTypeLike

    def dequantize(self) -> Array:
        """The weights, of the codes' shape and of `dtype`; bit for bit what `project` returns."""
        codes = self.codes.astype(self.scale.dtype)
        magnitude = at_index(jnp.abs(codes), self.magnitudes)
        return (jnp.where(codes < 0, -magnitude, magnitude) * self._expanded_scale()).astype(
            self.dtype
        )

    def _expanded_scale(self) -> Array:
        """The scale, repeated along a block axis so that it broadcasts against the codes."""
        scale = self.scale
        for axis, (entries, groups) in enumerate(zip(self.codes.shape, scale.shape, strict=True)):
            if groups not in (1, entries):
                scale = jnp.repeat(scale, entries // groups, axis=axis, total_repeat_length=entries)
        return scale
