"""What is computed in another way on another platform."""

from collections.abc import Callable
from typing import Any

from jax import lax


def by_platform(
    forced: str | None, *operands: Any, default: Callable[..., Any], **others: Callable[..., Any]
) -> Any:
    """As `lax.platform_dependent`; but what is for the forced platform, if tests force one."""
    if forced is not None:
        return others.get(forced, default)(*operands)
    return lax.platform_dependent(*operands, default=default, **others)
