"""`python -m brelax_jax info`."""

import json

import pytest

from brelax_jax.__main__ import main
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
