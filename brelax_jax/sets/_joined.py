"""The numbers of scale groups, one a group, of many arrays side by side.

On accelerators the launch of a kernel costs more than what it does for a few numbers. So there
whatever is not a reduction over weights is one small operation for the groups of all arrays.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

MOST_GROUPS = 4096  # of one array, for its groups to be joined with those of others
Setting = TypeVar("Setting", bound=Hashable)


def can_be_joined(groups: int) -> bool:
    """Whether the numbers of an array of so many groups may become a part of one vector.

    XLA would move those of arrays that are sharded differently.
    """
    return groups == 1 or (are_local() and groups <= MOST_GROUPS)


def are_local() -> bool:
    """Whether arrays are on one device, and their types say nothing else. Where XLA decides on the
    sharding that is not known.
    """
    mesh = jax.sharding.get_abstract_mesh()
    is_mapped = set(mesh.manual_axes) == set(mesh.axis_names) != set()
    return is_mapped or (jax.device_count() == 1 and not mesh.explicit_axes)


class Layout(NamedTuple):
    """How the numbers of the groups of some arrays lie side by side.

    Attributes:
      views: the shape of the scales of each array, as they broadcast against it.
    """

    views: tuple[tuple[int, ...], ...]

    def join(self, parts: Sequence[Array]) -> Array:
        """The numbers of all arrays, each of its view's shape, perhaps after other axes.

        One array's keep their shape: it may be sharded.
        """
        if len(self.views) == 1:
            return parts[0]
        pairs = zip(parts, self.views, strict=True)
        vectors = [x.reshape(*x.shape[: x.ndim - len(view)], -1) for x, view in pairs]
        return jnp.concatenate(vectors, axis=-1)

    def split(self, joined: Array) -> list[Array]:
        """The reverse of `join`."""
        if len(self.views) == 1:
            return [joined]
        ends = np.cumsum([math.prod(view) for view in self.views])[:-1].tolist()
        pairs = zip(jnp.split(joined, ends, axis=-1), self.views, strict=True)
        return [x.reshape(*x.shape[:-1], *view) for x, view in pairs]


Numbers = Sequence[Sequence[Array]]  # of each array some, each of the shape of its scales


def compute_all(
    function: Callable[..., Array], settings: Sequence[Setting], numbers: Numbers
) -> list[Array]:
    """function(setting, *numbers), elementwise, of each array."""
    return lax.platform_dependent(
        numbers,
        cpu=partial(compute_in_turn, function, settings),
        default=partial(compute_together, function, settings),
    )


def compute_in_turn(
    function: Callable[..., Array], settings: Sequence[Setting], numbers: Numbers
) -> list[Array]:
    return [function(setting, *own) for setting, own in zip(settings, numbers, strict=True)]


def compute_together(
    function: Callable[..., Array], settings: Sequence[Setting], numbers: Numbers
) -> list[Array]:
    """Of arrays with the same setting at once."""
    members: dict[Hashable, list[int]] = {}
    for i, (x, *_) in enumerate(numbers):
        alone = None if can_be_joined(x.size) else i
        kind = settings[i], x.dtype, jax.typeof(x).manual_axis_type.varying, alone
        members.setdefault(kind, []).append(i)
    results: dict[int, Array] = {}
    for each in members.values():
        layout = Layout(tuple(numbers[i][0].shape for i in each))
        joined = map(layout.join, zip(*(numbers[i] for i in each), strict=True))
        result = function(settings[each[0]], *joined)
        results |= zip(each, layout.split(result), strict=True)
    return [results[i] for i in range(len(numbers))]
