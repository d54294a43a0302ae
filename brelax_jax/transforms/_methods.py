"""The other forms and methods: short names for settings of `binary_relax`."""

from collections.abc import Callable

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from brelax_jax._proximal import PiecewiseAffine, ProximalMap
from brelax_jax._select import Selection
from brelax_jax.sets import QuantizedSet
from brelax_jax.transforms._relax import RELAXATION, binary_relax


def relax_params(
    qset: QuantizedSet | Selection,
    lam: ArrayLike | Callable[[ArrayLike], ArrayLike],
    hard_from: ArrayLike | None = None,
    float_dtype: DTypeLike = "float32",
    track_flips: bool = False,
    proximal_map: ProximalMap = RELAXATION,
) -> optax.GradientTransformationExtraArgs:
    """`binary_relax` as the last link of `optax.chain(base, …)`.

    What stands before it in the chain sees the pseudo-quantized params: weight decay acts on them,
    not on the float weights. Where that matters, and in general, use `binary_relax`.

    Args:
      qset: as for `binary_relax`.
      lam: as for `binary_relax`.
      hard_from: as for `binary_relax`.
      float_dtype: as for `binary_relax`.
      track_flips: as for `binary_relax`.
      proximal_map: as for `binary_relax`.

    Returns:
      A transformation that turns the updates of the links before it into updates of the
      pseudo-quantized params.

    Raises:
      ValueError: as `binary_relax`.

    >>> import brelax_jax as brx, optax
    >>> optimizer = optax.chain(
    ...     optax.sgd(0.1, momentum=0.9),
    ...     brx.relax_params(brx.Ternary(), lam=brx.linear_continuation(900), hard_from=900),
    ... )
    """
    return binary_relax(
        optax.identity(), qset, lam, hard_from, float_dtype, track_flips, proximal_map
    )


def binary_connect(
    base: optax.GradientTransformation,
    qset: QuantizedSet | Selection,
    float_dtype: DTypeLike = "float32",
    track_flips: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """BinaryConnect, the customary baseline: projects from the first step on (λ = ∞).

    Args:
      base: as for `binary_relax`.
      qset: as for `binary_relax`.
      float_dtype: as for `binary_relax`.
      track_flips: as for `binary_relax`.

    Returns:
      A transformation. In effect the straight-through estimator: gradients at the quantized weights
      move the float ones.

    Raises:
      ValueError: as `binary_relax`.

    References:
      Courbariaux et al., BinaryConnect, 2015 (arXiv 1511.00363).

    >>> import brelax_jax as brx, optax
    >>> optimizer = brx.binary_connect(optax.adam(1e-3), brx.Binary())
    """
    return binary_relax(base, qset, jnp.inf, None, float_dtype, track_flips)


def parq(
    base: optax.GradientTransformation,
    qset: QuantizedSet | Selection,
    lam: ArrayLike | Callable[[ArrayLike], ArrayLike],
    hard_from: ArrayLike | None = None,
    float_dtype: DTypeLike = "float32",
    track_flips: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """PARQ: `binary_relax` with the piecewise-affine map, whose slope is λ + 1.

    Args:
      base: as for `binary_relax`.
      qset: as for `binary_relax`.
      lam: λ ≥ 0, or a schedule of it: the slope less 1. PARQ's own is `sigmoid_continuation`.
      hard_from: as for `binary_relax`.
      float_dtype: as for `binary_relax`.
      track_flips: as for `binary_relax`.

    Returns:
      A transformation, as `binary_relax`. Unlike there, λ = 0 is not float training: weights
      beyond the last level are cut off, which for `Binary` is half of them.

    Raises:
      ValueError: as `binary_relax`.

    References:
      Jin et al., PARQ, 2025 (arXiv 2503.15748).

    >>> import brelax_jax as brx, optax
    >>> optimizer = brx.parq(
    ...     optax.sgd(0.1), brx.Ternary(), lam=brx.sigmoid_continuation(900), hard_from=900
    ... )
    """
    return binary_relax(base, qset, lam, hard_from, float_dtype, track_flips, PiecewiseAffine())
