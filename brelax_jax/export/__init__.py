"""Exactly quantized networks in the formats that run elsewhere."""

from brelax_jax.export._bitnet import bitnet_arrays as bitnet_arrays
from brelax_jax.export._gguf import gguf_tensor as gguf_tensor
from brelax_jax.export._gguf import write_gguf as write_gguf
from brelax_jax.export._onnx import quantize_onnx as quantize_onnx
