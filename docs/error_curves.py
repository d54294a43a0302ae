"""Draws docs/error_curves.png: the squared error over the scale, and where alternating minimization
ends: `python docs/error_curves.py`.
"""

from pathlib import Path

import matplotlib
import numpy as np

import brelax_jax as brx

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CASES = {
    "normal weights, ternary": (brx.Ternary(), lambda rng: rng.standard_normal(4096)),
    "Student-t (1.5) weights, ternary": (brx.Ternary(), lambda rng: rng.standard_t(1.5, 4096)),
    "normal weights, 4 bits": (brx.Uniform(4), lambda rng: rng.standard_normal(64)),
    "Student-t (1.5) weights, 4 bits": (brx.Uniform(4), lambda rng: rng.standard_t(1.5, 64)),
}
STARTS = 12  # of alternating minimization, geometrically spaced


def codes(a, scale, magnitudes):
    """The nearest magnitude of each weight."""
    return magnitudes[np.abs(a[:, None] - scale * magnitudes).argmin(-1)]


def error(a, scale, magnitudes):
    """E(s), over the sum of squares."""
    return np.sum((a - scale * codes(a, scale, magnitudes)) ** 2) / np.sum(a**2)


def alternating(a, scale, magnitudes):
    """Where alternating minimization ends."""
    for _ in range(1000):
        q = codes(a, scale, magnitudes)
        if not q.any() or np.isclose(scale, new := (q @ a) / (q @ q), rtol=1e-12):
            break
        scale = new
    return scale


def main():
    """Draws the picture, and prints how far above the optimum the ends are."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    for axis, (title, (qset, draw)) in zip(axes.flat, CASES.items(), strict=True):
        a = np.abs(draw(np.random.default_rng(0)))
        magnitudes = np.array(qset.magnitudes)
        best = float(qset.quantize(a.astype(np.float32)).scale.item())
        low, high = a.mean() / magnitudes[-1], a.max()
        scales = np.geomspace(low, high, 1500)
        axis.plot(scales, [error(a, s, magnitudes) for s in scales], lw=1, color="C0")
        ends = {
            round(alternating(a, s, magnitudes), 9)
            for s in np.geomspace(low, high, STARTS + 2)[1:-1]
        }
        axis.plot(
            sorted(ends),
            [error(a, s, magnitudes) for s in sorted(ends)],
            "x",
            color="C3",
            label=f"alternating minimization, {STARTS} starts",
        )
        least = error(a, best, magnitudes)
        axis.plot(best, least, "o", mfc="none", ms=10, color="k", label="project")
        axis.set(title=title, xscale="log", yscale="log", xlabel="scale s", ylabel="E(s) / Σw²")
        worst = max(error(a, s, magnitudes) for s in ends)
        print(f"{title}: {len(ends)} ends, the worst {worst / least - 1:.1%} above the optimum")
    axes.flat[0].legend()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
