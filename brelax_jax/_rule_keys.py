"""The keys of rules: patterns, and functions of a leaf's path and shape."""

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np

from brelax_jax._arguments import is_function
from brelax_jax.sets import QuantizedSet

Key: TypeAlias = str | re.Pattern[str] | Callable[[str, Any], bool]
Rule: TypeAlias = tuple[Key, QuantizedSet | None]


def shape_of(leaf: Any) -> jax.ShapeDtypeStruct:
    """A leaf as users' functions see it: the same at `init`, in updates and under jit."""
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))


def decides(value: Any) -> bool:
    """Whether it is a function to decide by, and not a module of sets that can be called."""
    return is_function(value) and all(leaf is value for leaf in jax.tree.leaves(value))


def takes(function: Callable[..., Any], count: int) -> bool:
    """Whether a function can be called with so many arguments."""
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # it has no signature that Python knows
        return True
    return True


def matches(key: Key, path: str, leaf: Any) -> bool:
    """Whether a key fits a leaf."""
    if not callable(key):
        return re.search(key, path) is not None
    answer = key(path, shape_of(leaf))
    if not isinstance(answer, bool | np.bool_):
        raise ValueError(
            f"A rule's function must return True or False, but {key!r} returned {answer!r} for "
            f"{path!r}: wrap it in bool(…)."
        )
    return bool(answer)


def check_patterns(rules: Sequence[Rule], leaves: Sequence[tuple[str, Any]]) -> None:
    """Raises a ValueError if a pattern matches no leaf."""
    for key, _ in rules:
        if not callable(key) and not any(re.search(key, path) for path, _ in leaves):
            raise ValueError(
                f"The pattern {key!r} matches no leaf. Patterns are regular expressions, "
                f"searched in these paths: {', '.join(path for path, _ in leaves)}."
            )


def check_rule(rule: Any) -> None:
    """Raises a ValueError if it is no pair of a key and a set, or the key no pattern."""
    is_pair = isinstance(rule, tuple) and len(cast("tuple[Any, ...]", rule)) == 2
    is_pattern = is_pair and isinstance(rule[0], str | re.Pattern)
    if not (is_pattern or (is_pair and decides(rule[0]) and takes(rule[0], 2))):
        raise ValueError(
            "A rule is a pair of a pattern or a function (path, leaf) -> bool, and a set or None, "
            f"got {rule!r}."
        )
    try:
        if is_pattern:
            re.compile(rule[0])
    except re.error as error:
        raise ValueError(f"The pattern {rule[0]!r} is not a regular expression: {error}.") from None
