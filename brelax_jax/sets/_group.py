"""What a computation over scale groups may do with a group: reduce over it.

Whatever else is done with weights is elementwise. So a set or a search that is written with these
reductions works for every granularity.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Group(NamedTuple):
    """The scale groups of a view of an array, each of which lies along the same axes.

    Every reduction keeps those axes, with size one, so that its result broadcasts.

    Attributes:
      axes: the axes of the view along which the entries of one group lie.
    """

    axes: tuple[int, ...]

    def sum(self, x: Array) -> Array:
        """The sum over each group."""
        return jnp.sum(x, axis=self.axes, keepdims=True)

    def mean(self, x: Array) -> Array:
        """The mean of each group."""
        return jnp.mean(x, axis=self.axes, keepdims=True)

    def max(self, x: Array) -> Array:
        """The largest entry of each group."""
        return jnp.max(x, axis=self.axes, keepdims=True)

    def size(self, x: Array) -> int:
        """Entries in one group."""
        return math.prod(x.shape[axis] for axis in self.axes)
