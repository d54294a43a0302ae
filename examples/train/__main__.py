"""Trains an image classifier: `python -m examples.train --help`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from examples.runs import plots
from examples.runs.progress import Progress
from examples.runs.report import table
from examples.train.cli import parse
from examples.train.data import load as data
from examples.train.loop import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns its exit status."""
    config, options = parse(arguments)
    try:
        loaded = data.load(
            config.dataset,
            config.image_size,
            config.validation,
            config.train_examples,
            progress=not options.quiet,
            stream=config.stream,
        )
        images = config.epochs * config.images_per_epoch(len(loaded.train))
        progress = Progress(images, quiet=options.quiet)
        result = run(config, loaded, progress, options.resume)
        progress.close()
    except (ValueError, FileNotFoundError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    rows = [
        {"layer": layer["path"], "weights": f"{layer['weights']:,}",
         "scales": f"{layer['groups']:,}", "distinct values per scale": str(layer["distinct"])}
        for layer in result["layers"]
    ]  # fmt: skip
    if rows:
        print("\n" + table(rows))
    print(
        f"\ntest accuracy: {result['test_current']:.2%} current, "
        f"{result['test_deployed']:.2%} deployed"
    )
    print(
        f"bits per quantized weight: {result['bits_per_weight']:.3f}; "
        f"all params: {result['bytes'] / 1024:,.0f} KiB"
    )
    picture = plots.plot_runs(
        {f"{config.method} {config.set}": config.directory}, Path(config.directory) / "run.png"
    )
    metrics = plots.plot_metrics(config.directory, Path(config.directory) / "metrics.png")
    beside = (
        "log.jsonl and checkpoints" if metrics is None else "metrics.png, log.jsonl, checkpoints"
    )
    print(f"written: {picture} and, beside it, {beside}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
