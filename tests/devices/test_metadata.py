"""Kernels whose sharding Flax's boxes name: scales lie as their weights do, as far as they can.
`test_on_eight_devices` runs these tests.
"""

from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import brelax_jax as brx
from tests.helpers import covering, meshes

SHAPE = (16, 8)  # "data" cuts the first axis in two, "model" the second in four
WITHIN_SHARDS = {
    "tensor": (brx.Binary(), P(None, None)),
    "channel": (brx.TernaryThreshold(granularity=brx.PerChannel()), P(None, "model")),
    "rows": (brx.Binary(granularity=brx.PerChannel(0)), P("data", None)),
    "block": (brx.Binary(granularity=brx.PerBlock(4, 0)), P("data", "model")),
    "half": (brx.Binary(granularity=brx.PerBlock(8, 0)), P("data", "model")),
}
ACROSS = {  # the explicit mode refuses them
    "whole": (brx.Binary(granularity=brx.PerBlock(16, 0)), P(None, "model")),
    "across": (brx.Binary(granularity=brx.PerBlock(8, 1)), P("data", None)),
}
SETS = {AxisType.Auto: WITHIN_SHARDS | ACROSS, AxisType.Explicit: WITHIN_SHARDS}
NAMES = ("data", "model")
LOGICAL = (("embed", "data"), ("mlp", "model"))
STEPS = 2

if jax.device_count() >= meshes.DEVICES:

    def optimizer_of(sets):
        rules = brx.select(*((f"{name}/", qset) for name, (qset, _) in sets.items()))
        return brx.binary_relax(optax.adamw(0.1), rules, 1.0, 2, track_flips=True)

    def assert_lie(spec, mesh, x):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim), (spec, x.sharding)

    def assert_scales_lie(sets, mesh, state):
        for name, (_, spec) in sets.items():
            [scale] = jax.tree.leaves(state.scales[f"{name}/kernel"])
            assert_lie(spec, mesh, scale)
        assert set(state.code_scales) == {"channel/kernel"}
        assert_lie(sets["channel"][1], mesh, *jax.tree.leaves(state.code_scales))

    @pytest.mark.filterwarnings("ignore:.* cuts across the . shards:UserWarning")
    @pytest.mark.parametrize("logical", covering.some([False, True], [True]))
    @pytest.mark.parametrize("mode", covering.some(SETS, [AxisType.Explicit]))
    def test_nnx(mode, logical):
        mesh, sets = meshes.make_mesh(mode), SETS[mode]
        names = ("embed", "mlp") if logical else NAMES
        init = nnx.with_partitioning(nnx.initializers.ones_init(), names)

        class Model(nnx.Module):
            def __init__(self, rngs):
                for name in sets:
                    layer = nnx.Linear(*SHAPE, use_bias=False, rngs=rngs, kernel_init=init)
                    setattr(self, name, layer)

        def loss(model):
            return sum(jnp.sum(jnp.square(getattr(model, name).kernel[...] - 1)) for name in sets)

        with jax.set_mesh(mesh), nnx.logical_axis_rules(LOGICAL if logical else ()):
            model = Model(nnx.Rngs(0))
            crosses = mode == AxisType.Auto
            warns = pytest.warns(UserWarning, match="cuts across") if crosses else nullcontext()
            with warns:
                optimizer = nnx.Optimizer(model, optimizer_of(sets), wrt=nnx.Param)

            @nnx.jit
            def step(model, optimizer):
                optimizer.update(model, nnx.grad(loss)(model))

            for _ in range(STEPS):
                state = optimizer.opt_state
                for tree in (state.float_params, state.codes):
                    for leaf in jax.tree.leaves(tree):
                        assert_lie(P(*NAMES), mesh, leaf)
                assert_scales_lie(sets, mesh, state)
                step(model, optimizer)

    @pytest.mark.parametrize("logical", covering.some([False, True], [False]))
    def test_linen(logical):
        """In the automatic mode: Linen's boxes want arrays that the explicit one does not make."""
        mesh, sets = meshes.make_mesh(AxisType.Auto), SETS[AxisType.Auto]
        init = linen.initializers.ones_init()
        if logical:
            init = linen.with_logical_partitioning(init, ("embed", "mlp"))
        else:
            init = linen.with_partitioning(init, NAMES)

        class Model(linen.Module):
            @linen.compact
            def __call__(self, x):
                return [
                    linen.Dense(SHAPE[1], use_bias=False, kernel_init=init, name=name)(x)
                    for name in sets
                ]

        def create(key):
            params = Model().init(key, jnp.ones((1, SHAPE[0])))["params"]
            return TrainState.create(apply_fn=None, params=params, tx=optimizer_of(sets))

        with jax.set_mesh(mesh), linen.logical_axis_rules(LOGICAL if logical else ()):
            specs = linen.get_partition_spec(jax.eval_shape(create, jax.random.key(0)))
            shardings = linen.logical_to_mesh_sharding(
                specs, mesh, LOGICAL if logical else [(name, name) for name in NAMES]
            )
            state = jax.jit(create, out_shardings=shardings)(jax.random.key(0))
            step = jax.jit(
                lambda state: state.apply_gradients(grads=jax.tree.map(jnp.sin, state.params)),
                out_shardings=shardings,
            )
            for _ in range(STEPS):
                ours = state.opt_state
                for leaf in jax.tree.leaves((state.params, ours.float_params, ours.codes)):
                    assert_lie(P(*NAMES), mesh, leaf)
                assert_scales_lie(sets, mesh, ours)
                state = step(state)
        for w in jax.tree.leaves(brx.quantized_params(state.opt_state, state.params)):
            assert np.isfinite(w).all()
