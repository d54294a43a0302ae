"""Which weights share a scale: against a bookkeeping of the tests' own, without any arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from tests.helpers import oracles
from tests.helpers.training import ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

CASES = [
    (brx.PerTensor(), (), lambda shape: [((), ())]),
    (brx.PerTensor(), (5,), lambda shape: oracles.channel_groups(shape, ())),
    (brx.PerTensor(), (3, 3, 2, 4), lambda shape: oracles.channel_groups(shape, ())),
    (brx.PerTensor(), (0, 3), lambda shape: oracles.channel_groups(shape, ())),
    (brx.PerChannel(), (5,), lambda shape: oracles.channel_groups(shape, (0,))),
    (brx.PerChannel(), (3, 3, 2, 4), lambda shape: oracles.channel_groups(shape, (3,))),
    (brx.PerChannel(0), (6, 4), lambda shape: oracles.channel_groups(shape, (0,))),
    (brx.PerChannel((0, -1)), (2, 5, 3), lambda shape: oracles.channel_groups(shape, (0, 2))),
    (brx.PerChannel((-1, 0)), (2, 5, 3), lambda shape: oracles.channel_groups(shape, (0, 2))),
    (brx.PerChannel((0, 1)), (3, 2), lambda shape: oracles.channel_groups(shape, (0, 1))),
    (brx.PerChannel(()), (3, 2), lambda shape: oracles.channel_groups(shape, ())),
    (brx.PerChannel(), (0, 3), lambda shape: oracles.channel_groups(shape, (1,))),
    (brx.PerBlock(3), (6,), lambda shape: oracles.block_groups(shape, 3, 0)),
    (brx.PerBlock(2), (3, 4), lambda shape: oracles.block_groups(shape, 2, 1)),
    (brx.PerBlock(2, axis=0), (4, 3, 2), lambda shape: oracles.block_groups(shape, 2, 0)),
    (brx.PerBlock(3, axis=-2), (2, 6, 5), lambda shape: oracles.block_groups(shape, 3, 1)),
    (brx.PerBlock(6, axis=1), (2, 6, 5), lambda shape: oracles.block_groups(shape, 6, 1)),
    (brx.PerBlock(1, axis=1), (2, 3), lambda shape: oracles.block_groups(shape, 1, 1)),
    (brx.PerBlock(4), (3, 0), lambda shape: oracles.block_groups(shape, 4, 1)),
]


def names_of(cases):
    """Names that are the same in every process."""
    return [f"{granularity}-{shape}" for granularity, shape, _ in cases]


@pytest.mark.parametrize(("granularity", "shape", "expected"), CASES, ids=names_of(CASES))
def test_groups_hold_the_right_entries_at_the_right_scale(granularity, shape, expected):
    groups, expected = granularity.groups(shape), list(expected(shape))
    assert len(groups.scale) == len(shape), "a scale has the weight's rank"
    assert np.prod(groups.scale, dtype=int) == len(expected)
    number = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    scale_of = np.arange(len(expected)).reshape(groups.scale)
    spread = np.broadcast_to(scale_of.reshape(groups.scale_view), groups.view).reshape(shape)
    for entries, place in expected:
        inside = number[entries].ravel()
        assert inside.size == groups.size
        np.testing.assert_array_equal(np.flatnonzero(spread == scale_of[place]), np.sort(inside))


@pytest.mark.parametrize(("granularity", "shape", "expected"), CASES[::2], ids=names_of(CASES[::2]))
def test_dequantize_gives_each_entry_the_scale_of_its_group(granularity, shape, expected):
    groups = granularity.groups(shape)
    scale = np.arange(1.0, 1 + np.prod(groups.scale, dtype=int), dtype="f4").reshape(groups.scale)
    codes = np.ones(shape, np.int8)
    quantized = brx.Quantized(codes, scale, (0.0, 1.0), jnp.dtype(jnp.float32))
    weights = np.asarray(jax.jit(brx.Quantized.dequantize)(quantized))
    assert weights.shape == shape
    for entries, place in expected(shape):
        np.testing.assert_array_equal(weights[entries], scale[place])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (brx.PerChannel(()), brx.PerTensor()),
        (brx.PerChannel(1), brx.PerBlock(6, axis=0)),
        (brx.PerBlock(4, axis=1), brx.PerChannel(0)),
        (brx.PerChannel((0, 1)), brx.PerBlock(1)),
    ],
    ids=str,
)
def test_granularities_that_coincide(one, other):
    w = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    project = jax.jit(lambda w: [brx.Binary(granularity=kind).project(w) for kind in (one, other)])
    np.testing.assert_allclose(*project(w), rtol=1e-6)


def test_values_not_spellings():
    assert brx.PerChannel([0, 1]) == brx.PerChannel((np.int32(0), 1)) != brx.PerChannel((1, 0))
    assert brx.PerBlock(np.int64(8)) == brx.PerBlock(8, axis=-1)
    assert hash(brx.PerChannel([0, 1])) == hash(brx.PerChannel((0, 1)))
    assert len({brx.PerTensor(), brx.PerTensor(), brx.PerChannel(), brx.PerChannel(-1)}) == 2
    assert brx.PerTensor(["a", "b"]) == brx.PerTensor(("a", "b")) != brx.PerTensor("a")
    assert hash(brx.PerChannel(axis_name=["a"])) == hash(brx.PerChannel(axis_name=("a",)))


@pytest.mark.parametrize("granularity", [brx.PerTensor, brx.PerChannel])
def test_a_group_goes_on_over_a_mapped_axis(granularity):
    """Four parts under `vmap`, which names the axis that they lie along."""
    parts = np.random.default_rng(0).standard_t(2.5, (4, 6, 3)).astype(np.float32)
    builds = (brx.Binary, brx.Ternary, brx.TernaryThreshold)
    qsets = [build(granularity=granularity(axis_name="parts")) for build in builds]

    @jax.jit
    def mapped_and_whole(parts):
        def everything(w):
            return [(qset.quantize(w), brx.distance(w, qset)) for qset in qsets]

        # Where the name is not bound, the array is whole.
        return jax.vmap(everything, axis_name="parts")(parts), everything(parts.reshape(24, 3))

    found = jax.device_get(mapped_and_whole(parts))
    for (mapped, far), (whole, whole_far) in zip(*found, strict=True):
        np.testing.assert_array_equal(mapped.codes.reshape(24, 3), whole.codes)
        for part in range(4):
            np.testing.assert_allclose(mapped.scale[part], whole.scale, rtol=1e-6)
            np.testing.assert_allclose(far[part], whole_far, rtol=1e-6)


@pytest.mark.parametrize(
    ("granularity", "shape", "message"),
    [
        (brx.PerChannel(2), (6, 4), r"axis 2 .*out of range.*\(6, 4\).*from -2 to 1"),
        (brx.PerChannel(-3), (6, 4), r"axis -3 .*out of range.*\(6, 4\)"),
        (brx.PerChannel(), (), "axis -1 .*out of range.*scalar.*PerTensor"),
        (brx.PerChannel((0, -2)), (6, 4), r"\(0, -2\).*\(6, 4\) twice.*once"),
        (brx.PerBlock(2, axis=2), (6, 4), r"axis 2 .*out of range.*\(6, 4\)"),
        (brx.PerBlock(4, axis=0), (6, 4), r"size=4.*does not divide axis 0 .*\(6, 4\).*Choose"),
        (brx.PerBlock(8), (6, 4), r"size=8.*does not divide axis 1"),
        (brx.PerBlock(8), (), "out of range.*scalar"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused_on_use(granularity, shape, message):
    qset, w = brx.Ternary(granularity=granularity), ones(*shape)
    for operation in (qset.project, qset.quantize, lambda w: brx.relax(w, qset, 1.0)):
        with pytest.raises(ValueError, match=message):
            operation(w)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: brx.PerChannel(1.0), "axis must be an integer.*got 1.0"),
        (lambda: brx.PerChannel((0, "1")), "axis must be an integer.*got '1'"),
        (lambda: brx.PerChannel(None), "axis must be an integer.*got None"),
        (lambda: brx.PerChannel(True), "axis must be an integer.*got True"),
        (lambda: brx.PerTensor(0), "axis_name must be None, a name.*got 0"),
        (lambda: brx.PerTensor(("a", "a")), r"axis_name must be .*got \('a', 'a'\)"),
        (lambda: brx.PerChannel(0, 1.5), "axis_name must be .*got 1.5"),
        (lambda: brx.PerChannel(axis_name=("a", 0)), r"axis_name must be .*got \('a', 0\)"),
        (lambda: brx.Binary(granularity=64), r"granularity must be PerTensor\(\).*got 64"),
        (lambda: brx.Uniform(4, granularity=brx.PerChannel), "granularity must be .*class"),
        (lambda: brx.PerBlock(0), "size must be a positive.*got 0"),
        (lambda: brx.PerBlock(-4), "size must be a positive.*got -4"),
        (lambda: brx.PerBlock(64.0), "size must be an integer.*got 64.0"),
        (lambda: brx.PerBlock(4, axis=(0, 1)), r"axis must be an integer.*got \(0, 1\)"),
    ],
)
def test_arguments_that_make_no_granularity(build, message):
    with pytest.raises(ValueError, match=message):
        build()
