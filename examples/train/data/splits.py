"""Splits of labelled images: in memory, or read and decoded as they are needed."""

import collections
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Indices = NDArray[np.int64]
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Key = tuple[int, int]  # seed and epoch: random crops are made from them and the image's index

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # as Pillow calls what has so many channels
AHEAD = 2  # batches that are decoded while one is in use


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (uint8: count, height, width, channels) and their labels (int32)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Indices) -> "Split":
        return Split(self.images[indices], self.labels[indices])

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return self.images.shape[1:]

    def part(self, indices: Indices) -> "Split":
        """The split of these images."""
        return self[indices]

    def batches(self, parts: Iterable[Indices], key: Key | None = None) -> Iterator["Split"]:
        """Images by their indices; what is random about them is up to the training step."""
        del key
        return (self[indices] for indices in parts)


@dataclasses.dataclass(frozen=True)
class Stream:
    """Encoded images, decoded by threads when they are asked for, all to squares of one side.

    Attributes:
      name: what it is called in an error.
      source: records by their indices, each with an encoded `image` and a `label`.
      side: of the squares, in pixels.
      channels: 1, 3 or 4.
      indices: those of the records that are in the split.
    """

    name: str
    source: Any
    side: int
    channels: int
    indices: Indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, indices: Indices) -> Split:
        return next(iter(self.batches([indices])))

    @property
    def shape(self) -> tuple[int, ...]:
        """Height, width and channels of an image."""
        return self.side, self.side, self.channels

    def part(self, indices: Indices) -> "Stream":
        """The split of these images."""
        return dataclasses.replace(self, indices=self.indices[indices])

    def batches(self, parts: Iterable[Indices], key: Key | None = None) -> Iterator[Split]:
        """Images by their indices, `AHEAD` of those that are in use and no more.

        Args:
          parts: the indices of each batch.
          key: seed and epoch of random resized crops; centre crops without it.
        """
        waiting: collections.deque[list[Future[tuple[NDArray[np.uint8], int]]]]
        waiting = collections.deque()
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            try:
                for indices in parts:
                    places = self.indices[indices].tolist()
                    waiting.append([threads.submit(self._decoded, i, key) for i in places])
                    if len(waiting) > AHEAD:
                        yield _gathered(waiting.popleft())
                while waiting:
                    yield _gathered(waiting.popleft())
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _decoded(self, index: int, key: Key | None) -> tuple[NDArray[np.uint8], int]:
        record = self.source[index]
        try:
            picture = picture_of(record["image"], self.channels)
        except (OSError, SyntaxError) as error:
            raise ValueError(f"Image {index} of {self.name} cannot be read: {error}") from None
        if key is None:
            box = centre_box(*picture.size)
        else:
            box = random_box(np.random.default_rng((*key, index)), *picture.size)
        return resized(picture, box, self.side), record["label"]


AnySplit = Split | Stream


def _gathered(images: list[Future[tuple[NDArray[np.uint8], int]]]) -> Split:
    pixels, labels = zip(*(image.result() for image in images), strict=True)
    return Split(np.stack(pixels), np.array(labels, np.int32))


def picture_of(image: bytes, channels: int) -> Image.Image:
    """The picture in a file's bytes."""
    return Image.open(io.BytesIO(image)).convert(MODES[channels])


def resized(picture: Image.Image, box: Box, side: int) -> NDArray[np.uint8]:
    """A box of a picture as a square: side, side, channels."""
    small = picture.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return np.asarray(small).reshape(side, side, -1)


def centre_box(width: int, height: int, share: float = 224 / 256) -> Box:
    """The square in the middle: by default that of 224 pixels where the shorter side has 256."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(rng: np.random.Generator, width: int, height: int) -> Box:
    """The customary box: of 8 to 100 % of the area, and from 3:4 to 4:3, anywhere in the image;
    the square in the middle if ten such boxes do not fit in.
    """
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(width - w + 1), rng.integers(height - h + 1)
            return float(left), float(top), float(left + w), float(top + h)
    return centre_box(width, height, 1)
