"""Before the first update: training starts from the params that it is given.

Weights may be loaded between `init` and the first update. Until then the float weights in the
state do not count, and its scales are blank.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from brelax_jax._tree import leaves_with_paths
from brelax_jax.sets import Fit, LeastSquares, QuantizedSet, compute_dtype, promoted
from brelax_jax.transforms._leaf import fit_leaves
from brelax_jax.transforms._state import BinaryRelaxState, fits_of


def check_has_values(params: Any) -> None:
    """Raises a ValueError, naming the leaf, if params are shapes."""
    for path, leaf in leaves_with_paths(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"{path!r} is {leaf}, which has no values, and the state holds copies of them. For "
                "the shapes of a state use jax.eval_shape(optimizer.init, params)."
            )


def float_copy(p: ArrayLike, float_dtype: DTypeLike) -> Array:
    """A float weight that starts at a param. A copy, because params are donated."""
    return jnp.array(p, promoted(jnp.result_type(p), float_dtype), copy=True)


def blank_fit(qset: QuantizedSet, y: Array) -> Fit:
    """Zeros in place of the scales of y, laid out over devices as the scales will be."""
    if isinstance(y, jax.core.Tracer) or len(y.devices()) > 1:
        return _reduced_zeros(qset, y)
    shape, dtype = qset.granularity.groups(y.shape).scale, compute_dtype(y.dtype)
    device = y.sharding if y.committed else None  # else the second update is compiled anew
    zero = jax.device_put(np.zeros(shape, dtype), device)  # compiles nothing
    return Fit(zero, zero if _has_code_scale(qset, y) else None)


def _has_code_scale(qset: QuantizedSet, y: Array) -> bool:
    if isinstance(qset.rule, LeastSquares):
        return False
    return jax.eval_shape(qset.fit, y).code_scale is not None


@functools.partial(jax.jit, static_argnums=0)
def _reduced_zeros(qset: QuantizedSet, y: Array) -> Fit:
    """Zeros that lie as the scales will, because they are reduced from y too."""
    groups = qset.granularity.groups(y.shape)
    if y.size == 0:
        zero = jnp.zeros(groups.scale, compute_dtype(y.dtype))
    else:
        largest = groups.group.max(jnp.abs(y.reshape(groups.view)))
        zero = jnp.minimum(largest, 0).astype(compute_dtype(y.dtype)).reshape(groups.scale)
    return Fit(zero, zero if _has_code_scale(qset, y) else None)


def float_weights(state: BinaryRelaxState, params: Mapping[str, Any]) -> dict[str, Array]:
    """The float weights of each quantized leaf: the state's, or of these params if it has not
    started.
    """
    started = _started(state)

    def chosen(y: Array, p: ArrayLike) -> Array:
        if not isinstance(started, jax.core.Tracer):
            return y if started else jnp.asarray(p, y.dtype)
        return jnp.where(started, y, jnp.asarray(p, y.dtype))

    return {path: chosen(y, params[path]) for path, y in leaves_with_paths(state.float_params)}


def current_fits(
    state: BinaryRelaxState,
    sets: Mapping[str, QuantizedSet],
    floats: Mapping[str, Array],
    params: Mapping[str, Any],
) -> dict[str, Fit]:
    """The fits of these float weights: the state's, or new ones if it has not started."""
    started = _started(state)

    def kept() -> dict[str, Fit]:
        return fits_of(state, sets)

    def fitted() -> dict[str, Fit]:
        return fit_leaves(sets, floats, params)

    if not isinstance(started, jax.core.Tracer):
        return kept() if started else fitted()
    return lax.cond(started, kept, fitted)


def _started(state: BinaryRelaxState) -> Array:
    [started] = jax.tree.leaves(state.started)
    return started
