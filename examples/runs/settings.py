"""Settings of a run: fields of a dataclass, from which a command line is made."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

NOTHING: Mapping[str, Any] = MappingProxyType({})


def setting(default: Any, group: str, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field with what the command line needs to know of it."""
    return dataclasses.field(
        default=default, metadata={"group": group, "help": help, "choices": choices}
    )


def flag(name: str) -> str:
    """The option of a setting."""
    return "--" + name.replace("_", "-")


def differences(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], defaults: Mapping[str, Any] = NOTHING
) -> list[str]:
    """Lines that say which settings differ between two runs. A setting that one of them lacks, as
    an earlier version did, is at its default.
    """
    lines: list[str] = []
    for name in sorted({*theirs, *ours}):
        values = [settings.get(name, defaults.get(name)) for settings in (theirs, ours)]
        if values[0] != values[1]:
            lines.append(f"{name}: {values[0]!r} there, {values[1]!r} here")
    return lines
