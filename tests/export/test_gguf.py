"""Kernels in GGUF: what its own dequantizers and ggml's make of the bytes, and what is refused."""

import ctypes
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from tests.export.made import E2M1, bits, integers, quantized, weights
from tests.helpers.training import array

pytestmark = pytest.mark.usefixtures("quickly_compiled")

IN, OUT = 512, 3
CASES = {
    "q1_0": (integers(1), 128, "float16", True),
    "q2_0": (integers(1), 64, "float16", False),
    "q4_0": (integers(7), 32, "float16", False),
    "q5_0": (integers(15), 32, "float16", False),
    "q8_0": (integers(127), 32, "float16", False),
    "tq1_0": (integers(1), 256, "float16", False),
    "tq2_0": (integers(1), 256, "float16", False),
    "mxfp4": (E2M1, 32, "float8_e8m0fnu", False),
    "nvfp4": (E2M1, 16, "float8_e4m3fn", False),
}


def kernel(name, groups=None, **options):
    magnitudes, block, dtype, binary = CASES[name]
    shape = (IN // block, OUT) if groups is None else groups
    return quantized(magnitudes, (IN, OUT), shape, binary, dtype, **options)


def by_ggml(name, content):
    """What llama.cpp's library makes of the bytes."""
    module = pytest.importorskip("xllamacpp.xllamacpp")
    function = getattr(ctypes.CDLL(module.__file__), f"dequantize_row_{name}")
    result = np.zeros((OUT, IN), np.float32)
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (content, result))
    function(*pointers, ctypes.c_int64(result.size))
    return result


def by_gguf(name, content):
    gguf = pytest.importorskip("gguf")
    try:
        return gguf.dequantize(content, gguf.GGMLQuantizationType[name.upper()])
    except (KeyError, NotImplementedError):
        pytest.skip(f"this gguf does not read {name}")


READERS = [by_gguf, by_ggml]


@pytest.mark.parametrize("groups", [None, (1, OUT), (1, 1)], ids=["block", "channel", "tensor"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reader", READERS)
def test_the_weights_come_back_bit_for_bit(reader, name, groups):
    given = kernel(name, groups)
    content = brx.export.gguf_tensor(given, name)
    assert content.dtype == np.uint8
    np.testing.assert_array_equal(bits(reader(name, content)), bits(weights(given).T))


@pytest.mark.parametrize(
    ("name", "qset"),
    [
        ("q4_0", brx.Uniform(4)),
        ("q4_0", brx.Ternary()),
        ("q4_0", brx.Binary()),
        ("q4_0", brx.ScaledLevels((-3, -1, 1, 3))),
        ("q4_0", brx.ScaledLevels((-1.5, -0.5, 0.5, 1.5))),
        ("q5_0", brx.PowerOfTwo(4)),
        ("q5_0", brx.Uniform(5)),
        ("q8_0", brx.Uniform(8)),
        ("q8_0", brx.PowerOfTwo(4)),
        ("mxfp4", brx.Uniform(3)),
        ("mxfp4", brx.PowerOfTwo(4)),
        ("nvfp4", brx.Ternary()),
        ("tq1_0", brx.Binary()),
    ],
)
def test_sets_that_fit(name, qset):
    magnitudes = tuple(sorted({0.0, *(abs(level) for level in qset.levels)}))
    _, block, dtype, _ = CASES[name]
    binary = 0.0 not in qset.levels
    given = quantized(magnitudes, (IN, OUT), (IN // block, OUT), binary, dtype)
    content = brx.export.gguf_tensor(given, name)
    np.testing.assert_array_equal(bits(by_gguf(name, content)), bits(weights(given).T))


def test_smallest_and_largest_scales():
    for name, scales in {
        "q4_0": [2.0**-24, 65504.0],
        "mxfp4": [2.0**-125, 2.0**120],
        "nvfp4": [2.0**-9, 448.0],
    }.items():
        magnitudes, block, _, _ = CASES[name]
        codes = np.arange(2 * block)[:, None] % (2 * len(magnitudes) - 1) - len(magnitudes) + 1
        times = (2, 1) if name == "nvfp4" else 1  # its blocks are of 64 weights
        codes, scales = np.tile(codes, times), np.tile(np.array(scales)[:, None], times)
        given = brx.Quantized(array(codes, "int8"), array(scales), magnitudes, jnp.float32)
        content = brx.export.gguf_tensor(given, name)
        np.testing.assert_array_equal(bits(by_gguf(name, content)), bits(weights(given).T))


def test_what_a_format_cannot_hold_is_refused():
    def refused(name, given):
        with pytest.raises(ValueError, match=f"^{name} cannot hold this kernel") as error:
            brx.export.gguf_tensor(given, name)
        return str(error.value)

    by_block = (IN // 32, OUT)
    wide = quantized(integers(127), (IN, OUT), by_block, scale_dtype="float16")
    assert "no levels [-127, " in refused("q4_0", wide)
    assert refused("q4_0", wide).endswith("It fits q8_0.")
    ternary = quantized(integers(1), (IN, OUT), by_block, scale_dtype="float16")
    message = refused("tq2_0", ternary)
    assert "32 consecutive inputs share a scale, and the format has one for each 256" in message
    assert "use PerBlock(256, axis=0) or PerChannel()" in message
    assert message.endswith("It fits q4_0 and q5_0 and q8_0.")
    assert "no levels [0]" in refused("q1_0", kernel("q2_0", (1, OUT)))
    rows = quantized(integers(1), (IN + 32, OUT), (1, OUT), scale_dtype="float16")
    assert "its 544 inputs are no multiple of the block of 256" in refused("tq1_0", rows)
    exact = quantized(integers(1), (IN, OUT), (1, OUT), scale_dtype="float32")
    assert "2 of its scales are no float16 values" in refused("q4_0", exact)
    assert "scale_dtype='float8_e8m0fnu'" in refused("mxfp4", exact)
    huge = brx.Quantized(exact.codes, np.asarray(exact.scale) + 70000, exact.magnitudes, "float32")
    assert "3 of its scales are no float16 values" in refused("q8_0", huge)
    inputs = quantized(integers(1), (IN, OUT), (IN, 1), scale_dtype="float16")
    assert "1 consecutive inputs share a scale" in refused("q4_0", inputs)
    rounded = quantized(
        integers(127), (IN, OUT), by_block, scale_dtype="float16", dtype=jnp.bfloat16
    )
    assert "rounded to a grid" in refused("q8_0", rounded)


def test_what_is_no_quantized_kernel_is_refused():
    given = kernel("q4_0")
    with pytest.raises(ValueError, match=r"format must be one of q1_0, .*, got 'q4_k'"):
        brx.export.gguf_tensor(given, "q4_k")
    with pytest.raises(TypeError, match=r"quantized must be a Quantized, as brx.quantized_tree"):
        brx.export.gguf_tensor(given.codes, "q4_0")
    stacked = quantized(integers(1), (2, IN, OUT), (1, 1, 1), scale_dtype="float16")
    with pytest.raises(ValueError, match=r"takes a kernel \(in, out\), got .* \(2, 512, 3\)"):
        brx.export.gguf_tensor(stacked, "q4_0")
    beyond = brx.Quantized(
        np.asarray(given.codes) - np.int8(120), given.scale, given.magnitudes, "float32"
    )
    with pytest.raises(ValueError, match="codes of `quantized` must be from -7 to 7"):
        brx.export.gguf_tensor(beyond, "q4_0")
    uneven = quantized((0.0, 0.3, 1.7), (IN, OUT), (1, 1))
    with pytest.raises(ValueError, match=r"levels .* whole numbers or halves, got"):
        brx.export.gguf_tensor(uneven, "q4_0")
    broken = brx.Quantized(
        given.codes, np.nan * np.asarray(given.scale), given.magnitudes, "float32"
    )
    with pytest.raises(ValueError, match="must be finite and not negative"):
        brx.export.gguf_tensor(broken, "q4_0")


def test_a_file_holds_what_was_given(tmp_path):
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "network.gguf"
    norm, ternary, four = np.arange(3.0), kernel("q2_0"), kernel("q4_0")
    metadata = {"llama.block_count": 2, "llama.eps": 0.5, "a": True, "b": "c", "d": ["é", "f"]}
    tensors = {"norm": norm, "ternary": (ternary, "q2_0"), "four": (four, "q4_0")}
    path.write_text("what was there before")
    with pytest.raises(ValueError, match="ternary: q1_0 cannot hold"):
        brx.export.write_gguf(path, "llama", metadata, {"ternary": (ternary, "q1_0")})
    with pytest.raises(TypeError, match="'a' must be a bool, int, float, str or list, got None"):
        brx.export.write_gguf(path, "llama", {"a": None}, {})
    with pytest.raises(TypeError, match="four: give a pair of the Quantized and its format"):
        brx.export.write_gguf(path, "llama", metadata, {"four": four})
    assert path.read_text() == "what was there before"
    brx.export.write_gguf(path, "llama", metadata, tensors)
    assert [*tmp_path.iterdir()] == [path]
    if not hasattr(gguf.GGMLQuantizationType, "Q2_0"):  # its reader does not know what it wrote
        brx.export.write_gguf(path, "llama", metadata, {**tensors, "ternary": (ternary, "q8_0")})
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.architecture"].contents() == "llama"
    assert {key: reader.fields[key].contents() for key in metadata} == metadata
    read = {tensor.name: tensor for tensor in reader.tensors}
    np.testing.assert_array_equal(read["norm"].data, norm)
    assert [*read["four"].shape] == [IN, OUT], "ggml counts from the innermost axis"
    for name, given in {"ternary": ternary, "four": four}.items():
        result = gguf.dequantize(read[name].data, read[name].tensor_type)
        np.testing.assert_array_equal(bits(result), bits(weights(given).T))


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModuleNotFoundError, match=r"gguf is missing: pip install 'brelax_jax\[exp"):
        brx.export.write_gguf(Path(tmp_path) / "a.gguf", "llama", {}, {})
