"""The other forms and methods: short names for settings of `binary_relax`.

They repeat its keywords, because Optax's `inject_hyperparams` reads signatures.
"""

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from brelax_jax._proximal import PiecewiseAffine, ProximalMap
from brelax_jax._select import Sets
from brelax_jax.transforms._relax import RELAXATION, Lam, binary_relax


def relax_params(
    qset: Sets,
    lam: Lam,
    hard_from: ArrayLike | None = None,
    *,
    float_dtype: DTypeLike = "float32",
    track_flips: bool = False,
    proximal_map: ProximalMap = RELAXATION,
) -> optax.GradientTransformationExtraArgs:
    """`binary_relax` as the last link of `optax.chain(base, …)`.

    The links before it see the pseudo-quantized params: weight decay acts on them, not on the float
    weights. Prefer `binary_relax`. Arguments and errors are those
    of `binary_relax`, without `base`.

    Returns:
      A transformation that turns the updates of the links before it into updates of the
      pseudo-quantized params.

    >>> import brelax_jax as brx, optax
    >>> optimizer = optax.chain(
    ...     optax.sgd(0.1, momentum=0.9), brx.relax_params(brx.Ternary(), brx.continuation(1_200))
    ... )
    """
    return binary_relax(
        optax.identity(),
        qset,
        lam,
        hard_from,
        float_dtype=float_dtype,
        track_flips=track_flips,
        proximal_map=proximal_map,
    )


def binary_connect(
    base: optax.GradientTransformation,
    qset: Sets,
    *,
    float_dtype: DTypeLike = "float32",
    track_flips: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """BinaryConnect, the customary baseline: `binary_relax` with λ = ∞, so it projects from the
    first step on. Arguments and errors are otherwise the same.

    Returns:
      A transformation. It is the straight-through estimator: gradients at the quantized weights
      move the float weights.

    References:
      Courbariaux et al., BinaryConnect, 2015 (arXiv 1511.00363).

    >>> import brelax_jax as brx, optax
    >>> optimizer = brx.binary_connect(optax.adam(1e-3), brx.Binary())
    """
    return binary_relax(base, qset, jnp.inf, float_dtype=float_dtype, track_flips=track_flips)


def parq(
    base: optax.GradientTransformation,
    qset: Sets,
    lam: Lam,
    hard_from: ArrayLike | None = None,
    *,
    float_dtype: DTypeLike = "float32",
    track_flips: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """PARQ: `binary_relax` with the piecewise-affine map, whose slope is λ + 1; the same arguments
    and errors otherwise. PARQ's own schedule is `sigmoid_continuation`.

    Returns:
      A transformation. Unlike with `binary_relax`, λ = 0 is not float training: weights beyond the
      last level are cut off, which for `Binary` is half of them.

    References:
      Jin et al., PARQ, 2025 (arXiv 2503.15748).

    >>> import brelax_jax as brx, optax
    >>> optimizer = brx.parq(
    ...     optax.sgd(0.1), brx.Ternary(), brx.continuation(1_200, shape="sigmoid")
    ... )
    """
    return binary_relax(
        base,
        qset,
        lam,
        hard_from,
        float_dtype=float_dtype,
        track_flips=track_flips,
        proximal_map=PiecewiseAffine(),
    )
