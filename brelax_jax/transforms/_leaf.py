"""What an update does to one leaf: fit its set, hold the scale back, pull the weights, land.

The functions of one leaf are jitted: outside of a program they are compiled once for each set and
shape, and inside of one they are traced once.
"""

import functools
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from brelax_jax._proximal import ProximalMap, Target
from brelax_jax.sets import Fit, Quantized, QuantizedSet
from brelax_jax.sets._fit import fit_all, largest_scale
from brelax_jax.sets._joined import compute_all
from brelax_jax.sets._quantized import without_negative_zero
from brelax_jax.transforms._grid import (
    grid_beside,
    grid_of,
    has_exact_levels,
    landing_point,
    limit_scale_jump,
    place_on_grid,
    rounded_scale,
    scale_digits,
)


class Step(NamedTuple):
    """What one update has in common for all leaves.

    Attributes:
      alpha: the strength.
      exact: whether the params are to be on their grids.
      is_on_grid: whether they are on those of the update before.
    """

    alpha: Array
    exact: Array
    is_on_grid: Array


class UpdatedLeaf(NamedTuple):
    """What an update makes of one leaf.

    Attributes:
      update: what is to be added to the param, of its shape and dtype.
      y: the float weights.
      fit: what places them on the set.
    """

    update: Array
    y: Array
    fit: Fit


def fit_leaves(
    sets: Mapping[str, QuantizedSet],
    floats: Mapping[str, Array],
    params: Mapping[str, Any],
    last: Mapping[str, Fit] | None = None,
) -> dict[str, Fit]:
    """Fits its set to the float weights of each leaf.

    Args:
      sets: the set of each leaf, by its path.
      floats: the float weights.
      params: arrays of the params' dtypes.
      last: the fits before.
    """
    programs: dict[Hashable, list[str]] = {}
    for path in sets:
        programs.setdefault(_program_of(path, floats[path]), []).append(path)
    fits: dict[str, Fit] = {}
    for paths in programs.values():
        found = _fit_leaves(
            tuple(sets[path] for path in paths),
            tuple(jnp.result_type(params[path]) for path in paths),
            [floats[path] for path in paths],
            [last[path] if last else None for path in paths],
        )
        fits |= zip(paths, found, strict=True)
    return {path: fits[path] for path in sets}


def _program_of(path: str, y: Array) -> Hashable:
    """Leaves for which this is the same are fitted by one program.

    Outside of a program that takes leaves of the same devices. On CPU it is every leaf by itself,
    because small programs compile faster, and others have leaves of the same shapes.
    """
    if isinstance(y, jax.core.Tracer):
        return None
    devices = frozenset(y.devices())
    return (devices, path if any(each.platform == "cpu" for each in devices) else None)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fit_leaves(
    sets: tuple[QuantizedSet, ...],
    dtypes: tuple[DTypeLike, ...],
    floats: list[Array],
    before: list[Fit | None],
) -> list[Fit]:
    digits = [scale_digits(*each) for each in zip(sets, dtypes, strict=True)]
    fits = fit_all(sets, floats, before, digits)
    pairs = list(zip(sets, dtypes, strict=True))
    numbers = [[fit.scale] for fit in fits]
    for own, y, (qset, dtype) in zip(numbers, floats, pairs, strict=True):
        if (most := largest_scale(qset, y, own[0], dtype)) is not None:
            own.append(most)
    scales = compute_all(lambda pair, *own: rounded_scale(*pair, *own), pairs, numbers)
    return [fit._replace(scale=scale) for fit, scale in zip(fits, scales, strict=True)]


@functools.partial(jax.jit, static_argnums=(0, 1))
def update_leaf(
    proximal_map: ProximalMap,
    qset: QuantizedSet,
    step: Step,
    p: Array,
    y: Array,
    fit: Fit,
    last: Fit,
) -> UpdatedLeaf:
    """The update of the param p, whose float weights have become y.

    Args:
      proximal_map: how the weights are pulled.
      qset: the leaf's set.
      step: what all leaves have in common.
      p: the param.
      y: its float weights after the step of the base optimizer.
      fit: their fit.
      last: the fit before.
    """
    limited = limit_scale_jump(fit, last, qset, p.dtype)
    fit = jax.tree.map(lambda new, free: jnp.where(step.exact, new, free), limited, fit)
    grid = grid_beside(fit, qset, y.shape, p.dtype)
    target = Target(y, place_on_grid(y, fit, qset, grid), qset, fit)
    w = proximal_map.pull(target, step.alpha.astype(y.dtype))
    goal = jnp.where(step.exact, landing_point(w, p, grid, step.is_on_grid), w)
    update = (goal - p.astype(goal.dtype)).astype(p.dtype)
    if proximal_map.updates_float_params:
        y, fit = w, _recut(fit, step.alpha)
    return UpdatedLeaf(update, y, fit)


@functools.partial(jax.jit, static_argnums=(0, 1))
def quantized_leaf(qset: QuantizedSet, dtype: DTypeLike, y: Array, fit: Fit) -> Array:
    """The float weights y on their set, in the params' dtype, as phase II leaves the params."""
    grid = grid_beside(fit, qset, y.shape, dtype)
    return without_negative_zero(place_on_grid(y, fit, qset, grid).astype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1))
def coded_leaf(qset: QuantizedSet, dtype: DTypeLike, y: Array, fit: Fit) -> Quantized:
    """`quantized_leaf` as codes and scales."""
    codes = qset.codes(y, fit).astype(jnp.int8)
    spacing = None if has_exact_levels(qset) else grid_of(fit.scale, qset, dtype).spacing
    has_zero = qset.magnitudes[0] == 0
    return Quantized(codes, fit.scale, qset.table, jnp.dtype(dtype), spacing, has_zero)


@functools.partial(jax.jit, static_argnums=0)
def codes_of(qset: QuantizedSet, y: Array, fit: Fit) -> Array:
    """The codes of the float weights y, as the state keeps them."""
    return qset.codes(y, fit).astype(jnp.int8)


def _recut(fit: Fit, alpha: Array) -> Fit:
    """The fit that places weights which are on their levels already, if they are."""
    if fit.code_scale is None:
        return fit
    return fit._replace(code_scale=jnp.where(alpha == 1, fit.scale, fit.code_scale))
