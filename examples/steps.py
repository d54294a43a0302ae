"""The jitted functions of training and evaluation, each called from Python.

A compiled loop around convolutions would run several times slower on CPU than a step called from
Python.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import brelax_jax as brx
from examples.augment import augment, normalize
from examples.config import Config
from examples.data import Data, Split
from examples.models import make_model
from examples.quantization import learning_rate, make_optimizer


class TrainState(NamedTuple):
    """What a checkpoint keeps: all that the next step depends on, besides the data."""

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any


class Metrics(NamedTuple):
    """Sums over images."""

    loss: Array | float = 0.0
    correct: Array | float = 0.0
    images: Array | float = 0.0

    def plus(self, other: "Metrics") -> "Metrics":
        """The sums over both."""
        return Metrics(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def mean_loss(self) -> float:
        """Mean cross entropy; waits for the device."""
        return float(self.loss) / float(self.images)

    @property
    def accuracy(self) -> float:
        """Share of correct answers; waits for the device."""
        return float(self.correct) / float(self.images)


class Trainer:
    """A network, its optimizer and its data, with the jitted functions over them."""

    def __init__(self, config: Config, data: Data) -> None:
        self.config, self.data = config, data
        self.model = make_model(config.model, data.classes, config.dtype)
        self.batch = min(config.batch, len(data.train))
        self.steps_per_epoch = config.steps_per_epoch(len(data.train))
        self.images_per_epoch = config.images_per_epoch(len(data.train))
        self.learning_rate = learning_rate(config, self.steps_per_epoch)
        self.optimizer = make_optimizer(config, self.steps_per_epoch)
        self.mean, self.std = map(jnp.asarray, data.channel_moments)
        self.step = jax.jit(self._step, donate_argnums=0)
        self.quantized = jax.jit(brx.quantized_params)
        self._sums = jax.jit(self._batch_sums)
        self._statistics = jax.jit(self._batch_statistics)

    def init(self) -> TrainState:
        """The state before the first step."""
        return jax.jit(self._init)()

    def abstract_state(self) -> TrainState:
        """The shapes and dtypes of a state."""
        return jax.eval_shape(self._init)

    def warm_state(self, params: Any, batch_stats: Any) -> TrainState:
        """The state before the first step from given params and batch statistics."""
        return jax.jit(self._state)(params, batch_stats)

    def batches(self, epoch: int) -> Iterator[Split]:
        """The training batches of an epoch, in an order made from the seed and the epoch only."""
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.data.train))
        for start in range(0, self.images_per_epoch, self.batch):
            yield self.data.train[order[start : start + self.batch]]

    def evaluate(self, params: Any, batch_stats: Any, split: Split) -> float:
        """Accuracy on a split."""
        total = Metrics()
        size = min(500, len(split))
        for start in range(0, len(split), size):
            indices = np.arange(start, start + size)  # past the end: the last image, not counted
            part = split[np.minimum(indices, len(split) - 1)]
            total = total.plus(
                self._sums(params, batch_stats, part.images, part.labels, indices < len(split))
            )
        return total.accuracy

    def batch_statistics(self, params: Any) -> Any:
        """The batch statistics of these params: the mean of those of some training batches.

        Running averages belong to the params of the steps before, not to those that are deployed.
        """
        batches = itertools.islice(self.batches(epoch=0), self.config.statistics_batches)
        collected = [
            self._statistics(params, batch.images, jnp.int32(number))
            for number, batch in enumerate(batches, start=1)
        ]
        return jax.tree.map(lambda *each: sum(each) / len(each), *collected)

    def _init(self) -> TrainState:
        image = jnp.zeros((1, *self.data.train.images.shape[1:]))
        variables = self.model.init(jax.random.key(self.config.seed), image)
        return self._state(variables["params"], variables["batch_stats"])

    def _state(self, params: Any, batch_stats: Any) -> TrainState:
        return TrainState(
            jnp.zeros((), jnp.int32), params, batch_stats, self.optimizer.init(params)
        )

    def _step(self, state: TrainState, images: Array, labels: Array) -> tuple[TrainState, Metrics]:
        if self.config.augment:
            images = augment(
                jax.random.fold_in(jax.random.key(self.config.seed), state.step), images
            )

        def loss(params: Any) -> tuple[Array, tuple[Array, Any]]:
            variables = {"params": params, "batch_stats": state.batch_stats}
            inputs = normalize(images, self.mean, self.std)
            logits, new = self.model.apply(variables, inputs, train=True, mutable=["batch_stats"])
            loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
            return loss, (logits, new["batch_stats"])

        (value, (logits, batch_stats)), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        correct = jnp.sum(jnp.argmax(logits, axis=-1) == labels)
        metrics = Metrics(
            value * len(labels), correct.astype(jnp.float32), jnp.float32(len(labels))
        )
        return TrainState(state.step + 1, params, batch_stats, opt_state), metrics

    def _batch_sums(
        self, params: Any, batch_stats: Any, images: Array, labels: Array, counts: Array
    ) -> Metrics:
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = self.model.apply(
            variables, normalize(images, self.mean, self.std), train=False
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.argmax(logits, axis=-1) == labels
        return Metrics(jnp.sum(losses * counts), jnp.sum(correct * counts), jnp.sum(counts))

    def _batch_statistics(self, params: Any, images: Array, number: Array) -> Any:
        if self.config.augment:  # the running averages are of augmented images, too
            images = augment(jax.random.fold_in(jax.random.key(self.config.seed), -number), images)
        forgetful = self.model.clone(bn_momentum=0.0)
        inputs = normalize(images, self.mean, self.std)
        return forgetful.apply({"params": params}, inputs, train=True, mutable=["batch_stats"])[1][
            "batch_stats"
        ]
