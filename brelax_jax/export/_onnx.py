"""ONNX: initializers as integer codes and scales, which `DequantizeLinear` multiplies out."""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from brelax_jax._tree import leaves_with_paths
from brelax_jax.export._levels import Floats, Scaled, expanded, same_bits, scaled
from brelax_jax.export._optional import optional
from brelax_jax.sets import Quantized


class Integers(NamedTuple):
    """A type of codes in ONNX.

    Attributes:
      dtype: NumPy's.
      largest: the largest code; the least one is one below its negative.
      opset: the first one that has it, for scales per tensor, channel and block.
      ir_version: the first one that has it.
    """

    dtype: Any
    largest: int
    opset: int
    ir_version: int


INTEGERS = {
    "int2": Integers(jnp.int2, 1, 25, 13),
    "int4": Integers(jnp.int4, 7, 21, 10),
    "int8": Integers(jnp.int8, 127, 21, 10),
}


class Stored(NamedTuple):
    """A quantized leaf as an initializer stores it.

    Attributes:
      kind: the type of its codes.
      codes: integers of the initializer's shape.
      scale: a number, a vector (one for each index of `axis`), or of the rank of the codes.
      axis: along which the scales change, or blocks lie.
      block: consecutive weights along `axis` that share a scale; 0 where there are no blocks.
    """

    kind: Integers
    codes: NDArray[Any]
    scale: Floats
    axis: int
    block: int


def quantize_onnx(model: Any, tree: Any, narrowest: str = "int2") -> Any:
    """An ONNX model whose quantized weights are stored as integers, exactly.

    Takes any float model whose initializers are these weights, wherever it comes from. Each leaf is
    found by its bits, even if its axes are in another order or it is reshaped. Codes, scales and a
    `DequantizeLinear`, which multiplies them, replace the initializer. The product keeps its
    name.

    Args:
      model: an `onnx.ModelProto` of `quantized_params`; it is not changed.
      tree: what `brx.quantized_tree(opt_state, params)` gives. Leaves that are no `Quantized` stay
        as they are in the model.
      narrowest: the type with the fewest bits that the runtime supports: "int2", "int4" or "int8".
        Each leaf gets the narrowest type from there on that holds its levels.

    Returns:
      A new model: opset 25 and IR 13 where there are INT2 codes, else at least opset 21 and IR 10.

    Raises:
      ModuleNotFoundError: if the package `onnx` is missing.
      ValueError: if there is nothing to quantize, if a leaf is found in no initializer or in
        several, if two leaves are found in the same one, or if no integer type holds a leaf. The
        message names the leaf.

    References:
      onnx/onnx, docs/Operators.md, DequantizeLinear.
    """
    onnx = optional("onnx")
    if narrowest not in INTEGERS:
        raise ValueError(f"narrowest must be one of {', '.join(INTEGERS)}, got {narrowest!r}.")
    leaves = _leaves(tree)
    floats = {
        tensor.name: onnx.numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    }
    names = _names(leaves, floats)
    kinds = [*INTEGERS.values()][[*INTEGERS].index(narrowest) :]
    stored = {
        names[path]: _stored(path, leaf, floats[names[path]], kinds)
        for path, leaf in leaves.items()
    }
    model = _with_opset(onnx, model, max(leaf.kind.opset for leaf in stored.values()))
    model.ir_version = max(model.ir_version, *(leaf.kind.ir_version for leaf in stored.values()))
    _replace(onnx, model.graph, stored)
    return model


def _leaves(tree: Any) -> dict[str, Scaled]:
    """The quantized leaves by their paths."""
    leaves = leaves_with_paths(tree, is_leaf=lambda leaf: isinstance(leaf, Quantized))
    found: dict[str, Scaled] = {}
    for path, leaf in leaves:
        if isinstance(leaf, Quantized):
            try:
                found[path] = scaled(leaf)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    if not found:
        raise ValueError(
            "tree has no Quantized leaf: give brx.quantized_tree(opt_state, params), not params."
        )
    return found


def _names(leaves: dict[str, Scaled], floats: dict[str, Floats]) -> dict[str, str]:
    """The name of the initializer that holds each leaf."""
    checksums = {name: _checksum(array) for name, array in floats.items()}
    names: dict[str, str] = {}
    for path, leaf in leaves.items():
        checksum = _checksum(leaf.weights)
        found = [
            name
            for name, array in floats.items()
            if checksums[name] == checksum and _axes(leaf.weights, array) is not None
        ]
        if not found:
            raise ValueError(
                f"{path}: no initializer has these weights. Make the model of "
                f"brx.quantized_params(opt_state, params), without folding other layers into them."
            )
        taken = [other for other, name in names.items() if name in found]
        if len(found) > 1 or taken:
            where = " and ".join([*found, *taken])
            raise ValueError(f"{path}: its weights are found twice, in {where}.")
        [names[path]] = found
    return names


def _checksum(array: Floats) -> tuple[int, int]:
    """Equal for arrays that are equal up to the order of their entries."""
    return array.size, int(array.view(np.uint32).sum(dtype=np.uint64))


def _axes(weights: Floats, array: Floats) -> tuple[int, ...] | None:
    """The order of axes in which the weights are, reshaped, this array, bit for bit."""
    for axes in itertools.permutations(range(weights.ndim)):
        if same_bits(weights.transpose(axes).reshape(array.shape), array):
            return axes
    return None


def _stored(path: str, leaf: Scaled, array: Floats, kinds: Sequence[Integers]) -> Stored:
    """A leaf in the layout of its initializer, and in the narrowest integers that hold it."""
    least, largest = leaf.levels.min(), leaf.levels.max()
    fitting = [kind for kind in kinds if -kind.largest - 1 <= least and largest <= kind.largest]
    scale = expanded(leaf.scale, leaf.levels.shape)
    if not fitting:
        raise ValueError(
            f"{path}: ONNX's integers end at 127, and its levels at {max(-least, largest):g}; use "
            f"Uniform(8) or fewer bits."
        )
    if not same_bits(leaf.levels * scale, leaf.weights):
        raise ValueError(
            f"{path}: its weights are rounded to a grid, so that they are not level times scale; "
            f"use whole numbers as levels, and float32 params."
        )
    axes = _axes(leaf.weights, array)
    codes, scale = (part.transpose(axes).reshape(array.shape) for part in (leaf.levels, scale))
    return Stored(fitting[0], codes.astype(fitting[0].dtype), *_grouped(scale))


def _grouped(scale: Floats) -> tuple[Floats, int, int]:
    """The scale of each weight as few scales, with their axis and block: see `Stored`."""
    runs = [_run(scale, axis) for axis in range(scale.ndim)]
    changing = [axis for axis, size in enumerate(scale.shape) if runs[axis] < size]
    if not changing:
        return scale.reshape(-1)[0], 0, 0
    if len(changing) == 1:
        others = tuple(axis for axis in range(scale.ndim) if axis != changing[0])
        return scale.max(others), changing[0], 0
    axis = int(np.argmax(runs))
    return np.take(scale, range(0, scale.shape[axis], runs[axis]), axis), axis, runs[axis]


def _run(scale: Floats, axis: int) -> int:
    """How many consecutive entries along an axis are equal, at least, and divide it."""
    changes = np.diff(scale, axis=axis).any(tuple(a for a in range(scale.ndim) if a != axis))
    return math.gcd(scale.shape[axis], *(1 + np.flatnonzero(changes)).tolist())


def _with_opset(onnx: Any, model: Any, opset: int) -> Any:
    """A copy of the model, of at least this version of ONNX's operators."""
    [version] = [each.version for each in model.opset_import if each.domain in ("", "ai.onnx")]
    if version < opset:
        return onnx.version_converter.convert_version(model, opset)
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _replace(onnx: Any, graph: Any, stored: dict[str, Stored]) -> None:
    """Codes, scales and a `DequantizeLinear` in place of initializers."""
    kept = [tensor for tensor in graph.initializer if tensor.name not in stored]
    others = [each for each in graph.input if each.name not in stored]
    nodes: list[Any] = []
    for name, leaf in stored.items():
        parts = {f"{name}_codes": leaf.codes, f"{name}_scale": leaf.scale}
        kept += [onnx.numpy_helper.from_array(array, part) for part, array in parts.items()]
        where = {"axis": leaf.axis} if leaf.scale.ndim else {}
        where |= {"block_size": leaf.block} if leaf.block else {}
        nodes.append(onnx.helper.make_node("DequantizeLinear", [*parts], [name], **where))
    nodes += graph.node
    for field, content in {"initializer": kept, "input": others, "node": nodes}.items():
        graph.ClearField(field)
        getattr(graph, field).extend(content)
    graph.ClearField("value_info")  # of shapes that may no longer be right
