"""What quantization adds to an optimizer's update, as ratios: `python -m benchmarks.updates`.

Every row is the time of update plus `optax.apply_updates`, jitted with donated buffers, on the
convolution weights of ResNet-18 (float32), over that of SGD with momentum alone. The rows take
turns, and the smallest of several runs counts.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import brelax_jax as brx

RUNS = 15


def resnet18() -> list[tuple[int, ...]]:
    """Shapes of its convolution kernels."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    inputs = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(3, 3, inputs, width), (3, 3, width, width)]
            shapes += [(1, 1, inputs, width)] if inputs != width else []
            inputs = width
    return shapes


def resnet50() -> list[tuple[int, ...]]:
    """Shapes of its convolution kernels."""
    shapes: list[tuple[int, ...]] = [(7, 7, 3, 64)]
    inputs = 64
    for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(depth):
            shapes += [(1, 1, inputs, width), (3, 3, width, width), (1, 1, width, 4 * width)]
            shapes += [(1, 1, inputs, 4 * width)] if block == 0 else []
            inputs = 4 * width
    return shapes


def weights(shapes: list[tuple[int, ...]]) -> dict[str, dict[str, jax.Array]]:
    """Normal weights of these shapes."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        f"conv{i}": {"kernel": 0.05 * jax.random.normal(key, shape)}
        for i, (key, shape) in enumerate(zip(keys, shapes, strict=True))
    }


def compiled(optimizer: optax.GradientTransformation, params: Any) -> tuple[Any, Any, float]:
    """Update and apply, the state to begin with, and the seconds of compilation."""

    def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    begin = time.perf_counter()
    step = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params).compile()
    return step, state, time.perf_counter() - begin


def main() -> None:
    """Measures and prints the table."""
    sgd = optax.sgd(1e-3, momentum=0.9)
    relax: Callable[..., Any] = brx.binary_relax
    optimizers = {
        "SGD with momentum": sgd,
        "binary, phase I": relax(sgd, brx.Binary(), 1.0, hard_from=10**6),
        "binary, phase II": relax(sgd, brx.Binary(), 1.0, hard_from=0),
        "ternary by threshold": relax(sgd, brx.TernaryThreshold(), 1.0, hard_from=10**6),
        "ternary": relax(sgd, brx.Ternary(), 1.0, hard_from=10**6),
    }
    params = weights(resnet18())
    grads = jax.tree.map(lambda w: 0.01 * w, params)
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    rows: dict[str, list[Any]] = {}
    for name, optimizer in optimizers.items():
        step, state, seconds = compiled(optimizer, params)
        rows[name] = [step, jax.tree.map(jnp.copy, params), state, math.inf, seconds]
    for _ in range(RUNS):
        for row in rows.values():
            begin = time.perf_counter()
            row[1], row[2] = jax.block_until_ready(row[0](row[1], row[2], grads))
            row[3] = min(row[3], time.perf_counter() - begin)
    base = rows["SGD with momentum"][3]
    print(f"update and apply, {count / 1e6:.1f} M weights of ResNet-18, jax {jax.__version__}")
    print(f"{'optimizer':<24}{'ms':>8}{'ratio':>8}{'compile s':>11}")
    for name, (_, _, _, seconds, compile_seconds) in rows.items():
        print(f"{name:<24}{1e3 * seconds:8.1f}{seconds / base:8.2f}{compile_seconds:11.1f}")
    for name, qset in {"binary": brx.Binary(), "ternary": brx.Ternary()}.items():
        seconds = compiled(relax(sgd, qset, 1.0, hard_from=100), weights(resnet50()))[2]
        print(f"ResNet-50's {len(resnet50())} kernels, {name}: compiled in {seconds:.1f} s")


if __name__ == "__main__":
    main()
