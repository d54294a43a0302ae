"""The state of a relaxing transformation: its fields, how it is found, and what it was made for."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from brelax_jax._select import Selection
from brelax_jax._tree import is_absent, leaves_with_paths, register_with_flax, with_leaves
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

    def __post_init__(self) -> None:
        if any("rule" not in vars(qset) for _, qset in self.pairs or ()):  # in an older pickle
            raise ValueError(EARLIER)

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


class _Fields(NamedTuple):
    """See `BinaryRelaxState`."""

    base_state: Any
    float_params: Any
    scales: Any
    code_scales: Any
    codes: Any
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    lam: Array
    updates_on_grid: Array
    started: Array
    sets: "Assignment"


class BinaryRelaxState(_Fields):
    """State of `binary_relax`, and so of `relax_params`, `binary_connect` and `parq`.

    Attributes:
      base_state: the state of the base optimizer.
      float_params: the float weights y, in the params' tree; `optax.MaskedNode` in place of
        leaves that are not quantized.
      scales: a dict of the scales of each group, by the path of the leaf; 0 before the first
        update.
      code_scales: as `scales`, for rules that place codes by another scale: they are the nearest
        ones at it.
      codes: int8, the codes before the last update, in the params' tree; `optax.EmptyState()`
        unless flips are tracked.
      count: int32, updates so far.
      lam: the λ with which the current params were made: 0 before the first update, the largest
        finite number in phase II. Of the widest dtype of the float weights.
      updates_on_grid: int32, how many updates in a row have put the params on their grids, up to 2.
      started: bool, whether the float weights are those to go on from. If not, the next update
        starts from the params that it is given.
      sets: which leaves are quantized on which sets; a pytree without leaves.
    """

    __slots__ = ()

    @property
    def sets(self) -> "Assignment":  # pyright: ignore[reportIncompatibleVariableOverride]
        """`flax.serialization` reads every field, and needs to know the type of this one by then.
        It may have been imported after the state was made.
        """
        register_with_flax(Assignment)
        return self[-1]


def find_states(opt_state: Any) -> list[BinaryRelaxState]:
    """The states of this library inside an optimizer state, at least one."""
    states = [state for state in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(state)]
    if not states:
        raise ValueError(
            EARLIER
            if is_earlier(opt_state)
            else "opt_state holds no state of binary_relax, relax_params or binary_connect; "
            "pass the whole state that their `init` or `update` returned."
        )
    return states


OTHER_SETS = (
    "Pass the state that this optimizer made, or take another one's over with "
    "brelax_jax.with_rules(opt_state, params, optimizer)."
)
EARLIER = (
    "This state was saved by brelax_jax 0.1.0, whose states this version cannot read. Finish the "
    "run with 0.1.0, or start anew: call `init` on its params, with its float_params in place of "
    "those that are quantized."
)
REMEDY = "Make the state with `init` from these params, or pass what it was made from."


def check_is_one(state: BinaryRelaxState) -> None:
    """Raises a ValueError if it is a stack of states."""
    [count] = jax.tree.leaves(state.count)
    if jnp.ndim(count):
        raise ValueError(
            f"The state is a stack: its count has shape {jnp.shape(count)}. Call this under "
            "jax.vmap, or index the state and the params first."
        )


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
            f"The state has float weights for {lost[0]!r}, but its rules no longer select it. "
            "Outside of shard_map, make the state with `init` and update it once."
        )
    return {path: chosen[path] for path in paths}


def current_sets(
    sets: dict[str, QuantizedSet], params: Any, selection: Selection
) -> dict[str, QuantizedSet]:
    """The sets by a selection, which differ from these at most in how their scale is found.

    Raises:
      ValueError: if the selection gives others; it names the leaf.
    """
    if selection.has_functions and jax.sharding.get_abstract_mesh().manual_axes:
        return sets  # functions may go by shapes, and these are of one device's parts
    wanted = selection.choose(params)
    for path in {**wanted, **sets}:
        if path not in sets:
            raise ValueError(
                f"{path!r} is to be quantized, but the state has no float weights for it. "
                f"{OTHER_SETS}"
            )
        if not _is_same(wanted.get(path), sets[path]):
            raise ValueError(
                f"{path!r} was selected for {sets[path]} when the state was made, but is for "
                f"{wanted.get(path)} now. {OTHER_SETS} A function that selects must always give "
                "the same answer."
            )
    return {path: wanted[path] for path in sets}


def _is_same(one: QuantizedSet | None, other: QuantizedSet) -> bool:
    """Whether two sets have the same points. The scale is found anew at each update, so its rule
    and dtype may change midway.
    """
    return one is not None and (one.levels, one.granularity) == (other.levels, other.granularity)


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


def fits_of(state: BinaryRelaxState, sets: Mapping[str, QuantizedSet]) -> dict[str, Fit]:
    """The last fit of each quantized leaf, by the leaf's path.

    Raises:
      ValueError: if a scale has another shape than its set's.
    """
    scales = dict(leaves_with_paths(state.scales))
    code_scales = dict(leaves_with_paths(state.code_scales))
    fits: dict[str, Fit] = {}
    for path, y in leaves_with_paths(state.float_params):
        wanted = sets[path].granularity.groups(jnp.shape(y)).scale
        if path not in scales or jnp.shape(scales[path]) != wanted:
            found = f"shape {jnp.shape(scales[path])}" if path in scales else "no entry"
            raise ValueError(
                f"The scales of {path!r} have {found} in the state, but {wanted} by {sets[path]}. "
                "Restore the state with the optimizer that made it, and take it to another one's "
                "sets by brelax_jax.with_rules; read a stacked state under jax.vmap."
            )
        fits[path] = Fit(scales[path], code_scales.get(path))
    return fits


def with_fits(state: BinaryRelaxState, fits: Mapping[str, Fit]) -> BinaryRelaxState:
    """The state with these fits."""
    if not fits:
        return state
    scales = with_leaves(state.scales, {path: fit.scale for path, fit in fits.items()})
    others = {path: fit.code_scale for path, fit in fits.items() if fit.code_scale is not None}
    boxes = state.code_scales
    if dict(leaves_with_paths(boxes)).keys() != others.keys():  # the rule is another than before
        boxes = {path: state.scales[path] for path in others}
    return state._replace(scales=scales, code_scales=with_leaves(boxes, others))


def is_earlier(tree: Any) -> bool:
    """Whether a tree has a state of version 0.1.0, restored as a dict of its fields."""

    def has_fields(node: Any) -> bool:
        return isinstance(node, Mapping) and "float_params" in node

    nodes = jax.tree.leaves(tree, is_leaf=has_fields)
    return any(has_fields(node) and node.keys() & {"cuts", "fits"} for node in nodes)


def is_state(node: Any) -> bool:
    return isinstance(node, BinaryRelaxState)
