"""The benchmark in which scales are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from benchmarks.accuracy.learned import codes, gradient, learned_scales, scales_are_learned
from examples.train import steps
from examples.train.config import Config
from tests.helpers.tiny_grid import grid

pytestmark = pytest.mark.usefixtures("quickly_compiled")
SET = brx.ScaledLevels((-3, -1, 1, 3), rule=brx.MeanMagnitude(0.627, refit=False))
Y = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


def test_the_gradient_is_that_of_a_straight_through_estimator():
    def dequantized(s):
        ratio = jnp.clip(Y / s, -3, 3)
        return s * (ratio + jax.lax.stop_gradient(codes(SET, Y, s) - ratio))

    s = jnp.full((1, 1), 0.4)
    g = np.cos(Y)
    wanted = jax.jit(jax.grad(lambda s: jnp.sum(g * dequantized(s))))(s) / np.sqrt(Y.size * 3)
    found, inside = jax.jit(lambda *arrays: gradient(SET, *arrays))(g, Y, s)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    np.testing.assert_array_equal(inside, np.abs(Y / 0.4) <= 3)
    assert not inside.all()


def test_params_are_on_the_learned_scale():
    selection = brx.select(default=SET)
    inner = brx.binary_connect(optax.sgd(0.1), selection)
    optimizer = learned_scales(inner, selection, lambda count: 0.1)
    params = {"kernel": jnp.array(Y)}
    state, scales = optimizer.init(params), []

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.tree.map(jnp.cos, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
        scales.append(float(state.inner.scales["kernel"][0, 0]))
    assert len(set(scales)) == 3
    deployed = brx.quantized_params(state.inner, params)["kernel"]
    np.testing.assert_allclose(params["kernel"], deployed, rtol=1e-6)
    np.testing.assert_allclose(jnp.max(jnp.abs(deployed)), 3 * scales[-1], rtol=1e-6)


def test_all_quantized_runs_learn_their_scales():
    kernels = {name: {"kernel": jnp.array(Y)} for name in ("stem", "head")}
    with scales_are_learned(0.5):
        made = {m: steps.make_optimizer(Config(method=m), 3) for m in ("float", "binary_relax")}
    states = {method: optimizer.init(kernels) for method, optimizer in made.items()}
    assert not hasattr(states["float"], "velocity")
    assert states["binary_relax"].velocity.keys() == {"stem/kernel"}
    with scales_are_learned(None):
        assert not hasattr(steps.make_optimizer(Config(), 3).init(kernels), "velocity")


def test_they_need_directories_of_their_own(capsys):
    with pytest.raises(SystemExit):
        grid("--learn-scales", "1", "--runs", "x")
    assert "--learn-scales needs a directory of its own: give --results" in capsys.readouterr().err
