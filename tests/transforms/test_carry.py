"""A run goes on under another optimizer's rules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers.training import array, trace_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BASE = optax.sgd(0.1, momentum=0.9)
NAMES = ("low", "high")


def weights(seed=0, **shapes):
    rng = np.random.default_rng(seed)
    shapes = dict.fromkeys((*NAMES, "bias"), (8, 4)) | shapes
    floats = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return jax.tree.map(array, floats)


@functools.cache
def relaxing(rules, lam=1.0, base=BASE):
    return brx.binary_relax(base, rules, lam, 10, track_flips=True)


def trained(optimizer, state, params, steps=3):
    shapes = {name: p.shape for name, p in params.items()}
    grads = [weights(step, **shapes) for step in range(steps)]
    return trace_of(optimizer, params, grads, state)[-1]


ONLY_LOW = brx.select(("^low$", brx.Binary()))
CHANGES = {
    "wider rules": (ONLY_LOW, brx.Binary()),
    "narrower rules": (brx.Binary(), ONLY_LOW),
    "fewer bits": (brx.Uniform(8), brx.Uniform(3)),
    "another kind": (brx.Binary(), brx.TernaryThreshold()),
    "and back": (brx.TernaryThreshold(), brx.Binary()),
    "another granularity": (brx.Binary(), brx.Binary(granularity=brx.PerChannel())),
}
every_change = pytest.mark.parametrize("change", CHANGES)


@every_change
def test_without_it_an_update_is_refused(change):
    old, new = map(relaxing, CHANGES[change])
    params, state = weights(), old.init(weights())
    with pytest.raises(ValueError, match=r"'(low|high)'.*brelax_jax\.with_rules"):
        new.update(params, state, params)


@every_change
def test_float_weights_base_state_and_count_are_carried_over(change):
    old, new = map(relaxing, CHANGES[change])
    params, state = trained(old, old.init(weights()), weights())
    after = brx.with_rules(state, params, new)
    assert jax.tree.structure(after) == jax.tree.structure(new.init(params))
    assert after.count == state.count == 3
    assert brx.strength(after) == brx.strength(state)
    floats, kept = (dict(brx.float_params(s, params)) for s in (state, after))
    quantized_now = {path for path, _ in after.sets.pairs}
    for name in NAMES:
        wanted = floats[name] if name in quantized_now else params[name]
        np.testing.assert_array_equal(kept[name], wanted)
    for before, now in zip(*(jax.tree.leaves(s.base_state) for s in (state, after)), strict=True):
        np.testing.assert_array_equal(now, before)
    params, after = trained(new, after, params, 12)
    quantized = brx.quantized_params(after, params)
    for path, qset in after.sets.pairs:
        w = np.asarray(params[path])
        np.testing.assert_array_equal(w, quantized[path])
        groups = w.T if qset.granularity == brx.PerChannel() else [w]
        assert max(len(np.unique(group)) for group in groups) <= len(qset.levels)


def test_a_new_head_starts_anew():
    old, new = map(relaxing, CHANGES["another kind"])
    params, state = trained(old, old.init(weights()), weights())
    head = weights(5, high=(8, 2))["high"]
    params = {**params, "high": head, "head": head}
    after = brx.with_rules(state, params, new)
    np.testing.assert_array_equal(after.float_params["high"], head)
    np.testing.assert_array_equal(after.float_params["head"], head)
    momentum = after.base_state[0].trace
    assert not np.any(momentum["high"])
    assert not np.any(momentum["head"])
    np.testing.assert_array_equal(momentum["low"], state.base_state[0].trace["low"])
    trained(new, after, params, 1)


def test_inside_of_wrappers():
    def wrapped(rules):
        steps = optax.MultiSteps(relaxing(rules), 2).gradient_transformation()
        return optax.chain(optax.clip(1.0), steps)

    old, new = map(wrapped, CHANGES["another kind"])
    params, state = trained(old, old.init(weights()), weights())
    after = brx.with_rules(state, params, new)
    np.testing.assert_array_equal(after[1].acc_grads["low"], state[1].acc_grads["low"])
    assert after[1].mini_step == state[1].mini_step == 1
    assert optax.tree.get(after, "updates_on_grid") == 0
    trained(new, after, params, 1)


def test_bfloat16_params_that_are_quantized_only_now():
    """Their momentum was bfloat16, and is float32 as the float weights are."""
    params = {name: array(w, "bfloat16") for name, w in weights().items()}
    old, new = map(relaxing, CHANGES["wider rules"])
    [(_, state)] = trace_of(old, params, [params])
    after = brx.with_rules(state, params, new)
    assert after.base_state[0].trace["high"].dtype == jnp.float32
    assert after.base_state[0].trace["bias"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(after.base_state[0].trace["high"], params["high"])


REFUSED = {
    "another base": (relaxing(brx.Binary(), base=optax.adam(0.1)), "0/trace/low, of.* same base"),
    "no state of this library": (optax.sgd(0.1), r"optimizer must have a transformation"),
    "other wrappers": (
        optax.partition(
            {"a": relaxing(brx.Binary()), "b": relaxing(brx.Ternary())},
            {"low": "a", "high": "b", "bias": "b"},
        ),
        r"has a state of this library at '.*where opt_state has none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_over_is_refused(name):
    optimizer, message = REFUSED[name]
    state = relaxing(brx.Binary(), base=optax.sgd(0.1, momentum=0.9)).init(weights())
    with pytest.raises(ValueError, match=message):
        brx.with_rules(state, weights(), optimizer)


def test_restored_scales_of_another_granularity_are_refused():
    """A checkpoint has no rules in it, but shapes."""
    old, new = map(relaxing, CHANGES["another granularity"])
    state, params = old.init(weights()), weights()
    restored = new.init(params)._replace(scales=state.scales)
    for read in (new.update, lambda _, *args: brx.quantized_params(*args)):
        with pytest.raises(ValueError, match=r"scales of 'high' have shape \(1, 1\).*\(1, 4\)"):
            read(params, restored._replace(started=jnp.array(True)), params)
