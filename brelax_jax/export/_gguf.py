"""GGUF, the files of llama.cpp: blocks of weights along the inputs, each with its scale."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from brelax_jax.export._levels import Scaled, expanded, same_bits, scaled
from brelax_jax.export._optional import optional
from brelax_jax.sets import Quantized

Bytes = NDArray[np.uint8]
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # the magnitudes of 4-bit floats, doubled

# How the levels of blocks (…, weights a block) become bytes (…, bytes a block), as in ggml's
# `ggml-quants.c`.


def _halves(codes: NDArray[Any]) -> Bytes:
    """Nibbles: the first half of a block is low, the second half high."""
    low, high = np.split(codes.astype(np.uint8), 2, axis=-1)
    return low | high * np.uint8(16)


def _nibbles(levels: NDArray[Any]) -> Bytes:
    return _halves(levels + 8)


def _nibbles_and_fifth_bits(levels: NDArray[Any]) -> Bytes:
    codes = (levels + 16).astype(np.uint8)
    fifth = np.packbits(codes >> 4, axis=-1, bitorder="little")
    return np.concatenate([fifth, _halves(codes & 15)], axis=-1)


def _int8(levels: NDArray[Any]) -> Bytes:
    return levels.astype(np.int8).view(np.uint8)


def _signs(levels: NDArray[Any]) -> Bytes:
    return np.packbits(levels >= 0, axis=-1, bitorder="little")


def _crumbs(codes: NDArray[Any], axis: int) -> Bytes:
    """Two bits each: four codes along an axis become a byte, the first one lowest."""
    shifted = np.moveaxis(codes, axis, -1).astype(np.uint8) << np.arange(0, 8, 2, dtype=np.uint8)
    return np.bitwise_or.reduce(shifted, axis=-1)


def _consecutive_crumbs(levels: NDArray[Any]) -> Bytes:
    return _crumbs((levels + 1).reshape(*levels.shape[:-1], 16, 4), axis=-1)


def _strided_crumbs(levels: NDArray[Any]) -> Bytes:
    crumbs = _crumbs((levels + 1).reshape(*levels.shape[:-1], 2, 4, 32), axis=-2)
    return crumbs.reshape(*levels.shape[:-1], 64)


def _trits(levels: NDArray[Any]) -> Bytes:
    """Five to a byte, as the fraction ⌈256·t/243⌉, of which multiplying by 3 takes out the first:
    those of 160 weights in 32 bytes, of 80 in 16, and of the last 16, four to a byte, in 4.
    """
    parts: list[Bytes] = []
    for start, stop, size in ((0, 160, 32), (160, 240, 16), (240, 256, 4)):
        part = (levels[..., start:stop] + 1).astype(np.uint16)
        part = part.reshape(*levels.shape[:-1], -1, size)
        places = 3 ** np.arange(4, 4 - part.shape[-2], -1, dtype=np.uint16)
        number = np.einsum("...ij,i->...j", part, places)
        parts.append(((number * 256 + 242) // 243).astype(np.uint8))
    return np.concatenate(parts, axis=-1)


def _e2m1(levels: NDArray[Any]) -> Bytes:
    codes = np.searchsorted(E2M1, np.abs(levels)) + 8 * (levels < 0)
    return _halves(codes)


def _e2m1_by_16(levels: NDArray[Any]) -> Bytes:
    return _e2m1(levels.reshape(*levels.shape[:-1], 4, 16)).reshape(*levels.shape[:-1], 32)


class Format(NamedTuple):
    """A format of ggml's.

    Attributes:
      id: ggml's number of it.
      block: weights that lie together.
      group: consecutive weights that share a scale.
      levels: those that it can hold.
      scale_dtype: of the stored scales.
      pack: the bytes of levels.
      unit: the stored scale of levels whose scale is 1.
      scale_last: whether the scale lies behind the codes.
    """

    id: int
    block: int
    group: int
    levels: tuple[int, ...]
    scale_dtype: Any
    pack: Callable[[NDArray[Any]], Bytes]
    unit: int = 1
    scale_last: bool = False


TERNARY, FLOATS = (-1, 0, 1), tuple(sign * magnitude for magnitude in E2M1 for sign in (-1, 1))
FORMATS = {  # from the fewest bits a weight to the most
    "q1_0": Format(41, 128, 128, (-1, 1), np.float16, _signs),
    "tq1_0": Format(34, 256, 256, TERNARY, np.float16, _trits, scale_last=True),
    "tq2_0": Format(35, 256, 256, TERNARY, np.float16, _strided_crumbs, scale_last=True),
    "q2_0": Format(42, 64, 64, (*TERNARY, 2), np.float16, _consecutive_crumbs),
    "mxfp4": Format(39, 32, 32, FLOATS, jnp.float8_e8m0fnu, _e2m1, unit=2),
    "q4_0": Format(2, 32, 32, tuple(range(-8, 8)), np.float16, _nibbles),
    "nvfp4": Format(40, 64, 16, FLOATS, jnp.float8_e4m3fn, _e2m1_by_16, unit=2),
    "q5_0": Format(6, 32, 32, tuple(range(-16, 16)), np.float16, _nibbles_and_fifth_bits),
    "q8_0": Format(8, 32, 32, tuple(range(-128, 128)), np.float16, _int8),
}


def gguf_tensor(quantized: Quantized, format: str) -> Bytes:  # noqa: A002
    """A kernel's bytes in one of ggml's formats, without any rounding.

    llama.cpp's own quantizers, given exactly quantized weights, change most of them. This stores
    the codes and the scales as they are. A scale that is shared by a channel or the tensor is
    repeated for each block.

    Args:
      quantized: a kernel (in, out), as `brx.quantized_tree` gives it.
      format: q1_0, q2_0, q4_0, q5_0, q8_0, tq1_0, tq2_0, mxfp4 or nvfp4.

    Returns:
      uint8 of shape (out, bytes a row): one row for each output, with blocks along the inputs.

    Raises:
      ValueError: if the format cannot hold these weights exactly: it lacks a level, its blocks do
        not divide the rows, a block would need several scales, or a scale is not of its dtype. The
        message names the formats that can.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> codes, scale = jnp.ones((256, 4), jnp.int8), jnp.full((1, 4), 0.5)
    >>> ternary = brx.Quantized(codes, scale, magnitudes=(0.0, 1.0), dtype=jnp.float32)
    >>> brx.export.gguf_tensor(ternary, "tq2_0").shape
    (4, 66)

    References:
      ggml-org/llama.cpp, ggml/src/ggml-common.h and ggml-quants.c.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}.")
    parts = scaled(quantized)
    if parts.levels.ndim != 2:
        raise ValueError(
            f"gguf_tensor takes a kernel (in, out), got the shape {parts.levels.shape}: reshape "
            f"its codes and scales."
        )
    if fault := _fault(parts, FORMATS[format]):
        others = [name for name, kind in FORMATS.items() if not _fault(parts, kind)]
        can = f" It fits {' and '.join(others)}." if others else ""
        raise ValueError(f"{format} cannot hold this kernel: {fault}.{can}")
    return _bytes(parts, FORMATS[format])


def _fault(parts: Scaled, kind: Format) -> str | None:
    """Why a format cannot hold these weights, and what would help."""
    inputs, groups = parts.levels.shape[0], parts.scale.shape[0]
    if inputs % kind.block:
        return f"its {inputs} inputs are no multiple of the block of {kind.block}"
    if (inputs // groups) % kind.group:
        return (
            f"{inputs // groups} consecutive inputs share a scale, and the format has one for each "
            f"{kind.group}; use PerBlock({kind.group}, axis=0) or PerChannel()"
        )
    nonzero = expanded(parts.scale, parts.levels.shape) > 0
    if lacking := set(np.unique(parts.levels[nonzero]).astype(int)) - set(kind.levels):
        return f"it has no levels {sorted(map(int, lacking))}"
    stored = _stored_scale(parts, kind)
    if (wrong := stored.astype(np.float32) != _wanted_scale(parts, kind)).any():
        dtype = np.dtype(kind.scale_dtype).name
        return (
            f"{wrong.sum()} of its scales are no {dtype} values; train with a set of brx.formats "
            f"or with scale_dtype={dtype!r}"
        )
    if not same_bits(parts.levels * expanded(parts.scale, parts.levels.shape), parts.weights):
        return (
            "its weights are rounded to a grid, so that they are not level times scale; use whole "
            "numbers as levels, or float32 params"
        )
    return None


def _wanted_scale(parts: Scaled, kind: Format) -> NDArray[Any]:
    """The scales as the format counts them; 1 in place of 0 where it has none."""
    none = 1 if kind.scale_dtype is jnp.float8_e8m0fnu else 0
    return np.where(parts.scale > 0, kind.unit * parts.scale, none)


def _stored_scale(parts: Scaled, kind: Format) -> NDArray[Any]:
    with np.errstate(over="ignore"):
        return _wanted_scale(parts, kind).astype(kind.scale_dtype)


def _bytes(parts: Scaled, kind: Format) -> Bytes:
    inputs, outputs = parts.levels.shape
    scale = expanded(_stored_scale(parts, kind), (inputs // kind.group, outputs)).T
    scale = np.ascontiguousarray(scale).view(np.uint8).reshape(outputs, inputs // kind.block, -1)
    codes = kind.pack(parts.levels.T.reshape(outputs, inputs // kind.block, kind.block))
    order = (codes, scale) if kind.scale_last else (scale, codes)
    return np.concatenate(order, axis=-1).reshape(outputs, -1)


Value = bool | int | float | str | Sequence[Any]


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    metadata: Mapping[str, Value],
    tensors: Mapping[str, Any],
) -> None:
    """Writes a GGUF file, atomically: an old file stays whole until the new one replaces it.

    Args:
      path: of the file.
      architecture: what llama.cpp calls the network, such as "llama".
      metadata: the other keys with their values. Integers become uint32, floats float32, and lists
        arrays.
      tensors: by name, an array (out, in), which is stored as float32, or a pair of a kernel's
        `Quantized` (in, out) and a format of `gguf_tensor`.

    Raises:
      ModuleNotFoundError: if the package `gguf` is missing.
      TypeError: if a value is of another type, or a `Quantized` has no format.
      ValueError: as `gguf_tensor`, and names the tensor.
    """
    gguf, path = optional("gguf"), Path(path)
    beside = path.with_name(path.name + ".new")
    writer = gguf.GGUFWriter(beside, architecture)
    add: dict[Any, Any] = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, list: writer.add_array, tuple: writer.add_array}
    for key, value in metadata.items():
        if type(value) not in add:
            raise TypeError(
                f"metadata {key!r} must be a bool, int, float, str or list, got {value!r}."
            )
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        _add_tensor(writer, name, tensor)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _add_tensor(writer: Any, name: str, tensor: Any) -> None:
    if isinstance(tensor, Quantized):
        raise TypeError(f"{name}: give a pair of the Quantized and its format, such as 'q4_0'.")
    if not (isinstance(tensor, tuple) and isinstance(tensor[0], Quantized)):
        writer.add_tensor(name, np.ascontiguousarray(tensor, np.float32))
        return
    quantized, kind = tensor
    try:
        content = gguf_tensor(quantized, kind)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    # As int8, because of uint8 the writer would look up the format, and not all versions know all.
    writer.add_tensor(
        name,
        content.view(np.int8),
        raw_shape=quantized.codes.shape[::-1],
        raw_dtype=FORMATS[kind].id,
    )
