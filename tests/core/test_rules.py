"""How scales are found: each rule against its definition, its cost, and what it leaves alone."""

import copy
import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from brelax_jax.sets._sums import PIECE
from tests.helpers import covering, oracles

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SETS = {
    "binary": brx.Binary,
    "ternary": brx.Ternary,
    "two-bit": lambda **kwargs: brx.ScaledLevels((-3, -1, 1, 3), **kwargs),
    "uniform4": lambda **kwargs: brx.Uniform(4, **kwargs),
    "uniform8": lambda **kwargs: brx.Uniform(8, **kwargs),
}
RULES = {
    "twn": brx.MeanMagnitude(1.4),
    "absmean": brx.MeanMagnitude(1.0, refit=False),
    "max": brx.MaxMagnitude(),
    "fixed": brx.Fixed(0.5),
}


def every(name, cases):
    """Each rule with a part of these cases in the suite, and with all in `make soak`."""
    return pytest.mark.parametrize(("rule", name), covering.pairs(RULES, cases))


def drawn(shape=(60, 5)):
    return np.random.default_rng(0).standard_t(3, shape).astype(np.float32)


def defined(rule, w, levels):
    """(codes at unit scale, scale) of one group, in float64 and from the definition."""
    levels, a = np.array(levels), np.abs(w).astype(float)
    match rule:
        case brx.MeanMagnitude():
            at = rule.factor * np.mean(a)
        case brx.MaxMagnitude():
            at = np.max(a) / levels[-1]
        case _:
            at = rule.value
    q = levels[np.argmin(np.abs(w.astype(float)[:, None] - at * levels[None]), axis=1)]
    return q, (q @ w) / (q @ q) if getattr(rule, "refit", False) else at


@every("name", SETS)
def test_each_rule_is_its_definition(rule, name):
    w, rule = drawn(), RULES[rule]
    qset = SETS[name](granularity=brx.PerChannel(), rule=rule)
    projection, quantized = jax.jit(lambda w: (qset.project(w), qset.quantize(w)))(w)
    for i, group in enumerate(w.T):
        q, scale = defined(rule, group, qset.levels)
        np.testing.assert_allclose(np.ravel(quantized.scale)[i], scale, rtol=2e-6)
        np.testing.assert_allclose(projection[:, i], scale * q, rtol=2e-6, atol=1e-30)
    np.testing.assert_array_equal(quantized.dequantize(), projection)


def test_names_that_others_give_to_these_rules():
    w = drawn()
    twn, named = brx.Ternary(rule=brx.MeanMagnitude(1.4)), brx.TernaryThreshold()
    np.testing.assert_array_equal(twn.project(w), named.project(w))
    assert named.rule == brx.MeanMagnitude(1.4)
    np.testing.assert_array_equal(
        np.unique(np.abs(brx.Binary(rule=brx.Fixed(1.0)).project(w))), [1.0]
    )


@pytest.mark.parametrize("name", ["ternary", "two-bit", "uniform4"])
def test_the_refit_of_a_large_group_is_its_definition(name):
    """On CPU it is taken in pieces, of which the last one is smaller."""
    rule, rows = brx.MeanMagnitude(1.0), PIECE + 17
    one, several = (
        SETS[name](rule=rule, granularity=g) for g in (brx.PerTensor(), brx.PerChannel())
    )
    # Not those of `quantize`, which corrects them.
    scales = jax.jit(lambda w: (one.fit(w).scale, several.fit(w).scale))
    for size in (1e-30, 1, 1e36):  # the sum of the last ones overflows
        w = (size * np.random.default_rng(7).standard_normal((rows, 2))).astype(np.float32)
        groups = [w.ravel(), *w.T]
        found = np.concatenate([np.ravel(scale) for scale in scales(w)])
        for group, scale in zip(groups, found, strict=True):
            np.testing.assert_allclose(scale, defined(rule, group, one.levels)[1], rtol=2e-6)


@every("name", ["ternary", "uniform4", "binary"])
def test_nan_infinity_and_extremes_stay_in_their_group(rule, name):
    w = np.abs(drawn((6, 20)))
    w[1, 3], w[2, 0], w[3], w[4] = np.nan, -np.inf, 0, 3e38
    qset = SETS[name](granularity=brx.PerChannel(0), rule=RULES[rule])
    projection = np.asarray(qset.project(w))
    assert np.isnan(projection[1:3]).all()
    assert np.isfinite(projection[[0, 3, 4, 5]]).all()
    if rule != "fixed":
        assert np.all(projection[3] == 0)
        assert np.all(np.abs(projection[4]) > 1e37)


@every("name", SETS)
def test_the_derivative_is_that_of_the_definition(rule, name):
    """With the codes held, by differences of the definition in float64."""
    w, rule = drawn((40,)), RULES[rule]
    tangent = np.random.default_rng(1).standard_normal(40).astype(np.float32)
    qset = SETS[name](rule=rule)
    _, found = jax.jvp(qset.project, [jnp.asarray(w)], [jnp.asarray(tangent)])
    q, _ = defined(rule, w, qset.levels)

    def scale(t):
        moved = w.astype(float) + t * tangent
        match rule:
            case brx.MeanMagnitude(refit=True):
                return (q @ moved) / (q @ q)
            case brx.MeanMagnitude():
                return rule.factor * np.mean(np.abs(moved))
            case brx.MaxMagnitude():
                return np.max(np.abs(moved)) / qset.levels[-1]
            case _:
                return rule.value

    slope = (scale(1e-6) - scale(-1e-6)) / 2e-6
    np.testing.assert_allclose(found, q * slope, rtol=1e-4, atol=1e-6)


@every("name", ["ternary", "uniform4"])
def test_distance_envelope_and_relax_are_of_the_set(rule, name):
    w, lam, rule = drawn((300,)), 3.0, RULES[rule]
    qset = SETS[name](rule=rule)
    if isinstance(rule, brx.Fixed):
        least = oracles.error(w, rule.value, qset.levels)
    else:
        least = oracles.optimum(w, qset.levels)[1]
    functions = brx.distance, lambda *x: brx.moreau_envelope(*x, lam), lambda *x: brx.relax(*x, lam)
    distance, envelope, relaxed = jax.jit(lambda w: [each(w, qset) for each in functions])(w)
    np.testing.assert_allclose(distance**2, least, rtol=1e-5)
    np.testing.assert_allclose(envelope, lam / 2 * least, rtol=1e-5)
    relaxed = np.asarray(relaxed, float)
    np.testing.assert_allclose(np.sum((relaxed - w) ** 2), least * (0.75**2), rtol=1e-4)


@every("params", ["float32", "bfloat16"])
def test_training_ends_on_the_set_bit_for_bit(rule, params):
    rule = RULES[rule]
    qset = brx.Uniform(4, granularity=brx.PerChannel(), rule=rule)
    relax = brx.binary_relax(optax.sgd(0.1), qset, 1.0, hard_from=9)
    rng = np.random.default_rng(0)
    w = {"kernel": jnp.asarray(drawn((30, 4)), params)}
    state, update = relax.init(w), jax.jit(relax.update)
    for _ in range(13):
        grads = {"kernel": jnp.asarray(rng.standard_normal((30, 4)), params)}
        updates, state = update(grads, state, w)
        w = optax.apply_updates(w, updates)
    assert update._cache_size() == 1  # a state after an update is like the first one
    np.testing.assert_array_equal(w["kernel"], brx.quantized_params(state, w)["kernel"])
    np.testing.assert_array_equal(
        w["kernel"], brx.quantized_tree(state, w)["kernel"].dequantize(), strict=True
    )
    y = np.asarray(brx.float_params(state, w)["kernel"])
    held = 2.0**-15 if params == "float32" else 2.0**-3  # significant bits of a scale
    for i, scale in enumerate(np.ravel(state.scales["kernel"])):
        np.testing.assert_allclose(scale, defined(rule, y[:, i], qset.levels)[1], rtol=held)


def test_an_update_needs_no_memory_for_what_it_computes_of_weights():
    """No |w| is written to be read again, and no codes but those of one piece."""
    sets = {name: {"kernel": SETS["uniform4"](rule=rule)} for name, rule in RULES.items()}
    sets["binary"] = {"kernel": brx.Binary()}
    params = {name: {"kernel": jax.ShapeDtypeStruct((1024, 4096), jnp.float32)} for name in sets}
    relax = brx.binary_relax(optax.sgd(0.1, momentum=0.9), sets, 1.0)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = relax.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = step.lower(params, jax.eval_shape(relax.init, params), params).compile()
    weights = 4 * 1024 * 4096  # bytes of one leaf
    assert compiled.memory_analysis().temp_size_in_bytes < weights / 10


@pytest.mark.parametrize("names", covering.some([("twn",), tuple(RULES)], [("twn",)]))
def test_a_rule_changes_midway(names):
    """Another rule is no other set: the next update finds the scale by it."""
    params = {"kernel": jnp.asarray(drawn())}
    rules = [brx.LeastSquares(), *map(RULES.get, names), brx.LeastSquares(0.01), brx.LeastSquares()]
    rules += [brx.MeanMagnitude(1.4), brx.LeastSquares(0.01)]
    by_rule = {r: brx.binary_connect(optax.sgd(0.0), brx.Ternary(rule=r)) for r in rules}
    updates = {rule: jax.jit(relax.update) for rule, relax in by_rule.items()}
    state = None
    for rule in rules:
        relax, update = by_rule[rule], updates[rule]
        state = relax.init(params) if state is None else state
        for _ in range(2):
            _, state = update(params, state, params)
        fresh = update(params, relax.init(params), params)[1]
        if rule != brx.LeastSquares(0.01):  # which may keep what the rule before found
            jax.tree.map(np.testing.assert_array_equal, state.scales, fresh.scales)
        assert jax.tree.structure(state) == jax.tree.structure(fresh)


@pytest.mark.parametrize("given", [0, -1.0, np.nan, np.inf, "1", None, [1.0]])
def test_wrong_numbers_are_refused(given):
    with pytest.raises(ValueError, match="factor must be a positive finite number, got"):
        brx.MeanMagnitude(given)
    with pytest.raises(ValueError, match="value must be a positive finite number, got"):
        brx.Fixed(given)


def test_what_is_no_rule_is_refused():
    for given in ("mean", brx.LeastSquares, None):
        with pytest.raises(ValueError, match=r"rule must be LeastSquares\(\), MeanMagnitude"):
            brx.Ternary(rule=given)
    with pytest.raises(ValueError, match="refit must be True or False, got 1"):
        brx.MeanMagnitude(1.0, refit=1)


def test_rules_and_sets_are_values():
    for rule in [brx.LeastSquares(0.1), *RULES.values()]:
        qset = brx.Uniform(4, rule=rule, scale_dtype="float16")
        assert qset == copy.deepcopy(qset) == pickle.loads(pickle.dumps(qset))
        assert hash(qset) == hash(copy.copy(qset))
        assert eval(repr(qset), vars(brx)) == qset
    assert brx.MeanMagnitude(np.float32(1.5)) == brx.MeanMagnitude(1.5)
    assert repr(brx.Ternary()) == "Ternary()"
