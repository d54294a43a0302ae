"""Whole runs against others' optimizers for the same methods, in float64.

Against NumPy always, and against torchao (`torchao.prototype.parq`) where that is installed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx

pytestmark = pytest.mark.usefixtures("quickly_compiled")

STEPS = 100
LR, MOMENTUM, DECAY = 0.1, 0.9, 1e-3
SHAPE = (24, 10)


@functools.cache
def problem():
    """A quadratic loss: where the weights start, where they are drawn to, and how hard."""
    rng = np.random.default_rng(0)
    return rng.standard_normal(SHAPE), rng.standard_normal(SHAPE), rng.uniform(0.1, 1, SHAPE)


def gradient(w):
    _, goal, curvature = problem()
    return curvature * (w - goal)


def binary_relax_map(y, share):
    """(1 − α)·y + α·q, α growing linearly."""
    q = np.where(y < 0, -1, 1) * np.abs(y).mean()
    return (1 - share) * y + share * q


def parq_map(y, share, steepness=10.0):
    """With the inverse slope along a sigmoid; the midpoint of the two levels is 0."""

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    low = sigmoid(-steepness / 2)
    inverse = (sigmoid(steepness * (0.5 - share)) - low) / (sigmoid(steepness / 2) - low)
    scale = np.abs(y).mean()
    return np.clip(y / inverse, -scale, scale)


def in_numpy(mapped):
    y = w = problem()[0]
    velocity, trace = 0, []
    for step in range(STEPS):
        velocity = MOMENTUM * velocity + gradient(w) + DECAY * y
        y = y - LR * velocity
        w = mapped(y, step / STEPS)
        trace.append((y, w))
    return np.array(trace)


def base():
    return optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(LR, momentum=MOMENTUM))


METHODS = {
    "binary_relax": (
        lambda: brx.binary_relax(base(), brx.Binary(), brx.linear_continuation(STEPS)),
        binary_relax_map,
    ),
    "parq": (
        lambda: brx.parq(base(), brx.Binary(), brx.sigmoid_continuation(STEPS)),
        parq_map,
    ),
}


@functools.cache
def ours(method):
    with jax.enable_x64(True):
        optimizer = METHODS[method][0]()
        params = {"kernel": jnp.asarray(problem()[0])}
        state, trace = optimizer.init(params), []

        @jax.jit
        def step(params, state):
            grads = {"kernel": gradient(params["kernel"])}
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(STEPS):
            params, state = step(params, state)
            trace.append((brx.float_params(state, params)["kernel"], params["kernel"]))
        assert state.lam.dtype == np.float64
        return np.array(trace)


def assert_close(run, wanted):
    """To rounding, which PARQ's slope multiplies by more than 20 in each of the last steps. λ in
    float32 would be off by 1e-8 and more from the beginning.
    """
    np.testing.assert_allclose(run[:80], wanted[:80], rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(run, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_those_of_numpy(method):
    assert_close(ours(method), in_numpy(METHODS[method][1]))


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_those_of_torchao(method):
    torch = pytest.importorskip("torch")
    optim = pytest.importorskip("torchao.prototype.parq.optim")
    quant = pytest.importorskip("torchao.prototype.parq.quant")
    maps = {"binary_relax": optim.ProxBinaryRelax, "parq": optim.ProxPARQ}
    weights = torch.nn.Parameter(torch.tensor(problem()[0]))
    optimizer = optim.QuantOptimizer(
        torch.optim.SGD(
            [{"params": [weights], "quant_bits": 1}],
            lr=LR,
            momentum=MOMENTUM,
            weight_decay=DECAY,
        ),
        quant.LSBQuantizer(),
        maps[method](0, STEPS),
        quant_period=1,
    )
    trace = []
    for _ in range(STEPS):
        weights.grad = torch.tensor(gradient(weights.detach().numpy()))
        optimizer.step()
        latent = optimizer.state[weights]["latent"]
        trace.append((latent.numpy().copy(), weights.detach().numpy().copy()))
    if method == "parq":  # its map is computed in float32 there
        np.testing.assert_allclose(ours(method)[:80], trace[:80], rtol=1e-4, atol=1e-5)
    else:
        assert_close(ours(method), np.array(trace))
