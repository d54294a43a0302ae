"""What a user may import, and what the sets promise as values."""

import importlib.resources
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import brelax_jax as brx

NAMES = [
    "distance",
    "quantized_tree",
    "with_rules",
    "moreau_envelope",
    "relax",
    "ProximalMap",
    "Relaxation",
    "PiecewiseAffine",
    "SoftThreshold",
    "LeafMetrics",
    "metrics",
    "geometric_continuation",
    "linear_continuation",
    "cosine_continuation",
    "sigmoid_continuation",
    "continuation",
    "Continuation",
    "Selection",
    "select",
    "Binary",
    "Ternary",
    "TernaryThreshold",
    "Uniform",
    "PowerOfTwo",
    "ScaledLevels",
    "ScaleRule",
    "LeastSquares",
    "MeanMagnitude",
    "MaxMagnitude",
    "Fixed",
    "PerTensor",
    "PerChannel",
    "PerBlock",
    "Quantized",
    "QuantizedSet",
    "BinaryRelaxState",
    "binary_relax",
    "relax_params",
    "binary_connect",
    "parq",
    "float_params",
    "quantized_params",
    "strength",
    "with_float_params",
    "Packed",
    "dequantize",
    "load",
    "pack",
    "save",
]

VALUES = [
    (brx.Binary, {}),
    (brx.Ternary, {}),
    (brx.TernaryThreshold, {"factor": 0.6}),
    (brx.Uniform, {"bits": 4}),
    (brx.PowerOfTwo, {"bits": 3}),
    (brx.ScaledLevels, {"levels": (-3, -1, 1, 3)}),
    (brx.PerTensor, {}),
    (brx.PerChannel, {"axis": (0, 1)}),
    (brx.PerBlock, {"size": 64, "axis": 0}),
    (brx.SoftThreshold, {"updates_float_params": True}),
]


def test_the_public_names_are_these_and_documented():
    public = {
        name
        for name, value in vars(brx).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(NAMES)
    for name in NAMES:
        assert inspect.getdoc(getattr(brx, name)), f"{name} has no docstring"


def test_the_changelog_begins_with_this_version():
    text = (Path(__file__).parents[2] / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (\S+)", text, re.M)[1] == brx.__version__


@pytest.mark.parametrize(("kind", "arguments"), VALUES)
def test_sets_and_granularities_are_values(kind, arguments):
    one, same = kind(**arguments), kind(**arguments)
    assert one == same
    assert hash(one) == hash(same)
    assert not callable(one), "Optax's inject_hyperparams takes callables for schedules"
    for name in (*arguments, "granularity", "levels"):
        with pytest.raises(AttributeError):
            setattr(one, name, 1)


def test_sets_differ_by_kind_argument_and_granularity():
    sets = [kind(**arguments) for kind, arguments in VALUES[:6]]
    others = [brx.TernaryThreshold(), brx.Uniform(3), brx.Uniform(2), brx.PowerOfTwo(2)]
    by_channel = [kind(**arguments, granularity=brx.PerChannel()) for kind, arguments in VALUES[:6]]
    assert len({*sets, *others, *by_channel}) == 16
    assert brx.ScaledLevels([-3, -1, 1, 3]) == brx.ScaledLevels((-3.0, -1.0, 1.0, 3.0))


def test_levels_are_ascending_floats_symmetric_about_zero():
    for kind, arguments in VALUES[:6]:
        levels = kind(**arguments).levels
        assert all(type(level) is float for level in levels)
        assert levels == tuple(sorted(levels)) == tuple(-level + 0.0 for level in reversed(levels))
    assert brx.PowerOfTwo(4).levels == (-8, -4, -2, -1, 0, 1, 2, 4, 8)
    assert brx.Uniform(3).levels == (-3, -2, -1, 0, 1, 2, 3)
    assert brx.TernaryThreshold().factor == 0.7
    assert brx.PerChannel().axis == brx.PerBlock(8).axis == -1
    assert brx.Binary().granularity == brx.PerTensor()


def test_the_package_is_typed():
    assert importlib.resources.files(brx).joinpath("py.typed").is_file()


def test_the_core_imports_only_what_it_needs():
    program = "import sys, brelax_jax; print(*{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    modules = set(run.stdout.split())
    assert {"brelax_jax", "jax", "optax", "numpy"} <= modules
    extras = {"flax", "orbax", "tensorflow", "tensorflow_datasets", "sklearn", "matplotlib", "tqdm"}
    extras |= {"safetensors", "onnx", "gguf"}
    assert not modules & extras
