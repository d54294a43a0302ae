"""What to watch in a long run: how far weights are from their sets, and whether they oscillate."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax._envelope import strength_of
from brelax_jax._tree import fold_leaves
from brelax_jax.sets import Fit, QuantizedSet
from brelax_jax.sets._levels import shift_of
from brelax_jax.transforms._accessors import quantized_leaves
from brelax_jax.transforms._leaf import codes_of


class LeafMetrics(NamedTuple):
    """What `metrics` gives for a leaf, as arrays.

    Attributes:
      lam: float32 scalar, the λ of the last update: 0 before the first one, ∞ in phase II.
      strength: float32 scalar, α = λ/(λ + 1).
      distance: scalar, ‖y − proj_Q(y)‖/‖y‖ of the float weights y. It is 0 on the set and at most
        1, except while a scale that jumped is held back.
      occupancy: for each of the set's `levels`, the share of weights that are nearest to it.
      scale: the scale of each group, of the weight's rank.
      flips: scalar, the share of weights whose level the last update changed (for `Binary`, whose
        sign); None unless the transformation was made with `track_flips=True`.
      saturated: float32 scalar, the number of groups whose scale is the least or the largest of the
        set's `scale_dtype`, because their own may be beyond it.
    """

    lam: Array
    strength: Array
    distance: Array
    occupancy: Array
    scale: Array
    flips: Array | None
    saturated: Array


def metrics(opt_state: Any, params: Any) -> dict[str, LeafMetrics]:
    """How far each quantized leaf is from its set, and how it is spread over the set's levels.

    It reads the float weights and the stored scales. So in phase I it shows what would be deployed,
    and in phase II what `params` hide: weights that oscillate between two levels. It makes a few
    reductions over the weights, so jit it and call it only every so many steps.

    Args:
      opt_state: an optimizer state in which a transformation of this library has its own, at any
        depth.
      params: the params that it belongs to.

    Returns:
      `LeafMetrics` by the '/'-joined path of the leaf. Inside `shard_map` they cover only the scale
      groups of which this device holds a part. For all groups call it outside, on whole arrays.

    Raises:
      ValueError: if `opt_state` holds no such state, or one of other params.

    >>> import brelax_jax as brx, jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([[3.0, -1.0, 0.1, 2.0]])}
    >>> optimizer = brx.binary_relax(optax.sgd(1.0), brx.Ternary(), 1.0, track_flips=True)
    >>> state = optimizer.init(params)
    >>> grads = {"kernel": jnp.array([[0.0, 2.0, 0.0, 0.0]])}  # −1 becomes −3
    >>> _, state = optimizer.update(grads, state, params)
    >>> leaf = brx.metrics(state, params)["kernel"]
    >>> leaf.occupancy, leaf.flips
    (Array([0.25, 0.25, 0.5 ], dtype=float32), Array(0.25, dtype=float32))
    >>> float(leaf.strength), round(float(leaf.distance), 3)
    (0.5, 0.175)
    """
    leaves = quantized_leaves(opt_state, params)

    def measured(
        path: str, arrays: tuple[Array, Fit, Array | None]
    ) -> tuple[Array, Array, Array | None]:
        """Distance, occupancy and flips, from the float weights, their fit and the last codes."""
        qset, (y, fit, last) = leaves[path].qset, arrays
        codes = codes_of(qset, y, fit)
        [started] = jax.tree.leaves(leaves[path].state.started)
        flips = None if last is None else _share(qset, (codes != last) & started)
        return _relative_distance(qset, y, fit), _occupancy(qset, codes), flips

    arrays = {path: (leaf.y, leaf.fit, leaf.codes) for path, leaf in leaves.items()}
    found: dict[str, LeafMetrics] = {}
    for path, (distance, occupancy, flips) in fold_leaves(measured, arrays).items():
        [lam], scale = jax.tree.leaves(leaves[path].state.lam), leaves[path].fit.scale
        lam = jnp.where(lam < jnp.finfo(lam.dtype).max, lam, jnp.inf)
        saturated = _saturated(leaves[path].qset, scale)
        found[path] = LeafMetrics(
            lam, strength_of(lam), distance, occupancy, scale, flips, saturated
        )
    return found


def _saturated(qset: QuantizedSet, scale: Array) -> Array:
    scales = qset.scales_of_dtype
    if scales is None:
        return jnp.zeros((), jnp.float32)
    is_last = (scale == scales.least) | (scale == scales.most)
    return jnp.sum(is_last.astype(jnp.float32))


def _share(qset: QuantizedSet, condition: Array) -> Array:
    """The share of weights for which a condition holds."""
    whole = qset.granularity.groups(condition.shape).whole
    return whole.mean(condition.astype(jnp.float32)).reshape(())


@functools.partial(jax.jit, static_argnums=0)
def _occupancy(qset: QuantizedSet, codes: Array) -> Array:
    """The share of weights at each level; that of the last is what the others leave."""
    levels = jnp.asarray(_codes_of_levels(qset.levels), codes.dtype)
    shares = lax.map(lambda level: _share(qset, codes == level), levels[:-1])
    return jnp.append(shares, jnp.maximum(1 - jnp.sum(shares), 0))


def _codes_of_levels(levels: Sequence[float]) -> list[int]:
    """The code of each level: its magnitude's place among the positive ones, with its sign."""
    positive = [level for level in levels if level > 0]
    place = {level: number for number, level in enumerate(positive, start=1)}
    return [place.get(level, -place.get(-level, 0)) for level in levels]


@functools.partial(jax.jit, static_argnums=0)
def _relative_distance(qset: QuantizedSet, y: Array, fit: Fit) -> Array:
    """‖y − proj(y)‖/‖y‖, in units of the largest entry, because squares may overflow or vanish."""
    whole = qset.granularity.groups(y.shape).whole
    largest = whole.max(jnp.abs(y), initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    shift = shift_of(unit)
    residual = y - qset.place(y, fit)
    far, length = (whole.sum(jnp.square(x * shift / (unit * shift))) for x in (residual, y))
    return jnp.where(length == 0, 0, jnp.sqrt(far / jnp.maximum(length, 1))).reshape(())
