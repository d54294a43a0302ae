"""Checks of the arguments of the transformations, where their values are known."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from brelax_jax._arguments import is_function
from brelax_jax._proximal import ProximalMap
from brelax_jax._schedules import Continuation
from brelax_jax.sets import FLOATS


def check_base(base: Any) -> None:
    """Raises a ValueError if it is no optimizer."""
    if not (hasattr(base, "init") and hasattr(base, "update")):
        raise ValueError(
            f"base must be an optax.GradientTransformation, such as optax.sgd(0.1), got {base!r}."
        )


def check_options(lam: Any, hard_from: Any, float_dtype: Any, proximal_map: Any) -> None:
    """Raises a ValueError that names the argument which is not of its kind."""
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
    if isinstance(lam, jax.core.Tracer) or is_function(lam):
        return
    try:
        is_one = not isinstance(lam, str | bool | np.bool_) and not np.ndim(lam)
        number = float(lam) if is_one else None
    except (TypeError, ValueError):
        number = None
    if number is None:
        raise ValueError(
            f"lam must be one number, a schedule of the step count, or a Continuation, got {lam!r}."
        )
    if not number >= 0:
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
        name = None if float_dtype is None else jnp.dtype(float_dtype).name
    except TypeError:
        name = None
    if name not in FLOATS:
        raise ValueError(
            f"float_dtype must be a real floating dtype, one of {', '.join(FLOATS)}, "
            f"got {float_dtype!r}."
        )
