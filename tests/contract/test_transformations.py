"""What every transformation does with every set: a new one is tested by adding it to a list here.

Compilation dominates, so one program serves every transformation and a leaf for each set. In the
suite each transformation has some of the sets, and in `make soak` the others.
"""

import collections
import dataclasses
import functools
import itertools

import chex
import jax
import numpy as np
import optax
import pytest
from flax import core, struct

import brelax_jax as brx
from tests.helpers import covering
from tests.helpers.exactness import fresh_state
from tests.helpers.training import array, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

HARD_FROM = 2
TRANSFORMATIONS = {
    "binary_relax": lambda qset: brx.binary_relax(
        optax.sgd(0.1, 0.9), qset, 1.0, HARD_FROM, track_flips=True
    ),
    "relax_params": lambda qset: brx.relax_params(qset, lambda count: 1.0 + count, HARD_FROM),
    "binary_connect": lambda qset: brx.binary_connect(optax.adam(0.1), qset),
    "parq": lambda qset: brx.parq(optax.sgd(0.1), qset, lambda count: 1.0 + count, HARD_FROM),
}
# The same from any base, that extra arguments may be shown to reach it.
FROM_BASE = {
    "binary_relax": lambda base, qset: brx.binary_relax(base, qset, 0.0),
    "relax_params": lambda base, qset: optax.chain(base, brx.relax_params(qset, 0.0)),
    "binary_connect": brx.binary_connect,
    "parq": lambda base, qset: brx.parq(base, qset, 0.0),
}
SETS = {
    "Binary": brx.Binary(granularity=brx.PerChannel()),
    "Ternary": brx.Ternary(granularity=brx.PerChannel()),
    "TernaryThreshold": brx.TernaryThreshold(granularity=brx.PerChannel()),
    "Uniform": brx.Uniform(4, granularity=brx.PerChannel()),
    "PowerOfTwo": brx.PowerOfTwo(4, granularity=brx.PerChannel()),
    "ScaledLevels": brx.ScaledLevels((-1.7, -0.3, 0.3, 1.7), granularity=brx.PerChannel()),
}
RULES = brx.select(*((f"^{name}$", qset) for name, qset in SETS.items()))
SHAPE = (16, 3)
STEPS = 6
EXACT = slice(HARD_FROM + 2, STEPS)  # from the third hard update on

IN_SUITE = {
    "binary_relax": ("Binary", "Ternary", "Uniform"),
    "relax_params": ("Binary", "TernaryThreshold", "PowerOfTwo"),
    "binary_connect": ("Binary", "TernaryThreshold", "Ternary"),
    "parq": ("Binary", "Uniform", "ScaledLevels"),
}
IN_16_BITS = ("bfloat16", "float16")

every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)
every_set = pytest.mark.parametrize("qset", SETS)


def every_pair(suite=tuple(TRANSFORMATIONS)):
    """The suite has these transformations, each with its sets."""
    pairs = itertools.product(TRANSFORMATIONS, SETS)
    in_suite = [(name, qset) for name in suite for qset in IN_SUITE[name]]
    marks = {pair: [] if pair in in_suite else pytest.mark.soak for pair in pairs}
    cases = [pytest.param(*pair, marks=mark) for pair, mark in marks.items()]
    return pytest.mark.parametrize(("name", "qset"), cases)


part = pytest.mark.parametrize("in_suite", covering.some([True, False], [True]))


def noise(seed, *shape):
    rng = np.random.default_rng(seed)
    return {name: array(rng.standard_normal(shape)) for name in SETS}


OPTIMIZERS = {name: make(RULES) for name, make in TRANSFORMATIONS.items()}


def optimizers(params):
    """By transformation: each has the rules of its params."""
    rules = {
        name: brx.select(*((f"^{qset}$", SETS[qset]) for qset in sets))
        for name, sets in params.items()
    }
    return {name: TRANSFORMATIONS[name](rules[name]) for name in params}


def init(params):
    shapes = {name: jax.eval_shape(o.init, params[name]) for name, o in optimizers(params).items()}
    return {name: fresh_state(shapes[name], params[name]) for name in params}


def step(grads, state, params):
    """One of every transformation: params, states and quantized params after it."""
    for name, optimizer in optimizers(params).items():
        given = {qset: grads[qset] for qset in params[name]}
        updates, state[name] = optimizer.update(given, state[name], params[name])
        params[name] = optax.apply_updates(params[name], updates)
    quantized = {name: brx.quantized_params(state[name], params[name]) for name in params}
    return params, state, quantized


donating_step = jax.jit(step, donate_argnums=(1, 2))


def for_each(params, in_suite):
    """The params of each transformation, for its sets of the suite or the others."""
    return {
        name: {qset: array(w) for qset, w in params.items() if (qset in sets) == in_suite}
        for name, sets in IN_SUITE.items()
    }


def stepped(params, grads, in_suite):
    """The params and quantized params after each update; `grads` has the steps first."""
    params, trace = for_each(params, in_suite), []
    state = init(params)
    for t in range(STEPS):
        params, state, quantized = donating_step({q: g[t] for q, g in grads.items()}, state, params)
        trace.append(jax.tree.map(np.array, (params, quantized)))
    params, quantized = jax.tree.map(lambda *leaves: np.stack(leaves), *trace)
    return {name: (params[name], quantized[name]) for name in OPTIMIZERS}


@functools.cache
def run(kind, in_suite):
    """`stepped` from weights of one kind."""
    start, grads = noise(0, *SHAPE), noise(1, STEPS, *SHAPE)
    if kind == "zero":
        return stepped(*jax.tree.map(np.zeros_like, (start, grads)), in_suite)
    if kind != "normal":
        start = jax.tree.map(np.array, start)
        for w in start.values():
            w[3, 1] = float(kind)
    return stepped(start, grads, in_suite)


# Of `vmapped_scan`; the other wrappers, which share the first one's update, in `make soak`.
IN_SCAN = ("binary_relax", "relax_params")


@functools.cache
def vmapped_scan(names, in_suite):
    def train(params, state, grads):
        def body(carry, grads):
            params, state, quantized = step(grads, *carry)
            return (state, params), (params, quantized)

        return jax.lax.scan(body, (state, params), grads)[1]

    params = [for_each(noise(seed, *SHAPE), in_suite) for seed in (0, 2)]
    params = [{name: p[name] for name in names} for p in params]
    grads = [noise(seed, STEPS, *SHAPE) for seed in (1, 3)]
    states = [init(p) for p in params]
    seeds = (
        jax.tree.map(lambda *leaves: np.stack(leaves), *trees) for trees in (params, states, grads)
    )
    params, quantized = jax.tree.map(np.array, jax.jit(jax.vmap(train))(*seeds))
    return {name: (params[name], quantized[name]) for name in names}


def few_values(trace, qset):
    """Whether every channel of every step has at most as many values as there are levels."""
    columns = trace.reshape(-1, *SHAPE).transpose(0, 2, 1).reshape(-1, SHAPE[0])
    return all(len(np.unique(column)) <= len(SETS[qset].levels) for column in columns)


@every_pair()
def test_jit_with_donation(name, qset):
    params, quantized = (tree[qset] for tree in run("normal", qset in IN_SUITE[name])[name])
    assert np.isfinite(params).all()
    np.testing.assert_array_equal(params[EXACT], quantized[EXACT])
    assert few_values(quantized, qset)
    moved = np.abs(np.diff(quantized, axis=0)).max(axis=(1, 2))
    assert (moved > 0).all()


@every_pair(IN_SCAN)
def test_scan_and_vmap_over_seeds(name, qset):
    in_suite = qset in IN_SUITE[name]
    names = tuple(other for other in IN_SUITE if (other in IN_SCAN) == (name in IN_SCAN))
    params, quantized = (tree[qset] for tree in vmapped_scan(names, in_suite)[name])
    wanted = run("normal", in_suite)[name][0][qset]
    np.testing.assert_allclose(params[0], wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(params[:, EXACT], quantized[:, EXACT])
    assert few_values(quantized, qset)
    assert not np.allclose(params[0], params[1])


@part
@every_transformation
def test_zero_weights_without_gradients_stay_zero(name, in_suite):
    params, quantized = run("zero", in_suite)[name]
    for qset in params:
        assert not params[qset].any(), qset
        assert not quantized[qset].any(), qset


@part
@every_transformation
@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_what_is_not_finite_stays_in_its_group(name, bad, in_suite):
    params, quantized = run(bad, in_suite)[name]
    clean = run("normal", in_suite)[name][0]
    for qset in params:
        assert np.isnan(quantized[qset][..., 1]).all(), qset
        np.testing.assert_allclose(params[qset][..., ::2], clean[qset][..., ::2], rtol=1e-5)


@dataclasses.dataclass
class Layer:
    """A user's pytree."""

    kernel: jax.Array
    bias: jax.Array


jax.tree_util.register_dataclass(Layer, ["kernel", "bias"], [])


@struct.dataclass
class StructLayer:
    """Flax's kind of pytree, with a field that is none of its leaves."""

    kernel: jax.Array
    bias: jax.Array
    name: str = struct.field(pytree_node=False, default="dense")


Pair = collections.namedtuple("Pair", ["kernel", "bias"])


def spec(shape=SHAPE, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


TREES = {
    "dict": {"a": {"kernel": spec(), "bias": spec((3,))}},
    "tuple": ((spec(), spec((3,))), spec()),
    "list": [spec(), [spec()]],
    "dataclass": [Layer(spec(), spec((3,)))],
    "one array": spec(),
    "None": {"a": spec(), "b": None},
    "MaskedNode": {"a": spec(), "b": optax.MaskedNode()},
    "no leaf": {"a": {}, "b": ()},
    "an empty leaf": {"a": spec((0, 3)), "b": spec((3, 0)), "c": spec()},
    "bfloat16": {"a": spec(dtype="bfloat16"), "b": spec()},
    "float16": {"a": spec(dtype="float16"), "bias": spec(dtype="float16")},
    "flax.struct": {"a": StructLayer(spec(), spec((3,)))},
    "namedtuple": (Pair(spec(), spec((3,))),),
    "a frozen dict": core.freeze({"a": {"kernel": spec()}}),
}


def kinds(tree):
    """What scan and donation need to stay as it is."""
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def check_metrics_shapes(after, tree, tracks):
    """Every number there is, at each quantized leaf; flips where they are asked for."""
    float_shapes = jax.tree.leaves(jax.eval_shape(brx.float_params, after, tree))
    metrics = jax.eval_shape(brx.metrics, after, tree)
    assert len(metrics) <= len(float_shapes)
    for leaf in metrics.values():
        assert leaf.lam.shape == leaf.strength.shape == leaf.distance.shape == ()
        assert leaf.occupancy.ndim == 1
        assert (leaf.flips is not None) == tracks


def check_shapes(name, rules, tree, with_metrics=True):
    optimizer = TRANSFORMATIONS[name](rules)
    state = jax.eval_shape(optimizer.init, tree)
    updates, after = jax.eval_shape(optimizer.update, tree, state, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, tree)
    assert kinds(after) == kinds(state)
    quantized = jax.eval_shape(brx.quantized_params, after, tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(quantized, tree)
    floats = jax.eval_shape(brx.float_params, after, tree)
    chex.assert_trees_all_equal_shapes(floats, tree)
    assert kinds(jax.eval_shape(brx.with_float_params, after, tree)) == kinds(state)
    if with_metrics:
        check_metrics_shapes(after, tree, name == "binary_relax")


@pytest.mark.parametrize(("turn", "tree"), [*enumerate(TREES.values())], ids=TREES)
def test_every_tree(turn, tree):
    """The transformations and the sets take turns, and every third turn reads metrics."""
    name, qset = list(TRANSFORMATIONS)[turn % 4], list(SETS.values())[turn % len(SETS)]
    check_shapes(name, qset, tree, with_metrics=turn % 3 == 0)


@pytest.mark.soak
@every_transformation
@every_set
@pytest.mark.parametrize("tree", TREES)
def test_every_tree_with_every_set(name, qset, tree):
    check_shapes(name, SETS[qset], TREES[tree])


@pytest.mark.parametrize(("name", "dtype"), covering.pairs(TRANSFORMATIONS, IN_16_BITS))
def test_every_set_in_16_bits(name, dtype):
    kernels = {qset: spec(dtype=dtype) for qset in SETS}
    check_shapes(name, RULES, {**kernels, "bias": spec((3,), dtype)})


@every_transformation
def test_params_are_needed(name):
    optimizer, grads = OPTIMIZERS[name], dict.fromkeys(SETS, spec())
    state = jax.eval_shape(optimizer.init, grads)
    for update in (optimizer.update, lambda g, s: optimizer.update(g, s, None)):
        with pytest.raises(ValueError, match=r"params is None.*update\(grads, state, params\)"):
            jax.eval_shape(update, grads, state)


@every_transformation
@every_set
def test_a_leaf_that_does_not_fit_is_named(name, qset):
    bad = dataclasses.replace(SETS[qset], granularity=brx.PerBlock(5, axis=0))
    with pytest.raises(ValueError, match=r"'layer/kernel'.*does not divide axis 0"):
        TRANSFORMATIONS[name](bad).init({"layer": {"kernel": ones(*SHAPE)}})


@every_transformation
def test_it_is_a_transformation_with_extra_arguments(name):
    optimizer = OPTIMIZERS[name]
    assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
    params = noise(0, *SHAPE)
    state = jax.eval_shape(optimizer.init, params)
    plain = jax.eval_shape(optimizer.update, params, state, params)
    extra = jax.eval_shape(lambda *args: optimizer.update(*args, value=1.0), params, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(plain, extra)


@pytest.mark.parametrize("name", FROM_BASE)
def test_extra_arguments_reach_the_base(name):
    """The size of a Polyak step is the loss by the squared norm of the gradients."""
    optimizer = FROM_BASE[name](optax.polyak_sgd(max_learning_rate=10.0), brx.Binary())
    params, grads = {"a": array(np.eye(2))}, {"a": ones(2, 2)}
    _, state = jax.jit(optimizer.update)(grads, optimizer.init(params), params, value=2.0)
    wanted = np.eye(2) - 2.0 / 4
    np.testing.assert_allclose(brx.float_params(state, params)["a"], wanted, rtol=1e-5)
