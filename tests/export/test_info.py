"""`python -m brelax_jax info`."""

import json

import numpy as np
import pytest

import brelax_jax as brx
from brelax_jax.__main__ import main
from tests.export.made import E2M1, integers, quantized, weights
from tests.export.test_onnx import model_of
from tests.helpers.altered import file


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "network.safetensors"
    path.write_bytes(file())
    return path


def test_the_table_has_a_line_for_each_leaf_and_totals(path, capsys):
    assert main(["info", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["layer", "shape", "set", "scales"]
    assert [line.split()[0] for line in lines[1:8]] == [
        "conv/kernel", "layers/0/w", "layers/1/w", "levels", "bias", "half", "steps",
    ]  # fmt: skip
    assert "Uniform(4)    PerBlock(size=4, axis=0)  12.00     24  of 15 levels, -7:" in lines[3]
    assert lines[-1].startswith("52 weights, 45 of them on sets, in 81 bytes (")


def test_json_says_the_same_in_full(path, capsys):
    assert main(["info", str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["file_bytes"] == len(file())
    assert (report["weights"], report["quantized_weights"]) == (52, 45)
    assert report["bytes"] == sum(leaf["bytes"] for leaf in report["leaves"])
    assert report["float32_ratio"] == pytest.approx(4 * 52 / report["bytes"])
    binary, ternary, uniform, *_, bias, _, steps = report["leaves"]
    assert (binary["layer"], binary["set"], binary["shape"]) == ("conv/kernel", "Binary", [3, 4])
    assert (binary["bytes"], binary["bits"]) == (2 + 4, 4.0)
    assert [level for level, _ in ternary["shares"]] == [-1, 0, 1]
    assert sum(share for _, share in ternary["shares"]) == pytest.approx(1)
    assert len(uniform["shares"]) == 15
    assert (bias["set"], bias["bits"], bias["shares"]) == ("float32", 32, [])
    assert steps["set"] == "int32"


def test_a_bad_file_is_an_error_in_one_line(path, capsys):
    path.write_bytes(file()[:-1])
    assert main(["info", str(path)]) == 1
    assert main(["info", str(path) + "x"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    first, second = printed.err.splitlines()
    assert first.startswith(f"{path}: it is not a complete safetensors file")
    assert "No such file" in second


def leaves(path, capsys):
    assert main(["info", str(path), "--json"]) == 0
    return {leaf["layer"]: leaf for leaf in json.loads(capsys.readouterr().out)["leaves"]}


def test_gguf(tmp_path, capsys):
    path = tmp_path / "network.gguf"
    four = quantized(integers(7), (64, 3), (2, 3), scale_dtype="float16")
    floating = quantized(E2M1, (64, 3), (2, 3), scale_dtype="float8_e8m0fnu")
    tensors = {"norm": np.ones(5), "four": (four, "q4_0"), "floating": (floating, "mxfp4")}
    brx.export.write_gguf(path, "llama", {}, tensors)
    found = leaves(path, capsys)
    assert (found["norm"]["set"], found["norm"]["bytes"]) == ("F32", 20)
    for name, kind, given, bits in (
        ("four", "Q4_0", four, 4.5),
        ("floating", "MXFP4", floating, 4.25),
    ):
        leaf = found[name]
        assert (leaf["set"], leaf["shape"], leaf["bits"]) == (kind, [3, 64], bits)
        assert leaf["granularity"] == "blocks of 32"
        magnitudes = np.array(given.magnitudes)[np.abs(given.codes)]
        wanted = np.unique(np.sign(weights(given)) * magnitudes, return_counts=True)
        shares = np.array(leaf["shares"])
        np.testing.assert_allclose(shares[:, 0], wanted[0])
        np.testing.assert_allclose(shares[:, 1], wanted[1] / 192)


def test_onnx(tmp_path, capsys):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "network.onnx"
    ternary = quantized(integers(1), (8, 4), (1, 4))
    model = model_of({"kernel": weights(ternary), "bias": np.ones(4, np.float32)})
    onnx.save(brx.export.quantize_onnx(model, {"kernel": ternary}, narrowest="int4"), path)
    found = leaves(path, capsys)
    assert (found["bias"]["set"], found["bias"]["bytes"]) == ("FLOAT", 16)
    [codes] = [leaf for leaf in found.values() if leaf["shares"]]
    assert (codes["set"], codes["shape"], codes["bytes"]) == ("INT4", [8, 4], 16 + 4 * 4)
    wanted = np.unique(np.sign(weights(ternary)), return_counts=True)[1] / 32
    np.testing.assert_allclose([share for _, share in codes["shares"]], wanted)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_bad_files_of_others_are_an_error_in_one_line(kind, tmp_path, capsys):
    pytest.importorskip(kind)
    path = tmp_path / f"network.{kind}"
    assert main(["info", str(path)]) == 1
    path.write_bytes(b"no such network")
    assert main(["info", str(path)]) == 1
    missing, broken = capsys.readouterr().err.splitlines()[:2]
    assert "no such file" in missing
    assert broken.startswith(f"{path}: it is no {kind.upper()} file that can be read")
