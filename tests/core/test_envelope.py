"""Distance, envelope and relaxation: by definition, by gradients, and at λ = 0 and λ = ∞."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from tests.helpers import oracles
from tests.helpers.training import array, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = (8, 6)
SETS = {
    "binary": brx.Binary(),
    "binary by block": brx.Binary(granularity=brx.PerBlock(4, axis=0)),
    "threshold": brx.TernaryThreshold(granularity=brx.PerChannel()),
    "ternary": brx.Ternary(granularity=brx.PerChannel()),
}
GROUPS = {
    "binary": lambda: oracles.channel_groups(SHAPE, ()),
    "binary by block": lambda: oracles.block_groups(SHAPE, 4, 0),
    "ternary": lambda: oracles.channel_groups(SHAPE, (1,)),
}
STRENGTHS = {0.0: 0.0, 0.25: 0.2, 1.0: 0.5, 1e30: 1.0, np.inf: 1.0}

every_set = pytest.mark.parametrize("name", SETS)


def weights(seed=0, dtype=np.float32):
    return np.random.default_rng(seed).laplace(size=SHAPE).astype(dtype)


@functools.partial(jax.jit, static_argnums=0)
def everything(names, w, lam):
    """All of the module and the projection, of some sets."""
    return {
        name: {
            "projection": qset.project(w),
            "distance": brx.distance(w, qset),
            "envelope": brx.moreau_envelope(w, qset, lam),
            "relax": brx.relax(w, qset, lam),
            "distance gradient": jax.grad(brx.distance)(w, qset),
            "envelope gradient": jax.grad(brx.moreau_envelope)(w, qset, lam),
        }
        for name, qset in ((name, SETS[name]) for name in names)
    }


def compiled(name, together=tuple(SETS)):
    """A function of (w, λ); one program for sets that are together."""
    return lambda w, lam: jax.tree.map(np.asarray, everything(together, w, lam)[name])


@pytest.mark.parametrize("name", GROUPS)
def test_distance_is_the_root_of_the_least_squared_error(name):
    w = weights()
    least = sum(oracles.optimum(w[g].ravel(), SETS[name].levels)[1] for g, _ in GROUPS[name]())
    results = compiled(name)(w, 3.0)
    np.testing.assert_allclose(results["distance"], np.sqrt(least), rtol=1e-5)
    np.testing.assert_allclose(results["envelope"], 1.5 * least, rtol=1e-5)


nearest_by_channel = jax.jit(brx.Ternary(granularity=brx.PerChannel()).project)


def nearest_point(name, w, results):
    """The point of Q nearest to w, which a rule of thumb for the scale does not give."""
    return np.asarray(nearest_by_channel(w)) if name == "threshold" else results["projection"]


@every_set
@pytest.mark.parametrize(("lam", "strength"), STRENGTHS.items())
def test_relax_goes_that_share_of_the_way(name, lam, strength):
    w = weights()
    results = compiled(name)(w, lam)
    expected = (1 - strength) * w + strength * nearest_point(name, w, results)
    if strength in (0, 1):
        np.testing.assert_array_equal(results["relax"], expected)
    np.testing.assert_allclose(results["relax"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_relax_is_bitwise_at_both_ends_in_every_dtype(dtype):
    w, qset = array(weights(), dtype), SETS["binary"]
    relax = jax.jit(lambda w, lam: (brx.relax(w, qset, lam), qset.project(w)))
    between, projection = relax(w, 1.0)
    for lam, expected in [(0.0, w), (np.inf, projection)]:
        for relaxed in (relax(w, lam)[0], brx.relax(w, qset, lam)):
            assert relaxed.dtype == w.dtype
            np.testing.assert_array_equal(relaxed, expected)
    between, w, projection = (np.asarray(x, np.float32) for x in (between, w, projection))
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(between, (w + projection) / 2, rtol=rounding, atol=1e-6)


def test_at_infinity_the_envelope_is_the_indicator():
    off = compiled("binary")(weights(), np.inf)
    on = compiled("binary")(off["projection"], np.inf)
    assert on["envelope"] == 0
    np.testing.assert_array_equal(on["envelope gradient"], 0)
    assert off["envelope"] == np.inf
    assert not np.isfinite(off["envelope gradient"]).any()


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("lam", [0.3, 5.0])
def test_relax_is_the_minimizer_that_it_says(name, lam):
    """½‖u − y‖² + λ/2·dist(u, Q)² is nowhere below its value at u = relax(y)."""
    levels, rng = SETS[name].levels, np.random.default_rng(1)
    y = weights().astype(float)

    def objective(u):
        square = sum(oracles.optimum(u[g].ravel(), levels)[1] for g, _ in GROUPS[name]())
        return np.sum((u - y) ** 2) / 2 + lam / 2 * square

    u = np.asarray(compiled(name)(y.astype(np.float32), lam)["relax"], float)
    least = objective(u)
    for size in (0.01, 0.1, 1.0):
        for step in (*rng.standard_normal((5, *SHAPE)), y - u, u - y):
            assert objective(u + size * step) > least


@every_set
@pytest.mark.parametrize("lam", [0.0, 2.0, np.inf])
def test_on_the_set_everything_is_zero_and_nothing_nan(name, lam):
    compute = compiled(name)
    point = compute(weights(), lam)["projection"]
    for w in (point, -point, 0 * point, np.float32(1e30) * point, np.float32(1e-30) * point):
        results = compute(w, lam)
        np.testing.assert_array_equal(results["distance"], 0)
        np.testing.assert_array_equal(results["envelope"], 0)
        np.testing.assert_array_equal(results["distance gradient"], 0)
        np.testing.assert_array_equal(results["envelope gradient"], 0)
        np.testing.assert_allclose(results["relax"], w, rtol=1e-6)


@every_set
def test_off_the_set_the_envelope_is_infinite_at_infinity_and_zero_at_zero(name):
    assert compiled(name)(weights(), np.inf)["envelope"] == np.inf
    results = compiled(name)(weights(), 0.0)
    assert results["envelope"] == 0
    np.testing.assert_array_equal(results["envelope gradient"], 0)


@pytest.mark.parametrize("name", ["binary by block", "threshold"])
def test_gradients_are_those_of_the_theory_and_of_difference_quotients(name):
    lam, step = 3.0, 1e-6
    w = np.random.default_rng(2).laplace(size=SHAPE)
    with jax.enable_x64(True):
        compute = compiled(name, ("binary by block", "threshold"))
        results = compute(w, lam)
        residual = w - nearest_point(name, w, results)
        unit = residual / results["distance"]
        np.testing.assert_allclose(results["envelope gradient"], lam * residual, rtol=1e-9)
        np.testing.assert_allclose(results["distance gradient"], unit, rtol=1e-9)
        for direction in np.random.default_rng(3).standard_normal((4, *SHAPE)):
            ahead, behind = (compute(w + sign * step * direction, lam) for sign in (1, -1))
            for what in ("envelope", "distance"):
                slope = (ahead[what] - behind[what]) / (2 * step)
                along = np.sum(results[f"{what} gradient"] * direction)
                np.testing.assert_allclose(along, slope, rtol=1e-5, atol=1e-7)


def two_off():
    """Weights at distance 2 from the binary set, whose scale is 2."""
    w = np.full(SHAPE, 2, np.float32)
    w[0, :4] = 1, 3, -1, -3
    return w


@pytest.mark.parametrize("magnitude", [1e30, 0.9e38, 1e-25])
def test_distance_far_from_one(magnitude):
    results = compiled("binary")(two_off() * np.float32(magnitude), 0.0)
    np.testing.assert_allclose(results["distance"] / magnitude, 2.0, rtol=1e-5)
    gradient = np.zeros(SHAPE)
    gradient[0, :4] = -0.5, 0.5, 0.5, -0.5
    np.testing.assert_allclose(results["distance gradient"], gradient, rtol=1e-5, atol=1e-8)


def test_a_tiny_point_off_the_set_is_still_off():
    w = two_off() * np.float32(1e-25)
    assert compiled("binary")(w, np.inf)["envelope"] == np.inf


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_are_measured_in_32_bits(dtype):
    w = array(weights(), dtype)
    compute = compiled("binary", ("binary",))
    results = compute(w, 2.0)
    assert results["distance"].dtype == results["envelope"].dtype == jnp.float32
    assert results["relax"].dtype == results["envelope gradient"].dtype == w.dtype
    least = oracles.binary(np.asarray(w, float).ravel())[1]
    rounding = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(results["distance"], np.sqrt(least), rtol=rounding)
    # A point of the set in its own dtype, whose scale the dtype has rounded, is on the set.
    on_set = compute(results["projection"], np.inf)
    assert on_set["distance"] == on_set["envelope"] == 0


@every_set
def test_nan_is_not_hidden(name):
    w = weights()
    w[0, 0] = np.nan
    results = compiled(name)(w, 1.0)
    assert np.isnan(results["distance"])
    assert np.isnan(results["envelope"])
    assert np.isnan(results["relax"][0, 0])


def test_empty_weights_are_on_the_set():
    empty, qset = jnp.zeros((0, 6)), brx.Ternary(granularity=brx.PerChannel())
    assert brx.distance(empty, qset) == brx.moreau_envelope(empty, qset, np.inf) == 0
    assert brx.relax(empty, qset, 1.0).shape == (0, 6)


@pytest.mark.parametrize(
    "function",
    [
        lambda w, qset: brx.distance(w, qset),
        lambda w, qset: brx.moreau_envelope(w, qset, 1.0),
        lambda w, qset: brx.relax(w, qset, 1.0),
    ],
    ids=["distance", "moreau_envelope", "relax"],
)
def test_bad_weights_are_refused(function):
    with pytest.raises(TypeError, match=r"floating.*int32"):
        function(np.arange(4, dtype=np.int32), brx.Binary())
    with pytest.raises(ValueError, match="does not divide"):
        function(ones(5), brx.Binary(granularity=brx.PerBlock(4)))
