"""A mesh of devices, data × model: batches lie over its rows, kernels over its columns."""

import math
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Tree = TypeVar("Tree")

FORM = r"[1-9]\d*x[1-9]\d*"
AXES = ("data", "model")


def make_mesh(word: str) -> Mesh:
    """The mesh of a word such as `4x2`, 4 rows of 2, over the first devices there are.

    Raises:
      ValueError: if there are too few.
    """
    shape = tuple(int(number) for number in word.split("x"))
    devices = jax.devices()[: math.prod(shape)]
    if len(devices) < math.prod(shape):
        raise ValueError(
            f"--mesh {word} takes {math.prod(shape)} devices, but here are {len(devices)}. A CPU "
            f"passes for several with XLA_FLAGS=--xla_force_host_platform_device_count=N."
        )
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * 2, devices=devices)


def over_data(mesh: Mesh) -> NamedSharding:
    """For batches: their first axis over the rows."""
    return NamedSharding(mesh, P("data"))


def everywhere(mesh: Mesh) -> NamedSharding:
    """For what every device holds whole."""
    return NamedSharding(mesh, P())


def over_model(mesh: Mesh, tree: Any) -> Any:
    """For params and all that is of their shapes: matrices and kernels with their last axis, the
    output channels, over the columns if it divides; what else there is, everywhere.
    """

    def sharding(leaf: Any) -> NamedSharding:
        if leaf.ndim < 2 or leaf.shape[-1] % mesh.shape["model"]:
            return everywhere(mesh)
        return NamedSharding(mesh, P(*(None,) * (leaf.ndim - 1), "model"))

    return jax.tree.map(sharding, tree)


def laid_out(shapes: Tree, shardings: Any) -> Tree:
    """Abstract arrays with their shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )
