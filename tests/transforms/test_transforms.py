"""What an update does: the formula, the schedule and the phases, and where the base acts."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers.training import array, compiled, normal, ones, spoilt, trace_of, traces_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BINARY, THRESHOLD = brx.Binary(), brx.TernaryThreshold()
FORMS = {
    "wrapper": brx.binary_relax,
    "chain": lambda base, *args, **kwargs: optax.chain(base, brx.relax_params(*args, **kwargs)),
}
every_form = pytest.mark.parametrize("form", FORMS)
SGD = optax.sgd(0.1)
BASES = {"sgd": optax.sgd(0.1, 0.9), "adamw": optax.adamw(0.01)}
PHASE_TWO = [
    *(("chain", hard_from) for hard_from in (0, 9)),
    *(("wrapper", hard_from) for hard_from in (1, 3.0, np.int64(3), jnp.int32(9))),
]
STEPS = 20


@functools.cache
def traces():
    """Many transformations at the same gradients, in one program."""
    cases = {
        ("phase two", form, repr(hard_from)): FORMS[form](SGD, BINARY, 1.0, hard_from)
        for form, hard_from in PHASE_TWO
    }
    for form, make in FORMS.items():
        cases["schedule", form] = make(SGD, BINARY, lambda count: count - 1)
        cases["never", form] = make(SGD, BINARY, 1e4, None)
        for name, base in BASES.items():
            cases["lambda zero", form, name] = make(base, BINARY, 0.0)
    grads = [{"kernel": normal(i, 4, 4)} for i in range(STEPS)]
    return traces_of(BASES | cases, grads[0], grads)


def binary(y):
    """The projection on the binary set in NumPy, zero to +s."""
    return np.where(y < 0, -1, 1) * np.mean(np.abs(y))


@functools.cache
def relaxed(form):
    """Some updates at a λ that is an argument, and so unknown when the transformation is made."""

    @jax.jit
    def run(params, grads, lam):
        optimizer = FORMS[form](optax.sgd(0.1), BINARY, lam)

        def step(carry, grads):
            params, state = carry
            updates, state = optimizer.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            read = (brx.float_params(state, params), brx.quantized_params(state, params))
            return (params, state), (params, *read, brx.strength(state))

        return jax.lax.scan(step, (params, optimizer.init(params)), grads)[1]

    return run


@every_form
@pytest.mark.parametrize("lam", [0.0, 1e-30, 0.3, 1.0, 7.0, 1e6, 1e30, np.inf])
def test_the_relaxation_formula(form, lam):
    """w = (λ·proj(y) + y)/(λ + 1), against NumPy in float64."""
    start, grads = normal(0, 6, 5), normal(1, 3, 6, 5)
    trace = relaxed(form)({"kernel": start}, {"kernel": grads}, lam)
    *trees, strengths = jax.tree.map(np.asarray, trace)
    y = np.asarray(start, np.float64)
    for t, grad in enumerate(np.asarray(grads, np.float64)):
        y = y - 0.1 * grad
        w = binary(y) if np.isinf(lam) else (lam * binary(y) + y) / (lam + 1)
        for tree, wanted in zip(trees, (w, y, binary(y)), strict=True):
            np.testing.assert_allclose(tree["kernel"][t], wanted, atol=1e-5)
        wanted = 1.0 if np.isinf(lam) else lam / (lam + 1)
        assert float(strengths[t]) == pytest.approx(wanted, rel=1e-6, abs=1e-29)


def test_the_first_gradient_is_taken_at_the_params_as_given():
    params = {"kernel": normal(0, 3, 3)}
    for lam in (1.0, np.inf):
        state = brx.binary_relax(optax.sgd(0.1), BINARY, lam).init(params)
        np.testing.assert_array_equal(brx.float_params(state, params)["kernel"], params["kernel"])
        assert float(brx.strength(state)) == 0
        assert int(state.count) == 0


@every_form
def test_the_schedule_is_evaluated_before_the_increment(form):
    """As in Optax: count 0 at the first update. A negative λ counts as 0."""
    strengths = [float(brx.strength(state)) for _, state in traces()["schedule", form][:5]]
    np.testing.assert_allclose(strengths, [0, 0, 1 / 2, 2 / 3, 3 / 4], rtol=1e-6)


@pytest.mark.parametrize(("form", "hard_from"), PHASE_TWO)
def test_phase_two_starts_at_hard_from(form, hard_from):
    trace = traces()["phase two", form, repr(hard_from)]
    strengths = [float(brx.strength(state)) for _, state in trace]
    first = int(hard_from)
    assert strengths == [0.5] * first + [1.0] * (STEPS - first)
    few = [len(np.unique(params["kernel"])) <= 2 for params, _ in trace]
    assert not any(few[:first])
    assert all(few[first if first >= 8 else first + 2 :])


@every_form
def test_numbers_may_be_traced(form):
    """A transformation made inside jit, from λ and `hard_from` that are its arguments."""
    params = normal(0, 4, 3)

    def run(lam, hard_from):
        return trace_of(FORMS[form](SGD, BINARY, lam, hard_from), params, [params] * 3)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
    jax.tree.map(close, jax.jit(run)(1.0, 2), run(1.0, 2))


@every_form
def test_without_hard_from_phase_two_never_starts(form):
    """λ = 1e6 is not ∞: the params stay off the set."""
    trace = traces()["never", form]
    assert all(float(brx.strength(state)) < 1 for _, state in trace)
    assert all(len(np.unique(params["kernel"])) > 2 for params, _ in trace)


@pytest.mark.parametrize("base", BASES)
@every_form
def test_lambda_zero_trains_as_the_base(form, base):
    ours, theirs = traces()["lambda zero", form, base], traces()[base]
    for (a, state), (b, _) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a["kernel"], b["kernel"], rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(brx.float_params(state, a)["kernel"], b["kernel"], atol=1e-6)


def test_three_spellings_of_binary_connect():
    params, grads = {"kernel": normal(0, 4, 4)}, [{"kernel": normal(i, 4, 4)} for i in range(9)]
    optimizers = (
        brx.binary_connect(optax.adam(0.1), THRESHOLD),
        brx.binary_relax(optax.adam(0.1), THRESHOLD, np.inf),
        brx.binary_relax(optax.adam(0.1), THRESHOLD, lambda count: jnp.inf + count),
        brx.binary_relax(optax.adam(0.1), THRESHOLD, 1.0, hard_from=0),
        optax.chain(optax.adam(0.1), brx.relax_params(THRESHOLD, np.inf)),
    )
    runs = traces_of(dict(enumerate(optimizers)), params, grads).values()
    for (wanted, state), *others in zip(*runs, strict=True):
        assert float(brx.strength(state)) == 1
        for params, _ in others:
            np.testing.assert_array_equal(params["kernel"], wanted["kernel"])


def test_binary_connect_is_the_straight_through_estimator():
    """The float weights move by the gradient at the quantized ones, once there are such."""
    target = np.asarray(normal(1, 4, 4), np.float64)
    y = w = np.asarray(normal(0, 4, 4), np.float64)
    params = {"kernel": normal(0, 4, 4)}
    optimizer = brx.binary_connect(optax.sgd(0.2), BINARY)
    state = optimizer.init(params)
    for _ in range(6):
        grads = {"kernel": np.asarray(params["kernel"]) - target.astype("float32")}
        [(params, state)] = compiled(optimizer)(grads, [(params, state)])
        y = y - 0.2 * (w - target)
        w = binary(y)
        np.testing.assert_allclose(params["kernel"], w, atol=1e-5)


def test_weight_decay_acts_on_float_weights_in_the_wrapper_and_on_params_in_the_chain():
    base, params = optax.adamw(0.5, weight_decay=0.1), {"kernel": normal(0, 4, 4)}
    grads = [jax.tree.map(jnp.zeros_like, params)] * 6
    y = np.asarray(params["kernel"], np.float64)
    optimizers = {form: make(base, BINARY, 3.0) for form, make in FORMS.items()}
    traces = traces_of(optimizers, params, grads)
    wrapped, chained = (traces[form][-1] for form in ("wrapper", "chain"))
    np.testing.assert_allclose(brx.float_params(*wrapped[::-1])["kernel"], y * 0.95**6, rtol=1e-5)
    w = y
    for _ in range(6):
        y = y - 0.05 * w
        w = (3 * binary(y) + y) / 4
    np.testing.assert_allclose(brx.float_params(*chained[::-1])["kernel"], y, rtol=1e-4, atol=1e-5)
    assert np.abs(y - brx.float_params(*wrapped[::-1])["kernel"]).max() > 0.05


BY_NORMS = {
    "adaptive_grad_clip": optax.chain(optax.adaptive_grad_clip(0.01), optax.sgd(1.0)),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "lars": optax.lars(0.1),
}


@functools.cache
def by_norms():
    """The traces of each base and, under (its name, "ours"), of the wrapper around it."""
    params, grads = {"kernel": normal(0, 4, 4)}, [{"kernel": normal(i, 4, 4)} for i in range(8)]
    ours = {(name, "ours"): brx.binary_connect(base, BINARY) for name, base in BY_NORMS.items()}
    return traces_of(BY_NORMS | ours, params, grads)


@pytest.mark.parametrize("base", BY_NORMS)
def test_norms_of_params_are_those_of_the_float_weights(base):
    """The wrapper's float weights move as the base alone moves them, given the same gradients."""
    for (p, state), (y, _) in zip(by_norms()[base, "ours"], by_norms()[base], strict=True):
        np.testing.assert_allclose(brx.float_params(state, p)["kernel"], y["kernel"], rtol=1e-4)


def test_extra_arguments_are_forwarded():
    """Polyak's step size is the loss value; the line of plain transformations ignores it."""
    params, grads = {"kernel": normal(0, 2, 2)}, [{"kernel": ones(2, 2)}]
    base = optax.polyak_sgd(max_learning_rate=10.0)
    optimizers = {form: make(base, BINARY, 0.0) for form, make in FORMS.items()}
    optimizers["plain"] = brx.binary_relax(optax.sgd(0.1), BINARY, 0.0)
    traces = traces_of(optimizers, params, grads, value=2.0, grad=grads[0], anything=None)
    for form, rate in {"wrapper": 2.0 / 4, "chain": 2.0 / 4, "plain": 0.1}.items():
        [(moved, _)] = traces[form]
        wanted = np.asarray(params["kernel"]) - rate
        np.testing.assert_allclose(moved["kernel"], wanted, rtol=1e-5)


def test_edits_between_updates_are_overwritten():
    params, grads = {"kernel": normal(0, 3, 3)}, [{"kernel": normal(1, 3, 3)}]
    optimizer = brx.binary_relax(optax.sgd(0.1), BINARY, 1.0)
    [(params, state)] = trace_of(optimizer, params, grads)
    edited = jax.tree.map(lambda w: np.asarray(w) + np.float32(0.25), params)
    left, right = (trace_of(optimizer, p, grads, state)[0][0] for p in (params, edited))
    np.testing.assert_allclose(left["kernel"], right["kernel"], atol=1e-6)


def test_other_leaves_get_the_updates_of_the_base_bit_for_bit():
    params = {
        "kernel": normal(0, 3, 3),
        "bias": normal(1, 3),
        "half": normal(2, 3, dtype="float16"),
    }
    grads = [jax.tree.map(lambda p, i=i: np.cos(np.asarray(p) + i), params) for i in range(6)]
    base = optax.adam(0.1, eps=1e-4)
    ours = brx.binary_relax(base, BINARY, 1.0, hard_from=2)
    traces = traces_of({"ours": ours, "base": base}, params, grads)
    for (a, _), (b, _) in zip(*traces.values(), strict=True):
        np.testing.assert_array_equal(a["bias"], b["bias"])
        np.testing.assert_array_equal(a["half"], b["half"])


SPOILT = {
    "channel": brx.Binary(granularity=brx.PerChannel(0)),
    "threshold": brx.TernaryThreshold(granularity=brx.PerChannel(0)),
    "searched": brx.Uniform(3, granularity=brx.PerBlock(6)),  # the same groups
    "other": brx.Binary(),
}
SPOILT_OPTIMIZER = brx.binary_relax(optax.sgd(0.1), brx.select(*SPOILT.items()), 1.0, hard_from=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["params", "grads"])
def test_what_is_not_finite_stays_in_its_group(where, bad):
    params = {name: normal(0, 4, 6) for name in SPOILT}
    grads = {name: normal(1, 4, 6) for name in SPOILT}
    optimizer = SPOILT_OPTIMIZER
    clean = trace_of(optimizer, params, [grads] * 3)
    given = {"params": params, "grads": grads}
    given[where] = {
        name: leaf if name == "other" else spoilt(leaf, (2, 3), bad)
        for name, leaf in given[where].items()
    }
    for (p, state), (wanted, _) in zip(
        trace_of(optimizer, given["params"], [given["grads"]] * 3), clean, strict=True
    ):
        p, wanted, quantized = jax.tree.map(np.asarray, (p, wanted, brx.quantized_params(state, p)))
        np.testing.assert_array_equal(p["other"], wanted["other"])
        for name in ("channel", "threshold", "searched"):
            assert np.isnan(quantized[name][2]).all()
            good = np.delete(p[name], 2, axis=0)
            np.testing.assert_array_equal(good, np.delete(wanted[name], 2, axis=0))
            assert np.isfinite(good).all()
    assert all(np.isnan(p[name][2]).all() for name in ("channel", "threshold", "searched"))


def test_weights_that_recover_from_zero():
    """All-zero leaves stay zero without gradients, and are quantized once they have some."""
    params = zero = {"kernel": array(np.zeros((4, 4)))}
    some = {"kernel": normal(1, 4, 4)}
    optimizers = {qset: brx.binary_connect(SGD, qset) for qset in (BINARY, THRESHOLD)}
    for qset, trace in traces_of(optimizers, params, [zero] * 3 + [some] * 3).items():
        assert not any(np.any(p["kernel"]) for p, _ in trace[:3])
        p, state = trace[-1]
        assert 0 < len(np.unique(p["kernel"])) <= len(qset.levels)
        np.testing.assert_array_equal(p["kernel"], brx.quantized_params(state, p)["kernel"])
        wanted = qset.project(brx.float_params(state, p)["kernel"])
        np.testing.assert_allclose(p["kernel"], wanted, rtol=1e-4)


def test_the_count_stops_at_the_end_of_int32():
    params = {"kernel": normal(0, 2, 2)}
    optimizer = brx.binary_relax(optax.sgd(0.1), BINARY, lambda count: count / 1e9, hard_from=None)
    state = optimizer.init(params)._replace(count=jnp.int32(2**31 - 2))
    late = brx.binary_relax(SGD, BINARY, 1.0, hard_from=2**31 - 1)
    traces = traces_of({"never": optimizer, "late": late}, params, [params] * 3, state)
    assert [int(state.count) for _, state in traces["never"]] == [2**31 - 1] * 3
    _, after = traces["late"][1]
    assert float(brx.strength(after)) == 1


@pytest.mark.parametrize("on_the_set", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_a_small_quadratic_ends_at_its_best_binary_point(seed, on_the_set):
    """That is the best of {±s}⁴ over all signs.

    Unless its gradient is zero, the float weights drift slowly on, and s is near the best one only.
    """
    rng = np.random.default_rng(seed)
    root = np.eye(4) + 0.2 * rng.standard_normal((4, 4))
    matrix, target = root @ root.T, rng.choice([-1.0, 1.0], 4)
    if not on_the_set:
        target *= 1 + 0.4 * rng.random(4)

    def best_with(signs):
        q = np.array(signs)
        return max(q @ matrix @ target / (q @ matrix @ q), 0) * q

    points = map(best_with, itertools.product([-1, 1], repeat=4))
    best = min(points, key=lambda w: (w - target) @ matrix @ (w - target))
    params = descended(normal(seed, 4, 1), matrix.astype("float32"), target.astype("float32"))
    rtol = 1e-2 if on_the_set else 0.1
    np.testing.assert_allclose(np.ravel(params["kernel"]), best, rtol=rtol)


@jax.jit
def descended(kernel, matrix, target):
    """Params after training on a quadratic."""
    optimizer = brx.binary_relax(
        optax.sgd(optax.piecewise_constant_schedule(0.1, {150: 0.1})),
        BINARY,
        brx.geometric_continuation(1.0, 1.04),
        hard_from=150,
    )

    def body(carry, _):
        params, state = carry
        grads = {"kernel": matrix @ (params["kernel"] - target[:, None])}
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": kernel}
    return jax.lax.scan(body, (params, optimizer.init(params)), length=250)[0][0]


KERNEL = {"layer": {"kernel": ones(4, 3), "bias": ones(3)}}
REFUSED = {
    "negative lam": (lambda: brx.binary_relax(SGD, BINARY, -1.0), r"lam must be nonneg.*got -1\.0"),
    "tiny lam below zero": (lambda: brx.relax_params(BINARY, -1e-30), r"lam .*-1e-30"),
    "lam = -inf": (lambda: brx.relax_params(BINARY, -np.inf), r"lam .*-inf"),
    "lam = NaN": (lambda: brx.relax_params(BINARY, np.nan), r"lam .*nan"),
    "lam an array": (lambda: brx.relax_params(BINARY, jnp.float32(-2)), r"lam .*-2"),
    "lam missing": (lambda: brx.relax_params(BINARY, None), r"lam .*None"),
    "lam a text": (lambda: brx.relax_params(BINARY, "1.0"), r"lam .*'1\.0'"),
    "lam many numbers": (lambda: brx.relax_params(BINARY, ones(3)), r"lam .*1\., 1\., 1\."),
    "hard_from negative": (lambda: brx.relax_params(BINARY, 1.0, -3), r"hard_from .*None.*-3"),
    "hard_from broken": (lambda: brx.relax_params(BINARY, 1.0, 2.5), r"hard_from .*2\.5"),
    "hard_from broken array": (
        lambda: brx.relax_params(BINARY, 1.0, np.float32(2.5)),
        r"hard_from .*2\.5",
    ),
    "hard_from NaN": (lambda: brx.relax_params(BINARY, 1.0, np.nan), r"hard_from .*nan"),
    "hard_from a text": (lambda: brx.relax_params(BINARY, 1.0, "3"), r"hard_from .*'3'"),
    "base a rate": (lambda: brx.binary_relax(0.1, BINARY, 1.0), r"base .*optax\.sgd.*got 0\.1"),
    "base a function": (lambda: brx.binary_connect(optax.sgd, BINARY), r"base .*sgd"),
    "base and set exchanged": (lambda: brx.binary_connect(BINARY, SGD), r"base .*Binary"),
    "a class": (lambda: brx.binary_relax(SGD, brx.Ternary, 1.0), r"qset .*Ternary\(\).*Ternary"),
    "bits": (lambda: brx.relax_params(2, 1.0), r"qset .*Ternary\(\).*got 2"),
    "rules without select": (lambda: brx.relax_params([("a", BINARY)], 1.0), r"qset .*select"),
    "set and lam exchanged": (lambda: brx.relax_params(1.0, BINARY), r"qset .*got 1\.0"),
    "lam a set": (lambda: brx.relax_params(BINARY, brx.Ternary()), r"lam must be.*Ternary"),
    "lam complex": (lambda: brx.relax_params(BINARY, 1 + 0j), r"lam must be.*1\+0j"),
    "lam a class": (lambda: brx.relax_params(BINARY, brx.Continuation), r"lam .*got <class"),
    "no set": (lambda: brx.relax_params(None, 1.0), r"qset .*None"),
}


@pytest.mark.parametrize(("act", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_are_refused_at_once(act, message):
    with pytest.raises(ValueError, match=message):
        act()


OTHERS = {
    "another shape": ({"layer": {"kernel": ones(2, 3), "bias": ones(3)}}, r"\(2, 3\)"),
    "a leaf less": ({"layer": {"bias": ones(3)}}, "layer/kernel"),
    "another name": ({"layer": {"kernels": ones(4, 3), "bias": ones(3)}}, "layer/kernel"),
    "a leaf more": (KERNEL | {"head": ones(2, 2)}, "head"),
    "one array": (ones(4, 3), "layer/kernel"),
}


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("form", ["relax_params", "binary_relax", "binary_connect"])
def test_a_state_of_other_params_is_refused(form, other, message):
    optimizer = {
        "relax_params": brx.relax_params(BINARY, 1.0),
        "binary_relax": brx.binary_relax(optax.adam(0.1), BINARY, 1.0),
        "binary_connect": brx.binary_connect(optax.adam(0.1), BINARY),
    }[form]
    state = optimizer.init(KERNEL)
    with pytest.raises(ValueError, match=message):
        optimizer.update(other, state, other)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(optimizer.update, other, state, other)
    with pytest.raises(ValueError, match=message):
        brx.with_float_params(state, other)
    if other is not OTHERS["a leaf more"][0]:  # a reader has no use for it, and no harm
        for read in (brx.float_params, brx.quantized_params):
            with pytest.raises(ValueError, match=message):
                read(state, other)
    # Nothing was changed: the state still serves its own params.
    updates, _ = jax.eval_shape(optimizer.update, KERNEL, state, KERNEL)
    assert jax.tree.structure(updates) == jax.tree.structure(KERNEL)


def test_missing_params_are_refused():
    for optimizer in (
        brx.relax_params(BINARY, 1.0),
        brx.binary_relax(SGD, BINARY, 1.0),
        brx.binary_connect(SGD, BINARY),
    ):
        with pytest.raises(ValueError, match=r"params is None.*update\(grads, state, params\)"):
            optimizer.update(KERNEL, optimizer.init(KERNEL))
