"""The jitted functions of training and evaluation, each called from Python.

A compiled loop around convolutions would run several times slower on CPU than a step called from
Python.
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import brelax_jax as brx
from examples.train.config import Config
from examples.train.data.augment import augment, normalize
from examples.train.data.load import Data
from examples.train.data.splits import AnySplit, Indices, Split, Stream
from examples.train.float_weights import average_of
from examples.train.mesh import everywhere, laid_out, make_mesh, over_data, over_model
from examples.train.models import make_model
from examples.train.optimizer import learning_rate, make_optimizer


class TrainState(NamedTuple):
    """What a checkpoint keeps: all that the next step depends on, besides the data."""

    step: Array
    params: Any
    batch_stats: Any
    opt_state: Any


class Sums(NamedTuple):
    """Sums over images."""

    loss: Array | float = 0.0
    correct: Array | float = 0.0
    images: Array | float = 0.0

    def plus(self, other: "Sums") -> "Sums":
        """The sums over both."""
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def mean_loss(self) -> float:
        """Mean cross entropy; waits for the device."""
        return float(self.loss) / float(self.images)

    @property
    def accuracy(self) -> float:
        """Share of correct answers; waits for the device."""
        return float(self.correct) / float(self.images)


class Trainer:
    """A network, its optimizer and its data, with the jitted functions over them.

    Raises:
      ValueError: if the devices do not suffice for the mesh, or the batches do not divide over it.
    """

    def __init__(self, config: Config, data: Data) -> None:
        self.config, self.data = config, data
        self.model = make_model(config.model, data.classes, config.dtype)
        self.batch = min(config.batch, len(data.train))
        self.steps_per_epoch = config.steps_per_epoch(len(data.train))
        self.images_per_epoch = config.images_per_epoch(len(data.train))
        self.learning_rate = learning_rate(config, self.steps_per_epoch)
        self.optimizer = make_optimizer(config, self.steps_per_epoch)
        self.mean, self.std = jax.device_put(data.channel_moments)
        mesh = make_mesh(config.mesh)
        self._rows = mesh.shape["data"]
        if self.batch % self._rows:
            raise ValueError(
                f"A batch of {self.batch} does not divide over the {self._rows} rows of --mesh "
                f"{config.mesh}: give another --batch or --mesh."
            )
        shapes = jax.eval_shape(self.initial_state)
        self._abstract = laid_out(shapes, over_model(mesh, shapes))
        self._jit(over_model(mesh, shapes), over_data(mesh), everywhere(mesh))

    def with_numbers(self, **numbers: Any) -> "Trainer":
        """The same with other numbers in its settings: its seed or its learning rate.

        In a function that is transformed by `jax.vmap` they may be traced. The jitted functions
        keep the numbers of before.
        """
        other = copy.copy(self)
        other.config = dataclasses.replace(self.config, **numbers)
        other.learning_rate = learning_rate(other.config, self.steps_per_epoch)
        other.optimizer = make_optimizer(other.config, self.steps_per_epoch)
        return other

    def abstract_state(self) -> TrainState:
        """The shapes, dtypes and shardings of a state."""
        return self._abstract

    def batches(self, epoch: int) -> Iterator[Split]:
        """The training batches of an epoch, in an order made from the seed and the epoch only."""
        key = (self.config.seed, epoch) if self.config.augment else None
        return self.data.train.batches(self.order(epoch), key)

    def order(self, epoch: int) -> Iterator[Indices]:
        """The indices of each of these batches."""
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.data.train))
        starts = range(0, self.images_per_epoch, self.batch)
        return (order[start : start + self.batch] for start in starts)

    def evaluate(self, params: Any, batch_stats: Any, split: AnySplit) -> float:
        """Accuracy on a split."""
        total = Sums()
        size = -(-min(500, len(split)) // self._rows) * self._rows
        places = [np.arange(start, start + size) for start in range(0, len(split), size)]
        last = len(split) - 1  # in place of what is past the end, not counted
        parts = split.batches(np.minimum(indices, last) for indices in places)
        for indices, part in zip(places, parts, strict=True):
            total = total.plus(
                self._sums(params, batch_stats, part.images, part.labels, indices <= last)
            )
        return total.accuracy

    def batch_statistics(self, params: Any) -> Any:
        """The batch statistics of these params: the mean of those of some training batches.

        Running averages belong to the params of the steps before, not to those that are deployed.
        """
        batches = itertools.islice(self.batches(epoch=0), self.config.statistics_batches)
        collected = [
            self._statistics(params, batch.images, np.int32(number))
            for number, batch in enumerate(batches, start=1)
        ]
        return self._mean(*collected)

    def _jit(self, states: Any, batches: Any, whole: Any) -> None:
        """Makes the jitted functions, with the shardings of what they take and give."""
        model = (states.params, states.batch_stats)
        self.init = jax.jit(self.initial_state, out_shardings=states)
        self.warm_state = jax.jit(self.state_of, in_shardings=model, out_shardings=states)
        self.step = jax.jit(
            self.next_state,
            in_shardings=(states, batches, batches),
            out_shardings=(states, whole),
            donate_argnums=0,
        )
        self.deployed = jax.jit(
            self.params_to_deploy, in_shardings=(states,), out_shardings=states.params
        )
        self.metrics = jax.jit(brx.metrics, out_shardings=whole)
        self._sums = jax.jit(
            self.sums_of, in_shardings=(*model, *(batches,) * 3), out_shardings=whole
        )
        self._statistics = jax.jit(
            self.statistics_of,
            in_shardings=(states.params, batches, whole),
            out_shardings=states.batch_stats,
        )
        self._mean = jax.jit(mean_of_trees, out_shardings=states.batch_stats)

    def initial_state(self) -> TrainState:
        """The state before the first step."""
        image = jnp.zeros((1, *self.data.train.shape))
        variables = self.model.init(jax.random.key(self.config.seed), image)
        return self.state_of(variables["params"], variables["batch_stats"])

    def state_of(self, params: Any, batch_stats: Any) -> TrainState:
        """The state before the first step from given params and batch statistics."""
        return TrainState(
            jnp.zeros((), jnp.int32), params, batch_stats, self.optimizer.init(params)
        )

    def next_state(
        self, state: TrainState, images: Array, labels: Array
    ) -> tuple[TrainState, Sums]:
        images = self._augmented(images, state.step)

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
        sums = Sums(value * len(labels), correct.astype(jnp.float32), jnp.float32(len(labels)))
        return TrainState(state.step + 1, params, batch_stats, opt_state), sums

    def params_to_deploy(self, state: TrainState) -> Any:
        """The float weights, or their average, on their sets."""
        opt_state, params = state.opt_state, state.params
        quantized = self.config.method != "float"
        if self.config.average:
            params = average_of(opt_state)
            opt_state = brx.with_float_params(opt_state, params) if quantized else opt_state
        return brx.quantized_params(opt_state, params) if quantized else params

    def _augmented(self, images: Array, number: Array) -> Array:
        """Training images, changed at random by the seed and this number."""
        if not self.config.augment:
            return images
        key = jax.random.fold_in(jax.random.key(self.config.seed), number)
        return augment(key, images, shifts=not isinstance(self.data.train, Stream))

    def sums_of(
        self, params: Any, batch_stats: Any, images: Array, labels: Array, counts: Array
    ) -> Sums:
        variables = {"params": params, "batch_stats": batch_stats}
        logits: Any = self.model.apply(
            variables, normalize(images, self.mean, self.std), train=False
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        correct = jnp.argmax(logits, axis=-1) == labels
        return Sums(jnp.sum(losses * counts), jnp.sum(correct * counts), jnp.sum(counts))

    def statistics_of(self, params: Any, images: Array, number: Array) -> Any:
        images = self._augmented(images, -number)  # as those of the running averages are
        forgetful = self.model.clone(bn_momentum=0.0)
        inputs = normalize(images, self.mean, self.std)
        return forgetful.apply({"params": params}, inputs, train=True, mutable=["batch_stats"])[1][
            "batch_stats"
        ]


def mean_of_trees(*trees: Any) -> Any:
    """The mean of each array over trees."""
    return jax.tree.map(lambda *each: sum(each) / len(each), *trees)
