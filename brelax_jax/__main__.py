"""`python -m brelax_jax info FILE`: what is in a file of a quantized network."""

import json
import sys
from collections.abc import Sequence

from brelax_jax._command_line import Parser
from brelax_jax.export._other_reports import gguf_rows, onnx_rows
from brelax_jax.export._report import report, table

READERS = {".gguf": gguf_rows, ".onnx": onnx_rows}  # other files are ours


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a report; returns the exit status."""
    parser = Parser("brelax_jax", __doc__, "info network.safetensors", "info --json model.onnx")
    parser.add_argument(
        "command", choices=["info"], help="show the layers of a file, their sets and sizes"
    )
    kinds = "what brelax_jax.save wrote, or a .gguf or .onnx file"
    parser.add_argument("file", metavar="FILE", help=kinds)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    asked = parser.parse_args(arguments)
    try:
        found = report(asked.file, READERS)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found, indent=2) if asked.json else table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
