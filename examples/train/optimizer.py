"""From words to brelax_jax: the sets, which layer gets which, and the optimizer."""

import math
from typing import Any

import jax.numpy as jnp
import optax

import brelax_jax as brx
from examples.train.config import Config

GGUF = ("q4_0", "q5_0", "q8_0", "tq1_0", "tq2_0", "q1_0", "q2_0", "mxfp4", "nvfp4")
FORMATS = (*GGUF, "int2", "int4", "int8", "bitnet")
RULES = "best, mean:FACTOR, mean:FACTOR:norefit, max, fixed:SCALE"
SETS = (
    "binary, ternary, ternary-threshold, uniform2..uniform8, power2..power5, levels:-3,-1,1,3, "
    f"{', '.join(FORMATS)}; after an @ the rule for the scale: {RULES}"
)
GRANULARITIES = "tensor, channel, channel:AXIS, block:SIZE, block:SIZE:AXIS"


def parse_granularity(word: str) -> brx.PerTensor | brx.PerChannel | brx.PerBlock:
    """`tensor`, `channel[:AXIS]` or `block:SIZE[:AXIS]`."""
    kind, *numbers = word.split(":")
    try:
        match kind, [int(number) for number in numbers]:
            case "tensor", []:
                return brx.PerTensor()
            case "channel", []:
                return brx.PerChannel()
            case "channel", [axis]:
                return brx.PerChannel(axis)
            case "block", [size, *axis] if len(axis) < 2:
                return brx.PerBlock(size, *axis)
            case _:
                raise ValueError("not of that form")
    except ValueError as error:
        raise ValueError(
            f"Unknown granularity {word!r} ({error}). Known: {GRANULARITIES}."
        ) from None


def parse_rule(word: str, tolerance: float = 0.0) -> brx.ScaleRule:
    """`best`, `mean:FACTOR`, `mean:FACTOR:norefit`, `max` or `fixed:SCALE`."""
    kind, *options = word.split(":")
    try:
        match kind, options:
            case "best", []:
                return brx.LeastSquares(tolerance)
            case "mean", [factor]:
                return brx.MeanMagnitude(float(factor))
            case "mean", [factor, "norefit"]:
                return brx.MeanMagnitude(float(factor), refit=False)
            case "max", []:
                return brx.MaxMagnitude()
            case "fixed", [scale]:
                return brx.Fixed(float(scale))
            case _:
                raise ValueError("not of that form")
    except ValueError as error:
        raise ValueError(f"Unknown rule {word!r} ({error}). Known: {RULES}.") from None


def parse_set(word: str, granularity: str = "tensor", tolerance: float = 0.0) -> brx.QuantizedSet:
    """A set from its word, such as `ternary`, `uniform4`, `power3`, `levels:-3,-1,1,3` or `q4_0`,
    and after an `@` the rule for its scale, as in `ternary@mean:1.4`.
    """
    name, _, rule_word = word.partition("@")
    rule = parse_rule(rule_word or "best", tolerance)
    shared: Any = {"granularity": parse_granularity(granularity)}
    try:
        if name in FORMATS:
            return getattr(brx.formats, name)(rule=rule)
        if name == "ternary-threshold" and not rule_word:
            return brx.TernaryThreshold(**shared)
        shared["rule"] = rule
        plain = {"binary": brx.Binary, "ternary": brx.Ternary}
        if name in plain:
            return plain[name](**shared)
        if name.startswith("levels:"):
            levels = tuple(float(level) for level in name.removeprefix("levels:").split(","))
            return brx.ScaledLevels(levels, **shared)
        for prefix, of_bits in (("uniform", brx.Uniform), ("power", brx.PowerOfTwo)):
            if name.startswith(prefix):
                return of_bits(int(name.removeprefix(prefix)), **shared)
    except ValueError as error:
        raise ValueError(f"Set {word!r}: {error} Known: {SETS}.") from None
    raise ValueError(f"Unknown set {word!r}. Known: {SETS}.")


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
    """The learning rate by step: cosine or drops, and at most `hard_lr` in phase II."""
    if config.lr_schedule == "cosine":
        plain = optax.cosine_decay_schedule(config.lr, config.epochs * steps_per_epoch)
    else:
        drops = {round(epoch * steps_per_epoch): 0.1 for epoch in config.lr_drops}
        plain = optax.piecewise_constant_schedule(config.lr, drops)
    most = math.inf if config.hard_lr is None else config.hard_lr
    hard_step = round(config.hard_epoch * steps_per_epoch)
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
    sgd = optax.chain(
        optax.add_decayed_weights(config.weight_decay),
        optax.sgd(learning_rate(config, steps_per_epoch), momentum=config.momentum),
    )
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
