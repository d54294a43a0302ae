"""The networks that are compared, and how each comes about."""

from typing import NamedTuple

import optax

import brelax_jax as brx
from examples.language_model.config import Settings
from examples.runs.sets import parse_set

START = "float"  # the network from which the others start


class Network(NamedTuple):
    """How a network comes about.

    Attributes:
      before: steps that its start has behind it.
      steps: its own.
      optimizer: AdamW, alone or inside a transformation that quantizes.
      word: the set on which its kernels end; None for a float network.
    """

    before: int
    steps: int
    optimizer: optax.GradientTransformation
    word: str | None = None


def rules(word: str) -> brx.Selection:
    """Every kernel but the head's; embeddings are no kernels."""
    return brx.select((r"^head/", None), default=parse_set(word, "channel"))


def networks(settings: Settings) -> dict[str, Network]:
    """All networks by their names. The first one starts from scratch, the others from it."""
    steps, further = settings.steps, settings.further_steps

    def adamw(steps: int, lr: float) -> optax.GradientTransformation:
        schedule = optax.warmup_cosine_decay_schedule(0.0, lr, settings.warmup, steps)
        return optax.adamw(schedule, b2=0.99, weight_decay=settings.weight_decay)

    base = adamw(further, settings.further_lr or settings.lr)
    found = {START: Network(0, steps, adamw(steps, settings.lr))}
    found["float, further"] = Network(steps, further, base)
    plan = brx.continuation(further, settings.shape, settings.hard_share)
    for word in settings.sets:
        connect = brx.binary_connect(base, rules(word))
        relax = brx.binary_relax(base, rules(word), plan)
        found[f"rounded, {word}"] = Network(steps, 0, connect, word)
        found[f"BinaryRelax, {word}"] = Network(steps, further, relax, word)
        found[f"BinaryConnect, {word}"] = Network(steps, further, connect, word)
    return found
