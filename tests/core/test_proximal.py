"""The proximal maps, against the formulas of their papers, written out in NumPy."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SETS = [
    brx.Binary(),
    brx.Ternary(granularity=brx.PerChannel()),
    brx.PowerOfTwo(4, granularity=brx.PerBlock(4, 0)),
    brx.ScaledLevels((-1.7, -0.3, 0, 0.3, 1.7)),
]
MAPS = [brx.Relaxation(), brx.PiecewiseAffine(), brx.SoftThreshold()]
PROXQUANT = brx.SoftThreshold(updates_float_params=True)
LAMBDAS = (0.0, 0.3, 4.0, 1e3)

every_set = pytest.mark.parametrize("qset", SETS, ids=repr)
every_map = pytest.mark.parametrize("proximal_map", MAPS, ids=repr)


def weights(*shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


class Results(NamedTuple):
    """What the library gives for one set."""

    applied: list
    relaxed: jax.Array
    projection: jax.Array
    quantized: brx.Quantized


@functools.partial(jax.jit, static_argnums=0)
def results(qset, y, lam):
    return Results(
        [proximal_map.apply(y, qset, lam) for proximal_map in MAPS],
        brx.relax(y, qset, lam),
        qset.project(y),
        qset.quantize(y),
    )


def applied(proximal_map, qset, y, lam):
    return results(qset, y, lam).applied[MAPS.index(proximal_map)]


def scales(qset, y):
    """The scale of each entry of y."""
    scale = np.asarray(results(qset, y, 0.0).quantized.scale, np.float64)
    repeats = [entries // groups for entries, groups in zip(y.shape, scale.shape, strict=True)]
    for axis, times in enumerate(repeats):
        scale = np.repeat(scale, times, axis)
    return scale


def piecewise_affine(y, levels, slope):
    """PARQ's map, by finding the interval between two levels that y is in."""
    upper = np.searchsorted(levels, y)
    if upper in (0, len(levels)):
        return levels[min(upper, len(levels) - 1)]
    a, b = levels[upper - 1], levels[upper]
    return np.clip((a + b) / 2 + slope * (y - (a + b) / 2), a, b)


@every_set
@pytest.mark.parametrize("lam", LAMBDAS)
def test_piecewise_affine_is_the_published_formula(qset, lam):
    y = weights(8, 6) * 1.5
    expected = np.vectorize(lambda y, s: piecewise_affine(y, s * np.array(qset.levels), 1 + lam))
    w = applied(brx.PiecewiseAffine(), qset, y, lam)
    w_expected = expected(y.astype(np.float64), scales(qset, y))
    np.testing.assert_allclose(w, w_expected, atol=3e-6 * lam + 1e-6)


@every_set
@pytest.mark.parametrize("lam", LAMBDAS)
def test_soft_threshold_is_the_published_formula(qset, lam):
    y = weights(8, 6)
    q = np.asarray(results(qset, y, 0.0).projection, np.float64)
    residual = y - q
    shrunk = np.maximum(np.abs(residual) - lam * scales(qset, y), 0)
    w = applied(brx.SoftThreshold(), qset, y, lam)
    np.testing.assert_allclose(w, q + np.sign(residual) * shrunk, atol=1e-5)


def test_soft_threshold_is_proxquants_for_weights_at_scale_one():
    theta, lam = np.array([0.25, -1.75, 0.5, -1.5, 0.875, -1.125], np.float32), 0.3
    theta = np.tile(theta, (8, 1))
    sign = np.sign(theta)
    expected = sign + np.sign(theta - sign) * np.maximum(np.abs(theta - sign) - lam, 0)
    np.testing.assert_allclose(
        applied(brx.SoftThreshold(), brx.Binary(), theta, lam), expected, atol=1e-6
    )


@every_set
@pytest.mark.parametrize("lam", [0.3, 4.0])
def test_soft_threshold_minimizes_its_objective(qset, lam):
    y = weights(8, 6).astype(np.float64)
    q, s = results(qset, y.astype(np.float32), 0.0).projection, scales(qset, y.astype(np.float32))
    q = np.asarray(q)

    def objective(u):
        return (u - y) ** 2 / 2 + lam * s * np.abs(u - q)

    w = np.asarray(applied(brx.SoftThreshold(), qset, y.astype(np.float32), lam), np.float64)
    others = w + np.linspace(-2, 2, 801)[:, None, None]
    assert (objective(w) <= objective(others).min(axis=0) + 1e-6).all()


@every_set
@pytest.mark.parametrize("lam", LAMBDAS)
def test_relaxation_is_relax(qset, lam):
    y = weights(8, 6)
    found = results(qset, y, lam)
    np.testing.assert_array_equal(found.applied[MAPS.index(brx.Relaxation())], found.relaxed)


@every_set
@every_map
def test_at_infinity_every_map_is_the_projection(qset, proximal_map):
    y = weights(8, 6)
    y[:, 0] = 0
    wanted = results(qset, y, 0.0).projection
    np.testing.assert_array_equal(applied(proximal_map, qset, y, np.inf), wanted)


@every_set
@every_map
def test_the_pull_grows_with_lambda_and_keeps_the_order(qset, proximal_map):
    y = np.linspace(-2, 2, 48, dtype=np.float32).reshape(8, 6)
    q = np.asarray(results(qset, y, 0.0).projection)
    away = [np.abs(applied(proximal_map, qset, y, lam) - q) for lam in (0.0, 0.3, 1.0, 4.0, 1e3)]
    assert (np.diff(away, axis=0) <= 1e-6).all()
    assert (away[0] <= np.abs(y - q) + 1e-6).all()


@every_set
def test_piecewise_affine_at_zero_cuts_off_at_the_last_levels(qset):
    y = weights(8, 6)
    last = qset.levels[-1] * scales(qset, y)
    w = applied(brx.PiecewiseAffine(), qset, y, 0.0)
    np.testing.assert_allclose(w, np.clip(y, -last, last), atol=1e-6)


def test_piecewise_affine_holds_weights_between_the_cut_and_halfway_at_the_midpoint():
    qset = brx.TernaryThreshold(0.2)
    y = np.array([0.3, -0.4, 3.0, -2.0, 0.01], np.float32)
    apply = jax.jit(lambda y, lam: brx.PiecewiseAffine().apply(y, qset, lam))
    s = np.mean([0.3, 0.4, 3.0, 2.0])
    np.testing.assert_allclose(apply(y, 1e6), [s / 2, -s / 2, s, -s, 0], rtol=1e-5)
    np.testing.assert_array_equal(apply(y, np.inf), qset.project(y))


@jax.jit
def every_applied_in_16_bits(arrays):
    qset = SETS[1]
    return {dtype: [m.apply(y, qset, 1.0) for m in MAPS] for dtype, y in arrays.items()}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@every_map
def test_low_precision_keeps_its_dtype(dtype, proximal_map):
    arrays = {dtype: jnp.asarray(weights(8, 6), dtype) for dtype in ("float16", "bfloat16")}
    w = every_applied_in_16_bits(arrays)[dtype][MAPS.index(proximal_map)]
    assert w.dtype == arrays[dtype].dtype
    wide = applied(proximal_map, SETS[1], arrays[dtype].astype("float32"), 1.0)
    np.testing.assert_allclose(np.asarray(w, "float32"), wide, rtol=2.0**-8, atol=2.0**-8)


def test_the_derivative_of_piecewise_affine_is_its_slope_or_zero():
    y = jnp.asarray(weights(8, 6))
    total = jax.jit(lambda y: jnp.sum(brx.PiecewiseAffine().apply(y, SETS[1], 1.0)))
    slopes = jax.grad(total)(y)
    assert set(np.unique(slopes)) == {0, 2}


WANTED = weights(8, 6)[::-1]


def trained(optimizers, steps):
    """Params and state of each optimizer after steps on a quadratic, all in one program."""
    params = {"kernel": jnp.asarray(weights(8, 6))}

    @jax.jit
    def step(carries):
        after = []
        for optimizer, (params, state) in zip(optimizers, carries, strict=True):
            grads = jax.tree.map(lambda w: w - WANTED, params)
            updates, state = optimizer.update(grads, state, params)
            after.append((optax.apply_updates(params, updates), state))
        return after

    carries = [(params, optimizer.init(params)) for optimizer in optimizers]
    for _ in range(steps):
        carries = step(carries)
    return carries


def test_proxquant_is_a_proximal_step_of_the_weights_themselves():
    qset, y = brx.Binary(), weights(8, 6)
    optimizer = brx.binary_relax(
        optax.sgd(0.3),
        qset,
        lam=lambda count: 0.01 * count,
        proximal_map=PROXQUANT,
    )
    [(params, state)] = trained([optimizer], steps=10)
    for count in range(10):
        y = y - 0.3 * (y - WANTED)
        y = np.asarray(applied(brx.SoftThreshold(), qset, y, 0.01 * count))
    np.testing.assert_allclose(params["kernel"], y, atol=1e-5)
    np.testing.assert_array_equal(brx.float_params(state, params)["kernel"], params["kernel"])


EVERY_MAP = [*MAPS, PROXQUANT]


@functools.cache
def trained_with_every_map():
    plan = brx.continuation(30, "linear")
    optimizers = [
        brx.binary_relax(optax.sgd(0.1), SETS[1], *plan, proximal_map=proximal_map)
        for proximal_map in EVERY_MAP
    ]
    return trained(optimizers, steps=30)


@pytest.mark.parametrize("proximal_map", EVERY_MAP, ids=repr)
def test_phase_two_is_exact_with_every_map(proximal_map):
    params, state = trained_with_every_map()[EVERY_MAP.index(proximal_map)]
    np.testing.assert_array_equal(params["kernel"], brx.quantized_params(state, params)["kernel"])
    assert float(brx.strength(state)) == 1


def test_parq_is_binary_relax_with_its_map():
    plan = brx.continuation(20, "sigmoid")
    ours = brx.parq(optax.adam(0.1), brx.Binary(), *plan)
    same = brx.binary_relax(
        optax.adam(0.1), brx.Binary(), *plan, proximal_map=brx.PiecewiseAffine()
    )
    other = brx.binary_relax(optax.adam(0.1), brx.Binary(), *plan)
    w, v, u = (params["kernel"] for params, _ in trained((ours, same, other), steps=10))
    np.testing.assert_array_equal(w, v)
    assert not np.array_equal(w, u)


@pytest.mark.parametrize("given", [None, "parq", brx.PiecewiseAffine, lambda y: y])
def test_a_map_of_another_kind_is_refused(given):
    with pytest.raises(ValueError, match=r"proximal_map must be Relaxation\(\), .*, got"):
        brx.binary_relax(optax.sgd(0.1), brx.Binary(), 1.0, proximal_map=given)
