"""Slow references in NumPy float64, written from the definitions and sharing nothing with the library.

A *group* is a one-dimensional array of the weights that share one scale.
"""

import itertools
import math

import numpy as np


def nearest_error(group, scale, levels):
    """Σ min over l of (wᵢ − scale·l)², the squared error of the best codes at this scale."""
    points = scale * np.asarray(levels, np.float64)
    return sum(float(np.min((w - points) ** 2)) for w in np.asarray(group, np.float64))


def brute_force(group, levels):
    """The least squared error over every assignment of levels: |L|ⁿ of them, so for tiny n only."""
    w = np.asarray(group, np.float64)
    best = float(w @ w)  # at scale 0
    for assignment in itertools.product(levels, repeat=len(w)):
        q = np.array(assignment)
        if q @ w > 0:
            scale = (q @ w) / (q @ q)
            best = min(best, float(np.sum((w - scale * q) ** 2)))
    return best


def optimum(group, levels, limit=1 << 20):
    """(scale, squared error) of the global minimizer of E(s) = Σ min over l of (wᵢ − s·l)².

    An entry's nearest magnitude changes from m to the next m' where |w| = s·(m + m')/2. Between two such breakpoints
    the codes q are constant, E is quadratic, and its least value for these codes is Σw² − ⟨a, q⟩²/⟨q, q⟩. Scan all of
    them from large s to small; a window of more than `limit` breakpoints is cut into two, to bound memory.
    """
    a = np.sort(np.abs(np.asarray(group, np.float64)))
    if a.size == 0 or a[-1] == 0:
        return 0.0, 0.0
    unit = a[-1]
    a = a / unit
    magnitudes = np.array([level for level in levels if level >= 0], np.float64)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    best_gain, best_scale = 0.0, 0.0
    windows = [(0.0, 2 / middles[0] if middles.size else 1.0)]
    while windows:
        low, high = windows.pop()
        ranges = [np.searchsorted(a, (low * c, high * c), side="right") for c in middles]
        count = sum(stop - start for start, stop in ranges)
        middle = (low + high) / 2
        if count > limit and low < middle < high:
            windows += [(low, middle), (middle, high)]
            continue
        # The codes at the upper end of the window, then every change on the way down.
        index = sum((a > high * c).astype(int) for c in middles) if middles.size else 0
        q = magnitudes[index] * np.ones_like(a)
        entry = np.concatenate([a[start:stop] for start, stop in ranges] or [a[:0]])
        which = np.repeat(np.arange(len(ranges)), [stop - start for start, stop in ranges])
        order = np.argsort(entry / middles[which] if entry.size else entry)[::-1]
        entry, which = entry[order], which[order]
        along = np.cumsum(np.concatenate([[q @ a], entry * np.diff(magnitudes)[which]]))
        norm = np.cumsum(np.concatenate([[q @ q], np.diff(magnitudes**2)[which]]))
        gain = along**2 / np.maximum(norm, np.finfo(float).tiny)
        k = int(np.argmax(gain))
        if gain[k] > best_gain:
            best_gain, best_scale = gain[k], along[k] / norm[k]
    return unit * best_scale, unit**2 * scan_error(a, best_scale, magnitudes)


def scan_error(a, scale, magnitudes):
    """As `nearest_error`, for many nonnegative entries at once and for nonnegative levels."""
    least = np.full(a.shape, np.inf)
    for magnitude in magnitudes:
        least = np.minimum(least, (a - scale * magnitude) ** 2)
    return math.fsum(least)


def binary(group):
    """(scale, squared error) of {±s}: s is the mean magnitude."""
    a = np.abs(np.asarray(group, np.float64))
    scale = math.fsum(a) / len(a)
    return scale, math.fsum((a - scale) ** 2)


def ternary(group):
    """(scale, squared error) of {0, ±s}: by sorting, the k that maximizes S_k²/k."""
    a = np.sort(np.abs(np.asarray(group, np.float64)))[::-1]
    k = np.arange(1, len(a) + 1)
    best = int(np.argmax(np.cumsum(a) ** 2 / k))
    scale = math.fsum(a[: best + 1]) / (best + 1)
    return scale, math.fsum((a[: best + 1] - scale) ** 2) + math.fsum(a[best + 1 :] ** 2)


def ternary_threshold(group, factor):
    """Codes and scale of ternary weight networks: nonzero above factor·mean |w|, there the mean of |w|."""
    w = np.asarray(group, np.float64)
    above = np.abs(w) > factor * np.mean(np.abs(w))
    scale = np.mean(np.abs(w)[above]) if above.any() else 0.0
    return np.sign(w) * above, scale


def channel_groups(shape, axes):
    """Index arrays, one for each combination of indices along `axes`, with the place of its scale."""
    axes = [axis % len(shape) for axis in axes]
    for place in itertools.product(*(range(shape[axis]) for axis in axes)):
        index, scale_index = [slice(None)] * len(shape), [0] * len(shape)
        for axis, i in zip(axes, place, strict=True):
            index[axis], scale_index[axis] = i, i
        yield tuple(index), tuple(scale_index)


def block_groups(shape, size, axis):
    """Index arrays, one for each run of `size` entries along `axis`, with the place of its scale."""
    axis %= len(shape)
    for place in itertools.product(*(range(extent) for extent in shape)):
        if place[axis] % size == 0:
            index, scale_index = list(place), list(place)
            index[axis] = slice(place[axis], place[axis] + size)
            scale_index[axis] = place[axis] // size
            yield tuple(index), tuple(scale_index)
