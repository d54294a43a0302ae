"""Bad input through Optax's wrappers: errors name the argument, the leaf or the rule as without."""

import jax
import jax.numpy as jnp
import optax
import pytest

import brelax_jax as brx

BINARY = brx.Binary()


def everything(params):
    return jax.tree.map(lambda _: True, params)


LAYER = {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
REFUSING = {
    name: lambda qset=BINARY, lam=1.0, wrap=wrap: wrap(brx.binary_relax(optax.sgd(0.1), qset, lam))
    for name, wrap in {
        "chain": lambda tx: optax.chain(optax.clip(1.0), tx),
        "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("relax", tx)),
        "masked": lambda tx: optax.masked(tx, everything),
        "partition": lambda tx: optax.partition({"ours": tx}, "ours"),
        "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
        "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
        "lookahead": lambda tx: optax.lookahead(tx, 3, 0.5),
        "all at once": lambda tx: optax.MultiSteps(
            optax.apply_if_finite(optax.chain(optax.masked(tx, everything)), 2), 2
        ),
    }.items()
}
REFUSING["inject_hyperparams"] = lambda qset=BINARY, lam=1.0: optax.inject_hyperparams(
    brx.binary_relax
)(optax.sgd(0.1), qset, lam=lam)
every_wrapper = pytest.mark.parametrize("wrapper", REFUSING)


def of_wrapper(wrapper, params):
    return optax.LookaheadParams.init_synced(params) if wrapper == "lookahead" else params


MISFITS = {
    "negative lam": ({"lam": -1.0}, LAYER, r"lam must be nonnegative.*-1\.0?"),
    "a rule that matches nothing": (
        {"qset": brx.select(("^head/", BINARY))},
        LAYER,
        r"'\^head/' matches no leaf.*layer/bias, layer/kernel",
    ),
    "a leaf that does not fit": (
        {"qset": brx.Binary(granularity=brx.PerBlock(5, axis=0))},
        LAYER,
        r"'layer/kernel'.*PerBlock.*does not divide axis 0",
    ),
    "an integer leaf": (
        {"qset": brx.select(("kernel", BINARY))},
        {"layer": {"kernel": jnp.ones((4, 3), int), "bias": jnp.ones(3)}},
        r"'layer/kernel' is of dtype int32",
    ),
}


@every_wrapper
@pytest.mark.parametrize(("arguments", "params", "message"), MISFITS.values(), ids=MISFITS)
def test_what_does_not_fit_is_named_at_init(wrapper, arguments, params, message):
    with pytest.raises(ValueError, match=message):
        REFUSING[wrapper](**arguments).init(of_wrapper(wrapper, params))


@every_wrapper
def test_missing_params_are_named(wrapper):
    optimizer = REFUSING[wrapper]()
    state = jax.eval_shape(optimizer.init, of_wrapper(wrapper, LAYER))
    error, message = ValueError, r"params is None.*update\(grads, state, params\)"
    if wrapper == "lookahead":  # which needs them itself
        error, message = TypeError, "missing .* 'params'"
    with pytest.raises(error, match=message):
        jax.eval_shape(optimizer.update, LAYER, state)


OTHERS = {
    "another shape": (
        {"layer": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}},
        r"'layer/kernel' has shape \(2, 3\) in params, but \(4, 3\)",
    ),
    "a leaf less": ({"layer": {"bias": jnp.ones(3)}}, "'layer/kernel', which params lack"),
    "a leaf more": (LAYER | {"head": jnp.ones((2, 2))}, "'head' is to be quantized"),
}


@every_wrapper
@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_a_state_of_other_params_is_named(wrapper, other, message):
    optimizer = REFUSING[wrapper]()
    state = jax.eval_shape(optimizer.init, of_wrapper(wrapper, LAYER))
    if wrapper in ("MultiSteps", "all at once") and "shape" not in message:
        message = "structure error"  # its sum of gradients meets the other tree first
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(optimizer.update, other, state, of_wrapper(wrapper, other))


def test_a_rule_for_a_leaf_that_is_masked_away_matches_nothing():
    """Inside `partition` and `masked` a transformation sees its own leaves only, by whole path."""
    tx = brx.binary_connect(optax.sgd(0.1), brx.select(("kernel", BINARY), ("^layer/bias$", None)))
    mine = {"layer": {"kernel": True, "bias": False}}
    label = jax.tree.map({True: "ours", False: "theirs"}.get, mine)
    for optimizer in (
        optax.masked(tx, mine),
        optax.partition({"ours": tx, "theirs": optax.sgd(0.1)}, label),
    ):
        with pytest.raises(ValueError, match=r"'\^layer/bias\$' matches no leaf.*: layer/kernel\."):
            optimizer.init(LAYER)


def test_a_negative_lam_set_at_run_time_is_refused_where_it_is_known():
    """Documented: under jit it is not."""
    optimizer = REFUSING["inject_hyperparams"]()
    state = optimizer.init(LAYER)
    state.hyperparams["lam"] = jnp.float32(-3.0)
    with pytest.raises(ValueError, match=r"lam must be nonnegative.*-3\."):
        optimizer.update(LAYER, state, LAYER)
