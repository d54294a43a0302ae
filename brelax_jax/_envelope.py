"""How hard weights are pulled: the distance to a set, its Moreau envelope, its proximal map."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from brelax_jax.sets import Group, QuantizedSet, compute_dtype
from brelax_jax.sets._levels import shift_of


def strength_of(lam: ArrayLike) -> Array:
    """α = 1/(1 + 1/λ) = λ/(λ + 1), exact at both ends: 0 at λ = 0 and 1 at λ = ∞."""
    with jax.debug_infs(False):  # 1/0 on the way is no fault
        return 1 / (1 + 1 / jnp.asarray(lam))


def blend(y: Array, projection: Array, alpha: Array) -> Array:
    """(1 − α)·y + α·projection: at α = 0 exactly y, at α = 1 exactly the projection."""
    return (1 - alpha) * y + alpha * projection


def distance(w: ArrayLike, qset: QuantizedSet) -> Array:
    """min over u ∈ Q of ‖u − w‖₂, over all scale groups together.

    Q holds all s·q, whatever the set's rule for the scale. With `Fixed`, s is the given scale.
    Residuals within rounding of w's dtype count as zero, so that a point on Q has distance 0.
    Differentiable almost everywhere, and on Q, where the gradient is 0.

    Args:
      w: floating array of any shape. Inside `jax.shard_map`, the part of a weight that is sharded
        over the `axis_name` of the set's granularity.
      qset: the set Q.

    Returns:
      A scalar, at least float32.

    Raises:
      TypeError: if w is not of a floating dtype.
      ValueError: if the set's granularity does not fit w's shape.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.distance(jnp.array([3.0, -5.0]), brx.Binary()).round(4)
    Array(1.4142, dtype=float32)
    """
    return _distance(qset, jnp.asarray(w))


@partial(jax.jit, static_argnums=0)
def _distance(qset: QuantizedSet, w: Array) -> Array:
    """In one program, as all that is computed here: outside of one each operation is compiled."""
    residual = _residual(w, qset)
    return norm(residual, qset.granularity.groups(residual.shape).whole)


def norm(x: Array, whole: Group) -> Array:
    """‖x‖₂ of a whole array, whose squares may overflow; its gradient at 0 is 0."""
    largest = whole.max(jax.lax.stop_gradient(jnp.abs(x)), initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    shift = shift_of(unit)
    square = whole.sum(jnp.square((x * shift) / (unit * shift)))
    zero = square == 0
    return (unit * jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))).reshape(())


def moreau_envelope(w: ArrayLike, qset: QuantizedSet, lam: ArrayLike) -> Array:
    """min over u of λ/2·‖u − w‖² + indicator of Q(u), which is λ/2·distance(w, Q)².

    Its gradient is λ·(w − proj_Q(w)) almost everywhere. At λ = ∞ it is the indicator itself: 0 on
    Q, with gradient 0; elsewhere ∞, where no gradient exists and infinities and NaN come out.

    Args:
      w: floating array of any shape.
      qset: the set Q.
      lam: λ ≥ 0, a scalar; 0 and ∞ are allowed.

    Returns:
      A scalar, at least float32.

    Raises:
      TypeError: if w is not of a floating dtype.
      ValueError: if the set's granularity does not fit w's shape.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.moreau_envelope(jnp.array([3.0, -5.0]), brx.Binary(), lam=10.0).round(4)
    Array(10., dtype=float32)

    References:
      Yin et al., BinaryRelax, 2018 (arXiv 1801.06313), section 3.
    """
    return _moreau_envelope(qset, jnp.asarray(w), lam)


@partial(jax.jit, static_argnums=0)
def _moreau_envelope(qset: QuantizedSet, w: Array, lam: ArrayLike) -> Array:
    far = distance(w, qset)
    return jnp.where(far == 0, 0, jnp.asarray(lam, far.dtype)) * far * far / 2


def relax(y: ArrayLike, qset: QuantizedSet, lam: ArrayLike) -> Array:
    """argmin over u of ½·‖u − y‖² + λ/2·distance(u, Q)², which is (λ·proj_Q(y) + y)/(λ + 1).

    The proximal map of the Moreau envelope: y itself at λ = 0, exactly proj_Q(y) at λ = ∞. proj_Q
    is the nearest point of Q, whatever the set's rule; with `Fixed`, at the given scale.

    Args:
      y: floating array of any shape, the float weights.
      qset: the set Q.
      lam: λ ≥ 0, a scalar; 0 and ∞ are allowed.

    Returns:
      The pseudo-quantized weights, of y's shape and dtype.

    Raises:
      TypeError: if y is not of a floating dtype.
      ValueError: if the set's granularity does not fit y's shape.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.relax(jnp.array([3.0, -5.0]), brx.Binary(), lam=1.0)
    Array([ 3.5, -4.5], dtype=float32)

    References:
      Yin et al., BinaryRelax, 2018 (arXiv 1801.06313), eq. 3.3.
    """
    return _relax(qset, jnp.asarray(y), lam)


@partial(jax.jit, static_argnums=0)
def _relax(qset: QuantizedSet, y: Array, lam: ArrayLike) -> Array:
    projection = qset.nearest.project(y)
    compute = compute_dtype(y.dtype)
    alpha = strength_of(jnp.asarray(lam, compute))
    return blend(y.astype(compute), projection.astype(compute), alpha).astype(y.dtype)


def _residual(w: Array, qset: QuantizedSet) -> Array:
    """w − proj_Q(w), at least float32, zero where it is within rounding of w's dtype."""
    projection = qset.nearest.project(w)
    compute = compute_dtype(w.dtype)
    rounding = float(jnp.finfo(w.dtype).eps + 32 * jnp.finfo(compute).eps)
    w = w.astype(compute)
    residual = w - projection.astype(compute)
    return jnp.where(jnp.abs(residual) <= rounding * jnp.abs(w), 0, residual)
