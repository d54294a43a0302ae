"""The state of a relaxing transformation: its fields, how it is found, and what it was made for."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax._select import Selection
from brelax_jax._tree import is_absent, leaves_with_paths, path_of
from brelax_jax.sets import Fit, QuantizedSet


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class Assignment:
    """What a selection gave to the leaves of some params. A pytree without leaves.

    Two are equal if they gave the same sets to the same leaves, whatever functions decided it.

    Attributes:
      selection: what decided. It goes into a pickle only if it has no functions.
      pairs: the path and the set of each quantized leaf; None for params without leaves. Optax
        takes the state of such params for the pattern of any other of the same selection.
    """

    selection: Selection | None
    pairs: tuple[tuple[str, QuantizedSet], ...] | None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Assignment):
            return NotImplemented
        if self.pairs is None or other.pairs is None:
            return self.selection == other.selection
        return self.pairs == other.pairs

    def __hash__(self) -> int:
        return hash(Assignment)

    def __reduce__(self) -> tuple[Any, ...]:
        has_functions = self.selection is not None and self.selection.has_functions
        return Assignment, (None if has_functions else self.selection, self.pairs)

    def __deepcopy__(self, memo: Any) -> "Assignment":
        return self


class BinaryRelaxState(NamedTuple):
    """State of `binary_relax`, and so of `relax_params`, `binary_connect` and `parq`.

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
      updates_on_grid: int32, how many updates in a row have put the params on their grids, up to 2.
      sets: which leaves are quantized on which sets; a pytree without leaves.
    """

    base_state: Any
    float_params: Any
    fits: Any
    codes: Any
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    lam: Array
    updates_on_grid: Array
    sets: Assignment


def find_states(opt_state: Any) -> list[BinaryRelaxState]:
    """The states of this library inside an optimizer state, at least one."""
    states = [state for state in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(state)]
    if not states:
        raise ValueError(
            "opt_state holds no state of binary_relax, relax_params or binary_connect; "
            "pass the whole state that their `init` or `update` returned."
        )
    return states


REMEDY = "Make the state with `init` from these params, or pass what it was made from."


def sets_of(state: BinaryRelaxState, params: Any) -> dict[str, QuantizedSet]:
    """The set of each leaf for which the state has float weights, by its path.

    Raises:
      ValueError: if the state was made without params, as Optax's `map_params` does it, and its
        selection gives no set to one of these leaves.
    """
    if state.sets.pairs is not None:
        return dict(state.sets.pairs)
    paths = [path for path, _ in leaves_with_paths(state.float_params)]
    chosen = state.sets.selection.choose(params) if paths and state.sets.selection else {}
    if lost := [path for path in paths if path not in chosen]:
        raise ValueError(
            f"The state has float weights for {lost[0]!r}, but its rules select it no more. "
            "Outside of shard_map, make the state with `init` and update it once."
        )
    return {path: chosen[path] for path in paths}


def check_same_sets(sets: dict[str, QuantizedSet], params: Any, selection: Selection) -> None:
    """Raises a ValueError, naming the leaf, if a selection gives others than these sets."""
    if selection.has_functions and jax.sharding.get_abstract_mesh().manual_axes:
        return  # functions may go by shapes, and these are of one device's parts
    wanted = selection.choose(params)
    for path in {**wanted, **sets}:
        if path not in sets:
            raise ValueError(
                f"{path!r} is to be quantized, but the state has no float weights for it. {REMEDY}"
            )
        if wanted.get(path) != sets[path]:
            raise ValueError(
                f"{path!r} was selected for {sets[path]} when the state was made, but is for "
                f"{wanted.get(path)} now. Make a state with `init` of the optimizer that has these "
                "sets, or pass the one that made this state. A function that selects must always "
                "give the same answer."
            )


def check_known(state: BinaryRelaxState, params: Any) -> None:
    """Raises a ValueError, naming the leaf, if params have one that the state was not made for."""
    known = {path for path, _ in leaves_with_paths(state.float_params, is_absent)}
    for path, _ in leaves_with_paths(params):
        if path not in known:
            raise ValueError(f"Params have {path!r}, which the state does not know. {REMEDY}")


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
        sets, fits = sets_of(state, params), fits_by_path(state)
        codes = dict(leaves_with_paths(state.codes))
        for path, y in leaves_with_paths(state.float_params):
            found[path] = QuantizedLeaf(state, sets[path], y, fits[path], codes.get(path))
    return found


def fits_by_path(state: BinaryRelaxState) -> dict[str, Fit]:
    """The fit of each quantized leaf, by the leaf's path."""
    parts: dict[str, dict[str, Array]] = {}
    for keys, part in jax.tree_util.tree_leaves_with_path(state.fits):
        leaf, field = fit_place(keys)
        parts.setdefault(leaf, {})[field] = part
    return {path: Fit(**fields) for path, fields in parts.items()}


def fit_place(keys: tuple[Any, ...]) -> tuple[str, str]:
    """The path of a leaf and the field of its `Fit`, from a key path into `fits`."""
    keys = tuple(keys)
    if keys[-1] == jax.tree_util.GetAttrKey("value"):  # of a Flax NNX variable
        keys = keys[:-1]
    return path_of(keys[:-1]), path_of(keys[-1:])


def is_state(node: Any) -> bool:
    return isinstance(node, BinaryRelaxState)
