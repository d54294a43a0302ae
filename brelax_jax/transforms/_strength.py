"""How hard one update pulls: λ by its schedule, and what follows from it for all leaves."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from brelax_jax._envelope import strength_of
from brelax_jax.transforms._grid import LANDING, LEAD
from brelax_jax.transforms._leaf import Step
from brelax_jax.transforms._state import BinaryRelaxState


def next_step(
    lam: ArrayLike | Callable[[ArrayLike], ArrayLike],
    hard_from: ArrayLike | None,
    state: BinaryRelaxState,
) -> tuple[Array, Step]:
    """λ of the next update, finite, and what all leaves have in common in it.

    Where a schedule gives NaN, λ stays what it was.

    Raises:
      ValueError: if a schedule gives something else than one real number.
    """
    most = float(jnp.finfo(state.lam.dtype).max)  # its strength is 1; the state holds no infinity
    with jax.debug_infs(False):  # λ = ∞ is no fault
        now = jnp.asarray(_checked(lam(state.count)) if callable(lam) else lam, state.lam.dtype)
        now = jnp.clip(jnp.where(jnp.isnan(now), state.lam, now), 0, most)
        exact = jnp.array(False)
        if hard_from is not None:
            now = jnp.where(state.count >= hard_from, most, now)
            exact = state.count >= jnp.asarray(hard_from) - LEAD
        alpha = strength_of(now)
    exact |= alpha == 1
    return now, Step(alpha, exact, state.updates_on_grid >= LANDING)


def _checked(lam: Any) -> Any:
    """What a schedule gave."""
    if lam is None or np.ndim(lam) or not _is_real(jnp.result_type(lam)):
        raise ValueError(
            "lam, a schedule, must give one real number for each step count, got "
            f"{lam!r}; for an array of one entry index it."
        )
    return lam


def _is_real(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
