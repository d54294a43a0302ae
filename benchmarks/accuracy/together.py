"""Runs that differ only in their seeds and learning rates, trained as one program.

A GPU takes about as long for six small networks as for one. So the members of a team are the rows
of all arrays, by `jax.vmap`, and an epoch is one call. Each member computes what
`examples.train.loop` would, to rounding, and leaves the same log. It leaves one checkpoint, its
last: a team that is interrupted starts again.
"""

import math
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

import brelax_jax as brx
from benchmarks.accuracy.runs import Run
from examples.runs.log import Log
from examples.runs.progress import Progress
from examples.train.checkpoints import Checkpoints
from examples.train.config import Config
from examples.train.data.load import Data
from examples.train.data.splits import Split
from examples.train.loop import (
    log_start,
    log_weights,
    pull_of,
    shown_metrics,
    weights_due,
    what_is_held,
)
from examples.train.optimizer import layer_sets
from examples.train.steps import Sums, Trainer, TrainState

NUMBERS = ("seed", "lr")  # what may differ between the members of a team
PRECISION = "highest"  # of products: float32, as on CPU
PLACES = 256  # of an image that one product of a convolution takes

Numbers: TypeAlias = dict[str, Array]
Arrays: TypeAlias = tuple[Array, Array]  # images and labels


def teams(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs in teams, in the order of their first members."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        alike = {name: value for name, value in run.settings.items() if name not in NUMBERS}
        alike["warm_start"] = run.start is not None
        found.setdefault(repr(alike), []).append(run)
    return list(found.values())


def train_together(runs: Sequence[Run], data: Data, progress: Progress) -> None:
    """Trains a team from the start, and writes the log and the last checkpoint of each member.

    Raises:
      ValueError: if the data are decoded while training.
    """
    with jax.default_matmul_precision(PRECISION):
        team = Team([run.config for run in runs], data)
        state = team.start()
        for member, (log, config) in enumerate(zip(team.logs, team.configs, strict=True)):
            log_start(log, config, data, member_of(state.params, member), together=len(runs))
        team.log_weights(0, state)
        for epoch in range(1, team.config.epochs + 1):
            state = team.train_epoch(state, epoch)
            progress.advance(len(runs) * team.trainer.images_per_epoch)
        team.finish(state)


def member_of(tree: Any, member: int) -> Any:
    """One member's part of what a team holds, cut out by NumPy: that compiles nothing."""
    return jax.tree.map(lambda x: np.asarray(x)[member], tree)


class Team:
    """The functions of `Trainer` over all members at once, and the members' logs."""

    def __init__(self, configs: Sequence[Config], data: Data) -> None:
        if not isinstance(data.train, Split):
            raise ValueError("--together needs all images in memory: --override stream=no.")
        self.configs, self.config, self.data = list(configs), configs[0], data
        self.logs = [Log(config.directory) for config in configs]
        self.trainer = Trainer(self.config, data)
        self.trainer.model = self.trainer.model.clone(convolve=convolution_as_product)
        self._numbers = {
            name: jax.device_put(np.array([getattr(config, name) for config in configs]))
            for name in NUMBERS
        }
        splits = {"train": data.train, "validation": data.validation, "test": data.test}
        self._splits: dict[str, Arrays] = {
            name: jax.device_put((split.images, split.labels))
            for name, split in splits.items()
            if isinstance(split, Split)
        }
        self._epoch = jax.jit(self._train_epoch, donate_argnums=0)
        self._correct = jax.jit(self._share_correct)
        self._deployed = jax.jit(self._deploy)
        self._metrics = jax.jit(jax.vmap(brx.metrics))

    def start(self) -> TrainState:
        """The state before the first step, from scratch or from the members' float starts."""
        if self.config.warm_start is None:
            init = jax.vmap(lambda numbers: self.trainer.with_numbers(**numbers).initial_state())
            return jax.jit(init)(self._numbers)
        like = self.trainer.abstract_state()
        models = [
            Checkpoints(str(config.warm_start)).restore_model(like, config)
            for config in self.configs
        ]
        model = jax.tree.map(lambda *each: np.stack(each), *models)
        return jax.jit(jax.vmap(self.trainer.state_of))(model["params"], model["batch_stats"])

    def train_epoch(self, state: TrainState, epoch: int) -> TrainState:
        """An epoch of all members, and its lines in their logs."""
        begin, step = time.perf_counter(), epoch * self.trainer.steps_per_epoch
        state, sums = self._epoch(state, self._numbers, self._orders(epoch), self._splits["train"])
        sums = jax.device_get(sums)
        losses, shares = sums.loss / sums.images, sums.correct / sums.images
        seconds = (time.perf_counter() - begin) / len(self.configs)
        accuracies = self._accuracies(state, "validation" if len(self.data.validation) else "test")
        metrics = self._layers(state)
        for member, (log, config) in enumerate(zip(self.logs, self.configs, strict=True)):
            if metrics:
                log.write("metrics", epoch=epoch, step=step, layers=metrics[member])
            values = {"loss": losses[member], "accuracy": shares[member]}
            values["learning_rate"] = self.trainer.with_numbers(lr=config.lr).learning_rate(
                step - 1
            )
            if config.method != "float":
                values |= pull_of(float(brx.strength(member_of(state.opt_state, member))))
            log.write(
                "epoch", epoch=epoch, step=step, **values, seconds=seconds,
                images_per_second=self.trainer.images_per_epoch / seconds, **accuracies[member],
            )  # fmt: skip
        if weights_due(epoch, self.config):
            self.log_weights(epoch, state)
        return state

    def log_weights(self, epoch: int, state: TrainState) -> None:
        """Logs a histogram of each member's weights."""
        for member, (log, config) in enumerate(zip(self.logs, self.configs, strict=True)):
            log_weights(log, epoch, member_of(state, member), config)

    def finish(self, state: TrainState) -> None:
        """Writes each member's checkpoint and result."""
        accuracies, params = self._accuracies(state, "test"), state.params
        if not self.config.deploys_as_trained:
            params, _ = self.deployed(state)
        for member, (log, config) in enumerate(zip(self.logs, self.configs, strict=True)):
            ours = jax.device_put(member_of(state, member))
            Checkpoints(config.directory).save(config.epochs, ours, config)
            held = what_is_held(member_of(params, member), config)
            log.write("result", epoch=config.epochs, **accuracies[member], **held)

    def deployed(self, state: TrainState) -> tuple[Any, Any]:
        """The params to deploy and batch statistics that belong to them."""
        return self._deployed(state, self._numbers, self._orders(0), self._splits["train"])

    def _orders(self, epoch: int) -> NDArray[np.int64]:
        """The indices of an epoch's batches: steps, members, images."""
        members = [self.trainer.with_numbers(seed=config.seed) for config in self.configs]
        return np.stack([np.stack([*member.order(epoch)]) for member in members], axis=1)

    def _accuracies(self, state: TrainState, split: str) -> list[dict[str, float]]:
        """Each member's accuracy as training left it, and deployed."""
        model = (state.params, state.batch_stats)
        current = deployed = self._correct(model, self._splits[split])
        if not self.config.deploys_as_trained:
            deployed = self._correct(self.deployed(state), self._splits[split])
        return [
            {f"{split}_current": one, f"{split}_deployed": other}
            for one, other in zip(current.tolist(), deployed.tolist(), strict=True)
        ]

    def _layers(self, state: TrainState) -> list[dict[str, Any]]:
        """Each member's metrics of each quantized layer, if they are logged."""
        steps = self.trainer.steps_per_epoch
        if not self.config.metrics_due(steps, steps):
            return []
        values = jax.device_get(self._metrics(state.opt_state, state.params))
        sets = layer_sets(self.config).assign(member_of(state.params, 0))
        return [
            {path: shown_metrics(member_of(each, i), sets[path]) for path, each in values.items()}
            for i in range(len(self.configs))
        ]

    def _train_epoch(
        self, state: TrainState, numbers: Numbers, orders: Array, split: Arrays
    ) -> tuple[TrainState, Sums]:
        images, labels = split

        def one(numbers: Numbers, state: TrainState, indices: Array) -> tuple[TrainState, Sums]:
            member = self.trainer.with_numbers(**numbers)
            return member.next_state(state, images[indices], labels[indices])

        def step(carry: tuple[TrainState, Sums], indices: Array) -> tuple[Any, None]:
            state, total = carry
            state, sums = jax.vmap(one)(numbers, state, indices)
            return (state, total.plus(sums)), None

        zero = jnp.zeros(len(self.configs))
        return lax.scan(step, (state, Sums(zero, zero, zero)), orders)[0]

    def _share_correct(self, model: tuple[Any, Any], split: Arrays) -> Array:
        images, labels = split
        size = next(n for n in range(min(500, len(labels)), 0, -1) if len(labels) % n == 0)
        batches = (images.reshape(-1, size, *images.shape[1:]), labels.reshape(-1, size))

        def add(total: Array, batch: Arrays) -> tuple[Array, None]:
            sums = jax.vmap(self.trainer.sums_of, (0, 0, None, None, None))(
                *model, *batch, jnp.ones(size)
            )
            return total + sums.correct, None

        return lax.scan(add, jnp.zeros(len(self.configs)), batches)[0] / len(labels)

    def _deploy(
        self, state: TrainState, numbers: Numbers, orders: Array, split: Arrays
    ) -> tuple[Any, Any]:
        images, _ = split
        count = min(self.config.statistics_batches, len(orders))

        def one(numbers: Numbers, state: TrainState, orders: Array) -> tuple[Any, Any]:
            member = self.trainer.with_numbers(**numbers)
            params = member.params_to_deploy(state)

            def add(total: Any, batch: Arrays) -> tuple[Any, None]:
                number, indices = batch
                new = member.statistics_of(params, images[indices], number)
                return jax.tree.map(jnp.add, total, new), None

            zeros = jax.tree.map(jnp.zeros_like, state.batch_stats)
            total = lax.scan(add, zeros, (jnp.arange(1, count + 1), orders))[0]
            return params, jax.tree.map(lambda x: x / count, total)

        return jax.vmap(one, in_axes=(0, 0, 1))(numbers, state, orders[:count])


def convolution_as_product(
    images: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    **_: Any,
) -> Array:
    """A convolution of NHWC images as matrix products over patches.

    With a kernel for each member `lax.conv_general_dilated` becomes a convolution in groups, which
    took ten times as long on an H200. The products are those of parts of the places, because the
    kernel's gradient is a sum over all of them, and one product would use few cores of a GPU.
    """
    height, width, _inputs, outputs = kernel.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(images.shape[1:3], (height, width), strides, padding)
    images = jnp.pad(images, ((0, 0), *padding, (0, 0)))
    rows, columns = (
        (size - side) // stride + 1
        for size, side, stride in zip(images.shape[1:3], (height, width), strides, strict=True)
    )
    shifted = [
        images[:, i :: strides[0], j :: strides[1]][:, :rows, :columns]
        for i in range(height)
        for j in range(width)
    ]
    patches = jnp.concatenate(shifted, axis=-1)
    parts = math.gcd(len(images), max(rows * columns * len(images) // PLACES, 1))
    kernels = jnp.broadcast_to(kernel.reshape(-1, outputs), (parts, patches.shape[-1], outputs))
    product = jnp.einsum("ijp,ipc->ijc", patches.reshape(parts, -1, patches.shape[-1]), kernels)
    return product.reshape(*patches.shape[:-1], outputs)
