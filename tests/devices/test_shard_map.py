"""Inside `jax.shard_map` an array is one device's part of a weight: `axis_name` says so.

On eight devices that the machine pretends to have. `test_on_eight_devices` runs these tests.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import brelax_jax as brx
from brelax_jax.sets import Group
from brelax_jax.sets._fit import fit_all
from tests.helpers import covering, meshes, oracles, quick, searching

SHAPE = (16, 8, 16)
BOTH = ("data", "model")
CASES = {  # a set, how the weight is sharded, and how its scale is
    "binary": (brx.Binary(granularity=brx.PerTensor("model")), P(None, None, "model"), P()),
    "threshold": (brx.TernaryThreshold(granularity=brx.PerTensor(BOTH)), P(*BOTH), P()),
    "ternary": (brx.Ternary(granularity=brx.PerTensor(BOTH)), P("data", None, "model"), P()),
    "uniform": (
        brx.Uniform(4, granularity=brx.PerChannel(axis_name="model")),
        P("model", None, "data"),
        P(None, None, "data"),
    ),
    "powers": (
        brx.PowerOfTwo(4, granularity=brx.PerChannel(0, axis_name="model")),
        P("data", "model"),
        P("data"),
    ),
    "two-bit": (
        brx.ScaledLevels((-3, -1, 1, 3), granularity=brx.PerBlock(8, 0)),
        P("data", None, "model"),
        P("data", None, "model"),
    ),
}

if jax.device_count() >= meshes.DEVICES:

    @pytest.fixture(scope="module")
    def mesh():
        mesh = meshes.make_mesh(AxisType.Auto)
        with jax.set_mesh(mesh):
            yield mesh

    def weights():
        return np.random.default_rng(0).standard_t(2.5, SHAPE).astype(np.float32)

    def quantized(qset, w):
        """The codes and the scale."""
        result = qset.quantize(w)
        return result.codes, result.scale

    def measures(qset, w):
        """Two numbers, and arrays of w's shape."""
        projection, transposed = jax.vjp(qset.project, w)
        envelope, gradient = jax.value_and_grad(brx.moreau_envelope)(w, qset, 3.0)
        return (envelope, brx.distance(w, qset)), {
            "project": projection,
            "derivative": jax.jvp(qset.project, (w,), (jnp.sin(w),))[1],
            "transposed derivative": transposed(jnp.cos(w))[0],
            "relax": brx.relax(w, qset, 1.0),
            "gradient of the envelope": gradient,
        }

    def in_float64(function, weights):
        with jax.enable_x64(True):
            return jax.device_get(quick.jit(function)(jax.tree.map(np.float64, weights)))

    def check_codes(name, codes, scale):
        wanted, fit = meshes.placed(CASES[name][0], weights())
        np.testing.assert_allclose(scale, fit.scale, rtol=1e-6, err_msg=name)
        meshes.assert_same_codes(CASES[name][0], codes, wanted, weights(), fit)

    # Of the pairs of a case with one of two kinds, each turn has half.
    every_turn = pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.soak)])

    @every_turn
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_parts_land_where_the_whole_does(kind, turn):
        mesh = meshes.make_mesh(kind)
        mapped, ws = {}, {}
        for name in [*CASES][(turn + (kind == AxisType.Explicit)) % 2 :: 2]:
            qset, spec, scale_spec = CASES[name]
            mapped[name] = jax.shard_map(
                functools.partial(quantized, qset),
                mesh=mesh,
                in_specs=spec,
                out_specs=(spec, scale_spec),
                check_vma=kind == AxisType.Auto,
            )
            ws[name] = jax.device_put(weights(), NamedSharding(mesh, spec))
        found = jax.jit(lambda ws: {name: mapped[name](w) for name, w in ws.items()})(ws)
        for name, (codes, scale) in found.items():
            check_codes(name, codes, scale)

    @pytest.mark.parametrize(
        "names",
        [("threshold", "ternary"), pytest.param(("binary",), marks=pytest.mark.soak)],
        ids=" ".join,
    )
    def test_distances_and_derivatives_are_those_of_the_whole(names, mesh):
        sets = {name: CASES[name][0] for name in names}
        specs = {name: CASES[name][1] for name in sets}

        def compute(ws):
            return {name: measures(sets[name], w) for name, w in ws.items()}

        out_specs = {name: (P(), spec) for name, spec in specs.items()}
        parts = jax.shard_map(compute, in_specs=(specs,), out_specs=out_specs)
        ws = dict.fromkeys(sets, weights())
        found, expected = jax.jit(parts)(meshes.put(ws, specs, mesh)), in_float64(compute, ws)
        for name, (wanted_numbers, wanted_arrays) in expected.items():
            numbers, arrays = found[name]
            np.testing.assert_allclose(numbers, wanted_numbers, rtol=1e-5, err_msg=name)
            for what, wanted in wanted_arrays.items():
                atol = 1e-6 * np.max(np.abs(wanted))
                np.testing.assert_allclose(
                    arrays[what], wanted, atol=atol, err_msg=f"{name}: {what}"
                )

    def test_devices_that_search_for_long_beside_some_that_do_not(mesh):
        """The groups of two halves of the devices need different numbers of rounds."""
        easy, hard = np.ones((64, 4)), np.random.default_rng(0).uniform(0, 1, (64, 4))
        w = np.concatenate([easy, hard / np.max(hard, axis=0)], axis=1).astype(np.float32)
        qset = brx.Uniform(6, granularity=brx.PerChannel(axis_name="model"))
        search = quick.jit(lambda a: searching.in_turn(a, qset.magnitudes, Group((0,))))
        few, many = (int(search(half).rounds) for half in np.split(w, 2, axis=1))
        assert 2 * few < many, "there is nothing to test"
        spec, scale_spec = P("model", "data"), P(None, "data")
        parts = jax.shard_map(
            functools.partial(quantized, qset), in_specs=spec, out_specs=(spec, scale_spec)
        )
        codes, scale = map(np.asarray, jax.jit(parts)(w))
        wanted, (wanted_scale, _) = meshes.placed(qset, w)
        # Ones are on the set at many scales, between which roundings decide.
        np.testing.assert_allclose(codes * scale, wanted * wanted_scale, rtol=1e-6)
        np.testing.assert_allclose(scale[:, 4:], wanted_scale[:, 4:], rtol=1e-6)
        np.testing.assert_array_equal(codes[:, 4:], wanted[:, 4:])

    def test_weights_whose_scales_are_searched_for_by_one_loop(mesh):
        qset, ws = brx.Ternary(granularity=brx.PerTensor("model")), [weights()[0], weights()[:, 0]]

        def scales(ws):
            return [fit.scale for fit in fit_all([qset] * 2, ws)]

        parts = jax.shard_map(scales, in_specs=([P(None, "model")] * 2,), out_specs=P())
        wanted = [[[oracles.ternary(np.ravel(w))[0]]] for w in ws]
        np.testing.assert_allclose(jax.jit(parts)(ws), wanted, rtol=1e-6)

    def test_training_is_that_of_one_device(mesh):
        """Parts of the batch and of the kernels on each device; the recipe of docs/sharding.md."""
        optimizer = meshes.relaxation()
        params, state = meshes.start_on(mesh)
        specs = jax.tree.map(lambda x: x.sharding.spec, (params, state))

        def loss(params, inputs, targets):
            def contract(x, kernel):
                return lax.psum(x @ kernel, "model")

            return lax.pmean(meshes.loss(params, inputs, targets, contract), "data")

        def train(params, state, inputs, targets):
            grads = jax.grad(loss)(params, inputs, targets)
            return meshes.updated(optimizer, grads, state, params)

        mapped = jax.shard_map(train, in_specs=(*specs, P("data"), P("data")), out_specs=specs)
        step = jax.jit(mapped).lower(params, state, *meshes.batch(0)).compile()
        alone = meshes.on_one_device()
        for t, (before, after) in enumerate(itertools.pairwise(alone)):
            _, state = step(*meshes.put(before, specs, mesh), *meshes.batch(t))
            meshes.assert_same(state, after[1])
        params, state = meshes.put(alone[0], specs, mesh)
        for t in range(meshes.STEPS):
            params, state = step(params, state, *meshes.batch(t))
        meshes.assert_same(state, alone[-1][1], rtol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, params, brx.quantized_params(state, params))

    @every_turn
    @pytest.mark.parametrize("checked", covering.some([True, False], [False]))
    def test_updates_are_those_of_one_device(checked, turn, mesh):
        """Gradients come from outside; also where JAX does not track what varies over an axis."""
        rules = meshes.rules(meshes.SIMPLE)
        optimizer = [
            brx.binary_connect(optax.adam(0.01, eps=1e-3), rules),
            optax.chain(optax.sgd(0.1), brx.relax_params(rules, 1.0, 3)),
        ][(turn + (not checked)) % 2]
        params = meshes.put(meshes.network(), meshes.SPECS, mesh)
        specs = jax.tree.map(lambda x: x.sharding.spec, (params, optimizer.init(params)))
        update = jax.jit(
            jax.shard_map(
                functools.partial(meshes.updated, optimizer),
                in_specs=(specs[0], specs[1], specs[0]),
                out_specs=specs,
                check_vma=checked,
            )
        )
        steps = meshes.alone(optimizer)
        for t, (before, after) in enumerate(itertools.pairwise(steps)):
            grads = meshes.gradient_of_loss(before[0], *meshes.batch(t))
            params, state = meshes.put(before, specs, mesh)
            _, state = update(meshes.put(grads, specs[0], mesh), state, params)
            meshes.assert_same(state, after[1], meshes.SIMPLE)

    def test_an_automatic_axis_has_no_parts(mesh):
        """Where only `data` is mapped, arrays are whole along `model`, and no name is missing."""
        name = "threshold"
        qset, spec, _ = CASES[name]
        mapped = jax.shard_map(
            functools.partial(quantized, qset),
            in_specs=P("data"),
            out_specs=(P("data"), P()),
            axis_names={"data"},
        )
        check_codes(name, *jax.jit(mapped)(jax.device_put(weights(), NamedSharding(mesh, spec))))

    @pytest.mark.parametrize(
        "operation",
        [
            lambda qset, w: qset.project(w),
            lambda qset, w: qset.quantize(w).scale,
            lambda qset, w: brx.relax(w, qset, 1.0),
            lambda qset, w: brx.distance(w, qset),
            lambda qset, w: brx.binary_connect(optax.sgd(0.1), qset).init({"a": w}).count,
        ],
        ids=["project", "quantize", "relax", "distance", "init"],
    )
    @pytest.mark.parametrize(
        "granularity", [brx.PerTensor(("batch", "model")), brx.PerChannel(axis_name="model")]
    )
    def test_a_name_that_the_mesh_lacks(operation, granularity, request):
        qset = brx.Ternary(granularity=granularity)
        mesh = jax.make_mesh((4, 2), ("batch", "columns"), axis_types=(AxisType.Auto,) * 2)
        mapped = jax.shard_map(
            functools.partial(operation, qset), in_specs=P("batch", "columns"), out_specs=P()
        )
        leaf = "'a', selected for .*" if request.node.callspec.id.endswith("init") else ""
        message = leaf + "'model' is no axis of this shard_map.* 'batch', 'columns'. Name the axes"
        with jax.set_mesh(mesh), pytest.raises(ValueError, match=message):
            jax.eval_shape(mapped, jnp.ones((8, 4)))
