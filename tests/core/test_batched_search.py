"""Both kinds of search, on arrays that share a loop: each finds the optimum of each group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import brelax_jax as brx
from brelax_jax.sets import Fit, Group, _in_turn, _joined, _rows
from brelax_jax.sets._fit import fit_all
from brelax_jax.sets._rows import joined_rows
from brelax_jax.sets._rules import mean_at_once
from brelax_jax.sets._together import MANY
from brelax_jax.sets._weights import Weights
from tests.helpers import covering, oracles, searching
from tests.helpers.training import normal, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

every_kind = pytest.mark.parametrize("kind", searching.KINDS)
LEAVES = [(7, 3, 20), (300,), (64, 5), (1, 1), (11, 13)]
ROWS = Group((1,))


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    leaves = [rng.standard_t(2, shape).astype(np.float32) for shape in LEAVES]
    leaves[1] *= 1e30
    leaves[2] *= 1e-30
    return leaves


def blank(sets, leaves):
    """The fits before the first ones."""
    pairs = zip(sets, leaves, strict=True)
    shapes = (qset.granularity.groups(w.shape).scale for qset, w in pairs)
    return [Fit(np.zeros(shape, np.float32)) for shape in shapes]


def assert_optimal(qset, w, scale, tolerance=1e-6):
    groups = qset.granularity.groups(w.shape)
    axes = tuple(a for a in range(len(groups.view)) if a not in groups.axes)
    rows = np.transpose(w.astype(float).reshape(groups.view), (*axes, *groups.axes))
    scale = np.ravel(scale)
    for row, s in zip(rows.reshape(len(scale), -1), scale.astype(float), strict=True):
        unit = np.max(np.abs(row)) or 1
        least = oracles.optimum(row / unit, qset.levels)[1]
        error = oracles.error(row / unit, s / unit, qset.levels)
        assert error <= least * (1 + tolerance) + 1e-12 * np.sum((row / unit) ** 2)


@pytest.mark.parametrize(
    ("qset", "kind"),
    [
        (brx.Ternary(), "in turn"),
        (brx.Ternary(), "together"),
        pytest.param(brx.PowerOfTwo(5), "in turn", marks=pytest.mark.soak),
        pytest.param(brx.PowerOfTwo(5), "together", marks=pytest.mark.soak),
        (brx.ScaledLevels((-1000, -10, -1, 1, 10, 1000)), "together"),
        (brx.Uniform(4, granularity=brx.PerChannel()), "together"),
    ],
    ids=repr,
)
def test_every_group_of_every_array_gets_the_best_scale(qset, kind):
    leaves = drawn()
    with searching.forced(searching.KINDS[kind]):
        fits = fit_all([qset] * len(leaves), leaves, [None] * len(leaves))
    for w, fit in zip(leaves, fits, strict=True):
        assert_optimal(qset, w, fit.scale)


@every_kind
def test_arrays_of_other_sets_and_dtypes_share_a_program(kind):
    leaves = [*drawn(), drawn(1)[0].astype(jnp.bfloat16), np.zeros((0, 3), np.float32)]
    sets = [
        brx.Ternary(),
        brx.Uniform(3),
        brx.Ternary(granularity=brx.PerChannel()),
        brx.Binary(),
        brx.TernaryThreshold(),
        brx.Ternary(),
        brx.Ternary(),
    ]
    with searching.forced(searching.KINDS[kind]):
        fits = fit_all(sets, leaves, [None] * len(sets))
    for i in (0, 1, 2, 3, 5):
        assert_optimal(sets[i], np.asarray(leaves[i], np.float32), fits[i].scale)
    assert fits[6].scale.tolist() == [[0]]


@every_kind
def test_arrays_without_an_answer_do_not_disturb_the_others(kind):
    clean, spoilt = drawn(), drawn()
    spoilt[0][0, 0, 0], spoilt[3][:] = np.nan, 0
    spoilt[4][:] = -np.inf
    with searching.forced(searching.KINDS[kind]):
        wanted, found = (
            fit_all([brx.Uniform(4)] * len(LEAVES), leaves, [None] * len(LEAVES))
            for leaves in (clean, spoilt)
        )
    scales = [fit.scale.item() for fit in found]
    assert np.isnan(scales[0])
    assert np.isnan(scales[4])
    assert scales[3] == 0
    for i in (1, 2):
        assert scales[i] == wanted[i].scale.item()


# In turn: below, and in test_tolerance.
@pytest.mark.parametrize("kind", covering.some(searching.KINDS, ["together"]))
def test_a_kept_scale_stays_within_its_tolerance(kind):
    qset = brx.Ternary(rule=brx.LeastSquares(0.01))
    rng, leaves = np.random.default_rng(0), drawn()
    with searching.forced(searching.KINDS[kind]):
        fits = fit_all([qset] * len(leaves), leaves, blank([qset] * len(leaves), leaves))
        for _ in range(5):
            leaves = [w * (1 + 0.05 * rng.standard_normal(w.shape)).astype("f4") for w in leaves]
            fits = fit_all([qset] * len(leaves), leaves, fits)
            for w, fit in zip(leaves, fits, strict=True):
                assert_optimal(qset, w, fit.scale, 0.01 + 2e-6)


SMALL_GROUPS = [
    brx.Ternary(granularity=brx.PerBlock(16, 0)),
    brx.Ternary(granularity=brx.PerBlock(9, 0)),
    brx.Uniform(4, granularity=brx.PerBlock(16, 0)),
    brx.Uniform(4, granularity=brx.PerBlock(48, 0)),
    brx.Uniform(4, granularity=brx.PerBlock(16, 0), rule=brx.LeastSquares(0.05)),
]


# In turn: test_small_groups.
@pytest.mark.parametrize(
    "kind", covering.some(searching.KINDS_OF_SMALL_GROUPS, ["together", "where they lie"])
)
def test_small_groups_of_several_arrays(kind, monkeypatch):
    """On GPUs those of one size are searched side by side, up to so many weights."""
    monkeypatch.setattr(_rows, "MOST_WEIGHTS", 2000)
    rng, sets = np.random.default_rng(0), [*SMALL_GROUPS, *SMALL_GROUPS]
    leaves = [rng.standard_t(3, (144, 2)).astype("f4") for _ in SMALL_GROUPS]
    leaves += [rng.standard_t(3, (144, 1, 3)).astype("f4") for _ in SMALL_GROUPS]
    fits = blank(sets, leaves)
    for _ in range(2):
        with searching.forced(searching.KINDS_OF_SMALL_GROUPS[kind]):
            fits = fit_all(sets, leaves, fits)
        for qset, w, fit in zip(sets, leaves, fits, strict=True):
            assert_optimal(qset, w, fit.scale, max(qset.rule.tolerance / 0.95, 2e-6))
        leaves = [w * (1 + 0.05 * rng.standard_normal(w.shape)).astype("f4") for w in leaves]
    spoilt = [w.copy() for w in leaves]
    spoilt[2][3, 1] = np.nan
    with searching.forced(searching.KINDS_OF_SMALL_GROUPS[kind]):
        clean, found = (fit_all(sets, each, fits) for each in (leaves, spoilt))
    for i, (one, other) in enumerate(zip(clean, found, strict=True)):
        is_spoilt = np.isnan(other.scale)
        assert is_spoilt.sum() == (i == 2)
        np.testing.assert_array_equal(np.where(is_spoilt, one.scale, other.scale), one.scale)


def test_rows_that_lie_side_by_side(monkeypatch):
    """Those of one size and one tolerance, up to so many weights."""
    shapes = [(9, 4), (9, 2, 3), (16, 5), (9, 7)]
    weights = [Weights(ones(*shape), Group((0,))) for shape in shapes]
    weights[3] = weights[3]._replace(tolerance=0.1)
    parts = joined_rows(weights)
    assert [part.members for part in parts] == [[0, 1], [2], [3]]
    assert [part.weights.w.shape for part in parts] == [(9, 10), (16, 5), (9, 7)]
    one, other = parts[0].split(np.arange(10.0)[None])
    np.testing.assert_array_equal(one, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(other, [[[4, 5, 6], [7, 8, 9]]])
    monkeypatch.setattr(_rows, "MOST_WEIGHTS", 80)
    assert [part.members for part in joined_rows(weights)] == [[0], [1], [2], [3]]


def test_arrays_whose_sizes_have_only_names():
    """A program can be exported for all sizes."""
    (blocks,) = jax.export.symbolic_shape("blocks")
    arrays = [jax.ShapeDtypeStruct((blocks, 16), "float32")] * 2
    qset = brx.Ternary(granularity=brx.PerBlock(8))
    scales = jax.jit(lambda *each: [fit.scale for fit in fit_all([qset] * 2, each)])
    scales = jax.export.export(scales, platforms=["cpu", "cuda", "tpu"])(*arrays).call
    w = normal(0, 3, 16)
    np.testing.assert_array_equal(scales(w, w)[1], qset.quantize(w).scale)


def test_arrays_that_share_a_loop_get_the_scales_that_they_get_alone(monkeypatch):
    """On CPU. Here two share it, and one is left over."""
    monkeypatch.setattr(_in_turn, "MOST_ARRAYS", 2)
    rule = brx.LeastSquares(0.01)
    qset = brx.Ternary(granularity=brx.PerChannel(), rule=rule, scale_dtype="float16")
    rng = np.random.default_rng(0)
    leaves = [rng.standard_t(3, shape).astype("f4") for shape in [(90, 40), (3, 40, 40), (90, 40)]]
    fits = alone = blank([qset] * 3, leaves)
    for _ in range(2):
        with searching.forced(searching.KINDS["in turn"]):
            fits = fit_all([qset] * 3, leaves, fits)
            alone = [qset.fit(w, fit) for w, fit in zip(leaves, alone, strict=True)]
        for one, other in zip(fits, alone, strict=True):
            np.testing.assert_array_equal(one.scale, other.scale)
        leaves = [w * (1 + 0.05 * rng.standard_normal(w.shape)).astype("f4") for w in leaves]


def test_a_loop_on_cpu_holds_few_arrays_and_few_weights(monkeypatch):
    monkeypatch.setattr(_in_turn, "MOST_ARRAYS", 2)
    monkeypatch.setattr(_in_turn, "MOST_WEIGHTS", 100)
    arrays = [Weights(np.zeros(size), Group((0,))) for size in (30, 30, 30, 60, 80, 200)]
    assert _in_turn._loops(arrays) == [[0, 1], [2, 3], [4], [5]]


def test_the_explicit_mode_on_one_device():
    mesh = jax.make_mesh((1,), ("model",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P(None, "model"))
        leaves = [jax.device_put(np.sin(np.arange(32.0)).reshape(8, 4), sharding)] * 2
        channel, block = brx.PerChannel(), brx.PerBlock(4, 0)
        qsets = [brx.Ternary(granularity=channel)] * 2 + [brx.Uniform(3, granularity=block)] * 2
        for fit in fit_all(qsets, leaves * 2):
            assert jax.typeof(fit.scale).sharding.spec[-1] == "model"


def test_forgotten_intervals_are_searched_again():
    """With few intervals to remember the certificate holds, after more rounds."""
    a = np.abs(np.random.default_rng(0).standard_normal((4, 3000))).astype(np.float32)
    a /= np.max(a, axis=1, keepdims=True)
    magnitudes = tuple(map(float, range(32)))
    shapes = MANY, MANY._replace(intervals=3), MANY._replace(intervals=200)
    ends = jax.jit(lambda a: [searching.together(a, magnitudes, ROWS, each) for each in shapes])(a)
    ends = jax.device_get(ends)
    for end in ends:
        assert np.all(end.left[0, 0] == end.end[0])
        np.testing.assert_allclose(end.best[1], ends[0].best[1], rtol=2e-6)
    assert ends[1].rounds > ends[2].rounds


@pytest.mark.parametrize(
    ("bits", "most"), [pytest.param(2, 5, marks=pytest.mark.soak), (4, 7), (8, 60)]
)
def test_few_rounds_suffice_for_many_scales_at_a_time(bits, most):
    rng = np.random.default_rng(0)
    w = np.abs(np.stack([rng.standard_normal(5000), rng.laplace(size=5000)])).astype(np.float32)
    a = w / np.max(w, axis=1, keepdims=True)
    end = jax.device_get(jax.jit(lambda a: searching.together(a, range(2 ** (bits - 1)), ROWS))(a))
    assert end.rounds <= most
    assert np.all(end.left[0, 0] == end.end[0])


def test_a_mean_at_once_is_that_of_other_passes():
    w = np.stack([np.full(1000, -1e37), np.linspace(0, 1, 1000), np.full(1000, 3.4e38)])
    w = np.stack([*w, np.full(1000, 2e-38), w[1], w[1]]).astype(np.float32)
    w[4, 7], w[5, 7] = np.inf, np.nan
    mean = np.asarray(jax.jit(lambda w: mean_at_once(ROWS, w))(w))[:, 0]
    np.testing.assert_allclose(mean, [1e37, 0.5, 3.4e38, 2e-38, np.inf, np.nan], rtol=1e-5)


def test_numbers_computed_together_are_those_of_each_array():
    def function(setting, x, *rest):
        return jnp.round(x * setting) + sum(rest)

    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 4), (1, 1), (2, 1, 3), (1, 5000), (1, 1)]
    settings = [3, 3, 3, 3, 3, 7]
    numbers = [[rng.standard_normal(shape).astype(np.float32)] * 2 for shape in shapes]
    numbers[-1].pop()
    found, wanted = (
        jax.jit(lambda numbers, compute=compute: compute(function, settings, numbers))(numbers)
        for compute in (_joined.compute_together, _joined.compute_in_turn)
    )
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
