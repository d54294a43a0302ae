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

from brelax_jax._boxes import box_scale, boxes_with_paths, masked_but
from brelax_jax._proximal import ProximalMap, Relaxation
from brelax_jax._schedules import Continuation
from brelax_jax._select import Selection, Sets, as_selection
from brelax_jax._tree import compute_after, leaves_with_paths, map_at, with_leaves
from brelax_jax.sets import QuantizedSet, promoted
from brelax_jax.transforms._checks import check_base, check_given_once, check_options
from brelax_jax.transforms._grid import LANDING
from brelax_jax.transforms._leaf import codes_of, fit_leaves, update_leaf
from brelax_jax.transforms._start import (
    blank_fit,
    check_has_values,
    current_fits,
    float_copy,
    float_weights,
)
from brelax_jax.transforms._state import (
    Assignment,
    BinaryRelaxState,
    check_known,
    check_owned,
    current_sets,
    find_states,
    fits_of,
    sets_of,
    with_fits,
)
from brelax_jax.transforms._strength import next_step
from brelax_jax.transforms._warnings import warn_of_crossing, warn_of_saturation, warn_of_vanishing

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
    levels, bit for bit, under plain `optax.apply_updates`. The params then equal
    `quantized_params`. This holds from `hard_from` on if at least eight updates came before it,
    else from the third such update. In phase II a scale that jumps more than 16-fold in one step
    (twofold for 16-bit params) is held back for that step. A 16-bit dtype holds few scales for many
    levels: with bfloat16 params, Uniform(7), Uniform(8) and PowerOfTwo(5) get powers of two as
    scales, and may miss the set in a step in which a scale changes.

    Args:
      base: the optimizer. It sees the float weights as its `params`, and gradients in their dtype.
      qset: one set for all kernels (docs/different_layers.md says what a kernel is); or the rules
        of `select`; or, as `optax.partition` takes labels, a tree of sets and None like the params,
        or a function from params to such a tree. A set at a leaf is for that leaf, and a set at a
        subtree is for its kernels. Inside `inject_hyperparams`, which takes functions for
        schedules, write `select(function)`.
      lam: λ ≥ 0; or a schedule from the step count (0 at the first update) to λ; or a
        `Continuation`, which sets `hard_from` too. 0 is float training, ∞ is phase II. If a
        schedule gives less than 0, that counts as 0.
      hard_from: the step count at which phase II begins; None for never. The learning rate should
        be small from there on.
      float_dtype: the least dtype of the float weights, of 16 bits or more; wider params keep their
        own.
      track_flips: whether the state keeps the codes before the last update, one int8 a weight, for
        the share of flips in `metrics`.
      proximal_map: how phase I pulls the float weights: `Relaxation()`, the default;
        `PiecewiseAffine()` (see `parq`); or `SoftThreshold(updates_float_params=True)` (ProxQuant).
        λ is the parameter of this map.

    Returns:
      A transformation whose `update` needs `params` and forwards extra arguments to `base`. The
      next update overwrites edits to params between updates; see `with_float_params`.

    Raises:
      ValueError: if an argument is not of the kind described, or if `lam` or `hard_from` is
        negative. At `init`, if the sets do not fit the params. At `update`, if `params` is missing
        or the state was made for other params or sets.

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
    check_has_values(params)
    sets = settings.selection.assign(params)
    boxes, given = boxes_with_paths(params), dict(leaves_with_paths(params))
    warn_of_vanishing(sets, given)
    warn_of_saturation(sets, given)
    warn_of_crossing(sets, given)
    floats = {path: float_copy(given[path], settings.float_dtype) for path in sets}
    fits = {path: blank_fit(qset, floats[path]) for path, qset in sets.items()}

    def by_path(arrays: dict[str, Array | None]) -> Any:
        """In boxes like the params'. For params without leaves one number: `map_params` of Optax
        takes it for the pattern of any such dict.
        """
        if not given:
            return jnp.zeros(())
        return {
            path: box_scale(boxes[path], x, jnp.shape(given[path]))
            for path, x in arrays.items()
            if x is not None
        }

    codes: Any = optax.EmptyState()
    if settings.track_flips:
        blank = {path: codes_of(sets[path], y, fits[path]) for path, y in floats.items()}
        codes = masked_but(params, blank)
    return BinaryRelaxState(
        base_state=settings.base.init(with_leaves(params, floats)),
        float_params=masked_but(params, floats),
        scales=by_path({path: fit.scale for path, fit in fits.items()}),
        code_scales=by_path({path: fit.code_scale for path, fit in fits.items()}),
        codes=codes,
        count=jnp.zeros((), jnp.int32),
        lam=jnp.zeros((), promoted("float32", *(y.dtype for y in floats.values()))),
        updates_on_grid=jnp.zeros((), jnp.int32),
        started=jnp.array(False),
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
    find_states(state)  # it is one
    check_owned(state, params)
    sets = current_sets(sets_of(state, params), params, settings.selection)
    given = dict(leaves_with_paths(params))
    check_known(state, params)
    last = fits_of(state, sets)
    before = float_weights(state, given)
    codes, are_read = _last_codes(state, sets, before, given)
    grads = map_at(lambda g, y: g.astype(y.dtype), updates, before)
    base_updates, base_state = settings.base.update(
        grads, state.base_state, with_leaves(params, before), **extra
    )
    moved = map_at(lambda u, y: _sum(y, jnp.where(are_read, u, 0)), base_updates, before)
    floats = {path: leaf for path, leaf in leaves_with_paths(moved) if path in sets}
    fits = fit_leaves(sets, floats, given, last)
    lam, step = next_step(settings.lam, settings.hard_from, state)
    leaves = {
        path: update_leaf(
            settings.proximal_map, qset, step, given[path], floats[path], fits[path], last[path]
        )
        for path, qset in sets.items()
    }
    new_fits = {path: leaf.fit for path, leaf in leaves.items()}
    return with_leaves(base_updates, {path: leaf.update for path, leaf in leaves.items()}), (
        with_fits(state, new_fits)._replace(
            base_state=base_state,
            float_params=with_leaves(
                state.float_params, {path: leaf.y for path, leaf in leaves.items()}
            ),
            codes=with_leaves(state.codes, codes),
            count=jnp.asarray(optax.safe_increment(state.count)),
            lam=lam,
            updates_on_grid=jnp.where(
                step.exact, jnp.minimum(state.updates_on_grid + 1, LANDING), 0
            ),
            started=jnp.ones_like(state.started),
            sets=Assignment(settings.selection, tuple(sets.items())),
        )
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


def _last_codes(
    state: BinaryRelaxState,
    sets: dict[str, QuantizedSet],
    floats: dict[str, Array],
    params: dict[str, Any],
) -> tuple[dict[str, Array], Array]:
    """The codes before this update if flips are tracked, and a scalar that is true once they are
    computed.

    XLA writes new float weights in place of the old ones. It would copy these first, because it
    does not see that their codes can be read before.
    """

    def read(floats: dict[str, Array]) -> tuple[dict[str, Array], Array]:
        fits = current_fits(state, sets, floats, params)
        codes = {path: codes_of(sets[path], y, fits[path]) for path, y in floats.items()}
        return codes, jnp.array(True)

    if not jax.tree.leaves(state.codes):
        return {}, jnp.array(True)
    return compute_after(state.count, read, floats)
