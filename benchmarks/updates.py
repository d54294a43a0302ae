"""What quantization adds to an optimizer's update, as ratios: `python -m benchmarks.updates`.

The first table is the time of update plus `optax.apply_updates`, jitted with donated buffers, on
the convolution weights of ResNet-18 (float32), over that of SGD with momentum alone; the second
what flips that are tracked and metrics add to it, in the update's program and in their own; the
third the time of a whole training step of ResNet-20, 128 images of 32 px, over the float step. The
rows of a table take turns. In the first two the smallest of several runs counts, in the third the
median of the ratios of each turn.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import brelax_jax as brx
from brelax_jax._command_line import Parser
from examples.train.config import Config
from examples.train.data.load import Data, Split
from examples.train.steps import Trainer

RUNS = 15
STEPS = 40
WARMUP = 6
EVERY = 10  # updates from one call of `metrics` to the next
relax: Callable[..., Any] = brx.binary_relax


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


class Row:
    """An optimizer's update and apply, compiled, with its state and its times."""

    def __init__(self, optimizer: optax.GradientTransformation, params: Any, metrics: bool = False):
        def update(params: Any, state: Any, grads: Any) -> tuple[Any, Any, Any]:
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return params, state, brx.metrics(state, params) if metrics else None

        self.params, self.state = jax.tree.map(jnp.copy, params), jax.jit(optimizer.init)(params)
        begin = time.perf_counter()
        lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, self.state, params)
        self.update = lowered.compile()
        self.compile_seconds = time.perf_counter() - begin
        self.seconds = math.inf

    def run(self, grads: Any, counts: bool = False) -> None:
        """One update."""
        begin = time.perf_counter()
        done = jax.block_until_ready(self.update(self.params, self.state, grads))
        self.params, self.state, _ = done
        if counts:
            self.seconds = min(self.seconds, time.perf_counter() - begin)


def in_turns(rows: dict[str, Row], params: Any) -> None:
    """Measures every row; the warm-up brings phase II to its hard steps."""
    grads = jax.tree.map(lambda w: 0.01 * w, params)
    for run in range(RUNS + WARMUP):
        for row in rows.values():
            row.run(grads, counts=run >= WARMUP)


def print_table(title: str, rows: dict[str, Row]) -> None:
    """Times and their ratios to the first row."""
    base = next(iter(rows.values())).seconds
    print(f"\n{title:<32}{'ms':>8}{'ratio':>8}{'compile s':>11}")
    for name, row in rows.items():
        ratio = row.seconds / base
        print(f"{name:<32}{1e3 * row.seconds:8.1f}{ratio:8.2f}{row.compile_seconds:11.1f}")


def update_times() -> None:
    """Measures update and apply, and prints the table."""
    sgd, by_mean = optax.sgd(1e-3, momentum=0.9), brx.MeanMagnitude(0.445, refit=False)
    optimizers = {
        "SGD with momentum": sgd,
        "binary, phase I": relax(sgd, brx.Binary(), 1.0, hard_from=10**6),
        "binary, phase II": relax(sgd, brx.Binary(), 1.0, hard_from=4),
        "binary, PARQ": brx.parq(sgd, brx.Binary(), 1.0, hard_from=10**6),
        "ternary by threshold": relax(sgd, brx.TernaryThreshold(), 1.0, hard_from=10**6),
        "ternary": relax(sgd, brx.Ternary(), 1.0, hard_from=10**6),
        "four bits by the mean": relax(sgd, brx.Uniform(4, rule=by_mean), 1.0, hard_from=10**6),
        "four bits": relax(sgd, brx.Uniform(4), 1.0, hard_from=10**6),
    }
    params = weights(resnet18())
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    rows = {name: Row(optimizer, params) for name, optimizer in optimizers.items()}
    in_turns(rows, params)
    print(f"update and apply, {count / 1e6:.1f} M weights of ResNet-18, jax {jax.__version__}")
    print_table("optimizer", rows)
    for name, qset in {"binary": brx.Binary(), "ternary": brx.Ternary()}.items():
        row = Row(relax(sgd, qset, 1.0, hard_from=100), weights(resnet50()))
        seconds = row.compile_seconds
        print(f"ResNet-50's {len(resnet50())} kernels, {name}: compiled in {seconds:.1f} s")


def metrics_times() -> None:
    """Measures what metrics cost, and prints a table for each set."""
    sgd, params = optax.sgd(1e-3, momentum=0.9), weights(resnet18())
    for name, qset in {"binary": brx.Binary(), "ternary": brx.Ternary()}.items():
        plain, tracked = (relax(sgd, qset, 1.0, track_flips=track) for track in (False, True))
        rows = {
            "no metrics": Row(plain, params),
            "metrics in every update": Row(plain, params, metrics=True),
            "flips tracked": Row(tracked, params),
            "both": Row(tracked, params, metrics=True),
        }
        in_turns(rows, params)
        print_table(f"{name}, phase I", rows)
        update, alone = rows["no metrics"].seconds, metrics_seconds(rows["flips tracked"])
        print(f"{'metrics, a program of its own':<32}{1e3 * alone:8.1f}{alone / update:8.2f}")
        for every in (1, EVERY):
            ratio = (rows["flips tracked"].seconds + alone / every) / update
            print(f"{f'flips tracked, with it every {every}':<40}{ratio:8.2f}")


def metrics_seconds(row: Row) -> float:
    """Time of the metrics of a row's state, compiled on their own."""
    metrics = jax.jit(brx.metrics)
    seconds: list[float] = []
    for _ in range(RUNS + WARMUP):
        begin = time.perf_counter()
        jax.block_until_ready(metrics(row.state, row.params))
        seconds.append(time.perf_counter() - begin)
    return min(seconds[WARMUP:])


def training_step_times() -> None:
    """Measures whole training steps, and prints the table."""
    images = np.random.default_rng(0).integers(0, 256, (128, 32, 32, 3), np.uint8)
    split = Split(images, np.arange(128, dtype=np.int32) % 10)
    rows: dict[str, list[Any]] = {}
    settings: dict[str, dict[str, Any]] = {
        "float": {"method": "float"},
        "float, again": {"method": "float"},  # how far two equal rows differ
        "binary, phase I": {"hard_from": 1.0},
        "binary, phase II": {"hard_from": 0.0},
        "binary, PARQ": {"hard_from": 1.0, "method": "parq"},
        "binary, ProxQuant": {"hard_from": 1.0, "method": "proxquant"},
        "ternary, phase I": {"hard_from": 1.0, "set": "ternary"},
        "binary, metrics each step": {"hard_from": 1.0, "metrics_every": 1},
    }
    for name, changes in settings.items():
        plain = Config(dataset="cifar10", model="resnet20", epochs=10**4, metrics_every=0)
        config = dataclasses.replace(plain, **changes)
        trainer = Trainer(config, Data(split, split[np.arange(0)], split, 10))
        rows[name] = [trainer, trainer.init(), []]
    for run in range(STEPS + WARMUP):
        for row in rows.values():
            begin = time.perf_counter()
            trainer, state, seconds = row
            row[1] = jax.block_until_ready(trainer.step(state, split.images, split.labels)[0])
            if trainer.config.metrics_every:
                jax.block_until_ready(trainer.metrics(row[1].opt_state, row[1].params))
            if run >= WARMUP:
                seconds.append(time.perf_counter() - begin)
    print(f"\n{'training step of ResNet-20':<24}{'ms':>8}{'ratio':>8}")
    for name, (_, _, seconds) in rows.items():
        ratio = np.median(np.divide(seconds, rows["float"][2]))
        print(f"{name:<26}{1e3 * np.median(seconds):8.1f}{ratio:8.3f}")


def main() -> None:
    """Prints the tables."""
    Parser("benchmarks.updates", __doc__).parse_args()
    update_times()
    metrics_times()
    training_step_times()


if __name__ == "__main__":
    main()
