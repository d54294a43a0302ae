"""What a projection costs, in passes over memory: `python -m benchmarks.projections`.

A pass is `jnp.sum(jnp.abs(w))` on the same weights, jitted. All rows take turns, and the smallest
of several runs counts. With the extra `parq` the last table compares with torchao's PARQ optimizer.
"""

import functools
import importlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import brelax_jax as brx
from benchmarks.updates import Row, relax, resnet18, weights
from brelax_jax._command_line import Parser

RUNS = 8
SHAPE = (3, 3, 512, 512)
CHANNEL = brx.PerChannel(-1)


def least_seconds(calls: dict[str, Callable[[], Any]], runs: int = RUNS) -> dict[str, float]:
    """The least time of each call, over runs in which they take turns."""
    seconds = dict.fromkeys(calls, float("inf"))
    for run in range(runs + 1):  # the first compiles
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if run:
                seconds[name] = min(seconds[name], time.perf_counter() - begin)
    return seconds


def by_sorting(w: jax.Array) -> jax.Array:
    """The customary exact ternary projection: sort, cumulative sum, best support."""
    a = jnp.sort(jnp.abs(w).ravel())[::-1]
    sums = jnp.cumsum(a)
    k = jnp.argmax(jnp.square(sums) / jnp.arange(1, a.size + 1))
    return jnp.where(jnp.abs(w) >= a[k], jnp.sign(w) * sums[k] / (k + 1), 0)


def on(project: Callable[[jax.Array], Any], w: jax.Array) -> Callable[[], Any]:
    """The jitted call."""
    jitted = jax.jit(project)
    return lambda: jitted(w)


def projection_times() -> None:
    """Prints the table of all sets, on 2.36 million weights."""
    normal = jax.random.normal(jax.random.key(0), SHAPE)
    heavy = jnp.asarray(np.random.default_rng(0).standard_t(2.5, SHAPE), jnp.float32)
    sets: dict[str, brx.QuantizedSet] = {
        "Binary": brx.Binary(),
        "TernaryThreshold": brx.TernaryThreshold(),
        "Ternary": brx.Ternary(),
        "two bits (±1, ±3)": brx.ScaledLevels((-3, -1, 1, 3)),
        "Uniform(3)": brx.Uniform(3),
        "Uniform(4)": brx.Uniform(4),
        "Uniform(6)": brx.Uniform(6),
        "Uniform(8)": brx.Uniform(8),
        "PowerOfTwo(4)": brx.PowerOfTwo(4),
        "PowerOfTwo(5)": brx.PowerOfTwo(5),
        "TernaryThreshold, channel": brx.TernaryThreshold(granularity=CHANNEL),
        "Ternary, channel": brx.Ternary(granularity=CHANNEL),
        "Uniform(4), channel": brx.Uniform(4, granularity=CHANNEL),
        "Ternary, blocks of 64": brx.Ternary(granularity=brx.PerBlock(64, 2)),
        "Ternary, blocks of 16": brx.Ternary(granularity=brx.PerBlock(16, 2)),
        "Uniform(4), blocks of 32": brx.Uniform(4, granularity=brx.PerBlock(32, 2)),
        "Uniform(4), blocks of 16": brx.Uniform(4, granularity=brx.PerBlock(16, 2)),
    }
    calls = {"one pass": on(lambda w: jnp.sum(jnp.abs(w)), normal)}
    calls |= {name: on(qset.project, normal) for name, qset in sets.items()}
    calls |= {
        "Ternary, Student-t(2.5)": on(brx.Ternary().project, heavy),
        "ternary by sorting": on(by_sorting, normal),
    }
    seconds = least_seconds(calls)
    print(f"{normal.size / 1e6:.2f} M weights, float32, jax {jax.__version__}, {jax.devices()[0]}")
    print(f"{'projection':<28}{'ms':>9}{'passes':>9}{'× threshold':>13}{'peak memory':>13}")
    for name, each in seconds.items():
        threshold = "TernaryThreshold" + (", channel" if name.endswith("channel") else "")
        memory = ""
        if name in sets:
            analysis: Any = jax.jit(sets[name].project).lower(normal).compile().memory_analysis()
            total = analysis.temp_size_in_bytes + 2 * normal.nbytes  # with w and its projection
            memory = f"{total / normal.nbytes:.2f}"
        print(
            f"{name:<28}{1e3 * each:9.2f}{each / seconds['one pass']:9.1f}"
            f"{each / seconds[threshold]:13.1f}{memory:>13}"
        )


def growth() -> None:
    """Prints the time per weight from 1e4 to 1e8 of them."""
    print(f"\n{'weights':<28}{'ms':>9}{'ns a weight':>14}")
    for size in (10**4, 10**5, 10**6, 10**7, 10**8):
        w = jax.random.normal(jax.random.key(1), (size,))
        seconds = least_seconds({"": on(brx.Ternary().project, w)}, 3)[""]
        print(f"Ternary, {size:<19.0e}{1e3 * seconds:9.2f}{1e9 * seconds / size:14.2f}")


def against_parq() -> None:
    """Prints the time of whole updates on ResNet-18's convolution weights, beside PARQ's."""
    params = weights(resnet18())
    grads = jax.tree.map(lambda w: 0.01 * w, params)
    sgd = optax.sgd(1e-3, momentum=0.9)
    calls: dict[str, Callable[[], Any]] = {}
    for name, optimizer in {
        "SGD": sgd,
        "Ternary": relax(sgd, brx.Ternary(), 1.0, hard_from=10**6),
    }.items():
        calls[name] = functools.partial(Row(optimizer, params).run, grads)
    try:
        calls |= parq_calls([np.asarray(leaf) for leaf in jax.tree.leaves(params)])
    except ImportError as error:
        print(f"\nPARQ is left out ({error}): pip install '.[parq]' brings it.")
    seconds = least_seconds(calls)
    print(f"\n{'update of 11.2 M weights':<28}{'ms':>9}{'× SGD':>9}")
    for name, each in seconds.items():
        print(f"{name:<28}{1e3 * each:9.1f}{each / seconds['SGD']:9.2f}")


def parq_calls(kernels: list[np.ndarray[Any, Any]]) -> dict[str, Callable[[], Any]]:
    """A step of PARQ's hard-projecting optimizer with its heuristic ternary quantizer."""
    torch: Any = importlib.import_module("torch")
    optim: Any = importlib.import_module("torchao.prototype.parq.optim")
    quant: Any = importlib.import_module("torchao.prototype.parq.quant")
    tensors = [torch.nn.Parameter(torch.tensor(kernel)) for kernel in kernels]
    for tensor in tensors:
        tensor.grad = 0.01 * tensor.detach()
    group = {"params": tensors, "quant_bits": 0}
    base = torch.optim.SGD([group], lr=1e-3, momentum=0.9)
    optimizer = optim.QuantOptimizer(
        base,
        quant.LSBQuantizer(optimal=False),
        optim.ProxHardQuant(),
        warmup_steps=0,
        quant_period=1,
    )
    return {"PARQ, heuristic ternary": lambda: optimizer.step()}


def main() -> None:
    """Prints all tables."""
    Parser("benchmarks.projections", __doc__).parse_args()
    projection_times()
    growth()
    against_parq()


if __name__ == "__main__":
    main()
