"""Searches at their end, and every kind of them on the CPU."""

import contextlib

from brelax_jax.sets import _fit, _problem, _search, _together
from brelax_jax.sets._weights import Weights

KINDS = {"in turn": "cpu", "together": "gpu"}
KINDS_OF_SMALL_GROUPS = {**KINDS, "where they lie": "tpu"}


def in_turn(a, magnitudes, group) -> _search.Search:
    """The search for the scales of one array, one scale a round, at its end."""
    source = _problem.Source.of(Weights(a, group))
    return _search.branch_and_bound(_problem.problem_of(tuple(map(float, magnitudes)), source))


def together(a, magnitudes, group, shape=_together.MANY) -> _together.Search:
    """The search as it is on accelerators, at its end."""
    part = _together.Part.of(tuple(map(float, magnitudes)), [Weights(a, group)])
    return _together.branch_and_bound([part], shape)[0]


@contextlib.contextmanager
def forced(kind):
    """All searches of this kind, whatever the platform; programs that are traced here only."""
    _fit.FORCED = kind
    try:
        yield
    finally:
        _fit.FORCED = None
