"""What saving, loading and running packed networks costs: `python -m benchmarks.export`.

Each figure is a ratio to something measured in the same run, the two taking turns: the size of a
file to that of its bits, packing to `numpy.packbits` on as many bits, loading to reading the bytes
and unpacking them, and a network on packed weights to the float network. Of times the smallest of
several runs counts, for the network the median of the ratios of each turn.
"""

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import brelax_jax as brx
from brelax_jax._command_line import Parser
from examples.train.models import make_model

RUNS = 15
TURNS = 20
COUNT = 11_000_000
SETS = {"binary": (brx.Binary(), 1.0), "ternary": (brx.TernaryThreshold(), 1.6)}
OTHERS = {"4 bits": (brx.Uniform(4), 4.0), "8 bits": (brx.Uniform(8), 8.0)}


def seconds(*functions: Callable[[], Any], runs: int = RUNS) -> list[list[float]]:
    """The times of each function, in turns; the first one does not count."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(runs + 1):
        for function, taken in zip(functions, times, strict=True):
            begin = time.perf_counter()
            jax.block_until_ready(function())
            if turn:
                taken.append(time.perf_counter() - begin)
    return times


def ratio(one: Callable[[], Any], other: Callable[[], Any]) -> str:
    """The ratio of the least times of two functions, and these."""
    mine, theirs = (min(times) for times in seconds(one, other))
    return f"{mine / theirs:8.2f}   {1e3 * mine:.2f} ms to {1e3 * theirs:.2f} ms"


def line(name: str, figure: str, target: str) -> None:
    """Prints a row of the table."""
    print(f"{name:<40}{figure:<40}{target}", flush=True)


def packing(name: str, qset: brx.QuantizedSet, bits: float) -> None:
    """Packs and unpacks random codes."""
    rng, most, has_zero = np.random.default_rng(0), len(qset.table) - 1, 0.0 in qset.levels
    codes = [code for code in range(-most, most + 1) if code or has_zero]
    drawn = jnp.asarray(rng.choice(codes, COUNT), jnp.int8)
    scale, dtype = jnp.ones(1), jnp.dtype("float32")
    quantized = brx.Quantized(drawn, scale, qset.table, dtype, has_zero=has_zero)
    packed = brx.pack(quantized)
    ones = rng.integers(0, 2, int(bits * COUNT)).astype(np.uint8)
    data = np.packbits(ones)
    line(f"pack, {name}", ratio(lambda: brx.pack(quantized), lambda: np.packbits(ones)), "4")
    line(f"unpack, {name}", ratio(packed.unpack, lambda: np.unpackbits(data)), "4")


def file(path: Path, params: Any, name: str, qset: brx.QuantizedSet, bits: float) -> None:
    """Saves and loads a network with all kernels on a set."""
    rules = brx.select((r"kernel$", qset))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the params are not on the set
        brx.save(path, params, rules=rules)
    packed = brx.load(path, packed=True)
    leaves = jax.tree.leaves(packed, is_leaf=is_packed)
    least = sum(
        bits / 8 * math.prod(leaf.shape) + leaf.scale.nbytes if is_packed(leaf) else leaf.nbytes
        for leaf in leaves
    )
    size = path.stat().st_size
    figure = f"{size / least:8.3f}   {size:,} bytes to {least:,.0f}"
    line(f"file of ResNet-18, {name}", figure, "1.03")
    unpack = jax.jit(brx.dequantize)

    def read_and_unpack() -> Any:
        path.read_bytes()
        return unpack(packed)

    line(f"load, {name}", ratio(lambda: brx.load(path), read_and_unpack), "3")
    line(f"load packed, {name}", ratio(lambda: brx.load(path, packed=True), read_and_unpack), "")


def is_packed(leaf: Any) -> bool:
    """Whether it is a `Packed`."""
    return isinstance(leaf, brx.Packed)


def inference() -> None:
    """Runs a ResNet-20 on a batch of 128 images, from float and from packed weights."""
    model = make_model("resnet20", 10)
    images = jax.random.normal(jax.random.key(1), (128, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images[:1])
    rules = brx.select((r"kernel$", brx.Binary()))
    run = jax.jit(model.apply)
    packed = {**variables, "params": brx.pack(rules.quantize(variables["params"]))}
    run_packed = jax.jit(lambda packed, x: model.apply(brx.dequantize(packed), x))
    projected = {**variables, "params": rules.project(variables["params"])}
    outputs = run_packed(packed, images), run(projected, images)
    mine, theirs = seconds(
        lambda: run_packed(packed, images), lambda: run(projected, images), runs=TURNS
    )
    line(
        "inference of ResNet-20, packed, binary",
        f"{np.median(np.divide(mine, theirs)):8.3f}   {1e3 * min(mine):.1f} ms to "
        f"{1e3 * min(theirs):.1f} ms",
        "1.25",
    )
    worst = float(jnp.max(jnp.abs(outputs[0] - outputs[1])))
    line("  largest difference of its outputs", f"{worst:8.2g}", "0")
    sizes = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree["params"])) for tree in (packed, projected)
    ]
    line("  bytes of all its params", f"{sizes[0] / sizes[1]:8.4f}", "0.125")


def float16_scales() -> None:
    """Projects onto a set whose scales are of float16, and onto that with any scales."""
    w = 0.05 * jax.random.normal(jax.random.key(0), (512, 4608))
    sets = [
        brx.Uniform(4, granularity=brx.PerBlock(32, 0), scale_dtype=dtype)
        for dtype in ("float16", None)
    ]
    bound, free = (jax.jit(lambda w, qset=qset: qset.fit(w).scale) for qset in sets)
    medians = [float(np.median(times)) for times in seconds(lambda: bound(w), lambda: free(w))]
    line("scales of float16, Uniform(4), blocks: time", f"{medians[0] / medians[1]:8.2f}", "1.3")
    errors = [float(brx.distance(w, qset)) ** 2 for qset in sets]
    line("  squared error", f"{errors[0] / errors[1]:8.6f}", "1.001")


def main() -> None:
    """Prints the table."""
    Parser("benchmarks.export", __doc__).parse_args()
    print(f"jax {jax.__version__}, {COUNT / 1e6:.0f} M weights where none are named\n")
    line("what", "   ratio", "at most")
    model = make_model("resnet18", 1000)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    with TemporaryDirectory() as directory:
        for name, (qset, bits) in SETS.items():
            file(Path(directory) / name, params, name, qset, bits)
    for name, (qset, bits) in {**SETS, **OTHERS}.items():
        packing(name, qset, bits)
    inference()
    float16_scales()


if __name__ == "__main__":
    main()
