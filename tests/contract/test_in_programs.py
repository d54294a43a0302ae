"""Every transformation in the programs of its users: a new one is tested by adding it to the list
of `test_transformations`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx, serialization
from jax.sharding import PartitionSpec as P

import brelax_jax as brx
from tests.contract.test_transformations import TRANSFORMATIONS
from tests.helpers import covering
from tests.helpers.training import array

pytestmark = pytest.mark.usefixtures("quickly_compiled")
RULES = brx.select(
    ("^first/k", brx.Binary(granularity=brx.PerChannel())), ("^second/k", brx.TernaryThreshold())
)
OTHER = brx.select(("^first/k", brx.TernaryThreshold()), ("^third/k", brx.Binary()))
every_transformation = pytest.mark.parametrize("name", TRANSFORMATIONS)


def each_kind(wrapper):
    """Of a wrapper, and in a chain; the other wrappers, which share its update, in `make soak`."""
    cases = covering.some(TRANSFORMATIONS, (wrapper, "relax_params"))
    return pytest.mark.parametrize("name", cases)


def weights(seed=0):
    rng = np.random.default_rng(seed)
    return {
        layer: {
            "kernel": array(rng.standard_normal((4, 6))),
            "bias": array(rng.standard_normal(6)),
        }
        for layer in ("first", "second", "third")
    }


def updated(optimizer, params, state, steps=2):
    def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(jnp.cos, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda *carry: jax.lax.scan(body, carry, None, steps)[0])(params, state)


class Model(nnx.Module):
    """Three layers, one of which is not quantized."""

    def __init__(self, rngs):
        for layer in weights():
            setattr(self, layer, nnx.Linear(4, 6, rngs=rngs))


@each_kind("binary_relax")
def test_nnx_loops_and_checkpoints(name, tmp_path):
    def make():
        model = Model(nnx.Rngs(0))
        return model, nnx.Optimizer(model, TRANSFORMATIONS[name](RULES), wrt=nnx.Param)

    def body(_, pair):
        model, optimizer = pair
        optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))
        return pair

    pair = nnx.fori_loop(0, 2, body, make())
    graph, like = nnx.split(nnx.eval_shape(make))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(pair))
        checkpointer.wait_until_finished()
        again = nnx.merge(graph, checkpointer.restore(tmp_path / "state", like))
    chex.assert_trees_all_equal(*(nnx.to_pure_dict(nnx.state(p)) for p in (pair, again)))


@each_kind("parq")
def test_specs_by_metadata_and_by_map_params(name):
    optimizer, params = TRANSFORMATIONS[name](RULES), weights()
    boxed = jax.tree.map(lambda w: linen.Partitioned(w, ("data", "model")[-w.ndim :]), params)
    specs = linen.get_partition_spec(jax.eval_shape(optimizer.init, boxed))
    ours = optax.tree.get(specs, "scales")
    assert ours == {"first/kernel": P(None, "model"), "second/kernel": P(None, None)}
    assert optax.tree.get(specs, "float_params")["first"]["kernel"] == P("data", "model")
    state = jax.eval_shape(optimizer.init, params)
    mapped = optax.tree.map_params(
        optimizer, lambda _: "like params", state, transform_non_params=lambda _: "not"
    )
    assert optax.tree.get(mapped, "scales") == optax.tree.get(mapped, "code_scales") == "not"
    assert set(jax.tree.leaves(optax.tree.get(mapped, "float_params"))) == {"like params"}


@each_kind("binary_connect")
def test_weights_that_are_loaded_after_init(name):
    optimizer, loaded = TRANSFORMATIONS[name](RULES), weights(1)
    late = updated(optimizer, loaded, optimizer.init(weights(0)))
    chex.assert_trees_all_equal(late, updated(optimizer, loaded, optimizer.init(loaded)))
    quantized = brx.quantized_params(optimizer.init(weights(0)), loaded)
    chex.assert_trees_all_close(quantized, RULES.project(loaded), rtol=1e-4)


@each_kind("parq")
def test_other_rules_are_refused_and_taken_over(name):
    old, new = (TRANSFORMATIONS[name](rules) for rules in (RULES, OTHER))
    params, state = updated(old, weights(), old.init(weights()))
    with pytest.raises(ValueError, match=r"'first/kernel'.*with_rules"):
        new.update(params, state, params)
    after = brx.with_rules(state, params, new)
    floats, kept = (brx.float_params(s, params) for s in (state, after))
    np.testing.assert_array_equal(kept["first"]["kernel"], floats["first"]["kernel"])
    assert optax.tree.get(after, "count", filtering=is_ours) == 2
    params, after = updated(new, params, after, 6)
    quantized = brx.quantized_params(after, params)
    assert len(np.unique(quantized["third"]["kernel"])) == 2
    if name != "relax_params":  # its λ is still finite
        np.testing.assert_array_equal(params["third"]["kernel"], quantized["third"]["kernel"])


def is_ours(path, value):
    return getattr(path[-1], "tuple_name", None) == "BinaryRelaxState"


@each_kind("binary_connect")
def test_codes_are_the_quantized_params(name):
    optimizer = TRANSFORMATIONS[name](RULES)
    params, state = updated(optimizer, weights(), optimizer.init(weights()))
    tree = brx.quantized_tree(state, params)
    dequantized = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, brx.Quantized) else leaf,
        tree,
        is_leaf=lambda leaf: isinstance(leaf, brx.Quantized),
    )
    chex.assert_trees_all_equal(dequantized, brx.quantized_params(state, params))


@each_kind("binary_relax")
def test_flax_serialization(name):
    optimizer = TRANSFORMATIONS[name](RULES)
    _, state = updated(optimizer, weights(), optimizer.init(weights()))
    again = serialization.from_bytes(optimizer.init(weights()), serialization.to_bytes(state))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    chex.assert_trees_all_equal(again, state)


@each_kind("parq")
def test_lambda_is_as_precise_as_the_float_weights(name):
    with jax.enable_x64(True):
        params = jax.tree.map(lambda w: w.astype("float64"), weights())
        optimizer = TRANSFORMATIONS[name](RULES)
        state = jax.eval_shape(optimizer.init, params)
        _, after = jax.eval_shape(optimizer.update, params, state, params)
    for tree in (state, after):
        assert optax.tree.get(tree, "lam", filtering=is_ours).dtype == "float64"


@every_transformation
def test_nothing_selected_is_an_error(name):
    with pytest.raises(ValueError, match=r"no leaf is selected.*first/bias"):
        TRANSFORMATIONS[name](brx.Binary()).init({"first": {"bias": jnp.ones((2, 2))}})
