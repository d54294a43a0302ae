"""The text of the language model: its splits, batches and windows."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from examples.language_model import text
from tests.helpers.made_text import made_text


@pytest.fixture(scope="module")
def made():
    return text.encode(made_text(2000, 0), made_text(150, 1), made_text(150, 2))


def test_a_text_is_encoded_and_a_twentieth_of_its_training_split_held_out():
    train = made_text(2000, 0)
    found = text.encode(train, "bad", "face")
    assert (len(found.train), len(found.held_out)) == (1900, 100)
    assert found.decode(np.concatenate([found.train, found.held_out])) == train
    assert (found.decode(found.validation), found.decode(found.test)) == ("bad", "face")


def test_characters_that_training_never_saw_are_refused():
    with pytest.raises(ValueError, match=r"none of these characters: \['X', 'z'\]"):
        text.encode("abc", "azX", "b")


def test_a_batch_depends_on_seed_and_step_alone(made):
    one = text.batch_at(made.train, 8, 4, seed=1, step=5)
    np.testing.assert_array_equal(one, text.batch_at(made.train, 8, 4, seed=1, step=5))
    whole = made.decode(made.train)
    assert all(made.decode(piece) in whole and len(piece) == 9 for piece in one)
    for seed, step in ((1, 6), (2, 5)):
        assert np.any(one != text.batch_at(made.train, 8, 4, seed, step))


@pytest.mark.parametrize("context", [2, 7, 8])
@pytest.mark.parametrize("length", [9, 12, 50, 57])
def test_each_character_is_predicted_once_from_half_a_context_or_all_there_is(context, length):
    seen = []
    for pieces, counts in text.windows(np.arange(length), context, batch=3):
        assert pieces.shape == (3, context + 1)
        assert counts.shape == (3, context)
        for piece, counted in zip(pieces, counts, strict=True):
            for place in np.flatnonzero(counted):
                target = piece[place + 1]
                np.testing.assert_array_equal(
                    piece[: place + 1], target - np.arange(place + 1, 0, -1)
                )
                assert place + 1 >= min(target, context // 2)
                seen.append(target)
    assert sorted(seen) == list(range(1, length))


class TinyShakespeare(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS's under its name and version, with a made text."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "validation", "test")}

    def _generate_examples(self, split):
        yield split, {"text": f"the {split} part: evaluation {' '.join(map(chr, range(97, 123)))}"}


def test_tiny_shakespeare_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"pip install \"\.\[prepare\]\"") as error:
        text.load()
    command = "tfds.builder('tiny_shakespeare', file_format='array_record').download_and_prepare()"
    assert command in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "digits" not in str(error.value)
    TinyShakespeare(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    found = text.load()
    assert found.decode(found.train).startswith("the train part")
    assert found.decode(found.validation).startswith("the validation part")
    assert found.decode(found.test).startswith("the test part")
