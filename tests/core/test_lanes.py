"""Blocks along the last axis, as TPUs take them: the same numbers in another order of memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from brelax_jax.sets import _fit
from brelax_jax.sets._fit import fit_all
from brelax_jax.sets._lanes import laid_back, repeated, repeated_in_tiles, upright
from tests.core.test_batched_search import assert_optimal
from tests.helpers import searching
from tests.helpers.training import normal

pytestmark = pytest.mark.usefixtures("quickly_compiled")


@pytest.mark.parametrize(
    ("shape", "size"),
    [((8, 8), 16), ((16, 12), 32), ((2, 8, 2), 64), ((24, 3), 128), ((3, 2, 8, 5), 256)],
)
def test_numbers_are_repeated_tile_by_tile(shape, size):
    numbers = normal(0, *shape).at[..., 1].set(jnp.nan)
    wanted = np.repeat(numbers, size, axis=-1)
    np.testing.assert_array_equal(repeated_in_tiles(size, numbers), wanted)
    np.testing.assert_array_equal(repeated(numbers, size), wanted)


@pytest.mark.parametrize("shape", [(8, 4, 32), (3, 4, 32), (2, 8, 2, 64), (5, 3), (1, 1)])
def test_blocks_that_are_put_upright_are_laid_back(shape):
    view = normal(0, *shape)
    blocks, entries = shape[-2:]
    moved = upright(view)
    np.testing.assert_array_equal(
        moved, np.moveaxis(np.reshape(view, (-1, blocks, entries)), 0, -1)
    )
    numbers = (*shape[:-1], 1)
    largest = laid_back(moved.max(1, keepdims=True), numbers)
    np.testing.assert_array_equal(largest, view.max(-1, keepdims=True))


RULES = [
    brx.LeastSquares(),
    brx.MeanMagnitude(1.4),
    brx.MeanMagnitude(0.5, refit=False),
    brx.MaxMagnitude(),
    brx.Fixed(0.3),
]


def test_scales_by_a_rule_are_those_of_other_platforms():
    """Sums are in another order."""
    sets = [brx.Binary(granularity=brx.PerBlock(32), rule=rule) for rule in RULES[:1]]
    sets += [brx.Uniform(3, granularity=brx.PerBlock(32), rule=rule) for rule in RULES[1:]]
    leaves = [normal(i, 8, 128).at[0, 0].set(jnp.nan) for i in range(len(sets))]
    found = []
    for platform in ("gpu", "tpu"):
        with searching.forced(platform):
            found.append(fit_all(sets, leaves))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-6), *found)


@pytest.mark.parametrize(
    ("granularity", "shape"),
    [(brx.PerChannel(0), (8, 128)), (brx.PerChannel((0, 1)), (3, 8, 64)), (brx.PerBlock(4), (8,))],
)
def test_only_blocks_of_matrices_are_put_upright(granularity, shape, monkeypatch):
    """Else nothing is in other tiles, or the copy would have a last axis of one entry."""
    monkeypatch.setattr(_fit, "upright", None)
    w = normal(5, *shape)
    with searching.forced("tpu"):
        [fit] = fit_all([brx.Binary(granularity=granularity)], [w])
    groups = granularity.groups(shape)
    mean = np.abs(w).reshape(groups.view).mean(groups.axes).reshape(groups.scale)
    np.testing.assert_allclose(fit.scale, mean, rtol=1e-6)


def test_scales_that_are_searched_for_are_the_best():
    sets = [brx.Ternary(granularity=brx.PerBlock(16)), brx.Uniform(4, granularity=brx.PerBlock(32))]
    leaves = [np.asarray(normal(i, 8, 128)) for i in range(2)]
    with searching.forced("tpu"):
        fits = fit_all(sets, leaves)
    for qset, w, fit in zip(sets, leaves, fits, strict=True):
        assert_optimal(qset, w, fit.scale, 2e-6)


def test_a_program_for_tpus_has_both_ways():
    """It is not run here: but a block whose entries lie side by side is lowered by other steps."""
    qset = brx.Ternary(granularity=brx.PerBlock(32))
    lowered = {
        platform: jax.jit(qset.project)
        .trace(jnp.zeros((8, 128)))
        .lower(lowering_platforms=(platform,))
        .as_text()
        for platform in ("cpu", "tpu")
    }
    assert "optimization_barrier" in lowered["tpu"]
    assert "iota" in lowered["tpu"]
    assert "iota" not in lowered["cpu"]
