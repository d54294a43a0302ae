"""How the scale of a group is found: by a search for the best one, or by a mean."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._arrays import Weights
from brelax_jax.sets._group import Group
from brelax_jax.sets._together import searched_scales


def least_squares_scale(w: Array, magnitudes: Sequence[float], group: Group) -> Array:
    """argmin over s ≥ 0 of Σ min_l (|w| − s·m_l)², for each group.

    Args:
      w: floats, at least float32.
      magnitudes: ascending and nonnegative, the last one positive.
      group: which entries of `w` form a group.

    Returns:
      Scales of w's dtype that broadcast against it: 0 for groups of zeros, NaN for groups that hold
      one or an infinity.
    """
    if len(magnitudes) == 1:
        scale = mean_magnitude(w, group) / magnitudes[0]
        return jnp.where(jnp.isfinite(scale), scale, jnp.nan)
    return searched_scales(magnitudes, [Weights(w, group)])[0]


def mean_magnitude(w: Array, group: Group) -> Array:
    """The mean of |w| over each group, also where the plain sum overflows."""
    return lax.platform_dependent(
        w,
        cpu=functools.partial(_mean_by_other_passes, group),
        default=functools.partial(mean_at_once, group),
    )


def _mean_by_other_passes(group: Group, w: Array) -> Array:
    """Where the plain sum overflows, by other passes: on CPU two sums in one pass are slow."""
    size = float(group.size(w))  # 2^32 is no int32
    total = group.sum(jnp.abs(w))
    return lax.cond(
        jnp.all(jnp.isfinite(total)),
        lambda: total / size,
        lambda: jnp.minimum(
            2 * group.sum(jnp.abs(w) / (2 * size)),
            group.max(jnp.abs(w)),
        ),
    )


def mean_at_once(group: Group, w: Array) -> Array:
    """By a sum that is exact and one that does not overflow: a branch would copy the weights."""
    size = float(group.size(w))
    total, small = group.sum(jnp.abs(w)), group.sum(jnp.abs(w) * 2.0**-32)
    large = jnp.minimum(small / size, jnp.finfo(w.dtype).max * 2.0**-32) * 2.0**32
    return jnp.where(jnp.isfinite(total), total / size, jnp.where(jnp.isinf(small), small, large))
