"""Ternary kernels in the BitNet layout, read as its documentation says."""

import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from tests.export.made import bits, integers, quantized, weights

pytestmark = pytest.mark.usefixtures("quickly_compiled")

GIVEN = {"magnitudes": integers(1), "shape": (7, 12), "groups": (1, 1)}


def codes_of(packed):
    """One row after the other: bits 2i of row r are output i · out/4 + r."""
    rows = len(packed)
    codes = np.zeros((4 * rows, packed.shape[1]), int)
    for i in range(4):
        for r in range(rows):
            codes[i * rows + r] = [(byte >> 2 * i & 3) - 1 for byte in packed[r].tolist()]
    return codes


@pytest.mark.parametrize("binary", [False, True])
def test_codes_and_scale_come_back(binary):
    given = quantized(**GIVEN, binary=binary)
    arrays = brx.export.bitnet_arrays(given)
    assert {name: (a.shape, a.dtype.name) for name, a in arrays.items()} == {
        "weight": ((3, 7), "uint8"),
        "weight_scale": ((1,), "float32"),
    }
    read = codes_of(arrays["weight"]) * arrays["weight_scale"] + np.float32(0)
    np.testing.assert_array_equal(bits(read), bits(weights(given).T))
    divided = brx.export.bitnet_arrays(given, "bitlinear")
    np.testing.assert_array_equal(divided["weight"], arrays["weight"])
    np.testing.assert_allclose(divided["weight_scale"] * arrays["weight_scale"], 1, rtol=1e-6)


def test_a_kernel_of_zeros():
    given = brx.Quantized(jnp.ones((3, 4), jnp.int8), jnp.zeros((1, 1)), (0.0, 1.0), "float32")
    for linear_class, scale in {"autobitlinear": 0, "bitlinear": 1}.items():
        arrays = brx.export.bitnet_arrays(given, linear_class)
        assert not codes_of(arrays["weight"]).any()
        assert arrays["weight_scale"] == scale


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"shape": (7, 10)}, r"multiple of 4 outputs, got \(7, 10\)"),
        ({"shape": (2, 7, 12), "groups": (1, 1, 1)}, r"kernels \(in, out\)"),
        ({"groups": (1, 12)}, "one scale a tensor, and this kernel 12; use Ternary"),
        ({"magnitudes": integers(3)}, "use Ternary\\(\\) and float32 params"),
        ({"magnitudes": (0.0, 0.3)}, "must be whole numbers or halves, got"),
        ({"dtype": jnp.bfloat16}, "use Ternary\\(\\) and float32 params"),
    ],
)
def test_what_is_refused(other, message):
    given = quantized(**{**GIVEN, **other})
    with pytest.raises(ValueError, match=message):
        brx.export.bitnet_arrays(given)


def test_another_class_is_refused():
    with pytest.raises(ValueError, match=r"one of \('autobitlinear', 'bitlinear'\), got 'linear'"):
        brx.export.bitnet_arrays(quantized(**GIVEN), "linear")
