"""What users read from an optimizer state that holds ours at any depth."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax._envelope import strength_of
from brelax_jax._tree import leaves_with_paths, map_at, map_with_path, with_leaves
from brelax_jax.sets import Fit, Quantized, QuantizedSet
from brelax_jax.transforms._leaf import coded_leaf, codes_of, fit_leaves, quantized_leaf
from brelax_jax.transforms._start import current_fits, float_weights
from brelax_jax.transforms._state import (
    BinaryRelaxState,
    check_is_one,
    check_known,
    check_owned,
    find_states,
    is_state,
    sets_of,
    with_fits,
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
    floats: dict[str, Array] = {}
    given = dict(leaves_with_paths(params))
    for state in find_states(opt_state):
        check_is_one(state)
        check_owned(state, params)
        floats |= float_weights(state, given)
    return with_leaves(params, floats)


def quantized_params(opt_state: Any, params: Tree) -> Tree:
    """The params to deploy: the float weights projected on their sets, exactly, in every phase.

    It applies the stored scales to the float weights, elementwise. In phase II it gives the params
    themselves, bit for bit.

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

    def read(p: Any, leaf: QuantizedLeaf) -> Array:
        return quantized_leaf(leaf.qset, jnp.result_type(p), leaf.y, leaf.fit)

    return map_at(read, params, quantized_leaves(opt_state, params))


def quantized_tree(opt_state: Any, params: Tree) -> Tree:
    """The params to deploy, as codes and scales whose products are `quantized_params`.

    It takes the scales of the state. `quantize` of a set finds scales anew, which often differ for
    deployed params.

    Args:
      opt_state: as for `float_params`.
      params: the params that it belongs to.

    Returns:
      The params' tree with a `Quantized` in place of each quantized leaf, whose `dequantize()`
      is that leaf of `quantized_params`, bit for bit, and the other leaves as they are.

    Raises:
      ValueError: if `opt_state` holds no such state, or one of other params.

    >>> import brelax_jax as brx, jax.numpy as jnp, optax
    >>> params = {"kernel": jnp.array([[0.25, -0.75]])}
    >>> state = brx.binary_relax(optax.adam(1e-3), brx.Binary(), lam=1.0).init(params)
    >>> quantized = brx.quantized_tree(state, params)["kernel"]
    >>> quantized.codes, quantized.scale
    (Array([[ 1, -1]], dtype=int8), Array([[0.5]], dtype=float32))
    """

    def read(p: Any, leaf: QuantizedLeaf) -> Quantized:
        return coded_leaf(leaf.qset, jnp.result_type(p), leaf.y, leaf.fit)

    return map_at(read, params, quantized_leaves(opt_state, params))


def with_float_params(opt_state: Tree, params: Any) -> Tree:
    """A state that goes on from these params: they replace the float weights; all else stays.

    Use it after you change params between updates, for example by averaging, clipping or restoring.
    The next update would overwrite such changes otherwise.

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
    check_is_one(state)
    check_owned(state, params)
    check_known(state, params)
    given, sets = dict(leaves_with_paths(params)), sets_of(state, params)
    floats = {
        path: jnp.array(given[path], y.dtype, copy=True)
        for path, y in leaves_with_paths(state.float_params)
    }
    fits = fit_leaves(sets, floats, given)

    def recoded(path: str, _: Array) -> Array:
        return codes_of(sets[path], floats[path], fits[path])

    return with_fits(state, fits)._replace(
        float_params=with_leaves(state.float_params, floats),
        codes=map_with_path(recoded, state.codes),
        lam=jax.tree.map(jnp.zeros_like, state.lam),
        updates_on_grid=jax.tree.map(jnp.zeros_like, state.updates_on_grid),
        started=jax.tree.map(jnp.ones_like, state.started),
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
    [lam] = jax.tree.leaves(find_states(opt_state)[0].lam)
    return strength_of(lam)


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
    given = dict(leaves_with_paths(params))
    for state in find_states(opt_state):
        check_is_one(state)
        check_owned(state, params)
        sets, floats = sets_of(state, params), float_weights(state, given)
        fits = current_fits(state, sets, floats, given)
        codes = dict(leaves_with_paths(state.codes))
        for path, y in floats.items():
            found[path] = QuantizedLeaf(state, sets[path], y, fits[path], codes.get(path))
    return found
