"""Parameters of tests: the suite runs so many that it has each kind, `make soak` the others."""

import pytest


def some(cases, suite):
    """Each case; those in `suite` run there."""
    return [pytest.param(case, marks=[] if case in suite else pytest.mark.soak) for case in cases]


def pairs(firsts, seconds):
    """Each (first, second); the suite runs enough of them to have every one of both."""
    firsts, seconds = list(firsts), list(seconds)
    turns = range(max(len(firsts), len(seconds)))
    suite = {(turn % len(firsts), turn % len(seconds)) for turn in turns}
    return [
        pytest.param(first, second, marks=[] if (i, j) in suite else pytest.mark.soak)
        for i, first in enumerate(firsts)
        for j, second in enumerate(seconds)
    ]
