"""Image classification data in memory: scikit-learn's digits, or any such TFDS dataset that is
prepared.
"""

import dataclasses
import difflib
import logging
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

SPLIT_SEED = 0  # the same splits for every run, whatever its seed
KNOWN = ("digits", "cifar10", "cifar100")
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

PREPARE = """\
{name} is not prepared in {place} (TFDS_DATA_DIR sets another place).
To download and prepare it, once, in a clone of brelax_jax:
    pip install ".[prepare]"
    python -c "import tensorflow_datasets as tfds; \
tfds.builder('{name}', file_format='array_record').download_and_prepare()"
The extra brings TensorFlow, which TFDS needs for this step only.
Without a network, try --dataset digits."""


@dataclasses.dataclass(frozen=True)
class Split:
    """Images (uint8: count, height, width, channels) and their labels (int32)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: NDArray[np.int64]) -> "Split":
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class Data:
    """The splits of a dataset; `validation` is empty if none was held out."""

    train: Split
    validation: Split
    test: Split
    classes: int

    @property
    def channel_moments(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Mean and standard deviation of each channel over the training images."""
        counts = [
            np.bincount(channel.ravel(), minlength=256)
            for channel in np.moveaxis(self.train.images, -1, 0)
        ]
        values, weights = np.arange(256), np.array(counts) / (self.train.images[..., 0].size)
        mean = weights @ values
        return mean.astype(np.float32), np.sqrt(weights @ values**2 - mean**2).astype(np.float32)


def load(
    name: str,
    image_size: int | None = None,
    validation: float = 0.0,
    train_examples: int | None = None,
    progress: bool = True,
) -> Data:
    """Loads a dataset, and holds a share of its training split out for validation.

    Raises:
      ValueError: if the name is not known, or the dataset not one of labelled images.
      FileNotFoundError: if it has to be prepared first; the message says how.
    """
    train, test, classes = (
        _digits(image_size) if name == "digits" else _tfds(name, image_size, progress)
    )
    held_out = Split(train.images[:0], train.labels[:0])
    if validation:
        few = int(validation * len(train))
        if few < classes:
            raise ValueError(
                f"--validation {validation} holds {few} of {len(train)} examples out, fewer than "
                f"the {classes} classes: hold out more of them, or 0."
            )
        train, held_out = _stratified(train, validation)
    if train_examples is not None and train_examples < len(train):
        train = train[np.random.default_rng(SPLIT_SEED).permutation(len(train))[:train_examples]]
    return Data(train, held_out, test, classes)


def _stratified(split: Split, share: float) -> tuple[Split, Split]:
    """Two parts with the same share of every class."""
    kept, held_out = train_test_split(
        np.arange(len(split)), test_size=share, stratify=split.labels, random_state=SPLIT_SEED
    )
    return split[np.sort(kept)], split[np.sort(held_out)]


def _digits(image_size: int | None) -> tuple[Split, Split, int]:
    """1,797 handwritten digits of 8 by 8 pixels, a quarter of them for the test."""
    digits: Any = load_digits()
    images = (digits.images * 255 / 16).round().astype(np.uint8)[..., None]
    images = np.stack([_resized(image, image_size) for image in images])
    train, test = _stratified(Split(images, digits.target.astype(np.int32)), 0.25)
    return train, test, 10


def _tfds(name: str, image_size: int | None, progress: bool) -> tuple[Split, Split, int]:
    logging.getLogger("absl").setLevel(
        logging.ERROR
    )  # it would recommend OpenCV, and warn of what is asked here
    import tensorflow_datasets as tfds

    known = tfds.list_builders(with_community_datasets=False)
    if name.split("/")[0].split(":")[0] not in known:
        close = difflib.get_close_matches(name, known)
        raise ValueError(
            f"Unknown dataset {name!r}. Known: {', '.join(KNOWN)}, and every image classification "
            f"dataset of TFDS, such as {', '.join(ALSO)}."
            + (f" Did you mean {' or '.join(close)}?" if close else "")
        )
    builder: Any = tfds.builder(name, data_dir=os.environ.get("TFDS_DATA_DIR"))
    features = builder.info.features
    if not {"image", "label"} <= set(features or ()):
        raise ValueError(
            f"{name!r} is not an image classification dataset: its features are {list(features)}."
        )
    if not builder.is_prepared():
        raise FileNotFoundError(PREPARE.format(name=name, place=builder.data_path))
    if builder.info.file_format.value not in ("array_record", "parquet"):  # no random access
        remedy = PREPARE.format(name=name, place="the format array_record")
        raise FileNotFoundError(
            f"{builder.data_path} is of the format {builder.info.file_format.value}, which needs "
            f"TensorFlow to be read. Remove it, or set TFDS_DATA_DIR to another place.\n{remedy}"
        )
    held_out = next((s for s in ("test", "validation") if s in builder.info.splits), None)
    if held_out is None or "train" not in builder.info.splits:
        raise ValueError(
            f"{name!r} needs a train and a test split, but has {list(builder.info.splits)}."
        )
    train, test = (_decoded(builder, split, image_size, progress) for split in ("train", held_out))
    return train, test, features["label"].num_classes


def _decoded(
    builder: Any, split: str, image_size: int | None, progress: bool, chunk: int = 500
) -> Split:
    """All images of a split, decoded once."""
    source = builder.as_data_source(split=split)
    images, labels = [], []
    with tqdm(
        total=len(source),
        desc=f"{builder.name} {split}",
        unit="img",
        disable=None if progress else True,
    ) as bar:
        for start in range(0, len(source), chunk):
            rows = source.__getitems__(list(range(start, min(start + chunk, len(source)))))
            labels.extend(row["label"] for row in rows)
            images.extend(_resized(row["image"], image_size) for row in rows)
            bar.update(len(rows))
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            f"The images of {builder.name!r} differ in size: give one, as in --image-size 224."
        )
    return Split(np.stack(images), np.array(labels, np.int32))


def _resized(image: NDArray[np.uint8], side: int | None) -> NDArray[np.uint8]:
    """The centre square of an image, resized; the image itself if no side is given."""
    height, width, channels = image.shape
    if side is None or (height, width) == (side, side):
        return image
    crop = min(height, width)
    left, top = (width - crop) / 2, (height - crop) / 2
    picture = Image.fromarray(image[..., 0] if channels == 1 else image)
    small = picture.resize(
        (side, side), Image.Resampling.BICUBIC, box=(left, top, left + crop, top + crop)
    )
    return np.asarray(small).reshape(side, side, channels)
