"""Our file: safetensors, whose header says how each leaf is quantized. docs/file-format.md has it.

What is read is checked in full before it is used, and nothing is allocated by what a header claims:
every size in it must be that of bytes which are there.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any, TypeAlias, cast

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from brelax_jax.export._optional import optional
from brelax_jax.export._packing import Packed, codes_of_symbols, layout, unpack_rows
from brelax_jax.sets import FLOATS, Granularity, PerBlock, PerChannel, PerTensor, ScaledLevels
from brelax_jax.sets._levels import are_consecutive

VERSION = 1
KEY = "brelax_jax"  # of the header's metadata
ALIGNMENT = 64  # bytes
NO_SUM = "0" * 64  # in place of the checksum while it is taken
DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32",
    "I32": "int32", "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16",
    "F32": "float32", "F64": "float64",
}  # fmt: skip
GRANULARITIES = {kind.__name__: kind for kind in (PerTensor, PerChannel, PerBlock)}

NumPyArray: TypeAlias = NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf of a network in a file.

    Attributes:
      keys: its path; integers for places in sequences.
      value: an array, or what is packed; of NumPy's arrays.
      qset: the name of its set, as in 'Uniform(4)'; None if it is not quantized.
      granularity: of its scales.
    """

    keys: tuple[str | int, ...]
    value: Any
    qset: str | None = None
    granularity: Granularity | None = None

    @property
    def name(self) -> str:
        """Its '/'-joined path."""
        return "/".join(map(str, self.keys))

    def dequantize(self) -> NumPyArray:
        """The weights, by NumPy: there is nothing to compile for each shape."""
        if self.granularity is None:
            return self.value
        packed, groups = self.value, self.granularity.groups(self.value.shape)
        w = _at_unit_scale(packed).reshape(groups.view)
        w *= packed.scale.reshape(groups.scale_view)
        if packed.spacing is not None:
            spacing = packed.spacing.reshape(groups.scale_view)
            w = np.round(w * (1 / spacing)) * spacing
        if packed.spacing is not None or packed.scale.min() < np.finfo(packed.scale.dtype).tiny:
            w += 0  # no −0
        return w.reshape(packed.shape).astype(packed.dtype, copy=False)


def symbols_of(packed: Packed) -> NumPyArray:
    """The index of each weight's level, of one axis."""
    count = math.prod(packed.shape)
    return np.concatenate(unpack_rows(packed.data, count, packed.levels))[:count]


def _at_unit_scale(packed: Packed) -> NumPyArray:
    """Each weight's level, of one axis, in memory that JAX on the CPU takes over without a copy."""
    count, most, dtype = math.prod(packed.shape), len(packed.magnitudes) - 1, packed.scale.dtype
    rows, _, size = layout(count, packed.levels)
    memory = np.empty(rows * size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    w = memory[start : start + rows * size * dtype.itemsize].view(dtype).reshape(rows, size)
    magnitudes = np.array(packed.magnitudes, dtype)
    table = np.concatenate([magnitudes, -magnitudes[:0:-1]])  # code −1 is the last entry
    for row, symbols in zip(w, unpack_rows(packed.data, count, packed.levels), strict=True):
        codes = codes_of_symbols(symbols, most, packed.has_zero)
        row[:] = codes if are_consecutive(packed.magnitudes) else table[codes]
    return w.reshape(-1)[:count]


def encode(leaves: Sequence[Leaf]) -> bytes:
    """A file's bytes.

    Raises:
      ValueError: if a leaf is not to be stored, or two have one name; it names them.
    """
    tensors: dict[str, NumPyArray] = {}
    for leaf in leaves:
        for name, tensor in _tensors_of(leaf).items():
            if tensor.dtype.name not in DTYPES.values():
                raise ValueError(f"{leaf.name!r} is of dtype {tensor.dtype}, which is not stored.")
            if name in tensors:
                raise ValueError(f"Two leaves need the name {name!r}; rename one.")
            tensors[name] = np.asarray(tensor, order="C")
    header = {"sha256": NO_SUM, "version": VERSION, "leaves": [*map(_entry_of, leaves)]}
    metadata = {KEY: json.dumps(header, separators=(",", ":"))}
    raw = optional("safetensors.numpy").save(tensors, metadata)
    # The first such digits are those of the header, which come before all that a user named.
    return raw.replace(NO_SUM.encode(), hashlib.sha256(raw).hexdigest().encode(), 1)


def _tensors_of(leaf: Leaf) -> dict[str, NumPyArray]:
    packed = leaf.value
    if leaf.granularity is None:
        return {leaf.name: packed}
    parts = {"codes": packed.data, "scale": packed.scale, "spacing": packed.spacing}
    return {f"{leaf.name}:{part}": array for part, array in parts.items() if array is not None}


def _entry_of(leaf: Leaf) -> dict[str, Any]:
    packed, granularity = leaf.value, cast("Any", leaf.granularity)
    if granularity is None:
        return {"path": leaf.keys}
    kind = type(granularity).__name__
    if GRANULARITIES.get(kind) is not type(granularity):
        raise ValueError(
            f"{leaf.name!r} has scales by {granularity!r}, which is not stored; only those by "
            f"{', '.join(GRANULARITIES)} are."
        )
    values = {name: value for name, value in vars(granularity).items() if name != "axis_name"}
    positive = packed.magnitudes[1:]
    levels = [-m for m in reversed(positive)] + [0.0] * packed.has_zero + [*positive]
    return {
        "path": leaf.keys,
        "set": leaf.qset,
        "levels": levels,
        "granularity": {"kind": kind, **values},
        "shape": packed.shape,
        "dtype": jnp.dtype(packed.dtype).name,
    }


def decode(raw: bytes) -> list[Leaf]:
    """The leaves in a file's bytes, of NumPy's arrays.

    Raises:
      ValueError: if anything in them is wrong; it says what.
    """
    tensors = _read_tensors(raw)
    header = _read_header(raw)
    if header.get("version") != VERSION:
        raise ValueError(
            f"it is of version {header.get('version')!r} of the format, and this version of "
            f"brelax_jax reads {VERSION}; upgrade it."
        )
    digest = header.get("sha256")
    if not (isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest)):
        raise ValueError(f"its checksum is {digest!r}, which is not a SHA-256")
    if hashlib.sha256(raw.replace(digest.encode(), NO_SUM.encode(), 1)).hexdigest() != digest:
        raise ValueError("its checksum does not match: it was altered; get the file again")
    leaves = [_read_leaf(entry, tensors) for entry in _typed(header, "leaves", list)]
    if tensors:
        raise ValueError(f"its tensors {sorted(tensors)} belong to no leaf of the header")
    return leaves


def _read_tensors(raw: bytes) -> dict[str, NumPyArray]:
    safetensors = optional("safetensors")
    try:
        found = safetensors.deserialize(raw)
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is not a complete safetensors file: {error}") from None
    tensors: dict[str, NumPyArray] = {}
    for name, tensor in found:
        if tensor["dtype"] not in DTYPES:
            raise ValueError(f"its tensor {name!r} is of dtype {tensor['dtype']}, which is unknown")
        flat = np.frombuffer(tensor["data"], jnp.dtype(DTYPES[tensor["dtype"]]))
        tensors[name] = flat.reshape(tensor["shape"])
    return tensors


def _read_header(raw: bytes) -> dict[str, Any]:
    size = int.from_bytes(raw[:8], "little")
    text = (json.loads(raw[8 : 8 + size]).get("__metadata__") or {}).get(KEY)
    if text is None:
        raise ValueError("it was not saved by brelax_jax.save: its header does not describe sets")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header of brelax_jax is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("its header of brelax_jax is not a JSON object")
    return header


def _read_leaf(entry: Any, tensors: dict[str, NumPyArray]) -> Leaf:
    """A leaf, whose tensors are taken out of `tensors`."""
    if not isinstance(entry, dict):
        raise ValueError(f"its header has {entry!r} where a leaf should be")
    keys = tuple(_typed(entry, "path", list))
    if not all(type(key) in (str, int) for key in keys):
        raise ValueError(f"its header has a path {keys!r}, not of strings and integers")
    leaf = Leaf(keys, None)
    if "levels" not in entry:
        return dataclasses.replace(leaf, value=_take(tensors, leaf.name))
    try:
        granularity = _read_granularity(_typed(entry, "granularity", dict))
        packed = _read_packed(leaf.name, entry, granularity, tensors)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"its leaf {leaf.name!r} is contradictory: {error}") from None
    return Leaf(keys, packed, _typed(entry, "set", str), granularity)


def _read_granularity(entry: dict[str, Any]) -> Granularity:
    kind = GRANULARITIES.get(entry.get("kind", ""))
    values = {name: value for name, value in entry.items() if name in ("size", "axis")}
    if kind is None or len(values) + 1 != len(entry):
        raise ValueError(f"its granularity is not known: {entry!r}")
    return kind(**values)


def _read_packed(
    name: str, entry: dict[str, Any], granularity: Granularity, tensors: dict[str, NumPyArray]
) -> Packed:
    shape, dtype = tuple(_typed(entry, "shape", list)), _typed(entry, "dtype", str)
    if not all(type(size) is int and size > 0 for size in shape) or dtype not in FLOATS:
        raise ValueError(f"its shape is {shape!r} and its dtype {dtype!r}")
    qset = ScaledLevels(_typed(entry, "levels", list))
    packed = Packed(
        cast("Any", _take(tensors, f"{name}:codes")),
        cast("Any", _take(tensors, f"{name}:scale")),
        shape,
        qset.table,
        jnp.dtype(dtype),
        0.0 in qset.levels,
        cast("Any", tensors.pop(f"{name}:spacing", None)),
    )
    _check_scales(packed, granularity)
    _, planes, size = layout(math.prod(shape), packed.levels)
    if packed.data.dtype != np.uint8 or packed.data.shape != (planes * size,):
        raise ValueError(
            f"codes of shape {shape} and {packed.levels} levels take {planes * size} bytes, but "
            f"there is {packed.data.dtype} of shape {packed.data.shape}"
        )
    full = 2**planes == packed.levels  # every symbol is one of a level
    largest = 242 if packed.levels == 3 else packed.levels - 1
    if not full and (packed.data if packed.levels == 3 else symbols_of(packed)).max() > largest:
        raise ValueError("it has codes that belong to no level")
    return packed


def _check_scales(packed: Packed, granularity: Granularity) -> None:
    wanted = granularity.groups(packed.shape).scale
    for name, array in {"scales": packed.scale, "spacing": packed.spacing}.items():
        if array is None:
            continue
        if array.dtype.name not in ("float32", "float64") or array.shape != wanted:
            raise ValueError(
                f"{granularity} of shape {packed.shape} has {name} of shape {wanted}, but there is "
                f"{array.dtype} of shape {array.shape}"
            )
        if not (np.isfinite(array) & (array >= 0)).all():
            raise ValueError(f"its {name} must be finite and not negative")
    if packed.spacing is not None and not packed.spacing.all():
        raise ValueError("its spacing must not be 0")
    largest = packed.scale.max().astype(np.float64) * packed.magnitudes[-1]
    if largest > float(jnp.finfo(packed.dtype).max):
        raise ValueError(f"its largest weight would be {largest}, beyond {packed.dtype}")


def _take(tensors: dict[str, NumPyArray], name: str) -> NumPyArray:
    if name not in tensors:
        raise ValueError(f"it has no tensor {name!r}, or two leaves need it")
    return tensors.pop(name)


def _typed(entry: dict[str, Any], name: str, kind: type[Any]) -> Any:
    if not isinstance(entry.get(name), kind):
        raise ValueError(f"its header has {name!r}: {entry.get(name)!r}, not a {kind.__name__}")
    return entry[name]
