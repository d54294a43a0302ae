"""The search for the scale, and the references that the other tests hold it to."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from brelax_jax.sets import Group, _levels, _problem, _rules, _search
from brelax_jax.sets._weights import Weights
from tests.helpers import oracles, searching

LEVELS = {
    "binary": (-1, 1),
    "ternary": (-1, 0, 1),
    "two-bit": (-3, -1, 1, 3),
    "powers": (-2, -1, 0, 1, 2),
    "far": (-100, -1, 1, 100),
    "near": (-1.1, -1, 1, 1.1),
}

ROWS = Group(axes=(1,))
modest = hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
floats = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-4)
tiny_groups = hnp.arrays(np.float32, (8, 5), elements=floats | st.sampled_from([0, 1, -1, 2, 3]))


@functools.partial(jax.jit, static_argnums=1)
def search(w, many):
    """The scale of every row for each of some level sets: searches share what is compiled."""
    magnitudes = [tuple(float(level) for level in levels if level >= 0) for levels in many]
    source = _problem.Source.of(Weights(w, ROWS))
    return [_search.searched_scale(each, source) for each in magnitudes]


# The references agree with one another


@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_references_agree_where_every_assignment_can_be_tried(levels):
    rng = np.random.default_rng(0)
    for w in (*rng.standard_t(1.5, (8, 5)), *rng.integers(-3, 4, (8, 5)), np.zeros(5), np.ones(1)):
        least = oracles.brute_force(w, levels)
        for limit in (1 << 20, 1):
            scale, error = oracles.optimum(w, levels, limit)
            np.testing.assert_allclose(error, least, rtol=1e-9, atol=1e-13 * (w @ w))
            np.testing.assert_allclose(error, oracles.error(w, scale, levels), atol=1e-13 * (w @ w))


@pytest.mark.parametrize("limit", [1 << 20, 1000])
def test_references_agree_on_many_weights(limit):
    w = np.random.default_rng(0).standard_t(1.5, 5000)
    for oracle, levels in [(oracles.binary, (-1, 1)), (oracles.ternary, (-1, 0, 1))]:
        np.testing.assert_allclose(oracle(w), oracles.optimum(w, levels, limit), rtol=1e-9)
    many = tuple(range(-15, 16))
    np.testing.assert_allclose(oracles.optimum(w, many, limit), oracles.optimum(w, many), rtol=1e-9)


def test_the_reference_finds_what_a_grid_of_scales_finds():
    rng = np.random.default_rng(0)
    for levels in [*LEVELS.values(), tuple(range(-7, 8))]:
        w = rng.laplace(size=300)
        grid = np.geomspace(1e-3, 10, 4000)[:, None]
        squares = functools.reduce(np.minimum, ((w - grid * level) ** 2 for level in levels))
        on_grid = squares.sum(axis=1).min()
        least = oracles.optimum(w, levels)[1]
        assert least <= on_grid <= 1.001 * least


# The search finds the optimum


TRIED = tuple(LEVELS[name] for name in ("ternary", "two-bit", "near"))


@modest
@hypothesis.given(w=tiny_groups)
def test_search_finds_the_best_of_all_assignments(w):
    for levels, scales in zip(TRIED, search(w, TRIED), strict=True):
        for row, scale in zip(w.astype(float), np.ravel(scales).astype(float), strict=True):
            least = oracles.brute_force(row, levels)
            excess = oracles.error(row, scale, levels) - least
            assert excess <= 1e-6 * least + 1e-11 * (row @ row), (levels, row, scale)


def test_search_ends_on_what_has_no_answer():
    w = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    clean, *_ = map(np.asarray, search(w, TRIED))
    w[1, 2], w[3, 0], w[4], w[6] = np.nan, -np.inf, 0, np.inf
    scale, *_ = map(np.asarray, search(w, TRIED))
    np.testing.assert_array_equal(np.isnan(scale[:, 0]), np.isin(np.arange(8), [1, 3, 6]))
    assert scale[4] == 0
    np.testing.assert_array_equal(scale[[0, 2, 5, 7]], clean[[0, 2, 5, 7]])


def test_the_search_is_over_long_before_its_bound_and_ends_there_in_any_case(monkeypatch):
    rng = np.random.default_rng(0)
    hostile = np.stack(
        [
            rng.uniform(0, 1, 2000),  # E is flat near its least value
            np.arange(2000) / 2000,
            np.where(np.arange(2000) == 0, 1, 1e-6 * rng.standard_normal(2000)),
            rng.choice([1, 1e-1, 1e-2, 1e-3], 2000) * rng.normal(1, 0.01, 2000),
        ]
    )
    a = np.abs(hostile / np.max(np.abs(hostile), axis=1, keepdims=True)).astype(np.float32)
    most_rounds = {2: 40, 4: 100, 8: 500}

    @jax.jit
    def ends(a, bound):
        with monkeypatch.context() as patched:
            patched.setattr(_search, "ROUNDS", bound)
            return {
                bits: searching.in_turn(a, range(2 ** (bits - 1)), ROWS) for bits in most_rounds
            }

    for bits, end in jax.device_get(ends(a, _search.ROUNDS)).items():
        assert end.rounds <= most_rounds[bits] < _search.ROUNDS
        assert np.all(end.below[0] == end.ahead[-1, 0])  # certified up to the largest scale
    assert all(end.rounds == 0 for end in ends(np.full_like(a, np.nan), _search.ROUNDS).values())
    assert ends(a, 7)[8].rounds == 7


def test_an_optimum_among_many_basins():
    """Levels far apart and weights in clusters give an error of many near-equal local minima."""
    rng = np.random.default_rng(1)
    w = (rng.choice([1, 7, 30, 1000], (8, 400)) * (1 + 0.1 * rng.standard_normal((8, 400)))).astype(
        "f4"
    )
    [scales] = np.asarray(search(w, ((-100, -10, -1, 1, 10, 100),)), np.float64)[..., 0]
    for row, scale in zip(w.astype(float), scales, strict=True):
        least = oracles.optimum(row, (-100, -10, -1, 1, 10, 100))[1]
        assert oracles.error(row, scale, (-100, -10, -1, 1, 10, 100)) <= least * (1 + 1e-6)


# Its parts


@functools.partial(jax.jit, static_argnums=2)
def nearest(a, scale, magnitudes):
    """The indices of the nearest levels, and the levels."""
    index = _levels.level_index(a, scale, magnitudes)
    return index, _levels.at_index(index, magnitudes)


@pytest.mark.parametrize(
    "magnitudes",
    [
        (0.0, 1.0),
        (1.0, 3.0),
        (0.0, 0.3, 1.7),
        tuple(map(float, range(128))),
        (0.5, 1.0, *range(2, 12)),
    ],
    ids=len,
)
def test_level_index_is_the_nearest_level(magnitudes):
    rng = np.random.default_rng(0)
    scale = np.array([[0.01], [1.0], [30.0]], np.float32)
    a = np.abs(rng.standard_normal((3, 500)) * 20).astype(np.float32)
    index, values = map(np.asarray, nearest(a, scale, magnitudes))
    assert index.min() >= 0
    assert index.max() <= len(magnitudes) - 1
    distance = np.abs(a[..., None] - scale[..., None] * np.array(magnitudes, np.float32))
    chosen = np.take_along_axis(distance, index.astype(int)[..., None], -1)[..., 0]
    np.testing.assert_allclose(chosen, distance.min(-1), rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(values, np.array(magnitudes, np.float32)[index.astype(int)])


def test_level_index_at_scale_zero_is_a_level():
    for magnitudes in [(0.0, 1.0), tuple(map(float, range(16)))]:
        index, _ = nearest(np.zeros(3, np.float32), np.float32(0), magnitudes)
        np.testing.assert_array_equal(index, 0)


def test_mean_magnitude_where_the_sum_overflows():
    w = np.stack([np.full(1000, -1e37), np.linspace(0, 1, 1000)]).astype(np.float32)
    compiled = jax.jit(lambda w: _rules.mean_magnitude(w, ROWS))

    def mean_magnitude(w):
        return np.asarray(compiled(w))

    np.testing.assert_allclose(mean_magnitude(w)[:, 0], [1e37, 0.5], rtol=1e-5)
    largest = np.full_like(w, np.finfo(np.float32).max)
    np.testing.assert_allclose(mean_magnitude(largest), largest[:, :1], rtol=1e-5)
    w[0, 0] = np.nan
    mean = mean_magnitude(w)[:, 0]
    assert np.isnan(mean[0])
    np.testing.assert_allclose(mean[1], 0.5, rtol=1e-5)
