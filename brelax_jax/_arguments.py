"""Checks of arguments that several modules share."""

import numbers
from typing import Any

import numpy as np


def is_function(value: Any) -> bool:
    """Whether it can be called, and is not a class."""
    return callable(value) and not isinstance(value, type)


def is_number(value: Any) -> bool:
    """Whether a value is one real number: Python's, NumPy's, or a concrete array of rank 0."""
    if isinstance(value, numbers.Real):
        return True
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return bool(kind) and kind in "iuf" and np.ndim(value) == 0
