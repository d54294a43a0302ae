"""Processes of their own that need not import anything: all are forked from one that has, and in
which JAX has not started yet.
"""

import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

SETTINGS = (
    "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes", "jax_disable_most_optimizations",
)  # fmt: skip
IMPORTED = ["tests.helpers.tiny_grid", "sklearn.datasets", "sklearn.model_selection", "pytest"]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)


def run(directory: Path, function: Callable[..., Any], *arguments: Any, **environ: str) -> int:
    """Runs a function of a module, in this process's settings of JAX; returns the exit status, with
    what was printed in the directory's `printed`.
    """
    settings = {name: jax.config.values[name] for name in SETTINGS}
    child = context.Process(
        target=_run, args=(directory / "printed", settings, environ, function, arguments)
    )
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def _run(
    printed: Path,
    settings: dict[str, Any],
    environ: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.update(environ)
    for name, value in settings.items():
        jax.config.update(name, value)
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.exit(function(*arguments))
