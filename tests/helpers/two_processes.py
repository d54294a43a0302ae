"""One of two processes that train the network of `meshes` together, for `test_distributed`."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import meshes


def main(port: int, process: int, steps: int, across: str, names: Sequence[str], out: Path) -> None:
    """Trains and saves what there is before the first step and after each.

    Args:
      port: where the processes meet.
      process: 0 or 1.
      steps: how many.
      across: the axis of the mesh that goes from one process to the other.
      names: of the layers that are quantized.
      out: the file.
    """
    jax.config.update("jax_disable_most_optimizations", True)  # all that is compiled runs briefly
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, process, initialization_timeout=120)
    devices = np.array(jax.devices()).reshape(2, 2)  # a row a process
    axes = ("data", "model") if across == "data" else ("model", "data")
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * 2)
    jax.set_mesh(mesh)
    optimizer = meshes.relaxation({name: meshes.SETS[name] for name in names})
    params = meshes.put(meshes.network(), meshes.SPECS, mesh)
    state = optimizer.init(params)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    gradient = jax.jit(jax.grad(meshes.loss), out_shardings=shardings[0])
    update = jax.jit(functools.partial(meshes.updated, optimizer), out_shardings=shardings)
    gathered = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))

    def gradient_of_batch(params, *batch):
        return gradient(params, *meshes.put(batch, (P("data"), P("data")), mesh))

    trace = meshes.trained(gradient_of_batch, update, params, state, steps)
    leaves = [np.asarray(leaf) for at in trace for leaf in jax.tree.leaves(gathered(at))]
    np.savez(out, *leaves)
    jax.distributed.shutdown()
