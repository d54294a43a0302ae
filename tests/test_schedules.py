"""The continuation schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx

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


@pytest.mark.parametrize("steps", [1, 10, 2**24 + 1, LAST])
def test_linear_strength_is_whole_at_its_end_and_not_at_its_start(steps):
    lam = brx.linear_continuation(steps)
    assert lam(jnp.int32(0)) == 0
    assert lam(jnp.int32(steps)) == np.inf
    if steps > 1:
        np.testing.assert_allclose(lam(jnp.int32(steps // 2)), 1, rtol=1e-6)
        assert np.isfinite(lam(jnp.int32(int(0.99 * steps))))


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
def test_linear_bad_input(steps):
    with pytest.raises(ValueError, match=f"steps must be at least 1.*got '?{steps}"):
        brx.linear_continuation(steps)
