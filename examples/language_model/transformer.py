"""A small decoder-only transformer (Flax Linen), whose places are told apart by a bias: `alibi`.

Its kernels are matrices (inputs, outputs): `PerChannel()` gives each output channel a scale.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Dense = partial(nn.Dense, use_bias=False)


class Transformer(nn.Module):
    """From characters to the logits of the next one, at each place of each text.

    Attributes:
      characters: how many different ones there are.
      width: numbers that stand for a place.
      layers: blocks of attention and two dense layers.
      heads: of each attention; they divide the width.
    """

    characters: int
    width: int
    layers: int
    heads: int

    @nn.compact
    def __call__(self, codes: Array) -> Array:
        # All places in one axis: kernels' gradients are plain matrix products, faster on CPU.
        x = nn.Embed(self.characters, self.width, name="characters")(codes.ravel())
        for i in range(self.layers):
            x = Block(self.heads, name=f"block_{i}")(x, codes.shape)
        return Dense(self.characters, name="head")(norm(x)).reshape(*codes.shape, -1)


class Block(nn.Module):
    """Attention to what came before, then two dense layers, each added to what it reads."""

    heads: int

    @nn.compact
    def __call__(self, x: Array, shape: tuple[int, ...]) -> Array:
        width = x.shape[-1]
        qkv = Dense(3 * width, name="qkv")(norm(x))
        y = attention(qkv.reshape(*shape, self.heads, -1)).reshape(x.shape)
        x = x + Dense(width, name="out")(norm(y))
        y = Dense(4 * width, name="up")(norm(x))
        return x + Dense(width, name="down")(jnp.square(nn.relu(y)))


def attention(qkv: Array) -> Array:
    """Causal attention of (texts, places, heads, 3·size). Places are told apart by a bias that
    falls with the distance, faster in the first heads (ALiBi, Press et al., arXiv 2108.12409).
    """
    length, heads = qkv.shape[1:3]
    query, key, value = jnp.split(qkv, 3, axis=-1)
    slopes = 2.0 ** (-8 * jnp.arange(1, heads + 1) / heads)
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    bias = -slopes[:, None, None] * distance
    return jax.nn.dot_product_attention(query, key, value, bias[None], is_causal=True)


def norm(x: Array) -> Array:
    """Root mean square 1 at each place: RMSNorm without a scale of its own."""
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
