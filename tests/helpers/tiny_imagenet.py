"""A tiny data set under the name of TFDS's imagenet2012: JPEGs of differing sizes, and a test split
without labels.
"""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TRAIN, TEST = 40, 20
SIZES = ((40, 60), (60, 40), (48, 48), (34, 100))  # height, width


def size(i):
    """Height and width of the i-th image of a split."""
    return SIZES[i % len(SIZES)]


def picture(i):
    """Red rises from left to right and green from top to bottom, from 0 to 250: a crop's corners
    show where it lies. Blue tells the images apart.
    """
    height, width = size(i)
    red = np.linspace(0, 250, width) + np.zeros((height, 1))
    green = np.linspace(0, 250, height)[:, None] + np.zeros(width)
    blue = np.full((height, width), 6 * i)
    return np.stack([red, green, blue], axis=-1).round().astype(np.uint8)


class Imagenet2012(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Version and features are those of TFDS's own; labels go round ten of the classes."""

    VERSION = tfds.core.Version("5.1.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=1000),
            "file_name": tfds.features.Text(),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(TRAIN),
            "validation": self._generate_examples(TEST),
            "test": self._generate_examples(4, labelled=False),
        }

    def _generate_examples(self, count, labelled=True):
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(picture(i)).save(file, "jpeg", quality=100, subsampling=0)
            file.seek(0)
            yield (
                i,
                {"image": file, "label": i % 10 if labelled else -1, "file_name": f"{i}.JPEG"},
            )
