"""Image classification data: scikit-learn's digits, or any such TFDS dataset that is prepared, in
memory if it is small.
"""

import dataclasses
import difflib
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from examples.runs import datasets
from examples.runs.progress import BAR
from examples.train.data.splits import (
    AnySplit,
    Indices,
    Split,
    Stream,
    centre_box,
    picture_of,
    resized,
)

SPLIT_SEED = 0  # the same splits for every run, whatever its seed
IN_MEMORY = 4 * 2**30  # bytes of training images, decoded, beyond which they are not kept
SAMPLE = 1000  # images that say the moments of those that are not in memory
KNOWN = ("digits", "cifar10", "cifar100", "imagenet2012")
ALSO = (
    "mnist",
    "fashion_mnist",
    "kmnist",
    "emnist",
    "svhn_cropped",
    "cinic10",
    "imagenette",
    "food101",
)

OFFLINE = "\nWithout a network, try --dataset digits."


@dataclasses.dataclass(frozen=True)
class Data:
    """The splits of a dataset; `validation` is empty if none was held out."""

    train: AnySplit
    validation: AnySplit
    test: AnySplit
    classes: int

    @property
    def channel_moments(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of each channel over the training images, or over some that
        lie evenly in a stream.
        """
        train = self.train
        if isinstance(train, Stream):
            train = train[np.linspace(0, len(train) - 1, min(SAMPLE, len(train))).astype(np.int64)]
        counts = [
            np.bincount(channel.ravel(), minlength=256)
            for channel in np.moveaxis(train.images, -1, 0)
        ]
        values, weights = np.arange(256), np.array(counts) / (train.images[..., 0].size)
        mean = weights @ values
        return mean.astype(np.float32), np.sqrt(weights @ values**2 - mean**2).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A split of a prepared dataset that is to be in memory, before its images are decoded."""

    builder: Any
    split: str

    def __len__(self) -> int:
        return self.builder.info.splits[self.split].num_examples

    @property
    def labels(self) -> NDArray[np.int32]:
        """Those of all images, in their order."""
        rows = _rows(_encoded(self.builder, self.split), np.arange(len(self)))
        return np.array([row["label"] for row in rows], np.int32)

    def decoded(self, side: int | None, progress: bool, indices: Indices | None = None) -> Split:
        """Some of the images, or all, as squares of this side."""
        if indices is None:
            indices = np.arange(len(self))
        images, labels = [], []
        channels = self.builder.info.features["image"].shape[-1]
        with tqdm(
            total=len(indices),
            desc=f"reading {self.builder.name} {self.split}",
            bar_format=BAR,
            unit="img",
            disable=None if progress else True,
        ) as bar:
            for row in _rows(_encoded(self.builder, self.split), indices):
                labels.append(row["label"])
                images.append(_resized(picture_of(row["image"], channels), side))
                bar.update()
        if len({image.shape for image in images}) > 1:
            raise ValueError(
                f"The images of {self.builder.name!r} differ in size: give one, as in "
                "--image-size 224."
            )
        return Split(np.stack(images), np.array(labels, np.int32))


def _rows(source: Any, indices: Indices, chunk: int = 500) -> Iterator[dict[str, Any]]:
    """Records by their indices, read some at a time."""
    for start in range(0, len(indices), chunk):
        yield from source.__getitems__(indices[start : start + chunk].tolist())


def load(
    name: str,
    image_size: int | None = None,
    validation: float = 0.0,
    train_examples: int | None = None,
    progress: bool = True,
    stream: str = "auto",
) -> Data:
    """Loads a dataset, and holds a share of its training split out for validation: the same share
    of every class, if it is in memory.

    Args:
      name: digits, or the name of a TFDS dataset.
      image_size: side of the squares to resize images to, in pixels.
      validation: the share to hold out.
      train_examples: how many of the training split to keep, at most.
      progress: whether to show a bar while images are decoded.
      stream: "yes" reads and decodes images as they are needed, "no" keeps all of them in memory;
        "auto" keeps them if they take no more than `IN_MEMORY`.

    Raises:
      ValueError: if the name is not known, or the dataset not one of labelled images.
      FileNotFoundError: if it has to be prepared first; the message says how.
    """
    if name != "digits":
        part = train_examples is not None
        train, test, classes = _tfds(name, image_size, progress, stream, part)
    elif stream == "yes":
        raise ValueError("--stream yes: the digits are always in memory; give a TFDS dataset.")
    else:
        train, test, classes = _digits(image_size)
    kept, held_out = np.arange(len(train)), np.arange(0)
    if validation:
        few = int(validation * len(train))
        if few < classes:
            raise ValueError(
                f"--validation {validation} holds {few} of {len(train)} examples out, fewer than "
                f"the {classes} classes: hold out more of them, or 0."
            )
        kept, held_out = _divided(train, validation)
    if train_examples is not None and train_examples < len(kept):
        order = np.random.default_rng(SPLIT_SEED).permutation(len(kept))
        kept = kept[order[:train_examples]]
    if isinstance(train, Encoded):
        train = train.decoded(image_size, progress, np.concatenate([kept, held_out]))
        kept, held_out = np.split(np.arange(len(train)), [len(kept)])
    validating = train.part(held_out)
    return Data(train.part(kept) if len(kept) < len(train) else train, validating, test, classes)


def _divided(split: AnySplit | Encoded, share: float) -> tuple[Indices, Indices]:
    """The indices of two parts, with the same share of every class where labels are in memory."""
    from sklearn.model_selection import train_test_split

    labels = None if isinstance(split, Stream) else split.labels
    kept, held_out = train_test_split(
        np.arange(len(split)), test_size=share, stratify=labels, random_state=SPLIT_SEED
    )
    return np.sort(kept), np.sort(held_out)


@functools.cache
def _digits(image_size: int | None) -> tuple[Split, Split, int]:
    """1,797 handwritten digits of 8 by 8 pixels, a quarter of them for the test."""
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)[..., None]
    if image_size is not None:
        pictures = map(Image.fromarray, images[..., 0])
        images = np.stack([_resized(picture, image_size) for picture in pictures])
    everything = Split(images, digits.target.astype(np.int32))
    train, test = _divided(everything, 0.25)
    return everything[train], everything[test], 10


def _tfds(
    name: str, image_size: int | None, progress: bool, stream: str, part: bool
) -> tuple[AnySplit | Encoded, AnySplit, int]:
    """The splits and the number of classes; if only a part of the training split will be used, it
    is not decoded yet.
    """
    builder = _builder(name)
    splits, features = builder.info.splits, builder.info.features
    held_out = next((s for s in ("test", "validation") if _has_labels(builder, s)), None)
    if held_out is None or "train" not in splits:
        raise ValueError(
            f"{name!r} needs a train and a labelled test split, but has {list(splits)}."
        )
    if stream == "auto":
        decoded = splits["train"].num_examples * math.prod(_shape(builder, image_size or 224))
        stream = "yes" if decoded > IN_MEMORY else "no"
    classes = features["label"].num_classes
    if stream == "yes":
        train, test = (_streamed(builder, split, image_size) for split in ("train", held_out))
        return train, test, classes
    train = Encoded(builder, "train")
    if not part:
        train = train.decoded(image_size, progress)
    return train, Encoded(builder, held_out).decoded(image_size, progress), classes


def _builder(name: str) -> Any:
    """TFDS's builder of a dataset that is prepared."""
    known = datasets.tfds().list_builders(with_community_datasets=False)
    if name.split("/")[0].split(":")[0] not in known:
        close = difflib.get_close_matches(name, known)
        raise ValueError(
            f"Unknown dataset {name!r}. Known: {', '.join(KNOWN)}, and every image classification "
            f"dataset of TFDS, such as {', '.join(ALSO)}."
            + (f" Did you mean {' or '.join(close)}?" if close else "")
        )
    builder = datasets.builder_of(name)
    features = builder.info.features
    if not {"image", "label"} <= set(features or ()):
        raise ValueError(
            f"{name!r} is not an image classification dataset: its features are {list(features)}."
        )
    datasets.check_prepared(name, builder, OFFLINE)
    return builder


def _has_labels(builder: Any, split: str) -> bool:
    """Whether there is such a split with labels; TFDS labels what has none by -1."""
    return split in builder.info.splits and _encoded(builder, split)[0]["label"] >= 0


def _encoded(builder: Any, split: str) -> Any:
    """The records of a split, their images not decoded."""
    from tensorflow_datasets.core.decode import SkipDecoding

    return builder.as_data_source(split=split, decoders={"image": SkipDecoding()})


def _shape(builder: Any, side: int | None) -> tuple[int, int, int]:
    """The shape of all images, when they are resized to this side.

    Raises:
      ValueError: if no side is given and they are not squares of one size.
    """
    height, width, channels = builder.info.features["image"].shape
    if side is None and (height is None or height != width):
        raise ValueError(
            f"The images of {builder.name!r} differ in size, or are no squares: give one, as in "
            "--image-size 224."
        )
    return side or height, side or width, channels


def _streamed(builder: Any, split: str, image_size: int | None) -> Stream:
    """A split that is decoded as it is needed."""
    side, _, channels = _shape(builder, image_size)
    source = _encoded(builder, split)
    name = f"the {split} split of {builder.name}"
    return Stream(name, source, side, channels, np.arange(len(source)))


def _resized(picture: Image.Image, side: int | None) -> NDArray[np.uint8]:
    """The centre square of a picture, resized; all of the picture if no side is given."""
    width, height = picture.size
    if side is None or (height, width) == (side, side):
        return np.asarray(picture).reshape(height, width, -1)
    return resized(picture, centre_box(width, height, 1), side)
