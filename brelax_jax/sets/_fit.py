"""What places arrays on their sets: the fits of all of them."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from brelax_jax.sets._group import Group
from brelax_jax.sets._lanes import UPRIGHT, laid_back, lies_across, upright
from brelax_jax.sets._levels import magnitude_of, nearest_magnitude, shift_of
from brelax_jax.sets._platform import by_platform
from brelax_jax.sets._rules import Fit, LeastSquares
from brelax_jax.sets._scale_dtype import Scales
from brelax_jax.sets._searches import searched_scales
from brelax_jax.sets._weights import Weights

if TYPE_CHECKING:
    from brelax_jax.sets._base import QuantizedSet

FORCED: str | None = None  # for tests: see `searched_scales`
FLOATS = ("bfloat16", "float16", "float32", "float64")


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """The dtype in which scales are computed: the array's, but at least float32."""
    return promoted(dtype, jnp.float32)


def promoted(*dtypes: DTypeLike) -> jnp.dtype:
    """The least dtype that holds all of these, in JAX's strict mode too."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def fit_all(
    qsets: Sequence["QuantizedSet"],
    arrays: Sequence[Array],
    last: Sequence[Fit | None] | None = None,
    digits: Sequence[int] | None = None,
) -> list[Fit]:
    """As `fit`, for many arrays. What can be computed for all of them together is.

    Args:
      qsets: the set of each array.
      arrays: floats.
      last: the fit from before of each one.
      digits: to how many significant bits the scales of each one will be rounded, where a set's
        scales are those of a dtype.
    """
    given = [None] * len(arrays) if last is None else list(last)
    allowed = [qset.scales_of_dtype for qset in qsets]
    for i, each in enumerate(digits or ()):
        scales = allowed[i]
        if scales is not None:
            allowed[i] = scales._replace(digits=min(scales.digits, each))
    return _fit_all(tuple(qsets), tuple(allowed), FORCED, list(arrays), given)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _fit_all(
    qsets: tuple["QuantizedSet", ...],
    allowed: tuple[Scales | None, ...],
    forced: str | None,
    arrays: list[Array],
    last: list[Fit | None],
) -> list[Fit]:
    fits: dict[int, Fit] = {}
    searched: dict[tuple[float, ...], dict[int, Weights]] = {}
    for i, (qset, w, before) in enumerate(zip(qsets, arrays, last, strict=True)):
        groups, dtype, rule = qset.granularity.groups(w.shape), compute_dtype(w.dtype), qset.rule
        view = w.astype(dtype).reshape(groups.view)
        if w.size == 0:
            fits[i] = Fit(jnp.zeros(groups.scale, dtype))
        elif isinstance(rule, LeastSquares) and len(qset.magnitudes) > 1:
            kept = before.scale.reshape(groups.scale_view) if before and rule.tolerance else None
            weights = Weights(view, groups.group, kept, rule.tolerance, allowed[i])
            searched.setdefault(qset.magnitudes, {})[i] = weights
        else:
            fits[i] = _fit_by_rule(qset, w.ndim, view, groups.group, forced)
    for magnitudes, weights in searched.items():
        found = searched_scales(magnitudes, list(weights.values()), forced)
        fits |= zip(weights, map(Fit, found), strict=True)
    return [
        _shaped(qset, w, fits[i], allowed[i])
        for i, (qset, w) in enumerate(zip(qsets, arrays, strict=True))
    ]


def _fit_by_rule(
    qset: "QuantizedSet", rank: int, view: Array, group: Group, forced: str | None
) -> Fit:
    def fitted(view: Array) -> Fit:
        return qset.rule.fit_groups(view, qset.magnitudes, group)

    def on_tpu(view: Array) -> Fit:
        fit = qset.rule.fit_groups(upright(view), qset.magnitudes, UPRIGHT)
        return jax.tree.map(lambda x: laid_back(x, group.numbers(view)), fit)

    is_in_blocks = view.ndim > rank
    if not (is_in_blocks and lies_across(view, group)):
        return fitted(view)
    return by_platform(forced, view, tpu=on_tpu, default=fitted)


def _shaped(qset: "QuantizedSet", w: Array, fit: Fit, allowed: Scales | None) -> Fit:
    """A fit in the state's shape, with scales that both the array's and the scales' dtype hold."""
    shape = qset.granularity.groups(w.shape).scale
    fit = jax.tree.map(lambda x: x.reshape(shape), fit)
    if allowed is not None:
        fit = fit._replace(scale=allowed.nearest(fit.scale))
    most = largest_scale(qset, w, fit.scale, w.dtype)
    if most is None:
        return fit
    if allowed is not None:
        most = allowed.at_most(most)
    return fit._replace(scale=jnp.minimum(fit.scale, most))


def fit_finely(qset: "QuantizedSet", w: Array) -> Fit:
    """As `fit`, with two more reductions where a scale is a mean: a sum of many equal floats is off
    by many roundings, and a point of Q is to be its own projection.
    """
    fit = qset.fit(w)
    is_mean = qset.rule.refits and not qset.is_searched
    if w.size == 0 or not is_mean or qset.scale_dtype is not None:
        return fit
    groups = qset.granularity.groups(w.shape)
    view = w.astype(fit.scale.dtype).reshape(groups.view)
    scale = fit.scale.reshape(groups.scale_view)
    code_scale = scale if fit.code_scale is None else fit.code_scale.reshape(groups.scale_view)
    small = scale < 1e-18  # whose products and differences are flushed to zero
    unit = jnp.where(scale > 0, scale, 1)
    shift = jnp.where(small, 2.0**60, shift_of(unit))
    a = magnitude_of(view)
    q = nearest_magnitude(a, code_scale, qset.magnitudes)
    norm = groups.group.sum(jnp.square(q))
    # Near a point a difference is exact, which a quotient is not.
    gain = groups.group.sum(q * ((a * shift - unit * shift * q) / (unit * shift)))
    scale *= jnp.where(small, 2.0**60, 1)
    refined = scale + scale * (gain / jnp.where(norm > 0, norm, 1))
    refined *= jnp.where(small, 2.0**-60, 1)
    return fit._replace(scale=refined.reshape(fit.scale.shape))


def largest_scale(qset: "QuantizedSet", w: Array, scale: Array, dtype: DTypeLike) -> Array | None:
    """The largest scale at which the dtype holds the level of the largest weight of each group.

    None for dtypes as wide as float32: no weights are that large.
    """
    if jnp.finfo(dtype).nexp >= jnp.finfo(jnp.float32).nexp or w.size == 0:
        return None
    groups = qset.granularity.groups(w.shape)
    peak = groups.group.max(jnp.abs(w.astype(scale.dtype)).reshape(groups.view))
    magnitude = nearest_magnitude(peak, scale.reshape(groups.scale_view), qset.magnitudes)
    magnitude = magnitude.reshape(scale.shape)
    most = float(jnp.finfo(dtype).max) * (1 - 2 * float(jnp.finfo(scale.dtype).eps))
    return most / jnp.where(magnitude > 0, magnitude, 1)
