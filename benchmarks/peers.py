"""Other libraries on the same work: `python -m benchmarks.peers`.

A network of two dense layers learns scikit-learn's digits by 200 full-batch steps of Adam, with
kernels of one scale for each output channel: by this library, by Qwix (JAX) and by torchao's PARQ
(PyTorch), each where it is installed (`pip install ".[peers]"`). The table has the test accuracy by
seed, the most values that a channel of the trained params holds, the time of a step over the float
step of the same framework, and the statements that a user adds to a float program.
"""

import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import brelax_jax as brx
from brelax_jax._command_line import Parser
from examples.runs.report import table

STEPS, RATE, HIDDEN = 200, 0.02, 64
SEEDS = (0, 1, 2)
TURNS, STEPS_A_TURN = 9, 20  # of timing
SETS = {
    "1 bit": brx.Binary(granularity=brx.PerChannel()),
    "ternary": brx.TernaryThreshold(granularity=brx.PerChannel()),
    "4 bits": brx.Uniform(4, granularity=brx.PerChannel()),
}


class Trained(NamedTuple):
    """A trained network: test accuracy, its kernels (in, out), and a step that goes on with it."""

    accuracy: float
    kernels: list[np.ndarray[Any, Any]]
    step: Callable[[], None]


def data() -> tuple[Any, ...]:
    """Images from 0 to 1 and labels, for training and for the test."""
    images, labels = load_digits(return_X_y=True)
    parts: Any = train_test_split(images / 16, labels, random_state=0)
    return tuple(np.asarray(part, kind) for part, kind in zip(parts, "ffii", strict=True))


def in_jax(seed: int, wrapped: Callable[[Any], Any], model: Any) -> Trained:
    """A Flax network by an optimizer that `wrapped` makes from Adam."""
    train_x, test_x, train_y, test_y = data()
    params = model.init(jax.random.key(seed), train_x)
    optimizer = wrapped(optax.adam(optax.cosine_decay_schedule(RATE, STEPS)))

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        def loss(params: Any) -> Any:
            logits = model.apply(params, train_x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    now = [params, jax.jit(optimizer.init)(params)]

    def go_on() -> None:
        now[:] = step(*now)
        jax.block_until_ready(now)

    for _ in range(STEPS):
        go_on()
    right = jnp.argmax(model.apply(now[0], test_x), -1) == test_y
    kernels = [np.asarray(leaf) for leaf in jax.tree.leaves(now[0]) if leaf.ndim == 2]
    return Trained(float(right.mean()), kernels, go_on)


def network() -> nn.Module:
    """The network in Flax."""
    return nn.Sequential([nn.Dense(HIDDEN), nn.relu, nn.Dense(10)])


def ours(seed: int, bits: str) -> Trained:
    """By `binary_relax`."""
    plan = brx.continuation(STEPS)
    return in_jax(seed, lambda adam: brx.binary_relax(adam, SETS[bits], plan), network())


def by_qwix(seed: int, bits: str) -> Trained:
    """By Qwix's quantization-aware training of weights."""
    qwix: Any = importlib.import_module("qwix")

    rule = qwix.QtRule(module_path=".*", weight_qtype={"4 bits": "int4"}[bits])
    return in_jax(seed, lambda adam: adam, qwix.quantize_model(network(), qwix.QtProvider([rule])))


def by_torchao(seed: int, bits: str | None) -> Trained:
    """By PARQ in PyTorch; float if there are no bits."""
    torch: Any = importlib.import_module("torch")
    optim: Any = importlib.import_module("torchao.prototype.parq.optim")
    quant: Any = importlib.import_module("torchao.prototype.parq.quant")

    train_x, test_x, train_y, test_y = map(torch.from_numpy, data())
    train_y, test_y = train_y.long(), test_y.long()
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(64, HIDDEN), torch.nn.ReLU(), torch.nn.Linear(HIDDEN, 10)
    )
    kernels = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    if bits is None:
        optimizer = adam = torch.optim.Adam(model.parameters(), RATE)
    else:
        width, quantizer = {
            "1 bit": (1, quant.LSBQuantizer()),
            "ternary": (0, quant.TernaryUnifQuantizer()),
            "4 bits": (4, quant.UnifQuantizer()),
        }[bits]
        groups = [{"params": kernels, "quant_bits": width}, {"params": others}]
        adam = torch.optim.Adam(groups, RATE)
        optimizer = optim.QuantOptimizer(
            adam, quantizer, optim.ProxPARQ(0, 3 * STEPS // 4),
            quant_period=1, quant_per_channel=True,
        )  # fmt: skip
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, STEPS)

    def go_on() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(train_x), train_y).backward()
        optimizer.step()

    for _ in range(STEPS):
        go_on()
        schedule.step()
    right = model(test_x).argmax(-1) == test_y
    arrays = [p.detach().numpy().T.copy() for p in kernels]
    return Trained(float(right.float().mean()), arrays, go_on)


class Peer(NamedTuple):
    """A library on one width.

    Attributes:
      name: its name.
      package: what has to be installed.
      train: trains with a seed.
      floats: the same framework without quantization.
      statements: what a user adds: to make the optimizer or the model, and to wrap it.
    """

    name: str
    package: str
    train: Callable[[int], Trained]
    floats: Callable[[int], Trained]
    statements: int


def peers() -> list[Peer]:
    """All rows of the table."""
    found: list[Peer] = []

    def floats(seed: int) -> Trained:
        return in_jax(seed, lambda adam: adam, network())

    for bits in SETS:
        found.append(Peer(f"brelax_jax, {bits}", "jax", partial(ours, bits=bits), floats, 1))
    found.append(Peer("Qwix, 4 bits", "qwix", partial(by_qwix, bits="4 bits"), floats, 2))
    plain = partial(by_torchao, bits=None)
    for bits in SETS:
        found.append(Peer(f"torchao, {bits}", "torchao", partial(by_torchao, bits=bits), plain, 3))
    return found


def row(peer: Peer) -> dict[str, str]:
    """A line of the table."""
    runs = [peer.train(seed) for seed in SEEDS]
    values = max(len(np.unique(c)) for run in runs for kernel in run.kernels for c in kernel.T)
    reference, ratios = peer.floats(SEEDS[0]), []
    for _ in range(TURNS):
        seconds = []
        for step in (runs[0].step, reference.step):
            begin = time.perf_counter()
            for _ in range(STEPS_A_TURN):
                step()
            seconds.append(time.perf_counter() - begin)
        ratios.append(seconds[0] / seconds[1])
    return {
        "library": peer.name,
        "accuracy by seed (%)": ", ".join(f"{100 * run.accuracy:.1f}" for run in runs),
        "values a channel": str(values),
        "step over float": f"{statistics.median(ratios):.2f}",
        "statements": str(peer.statements),
    }


def main() -> None:
    """Prints the table."""
    Parser("benchmarks.peers", __doc__).parse_args()
    known = [each for each in peers() if importlib.util.find_spec(each.package)]
    print(table([row(peer) for peer in known]))
    if missing := {each.package for each in peers()} - {each.package for each in known}:
        print(f"Not installed: {', '.join(sorted(missing))}.")


if __name__ == "__main__":
    main()
