"""Sharded weights are projected where they lie: on eight devices that the machine pretends to
have. `test_on_eight_devices` runs these tests.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import brelax_jax as brx
from brelax_jax.sets._fit import fit_all
from tests.helpers import covering, meshes, oracles, quick, searching

SHAPE = (1, 3, 32, 16)
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
IN_SUITE = ("binary-channel", "ternary", "ternary-block", "threshold", "uniform4", "power5")
SPECS = [
    P(None, None, None, "model"),
    P(None, None, "model", None),
    P(None, None, "data", "model"),
    P(None, None, None, ("data", "model")),
]

MODES = [AxisType.Auto, AxisType.Explicit]


def one_mode(mode):
    """The suite has this mode of `mesh`, `make soak` the other one."""
    return pytest.mark.parametrize("mesh", covering.some(MODES, [mode]), indirect=True)


if jax.device_count() >= meshes.DEVICES:

    @pytest.fixture(params=MODES, ids=["automatic", "explicit"])
    def mesh(request):
        mesh = meshes.make_mesh(request.param)
        with jax.set_mesh(mesh):
            yield mesh

    def weights(seed=0):
        return np.random.default_rng(seed).standard_t(2.5, SHAPE).astype(np.float32)

    @pytest.mark.soak
    @pytest.mark.parametrize("spec", SPECS, ids=str)
    def test_every_set_in_every_sharding(spec, mesh):
        check(dict.fromkeys(SETS, spec), mesh)
        w = jax.device_put(weights(), NamedSharding(mesh, spec))
        for name, qset in SETS.items():
            assert qset.project(w).sharding.is_equivalent_to(w.sharding, 4), name

    def test_projections_reduce_and_move_no_weights(mesh):
        """The shardings and the modes take turns."""
        turns = {name: SPECS[i % len(SPECS)] for i, name in enumerate(IN_SUITE)}
        start = MODES.index(mesh.axis_types[0])
        check(dict([*turns.items()][start::2]), mesh)

    def check(specs, mesh):
        """Each set projects weights that lie as the spec of its name says."""
        ws = {n: jax.device_put(weights(), NamedSharding(mesh, spec)) for n, spec in specs.items()}
        quantize = jax.jit(lambda ws: {name: SETS[name].quantize(w) for name, w in ws.items()})
        compiled = quantize.lower(ws).compile()
        assert not meshes.MOVES.findall(compiled.as_text())
        for name, quantized in compiled(ws).items():
            codes, fit = meshes.placed(SETS[name], weights())
            assert quantized.codes.sharding.is_equivalent_to(ws[name].sharding, 4), name
            rtol = 1e-5 if name == "uniform8-channel" else 1e-6  # its search may end a bit beside
            np.testing.assert_allclose(quantized.scale, fit.scale, rtol=rtol, err_msg=name)
            meshes.assert_same_codes(SETS[name], quantized.codes, codes, weights(), fit, rtol)

    @one_mode(AxisType.Auto)
    def test_training_is_that_of_one_device(mesh):
        """A step from each of one device's states, and all steps in a row."""
        optimizer, contract = meshes.relaxation(), jnp.matmul
        params, state = meshes.start_on(mesh)
        assert_inherited(state, params)
        if mesh.axis_types[0] == AxisType.Explicit:
            contract = functools.partial(jnp.matmul, out_sharding=P("data", None))
            assert_inherited(jax.eval_shape(optimizer.init, params), params)
        shardings = jax.tree.map(lambda x: x.sharding, (params, state))
        update = jax.jit(functools.partial(meshes.updated, optimizer))
        update = update.lower(params, state, params).compile()
        assert not meshes.MOVES.findall(update.as_text())
        grad = jax.grad(functools.partial(meshes.loss, contract=contract))
        grad = quick.jit(grad, out_shardings=shardings[0])

        def gradient(params, *batch):
            return grad(params, *meshes.put(batch, (P("data"), P("data")), mesh))

        alone = meshes.on_one_device()
        for t, (before, after) in enumerate(itertools.pairwise(alone)):
            params, state = jax.device_put(before, shardings)
            params, state = update(gradient(params, *meshes.batch(t)), state, params)
            meshes.assert_same(state, after[1])
        start = jax.device_put(alone[0], shardings)
        *_, (params, state) = meshes.trained(gradient, update, *start)
        assert_inherited(state, params)
        meshes.assert_same(state, alone[-1][1], rtol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, params, brx.quantized_params(state, params))

    @one_mode(AxisType.Auto)
    def test_small_blocks_as_accelerators_search_them(mesh):
        """Each array where it lies, all in one loop."""
        uniform = brx.Uniform(3, granularity=brx.PerBlock(8, 2))
        sets, specs = [SETS["ternary-block"], uniform, uniform], [SPECS[2], SPECS[0], SPECS[1]]
        drawn = [weights(seed) for seed in range(3)]
        placed = [meshes.put(w, spec, mesh) for w, spec in zip(drawn, specs, strict=True)]
        with searching.forced(searching.KINDS["together"]):
            fit = jax.jit(functools.partial(fit_all, sets)).lower(placed).compile()
        assert not meshes.MOVES.findall(fit.as_text())
        for found, w, qset in zip(fit(placed), drawn, sets, strict=True):
            rows = np.moveaxis(w.reshape(1, 3, 4, 8, 16), 3, -1).reshape(-1, 8).astype(float)
            for row, scale in zip(rows, np.ravel(found.scale).astype(float), strict=True):
                least = oracles.optimum(row, qset.levels)[1]
                assert oracles.error(row, scale, qset.levels) <= least * (1 + 2e-6)

    @one_mode(AxisType.Explicit)
    def test_states_lie_as_the_params_do(mesh):
        optimizer, (params, state) = meshes.relaxation(), meshes.start_on(mesh)
        step = functools.partial(meshes.updated, optimizer)
        after, state = jax.eval_shape(step, params, state, params)
        assert_inherited(state, after)

    @one_mode(AxisType.Explicit)
    def test_metrics_are_those_of_one_device_and_move_no_weights(mesh):
        start = meshes.start_on(mesh)
        shardings = jax.tree.map(lambda x: x.sharding, start)
        alone = meshes.on_one_device()[-1]
        params, state = jax.device_put(alone, shardings)
        metrics = jax.jit(brx.metrics).lower(state, params).compile()
        assert not meshes.MOVES.findall(metrics.as_text())
        found, wanted = metrics(state, params), brx.metrics(alone[1], alone[0])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, wanted)
        assert any(leaf.flips > 0 for leaf in found.values())
        for name in meshes.SETS:
            codes = state.codes[name]["kernel"].sharding
            assert codes.is_equivalent_to(params[name]["kernel"].sharding, 2)

    def assert_inherited(state, params):
        """The momentum, the float weights and the scales lie as the params do."""
        momentum = state.base_state[0].trace
        for name, spec in meshes.SPECS.items():
            for tree in (params, state.float_params, momentum):
                sharding = tree[name]["kernel"].sharding
                assert sharding.is_equivalent_to(NamedSharding(sharding.mesh, spec["kernel"]), 2)
            scale = state.scales[f"{name}/kernel"]
            names = (*spec["kernel"], None, None)
            spread = [n if size > 1 else None for n, size in zip(names, scale.shape, strict=False)]
            wanted = NamedSharding(scale.sharding.mesh, P(*spread))
            assert scale.sharding.is_equivalent_to(wanted, 2), (name, scale.sharding)

    @pytest.mark.soak
    def test_updates_of_every_set_move_no_weights(mesh):
        params = {
            name: {"kernel": jax.device_put(weights(i), NamedSharding(mesh, SPECS[i % len(SPECS)]))}
            for i, name in enumerate(SETS)
        }
        rules = brx.select(*((f"^{name}/", qset) for name, qset in SETS.items()))
        optimizer = brx.binary_relax(optax.sgd(0.1, momentum=0.9), rules, 1.0, hard_from=2)

        state = optimizer.init(params)
        update = jax.jit(functools.partial(meshes.updated, optimizer))
        compiled = update.lower(params, state, params).compile()
        assert not meshes.MOVES.findall(compiled.as_text())
        for _ in range(6):
            params, state = compiled(jax.tree.map(lambda p: 0.1 * p, params), state, params)
        quantized = brx.quantized_params(state, params)
        floats = brx.float_params(state, params)
        for name in SETS:
            p, q, y = (tree[name]["kernel"] for tree in (params, quantized, floats))
            np.testing.assert_array_equal(p, q)
            assert y.sharding.is_equivalent_to(p.sharding, 4)

    def test_blocks_that_cross_shards():
        qset = brx.Ternary(granularity=brx.PerBlock(16, 2))
        spec = P(None, None, "model", None)
        expected = quick.jit(qset.project)(weights())
        for kind in (AxisType.Auto, AxisType.Explicit):
            mesh = meshes.make_mesh(kind)
            with jax.set_mesh(mesh):
                w = jax.device_put(weights(), NamedSharding(mesh, spec))
                message = r"PerBlock\(size=16, axis=2\) cuts across the 4 shards of axis 2"
                if kind == AxisType.Auto:
                    np.testing.assert_allclose(qset.project(w), expected, rtol=1e-6)
                    with pytest.warns(UserWarning, match="'kernel': " + message):
                        brx.binary_connect(optax.sgd(0.1), qset).init({"kernel": w})
                    continue
                with pytest.raises(ValueError, match=message):
                    qset.project(w)
                with pytest.raises(ValueError, match="'kernel'.*" + message):
                    brx.binary_connect(optax.sgd(0.1), qset).init({"kernel": w})
