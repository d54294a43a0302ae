"""Checks of the arguments of the transformations, where their values are known."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from brelax_jax._proximal import ProximalMap
from brelax_jax._schedules import Continuation


def check_arguments(
    base: Any, lam: Any, hard_from: Any, float_dtype: Any, proximal_map: Any
) -> None:
    """Raises a ValueError that names the argument which is not of its kind."""
    if not (hasattr(base, "init") and hasattr(base, "update")):
        raise ValueError(
            f"base must be an optax.GradientTransformation, such as optax.sgd(0.1), got {base!r}."
        )
    if not isinstance(proximal_map, ProximalMap):
        raise ValueError(
            "proximal_map must be Relaxation(), PiecewiseAffine() or SoftThreshold(…), "
            f"got {proximal_map!r}."
        )
    _check_lam(lam)
    _check_hard_from(hard_from)
    _check_float_dtype(float_dtype)


def check_given_once(plan: Continuation, hard_from: Any) -> None:
    """Raises a ValueError if `hard_from` is given beside a `Continuation`."""
    if hard_from is not None:
        raise ValueError(
            f"hard_from={hard_from!r} is given twice: the Continuation given as lam has "
            f"{plan.hard_from}. Leave hard_from out, or pass the Continuation's lam alone."
        )


def _check_lam(lam: Any) -> None:
    if lam is None or isinstance(lam, str):
        raise ValueError(f"lam must be a number or a schedule of the step count, got {lam!r}.")
    if callable(lam) or isinstance(lam, jax.core.Tracer):
        return
    if np.ndim(lam) != 0:
        raise ValueError(f"lam must be one number or a schedule of the step count, got {lam!r}.")
    if not np.asarray(lam) >= 0:
        raise ValueError(
            f"lam must be nonnegative (0 is float training, inf the exact projection), got {lam!r}."
        )


def _check_hard_from(hard_from: Any) -> None:
    if hard_from is None or isinstance(hard_from, jax.core.Tracer):
        return
    step = np.asarray(hard_from)
    number = np.issubdtype(step.dtype, np.number)
    if step.ndim != 0 or not number or not (step >= 0 and step == np.floor(step)):
        raise ValueError(
            f"hard_from must be a step count from 0 on, or None for never, got {hard_from!r}."
        )


def _check_float_dtype(float_dtype: Any) -> None:
    try:
        known = None if float_dtype is None else jnp.dtype(float_dtype)
    except TypeError:
        known = None
    real = known is not None and jnp.issubdtype(known, jnp.floating)
    if not real or jnp.finfo(known).bits < 16:
        raise ValueError(
            "float_dtype must be a real floating dtype of at least 16 bits, such as 'float32', "
            f"got {float_dtype!r}."
        )
