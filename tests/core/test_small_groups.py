"""Small ternary groups are sorted, those of more levels are swept: exact in each dtype, with ties,
zeros and NaN.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import brelax_jax as brx
from brelax_jax.sets import Fit, Group, _in_turn
from brelax_jax.sets._rows import has_rows
from brelax_jax.sets._small_groups import is_small, sorting_network
from brelax_jax.sets._weights import Weights
from tests.core.test_optimality import KINDS, SETS, assert_optimal
from tests.helpers import covering, oracles
from tests.helpers.training import array, normal, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SIZES = [1, 2, 9, 16, 32]
KEPT = brx.Ternary(granularity=brx.PerBlock(16), rule=brx.LeastSquares(0.05))
fit_or_keep = jax.jit(KEPT.fit)


def test_a_network_sorts():
    """It does if it sorts zeros and ones."""
    for n in range(1, 11):
        for bits in itertools.product((0, 1), repeat=n):
            row = list(bits)
            for i, j in sorting_network(n):
                row[i], row[j] = max(row[i], row[j]), min(row[i], row[j])
            assert row == sorted(bits, reverse=True)


@functools.partial(jax.jit, static_argnums=0)
def quantize(size, w):
    return brx.Ternary(granularity=brx.PerBlock(size, 1)).quantize(w)


@pytest.mark.parametrize("size", covering.some(SIZES, [1, 9, 32]))
def test_scales_are_the_best_for_every_kind_of_weights(size):
    drawn = [
        np.asarray(draw(np.random.default_rng((seed, i)), size), np.float32)
        for i, draw in enumerate(KINDS.values())
        for seed in range(20)
    ]
    w = np.stack([np.where(np.abs(x) < 1.2e-38, np.float32(0), x) for x in drawn])
    assert is_small((0.0, 1.0), Weights(array(w), Group((1,))))
    kinds = [kind for kind in KINDS for _ in range(20)]
    assert_optimal(brx.Ternary(granularity=brx.PerBlock(size, 1)), kinds, w, quantize(size, w))


@pytest.mark.parametrize(("columns", "part"), [(37, 13), (500, 40)])
def test_groups_in_parts_get_the_scales_that_they_get_together(monkeypatch, columns, part):
    """On CPU, also inside `jax.shard_map`. In the first case the last part overlaps another one."""
    qset = brx.Uniform(3, granularity=brx.PerBlock(8, 0), rule=brx.LeastSquares(0.02))
    first, second = normal(0, 16, columns), normal(1, 16, columns)
    spoilt = second.at[3, -1].set(np.nan)

    def fits(w, last):
        return jax.jit(lambda w, last: qset.fit(w, last))(w, last)

    start = fits(first, Fit(np.zeros((2, columns), np.float32)))
    wanted = fits(second, start).scale
    jax.clear_caches()
    monkeypatch.setattr(_in_turn, "GROUPS_OF_A_PART", part)
    found = fits(spoilt, start).scale
    mesh, spec = jax.make_mesh((1,), ("x",), (AxisType.Auto,)), P(None, "x")
    mapped = jax.shard_map(fits, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(mapped(spoilt, start).scale, found)
    jax.clear_caches()
    assert np.isnan(found[0, -1])
    np.testing.assert_array_equal(found.at[0, -1].set(0), wanted.at[0, -1].set(0))


SWEPT = {
    name: dataclasses.replace(SETS[name], granularity=brx.PerBlock(16, 1))
    for name in ("uniform4", "power4", "two-bit", "uneven")
}


@jax.jit
def quantize_swept(w):
    return {name: qset.quantize(w) for name, qset in SWEPT.items()}


def test_scales_of_more_levels_are_the_best_for_every_kind_of_weights():
    w = np.zeros((len(KINDS), 16), np.float32)
    for i, draw in enumerate(KINDS.values()):
        w[i] = draw(np.random.default_rng((7, i)), 16)
    w = np.where(np.abs(w) < 1.2e-37, np.float32(0), w)
    assert has_rows(Weights(array(w), Group((1,))))
    assert not has_rows(Weights(ones(3, 65), Group((1,))))
    assert not has_rows(Weights(array(w), Group((0, 1))))
    for name, quantized in quantize_swept(w).items():
        assert_optimal(SWEPT[name], [*KINDS], w, quantized)


def test_groups_without_an_answer_do_not_disturb_a_sweep():
    w = np.random.default_rng(0).standard_normal((len(KINDS), 16)).astype(np.float32)
    clean = np.ravel(quantize_swept(w)["uniform4"].scale)
    w[1, 3], w[2, 0], w[4] = np.nan, -np.inf, 0
    scale = np.ravel(quantize_swept(w)["uniform4"].scale)
    np.testing.assert_array_equal(np.isnan(scale[:6]), np.isin(np.arange(6), [1, 2]))
    assert scale[4] == 0
    np.testing.assert_array_equal(scale[[0, 3, 5]], clean[[0, 3, 5]])


@pytest.mark.parametrize("axis", covering.some([0, 1, 2], [1]))
def test_blocks_along_every_axis(axis):
    w = np.random.default_rng(0).standard_t(2, (18, 18, 27)).astype(np.float32)
    qset = brx.ScaledLevels((-2, 0, 2), granularity=brx.PerBlock(9, axis))
    quantized = jax.jit(qset.quantize)(w)
    groups = np.moveaxis(w, axis, -1).reshape(-1, 9)
    scales = np.moveaxis(np.asarray(quantized.scale), axis, -1).ravel()
    for group, scale in zip(groups.astype(float), scales.astype(float), strict=True):
        least = oracles.optimum(group, qset.levels)[1]
        assert oracles.error(group, scale, qset.levels) <= least * (1 + 1e-6)


def test_groups_without_an_answer_keep_to_themselves():
    w = np.random.default_rng(0).standard_normal((20 * len(KINDS), 9)).astype(np.float32)
    clean = np.ravel(quantize(9, w).scale)
    w[1, 3], w[2, 0], w[4] = np.nan, -np.inf, 0
    scale = np.ravel(quantize(9, w).scale)
    np.testing.assert_array_equal(np.isnan(scale), np.isin(np.arange(len(w)), [1, 2]))
    assert scale[4] == 0
    np.testing.assert_array_equal(np.delete(scale, [1, 2, 4]), np.delete(clean, [1, 2, 4]))


def test_float64():
    with jax.enable_x64(True):
        w = np.random.default_rng(0).standard_t(2, (50, 16))
        qset = brx.Ternary(granularity=brx.PerBlock(16))
        scales = np.ravel(jax.jit(qset.quantize)(w).scale)
    assert scales.dtype == np.float64
    for group, scale in zip(w, scales, strict=True):
        np.testing.assert_allclose(scale, oracles.optimum(group, qset.levels)[0], rtol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.3, 1.0, 1e30, np.nan, np.inf])
def test_a_scale_is_kept_within_its_tolerance(scale):
    w = normal(0, 200, 16)
    fit = fit_or_keep(w, Fit(np.full((200, 1), scale, np.float32)))
    scales = np.ravel(fit.scale)
    excess: list[float] = []
    for group, s in zip(np.asarray(w, float), scales.astype(float), strict=True):
        least = oracles.optimum(group, KEPT.levels)[1]
        excess.append(oracles.error(group, s, KEPT.levels) / least - 1)
    assert max(excess) < 0.05 / 0.95
    if scale == 1.0:
        assert max(excess) > 1e-3  # else nothing was kept


def test_groups_along_several_axes():
    w = np.random.default_rng(0).laplace(size=(3, 3, 8, 10)).astype(np.float32)
    scales = jax.jit(brx.Ternary(granularity=brx.PerChannel((2, 3))).quantize)(w).scale
    for group, scale in zip(w.reshape(9, -1).T.astype(float), np.ravel(scales), strict=True):
        np.testing.assert_allclose(scale, oracles.optimum(group, (-1, 0, 1))[0], rtol=1e-5)
