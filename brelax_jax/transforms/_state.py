"""The state of a relaxing transformation, and what can be read from it."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax._envelope import strength_of
from brelax_jax._select import Selection, is_masked, leaves_with_paths, map_with_path, path_of
from brelax_jax.sets import Fit, QuantizedSet
from brelax_jax.transforms._grid import place_on_grid, round_fit

Tree = TypeVar("Tree")


class BinaryRelaxState(NamedTuple):
    """State of `binary_relax`, `relax_params` and `binary_connect`.

    Attributes:
      base_state: the state of the base optimizer.
      float_params: the float weights y; `optax.MaskedNode` in the place of leaves that are not
        quantized.
      fits: a `Fit` for each of them, the scale of each group; `optax.MaskedNode` elsewhere.
      codes: int8, the codes before the last update; `optax.MaskedNode` everywhere unless flips are
        tracked.
      count: int32, updates so far.
      lam: float32, the λ with which the current params were made: 0 before the first update, ∞ in
        phase II.
      landed: int32, how many updates in a row have put the params on their grids, up to 2.
      selection: which leaves are quantized on which sets; a pytree without leaves.
    """

    base_state: Any
    float_params: Any
    fits: Any
    codes: Any
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    lam: Array
    landed: Array
    selection: Selection


def fit_leaf(qset: QuantizedSet, y: Array, p: Any, last: Fit | None = None) -> Fit:
    """Fits a set to the float weights y of the param p, given the fit before."""
    return round_fit(qset.fit(y, last), qset, jnp.result_type(p))


def codes_of(qset: QuantizedSet, y: Array, fit: Fit) -> Array:
    """The codes of the float weights y, as the state keeps them."""
    return qset.codes(y, fit).astype(jnp.int8)


def float_params(opt_state: Any, params: Tree) -> Tree:
    """The float weights y behind the pseudo-quantized `params`.

    Args:
      opt_state: an optimizer state in which a transformation of this library has its own, at any
        depth (`chain`, `MultiSteps`, `partition`, `masked`, `inject_hyperparams`, …).
      params: the params that it belongs to.

    Returns:
      The params' tree with the float weights of the quantized leaves (at least float32), and the
      other leaves as they are.

    Raises:
      ValueError: if `opt_state` holds no such state, or one of other params.

    >>> import brelax_jax as brx, jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([[0.25, -0.75]]), "bias": jnp.zeros(2)}
    >>> optimizer = brx.binary_connect(optax.sgd(0.5), brx.Binary())
    >>> state = optimizer.init(params)
    >>> grads = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    >>> updates, state = optimizer.update(grads, state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> brx.float_params(state, params)["kernel"], params["kernel"]
    (Array([[-0.25, -1.25]], dtype=float32), Array([[-0.75, -0.75]], dtype=float32))
    """
    return _read(opt_state, params, lambda leaf, p: leaf.y)


def quantized_params(opt_state: Any, params: Tree) -> Tree:
    """The params to deploy: the float weights projected on their sets, exactly, in every phase.

    Applies the stored scales to the float weights, elementwise. In phase II the params themselves
    are these, bit for bit.

    Args:
      opt_state: as for `float_params`.
      params: the params that it belongs to.

    Returns:
      The params' tree, dtypes and all, with the quantized leaves on their sets, and the other
      leaves as they are.

    Raises:
      ValueError: if `opt_state` holds no such state, or one of other params.

    >>> import brelax_jax as brx, jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([[0.25, -0.75]])}
    >>> state = brx.binary_relax(optax.adam(1e-3), brx.Binary(), lam=1.0).init(params)
    >>> brx.quantized_params(state, params)
    {'kernel': Array([[ 0.5, -0.5]], dtype=float32)}
    """

    def quantized(leaf: QuantizedLeaf, p: Any) -> Array:
        dtype = jnp.result_type(p)
        q = place_on_grid(leaf.y, leaf.fit, leaf.qset, dtype).astype(dtype)
        return jnp.where(q == 0, 0, q)  # not −0, which no sum ends at

    return _read(opt_state, params, quantized)


def with_float_params(opt_state: Tree, params: Any) -> Tree:
    """A state that goes on from these params: they replace the float weights, all else stays.

    For params that were changed between updates, which the next update would otherwise overwrite:
    averaged, clipped or restored ones.

    Args:
      opt_state: as for `float_params`.
      params: the new params, of the structure and shapes of those that it belongs to.

    Returns:
      The new state.

    Raises:
      ValueError: if `opt_state` holds no such state, or one of other params.

    >>> import brelax_jax as brx, jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([[0.25, -0.75]])}
    >>> state = brx.binary_relax(optax.adam(1e-3), brx.Binary(), lam=1.0).init(params)
    >>> state = brx.with_float_params(state, {"kernel": jnp.array([[3.0, -1.0]])})
    >>> brx.quantized_params(state, params)
    {'kernel': Array([[ 2., -2.]], dtype=float32)}
    """
    find_states(opt_state)
    given = dict(leaves_with_paths(params))

    def replaced(state: Any) -> Any:
        if not isinstance(state, BinaryRelaxState):
            return state
        check_same_params(state, params)
        floats = map_with_path(
            lambda path, y: jnp.array(given[path], y.dtype, copy=True), state.float_params
        )
        leaves = dict(leaves_with_paths(floats))
        sets = {path: state.selection.the_set_of(path, y) for path, y in leaves.items()}
        fits = {path: fit_leaf(sets[path], y, given[path]) for path, y in leaves.items()}

        def refitted(keys: tuple[Any, ...], _: Array) -> Array:
            leaf, field = fit_place(keys)
            return getattr(fits[leaf], field)

        def recoded(path: str, _: Array) -> Array:
            return codes_of(sets[path], leaves[path], fits[path])

        return state._replace(
            float_params=floats,
            fits=jax.tree_util.tree_map_with_path(refitted, state.fits),
            codes=map_with_path(recoded, state.codes),
            lam=jnp.zeros_like(state.lam),
            landed=jnp.zeros_like(state.landed),
        )

    return jax.tree.map(replaced, opt_state, is_leaf=_is_state)


def strength(opt_state: Any) -> Array:
    """α = λ/(λ + 1) of the last update: how far the params were pulled to their sets.

    Args:
      opt_state: as for `float_params`.

    Returns:
      A float32 scalar from 0 (the params are the float weights; so before the first update) to 1
      (phase II). If `opt_state` holds several states of this library, that of the first.

    Raises:
      ValueError: if `opt_state` holds no state of this library.

    >>> import brelax_jax as brx, jax.numpy as jnp, optax
    >>> brx.strength(brx.binary_relax(optax.sgd(0.1), brx.Binary(), lam=1.0).init(jnp.ones((2, 2))))
    Array(0., dtype=float32)
    """
    return strength_of(find_states(opt_state)[0].lam)


def find_states(opt_state: Any) -> list[BinaryRelaxState]:
    """The states of this library inside an optimizer state, at least one."""
    states = [state for state in jax.tree.leaves(opt_state, is_leaf=_is_state) if _is_state(state)]
    if not states:
        raise ValueError(
            "opt_state holds no state of binary_relax, relax_params or binary_connect; "
            "pass the whole state that their `init` or `update` returned."
        )
    return states


REMEDY = "Make the state with `init` from these params, or pass the params that it was made from."


def check_same_params(state: BinaryRelaxState, params: Any) -> None:
    """Raises a ValueError, naming the leaf, if params are not those that the state was made for."""
    check_owned(state, params)
    known = {path for path, _ in leaves_with_paths(state.float_params, is_masked)}
    for path, leaf in leaves_with_paths(params):
        if path not in known and state.selection.set_of(path, leaf) is not None:
            raise ValueError(
                f"{path!r} is to be quantized, but the state has no float weights for it. {REMEDY}"
            )


def check_owned(state: BinaryRelaxState, params: Any) -> None:
    """Raises a ValueError, naming the leaf, if params lack one of the state's or its shape."""
    given = dict(leaves_with_paths(params))
    for path, y in leaves_with_paths(state.float_params):
        if path not in given:
            raise ValueError(
                f"The state has float weights for {path!r}, which params lack. {REMEDY}"
            )
        if jnp.shape(given[path]) != jnp.shape(y):
            raise ValueError(
                f"{path!r} has shape {jnp.shape(given[path])} in params, but {jnp.shape(y)} in the "
                f"state. {REMEDY}"
            )


class QuantizedLeaf(NamedTuple):
    """What a state holds for one quantized leaf.

    Attributes:
      state: the state.
      qset: the leaf's set.
      y: its float weights.
      fit: what places them on the set.
      codes: those before the last update; None where flips are not tracked.
    """

    state: BinaryRelaxState
    qset: QuantizedSet
    y: Array
    fit: Fit
    codes: Array | None


def quantized_leaves(opt_state: Any, params: Any) -> dict[str, QuantizedLeaf]:
    """The quantized leaves of all states of this library inside an optimizer state, by path.

    Raises:
      ValueError: if there is no such state, or one of other params.
    """
    found: dict[str, QuantizedLeaf] = {}
    for state in find_states(opt_state):
        check_owned(state, params)
        parts: dict[str, dict[str, Array]] = {}
        for keys, part in jax.tree_util.tree_leaves_with_path(state.fits):
            leaf, field = fit_place(keys)
            parts.setdefault(leaf, {})[field] = part
        codes = dict(leaves_with_paths(state.codes))
        for path, y in leaves_with_paths(state.float_params):
            qset = state.selection.the_set_of(path, y)
            found[path] = QuantizedLeaf(state, qset, y, Fit(**parts[path]), codes.get(path))
    return found


def _read(opt_state: Any, params: Tree, read: Callable[[QuantizedLeaf, Any], Any]) -> Tree:
    """The params' tree with read(leaf, p) in the place of each quantized leaf p."""
    found = quantized_leaves(opt_state, params)
    return map_with_path(lambda path, p: read(found[path], p) if path in found else p, params)


def fit_place(keys: tuple[Any, ...]) -> tuple[str, str]:
    """The path of a leaf and the field of its `Fit`, from a key path into `fits`."""
    keys = tuple(keys)
    if keys[-1] == jax.tree_util.GetAttrKey("value"):  # of a Flax NNX variable
        keys = keys[:-1]
    return path_of(keys[:-1]), path_of(keys[-1:])


def _is_state(node: Any) -> bool:
    return isinstance(node, BinaryRelaxState)
