"""Plots of the accuracy grid: over bits, over epochs, and what pulls the weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray

from examples.runs.plots import PALETTE, STYLE

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

Rows = Mapping[tuple[str, str], Mapping[int, dict[str, Any]]]  # by set and method, then by seed
Titles = Mapping[str, str]


def plot_bits(rows: Rows, titles: Titles, path: Path) -> None:
    """Test accuracy of the deployed networks by bits a weight, mean and spread over the seeds."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        methods = quantized_methods(rows)
        for number, (color, method) in enumerate(zip(PALETTE, methods, strict=False)):
            points = [
                (float(np.mean(column(row, "bits_per_weight"))), column(row, "test_deployed"))
                for (_, name), row in rows.items()
                if name == method
            ]
            shift = 0.015 * (number - (len(methods) - 1) / 2)  # so that they do not hide each other
            axes.errorbar(
                [bits + shift for bits, _ in points],
                [100 * np.mean(values) for _, values in points],
                [float(100 * np.std(v, ddof=1)) if len(v) > 1 else 0.0 for _, v in points],
                fmt="o", ms=4, capsize=2, color=color, label=titles.get(method, method),
            )  # fmt: skip
        float_lines(axes, rows, titles, "test_deployed")
        axes.set(xlabel="bits a quantized weight", ylabel="test accuracy (%)")
        axes.set_title("Deployed network after the last step: mean and deviation over seeds")
        save(figure, path)


def plot_curves(rows: Rows, titles: Titles, path: Path) -> None:
    """Validation accuracy of the deployed network over epochs, a panel for each set."""
    sets = quantized_sets(rows)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            1, len(sets), figsize=(1.2 + 3.6 * len(sets), 3.8), layout="constrained",
            sharey=True, squeeze=False,
        )  # fmt: skip
        for axes, of_set in zip(panels[0], sets, strict=True):
            lines(axes, rows, titles, of_set, "validation_deployed")
            axes.set(title=of_set, xlabel="epoch")
        panels[0, 0].set_ylabel("validation accuracy, deployed (%)")
        save(figure, path)


def plot_pull(rows: Rows, titles: Titles, path: Path) -> None:
    """Distance to the set and flips over epochs, a column for each set."""
    sets = quantized_sets(rows)
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            2, len(sets), figsize=(1.2 + 3.6 * len(sets), 6), layout="constrained",
            sharex=True, sharey="row", squeeze=False,
        )  # fmt: skip
        for column_of, of_set in zip(panels.T, sets, strict=True):
            for axes, name in zip(column_of, ("distance", "flips"), strict=True):
                lines(axes, rows, titles, of_set, name)
            column_of[0].set_title(of_set)
            column_of[1].set_xlabel("epoch")
        panels[1, 0].set_yscale("symlog", linthresh=0.01)
        panels[1, 0].set_ylim(bottom=0)
        panels[0, 0].set_ylabel("distance of the float weights (%)")
        panels[1, 0].set_ylabel("weights that a step flips (%)")
        save(figure, path)


def lines(axes: Any, rows: Rows, titles: Titles, of_set: str, name: str) -> None:
    """A curve of each method over epochs: the mean over seeds, and thinly each seed."""
    for color, method in zip(PALETTE, quantized_methods(rows), strict=False):
        row = rows.get((of_set, method), {})
        curves = [
            100 * np.array(record["curve"][name], float)
            for record in row.values()
            if name in record["curve"]
        ]
        if not curves:
            continue
        epochs = np.arange(1, len(curves[0]) + 1)
        style = "--" if method == "binary_connect" else "-"
        for curve in curves:
            axes.plot(epochs, curve, style, color=color, lw=0.5, alpha=0.4)
        mean = np.mean(curves, axis=0)
        axes.plot(epochs, mean, style, color=color, lw=1.8, label=titles.get(method, method))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def float_lines(axes: Any, rows: Rows, titles: Titles, name: str) -> None:
    """The mean accuracies of the float runs, as lines to reach."""
    styles = iter((":", "-."))
    for (of_set, method), row in rows.items():
        if not of_set:
            mean = 100 * np.mean(column(row, name))
            axes.axhline(
                mean, color="#333333", lw=1, ls=next(styles), label=titles.get(method, method)
            )


def column(row: Mapping[int, dict[str, Any]], name: str) -> NDArray[np.float64]:
    """A value of the runs of a row, which may have diverged: NaN then."""
    return np.array([np.nan if r["diverged"] else r[name] for r in row.values()], float)


def quantized_methods(rows: Rows) -> list[str]:
    """The methods that quantize."""
    return list(dict.fromkeys(method for of_set, method in rows if of_set))


def quantized_sets(rows: Rows) -> list[str]:
    """Their sets."""
    return list(dict.fromkeys(of_set for of_set, _ in rows if of_set))


def save(figure: Any, path: Path) -> None:
    """Writes a picture, with one legend of all its lines."""
    named = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path)
    plt.close(figure)
