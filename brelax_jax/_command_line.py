"""Command lines: help with defaults and an example, and a hint where an option is misspelt."""

import argparse
import difflib
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """A parser of the options of `python -m PROGRAM`.

    Args:
      program: the module that is run.
      description: what the program does, often its docstring.
      *examples: arguments that one could give it; without any, it is run as it is.
    """

    def __init__(self, program: str, description: str | None, *examples: str) -> None:
        prog = f"python -m {program}"
        commands = [f"  {prog} {words}".rstrip() for words in examples or [""]]
        super().__init__(
            prog=prog,
            description=description,
            epilog="\n".join(["examples:", *commands]),
            formatter_class=_Help,
            allow_abbrev=False,
        )

    def group(self, title: str) -> Any:
        """The group of options with this title, which is made when it is first asked for."""
        found = [group for group in self._action_groups if group.title == title]
        return found[0] if found else self.add_argument_group(title)

    def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]  # it is overloaded
        self, args: Any = None, namespace: Any = None
    ) -> Any:
        """As argparse does it, but an unknown option is met with the one that looks like it."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = unknown[0].partition("=")[0]
            near = difflib.get_close_matches(name, self._option_string_actions, n=1)
            kind = "unknown option" if name.startswith("-") else "unexpected argument"
            self.error(f"{kind} {name}" + (f": did you mean {near[0]}?" if near else ""))
        return options

    def error(self, message: str) -> NoReturn:
        """Ends the program with this message, in place of all options."""
        self.exit(2, f"{message}\n{self.prog} --help lists the options.\n")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions, and adds the default to the help of each option."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if default is None or default is False or default in (argparse.SUPPRESS, []):
            return action.help
        words = default if isinstance(default, list | tuple) else [default]
        return f"{action.help} [{' '.join(map(str, words)).replace('%', '%%')}]"
