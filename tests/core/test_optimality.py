"""Every projection is the global least-squares minimizer: thousands of groups against the oracle
that scans every breakpoint of the error.
"""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st

import brelax_jax as brx
from tests.helpers import covering, oracles

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EXCESS = 1e-6  # of the least error
ROUNDING = 1e-12  # of the sum of squares: that of the float32 entries themselves
SETS = {
    "ternary": brx.Ternary(),
    **{f"uniform{bits}": brx.Uniform(bits) for bits in range(2, 9)},
    **{f"power{bits}": brx.PowerOfTwo(bits) for bits in range(3, 6)},
    "binary": brx.Binary(),
    "two-bit": brx.ScaledLevels((-3, -1, 1, 3)),
    "uneven": brx.ScaledLevels((-1.7, -0.3, 0, 0.3, 1.7)),
    "far": brx.ScaledLevels((-1000, -10, -1, 1, 10, 1000)),
    "near": brx.ScaledLevels((-1.01, -1, 0, 1, 1.01)),
}
# How a group of n weights is drawn.
KINDS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "t1.5": lambda rng, n: rng.standard_t(1.5, n),
    "t2": lambda rng, n: rng.standard_t(2, n),
    "t2.5": lambda rng, n: rng.standard_t(2.5, n),
    "t3": lambda rng, n: rng.standard_t(3, n),
    "one outlier": lambda rng, n: rng.standard_normal(n) * np.where(np.arange(n) == n // 2, 1e6, 1),
    "two clusters": lambda rng, n: rng.choice([-1, 1, -1000, 1000], n) * rng.normal(1, 0.05, n),
    "sparse": lambda rng, n: rng.standard_normal(n) * (rng.random(n) < 0.05),
    "few integers": lambda rng, n: rng.integers(-3, 4, n),
    "integers": lambda rng, n: rng.integers(-200, 201, n),
    "integers, heavy": lambda rng, n: np.round(3 * rng.standard_t(2, n)),
    "constant": lambda rng, n: np.full(n, rng.standard_normal()),
    "zeros": lambda rng, n: np.zeros(n),
    "tiny": lambda rng, n: rng.standard_normal(n) * 1e-37,  # times the largest level: see `groups`
    "huge": lambda rng, n: rng.standard_normal(n) * 1e37,
    "float16": lambda rng, n: rng.standard_normal(n).astype(np.float16),
    "bfloat16": lambda rng, n: rng.laplace(size=n).astype(ml_dtypes.bfloat16),
}


def groups(size, seeds, largest):
    """(kind, group) for each kind and seed, as rows of float32.

    The tiny ones are as small as they can be without a scale that devices flush to zero.
    """
    for seed in range(seeds):
        for i, (kind, draw) in enumerate(KINDS.items()):
            w = draw(np.random.default_rng((seed, i, size)), size)
            w = np.asarray(w * (largest if kind == "tiny" else 1), np.float32)
            yield kind, np.where(np.abs(w) < 1.2e-38, np.float32(0), w)  # devices flush these


@jax.jit
def quantize(arrays):
    """For arrays by set and dtype; one program, as what searches share compiles once."""
    return {key: jax.vmap(SETS[key[0]].quantize)(w) for key, w in arrays.items()}


@functools.cache
def quantized_groups(names, size, seeds):
    """For each set (the kinds, the groups, and how it quantizes them)."""
    kinds, w = {}, {}
    for name in names:
        drawn = groups(size, seeds, SETS[name].levels[-1])
        kinds[name], rows = zip(*drawn, strict=True)
        w[name, "float32"] = np.stack(rows)
    quantized = quantize(w)
    return {name: (kinds[name], w[name, dtype], quantized[name, dtype]) for name, dtype in w}


def check(name, size, seeds, names=None):
    """Of this set, compiled together with those of some names."""
    assert_optimal(SETS[name], *quantized_groups(names or (name,), size, seeds)[name])


def assert_optimal(qset, kinds, w, quantized):
    magnitudes, levels = np.array(quantized.magnitudes), qset.levels
    worst = []
    for kind, group, codes, scale in zip(
        kinds, w, np.asarray(quantized.codes, int), np.asarray(quantized.scale[:, 0]), strict=True
    ):
        unit = float(np.max(np.abs(group))) or 1.0
        group = group.astype(float) / unit  # the oracle's squares must not overflow
        q = np.where(codes < 0, -1, 1) * magnitudes[np.abs(codes)] * (float(scale) / unit)
        error, energy = np.sum((group - q) ** 2), np.sum(group**2)
        least = oracles.optimum(group, levels)[1]
        if error > least * (1 + EXCESS) + ROUNDING * energy:
            worst.append((error / least - 1 if least else np.inf, (error - least) / energy, kind))
    assert not worst, f"(excess, of the sum of squares) {sorted(worst, reverse=True)[:4]}"


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    w=hnp.arrays(
        np.float32,
        24,
        elements=st.floats(-1, 1, width=32) | st.sampled_from([0, 0.5, -0.5, 1, 0.125]),
    ),
    scale=st.sampled_from([1, 1e-30, 1e30, 3.7]),
)
def test_made_up_groups(w, scale):
    w = np.where(np.abs(w) < 1e-7, np.float32(0), w) * np.float32(scale)
    names = ["ternary", "uniform4", "power4", "two-bit", "uneven"]
    quantized = quantize({(name, "float32"): w[None] for name in names})
    for name in names:
        assert_optimal(SETS[name], [name], w[None], quantized[name, "float32"])


# Bits and levels between those of others.
BETWEEN = {
    *(f"uniform{bits}" for bits in (2, 3, 5, 6, 7)),
    *("power3", "power4", "two-bit", "uneven"),
}


@pytest.mark.soak
@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("name", SETS)
def test_tiny_groups(name, size):
    check(name, size, {1: 2, 9: 12}[size])


@pytest.mark.parametrize("name", covering.some(SETS, SETS.keys() - BETWEEN))
def test_small_groups(name):
    quick = tuple(other for other in SETS if other not in BETWEEN)
    check(name, 576, 4, quick if name in quick else None)


@pytest.mark.parametrize(
    ("name", "dtype"),
    covering.pairs(
        ["ternary", "uniform4", "uniform8", "power4", "two-bit"], ["float16", "bfloat16"]
    ),
)
def test_16_bit_weights(name, dtype):
    """Their scale is float32, and as good as that of the same weights in float32."""
    rng = np.random.default_rng(0)
    w = np.stack([KINDS[kind](rng, 100) for kind in ("normal", "t2", "integers")]).astype(dtype)
    quantized = quantize({(name, dtype): w})[name, dtype]
    assert quantized.scale.dtype == np.float32
    assert_optimal(SETS[name], ["normal", "t2", "integers"], w.astype(np.float32), quantized)


@pytest.mark.soak
@pytest.mark.parametrize("size", [3, 64, 4608, 100_000, 1_000_000])
@pytest.mark.parametrize("name", SETS)
def test_large_groups(name, size):
    check(name, size, {3: 10, 64: 10, 4608: 3}.get(size, 1))
