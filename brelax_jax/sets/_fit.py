"""What places arrays on their sets: the scale of each group."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from brelax_jax.sets._arrays import Weights
from brelax_jax.sets._levels import at_index, level_index, shift_of
from brelax_jax.sets._together import searched_scales

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


def fit_all(
    qsets: Sequence["QuantizedSet"], arrays: Sequence[Array], last: Sequence[Fit | None]
) -> list[Fit]:
    """As `fit`, for many arrays. What can be computed for all of them together is.

    Args:
      qsets: the set of each array.
      arrays: floats.
      last: the fit from before of each one.
    """
    return _fit_all(tuple(qsets), list(arrays), list(last))


@functools.partial(jax.jit, static_argnums=0)
def _fit_all(
    qsets: tuple["QuantizedSet", ...], arrays: list[Array], last: list[Fit | None]
) -> list[Fit]:
    fits: dict[int, Fit] = {}
    searched: dict[tuple[float, ...], dict[int, Weights]] = {}
    for i, (qset, w, before) in enumerate(zip(qsets, arrays, last, strict=True)):
        groups, dtype = qset.granularity.groups(w.shape), compute_dtype(w.dtype)
        view = w.astype(dtype).reshape(groups.view)
        if w.size == 0:
            fits[i] = Fit(jnp.zeros(groups.scale, dtype))
        elif not qset.is_searched:
            fits[i] = qset.fit_groups(view, groups.group)
        else:
            kept = before.scale.reshape(groups.scale_view) if before and qset.tolerance else None
            weights = Weights(view, groups.group, kept, qset.tolerance)
            searched.setdefault(qset.magnitudes, {})[i] = weights
    for magnitudes, weights in searched.items():
        found = searched_scales(magnitudes, list(weights.values()))
        fits |= zip(weights, map(Fit, found), strict=True)

    def shaped(i: int) -> Fit:
        qset, w = qsets[i], arrays[i]
        shape = qset.granularity.groups(w.shape).scale
        fit = jax.tree.map(lambda x: x.reshape(shape), fits[i])
        most = largest_scale(qset, w, fit.scale, w.dtype)
        return fit if most is None else fit._replace(scale=jnp.minimum(fit.scale, most))

    return list(map(shaped, range(len(arrays))))


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
