"""How float weights are pulled to a set: the proximal maps of the published methods.

Each turns the float weights y into the params w that the network computes with, by one number, the
strength α = λ/(λ + 1): from (nearly) y at α = 0 to exactly proj_Q(y) at α = 1, which is
BinaryConnect. Elementwise, given the scales.
"""

import abc
import dataclasses

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from brelax_jax._envelope import blend, strength_of
from brelax_jax.sets import Fit, QuantizedSet, compute_dtype
from brelax_jax.sets._fit import fit_finely


@dataclasses.dataclass(frozen=True)
class Target:
    """Float weights and the points of Q that they are pulled to.

    Attributes:
      y: the float weights, at least float32.
      projection: their points of Q, of y's shape and dtype.
      qset: the set Q.
      fit: what places y on it.
    """

    y: Array
    projection: Array
    qset: QuantizedSet
    fit: Fit

    @property
    def scale(self) -> Array:
        """The scale of each weight, of y's shape."""
        return self.qset.scales(self.y, self.fit)

    @property
    def half_gap(self) -> Array:
        """Half the distance between the two points of Q that each weight is between, of y's shape;
        0 beyond the last.
        """
        return self.qset.half_gaps(self.y, self.fit)


@dataclasses.dataclass(frozen=True)
class ProximalMap(abc.ABC):
    """What all maps share. A new map defines `pull`.

    Attributes:
      updates_float_params: whether the float weights themselves are moved to w, not only the
        params.
    """

    updates_float_params: bool = dataclasses.field(default=False, init=False, repr=False)

    def apply(self, y: ArrayLike, qset: QuantizedSet, lam: ArrayLike) -> Array:
        """The map of one array.

        Args:
          y: floating array of any shape, the float weights.
          qset: the set Q.
          lam: λ ≥ 0, a scalar; 0 and ∞ are allowed.

        Returns:
          w, of y's shape and dtype; proj_Q(y) at λ = ∞. Derivatives treat the projection as a
          constant.

        Raises:
          TypeError: if y is not of a floating dtype.
          ValueError: if the set's granularity does not fit y's shape.
        """
        y = qset._checked(y)
        constant = lax.stop_gradient(y)
        fit = fit_finely(qset, constant)
        projection = qset.place(constant, fit).astype(y.dtype)  # as `project` rounds it
        compute = compute_dtype(y.dtype)
        alpha = strength_of(jnp.asarray(lam, compute))
        target = Target(y.astype(compute), projection.astype(compute), qset, fit)
        return self.pull(target, alpha).astype(y.dtype)

    @abc.abstractmethod
    def pull(self, target: Target, alpha: Array) -> Array:
        """w, of the shape and dtype of `target.y`; at α = 1 exactly `target.projection`.

        Args:
          target: the float weights `y` and their `projection`. The `scale` of each weight and the
            `half_gap` between the levels around it are computed only when asked for.
          alpha: the strength, a scalar of y's dtype.
        """


@dataclasses.dataclass(frozen=True)
class Relaxation(ProximalMap):
    """BinaryRelax: w = (λ·proj_Q(y) + y)/(λ + 1), the proximal map of λ/2·dist(w, Q)².

    The float weights themselves at λ = 0. See `relax`.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.Relaxation().apply(jnp.array([3.0, -5.0]), brx.Binary(), lam=1.0)
    Array([ 3.5, -4.5], dtype=float32)

    References:
      Yin et al., BinaryRelax, 2018 (arXiv 1801.06313), eq. 3.3.
    """

    def pull(self, target: Target, alpha: Array) -> Array:
        """See `ProximalMap.pull`."""
        return blend(target.y, target.projection, alpha)


@dataclasses.dataclass(frozen=True)
class PiecewiseAffine(ProximalMap):
    """PARQ: between neighbouring levels a < b, w = clip(c + (λ + 1)·(y − c), a, b) with the
    midpoint c = (a + b)/2; beyond the last level, that level.

    The slope λ + 1 turns a line into steps, continuously: weights near a level are on it exactly,
    long before the others. At λ = 0 it is y, cut off at the last levels. With
    `MeanMagnitude`, whose codes may not be the nearest ones at the scale, weights that have another
    code than the nearest are held at the midpoint.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> y = jnp.array([0.25, -1.75, 0.5, -1.5])  # the scale is 1
    >>> brx.PiecewiseAffine().apply(y, brx.Binary(), lam=1.0)
    Array([ 0.5, -1. ,  1. , -1. ], dtype=float32)

    References:
      Jin et al., PARQ, 2025 (arXiv 2503.15748), its proximal map.
    """

    def pull(self, target: Target, alpha: Array) -> Array:
        """See `ProximalMap.pull`; from the nearest level outwards, which is the same."""
        projection, half = target.projection, target.half_gap
        residual = target.y - projection
        slope = 1 / jnp.where(alpha < 1, 1 - alpha, 1)
        moved = jnp.clip(half - slope * (half - jnp.abs(residual)), 0, half)
        return jnp.where(alpha < 1, projection + jnp.sign(residual) * moved, projection)


@dataclasses.dataclass(frozen=True)
class SoftThreshold(ProximalMap):
    """ProxQuant: w = q + sign(y − q)·max(|y − q| − λ·s, 0) with q = proj_Q(y) and its scale s, the
    proximal map of λ·s·‖w − q‖₁.

    The published map has the levels ±1, so s = 1. Weights within λ·s of their level move onto it.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> y = jnp.array([0.25, -1.75, 0.5, -1.5])  # the scale is 1
    >>> brx.SoftThreshold().apply(y, brx.Binary(), lam=0.5).round(4)
    Array([ 0.75, -1.25,  1.  , -1.  ], dtype=float32)

    Attributes:
      updates_float_params: whether the float weights themselves are moved to w, as in ProxQuant,
        and not only the params.

    References:
      Bai, Wang and Liberty, ProxQuant, 2018 (arXiv 1810.00861), its map for binary weights.
    """

    updates_float_params: bool = False

    def pull(self, target: Target, alpha: Array) -> Array:
        """See `ProximalMap.pull`."""
        projection = target.projection
        residual = target.y - projection
        lam = jnp.where(alpha < 1, alpha / jnp.where(alpha < 1, 1 - alpha, 1), 0)
        shrunk = jnp.maximum(jnp.abs(residual) - lam * target.scale, 0)
        return jnp.where(alpha < 1, projection + jnp.sign(residual) * shrunk, projection)
