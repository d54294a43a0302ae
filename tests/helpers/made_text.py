"""Made texts of which there is something to learn."""

import numpy as np


def made_text(length, seed):
    """Vowels and consonants take turns, mostly: there is something to learn."""
    rng = np.random.default_rng(seed)
    pairs = zip(rng.choice([*"bcdfg\n"], length), rng.choice([*"aeiou "], length), strict=True)
    return "".join(a + b for a, b in pairs)[:length]
