"""Which leaves are quantized, and on which set each must land."""

import collections
import dataclasses
import math
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from brelax_jax.sets import QuantizedSet, groups_of

NOT_KERNELS = ("bias", "scale", "embedding")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Selection:
    """Rules that give each leaf a set or None; made by `select`. A pytree without leaves.

    Attributes:
      rules: pairs of a pattern and a set or None; the first pattern found in a leaf's path decides.
      default: the set of the kernels that no pattern matches, or None.
    """

    rules: tuple[tuple[str, QuantizedSet | None], ...]
    default: QuantizedSet | None

    def set_of(self, path: str, leaf: Any) -> QuantizedSet | None:
        """The set of one leaf, or None if it stays as it is."""
        for pattern, qset in self.rules:
            if re.search(pattern, path):
                return qset if math.prod(jnp.shape(leaf)) else None
        return self.default if is_kernel(path, leaf) else None

    def the_set_of(self, path: str, leaf: Any) -> QuantizedSet:
        """The set of a leaf that is known to have one."""
        qset = self.set_of(path, leaf)
        if qset is None:
            raise ValueError(f"{path!r} has float weights in this state, but no rule selects it.")
        return qset

    def check(self, params: Any) -> None:
        """Raises a ValueError, naming the leaf or the rule, if these rules do not fit params."""
        leaves = leaves_with_paths(params)
        for path, count in collections.Counter(path for path, _ in leaves).items():
            if count > 1:
                raise ValueError(f"{count} leaves of params have the path {path!r}; rename one.")
        for pattern, _ in self.rules:
            if leaves and not any(re.search(pattern, path) for path, _ in leaves):
                raise ValueError(
                    f"The pattern {pattern!r} matches no leaf. Patterns are regular expressions, "
                    f"searched in these paths: {', '.join(path for path, _ in leaves)}."
                )
        for path, leaf in leaves:
            qset = self.set_of(path, leaf)
            if qset is None:
                continue
            if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
                raise ValueError(
                    f"{path!r} is of dtype {jnp.result_type(leaf)}, but is selected for {qset}. "
                    "Only floating leaves can be quantized; put a rule that gives it None first."
                )
            try:
                groups_of(qset.granularity, leaf)
            except ValueError as error:
                raise ValueError(f"{path!r}, selected for {qset}: {error}") from None


def select(
    *rules: tuple[str, QuantizedSet | None], default: QuantizedSet | None = None
) -> Selection:
    """Rules that say which leaves are quantized, and how.

    Args:
      *rules: pairs of a regular expression and a set, or None for leaves that stay as they are. The
        first pattern that `re.search` finds in a leaf's path ('/'-joined, as in 'Conv_0/kernel')
        decides; it decides for every leaf that it matches, so name a bias or do not match it.
      default: the set of the *kernels* that no pattern matches: floating leaves of rank 2 or more
        whose last name is not bias, scale or embedding. None leaves them as they are.

    Returns:
      The rules, as every transformation of this library takes them in the place of one set.

    Raises:
      ValueError: if a rule is not such a pair, or a pattern not a regular expression; at a
        transformation's `init`, if a pattern matches no leaf, or gives a set to a leaf that is not
        floating or whose shape does not fit.

    The first convolution stays float, the head has 8 bits, every other kernel is ternary:

    >>> import brelax_jax as brx
    >>> rules = brx.select(
    ...     (r"^Conv_0/", None), (r"head/kernel", brx.Uniform(8)), default=brx.Ternary()
    ... )
    """
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
            raise ValueError(f"A rule is a pair of a pattern and a set or None, got {rule!r}.")
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ValueError(
                f"The pattern {rule[0]!r} is not a regular expression: {error}."
            ) from None
    for qset in (*(rule[1] for rule in rules), default):
        if qset is not None and not isinstance(qset, QuantizedSet):
            raise ValueError(f"A rule gives a set such as Ternary(), or None, got {qset!r}.")
    return Selection(tuple(rules), default)


def as_selection(qset: QuantizedSet | Selection) -> Selection:
    """Rules as they are; one set as the default of no rules."""
    return qset if isinstance(qset, Selection) else select(default=qset)


def register_with_flax() -> None:
    """Lets `flax.serialization` pass over a selection, where flax is in use: it is not imported."""
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        serialization.register_serialization_state(
            Selection, lambda _: {}, lambda selection, _: selection, override=True
        )


def is_kernel(path: str, leaf: Any) -> bool:
    """Whether one set, given alone, applies to this leaf."""
    return (
        jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        and jnp.ndim(leaf) >= 2
        and math.prod(jnp.shape(leaf)) > 0
        and path.rpartition("/")[2] not in NOT_KERNELS
    )


def path_of(keys: tuple[Any, ...]) -> str:
    """A key path as 'a/b/c', without the `.value` that Flax NNX's variables add at `init` only."""
    if keys and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, Any]]:
    """The leaves of a tree with their paths."""
    return [
        (path_of(keys), leaf) for keys, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    ]


def map_with_path(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`jax.tree.map` whose function gets the leaf's path first."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, *leaves: function(path_of(keys), *leaves), tree, *rest
    )


def is_masked(leaf: Any) -> bool:
    """Whether a leaf stands for one that is not there."""
    return isinstance(leaf, optax.MaskedNode)
