"""What the transformations do: the formulas, the wrappers around them, and what they refuse."""

import pickle

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import brelax_jax as brx

SETS = {
    "binary": brx.Binary(),
    "ternary": brx.Ternary(granularity=brx.PerChannel()),
    "threshold": brx.TernaryThreshold(),
    "uniform": brx.Uniform(4, granularity=brx.PerBlock(2, axis=0)),
    "power": brx.PowerOfTwo(3),
    "levels": brx.ScaledLevels((-3, -1, 1, 3)),
}
RULES = brx.select(*((f"^{name}/kernel", qset) for name, qset in SETS.items()))
FORMS = {
    "wrapper": lambda base, *args, **kwargs: brx.binary_relax(base, *args, **kwargs),
    "chain": lambda base, *args, **kwargs: optax.chain(base, brx.relax_params(*args, **kwargs)),
}


def make_params(seed=0, dtype="float32"):
    keys = iter(jax.random.split(jax.random.key(seed), 2 * len(SETS)))
    return {
        name: {
            "kernel": jax.random.normal(next(keys), (4, 3), dtype),
            "bias": jax.random.normal(next(keys), (3,), dtype),
        }
        for name in SETS
    }


def run(optimizer, params, steps, grads_of=None, state=None):
    """The params and states after each of some updates."""
    state = optimizer.init(params) if state is None else state
    grads_of = grads_of or (lambda t, p: jax.tree.map(lambda x: jnp.sin(x + t), p))

    @jax.jit
    def update(t, params, state):
        updates, state = optimizer.update(grads_of(t, params), state, params)
        return optax.apply_updates(params, updates), state

    trace = []
    for t in range(steps):
        params, state = update(t, params, state)
        trace.append((params, state))
    return trace


@pytest.mark.parametrize("form", FORMS)
def test_phase_one_is_the_relaxation_and_phase_two_the_projection(form):
    lam = brx.geometric_continuation(0.5, 2.0)
    optimizer = FORMS[form](optax.sgd(0.1, momentum=0.9), RULES, lam, hard_from=6)
    for t, (params, state) in enumerate(run(optimizer, make_params(), 9)):
        y = brx.float_params(state, params)
        alpha = 1.0 if t >= 6 else 0.5 * 2**t / (0.5 * 2**t + 1)
        assert float(brx.strength(state)) == pytest.approx(alpha)
        for name, qset in SETS.items():
            projection = qset.project(y[name]["kernel"])
            wanted = (1 - alpha) * y[name]["kernel"] + alpha * projection
            np.testing.assert_allclose(params[name]["kernel"], wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_lambda_zero_is_float_training(form):
    base = optax.adam(0.01)
    trace = run(FORMS[form](base, RULES, 0.0), make_params(), 20)
    plain = run(base, make_params(), 20)
    chex.assert_trees_all_close(trace[-1][0], plain[-1][0], rtol=1e-5, atol=1e-6)


def test_lambda_infinity_is_binary_connect():
    base = optax.sgd(0.1)
    relaxed = run(brx.binary_relax(base, RULES, jnp.inf), make_params(), 5)
    hard = run(brx.binary_relax(base, RULES, 1.0, hard_from=0), make_params(), 5)
    connect = run(brx.binary_connect(base, RULES), make_params(), 5)
    chex.assert_trees_all_equal(relaxed[-1][0], connect[-1][0], hard[-1][0])


def test_decay_and_trust_ratios_act_on_the_float_weights():
    """The base alone, fed with the same gradients and the float weights, moves as they do."""
    base = optax.chain(optax.clip_by_global_norm(1.0), optax.lamb(0.05, weight_decay=0.1))
    optimizer = brx.binary_relax(base, RULES, 3.0)
    params = make_params()
    state, floats, base_state = optimizer.init(params), params, base.init(params)
    update, base_update = jax.jit(optimizer.update), jax.jit(base.update)
    for t in range(4):
        grads = jax.tree.map(lambda x, t=t: jnp.cos(3 * x + t), params)
        updates, base_state = base_update(grads, base_state, floats)
        floats = optax.apply_updates(floats, updates)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(brx.float_params(state, params), floats, rtol=1e-5, atol=1e-6)


def test_leaves_that_are_not_selected_get_the_updates_of_the_base():
    optimizer, base = brx.binary_connect(optax.adam(0.1), RULES), optax.adam(0.1)
    ours, theirs = run(optimizer, make_params(), 1)[0][0], run(base, make_params(), 1)[0][0]
    for name in SETS:
        np.testing.assert_array_equal(ours[name]["bias"], theirs[name]["bias"])


def test_small_updates_are_not_lost_on_bfloat16_params():
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    optimizer = brx.binary_relax(optax.sgd(1e-4), brx.Binary(), 1.0)
    state = optimizer.init(params)

    def body(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        assert updates["kernel"].dtype == jnp.bfloat16
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.lax.scan(body, (params, state), None, length=1000)
    np.testing.assert_allclose(brx.float_params(state, params)["kernel"], 0.9, rtol=1e-3)
    np.testing.assert_allclose(params["kernel"].astype("float32"), 0.9, rtol=5e-3)


def test_the_state_is_one_float_copy_and_one_scale_a_group_over_the_base():
    params, base = make_params(), optax.adam(0.1)
    kernels = sum(params[name]["kernel"].size for name in SETS)
    groups = sum(brx_groups(qset) for qset in SETS.values()) + 1  # and the threshold's cut

    def size(tree):
        return sum(leaf.size for leaf in jax.tree.leaves(tree))

    state = brx.binary_relax(base, RULES, 1.0).init(params)
    assert size(state) == size(base.init(params)) + kernels + groups + 2


def brx_groups(qset):
    return qset.quantize(jnp.ones((4, 3))).scale.size


def test_donated_params_and_states():
    params = make_params()
    optimizer = brx.binary_relax(optax.adam(0.1), RULES, 1.0, hard_from=3)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update, donate_argnums=(1, 2))
    updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((updates, state)))


def test_nan_stays_in_its_group_and_zeros_stay_zero():
    qset = brx.Ternary(granularity=brx.PerChannel())
    params = {"kernel": jnp.zeros((8, 3)).at[:, 1].set(1.0).at[2, 2].set(jnp.nan)}
    optimizer = brx.binary_connect(optax.sgd(0.0), qset)
    params, state = run(optimizer, params, 3)[-1]
    for tree in (params, brx.quantized_params(state, params)):
        assert (tree["kernel"][:, 0] == 0).all()
        assert (tree["kernel"][:, 1] == 1).all()
        assert jnp.isnan(tree["kernel"][:, 2]).all()


def test_extra_arguments_reach_the_base():
    seen = []

    def update(updates, state, params=None, **extra):
        seen.append(extra)
        return updates, state

    base = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    params = make_params()
    optimizer = brx.binary_relax(base, RULES, 1.0)
    optimizer.update(params, optimizer.init(params), params, value=3.0)
    assert seen == [{"value": 3.0}]


def test_the_count_does_not_overflow():
    params = make_params()
    optimizer = brx.binary_relax(optax.sgd(0.1), RULES, 1.0, hard_from=10)
    state = optimizer.init(params)._replace(count=jnp.int32(2**31 - 1))
    params, state = run(optimizer, params, 2, state=state)[-1]
    assert int(state.count) == 2**31 - 1
    assert float(brx.strength(state)) == 1


WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("relax", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "theirs": optax.sgd(0.1)},
        lambda p: {name: {"kernel": "ours", "bias": "theirs"} for name in p},
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_accessors_find_the_state_inside(wrapper):
    optimizer = WRAPPERS[wrapper](brx.binary_relax(optax.sgd(0.05), RULES, 1.0, hard_from=8))
    params, state = run(optimizer, make_params(), 24)[-1]
    quantized = brx.quantized_params(state, params)
    chex.assert_trees_all_equal(quantized, params)
    for name, qset in SETS.items():
        values = np.unique(quantized[name]["kernel"][:, 0])
        assert len(values) <= len(qset.levels) * 2  # two blocks of two
        assert not np.array_equal(
            brx.float_params(state, params)[name]["kernel"], params[name]["kernel"]
        )
    assert float(brx.strength(state)) == 1


def test_injected_hyperparameters_are_set_at_run_time():
    make = optax.inject_hyperparams(brx.binary_relax)
    optimizer = make(optax.sgd(0.1), RULES, lam=1.0, hard_from=1000)
    params, state = run(optimizer, make_params(), 1)[-1]
    assert float(brx.strength(state)) == 0.5
    state.hyperparams["lam"] = jnp.float32(3.0)
    params, state = run(optimizer, params, 1, state=state)[-1]
    assert float(brx.strength(state)) == 0.75
    state.hyperparams["hard_from"] = jnp.zeros_like(state.hyperparams["hard_from"])
    _, state = run(optimizer, params, 1, state=state)[-1]
    assert float(brx.strength(state)) == 1


def test_with_float_params_goes_on_from_other_params():
    optimizer = brx.binary_relax(optax.sgd(0.1, momentum=0.9), RULES, 1.0)
    _params, state = run(optimizer, make_params(), 3)[-1]
    other = make_params(seed=1)
    replaced = brx.with_float_params(state, other)
    chex.assert_trees_all_equal(brx.float_params(replaced, other), other)
    chex.assert_trees_all_equal(replaced.base_state, state.base_state)
    assert int(replaced.count) == 3
    assert float(brx.strength(replaced)) == 0
    for name, qset in SETS.items():
        np.testing.assert_allclose(
            brx.quantized_params(replaced, other)[name]["kernel"],
            qset.project(other[name]["kernel"]),
            rtol=1e-4,
        )


def test_states_are_saved_and_restored(tmp_path):
    optimizer = brx.binary_relax(optax.adam(0.1), RULES, 1.0, hard_from=3)
    params, state = run(optimizer, make_params(), 2)[-1]
    like = optimizer.init(params)
    restored = flax.serialization.from_bytes(like, flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal(pickle.loads(pickle.dumps(state)), state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        chex.assert_trees_all_equal(checkpointer.restore(tmp_path / "state", like), state)
    assert float(optax.tree.get(state, "lam")) == 1


def test_tree_map_params_and_stable_structure():
    optimizer = brx.binary_relax(optax.adam(0.1), RULES, lambda count: 1 + count, hard_from=3)
    params = make_params()
    state = optimizer.init(params)
    doubled = optax.tree_utils.tree_map_params(optimizer, lambda x: 2 * x, state)
    np.testing.assert_array_equal(
        doubled.float_params["binary"]["kernel"], 2 * params["binary"]["kernel"]
    )
    after = jax.eval_shape(lambda: optimizer.update(params, state, params)[1])
    chex.assert_trees_all_equal_shapes_and_dtypes(state, after)
    weak = [leaf.weak_type for leaf in jax.tree.leaves(after)]
    assert weak == [leaf.weak_type for leaf in jax.tree.leaves(state)]


def test_vmap_over_seeds():
    optimizer = brx.binary_connect(optax.sgd(0.1), RULES)

    @jax.jit
    def train(key):
        params = jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), make_params())
        state = optimizer.init(params)
        for _ in range(3):
            updates, state = optimizer.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return params

    keys = jax.random.split(jax.random.key(5), 3)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[1], jax.vmap(train)(keys)), train(keys[1]), rtol=1e-5, atol=1e-6
    )


SGD = optax.sgd(0.1)
KERNEL = {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
REFUSED = {
    "negative λ": (lambda: brx.binary_relax(SGD, brx.Binary(), -1.0), r"lam .*-1\.0"),
    "λ not a number": (lambda: brx.binary_relax(SGD, brx.Binary(), float("nan")), "lam .*nan"),
    "negative hard_from": (lambda: brx.binary_relax(SGD, brx.Binary(), 1.0, -3), "hard_from .*-3"),
    "broken hard_from": (
        lambda: brx.binary_relax(SGD, brx.Binary(), 1.0, 2.5),
        r"hard_from .*2\.5",
    ),
    "a class for a set": (lambda: brx.binary_connect(SGD, brx.Ternary), "qset .*Ternary"),
    "no optimizer": (lambda: brx.binary_connect(0.1, brx.Binary()), r"base .*0\.1"),
    "no match": (
        lambda: brx.binary_connect(SGD, brx.select(("dense", brx.Binary()))).init(KERNEL),
        r"'dense' matches no leaf.*layer/kernel",
    ),
    "an integer leaf": (
        lambda: brx.binary_connect(SGD, brx.select(("n", brx.Binary()))).init({"n": jnp.arange(3)}),
        "'n' is of dtype int32.*None",
    ),
    "an axis out of range": (
        lambda: brx.binary_connect(SGD, brx.Binary(granularity=brx.PerChannel(2))).init(KERNEL),
        r"'layer/kernel'.*axis 2 is out of range for shape \(4, 3\)",
    ),
    "a block that does not divide": (
        lambda: brx.binary_connect(SGD, brx.Binary(granularity=brx.PerBlock(2))).init(KERNEL),
        r"'layer/kernel'.*does not divide axis 1 of shape \(4, 3\)",
    ),
    "no params": (
        lambda: brx.relax_params(brx.Binary(), 1.0).update(
            KERNEL, brx.relax_params(brx.Binary(), 1.0).init(KERNEL)
        ),
        "params is None.*update",
    ),
    "a state of other shapes": (
        lambda: brx.relax_params(brx.Binary(), 1.0).update(
            KERNEL,
            brx.relax_params(brx.Binary(), 1.0).init({"layer": {"kernel": jnp.ones((2, 3))}}),
            KERNEL,
        ),
        r"'layer/kernel' has shape \(4, 3\) in params, but \(2, 3\)",
    ),
    "a state of other names": (
        lambda: brx.relax_params(brx.Binary(), 1.0).update(
            KERNEL, brx.relax_params(brx.Binary(), 1.0).init({"kernel": jnp.ones((4, 3))}), KERNEL
        ),
        "'kernel', which params lack",
    ),
    "a foreign state": (lambda: brx.float_params(SGD.init(KERNEL), KERNEL), "holds no state"),
    "a rule that is no pair": (lambda: brx.select("kernel"), "pair.*'kernel'"),
    "a broken pattern": (lambda: brx.select(("(", None)), "not a regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_reason(case):
    act, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        act()


def test_empty_trees_and_leaves_pass():
    optimizer = brx.binary_relax(SGD, brx.select(("kernel", brx.Binary())), 1.0)
    for params in ({}, {"kernel": jnp.zeros((0, 3))}):
        updates, state = optimizer.update(params, optimizer.init(params), params)
        chex.assert_trees_all_equal(updates, params)
        chex.assert_trees_all_equal(brx.quantized_params(state, params), params)


def test_rules_by_first_match_and_the_default_for_kernels():
    params = {"stem": {"kernel": jnp.ones((2, 2))}, "mid": [{"kernel": jnp.ones((2, 2))}] * 2}
    params |= {"head": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones((2, 2))}}
    rules = brx.select(("^stem/", None), ("head/kernel", brx.Uniform(8)), default=brx.Ternary())
    state = brx.binary_relax(SGD, rules, 1.0).init(params)
    paths = {"head/kernel", "mid/0/kernel", "mid/1/kernel"}
    leaves = jax.tree_util.tree_leaves_with_path(state.float_params)
    assert {jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in leaves} == paths
    assert rules.set_of("head/kernel", params["head"]["kernel"]) == brx.Uniform(8)
