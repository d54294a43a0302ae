"""Files that are not what they should be: a ValueError names the file and what is wrong."""

import json

import numpy as np
import pytest
from safetensors.numpy import save

import brelax_jax as brx
from brelax_jax.export._format import Leaf, encode
from tests.helpers.altered import check, file, header_of

BINARY, TERNARY, UNIFORM, LEVELS, BIAS = range(5)  # places of leaves in the header


def changed(place, **values):
    """A file with other values in the header's entry of a leaf."""
    header, sealed = header_of(file())
    header["leaves"][place].update(values)
    return sealed(header)


def with_header(**values):
    header, sealed = header_of(file())
    return sealed({**header, **values})


def with_tensors(**tensors):
    """A file whose outer header claims other tensors."""
    header, sealed = header_of(file())
    return sealed(header, tensors)


def with_bytes(tensor, array):
    """A file with another content of a tensor, of its size, under the right checksum."""
    header, sealed = header_of(file())
    begin, end = tensor_of(tensor)["data_offsets"]
    data, new = file()[8 + SIZE :], np.asarray(array).tobytes()
    assert len(new) == end - begin
    return sealed(header, data=data[:begin] + new + data[end:])


def tensor_of(name):
    return json.loads(file()[8 : 8 + SIZE])[name]


def doubled():
    header, sealed = header_of(file())
    return sealed({**header, "leaves": [*header["leaves"], header["leaves"][0]]})


def renamed(*path):
    """A file in which the bias has another path."""
    header, sealed = header_of(file())
    header["leaves"][BIAS]["path"] = path
    return sealed(header, {"/".join(path): tensor_of("bias"), "bias": None})


SIZE = int.from_bytes(file()[:8], "little")
HUGE = {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}
CASES = {
    "empty": (lambda: b"", "not a complete safetensors file"),
    "a length beyond the file": (
        lambda: (2**40).to_bytes(8, "little") + file()[8:],
        "not a complete",
    ),
    "truncated": (lambda: file()[:-1], "not a complete safetensors file"),
    "longer": (lambda: file() + b"1", "not a complete safetensors file"),
    "altered": (lambda: file()[:-1] + bytes([file()[-1] ^ 1]), "it was altered"),
    "a tensor beyond the file": (
        lambda: with_tensors(**{"layers/1/w:codes": HUGE}),
        "not a complete",
    ),
    "of another program": (lambda: save({"w": np.ones(2)}), "was not saved by brelax_jax.save"),
    "a version to come": (lambda: with_header(version=2), "of version 2 .*reads 1; upgrade"),
    "no version": (lambda: with_header(version=None), "of version None"),
    "no leaves": (lambda: with_header(leaves=None), "'leaves': None, not a list"),
    "no leaf": (lambda: with_header(leaves=["x"]), "'x' where a leaf should be"),
    "a path of objects": (lambda: changed(BIAS, path=[{}]), "not of strings and integers"),
    "a leaf of no tensor": (lambda: changed(BIAS, path=["b"]), "no tensor 'b'"),
    "a leaf twice": (doubled, "no tensor 'conv/kernel:codes', or two"),
    "a leaf around a leaf": (lambda: renamed("conv"), "is there twice, or contains other leaves"),
    "a leaf inside a leaf": (
        lambda: renamed("conv", "kernel", "b"),
        "cannot lie where",
    ),
    "keys of two types": (lambda: renamed("layers", "b"), "cannot lie where"),
    "a tensor of no leaf": (lambda: with_header(leaves=[]), "belong to no leaf"),
    "a shape of more": (lambda: changed(BINARY, shape=[2**40, 2**40]), "take .* bytes, but"),
    "a shape of less": (lambda: changed(BINARY, shape=[1, 4]), "take 1 bytes, but"),
    "a negative shape": (lambda: changed(BINARY, shape=[-3, -4]), r"shape is \(-3, -4\)"),
    "a dtype of integers": (lambda: changed(BINARY, dtype="int8"), "dtype 'int8'"),
    "other levels": (lambda: changed(BINARY, levels=[-3, -1, 1, 3]), "4 levels take 4 bytes"),
    "levels that are none": (lambda: changed(BINARY, levels=[1, 2]), "must be symmetric"),
    "no granularity": (lambda: changed(BINARY, granularity={"kind": "PerRow"}), "PerRow"),
    "another granularity": (
        lambda: changed(UNIFORM, granularity={"kind": "PerBlock", "size": 2, "axis": 0}),
        r"scales of shape \(4, 2\), but",
    ),
    "blocks that do not divide": (
        lambda: changed(UNIFORM, granularity={"kind": "PerBlock", "size": 3, "axis": 0}),
        "does not divide axis 0",
    ),
    "a name in the place of an axis": (
        lambda: changed(TERNARY, granularity={"kind": "PerChannel", "axis": "last"}),
        "must be an integer",
    ),
    "a scale of infinity": (lambda: with_bytes("conv/kernel:scale", np.float32(np.inf)), "finite"),
    "a scale of NaN": (lambda: with_bytes("conv/kernel:scale", np.float32(np.nan)), "finite"),
    "a negative scale": (lambda: with_bytes("conv/kernel:scale", np.float32(-1)), "not negative"),
    "a spacing of 0": (lambda: with_bytes("levels:spacing", np.float32(0)), "must not be 0"),
    "weights beyond the dtype": (
        lambda: with_bytes("levels:scale", np.float32(3.4e38)),
        "largest weight would be",
    ),
    "ternary codes of no level": (
        lambda: with_bytes("layers/0/w:codes", np.array([243, 0, 0], "u1")),
        "codes that belong to no level",
    ),
    "4-bit codes of no level": (
        lambda: with_bytes("layers/1/w:codes", np.full(8, 255, "u1")),
        "codes that belong to no level",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_bad_file_is_refused(case, tmp_path):
    made, message = CASES[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(made())
    with pytest.raises(ValueError, match=message) as error:
        brx.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_altered_files_are_refused_or_load_as_they_must(tmp_path):
    """`python -m tests.helpers.altered 10000` tries more."""
    refused = sum(check(tmp_path / "file", seed) for seed in range(200))
    assert 150 < refused < 200


def test_double_precision_needs_x64(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(encode([Leaf(("w",), np.ones(2))]))
    with pytest.raises(ValueError, match="'w' is of float64, which JAX has only with"):
        brx.load(path)
