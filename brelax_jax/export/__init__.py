"""Exactly quantized networks in the formats that run elsewhere."""

from brelax_jax.export._bitnet import bitnet_arrays as bitnet_arrays
from brelax_jax.export._file import load as load
from brelax_jax.export._file import save as save
from brelax_jax.export._gguf import gguf_tensor as gguf_tensor
from brelax_jax.export._gguf import write_gguf as write_gguf
from brelax_jax.export._onnx import quantize_onnx as quantize_onnx
from brelax_jax.export._packing import Packed as Packed
from brelax_jax.export._packing import dequantize as dequantize
from brelax_jax.export._packing import pack as pack
