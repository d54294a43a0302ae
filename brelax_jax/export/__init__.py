"""Exactly quantized networks in the formats that run elsewhere."""

from brelax_jax.export._file import load as load
from brelax_jax.export._file import save as save
from brelax_jax.export._packing import Packed as Packed
from brelax_jax.export._packing import dequantize as dequantize
from brelax_jax.export._packing import pack as pack
