"""How the scale of a group is found: by a search for the best one, or by a mean."""

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
    """The mean of |w| over each group; if the plain sum overflows, by other passes."""
    size = group.size(w)
    total = group.sum(jnp.abs(w))
    return lax.cond(
        jnp.all(jnp.isfinite(total)),
        lambda: total / size,
        lambda: jnp.minimum(
            2 * group.sum(jnp.abs(w) / (2 * size)),
            group.max(jnp.abs(w)),
        ),
    )
