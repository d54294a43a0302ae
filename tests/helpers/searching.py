"""Searches at their end, and both shapes of them on the CPU."""

import contextlib

import jax

from brelax_jax.sets import _together
from brelax_jax.sets._arrays import Weights
from brelax_jax.sets._search import Search, branch_and_bound

SHAPES = {"cpu": _together.CPU, "accelerator": _together.ACCELERATOR}


def search_of(a, magnitudes, group, shape=_together.CPU) -> Search:
    """The search for the scales of magnitudes of weights up to about 1, at its end."""
    part = _together.Part.of(tuple(map(float, magnitudes)), [Weights(a, group)], shape)
    return branch_and_bound([part.errors], [part.problem()], shape)[0]


@contextlib.contextmanager
def forced(shape):
    """All searches in this shape, whatever the platform."""
    jax.clear_caches()
    _together.FORCED = shape
    try:
        yield
    finally:
        _together.FORCED = None
        jax.clear_caches()
