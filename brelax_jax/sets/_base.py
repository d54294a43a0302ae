"""What every quantized set is: levels, a granularity, a scale, and the projection they make."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from brelax_jax._arguments import is_number
from brelax_jax.sets._fit import FLOATS, Fit, fit_array, fit_finely
from brelax_jax.sets._granularity import Granularity, Groups, PerTensor, groups_of
from brelax_jax.sets._group import Group
from brelax_jax.sets._levels import at_index, level_index
from brelax_jax.sets._quantized import Quantized, without_negative_zero
from brelax_jax.sets._rules import least_squares_scale


@dataclasses.dataclass(frozen=True)
class QuantizedSet:
    """Q = { s·q : s ≥ 0, q ∈ Lⁿ } for each scale group, with a symmetric level set L.

    The sets of this library derive from it. A new one states its `levels`; only if its scale is not
    to be the least-squares one does it need a `fit_groups` of its own.

    Attributes:
      granularity: which weights share a scale s.
      tolerance: in training, how far the squared error may be above the least one, relative, before
        a scale is searched for anew; until then that of the same codes follows the weights. 0
        always takes the least, and may jump from one step to the next (docs/projections.md).
        `project` and `quantize` see no step before, and take the least in any case.
      levels: L, ascending, at scale 1.
    """

    granularity: Granularity = dataclasses.field(default=PerTensor(), kw_only=True)
    tolerance: float = dataclasses.field(default=0.0, kw_only=True)
    levels: tuple[float, ...] = dataclasses.field(init=False, repr=False)

    def _init_fields(self, **attributes: object) -> None:
        """Sets attributes of a frozen instance, once, in `__post_init__`."""
        if isinstance(self.granularity, type) or not hasattr(self.granularity, "groups"):
            raise ValueError(
                "granularity must be PerTensor(), PerChannel(axis) or PerBlock(size, axis), "
                f"got {self.granularity!r}."
            )
        for name, value in attributes.items():
            object.__setattr__(self, name, value)
        if is_number(self.tolerance):
            object.__setattr__(self, "tolerance", float(self.tolerance))
        if not (is_number(self.tolerance) and 0 <= self.tolerance < 1):
            raise ValueError(
                f"tolerance must be a number from 0 to less than 1, got {self.tolerance!r}."
            )
        if self.tolerance and not self._searched:
            raise ValueError(
                f"tolerance is for sets whose scale is searched for, got {self.tolerance!r}; "
                f"{type(self).__name__}'s is a formula, which does not jump: leave it out."
            )

    @property
    def _searched(self) -> bool:
        """Whether the scale is the best one of a search, not a formula."""
        least_squares = type(self).fit_groups is QuantizedSet.fit_groups
        return least_squares and len(self.magnitudes) > 1

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The nonnegative levels, ascending."""
        return tuple(level for level in self.levels if level >= 0)

    @property
    def is_mean(self) -> bool:
        """Whether the scale is a mean of magnitudes, by this library's own rules."""
        least_squares = type(self).fit_groups is QuantizedSet.fit_groups
        return least_squares and len(self.magnitudes) == 1

    def project(self, w: ArrayLike) -> Array:
        """argmin over u ∈ Q of ‖u − w‖².

        Differentiable almost everywhere, by the projection's own derivative: q·⟨q, ·⟩/⟨q, q⟩ in
        each group.

        Args:
          w: floating array of any shape.

        Returns:
          The projection, of w's shape and dtype. A group that holds NaN or infinity becomes NaN.

        Raises:
          TypeError: if w is not of a floating dtype.
          ValueError: if the granularity does not fit w's shape.
        """
        return _project(self, self._checked(w))

    def quantize(self, w: ArrayLike) -> Quantized:
        """The projection as integer codes and scales; `quantize(w).dequantize()` is `project(w)`,
        bit for bit.

        The scales are found anew. For weights that a transformation put on the set they need not be
        the ones that it used; `quantized_tree` gives those.

        Args:
          w: floating array of any shape.

        Returns:
          The codes (int8, w's shape) and the scales (at least float32).

        Raises:
          TypeError: if w is not of a floating dtype.
          ValueError: if the granularity does not fit w's shape.
        """
        w = self._checked(w)
        return _quantize(self, w)

    def fit(self, w: Array, last: Fit | None = None) -> Fit:
        """What places w on this set: the scale of each group.

        Args:
          w: floats.
          last: the fit of the weights from which w came by a step, kept as `tolerance` says.
        """
        return fit_array(self, w, last if self.tolerance and self._searched else None)

    def fit_groups(self, w: Array, group: Group) -> Fit:
        """As `fit`, for w in a view in which the sum of each group is `group.sum(w)`.

        Args:
          w: floats, at least float32; not empty.
          group: the reductions over a group. A scale is of the shape of their results.
        """
        return Fit(least_squares_scale(w, self.magnitudes, group))

    def codes(self, w: Array, fit: Fit) -> Array:
        """Signed indices into the magnitudes, for w placed by `fit`; floats of w's shape."""
        view, scale, cut = self.views(w, fit)
        a = jnp.abs(view)
        index = level_index(a, scale, self.magnitudes) if cut is None else (a > cut).astype(a.dtype)
        index += len(self.table) - len(self.magnitudes)
        return jnp.where((view < 0) & (index > 0), -index, index).reshape(w.shape)

    def place(self, w: Array, fit: Fit) -> Array:
        """The points of Q for w placed by `fit`, of w's shape and the scale's dtype."""
        view, scale, _ = self.views(self.at_unit_scale(w, fit), fit)
        return (view * scale).reshape(w.shape)

    def half_gaps(self, w: Array, fit: Fit) -> Array:
        """Half the distance between the two points of Q that each entry of w is between, of w's
        shape and the scale's dtype; 0 beyond the last.
        """
        view, scale, _ = self.views(w, fit)
        bounds = self.magnitudes if self.magnitudes[0] else self.magnitudes[1:]
        first = 1.0 if self.magnitudes[0] == 0 else 2.0  # with no level 0: from −m to m
        gaps = [first * bounds[0], *(high - low for low, high in itertools.pairwise(bounds)), 0.0]
        # Not abs, which XLA would compute once for this and the scale, and keep for every leaf.
        a, half = jnp.maximum(view, -view), jnp.full_like(view, gaps[0] / 2)
        for bound, (last, gap) in zip(bounds, itertools.pairwise(gaps), strict=True):
            if gap != last:
                half = jnp.where(a > bound * scale, gap / 2, half)
        return (half * scale).reshape(w.shape)

    def scales(self, w: Array, fit: Fit) -> Array:
        """The scale of each entry of w, of w's shape."""
        view, scale, _ = self.views(w, fit)
        return jnp.broadcast_to(scale, view.shape).reshape(w.shape)

    def at_unit_scale(self, w: Array, fit: Fit) -> Array:
        codes = self.codes(w, fit)
        magnitude = at_index(jnp.abs(codes), self.table)
        return jnp.where(codes < 0, -magnitude, magnitude)

    @property
    def table(self) -> tuple[float, ...]:
        """What codes index: the magnitudes from 0 on, so that codes of other levels have a sign."""
        return self.magnitudes if self.magnitudes[0] == 0 else (0.0, *self.magnitudes)

    def views(self, w: Array, fit: Fit) -> tuple[Array, Array, Array | None]:
        """w in the scale's dtype, the scale and the cut, in the view in which they broadcast."""
        groups: Groups = self.granularity.groups(w.shape)
        cut = None if fit.cut is None else fit.cut.reshape(groups.scale_view)
        return (
            w.astype(fit.scale.dtype).reshape(groups.view),
            fit.scale.reshape(groups.scale_view),
            cut,
        )

    def _checked(self, w: ArrayLike) -> Array:
        w = jnp.asarray(w)
        if w.dtype.name not in FLOATS:
            raise TypeError(
                f"w must be of a floating dtype, one of {', '.join(FLOATS)}, got {w.dtype}; "
                "convert it, for example to float32."
            )
        groups_of(self.granularity, w)
        return w


@functools.partial(jax.jit, static_argnums=0)
def _quantize(qset: QuantizedSet, w: Array) -> Quantized:
    fit = fit_finely(qset, w)
    codes = qset.codes(w, fit).astype(jnp.int8)
    has_zero = qset.magnitudes[0] == 0
    return Quantized(codes, fit.scale, qset.table, jnp.dtype(w.dtype), has_zero=has_zero)


@functools.partial(jax.jit, static_argnums=0)
def _project(qset: QuantizedSet, w: Array) -> Array:
    return _differentiable(qset, w)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(qset: QuantizedSet, w: Array) -> Array:
    return without_negative_zero(qset.place(w, fit_finely(qset, w)).astype(w.dtype))


@_differentiable.defjvp
def _project_jvp(
    qset: QuantizedSet, primals: Sequence[Array], tangents: Sequence[Array]
) -> tuple[Array, Array]:
    """With the codes q locally constant, the scale is ⟨q, w⟩/⟨q, q⟩, linear in w."""
    (w,), (tangent,) = primals, tangents
    fit = fit_finely(qset, w)
    groups = qset.granularity.groups(w.shape)
    q = qset.at_unit_scale(w, fit).reshape(groups.view)
    along = groups.group.sum(q * tangent.astype(q.dtype).reshape(groups.view))
    norm = groups.group.sum(jnp.square(q))
    derivative = q * (along / jnp.where(norm > 0, norm, 1))
    projection = without_negative_zero(qset.place(w, fit).astype(w.dtype))
    return projection, derivative.reshape(w.shape).astype(w.dtype)
