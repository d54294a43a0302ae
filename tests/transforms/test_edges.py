"""Sizes, numbers and dtypes at the edge of what there is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers.training import array, normal, ones, trace_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SETS = [brx.Binary(), brx.Ternary(), brx.TernaryThreshold(), brx.Uniform(4), brx.PowerOfTwo(5)]
PARAMS = {"kernel": normal(0, 6, 4)}


@functools.cache
def relaxing(lam, hard_from=None, qset=SETS[0], lr=0.0):
    return brx.binary_relax(optax.sgd(lr), qset, lam, hard_from)


def after(optimizer, steps, params=PARAMS):
    return trace_of(optimizer, params, [jax.tree.map(np.zeros_like, params)] * steps)


@pytest.mark.parametrize("qset", SETS)
def test_a_leaf_of_two_to_the_thirty_second_entries(qset):
    big = {"kernel": jax.ShapeDtypeStruct((2**16, 2**16), jnp.bfloat16)}
    optimizer = brx.binary_relax(optax.sgd(0.1), qset, 1.0, 10, track_flips=True)
    state = jax.eval_shape(optimizer.init, big)
    updates, state = jax.eval_shape(optimizer.update, big, state, big)
    assert updates["kernel"].shape == (2**16, 2**16)
    jax.eval_shape(brx.metrics, state, big)
    jax.eval_shape(brx.quantized_tree, state, big)


def test_a_schedule_that_gives_nan_once_leaves_lambda_as_it_was():
    trace = after(relaxing(lambda count: jnp.where(count == 2, jnp.nan, 1.0 + count)), 5)
    strengths = [float(brx.strength(state)) for _, state in trace]
    assert strengths == pytest.approx([1 / 2, 2 / 3, 2 / 3, 4 / 5, 5 / 6])
    assert all(np.isfinite(params["kernel"]).all() for params, _ in trace)


@pytest.mark.parametrize("low", [-1.0, -jnp.inf])
def test_a_schedule_below_zero_is_zero(low):
    [(_, state)] = after(relaxing(lambda count: low), 1)
    assert brx.strength(state) == 0


SCHEDULES = {
    "an array of one entry": lambda count: jnp.ones(1),
    "an array": lambda count: jnp.ones(4),
    "boolean": lambda count: count > 2,
    "complex": lambda count: 1j,
    "None": lambda count: None,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_schedule_must_not_give(name):
    optimizer = relaxing(SCHEDULES[name])
    with pytest.raises(ValueError, match="lam, a schedule, must give one real number"):
        jax.eval_shape(optimizer.update, PARAMS, optimizer.init(PARAMS), PARAMS)


@pytest.mark.parametrize("lam", [True, np.bool_(True), ones(1), 1j, "1", float("nan")])
def test_what_lam_must_not_be(lam):
    with pytest.raises(ValueError, match="lam must be"):
        brx.binary_relax(optax.sgd(0.1), SETS[0], lam)


def test_settings_of_sets_may_be_jax_numbers():
    assert brx.LeastSquares(jnp.float32(0.25)) == brx.LeastSquares(0.25)
    assert brx.TernaryThreshold(factor=jnp.float32(0.5)) == brx.TernaryThreshold(factor=0.5)
    hash(brx.LeastSquares(jnp.float32(0.25)))


@pytest.mark.parametrize("top", [65504, 60000, 30000])
@pytest.mark.parametrize("qset", [brx.Uniform(4), brx.Binary(), brx.ScaledLevels((-3, -1, 1, 3))])
def test_float16_up_to_its_largest_number(qset, top):
    w = array(np.clip(6e4 * np.asarray(PARAMS["kernel"]), -top, top), "float16")
    projection = qset.project(w)
    assert np.isfinite(projection).all()
    assert len(np.unique(projection)) <= len(qset.levels)
    np.testing.assert_array_equal(qset.quantize(w).dequantize(), projection)
    params, state = after(relaxing(1.0, 2, qset), 6, {"kernel": w})[-1]
    quantized = brx.quantized_params(state, params)["kernel"]
    assert np.isfinite(quantized).all()
    np.testing.assert_array_equal(params["kernel"], quantized)


def test_metrics_near_the_largest_number():
    w = np.asarray(PARAMS["kernel"]) * np.float32(1e38)
    found = jax.jit(brx.metrics)(relaxing(1.0).init({"w": w}), {"w": w})["w"]
    a = np.abs(w.astype(np.float64))
    wanted = np.linalg.norm(a - a.mean()) / np.linalg.norm(a)
    np.testing.assert_allclose(found.distance, wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_refused_by_name(dtype):
    w = array(np.ones((4, 4)), dtype)
    with pytest.raises(ValueError, match=rf"'kernel' is of dtype {dtype}.*bfloat16, float16"):
        relaxing(1.0).init({"kernel": w})
    with pytest.raises(TypeError, match=rf"got {dtype}"):
        brx.Binary().project(w)


@functools.cache
def stacked():
    """States and params of two runs side by side."""
    optimizer = relaxing(1.0, qset=brx.TernaryThreshold(granularity=brx.PerChannel()))

    def updated(params):
        return optimizer.update(params, optimizer.init(params), params)[1], params

    return jax.jit(jax.vmap(updated))({"kernel": normal(1, 2, 6, 4)})


READERS = [brx.quantized_params, brx.float_params, brx.quantized_tree, brx.metrics]


@pytest.mark.parametrize("read", [*READERS, brx.with_float_params])
def test_readers_of_stacked_states_say_that_they_want_vmap(read):
    state, params = stacked()
    with pytest.raises(ValueError, match=r"a stack: its count has shape \(2,\).*jax\.vmap"):
        read(state, params)
    both = jax.jit(jax.vmap(read))(state, params)
    for run in range(2):
        one = read(*jax.tree.map(lambda x, run=run: np.asarray(x)[run], (state, params)))
        for left, right in zip(*map(jax.tree.leaves, (both, one)), strict=True):
            np.testing.assert_allclose(np.asarray(left)[run], right, rtol=1e-6)


ON_SETS = [
    (brx.Binary(), 0.53717804 * np.random.default_rng(0).choice([-1, 1], (100, 37))),
    (brx.Binary(granularity=brx.PerChannel()), 0.1 * np.ones((5000, 2))),
    (brx.TernaryThreshold(), 0.3 * np.random.default_rng(0).choice([-1, 0, 1], (100, 100))),
    (brx.Ternary(), 0.3 * np.random.default_rng(0).choice([-1, 0, 1], (100, 100))),
    (brx.Uniform(4), 0.7 * np.random.default_rng(0).integers(-7, 8, (64, 64))),
    (brx.PowerOfTwo(4), 0.3 * np.random.default_rng(0).choice([-4, -2, -1, 0, 1, 2, 4], (64, 64))),
]


@pytest.mark.parametrize(("qset", "w"), ON_SETS, ids=[type(qset).__name__ for qset, _ in ON_SETS])
def test_a_point_of_a_set_is_on_it(qset, w):
    @jax.jit
    def of(w):
        return brx.distance(w, qset), brx.moreau_envelope(w, qset, np.inf), qset.project(w)

    w = array(w)
    distance, envelope, projection = of(w)
    assert distance == envelope == 0
    error = np.asarray(projection, np.float64) - np.asarray(w, np.float64)
    assert np.sum(error**2) <= 1e-12 * np.sum(np.asarray(w, np.float64) ** 2)
