"""BinaryRelax as an Optax gradient transformation."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from brelax_jax._envelope import strength_of
from brelax_jax._proximal import ProximalMap, Relaxation
from brelax_jax._schedules import Continuation
from brelax_jax._select import Selection, Sets, as_selection
from brelax_jax._tree import (
    compute_after,
    leaves_with_paths,
    map_quantized,
    map_with_path,
    register_with_flax,
    with_leaves,
)
from brelax_jax.sets import Fit, QuantizedSet
from brelax_jax.transforms._checks import check_base, check_given_once, check_options
from brelax_jax.transforms._grid import LANDING, LEAD
from brelax_jax.transforms._leaf import Step, codes_of, fit_leaves, update_leaf
from brelax_jax.transforms._state import (
    Assignment,
    BinaryRelaxState,
    check_known,
    check_owned,
    check_same_sets,
    fits_by_path,
    sets_of,
)

RELAXATION = Relaxation()
LAST_COUNT = np.iinfo(np.int32).max  # the count stops there
Lam: TypeAlias = ArrayLike | Callable[[ArrayLike], ArrayLike] | Continuation


def binary_relax(
    base: optax.GradientTransformation,
    qset: Sets,
    lam: Lam,
    hard_from: ArrayLike | None = None,
    *,
    float_dtype: DTypeLike = "float32",
    track_flips: bool = False,
    proximal_map: ProximalMap = RELAXATION,
) -> optax.GradientTransformationExtraArgs:
    """Wraps an optimizer so that the params it trains end up exactly on quantized sets.

    The base optimizer works on float weights y, kept in the state: its momentum, weight decay,
    trust ratios and clipping all act on them. The params that the network computes with are

        w = argmin over u of ½·‖u − y‖² + λ/2·dist(u, Q)²
          = (λ·proj_Q(y) + y)/(λ + 1)                       before step `hard_from` (phase I)
        w = proj_Q(y)                                       from it on (phase II)

    In phase II every scale group of the params holds at most as many distinct values as the set has
    levels, bit for bit, under plain `optax.apply_updates`, and equals `quantized_params`: from
    `hard_from` on if at least eight updates came before it, else from the third such update. There
    a scale that jumps more than 16-fold in one step (twofold for 16-bit params) is held back for
    that step. The 16-bit dtypes hold few scales for many levels: with bfloat16 params Uniform(7),
    Uniform(8) and PowerOfTwo(5) get powers of two, and may miss where one changes.

    Args:
      base: the optimizer. It sees the float weights as its `params`, and gradients in their dtype.
      qset: one set for all kernels (floating leaves of rank 2 or more whose last name is not bias,
        scale or embedding), the rules of `select`, or, as `optax.partition` takes labels, a tree of
        sets and None like the params, or a function from params to one (inside
        `inject_hyperparams`, which takes functions for schedules: `select(function)`). There a set
        in the place of a leaf is for that leaf, and in the place of a subtree for its kernels.
      lam: λ ≥ 0, or a schedule from the step count (0 at the first update) to λ. 0 is float
        training, ∞ phase II. What a schedule gives below 0 counts as 0. Or a `Continuation`, which
        sets `hard_from` too.
      hard_from: the step count from which on the projection is exact; None for never. Set the
        learning rate of phase II beside it: it should be small.
      float_dtype: the least dtype of the float weights, of 16 bits or more; wider params keep their
        own.
      track_flips: whether the state keeps the codes before the last update, one int8 a weight, for
        the share of flips in `metrics`.
      proximal_map: how phase I pulls the float weights, `Relaxation()` unless told:
        `PiecewiseAffine()` (see `parq`), `SoftThreshold(updates_float_params=True)` (ProxQuant). λ
        is theirs.

    Returns:
      A transformation whose `update` needs `params` and forwards extra arguments to `base`. Edits
      to params between updates are overwritten by the next one; see `with_float_params`.

    Raises:
      ValueError: if an argument is not of the kind described, or `lam` or `hard_from` negative; at
        `init`, if the sets do not fit the params; at `update`, if `params` is missing or the state
        was made for other params or sets.

    References:
      Yin et al., BinaryRelax, 2018 (arXiv 1801.06313), algorithm 1.

    >>> import brelax_jax as brx, jax, jax.numpy as jnp, optax
    >>> optimizer = brx.binary_relax(
    ...     optax.sgd(0.1), brx.Binary(), lam=brx.geometric_continuation(growth=1.1), hard_from=40
    ... )
    >>> params = {"kernel": jnp.array([[0.1, 0.7], [-0.4, 0.2]])}
    >>> state = optimizer.init(params)
    >>> def loss(params):
    ...     return jnp.sum((params["kernel"] - jnp.array([[0.5, 0.5], [-0.5, -0.5]])) ** 2)
    >>> for _ in range(50):
    ...     updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> params["kernel"].round(2)
    Array([[ 0.5,  0.5],
           [-0.5, -0.5]], dtype=float32)
    """
    if isinstance(lam, Continuation):
        check_given_once(lam, hard_from)
        lam, hard_from = lam
    check_base(base)
    selection = as_selection(qset)
    check_options(lam, hard_from, float_dtype, proximal_map)
    if not isinstance(hard_from, jax.core.Tracer | None) and np.asarray(hard_from) > LAST_COUNT:
        hard_from = None
    base = optax.with_extra_args_support(base)
    register_with_flax(Assignment)
    settings = _Settings(base, selection, lam, hard_from, float_dtype, track_flips, proximal_map)
    return optax.GradientTransformationExtraArgs(
        cast(optax.TransformInitFn, partial(_init, settings)),
        cast(optax.TransformUpdateExtraArgsFn, partial(_update, settings)),
    )


class _Settings(NamedTuple):
    """The arguments of `binary_relax`."""

    base: optax.GradientTransformationExtraArgs
    selection: Selection
    lam: ArrayLike | Callable[[ArrayLike], ArrayLike]
    hard_from: ArrayLike | None
    float_dtype: DTypeLike
    track_flips: bool
    proximal_map: ProximalMap


def _init(settings: _Settings, params: Any) -> BinaryRelaxState:
    sets = settings.selection.assign(params)
    given = dict(leaves_with_paths(params))

    def float_copy(path: str) -> Array:
        dtype = jnp.promote_types(jnp.result_type(given[path]), settings.float_dtype)
        return jnp.array(given[path], dtype, copy=True)

    floats = {path: float_copy(path) for path in sets}
    fits = fit_leaves(sets, floats, given)
    codes: dict[str, Array] = {}
    if settings.track_flips:
        codes = {path: codes_of(sets[path], floats[path], fits[path]) for path in sets}

    def masked_but(leaves: dict[str, Any]) -> Any:
        return map_with_path(lambda path, _: leaves.get(path, optax.MaskedNode()), params)

    return BinaryRelaxState(
        base_state=settings.base.init(with_leaves(params, floats)),
        float_params=masked_but(floats),
        fits=masked_but(fits),
        codes=masked_but(codes),
        count=jnp.zeros((), jnp.int32),
        lam=jnp.zeros((), jnp.float32),
        updates_on_grid=jnp.zeros((), jnp.int32),
        sets=Assignment(settings.selection, tuple(sets.items()) if given else None),
    )


def _update(
    settings: _Settings, updates: Any, state: BinaryRelaxState, params: Any = None, **extra: Any
) -> tuple[Any, BinaryRelaxState]:
    if params is None:
        raise ValueError(
            "params is None, but this transformation needs the current ones: "
            "call update(grads, state, params)."
        )
    check_owned(state, params)
    sets, given = sets_of(state, params), dict(leaves_with_paths(params))
    check_same_sets(sets, params, settings.selection)
    check_known(state, params)
    before, last = dict(leaves_with_paths(state.float_params)), fits_by_path(state)
    codes, are_read = _last_codes(state, sets, before, last)
    grads = map_quantized(lambda g, y: g.astype(y.dtype), updates, state.float_params)
    base_updates, base_state = settings.base.update(
        grads, state.base_state, with_leaves(params, before), **extra
    )
    moved = map_quantized(
        lambda u, y: _sum(y, jnp.where(are_read, u, 0)), base_updates, state.float_params
    )
    floats = {path: leaf for path, leaf in leaves_with_paths(moved) if path in sets}
    fits = fit_leaves(sets, floats, given, last)
    lam, step = _step(settings, state)
    leaves = {
        path: update_leaf(
            settings.proximal_map, qset, step, given[path], floats[path], fits[path], last[path]
        )
        for path, qset in sets.items()
    }

    def with_updated(tree: Any, field: str) -> Any:
        return with_leaves(tree, {path: getattr(leaf, field) for path, leaf in leaves.items()})

    return with_updated(base_updates, "update"), BinaryRelaxState(
        base_state=base_state,
        float_params=with_updated(state.float_params, "y"),
        fits=with_updated(state.float_params, "fit"),
        codes=with_leaves(state.codes, codes),
        count=jnp.asarray(optax.safe_increment(state.count)),
        lam=lam,
        updates_on_grid=jnp.where(step.exact, jnp.minimum(state.updates_on_grid + 1, LANDING), 0),
        sets=Assignment(settings.selection, tuple(sets.items())),
    )


def _sum(y: Array, u: Array) -> Array:
    """y + u in y's dtype, rounded to it.

    XLA may leave out that rounding where what follows is computed in float32, as the codes of this
    update are. But they must be those of the float weights that are stored.
    """
    if y.dtype != jnp.bfloat16:
        return (y + u).astype(y.dtype)
    info = jnp.finfo(y.dtype)
    exact = y.astype(jnp.float32) + u.astype(jnp.float32)
    return lax.reduce_precision(exact, info.nexp, info.nmant).astype(y.dtype)


def _step(settings: _Settings, state: BinaryRelaxState) -> tuple[Array, Step]:
    """λ of this update, and what follows from it for all leaves."""
    lam = settings.lam(state.count) if callable(settings.lam) else settings.lam
    lam = jnp.maximum(jnp.asarray(lam, jnp.float32), 0)  # schedules and tracers are not checked
    exact = jnp.array(False)
    if settings.hard_from is not None:
        lam = jnp.where(state.count >= settings.hard_from, jnp.inf, lam)
        exact = state.count >= jnp.asarray(settings.hard_from) - LEAD
    alpha = strength_of(lam)
    exact |= alpha == 1
    return lam, Step(alpha, exact, state.updates_on_grid >= LANDING)


def _last_codes(
    state: BinaryRelaxState,
    sets: dict[str, QuantizedSet],
    floats: dict[str, Array],
    fits: dict[str, Fit],
) -> tuple[dict[str, Array], Array]:
    """The codes before this update if flips are tracked, and a scalar that is true once they are
    computed.

    XLA writes new float weights in the place of the old ones. It would copy these first, because it
    does not see that their codes can be read before.
    """

    def read(floats: dict[str, Array]) -> tuple[dict[str, Array], Array]:
        codes = {path: codes_of(sets[path], y, fits[path]) for path, y in floats.items()}
        return codes, jnp.array(True)

    if not jax.tree.leaves(state.codes):
        return {}, jnp.array(True)
    return compute_after(state.count, read, floats)
