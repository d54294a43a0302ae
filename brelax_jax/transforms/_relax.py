"""BinaryRelax as an Optax gradient transformation."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from brelax_jax._envelope import strength_of
from brelax_jax._order import in_turn
from brelax_jax._proximal import ProximalMap, Relaxation
from brelax_jax._select import (
    Selection,
    as_selection,
    is_masked,
    map_with_path,
    register_with_flax,
)
from brelax_jax.sets import Fit, QuantizedSet
from brelax_jax.transforms._grid import (
    LANDING,
    LEAD,
    follow,
    grid_of,
    landing_point,
    place_on_grid,
)
from brelax_jax.transforms._state import (
    BinaryRelaxState,
    check_same_params,
    codes_of,
    fit_leaf,
)

RELAXATION = Relaxation()


def binary_relax(
    base: optax.GradientTransformation,
    qset: QuantizedSet | Selection,
    lam: ArrayLike | Callable[[ArrayLike], ArrayLike],
    hard_from: ArrayLike | None = None,
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
        scale or embedding), or the rules of `select`.
      lam: λ ≥ 0, or a schedule from the step count (0 at the first update) to λ. 0 is float
        training, ∞ phase II. What a schedule gives below 0 counts as 0.
      hard_from: the step count from which on the projection is exact; None for never. Set the
        learning rate of phase II beside it: it should be small.
      float_dtype: the least dtype of the float weights; wider params keep their own.
      track_flips: whether the state keeps the codes before the last update, one int8 a weight, for
        the share of flips in `metrics`.
      proximal_map: how phase I pulls the float weights, `Relaxation()` unless told:
        `PiecewiseAffine()` (see `parq`), `SoftThreshold(eager=True)` (ProxQuant). λ is theirs.

    Returns:
      A transformation whose `update` needs `params` and forwards extra arguments to `base`. Edits
      to params between updates are overwritten by the next one; see `with_float_params`.

    Raises:
      ValueError: if an argument is not of the kind described, or `lam` or `hard_from` negative; at
        `init`, if the rules do not fit the params; at `update`, if `params` is missing or the state
        was made for other params.

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
    _check_arguments(base, qset, lam, hard_from, proximal_map)
    hard_from = _reached(hard_from)
    selection = as_selection(qset)
    register_with_flax()
    base = optax.with_extra_args_support(base)

    def each(function: Callable[..., Any], params: Any, *trees: Any) -> Any:
        """function(qset, p, …) of each quantized leaf; masked nodes in the place of the others."""

        def leaf(path: str, p: Any, *parts: Any) -> Any:
            if is_masked(parts[0]):
                return parts[0]
            return function(selection.the_set_of(path, p), p, *parts)

        return map_with_path(leaf, params, *trees)

    def codes_in(params: Any, tracked: Any, floats: Any, fits: Any) -> Any:
        def codes(qset: QuantizedSet, _p: Any, _tracked: Array, y: Array, fit: Fit) -> Array:
            return codes_of(qset, y, fit)

        return each(codes, params, tracked, floats, fits)

    def init(params: optax.Params) -> BinaryRelaxState:
        selection.check(params)

        def float_copy(path: str, p: Any) -> Any:
            if selection.set_of(path, p) is None:
                return optax.MaskedNode()
            return jnp.array(p, jnp.promote_types(jnp.result_type(p), float_dtype), copy=True)

        floats = map_with_path(float_copy, params)
        fits = _fits(params, floats)
        tracked = floats if track_flips else jax.tree.map(lambda _: optax.MaskedNode(), params)
        return BinaryRelaxState(
            base_state=base.init(_filled(floats, params)),
            float_params=floats,
            fits=fits,
            codes=codes_in(params, tracked, floats, fits),
            count=jnp.zeros((), jnp.int32),
            lam=jnp.zeros((), jnp.float32),
            landed=jnp.zeros((), jnp.int32),
            selection=selection,
        )

    def update(
        updates: optax.Updates,
        state: BinaryRelaxState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[Any, BinaryRelaxState]:
        if params is None:
            raise ValueError(
                "params is None, but this transformation needs the current ones: "
                "call update(grads, state, params)."
            )
        check_same_params(state, params)
        codes, done = state.codes, True
        if jax.tree.leaves(codes):

            def last_codes(floats: Any) -> tuple[Any, Array]:
                return codes_in(params, state.codes, floats, state.fits), jnp.array(True)

            # XLA writes new float weights in the place of the old ones, and would copy these first,
            # because it does not see that their codes can be read before.
            codes, done = in_turn(state.count, last_codes, state.float_params)
        grads = _where_quantized(lambda y, g: g.astype(y.dtype), state.float_params, updates)
        base_updates, base_state = base.update(
            grads, state.base_state, _filled(state.float_params, params), **extra_args
        )
        floats = jax.tree.map(
            lambda y, u: y if is_masked(y) else (y + jnp.where(done, u, 0)).astype(y.dtype),
            state.float_params,
            base_updates,
            is_leaf=is_masked,
        )
        fits = _fits(params, floats, state.fits)
        now = jnp.asarray(lam(state.count) if callable(lam) else lam, jnp.float32)
        now = jnp.maximum(now, 0)  # a schedule or a tracer may be negative, without an error
        exact = jnp.array(False)
        if hard_from is not None:
            now = jnp.where(state.count >= hard_from, jnp.inf, now)
            exact = state.count >= jnp.asarray(hard_from) - LEAD
        alpha = strength_of(now)
        exact |= alpha == 1
        landing = _Landing(exact, state.landed >= LANDING)

        def held(qset: QuantizedSet, p: Array, fit: Fit, last: Fit) -> Fit:
            return _where(exact, follow(fit, last, qset, p.dtype), fit)

        fits = each(held, params, fits, state.fits)
        pulled = each(functools.partial(_pulled, proximal_map, alpha), params, floats, fits)
        steps = each(functools.partial(_step, landing), params, pulled, fits)
        updates = _where_quantized(lambda step, _: step, steps, base_updates)
        if proximal_map.eager:
            floats = pulled
            fits = each(functools.partial(_settled, alpha), params, fits)
        return updates, BinaryRelaxState(
            base_state,
            floats,
            fits,
            codes,
            jnp.asarray(optax.safe_increment(state.count)),
            now,
            jnp.where(exact, jnp.minimum(state.landed + 1, LANDING), 0),
            selection,
        )

    def _fits(params: Any, floats: Any, *last: Any) -> Any:
        largest = jnp.zeros((), jnp.float32)  # scale of the leaf before

        def fit(qset: QuantizedSet, p: Any, y: Array, *last: Fit) -> Fit:
            nonlocal largest
            if len(qset.magnitudes) == 1:  # a mean, no search
                return fit_leaf(qset, y, p)
            result = in_turn(largest, lambda y: fit_leaf(qset, y, p, *last), y)
            largest = jnp.max(result.scale)
            return result

        return each(fit, params, floats, *last)

    return optax.GradientTransformationExtraArgs(
        cast(optax.TransformInitFn, init), cast(optax.TransformUpdateExtraArgsFn, update)
    )


class _Landing(NamedTuple):
    """Where the params of one update may be, as scalars.

    Attributes:
      exact: whether they are to be on their grids.
      landed: whether they are on the grids of the update before.
    """

    exact: Array
    landed: Array


def _pulled(
    proximal_map: ProximalMap, alpha: Array, qset: QuantizedSet, p: Array, y: Array, fit: Fit
) -> Array:
    """The pseudo-quantized weights for the float weights y of the param p."""
    quantized = place_on_grid(y, fit, qset, p.dtype)
    return proximal_map.pull(y, quantized, qset, fit, alpha.astype(y.dtype))


def _settled(alpha: Array, qset: QuantizedSet, p: Array, fit: Fit) -> Fit:
    """The fit that places weights which are on their levels already, if they are."""
    if fit.cut is None:
        return fit
    return fit._replace(cut=jnp.where(alpha == 1, fit.scale / 2, fit.cut))


def _step(landing: _Landing, qset: QuantizedSet, p: Array, w: Array, fit: Fit) -> Array:
    """The update of one leaf: from p to the weights w, on the grid if they are to be exact."""
    groups = qset.granularity.groups(w.shape)
    grid = grid_of(fit.scale.reshape(groups.scale_view), qset, p.dtype)
    w, now = w.reshape(groups.view), p.reshape(groups.view)
    w = jnp.where(landing.exact, landing_point(w, now, grid, landing.landed), w)
    return (w - now.astype(w.dtype)).astype(p.dtype).reshape(p.shape)


def _where(condition: Array, fit: Fit, other: Fit) -> Fit:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), fit, other)


def _filled(floats: Any, params: Any) -> Any:
    """The params with the float weights in the place of the quantized leaves."""
    return jax.tree.map(lambda p, y: p if is_masked(y) else y, params, floats)


def _where_quantized(function: Callable[..., Any], floats: Any, tree: Any) -> Any:
    """function(y, leaf) on the leaves that have float weights y, the others as they are."""
    return jax.tree.map(lambda leaf, y: leaf if is_masked(y) else function(y, leaf), tree, floats)


def _check_arguments(base: Any, qset: Any, lam: Any, hard_from: Any, proximal_map: Any) -> None:
    if not (hasattr(base, "init") and hasattr(base, "update")):
        raise ValueError(
            f"base must be an optax.GradientTransformation, such as optax.sgd(0.1), got {base!r}."
        )
    if not isinstance(qset, QuantizedSet | Selection):
        raise ValueError(
            f"qset must be a set such as Ternary() or the rules of select(…), got {qset!r}."
        )
    if not isinstance(proximal_map, ProximalMap):
        raise ValueError(
            "proximal_map must be Relaxation(), PiecewiseAffine() or SoftThreshold(…), "
            f"got {proximal_map!r}."
        )
    if lam is None or isinstance(lam, str):
        raise ValueError(f"lam must be a number or a schedule of the step count, got {lam!r}.")
    known = not callable(lam) and not isinstance(lam, jax.core.Tracer)
    if known and np.ndim(cast(Any, lam)) != 0:
        raise ValueError(f"lam must be one number or a schedule of the step count, got {lam!r}.")
    if known and not np.asarray(lam) >= 0:
        raise ValueError(
            f"lam must be nonnegative (0 is float training, inf the exact projection), got {lam!r}."
        )
    if hard_from is None or isinstance(hard_from, jax.core.Tracer):
        return
    step = np.asarray(hard_from)
    number = np.issubdtype(step.dtype, np.number)
    if step.ndim != 0 or not number or not (step >= 0 and step == np.floor(step)):
        raise ValueError(
            f"hard_from must be a step count from 0 on, or None for never, got {hard_from!r}."
        )


def _reached(hard_from: Any) -> Any:
    """`hard_from`, or None if it is beyond the int32 at which the count stops."""
    if hard_from is None or isinstance(hard_from, jax.core.Tracer):
        return hard_from
    return None if np.asarray(hard_from) > np.iinfo(np.int32).max else hard_from
