"""Texts in memory, as codes of their characters: TFDS's tiny_shakespeare."""

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from examples.runs import datasets

HELD_OUT = 0.05
Codes = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class Text:
    """A text's splits, each character as its place in `characters`.

    Attributes:
      characters: those of the training split, in order.
      train: what is trained on.
      held_out: the last twentieth of TFDS's training split, to choose settings on.
      validation: TFDS's.
      test: TFDS's.
    """

    characters: str
    train: Codes
    held_out: Codes
    validation: Codes
    test: Codes

    def decode(self, codes: Codes) -> str:
        """Codes as text."""
        return "".join(self.characters[code] for code in codes)


def load(name: str = "tiny_shakespeare") -> Text:
    """Loads a text of TFDS.

    Raises:
      FileNotFoundError: if it has to be prepared first; the message says how.
    """
    builder = datasets.builder_of(name)
    datasets.check_prepared(name, builder)
    splits = ("train", "validation", "test")
    return encode(*(builder.as_data_source(split=split)[0]["text"].decode() for split in splits))


def encode(train: str, validation: str, test: str) -> Text:
    """Splits as codes; a part of the training split is held out.

    Raises:
      ValueError: if validation or test have characters that the training split has not.
    """
    characters = "".join(sorted(set(train)))
    if unknown := sorted(set(validation + test) - set(characters)):
        raise ValueError(f"The training split has none of these characters: {unknown}.")
    code_of = {character: code for code, character in enumerate(characters)}

    def codes(text: str) -> Codes:
        return np.array([code_of[character] for character in text], np.int32)

    kept = len(train) - round(HELD_OUT * len(train))
    return Text(
        characters, codes(train[:kept]), codes(train[kept:]), codes(validation), codes(test)
    )


def batch_at(codes: Codes, context: int, batch: int, seed: int, step: int) -> Codes:
    """The batch of a step: pieces of `context` characters and the one that follows, from anywhere
    in a text; they depend on the seed and the step alone.
    """
    starts = np.random.default_rng((seed, step)).integers(0, len(codes) - context, batch)
    return codes[starts[:, None] + np.arange(context + 1)]


def windows(codes: Codes, context: int, batch: int) -> Iterator[tuple[Codes, NDArray[np.bool_]]]:
    """A whole text in batches of pieces that overlap by half, and which of their predictions count:
    each character but the first one is predicted once, from at least the half of a context, or all
    that there is before it.

    Yields:
      Pieces (batch, context + 1), and for each of their characters but the first whether it counts
      (batch, context). The last batch is filled up with pieces of which none does.
    """
    starts = np.arange(0, max(len(codes) - 1 - context, 0) + context // 2, context // 2)[:, None]
    starts = np.pad(starts, ((0, -len(starts) % batch), (0, 0)), constant_values=len(codes))
    within = np.arange(context)
    predicted = starts + 1 + within
    counts = (predicted < len(codes)) & ((within >= context - context // 2) | (starts == 0))
    pieces = np.minimum(starts + np.arange(context + 1), len(codes) - 1)
    for first in range(0, len(starts), batch):
        part = slice(first, first + batch)
        yield codes[pieces[part]], counts[part]
