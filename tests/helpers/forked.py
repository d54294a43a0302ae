"""Processes of their own that need not import anything: all are forked from one that has, and in
which JAX has not started yet.
"""

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import process
from pathlib import Path
from typing import Any

import jax

from tests.helpers import quick

quick.install()

SETTINGS = (
    "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes", "jax_disable_most_optimizations",
)  # fmt: skip
LIMIT = 1800  # seconds, only so that nothing ever hangs
IMPORTED = ["tests.helpers.tiny_grid", "sklearn.datasets", "sklearn.model_selection", "pytest"]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


def run(directory: Path, function: Callable[..., Any], *arguments: Any, **environ: str) -> int:
    """As `start`, to its end: returns the exit status."""
    return ended(start(directory, function, *arguments, **environ))


def start(
    directory: Path, function: Callable[..., Any], *arguments: Any, **environ: str
) -> process.BaseProcess:
    """Runs a function of a module, in this working directory and with these settings of JAX.

    Args:
      directory: where the file `printed` will say what was printed.
      function: its result is the exit status.
      arguments: of the function.
      environ: variables of the environment, besides those of this process; those that JAX reads
        at its import, too.
    """
    settings = {name: jax.config.values[name] for name in SETTINGS}
    place = (os.getcwd(), directory / "printed")
    child = context.Process(target=_run, args=(*place, settings, environ, function, arguments))
    with contextlib.chdir(process.ORIGINAL_DIR):  # the first finds there what is to be imported
        child.start()
    return child


def ended(child: process.BaseProcess) -> int:
    """The exit status of a process when it has ended, or minus the signal that ended it."""
    child.join(LIMIT)
    if child.exitcode is None:
        child.kill()
        raise TimeoutError(f"It has not ended in {LIMIT} s.")
    return child.exitcode


def _run(
    working: str,
    printed: Path,
    settings: dict[str, Any],
    environ: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.chdir(working)
    os.environ.update(environ)
    settings |= {n.lower(): v for n, v in environ.items() if n.lower() in jax.config.values}
    for name, value in settings.items():
        jax.config.update(name, value)
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(function(*arguments))
