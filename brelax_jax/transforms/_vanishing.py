"""Whether a whole slice of a stacked kernel, as an expert's, would be all zeros on its set."""

import warnings
from collections.abc import Mapping
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array

from brelax_jax.sets import QuantizedSet


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


def _lost_slices(qset: QuantizedSet, w: Any) -> list[int]:
    is_known = not isinstance(w, jax.core.Tracer) and getattr(w, "is_fully_addressable", True)
    shape = jnp.shape(w)
    if not is_known or len(shape) < 3 or 0 in shape or qset.magnitudes[0] != 0:
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
