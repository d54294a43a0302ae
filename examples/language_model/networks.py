"""The networks that are compared, and how each comes about."""

from typing import NamedTuple

import optax

import brelax_jax as brx
from examples.language_model.config import SETS, Settings

START = "float"  # the network from which the others start


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
    relax = brx.binary_relax(base, rules, plan)
    return {
        START: Network(0, steps, adamw(steps), False),
        "abrupt ternary": Network(steps, 0, connect, True),
        "float, further": Network(steps, further, base, False),
        "BinaryRelax": Network(steps, further, relax, True),
        "BinaryConnect": Network(steps, further, connect, True),
    }
