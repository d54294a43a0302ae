"""The least-squares scales of many arrays, on accelerators in one loop for all but small groups.

There a kernel's launch and the end of a loop cost more than most reductions. So each round
evaluates E at several scales of all groups of all arrays, and whatever is not a reduction over
weights is one small operation for all groups. On CPU arithmetic counts: there it is one array after
the other, and one scale a round (`_in_turn.py`). The bound and the certificate are the same.

Of each group the loop keeps a list of the open intervals, ascending: those in which the bound does
not exclude a better scale than the best one known. Each round evaluates E at some scales inside
them, and keeps of the parts what is still open. If the list is full, what is known of the farthest
is forgotten, which costs evaluations later.
"""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._joined import MOST_GROUPS, Layout, can_be_joined
from brelax_jax.sets._problem import TOLERANCE, Goal, Known, bounds, interval, is_open
from brelax_jax.sets._search import ROUNDS, between
from brelax_jax.sets._weights import Unit, Weights, bound, errors, gains, refitted

LEAST_ENTRIES = 1024  # of a group of such an array, for several scales a round


class Shape(NamedTuple):
    """How the search proceeds. The certificate is the same for all.

    Attributes:
      scales: that each round evaluates in each group.
      intervals: that are remembered.
    """

    scales: int
    intervals: int


MANY = Shape(scales=16, intervals=32)
FEW = Shape(scales=4, intervals=8)  # where what is remembered of groups would outweigh them


def shape_of(weights: Weights) -> Shape:
    """How the search of an array proceeds."""
    few = weights.groups > MOST_GROUPS and weights.entries < LEAST_ENTRIES
    return FEW if few else MANY


def at_once(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    """As `in_turn`, in one loop."""
    joined = [i for i, x in enumerate(arrays) if can_be_joined(x.groups)]
    members = [joined] if joined else []
    members += [[i] for i in range(len(arrays)) if i not in joined]
    parts = [Part.of(magnitudes, [arrays[i] for i in each]) for each in members]
    searches = branch_and_bound(parts, shape_of(arrays[0]))
    scales: dict[int, Array] = {}
    for each, part, search in zip(members, parts, searches, strict=True):
        scales |= zip(each, part.scales(search.best[0]), strict=True)
    return [scales[i] for i in range(len(arrays))]


class Part(NamedTuple):
    """Arrays whose numbers, one a group, are computed with as one array.

    Attributes:
      magnitudes: those of the levels.
      arrays: the arrays.
      layout: how the numbers of their groups lie.
      peak: the largest magnitude in each group.
      unit: what weights are divided by.
    """

    magnitudes: Sequence[float]
    arrays: list[Weights]
    layout: Layout
    peak: Array
    unit: Unit

    @staticmethod
    def of(magnitudes: Sequence[float], arrays: list[Weights]) -> "Part":
        peaks = [x.group.max(jnp.abs(x.w)) for x in arrays]
        layout = Layout(tuple(peak.shape for peak in peaks))
        peak = layout.join(peaks)
        return Part(magnitudes, arrays, layout, peak, Unit.of(peak, arrays[0].allowed))

    def each(self, function: Callable[..., Any], *numbers: Array) -> Any:
        """function(a, group, its numbers…) of each array, whose magnitudes of weights are a: arrays
        with a number of each group.
        """
        given = (1 / self.unit.unit, *numbers)
        if numbers:  # else XLA would compute `a` before the loop and keep it
            given = lax.optimization_barrier(given)
        pieces = zip(*map(self.layout.split, given), strict=True)
        found = [
            _one_pass(function, x.group, x.w, inverse, *own)
            for x, (inverse, *own) in zip(self.arrays, pieces, strict=True)
        ]
        return jax.tree.map(lambda *parts: self.layout.join(parts), *found)

    def known(self, scales: Array) -> Known:
        """Scales of the shape (scales, *groups), with their errors."""
        return jnp.stack([scales, self.each(bound(errors, self.magnitudes), scales)])

    def energy_and_mean(self) -> tuple[Array, Array]:
        """The sum of a² of each group, and the mean of a."""
        return self.each(_energy_and_mean)

    def bounds(self, mean: Array) -> tuple[Array, Array]:
        return bounds(self.magnitudes, mean, self.unit.divided(self.peak), self.unit)

    def goal(self, energy: Array) -> Goal:
        least = jnp.full_like(energy, TOLERANCE)
        none = jnp.stack([jnp.full_like(energy, -1), jnp.full_like(energy, jnp.inf)])
        if self.arrays[0].kept is None:
            return Goal(energy, none, least)
        last = self.layout.join([x.kept for x in self.arrays if x.kept is not None])
        given = zip(self.arrays, self.layout.split(least), strict=True)
        tolerance = self.layout.join([jnp.maximum(most, x.tolerance) for x, most in given])
        scale = self.unit.nearest(self.refitted(self.unit.divided(last)))
        is_known = last > 0  # not in the first step
        kept = self.known(jnp.where(is_known, scale, 1)[None])[:, 0]
        return Goal(energy, jnp.where(is_known, kept, none), jnp.where(is_known, tolerance, least))

    def refitted(self, scale: Array) -> Array:
        """The least-squares scale for the codes that are nearest at a scale."""
        return refitted(scale, *self.each(bound(_gain_and_norm, self.magnitudes), scale))

    def scales(self, best: Array) -> list[Array]:
        """The scales of the weights, from the best ones in their units."""
        if self.unit.allowed is None:
            best = self.refitted(best)
        return self.layout.split(self.unit.scales(best, self.peak))


@partial(jax.jit, static_argnums=(0, 1))
def _one_pass(
    function: Callable[..., Any], group: Group, w: Array, inverse: Array, *numbers: Array
) -> Any:
    """Traced once for arrays of equal shapes."""
    return function(jnp.abs(w * inverse), group, *numbers)


def _energy_and_mean(a: Array, group: Group) -> tuple[Array, Array]:
    return group.sums(jnp.square(a), a / float(group.size(a)))


def _gain_and_norm(
    magnitudes: Sequence[float], a: Array, group: Group, scale: Array
) -> tuple[Array, Array]:
    return group.sums(*gains(a, scale, magnitudes))


class Search(NamedTuple):
    """What the loop carries.

    Attributes:
      left: the lower ends of the open intervals, ascending along the second axis, then `end`.
      right: their upper ends, then `end`.
      end: the largest scale.
      best: the scale of the least error so far.
      rounds: so far.
    """

    left: Known
    right: Known
    end: Known
    best: Known
    rounds: Array


def branch_and_bound(parts: Sequence[Part], shape: Shape) -> tuple[Search, ...]:
    """The searches of some parts at their end, in one loop."""
    sums = [part.energy_and_mean() for part in parts]
    goals = [part.goal(energy) for part, (energy, _) in zip(parts, sums, strict=True)]
    ends = [part.bounds(mean) for part, (_, mean) in zip(parts, sums, strict=True)]

    def is_uncertain(searches: tuple[Search, ...]) -> Array:
        any_open = [jnp.any(each.left[0, 0] < each.right[0, 0]) for each in searches]
        return (searches[0].rounds < ROUNDS) & functools.reduce(jnp.logical_or, any_open)

    def split(searches: tuple[Search, ...]) -> tuple[Search, ...]:
        return tuple(map(partial(_split, shape), parts, goals, ends, searches))

    start = tuple(map(partial(_start, shape), goals, ends))
    return lax.while_loop(is_uncertain, split, start)


def _start(shape: Shape, goal: Goal, ends: tuple[Array, Array]) -> Search:
    """One interval. Its ends have no errors yet, so these are the least that they may be."""
    low, high = (jnp.stack([x, jnp.zeros_like(x)]) for x in ends)
    order = _column(jnp.arange(shape.intervals), ends[0])
    left = jnp.where(order == 0, low[:, None], high[:, None])
    unknown = jnp.stack([ends[0], jnp.full_like(ends[0], jnp.inf)])
    best = jnp.where(goal.kept[0] > 0, goal.kept, unknown)
    right = jnp.broadcast_to(high[:, None], left.shape)
    return Search(left, right, high, best, jnp.zeros((), jnp.int32))


def _split(
    shape: Shape, part: Part, goal: Goal, ends: tuple[Array, Array], search: Search
) -> Search:
    """After evaluating scales inside the first intervals of each group."""
    left, right = search.left, search.right
    order = _column(jnp.arange(shape.intervals), goal.energy)
    turn = _column(jnp.arange(shape.scales), goal.energy)
    # The scales go to the first intervals in equal parts: to which, from which scale on, how many.
    number = jnp.clip(jnp.sum(left[0] < right[0], axis=0), 1, shape.scales)
    owner = turn * number // shape.scales
    first = -(-owner * shape.scales // number)
    quota = -(-(owner + 1) * shape.scales // number) - first
    is_owner = owner == order[:, None]

    def of_owner(x: Array) -> Array:
        return jnp.sum(jnp.where(is_owner, x[:, None], 0), axis=0)

    low, high = of_owner(left[0]), of_owner(right[0])
    middle = of_owner(interval(left, right, goal.energy)[1])
    part_of_way = (turn - first + 1).astype(low.dtype) / (quota + 1).astype(low.dtype)
    spread = low + (high - low) * part_of_way
    scales = jnp.where(quota == 1, middle, spread)
    if part.unit.allowed is not None:
        scales = jnp.clip(part.unit.at_most(scales), part.unit.after(low), high)
    scales = jnp.where(search.rounds == 0, _start_scales(shape, part, ends), scales)
    new = part.known(scales)
    # Intervals go up to the first scale inside, from one to the next, and from the last to the end.
    starts = is_owner & (turn == first)
    to_new = jnp.sum(jnp.where(starts, new[:, None], 0), axis=2)
    next_new = jnp.concatenate([new[:, 1:], new[:, -1:]], axis=1)
    lasts = turn == first + quota - 1
    from_new = jnp.where(lasts, jnp.stack([high, of_owner(right[1])]), next_new)
    least = _least(new)
    better = least[1] < goal.replace_below(search.best)
    parts = Search(
        left=jnp.concatenate([left, new], axis=1),
        right=jnp.concatenate([jnp.where(order < number, to_new, right), from_new], axis=1),
        end=jnp.where(search.rounds == 0, new[:, -1], search.end),
        best=jnp.where(better, least, search.best),
        rounds=search.rounds + 1,
    )
    return _open(shape, part, goal, parts)


def _start_scales(shape: Shape, part: Part, ends: tuple[Array, Array]) -> Array:
    """Both ends and what is between them, geometrically spaced."""
    step = _column(jnp.linspace(0, 1, shape.scales, dtype=ends[0].dtype), ends[0])
    return between(*ends, step, part.unit)


def _open(shape: Shape, part: Part, goal: Goal, search: Search) -> Search:
    """The search with only those of its intervals that are open, in order."""
    left, right = search.left, search.right
    are_open = is_open(left, right, search.best, goal, part.unit)
    before = are_open & (left[0] < left[0][:, None])
    rank = jnp.where(are_open, jnp.sum(before, axis=1), -1)
    number = jnp.sum(are_open, axis=0)
    order = _column(jnp.arange(shape.intervals), goal.energy)
    is_here = rank == order[:, None]
    end = search.end[:, None]

    def in_order(x: Known) -> Known:
        return jnp.where(order < number, jnp.sum(jnp.where(is_here, x[:, None], 0), axis=2), end)

    is_forgotten = (number > shape.intervals) & (order == shape.intervals - 1)
    return search._replace(left=in_order(left), right=jnp.where(is_forgotten, end, in_order(right)))


def _least(nodes: Known) -> Known:
    """The scale of the least error."""
    order = _column(jnp.arange(nodes.shape[1]), nodes[0, 0])
    is_least = order == jnp.argmin(nodes[1], axis=0)
    return jnp.sum(jnp.where(is_least, nodes, 0), axis=1)


def _column(x: Array, groups: Array) -> Array:
    """A vector as it broadcasts against groups, along a first axis."""
    return x.reshape(-1, *[1] * groups.ndim)
