"""Levels by their index: the nearest level of a weight, and the value at an index."""

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

COMPARED = 8  # up to so many magnitudes, comparing with each is faster than dividing


def level_index(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """The index of the magnitude for which |a − scale·magnitude| is least, as a float of a's dtype.

    Args:
      a: nonnegative floats.
      scale: nonnegative, broadcasts against `a`.
      magnitudes: ascending and nonnegative.
    """
    if len(magnitudes) > COMPARED and are_consecutive(magnitudes):
        unit = jnp.where(scale > 0, scale, 1)
        shift = shift_of(unit)
        nearest = jnp.round((a * shift) / (unit * shift))
        return jnp.minimum(nearest, float(len(magnitudes) - 1))
    index = jnp.zeros_like(a)
    for lower, upper in itertools.pairwise(magnitudes):
        index += (a > scale * ((lower + upper) / 2)).astype(a.dtype)
    return index


def nearest_magnitude(a: Array, scale: Array, magnitudes: Sequence[float]) -> Array:
    """The magnitude for which |a − scale·magnitude| is least; see `level_index`."""
    return at_index(level_index(a, scale, magnitudes), magnitudes)


def magnitude_of(w: Array) -> Array:
    """|w|, where other passes over w take its absolute values too.

    XLA on CPU would write these to memory, to compute them once, and read them in each pass. It
    does not see that they are the same.
    """
    return jnp.maximum(w, -w)


def shift_of(unit: Array) -> Array:
    """What to multiply a divisor by, so that its reciprocal is not subnormal if it is huge."""
    return jnp.where(unit > 1, 2.0**-8, 1)


def at_index(index: Array, magnitudes: Sequence[float]) -> Array:
    """The magnitudes at these (float) indices, elementwise and without a gather."""
    if are_consecutive(magnitudes):
        return index
    values = jnp.full_like(index, magnitudes[0])
    for position, magnitude in enumerate(magnitudes[1:], start=1):
        values = jnp.where(index >= position, magnitude, values)
    return values


def are_consecutive(magnitudes: Sequence[float]) -> bool:
    """Whether they are 0, 1, 2, …"""
    return tuple(magnitudes) == tuple(range(len(magnitudes)))
