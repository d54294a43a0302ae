"""Optax's tools for states, and JAX's strict modes: clean wherever `optax.adamw` is."""

import contextlib
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from optax.tree_utils import NamedTupleKey

import brelax_jax as brx
from tests.helpers import covering
from tests.helpers.training import array, trace_of

pytestmark = pytest.mark.usefixtures("quickly_compiled")

PARAMS = {
    "dense": {"kernel": array(np.arange(12.0).reshape(4, 3) - 5), "bias": array(np.zeros(3))},
    "low": {"kernel": array(np.linspace(-1, 1, 8).reshape(4, 2), "bfloat16")},
}
SPECS = {"dense": {"kernel": P("data", "model"), "bias": P()}, "low": {"kernel": P(None, "model")}}
RULES = brx.select(
    ("^dense/kernel", brx.TernaryThreshold(granularity=brx.PerChannel())), default=brx.Binary()
)
OPTIMIZERS = {
    "alone": lambda rules, **options: brx.binary_relax(optax.adamw(0.1), rules, 1.0, 3, **options),
    "tracking": lambda rules: brx.binary_relax(
        optax.adamw(0.1), rules, brx.continuation(8), track_flips=True
    ),
    "in MultiSteps": lambda rules: optax.MultiSteps(
        brx.binary_connect(optax.adamw(0.1), rules), 2
    ).gradient_transformation(),
    "last in a chain": lambda rules: optax.chain(
        optax.adam(0.1), brx.relax_params(rules, brx.linear_continuation(2))
    ),
}


@functools.cache
def optimizer_of(name):
    return OPTIMIZERS[name](RULES)


def two(*names):
    """The suite has two of the optimizers, `make soak` the others."""
    return pytest.mark.parametrize("name", covering.some(OPTIMIZERS, names))


def is_masked(node):
    return isinstance(node, optax.MaskedNode)


@two("tracking", "last in a chain")
def test_specs_of_a_whole_state_in_one_call(name):
    optimizer = optimizer_of(name)
    state = jax.eval_shape(optimizer.init, PARAMS)
    specs = optax.tree.map_params(
        optimizer,
        lambda leaf, spec: leaf if is_masked(leaf) else spec,
        state,
        SPECS,
        transform_non_params=lambda _: P(),
        is_leaf=is_masked,
    )
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    shardings = jax.tree.map(lambda spec: jax.sharding.NamedSharding(mesh, spec), specs)
    state = jax.jit(optimizer.init, out_shardings=shardings)(PARAMS)
    ours = optax.tree.get(state, "float_params")
    assert ours["dense"]["kernel"].sharding.spec == P("data", "model")
    scales = optax.tree.get(state, "scales")
    assert [scale.sharding.spec for scale in scales.values()] == [P(), P()]


@two("alone", "in MultiSteps")
def test_zeros_in_the_place_of_what_is_like_params_leave_the_scales(name):
    optimizer = optimizer_of(name)
    _, state = trace_of(optimizer, PARAMS, [PARAMS] * 2)[-1]
    mapped = optax.tree.map_params(optimizer, np.zeros_like, state)
    before, after = (optax.tree.get(tree, "scales") for tree in (state, mapped))
    for path, scale in jax.tree.map(np.asarray, before).items():
        np.testing.assert_array_equal(after[path], scale)
        assert np.all(scale > 0)
    for y in jax.tree.leaves(optax.tree.get(mapped, "float_params")):
        assert not np.any(y)


def of_ours(path, value):
    """A filter that names the state of this library."""
    keys = [key for key in path if isinstance(key, NamedTupleKey)]
    return bool(keys) and keys[-1].tuple_name == "BinaryRelaxState"


@two("in MultiSteps", "last in a chain")
def test_get_and_set_of_count_and_lam(name):
    """Set, the count says where in the schedule the next update is; λ is that of the last one."""
    optimizer = optimizer_of(name)
    state = optimizer.init(PARAMS)
    assert optax.tree.get(state, "count", filtering=of_ours) == 0
    later = optax.tree.set(state, of_ours, count=array(100, "int32"), lam=array(2.0))
    assert optax.tree.get(later, "count", filtering=of_ours) == 100
    assert brx.strength(later) == pytest.approx(2 / 3)
    counts = [leaf for _, leaf in optax.tree.get_all_with_path(later, "count")]
    assert len(counts) > 1
    assert sorted(set(map(int, counts))) == [0, 100]
    _, later = trace_of(optimizer, PARAMS, [PARAMS] * 2, later)[-1]  # MultiSteps: in the second
    assert brx.strength(later) == 1


STRICT = {
    "infinities": {"jax_debug_infs": True},
    "NaN": {"jax_debug_nans": True},
    "ranks": {"jax_numpy_rank_promotion": "raise"},
    "dtypes": {"jax_numpy_dtype_promotion": "strict"},
    "no jit": {"jax_disable_jit": True},
    "no jit, every set": {"jax_disable_jit": True},  # takes long, operation by operation
    "tracer leaks": {"jax_check_tracer_leaks": True},
}
EVERY_SET = {
    "binary": brx.Binary(),
    "ternary": brx.Ternary(granularity=brx.PerChannel(), rule=brx.LeastSquares(0.01)),
    "threshold": brx.TernaryThreshold(granularity=brx.PerBlock(2, 0)),
}


@contextlib.contextmanager
def strict(settings):
    before = {key: jax.config.values[key] for key in settings}
    for key, value in settings.items():
        jax.config.update(key, value)
    try:
        yield
    finally:
        for key, value in before.items():
            jax.config.update(key, value)


def everything(optimizer, params, transform=lambda function: function):
    """An update in phase II, and whatever is read."""
    state = transform(optimizer.init)(params)
    updates, state = transform(optimizer.update)(jax.tree.map(jnp.cos, params), state, params)
    params = optax.apply_updates(params, updates)
    read = brx.quantized_params, brx.float_params, brx.quantized_tree, brx.with_float_params
    return [function(state, params) for function in read], brx.strength(state)


@pytest.mark.parametrize("mode", covering.some(STRICT, STRICT.keys() - {"no jit, every set"}))
def test_strict_modes(mode):
    rng = np.random.default_rng(0)
    dtypes = ["float32", "bfloat16"] if mode == "dtypes" else ["float32"]
    sets = {"binary": EVERY_SET["binary"]} if mode == "no jit" else EVERY_SET
    params = {
        f"{name} {dtype}": array(
            rng.standard_normal((400, 3) if "large" in name else (4, 3)), dtype
        )
        for name in sets
        for dtype in dtypes
    }
    rules = brx.select(*((f"^{name} ", qset) for name, qset in sets.items()))
    base = optax.sgd(0.1, 0.9)  # with strict dtypes Adam fails by itself
    optimizer = brx.binary_relax(base, rules, brx.linear_continuation(1), 0)
    with strict(STRICT[mode]):
        if mode in ("ranks", "dtypes", "tracer leaks"):  # of these tracing knows
            jax.eval_shape(lambda params: everything(optimizer, params), params)
        else:
            assert everything(optimizer, params)[1] == 1
        if mode in ("infinities", "NaN"):
            assert everything(optimizer, params, jax.jit)[1] == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_functions_with_strict_dtypes(dtype):
    sets = [*EVERY_SET.values(), brx.Ternary(), brx.Uniform(4), brx.formats.nvfp4(axis=0)]

    def every(w, lam):
        return [
            (
                qset.project(w),
                brx.dequantize(qset.quantize(w)),
                brx.relax(w, qset, lam),
                jax.grad(lambda w, qset=qset: brx.moreau_envelope(w, qset, lam).astype("float32"))(
                    w
                ),
            )
            for qset in sets
        ]

    with strict(STRICT["dtypes"]):
        of_dtype = jax.ShapeDtypeStruct((80, 3), dtype)
        found = jax.eval_shape(every, of_dtype, jax.ShapeDtypeStruct((), "float32"))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(dtype)}


def test_flax_serialization_may_be_imported_after_the_state_is_made():
    program = (
        "import jax.numpy as jnp, optax, brelax_jax as brx; "
        "params = {'kernel': jnp.eye(3), 'bias': jnp.zeros(3)}; "
        "optimizer = brx.binary_relax(optax.adam(1e-3), brx.Binary(), 1.0, track_flips=True); "
        "state = optimizer.init(params); "
        "from flax import serialization; "
        "data = serialization.to_bytes(state); "
        "again = serialization.from_bytes(optimizer.init(params), data); "
        "assert type(again) is type(state) and again.sets == state.sets"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
