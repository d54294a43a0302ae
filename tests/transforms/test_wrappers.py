"""Optax's wrappers around the transformations, as docs/wrappers.md says, row by row."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers import covering
from tests.helpers.training import (
    QUANTIZED,
    RULES,
    array,
    make_params,
    normal,
    relaxing,
    spoilt,
    steps,
    trace_of,
    traces_of,
)

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BINARY = brx.Binary()


def labels(kernel, bias):
    return lambda params: {name: {"kernel": kernel, "bias": bias} for name in params}


def everything(params):
    return jax.tree.map(lambda _: True, params)


LINK = brx.relax_params(RULES, 1.0, hard_from=8)
WRAPPERS = {
    "last of a chain": lambda tx: optax.chain(optax.trace(0.5), optax.scale(-0.05), LINK),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("relax", tx)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2),
    "masked, biases": lambda tx: optax.masked(tx, labels(True, False)),
    "partition": lambda tx: optax.partition(
        {"ours": tx, "theirs": optax.adam(0.1)}, labels("ours", "theirs")
    ),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(brx.binary_relax)(
        optax.sgd(0.05), RULES, lam=1.0, hard_from=8
    ),
    "all at once": lambda tx: optax.MultiSteps(
        optax.apply_if_finite(optax.chain(optax.masked(tx, everything), optax.identity()), 2), 2
    ),
}


GUARDS = {
    "apply_if_finite": WRAPPERS["apply_if_finite"],
    "MultiSteps that skips": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ),
}
WRAPPED = {name: wrap(relaxing()) for name, wrap in (WRAPPERS | GUARDS).items()}
# These have tests of their own below, and are in "all at once" or in `NEUTRAL`.
IN_SOAK = ("MultiSteps", "inject_hyperparams")
START = make_params()
GOOD = [
    jax.tree.map(lambda p, t=t: np.cos(np.asarray(p) + p.dtype.type(t)), START) for t in range(20)
]
BAD = jax.tree.map(lambda g: spoilt(g, 0) if g.dtype == jnp.bfloat16 else g, GOOD[0])


@functools.cache
def wrapped(bad_step=None, in_soak=False):
    """The traces of the wrappers of the suite, with a NaN batch at one step or none; or those of
    the others.
    """
    grads = GOOD if bad_step is None else [*GOOD[:bad_step], BAD, *GOOD[bad_step:]]
    wrappers = {name: tx for name, tx in WRAPPED.items() if (name in IN_SOAK) == in_soak}
    return traces_of(wrappers, START, grads)


def kernels(params):
    return {name: layer["kernel"] for name, layer in params.items()}


@pytest.mark.parametrize("wrapper", covering.some(WRAPPERS, WRAPPERS.keys() - {*IN_SOAK}))
def test_accessors_find_the_state_inside(wrapper):
    state = WRAPPED[wrapper].init(START)
    assert float(brx.strength(state)) == 0
    chex.assert_trees_all_equal(
        kernels(brx.float_params(state, START)),
        jax.tree.map(lambda p: p.astype("float32") if p.dtype == "bfloat16" else p, kernels(START)),
    )
    params, state = wrapped(in_soak=wrapper in IN_SOAK)[wrapper][-1]
    assert float(brx.strength(state)) == 1
    quantized, floats = brx.quantized_params(state, params), brx.float_params(state, params)
    chex.assert_trees_all_equal(quantized, params)
    chex.assert_trees_all_equal(floats["plain"], params["plain"])
    assert [len(np.unique(column)) for column in params["binary"]["kernel"].T] == [2, 2, 2]
    assert len(np.unique(params["threshold"]["kernel"])) <= 3
    assert params["half"]["kernel"].dtype == jnp.bfloat16
    assert floats["half"]["kernel"].dtype == jnp.float32
    for name in QUANTIZED:
        assert len(np.unique(floats[name]["kernel"])) > 6
    # New float weights go in where the old ones came out.
    other = make_params(1)
    replaced = brx.with_float_params(state, other)
    chex.assert_trees_all_equal_structs(replaced, state)
    for name in QUANTIZED:
        y = brx.float_params(replaced, other)[name]["kernel"]
        np.testing.assert_array_equal(y, other[name]["kernel"].astype("float32"))
    assert float(brx.strength(replaced)) == 0


HARD = {
    "kernel": normal(0, 4, 3),
    "half": normal(1, 4, 3, dtype="bfloat16"),
    "zeros": array(np.zeros((4, 3))),
    "spoilt": array(spoilt(normal(2, 4, 3), (1, 1))),
    "empty": array(np.zeros((0, 3))),
    "bias": normal(3, 3),
}
CHANNELS = brx.select(("^(?!bias)", brx.Binary(granularity=brx.PerChannel())))
POLYAK = optax.polyak_sgd(max_learning_rate=1.0)  # needs the argument `value`


def hard_gradients(seed):
    grads = {
        name: normal(seed + i, *p.shape, dtype=p.dtype) for i, (name, p) in enumerate(HARD.items())
    }
    return grads | {"zeros": HARD["zeros"]}


GRADIENTS = [hard_gradients(10 * t) for t in range(11)]
NEUTRAL = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("relax", tx)),
    "masked": lambda tx: optax.masked(tx, everything),
    "partition": lambda tx: optax.partition({"ours": tx, "none": optax.sgd(1.0)}, "ours"),
    "multi_transform": lambda tx: optax.multi_transform({0: tx}, dict.fromkeys(HARD, 0)),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1),
    **GUARDS,
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(brx.binary_relax)(
        POLYAK, CHANNELS, lam=1.0, hard_from=8
    ),
}
IN_SUITE = ("chain", "masked", "multi_transform", *GUARDS, "inject_hyperparams")


@functools.cache
def neutral(in_suite=True):
    """The traces of these wrappers or of the others, and of none."""
    ours = brx.binary_relax(POLYAK, CHANNELS, 1.0, 8)
    names = [name for name in NEUTRAL if (name in IN_SUITE) == in_suite]
    optimizers = {name: NEUTRAL[name](ours) for name in names}
    return traces_of({"none": ours, **optimizers}, HARD, GRADIENTS, value=2.0)


def test_zeros_nan_and_no_weights_unwrapped():
    """What the next test compares with: NaN stays in its channel, zeros stay, no weight is none."""
    params, state = neutral()["none"][-1]
    chex.assert_trees_all_equal(params, brx.quantized_params(state, params))
    for name in ("kernel", "half"):
        assert [len(np.unique(column)) for column in np.abs(params[name]).T] == [1, 1, 1]
    assert not np.any(params["zeros"])
    assert np.isnan(params["spoilt"][:, 1]).all()
    assert [len(np.unique(column)) for column in np.abs(params["spoilt"][:, ::2]).T] == [1, 1]
    assert params["empty"].shape == (0, 3)


@pytest.mark.parametrize("wrapper", covering.some(NEUTRAL, IN_SUITE))
def test_a_wrapper_that_does_nothing_changes_nothing(wrapper):
    """And it hands the extra argument on, without which there is no step."""
    traces = neutral(wrapper in IN_SUITE)
    for (params, state), (wanted, reference) in zip(traces[wrapper], traces["none"], strict=True):
        assert_close(params, wanted)
        assert float(brx.strength(state)) == float(brx.strength(reference))
    assert_close(brx.float_params(state, params), brx.float_params(reference, wanted))
    chex.assert_trees_all_equal(brx.quantized_params(state, params), params)


def assert_close(tree, other):
    """But for rounding: programs differ in which sums and products XLA fuses."""
    chex.assert_trees_all_close(tree, other, rtol=1e-5, atol=1e-6)


def test_partition_gives_each_leaf_its_own_optimizer():
    """As on their own; the paths in rules are those of the whole tree."""
    ours = brx.binary_relax(optax.sgd(0.1, 0.9), brx.select(("^body/kernel$", BINARY)), 1.0, 8)
    label = {"body": {"kernel": "ours", "bias": "theirs"}, "head": "theirs"}
    optimizer = optax.partition({"ours": ours, "theirs": optax.adam(0.1)}, label)

    def tree(seed):
        return {
            "body": {"kernel": normal(seed, 4, 3), "bias": normal(seed + 1, 3)},
            "head": normal(seed + 2, 3, 2),
        }

    def split(tree):
        body, head = tree["body"], tree["head"]
        return {"body": {"kernel": body["kernel"]}}, {"body": {"bias": body["bias"]}, "head": head}

    grads = [tree(10 * t) for t in range(1, 11)]
    params, state = trace_of(optimizer, tree(0), grads)[-1]
    for i, tx in enumerate((ours, optax.adam(0.1))):
        alone = trace_of(tx, split(tree(0))[i], [split(grad)[i] for grad in grads])[-1][0]
        assert_close(split(params)[i], alone)
    assert len(np.unique(params["body"]["kernel"])) == 2
    chex.assert_trees_all_equal(brx.quantized_params(state, params), params)


def test_multi_steps_relaxes_once_a_full_step():
    """By the mean gradient; λ, the count and `hard_from` are of full steps."""
    start = {"kernel": normal(0, 4, 4), "bias": normal(1, 4)}
    tx = brx.binary_relax(optax.sgd(0.1, 0.9), BINARY, lambda count: count, 8)
    grads = [jax.tree.map(lambda p, t=t: np.sin(np.asarray(p) + t), start) for t in range(30)]
    trace = trace_of(optax.MultiSteps(tx, 3), start, grads)
    means = [
        jax.tree.map(lambda *g: sum(g) / 3, *grads[t : t + 3]) for t in range(0, len(grads), 3)
    ]
    before = start
    for t, (wanted, reference) in enumerate(trace_of(tx, start, means)):
        for params, _ in trace[3 * t : 3 * t + 2]:
            chex.assert_trees_all_equal(params, before)
        before, state = trace[3 * t + 2]
        chex.assert_trees_all_close(before, wanted, rtol=1e-4, atol=1e-5)
        assert float(brx.strength(state)) == float(brx.strength(reference))
    chex.assert_trees_all_equal(before, brx.quantized_params(state, before))
    assert len(np.unique(before["kernel"])) == 2


@pytest.mark.parametrize("bad_step", [3, 10], ids="step {}".format)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_nan_batch_leaves_everything_as_it_was(guard, bad_step):
    """Params, float weights, scales, the base's momentum and the count, in both phases."""
    trace = wrapped(bad_step)[guard]
    (before, state), (params, after) = trace[bad_step - 1 : bad_step + 1]
    chex.assert_trees_all_equal(params, before)
    chex.assert_trees_all_equal(inner(after), inner(state))
    assert int(inner(after).count) == bad_step
    # And so training goes on as if it had not been.
    wanted, reference = wrapped()[guard][-1]
    chex.assert_trees_all_equal(trace[-1][0], wanted)
    chex.assert_trees_all_equal(inner(trace[-1][1]), inner(reference))


def inner(state):
    """The state of ours inside one wrapper."""
    return getattr(state, "inner_state", None) or state.inner_opt_state


def test_injected_hyperparameters_are_set_at_run_time():
    make = optax.inject_hyperparams(brx.binary_relax)
    optimizer = optax.chain(make(optax.sgd(0.05), RULES, lam=1.0, hard_from=1000))
    params, state = steps(optimizer, make_params(), 1)
    hyperparams = state[0].hyperparams
    assert float(brx.strength(state)) == 0.5
    for lam, strength in ((3.0, 0.75), (0.0, 0.0), (jnp.inf, 1.0)):
        hyperparams["lam"] = jnp.asarray(lam, hyperparams["lam"].dtype)
        params, state = steps(optimizer, params, 1, state)
        hyperparams = state[0].hyperparams
        assert float(brx.strength(state)) == strength
    hyperparams["lam"] = jnp.float32(1.0)
    hyperparams["hard_from"] = jnp.zeros_like(hyperparams["hard_from"])
    params, state = steps(optimizer, params, 3, state)
    assert float(brx.strength(state)) == 1
    chex.assert_trees_all_equal(brx.quantized_params(state, params), params)


def test_injected_schedules():
    make = optax.inject_hyperparams(brx.binary_relax, static_args="hard_from")
    optimizer = make(optax.sgd(0.05), RULES, lam=brx.linear_continuation(4), hard_from=None)
    params, state = steps(optimizer, make_params(), 0)
    strengths = []
    for _ in range(6):
        params, state = steps(optimizer, params, 1, state)
        strengths.append(float(brx.strength(state)))
    np.testing.assert_allclose(strengths, [0, 0.25, 0.5, 0.75, 1, 1], rtol=1e-6)


def test_a_schedule_of_hard_from():
    """Evaluated at each step, as every hyperparameter: here phase II is called for at step 3."""
    make = optax.inject_hyperparams(brx.binary_relax)
    start = {"kernel": normal(0, 4, 4)}
    optimizer = make(
        optax.sgd(0.05), BINARY, lam=1.0, hard_from=lambda count: jnp.where(count < 3, 100, 0)
    )
    strengths = [float(brx.strength(s)) for _, s in trace_of(optimizer, start, [start] * 5)]
    assert strengths == [0.5, 0.5, 0.5, 1.0, 1.0]


def test_injected_numbers_have_the_dtype_of_the_params_unless_told():
    """Documented: float16 params make λ = 1e5 infinite, which is phase II."""
    start = {"kernel": normal(0, 4, 4, dtype="float16")}
    strengths = {}
    for dtype in (None, jnp.float32):
        make = optax.inject_hyperparams(brx.binary_relax, hyperparam_dtype=dtype)
        optimizer = make(optax.sgd(0.05), BINARY, lam=lambda count: 1e5 + count)
        with np.errstate(over="ignore"):
            [(_, state)] = trace_of(optimizer, start, [start])
        strengths[dtype] = float(brx.strength(state))
    assert strengths[None] == 1
    assert strengths[jnp.float32] == pytest.approx(1 - 1e-5, rel=1e-6)


ASCENT = optax.chain(optax.contrib.normalize(), optax.sgd(0.3))
TARGET = normal(9, 4, 4)


def pull(params, _=0):
    """The gradient of a bowl around `TARGET`."""
    return jax.tree.map(lambda w: jnp.tanh(w - TARGET), params)


@functools.cache
def sharp(opaque):
    """SAM around ours, with gradients by `pull`, which its steps take themselves."""
    sam = optax.contrib.sam(relaxing(rules=BINARY), ASCENT, opaque_mode=opaque)

    def update(_, state, params):
        return sam.update(pull(params), state, params, **({"grad_fn": pull} if opaque else {}))

    return optax.GradientTransformation(sam.init, update)


def test_sam_around_takes_gradients_beside_the_quantized_weights():
    """ρ away from the params that the network has; the params end exact in opaque mode."""
    start = {"kernel": normal(0, 4, 4)}
    trace = trace_of(sharp(opaque=True), start, [None] * 12)
    velocity, y, w = 0.0, start["kernel"], start["kernel"]
    for params, state in trace:
        grad = jnp.tanh(w - TARGET)
        beside = w + 0.3 * grad / np.linalg.norm(grad)
        velocity = 0.5 * velocity + jnp.tanh(beside - TARGET)
        y, w = y - 0.05 * velocity, params["kernel"]
        np.testing.assert_allclose(brx.float_params(state, params)["kernel"], y, atol=1e-5)
    assert len(np.unique(w)) == 2
    np.testing.assert_array_equal(w, brx.quantized_params(state, params)["kernel"])


def test_transparent_sam_around_trains_alike_but_its_params_are_inexact():
    """Documented: every other step they are ρ away, and then a rounding from the set."""
    start = {"kernel": normal(0, 4, 4)}
    opaque = trace_of(sharp(opaque=True), start, [None] * 12)
    transparent = trace_of(sharp(opaque=False), start, [None] * 24)
    for (wanted, reference), (params, state) in zip(opaque, transparent[1::2], strict=True):
        assert_close(params, wanted)
        assert_close(brx.float_params(state, params), brx.float_params(reference, wanted))
    params, state = transparent[-2]
    away = params["kernel"] - brx.quantized_params(state, params)["kernel"]
    assert np.linalg.norm(away) == pytest.approx(0.3, rel=1e-3)
    params, state = transparent[-1]
    assert len(np.unique(params["kernel"])) > 2
    assert len(np.unique(brx.quantized_params(state, params)["kernel"])) == 2
    assert brx.strength(state) == 1


def test_lookahead_around_leaves_the_float_weights_where_they_are():
    """Documented: its averages are overwritten by the next update, and are on no set."""
    start = {"kernel": normal(0, 4, 4)}
    grads = [{"kernel": normal(t, 4, 4)} for t in range(12)]
    ours = relaxing(rules=BINARY)
    synced = optax.LookaheadParams.init_synced(start)
    around = {reset: optax.lookahead(ours, 3, 0.5, reset_state=reset) for reset in (False, True)}
    traces, alone = traces_of(around, synced, grads), trace_of(ours, start, grads)
    for (params, state), (_, reference) in zip(traces[False], alone, strict=True):
        floats = brx.float_params(state, params.fast)
        assert_close(floats, brx.float_params(reference, start))
    assert len(np.unique(params.fast["kernel"])) > 2
    assert len(np.unique(params.slow["kernel"])) > 2
    # Where it resets the state, phase II never comes.
    counts = [int(state.fast_state.count) for _, state in traces[True][:7]]
    assert counts == [1, 2, 0, 1, 2, 0, 1]


OUTSIDE = {
    "schedule_free": lambda tx: optax.contrib.schedule_free(tx, 0.1, b1=0.9),
    "ema": lambda tx: optax.chain(tx, optax.ema(0.9)),
    "a link after ours": lambda tx: optax.chain(tx, optax.scale(0.5)),
}


@functools.cache
def outside():
    """Params and state of each after some updates."""
    optimizers = {name: wrap(relaxing(rules=BINARY)) for name, wrap in OUTSIDE.items()}
    grads = [{"kernel": normal(t, 4, 4)} for t in range(12)]
    traces = traces_of(optimizers, {"kernel": normal(0, 4, 4)}, grads)
    return {name: trace[-1] for name, trace in traces.items()}


@pytest.mark.parametrize("wrapper", OUTSIDE)
def test_what_changes_our_updates_takes_the_params_off_the_set(wrapper):
    """Documented: none of these belongs outside; `quantized_params` is exact all the same."""
    params, state = outside()[wrapper]
    assert len(np.unique(params["kernel"])) > 8
    assert len(np.unique(brx.quantized_params(state, params)["kernel"])) == 2


def test_flatten_around_leaves_no_kernel():
    """Documented: one vector is no kernel; a rule can select it."""
    params = {"kernel": normal(0, 4, 4)}
    with pytest.raises(ValueError, match="no leaf is selected"):
        optax.flatten(brx.binary_connect(optax.sgd(0.1), BINARY)).init(params)
    rules = brx.select(("", BINARY))
    state = optax.flatten(brx.binary_connect(optax.sgd(0.1), rules)).init(params)
    assert [y.shape for y in jax.tree.leaves(state.float_params)] == [(16,)]


def test_edits_in_phase_two_are_exact_again_once_the_state_knows_of_them():
    """Documented: weights that change sign in every step would miss the set by a rounding for long;
    `with_float_params` makes the next two updates land them."""
    optimizer = brx.binary_connect(optax.sgd(1.0), BINARY)
    start = {"kernel": normal(0, 32, 32)}
    flips = [jax.tree.map(lambda y, t=t: 2 * (-1) ** t * y, start) for t in range(8)]
    params, state = trace_of(optimizer, start, flips[:4])[-1]
    edited = {"kernel": normal(1, 32, 32)}
    told = brx.with_float_params(state, brx.float_params(state, params))
    untold, after = (trace_of(optimizer, edited, flips[4:], s)[-1] for s in (state, told))
    for reached, last in (untold, after):
        assert_close(reached, params)
        chex.assert_trees_all_equal(brx.quantized_params(last, reached), params)
    assert len(np.unique(untold[0]["kernel"])) > 2
    chex.assert_trees_all_equal(after[0], params)
