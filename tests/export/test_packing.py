"""Codes in few bits: the inverse gives them back, by JAX and by NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import brelax_jax as brx
from brelax_jax.export._packing import (
    codes_of_symbols,
    layout,
    levels_of,
    pack_leaf,
    pack_symbols,
    symbols_of,
    unpack_rows,
)
from tests.helpers.altered import quantized

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RNG = np.random.default_rng(0)
LEAVES = {
    "binary": quantized(RNG, (5, 3, 7), (1, 1, 1), [1], False),
    "ternary": quantized(RNG, (4, 6), (1, 6), [1]),
    "2 bits": quantized(RNG, (9,), (1,), [1, 3], False, "bfloat16"),
    "3 bits": quantized(RNG, (), (), [1, 2, 4], dtype="float16"),
    "4 bits": quantized(RNG, (8, 5), (2, 5), range(1, 8), spacing=2.0**-20),
    "empty": quantized(RNG, (0, 4), (1, 1), [1]),
}


@settings(deadline=None, max_examples=100)
@given(st.integers(2, 255), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_symbols_of_any_number_of_levels_come_back(levels, count, seed):
    symbols = np.random.default_rng(seed).integers(0, levels, count).astype("u1")
    data = pack_symbols(symbols, levels, np)
    rows, planes, size = layout(count, levels)
    assert data.dtype == np.uint8
    assert data.shape == (planes * size,)
    bits = 8 / 5 if levels == 3 else np.ceil(np.log2(levels))
    assert 8 * len(data) <= bits * (count + rows - 1) + 1e-9
    back = np.concatenate(unpack_rows(data, count, levels))[:count]
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, symbols)


@pytest.mark.parametrize("has_zero", [True, False])
@pytest.mark.parametrize("most", [1, 2, 127])
def test_symbols_are_the_levels_in_their_order(most, has_zero):
    codes = np.array([code for code in range(-most, most + 1) if code or has_zero], "i1")
    symbols = symbols_of(codes, most, has_zero)
    np.testing.assert_array_equal(symbols, np.arange(len(codes)))
    back = codes_of_symbols(symbols, most, has_zero)
    assert back.dtype == np.int8
    np.testing.assert_array_equal(back, codes)


def test_packed_under_jit_is_what_numpy_packs():
    packed = jax.jit(brx.pack)(LEAVES)
    unpacked = jax.jit(lambda tree: {name: leaf.unpack() for name, leaf in tree.items()})(packed)
    for name, leaf in LEAVES.items():
        np.testing.assert_array_equal(packed[name].data, pack_leaf(leaf, np).data)
        assert jax.tree.structure(unpacked[name]) == jax.tree.structure(leaf)
        for back, array in zip(jax.tree.leaves(unpacked[name]), jax.tree.leaves(leaf), strict=True):
            assert back.dtype == array.dtype
            np.testing.assert_array_equal(back, array)
    assert [packed[name].levels for name in LEAVES] == [2, 3, 4, 7, 15, 3]
    assert [packed[name].data.size for name in LEAVES] == [14, 5, 4, 3, 20, 0]


def test_dequantized_are_codes_and_packed_ones_alike():
    tree = {"kernel": LEAVES["4 bits"], "bias": jnp.ones(2)}
    wanted, found = jax.jit(lambda tree: (brx.dequantize(tree), brx.dequantize(brx.pack(tree))))(
        tree
    )
    assert found["kernel"].dtype == wanted["kernel"].dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_a_stack_is_packed_under_vmap():
    leaf = quantized(RNG, (3, 6), (1, 1), [1])
    stack = jax.tree.map(lambda array: np.stack([array, -array]), jax.device_get(leaf))
    packed = jax.jit(jax.vmap(brx.pack))(stack)
    assert packed.data.shape == (2, 4)
    codes = jax.jit(jax.vmap(lambda packed: packed.unpack().codes))(packed)
    np.testing.assert_array_equal(codes, stack.codes)


def test_sets_say_whether_0_is_a_level():
    w = jax.ShapeDtypeStruct((2,), "float32")
    for qset, levels in ((brx.Binary(), 2), (brx.Ternary(), 3), (brx.Uniform(4), 15)):
        assert levels_of(jax.eval_shape(qset.quantize, w)) == levels


def test_nothing_to_pack_is_an_error():
    with pytest.raises(ValueError, match="no Quantized, only 2 other leaves"):
        brx.pack({"kernel": jnp.ones(2), "bias": jnp.ones(2)})
