"""A jitted update lowers for accelerators on a machine without one, and runs when it is loaded."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax import export

import brelax_jax as brx
from tests.helpers import covering
from tests.helpers.training import array

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PLATFORMS = ("tpu", "cuda", "cpu")
SETS = {
    "binary": brx.Binary(),
    "ternary": brx.Ternary(granularity=brx.PerChannel()),
    "threshold": brx.TernaryThreshold(),
    "uniform": brx.Uniform(4, granularity=brx.PerBlock(8, 0)),
    "powers": brx.PowerOfTwo(4, granularity=brx.PerChannel(0)),
    "uneven": brx.ScaledLevels((-1.7, -0.3, 0.3, 1.7)),
}
SHAPE = (16, 8)
RULES = brx.select(*((f"^{name}$", qset) for name, qset in SETS.items()))
TRANSFORMATIONS = {
    "binary_relax": brx.binary_relax(optax.sgd(0.1, momentum=0.9), RULES, 1.0, hard_from=2),
    "binary_connect": brx.binary_connect(optax.adam(0.1), RULES),
    "relax_params": optax.chain(optax.sgd(0.1), brx.relax_params(RULES, lambda count: 1.0 + count)),
}


@functools.cache
def exported_step(name, dtype):
    """A step of training as a function of arrays only, which can be stored; the shapes of its
    state; and what is stored.
    """
    params = {name: jax.ShapeDtypeStruct(SHAPE, dtype) for name in SETS}
    optimizer = TRANSFORMATIONS[name]
    shapes = jax.eval_shape(optimizer.init, params)
    leaves, structure = jax.tree.flatten(shapes)

    @jax.jit
    def step(grads, leaves, params):
        state = jax.tree.unflatten(structure, leaves)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), jax.tree.leaves(state)

    return step, shapes, export.export(step, platforms=PLATFORMS)(params, leaves, params)


@pytest.mark.parametrize(
    ("name", "dtype"), covering.pairs(TRANSFORMATIONS, ["float32", "bfloat16"])
)
def test_updates_lower_for_every_platform(name, dtype):
    exported = exported_step(name, dtype)[-1]
    assert exported.platforms == PLATFORMS
    assert "custom_call" not in exported.mlir_module(), "only some platforms have them"


def test_an_exported_update_runs_when_it_is_loaded():
    rng = np.random.default_rng(0)
    params, grads = ({name: array(rng.laplace(size=SHAPE)) for name in SETS} for _ in range(2))
    step, shapes, exported = exported_step("binary_relax", "float32")
    state = jax.tree.map(lambda leaf: array(np.zeros(leaf.shape), leaf.dtype), shapes)
    leaves = jax.tree.leaves(state._replace(float_params=params))
    wanted = step(grads, leaves, params)
    assert not np.array_equal(wanted[0]["ternary"], params["ternary"])
    results = export.deserialize(exported.serialize()).call(grads, leaves, params)
    jax.tree.map(np.testing.assert_array_equal, results, wanted)
