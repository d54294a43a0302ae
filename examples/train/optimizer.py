"""From settings to brelax_jax: which layer gets which set, and the optimizer."""

import math

import jax.numpy as jnp
import optax

import brelax_jax as brx
from examples.runs.sets import parse_set
from examples.train.config import Config
from examples.train.float_weights import average_from, hold_oscillating


def layer_sets(config: Config) -> brx.Selection:
    """Which layer lands on which set: every model here names its first layer `stem` and its last
    `head`.
    """
    middle = parse_set(config.set, config.granularity, config.tolerance)

    def of(word: str) -> brx.QuantizedSet | None:
        if word in ("same", "float"):
            return middle if word == "same" else None
        return parse_set(word, config.granularity, config.tolerance)

    return brx.select(
        (r"^stem/kernel$", of(config.first)), (r"^head/kernel$", of(config.last)), default=middle
    )


def learning_rate(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The learning rate by step, at most `hard_lr` in phase II."""
    steps = config.epochs * steps_per_epoch
    hard_step = round(config.hard_epoch * steps_per_epoch)
    if config.lr_schedule == "cosine":
        plain = optax.cosine_decay_schedule(config.lr, steps)
    elif config.lr_schedule == "restart":
        phases = [steps_in for steps_in in (hard_step, steps - hard_step) if steps_in]
        cosines = [optax.cosine_decay_schedule(config.lr, steps_in) for steps_in in phases]
        plain = optax.join_schedules(cosines, [hard_step][: len(cosines) - 1])
    else:
        drops = {round(epoch * steps_per_epoch): 0.1 for epoch in config.lr_drops}
        plain = optax.piecewise_constant_schedule(config.lr, drops)
    most = math.inf if config.hard_lr is None else config.hard_lr
    cap = optax.join_schedules([lambda count: math.inf, lambda count: most], [hard_step])
    return lambda count: jnp.minimum(plain(count), cap(count))


def continuation(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """λ by step, in phase I."""
    hard_step = max(1, round(config.hard_epoch * steps_per_epoch))
    strengths = {"linear": brx.linear_continuation, "cosine": brx.cosine_continuation}
    if config.lam_shape in strengths:
        return strengths[config.lam_shape](hard_step)
    if config.lam_shape == "sigmoid":
        return brx.sigmoid_continuation(hard_step, config.lam_steepness)
    if config.lam_growth is not None:
        return brx.geometric_continuation(
            config.lam_start, config.lam_growth, every=steps_per_epoch
        )
    return brx.geometric_continuation(
        config.lam_start, (config.lam_end / config.lam_start) ** (1 / hard_step)
    )


MAPS = {
    "binary_relax": brx.Relaxation(),
    "parq": brx.PiecewiseAffine(),
    "proxquant": brx.SoftThreshold(updates_float_params=True),
}


def make_optimizer(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
    """SGD as the authors use it, alone or inside a transformation that quantizes: the one line that
    differs.
    """
    steps = config.epochs * steps_per_epoch
    parts = [
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate(config, steps_per_epoch), momentum=config.momentum),
    ]
    if config.hold and config.method != "float":
        parts.append(hold_oscillating(layer_sets(config), config.hold, steps))
    if config.average:
        parts.append(average_from(steps - round(config.average * steps_per_epoch)))
    sgd = optax.chain(*parts)
    if config.method == "float":
        return sgd
    tracked = config.metrics_every != 0
    if config.method == "binary_connect":
        return brx.binary_connect(sgd, layer_sets(config), track_flips=tracked)
    return brx.binary_relax(
        sgd,
        layer_sets(config),
        continuation(config, steps_per_epoch),
        hard_from=round(config.hard_epoch * steps_per_epoch),
        track_flips=tracked,
        proximal_map=MAPS[config.method],
    )
