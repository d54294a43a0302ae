"""Train on a format, export to it: the file's weights are the params, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers import covering
from tests.helpers.training import array

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BLOCKS = {
    "q4_0": (32, 4.5),
    "q5_0": (32, 5.5),
    "q8_0": (32, 8.5),
    "tq1_0": (256, 1.6875),
    "tq2_0": (256, 2.0625),
    "q1_0": (128, 1.125),
    "q2_0": (64, 2.25),
    "mxfp4": (32, 4.25),
    "nvfp4": (16, 4.5),
}
IN_SUITE = ("q4_0", "q5_0", "tq1_0", "q1_0", "mxfp4", "nvfp4")
RULES = {"mxfp4": brx.LeastSquares()}  # others need no search here


def trained(qset, shape=(256, 4)):
    """Float32 params after some steps of phase II, and their state."""
    relax = brx.binary_connect(optax.sgd(0.05), qset)
    rng = np.random.default_rng(0)
    params = {"kernel": array(0.3 * rng.standard_normal(shape))}
    state, update = relax.init(params), jax.jit(relax.update)
    for _ in range(4):
        grads = {"kernel": array(rng.standard_normal(shape))}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params, brx.quantized_tree(state, params)["kernel"]


@pytest.mark.parametrize("name", covering.some(BLOCKS, IN_SUITE))
def test_llama_cpp_reads_the_params(name):
    gguf = pytest.importorskip("gguf")
    block, bits = BLOCKS[name]
    qset = getattr(brx.formats, name)(0, rule=RULES.get(name, brx.MeanMagnitude(0.5)))
    params, quantized = trained(qset)
    np.testing.assert_array_equal(quantized.dequantize(), params["kernel"])
    assert quantized.scale.shape == (256 // block, 4)
    content = brx.export.gguf_tensor(quantized, name)
    assert content.shape == (4, 256 * bits / 8)
    try:
        read = gguf.dequantize(content, gguf.GGMLQuantizationType[name.upper()])
    except (KeyError, NotImplementedError):
        return  # tests/export/test_gguf.py has llama.cpp's own reader
    np.testing.assert_array_equal(read.T, params["kernel"])


def test_bitnet_is_published_absmean():
    qset = brx.formats.bitnet(rule=brx.MeanMagnitude(1.0, refit=False))
    params, quantized = trained(qset, (8, 12))
    np.testing.assert_array_equal(quantized.dequantize(), params["kernel"])
    scale = float(quantized.scale.item())
    assert scale == float(jnp.bfloat16(scale))


def test_channels():
    for name, most in (("int2", 1), ("int4", 7), ("int8", 127)):
        qset = getattr(brx.formats, name)(rule=brx.MaxMagnitude())
        quantized = qset.quantize(array(np.linspace(-1, 1, 24).reshape(6, 4)))
        assert quantized.scale.shape == (1, 4)
        assert np.max(np.abs(np.asarray(quantized.codes))) == most


def test_a_factor_moves_the_scales_of_nvfp4():
    w = 1e-4 * np.random.default_rng(0).standard_normal((32, 2)).astype(np.float32)
    rule = brx.MaxMagnitude()
    plain, moved = (brx.formats.nvfp4(factor=factor, rule=rule) for factor in (1, 2.0**-12))
    assert np.all(np.asarray(plain.quantize(w).scale) == 2.0**-6)  # saturated
    errors = [np.linalg.norm(w - qset.project(w)) for qset in (plain, moved)]
    assert 9 * errors[1] < errors[0]
    for factor in (3.0, 0, -1.0, np.inf, "2", 2.0**60):
        with pytest.raises(ValueError, match="factor must be a power of two"):
            brx.formats.nvfp4(factor=factor)
