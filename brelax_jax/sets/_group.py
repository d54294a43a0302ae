"""What a computation over scale groups may do with a group: reduce over it.

Whatever else is done with weights is elementwise. So a set or a search that is written with these
reductions works for every granularity, and inside `jax.shard_map`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Group(NamedTuple):
    """The scale groups of a view of an array, each of which lies along the same axes.

    Every reduction keeps those axes, with size one, so that its result broadcasts.

    Attributes:
      axes: the axes of the view along which the entries of one group lie.
      axis_names: the mapped axes over which a group goes on: each device holds a part of it.
    """

    axes: tuple[int, ...]
    axis_names: tuple[str, ...] = ()

    def sum(self, x: Array) -> Array:
        """The sum over each group."""
        total = jnp.sum(x, axis=self.axes, keepdims=True)
        return lax.psum(total, self.axis_names) if self.axis_names else total

    def sum_of(self, function: Callable[[Array], Array], x: Array) -> Array:
        """The sum over each group of function(x), which is elementwise."""
        return self.sum(function(x))

    def sums(self, one: Array, other: Array) -> tuple[Array, Array]:
        """The sums of two arrays of one dtype, in one reduction, as parts of complex numbers.

        On GPUs that is half of the kernels. XLA also computes what is reduced in the same kernel,
        and in place, which it does not for two reductions.
        """
        total = self.sum(lax.complex(one, other))
        return total.real, total.imag

    def mean(self, x: Array) -> Array:
        """The mean of each group."""
        mean = jnp.mean(x, axis=self.axes, keepdims=True)
        return lax.pmean(mean, self.axis_names) if self.axis_names else mean

    def max(self, x: Array, initial: float | None = None) -> Array:
        """The largest entry of each group; at least `initial`."""
        largest = jnp.max(x, axis=self.axes, keepdims=True, initial=initial)
        return lax.pmax(largest, self.axis_names) if self.axis_names else largest

    def peak(self, w: Array) -> Array:
        """The largest magnitude in each group.

        XLA on CPU would write |w| to memory before it takes a maximum of it.
        """
        smallest = jnp.min(w, axis=self.axes, keepdims=True)
        if self.axis_names:
            smallest = lax.pmin(smallest, self.axis_names)
        return jnp.abs(jnp.maximum(self.max(w), -smallest))

    def numbers(self, x: Array) -> tuple[int, ...]:
        """The shape of numbers that are one a group, as every reduction gives them."""
        return tuple(1 if axis in self.axes else size for axis, size in enumerate(x.shape))

    def size(self, x: Array) -> int:
        """Entries in one group."""
        here = math.prod(x.shape[axis] for axis in self.axes)
        return here * math.prod(map(lax.axis_size, self.axis_names))


def bound_names(axis_names: Sequence[str]) -> tuple[str, ...]:
    """Those of the names over which arrays are mapped where this is called.

    Outside of `jax.shard_map` and the like there are none: arrays are whole.

    Raises:
      ValueError: inside a `shard_map` over a mesh that lacks one of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    bound = tuple(name for name in axis_names if _is_bound(name))
    for name in axis_names if mesh.manual_axes else ():
        if name not in (*bound, *mesh.axis_names):
            raise ValueError(
                f"axis_name {name!r} is no axis of this shard_map, whose mesh has "
                f"{', '.join(map(repr, mesh.axis_names))}. Name the axes over which the weights "
                "are sharded, or none if every scale group lies on one device."
            )
    return bound


def _is_bound(name: str) -> bool:
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True
