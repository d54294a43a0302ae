"""Draws docs/ternary_scales.png: what the exact ternary scale and two rules by the mean do to the
layers of a network: `python docs/ternary_scales.py`.

It reads results/ternary_layers.json: for each layer of a run, by epoch, the share of zeros, the
scale, and the share of weights whose level the epoch's last step changed, as `--metrics-every`
logs them.
"""

import json
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RULES = {
    "exact scale": ("ternary-binary_relax-10ep", "#d1495b"),
    "TernaryThreshold": ("ternary@mean_1.4-binary_relax-10ep", "#1f6fb4"),
    "1.535·mean |w|": ("ternary@mean_1.535_norefit-binary_relax-10ep", "#3a9d6e"),
}
LAYERS = {  # with their weights
    "stem": 432, "stage0_block0_conv0": 2304, "stage0_block0_conv1": 2304,
    "stage1_block0_conv0": 4608, "stage1_block0_conv1": 9216,
    "stage2_block0_conv0": 18432, "stage2_block0_conv1": 36864,
}  # fmt: skip


def main():
    """Draws the picture."""
    here = Path(__file__).parent
    rows = json.loads((here.parent / "results/ternary_layers.json").read_text())
    figure, (zeros, scale, flips) = plt.subplots(1, 3, figsize=(12, 3.8), constrained_layout=True)
    places = np.arange(len(LAYERS))
    for shift, (label, (run, color)) in zip((-0.15, 0, 0.15), RULES.items(), strict=True):
        of_run = [row for row in rows if row["run"].rpartition("-seed")[0] == run]
        layers = [[row for row in of_run if row["layer"] == layer] for layer in LAYERS]
        last = np.array([[100 * row["zeros"][-1] for row in layer] for layer in layers])
        most = np.array([[100 * max(row["flips"]) for row in layer] for layer in layers])
        for seed in range(last.shape[1]):
            name = label if seed == 0 else None
            zeros.plot(places + shift, last[:, seed], "o", ms=4, color=color, label=name)
            flips.plot(places + shift, most[:, seed], "o", ms=4, color=color)
        for row in layers[0]:
            scale.plot(np.arange(1, 11), row["scale"], color=color, lw=1.4)
    for axes in (zeros, flips):
        axes.set_xticks(places, [f"{count:,}" for count in LAYERS.values()], rotation=30)
        axes.set_xlabel("weights of the layer, from the first to the last")
    zeros.set_title("Zeros at the end (%)", loc="left")
    scale.set_title("Scale of the first layer", loc="left")
    scale.set_xlabel("epoch")
    flips.set_title("Largest change of levels in a step (%)", loc="left")
    flips.set_yscale("log")
    for axes in (zeros, scale, flips):
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*zeros.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(here / "ternary_scales.png", dpi=110)


if __name__ == "__main__":
    main()
