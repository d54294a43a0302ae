"""What updates need on TPUs, read from their compiled programs: `python -m benchmarks.compiled`.

Nothing runs and no TPU is needed, only libtpu, which the extra `tpu` brings. The table is of update
plus `optax.apply_updates` on one v5e: on ResNet-18's convolution weights, and in blocks on
matrices. With `--meshes` it is of seven stacked kernels of a language model, 6.5 billion weights,
sharded over both axes of a mesh. Bytes are those of one device's main memory; the collectives are
those in the program's text, so one in the search's loop counts once. The rounds of that loop are
measured on the CPU, with normal weights. CPU seconds of compiling are those of all cores.
"""

import importlib
import math
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax
import optax
from jax.experimental import topologies
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import brelax_jax as brx
from benchmarks.updates import relax, resnet18, weights
from brelax_jax._command_line import Parser
from brelax_jax.sets._together import MANY, Part, branch_and_bound
from brelax_jax.sets._weights import Weights

ONE = "v5e:2x2"  # the least topology that libtpu knows; one of its devices is used
MESHES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16")
SETS: dict[str, brx.QuantizedSet | None] = {
    "SGD with momentum": None,
    "Binary": brx.Binary(),
    "TernaryThreshold": brx.TernaryThreshold(),
    "Ternary": brx.Ternary(),
    "Ternary, channel": brx.Ternary(granularity=brx.PerChannel()),
    "Uniform(4)": brx.Uniform(4),
    "Uniform(4), 0.3·mean |w|": brx.Uniform(4, rule=brx.MeanMagnitude(0.3, refit=False)),
}
# The core's own memory holds most of what is computed with the first, and none of the second.
MATRICES = (4096, 4096), (8192, 16384)
BLOCKS = brx.PerBlock(32)
MATRIX_SETS: dict[str, brx.QuantizedSet | None] = {
    "Binary, blocks of 32": brx.Binary(granularity=BLOCKS),
    "Ternary": brx.Ternary(),
    "Ternary, blocks of 32": brx.Ternary(granularity=BLOCKS),
    "Uniform(4), blocks of 32": brx.Uniform(4, granularity=BLOCKS),
    "q4_0": brx.formats.q4_0(),  # blocks along the axis before the last
}
STACKED = [(32, 4096, 4096)] * 4 + [(32, 4096, 11008)] * 2 + [(32, 11008, 4096)]
STACKED_SETS: dict[str, brx.QuantizedSet | None] = {
    "SGD with momentum": None,
    "Ternary, layer": brx.Ternary(granularity=brx.PerChannel(0)),
    "Uniform(4), channel": brx.Uniform(4, granularity=brx.PerChannel((0, -1))),
}
HEAD = f"{'arguments':>11}{'temporaries':>13}{'a weight':>9}{'compile s':>11}{'CPU s':>7}"

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(rf"= (.+?) ({KINDS})(?:-start)?\(")
ARRAY = re.compile(r"\b[a-z]+(\d*)\[([\d,]*)\]")  # f32[8,128], pred[]


def collectives(text: str) -> str:
    """The collectives in a compiled program's text: of each kind how many, and their bytes."""
    sizes: dict[str, list[int]] = {}
    for shape, kind in COLLECTIVE.findall(text):
        arrays = [(int(bits or 8), dims.split(",")) for bits, dims in ARRAY.findall(shape)]
        size = sum(bits * math.prod(int(dim or 1) for dim in dims) for bits, dims in arrays)
        sizes.setdefault(kind, []).append(size // 8)
    return "; ".join(
        f"{len(each)} {kind} of {min(each):,} to {max(each):,} bytes, {sum(each):,} in all"
        for kind, each in sizes.items()
    )


def devices_of(topology: str) -> list[Any]:
    """The devices of a TPU topology. None of them is here."""
    importlib.import_module("libtpu")  # where it is missing, a line says what to install
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu asks the network what is here
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    description: Any = topologies.get_topology_desc(topology, platform="tpu")
    return description.devices


def cost(
    qset: brx.QuantizedSet | None,
    shapes: Sequence[tuple[int, ...]],
    sharding: Sharding,
    devices: int = 1,
) -> str:
    """What a compiled update of kernels of these shapes needs, as columns of a table."""
    optimizer = optax.sgd(1e-3, momentum=0.9)
    if qset is not None:
        optimizer = relax(optimizer, qset, 1.0, hard_from=10**6)

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {
        f"layer{i}": {"kernel": jax.ShapeDtypeStruct(shape, "float32", sharding=sharding)}
        for i, shape in enumerate(shapes)
    }
    state = jax.eval_shape(optimizer.init, params)
    if devices == 1:  # else the state is sharded as the params
        state = jax.tree.map(lambda x: x.update(sharding=sharding), state)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    traced = jax.jit(update, donate_argnums=(0, 1)).trace(params, state, params)
    compiled = traced.lower(lowering_platforms=("tpu",)).compile()
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    memory: Any = compiled.memory_analysis()
    given, temporary = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    a_weight = temporary * devices / sum(map(math.prod, shapes))
    return (
        f"{given / 1e6:8.1f} MB{temporary / 1e6:10.1f} MB{a_weight:9.2f}{seconds:11.1f}"
        f"{cpu_seconds:7.1f}  {collectives(compiled.as_text() or '')}"
    )


def rounds(qset: brx.QuantizedSet, kernels: Sequence[jax.Array]) -> int:
    """How many rounds accelerators search for the scales of these kernels."""

    def search(kernels: Sequence[jax.Array]) -> jax.Array:
        pairs = [(w, qset.granularity.groups(w.shape)) for w in kernels]
        arrays = [Weights(w.reshape(groups.view), groups.group) for w, groups in pairs]
        [end] = branch_and_bound([Part.of(qset.magnitudes, arrays)], MANY)
        return end.rounds

    return int(jax.jit(search)(kernels))


def one_device() -> None:
    """Prints the tables of updates on one device."""
    device = devices_of(ONE)[0]
    print(f"one {device.device_kind}\n{'':<26}{HEAD}")
    sharding = SingleDeviceSharding(device)
    for title, shapes, sets in (
        ("ResNet-18", resnet18(), SETS),
        *((f"a matrix, {matrix}", [matrix], MATRIX_SETS) for matrix in MATRICES),
    ):
        print(f"{title}: {sum(map(math.prod, shapes)) / 1e6:.1f} M weights")
        for name, qset in sets.items():
            print(f"{name:<26}{cost(qset, shapes, sharding)}", flush=True)
    print("rounds of the search, for ResNet-18 with normal weights")
    kernels = jax.tree.leaves(weights(resnet18()))
    for name, qset in SETS.items():
        if qset and qset.is_searched:
            print(f"{name:<26}{rounds(qset, kernels):>11}", flush=True)


def meshes(names: Sequence[str]) -> None:
    """Prints the table of updates on meshes of these topologies."""
    jax.config.update("jax_num_cpu_devices", 2)  # with one, brelax_jax takes no mesh into account
    print(f"{sum(map(math.prod, STACKED)) / 1e9:.1f} B weights in {len(STACKED)} stacked kernels")
    print(f"{'mesh':<11}{'update':<20}{HEAD}  collectives")
    for name in names:
        devices = devices_of(name)
        sizes = [int(size) for size in name.partition(":")[2].split("x")]
        mesh = jax.make_mesh(sizes, ("data", "model"), devices=devices)
        sharding = NamedSharding(mesh, P(None, "data", "model"))
        with jax.set_mesh(mesh):
            for update, qset in STACKED_SETS.items():
                try:
                    row = cost(qset, STACKED, sharding, len(devices))
                except jax.errors.JaxRuntimeError as error:  # of memory
                    row = f" {str(error).splitlines()[0]}"
                print(f"{name:<11}{update:<20}{row}", flush=True)


def main() -> None:
    """Prints one of the tables."""
    parser = Parser("benchmarks.compiled", __doc__, "", "--meshes v5e:2x2 v5e:4x4")
    parser.add_argument(
        "--meshes",
        nargs="*",
        metavar="TOPOLOGY",
        help=f"the table for these meshes; without names {' '.join(MESHES)}",
    )
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    if options.meshes is None:
        one_device()
    else:
        meshes(options.meshes or MESHES)


if __name__ == "__main__":
    main()
