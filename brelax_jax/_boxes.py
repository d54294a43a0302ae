"""Flax's boxes: nodes around one array which say over which mesh axes it is sharded.

Linen puts params into `nn.Partitioned` and the like, NNX into its variables. Flax is not imported:
where it is not in use there are no boxes.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax import Array

from brelax_jax._tree import path_of

NAMES_OF_VARIABLES = ("out_sharding", "optimizer_sharding", "sharding_names", "sharding")


def is_box(node: Any) -> bool:
    """Whether a node is a box."""
    return _is_of(node, "flax.core.meta", "AxisMetadata") or _is_of(node, "flax.nnx", "Variable")


def boxes_with_paths(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths, each in its box if it has one."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return {path_of(keys): leaf for keys, leaf in pairs}


def masked_but(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree with these leaves, in their boxes, and `optax.MaskedNode` in place of others."""

    def leaf_at(keys: tuple[Any, ...], box: Any) -> Any:
        path = path_of(keys)
        return rebox(box, leaves[path]) if path in leaves else optax.MaskedNode()

    return jax.tree_util.tree_map_with_path(leaf_at, tree, is_leaf=is_box)


def rebox(box: Any, leaf: Any) -> Any:
    """Another leaf in the same box, or just that leaf if there is no box."""
    return jax.tree.map(lambda _: leaf, box) if is_box(box) else leaf


def box_scale(box: Any, scale: Array, shape: Sequence[int]) -> Any:
    """A scale of each group of an array of this shape, in a box like the array's.

    The scale is sharded over the mesh axes of an array's axis if it has that axis whole, or in
    blocks that lie within the shards.
    """
    if hasattr(box, "names") and hasattr(box, "replace_boxed"):
        return box.replace(value=scale, names=_names(box.names, scale.shape, shape, vars(box)))
    if not is_box(box) or not hasattr(box, "set_metadata"):
        return scale
    names = {
        key: _names(value, scale.shape, shape, box.get_metadata())
        for key, value in box.get_metadata().items()
        if key in NAMES_OF_VARIABLES and isinstance(value, tuple | jax.sharding.PartitionSpec)
    }
    if not names:
        return scale
    scale_box = rebox(box, scale)
    scale_box.set_metadata(**names)
    return scale_box


def _names(
    names: Any, scale: Sequence[int], shape: Sequence[int], metadata: Mapping[str, Any]
) -> Any:
    """The names of the array's axes that are right for the scale's, else None."""
    mesh = metadata.get("mesh") or jax.sharding.get_abstract_mesh()
    context = sys.modules.get("flax.core.spmd")
    rules = {
        **dict(context.get_logical_axis_rules() if context else ()),
        **dict(metadata.get("rules") or metadata.get("sharding_rules") or ()),
    }

    def shards(name: Any) -> int:
        parts = [rules.get(part, part) for part in (name if isinstance(name, tuple) else (name,))]
        count = 1
        for part in parts:
            for axis in part if isinstance(part, tuple) else (part,):
                count *= mesh.shape.get(axis, 1)
        return count

    def fits(name: Any, groups: int, entries: int) -> bool:
        return groups == entries or (groups > 1 and groups % shards(name) == 0)

    kept = tuple(
        name if name is not None and fits(name, groups, entries) else None
        for name, groups, entries in zip(names, scale, shape, strict=False)
    )
    return kept if isinstance(names, tuple) else jax.sharding.PartitionSpec(*kept)


def _is_of(node: Any, module: str, kind: str) -> bool:
    found = getattr(sys.modules.get(module), kind, None)
    return found is not None and isinstance(node, found)
