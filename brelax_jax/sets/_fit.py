"""What places an array on its set: the scale of each group."""

import functools
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from brelax_jax.sets._levels import at_index, level_index, shift_of
from brelax_jax.sets._rules import least_squares_scale
from brelax_jax.sets._search import Kept

if TYPE_CHECKING:
    from brelax_jax.sets._base import QuantizedSet

FLOATS = ("bfloat16", "float16", "float32", "float64")


class Fit(NamedTuple):
    """What places one array on a set: with it, the projection is elementwise.

    Attributes:
      scale: one entry per group, of the array's rank, at least float32.
      cut: for sets that do not round to the nearest level, where |w| leaves zero; as `scale`, else
        None.
    """

    scale: Array
    cut: Array | None = None


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which scales are computed: the array's, but at least float32."""
    return promoted(dtype, jnp.float32)


def promoted(*dtypes: DTypeLike) -> jnp.dtype:
    """The least dtype that holds all of these, in JAX's strict mode too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


@functools.partial(jax.jit, static_argnums=0)
def fit_array(qset: "QuantizedSet", w: Array, last: Fit | None) -> Fit:
    groups = qset.granularity.groups(w.shape)
    if w.size == 0:
        return Fit(jnp.zeros(groups.scale, compute_dtype(w.dtype)))
    view = w.astype(compute_dtype(w.dtype)).reshape(groups.view)
    if last is None:
        fit = qset.fit_groups(view, groups.group)
    else:
        known = jnp.where(last.scale > 0, last.scale, jnp.nan)  # not in the first step
        kept = Kept(known.reshape(groups.scale_view), qset.tolerance)
        fit = Fit(least_squares_scale(view, qset.magnitudes, groups.group, kept))
    fit = jax.tree.map(lambda x: x.reshape(groups.scale), fit)
    most = largest_scale(qset, w, fit.scale, w.dtype)
    return fit if most is None else fit._replace(scale=jnp.minimum(fit.scale, most))


def fit_finely(qset: "QuantizedSet", w: Array) -> Fit:
    """As `fit`, with two more reductions where a scale is a mean: a sum of many equal floats is off
    by many roundings, and a point of Q is to be its own projection.
    """
    fit = qset.fit(w)
    if w.size == 0 or not qset.is_mean:
        return fit
    groups = qset.granularity.groups(w.shape)
    q = qset.at_unit_scale(w, fit).reshape(groups.view)
    view, scale, _ = qset.views(w, fit)
    unit = jnp.where(scale > 0, scale, 1)
    shift = shift_of(unit)
    norm = groups.group.sum(jnp.square(q))
    gain = groups.group.sum(q * ((view * shift) / (unit * shift) - q))
    refined = scale + scale * (gain / jnp.where(norm > 0, norm, 1))
    return fit._replace(scale=refined.reshape(fit.scale.shape))


def largest_scale(qset: "QuantizedSet", w: Array, scale: Array, dtype: DTypeLike) -> Array | None:
    """The largest scale at which the dtype holds the level of the largest weight of each group.

    None for dtypes as wide as float32: no weights are that large.
    """
    if jnp.finfo(dtype).nexp >= jnp.finfo(jnp.float32).nexp or w.size == 0:
        return None
    groups = qset.granularity.groups(w.shape)
    peak = groups.group.max(jnp.abs(w.astype(scale.dtype)).reshape(groups.view))
    index = level_index(peak, scale.reshape(groups.scale_view), qset.magnitudes)
    magnitude = at_index(index, qset.magnitudes).reshape(scale.shape)
    most = float(jnp.finfo(dtype).max) * (1 - 2 * float(jnp.finfo(scale.dtype).eps))
    return most / jnp.where(magnitude > 0, magnitude, 1)
