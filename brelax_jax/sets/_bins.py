"""The search for the scale of many weights on CPU: first over bins of them.

The search of `_search.py` takes fifteen passes over the weights for ternary sets, fifty for
`Uniform(4)` and hundreds for more levels. Here one pass puts the weights into bins, by the leading
bits of their magnitudes: it adds up how many each bin has, and what they sum up to. The search then
sees the bins in place of the weights.

A bin is one point with the multiplicity n of its weights. Where no border between two codes lies in
it, its error is theirs, but for a constant. Where one does, at most

    s·(m_{l+1} − m_l)·n·width / 2

is lost, since n·width/4 is the most that values in an interval, with a mean on one side of a point,
are beyond that point. So the error over bins, less `doubt`·s, is a lower bound of the error over
the weights, up to the constant. Dividing by s keeps h convex: the search's own bound holds for it.
If the doubt is below the search's tolerance, its answer stands. Else the search goes on over the
weights, between the least and the largest scale that is still in doubt.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax.sets._group import Group
from brelax_jax.sets._joined import are_local
from brelax_jax.sets._problem import FLOOR, TOLERANCE, Known, Problem
from brelax_jax.sets._search import Search, branch_and_bound
from brelax_jax.sets._weights import Weights, bound

# Of up to so many magnitudes. With these the doubt is seldom above the tolerance.
BINS = {2: 2**14 + 1, 4: 2**16 + 1}
MOST_BINS = 2**17 + 1  # of more magnitudes
MERGED = 16  # bins, where there are that many, for a first search
LEAST_WEIGHTS = 2**18  # fewer are not worth the bins
MOST_WEIGHTS = 2**24  # more are not counted exactly in float32
PIECE = 2**14  # weights that are binned at a time: XLA holds the places of so many


class Counted(NamedTuple):
    """What stands for a group where entries are bins: each counts as often as it has weights."""

    counts: Array

    def sum(self, x: Array) -> Array:
        """See `Group.sum`."""
        return jnp.sum(self.counts * x)

    def sum_of(self, function: Callable[[Array], Array], x: Array) -> Array:
        """See `Group.sum_of`."""
        return self.sum(function(x))


class Bins(Problem):
    """The problem for the bins of weights, whose errors are lower bounds."""

    def known(self, scale: Array) -> Known:
        """See `Problem.known`."""
        known = super().known(scale)
        return known.at[1].add(-self.doubt * scale)

    @property
    def doubt(self) -> Array:
        """See `Goal`."""
        assert self.goal.doubt is not None
        return self.goal.doubt


class Found(NamedTuple):
    """The end of a search: the best scale, with its error."""

    best: Known


def has_bins(weights: Weights) -> bool:
    """Whether an array is one group on one device, of so many weights that bins are worth while."""
    is_plain = weights.kept is None and weights.allowed is None and not weights.group.axis_names
    is_large = LEAST_WEIGHTS <= weights.w.size <= MOST_WEIGHTS
    return is_plain and is_large and weights.groups == 1 and are_local()


class Large(NamedTuple):
    """Of a loop of several arrays, those for bins.

    Attributes:
      is_one: whether this turn's array is one of them.
      over: as that of `Source`, for one of them.
    """

    is_one: Array
    over: Callable[..., Any]


def search_with_bins(problem: Problem, large: Large | None = None) -> Found:
    """As `branch_and_bound`, but over bins first; of small arrays over the weights at once.

    Args:
      problem: of one group.
      large: which arrays are for bins; None if there is one, which is.
    """

    def over_bins() -> tuple[Array, Array, Array, Known]:
        low, high, best = problem.low, problem.high, problem.goal.kept
        source = problem.source._replace(over=large.over) if large else problem.source
        several = in_bins(problem._replace(source=source))
        for bins in several:
            low, high, best = _left(branch_and_bound(bins._replace(low=low, high=high)))
        bins = several[-1]
        # Of the best scale's error all the doubt, of the bound of others half of it.
        excess, least = bins.doubt * (best[0] + high / 2), best[1] + bins.doubt * best[0]
        return jnp.all(excess <= TOLERANCE * least + FLOOR * bins.goal.energy), low, high, best

    def over_none() -> tuple[Array, Array, Array, Known]:
        low, high = problem.low, problem.high
        return jnp.any(low < 0), low, high, jnp.stack([low, low])  # it never is: not settled

    found = lax.cond(large.is_one, over_bins, over_none) if large else over_bins()
    is_settled, low, high, best = found

    def over_weights() -> Known:
        # Where this is not a branch, as under `vmap`, the loop of a settled one ends at once.
        narrow = problem._replace(low=low, high=jnp.where(is_settled, low, high))
        return branch_and_bound(narrow).best

    return Found(lax.cond(is_settled, lambda: best, over_weights))


def _left(end: Search) -> tuple[Array, Array, Known]:
    """The least and the largest scale that may be better than the best, or are it; and the best."""
    assert end.left is not None  # as in each search in doubt
    return jnp.minimum(end.left[0], end.best[0]), jnp.maximum(end.left[1], end.best[0]), end.best


def in_bins(problem: Problem) -> list[Bins]:
    """The problem for the bins of the weights of a problem of one group; if there are many, for
    fewer and wider ones before.
    """
    magnitudes, source = problem.magnitudes, problem.source
    count = next((n for most, n in BINS.items() if len(magnitudes) <= most), MOST_BINS)
    border = sum(magnitudes[:2]) / 2 * (1 - 2.0**-10)  # below every border between two codes
    first, last = _bits(problem.low * border), _bits(source.unit.divided(source.peak))
    drops = jnp.arange(8 * first.dtype.itemsize - 1, dtype=first.dtype)
    has_more = ((last - first)[..., None] >> drops) > count - 4
    drop = jnp.sum(has_more, axis=-1, dtype=first.dtype)  # bits, so that there are bins enough
    base = (first >> drop) - 1
    table, least = source.over(bound(_binned, count), base, drop)
    base, drop = base.reshape(()), drop.reshape(())
    places = base + jnp.arange(count, dtype=base.dtype)
    lower, upper = _from_bits(places << drop), _from_bits((places + 1) << drop)
    counts, excess = table.reshape(count, 2).T
    sums = (counts * lower + excess).at[0].set(least.reshape(()))
    bins = [(counts, sums, upper - lower)]
    if count >= MOST_BINS:
        bins.insert(0, (_merged(counts), _merged(sums), _merged(upper - lower)))
    return [_of_bins(problem, *each) for each in bins]


def _merged(x: Array) -> Array:
    """The sums over so many bins each, but of the first one alone."""
    return jnp.append(x[0], jnp.sum(x[1:].reshape(-1, MERGED), axis=1))


def _of_bins(problem: Problem, counts: Array, sums: Array, widths: Array) -> Bins:
    """The problem for bins with these counts of weights, their sums, and the widths of the bins."""
    magnitudes, shape = problem.magnitudes, problem.low.shape
    points, group = sums / jnp.maximum(counts, 1), Counted(counts)

    def over(function: Callable[..., Any], *numbers: Array) -> Any:
        found = function(points, group, *(x.reshape(()) for x in numbers))
        return jax.tree.map(lambda x: x.reshape(shape), found)

    widest = jnp.max((counts * widths)[1:])  # no border between two codes is in the first bin
    doubt = (magnitudes[-1] - magnitudes[0]) * widest.reshape(shape) / 2
    energy = group.sum(jnp.square(points)).reshape(shape)
    goal = problem.goal._replace(energy=energy, doubt=doubt)
    return Bins(magnitudes, problem.source._replace(over=over), problem.low, problem.high, goal)


def _binned(count: int, a: Array, group: Group, base: Array, drop: Array) -> tuple[Array, Array]:
    """How many of the magnitudes are in each of so many bins, with the sum of what they are above
    its lower end; and the sum of those in the first bin, which may be most of them.
    """
    del group  # there is one
    a, base, drop = a.reshape(-1), base.reshape(()), drop.reshape(())

    def add(table: Array, least: Array, values: Array) -> tuple[Array, Array]:
        place = _bits(values) >> drop
        bins = jnp.clip(place - base, 0, count - 1)
        is_least = bins == 0
        excess = jnp.where(is_least, 0, values - _from_bits(place << drop))
        one_more = jnp.stack([jnp.ones_like(excess), excess], axis=-1)
        table = table.at[bins].add(one_more, mode="promise_in_bounds")
        return table, least + jnp.sum(jnp.where(is_least, values, 0))

    def add_piece(turn: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        return add(*sums, lax.dynamic_slice(a, (turn * PIECE,), (PIECE,)))

    pieces, rest = divmod(a.size, PIECE)
    sums = add(jnp.zeros((count, 2), a.dtype), jnp.zeros((), a.dtype), a[a.size - rest :])
    return lax.fori_loop(0, pieces, add_piece, sums) if pieces else sums


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int64 if x.dtype.itemsize == 8 else jnp.int32)


def _from_bits(bits: Array) -> Array:
    return lax.bitcast_convert_type(bits, jnp.float64 if bits.dtype.itemsize == 8 else jnp.float32)
