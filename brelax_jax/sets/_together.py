"""The least-squares scales of many arrays: which of them are searched for in one loop, and how.

On accelerators a kernel's launch and the end of a loop cost more than most reductions. So there all
arrays are searched for together, several scales a round. On CPU arithmetic counts: there it is one
array after the other and one scale a round, in a loop over the arrays whose program holds the
search once.
"""

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from brelax_jax._tree import compute_after
from brelax_jax.sets._arrays import Layout, Unit, Weights, errors, gain_of
from brelax_jax.sets._search import TOLERANCE, Problem, Shape, branch_and_bound
from brelax_jax.sets._small_groups import is_small, small_scales

CPU = Shape(start=5, scales=1, intervals=8, together=False)
ACCELERATOR = Shape(start=16, scales=16, intervals=32, together=True)
FINE = CPU._replace(together=True)  # where what is remembered of groups would outweigh them
FORCED: Shape | None = None  # for tests: the shape on every platform
MOST_GROUPS = 4096  # of one array, for its groups to be joined with those of others
MOST_COPIED = 100000  # weights of which there are normalized copies on CPU; more take fresh memory
LEAST_ENTRIES = 1024  # of a group of such an array, for several scales a round


def searched_scales(magnitudes: Sequence[float], arrays: Sequence[Weights]) -> list[Array]:
    """argmin over s ≥ 0 of Σ min_l (|w| − s·m_l)², for each group of each array.

    Returns:
      Scales of w's dtype that broadcast against it: 0 for groups of zeros, NaN for groups that hold
      one or an infinity.
    """
    loops: dict[tuple[bool, Hashable], list[int]] = {}
    scales: dict[int, Array] = {}
    for i, each in enumerate(arrays):
        if is_small(magnitudes, each):
            scales[i] = small_scales(magnitudes, each)
        else:
            loops.setdefault((_is_fine(each), _loop_of(each)), []).append(i)
    for (is_fine, _), members in loops.items():
        search = functools.partial(_search, tuple(magnitudes), [arrays[i] for i in members])
        operands = [(arrays[i].w, arrays[i].kept) for i in members]
        if FORCED is not None:
            found = search(FORCED, operands)
        else:
            found = lax.platform_dependent(
                operands,
                cpu=functools.partial(search, CPU),
                default=functools.partial(search, FINE if is_fine else ACCELERATOR),
            )
        scales |= zip(members, found, strict=True)
    return [scales[i] for i in range(len(arrays))]


def _loop_of(weights: Weights) -> Hashable:
    """Arrays for which this is the same may share a loop.

    Inside `jax.shard_map` devices that share a group must do the same number of rounds.
    """
    names = weights.group.axis_names
    varying = jax.typeof(weights.w).manual_axis_type.varying - set(names)
    return weights.w.dtype, names, varying, weights.kept is None


def _numbers(weights: Weights) -> tuple[int, int]:
    """How many groups an array has here, and how many entries each."""
    entries = math.prod(weights.w.shape[axis] for axis in weights.group.axes)
    return weights.w.size // entries, entries


def _is_fine(weights: Weights) -> bool:
    groups, entries = _numbers(weights)
    return groups > MOST_GROUPS and entries < LEAST_ENTRIES


def _search(
    magnitudes: tuple[float, ...],
    arrays: Sequence[Weights],
    shape: Shape,
    operands: Sequence[tuple[Array, Array | None]],
) -> list[Array]:
    arrays = [x._replace(w=w, kept=kept) for x, (w, kept) in zip(arrays, operands, strict=True)]
    joined = [i for i, x in enumerate(arrays) if _can_be_joined(x)]
    members = [] if shape.together else _batches(joined, arrays)
    members += [joined] if shape.together and joined else []
    members += [[i] for i in range(len(arrays)) if i not in joined]
    if shape.together:
        parts = [Part.of(magnitudes, [arrays[i] for i in each], shape) for each in members]
        evaluate = [part.errors for part in parts]
        searches = branch_and_bound(evaluate, [part.problem() for part in parts], shape)
        best = [search.best[0] for search in searches]
        found = [part.scales(scale) for part, scale in zip(parts, best, strict=True)]
    else:
        found = _in_turn(magnitudes, [[arrays[i] for i in each] for each in members], shape)
    scales: dict[int, Array] = {}
    for each, own in zip(members, found, strict=True):
        scales |= zip(each, own, strict=True)
    return [scales[i] for i in range(len(arrays))]


def _batches(joined: Sequence[int], arrays: Sequence[Weights]) -> list[list[int]]:
    """Arrays whose copies are in memory at the same time."""
    batches: list[list[int]] = []
    total = MOST_COPIED
    for i in joined:
        total += arrays[i].w.size
        if total > MOST_COPIED:
            batches.append([])
            total = arrays[i].w.size
        batches[-1].append(i)
    return batches


def _in_turn(
    magnitudes: tuple[float, ...], batches: Sequence[list[Weights]], shape: Shape
) -> list[list[Array]]:
    """The scales of some batches, one after the other: XLA would have all copies at once."""
    found: list[list[Array]] = []
    last = jnp.zeros(())
    for batch in batches:

        def search(
            arrays: Sequence[Array], kept: Sequence[Array | None], batch: list[Weights] = batch
        ) -> list[Array]:
            own = [x._replace(w=w, kept=k) for x, w, k in zip(batch, arrays, kept, strict=True)]
            part = Part.of(magnitudes, own, shape)
            return part.scales(part.search_each(shape))

        operands = [x.w for x in batch], [x.kept for x in batch]
        found.append(compute_after(last, search, *operands) if found else search(*operands))
        last = jnp.max(found[-1][0])
    return found


def _can_be_joined(weights: Weights) -> bool:
    """Whether the numbers of an array's groups may become a part of one vector.

    XLA would move those of arrays that are sharded differently, and where it decides on the
    sharding that is not known here.
    """
    groups, _ = _numbers(weights)
    mesh = jax.sharding.get_abstract_mesh()
    is_local = jax.device_count() == 1 or set(mesh.manual_axes) == set(mesh.axis_names) != set()
    return groups == 1 or (is_local and groups <= MOST_GROUPS)


class Part(NamedTuple):
    """Arrays whose numbers, one a group, are computed with as one array.

    Attributes:
      magnitudes: those of the levels.
      arrays: the arrays; where `is_normal`, they are magnitudes of weights up to about 1.
      layout: how the numbers of their groups lie.
      peak: the largest magnitude in each group.
      unit: what weights are divided by.
      is_normal: whether that is done.
    """

    magnitudes: tuple[float, ...]
    arrays: list[Weights]
    layout: Layout
    peak: Array
    unit: Unit
    is_normal: bool = False

    @staticmethod
    def of(magnitudes: tuple[float, ...], arrays: list[Weights], shape: Shape) -> "Part":
        peaks = [x.group.max(jnp.abs(x.w)) for x in arrays]
        layout = Layout(tuple(peak.shape for peak in peaks), is_stacked=not shape.together)
        peak = layout.join(peaks)
        part = Part(magnitudes, arrays, layout, peak, Unit.of(peak))
        if shape.together:
            return part
        inverses = layout.split(part.unit.inverse)
        normal = [x._replace(w=jnp.abs(x.w * y)) for x, y in zip(arrays, inverses, strict=True)]
        return part._replace(arrays=normal, is_normal=True)

    def each(self, function: Callable[..., Array], *numbers: Array) -> Array:
        """function(a, group, its numbers…) of each array, whose magnitudes of weights are a."""
        given = (self.unit.inverse, *numbers)
        if not self.is_normal and numbers:  # else XLA would compute `a` before the loop and keep it
            given = lax.optimization_barrier(given)
        pieces = zip(*map(self.layout.split, given), strict=True)
        return self.layout.join(
            [
                function(x.w if self.is_normal else jnp.abs(x.w * inverse), x.group, *own)
                for x, (inverse, *own) in zip(self.arrays, pieces, strict=True)
            ]
        )

    def errors(self, scales: Array) -> Array:
        """The errors at scales of the shape (scales, *groups)."""
        return self.each(lambda a, g, s: errors(a, s, self.magnitudes, g), scales)

    def problem(self) -> Problem:
        energy = self.each(lambda a, group: group.sum(jnp.square(a)))
        mean = self.each(lambda a, group: group.mean(a))
        # Outside [low, high] every entry has the largest magnitude, or E falls toward the interval.
        low = jnp.maximum(mean, jnp.finfo(mean.dtype).tiny) / self.magnitudes[-1]
        high = self.peak * self.unit.inverse / next(m for m in self.magnitudes if m > 0)
        none = jnp.stack([jnp.full_like(energy, -1), jnp.full_like(energy, jnp.inf)])
        least = jnp.full_like(energy, TOLERANCE)
        problem = Problem(low, jnp.maximum(low, high), energy, none, least)
        if self.arrays[0].kept is None:
            return problem
        last = self.layout.join([x.kept for x in self.arrays if x.kept is not None])
        scale = jnp.where(last > 0, self.refitted(last * self.unit.inverse), -1)
        given = zip(self.arrays, self.layout.split(least), strict=True)
        tolerance = self.layout.join([jnp.maximum(most, x.tolerance) for x, most in given])
        kept = jnp.stack([scale, self.errors(scale[None])[0]])
        return problem._replace(kept=kept, tolerance=jnp.where(last > 0, tolerance, least))

    def refitted(self, scale: Array) -> Array:
        """The least-squares scale for the codes that are nearest at a scale."""
        gain, norm = self.each(lambda a, g, s: gain_of(a, s, self.magnitudes, g), scale)
        return scale + gain / jnp.where(norm > 0, norm, 1)

    def scales(self, best: Array) -> list[Array]:
        """The scales of the weights, from the best ones in their units."""
        scale = self.unit.unit * self.refitted(best)
        scale = jnp.where(self.peak > 0, scale, self.peak)  # 0, or NaN
        return self.layout.split(jnp.where(jnp.isfinite(scale), scale, jnp.nan))

    def search_each(self, shape: Shape) -> Array:
        """The best scales of each array, one array after the other."""
        problem = self.problem()
        if len(self.arrays) == 1:
            return branch_and_bound([self.errors], [problem], shape)[0].best[0]

        def errors_of(i: int, scales: Array) -> Array:
            view, weights = self.layout.views[i], self.arrays[i]
            own = scales[:, : math.prod(view)].reshape(-1, *view)
            found = errors(weights.w, own, self.magnitudes, weights.group)
            return self.layout.pad(found.reshape(len(own), -1))

        def search(i: Array) -> Array:
            own = jax.tree.map(lambda x: x[..., i, :], problem)
            branches = [functools.partial(errors_of, i) for i in range(len(self.arrays))]
            evaluate = functools.partial(lax.switch, i, branches)
            return branch_and_bound([evaluate], [own], shape)[0].best[0]

        return lax.map(search, jnp.arange(len(self.arrays)))
