"""Sets by the names of the deployment formats that hold them: train on one, export to it.

A format is levels, a granularity and a scale dtype under one name. Flax keeps kernels as
(…, in, out), so by default blocks lie along the last axis but one. The rows in a format's file are
the columns of a kernel.

    optimizer = brx.binary_relax(base, brx.formats.q4_0(), lam=…)

llama.cpp's layouts are those of `ggml-common.h` and `ggml-quants.c` in its repository. The
microscaling formats are those of the OCP MX specification 1.0; NVFP4 is NVIDIA's.
"""

import math

from brelax_jax._arguments import is_number
from brelax_jax.sets import (
    Binary,
    LeastSquares,
    PerBlock,
    PerChannel,
    PerTensor,
    QuantizedSet,
    ScaledLevels,
    ScaleRule,
    Ternary,
    Uniform,
)

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the magnitudes of four-bit floats
BEST = LeastSquares()


def q4_0(axis: int = -2, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """llama.cpp's Q4_0: integers from −7 to 7, blocks of 32, float16 scales; 4.5 bits a weight.

    A block is 18 bytes: the scale, then 16 bytes of two codes each. The format has −8 too, which is
    not used here.

    >>> import brelax_jax as brx
    >>> brx.formats.q4_0()
    Uniform(granularity=PerBlock(size=32, axis=-2), scale_dtype='float16', bits=4)
    """
    return Uniform(4, granularity=PerBlock(32, axis), rule=rule, scale_dtype="float16")


def q5_0(axis: int = -2, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """llama.cpp's Q5_0: integers from −15 to 15, blocks of 32, float16 scales; 5.5 bits a weight.

    A block is 22 bytes: the scale, 4 bytes of fifth bits, 16 bytes of two codes' other bits each.
    """
    return Uniform(5, granularity=PerBlock(32, axis), rule=rule, scale_dtype="float16")


def q8_0(axis: int = -2, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """llama.cpp's Q8_0: integers from −127 to 127, blocks of 32, float16 scales; 8.5 bits a weight.

    A block is 34 bytes: the scale, then one int8 a code.
    """
    return Uniform(8, granularity=PerBlock(32, axis), rule=rule, scale_dtype="float16")


def tq1_0(axis: int = -2, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """llama.cpp's TQ1_0: ternary, blocks of 256, float16 scales; 1.69 bits a weight.

    A block is 54 bytes: five codes a byte as digits of base three, then the scale.
    """
    return Ternary(granularity=PerBlock(256, axis), rule=rule, scale_dtype="float16")


def tq2_0(axis: int = -2, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """llama.cpp's TQ2_0: ternary, blocks of 256, float16 scales; 2.06 bits a weight.

    A block is 66 bytes: four codes a byte, then the scale.
    """
    return Ternary(granularity=PerBlock(256, axis), rule=rule, scale_dtype="float16")


def q1_0(axis: int = -2, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """llama.cpp's Q1_0: binary, blocks of 128, float16 scales; 1.125 bits a weight.

    A block is 18 bytes: the scale, then eight codes a byte.
    """
    return Binary(granularity=PerBlock(128, axis), rule=rule, scale_dtype="float16")


def q2_0(axis: int = -2, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """llama.cpp's Q2_0: ternary, blocks of 64, float16 scales; 2.25 bits a weight.

    A block is 18 bytes: the scale, then four codes a byte.
    """
    return Ternary(granularity=PerBlock(64, axis), rule=rule, scale_dtype="float16")


def mxfp4(axis: int = -2, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """MXFP4: the levels of E2M1, blocks of 32, powers of two as scales; 4.25 bits a weight.

    A block is 17 bytes: the exponent of its scale, then 16 bytes of two codes each.

    >>> import brelax_jax as brx
    >>> brx.formats.mxfp4().magnitudes
    (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    """
    return ScaledLevels(
        _mirrored(E2M1), granularity=PerBlock(32, axis), rule=rule, scale_dtype="float8_e8m0fnu"
    )


def nvfp4(axis: int = -2, *, factor: float = 1.0, rule: ScaleRule = BEST) -> QuantizedSet:
    """NVFP4: the levels of E2M1, blocks of 16, scales of E4M3 times one factor; 4.5 bits a weight.

    Scales of E4M3 range from 2⁻⁶ to 448. For weights below about 0.05 choose a smaller factor, such
    as 2⁻⁶.

    Args:
      axis: that along which blocks lie.
      factor: of the whole tensor, a power of two. The levels are multiplied by it.
      rule: how scales are found.

    Raises:
      ValueError: if `factor` is not a power of two from 2⁻⁴⁰ to 2³².
    """
    if not (is_number(factor) and 2.0**-40 <= factor <= 2.0**32 and math.frexp(factor)[0] == 0.5):
        raise ValueError(
            f"factor must be a power of two from 2**-40 to 2**32, such as 2.0**-6, got {factor!r}."
        )
    levels = _mirrored([float(factor) * magnitude for magnitude in E2M1])
    return ScaledLevels(
        levels, granularity=PerBlock(16, axis), rule=rule, scale_dtype="float8_e4m3fn"
    )


def int4(axis: int = -1, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """INT4 of ONNX and LiteRT: integers from −7 to 7, a float32 scale for each index of `axis`."""
    return Uniform(4, granularity=PerChannel(axis), rule=rule)


def int8(axis: int = -1, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """INT8 of ONNX and LiteRT: integers from −127 to 127, a float32 scale for each index of `axis`.

    `rule=MaxMagnitude()` is customary there, and much faster.
    """
    return Uniform(8, granularity=PerChannel(axis), rule=rule)


def int2(axis: int = -1, *, rule: ScaleRule = BEST) -> QuantizedSet:
    """INT2 of ONNX and LiteRT: ternary, a float32 scale for each index of `axis`."""
    return Ternary(granularity=PerChannel(axis), rule=rule)


def bitnet(*, rule: ScaleRule = BEST) -> QuantizedSet:
    """BitNet in Hugging Face's transformers: ternary, one bfloat16 scale a tensor.

    The published models use `rule=MeanMagnitude(1.0, refit=False)`.
    """
    return Ternary(granularity=PerTensor(), rule=rule, scale_dtype="bfloat16")


def _mirrored(magnitudes: "tuple[float, ...] | list[float]") -> tuple[float, ...]:
    return tuple(sorted({sign * m for m in magnitudes for sign in (-1.0, 1.0)}))
