"""Params in 16 bits and in 64: dtypes, exactness, and small updates that arrive."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers import covering, quick
from tests.helpers.training import normal, trace_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BINARY = brx.Binary()
FORMS = {
    "wrapper": brx.binary_relax,
    "chain": lambda base, *args, **kwargs: optax.chain(base, brx.relax_params(*args, **kwargs)),
}
DTYPES = ("float32", "bfloat16", "float16")
every_form = pytest.mark.parametrize("form", FORMS)


@functools.cache
def updated_in_every_dtype():
    """(form, dtype, float dtype) → of each of two steps the updates, float weights and quantized
    weights."""
    cases = [(f, d, y) for f in FORMS for d in DTYPES for y in {"float32", d}]
    optimizers = [FORMS[f](optax.sgd(0.1), BINARY, 1.0, 3, float_dtype=y) for f, _, y in cases]
    every_params = [{"kernel": normal(0, 4, 4, dtype=dtype)} for _, dtype, _ in cases]

    @jax.jit
    def step(states):
        after = []
        for optimizer, params, state in zip(optimizers, every_params, states, strict=True):
            updates, state = optimizer.update(params, state, params)
            read = brx.float_params(state, params), brx.quantized_params(state, params)
            after.append((state, [tree["kernel"] for tree in (updates, *read)]))
        return [*zip(*after, strict=True)]

    states = [o.init(params) for o, params in zip(optimizers, every_params, strict=True)]
    states, first = step(states)
    _, second = step(states)
    return dict(zip(cases, zip(first, second, strict=True), strict=True))


@every_form
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(form, dtype):
    """Updates have the params' dtype; float weights at least float32, unless asked otherwise."""
    for float_dtype in ("float32", dtype):
        for update, y, q in updated_in_every_dtype()[form, dtype, float_dtype]:
            assert update.dtype == dtype
            assert y.dtype == float_dtype
            assert q.dtype == dtype


def test_float64_params_keep_float64():
    with jax.enable_x64(True):
        params = {"kernel": normal(0, 4, 4, dtype="float64")}
        optimizer = brx.binary_relax(optax.sgd(1e-12), BINARY, 0.0)
        (after, state), *_ = trace_of(optimizer, params, [jax.tree.map(jnp.ones_like, params)])
        assert brx.float_params(state, after)["kernel"].dtype == np.float64
        np.testing.assert_allclose(params["kernel"] - after["kernel"], 1e-12, rtol=1e-3)


SMALL = {
    "chain, phase I": lambda dtype: optax.chain(
        optax.sgd(1e-4), brx.relax_params(BINARY, 1.0, float_dtype=dtype)
    ),
    "phase I": lambda dtype: brx.binary_relax(optax.sgd(1e-4), BINARY, 1.0, float_dtype=dtype),
    "both phases": lambda dtype: brx.binary_relax(
        optax.sgd(1e-4), BINARY, 1.0, 500, float_dtype=dtype
    ),
    "binary_connect": lambda dtype: brx.binary_connect(optax.sgd(1e-4), BINARY, float_dtype=dtype),
    "adam": lambda dtype: brx.binary_relax(
        optax.adam(1e-4, eps=1e-4), BINARY, 1.0, 500, float_dtype=dtype
    ),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def after_a_thousand(dtype, float_dtype):
    """Updates by a gradient of ones, which SGD and Adam alike turn into steps of 1e-4.

    Of every case in one program: name → params and float weights.
    """
    optimizers = {name: make(float_dtype) for name, make in SMALL.items()}
    ones = {"kernel": jnp.ones((2, 2), dtype)}

    def body(carry, _):
        for name, (params, state) in carry.items():
            updates, state = optimizers[name].update(ones, state, params)
            carry[name] = optax.apply_updates(params, updates), state
        return carry, None

    carry = {name: (ones, optimizer.init(ones)) for name, optimizer in optimizers.items()}
    carry, _ = jax.lax.scan(body, carry, length=1000)
    return {
        name: (params["kernel"].astype("float32"), brx.float_params(state, params)["kernel"])
        for name, (params, state) in carry.items()
    }


@pytest.mark.parametrize("dtype", covering.some(["bfloat16", "float16"], ["bfloat16"]))
@pytest.mark.parametrize("case", SMALL)
def test_small_updates_of_16_bit_params_arrive(case, dtype):
    """A thousand of 1e-4 of the weight: the dtype alone would lose every one."""
    params, floats = after_a_thousand(dtype, "float32")[case]
    np.testing.assert_allclose(floats, 0.9, rtol=1e-3)
    np.testing.assert_allclose(params, 0.9, rtol=1e-2)  # bfloat16 scales of phase II have 7 bits


@pytest.mark.parametrize("case", SMALL)
def test_bfloat16_float_weights_lose_small_updates(case):
    """Documented: that is what `float_dtype` is for."""
    params, floats = after_a_thousand("bfloat16", "bfloat16")[case]
    np.testing.assert_array_equal(floats.astype("float32"), 1)
    np.testing.assert_allclose(params, 1, rtol=5e-3)


SETS = {
    "hidden": brx.TernaryThreshold(granularity=brx.PerChannel()),
    "out": brx.Binary(granularity=brx.PerChannel()),
}
RULES = brx.select(*((name, qset) for name, qset in SETS.items()))


@quick.jit
def projected(params):
    return {name: qset.project(params[name]) for name, qset in SETS.items()}


def network(params, x):
    return jnp.tanh(x @ params["hidden"]) @ params["out"]


@pytest.mark.parametrize(
    ("dtype", "float_dtype"),
    covering.pairs(["bfloat16", "float16", "float64"], ["float32", "bfloat16"]),
)
def test_training_ends_with_as_many_values_as_levels(dtype, float_dtype):
    """In every step of phase II, bit for bit, in the params' own dtype; and it has learnt."""
    with jax.enable_x64(dtype == "float64"):
        cast = functools.partial(normal, dtype=dtype)
        start, x = {"hidden": cast(0, 8, 6), "out": cast(1, 6, 3)}, cast(2, 64, 8)
        teacher = projected({name: cast(5, *leaf.shape) for name, leaf in start.items()})

        def loss(params):
            return jnp.mean((network(params, x) - network(teacher, x)) ** 2)

        optimizer = brx.binary_relax(
            optax.adam(0.03, eps=1e-4), RULES, 1.0, 60, float_dtype=float_dtype
        )

        def body(carry, _):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, brx.quantized_params(state, params), loss(params))

        run = jax.jit(lambda start: jax.lax.scan(body, (start, optimizer.init(start)), length=80))
        (params, state), trace = run(start)
        hard, quantized, losses = jax.tree.map(lambda leaf: leaf[60:], jax.device_get(trace))
        floats = brx.float_params(state, params)
        wanted = projected(floats)
        for name, qset in SETS.items():
            assert params[name].dtype == dtype
            y = floats[name]
            assert y.dtype == jnp.promote_types(dtype, float_dtype)
            assert y.dtype != np.float32 or len(np.unique(y)) > 12
            np.testing.assert_array_equal(hard[name], quantized[name])
            groups = np.asarray(hard[name], float).swapaxes(1, 2).reshape(-1, len(params[name]))
            assert max(len(np.unique(group)) for group in groups) <= len(qset.levels)
            found = np.asarray(params[name], float)
            np.testing.assert_allclose(found, np.asarray(wanted[name], float), rtol=2e-2)
        untrained = quick.jit(loss)(projected(start))
        assert np.asarray(losses, float).mean() < 0.7 * float(untrained)
