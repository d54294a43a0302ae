"""Sharded weights are projected where they lie: on eight devices that the machine pretends to have.

JAX fixes their number when it starts, so these tests run in a process of their own.
"""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import brelax_jax as brx

DEVICES = 8
SHAPE = (3, 3, 32, 64)
MOVES = re.compile(r"= (?!.*fusion\().*(all-gather|all-to-all|collective-permute|reduce-scatter)\(")
SETS = {
    "binary": brx.Binary(),
    "binary-channel": brx.Binary(granularity=brx.PerChannel()),
    "ternary": brx.Ternary(),
    "ternary-channel": brx.Ternary(granularity=brx.PerChannel()),
    "ternary-block": brx.Ternary(granularity=brx.PerBlock(8, 2)),
    "threshold": brx.TernaryThreshold(),
    "threshold-channel": brx.TernaryThreshold(granularity=brx.PerChannel()),
    "uniform4": brx.Uniform(4),
    "uniform8-channel": brx.Uniform(8, granularity=brx.PerChannel()),
    "power5": brx.PowerOfTwo(5),
}
SPECS = [
    P(None, None, None, "model"),
    P(None, None, "model", None),
    P(None, None, "data", "model"),
    P(None, None, None, ("data", "model")),
]

if jax.device_count() < DEVICES:

    @pytest.mark.parametrize(
        "extent", ["not soak", pytest.param("soak", marks=pytest.mark.soak)], ids=["", "soak"]
    )
    def test_on_eight_devices(extent):
        flags = (
            f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
        )
        command = [sys.executable, "-m", "pytest", "-q", "-m", extent, __file__]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]

else:

    @pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
    def mesh(request):
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(request.param,) * 2)
        with jax.set_mesh(mesh):
            yield mesh

    def weights(seed=0):
        return np.random.default_rng(seed).standard_t(2.5, SHAPE).astype(np.float32)

    @pytest.fixture(scope="module")
    def on_one_device():
        w = jnp.asarray(weights())
        return {name: jax.device_get(qset.quantize(w)) for name, qset in SETS.items()}

    @pytest.mark.soak
    @pytest.mark.parametrize("spec", SPECS, ids=str)
    @pytest.mark.parametrize("name", SETS)
    def test_every_set_in_every_sharding(name, spec, mesh, on_one_device):
        check(name, spec, mesh, on_one_device)

    @pytest.mark.parametrize("name", SETS)
    def test_projections_reduce_and_move_no_weights(name, mesh, on_one_device):
        """The shardings take turns."""
        turn = list(SETS).index(name) + (mesh.axis_types[0] == AxisType.Explicit)
        check(name, SPECS[turn % len(SPECS)], mesh, on_one_device)

    def check(name, spec, mesh, on_one_device):
        w = jax.device_put(weights(), NamedSharding(mesh, spec))
        compiled = jax.jit(SETS[name].quantize).lower(w).compile()
        assert not MOVES.findall(compiled.as_text())
        quantized, expected = compiled(w), on_one_device[name]
        assert quantized.codes.sharding.is_equivalent_to(w.sharding, 4)
        np.testing.assert_allclose(quantized.scale, expected.scale, rtol=1e-5)
        # A weight at a threshold may fall to the other side when the scale is rounded differently.
        assert np.mean(np.asarray(quantized.codes) != expected.codes) < 1e-3
        projection = SETS[name].project(w)
        assert projection.sharding.is_equivalent_to(w.sharding, 4)

    def test_updates_move_no_weights(mesh):
        params = {
            name: {"kernel": jax.device_put(weights(i), NamedSharding(mesh, SPECS[i % len(SPECS)]))}
            for i, name in enumerate(SETS)
        }
        rules = brx.select(*((f"^{name}/", qset) for name, qset in SETS.items()))
        optimizer = brx.binary_relax(optax.sgd(0.1, momentum=0.9), rules, 1.0, hard_from=2)

        def update(params, state, grads):
            updates, state = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = optimizer.init(params)  # jitted, Optax would lay its zeros on one device
        compiled = jax.jit(update).lower(params, state, params).compile()
        assert not MOVES.findall(compiled.as_text())
        for _ in range(6):
            params, state = compiled(params, state, jax.tree.map(lambda p: 0.1 * p, params))
        quantized = brx.quantized_params(state, params)
        floats = brx.float_params(state, params)
        for name in SETS:
            p, q, y = (tree[name]["kernel"] for tree in (params, quantized, floats))
            np.testing.assert_array_equal(p, q)
            assert y.sharding.is_equivalent_to(p.sharding, 4)

    def test_blocks_that_cross_shards():
        qset = brx.Ternary(granularity=brx.PerBlock(16, 2))
        spec = P(None, None, "model", None)
        expected = qset.project(jnp.asarray(weights()))
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
            with jax.set_mesh(mesh):
                w = jax.device_put(weights(), NamedSharding(mesh, spec))
                if kind == AxisType.Auto:
                    np.testing.assert_allclose(qset.project(w), expected, rtol=1e-6)
                    continue
                message = r"PerBlock\(size=16, axis=2\) cuts across the 4 shards of axis 2"
                with pytest.raises(ValueError, match=message):
                    qset.project(w)
                with pytest.raises(ValueError, match="'kernel'.*" + message):
                    brx.binary_connect(optax.sgd(0.1), qset).init({"kernel": w})
