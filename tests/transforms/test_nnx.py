"""Flax NNX: its loops, its splits and merges, its dicts, and its checkpoints."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import brelax_jax as brx
from tests.helpers import covering

SETS = {  # the state of a set whose scale is searched for is of the first one's structure
    "binary": brx.Binary(granularity=brx.PerChannel()),
    "threshold": brx.TernaryThreshold(granularity=brx.PerBlock(2, axis=0)),
}
RULES = brx.select(*((f"^{name}/kernel", qset) for name, qset in SETS.items()))
OPTIMIZER = brx.binary_relax(optax.adam(0.01), RULES, 1.0, 3, track_flips=True)
STEPS = 5
pytestmark = pytest.mark.usefixtures("quickly_compiled")


class Model(nnx.Module):
    """A layer for each set, and a norm that is not quantized."""

    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(4, rngs=rngs)
        for name in SETS:
            setattr(self, name, nnx.Linear(4, 4, rngs=rngs))

    def __call__(self, x):
        x = self.norm(x)
        return sum(getattr(self, name)(x) for name in SETS)


def make():
    model = Model(nnx.Rngs(0))
    return model, nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)


def loss(model):
    return jnp.mean((model(jnp.linspace(-1, 1, 8).reshape(2, 4)) - 1) ** 2)


def update(model, optimizer):
    optimizer.update(model, nnx.grad(loss)(model))


@nnx.jit
def nnx_step(model, optimizer):
    update(model, optimizer)


def arrays(*nodes):
    return nnx.to_pure_dict(nnx.state(nodes))


@functools.cache
def wanted():
    """What one jitted step after the other gives."""
    model, optimizer = make()
    for _ in range(STEPS):
        nnx_step(model, optimizer)
    return arrays(model, optimizer)


def in_fori_loop(model, optimizer):
    def body(_, carry):
        update(*carry)
        return carry

    return nnx.fori_loop(0, STEPS, body, (model, optimizer))


def in_scan(model, optimizer):
    def body(carry, _):
        update(*carry)
        return carry, 0

    return nnx.scan(body)((model, optimizer), jnp.arange(STEPS))[0]


def in_while_loop(model, optimizer):
    def body(carry):
        count, model, optimizer = carry
        update(model, optimizer)
        return count + 1, model, optimizer

    start = (jnp.array(0), model, optimizer)
    return nnx.while_loop(lambda carry: carry[0] < STEPS, body, start)[1:]


def in_cond(model, optimizer):
    @nnx.jit
    def step(count, model, optimizer):
        nnx.cond(count >= 0, update, lambda model, optimizer: None, model, optimizer)

    for count in range(STEPS):
        step(jnp.array(count), model, optimizer)
    return model, optimizer


def split_and_merged_in_lax_scan(model, optimizer):
    graph, state = nnx.split((model, optimizer))

    def body(state, _):
        pair = nnx.merge(graph, state)
        update(*pair)
        return nnx.split(pair)[1], None

    return nnx.merge(graph, jax.lax.scan(body, state, None, STEPS)[0])


LOOPS = [in_fori_loop, in_scan, in_while_loop, in_cond, split_and_merged_in_lax_scan]


# `tests/contract` has another `fori_loop`, and `test_networks` splits and merges at every step.
@pytest.mark.parametrize("loop", covering.some(LOOPS, [in_scan, in_cond]))
def test_loops_train_as_one_step_after_the_other(loop):
    after = arrays(*loop(*make()))
    chex.assert_trees_all_equal_structs(after, wanted())
    chex.assert_trees_all_close(after, wanted(), rtol=1e-4, atol=1e-5)


def test_jit_traces_once_in_any_number_of_steps():
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(None)
        update(model, optimizer)

    pair = make()
    for _ in range(4):
        step(*pair)
    assert len(traces) == 1


@pytest.mark.parametrize("steps", covering.some([0, STEPS], [STEPS]))
def test_a_pure_dict_brings_everything_back(steps):
    pair, again = make(), make()
    for _ in range(steps):
        nnx_step(*pair)
    state = nnx.state(again)
    nnx.replace_by_pure_dict(state, arrays(*pair))
    nnx.update(again, state)
    assert_goes_on_alike(pair, again)


def saved_and_restored(pair, make, directory):
    """By Orbax, into an abstract state of what `make` makes."""
    graph, like = nnx.split(nnx.eval_shape(make))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", nnx.state(pair))
        checkpointer.wait_until_finished()
        return nnx.merge(graph, checkpointer.restore(directory / "state", like))


@pytest.mark.parametrize("steps", covering.some([0, STEPS], [STEPS]))
def test_orbax_restores_into_an_abstract_state(steps, tmp_path):
    pair = make()
    for _ in range(steps):
        nnx_step(*pair)
    assert_goes_on_alike(pair, saved_and_restored(pair, make, tmp_path))


EVERY_SET = [
    brx.Ternary(rule=brx.LeastSquares(0.01)),
    brx.Uniform(4, granularity=brx.PerChannel()),
    brx.PowerOfTwo(4),
    brx.ScaledLevels((-1.7, -0.3, 0.3, 1.7), granularity=brx.PerBlock(2, axis=0)),
]


@pytest.mark.parametrize(("qset", "steps"), covering.pairs(EVERY_SET, [0, 2]))
def test_orbax_restores_the_other_sets_too(qset, steps, tmp_path):
    def make():
        model = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        optimizer = brx.binary_relax(optax.adam(0.01), qset, 1.0, 3, track_flips=True)
        return model, nnx.Optimizer(model, optimizer, wrt=nnx.Param)

    pair = make()
    for _ in range(steps):
        nnx_step(*pair)
    again = saved_and_restored(pair, make, tmp_path)
    chex.assert_trees_all_equal(arrays(*again), arrays(*pair))


def assert_goes_on_alike(pair, again):
    """Equal now and after another update, bit for bit, and so is what is read."""
    chex.assert_trees_all_equal(arrays(*again), arrays(*pair))
    for model, optimizer in (pair, again):
        nnx_step(model, optimizer)
    chex.assert_trees_all_equal(arrays(*again), arrays(*pair))
    read = [
        brx.quantized_params(optimizer.opt_state, nnx.state(model, nnx.Param))
        for model, optimizer in (pair, again)
    ]
    chex.assert_trees_all_equal(*map(nnx.to_pure_dict, read))


def test_another_optimizers_rules_take_over():
    model, optimizer = make()
    nnx_step(model, optimizer)
    rules = brx.select((r"^(binary|threshold)/kernel", brx.Binary()))
    fewer = brx.binary_relax(optax.adam(0.01), rules, 1.0)
    state = brx.with_rules(optimizer.opt_state, nnx.state(model, nnx.Param), fewer)
    again = nnx.Optimizer(model, fewer, wrt=nnx.Param)
    nnx.update(again.opt_state, nnx.state(nnx.as_pure(state)))
    floats = brx.float_params(optimizer.opt_state, nnx.state(model, nnx.Param))
    kept = brx.float_params(again.opt_state, nnx.state(model, nnx.Param))
    for name in SETS:
        np.testing.assert_array_equal(kept[name]["kernel"][...], floats[name]["kernel"][...])
    assert int(again.opt_state.count[...]) == 1
    nnx_step(model, again)
    quantized = brx.quantized_params(again.opt_state, nnx.state(model, nnx.Param))
    assert len(np.unique(quantized["threshold"]["kernel"][...])) == 2
