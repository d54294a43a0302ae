"""Training, evaluation and samples: the jitted functions over the networks and the text."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import brelax_jax as brx
from examples.language_model.config import Settings
from examples.language_model.llama import Llama
from examples.language_model.networks import Network, networks
from examples.language_model.text import Codes, Text, batch_at, windows
from examples.runs.progress import Progress

CURVE = 20  # points of the curve of a training


class Trained(NamedTuple):
    """A network that is trained.

    Attributes:
      params: as deployed.
      state: the optimizer's.
      curve: by steps, the bits per character of the held out text, as deployed.
    """

    params: Any
    state: Any
    curve: dict[int, float]


def one_of(stacked: Any, i: int) -> Any:
    """One seed's part of the arrays of all, cut out by NumPy: that compiles nothing."""
    return jax.device_put(jax.tree.map(lambda x: np.asarray(x)[i], stacked))


class Trainer:
    """The networks and the text, with the jitted functions over them.

    Raises:
      ValueError: if a split is not longer than the context.
    """

    def __init__(self, settings: Settings, text: Text) -> None:
        self.settings, self.text, self.networks = settings, text, networks(settings)
        for split in ("train", "held_out", "validation", "test"):
            if (length := len(getattr(text, split))) <= settings.context:
                raise ValueError(
                    f"The {split} split has {length} characters: give a --context below that."
                )
        self.model = Llama(len(text.characters), settings.width, settings.layers, settings.heads)
        self.init = jax.jit(self._init)
        self.logits = jax.jit(self._logits)
        self.quantized = jax.jit(jax.vmap(brx.quantized_params))
        self._step = {
            name: jax.jit(
                jax.vmap(functools.partial(self._update, n.optimizer)), donate_argnums=(0, 1)
            )
            for name, n in self.networks.items()
        }
        self._sum = jax.jit(lambda *batch: jnp.sum(self._nats(*batch[:2]) * batch[2]))
        self._next = jax.jit(self._draw)

    def train(
        self, name: str, params: Sequence[Any], seeds: Sequence[int], progress: Progress
    ) -> list[Trained]:
        """A network for each seed, trained from given params, all in one program.

        All networks that start from another see the same batches of a seed.
        """
        network, settings = self.networks[name], self.settings
        stacked = jax.tree.map(lambda *each: np.stack(each), *params)
        state = jax.jit(jax.vmap(network.optimizer.init))(stacked)
        curves: list[dict[int, float]] = [{} for _ in seeds]
        for count in range(network.before, last := network.before + network.steps):
            batch = np.stack(
                [
                    batch_at(self.text.train, settings.context, settings.batch, seed, count)
                    for seed in seeds
                ]
            )
            stacked, state, bits = self._step[name](stacked, state, batch)
            progress.advance(len(seeds))
            if progress.due():
                progress.figures(name, bits=float(np.mean(bits)))
            if (last - count - 1) % max(network.steps // CURVE, 1) == 0:
                for i, curve in enumerate(curves):
                    now = self._deployed(network, stacked, state, i)
                    curve[count + 1] = self.bits_per_character(now, self.text.held_out)
        return [
            Trained(
                self._deployed(network, stacked, state, i),
                one_of(state, i),
                curve,
            )
            for i, curve in enumerate(curves)
        ]

    def _deployed(self, network: Network, stacked: Any, state: Any, i: int) -> Any:
        """The params of one seed, on their sets if they have any."""
        if network.word is not None:
            stacked = self.quantized(state, stacked)
        return one_of(stacked, i)

    def bits_per_character(self, params: Any, codes: Codes) -> float:
        """Mean of −log₂ p of each character but the first."""
        total = 0.0
        for pieces, counts in windows(codes, self.settings.context, batch=64):
            total += float(self._sum(params, pieces, counts))
        return total / (len(codes) - 1) / math.log(2)

    def sample(self, params: Any, seed: int, length: int = 300) -> str:
        """How a network goes on after the beginning of the validation split."""
        context = self.settings.context
        codes = [*self.text.validation[:context]]
        for place in range(length):
            recent = np.array(codes[-context:], np.int32)
            codes.append(int(self._next(params, recent, seed, place)))
        return self.text.decode(np.array(codes[context:], np.int32))

    def _init(self, seed: Array) -> Any:
        codes = jnp.zeros((1, self.settings.context), jnp.int32)
        return self.model.init(jax.random.key(seed), codes)["params"]

    def _logits(self, params: Any, codes: Array) -> Any:
        """Those of the next character, at each place of each text."""
        return self.model.apply({"params": params}, codes)

    def _nats(self, params: Any, pieces: Array) -> Array:
        """−log p of each character but the first of each piece."""
        logits = self._logits(params, pieces[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, 1:])

    def _update(
        self, optimizer: optax.GradientTransformation, params: Any, state: Any, pieces: Array
    ) -> tuple[Any, Any, Array]:
        """A step: the new params and state, and bits per character before it."""

        def loss(params: Any) -> Array:
            return jnp.mean(self._nats(params, pieces))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value / math.log(2)

    def _draw(self, params: Any, codes: Array, seed: Array, place: Array) -> Array:
        """The character after these, drawn from the network's probabilities."""
        key = jax.random.fold_in(jax.random.key(seed), place)
        return jax.random.categorical(key, self._logits(params, codes[None])[0, -1])
