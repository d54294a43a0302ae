"""Codes of few bits, packed into bytes.

The *symbol* of a weight is the index of its level: 0, 1, 2, … Symbols are taken in `in_byte` rows
of m, the last one filled up with zeros, and a column of a row becomes a byte:

- Ternary: five rows. A byte is Σ symbol_k · 3^k.
- Other sets: eight rows, and a plane of m bytes for each bit that tells the levels apart. A byte of
  plane j is Σ (bit j of symbol_k) · 2^k.

So rows are contiguous, and whole rows are read and written at once.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, overload

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from brelax_jax.sets import Quantized


def layout(count: int, levels: int) -> tuple[int, int, int]:
    """How `count` symbols are packed: rows, planes, and bytes in a plane."""
    rows, planes = (5, 1) if levels == 3 else (8, (levels - 1).bit_length())
    return rows, planes, -(-count // rows)


def pack_symbols(symbols: Any, levels: int, xp: Any = jnp) -> Any:
    """Symbols as bytes; both uint8 of one axis, of JAX or, with `xp=numpy`, of NumPy."""
    count, planes, size = layout(len(symbols), levels)
    rows = xp.pad(symbols, (0, count * size - len(symbols))).reshape(count, size)
    if levels == 3:
        return sum(rows[k] * 3**k for k in range(count))
    return xp.concatenate(
        [sum((rows[k] >> j & 1) << k for k in range(count)) for j in range(planes)]
    )


def unpack_rows(data: Any, count: int, levels: int) -> list[Any]:
    """The rows of symbols that `pack_symbols` made these bytes of."""
    rows, planes, size = layout(count, levels)
    if levels == 3:
        quotients = [data // 3**k for k in range(rows + 1)]
        return [low - 3 * high for low, high in itertools.pairwise(quotients)]
    first, *others = data.reshape(planes, size)
    symbols = [first >> k & 1 for k in range(rows)]
    for j, plane in enumerate(others, start=1):
        symbols = [row | (plane >> k & 1) << j for k, row in enumerate(symbols)]
    return symbols


def symbols_of(codes: Any, most: int, has_zero: bool) -> Any:
    """Codes from −most to most as symbols; without a level 0 no code is 0."""
    above = 0 if has_zero else (codes > 0).view("int8")
    return (codes - above + most).view("uint8")  # what int8 lost at most wraps back


def codes_of_symbols(symbols: Any, most: int, has_zero: bool) -> Any:
    """The inverse of `symbols_of`."""
    above = 0 if has_zero else (symbols >= most).view("int8")
    return symbols.view("int8") - most + above


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["data", "scale", "spacing"],
    meta_fields=["shape", "magnitudes", "dtype", "has_zero"],
)
@dataclasses.dataclass(frozen=True)
class Packed:
    """A `Quantized` whose codes take as few bits as its levels need, made by `pack`.

    Binary codes take one bit, ternary ones 1.6, others as many whole bits as tell the levels apart.
    A pytree whose leaves are `data`, `scale` and, where there is one, `spacing`; so it can be an
    argument of a jitted function that unpacks it. Weights then stay packed in memory.

    Attributes:
      data: uint8, of one axis; docs/file-format.md has the layout.
      scale: as in `Quantized`.
      shape: the weight's.
      magnitudes: as in `Quantized`.
      dtype: as in `Quantized`.
      has_zero: as in `Quantized`.
      spacing: as in `Quantized`.
    """

    data: Array
    scale: Array
    shape: tuple[int, ...]
    magnitudes: tuple[float, ...]
    dtype: DTypeLike
    has_zero: bool = True
    spacing: Array | None = None

    @property
    def levels(self) -> int:
        """How many levels there are."""
        return levels_of(self)

    def unpack(self) -> Quantized:
        """The codes and scales, bit for bit those that were packed."""
        return _unpack(self)

    def dequantize(self) -> Array:
        """The weights: what `unpack().dequantize()` gives."""
        return self.unpack().dequantize()


def levels_of(quantized: Quantized | Packed) -> int:
    """How many levels there are."""
    return 2 * len(quantized.magnitudes) - 2 + quantized.has_zero


@overload
def pack(quantized: Quantized) -> Packed: ...
@overload
def pack(quantized: Any) -> Any: ...
def pack(quantized: Any) -> Any:
    """Codes in as few bits as their levels need; `unpack` of the result is the inverse.

    Args:
      quantized: a `Quantized`, or a tree with some, as `quantized_tree` gives it.

    Returns:
      A `Packed`, or the tree with one in place of each `Quantized`; other leaves as they are.

    Raises:
      ValueError: if there is no `Quantized`.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> packed = brx.pack(brx.Ternary().quantize(jnp.array([0.1, -1.0, 3.0, 2.0, -3.0])))
    >>> packed.data  # the digits 1, 1, 2, 2, 0 of base 3
    Array([76], dtype=uint8)
    >>> packed.unpack().codes
    Array([ 0,  0,  1,  1, -1], dtype=int8)
    """
    leaves = jax.tree.leaves(quantized, is_leaf=is_quantized)
    if not any(map(is_quantized, leaves)):
        raise ValueError(
            f"quantized holds no Quantized, only {len(leaves)} other leaves. Pass what "
            "quantized_tree(opt_state, params) or quantize(w) of a set gives."
        )
    return jax.tree.map(
        lambda leaf: _pack(leaf) if is_quantized(leaf) else leaf, quantized, is_leaf=is_quantized
    )


def dequantize(tree: Any) -> Any:
    """A tree with the weights in place of each `Packed` and `Quantized`.

    Call it inside the jitted forward pass; then only packed weights stay in memory between calls.

    Args:
      tree: any pytree, as `quantized_tree`, `pack` or `load(path, packed=True)` gives it.

    >>> import brelax_jax as brx, jax, jax.numpy as jnp
    >>> packed = {"kernel": brx.pack(brx.Binary().quantize(jnp.array([[0.5, -1.5]])))}
    >>> jax.jit(lambda tree, x: x @ brx.dequantize(tree)["kernel"])(packed, jnp.ones((1, 1)))
    Array([[ 1., -1.]], dtype=float32)
    """
    return jax.tree.map(
        lambda leaf: leaf.dequantize() if is_coded(leaf) else leaf, tree, is_leaf=is_coded
    )


def is_quantized(leaf: Any) -> bool:
    """Whether it is a `Quantized`."""
    return isinstance(leaf, Quantized)


def is_coded(leaf: Any) -> bool:
    """Whether it is a `Quantized` or a `Packed`."""
    return isinstance(leaf, Quantized | Packed)


def pack_leaf(quantized: Quantized, xp: Any = jnp) -> Packed:
    """`pack` of one leaf, of JAX's arrays or, with `xp=numpy`, of NumPy's."""
    most = len(quantized.magnitudes) - 1
    symbols = symbols_of(quantized.codes.reshape(-1), most, quantized.has_zero)
    return Packed(
        pack_symbols(symbols, levels_of(quantized), xp),
        quantized.scale,
        quantized.codes.shape,
        quantized.magnitudes,
        quantized.dtype,
        quantized.has_zero,
        quantized.spacing,
    )


_pack = jax.jit(pack_leaf)


@jax.jit
def _unpack(packed: Packed) -> Quantized:
    # A constant behind the barrier is not unpacked by the compiler, so a program stays as small.
    data = lax.optimization_barrier(packed.data)
    count = math.prod(packed.shape)
    most = len(packed.magnitudes) - 1
    rows = unpack_rows(data, count, packed.levels)
    codes = jnp.concatenate([codes_of_symbols(row, most, packed.has_zero) for row in rows])[:count]
    return Quantized(
        codes.reshape(packed.shape),
        packed.scale,
        packed.magnitudes,
        packed.dtype,
        packed.spacing,
        packed.has_zero,
    )
