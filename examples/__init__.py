"""Programs over brelax_jax, run from the repository's root: `python -m examples.train --help`.

A program that lacks a package ends with one line, which says what to install.
"""

import sys
from types import TracebackType

EXTRAS = {  # the others: examples
    "gguf": "export",
    "libtpu": "tpu",
    "tensorflow": "prepare",
    "torch": "parq",
    "torchao": "parq",
    "xllamacpp": "export-test",
}
OURS = {"brelax_jax", "examples", "benchmarks", "tests"}

report_error = sys.excepthook


def name_extra(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Reports an error that ends the program."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    package = (name or "").partition(".")[0]
    if package in {"", *OURS, *sys.stdlib_module_names}:
        report_error(kind, error, trace)
    else:
        extra = EXTRAS.get(package, "examples")
        print(f'{package} is missing: in a clone, pip install ".[{extra}]"', file=sys.stderr)


sys.excepthook = name_extra
