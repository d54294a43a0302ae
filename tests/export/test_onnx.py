"""Float ONNX models whose initializers become integers: what they multiply out to, and what is
refused.
"""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

import brelax_jax as brx
from tests.export.made import bits, integers, quantized, weights

onnx = pytest.importorskip("onnx")

pytestmark = pytest.mark.usefixtures("quickly_compiled")


def model_of(arrays, opset=21):
    """A float model with these initializers, each of which is an output too."""
    outputs = [
        onnx.helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, array.shape)
        for name, array in arrays.items()
    ]
    nodes = [onnx.helper.make_node("Identity", [name], [f"{name}_out"]) for name in arrays]
    tensors = [onnx.numpy_helper.from_array(np.array(a), name) for name, a in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "made", [], outputs, tensors)
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=9
    )


def initializers(model):
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def multiplied_out(model, name):
    """What the definition of DequantizeLinear makes of codes and scales."""
    [node] = [node for node in model.graph.node if node.output[0] == name]
    assert node.op_type == "DequantizeLinear"
    codes, scale = (initializers(model)[part] for part in node.input)
    attributes = {each.name: each.i for each in node.attribute}
    axis = attributes.get("axis", 1)
    if block := attributes.get("block_size"):
        scale = np.repeat(scale, block, axis)
    elif scale.ndim:
        scale = scale.reshape([-1 if a == axis else 1 for a in range(codes.ndim)])
    return codes.astype(np.float32) * scale


CONVOLUTION, MATRIX = (3, 3, 4, 6), (24, 10)
CASES = {  # name: magnitudes, shape, groups, binary; then the shape of scales, axis and block
    "tensor": ((integers(1), MATRIX, (1, 1), False), ((), None, None)),
    "output": ((integers(1), MATRIX, (1, 10), True), ((10,), 1, None)),
    "input": ((integers(7), MATRIX, (24, 1), False), ((24,), 0, None)),
    "blocks": ((integers(7), MATRIX, (3, 10), False), ((3, 10), 0, 8)),
    "bytes": ((integers(127), MATRIX, (1, 10), False), ((10,), 1, None)),
    "powers": (((0, 1, 2, 4, 8), MATRIX, (1, 10), False), ((10,), 1, None)),
    "halves": (((0, 0.5, 1.5), MATRIX, (1, 10), False), ((10,), 1, None)),
    "filter": ((integers(1), CONVOLUTION, (1, 1, 1, 6), True), ((6,), 0, None)),
    "filters": ((integers(1), CONVOLUTION, (1, 1, 4, 6), False), ((6, 4, 1, 3), 2, 3)),
    "filter blocks": ((integers(7), CONVOLUTION, (3, 3, 2, 6), False), ((6, 2, 3, 3), 1, 2)),
    "heads": ((integers(1), (8, 3, 4), (1, 3, 4), False), ((12,), 1, None)),
}
BITS = dict.fromkeys(CASES, "INT2")
BITS |= dict.fromkeys(("input", "blocks", "halves", "filter blocks"), "INT4")
BITS |= dict.fromkeys(("bytes", "powers"), "INT8")
AXES = {"filter": (3, 2, 0, 1), "filters": (3, 2, 0, 1), "filter blocks": (3, 2, 0, 1)}


@pytest.fixture(scope="module")
def tree(quickly_compiled):
    return {name: quantized(*given, seed=i) for i, (name, (given, _)) in enumerate(CASES.items())}


@pytest.fixture(scope="module")
def floats(tree):
    """The weights as a float model has them: convolutions in ONNX's order, heads flattened."""
    arrays = {}
    for name, leaf in tree.items():
        array = weights(leaf)
        array = array.reshape(8, 12) if name == "heads" else array
        arrays[name] = np.ascontiguousarray(array.transpose(AXES.get(name, range(array.ndim))))
    return arrays


@pytest.fixture(scope="module")
def stored(tree, floats):
    return brx.export.quantize_onnx(model_of({**floats, "bias": np.ones(3, "f4")}), tree)


def test_integers_multiply_out_to_the_weights(tree, floats, stored):
    for name, array in floats.items():
        np.testing.assert_array_equal(bits(multiplied_out(stored, name)), bits(array), name)
    onnx.checker.check_model(stored, full_check=True)
    assert (stored.opset_import[0].version, stored.ir_version) == (25, 13)
    tensors = initializers(stored)
    assert not tensors.keys() & tree.keys()
    np.testing.assert_array_equal(tensors["bias"], np.ones(3))


def test_codes_are_as_narrow_and_scales_as_few_as_can_be(stored):
    types = {tensor.name: tensor.data_type for tensor in stored.graph.initializer}
    nodes = {node.output[0]: node for node in stored.graph.node}
    for name, (_, (shape, axis, block)) in CASES.items():
        assert onnx.TensorProto.DataType.Name(types[f"{name}_codes"]) == BITS[name], name
        assert initializers(stored)[f"{name}_scale"].shape == shape, name
        attributes = {each.name: each.i for each in nodes[name].attribute}
        assert (attributes.get("axis"), attributes.get("block_size")) == (axis, block), name


@pytest.mark.parametrize(("narrowest", "least"), [("int4", "INT4"), ("int8", "INT8")])
def test_for_runtimes_without_the_narrowest_integers(narrowest, least, tree, floats):
    model = model_of(floats, opset=18)
    content = model.SerializeToString()
    stored = brx.export.quantize_onnx(model, tree, narrowest)
    assert model.SerializeToString() == content, "it stays as it was"
    assert (stored.opset_import[0].version, stored.ir_version) == (21, 10)
    types = {onnx.TensorProto.DataType.Name(t.data_type) for t in stored.graph.initializer}
    assert types == {"FLOAT", "INT8", least}
    for name, array in floats.items():
        np.testing.assert_array_equal(bits(multiplied_out(stored, name)), bits(array), name)


def test_transposed_weights_are_found(tree, floats):
    array = np.ascontiguousarray(floats["blocks"].T)
    stored = brx.export.quantize_onnx(model_of({"w": array}), {"blocks": tree["blocks"]})
    np.testing.assert_array_equal(bits(multiplied_out(stored, "w")), bits(array))


def refused(model, tree, message, **options):
    with pytest.raises(ValueError, match=message):
        brx.export.quantize_onnx(model, tree, **options)


def test_leaves_that_are_not_in_one_initializer_are_refused_by_name(tree, floats):
    leaf, array = tree["blocks"], floats["blocks"]
    tree = {"dense": {"kernel": leaf, "bias": jnp.ones(3)}}
    close = array.copy()
    close[0, 0] = np.nextafter(close[0, 0], 1)
    refused(model_of({"w": close}), tree, "^dense/kernel: no initializer has these weights")
    refused(model_of({"w": array.astype("f8")}), tree, "^dense/kernel: no initializer")
    refused(model_of({"v": array, "w": array.T}), tree, "^dense/kernel: .* twice, in v and w")
    refused(model_of({"w": array}), {"a": leaf, "b": leaf}, "^b: .* found twice, in w and a")
    refused(model_of({"w": array}), {"a": array}, "no Quantized leaf: give brx.quantized_tree")
    refused(model_of({"w": array}), tree, "one of int2, int4, int8, got 'int3'", narrowest="int3")


def test_sets_that_no_integers_hold_are_refused_by_name():
    for magnitudes, message in {
        (0.0, 1.0, 128.0): r"^k: ONNX's integers end at 127, and its levels at 128; use Uniform",
        (0.0, 0.3, 1.7): "^k: the levels .* must be whole numbers or halves",
    }.items():
        leaf = quantized(magnitudes, MATRIX, (1, 10))
        refused(model_of({"w": weights(leaf)}), {"k": leaf}, message)
    rounded = quantized(integers(127), MATRIX, (1, 10), dtype=jnp.bfloat16)
    array = weights(rounded).astype(np.float32)
    refused(model_of({"w": array}), {"k": rounded}, "and float32 params")


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ModuleNotFoundError, match=r"onnx is missing: pip install 'brelax_jax\[exp"):
        brx.export.quantize_onnx(None, {})
