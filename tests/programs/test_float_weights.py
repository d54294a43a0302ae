"""What the examples' optimizer does with float weights besides to descend."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from examples.train.config import Config
from examples.train.float_weights import average_from, average_of, hold_oscillating
from examples.train.optimizer import learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("quickly_compiled")
RNG = np.random.default_rng(0)
PARAMS = {"kernel": RNG.normal(size=(4, 3)).astype(np.float32), "bias": np.zeros(3, np.float32)}


def test_the_average_is_that_of_the_last_params():
    optimizer, params = optax.chain(optax.sgd(0.1), average_from(3)), PARAMS
    state, seen, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for _ in range(5):
        grads = {name: RNG.normal(size=p.shape).astype(np.float32) for name, p in params.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        seen.append(params)
        mean = np.mean([p["kernel"] for p in seen[3:] or seen[-1:]], axis=0)
        np.testing.assert_allclose(average_of(state)["kernel"], mean, atol=1e-6)


def test_it_is_found_inside_the_wrapper():
    config = Config(epochs=2, average=1.0, weight_decay=0.0, momentum=0.0)
    optimizer = make_optimizer(config, 2)
    params = {"stem": {"kernel": jnp.array(PARAMS["kernel"])}, "head": {"kernel": jnp.ones((3, 2))}}
    state, floats, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for _ in range(4):
        updates, state = update(optax.tree.ones_like(params), state, params)
        params = optax.apply_updates(params, updates)
        floats.append(brx.float_params(state, params)["stem"]["kernel"])
    average = average_of(state)
    np.testing.assert_allclose(average["stem"]["kernel"], np.mean(floats[2:], axis=0), atol=1e-6)
    deployed = brx.quantized_params(brx.with_float_params(state, average), average)
    assert len(np.unique(deployed["stem"]["kernel"])) == 2


def test_weights_whose_codes_go_back_and_forth_are_held():
    params = {"kernel": jnp.array([0.01, 1.0, 2.0, -3.0]), "bias": jnp.zeros(1)}
    optimizer = hold_oscillating(brx.select(("kernel", brx.Binary())), 0.02, steps=40)
    state, held, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for step in range(40):
        moves = jnp.array([0.0, -2.0 if step % 2 == 0 else 2.0, 0.01, -0.01])
        updates, state = update({"kernel": moves, "bias": jnp.ones(1)}, state, params)
        params = optax.apply_updates(params, updates)
        held.append(np.asarray((updates["kernel"] == 0) & (moves != 0)))
    held = np.array(held)
    assert not held[:, [0, 2, 3]].any()
    first = int(np.argmax(held[:, 1]))
    # After k returns the share is 1 - 0.99**k, and the threshold is at most 0.02.
    assert 2 <= first <= 5
    assert held[first:, 1].all()
    np.testing.assert_allclose(params["bias"], [40.0])


def test_the_learning_rate_restarts_with_phase_two():
    config = Config(epochs=4, lr=0.2, lr_schedule="restart", hard_from=1.0)
    rates = [float(learning_rate(config, 30)(step)) for step in (0, 15, 29, 30, 75, 119, 120)]
    np.testing.assert_allclose(rates, [0.2, 0.1, 0.00055, 0.2, 0.1, 1.5e-5, 0], atol=1e-4)
    for hard in (0.0, 4.0):  # one phase only
        whole = learning_rate(Config(epochs=4, lr_schedule="restart", hard_from=hard), 30)
        np.testing.assert_allclose([float(whole(step)) for step in (0, 60)], [0.1, 0.05], rtol=1e-5)
