"""Params are exact in phase II in each kind of loop that users write, and in unusual sizes.

Those of Flax are in `make soak`, as `test_networks` has them too, of programs with few
optimizations.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

import brelax_jax as brx
from tests.helpers import covering
from tests.helpers.exactness import assert_exact, bits, fresh_state, rules
from tests.helpers.training import array

BINARY = brx.Binary(granularity=brx.PerChannel())
THRESHOLD = brx.TernaryThreshold()
THRESHOLD_OF_BLOCKS = brx.TernaryThreshold(granularity=brx.PerBlock(8, axis=0))
LEAVES = {
    "binary": BINARY,
    "threshold": THRESHOLD_OF_BLOCKS,
    "uneven": brx.ScaledLevels((-1.7, -0.3, 0, 0.3, 1.7)),
}
SHAPE = (16, 12)


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), pytest.param(("float16",), marks=pytest.mark.soak)], ids=str
)
def test_larger_jumps_are_exact_throughout_and_the_scale_catches_up(dtypes):
    sets = {"binary": BINARY, "threshold": THRESHOLD}
    leaves = {f"{name}-{dtype}": qset for dtype in dtypes for name, qset in sets.items()}
    rng = np.random.default_rng(5)
    params = {name: array(rng.standard_normal(SHAPE), name.split("-")[1]) for name in leaves}
    optimizer = brx.binary_connect(optax.sgd(1.0), rules(leaves))
    state, update = (
        fresh_state(jax.eval_shape(optimizer.init, params), params),
        jax.jit(optimizer.update),
    )
    rest = [1] * 12
    for step, growth in enumerate([*rest, 1000, *rest, 1e-3, *rest]):
        # The factor spreads, and some signs flip.
        factors = growth * rng.choice([1, 1.1, -1], SHAPE)
        grads = jax.tree.map(lambda y, f=factors: (1 - f) * y, brx.float_params(state, params))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if step >= 2:
            assert_exact(state, params, leaves)
        if step in (11, 24, 37):
            y, q = brx.float_params(state, params), brx.quantized_params(state, params)
            for name in (f"binary-{dtype}" for dtype in dtypes):
                wanted = BINARY.project(y[name])
                found = np.asarray(q[name], np.float32)
                np.testing.assert_allclose(found, wanted, rtol=0.05, err_msg=name)


@pytest.mark.parametrize("name", covering.some(["binary", "threshold"], ["threshold"]))
def test_eager_updates_are_exact(name):
    leaves = {name: LEAVES[name]}
    rng = np.random.default_rng(11)
    params = {name: array(rng.standard_normal(SHAPE)) for name in leaves}
    optimizer = brx.binary_connect(optax.sgd(0.1), rules(leaves))
    state = optimizer.init(params)
    for step in range(5):
        grads = {name: array(rng.standard_normal(SHAPE)) for name in leaves}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        if step >= 2:
            assert_exact(state, params, leaves)


@pytest.mark.parametrize(
    "names", covering.some(["binary threshold", "uneven"], ["binary threshold"])
)
def test_float64_is_exact(names):
    leaves = {name: LEAVES[name] for name in names.split()}
    with jax.enable_x64(True):
        rng = np.random.default_rng(12)
        params = {name: array(rng.standard_t(1.5, SHAPE), "float64") for name in leaves}
        optimizer = brx.binary_relax(optax.adam(0.1), rules(leaves), 1.0, hard_from=8)
        state, update = (
            fresh_state(jax.eval_shape(optimizer.init, params), params),
            jax.jit(optimizer.update),
        )
        for step in range(12):
            grads = {name: array(rng.standard_t(1.5, SHAPE), "float64") for name in leaves}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            assert all(p.dtype == np.float64 for p in params.values())
            if step >= 8:
                assert_exact(state, params, leaves)


LARGE = {
    "binary": (BINARY, "float32"),
    "threshold": (brx.TernaryThreshold(granularity=brx.PerChannel()), "bfloat16"),
    "ternary": (brx.Ternary(granularity=brx.PerChannel()), "float32"),
}


@pytest.mark.parametrize(
    "names", covering.some(["binary threshold", "ternary"], ["binary threshold"])
)
def test_large_leaves_are_exact(names):
    leaves = {name: LARGE[name] for name in names.split()}
    sets = {name: qset for name, (qset, _) in leaves.items()}
    rng = np.random.default_rng(0)

    def noise():
        return {
            name: array(rng.standard_normal((3, 3, 256, 256), "f4"), dtype)
            for name, (_, dtype) in leaves.items()
        }

    params = noise()
    optimizer = brx.binary_connect(optax.sgd(0.1, 0.9), rules(sets))
    state, update = (
        fresh_state(jax.eval_shape(optimizer.init, params), params),
        jax.jit(optimizer.update),
    )
    for step in range(4):
        updates, state = update(noise(), state, params)
        params = optax.apply_updates(params, updates)
        if step >= 2:
            assert_exact(state, params, sets)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, "f4")


class Linen(linen.Module):
    """A multilayer perceptron."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(linen.relu(linen.Dense(16)(x)))


class Nnx(nnx.Module):
    """The same in the other API."""

    def __init__(self, rngs):
        self.first, self.second = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        return self.second(nnx.relu(self.first(x)))


@pytest.mark.soak
def test_linen_train_state_is_exact():
    model, x = Linen(), normal(0, 20, 8)
    shapes = jax.eval_shape(model.init, jax.random.key(1), x)["params"]
    rules = brx.select(("Dense_0/kernel", THRESHOLD), default=BINARY)
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=jax.tree.map(lambda leaf: jnp.asarray(normal(1, *leaf.shape)), shapes),
        tx=brx.binary_relax(optax.adam(0.01), rules, 1.0, hard_from=8),
    )

    @jax.jit
    def step(state):
        def loss(params):
            return jnp.mean(jnp.square(state.apply_fn({"params": params}, x) - 1))

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(11):
        state = step(state)
    quantized = brx.quantized_params(state.opt_state, state.params)
    jax.tree.map(np.testing.assert_array_equal, state.params, quantized)
    assert len(np.unique(state.params["Dense_0"]["kernel"])) == 3
    assert all(len(np.unique(column)) == 2 for column in state.params["Dense_1"]["kernel"].T)
    assert len(np.unique(state.params["Dense_0"]["bias"])) > 2


@pytest.mark.soak
def test_nnx_optimizer_is_exact():
    x = normal(0, 20, 8)
    model = Nnx(nnx.Rngs(0))
    rules = brx.select(("first/kernel", THRESHOLD), default=BINARY)
    transformation = brx.binary_relax(optax.adam(0.01), rules, 1.0, hard_from=8)
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean(jnp.square(model(x) - 1)))(model))

    for _ in range(11):
        step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    quantized = brx.quantized_params(optimizer.opt_state, params)
    jax.tree.map(np.testing.assert_array_equal, params, quantized)
    assert len(np.unique(model.first.kernel[...])) == 3
    assert all(len(np.unique(column)) == 2 for column in model.second.kernel[...].T)
    assert float(brx.strength(optimizer.opt_state)) == 1


TINY = brx.binary_connect(optax.sgd(0.1), brx.Binary(granularity=brx.PerChannel((0, 1))))
tiny_update = jax.jit(TINY.update)


@pytest.mark.parametrize("size", [1e-30, 1e-33, 1e-36])
def test_differences_that_devices_flush_to_zero_keep_no_weight_off_its_level(size):
    """The params are then nearer to their levels than the least normal number, and must move."""
    params = array(np.random.default_rng(0).standard_normal((8, 1)) * size)
    state = TINY.init(params)
    for _ in range(3):
        updates, state = tiny_update(jnp.zeros_like(params), state, params)
        params = optax.apply_updates(params, updates)
    quantized = brx.quantized_params(state, params)
    np.testing.assert_array_equal(bits(params), bits(quantized))
    assert np.any(quantized)
