"""One of two processes that train the network of `meshes` together; `test_distributed` starts it.

    python -m tests.helpers.two_processes PORT PROCESS STEPS ACROSS NAMES OUT

`ACROSS` is the axis of the mesh that goes from one process to the other, `NAMES` are the
layers that are quantized.
"""

import functools
import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import meshes, quick

quick.install()


def main(port: str, process: str, steps: str, across: str, names: str, out: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process), initialization_timeout=120)
    devices = np.array(jax.devices()).reshape(2, 2)  # a row a process
    axes = ("data", "model") if across == "data" else ("model", "data")
    mesh = Mesh(devices, axes, axis_types=(AxisType.Auto,) * 2)
    jax.set_mesh(mesh)
    optimizer = meshes.relaxation({name: meshes.SETS[name] for name in names.split()})
    params = meshes.put(meshes.network(), meshes.SPECS, mesh)
    state = optimizer.init(params)
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    gradient = jax.jit(jax.grad(meshes.loss), out_shardings=shardings[0])
    update = jax.jit(functools.partial(meshes.updated, optimizer), out_shardings=shardings)
    gathered = jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, P()))

    def gradient_of_batch(params, *batch):
        return gradient(params, *meshes.put(batch, (P("data"), P("data")), mesh))

    trace = meshes.trained(gradient_of_batch, update, params, state, int(steps))
    leaves = [np.asarray(leaf) for at in trace for leaf in jax.tree.leaves(gathered(at))]
    np.savez(out, *leaves)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
