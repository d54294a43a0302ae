"""Trees: the paths of leaves, leaves that are not there, and folds over leaves."""

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import optax
from jax import Array, lax

T = TypeVar("T")


def path_of(keys: tuple[Any, ...]) -> str:
    """A key path as 'a/b/c', without the `.value` that Flax NNX's variables add at `init` only."""
    return jax.tree_util.keystr(_without_value(keys), simple=True, separator="/")


def keys_of(keys: tuple[Any, ...]) -> tuple[str | int, ...]:
    """The parts of `path_of`: integers for places in sequences and integer keys of dicts."""
    places = [(key, getattr(key, "key", getattr(key, "idx", None))) for key in _without_value(keys)]
    return tuple(place if type(place) is int else path_of((key,)) for key, place in places)


def _without_value(keys: tuple[Any, ...]) -> tuple[Any, ...]:
    return keys[:-1] if keys and keys[-1] == jax.tree_util.GetAttrKey("value") else keys


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


def with_leaves(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """A tree with other leaves at some paths."""
    return map_at(lambda _, leaf: leaf, tree, leaves)


def map_at(function: Callable[..., Any], tree: Any, at: Mapping[str, Any]) -> Any:
    """function(leaf, at[path]) of the leaves whose paths are in `at`, the others as they are."""
    return map_with_path(lambda path, leaf: function(leaf, at[path]) if path in at else leaf, tree)


def is_masked(leaf: Any) -> bool:
    """Whether a leaf stands for one that is not there."""
    return isinstance(leaf, optax.MaskedNode)


def is_absent(leaf: Any) -> bool:
    """Whether a leaf is None, or stands for one that is not there."""
    return leaf is None or is_masked(leaf)


def fold_leaves(function: Callable[[str, Any], T], leaves: Mapping[str, Any]) -> dict[str, T]:
    """function(path, leaf) of each leaf; on CPU one leaf after the other.

    XLA on CPU runs independent computations side by side. That takes more memory, and so more
    time.
    """
    results: dict[str, T] = {}
    last = jnp.zeros(())
    for path, leaf in leaves.items():
        results[path] = compute_after(last, functools.partial(function, path), leaf)
        last = jnp.max(jax.tree.leaves(results[path])[0])
    return results


def compute_after(before: Array, function: Callable[..., T], *operands: Any) -> T:
    """function(*operands); in a program for the CPU not before the scalar `before` is known.

    XLA cannot know that `before` is never −1, so it keeps the dependency. Outside of a program one
    call follows the other anyhow.
    """
    if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((before, operands))):
        return function(*operands)
    function = jax.jit(function)  # traced once, though it occurs three times

    def after(before: Array, *operands: Any) -> T:
        def never(*operands: Any) -> T:
            # Of the function only shapes and shardings are left here: the rest is dead code.
            return jax.tree.map(jnp.zeros_like, function(*operands))

        return lax.cond(before != -1, function, never, *operands)

    return lax.platform_dependent(
        before, *operands, cpu=after, default=lambda _, *operands: function(*operands)
    )


def register_with_flax(kind: type) -> None:
    """Lets `flax.serialization` pass over what is static, where flax is in use: it is not
    imported.
    """
    serialization = sys.modules.get("flax.serialization")
    if serialization is not None:
        serialization.register_serialization_state(
            kind, lambda _: {}, lambda static, _: static, override=True
        )
