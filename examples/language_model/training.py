"""The networks of the language model example, and the jitted functions over them."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import brelax_jax as brx
from examples.language_model.text import Codes, Text, batch_at, windows
from examples.language_model.transformer import Transformer
from examples.runs.progress import Progress
from examples.train.config import setting

SETS = {"ternary-threshold": brx.TernaryThreshold, "ternary": brx.Ternary}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a run computes."""

    width: int = setting(128, "model", "numbers that stand for a character")
    layers: int = setting(4, "model", "blocks of attention and two dense layers")
    heads: int = setting(4, "model", "heads of each attention")
    context: int = setting(64, "model", "characters that a prediction may look at")
    batch: int = setting(16, "training", "pieces of text in a step")
    steps: int = setting(1000, "training", "steps of the float network")
    further_steps: int = setting(1000, "training", "steps of each network that starts from it")
    warmup: int = setting(100, "training", "steps over which a learning rate grows")
    lr: float = setting(4e-3, "training", "highest learning rate")
    weight_decay: float = setting(0.01, "training", "AdamW's, on the float weights")
    set: str = setting(
        "ternary-threshold", "quantization", "by threshold, or the nearest ternary", tuple(SETS)
    )
    shape: str = setting(
        "geometric", "quantization", "growth of λ", ("geometric", "linear", "cosine", "sigmoid")
    )
    hard_share: float = setting(
        0.25, "quantization", "share of the steps that is phase II, exactly quantized"
    )

    def check(self) -> None:
        """Raises a ValueError, naming the option, if a number is out of its range."""
        ones = dict.fromkeys(("width", "layers", "heads", "batch", "steps", "further_steps"), 1)
        for name, least in {**ones, "context": 2, "warmup": 0, "weight_decay": 0}.items():
            if not least <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{flag(name)} must be at least {least}, got {getattr(self, name)}."
                )
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr must be positive, got {self.lr}.")
        if self.width % self.heads:
            raise ValueError(f"--heads {self.heads} must divide --width {self.width}.")
        if not 0 <= self.hard_share <= 1:
            raise ValueError(f"--hard-share must be from 0 to 1, got {self.hard_share}.")
        if self.warmup >= min(self.steps, self.further_steps):
            raise ValueError(
                f"--warmup must be less than the steps of each network, got {self.warmup}."
            )


def flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")


class Network(NamedTuple):
    """How a network comes about.

    Attributes:
      before: steps that its start has behind it.
      steps: its own.
      optimizer: AdamW, alone or inside a transformation that quantizes.
      ternary: whether its kernels end up ternary.
    """

    before: int
    steps: int
    optimizer: optax.GradientTransformation
    ternary: bool


START = "float"


def ternary(settings: Settings) -> brx.Selection:
    """Every kernel but the head's, one scale for each output channel; embeddings are no kernels."""
    qset = SETS[settings.set](granularity=brx.PerChannel())
    return brx.select((r"^head/", None), default=qset)


def networks(settings: Settings) -> dict[str, Network]:
    """All networks by their names. The first one starts from scratch, the others from it."""
    steps, further = settings.steps, settings.further_steps

    def adamw(steps: int) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, settings.warmup, steps)
        return optax.adamw(schedule, b2=0.99, weight_decay=settings.weight_decay)

    base, rules = adamw(further), ternary(settings)
    connect = brx.binary_connect(base, rules)
    plan = brx.continuation(further, settings.shape, settings.hard_share)
    relax = brx.binary_relax(base, rules, *plan)
    return {
        START: Network(0, steps, adamw(steps), False),
        "abrupt ternary": Network(steps, 0, connect, True),
        "float, further": Network(steps, further, base, False),
        "BinaryRelax": Network(steps, further, relax, True),
        "BinaryConnect": Network(steps, further, connect, True),
    }


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
        self.model = Transformer(
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
