"""The training program's data: splits, TFDS, and what it says where there are none."""

import json
import shutil

import numpy as np
import pytest

from examples.train import __main__ as train
from examples.train.data import load as data
from tests.helpers import tiny_tfds as tiny


def test_digits_are_split_once_for_all_runs():
    everything = data.load("digits", validation=0.2)
    sizes = [len(split) for split in (everything.train, everything.validation, everything.test)]
    assert sizes == [1077, 270, 450]
    part = data.load("digits", validation=0.2, train_examples=256)
    assert len(part.train) == 256
    images = [
        split.images.reshape(len(split), -1)
        for split in (everything.train, everything.validation, everything.test)
    ]
    seen = [{row.tobytes() for row in part} for part in images]
    assert not (seen[0] | seen[1]) & seen[2]
    assert set(np.bincount(everything.test.labels)) <= {43, 44, 45, 46}
    data._digits.cache_clear()  # as in another process
    np.testing.assert_array_equal(data.load("digits").test.images, part.test.images)


def test_unknown_dataset_lists_the_known(capsys):
    assert train.main(["--dataset", "cifar11"]) == 2
    message = capsys.readouterr().err
    assert "'cifar11'" in message
    assert "digits, cifar10, cifar100" in message
    assert "Did you mean" in message


def test_data_that_is_not_there_says_what_to_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert train.main(["--dataset", "cifar100", "--quiet"]) == 2
    message = capsys.readouterr().err
    assert 'pip install ".[prepare]"' in message
    assert "tfds.builder('cifar100', file_format='array_record').download_and_prepare()" in message
    assert "--dataset digits" in message
    assert str(tmp_path) in message


def test_data_that_is_no_image_classification_is_refused():
    with pytest.raises(ValueError, match="not an image classification"):
        data.load("tiny_shakespeare")


@pytest.fixture(scope="module")
def tiny_tfds(tmp_path_factory):
    """A directory with a tiny CIFAR-100 and a tiny MNIST."""
    place = tmp_path_factory.mktemp("tfds")
    for builder in (tiny.Cifar100, tiny.Mnist):
        builder(data_dir=place, file_format="array_record").download_and_prepare()
    return place


@pytest.mark.parametrize("builder", [tiny.Cifar100, tiny.Mnist])
def test_any_image_classification_data_of_tfds(builder, tiny_tfds, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_tfds))
    loaded = data.load(builder.name)
    assert loaded.classes == builder.CLASSES
    for split, count in ((loaded.train, tiny.TRAIN), (loaded.test, tiny.TEST)):
        order = np.argsort(split.labels, kind="stable")
        expected = np.arange(count) % builder.CLASSES
        np.testing.assert_array_equal(split.labels[order], np.sort(expected))
        ours, theirs = (
            {image.tobytes() for image in images}
            for images in (split.images, tiny.images(count, builder.SHAPE))
        )
        assert ours == theirs
    assert data.load(builder.name, image_size=16).train.images.shape[1:3] == (16, 16)


def test_data_prepared_in_a_format_that_needs_tensorflow(tiny_tfds, tmp_path, monkeypatch, capsys):
    place = tmp_path / "mnist" / "3.0.1"
    shutil.copytree(tiny_tfds / "mnist" / "3.0.1", place)
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert train.main(["--dataset", "mnist"]) == 2
    message = capsys.readouterr().err
    assert "format tfrecord, which needs TensorFlow" in message
    assert "file_format='array_record'" in message


def test_too_few_examples_to_hold_out(tiny_tfds, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_tfds))
    with pytest.raises(ValueError, match=r"--validation 0\.1 .*4 of 40 examples.*100 classes"):
        data.load("cifar100", validation=0.1)


@pytest.mark.parametrize("validation", [0.0, 0.25])
def test_a_part_is_the_same_and_only_it_is_decoded(validation, tiny_tfds, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tiny_tfds))
    whole = data.load("mnist", 16, validation)
    decoded, resized = [], data._resized
    monkeypatch.setattr(data, "_resized", lambda *image: decoded.append(0) or resized(*image))
    part = data.load("mnist", 16, validation, train_examples=6)
    held_out = int(validation * tiny.TRAIN)
    assert len(decoded) == 6 + held_out + tiny.TEST
    kept = np.random.default_rng(data.SPLIT_SEED).permutation(tiny.TRAIN - held_out)[:6]
    for found, expected in (
        (part.train, whole.train[kept]),
        (part.validation, whole.validation),
        (part.test, whole.test),
    ):
        np.testing.assert_array_equal(found.images, expected.images)
        np.testing.assert_array_equal(found.labels, expected.labels)
    assert len(data.load("mnist", 16, validation, train_examples=99).train) == len(whole.train)


def test_cifar10_if_it_is_there():
    try:
        cifar = data.load("cifar10", image_size=16, train_examples=1000, progress=False)
    except FileNotFoundError:
        pytest.skip("CIFAR-10 is not prepared on this machine: docs/training.md says how")
    assert cifar.train.images.shape == (1000, 16, 16, 3)
    assert cifar.test.images.shape == (10000, 16, 16, 3)
    assert np.bincount(cifar.test.labels).tolist() == [1000] * 10
    assert np.all(abs(np.bincount(cifar.train.labels) - 100) < 50)
    mean, deviation = cifar.channel_moments  # those of CIFAR-10, the deviations of smaller images
    np.testing.assert_allclose(mean / 255, [0.491, 0.482, 0.447], atol=0.02)
    assert np.all((deviation > 50) & (deviation < 70))
    source = data.Encoded(data._builder("cifar10"), "train")
    assert len(source) == 50000
    kept = np.random.default_rng(data.SPLIT_SEED).permutation(50000)[:100]
    again = source.decoded(16, progress=False, indices=kept)
    np.testing.assert_array_equal(again.images, cifar.train.images[:100])
    np.testing.assert_array_equal(again.labels, cifar.train.labels[:100])
