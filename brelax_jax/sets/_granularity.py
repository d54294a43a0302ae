"""Which weights share a scale.

A granularity says how an array splits into scale groups. Everything else works on a *view* of the
array in which a group is all entries along `axes`; a scale then has size one along those axes and
broadcasts. Tensors, channels and blocks differ in this file only.
"""

import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax.sets._group import Group, bound_names
from brelax_jax.sets._lanes import repeated


class Groups(NamedTuple):
    """How one array shape splits into scale groups.

    Attributes:
      view: the shape to which the array is reshaped (the array's own, unless it is cut into
        blocks).
      axes: the axes of `view` along which the entries of one group lie.
      scale: the shape of the scales: the array's rank, one entry per group.
      axis_names: the mapped axes over which a group goes on where they are bound, as inside
        `jax.shard_map`.
    """

    view: tuple[int, ...]
    axes: tuple[int, ...]
    scale: tuple[int, ...]
    axis_names: tuple[str, ...] = ()

    @property
    def group(self) -> Group:
        """The reductions over each group, in the view."""
        return Group(self.axes, bound_names(self.axis_names))

    @property
    def whole(self) -> Group:
        """The reductions over all groups together, in the array's own shape."""
        return Group(tuple(range(len(self.scale))), bound_names(self.axis_names))

    @property
    def scale_view(self) -> tuple[int, ...]:
        """The shape in which a scale broadcasts against the view."""
        return tuple(1 if axis in self.axes else size for axis, size in enumerate(self.view))

    def spread(self, numbers: Array, shape: Sequence[int]) -> Array:
        """Numbers that are one a group, as they broadcast against the array of this shape."""
        if len(self.view) == len(shape):
            return numbers.reshape(self.scale_view)
        if self.axes == (len(shape),):
            return repeated(numbers.reshape(self.scale), self.size)
        return jnp.broadcast_to(numbers.reshape(self.scale_view), self.view).reshape(shape)

    @property
    def size(self) -> int:
        """Entries in one group, of this array."""
        return math.prod(self.view[axis] for axis in self.axes)


class Granularity(Protocol):
    """Which weights share a scale: `PerTensor`, `PerChannel` or `PerBlock`."""

    def groups(self, shape: Sequence[int]) -> Groups:
        """The scale groups of an array of this shape.

        Raises:
          ValueError: if this granularity does not fit the shape.
        """
        ...


@dataclasses.dataclass(frozen=True)
class PerTensor:
    """One scale for the whole array.

    Inside `jax.shard_map` an array is one device's part of the weight. There, `axis_name` names the
    mesh axis (or a tuple of them) over which the weight is sharded, so that all of its parts share
    one scale. Outside of `shard_map` it has no effect, because XLA knows how a whole array is
    sharded.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.Binary(granularity=brx.PerTensor()).quantize(jnp.ones((3, 4))).scale.shape
    (1, 1)

    Raises:
      ValueError: if `axis_name` is neither None, nor a name, nor a tuple of names; on use, inside
        a `shard_map` over a mesh that lacks it.
    """

    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis_name", _names(self.axis_name))

    def groups(self, shape: Sequence[int]) -> Groups:
        """See `Granularity.groups`."""
        axes = tuple(range(len(shape)))
        return Groups(tuple(shape), axes, (1,) * len(shape), _as_tuple(self.axis_name))


@dataclasses.dataclass(frozen=True)
class PerChannel:
    """One scale for each index of `axis`, an axis or a tuple of axes.

    Flax keeps output channels last, so the default gives each output channel of a dense or
    convolution kernel its own scale. `axis_name` is as for `PerTensor`: the mesh axes over which
    the other axes of the array are sharded.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.Binary(granularity=brx.PerChannel()).quantize(jnp.ones((3, 3, 16, 32))).scale.shape
    (1, 1, 1, 32)

    Raises:
      ValueError: if `axis` is neither an integer nor a tuple of integers; on use, if an axis is out
        of range or named twice; for `axis_name` as `PerTensor`.
    """

    axis: int | tuple[int, ...] = -1
    axis_name: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        axes = self.axis if isinstance(self.axis, Sequence) else (self.axis,)
        checked = tuple(_integer(axis, "axis") for axis in axes)
        object.__setattr__(self, "axis", checked if isinstance(self.axis, Sequence) else checked[0])
        object.__setattr__(self, "axis_name", _names(self.axis_name))

    def groups(self, shape: Sequence[int]) -> Groups:
        """See `Granularity.groups`."""
        axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        kept = [_axis_in(axis, shape, self) for axis in axes]
        if len(set(kept)) < len(kept):
            raise ValueError(f"{self} names an axis of shape {tuple(shape)} twice; name each once.")
        scale = tuple(size if axis in kept else 1 for axis, size in enumerate(shape))
        reduced = tuple(axis for axis in range(len(shape)) if axis not in kept)
        return Groups(tuple(shape), reduced, scale, _as_tuple(self.axis_name))


@dataclasses.dataclass(frozen=True)
class PerBlock:
    """One scale for each `size` consecutive entries along `axis`, for every index of the other
    axes.

    A block lies on one device, so there is no axis to name inside `jax.shard_map`.

    >>> import brelax_jax as brx, jax.numpy as jnp
    >>> brx.Binary(granularity=brx.PerBlock(64, axis=0)).quantize(jnp.ones((256, 10))).scale.shape
    (4, 10)

    Raises:
      ValueError: if `size` is not a positive integer or `axis` not an integer; on use, if `axis` is
        out of range or `size` does not divide it.
    """

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _integer(self.size, "size"))
        object.__setattr__(self, "axis", _integer(self.axis, "axis"))
        if self.size < 1:
            raise ValueError(f"size must be a positive number of entries, got {self.size}.")

    def groups(self, shape: Sequence[int]) -> Groups:
        """See `Granularity.groups`."""
        axis = _axis_in(self.axis, shape, self)
        blocks, rest = divmod(shape[axis], self.size)
        if rest:
            raise ValueError(
                f"{self} does not divide axis {axis} of shape {tuple(shape)}: {rest} of its "
                f"{shape[axis]} entries would be left over. Choose a size that divides it, or "
                "PerChannel for such leaves."
            )
        before, after = tuple(shape[:axis]), tuple(shape[axis + 1 :])
        return Groups((*before, blocks, self.size, *after), (axis + 1,), (*before, blocks, *after))


def groups_of(granularity: Granularity, w: Any) -> Groups:
    """The scale groups of this array.

    Raises:
      ValueError: if the granularity does not fit its shape, or names an axis that this `shard_map`
        lacks, or cuts across its shards: in JAX's explicit sharding mode, which refuses that; in
        the automatic one XLA moves the entries.
    """
    groups = granularity.groups(jnp.shape(w))
    bound_names(groups.axis_names)
    if isinstance(w, Array) and (fault := crossing(granularity, w, jax.typeof(w).sharding)):
        raise ValueError(fault)
    return groups


def crossing(granularity: Granularity, w: Array, sharding: jax.sharding.NamedSharding) -> str:
    """What is wrong with blocks of w that do not lie within its shards; else nothing."""
    if not isinstance(granularity, PerBlock):
        return ""
    axis = _axis_in(granularity.axis, w.shape, granularity)
    names = sharding.spec[axis] if axis < len(sharding.spec) else None
    names = names if isinstance(names, tuple) else (names,)
    shards = math.prod(sharding.mesh.shape[name] for name in names if name is not None)
    entries = w.shape[axis] // shards
    if entries % granularity.size == 0:
        return ""
    return (
        f"{granularity} cuts across the {shards} shards of axis {axis} of shape {w.shape}, of "
        f"{entries} entries each. Choose a size that divides them, or shard another axis."
    )


def _integer(value: object, name: str) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}.") from None


def _as_tuple(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if names is None else (names,) if isinstance(names, str) else names


def _names(axis_name: object) -> str | tuple[str, ...] | None:
    """The names of mesh axes, checked; a list becomes a tuple."""
    if axis_name is None or isinstance(axis_name, str):
        return axis_name
    names = tuple(axis_name) if isinstance(axis_name, Sequence) else (axis_name,)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(
            f"axis_name must be None, a name of a mesh axis or a tuple of them, got {axis_name!r}."
        )
    return cast("tuple[str, ...]", names)


def _axis_in(axis: int, shape: Sequence[int], granularity: object) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{granularity}: axis {axis} is out of range for shape {tuple(shape)}; give an axis "
            f"from {-len(shape)} to {len(shape) - 1}, or use PerTensor."
            if shape
            else f"{granularity}: axis {axis} is out of range for a scalar; use PerTensor."
        )
    return axis % len(shape)
