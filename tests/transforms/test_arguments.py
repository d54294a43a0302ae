"""Arguments of the transformations: a `Continuation`, keywords, and float dtypes."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers.training import normal, traces_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BINARY, SGD = brx.Binary(), optax.sgd(0.1)
PLAN = brx.continuation(8)
MADE = {
    "binary_relax": lambda *plan, **more: brx.binary_relax(SGD, BINARY, *plan, **more),
    "relax_params": lambda *plan, **more: brx.relax_params(BINARY, *plan, **more),
    "parq": lambda *plan, **more: brx.parq(SGD, BINARY, *plan, **more),
}
each = pytest.mark.parametrize("name", MADE)


@each
def test_a_continuation_is_lam_and_hard_from(name):
    grads = [{"kernel": normal(seed, 4, 2)} for seed in range(8)]
    both = {"one": MADE[name](PLAN), "two": MADE[name](*PLAN)}
    traces = traces_of(both, {"kernel": normal(0, 4, 2)}, grads)
    chex.assert_trees_all_equal(*traces.values())
    strengths = [float(brx.strength(state)) for _, state in traces["one"]]
    assert strengths[0] == 0 < strengths[3] < 1
    assert strengths[PLAN.hard_from :] == [1, 1]


@each
def test_a_continuation_and_hard_from_exclude_one_another(name):
    for given in ({"hard_from": 5}, {"hard_from": 0}, {"hard_from": PLAN.hard_from}):
        with pytest.raises(ValueError, match=r"hard_from=\d is given twice.* 6\. Leave hard_from"):
            MADE[name](PLAN, **given)


def test_a_continuation_is_no_function_for_inject_hyperparams():
    optimizer = optax.inject_hyperparams(brx.binary_relax)(SGD, BINARY, PLAN)
    state = optimizer.init({"kernel": jnp.ones((2, 2))})
    assert state.hyperparams == {}


@pytest.mark.parametrize("make", [brx.binary_relax, brx.relax_params, brx.binary_connect, brx.parq])
def test_options_are_keywords(make):
    parameters = inspect.signature(make).parameters
    for name in {"float_dtype", "track_flips", "proximal_map"} & parameters.keys():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert parameters["float_dtype"].default == "float32"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.float16, jnp.dtype("float32")])
def test_real_floating_dtypes_are_taken(dtype):
    state = jax.eval_shape(
        brx.binary_connect(SGD, BINARY, float_dtype=dtype).init,
        {"kernel": jax.ShapeDtypeStruct((2, 2), "float16")},
    )
    assert state.float_params["kernel"].dtype == jnp.promote_types("float16", dtype)


@pytest.mark.parametrize(
    "dtype",
    [
        "int32",
        "complex64",
        bool,
        "float33",
        None,
        3,
        "float8_e4m3fn",
        jnp.float8_e5m2,
        np.longdouble,
    ],
)
def test_other_dtypes_are_refused_at_once(dtype):
    for make in (MADE["binary_relax"], MADE["relax_params"], MADE["parq"]):
        with pytest.raises(ValueError, match=r"float_dtype must be a real floating dtype.*float32"):
            make(1.0, float_dtype=dtype)
    with pytest.raises(ValueError, match="float_dtype must be"):
        brx.binary_connect(SGD, BINARY, float_dtype=dtype)
