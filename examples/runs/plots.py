"""Pictures of runs, from their logs: accuracy and strength over epochs, weights collapsing onto
their levels, and metrics of the layers over steps.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from examples.runs.log import read

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PALETTE = ("#1f6fb4", "#d1495b", "#3a9d6e", "#e09f3e", "#6d597a", "#4f5d75")
STYLE: Any = {
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.edgecolor": "#888888", "axes.axisbelow": True, "font.size": 9, "axes.titlesize": 10,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False,
    "figure.dpi": 160,
}  # fmt: skip

METRICS = {
    "distance": ("Distance of the float weights to the set (% of their norm)", True),
    "flips": ("Weights whose level a step changes (%)", True),
    "scale": ("Mean scale", False),
}


def plot_runs(
    runs: Mapping[str, str | Path], path: str | Path, float_run: str | Path | None = None
) -> Path:
    """Draws runs beside each other.

    Args:
      runs: their directories, by the names in the legend.
      path: where the PNG goes.
      float_run: the directory of a run whose last accuracy is drawn as a line to reach.

    Returns:
      The path.
    """
    logs = {name: read(Path(directory) / "log.jsonl") for name, directory in runs.items()}
    collapsing = {
        n: log for n, log in logs.items() if of(log, "weights") and method(log) == "binary_relax"
    }
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(6.4 + 2.7 * len(collapsing), 5), layout="constrained")
        grid = figure.add_gridspec(2, 2 + len(collapsing), height_ratios=(2.2, 1))
        top = figure.add_subplot(grid[0, :2])
        accuracy_panel(
            top, logs, None if float_run is None else read(Path(float_run) / "log.jsonl")
        )
        strength_panel(figure.add_subplot(grid[1, :2], sharex=top), logs)
        for column, (name, log) in enumerate(collapsing.items()):
            collapse_panel(figure.add_subplot(grid[:, 2 + column]), of(log, "weights"), name)
        figure.savefig(path)
        plt.close(figure)
    return Path(path)


def plot_metrics(directory: str | Path, path: str | Path) -> Path | None:
    """Draws the metrics of a run's layers over steps.

    Args:
      directory: the run's.
      path: where the PNG goes.

    Returns:
      The path, or None if the run has logged no metrics.
    """
    lines = of(read(Path(directory) / "log.jsonl"), "metrics")
    if not lines:
        return None
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(
            len(METRICS), 1, figsize=(7.2, 7.2), layout="constrained", sharex=True
        )
        for axes, (name, (title, percent)) in zip(panels, METRICS.items(), strict=True):
            metrics_panel(axes, lines, name, 100 if percent else 1)
            axes.set_title(title)
        panels[-1].set_xlabel("step (grey: phase II)")
        figure.legend(
            *panels[0].get_legend_handles_labels(),
            loc="outside right upper",
            fontsize=8,
            ncols=1 + len(lines[0]["layers"]) // 24,
        )
        figure.savefig(path)
        plt.close(figure)
    return Path(path)


def metrics_panel(axes: Any, lines: list[dict[str, Any]], name: str, factor: float) -> None:
    """One of the metrics over steps, a line for each layer; phase II is shaded."""
    steps = [line["step"] for line in lines]
    layers = list(lines[0]["layers"])
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(layers)))
    for color, layer in zip(colors, layers, strict=True):
        values = [factor * line["layers"][layer][name] for line in lines]
        marker = "." if len(lines) < 40 else ""
        axes.plot(steps, values, marker, ls="-", lw=1.2, color=color, label=layer)
    hard = [line["step"] for line in lines if line["layers"][layers[0]]["lam"] == "inf"]
    if hard and len(hard) < len(steps):
        axes.axvspan(hard[0], steps[-1], color="#f0f0f0", lw=0, zorder=0)


def of(log: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The lines of a kind."""
    return [line for line in log if line["kind"] == kind]


def method(log: Sequence[dict[str, Any]]) -> str:
    """How the run's weights were trained."""
    return log[0]["config"]["method"]


def split_of(log: Sequence[dict[str, Any]]) -> str:
    """The split that the epochs were evaluated on."""
    return "validation" if "validation_current" in of(log, "epoch")[0] else "test"


def accuracy_panel(axes: Any, logs: dict[str, Any], float_log: Any) -> None:
    """Accuracy of the deployed params over epochs; if there is one run, of the current ones too."""
    lowest = 1.0
    split = split_of(next(iter(logs.values())))
    for color, (name, log) in zip(PALETTE * len(logs), logs.items(), strict=False):
        lines = of(log, "epoch")
        epochs, deployed = (
            [line["epoch"] for line in lines],
            [line[f"{split}_deployed"] for line in lines],
        )
        style = "--" if method(log) == "binary_connect" else "-"
        axes.plot(epochs, np.multiply(100, deployed), style, color=color, lw=1.8, label=name)
        if method(log) != "float" and len(logs) == 1:
            current = np.multiply(100, [line[f"{split}_current"] for line in lines])
            axes.plot(epochs, current, style, color=color, lw=1, alpha=0.5, label="as they are")
        lowest = min(lowest, np.quantile(deployed, 0.1))
    if float_log is not None:
        goal = of(float_log, "epoch")[-1][f"{split}_deployed"]
        axes.axhline(100 * goal, color="#333333", lw=1, ls=":", label="float, where they start")
    axes.set_ylim(max(0, 100 * lowest - 0.35 * (100 - 100 * lowest) - 1), 100.5)
    axes.set(ylabel=f"{split} accuracy (%)", title="Accuracy of the deployed network")
    axes.legend(loc="lower right", fontsize=8)
    axes.tick_params(labelbottom=False)


def strength_panel(axes: Any, logs: dict[str, Any]) -> None:
    """The strength over epochs, once for each method."""
    for name in dict.fromkeys(method(log) for log in logs.values()):
        log = next(log for log in logs.values() if method(log) == name)
        lines = [line for line in of(log, "epoch") if "strength" in line]
        style = "--" if name == "binary_connect" else "-"
        epochs, strengths = [line["epoch"] for line in lines], [line["strength"] for line in lines]
        axes.plot(epochs, strengths, style, color="#444444", lw=1.6, label=name.replace("_", " "))
    axes.set(
        xlabel="epoch",
        ylabel="strength α",
        ylim=(-0.04, 1.08),
        title="Pull toward the set: at 1, exactly on it",
    )
    if axes.lines:
        axes.legend(loc="lower right", fontsize=8)


def collapse_panel(axes: Any, snapshots: list[dict[str, Any]], name: str) -> None:
    """Histograms of a layer's weights, one above the other, the last epoch on top."""
    colors = matplotlib.colormaps["viridis_r"]
    reach = snapshots[0]["range"]
    for row, line in enumerate(snapshots):
        edges = np.linspace(-reach, reach, len(line["counts"]) + 1)
        heights = row + 0.93 * np.array(line["counts"]) / max(line["counts"])
        layer = dict(baseline=row, zorder=2 * (len(snapshots) - row))
        axes.stairs(
            heights, edges, fill=True, color=colors(0.15 + 0.75 * line["strength"]), **layer
        )
        axes.stairs(heights, edges, color="white", lw=0.6, **layer)
        axes.plot((-reach, reach), (row, row), color="#bbbbbb", lw=0.6, zorder=layer["zorder"] + 1)
    labels = [f"epoch {line['epoch']}\nα {line['strength']:.2f}" for line in snapshots]
    axes.set_yticks(np.arange(len(snapshots)) + 0.3, labels)
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set(
        xlim=(-reach, reach), ylim=(-0.05, len(snapshots) + 0.1), xlabel="weight / root mean square"
    )
    axes.set_title(f"{name}: {snapshots[0]['layer']}", fontsize=9)
