"""What is in the files of other formats: GGUF and ONNX."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brelax_jax.export._gguf import FORMATS, Format
from brelax_jax.export._optional import optional
from brelax_jax.export._report import Row


def gguf_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The tensors of a GGUF file, in llama.cpp's order of axes: (out, in).

    Raises:
      ValueError: if it is no GGUF file, or has tensors of a kind that the package does not know.
      ModuleNotFoundError: without the package `gguf`.
    """
    gguf = optional("gguf")
    tensors = _read(path, lambda: gguf.GGUFReader(path).tensors)
    return [_gguf_row(gguf, tensor) for tensor in tensors]


def _gguf_row(gguf: Any, tensor: Any) -> Row:
    name, shape = tensor.name, tuple(map(int, reversed(tensor.shape)))
    kind, number, size = tensor.tensor_type.name, int(tensor.n_elements), int(tensor.n_bytes)
    known = FORMATS.get(kind.lower())
    if known is None:
        return Row(name, shape, kind, "", size, number, {})
    levels = _gguf_levels(gguf, tensor, known)
    return Row(name, shape, kind, f"blocks of {known.group}", size, number, _shares(levels))


def _gguf_levels(gguf: Any, tensor: Any, kind: Format) -> NDArray[Any]:
    """The level of each weight: what it is in units of its block's scale; empty if the package
    cannot tell.
    """
    content = np.asarray(tensor.data).view(np.uint8).reshape(-1)
    blocks = content.reshape(int(tensor.n_elements) // kind.block, -1)
    width = kind.block // kind.group * np.dtype(kind.scale_dtype).itemsize
    scale_bytes = blocks[:, -width:] if kind.scale_last else blocks[:, :width]
    scale = np.ascontiguousarray(scale_bytes).view(kind.scale_dtype).astype(np.float32).ravel()
    try:
        weights = gguf.dequantize(np.asarray(tensor.data), tensor.tensor_type)
    except NotImplementedError:
        return np.zeros(0)
    groups = weights.reshape(-1, kind.group)
    unit = np.where(scale != 0, scale, 1)[:, None]
    return np.round(groups / unit * 2) / 2  # E2M1 has halves


def onnx_rows(path: str | os.PathLike[str]) -> list[Row]:
    """The initializers of an ONNX model; scales count with the codes that they belong to.

    Raises:
      ValueError: if it is no ONNX model.
      ModuleNotFoundError: without the package `onnx`.
    """
    onnx = optional("onnx")
    graph = _read(path, lambda: onnx.load(os.fspath(path)).graph)
    arrays = {each.name: each for each in graph.initializer}
    scale_of = {
        node.input[0]: node.input[1]
        for node in graph.node
        if node.op_type == "DequantizeLinear" and set(node.input[:2]) <= arrays.keys()
    }
    to_array = onnx.numpy_helper.to_array
    rows: list[Row] = []
    for name, each in arrays.items():
        kind = onnx.TensorProto.DataType.Name(each.data_type)
        shape, number = tuple(each.dims), int(np.prod(each.dims))
        if name in scale_of:
            scale = to_array(arrays[scale_of[name]])
            size = len(each.raw_data) + scale.nbytes
            shares = _shares(to_array(each).astype(np.float32))
            rows.append(Row(name, shape, kind, f"{scale.size} scales", size, number, shares))
        elif name not in scale_of.values():
            rows.append(Row(name, shape, kind, "", to_array(each).nbytes, number, {}))
    return rows


def _read(path: str | os.PathLike[str], read: Callable[[], Any]) -> Any:
    """What a package reads, with the file's name in its errors."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{os.fspath(path)}: no such file")
    try:
        return read()
    except Exception as error:  # packages raise what they please about broken files
        kind = Path(path).suffix.removeprefix(".").upper()
        message = f"{os.fspath(path)}: it is no {kind} file that can be read: {error}"
        raise ValueError(message) from error


def _shares(levels: NDArray[Any]) -> dict[float, float]:
    values, counts = np.unique(levels, return_counts=True)
    shares = counts / max(levels.size, 1)
    return dict(zip(values.tolist(), shares.tolist(), strict=True))
