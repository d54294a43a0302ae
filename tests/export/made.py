"""Kernels on quantized sets, made by hand."""

import jax.numpy as jnp
import numpy as np

import brelax_jax as brx
from tests.helpers.training import array

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def integers(largest):
    return tuple(map(float, range(largest + 1)))


def quantized(magnitudes, shape, groups, binary=False, scale_dtype="float32", seed=0, dtype=None):
    """Random codes, and random scales that a dtype can hold; the first one is 0."""
    rng = np.random.default_rng(seed)
    least = 1 if binary else 0
    codes = rng.integers(least, len(magnitudes), shape) * rng.choice([-1, 1], shape)
    scale = rng.lognormal(-2, 1, groups)
    scale = scale.astype(jnp.dtype(scale_dtype)).astype(np.float32)
    if scale.size > 1:
        scale.flat[0] = 0
    return brx.Quantized(array(codes, "int8"), array(scale), magnitudes, dtype or jnp.float32)


def bits(w):
    return np.ascontiguousarray(w, np.float32).view(np.int32)


def weights(given):
    """What codes and scales multiply out to, by NumPy; no −0."""
    codes, scale = np.asarray(given.codes), np.asarray(given.scale)
    for axis, (entries, groups) in enumerate(zip(codes.shape, scale.shape, strict=True)):
        scale = np.repeat(scale, entries // groups, axis)
    levels = np.sign(codes) * np.array(given.magnitudes, np.float32)[np.abs(codes)]
    return (levels * scale + 0.0).astype(given.dtype)
