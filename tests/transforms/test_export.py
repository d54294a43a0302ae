"""A jitted update lowers for accelerators on a machine without one, and runs when it is loaded."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import brelax_jax as brx
from tests.helpers import covering

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


def step_of(name, state):
    """A step of training as a function of arrays only, which can be stored."""
    optimizer, structure = TRANSFORMATIONS[name], jax.tree.structure(state)

    def step(grads, leaves, params):
        state = jax.tree.unflatten(structure, leaves)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), jax.tree.leaves(state)

    return jax.jit(step)


@pytest.mark.parametrize(
    ("name", "dtype"), covering.pairs(TRANSFORMATIONS, ["float32", "bfloat16"])
)
def test_updates_lower_for_every_platform(name, dtype):
    params = {name: jax.ShapeDtypeStruct(SHAPE, dtype) for name in SETS}
    state = jax.eval_shape(TRANSFORMATIONS[name].init, params)
    step = step_of(name, state)
    exported = export.export(step, platforms=PLATFORMS)(params, jax.tree.leaves(state), params)
    assert exported.platforms == PLATFORMS
    assert "custom_call" not in exported.mlir_module(), "only some platforms have them"


def test_an_exported_update_runs_when_it_is_loaded():
    rng = np.random.default_rng(0)
    params, grads = (
        {name: jnp.asarray(rng.laplace(size=SHAPE), "float32") for name in SETS} for _ in range(2)
    )
    init = jax.eval_shape(TRANSFORMATIONS["binary_relax"].init, params)
    state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), init)
    state = state._replace(float_params=params)
    step, leaves = step_of("binary_relax", state), jax.tree.leaves(state)
    stored = export.export(step, platforms=PLATFORMS)(grads, leaves, params).serialize()
    wanted = step(grads, leaves, params)
    assert not np.array_equal(wanted[0]["ternary"], params["ternary"])
    results = export.deserialize(stored).call(grads, leaves, params)
    jax.tree.map(np.testing.assert_array_equal, results, wanted)
