"""What can be read from a state, at any depth of an optimizer's."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax._envelope import strength_of
from brelax_jax._tree import leaves_with_paths, map_with_path, with_leaves
from brelax_jax.transforms._leaf import codes_of, fit_leaves, quantized_leaf
from brelax_jax.transforms._state import (
    BinaryRelaxState,
    QuantizedLeaf,
    check_known,
    check_owned,
    find_states,
    fit_place,
    is_state,
    quantized_leaves,
    sets_of,
)

Tree = TypeVar("Tree")


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

    def read(leaf: QuantizedLeaf, p: Any) -> Array:
        return quantized_leaf(leaf.qset, jnp.result_type(p), leaf.y, leaf.fit)

    return _read(opt_state, params, read)


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
    find_states(opt_state)  # there is one

    def replaced(state: Any) -> Any:
        return _replaced(state, params) if is_state(state) else state

    return jax.tree.map(replaced, opt_state, is_leaf=is_state)


def _replaced(state: BinaryRelaxState, params: Any) -> BinaryRelaxState:
    """The state with the float weights of these params."""
    check_owned(state, params)
    check_known(state, params)
    given, sets = dict(leaves_with_paths(params)), sets_of(state, params)
    floats = {
        path: jnp.array(given[path], y.dtype, copy=True)
        for path, y in leaves_with_paths(state.float_params)
    }
    fits = fit_leaves(sets, floats, given)

    def refitted(keys: tuple[Any, ...], _: Array) -> Array:
        path, field = fit_place(keys)
        return getattr(fits[path], field)

    def recoded(path: str, _: Array) -> Array:
        return codes_of(sets[path], floats[path], fits[path])

    return state._replace(
        float_params=with_leaves(state.float_params, floats),
        fits=jax.tree_util.tree_map_with_path(refitted, state.fits),
        codes=map_with_path(recoded, state.codes),
        lam=jnp.zeros_like(state.lam),
        updates_on_grid=jnp.zeros_like(state.updates_on_grid),
    )


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


def _read(opt_state: Any, params: Tree, read: Callable[[QuantizedLeaf, Any], Any]) -> Tree:
    """The params' tree with read(leaf, p) in the place of each quantized leaf p."""
    found = quantized_leaves(opt_state, params)
    return map_with_path(lambda path, p: read(found[path], p) if path in found else p, params)
