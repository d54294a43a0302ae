"""What to compute when: XLA on CPU runs what does not depend on one another side by side, which
takes more memory, and with it time, than one after the other.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax

T = TypeVar("T")


def in_turn(before: Array, function: Callable[..., T], *operands: Any) -> T:
    """function(*operands), on CPU not before `before` is known.

    That this scalar is never −1 is what XLA does not know.
    """

    def after(before: Array, *operands: Any) -> T:
        def never(*operands: Any) -> T:
            # Of the function only shapes and shardings are left here: the rest is dead code.
            return jax.tree.map(jnp.zeros_like, function(*operands))

        return lax.cond(before != -1, function, never, *operands)

    return lax.platform_dependent(
        before, *operands, cpu=after, default=lambda _, *operands: function(*operands)
    )
