"""Scales of a narrow dtype: the best of them, against every value that the dtype has."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import brelax_jax as brx
from brelax_jax.sets import Fit
from brelax_jax.sets._fit import fit_all
from tests.helpers import covering, oracles, searching

DTYPES = ["float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu"]
pytestmark = pytest.mark.usefixtures("quickly_compiled")

LEVELS = {
    "binary": brx.Binary(),
    "ternary": brx.Ternary(),
    "two-bit": brx.ScaledLevels((-3, -1, 1, 3)),
    "uniform4": brx.Uniform(4),
    "e2m1": brx.ScaledLevels((-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6)),
}


@functools.cache
def values(dtype):
    """Every positive normal value of a dtype, ascending."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bits = np.arange(2 ** (8 * kind.itemsize)).astype(f"u{kind.itemsize}")
    with np.errstate(invalid="ignore"):  # some bits are no numbers
        found = bits.view(kind).astype(np.float64)
    least = float(ml_dtypes.finfo(kind).smallest_normal)
    return np.unique(found[np.isfinite(found) & (found >= max(least, 2.0**-126))])


def least_error(w, levels, dtype):
    """Of the best scale, by trying all that are no further than one value from where it can be."""
    a, magnitudes = np.abs(w), [level for level in levels if level >= 0]
    high = a.max() / min(m for m in magnitudes if m)
    every = values(dtype)
    first = max(np.searchsorted(every, a.mean() / magnitudes[-1], "right") - 1, 0)
    last = np.searchsorted(every, high)
    distances = a[None] - every[first : last + 1, None] * magnitudes[0]
    for magnitude in magnitudes[1:]:
        others = a[None] - every[first : last + 1, None] * magnitude
        distances = np.where(np.abs(others) < np.abs(distances), others, distances)
    return np.min(np.sum(np.square(distances), axis=1))


def drawn(size):
    rng = np.random.default_rng(size)
    w = np.concatenate([rng.standard_normal((3, size)), rng.standard_t(2, (3, size))])
    return (w * rng.uniform(0.1, 10, (6, 1))).astype(np.float32)


def set_of(name, dtype, granularity):
    levels = LEVELS[name].levels
    return brx.ScaledLevels(levels, granularity=granularity, scale_dtype=dtype)


EVERY = [(name, size) for name in LEVELS for size in (16, 40)]
# Small ternary groups are sorted, all others searched.
SEARCHES = [("ternary", 16), *((name, 40) for name in LEVELS)]


@pytest.mark.parametrize(
    ("dtype", "kind", "cases"),
    [
        ("float16", "in turn", SEARCHES),
        ("float16", "together", [("ternary", 40), ("e2m1", 40)]),
        ("bfloat16", "in turn", [("e2m1", 40)]),
        ("float8_e4m3fn", "in turn", [("e2m1", 40)]),
        ("float8_e8m0fnu", "in turn", [("ternary", 40)]),
        *(
            pytest.param(dtype, kind, EVERY, marks=pytest.mark.soak)
            for dtype in DTYPES
            for kind in searching.KINDS
        ),
    ],
)
def test_the_best_scale_among_those_of_the_dtype(dtype, kind, cases):
    sets = {name: set_of(name, dtype, brx.PerChannel(0)) for name in LEVELS}
    drawn_of = [drawn(size) for _, size in cases]
    with searching.forced(searching.KINDS[kind]):
        fits = jax.jit(lambda ws: [sets[n].fit(w) for (n, _), w in zip(cases, ws, strict=True)])(
            drawn_of
        )
    for (name, _), w, fit in zip(cases, drawn_of, fits, strict=True):
        levels = sets[name].levels
        for row, scale in zip(w.astype(float), np.ravel(fit.scale).astype(float), strict=True):
            assert scale in values(dtype)
            error = oracles.error(row, scale, levels)
            assert error <= least_error(row, levels, dtype) * (1 + 2e-6) + 1e-12


@pytest.mark.parametrize("kind", searching.KINDS)
def test_weights_that_all_scales_are_far_too_large_for_get_the_least(kind):
    """Without a level 0. Their errors overflow, so that none is less than another."""
    kinds = brx.PerBlock(8), brx.PerBlock(8, 0), brx.PerTensor()
    sets = [brx.ScaledLevels((-3, -1, 1, 3), granularity=g, scale_dtype="float16") for g in kinds]
    w = np.full((8, 8), 1e-30, np.float32)
    with searching.forced(searching.KINDS[kind]):
        fits = fit_all(sets, [w, w, w[:, :1]], [None] * 3)
    for fit in fits:
        assert set(np.ravel(fit.scale).tolist()) == {values("float16")[0]}


@pytest.mark.parametrize(("dtype", "name"), covering.pairs(DTYPES, ["ternary", "binary"]))
def test_what_is_beyond_the_dtype_becomes_its_last_value(dtype, name):
    w = np.array([[1e-30, 2e-30], [1e30, -3e30], [0, 0], [np.nan, 1]], np.float32)
    fit = jax.jit(set_of(name, dtype, brx.PerChannel(0)).fit)(w)
    tiny, huge, zero, spoilt = np.ravel(fit.scale).astype(float)
    assert tiny in values(dtype)
    assert huge in values(dtype)
    if dtype in ("float16", "float8_e4m3fn"):
        assert (tiny, huge) == (values(dtype)[0], values(dtype)[-1])
    assert zero == 0
    assert np.isnan(spoilt)


@pytest.mark.parametrize("rule", [brx.MeanMagnitude(0.5), brx.MaxMagnitude(), brx.Fixed(0.3)])
def test_other_rules_take_the_nearest_value(rule):
    free = brx.Uniform(4, granularity=brx.PerChannel(0), rule=rule)
    sets = [free, *(dataclasses.replace(free, scale_dtype=dtype) for dtype in DTYPES)]
    fits = jax.jit(lambda w: [qset.fit(w) for qset in sets])(drawn(40))
    scales, *bound = (np.ravel(fit.scale).astype(float) for fit in fits)
    for dtype, found in zip(DTYPES, bound, strict=True):
        best = np.min(np.abs(values(dtype)[None] - scales[:, None]), axis=1)
        np.testing.assert_allclose(np.abs(found - scales), best, rtol=1e-6)


@pytest.mark.parametrize("kept", [0.0, 0.02])
def test_a_tolerance_keeps_scales_of_the_dtype(kept):
    qset = brx.Uniform(
        3, rule=brx.LeastSquares(kept), scale_dtype="float16", granularity=brx.PerChannel(0)
    )
    rng, w, fitted = np.random.default_rng(0), drawn(40), jax.jit(qset.fit)
    fit = Fit(np.zeros((6, 1), np.float32))
    for _ in range(4):
        w = (w + 0.03 * rng.standard_normal(w.shape)).astype(np.float32)
        fit = fitted(w, fit)
        for row, scale in zip(w.astype(float), np.ravel(fit.scale).astype(float), strict=True):
            assert scale in values("float16")
            least = least_error(row, qset.levels, "float16")
            assert oracles.error(row, scale, qset.levels) <= least * (1 + kept + 2e-6) / (1 - kept)


@pytest.mark.parametrize(
    ("name", "dtype", "params"),
    [
        ("uniform4", "float16", "float16"),
        ("e2m1", "float8_e8m0fnu", "bfloat16"),
        # Of these tests/export/test_formats.py trains formats.
        pytest.param("uniform4", "float16", "float32", marks=pytest.mark.soak),
        pytest.param("e2m1", "float8_e4m3fn", "float32", marks=pytest.mark.soak),
    ],
)
def test_training_ends_on_them_bit_for_bit(name, dtype, params):
    qset = set_of(name, dtype, brx.PerBlock(16, 0))
    relax = brx.binary_relax(optax.sgd(0.3), qset, 1.0, hard_from=9)
    rng = np.random.default_rng(0)
    w = {"kernel": jnp.asarray(rng.standard_t(2, (32, 6)), params)}
    state, update = relax.init(w), jax.jit(relax.update)
    for step in range(14):
        updates, state = update(
            {"kernel": jnp.asarray(rng.standard_normal((32, 6)), params)}, state, w
        )
        w = optax.apply_updates(w, updates)
        scales = np.ravel(state.scales["kernel"]).astype(float)
        assert np.isin(scales, values(dtype)).all()
        if step >= 9:
            np.testing.assert_array_equal(
                w["kernel"], brx.quantized_params(state, w)["kernel"], strict=True
            )
            quantized = brx.quantized_tree(state, w)["kernel"]
            assert quantized.spacing is None
            np.testing.assert_array_equal(quantized.dequantize(), w["kernel"])


def test_groups_beyond_the_dtype_are_warned_of_and_counted():
    qset = brx.Ternary(granularity=brx.PerChannel(), scale_dtype="float8_e4m3fn")
    params = {"kernel": jnp.array([[1e-4, 1.0, 2000.0], [2e-4, 0.5, 1000.0]])}
    relax = brx.binary_connect(optax.sgd(0.0), qset)
    with pytest.warns(UserWarning, match=r"'kernel' on .*: 2 scales would be beyond float8_e4m3fn"):
        state = relax.init(params)
    free = brx.binary_connect(optax.sgd(0.0), brx.Binary()).init(params)

    @jax.jit
    def both_metrics(state, params):
        _, state = relax.update(params, state, params)
        return [brx.metrics(each, params)["kernel"] for each in (state, free)]

    bound, unbound = both_metrics(state, params)
    assert bound.saturated == 2
    assert unbound.saturated == 0


@pytest.mark.parametrize("given", ["float32", "int8", "halves", 3, jnp.float64])
def test_other_dtypes_are_refused(given):
    with pytest.raises(ValueError, match=r"scale_dtype must be None or one of float16, bfloat16"):
        brx.Ternary(scale_dtype=given)
    assert brx.Ternary(scale_dtype=jnp.float16) == brx.Ternary(scale_dtype="float16")
