"""The demonstration: handwritten digits, float first, then binary and ternary by BinaryConnect and
BinaryRelax.

`python -m examples.demo` trains five networks within minutes on a CPU, ends with a table and a
picture, and saves the quantized networks in a few bits a weight.
"""

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brelax_jax.__main__ import main as info
from brelax_jax._command_line import Parser
from examples.runs import plots
from examples.runs.progress import Progress
from examples.runs.report import table
from examples.train import deploy
from examples.train.config import PRESETS, Config
from examples.train.data import load as data
from examples.train.loop import run
from examples.train.steps import Trainer, TrainState

METHODS = {"binary_connect": "BinaryConnect", "binary_relax": "BinaryRelax"}


def configs(out: str, epochs: int) -> dict[str, Config]:
    """The five runs by their names, the float one first."""
    # A fifth of the training images says more of each epoch than the usual tenth.
    common = Config(**PRESETS["quick"], validation=0.2, checkpoint_every=epochs, epochs=epochs)
    start = dataclasses.replace(common, method="float", out=f"{out}/float")
    runs = {"float": start}
    for qset in ("binary", "ternary"):
        for method, name in METHODS.items():
            runs[f"{name} {qset}"] = dataclasses.replace(
                common, method=method, set=qset, warm_start=start.out, out=f"{out}/{qset}-{method}"
            )
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    parser = Parser("examples.demo", __doc__, "--epochs 10 --out runs/short-demo")
    parser.add_argument(
        "--out", default="runs/demo", help="directory of the runs; what is there is replaced"
    )
    parser.add_argument(
        "--epochs", type=int, default=30, metavar="N", help="passes of each run over the images"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    options = parser.parse_args(arguments)
    runs = configs(options.out, options.epochs)
    settings = runs["float"]
    loaded = data.load(settings.dataset, validation=settings.validation)
    images = settings.epochs * settings.images_per_epoch(len(loaded.train))
    progress = Progress(len(runs) * images, options.quiet)
    results: dict[str, dict[str, Any]] = {}
    networks: list[Path] = []
    elsewhere: list[str] = []

    def finish(trainer: Trainer, state: TrainState) -> None:
        """Saves a network, and tries what was saved."""
        path = deploy.save(trainer, state)
        networks.append(path)
        elsewhere.append(f"{path}: {deploy.loaded_accuracy(trainer, path):.1%} when loaded back")
        if deploy.can_run_elsewhere() and len(networks) == len(runs) - 1:
            accuracy = deploy.accuracy_elsewhere(trainer, state)
            elsewhere.append(f"the last one in ONNX Runtime, with integer codes: {accuracy:.1%}")

    for name, config in runs.items():
        shutil.rmtree(config.directory, ignore_errors=True)
        is_float = config.method == "float"
        results[name] = run(config, loaded, progress, finish=None if is_float else finish)
    progress.close()
    quantized = {
        name: config.directory for name, config in runs.items() if config.method != "float"
    }
    picture = plots.plot_runs(quantized, Path(options.out) / "demo.png", settings.directory)
    print(
        f"\n{len(loaded.test)} test images; each network as it would be deployed, "
        "its weights projected:\n"
    )
    print(table([row(name, result) for name, result in results.items()]))
    print(f"\n{picture}\n\nThe networks in files, exactly as quantized:\n")
    print("\n".join(elsewhere))
    print(f"\n$ python -m brelax_jax info {networks[-1]}\n")
    return info(["info", str(networks[-1])])


def row(name: str, result: dict[str, Any]) -> dict[str, str]:
    """A line of the table."""
    distinct = sorted({layer["distinct"] for layer in result["layers"]})
    return {
        "network": name,
        "test accuracy": f"{result['test_deployed']:.1%}",
        "bits per weight": f"{result['bits_per_weight']:.2f}",
        "distinct values per layer": ", ".join(map(str, distinct)) or "all",
        "size (KiB)": f"{result['bytes'] / 1024:.0f}",
    }


if __name__ == "__main__":
    sys.exit(main())
