"""Scales that are trained, as in LSQ, in place of a rule.

The scale of each group starts at the set's own after the first update, and then follows its
gradient, by SGD of momentum 0.9. With y the float weights, q the codes of y at the scale s, L the
largest level, u = (1 − α)·y + α·s·q the params, g the gradient at u, and n weights in a group,

    ∂s = α·Σ g·(q − y/s where |y/s| ≤ L, q elsewhere) / √(n·L)

(Esser et al., LSQ, 2020, arXiv 1902.08153, equations 3 and 5, section 2.2). Weights beyond the
levels get no gradient.
"""

import contextlib
import dataclasses
import math
from collections.abc import Generator
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
from jax import Array

import brelax_jax as brx
from examples.runs.report import leaves
from examples.train import steps
from examples.train.config import Config
from examples.train.optimizer import layer_sets, learning_rate, make_optimizer

MOMENTUM, LEAST = 0.9, 1e-6  # of the scales' SGD; the smallest scale


class LearnedState(NamedTuple):
    """The state of the library's transformation, and the momentum of each scale by path."""

    inner: Any
    velocity: dict[str, Array]


def learned_scales(
    inner: Any, selection: brx.Selection, schedule: optax.Schedule
) -> optax.GradientTransformation:
    """Wraps a transformation of the library so that its scales follow their gradients.

    Args:
      inner: a transformation of the library, with a rule whose codes are the nearest ones at the
        scale, such as `MeanMagnitude(factor, refit=False)`.
      selection: its sets, with one scale a tensor or channel.
      schedule: the learning rate of the scales.
    """

    def init(params: Any) -> LearnedState:
        state = inner.init(params)
        return LearnedState(state, {path: jnp.zeros_like(s) for path, s in state.scales.items()})

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, LearnedState]:
        sets, old, velocity = selection.assign(params), state.inner, dict(state.velocity)
        floats, kept = leaves(old.float_params), leaves(updates)
        begun = old.count > 0
        for path, qset in sets.items():
            slope, inside = gradient(qset, kept[path], floats[path], old.scales[path])
            velocity[path] = MOMENTUM * velocity[path] + brx.strength(old) * slope
            kept[path] = jnp.where(begun & ~inside, 0, kept[path])
        updates, new = inner.update(_tree(kept, updates), old, params)
        alpha, scales = brx.strength(new), dict(new.scales)
        moves, given, floats = leaves(updates), leaves(params), leaves(new.float_params)
        for path, qset in sets.items():
            velocity[path] = jnp.where(begun, velocity[path], 0)
            learned = jnp.maximum(old.scales[path] - schedule(old.count) * velocity[path], LEAST)
            scales[path] = s = jnp.where(begun, learned, scales[path])
            y = floats[path]
            moves[path] = (1 - alpha) * y + alpha * s * codes(qset, y, s) - given[path]
        return _tree(moves, updates), LearnedState(new._replace(scales=scales), velocity)

    return optax.GradientTransformation(init, update)


def codes(qset: brx.QuantizedSet, y: Array, s: Array) -> Array:
    """The levels nearest to y/s."""
    table = jnp.array(qset.levels)
    return table[jnp.sum((y / s)[..., None] > (table[1:] + table[:-1]) / 2, axis=-1)]


def gradient(qset: brx.QuantizedSet, g: Array, y: Array, s: Array) -> tuple[Array, Array]:
    """∂s/α of each group, and which weights are within the levels."""
    most, s = max(qset.levels), jnp.maximum(s, LEAST)
    q, ratio = codes(qset, y, s), y / s
    inside = jnp.abs(ratio) <= most
    terms = g * jnp.where(inside, q - ratio, q)
    axes = tuple(i for i, (a, b) in enumerate(zip(y.shape, s.shape, strict=True)) if a != b)
    size = math.prod(y.shape[i] for i in axes)
    return jnp.sum(terms, axis=axes, keepdims=True) / math.sqrt(size * most), inside


def _tree(arrays: dict[str, Any], like: Any) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), arrays.values())


@contextlib.contextmanager
def scales_are_learned(step: float | None) -> Generator[None]:
    """All quantized runs train their scales, at `step` times the learning rate of the weights; None
    for what their rules say.
    """
    if step is None:
        yield
        return

    def learned(config: Config, steps_per_epoch: int) -> optax.GradientTransformation:
        plain = make_optimizer(config, steps_per_epoch)
        if config.method == "float":
            return plain
        rates = dataclasses.replace(config, lr=config.lr * step)
        return learned_scales(plain, layer_sets(config), learning_rate(rates, steps_per_epoch))

    with mock.patch.object(steps, "make_optimizer", learned):
        yield
