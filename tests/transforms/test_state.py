"""The state: what is read from it at any depth, how it is replaced, saved and restored."""

import dataclasses
import functools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.training import train_state

import brelax_jax as brx
from tests.helpers.training import (
    QUANTIZED,
    array,
    make_params,
    normal,
    ones,
    relaxing,
    steps,
    trace_of,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BINARY = brx.Binary()


def test_two_states_with_two_sets():
    optimizer = optax.partition(
        {
            "two": brx.binary_relax(optax.sgd(0.05), BINARY, 1.0, hard_from=0),
            "three": brx.relax_params(brx.TernaryThreshold(), 3.0),
            "none": optax.sgd(0.05),
        },
        lambda params: {
            name: {
                "kernel": {"binary": "two", "threshold": "three"}.get(name, "none"),
                "bias": "none",
            }
            for name in params
        },
    )
    params, state = steps(optimizer, make_params(), 6)
    quantized, floats = brx.quantized_params(state, params), brx.float_params(state, params)
    assert len(np.unique(quantized["binary"]["kernel"])) == 2
    assert len(np.unique(quantized["threshold"]["kernel"])) in (2, 3)
    assert np.array_equal(params["binary"]["kernel"], quantized["binary"]["kernel"])
    q, y = (np.asarray(tree["threshold"]["kernel"]) for tree in (quantized, floats))
    wanted = 0.75 * q + 0.25 * y
    np.testing.assert_allclose(params["threshold"]["kernel"], wanted, atol=1e-5)
    for name in ("half", "plain"):
        chex.assert_trees_all_equal(quantized[name], params[name], floats[name])
    assert float(brx.strength(state)) in (0.75, 1.0)
    replaced = brx.with_float_params(state, make_params(1))
    assert float(brx.strength(replaced)) == 0


def test_with_float_params_goes_on_from_them():
    """The next update starts at the new weights, with the momentum and the count of before."""
    optimizer = brx.binary_relax(optax.sgd(0.1, momentum=0.5), BINARY, 1.0)
    params, grads = {"kernel": array(np.eye(3))}, [{"kernel": ones(3, 3)}]
    [(_, state)] = trace_of(optimizer, params, grads)
    new = {"kernel": array(np.arange(9.0).reshape(3, 3) - 4)}
    replaced = brx.with_float_params(state, new)
    assert int(replaced.count) == 1
    assert float(brx.strength(replaced)) == 0
    quantized = brx.quantized_params(replaced, new)["kernel"]
    np.testing.assert_allclose(np.abs(quantized), np.mean(np.abs(new["kernel"])), rtol=1e-5)
    [(moved_on, after)] = trace_of(optimizer, new, grads, replaced)
    moved = np.asarray(new["kernel"]) - np.float32(0.1 * 1.5)
    np.testing.assert_allclose(brx.float_params(after, new)["kernel"], moved, rtol=1e-6)
    wanted = (moved + BINARY.project(moved)) / 2
    np.testing.assert_allclose(moved_on["kernel"], wanted, rtol=1e-4, atol=1e-5)
    # The old state is as it was, and the new one holds copies.
    first = np.eye(3, dtype="float32") - np.float32(0.1)
    np.testing.assert_array_equal(brx.float_params(state, params)["kernel"], first)
    held = brx.float_params(replaced, new)["kernel"]
    assert held.unsafe_buffer_pointer() != new["kernel"].unsafe_buffer_pointer()


def test_accessors_under_jit():
    params, state = steps(relaxing(), make_params(), 3)

    def read(state, params):
        reads = brx.float_params, brx.quantized_params, brx.with_float_params
        return [brx.strength(state), *(read(state, params) for read in reads)]

    compiled = jax.jit(read)(state, params)
    chex.assert_trees_all_equal(compiled, read(state, params))
    assert float(compiled[0]) == 0.5


@dataclasses.dataclass
class Attention:
    """A user's pytree with fields of the names that Flax and this library use inside."""

    kernel: jax.Array
    value: dict[str, jax.Array]
    scale: dict[str, jax.Array]


jax.tree_util.register_dataclass(Attention, ["kernel", "value", "scale"], [])

ODD_TREES = {
    "one array": lambda k: k(1),
    "attributes named value and scale": lambda k: Attention(k(1), {"kernel": k(2)}, {"cut": k(3)}),
    "numbers and their texts": lambda k: {"a": {0: k(1)}, "b": [k(2)], "c": ({"0": k(3)},)},
    "names of the state's fields": lambda k: {"float_params": k(1), "scales": {"a/b": {"x": k(2)}}},
}


@pytest.mark.parametrize("tree", ODD_TREES.values(), ids=ODD_TREES)
def test_leaves_are_not_mixed_up(tree):
    """Each leaf has weights of its own size: two leaves of one path would show."""
    optimizer = brx.binary_connect(optax.sgd(0.0), BINARY)
    start = tree(lambda i: np.full((i, 2), i, np.float32))
    doubled = tree(lambda i: np.full((i, 2), 2 * i, np.float32))

    def step(_, carry):
        params, state = carry
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def run(params):
        params, state = jax.lax.fori_loop(0, 3, step, (params, optimizer.init(params)))
        read = brx.float_params(state, params), brx.quantized_params(state, params)
        replaced = brx.with_float_params(state, doubled)
        return (params, *read), brx.quantized_params(replaced, doubled)

    same, replaced = run(start)
    for got in same:
        chex.assert_trees_all_equal(got, start)
    chex.assert_trees_all_equal(replaced, doubled)


def test_two_leaves_of_one_path_are_refused():
    params = {"a/b": ones(1, 2), "a": {"b": ones(2, 2)}}
    with pytest.raises(ValueError, match=r"2 leaves .* 'a/b'"):
        brx.binary_connect(optax.sgd(0.0), BINARY).init(params)


def test_a_state_without_ours_is_refused():
    params = make_params()
    for state in (optax.adam(0.1).init(params), (), None, optax.chain(optax.sgd(0.1)).init(params)):
        for read in (brx.float_params, brx.quantized_params, brx.with_float_params):
            with pytest.raises(ValueError, match="no state of binary_relax"):
                read(state, params)
        with pytest.raises(ValueError, match="no state of binary_relax"):
            brx.strength(state)


def test_memory_is_the_base_one_float_copy_and_the_scales():
    params, base = make_params(), optax.adam(0.1)

    def size(tree):
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    floats = 4 * 3 * 4 * len(QUANTIZED)  # the float32 copies
    scales = 4 * (3 + 2 + 2 * 3)  # per channel; the tensor's, and its cut; two blocks a column
    moments = 2 * 2 * 4 * 3  # Adam's, of the bfloat16 leaf in float32
    optimizer = relaxing(base=base)
    state = optimizer.init(params)
    assert (
        size(state) == size(base.init(params)) + moments + floats + scales + 3 * 4 + 1
    )  # and the two counts, λ and the flag
    _, after = jax.eval_shape(optimizer.update, params, state, params)
    assert size(after) == size(state)


def test_float_copies_are_copies():
    """Donation of the params must not take the state's arrays along, nor the other way round."""
    params = make_params()
    optimizer = relaxing()
    state = optimizer.init(params)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(params)}
    assert pointers.isdisjoint(leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state))
    step = jax.jit(
        lambda state, params: optimizer.update(params, state, params), donate_argnums=(0,)
    )
    updates, after = step(state, params)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    both = jax.jit(optimizer.update, donate_argnums=(1, 2))
    updates, after = both(updates, after, jax.tree.map(jnp.copy, params))
    assert all(np.isfinite(leaf.astype("float32")).all() for leaf in jax.tree.leaves(updates))
    chex.assert_trees_all_equal_structs(after, optimizer.init(params))


@pytest.mark.parametrize("committed", [False, True])
def test_a_state_is_committed_to_a_device_only_where_its_params_are(committed):
    """Else the second update, whose state is committed altogether, would be compiled anew."""
    params = jax.device_put(make_params(), jax.devices()[0] if committed else None)
    state = relaxing().init(params)
    for leaf in jax.tree.leaves((state.float_params, state.scales)):
        assert leaf.committed == committed


def stable(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


@pytest.mark.parametrize("lam", [1, 1.0, np.float64(2), lambda c: c, lambda c: 1.5, lambda c: 0])
@pytest.mark.parametrize("hard_from", [None, 3])
def test_structure_dtypes_and_weak_types_do_not_change(lam, hard_from):
    optimizer, params = relaxing(lam, hard_from), make_params()
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert stable(after) == stable(state)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


def test_tree_utilities():
    optimizer = relaxing()
    params, state = steps(optimizer, make_params(), 3)
    assert int(optax.tree.get(state, "count")) == 3
    assert float(optax.tree.get(state, "lam")) == 1
    again = optax.tree.set(state, count=jnp.int32(7))
    assert int(again.count) == 7
    same = jax.tree.map(lambda leaf: leaf, state)
    chex.assert_trees_all_equal(same, state)
    assert jax.tree.structure(same) == jax.tree.structure(state)
    mapped = optax.tree_utils.tree_map_params(optimizer, lambda leaf: leaf + 1, state)
    for name in QUANTIZED:
        y, after = (brx.float_params(s, params)[name]["kernel"] for s in (state, mapped))
        np.testing.assert_array_equal(after, y + 1)
    assert int(mapped.count) == 3
    assert float(mapped.lam) == 1
    mapped = optax.tree_utils.tree_map_params(optimizer, np.ones_like, state)
    momentum = jax.tree.leaves(mapped.base_state)
    assert momentum
    assert all(np.all(leaf == 1) for leaf in momentum)


SAVED = optax.chain(optax.clip(1.0), relaxing())


@functools.cache
def saved():
    """Params and a state shortly before phase II."""
    return going_on(make_params(), SAVED.init(make_params()), 4)


def going_on(params, state, count):
    """Steps from a state on a device, as Orbax restores it: so one program runs all of them."""
    params, state = jax.device_put((params, state), jax.devices()[0])
    return steps(SAVED, params, count, state)


def assert_resumes(restored):
    """Training goes on from a restored state as from the original, bit for bit."""
    params, state = saved()
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, state)
    left, right = (going_on(params, s, 6)[0] for s in (state, restored))
    chex.assert_trees_all_equal(left, right)


def test_pickle():
    assert_resumes(pickle.loads(pickle.dumps(saved()[1])))


def test_flax_serialization():
    fresh, (_, state) = SAVED.init(make_params()), saved()
    assert_resumes(serialization.from_bytes(fresh, serialization.to_bytes(state)))
    assert_resumes(serialization.from_state_dict(fresh, serialization.to_state_dict(state)))


def test_flax_serialization_of_a_train_state():
    params = {"kernel": normal(0, 4, 3), "bias": ones(3)}
    optimizer = brx.binary_relax(optax.adam(0.1), BINARY, 1.0, hard_from=2)
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=optimizer)
    step = jax.jit(lambda state: state.apply_gradients(grads=jax.tree.map(jnp.cos, state.params)))
    moved = state
    for _ in range(5):
        moved = step(moved)
    restored = serialization.from_bytes(state, serialization.to_bytes(moved))
    chex.assert_trees_all_equal(restored.params, moved.params)
    chex.assert_trees_all_equal(
        brx.float_params(restored.opt_state, restored.params),
        brx.float_params(moved.opt_state, moved.params),
    )


def test_orbax(tmp_path):
    params, state = saved()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(SAVED.init, params)
        assert_resumes(checkpointer.restore(tmp_path / "state", abstract))


# States of version 0.1.0.

FIELDS = {
    "fits": ("base_state", "float_params", "fits", "count", "lam", "landed", "selection"),
    "cuts": (
        *("base_state", "float_params", "scales", "cuts", "codes"),
        *("count", "lam", "updates_on_grid", "started", "sets"),
    ),
}


@pytest.fixture(params=FIELDS)
def of_0_1_0(request):
    """A state as 0.1.0 saved it, restored as a dict."""
    fields = saved()[1][1]._asdict()
    fits = {path: {"scale": scale} for path, scale in fields["scales"].items()}
    fields |= {"fits": fits, "cuts": {}, "landed": jnp.int32(2), "selection": {}}
    return serialization.to_state_dict({name: fields[name] for name in FIELDS[request.param]})


@pytest.mark.parametrize(
    "use",
    [
        lambda state, params: brx.float_params([{}, state], params),
        lambda state, params: brx.quantized_params({"0": {}, "1": state}, params),
        lambda state, params: brx.with_rules([{}, state], params, SAVED),
        lambda state, params: relaxing().update(params, state, params),
    ],
)
def test_a_state_of_0_1_0_is_refused_by_name(of_0_1_0, use):
    with pytest.raises(ValueError, match=r"saved by brelax_jax 0\.1\.0.*call `init` on its params"):
        use(of_0_1_0, make_params())


def test_flax_and_orbax_do_not_take_a_state_of_0_1_0(of_0_1_0, tmp_path):
    """They name the fields that differ."""
    name = "cuts" if "cuts" in of_0_1_0 else "fits"
    with pytest.raises(ValueError, match=rf"field names .*'{name}'"):
        serialization.from_state_dict(saved()[1], {"0": {}, "1": of_0_1_0})
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", [{}, of_0_1_0])
        checkpointer.wait_until_finished()
        with pytest.raises(ValueError, match="scales"):
            checkpointer.restore(tmp_path / "state", jax.eval_shape(SAVED.init, make_params()))


def test_a_pickle_of_0_1_0_is_refused_by_name():
    qset = brx.Ternary()
    state = brx.binary_relax(optax.sgd(0.1), qset, 1.0).init({"kernel": array(np.eye(3))})
    vars(qset)["tolerance"] = vars(qset).pop("rule").tolerance  # as sets had it
    with pytest.raises(ValueError, match=r"saved by brelax_jax 0\.1\.0"):
        pickle.loads(pickle.dumps(state))


def test_nnx_state_at_init_and_after_updates():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(4, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])

        def __call__(self, x):
            return self.layers[1](self.layers[0](x))

    model = Model(nnx.Rngs(0))
    rules = brx.select((r"^layers/0/kernel$", BINARY), (r"^layers/1/", None))
    optimizer = nnx.Optimizer(
        model, optax.chain(brx.binary_relax(optax.sgd(0.1), rules, 1.0)), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 4))) ** 2))(model)
        optimizer.update(model, grads)

    for strength in (0.0, 0.5, 0.5):
        assert float(brx.strength(optimizer.opt_state)) == strength
        params = nnx.state(model, nnx.Param)
        floats = brx.float_params(optimizer.opt_state, params)
        quantized = brx.quantized_params(optimizer.opt_state, params)
        chex.assert_trees_all_equal_structs(params, floats, quantized)
        first, second = quantized["layers"][0], quantized["layers"][1]
        assert len(np.unique(first["kernel"][...])) == 2
        np.testing.assert_array_equal(second["kernel"][...], model.layers[1].kernel[...])
        w = model.layers[0].kernel[...]
        wanted = (1 - strength) * floats["layers"][0]["kernel"][...]
        wanted += strength * first["kernel"][...]
        np.testing.assert_allclose(w, wanted, atol=1e-5)
        step(model, optimizer)
    zeros = jax.tree.map(jnp.zeros_like, params)
    replaced = brx.with_float_params(optimizer.opt_state, zeros)
    for leaf in jax.tree.leaves(brx.float_params(replaced, zeros)):
        assert not np.any(leaf)
