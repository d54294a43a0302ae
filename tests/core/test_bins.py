"""The search for the scale of many weights on CPU, which goes over bins of them first."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from brelax_jax.sets import _bins, _problem, _search
from brelax_jax.sets._group import Group
from brelax_jax.sets._weights import Weights
from tests.helpers import covering, oracles

pytestmark = pytest.mark.usefixtures("quickly_compiled")

N = 20_011  # weights, no multiple of a piece
LEVELS = {
    "ternary": (-1, 0, 1),
    "two-bit": (-3, -1, 1, 3),
    "uniform3": tuple(range(-3, 4)),
    "uniform4": tuple(range(-7, 8)),
    "powers": (-16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16),
}


def made() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=N)
    return {
        "normal": 0.03 * normal,
        "heavy tails": rng.standard_t(1.5, N),
        "tiny": 1e-30 * normal,
        "huge": 1e30 * normal,
        "mostly zeros": np.where(rng.random(N) < 0.9, 0, normal),
        "few values": rng.choice([-0.7, -0.3, 0.1, 0.5], N),
        "one large": np.append(normal[1:], 1e4),
        "equal": np.full(N, 0.3),
        "zeros": np.zeros(N),
    }


WEIGHTS = {name: w.astype(np.float32) for name, w in made().items()}


def problem_of(w, levels) -> _problem.Problem:
    magnitudes = tuple(float(level) for level in levels if level >= 0)
    return _problem.problem_of(magnitudes, _problem.Source.of(Weights(w, Group((0,)))))


@functools.cache
def searched(name, few=False):
    """The scale by the search with bins, and whether bins settled it; of each of WEIGHTS."""
    levels = LEVELS[name]

    @jax.jit
    def scale(w):
        problem = problem_of(w, levels)
        end = _search.branch_and_bound(_bins.in_bins(problem)[0])
        found = _search.searched_scale(problem.magnitudes, problem.source, _bins.search_with_bins)
        return found, end.left, problem.unit.unit

    with pytest.MonkeyPatch.context() as patched:
        if few:
            patched.setattr(_bins, "BINS", {99: 64})
        return {kind: jax.device_get(scale(w)) for kind, w in WEIGHTS.items()}


@pytest.mark.parametrize("name", covering.some(LEVELS, ["ternary", "uniform4", "powers"]))
def test_scales_are_the_best(name):
    scales_are_the_best(name, few=False)


@pytest.mark.parametrize("name", covering.some(LEVELS, ["two-bit", "uniform4"]))
def test_scales_are_the_best_where_few_bins_leave_it_open(name):
    scales_are_the_best(name, few=True)


def scales_are_the_best(name, few):
    for kind, (scale, *_) in searched(name, few).items():
        w = WEIGHTS[kind].astype(np.float64)
        least = oracles.optimum(w, LEVELS[name])[1]
        found = oracles.error(w, float(scale[0]), LEVELS[name])
        assert found <= least * (1 + 4e-6) + 1e-11 * (w @ w), kind


@pytest.mark.parametrize("name", covering.some(LEVELS, ["two-bit", "uniform4"]))
def test_what_bins_leave_open_has_the_best_scale(name):
    for kind, (_, left, unit) in searched(name, few=True).items():
        best = oracles.optimum(WEIGHTS[kind].astype(np.float64), LEVELS[name])[0]
        low, high = float(left[0, 0] * unit[0]), float(left[1, 0] * unit[0])
        if kind in ("equal", "zeros"):  # several scales are the best
            continue
        assert low * (1 - 1e-5) <= best <= high * (1 + 1e-5), kind


@pytest.mark.parametrize("few", [False, True], ids=["bins", "few bins"])
@pytest.mark.parametrize("name", ["two-bit", "uniform4"])
def test_errors_over_bins_are_bounds(name, few, monkeypatch):
    if few:
        monkeypatch.setattr(_bins, "BINS", {99: 64})

    @jax.jit
    def errors(w):
        problem = problem_of(w, LEVELS[name])
        bins = _bins.in_bins(problem)[0]
        scales = jnp.exp(jnp.linspace(jnp.log(problem.low), jnp.log(problem.high), 20))
        lower = jax.lax.map(lambda s: bins.known(s)[1], scales)
        return problem.unit.unit, scales, lower, bins.goal.doubt * scales, bins.goal.energy

    for kind in ("normal", "heavy tails", "mostly zeros"):
        unit, scales, lower, doubt, energy = jax.device_get(errors(WEIGHTS[kind]))
        a = WEIGHTS[kind].astype(np.float64) / float(unit[0])
        true = np.array([oracles.error(a, float(s[0]), LEVELS[name]) for s in scales])
        spread = a @ a - float(energy[0])  # of the weights in each bin, about its mean
        rounding = 1e-5 * (a @ a + true)
        assert np.all(true - spread >= lower[:, 0] - rounding)
        assert np.all(true - spread <= lower[:, 0] + doubt[:, 0] + rounding)
        assert not few or doubt.max() > 100 * rounding.min()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_answer_is_nan(bad):
    w = WEIGHTS["normal"].copy()
    w[5] = bad

    @jax.jit
    def scale(w):
        problem = problem_of(w, LEVELS["uniform4"])
        return _search.searched_scale(problem.magnitudes, problem.source, _bins.search_with_bins)

    assert np.isnan(scale(w)).all()


@pytest.mark.parametrize("n", [30_000, 400_000, 2_360_000])
def test_many_weights_on_a_set_are_their_own_projection(n):
    """Sums of so many are off by several roundings, but those of what is left are zero."""
    qset = brx.Ternary()
    project = jax.jit(qset.project)
    codes = np.random.default_rng(2).integers(-1, 2, n)
    normal = np.random.default_rng(3).normal(size=n).astype(np.float32)
    for points in (np.float32(0.0371) * codes.astype(np.float32), project(normal)):
        np.testing.assert_array_equal(project(points), points)


def test_many_weights_alone_and_beside_few():
    rng = np.random.default_rng(1)
    large = rng.normal(size=(512, _bins.LEAST_WEIGHTS // 512)).astype(np.float32)
    small = rng.normal(size=(40, 30)).astype(np.float32)
    assert _bins.has_bins(Weights(jnp.asarray(large), Group((0, 1))))
    assert not _bins.has_bins(Weights(jnp.asarray(small), Group((0, 1))))
    qset = brx.Uniform(4)
    alone = np.asarray(jax.jit(lambda w: qset.quantize(w).scale)(large))
    optimizer = brx.binary_connect(optax.sgd(0.1), qset)
    params = {"large": {"kernel": large}, "small": {"kernel": small}}
    both = brx.quantized_params(jax.jit(optimizer.init)(params), params)
    for name, w in (("large", large), ("small", small)):
        scale = np.abs(np.asarray(both[name]["kernel"])).max() / 7
        least = oracles.optimum(w.ravel().astype(np.float64), qset.levels)[1]
        assert oracles.error(w.ravel().astype(np.float64), scale, qset.levels) <= least * (1 + 4e-6)
    np.testing.assert_allclose(
        alone, np.abs(np.asarray(both["large"]["kernel"])).max() / 7, rtol=1e-3
    )
