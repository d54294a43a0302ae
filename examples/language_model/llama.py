"""A small network of the Llama architecture (Flax Linen): the one that llama.cpp runs.

Its kernels are matrices (inputs, outputs): `PerChannel()` gives each output channel a scale.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

EPSILON = 1e-6  # of the norms
BASE = 10_000.0  # of the rotary positions
WIDER = 3  # how much wider the dense layers are inside

Dense = partial(nn.Dense, use_bias=False)
Norm = partial(nn.RMSNorm, epsilon=EPSILON)


class Llama(nn.Module):
    """From characters to the logits of the next one, at each place of each text.

    Attributes:
      characters: how many different ones there are.
      width: numbers that stand for a place.
      layers: blocks of attention and three dense layers.
      heads: of each attention; twice their number divides the width.
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
        x = Norm(name="norm")(x)
        return Dense(self.characters, name="head")(x).reshape(*codes.shape, -1)


class Block(nn.Module):
    """Attention to what came before, then SwiGLU (Shazeer, arXiv 2002.05202), each added to what it
    reads.
    """

    heads: int

    @nn.compact
    def __call__(self, x: Array, shape: tuple[int, ...]) -> Array:
        width = x.shape[-1]
        y = Norm(name="attention_norm")(x)
        query, key, value = (
            Dense(width, name=name)(y).reshape(*shape, self.heads, -1)
            for name in ("query", "key", "value")
        )
        y = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
        x = x + Dense(width, name="out")(y.reshape(x.shape))
        y = Norm(name="dense_norm")(x)
        gate, up = (Dense(WIDER * width, name=name)(y) for name in ("gate", "up"))
        return x + Dense(width, name="down")(nn.silu(gate) * up)


def rotated(x: Array) -> Array:
    """Each pair of neighbors in (texts, places, heads, size) turned by an angle that grows with the
    place, faster in the first pairs (RoPE, Su et al., arXiv 2104.09864).
    """
    places, size = x.shape[1], x.shape[-1]
    speeds = BASE ** (-jnp.arange(0, size, 2) / size)
    angles = jnp.arange(places)[:, None, None] * speeds
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., ::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)
