"""Data that are read and decoded as they are needed, on a tiny data set like ImageNet."""

import itertools

import numpy as np
import pytest

from examples.train import __main__ as train
from examples.train.data import load as data
from examples.train.data.splits import AHEAD, Split, Stream
from tests.helpers import tiny_imagenet as tiny
from tests.helpers import tiny_tfds

SIDE = 16


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A directory with the tiny data sets; TFDS looks there."""
    place = tmp_path_factory.mktemp("tfds")
    for builder in (tiny.Imagenet2012, tiny_tfds.Mnist):
        builder(data_dir=place, file_format="array_record").download_and_prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(place))
        yield place


@pytest.fixture(scope="module")
def streamed(place):
    return data.load("imagenet2012", SIDE, stream="yes")


def numbers(split):
    """Which of the pictures these are, by their blue."""
    return np.round(split.images[..., 2].mean(axis=(1, 2)) / 6).astype(int).tolist()


def box(image, number):
    """Left, top, right and bottom of a crop, from its red and green, which rise evenly."""
    height, width = tiny.size(number)
    centres = (np.arange(SIDE) + 0.5) / SIDE
    inner = slice(3, -3)  # a filter's ends are cut off at the image's edge
    edges = []
    for axis, length, channel in ((0, width, 0), (1, height, 1)):
        values = image[..., channel].mean(axis=axis) / 250 * (length - 1) + 0.5
        slope, start = np.polyfit(centres[inner], values[inner], 1)
        edges.append((start, start + slope))
    (left, right), (top, bottom) = edges
    return left, top, right, bottom


def all_of(split, key=None):
    """The whole split as one batch."""
    (batch,) = split.batches([np.arange(len(split))], key)
    return batch


def test_large_data_are_streamed_and_small_ones_are_not(monkeypatch):
    assert isinstance(data.load("imagenet2012", SIDE, progress=False).train, Split)
    monkeypatch.setattr(data, "IN_MEMORY", tiny.TRAIN * SIDE * SIDE * 3 - 1)
    loaded = data.load("imagenet2012", SIDE)
    assert isinstance(loaded.train, Stream)
    assert isinstance(loaded.test, Stream)
    assert isinstance(data.load("imagenet2012", SIDE, progress=False, stream="no").train, Split)


def test_centre_crops_and_labels(streamed):
    for split, count in ((streamed.train, tiny.TRAIN), (streamed.test, tiny.TEST)):
        batch = split[np.arange(len(split))]
        found = numbers(batch)
        assert sorted(found) == list(range(count))  # not those of the split without labels
        assert batch.labels.tolist() == [i % 10 for i in found]
        for image, number in zip(batch.images, found, strict=True):
            height, width = tiny.size(number)
            half = min(height, width) * 224 / 256 / 2
            expected = (width / 2 - half, height / 2 - half, width / 2 + half, height / 2 + half)
            np.testing.assert_allclose(box(image, number), expected, atol=1)
    assert streamed.train.shape == (SIDE, SIDE, 3)
    assert streamed.classes == 1000


def test_random_crops_are_of_the_customary_size_and_shape(streamed):
    areas, ratios = [], []
    for epoch in range(4):
        batch = all_of(streamed.train, (0, epoch))
        for image, number in zip(batch.images, numbers(batch), strict=True):
            height, width = tiny.size(number)
            left, top, right, bottom = box(image, number)
            assert min(left, top) > -1
            assert right < width + 1
            assert bottom < height + 1
            areas.append((right - left) * (bottom - top) / (width * height))
            ratios.append((right - left) / (bottom - top))
    assert 0.06 < min(areas) < 0.15
    assert 0.8 < max(areas) < 1.05
    assert 0.68 < min(ratios) < 0.85
    assert 1.2 < max(ratios) < 1.47


def test_crops_depend_on_the_seed_the_epoch_and_the_image_alone(streamed):
    train = streamed.train
    whole = all_of(train, (1, 2)).images
    again = data.load("imagenet2012", SIDE, stream="yes").train
    order = np.random.default_rng(0).permutation(len(train))
    pieces = [order[i : i + 7] for i in range(0, len(order), 7)]
    for indices, batch in zip(pieces, again.batches(pieces, (1, 2)), strict=True):
        np.testing.assert_array_equal(batch.images, whole[indices])
    part = train.part(order[:5])
    np.testing.assert_array_equal(all_of(part, (1, 2)).images, whole[order[:5]])
    for key in ((1, 3), (2, 2)):
        changed = (all_of(train, key).images != whole).any(axis=(1, 2, 3))
        assert changed.mean() > 0.9


def test_no_more_is_decoded_than_the_next_batches(streamed):
    reads, size = [], 4

    class Source:
        def __getitem__(self, index):
            reads.append(index)
            return streamed.train.source[index]

    stream = Stream("made", Source(), SIDE, 3, np.arange(tiny.TRAIN))
    batches = stream.batches(itertools.repeat(np.arange(size)))  # without end
    for taken in range(1, 6):
        assert len(next(batches)) == size
        assert taken * size <= len(reads) <= (taken + AHEAD) * size
    batches.close()
    assert len(reads) <= (5 + AHEAD) * size


def test_one_channel_and_images_held_out():
    loaded = data.load("mnist", validation=0.25, train_examples=20, stream="yes")
    assert [len(s) for s in (loaded.train, loaded.validation, loaded.test)] == [20, 10, 20]
    assert loaded.train.shape == (28, 28, 1)  # the side need not be said where it is one
    everything = data.load("mnist", validation=0.25, stream="yes")
    kept, held_out = set(everything.train.indices), set(loaded.validation.indices)
    assert set(loaded.train.indices) < kept
    assert not kept & held_out
    assert kept | held_out == set(range(tiny_tfds.TRAIN))
    assert set(everything.validation.indices) == held_out


def test_moments_are_those_of_the_images(streamed, monkeypatch):
    images = all_of(streamed.train).images / 1.0
    np.testing.assert_allclose(
        streamed.channel_moments, [images.mean((0, 1, 2)), images.std((0, 1, 2))], rtol=1e-4
    )
    monkeypatch.setattr(data, "SAMPLE", 4)
    some = streamed.train[np.array([0, 13, 26, 39])].images / 1.0
    np.testing.assert_allclose(streamed.channel_moments[0], some.mean((0, 1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dataset=imagenet2012 --stream=yes", "'imagenet2012' differ in size"),
        ("--dataset=digits --stream=yes", "--stream yes: the digits are always in memory"),
        ("--dataset=imagenet2012 --stream=yes --image-size=16 --validation=0.1", "holds 4 of 40"),
    ],
)
def test_what_cannot_be_streamed(options, message, capsys):
    assert train.main([*options.split(), "--quiet", "--out=unused"]) == 2
    assert message in capsys.readouterr().err


def test_a_damaged_image_is_named(streamed):
    class Source:
        def __getitem__(self, index):
            record = dict(streamed.train.source[index])
            return record | {"image": record["image"][:200]} if index == 7 else record

    stream = Stream("the train split of made", Source(), SIDE, 3, np.arange(tiny.TRAIN))
    with pytest.raises(ValueError, match="Image 7 of the train split of made cannot be read"):
        all_of(stream)


def test_what_has_to_be_downloaded_by_hand(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert train.main(["--preset=imagenet", "--out=unused"]) == 2
    message = capsys.readouterr().err
    assert "tfds.builder('imagenet2012', file_format='array_record')" in message
    assert "ILSVRC2012_img_train.tar" in message
    assert str(tmp_path / "downloads" / "manual") in message
    with pytest.raises(FileNotFoundError, match=r"tfds\.builder\('emnist/letters'"):
        data.load("emnist/letters")
