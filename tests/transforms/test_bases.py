"""Base optimizers inside `binary_relax`: they act on the float weights, and the params end exact.

One compiled program runs a base alone, in the wrapper and in the chain.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from brelax_jax.transforms._state import find_states
from tests.helpers import covering
from tests.helpers.training import normal, trace_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BINARY = brx.Binary()
SETS = {
    "kernel": brx.Binary(granularity=brx.PerChannel()),
    "kept": brx.TernaryThreshold(),  # of rank 3, and without weight decay
}
RULES = brx.select(*((f"^{name}$", qset) for name, qset in SETS.items()))
DECAYED = {"kernel": True, "kept": False, "bias": False}
LAM, HARD_FROM, STEPS = 3.0, 8, 12

BASES = {
    "sgd": optax.sgd(0.1, momentum=0.9),
    "add_decayed_weights": optax.chain(optax.add_decayed_weights(0.1, DECAYED), optax.sgd(0.1)),
    "adam": optax.adam(0.05),
    "adamw": optax.adamw(0.05, weight_decay=0.2, mask=DECAYED),
    "lamb": optax.lamb(0.05, weight_decay=0.2, mask=DECAYED),
    "lion": optax.lion(0.05, weight_decay=0.2, mask=DECAYED),
    "adafactor": optax.adafactor(
        0.05, min_dim_size_to_factor=2, weight_decay_rate=0.02, weight_decay_mask=DECAYED
    ),
    "muon": optax.contrib.muon(0.05, weight_decay=0.2),
    "ema": optax.chain(optax.ema(0.9), optax.sgd(0.3)),
    "schedule_free": optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9),
    "lbfgs without a line search": optax.lbfgs(0.05, linesearch=None),
    "a set frozen": optax.partition(
        {"moves": optax.sgd(0.1), "rests": optax.set_to_zero()},
        {"kernel": "moves", "kept": "rests", "bias": "moves"},
    ),
    "flatten": optax.flatten(optax.adam(0.05)),
}
# What one step without a gradient multiplies a decayed weight by. LAMB's is free of the decay's
# strength: its step is as long as the weights times the learning rate.
DECAYS = {
    "add_decayed_weights": 1 - 0.1 * 0.1,
    "adamw": 1 - 0.05 * 0.2,
    "lamb": 1 - 0.05,
    "lion": 1 - 0.05 * 0.2,
    "adafactor": 1 - 0.02,
    "muon": 1 - 0.05 * 0.2,
}
# Those that read or move their params in a way of their own; others are compiled in `make soak`.
IN_SUITE = (
    *("add_decayed_weights", "adamw", "adafactor", "muon", "schedule_free"),
    *("lbfgs without a line search", "a set frozen", "flatten"),
)
every_base = pytest.mark.parametrize("base", covering.some(BASES, IN_SUITE))


def weights(seed, *steps):
    return {
        "kernel": normal(seed, *steps, 6, 4),
        "kept": normal(seed + 1, *steps, 2, 3, 4),
        "bias": normal(seed + 2, *steps, 4),
    }


OPTIMIZERS = {
    name: {
        "alone": base,
        "wrapper": brx.binary_relax(base, RULES, LAM, HARD_FROM),
        "chain": optax.chain(base, brx.relax_params(RULES, LAM, HARD_FROM)),
    }
    for name, base in BASES.items()
}


@functools.partial(jax.jit, static_argnums=0)
def trained(base, carry, grads):
    """Params and the relaxation's state after each step, in every form."""

    def step(carry, grads):
        after, trace = {}, {}
        for form, optimizer in OPTIMIZERS[base].items():
            params, state = carry[form]
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            after[form] = params, state
            states = find_states(state) if form != "alone" else []
            trace[form] = params, [state._replace(base_state=()) for state in states]
        return after, trace

    return jax.lax.scan(step, carry, grads)[1]


@jax.jit
@jax.vmap
def read(params, state):
    return {
        "params": params,
        "floats": brx.float_params(state, params),
        "quantized": brx.quantized_params(state, params),
    }


@functools.cache
def run(base, with_gradients=True):
    """The trace of a base in every form, at the same random gradients or at none."""
    params, grads = weights(0), weights(10, STEPS)
    if not with_gradients:
        grads = jax.tree.map(np.zeros_like, grads)
    carry = {form: (params, optimizer.init(params)) for form, optimizer in OPTIMIZERS[base].items()}
    trace = trained(base, carry, grads)
    found = {form: read(params, *state) for form, (params, state) in trace.items() if state}
    return jax.tree.map(np.asarray, {"alone": {"params": trace["alone"][0]}} | found)


@every_base
def test_float_weights_move_as_the_base_alone_moves_them(base):
    """Whatever the base reads of its params, it reads of the float weights."""
    trace = run(base)
    for name, wanted in trace["alone"]["params"].items():
        floats = trace["wrapper"]["floats"][name]
        np.testing.assert_allclose(floats, wanted, rtol=2e-5, atol=2e-6)
        if name in SETS:
            assert np.abs(trace["wrapper"]["params"][name] - wanted).max() > 0.1


@every_base
@pytest.mark.parametrize("form", ["wrapper", "chain"])
def test_params_are_quantized_bit_for_bit_in_phase_two(base, form):
    trace = run(base)[form]
    for name, qset in SETS.items():
        hard, quantized = (trace[part][name][HARD_FROM:] for part in ("params", "quantized"))
        np.testing.assert_array_equal(hard, quantized)
        groups = hard.swapaxes(1, 2).reshape(-1, 6) if name == "kernel" else hard
        assert max(len(np.unique(group)) for group in groups) <= len(qset.levels)
        soft = trace["params"][name][: HARD_FROM - 1]
        assert min(len(np.unique(w)) for w in soft) > 2 * len(qset.levels)


@pytest.mark.parametrize("base", covering.some(DECAYS, IN_SUITE))
def test_weight_decay_acts_on_the_float_weights(base):
    """Without gradients, decay alone moves: in the wrapper the float weights, whatever λ; in the
    chain they move by the decay of the params."""
    start, trace = weights(0), run(base, with_gradients=False)
    factor, count = DECAYS[base], np.arange(1, STEPS + 1)
    y = np.asarray(start["kernel"])
    wanted = y * factor ** count[:, None, None]
    np.testing.assert_allclose(trace["wrapper"]["floats"]["kernel"], wanted, rtol=1e-5)
    for name in ("kept", "bias"):
        for form in ("wrapper", "chain"):
            floats = trace[form]["floats"][name]
            np.testing.assert_array_equal(floats, np.broadcast_to(start[name], floats.shape))
    floats, params = (
        np.concatenate([y[None], trace["chain"][part]["kernel"]]) for part in ("floats", "params")
    )
    np.testing.assert_allclose(np.diff(floats, axis=0), (factor - 1) * params[:-1], atol=1e-6)
    assert np.abs(floats[-1] - wanted[-1]).max() > 0.01


MATRIX = optax.contrib.MuonDimensionNumbers
MUON_LEAVES = {
    "by rank": (None, ["kernel"]),
    "as told": ({"kernel": None, "kept": MATRIX((0, 1), 2), "bias": None}, ["kept"]),
}


@pytest.mark.parametrize(("numbers", "wanted"), MUON_LEAVES.values(), ids=MUON_LEAVES)
def test_muon_picks_its_leaves_as_it_does_alone(numbers, wanted):
    """By default all of rank 2, be they quantized or not, and Adam moves the others."""
    base = optax.contrib.muon(0.05, muon_weight_dimension_numbers=numbers)
    state = jax.eval_shape(brx.binary_relax(base, RULES, 1.0).init, weights(0)).base_state
    momentum = optax.tree.get(state.inner_states["muon"], "mu")
    assert [name for name, leaf in momentum.items() if jax.tree.leaves(leaf)] == wanted


def test_muon_steps_of_float_weights_are_orthogonal():
    """In all directions alike, whatever the gradient: what Muon is."""
    floats = run("muon")["wrapper"]["floats"]["kernel"]
    step = floats[0] - np.asarray(weights(0)["kernel"]) * DECAYS["muon"]
    singular = np.linalg.svd(step / 0.05, compute_uv=False)
    assert (singular > 0.5).all()
    assert (singular < 1.5).all()


def test_schedule_free_trains_one_sequence_and_deploys_its_average():
    """Gradients are taken at the relaxed sequence y; x, the average of z, is what to project."""
    start = {"kernel": normal(0, 4, 4)}
    grads = [{"kernel": normal(t, 4, 4)} for t in range(6)]
    optimizer = brx.binary_relax(BASES["schedule_free"], BINARY, LAM)
    params, state = trace_of(optimizer, start, grads)[-1]
    y = brx.float_params(state, params)
    average = optax.contrib.schedule_free_eval_params(state.base_state, y)
    deployed = brx.quantized_params(brx.with_float_params(state, average), average)
    moves = np.cumsum([grad["kernel"] for grad in grads], axis=0)
    z = np.asarray(start["kernel"]) - 0.1 * moves
    x = np.mean(z, axis=0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)
    close(average["kernel"], x)
    close(y["kernel"], 0.9 * x + 0.1 * z[-1])
    close(params["kernel"], brx.relax(y["kernel"], BINARY, LAM))
    close(deployed["kernel"], np.where(x < 0, -1, 1) * np.mean(np.abs(x)))
    assert not np.allclose(deployed["kernel"], brx.quantized_params(state, params)["kernel"])


TARGET = normal(3, 4, 3)


def loss(params):
    return jnp.sum(jnp.cosh(params["kernel"] - TARGET))


@functools.cache
def searched(lam, count):
    """Params and state of either form after steps with the arguments of a line search."""
    params = {"kernel": normal(4, 4, 3)}
    carry = {form: (params, make(lam).init(params)) for form, make in SEARCHING.items()}
    trace = [jax.tree.map(np.asarray, carry)]  # no weak types, which steps do not return
    for _ in range(count):
        trace.append(searching_step(trace[-1], lam))
    return {form: [carry[form] for carry in trace] for form in SEARCHING}


SEARCHING = {
    "wrapper": lambda lam: brx.binary_relax(optax.lbfgs(memory_size=2), BINARY, lam),
    "chain": lambda lam: optax.chain(optax.lbfgs(memory_size=2), brx.relax_params(BINARY, lam)),
}


@jax.jit
def searching_step(carry, lam):
    """One step of either form, at a λ that is an argument."""
    after = {}
    for form, (params, state) in carry.items():
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = SEARCHING[form](lam).update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        after[form] = optax.apply_updates(params, updates), state
    return after


def agrees(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.allclose(*pair) for pair in pairs)


def test_a_line_search_gets_its_arguments():
    """At λ = 0 the wrapper is L-BFGS, and its last value and gradient may be used again."""
    params, state = searched(0.0, 9)["wrapper"][-1]
    np.testing.assert_allclose(params["kernel"], TARGET, atol=1e-2)
    reused = optax.value_and_grad_from_state(loss)(params, state=state)
    assert agrees(reused, jax.value_and_grad(loss)(params))
    with pytest.raises(TypeError, match="value_fn"):
        jax.eval_shape(brx.binary_relax(optax.lbfgs(), BINARY, 0.0).update, params, state, params)


def test_a_line_search_in_the_wrapper_looks_at_the_float_weights():
    """Documented: it compares the loss at the params with losses at float weights, and
    `value_and_grad_from_state` returns what the float network has, not the params."""
    params, state = searched(np.inf, 2)["wrapper"][-1]
    reused = optax.value_and_grad_from_state(loss)(params, state=state)
    assert agrees(reused, jax.value_and_grad(loss)(brx.float_params(state, params)))
    assert not agrees(reused, jax.value_and_grad(loss)(params))


def test_a_line_search_in_the_chain_looks_where_the_params_do_not_go():
    """Documented: it finds a good step from the params, the float weights take that step, and the
    loss at the new params is another."""
    (before, _), (params, state) = searched(np.inf, 3)["chain"][-2:]
    found, _ = optax.value_and_grad_from_state(loss)(params, state=state)
    assert float(found) < 0.9 * float(loss(before))
    assert float(found) < 0.9 * float(loss(params))


ASCENT = optax.chain(optax.contrib.normalize(), optax.sgd(0.01))


def test_sam_inside_perturbs_what_is_then_projected():
    """Documented: in phase II its ascent moves the float weights; the params keep their codes."""
    start, grad = {"kernel": normal(0, 4, 4) + 1.0}, {"kernel": normal(1, 4, 4)}
    sam = optax.contrib.sam(optax.sgd(0.1), ASCENT)
    trace = trace_of(brx.binary_connect(sam, BINARY), start, [grad] * 2)
    (params, state), (after, last) = trace
    ascent = 0.01 * grad["kernel"] / np.linalg.norm(grad["kernel"])
    moved = brx.float_params(state, params)["kernel"] - start["kernel"]
    np.testing.assert_allclose(moved, ascent, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(params["kernel"], BINARY.project(start["kernel"]), rtol=1e-2)
    back = brx.float_params(last, after)["kernel"] - start["kernel"]
    np.testing.assert_allclose(back, -0.1 * grad["kernel"], rtol=1e-3, atol=1e-6)


def test_opaque_sam_inside_takes_gradients_at_float_weights():
    """Documented: so the network that it trains is the float one."""
    start, grad = {"kernel": normal(0, 4, 4)}, {"kernel": normal(1, 4, 4)}
    sam = optax.contrib.sam(optax.sgd(0.1), ASCENT, opaque_mode=True)
    optimizer = brx.binary_connect(sam, BINARY)
    update = functools.partial(optimizer.update, grad_fn=lambda params, _: params)
    bound = optax.GradientTransformation(optimizer.init, update)
    (params, state), (after, last) = trace_of(bound, start, [grad] * 2)
    y = brx.float_params(state, params)["kernel"]
    seen = y + 0.01 * grad["kernel"] / np.linalg.norm(grad["kernel"])
    moved = brx.float_params(last, after)["kernel"] - y
    np.testing.assert_allclose(moved, -0.1 * seen, rtol=1e-4, atol=1e-6)


def test_apply_if_finite_inside_skips_the_base_but_not_the_relaxation():
    """A NaN batch moves no float weight; the count and λ go on."""
    base = optax.apply_if_finite(optax.sgd(0.1), 3)
    optimizer = brx.binary_relax(base, BINARY, lambda count: 1.0 + count)
    good = {"kernel": normal(1, 4, 4)}
    bad = {"kernel": good["kernel"].at[0, 0].set(jnp.nan)}
    trace = trace_of(optimizer, {"kernel": normal(0, 4, 4)}, [good, bad, good])
    y = [brx.float_params(state, params)["kernel"] for params, state in trace]
    np.testing.assert_array_equal(y[0], y[1])
    np.testing.assert_allclose(y[2] - y[1], -0.1 * good["kernel"], rtol=1e-4, atol=1e-6)
    assert [int(state.count) for _, state in trace] == [1, 2, 3]
    np.testing.assert_allclose(
        trace[1][0]["kernel"], brx.relax(y[1], BINARY, 2.0), rtol=1e-5, atol=1e-6
    )


def test_multi_steps_inside_relaxes_at_every_mini_step():
    """Documented: the count and λ move at each, and each gradient is at other params."""
    optimizer = brx.binary_relax(optax.MultiSteps(optax.sgd(0.1), 2), BINARY, lambda count: count)
    start, grads = {"kernel": normal(0, 4, 4)}, [{"kernel": normal(t, 4, 4)} for t in range(4)]
    trace = trace_of(optimizer, start, grads)
    y = [start["kernel"]] + [brx.float_params(s, p)["kernel"] for p, s in trace]
    for t in (0, 2):
        np.testing.assert_array_equal(y[t], y[t + 1])
        mean = (grads[t]["kernel"] + grads[t + 1]["kernel"]) / 2
        np.testing.assert_allclose(y[t + 2] - y[t], -0.1 * mean, rtol=1e-4, atol=1e-6)
    strengths = [float(brx.strength(state)) for _, state in trace]
    np.testing.assert_allclose(strengths, [0, 1 / 2, 2 / 3, 3 / 4], rtol=1e-6)


def test_hyperparameters_of_the_base_are_set_at_run_time():
    base = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    optimizer = brx.binary_relax(base, BINARY, 1.0)
    params, grads = {"kernel": normal(0, 4, 4)}, [{"kernel": normal(1, 4, 4)}]
    [(params, state)] = trace_of(optimizer, params, grads)
    before = brx.float_params(state, params)["kernel"]
    state.base_state.hyperparams["learning_rate"] = jnp.float32(0.5)
    [(params, state)] = trace_of(optimizer, params, grads, state)
    moved = brx.float_params(state, params)["kernel"] - before
    np.testing.assert_allclose(moved, -0.5 * grads[0]["kernel"], rtol=1e-4, atol=1e-6)


def test_lookahead_is_no_base():
    """It wants params of its own kind, `LookaheadParams`; docs/wrappers.md has one that is."""
    optimizer = brx.binary_relax(optax.lookahead(optax.sgd(0.1), 5, 0.5), BINARY, 1.0)
    params = {"kernel": normal(0, 4, 4)}
    with pytest.raises(AttributeError, match="fast"):
        optimizer.update(params, optimizer.init(params), params)
