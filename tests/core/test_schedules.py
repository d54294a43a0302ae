"""The continuation schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx

pytestmark = pytest.mark.usefixtures("quickly_compiled")

LAST = np.iinfo(np.int32).max


@pytest.mark.parametrize("call", [lambda f, n: f(n), lambda f, n: jax.jit(f)(jnp.int32(n))])
@pytest.mark.parametrize("every", [1, 7])
def test_geometric_values(call, every):
    lam = brx.geometric_continuation(0.5, 1.04, every)
    for count in (0, 1, 6, 7, 8, 13, 14, 100, 700):
        expected = 0.5 * 1.04 ** (count // every)
        np.testing.assert_allclose(call(lam, count), expected, rtol=1e-6)


def test_growth_from_step_to_step_stays_accurate_in_long_runs():
    lam = brx.geometric_continuation(1e-6, 1.0001)
    for count in (50_000, 300_000):
        np.testing.assert_allclose(lam(count), 1e-6 * 1.0001**count, rtol=3e-6)


@pytest.mark.parametrize("call", [lambda f, n: f(n), lambda f, n: jax.jit(f)(jnp.int32(n))])
def test_linear_strength(call):
    lam = brx.linear_continuation(8)
    expected = {0: 0, 1: 1 / 7, 2: 1 / 3, 4: 1, 6: 3, 7: 7, 8: np.inf, 9: np.inf, LAST: np.inf}
    for count, value in expected.items():
        np.testing.assert_allclose(call(lam, count), value, rtol=1e-6)


def test_the_defaults_are_the_papers():
    lam = brx.geometric_continuation()
    np.testing.assert_allclose([lam(0), lam(1), lam(2)], [1, 1.04, 1.0816], rtol=1e-6)


def test_a_growing_strength_reaches_infinity_and_stays():
    counts = jnp.array([0, 1000, 10_000, 2**30, LAST], jnp.int32)
    lam = brx.geometric_continuation(1e-3, 1.04)(counts)
    assert np.all(np.diff(lam[:3]) > 0)
    np.testing.assert_array_equal(lam[2:], np.inf)
    np.testing.assert_array_equal(brx.geometric_continuation(2.0, 1.0)(counts), 2.0)
    np.testing.assert_array_equal(brx.geometric_continuation(np.inf)(counts), np.inf)


OF_STRENGTH = [brx.linear_continuation, brx.cosine_continuation, brx.sigmoid_continuation]


@pytest.mark.parametrize("steps", [1, 10, 2**24 + 1, LAST])
@pytest.mark.parametrize("continuation", OF_STRENGTH)
def test_strength_is_whole_at_its_end_and_not_at_its_start(continuation, steps):
    lam = continuation(steps)
    assert lam(jnp.int32(0)) == 0
    assert lam(jnp.int32(steps)) == np.inf
    if steps > 1:
        np.testing.assert_allclose(lam(jnp.int32(steps // 2)), 1, rtol=1e-5)
        counts = jnp.linspace(0, int(0.99 * steps), 50).astype(jnp.int32)
        assert np.isfinite(lam(counts)).all()
        assert (np.diff(lam(counts)) >= 0).all()


@pytest.mark.parametrize("call", [lambda f, n: f(n), lambda f, n: jax.jit(f)(jnp.int32(n))])
def test_cosine_strength(call):
    lam = brx.cosine_continuation(8)
    for count in range(9):
        alpha = (1 - np.cos(np.pi * count / 8)) / 2
        expected = alpha / (1 - alpha) if count < 8 else np.inf
        np.testing.assert_allclose(call(lam, count), expected, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("steepness", [0.01, 1.0, 10.0, 30.0])
def test_sigmoid_is_parqs_schedule_of_the_inverse_slope(steepness):
    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    lam = brx.sigmoid_continuation(100, steepness)
    for count in range(100):
        low, high = sigmoid(-steepness / 2), sigmoid(steepness / 2)
        inverse_slope = (sigmoid(steepness * (0.5 - count / 100)) - low) / (high - low)
        np.testing.assert_allclose(1 / (1 + lam(count)), inverse_slope, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("shape", ["geometric", "linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("steps", [1, 7, 1000])
def test_a_plan_needs_only_the_number_of_steps(shape, steps):
    lam, hard_from = brx.continuation(steps, shape)
    assert hard_from == round(0.75 * steps)
    last = max(hard_from, 1)
    if (
        shape == "geometric"
    ):  # the authors': λ = 1.04 in the first of 150 epochs, 1.04^150 in the last
        np.testing.assert_allclose([lam(0), lam(last)], [1.04, 1.04**150], rtol=1e-4)
    else:
        assert [lam(0), lam(last)] == [0, np.inf]


def test_a_plan_is_linear_unless_told():
    np.testing.assert_allclose(brx.continuation(1000).lam(375), 1, rtol=1e-6)


def test_a_plan_with_another_phase_two():
    lam, hard_from = brx.continuation(1000, "linear", hard_share=0.1)
    assert hard_from == 900
    np.testing.assert_allclose(lam(450), 1, rtol=1e-6)
    assert brx.continuation(1000, hard_share=1).hard_from == 0
    assert brx.continuation(1000, hard_share=0).hard_from == 1000


def test_a_schedule_runs_over_a_traced_count():
    lam = brx.geometric_continuation(1.0, 2.0, every=3)
    _, values = jax.lax.scan(lambda n, _: (n + 1, lam(n)), jnp.int32(0), length=9)
    np.testing.assert_array_equal(values, [1, 1, 1, 2, 2, 2, 4, 4, 4])
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(jax.vmap(lam)(jnp.arange(9)), values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"init_value": 0.0}, "init_value must be positive.*got 0.0"),
        ({"init_value": -1}, "init_value must be positive.*got -1"),
        ({"init_value": np.nan}, "init_value must be positive.*got nan"),
        ({"growth": 0.96}, "growth must be at least 1.*got 0.96"),
        ({"growth": np.nan}, "growth must be at least 1.*got nan"),
        ({"growth": None}, "growth must be at least 1.*got None"),
        ({"every": "epoch"}, "every must be at least 1.*got 'epoch'"),
        ({"every": 0}, "every must be at least 1.*got 0"),
    ],
)
def test_geometric_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        brx.geometric_continuation(**arguments)


@pytest.mark.parametrize("steps", [0, -5, np.nan, "all"])
@pytest.mark.parametrize("continuation", [*OF_STRENGTH, brx.continuation])
def test_bad_steps(continuation, steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1.*got '?{steps}"):
        continuation(steps)


@pytest.mark.parametrize("steepness", [0, -1.0, np.inf, np.nan, "steep"])
def test_bad_steepness(steepness):
    with pytest.raises(ValueError, match=f"steepness must be positive.*got '?{steepness}"):
        brx.sigmoid_continuation(10, steepness)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "exponential"}, "shape must be one of geometric, linear.*got 'exponential'"),
        ({"shape": None}, "shape must be one of geometric, linear.*got None"),
        ({"hard_share": 1.5}, "hard_share must be a share from 0 to 1, got 1.5"),
        ({"hard_share": np.nan}, "hard_share must be a share from 0 to 1, got nan"),
        ({"hard_share": "half"}, "hard_share must be a share from 0 to 1, got 'half'"),
    ],
)
def test_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        brx.continuation(100, **arguments)
