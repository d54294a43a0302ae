"""From words to sets."""

from typing import Any

import brelax_jax as brx

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
