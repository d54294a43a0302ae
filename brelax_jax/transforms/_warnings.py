"""What `init` warns of: weights that their set cannot hold, and blocks that cross shards."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from brelax_jax.sets import QuantizedSet, compute_dtype
from brelax_jax.sets._granularity import crossing
from brelax_jax.sets._scale_dtype import DTYPES


def warn_of_vanishing(sets: Mapping[str, QuantizedSet], params: Mapping[str, Any]) -> None:
    """Warns, by path, of slices along a leading axis that project to zeros.

    Where values are known: not under jit, and not where other processes hold some of them.
    """
    for path, qset in sets.items():
        if lost := _lost_slices(qset, params[path]):
            warnings.warn(
                f"{path!r} on {qset}: {len(lost)} of the {jnp.shape(params[path])[0]} slices along "
                f"axis 0 become all zeros, the first of them {lost[0]}. They share a scale with "
                "much larger weights. Give each a scale of its own, with "
                "granularity=PerChannel((0, -1)).",
                stacklevel=4,
            )


def warn_of_saturation(sets: Mapping[str, QuantizedSet], params: Mapping[str, Any]) -> None:
    """Warns, by path, of groups whose scale would be beyond their set's scale dtype.

    Where values are known, as `warn_of_vanishing`.
    """
    for path, qset in sets.items():
        w = params[path]
        if qset.scale_dtype is None or not is_known(w) or not jnp.size(w):
            continue
        if number := int(_saturated(qset, jnp.asarray(w))):
            warnings.warn(
                f"{path!r} on {qset}: {number} scales would be beyond {qset.scale_dtype} and "
                "become its least or its largest number. Choose a wider scale_dtype, or scale "
                "these weights.",
                stacklevel=4,
            )


def warn_of_crossing(sets: Mapping[str, QuantizedSet], params: Mapping[str, Any]) -> None:
    """Warns, by path, of blocks that cross the shards of an array: XLA moves weights for them.

    Where shardings are known: not under jit. In JAX's explicit mode this is an error already.
    """
    for path, qset in sets.items():
        sharding = getattr(params[path], "sharding", None)
        if isinstance(sharding, jax.sharding.NamedSharding) and (
            fault := crossing(qset.granularity, params[path], sharding)
        ):
            warnings.warn(f"{path!r}: {fault} Weights move between devices now.", stacklevel=4)


@functools.partial(jax.jit, static_argnums=0)
def _saturated(qset: QuantizedSet, w: Array) -> Array:
    """In how many groups that are not zero every scale that may be the best is beyond the dtype."""
    groups, scales = qset.granularity.groups(w.shape), DTYPES[str(qset.scale_dtype)]
    a = jnp.abs(w.astype(compute_dtype(w.dtype))).reshape(groups.view)
    peak, mean = groups.group.max(a), groups.group.mean(a)
    too_small = (peak > 0) & (peak / min(m for m in qset.magnitudes if m) < scales.least)
    return jnp.sum(too_small | (mean / qset.magnitudes[-1] > scales.most))


def is_known(w: Any) -> bool:
    """Whether the values of an array can be read here and now."""
    return not isinstance(w, jax.core.Tracer) and getattr(w, "is_fully_addressable", True)


def _lost_slices(qset: QuantizedSet, w: Any) -> list[int]:
    shape = jnp.shape(w)
    if not is_known(w) or len(shape) < 3 or 0 in shape or qset.magnitudes[0] != 0:
        return []
    if qset.granularity.groups(shape).scale[0] > 1:
        return []
    peaks = np.asarray(_peaks(w))
    small = (peaks > 0) & (peaks < 0.75 * peaks.max())  # others are no smaller than half a scale
    if not small.any():
        return []
    return np.flatnonzero(small & (np.asarray(_peaks(qset.project(w))) == 0)).tolist()


@jax.jit
def _peaks(w: Array) -> Array:
    """The largest magnitude of each slice along the first axis."""
    return jnp.max(jnp.abs(w), axis=tuple(range(1, w.ndim)))
