"""From one optimizer's rules to another's, in the middle of a run."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax._tree import leaves_with_paths, map_with_path, path_of, with_leaves
from brelax_jax.transforms._accessors import float_params
from brelax_jax.transforms._leaf import codes_of, fit_leaves
from brelax_jax.transforms._state import BinaryRelaxState, find_states, is_state, sets_of, with_fits


def with_rules(opt_state: Any, params: Any, optimizer: Any) -> Any:
    """A state for another optimizer, with other sets or rules, that goes on from this one.

    Use it for fewer bits midway, or for a new head. By path it carries over the float weights, the
    base optimizer's state and the count. Leaves that are quantized only now start from `params`. So
    do leaves that are no longer quantized; you may want to pass them as `float_params` gives them.
    Leaves whose shape changed start anew.

    Args:
      opt_state: as for `float_params`.
      params: the params of the new optimizer. Where they differ from those that `opt_state` belongs
        to, their leaves have other paths or shapes.
      optimizer: the new optimizer, with the same base and wrappers as the one that made
        `opt_state`.

    Returns:
      A state of `optimizer`.

    Raises:
      ValueError: if `opt_state` holds no state of this library, or one that cannot be carried over
        because the bases or the wrappers differ.

    >>> import brelax_jax as brx, jax.numpy as jnp, optax
    >>> params = {"low": jnp.array([[0.25, -0.75]]), "high": jnp.array([[3.0, -1.0]])}
    >>> only_low = brx.binary_connect(optax.sgd(0.1), brx.select(("low", brx.Binary())))
    >>> both = brx.binary_connect(optax.sgd(0.1), brx.Binary())
    >>> state = brx.with_rules(only_low.init(params), params, both)
    >>> brx.quantized_params(state, params)["high"]
    Array([[ 2., -2.]], dtype=float32)
    """
    given = dict(leaves_with_paths(params))
    known = float_params(opt_state, _known_params(opt_state, params))
    floats = given | dict(leaves_with_paths(known))
    new = optimizer.init(params)
    olds, news = _states_with_paths(opt_state), _states_with_paths(new)
    if not news:
        raise ValueError(
            "optimizer must have a transformation of this library in it, such as binary_relax, "
            f"got {optimizer!r}."
        )
    if len(olds) == len(news) == 1:
        olds = dict(zip(news, olds.values(), strict=True))
    if lost := [path for path in news if path not in olds]:
        raise ValueError(
            f"The optimizer has a state of this library at {lost[0]!r}, where opt_state has none, "
            f"but at {', '.join(map(repr, olds))}. Wrap the new optimizer as the old one was, or "
            "start it by its `init`."
        )
    carried = {path: _carried(news[path], olds[path], floats, given) for path in news}
    outside = dict(leaves_with_paths(opt_state))

    def node_at(keys: tuple[Any, ...], node: Any) -> Any:
        path = path_of(keys)
        return carried[path] if is_state(node) else _same_or(outside.get(path), node)

    return jax.tree_util.tree_map_with_path(node_at, new, is_leaf=is_state)


def _known_params(opt_state: Any, params: Any) -> Any:
    """The params by path in the shapes that the states have: those of other shapes are left out."""
    given = dict(leaves_with_paths(params))
    floats: dict[str, Array] = {}
    for state in find_states(opt_state):
        floats |= dict(leaves_with_paths(state.float_params))
    return {
        path: given[path] if path in given and jnp.shape(given[path]) == jnp.shape(y) else y
        for path, y in floats.items()
    }


def _states_with_paths(opt_state: Any) -> dict[str, BinaryRelaxState]:
    pairs = jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=is_state)
    return {path_of(keys): node for keys, node in pairs if is_state(node)}


def _carried(
    new: BinaryRelaxState,
    old: BinaryRelaxState,
    floats: Mapping[str, Any],
    params: Mapping[str, Any],
) -> BinaryRelaxState:
    """The new state with what the old one has learned."""
    sets = sets_of(new, params)
    weights = {
        path: jnp.array(floats[path] if jnp.shape(floats[path]) == y.shape else y, y.dtype)
        for path, y in leaves_with_paths(new.float_params)
    }
    fits = fit_leaves(sets, weights, params)
    before = dict(leaves_with_paths(old.base_state))
    if before and not before.keys() & dict(leaves_with_paths(new.base_state)).keys():
        raise ValueError(
            f"The base of opt_state keeps {', '.join(before)}, of which the new optimizer's has "
            "nothing. Give it the same base, or start it by its `init`."
        )
    base_state = map_with_path(lambda path, x: _same_or(before.get(path), x), new.base_state)
    [count], [lam], [started] = map(jax.tree.leaves, (old.count, old.lam, old.started))

    def recoded(path: str, _: Array) -> Array:
        return codes_of(sets[path], weights[path], fits[path])

    return with_fits(new, fits)._replace(
        base_state=base_state,
        float_params=with_leaves(new.float_params, weights),
        codes=map_with_path(recoded, new.codes),
        count=count,
        lam=lam.astype(new.lam.dtype),
        started=started,
    )


def _same_or(before: Any, now: Array) -> Array:
    """What was there before, if it is of the same shape."""
    if before is None or jnp.shape(before) != jnp.shape(now):
        return now
    return before if before.dtype == now.dtype else before.astype(now.dtype)
