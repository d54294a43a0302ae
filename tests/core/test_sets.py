"""The sets: against slow references, by the conditions of optimality, and by what different sets
share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from tests.helpers import covering, oracles
from tests.helpers.training import array

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SHAPE = (8, 2, 16)  # one shape for most tests, so that each set and granularity compiles once

GRANULARITIES = {
    "tensor": (brx.PerTensor(), lambda shape: oracles.channel_groups(shape, ())),
    "channel": (brx.PerChannel(), lambda shape: oracles.channel_groups(shape, (-1,))),
    "block": (brx.PerBlock(4, axis=0), lambda shape: oracles.block_groups(shape, 4, 0)),
}

SETS = {
    "binary": brx.Binary(),
    "ternary": brx.Ternary(),
    "threshold": brx.TernaryThreshold(),
    "uniform8": brx.Uniform(8),
    "powers": brx.PowerOfTwo(4),
    "two-bit": brx.ScaledLevels((-3, -1, 1, 3)),
}

# Of whole tensors other tests of the searches have the others.
IN_SUITE = {
    "tensor": ("binary", "ternary", "threshold", "two-bit"),
    "channel": tuple(SETS),
    "block": tuple(SETS),
}

every_set = pytest.mark.parametrize("name", SETS)

# How far the squared error may lie above the least one: relative to it, and relative to Σw². The
# second is float32's rounding, but for 8 bits, whose search ends before it has looked at every
# basin of E.
EXCESS = 1e-6, 1e-11  # of the least error, of the sum of squares


def both(qset, w):
    return qset.project(w), qset.quantize(w)


def with_granularity(name, granularity):
    return dataclasses.replace(SETS[name], granularity=GRANULARITIES[granularity][0])


# One program for many sets: what their searches have in common compiles once.
project_and_quantize = jax.jit(lambda qsets, w: [both(q, w) for q in qsets], static_argnums=0)
dequantize = jax.jit(lambda quantized: [q.dequantize() for q in quantized])
RESULTS = {}


def results(qsets, w):
    """(projection, quantized, dequantized) for each set, as NumPy arrays, computed once."""
    w = np.asarray(w)
    key = qsets, w.dtype, w.shape, w.tobytes()
    if key not in RESULTS:
        projections, quantized = zip(*project_and_quantize(qsets, w), strict=True)
        found = zip(projections, quantized, dequantize(quantized), strict=True)
        RESULTS[key] = jax.tree.map(np.asarray, [*found])
    return RESULTS[key]


def case(name, granularity="channel"):
    """What `results` gives for the set, and its groups by the oracle's own bookkeeping."""
    qsets = together(granularity, name in IN_SUITE[granularity])
    place = qsets.index(with_granularity(name, granularity))
    return lambda w: results(qsets, w)[place], GRANULARITIES[granularity][1]


def together(granularity, in_suite=True):
    """The sets of one program; per tensor, the last is another spelling of the ternary set."""
    names = [name for name in SETS if (name in IN_SUITE[granularity]) == in_suite]
    qsets = tuple(with_granularity(name, granularity) for name in names)
    return (*qsets, brx.PowerOfTwo(2)) if granularity == "tensor" else qsets


def data(seed=0, shape=SHAPE):
    """Arrays of every kind that has tripped a search for the scale."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal(shape)
    outlier = normal.copy()
    outlier.flat[-1] = 1e4
    clusters = np.where(rng.random(shape) < 0.9, 1, 100) * (1 + 0.1 * normal)
    arrays = {
        "normal": normal,
        "laplace": rng.laplace(size=shape),
        "student 2.5": rng.standard_t(2.5, shape),
        "student 1.5": rng.standard_t(1.5, shape),
        "outlier": outlier,
        "clusters": clusters,
        "sparse": normal * (rng.random(shape) < 0.05),
        "integers": rng.integers(-3, 4, shape),
        "constant": np.full(shape, -0.1),
        "zeros": np.zeros(shape),
        "huge": 1e38 * np.clip(normal, -3, 3),
        "small": 1e-35 * normal,
        "mixed": normal * np.logspace(-30, 30, shape[-1]),
    }
    return {kind: flushed(np.asarray(w, np.float32)) for kind, w in arrays.items()}


def flushed(w):
    """w without subnormal numbers, which XLA takes for zeros."""
    return np.where(np.abs(w) < np.finfo(np.float32).tiny, w.dtype.type(0), w)


def unit_points(quantized):
    """q, the points at scale 1, in float64."""
    codes = np.asarray(quantized.codes, int)
    return np.where(codes < 0, -1, 1) * np.asarray(quantized.magnitudes)[np.abs(codes)]


@pytest.mark.parametrize(
    ("granularity", "name"),
    [
        pytest.param(granularity, name, marks=[] if name in names else pytest.mark.soak)
        for granularity, names in IN_SUITE.items()
        for name in SETS
    ],
)
def test_every_group_against_its_oracle(name, granularity):
    placed, groups = case(name, granularity)
    levels, (relative, absolute) = SETS[name].levels, EXCESS
    for kind, w in data().items():
        projection, quantized, dequantized = placed(w)
        assert projection.shape == w.shape
        assert projection.dtype == w.dtype
        np.testing.assert_array_equal(projection, dequantized, err_msg=kind)
        q, scales = unit_points(quantized), np.asarray(quantized.scale, np.float64)
        assert set(np.unique(q)) <= set(levels)
        for entries, place in groups(w.shape):
            group, codes, scale = (
                w[entries].ravel().astype(float),
                q[entries].ravel(),
                scales[place],
            )
            where = f"{kind}, group {place}: scale {scale}"
            if name == "threshold":
                expected, expected_scale, cut = oracles.ternary_threshold(group, 0.7)
                clear = np.abs(np.abs(group) - cut) > 1e-5 * cut
                assert (codes == expected)[clear].all(), where
                if clear.all():
                    assert abs(scale - expected_scale) <= 1e-5 * expected_scale, where
                continue
            error = np.sum((group - scale * codes) ** 2)
            energy = np.sum(group**2)
            least = oracles.optimum(group, levels)[1]
            assert error <= least * (1 + relative) + absolute * energy, where
            # Every entry is at its nearest level, and the scale is the best one for these codes.
            nearest = oracles.error(group, scale, levels)
            assert error <= nearest * (1 + 1e-5) + 1e-12 * energy, where
            if codes @ group > 0:
                best = (codes @ group) / (codes @ codes)
                assert abs(scale - best) <= 1e-5 * best, where


def test_binary_and_ternary_down_to_the_smallest_normal_numbers():
    w = flushed(data()["normal"] * np.float32(1e-37))
    for name, oracle in {"binary": oracles.binary, "ternary": oracles.ternary}.items():
        placed, groups = case(name)
        scale = np.asarray(placed(w)[1].scale, np.float64)
        for entries, place in groups(w.shape):
            np.testing.assert_allclose(scale[place], oracle(w[entries].ravel())[0], rtol=1e-5)


@pytest.mark.parametrize("name", SETS)
def test_a_constant_near_the_largest_number(name):
    w = np.full(SHAPE, 1e38, np.float32)
    np.testing.assert_allclose(case(name)[0](w)[0], w, rtol=1e-6)


def test_ternary_where_alternating_minimization_fails():
    """One group of heavy-tailed weights: from the customary starts the error ends far above the
    least."""
    w = np.random.default_rng(0).standard_t(1.5, 36_864).astype(np.float32)
    quantized = jax.jit(brx.Ternary().quantize)(w)
    error = np.sum((w - float(quantized.scale[0]) * unit_points(quantized)) ** 2)
    assert error <= oracles.ternary(w)[1] * (1 + 1e-6)


# What the sets share


def test_four_spellings_of_the_ternary_set():
    sets = [brx.Ternary(), brx.Uniform(2), brx.PowerOfTwo(2), brx.ScaledLevels((-1, 0, 1))]
    assert {qset.levels for qset in sets} == {(-1.0, 0.0, 1.0)}
    w = data()["student 1.5"]
    found = results(together("tensor"), w)
    ternary, power = (found[together("tensor").index(qset)][0] for qset in sets[::2])
    np.testing.assert_array_equal(ternary, power)


def test_binary_and_its_levels_differ_in_nothing():
    w = data()["laplace"]
    by_levels = jax.jit(brx.ScaledLevels((-2, 2)).project)(w)  # any one magnitude is the same set
    np.testing.assert_allclose(by_levels, case("binary", "tensor")[0](w)[0], rtol=1e-6)


@every_set
@pytest.mark.parametrize("kind", ["normal", "student 1.5", "integers"])
def test_symmetries(name, kind):
    placed, _ = case(name)
    w = data()[kind]
    projection, quantized, _ = placed(w)
    # A power of two passes through the arithmetic unchanged.
    for factor in (2.0**20, 2.0**-20):
        np.testing.assert_array_equal(
            placed(w * np.float32(factor))[0], np.float32(factor) * projection
        )
    # Signs: only a zero, which Binary and its like send to the least positive level, has no mirror
    # image.
    negative = placed(-w)[0]
    np.testing.assert_array_equal(np.where(w == 0, projection, -negative), projection)
    # The order of a group's entries changes nothing but rounding.
    flipped, flipped_codes, _ = placed(w[::-1, ::-1])
    if name != "uniform8":  # its search may end in another basin
        np.testing.assert_allclose(flipped[::-1, ::-1], projection, rtol=1e-5)
        if kind != "integers":  # their codes may all be even: half the codes, twice the scale
            np.testing.assert_allclose(flipped_codes.scale, quantized.scale, rtol=1e-5)
    # A point on the set stays where it is.
    np.testing.assert_allclose(placed(projection)[0], projection, rtol=2e-6)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_zero_projects_to_the_least_magnitude_and_plus(zero):
    w = np.resize(np.array([zero, -3, 3, -1], np.float32), SHAPE)
    points = {
        "binary": [1.75, -1.75, 1.75, -1.75],
        "two-bit": [0.95, -2.85, 2.85, -0.95],
        "threshold": [0, -3, 3, 0],
    }
    for name, expected in points.items():
        projection = case(name, "tensor")[0](w)[0]
        np.testing.assert_allclose(projection, np.resize(expected, SHAPE), rtol=1e-6)
        assert not np.signbit(projection[..., ::4]).any()


@pytest.mark.parametrize("name", ["binary", "threshold", "ternary"])
def test_a_scalar_is_its_own_projection(name):
    names = ["binary", "threshold", "ternary"]
    found = results(tuple(SETS[other] for other in names), np.float32(-2.5))
    projection, scalar, dequantized = found[names.index(name)]
    assert projection.shape == scalar.codes.shape == scalar.scale.shape == ()
    assert float(dequantized) == float(projection) == -2.5


@pytest.mark.parametrize("size", [1e-30, 0.037, 1e30])
@pytest.mark.parametrize("shape", [(60, 5), (2500, 100)], ids=["few", "many"])
def test_points_are_their_own_projection_bit_for_bit(shape, size):
    """Of sets whose scale is a mean, too: that of many equal floats is seldom what they are."""
    w = np.random.default_rng(6).standard_normal(shape).astype(np.float32) * np.float32(size)
    granularities = brx.PerTensor(), brx.PerChannel()
    qsets = [
        each(granularity=g) for each in (brx.Binary, brx.TernaryThreshold) for g in granularities
    ]

    @jax.jit
    def projections(arrays):
        return [qset.project(each) for qset, each in zip(qsets, arrays, strict=True)]

    points = projections([w] * len(qsets))
    for again, point in zip(projections(points), points, strict=True):
        np.testing.assert_array_equal(again, point)


def test_a_block_of_one_is_its_own_projection():
    w, names = data()["student 1.5"][0], ("binary", "threshold", "powers")
    qsets = [dataclasses.replace(SETS[name], granularity=brx.PerBlock(1)) for name in names]
    for name, (projection, *_) in zip(names, results(tuple(qsets), w), strict=True):
        np.testing.assert_allclose(projection, w, rtol=1e-6, err_msg=name)


# NaN, infinity, nothing at all


@every_set
def test_nan_and_infinity_stay_in_their_group(name):
    placed, _ = case(name)
    w = data()["normal"]
    clean, spoiled = placed(w)[0], w.copy()
    spoiled[2, 1, 3], spoiled[0, 0, 5], spoiled[7, 0, 9] = np.nan, np.inf, -np.inf
    projection, _, dequantized = placed(spoiled)
    kept = np.delete(np.arange(SHAPE[-1]), [3, 5, 9])
    assert np.isnan(projection[..., [3, 5, 9]]).all()
    np.testing.assert_allclose(projection[..., kept], clean[..., kept], rtol=1e-6)
    np.testing.assert_array_equal(dequantized, projection)


@pytest.mark.parametrize(
    ("granularity", "shape"), covering.pairs(GRANULARITIES, [(8, 0), (0, 2, 16)])
)
def test_empty_arrays_pass_through(granularity, shape):
    for name in IN_SUITE[granularity]:
        placed, groups = case(name, granularity)
        projection, quantized, dequantized = placed(np.zeros(shape, np.float32))
        assert projection.shape == quantized.codes.shape == dequantized.shape == shape
        assert quantized.scale.size == len(list(groups(shape)))
        assert not np.isnan(quantized.scale).any()


# dtypes and transformations


IN_16_BITS = (("binary", "bfloat16"), ("ternary", "float16"), ("threshold", "bfloat16"))
ALSO_IN_16_BITS = (
    *(("binary", "float16"), ("ternary", "bfloat16"), ("threshold", "float16")),
    ("powers", "bfloat16"),
)


@functools.partial(jax.jit, static_argnums=0)
def in_16_bits(cases, arrays):
    return [both(with_granularity(name, "channel"), arrays[dtype]) for name, dtype in cases]


@functools.cache
def results_in_16_bits(cases, kind):
    arrays = {dtype: array(data()[kind], dtype) for dtype in ("bfloat16", "float16")}
    projections, quantized = zip(*in_16_bits(cases, arrays), strict=True)
    return arrays, [*zip(projections, quantized, dequantize(quantized), strict=True)]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*IN_16_BITS, *(pytest.param(*case, marks=pytest.mark.soak) for case in ALSO_IN_16_BITS)],
)
def test_16_bit_weights_have_scales_of_32_bits(name, dtype):
    _, groups = case(name)
    cases = IN_16_BITS if (name, dtype) in IN_16_BITS else ALSO_IN_16_BITS
    for kind in ("normal", "student 1.5", "integers", "zeros"):
        arrays, found = results_in_16_bits(cases, kind)
        w, (projection, quantized, dequantized) = arrays[dtype], found[cases.index((name, dtype))]
        assert projection.dtype == dequantized.dtype == quantized.dtype == w.dtype
        assert quantized.scale.dtype == jnp.float32
        np.testing.assert_array_equal(projection, dequantized)
        exact, q = np.asarray(w, np.float64), unit_points(quantized)
        for entries, place in groups(w.shape):
            group, points = (
                exact[entries].ravel(),
                float(quantized.scale[place]) * q[entries].ravel(),
            )
            error = np.sum((group - points) ** 2)
            if name == "threshold":
                codes, scale, _ = oracles.ternary_threshold(group, 0.7)
                np.testing.assert_allclose(points, scale * codes, rtol=1e-5)
            else:
                least = oracles.optimum(group, SETS[name].levels)[1]
                assert error <= least * (1 + 1e-6) + 1e-11 * np.sum(group**2), (kind, place)


FORMULAS_AND_A_SEARCH = ("binary", "ternary", "threshold")
# The ternary search compiles once: for its scales and for its derivative.
DERIVATIVES_OF = {"binary": "tensor", "ternary": "channel", "threshold": "block"}


@jax.jit
def in_float64(w, tangent):
    """project, quantize, and the projection's derivative from both sides, of three sets."""
    found = {}
    for name, granularity in DERIVATIVES_OF.items():
        project = with_granularity(name, granularity).project
        moved, along = jax.linearize(project, w)
        derivative, [transposed] = along(tangent), jax.linear_transpose(along, w)(tangent)
        found[name] = both(with_granularity(name, "channel"), w), moved, derivative, transposed
    return found


@pytest.mark.parametrize("name", FORMULAS_AND_A_SEARCH)
def test_float64_is_computed_in_float64(name):
    w = np.random.default_rng(0).standard_t(2.5, SHAPE)
    with jax.enable_x64(True):
        (projection, quantized), *_ = in_float64(w, w)[name]
        dtypes = [x.dtype for x in (projection, quantized.scale, *dequantize([quantized]))]
    assert dtypes == [jnp.float64] * 3
    for entries, place in GRANULARITIES["channel"][1](SHAPE):
        group = w[entries].ravel()
        q = unit_points(quantized)[entries].ravel()
        best = (q @ group) / (q @ q)  # to a precision that float32 does not have
        np.testing.assert_allclose(quantized.scale[place], best, rtol=1e-12)
        if name != "threshold":
            error = np.sum((group - best * q) ** 2)
            assert error <= oracles.optimum(group, SETS[name].levels)[1] * (1 + 1e-6)


@functools.cache
def quantized_in_a_vmapped_scan():
    """Four arrays, and how each of three sets quantizes them, in pairs."""
    stack = np.stack([*data().values()][:4])
    stack[1, 0, 0, 0] = np.nan  # a neighbour's NaN is not catching
    qsets = {name: with_granularity(name, "channel") for name in FORMULAS_AND_A_SEARCH}

    @jax.jit
    def scanned(stack):
        def step(carry, pair):
            return carry, {name: jax.vmap(qset.quantize)(pair) for name, qset in qsets.items()}

        return jax.lax.scan(step, (), stack)[1]

    return stack, scanned(stack.reshape(2, 2, *SHAPE))


@pytest.mark.parametrize("name", FORMULAS_AND_A_SEARCH)
def test_vmap_in_scan_is_one_array_after_the_other(name):
    placed, _ = case(name)
    stack, quantized = quantized_in_a_vmapped_scan()
    for i, w in enumerate(stack):
        one = jax.tree.map(lambda x, i=i: np.asarray(x)[i // 2, i % 2], quantized[name])
        np.testing.assert_allclose(dequantize([one])[0], placed(w)[0], rtol=1e-6)


@pytest.mark.parametrize("name", ["binary", "threshold"])
def test_outside_jit_as_inside(name):
    w = data()["student 2.5"]
    placed, _ = case(name)
    projection, quantized = both(with_granularity(name, "channel"), w)
    np.testing.assert_array_equal(projection, quantized.dequantize())
    np.testing.assert_allclose(projection, placed(w)[0], rtol=1e-6)


@every_set
def test_quantized_is_a_pytree_of_codes_and_scale(name):
    placed, _ = case(name)
    _, quantized, dequantized = placed(data()["normal"])
    assert quantized.codes.dtype == jnp.int8
    assert quantized.codes.shape == SHAPE
    assert quantized.scale.shape == (1, 1, 16)
    assert quantized.magnitudes[0] == 0
    assert set(quantized.magnitudes) - {0} == {level for level in SETS[name].levels if level > 0}
    leaves, _ = jax.tree.flatten(quantized)
    assert [id(leaf) for leaf in leaves] == [id(quantized.codes), id(quantized.scale)]
    doubled = jax.jit(lambda x: dataclasses.replace(x, scale=2 * x.scale))(quantized)
    assert isinstance(doubled, brx.Quantized)
    np.testing.assert_array_equal(dequantize([doubled])[0], 2 * dequantized)


@pytest.mark.parametrize("name", DERIVATIVES_OF)
def test_derivative_against_finite_differences(name):
    """Where no code changes, the projection is linear in w: a difference quotient is exact but for
    rounding."""
    rng = np.random.default_rng(0)
    w, tangent = rng.standard_normal((2, *SHAPE))
    step = 1e-7
    with jax.enable_x64(True):
        _, _, derivative, transposed = in_float64(w, tangent)[name]
        moved = [in_float64(w + s * tangent, tangent)[name][1] for s in (step, -step)]
    ahead, behind = map(np.asarray, moved)
    np.testing.assert_allclose(derivative, (ahead - behind) / (2 * step), atol=1e-6)
    # It is the orthogonal projection onto q, so its own transpose.
    np.testing.assert_allclose(transposed, derivative, atol=1e-12)


def test_derivative_at_zero_weights_is_zero_and_not_nan():
    gradient = jax.jit(jax.grad(lambda w: jnp.sum(brx.TernaryThreshold().project(w))))
    np.testing.assert_array_equal(gradient(jnp.zeros(3)), 0)


# Bad input


@pytest.mark.parametrize("w", [jnp.arange(3), jnp.array([True]), jnp.array([1j])], ids=repr)
@pytest.mark.parametrize("operation", ["project", "quantize"])
def test_only_floating_weights(w, operation):
    with pytest.raises(TypeError, match=rf"w must be .*floating.*{w.dtype}.*float32"):
        getattr(brx.Binary(), operation)(w)


@pytest.mark.parametrize(("bits", "most"), [(brx.Uniform, 8), (brx.PowerOfTwo, 5)])
@pytest.mark.parametrize("value", [-3, 0, 1, 9, 2.0, 2.5, "4", None, True])
def test_bits_out_of_range_or_not_an_integer(bits, most, value):
    message = rf"bits must be .*from 2 to {most} for {bits.__name__}, got {value!r}"
    with pytest.raises(ValueError, match=message):
        bits(value)


def test_bits_at_the_limit_and_one_bit():
    assert len(brx.Uniform(8).levels) == 255
    assert brx.PowerOfTwo(5).levels[-1] == 128
    assert brx.Uniform(np.int64(4)) == brx.Uniform(4)
    with pytest.raises(ValueError, match=r"for one bit use Binary\(\)"):
        brx.Uniform(1)
    with pytest.raises(ValueError, match="from 2 to 5"):
        brx.PowerOfTwo(6)


@pytest.mark.parametrize(
    ("levels", "fault"),
    [
        ((1, 0, -1), "ascend"),
        ((-1, 2), "symmetric"),
        ((0, 1), "symmetric"),
        ((-1, 0, 0, 1), "repeat"),
        ((-1, -0.0, 0.0, 1), "repeat"),
        ((), "positive"),
        ((0,), "positive"),
        ((-np.inf, np.inf), "finite"),
        ((-1, np.nan, 1), "finite"),
        ((-1e20, 1e20), "1e-12 to 1"),
        ((-1e7, -1e-7, 1e-7, 1e7), "within a factor of 1"),
        ((-1e-20, 0, 1e-20), "1e-12 to 1"),
        ((-1, 1j), "real numbers"),
        (1.0, "real numbers"),
        (tuple(range(-128, 129)), "at most 255.*int8"),
    ],
    ids=str,
)
def test_levels_that_make_no_set(levels, fault):
    with pytest.raises(ValueError, match=rf"levels .*{fault}.*got"):
        brx.ScaledLevels(levels)


@pytest.mark.parametrize("factor", [0, -0.7, np.inf, np.nan, "0.7", None])
def test_threshold_factor_out_of_range(factor):
    with pytest.raises(ValueError, match=rf"factor must be .*positive.*got {factor!r}"):
        brx.TernaryThreshold(factor)
