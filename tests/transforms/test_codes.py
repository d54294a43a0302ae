"""Codes and scales of a network, from a state and without one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers import covering
from tests.helpers.training import array, normal, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SETS = {
    "binary": brx.Binary(),
    "ternary": brx.Ternary(granularity=brx.PerChannel()),
    "threshold": brx.TernaryThreshold(granularity=brx.PerBlock(4, 0)),
    "uniform": brx.Uniform(4, granularity=brx.PerBlock(4, 0)),
    "powers": brx.PowerOfTwo(4),
    "levels": brx.ScaledLevels((-1.7, -0.3, 0.3, 1.7), granularity=brx.PerChannel()),
}
DTYPES = ["float32", "bfloat16", "float16"]
NAMES = [f"{name} {dtype}" for name, dtype in itertools.product(SETS, DTYPES)]
# Each set in one dtype; in all of them in `make soak`.
IN_SUITE = [f"{name} {DTYPES[i % len(DTYPES)]}" for i, name in enumerate(SETS)]
RULES = brx.select(*((f"^{name} ", qset) for name, qset in SETS.items()))


@functools.cache
def deployed(names):
    """Params in phase II, and what is read from their state."""
    params = {
        name: normal(seed, 16, 6, dtype=name.split()[1]) for seed, name in enumerate(names)
    } | {"bias": ones(3)}
    optimizer = brx.binary_relax(optax.sgd(0.1), RULES, 1.0, 0)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(4):
        params, state = step(params, state)
    read = params, brx.quantized_params(state, params), brx.quantized_tree(state, params)
    return jax.device_get(read)


def bits(w):
    return np.asarray(w).view(f"u{w.dtype.itemsize}")


@pytest.mark.parametrize("name", covering.some(NAMES, IN_SUITE))
def test_codes_and_scales_of_a_state_are_its_quantized_params_bit_for_bit(name):
    names = IN_SUITE if name in IN_SUITE else NAMES
    params, quantized, tree = deployed(tuple(names))
    leaf = tree[name]
    assert leaf.codes.dtype == np.int8
    assert leaf.codes.shape == quantized[name].shape
    dequantized = leaf.dequantize()
    assert dequantized.dtype == quantized[name].dtype
    np.testing.assert_array_equal(bits(dequantized), bits(quantized[name]))
    if name not in ("powers bfloat16", "powers float16"):
        np.testing.assert_array_equal(params[name], quantized[name])


def test_other_leaves_are_as_they_are():
    params, _, tree = deployed(tuple(IN_SUITE))
    np.testing.assert_array_equal(tree["bias"], params["bias"])
    assert jax.tree.structure(
        jax.tree.map(lambda _: 0, tree, is_leaf=lambda x: isinstance(x, brx.Quantized))
    ) == jax.tree.structure(params)


def test_a_quantized_tree_goes_through_jit():
    _, quantized, tree = deployed(tuple(IN_SUITE))
    leaf = {name: tree[name] for name in IN_SUITE}
    out = jax.jit(lambda tree: {name: leaf.dequantize() for name, leaf in tree.items()})(leaf)
    for name in IN_SUITE:
        np.testing.assert_array_equal(out[name], quantized[name])


def test_a_selection_projects_and_quantizes_without_an_optimizer():
    params = {name: normal(seed, 16, 6) for seed, name in enumerate(SETS)}
    params = {"layer": params, "bias": ones(3)}
    rules = brx.select(*((f"/{name}$", qset) for name, qset in SETS.items()))
    projected, quantized = rules.project(params), rules.quantize(params)
    for name, qset in SETS.items():
        wanted = qset.project(params["layer"][name])
        np.testing.assert_array_equal(projected["layer"][name], wanted)
        np.testing.assert_array_equal(quantized["layer"][name].dequantize(), wanted)
    np.testing.assert_array_equal(projected["bias"], params["bias"])
    np.testing.assert_array_equal(quantized["bias"], params["bias"])
    with pytest.raises(ValueError, match="no leaf is selected"):
        brx.select(default=brx.Binary()).project({"bias": ones(3)})


def test_zeros_have_no_sign():
    w = array(np.resize([-1e-3, 1.0, -2.0, 1e-3], (6, 16)).T)
    for q in (SETS["ternary"].project(w), SETS["ternary"].quantize(w).dequantize()):
        assert not np.any(q[0])
        assert not np.any(np.signbit(q[0]))
