"""The language model as GGUF files: what they hold, and what llama.cpp makes of them."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from brelax_jax.export._gguf import FORMATS
from examples.language_model import __main__ as language_model
from examples.language_model import gguf_file, llama_cpp, text
from examples.language_model.config import Settings
from examples.language_model.trainer import Trainer
from tests.helpers.made_text import made_text

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SETTINGS = Settings(width=256, layers=2, heads=4, context=32, sets=("tq2_0", "q4_0@max"))
NATIVE = ("tq1_0", "tq2_0", "q2_0", "q4_0")


@pytest.fixture(scope="module")
def trainer():
    made = text.encode(made_text(2000, 0), made_text(150, 1), made_text(150, 2))
    return Trainer(SETTINGS, made)


@pytest.fixture(scope="module")
def network(trainer):
    """A network that was not trained, with packed ternary kernels."""
    rng = np.random.default_rng(0)

    def ternary(shape):
        scale = rng.uniform(0.5, 1.5, (1, shape[1])) / np.sqrt(shape[0])
        codes, scale = rng.integers(-1, 2, shape).astype("i1"), scale.astype("f2").astype("f4")
        return brx.pack(brx.Quantized(codes, scale, (0.0, 1.0), jnp.float32))

    shapes = jax.eval_shape(trainer.init, jax.ShapeDtypeStruct((), "uint32"))
    params = jax.tree.map(lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype("f4"), shapes)
    params["characters"]["embedding"] = rng.normal(size=(12, 256)).astype("f4")
    params["head"]["kernel"] = rng.normal(size=(256, 12)).astype("f4") / 10
    for i in range(2):
        for layer in gguf_file.LAYERS:
            kernel = params[f"block_{i}"][layer]["kernel"]
            params[f"block_{i}"][layer]["kernel"] = ternary(kernel.shape)
    return params


def test_files_hold_the_network(trainer, network, tmp_path):
    gguf = pytest.importorskip("gguf")
    params = brx.dequantize(network)
    for kind in ("f32", "tq2_0"):
        path = gguf_file.write(tmp_path / "lm.gguf", network, SETTINGS, trainer.text, "x", kind)
        assert path == tmp_path / f"lm-x{'-f32' if kind == 'f32' else ''}.gguf"
        reader = gguf.GGUFReader(path)
        read = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
        for i in range(2):
            block = params[f"block_{i}"]
            for layer, name in {"query": "attn_q", "up": "ffn_up", "down": "ffn_down"}.items():
                kernel = block[layer]["kernel"]
                np.testing.assert_array_equal(read.pop(f"blk.{i}.{name}.weight"), kernel.T)
            scale = block["dense_norm"]["scale"]
            np.testing.assert_array_equal(read.pop(f"blk.{i}.ffn_norm.weight"), scale)
        others = {"attn_k", "attn_v", "attn_output", "ffn_gate", "attn_norm"}
        names = {f"blk.{i}.{name}.weight" for i in range(2) for name in others}
        ends = ("token_embd", "output_norm", "output")
        assert read.keys() == names | {f"{name}.weight" for name in ends}
        embedding = read["token_embd.weight"]
        assert len(embedding) == len(read["output.weight"]) == 13
        np.testing.assert_array_equal(embedding[:12], params["characters"]["embedding"])
        rarest = np.bincount(trainer.text.train).argmin()
        np.testing.assert_array_equal(embedding[12], embedding[rarest])
        fields = {name: field.contents() for name, field in reader.fields.items()}
        assert fields["llama.feed_forward_length"] == 768
        assert fields["tokenizer.ggml.tokens"] == [*"ĊĠabcdefgiou", "<eos>"]


def test_the_sets_that_are_formats():
    assert gguf_file.formats(SETTINGS) == {"tq2_0": "tq2_0", "q4_0@max": "q4_0"}
    assert {name: kind.block for name, kind in FORMATS.items()} == gguf_file.BLOCKS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sets", "ternary"], "--export-gguf needs a format of GGUF in --sets, got ('ternary',)"),
        (["--width", "96"], "--export-gguf of q2_0 needs a --width in blocks of 64, got 96"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_training(arguments, message, capsys):
    pytest.importorskip("gguf")
    with pytest.raises(SystemExit):
        language_model.parse(["--export-gguf", "lm.gguf", *arguments])
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def running(trainer, network, tmp_path_factory):
    """llama.cpp with a file of a format."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    out = tmp_path_factory.mktemp("files")

    def run(kind):
        path = gguf_file.write(out / "lm.gguf", network, SETTINGS, trainer.text, kind, kind)
        return llama_cpp.LlamaCpp(path, characters=12, context=SETTINGS.context)

    return run


def test_llama_cpp_predicts_the_same(running, trainer, network):
    """From floats up to rounding; from native formats up to activations that it rounds to int8."""
    codes = trainer.text.validation[: SETTINGS.context]
    params = brx.dequantize(network)
    ours = np.asarray(jax.nn.log_softmax(trainer.logits(params, codes[None])[0]))
    assert ours.std() > 1

    def errors(kind):
        there = running(kind)
        places = range(3, len(codes), 4)
        return np.array([there.log_probabilities(codes[: i + 1]) - ours[i] for i in places])

    assert np.abs(errors("f32")).max() < 3e-5
    for kind in NATIVE:
        error = errors(kind)
        assert 1e-4 < np.sqrt(np.mean(error**2)) < 0.08, kind


def test_llama_cpp_writes_the_same(running, trainer, network):
    params, codes = brx.dequantize(network), trainer.text.validation[:8]
    written = codes
    while len(written) < SETTINGS.context:
        padded = np.pad(written, (0, SETTINGS.context - len(written)))
        following = jnp.argmax(trainer.logits(params, padded[None])[0, len(written) - 1])
        written = np.append(written, following)
    assert running("f32").likeliest(codes, len(written) - 8) == trainer.text.decode(written[8:])


def test_bits_per_character_are_reported(running, trainer, network, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "COMPARED", 40)
    kept = types.SimpleNamespace(network=lambda name, packed: network)
    report = llama_cpp.exported(trainer, kept, tmp_path / "lm.gguf")
    bits = trainer.bits_per_character(brx.dequantize(network), trainer.text.validation[:41])
    assert "on the first 41 characters" in report
    lines = {line.split()[0]: line.split()[2:] for line in report.splitlines()[-4:]}
    words = ("tq2_0-f32", "tq2_0", "q4_0@max-f32", "q4_0@max")
    assert [*lines] == [str(tmp_path / f"lm-{word}.gguf") for word in words]
    for word, (ours, theirs) in zip(words, lines.values(), strict=True):
        assert ours == f"{bits:.4f}"
        assert abs(float(theirs) - bits) < (2e-4 if "f32" in word else 0.02)
