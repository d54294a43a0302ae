"""Weights that are loaded between `init` and the first update: training starts from them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state

import brelax_jax as brx
from tests.helpers.training import array, trace_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SETS = {
    "binary": brx.Binary(granularity=brx.PerChannel()),
    "ternary": brx.Ternary(rule=brx.LeastSquares(0.3)),
    "threshold": brx.TernaryThreshold(),
}
RULES = brx.select(*((f"^{name}$", qset) for name, qset in SETS.items()), default=brx.Binary())


def weights(seed, factor=1.0):
    rng = np.random.default_rng(seed)
    params = {name: factor * rng.standard_normal((6, 4)) for name in SETS}
    return jax.tree.map(array, params | {"bias": rng.normal(size=4)})


@functools.cache
def optimizer_of(lam=1.0, hard_from=0, lr=0.1):
    base = optax.sgd(lr, momentum=0.9)
    return brx.binary_relax(base, RULES, lam, hard_from, track_flips=True)


def trained(optimizer, state, params, steps):
    return trace_of(optimizer, params, [weights(10 + step) for step in range(steps)], state)


def test_the_first_update_starts_from_the_params_that_it_is_given():
    """Bit for bit as if they had been there at `init`, scales, tolerance, flips and all; those of
    `init` are a million times larger, so that a scale held back or kept would show.
    """
    optimizer = optimizer_of()
    loaded = weights(1)
    late = trained(optimizer, optimizer.init(weights(0, 1e6)), loaded, 4)
    wanted = trained(optimizer, optimizer.init(loaded), loaded, 4)
    chex.assert_trees_all_equal(late, wanted)
    params, state = late[0]
    for name in SETS:
        start = np.asarray(loaded[name]) - 0.1 * np.asarray(weights(10)[name])
        np.testing.assert_allclose(state.float_params[name], start, rtol=1e-5)
    np.testing.assert_allclose(params["bias"], loaded["bias"] - 0.1 * weights(10)["bias"])


def test_until_then_everything_reads_the_params_that_are_given():
    optimizer, loaded = optimizer_of(), weights(1)
    late, right = optimizer.init(weights(0)), optimizer.init(loaded)

    def read(state, params):
        reads = brx.float_params, brx.quantized_params, brx.quantized_tree, brx.metrics
        return [read(state, params) for read in reads]

    for transformed in (jax.jit(read), read):
        wanted, got = transformed(right, loaded), transformed(late, loaded)
        chex.assert_trees_all_equal(got, wanted)
    _, quantized, _, found = got
    for name, qset in SETS.items():
        w = np.asarray(loaded[name])
        q = np.asarray(qset.project(loaded[name]))
        np.testing.assert_allclose(quantized[name], q, rtol=1e-4)
        distance = np.linalg.norm(w - q) / np.linalg.norm(w)
        np.testing.assert_allclose(found[name].distance, distance, rtol=1e-3)
        assert found[name].flips == 0


def test_after_it_the_float_weights_are_the_states():
    optimizer = optimizer_of()
    _, state = trained(optimizer, optimizer.init(weights(0)), weights(0), 1)[0]
    other = weights(1)
    floats = brx.float_params(state, other)
    for name in SETS:
        np.testing.assert_array_equal(floats[name], state.float_params[name])


def test_with_float_params_counts_as_a_start():
    """The next update goes on from them, whatever params it is given."""
    optimizer, start = optimizer_of(), weights(1)
    state = brx.with_float_params(optimizer.init(weights(0)), start)
    _, after = trained(optimizer, state, weights(2), 1)[0]
    moved = np.asarray(start["binary"]) - 0.1 * np.asarray(weights(10)["binary"])
    np.testing.assert_allclose(after.float_params["binary"], moved, rtol=1e-5)


def test_users_may_set_the_count_before():
    """The mark is a flag of its own."""
    optimizer, loaded = optimizer_of(), weights(1)
    state = optimizer.init(weights(0))._replace(count=jnp.array(7, jnp.int32))
    params, after = trained(optimizer, state, loaded, 1)[0]
    wanted, _ = trained(optimizer, optimizer.init(loaded), loaded, 1)[0]
    chex.assert_trees_all_equal(params, wanted)
    assert after.count == 8


def test_multi_steps_delay_the_first_update():
    optimizer = optax.MultiSteps(optimizer_of(lr=0.0), 3).gradient_transformation()
    state, params = optimizer.init(weights(0)), weights(1)
    trace = trained(optimizer, state, params, 3)
    for name in SETS:
        np.testing.assert_array_equal(trace[1][0][name], params[name])
        floats = brx.float_params(trace[2][1], trace[2][0])
        np.testing.assert_array_equal(floats[name], params[name])


def test_a_train_state_whose_params_are_replaced():
    fresh, loaded = weights(0), weights(1)
    state = train_state.TrainState.create(apply_fn=None, params=fresh, tx=optimizer_of(0.0, None))
    state = state.replace(params=loaded)
    after = state.apply_gradients(grads=jax.tree.map(np.zeros_like, loaded))
    chex.assert_trees_all_close(after.params, loaded, rtol=1e-6)


def test_init_wants_values_and_says_how_to_do_without():
    shapes = jax.eval_shape(lambda: weights(0))
    with pytest.raises(ValueError, match=r"'bias' is ShapeDtypeStruct.*eval_shape\(optimizer.init"):
        optimizer_of().init(shapes)
    jax.eval_shape(optimizer_of().init, shapes)
