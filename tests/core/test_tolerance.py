"""Scales that are kept while they are nearly the best: what a tolerance promises, and what for."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

import brelax_jax as brx
from brelax_jax.sets import Fit
from tests.helpers import oracles
from tests.helpers.training import array

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TOLERANCE = 0.01
SETS = {
    "ternary": brx.Ternary(granularity=brx.PerChannel(), rule=brx.LeastSquares(TOLERANCE)),
    "powers": brx.PowerOfTwo(4, granularity=brx.PerChannel(), rule=brx.LeastSquares(TOLERANCE)),
}
SHAPE = (400, 4)
every_set = pytest.mark.parametrize("qset", SETS.values(), ids=SETS)


@jax.jit
def fit_all(w, last):
    """The fit of each set: what their searches have in common compiles once."""
    return [qset.fit(w, last) for qset in SETS.values()]


BLANK = Fit(np.zeros((1, SHAPE[1]), np.float32))


def fitted(qset, w, last=BLANK):
    return fit_all(w, last)[[*SETS.values()].index(qset)]


def excess(qset, w, fit):
    """How far the squared error of each channel is above the least one, relative."""
    found: list[float] = []
    for group, scale in zip(w.T, np.ravel(fit.scale), strict=True):
        _, least = oracles.optimum(group, qset.levels)
        found.append(oracles.error(group, scale, qset.levels) / least - 1)
    return np.array(found)


def walk(qset, steps=12):
    """Weights on a random walk, of which each fit is kept for the next."""
    rng = np.random.default_rng(0)
    w, fit = rng.standard_t(2, SHAPE).astype(np.float32), BLANK
    for _ in range(steps):
        w = (w + 0.2 * rng.standard_normal(w.shape)).astype(np.float32)
        fit = fitted(qset, w, fit)
        yield w, fit


@every_set
def test_the_error_stays_within_the_tolerance_of_the_least(qset):
    worst = [excess(qset, w, fit).max() for w, fit in walk(qset)]
    assert worst[0] < 2e-6
    assert max(worst) > 1e-5  # else nothing was kept
    assert max(worst) < TOLERANCE + 2e-6


def tied():
    """Magnitudes of √k − √(k − 1): S_k²/k, which Ternary's k maximizes, is 1 for every k."""
    rng = np.random.default_rng(0)
    w = rng.choice([-1, 1], SHAPE) * np.diff(np.sqrt(np.arange(SHAPE[0] + 1)))[:, None]
    return rng, w.astype(np.float32)


def test_where_scales_tie_the_least_error_jumps_and_the_kept_scale_does_not():
    rng, w = tied()
    qset = SETS["ternary"]
    least, kept = [], [fitted(qset, w)]
    for _ in range(20):
        w = (w + 1e-3 * rng.standard_normal(w.shape)).astype(np.float32)
        least.append(fitted(qset, w).scale)
        kept.append(fitted(qset, w, kept[-1]))
        assert excess(qset, w, kept[-1]).max() < TOLERANCE
    assert largest_steps(least).min() > 0.1
    assert largest_steps([fit.scale for fit in kept]).max() < 0.05


def largest_steps(scales):
    """Of each channel the largest change of its scale's logarithm."""
    return np.max(np.abs(np.diff(np.log(np.array(scales).reshape(-1, SHAPE[1])), axis=0)), axis=0)


@every_set
@pytest.mark.parametrize("scales", [(0.0, 1e-20, 1e-3, 1e3), (1e6, np.nan, np.inf, 1e-40)])
def test_a_scale_that_does_not_fit_is_replaced(qset, scales):
    w = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    fit = fitted(qset, w, Fit(array([scales])))
    assert excess(qset, w, fit).max() < TOLERANCE


@every_set
def test_degenerate_groups_keep_their_meaning(qset):
    w = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    last = fitted(qset, w)
    w[:, 0], w[0, 1], w[0, 2] = 0, np.nan, np.inf
    scale = np.ravel(fitted(qset, w, last).scale)
    assert scale[0] == 0
    assert np.isnan(scale[1:3]).all()
    assert excess(qset, w[:, 3:], Fit(scale[3:])).max() < TOLERANCE


def test_the_transformation_keeps_scales_and_is_exact():
    qset, (rng, w) = SETS["ternary"], tied()
    relax = brx.binary_relax(optax.sgd(5e-4), qset, 1.0, hard_from=10)
    params = {"kernel": array(w)}
    state, scales = relax.init(params), []
    update = jax.jit(relax.update)
    for _ in range(20):
        grads = {"kernel": array(rng.standard_normal(w.shape))}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        scales.append(state.scales["kernel"])
        y = np.asarray(brx.float_params(state, params)["kernel"])
        assert excess(qset, y, Fit(state.scales["kernel"])).max() < TOLERANCE
    assert largest_steps(scales).max() < 0.05
    quantized = np.asarray(brx.quantized_params(state, params)["kernel"])
    np.testing.assert_array_equal(params["kernel"], quantized)
    for channel in quantized.T:
        assert np.unique(np.abs(channel)).tolist() == [0, np.max(np.abs(channel))]


def test_projections_take_the_least_error_in_any_case():
    qset = SETS["ternary"]
    w = np.random.default_rng(0).standard_t(1.5, SHAPE).astype(np.float32)
    exact = dataclasses.replace(qset, rule=brx.LeastSquares())

    @jax.jit
    def placed(w):
        return [(each.project(w), each.quantize(w).codes) for each in (qset, exact)]

    jax.tree.map(np.testing.assert_array_equal, *placed(w))


@pytest.mark.parametrize("given", [-0.1, 1, 2.0, np.nan, np.inf, "0.01", None, True])
def test_a_wrong_tolerance_is_refused(given):
    with pytest.raises(ValueError, match="tolerance must be a number from 0 to less than 1, got"):
        brx.LeastSquares(given)


@pytest.mark.parametrize("make", [brx.Binary, lambda **k: brx.ScaledLevels((-1, 1), **k)])
def test_a_scale_by_a_formula_has_no_tolerance(make):
    with pytest.raises(ValueError, match=r"tolerance is for sets whose scale is searched.*0\.01"):
        make(rule=brx.LeastSquares(0.01))
    assert make(rule=brx.LeastSquares()) == make()
