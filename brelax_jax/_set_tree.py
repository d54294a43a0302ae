"""Trees of sets and None in place of rules, as `optax.partition` takes labels.

A set in place of a leaf is for that leaf, and in place of a subtree for the kernels in it.
"""

from collections.abc import Mapping
from typing import Any

from brelax_jax._tree import is_absent, leaves_with_paths
from brelax_jax.sets import QuantizedSet


def entries_of(tree: Any, kinds: str) -> tuple[tuple[str, QuantizedSet | None], ...]:
    """The sets and None in a tree, by their paths.

    Args:
      tree: what may be such a tree.
      kinds: how an error begins.

    Raises:
      ValueError: if there is something else in it, or two entries have one path.
    """
    entries = leaves_with_paths(tree, lambda node: node is None)
    for path, qset in entries:
        if qset is not None and not isinstance(qset, QuantizedSet):
            at = f" at {path!r}" if path else ""
            raise ValueError(f"{kinds} and None like the params, got {qset!r}{at}.")
    if len(dict(entries)) < len(entries):
        raise ValueError(f"Two entries of the tree of sets have one path: {dict(entries)}.")
    return tuple(entries)


def check_structure(entries: Mapping[str, QuantizedSet | None], params: Any) -> None:
    """Raises a ValueError, naming the path, if a tree of sets is not like the params."""
    places = leaves_with_paths(params, is_absent)
    paths = [path for path, leaf in places if not is_absent(leaf)]
    if not paths:  # Optax makes such placeholders
        return
    absent = {path for path, leaf in places if is_absent(leaf)}
    present = {above for path, _ in places for above in lineage(path)}
    for path, qset in entries.items():
        if qset is not None and path not in present and absent.isdisjoint(lineage(path)):
            raise ValueError(
                f"The tree of sets has {qset} at {path!r}, where params have nothing. Give it the "
                f"structure of the params, whose leaves are {', '.join(paths)}."
            )
    for path in paths:
        if nearest(path, entries) is None:
            raise ValueError(
                f"The tree of sets has nothing for {path!r}, a leaf of the params. Give a set or "
                "None for each of them, as in jax.tree.map(lambda p: None, params)."
            )


def nearest(path: str, entries: Mapping[str, Any]) -> str | None:
    """The path of the entry for a leaf: its own, or that of the innermost subtree around it."""
    return next((at for at in lineage(path) if at in entries), None)


def lineage(path: str) -> list[str]:
    """A path, and those of the nodes around it, up to the root's ''."""
    parts = path.split("/")
    return ["/".join(parts[:length]) for length in range(len(parts), 0, -1)] + [""] * bool(path)
