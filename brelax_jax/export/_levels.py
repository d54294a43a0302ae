"""Quantized weights as the integers and scales that other formats store."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from brelax_jax.sets import Quantized

Floats = NDArray[np.float32]


class Scaled(NamedTuple):
    """Weights as levels · scale.

    Attributes:
      levels: whole numbers of the weights' shape. They are 0 where the scale is 0.
      scale: of the weights' rank, one entry a group.
      weights: what both must multiply out to, bit for bit.
    """

    levels: Floats
    scale: Floats
    weights: Floats


def scaled(quantized: Quantized) -> Scaled:
    """The levels and scales of quantized weights. Half levels are doubled, and their scales halved.

    Raises:
      TypeError: if `quantized` is no `Quantized`.
      ValueError: if a scale is negative or not finite, a code has no level, or a level is neither
        whole nor a half.
    """
    if not isinstance(quantized, Quantized):
        raise TypeError(
            f"quantized must be a Quantized, as brx.quantized_tree(opt_state, params) gives it, "
            f"got {type(quantized).__name__}."
        )
    codes = np.asarray(quantized.codes, np.int16)
    magnitudes = np.array(quantized.magnitudes, np.float32)
    largest = len(magnitudes) - 1
    if np.abs(codes).max(initial=0) > largest:
        raise ValueError(
            f"the codes of `quantized` must be from {-largest} to {largest}, as its levels are, "
            f"got {codes.min()} to {codes.max()}."
        )
    levels = np.sign(codes) * magnitudes[np.abs(codes)]
    scale = np.asarray(quantized.scale, np.float32)
    if not (np.isfinite(scale) & (scale >= 0)).all():
        raise ValueError("the scales of `quantized` must be finite and not negative.")
    if np.any(levels % 1):
        levels, scale = 2 * levels, scale * np.float32(0.5)
    if np.any(levels % 1):
        raise ValueError(
            f"the levels of `quantized` must be whole numbers or halves, got "
            f"{quantized.magnitudes}; use those of a set such as ScaledLevels((-3, -1, 1, 3))."
        )
    levels = np.where(expanded(scale, codes.shape) > 0, levels, 0).astype(np.float32)
    return Scaled(levels, scale, np.asarray(quantized.dequantize()).astype(np.float32))


def expanded(scale: NDArray[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """One entry per group, repeated so that there are as many along each axis as `shape` says."""
    for axis, (entries, groups) in enumerate(zip(shape, scale.shape, strict=True)):
        scale = np.repeat(scale, entries // groups, axis=axis)
    return scale


def same_bits(a: Floats, b: Floats) -> bool:
    """Whether two arrays of float32 are equal, 0 and −0 being different."""
    return np.array_equal(a.view(np.int32), b.view(np.int32))
