"""Tiny TFDS data sets under the names of real ones, prepared without TensorFlow."""

import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TRAIN, TEST = 40, 20


def images(count, shape):
    return np.random.default_rng(count).integers(0, 256, (count, *shape), np.uint8)


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """What they share; labels go round."""

    SHAPE: tuple[int, int, int]
    CLASSES: int

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=self.SHAPE),
            "label": tfds.features.ClassLabel(num_classes=self.CLASSES),
        }
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(TRAIN), "test": self._generate_examples(TEST)}

    def _generate_examples(self, count):
        for i, image in enumerate(images(count, self.SHAPE)):
            file = io.BytesIO()
            Image.fromarray(image.squeeze()).save(file, "png")
            file.seek(0)
            yield i, {"image": file, "label": i % self.CLASSES}


class Cifar100(Tiny, skip_registration=True):
    """The version must be TFDS's own, else it looks elsewhere."""

    VERSION, SHAPE, CLASSES = tfds.core.Version("3.0.2"), (32, 32, 3), 100


class Mnist(Tiny, skip_registration=True):
    VERSION, SHAPE, CLASSES = tfds.core.Version("3.0.1"), (28, 28, 1), 10
