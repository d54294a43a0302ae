"""How the scale of a group is found: by a search for the best one, by a mean, or as it is given."""

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from brelax_jax._arguments import is_number
from brelax_jax.sets._group import Group
from brelax_jax.sets._levels import magnitude_of, nearest_magnitude
from brelax_jax.sets._sums import sums

SMALL = 2.0**-32  # the part of each weight of which a sum does not overflow


class Fit(NamedTuple):
    """What places one array on a set: with it, the projection is elementwise.

    Attributes:
      scale: one entry per group, of the array's rank, at least float32.
      code_scale: the scale at which codes are the nearest ones, as `scale`; None if that is `scale`
        itself.
    """

    scale: Array
    code_scale: Array | None = None


@dataclasses.dataclass(frozen=True)
class ScaleRule(abc.ABC):
    """How a set finds the scale of each group of weights. A new rule states its `fit_groups`."""

    @property
    def refits(self) -> bool:
        """Whether the scale is the least-squares one of the codes."""
        return False

    def check(self, magnitudes: Sequence[float], name: str) -> None:
        """Raises a ValueError if the rule is not for the set of this name, with these levels."""
        del magnitudes, name

    @abc.abstractmethod
    def fit_groups(self, w: Array, magnitudes: Sequence[float], group: Group) -> Fit:
        """The fit of each group.

        Args:
          w: floats, at least float32, not empty, in a view in which the sum of each group is
            `group.sum(w)`.
          magnitudes: the nonnegative levels, ascending, the last one positive.
          group: the reductions over a group. A scale is of the shape of their results.
        """


@dataclasses.dataclass(frozen=True)
class LeastSquares(ScaleRule):
    """The best scale: argmin over s ≥ 0 of Σ min over the levels l of (w − s·l)².

    Exact for all sets, by a search (docs/projections.md). A set with one magnitude needs none:
    there the scale is a mean.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> qset = brx.Uniform(3, rule=brx.LeastSquares())
    >>> qset.quantize(jnp.array([0.5, -1.0, 1.5, 0.1])).scale
    Array([0.5], dtype=float32)

    Attributes:
      tolerance: in training, how far the squared error may be above the least one, relative, before
        a new scale is searched for. Until then the codes' own scale follows the weights. With 0 the
        scale is always the best one, and may jump from one step to the next (docs/projections.md).
        `project` and `quantize` always take the best scale, because they see no step before.

    Raises:
      ValueError: if `tolerance` is not a number from 0 to less than 1; in a set whose scale is a
        mean, if it is not 0.
    """

    tolerance: float = 0.0

    def __post_init__(self) -> None:
        if not (is_number(self.tolerance) and 0 <= self.tolerance < 1):
            raise ValueError(
                f"tolerance must be a number from 0 to less than 1, got {self.tolerance!r}."
            )
        object.__setattr__(self, "tolerance", float(self.tolerance))

    @property
    def refits(self) -> bool:
        """See `ScaleRule.refits`."""
        return True

    def check(self, magnitudes: Sequence[float], name: str) -> None:
        """See `ScaleRule.check`."""
        if self.tolerance and len(magnitudes) == 1:
            raise ValueError(
                f"tolerance is for sets whose scale is searched for, got {self.tolerance!r}; "
                f"{name}'s is a formula, which does not jump: leave it out."
            )

    def fit_groups(self, w: Array, magnitudes: Sequence[float], group: Group) -> Fit:
        """See `ScaleRule.fit_groups`. For one magnitude: other sets are searched together."""
        [magnitude] = magnitudes
        scale = mean_magnitude(w, group) / magnitude
        return Fit(jnp.where(jnp.isfinite(scale), scale, jnp.nan))


@dataclasses.dataclass(frozen=True)
class MeanMagnitude(ScaleRule):
    """A multiple of mean |w|: codes are the nearest ones at the scale factor·mean |w|.

    With three levels and 1.4 this is the rule of ternary weight networks, and with 1.0 and no refit
    that of BitNet b1.58. It costs one or two reductions and does not jump. The points are not the
    nearest ones of the set.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> w = jnp.array([0.5, -1.0, 3.0, 1.5])  # the mean is 1.5
    >>> brx.Ternary(rule=brx.MeanMagnitude(1.4)).quantize(w).scale
    Array([2.25], dtype=float32)
    >>> brx.Ternary(rule=brx.MeanMagnitude(1.0, refit=False)).quantize(w).scale
    Array([1.5], dtype=float32)

    Attributes:
      factor: of the mean, positive.
      refit: whether the scale is then the least-squares one of the codes, ⟨q, w⟩/⟨q, q⟩, instead of
        factor·mean |w|.

    Raises:
      ValueError: if `factor` is not a positive finite number, or `refit` no bool.

    References:
      Li, Liu et al., Ternary Weight Networks, 2016 (arXiv 1605.04711), eq. 5 and 6.
      Ma et al., The Era of 1-bit LLMs, 2024 (arXiv 2402.17764), its absmean quantization.
    """

    factor: float
    refit: bool = True

    def __post_init__(self) -> None:
        if not (is_number(self.factor) and self.factor > 0 and math.isfinite(self.factor)):
            raise ValueError(
                f"factor must be a positive finite number, got {self.factor!r}; for ternary levels "
                "1.4 is customary."
            )
        if not isinstance(self.refit, bool):
            raise ValueError(f"refit must be True or False, got {self.refit!r}.")
        object.__setattr__(self, "factor", float(self.factor))

    @property
    def refits(self) -> bool:
        """See `ScaleRule.refits`."""
        return self.refit

    def fit_groups(self, w: Array, magnitudes: Sequence[float], group: Group) -> Fit:
        """See `ScaleRule.fit_groups`."""
        mean = mean_magnitude(w, group)
        at = jnp.minimum(self.factor * mean, jnp.finfo(w.dtype).max)
        at = jnp.where(jnp.isfinite(mean), at, jnp.nan)
        if not self.refit:
            return Fit(at)
        if len(magnitudes) == 1:  # all codes are the same, whatever places them
            return Fit(jnp.where(jnp.isfinite(mean), mean / magnitudes[0], jnp.nan))
        scale = _refitted(magnitudes, group, w, mean, at)
        return Fit(jnp.where(jnp.isnan(at), at, scale), at)


def _refitted(magnitudes: Sequence[float], group: Group, w: Array, mean: Array, at: Array) -> Array:
    """The least-squares scale of the codes that are nearest at a scale."""
    size = float(group.size(w))
    unit = jnp.where(mean < jnp.finfo(w.dtype).max / (2 * size), 1, SMALL)  # no overflow

    def gain_and_norm(w: Array, at: Array, unit: Array) -> tuple[Array, Array]:
        a = magnitude_of(w)
        q = nearest_magnitude(a, at, magnitudes)
        return a * unit * (q / magnitudes[-1]), jnp.square(q)

    gain, norm = sums(gain_and_norm, group, w, at, unit)
    norm = norm / size / magnitudes[-1]
    return gain / size / jnp.where(norm > 0, norm, 1) / unit


@dataclasses.dataclass(frozen=True)
class MaxMagnitude(ScaleRule):
    """The largest weight on the largest level: the customary rule for eight bits.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.Uniform(8, rule=brx.MaxMagnitude()).quantize(jnp.array([0.1, -1.27])).codes
    Array([  10, -127], dtype=int8)
    """

    def fit_groups(self, w: Array, magnitudes: Sequence[float], group: Group) -> Fit:
        """See `ScaleRule.fit_groups`."""
        scale = group.max(jnp.abs(w)) / magnitudes[-1]
        return Fit(jnp.where(jnp.isfinite(scale), scale, jnp.nan))


@dataclasses.dataclass(frozen=True)
class Fixed(ScaleRule):
    """The same scale for all groups, as in BinaryConnect and ProxQuant, whose weights are ±1.

    In training the scale is rounded to 19 significant bits, as every scale is.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.Binary(rule=brx.Fixed(1.0)).project(jnp.array([0.3, -0.2]))
    Array([ 1., -1.], dtype=float32)

    Attributes:
      value: the scale, positive.

    Raises:
      ValueError: if `value` is not a positive finite number.

    References:
      Courbariaux et al., BinaryConnect, 2015 (arXiv 1511.00363).
    """

    value: float

    def __post_init__(self) -> None:
        if not (is_number(self.value) and self.value > 0 and math.isfinite(self.value)):
            raise ValueError(
                f"value must be a positive finite number, got {self.value!r}; 1.0 is customary."
            )
        object.__setattr__(self, "value", float(self.value))

    def fit_groups(self, w: Array, magnitudes: Sequence[float], group: Group) -> Fit:
        """See `ScaleRule.fit_groups`."""
        largest = group.max(jnp.abs(w))
        return Fit(jnp.where(jnp.isfinite(largest), jnp.asarray(self.value, w.dtype), jnp.nan))


def mean_magnitude(w: Array, group: Group) -> Array:
    """The mean of |w| over each group, also where the plain sum overflows."""
    return lax.platform_dependent(
        w,
        cpu=functools.partial(_mean_by_other_passes, group),
        default=functools.partial(mean_at_once, group),
    )


def _mean_by_other_passes(group: Group, w: Array) -> Array:
    """Where the plain sum overflows, by another pass: on CPU two sums in one pass are slow."""
    total = group.sum(jnp.abs(w))
    size = float(group.size(w))  # 2^32 is no int32
    return lax.cond(
        jnp.all(jnp.isfinite(total)),
        lambda: total / size,
        lambda: _mean_of(total, group.sum(magnitude_of(w) * SMALL), size),
    )


def mean_at_once(group: Group, w: Array) -> Array:
    """By a sum that is exact and one that does not overflow: a branch would copy the weights."""
    a = jnp.abs(w)
    return _mean_of(*group.sums(a, a * SMALL), float(group.size(w)))


def _mean_of(total: Array, small: Array, size: float) -> Array:
    """The mean from the sum, which may have overflowed, and that of a part of each weight."""
    large = jnp.minimum(small / size, jnp.finfo(small.dtype).max * SMALL) / SMALL
    return jnp.where(jnp.isfinite(total), total / size, jnp.where(jnp.isinf(small), small, large))
