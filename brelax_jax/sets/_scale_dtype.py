"""Scales that a narrow dtype holds, so that a deployment format can store them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike


@jax.tree_util.register_static
class Scales(NamedTuple):
    """The positive normal numbers of a floating dtype. All scales of a set are among them.

    Attributes:
      digits: bits of the significand, the leading one too.
      least: the smallest.
      most: the largest.
    """

    digits: int
    least: float
    most: float

    def at_most(self, x: Array) -> Array:
        """The largest of them that is no larger than x > 0, or the smallest of all."""
        return self._masked(x, 0)

    def nearest(self, x: Array) -> Array:
        """The nearest of them for x > 0; 0 and NaN as they are."""
        return jnp.where(x > 0, self._masked(x, self._step(x) // 2), x)

    def after(self, x: Array) -> Array:
        """The next larger one after one of them, also after the last."""
        return lax.bitcast_convert_type(_bits(x) + jnp.array(self._step(x), _integer(x)), x.dtype)

    def _masked(self, x: Array, added: int) -> Array:
        integer, step = _integer(x), self._step(x)
        mask = ~jnp.array(step - 1, integer)
        digits = (_bits(x) + jnp.array(added, integer)) & mask
        # The bits of infinity are those of no number: `most` comes out of it.
        return jnp.clip(lax.bitcast_convert_type(digits, x.dtype), self.least, self.most)

    def _step(self, x: Array) -> int:
        """The distance of two neighbours in units in the last place of x's dtype."""
        return 2 ** max(jnp.finfo(x.dtype).nmant + 1 - self.digits, 0)


DTYPES = {
    "float16": Scales(11, 2.0**-14, 65504.0),
    "bfloat16": Scales(8, 2.0**-126, 255 * 2.0**120),
    "float8_e4m3fn": Scales(4, 2.0**-6, 448.0),
    "float8_e8m0fnu": Scales(1, 2.0**-126, 2.0**127),
}


def name_of(dtype: DTypeLike) -> str:
    """The name of one of `DTYPES`.

    Raises:
      ValueError: if it is none of them.
    """
    try:
        name = jnp.dtype(dtype).name
    except TypeError:
        name = ""
    if name not in DTYPES:
        raise ValueError(f"scale_dtype must be None or one of {', '.join(DTYPES)}, got {dtype!r}.")
    return name


def leading_bit(x: Array) -> Array:
    """The largest power of two that is at most x, for x > 0.

    By a bit mask, because exp2 and log2 are inexact on some devices.
    """
    mask = ~jnp.array(2 ** jnp.finfo(x.dtype).nmant - 1, _integer(x))
    return lax.bitcast_convert_type(_bits(x) & mask, x.dtype)


def _integer(x: Array) -> jnp.dtype:
    return jnp.dtype(f"uint{jnp.finfo(x.dtype).bits}")


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, _integer(x))
