"""Packages that only the export needs."""

import importlib
from types import ModuleType

EXTRA = "export"


def optional(name: str) -> ModuleType:
    """A module that `brelax_jax[export]` installs.

    Raises:
      ModuleNotFoundError: if its package is missing; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name} is missing: pip install 'brelax_jax[{EXTRA}]'", name=error.name
        ) from None
