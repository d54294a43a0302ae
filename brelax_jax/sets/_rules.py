"""How the scale of a group is found: by a search for the best one, or by a mean."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._levels import shift_of
from brelax_jax.sets._search import Kept, branch_and_bound, refitted


def least_squares_scale(
    w: Array, magnitudes: Sequence[float], group: Group, kept: Kept | None = None
) -> Array:
    """argmin over s ≥ 0 of Σ min_l (|w| − s·m_l)², for each group.

    Args:
      w: floats, at least float32.
      magnitudes: ascending and nonnegative, the last one positive.
      group: which entries of `w` form a group.
      kept: scales to keep where they are nearly the best.

    Returns:
      Scales of w's dtype that broadcast against it: 0 for groups of zeros, NaN for groups that hold
      one or an infinity.
    """
    if len(magnitudes) == 1:
        scale = mean_magnitude(w, group) / magnitudes[0]
    else:
        a = jnp.abs(w)
        peak = group.max(a)
        unit = jnp.where(peak > 0, peak, 1)
        shift = shift_of(unit)
        a = (a * shift) / (unit * shift)
        if kept is not None:
            kept = kept._replace(scale=(kept.scale * shift) / (unit * shift))
        best = branch_and_bound(a, magnitudes, group, kept).best[0]
        scale = unit * refitted(a, best, magnitudes, group)
        scale = jnp.where(peak > 0, scale, peak)  # 0, or NaN
    return jnp.where(jnp.isfinite(scale), scale, jnp.nan)


def mean_magnitude(w: Array, group: Group) -> Array:
    """The mean of |w| over each group; if the plain sum overflows, by other passes."""
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
