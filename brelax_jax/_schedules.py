"""Continuation schedules: λ by step count, and plans of a whole run by its number of steps."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from brelax_jax._arguments import is_number

Schedule = Callable[[ArrayLike], ArrayLike]


def geometric_continuation(
    init_value: float = 1.0, growth: float = 1.04, every: int = 1
) -> Callable[[ArrayLike], Array]:
    """λ(count) = init_value · growth^⌊count/every⌋.

    The paper's continuation multiplies λ once an epoch: set `every` to the steps of an epoch.

    Args:
      init_value: λ at count 0, positive.
      growth: the factor, at least 1.
      every: steps from one multiplication to the next, at least 1.

    Returns:
      A function of the step count; it grows to ∞, which is the exact projection.

    Raises:
      ValueError: if an argument is out of its range.

    >>> import brelax_jax as brx
    >>> lam = brx.geometric_continuation(init_value=1.0, growth=2.0, every=100)
    >>> float(lam(99)), float(lam(300))
    (1.0, 8.0)

    References:
      Yin et al., BinaryRelax, 2018 (arXiv 1801.06313), algorithm 1.
    """
    if not (is_number(init_value) and init_value > 0):
        raise ValueError(
            f"init_value must be positive, because growth cannot leave 0, got {init_value!r}."
        )
    if not (is_number(growth) and growth >= 1):
        raise ValueError(f"growth must be at least 1, so that λ does not fall, got {growth!r}.")
    if not (is_number(every) and every >= 1):
        raise ValueError(f"every must be at least 1 step, got {every!r}.")
    period = every if every <= np.iinfo(np.int32).max else np.inf  # the count's dtype holds no more

    def schedule(count: ArrayLike) -> Array:
        times = jnp.asarray(jnp.asarray(count) // period, jnp.int32)
        chosen = (times[..., None] >> np.arange(31)) & 1
        # growth^(2^k) for each bit k of a count: a float32 power is off by 1e-3 after 50,000 steps.
        with np.errstate(over="ignore"):
            factors = _floats(np.power(np.float64(growth), 2.0 ** np.arange(31)))
        return jnp.prod(jnp.where(chosen, factors, 1), axis=-1, initial=init_value)

    return schedule


def linear_continuation(steps: int) -> Callable[[ArrayLike], Array]:
    """λ(count) such that the strength α = λ/(λ + 1) rises linearly from 0 to 1 in `steps` steps,
    and stays at 1.

    Args:
      steps: at least 1.

    Returns:
      A function of the step count; from `steps` on it is ∞.

    Raises:
      ValueError: if `steps` is below 1.

    >>> import brelax_jax as brx
    >>> lam = brx.linear_continuation(steps=100)
    >>> float(lam(0)), float(lam(50)), float(lam(100))
    (0.0, 1.0, inf)
    """
    _check_steps(steps)

    def schedule(count: ArrayLike) -> Array:
        last = _floats(steps)
        done = jnp.clip(_floats(count), 0, last)
        return done / (last - done)

    return schedule


def cosine_continuation(steps: int) -> Callable[[ArrayLike], Array]:
    """λ(count) such that the strength α = λ/(λ + 1) is (1 − cos(π·count/steps))/2: slow at both
    ends, from 0 to 1 in `steps` steps.

    Args:
      steps: until the strength is 1; at least 1.

    Returns:
      A function of the step count, ∞ from `steps` on.

    Raises:
      ValueError: if `steps` is below 1.

    >>> import brelax_jax as brx
    >>> lam = brx.cosine_continuation(steps=100)
    >>> float(lam(0)), round(float(lam(50)), 4), float(lam(100))
    (0.0, 1.0, inf)
    """
    _check_steps(steps)

    def schedule(count: ArrayLike) -> Array:
        share = _share(count, steps)
        return jnp.where(share < 1, jnp.square(jnp.tan(share * (np.pi / 2))), jnp.inf)

    return schedule


def sigmoid_continuation(steps: int, steepness: float = 10.0) -> Callable[[ArrayLike], Array]:
    """PARQ's: the inverse slope 1/(λ + 1) = 1 − α falls from 1 to 0 in `steps` steps along a
    sigmoid σ,

        1 − α = (σ(k·(½ − t)) − σ(−k/2)) / (σ(k/2) − σ(−k/2)),  t = count/steps, k the steepness.

    Args:
      steps: at least 1.
      steepness: k, positive; below 1 it is almost a line.

    Returns:
      A function of the step count; from `steps` on it is ∞.

    Raises:
      ValueError: if `steps` is below 1, or `steepness` not positive and finite.

    >>> import brelax_jax as brx
    >>> lam = brx.sigmoid_continuation(steps=100)
    >>> float(lam(0)), float(lam(50)), float(lam(100))
    (0.0, 1.0, inf)

    References:
      Jin et al., PARQ, 2025 (arXiv 2503.15748), its schedule of the slope.
    """
    _check_steps(steps)
    if not (is_number(steepness) and 0 < steepness < np.inf):
        raise ValueError(
            f"steepness must be positive and finite (10 is PARQ's), got {steepness!r}."
        )
    end = np.tanh(steepness / 4)

    def schedule(count: ArrayLike) -> Array:
        share = _share(count, steps)
        now = jnp.tanh((steepness / 2) * (share - 0.5))  # from −end to end
        return jnp.where(share < 1, jnp.maximum(end + now, 0) / (end - now), jnp.inf)

    return schedule


class Continuation(NamedTuple):
    """What `continuation` gives: the arguments of a transformation that depend on a run's length.

    Attributes:
      lam: the schedule of λ.
      hard_from: the step count at which phase II begins.
    """

    lam: Callable[[ArrayLike], Array]
    hard_from: int


def _geometric(steps: int) -> Callable[[ArrayLike], Array]:
    """The authors' growth, 1.04 to 1.04^150, in so many steps."""
    return geometric_continuation(1.04, 1.04 ** (149 / steps))


SHAPES = {
    "geometric": _geometric,
    "linear": linear_continuation,
    "cosine": cosine_continuation,
    "sigmoid": sigmoid_continuation,
}


def continuation(steps: int, shape: str = "linear", hard_share: float = 0.25) -> Continuation:
    """λ and the beginning of phase II for a run of so many steps.

    Args:
      steps: updates in the whole run, at least 1.
      shape: how λ grows. "linear", "cosine" and "sigmoid" take the strength from 0 to 1.
        "geometric" is the authors' growth from 1.04 to 1.04^150, fitted to phase I. Linear is
        better from scratch, geometric from trained float weights (docs/accuracy_tables.md).
      hard_share: the share of the run that is phase II, from 0 to 1. The authors used 0.25.

    Returns:
      `lam` and `hard_from`. Pass the whole result to a transformation in place of `lam`.

    Raises:
      ValueError: if an argument is out of its range.

    >>> import brelax_jax as brx, optax
    >>> plan = brx.continuation(steps=2_000)
    >>> float(plan.lam(0)), float(plan.lam(750)), plan.hard_from
    (0.0, 1.0, 1500)
    >>> optimizer = brx.binary_relax(optax.sgd(0.1), brx.Binary(), plan)

    References:
      "geometric" and `hard_share` are the authors': VGG-11 on CIFAR-10, 200 epochs, phase II from
      epoch 150 (Yin et al., 2018, arXiv 1801.06313).
    """
    _check_steps(steps)
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {shape!r}.")
    if not (is_number(hard_share) and 0 <= hard_share <= 1):
        raise ValueError(f"hard_share must be a share from 0 to 1, got {hard_share!r}.")
    hard_from = round((1 - hard_share) * steps)
    return Continuation(SHAPES[shape](max(hard_from, 1)), hard_from)


def _check_steps(steps: int) -> None:
    if not (is_number(steps) and steps >= 1):
        raise ValueError(f"steps must be at least 1, got {steps!r}.")


def _share(count: ArrayLike, steps: int) -> Array:
    """count/steps, from 0 to 1."""
    return jnp.clip(_floats(count) / _floats(steps), 0, 1)


def _floats(x: ArrayLike) -> Array:
    """In JAX's default floating dtype: λ is as precise as the weights can be."""
    return jnp.asarray(x, float)
