"""The BitNet layout of Hugging Face's `transformers`: ternary, four codes to a byte."""

import numpy as np
from numpy.typing import NDArray

from brelax_jax.export._levels import Floats, same_bits, scaled
from brelax_jax.sets import Quantized

CLASSES = ("autobitlinear", "bitlinear")


def bitnet_arrays(
    quantized: Quantized, linear_class: str = "autobitlinear"
) -> dict[str, NDArray[np.uint8] | Floats]:
    """A ternary kernel as the two arrays of a BitNet layer, to store with safetensors.

    Bits 2i and 2i + 1 of row r of `weight` hold the codes, plus 1, of output i · out/4 + r.

    Args:
      quantized: a kernel (in, out) with one scale, as `brx.quantized_tree` gives it.
      linear_class: as in the `quantization_config` of the model. An "autobitlinear" multiplies by
        `weight_scale`. A "bitlinear" divides by it, so it is the reciprocal of the scale, rounded.

    Returns:
      `weight`, uint8 of shape (out/4, in), and `weight_scale`, float32 of shape (1,).

    Raises:
      ValueError: if the kernel is not a ternary matrix with one scale, or the number of outputs is
        not a multiple of 4.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> codes, scale = jnp.int8([[1, 0, -1, 1]]), jnp.full((1, 1), 0.5)
    >>> ternary = brx.Quantized(codes, scale, magnitudes=(0.0, 1.0), dtype=jnp.float32)
    >>> arrays = brx.export.bitnet_arrays(ternary)
    >>> arrays["weight"], arrays["weight_scale"]
    (array([[134]], dtype=uint8), array([0.5], dtype=float32))

    References:
      huggingface/transformers, src/transformers/integrations/bitnet.py.
    """
    if linear_class not in CLASSES:
        raise ValueError(f"linear_class must be one of {CLASSES}, got {linear_class!r}.")
    levels, scale, weights = scaled(quantized)
    if levels.ndim != 2 or levels.shape[1] % 4:
        raise ValueError(
            f"BitNet takes kernels (in, out) with a multiple of 4 outputs, got {levels.shape}."
        )
    if scale.size > 1:
        raise ValueError(
            f"BitNet has one scale a tensor, and this kernel {scale.size}; use Ternary() with its "
            f"default granularity, PerTensor()."
        )
    if np.abs(levels).max() > 1 or not same_bits(levels * scale, weights):
        raise ValueError(
            "BitNet has the codes −1, 0 and 1, times a float32 scale, and this kernel others; use "
            "Ternary() and float32 params."
        )
    codes = (levels.T + 1).astype(np.uint8).reshape(4, -1, levels.shape[0])
    shifted = codes << np.arange(0, 8, 2, dtype=np.uint8)[:, None, None]
    if linear_class == "bitlinear":
        scale = np.reciprocal(np.where(scale > 0, scale, np.float32(1)))
    return {"weight": np.bitwise_or.reduce(shifted), "weight_scale": scale.reshape(1)}
