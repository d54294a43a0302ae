"""The quantized sets. They differ in their levels."""

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence

from brelax_jax._arguments import is_number
from brelax_jax.sets._base import QuantizedSet
from brelax_jax.sets._rules import MeanMagnitude, ScaleRule

MOST_LEVELS = 255  # codes are int8
LARGEST = 1e12  # level, and one over the least positive one: sums of squares do not overflow


@dataclasses.dataclass(frozen=True, repr=False)
class Binary(QuantizedSet):
    """{±s}: one bit. The optimal scale is the mean of |w|; zero projects to +s.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.Binary().project(jnp.array([0.5, -1.0, 0.0, 2.5]))
    Array([ 1., -1.,  1.,  1.], dtype=float32)

    References:
      Rastegari et al., XNOR-Net, 2016 (arXiv 1603.05279), eq. 6.
    """

    def __post_init__(self) -> None:
        self._init_fields(levels=(-1.0, 1.0))


@dataclasses.dataclass(frozen=True, repr=False)
class Ternary(QuantizedSet):
    """{0, ±s}: log2(3) bits. With S_k the sum of the k largest |w|, s = S_k/k for the k that
    maximizes S_k²/k.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.Ternary().project(jnp.array([0.1, -1.0, 3.0, 2.0]))
    Array([0. , 0. , 2.5, 2.5], dtype=float32)

    References:
      Yin et al., Quantization and Training of Low Bit-Width Convolutional Neural Networks, 2016
      (arXiv 1612.06052), theorem 1.
    """

    def __post_init__(self) -> None:
        self._init_fields(levels=(-1.0, 0.0, 1.0))


@dataclasses.dataclass(frozen=True, repr=False)
class TernaryThreshold(QuantizedSet):
    """{0, ±s} by the rule of ternary weight networks: nonzero where |w| > factor·mean |w|, s the
    mean of |w| there.

    A short name for `Ternary(rule=MeanMagnitude(2 * factor))`. It is cheaper than least squares and
    close to it for normal weights, but not the nearest point of the set.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.TernaryThreshold().project(jnp.array([0.1, -1.0, 3.0, 2.0]))
    Array([0. , 0. , 2.5, 2.5], dtype=float32)

    Attributes:
      factor: the threshold in units of mean |w|, positive.

    Raises:
      ValueError: if `factor` is not a positive finite number.

    References:
      Li, Liu et al., Ternary Weight Networks, 2016 (arXiv 1605.04711), eq. 5 and 6.
    """

    factor: float = 0.7
    rule: ScaleRule = dataclasses.field(default=MeanMagnitude(1.4), init=False, repr=False)

    def __post_init__(self) -> None:
        if not (is_number(self.factor) and self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(
                f"factor must be a positive finite number (0.7 is customary), got {self.factor!r}."
            )
        factor = float(self.factor)
        rule = MeanMagnitude(2 * factor)
        self._init_fields(factor=factor, rule=rule, levels=(-1.0, 0.0, 1.0))


@dataclasses.dataclass(frozen=True, repr=False)
class Uniform(QuantizedSet):
    """s·{0, ±1, …, ±(2^(bits−1) − 1)}: evenly spaced levels.

    >>> import brelax_jax as brx
    >>> brx.Uniform(3).levels
    (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)

    Attributes:
      bits: from 2 (the ternary set) to 8.

    Raises:
      ValueError: if `bits` is not an integer, or out of range.
    """

    bits: int

    def __post_init__(self) -> None:
        bits = _bits(self.bits, most=8, name="Uniform")
        self._init_fields(bits=bits, levels=_mirrored(range(2 ** (bits - 1))))


@dataclasses.dataclass(frozen=True, repr=False)
class PowerOfTwo(QuantizedSet):
    """s·{0, ±1, ±2, ±4, …}: 2^(bits−2) magnitudes besides 0, so that products are shifts. The scale
    is free.

    >>> import brelax_jax as brx
    >>> brx.PowerOfTwo(3).levels
    (-2.0, -1.0, 0.0, 1.0, 2.0)

    Attributes:
      bits: from 2 (the ternary set) to 5.

    Raises:
      ValueError: if `bits` is not an integer, or out of range.

    References:
      Yin et al., Quantization and Training of Low Bit-Width Convolutional Neural Networks, 2016
      (arXiv 1612.06052).
    """

    bits: int

    def __post_init__(self) -> None:
        bits = _bits(self.bits, most=5, name="PowerOfTwo")
        self._init_fields(bits=bits, levels=_mirrored([0, *(2**k for k in range(2 ** (bits - 2)))]))


@dataclasses.dataclass(frozen=True, repr=False)
class ScaledLevels(QuantizedSet):
    """s·L for any symmetric set of levels L.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.ScaledLevels((-3, -1, 1, 3)).project(jnp.array([1.5, -0.75, 0.25, 1.5]))
    Array([ 1.5, -0.5,  0.5,  1.5], dtype=float32)

    Attributes:
      levels: ascending and symmetric about zero, at most 255.

    Raises:
      ValueError: if the levels are not real numbers of magnitude 0 or 1e-12 to 1e12, the
        positive ones within a factor of 1e12, ascending, symmetric, without repeats, one of them
        positive.
    """

    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        self._init_fields(levels=_symmetric(self.levels))


def _mirrored(magnitudes: Iterable[float]) -> tuple[float, ...]:
    """The levels ±m for these magnitudes, ascending."""
    return tuple(sorted({sign * float(m) + 0.0 for m in magnitudes for sign in (-1, 1)}))


def _bits(bits: object, most: int, name: str) -> int:
    try:
        if isinstance(bits, bool):
            raise TypeError
        bits = operator.index(bits)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ValueError(
            f"bits must be an integer from 2 to {most} for {name}, got {bits!r}."
        ) from None
    if not 2 <= bits <= most:
        hint = "; for one bit use Binary()" if bits == 1 else ""
        raise ValueError(f"bits must be from 2 to {most} for {name}, got {bits}{hint}.")
    return bits


def _symmetric(levels: Sequence[float]) -> tuple[float, ...]:
    try:
        checked = tuple(float(level) + 0.0 for level in levels)  # + 0.0 makes -0.0 a plain 0
    except (TypeError, ValueError):
        raise ValueError(f"levels must be a sequence of real numbers, got {levels!r}.") from None

    def refuse(fault: str) -> ValueError:
        return ValueError(f"levels {fault}, got {levels!r}; give them as in (-3, -1, 1, 3).")

    if not all(map(math.isfinite, checked)):
        raise refuse("must be finite")
    if any(level and not 1 / LARGEST <= abs(level) <= LARGEST for level in checked):
        raise refuse(f"must be 0 or from {1 / LARGEST} to {LARGEST} in magnitude")
    positive = [level for level in checked if level > 0]
    if not positive:
        raise refuse("must include a positive one")
    if max(positive) > LARGEST * min(positive):
        raise refuse(f"must be within a factor of {LARGEST} of one another, or 0")
    if len(set(checked)) < len(checked):
        raise refuse("must not repeat")
    if list(checked) != sorted(checked):
        raise refuse("must ascend")
    if any(-level not in checked for level in checked):
        raise refuse("must be symmetric about zero")
    if len(checked) > MOST_LEVELS:
        raise ValueError(
            f"levels must be at most {MOST_LEVELS}, because codes are int8, got {len(checked)}."
        )
    return checked
