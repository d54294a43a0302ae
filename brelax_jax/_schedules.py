"""When: continuation schedules, from a step count to λ."""

from collections.abc import Callable

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
    # growth^(2^k) for each bit k of a count: a float32 power is off by 1e-3 after 50,000 steps.
    with np.errstate(over="ignore"):
        factors = np.power(np.float64(growth), 2.0 ** np.arange(31)).astype(np.float32)

    def schedule(count: ArrayLike) -> Array:
        times = jnp.asarray(jnp.asarray(count) // period, jnp.int32)
        chosen = (times[..., None] >> np.arange(31)) & 1
        return jnp.prod(jnp.where(chosen, factors, 1), axis=-1, initial=np.float32(init_value))

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
    if not (is_number(steps) and steps >= 1):
        raise ValueError(f"steps must be at least 1, got {steps!r}.")

    last = np.float32(steps)

    def schedule(count: ArrayLike) -> Array:
        done = jnp.clip(jnp.asarray(count, jnp.float32), 0, last)
        return done / (last - done)

    return schedule
