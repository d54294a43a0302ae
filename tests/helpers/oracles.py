"""Slow references in NumPy float64, written from the definitions and sharing nothing with the
library.

A *group* is a one-dimensional array of the weights that share one scale.
"""

import functools
import itertools
import math

import numpy as np


@functools.cache
def assignments(levels, n):
    """Every vector of n levels, one a row."""
    return np.array(list(itertools.product(levels, repeat=n)), np.float64)


def brute_force(group, levels):
    """The least squared error over every assignment of levels: |L|ⁿ of them, so for tiny n only."""
    w = np.asarray(group, np.float64)
    q = assignments(tuple(levels), len(w))
    norm = np.sum(q * q, axis=1)
    scale = np.maximum(q @ w, 0) / np.where(norm > 0, norm, 1)
    return float(np.min(np.sum((w - scale[:, None] * q) ** 2, axis=1)))


def error(group, scale, levels):
    """E(s) = Σ min over l of (wᵢ − s·l)², with the nearest levels at the given scale."""
    distances = np.asarray(group, np.float64)[:, None] - scale * np.asarray(levels, np.float64)
    return math.fsum(np.min(distances**2, axis=1))


def optimum(group, levels, limit=1 << 20):
    """(scale, squared error) of the global minimizer of E.

    An entry's nearest magnitude changes from m to the next, m', where |w| = s·(m + m')/2. Between
    two such breakpoints the codes q are constant, E is quadratic, and no other scale does better
    with these codes than Σw² − ⟨a, q⟩²/⟨q, q⟩. Scan all breakpoints from large s to small; a window
    with more than `limit` of them is halved first, to bound memory.
    """
    a = np.sort(np.abs(np.asarray(group, np.float64)))
    if a.size == 0 or a[-1] == 0:
        return 0.0, 0.0
    unit, a = a[-1], a / a[-1]
    magnitudes = np.array([level for level in levels if level >= 0], np.float64)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    windows = [(0.0, 2 / middles[0] if middles.size else 1.0)]
    best_gain, best_scale = 0.0, 0.0
    while windows:
        low, high = windows.pop()
        start, stop = np.searchsorted(a, np.multiply.outer((low, high), middles), side="right")
        if np.sum(stop - start) > limit and low < (low + high) / 2 < high:
            windows += [(low, (low + high) / 2), ((low + high) / 2, high)]
            continue
        # The codes at the upper end of the window, then every change on the way down.
        q = magnitudes[np.searchsorted(middles * high, a)]
        step = np.repeat(np.arange(len(middles)), stop - start)
        entry = np.concatenate([a[:0], *map(a.__getitem__, map(slice, start, stop))])
        order = np.argsort(entry / middles[step])[::-1]
        entry, step = entry[order], step[order]
        along = np.cumsum(np.append(q @ a, entry * np.diff(magnitudes)[step]))
        norm = np.cumsum(np.append(q @ q, np.diff(magnitudes**2)[step]))
        gain = along**2 / np.where(norm > 0, norm, 1)
        k = int(np.argmax(gain))
        if gain[k] > best_gain:
            best_gain, best_scale = gain[k], along[k] / norm[k]
    return unit * best_scale, unit**2 * error(a, best_scale, magnitudes)


def binary(group):
    """(scale, squared error) of {±s}: s is the mean magnitude."""
    a = np.abs(np.asarray(group, np.float64))
    scale = math.fsum(a) / len(a)
    return scale, math.fsum((a - scale) ** 2)


def ternary(group):
    """(scale, squared error) of {0, ±s}: by sorting, the k that maximizes S_k²/k."""
    a = np.sort(np.abs(np.asarray(group, np.float64)))[::-1]
    k = 1 + int(np.argmax(np.cumsum(a) ** 2 / np.arange(1, len(a) + 1)))
    scale = math.fsum(a[:k]) / k
    return scale, math.fsum((a[:k] - scale) ** 2) + math.fsum(a[k:] ** 2)


def ternary_threshold(group, factor):
    """(codes, scale, cut) of ternary weight networks: nonzero above factor·mean |w|, s the mean
    there."""
    w = np.asarray(group, np.float64)
    cut = factor * np.mean(np.abs(w))
    above = np.abs(w) > cut
    scale = np.mean(np.abs(w[above])) if above.any() else 0.0
    return np.sign(w) * above, scale, cut


def channel_groups(shape, axes):
    """(index of the group's entries, index of its scale) for each combination of indices along
    `axes`."""
    axes = [axis % len(shape) for axis in axes]
    for place in itertools.product(*(range(shape[axis]) for axis in axes)):
        entries, scale = [slice(None)] * len(shape), [0] * len(shape)
        for axis, i in zip(axes, place, strict=True):
            entries[axis] = scale[axis] = i
        yield tuple(entries), tuple(scale)


def block_groups(shape, size, axis):
    """As `channel_groups`, for each run of `size` entries along `axis`."""
    axis %= len(shape)
    starts = [range(0, n, size if i == axis else 1) for i, n in enumerate(shape)]
    for place in itertools.product(*starts):
        entries, scale = list(place), list(place)
        entries[axis] = slice(place[axis], place[axis] + size)
        scale[axis] = place[axis] // size
        yield tuple(entries), tuple(scale)
