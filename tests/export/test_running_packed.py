"""Networks that run from packed weights: Linen, NNX, plain functions, and a file for JAX alone."""

import os
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import brelax_jax as brx

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RULES = brx.select(default=brx.TernaryThreshold(granularity=brx.PerChannel()))
X = np.random.default_rng(0).standard_normal((2, 4)).astype("f4")


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="last")(nn.relu(nn.Dense(4, name="first")(x)))


class Nnx(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.relu(self.layers[0](x)))


def linen():
    params = Linen().init(jax.random.key(0), X)["params"]
    return params, lambda params, x: Linen().apply({"params": params}, x)


def of_nnx():
    graph, params = nnx.split(Nnx())
    return params, lambda params, x: nnx.merge(graph, nnx.State(params))(x)


def plain():
    params = {"w": jnp.asarray(X.T @ X), "b": jnp.ones(4)}
    return params, lambda params, x: x @ params["w"] + params["b"]


@pytest.mark.parametrize("network", [linen, of_nnx, plain])
def test_outputs_are_those_of_the_quantized_params(network, tmp_path):
    params, apply = network()
    with pytest.warns(UserWarning, match="projected"):
        brx.save(tmp_path / "file", params, rules=RULES)
    wanted = jax.jit(apply)(brx.load(tmp_path / "file"), X)
    run = jax.jit(lambda packed, x: apply(brx.dequantize(packed), x))
    for packed in (
        brx.load(tmp_path / "file", packed=True),
        brx.pack(RULES.quantize(params)),
    ):
        np.testing.assert_array_equal(run(packed, X), wanted)
        arrays = jax.tree.leaves(packed)
        assert sum(array.dtype == np.uint8 for array in arrays) == (1 if network is plain else 2)
        assert not any(array.shape == (4, 4) for array in arrays)


def test_an_exported_network_is_small_and_needs_jax_alone(tmp_path):
    rng = np.random.default_rng(0)
    w = brx.Quantized(
        rng.choice([-1, 1], (256, 256)).astype("i1"),
        np.full((1, 1), 0.5, "f4"),
        (0.0, 1.0),
        jnp.dtype("float32"),
        has_zero=False,
    )
    packed = brx.pack({"w": w})
    network = jax.jit(lambda x: x @ brx.dequantize(packed)["w"])
    x = rng.integers(-4, 4, (2, 256)).astype("f4")
    exported = jax.export.export(network)(jax.ShapeDtypeStruct(x.shape, x.dtype)).serialize()
    assert len(exported) < packed["w"].data.nbytes + 8192
    compiled = jax.jit(network).lower(x).compile().as_text()
    assert "f32[256,256]{1,0} constant" not in compiled
    (tmp_path / "network").write_bytes(exported)
    np.save(tmp_path / "x.npy", x)
    program = (
        "import jax, numpy, sys\n"
        "network = jax.export.deserialize(bytearray(open('network', 'rb').read()))\n"
        "numpy.save('y.npy', network.call(numpy.load('x.npy')))\n"
        "assert not [name for name in sys.modules if name.startswith('brelax_jax')]\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    wanted = x @ (w.codes * np.float32(0.5))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), wanted)
