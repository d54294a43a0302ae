"""Training, evaluation and samples: the jitted functions over the networks and the text."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import brelax_jax as brx
from examples.language_model.config import Settings
from examples.language_model.llama import Llama
from examples.language_model.networks import networks, ternary
from examples.language_model.text import Codes, Text, batch_at, windows
from examples.language_model.transformer import Transformer
from examples.runs.progress import Progress

ARCHITECTURES = {"llama": Llama, "alibi": Transformer}


class Trainer:
    """The networks and the text, with the jitted functions over them.

    Raises:
      ValueError: if a split is not longer than the context.
    """

    def __init__(self, settings: Settings, text: Text) -> None:
        self.settings, self.text, self.networks = settings, text, networks(settings)
        self.rules = ternary(settings)
        for split in ("train", "held_out", "validation", "test"):
            if (length := len(getattr(text, split))) <= settings.context:
                raise ValueError(
                    f"The {split} split has {length} characters: give a --context below that."
                )
        self.model = ARCHITECTURES[settings.architecture](
            len(text.characters), settings.width, settings.layers, settings.heads
        )
        self.init = jax.jit(self._init)
        self.logits = jax.jit(self._logits)
        self.quantized = jax.jit(brx.quantized_params)
        self._step = {
            name: jax.jit(functools.partial(self._update, n.optimizer), donate_argnums=(0, 1))
            for name, n in self.networks.items()
        }
        self._sum = jax.jit(lambda *batch: jnp.sum(self._nats(*batch[:2]) * batch[2]))
        self._next = jax.jit(self._draw)

    def train(self, name: str, params: Any, seed: int, progress: Progress) -> tuple[Any, Any]:
        """The params and the optimizer's state of a network, trained from given params.

        All networks that start from another see the same batches.
        """
        network, settings = self.networks[name], self.settings
        params = jax.tree.map(jnp.copy, params)  # a step reuses the memory of what it gets
        state = jax.jit(network.optimizer.init)(params)
        for count in range(network.before, network.before + network.steps):
            batch = batch_at(self.text.train, settings.context, settings.batch, seed, count)
            params, state, bits = self._step[name](params, state, batch)
            progress.advance(1)
            if progress.due():
                progress.figures(f"seed {seed} {name}", bits=float(bits))
        return params, state

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
