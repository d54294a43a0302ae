"""What the tests of exact params share: groups, bits, and when params are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import brelax_jax as brx


def rules(leaves):
    """One rule for each leaf of a flat dict."""
    return brx.select(*((f"^{name}$", qset) for name, qset in leaves.items()))


def fresh_state(optimizer, params):
    """As `init`, but for its scales: of no concern here, and as long to compile as an update."""
    shapes = jax.eval_shape(optimizer.init, params)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    floats = optax.tree.get(shapes, "float_params")
    floats = jax.tree.map(lambda y, p: jnp.array(p, y.dtype), floats, params)
    return optax.tree.set(zeros, float_params=floats)


def grouped(x, granularity):
    """(steps, *SHAPE) → (steps, groups, entries of a group)."""
    steps, shape = len(x), x.shape[1:]
    match granularity:
        case brx.PerTensor():
            return x.reshape(steps, 1, -1)
        case brx.PerChannel(axis=-1):
            return np.moveaxis(x, -1, 1).reshape(steps, shape[-1], -1)
        case brx.PerBlock(size=size, axis=0):
            blocks = x.reshape(steps, shape[0] // size, size, *shape[1:])
            return np.moveaxis(blocks, 2, -1).reshape(steps, -1, size)
    raise ValueError(granularity)


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
