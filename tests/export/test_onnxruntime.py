"""A network on the digits, from Flax to ONNX Runtime: its weights and its predictions."""

import flax.linen as nn
import numpy as np
import pytest

import brelax_jax as brx
from tests.export.made import bits, integers, quantized, weights

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("jax2onnx")

pytestmark = pytest.mark.usefixtures("quickly_compiled")

EXACT = {"session.disable_quant_qdq": "1"}
CLOSE = {"session.qdq_matmulnbits_accuracy_level": "1"}
KERNELS = {  # magnitudes, shape, groups, binary
    "Conv_0": (integers(1), (3, 3, 1, 8), (1, 1, 1, 8), True),
    "Conv_1": (integers(7), (3, 3, 8, 16), (3, 3, 2, 16), False),
    "Dense_0": (integers(1), (64, 32), (4, 32), False),
    "Dense_1": (integers(127), (32, 10), (1, 10), False),
}


class Network(nn.Module):
    @nn.compact
    def __call__(self, images):
        x = nn.relu(nn.Conv(8, (3, 3), strides=2)(images))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(32)(x.reshape(x.shape[0], -1)))
        return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def images():
    from sklearn.datasets import load_digits

    return load_digits().images[-360:, ..., None].astype("f4") / 16  # the test split


@pytest.fixture(scope="module")
def models(quickly_compiled):
    """The float model of the quantized weights, and of what it is quantized to for each type."""
    from jax2onnx import to_onnx

    network = Network()
    tree = {name: {"kernel": quantized(*given)} for name, given in KERNELS.items()}
    params = {
        name: {"kernel": weights(layer["kernel"]), "bias": np.zeros(KERNELS[name][1][-1], "f4")}
        for name, layer in tree.items()
    }
    floats = to_onnx(
        lambda images: network.apply({"params": params}, images), inputs=[("B", 8, 8, 1)]
    )
    types = {kind: brx.export.quantize_onnx(floats, tree, kind) for kind in ("int2", "int4")}
    return {"float": floats, **types}


def run(model, images, options, outputs=None):
    session_options = runtime.SessionOptions()
    for name, value in options.items():
        session_options.add_session_config_entry(name, value)
    content, providers = model.SerializeToString(), ["CPUExecutionProvider"]
    session = runtime.InferenceSession(content, session_options, providers=providers)
    return session.run(outputs, {session.get_inputs()[0].name: images})


@pytest.mark.parametrize("kind", ["int2", "int4"])
def test_dequantized_initializers_are_the_weights(kind, models, images):
    names = [n.output[0] for n in models[kind].graph.node if n.op_type == "DequantizeLinear"]
    assert len(names) == 4
    watched = onnx.ModelProto()
    watched.CopyFrom(models[kind])
    watched.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    floats = {t.name: onnx.numpy_helper.to_array(t) for t in models["float"].graph.initializer}
    for name, array in zip(names, run(watched, images[:1], {}, names), strict=True):
        np.testing.assert_array_equal(bits(array), bits(floats[name]), name)


@pytest.mark.parametrize("kind", ["int2", "int4"])
def test_outputs_are_those_of_the_float_model(kind, models, images):
    """With the options that keep the runtime from rounding activations; without, they are not."""
    [wanted] = run(models["float"], images, {})
    size = np.abs(wanted).max()
    [exact], [close], [rounded] = (
        run(models[kind], images, options) for options in (EXACT, CLOSE, {})
    )
    np.testing.assert_array_equal(exact.argmax(-1), wanted.argmax(-1))
    np.testing.assert_allclose(exact, wanted, atol=1e-6 * size)
    np.testing.assert_allclose(close, wanted, atol=1e-6 * size)
    assert np.abs(rounded - wanted).max() > 1e-4 * size
