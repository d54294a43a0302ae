"""The search for the scales of small groups on CPU: all groups at once, and little to remember.

The bound and the certificate are those of `_search.py`, but a group has few entries. So what is
remembered of each costs as much as evaluating E, and a reduction along so short an axis more. Here
the entries of the groups are rows, which are added. Nothing is remembered of what is ahead: the
search goes up from the least scale by steps, as far as the bound is expected to allow. Where it
does not, the next step is a shorter one.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._joined import are_local
from brelax_jax.sets._problem import Goal, Known, Problem, Source, interval, is_open
from brelax_jax.sets._search import ROUNDS, first_scales, searched_scale
from brelax_jax.sets._weights import Weights

MOST_ROWS = 64  # programs grow with them
GROWTH = 1.5  # of a step, at least, after one that the bound allowed


class Rows(Group):
    """Groups of few entries, which lie along the first axes."""

    def _reduced(self, combine: Callable[[Array, Array], Array], x: Array) -> Array:
        for axis in self.axes:
            x = functools.reduce(combine, jnp.split(x, x.shape[axis], axis))
        return x

    def sum(self, x: Array) -> Array:
        """See `Group.sum`."""
        return self._reduced(jnp.add, x)

    def mean(self, x: Array) -> Array:
        """See `Group.mean`."""
        return self.sum(x) / self.size(x)

    def max(self, x: Array, initial: float | None = None) -> Array:
        """See `Group.max`."""
        largest = self._reduced(jnp.maximum, x)
        return largest if initial is None else jnp.maximum(largest, initial)


class Sweep(NamedTuple):
    """What the loop carries.

    Attributes:
      below: up to here there is nothing better than the best.
      scale: the larger one to evaluate next.
      best: the scale of the least error so far.
      rounds: evaluations so far.
    """

    below: Known
    scale: Array
    best: Known
    rounds: Array


def has_rows(weights: Weights, most: int = MOST_ROWS) -> bool:
    """Whether each of several groups lies on one device and has at most so many entries."""
    w, group = weights.w, weights.group
    spec = (*jax.typeof(w).sharding.spec, *[None] * w.ndim)
    return (
        len(group.axes) < w.ndim
        and not group.axis_names
        and all(spec[axis] is None for axis in group.axes)
        and group.size(w) <= most
    )


def swept_scale(
    magnitudes: Sequence[float], weights: Weights, before: Array | None = None
) -> Array:
    """As `searched_scale`."""
    w, group, kept, *_ = weights
    first = tuple(range(len(group.axes)))

    def in_rows(x: Array) -> Array:
        x = jnp.moveaxis(x, group.axes, first)
        # Without a short last axis programs are faster, but XLA would move sharded groups.
        return x.reshape(*x.shape[: len(first)], -1) if are_local() else x

    w, kept = jax.tree.map(in_rows, (w, kept))
    rows = Source.of(weights._replace(w=w, kept=kept, group=Rows(first)), before)
    return searched_scale(magnitudes, rows, sweep).reshape(group.numbers(weights.w))


def sweep(problem: Problem) -> Sweep:
    """The search at its end."""
    nodes = lax.map(problem.known, first_scales(problem.low, problem.high, problem.unit))
    best = _best_of(nodes, problem.goal)
    below, end = nodes[0], nodes[-1, 0]

    def is_uncertain(sweep: Sweep) -> Array:
        return (sweep.rounds < ROUNDS) & jnp.any(sweep.below[0] < end)

    start = Sweep(below, _onward(problem, below, best), best, jnp.zeros((), jnp.int32))
    return lax.while_loop(is_uncertain, functools.partial(_step, problem, end), start)


@jax.jit
def _best_of(nodes: Known, goal: Goal) -> Known:
    """The best of some scales, or the scale to keep."""
    least = jnp.argmin(nodes[:, 1], axis=0)[None, None]
    best = jnp.take_along_axis(nodes, least, axis=0)[0]
    far = best[1] >= goal.search_below(goal.kept)
    return jnp.where(far, goal.kept, best)


def _step(problem: Problem, end: Array, sweep: Sweep) -> Sweep:
    """After evaluating the next scale of each group."""
    below, goal, unit = sweep.below, problem.goal, problem.unit
    scale = jnp.minimum(sweep.scale, end)
    if unit.allowed is not None:
        scale = jnp.clip(unit.at_most(scale), unit.after(below[0]), end)
    # The barriers keep XLA from computing what is used several times as often.
    head = lax.optimization_barrier(problem.known(lax.optimization_barrier(scale)))
    better = head[1] < goal.replace_below(sweep.best)
    best = lax.optimization_barrier(jnp.where(better, head, sweep.best))
    shorter = interval(below, head, goal.energy)[1]
    onward = jnp.maximum(_onward(problem, head, best), head[0] + GROWTH * (head[0] - below[0]))
    passed = ~is_open(below, head, best, goal, unit)
    passed, scale = lax.optimization_barrier((passed, jnp.where(passed, onward, shorter)))
    return Sweep(jnp.where(passed, head, below), scale, best, sweep.rounds + 1)


def _onward(problem: Problem, head: Known, best: Known) -> Array:
    """The scale up to which the bound would allow a step, were E the same there.

    With e₀ = e₁ the bound of `interval` is about E − ¼(r − 1)²·Σa².
    """
    goal = problem.goal
    excess = jnp.maximum(head[1] - goal.search_below(best), 0)
    return head[0] * (1 + 2 * jnp.sqrt(excess / goal.energy))
