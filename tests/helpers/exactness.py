"""What the tests of exact params share: groups, bits, and when params are exact."""

import jax
import numpy as np
import optax

import brelax_jax as brx
from tests.helpers.training import array


def rules(leaves):
    """One rule for each leaf of a flat dict."""
    return brx.select(*((f"^{name}$", qset) for name, qset in leaves.items()))


def fresh_state(shapes, params):
    """As `init`, whose shapes are given, but for its scales: of no concern here, and as long to
    compile as an update.
    """
    zeros = jax.tree.map(lambda leaf: array(np.zeros(leaf.shape), leaf.dtype), shapes)
    floats = optax.tree.get(shapes, "float_params")
    floats = jax.tree.map(lambda y, p: array(p, y.dtype), floats, params)
    return optax.tree.set(zeros, float_params=floats)


def grouped(x, granularity):
    """(steps, *shape) → (steps, groups, entries of a group)."""
    shape = x.shape[1:]
    if isinstance(granularity, brx.PerBlock):
        axis, size = granularity.axis, granularity.size
        shape = (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
        x, kept = x.reshape(len(x), *shape), [a for a in range(len(shape)) if a != axis + 1]
    else:
        axes = granularity.axis if isinstance(granularity, brx.PerChannel) else ()
        axes = axes if isinstance(axes, tuple) else (axes,)
        kept = sorted(axis % len(shape) for axis in axes)
    rest = [axis for axis in range(len(shape)) if axis not in kept]
    groups = int(np.prod([shape[axis] for axis in kept], dtype=int))
    return x.transpose(0, *(a + 1 for a in (*kept, *rest))).reshape(len(x), groups, -1)


def bits(x):
    """An array's bits, so that comparisons tell 0 from −0, and NaN equals itself."""
    x = np.asarray(x)
    return x.view(f"uint{8 * x.dtype.itemsize}")


def assert_exact(state, params, leaves):
    """The params are what `quantized_params` returns, and no group has more values than the set."""
    quantized = brx.quantized_params(state, params)
    for name, qset in leaves.items():
        assert np.array_equal(bits(params[name]), bits(quantized[name])), name
        values = grouped(np.asarray(params[name], np.float64)[None], qset.granularity)[0]
        distinct = 1 + np.count_nonzero(np.diff(np.sort(values, axis=-1), axis=-1), axis=-1)
        assert distinct.max() <= len(qset.levels), name
