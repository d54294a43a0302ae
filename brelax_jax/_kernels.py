"""Which leaves are kernels, by their names. One set, given alone, applies to the kernels only."""

import math
import re
from typing import Any

import jax.numpy as jnp

VECTORS = {"bias", "biases", "scale", "scales", "offset", "offsets", "gamma", "beta", "slope"}
TOKENS = {"token", "tokens", "tok"}
POSITIONS = {"pos", "posemb", "position", "positions", "positional"}
EMBEDDINGS = {"emb", "wte", "wpe"}
NORMS = {"norm", "norms", "ln", "bn", "gn", "rms"}


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether one set, given alone, applies to this leaf.

    It has to be floating, of rank 2 or more and not empty. Its own name must not be that of a bias,
    a scale or an offset, and no name on its path that of an embedding, a position, a token or, but
    for leaves named `kernel` or `w`, a norm.
    """
    return (
        jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and jnp.ndim(leaf) >= 2
        and math.prod(jnp.shape(leaf)) > 0
        and not _is_named_otherwise(path)
    )


def _is_named_otherwise(path: str) -> bool:
    names = [_words(name) for name in path.split("/")]
    own = names[-1]
    if own in (["b"], ["cls"]) or not VECTORS.isdisjoint(own):
        return True
    if any(_is_table(words) for words in names):
        return True
    return own not in (["kernel"], ["w"]) and any(_is_norm(words) for words in names)


def _words(name: str) -> list[str]:
    """The words of a name: 'LayerNorm_0' and 'layer_norm' have two."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)]


def _is_table(words: list[str]) -> bool:
    """Embeddings and positions; tokens by the last word: 'token_mixing' has kernels."""
    known = EMBEDDINGS | POSITIONS
    is_embedding = any(word.startswith("embed") or word in known for word in words)
    return is_embedding or (bool(words) and words[-1] in TOKENS)


def _is_norm(words: list[str]) -> bool:
    return any(word in NORMS or word.endswith("norm") for word in words)
