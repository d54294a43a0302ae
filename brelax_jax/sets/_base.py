"""What all quantized sets share: levels, granularity, scale rule, and the projection."""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from brelax_jax.sets._fit import FLOATS, fit_all, fit_finely
from brelax_jax.sets._granularity import Granularity, Groups, PerTensor, groups_of
from brelax_jax.sets._levels import at_index, level_index, magnitude_of
from brelax_jax.sets._quantized import Quantized, without_negative_zero
from brelax_jax.sets._rules import Fit, Fixed, LeastSquares, ScaleRule
from brelax_jax.sets._scale_dtype import DTYPES, Scales, name_of


@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedSet:
    """Q = { s·q : s ≥ 0, q ∈ Lⁿ } for each scale group, with a symmetric level set L.

    The sets of this library derive from it. A new set defines `levels`.

    Attributes:
      granularity: which weights share a scale s.
      rule: how the scale of a group is found: `LeastSquares()`, the default, which is exact;
        `MeanMagnitude(factor)`, `MaxMagnitude()` or `Fixed(value)`.
      scale_dtype: the dtype whose normal numbers the scales are, for export: "float16", "bfloat16",
        "float8_e4m3fn" or "float8_e8m0fnu" (powers of two); None for all numbers. Scales are still
        kept as float32 or wider. Least squares finds the best scale among these numbers; another
        rule takes the nearest. Scales outside their range become the least or the largest.
      levels: L, ascending, at scale 1.
    """

    granularity: Granularity = dataclasses.field(default=PerTensor(), kw_only=True)
    rule: ScaleRule = dataclasses.field(default=LeastSquares(), kw_only=True)
    scale_dtype: str | None = dataclasses.field(default=None, kw_only=True)
    levels: tuple[float, ...] = dataclasses.field(init=False, repr=False)

    def _init_fields(self, **attributes: object) -> None:
        """Sets attributes of a frozen instance, once, in `__post_init__`."""
        for name, value in attributes.items():
            object.__setattr__(self, name, value)
        if isinstance(self.granularity, type) or not hasattr(self.granularity, "groups"):
            raise ValueError(
                "granularity must be PerTensor(), PerChannel(axis) or PerBlock(size, axis), "
                f"got {self.granularity!r}."
            )
        if not isinstance(self.rule, ScaleRule):
            raise ValueError(
                "rule must be LeastSquares(), MeanMagnitude(factor), MaxMagnitude() or "
                f"Fixed(value), got {self.rule!r}."
            )
        self.rule.check(self.magnitudes, type(self).__name__)
        if self.scale_dtype is not None:
            object.__setattr__(self, "scale_dtype", name_of(self.scale_dtype))

    def __repr__(self) -> str:
        """What differs from the defaults, as it is written."""
        given = [
            f"{field.name}={getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.init and getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    @property
    def is_searched(self) -> bool:
        """Whether the scale is the best one of a search, not a formula."""
        return isinstance(self.rule, LeastSquares) and len(self.magnitudes) > 1

    @property
    def scales_of_dtype(self) -> Scales | None:
        """The scales that there are; None for all."""
        return None if self.scale_dtype is None else DTYPES[self.scale_dtype]

    @property
    def nearest(self) -> "QuantizedSet":
        """This set with the rule that finds its nearest point: the given scale if it is fixed."""
        if isinstance(self.rule, Fixed | LeastSquares):
            return self
        nearest = copy.copy(self)
        object.__setattr__(nearest, "rule", LeastSquares())
        return nearest

    @property
    def magnitudes(self) -> tuple[float, ...]:
        """The nonnegative levels, ascending."""
        return tuple(level for level in self.levels if level >= 0)

    def project(self, w: ArrayLike) -> Array:
        """The point of Q for w: with the rule `LeastSquares`, argmin over u ∈ Q of ‖u − w‖².

        Differentiable almost everywhere, by the projection's own derivative: q·⟨q, ·⟩/⟨q, q⟩ in
        each group with codes q, where the scale is the least-squares one of its codes. With
        `MeanMagnitude(f, refit=False)` it is q·f·mean(sign(w)·), with `MaxMagnitude` q times the
        change of the largest weight over the largest level, with `Fixed` 0. The rounding of a
        `scale_dtype` counts as the identity.

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

        The scales are found anew. They may differ from those with which a transformation put the
        weights on the set; `quantized_tree` gives those.

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
          last: the fit of the weights from which w came by a step, kept as the rule's `tolerance`
            says.
        """
        return fit_all([self], [w], [last])[0]

    def codes(self, w: Array, fit: Fit) -> Array:
        """Signed indices into the magnitudes, for w placed by `fit`; floats of w's shape."""
        w, _, code_scale = self.beside(w, fit)
        index = level_index(magnitude_of(w), code_scale, self.magnitudes)
        index += len(self.table) - len(self.magnitudes)
        return jnp.where((w < 0) & (index > 0), -index, index)

    def place(self, w: Array, fit: Fit) -> Array:
        """The points of Q for w placed by `fit`, of w's shape and the scale's dtype."""
        at_unit_scale, scale, _ = self.beside(self.at_unit_scale(w, fit), fit)
        return at_unit_scale * scale

    def half_gaps(self, w: Array, fit: Fit) -> Array:
        """Half the distance between the two points of Q that each entry of w is between, of w's
        shape and the scale's dtype; 0 beyond the last.
        """
        w, scale, _ = self.beside(w, fit)
        bounds = self.magnitudes if self.magnitudes[0] else self.magnitudes[1:]
        first = 1.0 if self.magnitudes[0] == 0 else 2.0  # with no level 0: from −m to m
        gaps = [first * bounds[0], *(high - low for low, high in itertools.pairwise(bounds)), 0.0]
        # Not abs, which XLA would compute once for this and the scale, and keep for every leaf.
        a, half = jnp.maximum(w, -w), jnp.full_like(w, gaps[0] / 2)
        for bound, (last, gap) in zip(bounds, itertools.pairwise(gaps), strict=True):
            if gap != last:
                half = jnp.where(a > bound * scale, gap / 2, half)
        return half * scale

    def scales(self, w: Array, fit: Fit) -> Array:
        """The scale of each entry of w, of w's shape."""
        return jnp.broadcast_to(self.beside(w, fit)[1], w.shape)

    def at_unit_scale(self, w: Array, fit: Fit) -> Array:
        codes = self.codes(w, fit)
        magnitude = at_index(jnp.abs(codes), self.table)
        return jnp.where(codes < 0, -magnitude, magnitude)

    @property
    def table(self) -> tuple[float, ...]:
        """What codes index: the magnitudes from 0 on, so that codes of other levels have a sign."""
        return self.magnitudes if self.magnitudes[0] == 0 else (0.0, *self.magnitudes)

    def beside(self, w: Array, fit: Fit) -> tuple[Array, Array, Array]:
        """w in the scale's dtype, and as they broadcast against it the scale and the scale at which
        codes are the nearest ones.
        """
        groups: Groups = self.granularity.groups(w.shape)
        scale = groups.spread(fit.scale, w.shape)
        code_scale = scale if fit.code_scale is None else groups.spread(fit.code_scale, w.shape)
        return w.astype(fit.scale.dtype), scale, code_scale

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
    """With the codes q locally constant only the scale changes."""
    (w,), (tangent,) = primals, tangents
    fit = fit_finely(qset, w)
    derivative = qset.at_unit_scale(w, fit) * _scale_derivative(qset, w, fit, tangent)
    projection = without_negative_zero(qset.place(w, fit).astype(w.dtype))
    return projection, derivative.astype(w.dtype)


def _scale_derivative(qset: QuantizedSet, w: Array, fit: Fit, tangent: Array) -> Array:
    """Of the scale of each entry: ⟨q, ·⟩/⟨q, q⟩ where the scale is the least-squares one of the
    codes q; in other rules, their own.
    """
    if w.size == 0:
        return tangent
    tangent = tangent.astype(fit.scale.dtype)
    groups = qset.granularity.groups(w.shape)
    if qset.rule.refits:
        q = qset.at_unit_scale(w, fit).reshape(groups.view)
        along = groups.group.sum(q * tangent.reshape(groups.view))
        norm = groups.group.sum(jnp.square(q))
        derivative = along / jnp.where(norm > 0, norm, 1)
    else:
        _, derivative = jax.jvp(
            lambda view: qset.rule.fit_groups(view, qset.magnitudes, groups.group).scale,
            [w.astype(fit.scale.dtype).reshape(groups.view)],
            [tangent.reshape(groups.view)],
        )
    return jnp.broadcast_to(derivative, groups.view).reshape(w.shape)
