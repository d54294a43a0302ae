"""Selections by functions and by trees of sets, and what a selection says of params."""

import copy
import dataclasses
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import brelax_jax as brx
from tests.helpers.training import array, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BINARY, TERNARY, FOUR_BITS = brx.Binary(), brx.Ternary(), brx.Uniform(4)
PARAMS = {
    "conv": {"kernel": ones(3, 3, 2, 4), "bias": ones(4)},
    "head": {"kernel": ones(4, 2), "bias": ones(2), "scale": ones(2, 2)},
}
TREE = {
    "conv": {"kernel": BINARY, "bias": TERNARY},
    "head": {"kernel": FOUR_BITS, "bias": None, "scale": None},
}
CHOSEN = {"conv/bias": TERNARY, "conv/kernel": BINARY, "head/kernel": FOUR_BITS}


def assigned(qset, params=PARAMS):
    """What a transformation quantizes, by its state."""
    state = jax.eval_shape(brx.binary_connect(optax.sgd(0.1), qset).init, params)
    return dict(state.sets.pairs or ())


def large(path, leaf):
    return leaf.size > 10


def is_head(path, leaf):
    return path.startswith("head/k")


# Functions as keys


def test_a_key_may_be_a_function_of_path_and_leaf():
    rules = brx.select((is_head, FOUR_BITS), (large, BINARY), default=TERNARY)
    wanted = {"conv/kernel": BINARY, "head/kernel": FOUR_BITS}
    assert rules.assign(PARAMS) == assigned(rules) == wanted
    shapes = jax.eval_shape(lambda: PARAMS)
    assert rules.assign(shapes) == wanted


def test_the_first_key_decides_whatever_its_spelling():
    rules = brx.select((large, None), ("kernel$", BINARY), (lambda path, leaf: True, TERNARY))
    wanted = dict.fromkeys(("conv/bias", "head/bias", "head/scale"), TERNARY)
    assert rules.assign(PARAMS) == {**wanted, "head/kernel": BINARY}


def test_a_function_that_fits_no_leaf_is_no_mistake():
    """It may be a policy, as for small leaves; a pattern that finds nothing is a misspelling."""
    rules = brx.select((lambda path, leaf: leaf.ndim == 5, None), default=BINARY)
    assert rules.assign(PARAMS).keys() == {"conv/kernel", "head/kernel"}


@pytest.mark.parametrize("answer", [None, "yes", 1, jnp.array(True), BINARY], ids=repr)
def test_a_function_that_returns_something_else_is_refused(answer):
    rules = brx.select((lambda path, leaf: answer, BINARY))
    with pytest.raises(ValueError, match=r"must return True or False.*'conv/bias'.*in bool"):
        rules.assign(PARAMS)


def test_functions_see_shapes_and_not_values_which_change():
    seen = []

    def key(path, leaf):
        seen.append(leaf)
        return True

    def tree(params):
        seen.extend(jax.tree.leaves(params))
        return jax.tree.map(lambda _: BINARY, params)

    for rules in (brx.select((key, BINARY)), brx.select(tree)):
        assert len(rules.assign(PARAMS)) == len(rules.assign(jax.eval_shape(lambda: PARAMS))) == 5
    assert {type(leaf) for leaf in seen} == {jax.ShapeDtypeStruct}
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        brx.select((lambda path, leaf: float(jnp.mean(leaf)) > 0, BINARY)).assign(PARAMS)


# Trees of sets


def test_a_tree_of_sets_takes_the_place_of_rules():
    assert assigned(TREE) == CHOSEN
    assert assigned(lambda params: TREE) == CHOSEN
    assert assigned(brx.select(lambda params: TREE)) == CHOSEN


def test_a_tree_may_select_nothing():
    nothing = {"conv": None, "head": None}
    assert assigned(nothing) == assigned(lambda params: nothing) == {}


def test_none_stands_for_what_has_no_leaves_too():
    params = [PARAMS["head"], (), {}, None]
    assert assigned([BINARY, None, None, None], params) == {"0/kernel": BINARY}


def test_a_set_in_the_place_of_a_subtree_is_for_its_kernels():
    wanted = {"conv/kernel": BINARY, "head/kernel": FOUR_BITS}
    assert assigned({"conv": BINARY, "head": FOUR_BITS}) == wanted
    assert assigned({"conv": BINARY, "head": None}) == {"conv/kernel": BINARY}
    assert assigned(lambda params: TERNARY) == dict.fromkeys(wanted, TERNARY)


def test_trees_of_every_kind():
    def by_rank(params):
        return jax.tree.map(lambda p: BINARY if p.ndim > 1 else None, params)

    layer = jax.tree_util.register_dataclass(
        dataclasses.make_dataclass("Layer", ["kernel", "bias"]), ["kernel", "bias"], []
    )
    kernel, bias = ones(2, 3), ones(3)
    network = nnx.state(nnx.eval_shape(lambda: nnx.Linear(2, 3, rngs=nnx.Rngs(0))), nnx.Param)
    for params, path in [
        ([kernel, bias, None], "0"),
        ((layer(kernel, bias), optax.MaskedNode()), "0/kernel"),
        (network, "kernel"),
        (kernel, ""),
    ]:
        assert assigned(by_rank(params), params) == {path: BINARY}
        assert assigned(by_rank, params) == {path: BINARY}
    assert assigned({"kernel": TERNARY, "bias": None}, network) == {"kernel": TERNARY}


def test_a_module_that_can_be_called_is_a_tree_like_any_other():
    class Module(dict):
        def __call__(self):
            raise AssertionError

    jax.tree_util.register_pytree_with_keys(
        Module,
        lambda m: ([(jax.tree_util.DictKey(k), v) for k, v in m.items()], tuple(m)),
        lambda keys, values: Module(zip(keys, values, strict=True)),
    )
    assert assigned(Module(a=BINARY), Module(a=ones(2, 2))) == {"a": BINARY}


def test_a_tree_is_for_the_whole_network_also_where_only_a_part_is_trained():
    params = {**PARAMS, "head": optax.MaskedNode()}
    assert assigned(TREE, params) == {name: CHOSEN[name] for name in ("conv/bias", "conv/kernel")}
    optimizer = optax.masked(
        brx.binary_connect(optax.sgd(0.1), TREE), {"conv": True, "head": False}
    )
    state = jax.eval_shape(optimizer.init, PARAMS)
    updates, _ = jax.eval_shape(optimizer.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(updates) == jax.tree.structure(PARAMS)


@pytest.mark.parametrize("qset", [TREE, brx.select(lambda params: TREE)], ids=["tree", "function"])
def test_inside_inject_hyperparams(qset):
    make = optax.inject_hyperparams(brx.binary_relax)
    optimizer = make(optax.sgd(0.1), qset, brx.continuation(8))
    state = jax.eval_shape(optimizer.init, PARAMS)
    assert dict(state.inner_state.sets.pairs) == CHOSEN
    _, after = jax.eval_shape(optimizer.update, PARAMS, state, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)


REFUSED = {
    "a leaf without a set": (
        {"conv": TREE["conv"], "head": {"kernel": BINARY}},
        r"nothing for 'head/bias'.*or None",
    ),
    "a set without a leaf": (
        {**TREE, "tail": BINARY},
        r"Binary.* at 'tail', where params have nothing.*conv/bias",
    ),
    "a set below a leaf": ({**TREE, "conv": {"kernel": [BINARY]}}, r"at 'conv/kernel/0'"),
    "a name": ({**TREE, "conv": "binary"}, r"sets and None.*got 'binary' at 'conv'"),
    "a class": ({**TREE, "conv": brx.Binary}, r"got <class.*Binary'> at 'conv'"),
    "a mask": (jax.tree.map(lambda p: p.ndim > 1, PARAMS), r"got False at 'conv/bias'"),
    "a function to a text": (lambda params: "binary", r"must return a tree.*got 'binary'"),
    "a function to arrays": (lambda params: params, r"must return a tree.*at 'conv/bias'"),
    "a function to rules": (lambda params: brx.select(default=BINARY), r"must return.*Selection"),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(("qset", "message"), REFUSED.values(), ids=REFUSED)
def test_a_tree_that_is_not_like_the_params_is_refused(qset, message, jitted):
    def init(params):
        return brx.binary_connect(optax.sgd(0.1), qset).init(params)

    with pytest.raises(ValueError, match=message):
        (jax.jit(init) if jitted else init)(PARAMS)


def test_a_set_for_a_leaf_that_is_not_floating_is_refused():
    with pytest.raises(ValueError, match=r"'steps' is of dtype int32.*Binary"):
        brx.select(lambda params: {"steps": BINARY}).assign({"steps": jnp.arange(3)})
    block = brx.Binary(granularity=brx.PerBlock(4))
    with pytest.raises(ValueError, match=r"'a'.*does not divide axis 1"):
        brx.select(lambda params: {"a": block}).assign({"a": ones(2, 3)})


def test_a_function_alone_is_of_params_and_takes_no_default():
    for make in (
        lambda: brx.select(lambda params: TREE, default=BINARY),
        lambda: brx.select(large),
        lambda: brx.binary_connect(optax.sgd(0.1), large),
    ):
        with pytest.raises(ValueError, match=r"given alone.*A rule by a function is a pair"):
            make()
    with pytest.raises(ValueError, match=r"A rule is a pair.*\(path, leaf\)"):
        brx.select((lambda path: True, BINARY))


def test_a_compiled_pattern_is_a_pattern():
    rules = brx.select((re.compile("HEAD/K", re.IGNORECASE), BINARY))
    assert rules.assign(PARAMS) == {"head/kernel": BINARY}


# What a selection says


def test_a_mask_says_what_is_quantized():
    rules = brx.select(("^head/kernel", BINARY), default=TERNARY)
    mask = rules.mask(PARAMS)
    assert jax.tree.structure(mask) == jax.tree.structure(PARAMS)
    paths = [path for path, leaf in jax.tree_util.tree_leaves_with_path(mask) if leaf]
    paths = {jax.tree_util.keystr(path, simple=True, separator="/") for path in paths}
    assert paths == rules.assign(PARAMS).keys() == {"conv/kernel", "head/kernel"}


def test_a_mask_is_one_of_optax():
    """Decay of the quantized leaves alone."""
    rules = brx.select(("^head/kernel", BINARY), ("^conv/", None))
    decay = optax.add_decayed_weights(0.5, mask=rules.mask)
    zeros = jax.tree.map(lambda p: 0 * np.asarray(p), PARAMS)
    updates, _ = jax.jit(decay.update)(zeros, decay.init(PARAMS), PARAMS)
    updates = jax.device_get(updates)
    np.testing.assert_array_equal(updates["head"]["kernel"], 0.5)
    assert not updates["conv"]["kernel"].any()
    assert not updates["head"]["bias"].any()


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (brx.select(("^head/kernel", BINARY)), r"'\^head/kernel' matches no leaf.*other/kernel"),
        (brx.select(lambda params: TREE), r"at 'conv/(bias|kernel)', where params have nothing"),
    ],
    ids=["rules", "tree"],
)
def test_a_mask_or_an_assignment_for_other_params_is_refused(selection, message):
    for act in (selection.mask, selection.assign):
        with pytest.raises(ValueError, match=message):
            act({"other": {"kernel": ones(2, 2)}})


# In the state


def test_equal_functions_make_equal_states_and_compile_once():
    traces = []

    def optimizer():
        return brx.binary_connect(
            optax.sgd(0.1), brx.select((lambda path, leaf: leaf.ndim > 2, BINARY))
        )

    @jax.jit
    def step(grads, state, params):
        traces.append(1)
        return optimizer().update(grads, state, params)

    states = [optimizer().init(PARAMS) for _ in range(2)]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
    for state in states:
        _, after = step(PARAMS, state, PARAMS)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        step(PARAMS, after, PARAMS)
    assert len(traces) == 1
    other = brx.binary_connect(optax.sgd(0.1), brx.select((large, TERNARY))).init(PARAMS)
    assert jax.tree.structure(other) != jax.tree.structure(states[0])


OTHERS = {
    "another set": (
        {"a": TERNARY, "b": None},
        r"'a' was selected for Binary.*for Ternary.*with_rules",
    ),
    "another granularity": (
        {"a": brx.Binary(granularity=brx.PerChannel()), "b": None},
        r"'a' was selected for Binary.*PerChannel",
    ),
    "a leaf more": (
        {"a": BINARY, "b": BINARY},
        r"'b' is to be quantized, but the state has no ",
    ),
    "a leaf less": (
        lambda params: {"a": None, "b": None},
        r"'a' was selected for Binary.*for None",
    ),
}


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_other_sets_is_refused(other, message):
    params = {"a": ones(2, 2), "b": ones(2, 2)}
    state = brx.binary_connect(optax.sgd(0.1), {"a": BINARY, "b": None}).init(params)
    with pytest.raises(ValueError, match=message):
        brx.binary_connect(optax.sgd(0.1), other).update(params, state, params)


def test_a_state_whose_params_optax_has_mapped_can_be_read_and_updated():
    """`optax.tree.map_params` gives a state the structure of one that was made for no params."""
    optimizer = brx.binary_connect(optax.sgd(0.0), brx.select((large, BINARY), ("", None)))
    state = brx.with_float_params(optimizer.init(PARAMS), PARAMS)
    mapped = optax.tree.map_params(optimizer, lambda y: 2 * y, state)
    np.testing.assert_array_equal(brx.float_params(mapped, PARAMS)["conv"]["kernel"], 2.0)
    assert brx.quantized_params(mapped, PARAMS)["conv"]["kernel"].shape == (3, 3, 2, 4)
    _, after = jax.jit(optimizer.update)(PARAMS, mapped, PARAMS)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert dict(after.sets.pairs) == {"conv/kernel": BINARY}


def test_states_that_optax_has_mapped_are_not_taken_for_one_another():
    params = {"kernel": array([[0.1, -1.0, 3.0, 2.0]])}
    read = jax.jit(brx.quantized_params)
    for qset in (BINARY, brx.TernaryThreshold()):
        optimizer = brx.binary_connect(optax.sgd(0.1), qset)
        mapped = optax.tree.map_params(optimizer, lambda y: y, optimizer.init(params))
        wanted = qset.project(params["kernel"])
        np.testing.assert_allclose(read(mapped, params)["kernel"], wanted, rtol=1e-4)


def test_a_mapped_state_whose_rules_see_other_shapes_is_refused():
    """As in shard_map, where a function sees the shapes of one device's parts."""
    optimizer = brx.binary_connect(optax.sgd(0.1), brx.select((large, BINARY)))
    mapped = optax.tree.map_params(optimizer, lambda y: y[:1], optimizer.init({"a": ones(20)}))
    with pytest.raises(ValueError, match=r"float weights for 'a'.*Outside of shard_map"):
        brx.quantized_params(mapped, {"a": ones(1)})


@pytest.mark.parametrize(
    "qset", [BINARY, brx.select(("nothing", BINARY)), brx.Binary(granularity=brx.PerBlock(5))]
)
def test_a_part_without_leaves_quantizes_nothing(qset):
    parts = {"quantized": brx.binary_connect(optax.sgd(0.1), qset), "float": optax.sgd(0.1)}
    optimizer = optax.partition(parts, jax.tree.map(lambda _: "float", PARAMS))
    state = optimizer.init(PARAMS)
    for _ in range(2):
        chex.assert_trees_all_equal(brx.quantized_params(state, PARAMS), PARAMS)
        assert brx.metrics(brx.with_float_params(state, PARAMS), PARAMS) == {}
        _, state = optimizer.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda state: pickle.loads(pickle.dumps(state))])
def test_states_of_functions_can_be_copied_and_pickled(copied):
    optimizer = brx.binary_connect(optax.sgd(0.1), brx.select((lambda path, leaf: True, BINARY)))
    state = optimizer.init(PARAMS)
    again = copied(state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    jax.jit(optimizer.update)(PARAMS, again, PARAMS)
    with_patterns = brx.binary_connect(optax.sgd(0.1), brx.select(("kernel", BINARY)))
    again = copied(brx.with_float_params(with_patterns.init(PARAMS), PARAMS))
    mapped = optax.tree.map_params(with_patterns, lambda y: 2 * y, again)
    np.testing.assert_array_equal(brx.float_params(mapped, PARAMS)["head"]["kernel"], 2.0)
