"""What the optimizer inside does with float weights besides to descend: it averages them, and holds
those that oscillate. Both go after SGD in a chain.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

import brelax_jax as brx
from examples.runs.report import leaves

LEAST_SHARE = 1 / 4  # of the threshold at the start, at the end
MEMORY = 0.01  # weight of the last step in the share of steps


class AverageState(NamedTuple):
    """The updates so far, and the average of the params after them."""

    updates: Array
    average: Any


def average_from(first: int) -> optax.GradientTransformation:
    """Averages the params after each update from number `first` on; before, it follows them.

    Izmailov et al., Averaging weights leads to wider optima, 2018, arXiv 1803.05407.
    """

    def init(params: Any) -> AverageState:
        return AverageState(jnp.int32(0), jax.tree.map(jnp.array, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AverageState]:
        new = optax.apply_updates(params, updates)
        share = 1 / jnp.maximum(state.updates - first + 1, 1)
        average = optax.incremental_update(new, state.average, share)
        return updates, AverageState(state.updates + 1, average)

    return optax.GradientTransformation(init, update)


def average_of(opt_state: Any) -> Any:
    """The average, in the tree of the params."""
    return optax.tree.get(opt_state, "average")


class OscillationState(NamedTuple):
    """For each weight the share of recent steps in which its code went back, and by which sign it
    changed last.
    """

    updates: Array
    shares: dict[str, Array]
    signs: dict[str, Array]


def hold_oscillating(
    selection: brx.Selection, threshold: float, steps: int
) -> optax.GradientTransformation:
    """Holds for good each weight whose code goes back and forth too often.

    Nagel et al., Overcoming oscillations in quantization-aware training, 2022, arXiv 2203.11086,
    section 4.3. A held weight stays where it is; theirs goes to the code that it had most.

    Args:
      selection: the sets of the leaves.
      threshold: the largest share of recent steps in which a code may go back. From the first step
        to the last it falls to a quarter, as half a cosine.
      steps: how many steps there are.
    """
    schedule = optax.cosine_decay_schedule(threshold, steps, alpha=LEAST_SHARE)

    def init(params: Any) -> OscillationState:
        arrays = leaves(params)
        shapes = {path: arrays[path].shape for path in selection.assign(params)}
        return OscillationState(
            jnp.int32(0),
            {path: jnp.zeros(shape) for path, shape in shapes.items()},
            {path: jnp.zeros(shape, jnp.int8) for path, shape in shapes.items()},
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, OscillationState]:
        moves, shares, signs = leaves(updates), dict(state.shares), dict(state.signs)
        floats, most = leaves(params), schedule(state.updates)
        for path, qset in selection.assign(params).items():
            move = jnp.where(shares[path] > most, 0, moves[path])
            now, then = (qset.quantize(y).codes for y in (floats[path] + move, floats[path]))
            sign = jnp.sign(now - then)
            back = sign * signs[path] < 0
            shares[path] += MEMORY * (back - shares[path])
            signs[path] = jnp.where(sign == 0, signs[path], sign)
            moves[path] = move
        new = jax.tree.unflatten(jax.tree.structure(updates), moves.values())
        return new, OscillationState(state.updates + 1, shares, signs)

    return optax.GradientTransformation(init, update)
