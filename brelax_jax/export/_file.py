"""Saving a quantized network, and loading it."""

import os
import secrets
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from brelax_jax._select import Sets, as_selection
from brelax_jax._tree import keys_of, leaves_with_paths, path_of
from brelax_jax.export._format import Leaf, decode, encode
from brelax_jax.export._packing import is_quantized, pack_leaf
from brelax_jax.sets import FLOATS, Quantized, QuantizedSet
from brelax_jax.transforms._accessors import quantized_leaves, quantized_tree


def save(
    path: str | os.PathLike[str],
    params: Any,
    opt_state: Any = None,
    *,
    rules: Sets = None,
    others: Mapping[str, Any] | None = None,
    dtype: DTypeLike | None = None,
) -> None:
    """Saves a network whose weights are on their sets, in as few bits as their levels need.

    It saves `quantized_params(opt_state, params)`, bit for bit. Files are written atomically: an
    old file stays whole until the new one takes its place. The format is safetensors;
    docs/file-format.md has the layout.

    Args:
      path: of the file.
      params: the params.
      opt_state: the state that belongs to them, as for `quantized_params`.
      rules: in place of `opt_state`, for weights from elsewhere, which are then projected: a set,
        rules or a tree of sets, as every transformation takes them.
      others: trees of arrays to save beside the params, by name, such as `{"batch_stats": …}`;
        `load` gives each as one more entry of the outermost dict.
      dtype: the floating dtype in which leaves that are not quantized are saved; None keeps theirs.

    Raises:
      ValueError: if not exactly one of `opt_state` and `rules` is given, if they do not fit the
        params, or if the file cannot hold something. The message names the leaf.
      ModuleNotFoundError: without safetensors, which `brelax_jax[export]` installs.

    Warns:
      UserWarning: if the saved weights differ from the params, as in phase I. It says by how much.

    >>> import brelax_jax as brx, jax.numpy as jnp, pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "network.safetensors"
    >>> brx.save(path, {"kernel": jnp.array([[0.5, -0.5]])}, rules=brx.Binary())
    >>> brx.load(path)
    {'kernel': Array([[ 0.5, -0.5]], dtype=float32)}
    """
    if (opt_state is None) == (rules is None):
        raise ValueError(
            "Give one of opt_state, the state that belongs to these params, and rules, for weights "
            f"that came from elsewhere; got {'neither' if rules is None else 'both'}."
        )
    if dtype is not None and jnp.dtype(dtype).name not in FLOATS:
        raise ValueError(f"dtype must be None or one of {', '.join(FLOATS)}, got {dtype!r}.")
    if opt_state is None:
        selection = as_selection(rules)
        sets, tree = selection.assign(params), selection.quantize(params)
    else:
        found = quantized_leaves(opt_state, params)
        sets = {name: leaf.qset for name, leaf in found.items()}
        tree = quantized_tree(opt_state, params)
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    leaves = [
        _quantized(keys, leaf, sets[path_of(keys)])
        if is_quantized(leaf)
        else Leaf(keys_of(keys), _cast(np.asarray(leaf), dtype))
        for keys, leaf in pairs
    ]
    leaves += [
        Leaf(keys_of(keys), _cast(np.asarray(leaf), dtype))
        for keys, leaf in jax.tree_util.tree_leaves_with_path(dict(others or {}))
    ]
    _nested(leaves, leaves)  # they fit into one tree
    _write(path, encode(leaves))
    _warn_of_difference(path, leaves, dict(leaves_with_paths(params)), opt_state is None)


def load(path: str | os.PathLike[str], packed: bool = False) -> Any:
    """Loads what `save` saved. It trusts nothing in the file, and runs no code from it.

    Args:
      path: of the file.
      packed: whether to keep the codes packed: a `Packed` in place of each quantized leaf, for
        `dequantize` inside a jitted function.

    Returns:
      A nested dict of arrays, by the keys of the leaves' paths. Places in lists are integer keys.

    Raises:
      ValueError: if the file is incomplete, was altered, contradicts itself or has an unknown
        version. The message names the file and what is wrong.
      OSError: if there is no such file.
      ModuleNotFoundError: as `save`.
    """
    leaves = read(path)
    values = [leaf.value if packed else leaf.dequantize() for leaf in leaves]
    return jax.device_put(_nested(leaves, values))


def read(path: str | os.PathLike[str]) -> list[Leaf]:
    """The leaves in a file, of NumPy's arrays; raises as `load`."""
    raw = Path(path).read_bytes()
    try:
        leaves = decode(raw)
        for leaf in leaves:
            _check_precision(leaf)
        _nested(leaves, leaves)  # they fit into one tree
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    return leaves


def _nested(leaves: Iterable[Leaf], values: Iterable[Any]) -> Any:
    """Nested dicts of these values. The keys of each are of one type, so that JAX can sort them."""
    tree: dict[Any, Any] = {}
    for leaf, value in zip(leaves, values, strict=True):
        *above, last = "", *leaf.keys
        node = tree
        for key in above:
            node = _with_room(node, key, leaf).setdefault(key, {})
        if last in _with_room(node, last, leaf):
            raise ValueError(f"its leaf {leaf.name!r} is there twice, or contains other leaves")
        node[last] = value
    return tree.get("", {})


def _with_room(node: Any, key: str | int, leaf: Leaf) -> Any:
    if not isinstance(node, dict) or type(next(iter(node), key)) is not type(key):
        raise ValueError(f"its leaf {leaf.name!r} cannot lie where its path says")
    return cast("dict[Any, Any]", node)


def _cast(array: np.ndarray, dtype: DTypeLike | None) -> np.ndarray:
    floating = jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(dtype) if floating and dtype is not None else array


def _quantized(keys: Any, leaf: Quantized, qset: QuantizedSet) -> Leaf:
    """A quantized leaf as the file holds it."""
    leaf = jax.device_get(leaf)
    if not np.isfinite(leaf.scale).all():
        raise ValueError(f"{path_of(keys)!r} has weights that are not finite.")
    bits = getattr(qset, "bits", None)
    name = type(qset).__name__ + (f"({bits})" if bits else "")
    return Leaf(keys_of(keys), pack_leaf(leaf, np), name, qset.granularity)


def _write(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file atomically."""
    place = Path(os.path.realpath(path))
    beside = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
    try:
        with beside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(place)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _warn_of_difference(
    path: str | os.PathLike[str], leaves: list[Leaf], params: Mapping[str, Any], projected: bool
) -> None:
    differences: dict[str, float] = {}
    for leaf in leaves:
        if leaf.granularity is not None:
            w, p = leaf.dequantize().astype("float64"), np.asarray(params[leaf.name], "float64")
            if not np.array_equal(w, p):
                differences[leaf.name] = float(np.linalg.norm(w - p) / np.linalg.norm(p))
    if differences:
        worst = max(differences, key=lambda name: differences[name])
        reason = (
            "The rules' sets are not where they were, so they were projected: evaluate what "
            "load(path) gives."
            if projected
            else "Phase II has not begun, or not landed yet: evaluate quantized_params(opt_state, "
            "params), which are what is saved."
        )
        warnings.warn(
            f"The weights saved in {os.fspath(path)} are not the params in {len(differences)} "
            f"leaves, at most by {100 * differences[worst]:.3g} % of the norm, in {worst!r}. "
            f"{reason}",
            stacklevel=3,
        )


def _check_precision(leaf: Leaf) -> None:
    dtype = jnp.dtype(leaf.value.dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"its leaf {leaf.name!r} is of {dtype}, which JAX has only with jax_enable_x64; "
            "set it, or save a network of narrower weights"
        )
