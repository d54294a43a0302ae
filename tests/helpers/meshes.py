"""What the tests on several devices share: a process that has them, and a network to train."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import brelax_jax as brx
from brelax_jax.sets._rules import Fit
from brelax_jax.transforms._grid import grid_of
from brelax_jax.transforms._state import find_states, fits_of, sets_of
from tests.helpers import oracles, quick

DEVICES = 8
MOVES = re.compile(r"= (?!.*fusion\().*(all-gather|all-to-all|collective-permute|reduce-scatter)\(")


def make_mesh(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def put(tree, specs, mesh):
    """The leaves of a tree, laid on a mesh as the specs say."""
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


# A network with kernels sharded in every way.

SHAPES = {"whole": (8, 8), "column": (8, 32), "row": (32, 16), "own": (16, 24), "head": (24, 4)}
SPECS = {
    "whole": {"kernel": P(), "bias": P()},
    "column": {"kernel": P(None, "model"), "bias": P("model")},
    "row": {"kernel": P("model", None), "bias": P()},
    "own": {"kernel": P(None, "model"), "bias": P("model")},
    "head": {"kernel": P("model", None), "bias": P()},
}
SETS = {
    "whole": brx.Binary(),
    "column": brx.Ternary(granularity=brx.PerTensor(axis_name="model")),
    "row": brx.Binary(granularity=brx.PerChannel(axis_name="model")),
    "own": brx.Uniform(3, granularity=brx.PerChannel()),
    "head": brx.TernaryThreshold(granularity=brx.PerBlock(2, axis=0)),
}
SIMPLE = {name: SETS[name] for name in ("whole", "row", "head")}  # without a search
WITHOUT_OWN = {name: qset for name, qset in SETS.items() if name != "own"}
STEPS = 6


def relaxation(sets=SETS):
    """Three steps of phase I, then phase II."""
    base = optax.sgd(0.1, momentum=0.9)
    return brx.binary_relax(
        base, rules(sets), lambda count: 1.0 + count, hard_from=3, track_flips=True
    )


def rules(sets):
    return brx.select(*((f"^{name}/kernel", qset) for name, qset in sets.items()))


def network():
    """The params."""
    rng = np.random.default_rng(0)
    return {
        name: {
            "kernel": (rng.laplace(size=shape) / shape[0] ** 0.5).astype(np.float32),
            "bias": np.zeros(shape[1], np.float32),
        }
        for name, shape in SHAPES.items()
    }


def batch(step):
    rng = np.random.default_rng(100 + step)
    return rng.standard_normal((32, 8)).astype("f4"), rng.standard_normal((32, 4)).astype("f4")


def loss(params, inputs, targets, contract=jnp.matmul):
    """The squared error; `contract` multiplies by the kernels that are sharded by rows."""
    x = jnp.tanh(inputs @ params["whole"]["kernel"] + params["whole"]["bias"])
    x = jnp.tanh(x @ params["column"]["kernel"] + params["column"]["bias"])
    x = jnp.tanh(contract(x, params["row"]["kernel"]) + params["row"]["bias"])
    x = jnp.tanh(x @ params["own"]["kernel"] + params["own"]["bias"])
    x = contract(x, params["head"]["kernel"]) + params["head"]["bias"]
    return jnp.mean(jnp.square(x - targets))


@functools.cache
def start_on(mesh):
    """The params, and the state by an `init` outside of `jit`: both lie as the specs say."""
    with jax.set_mesh(mesh):
        params = put(network(), SPECS, mesh)
        return params, relaxation().init(params)


def updated(optimizer, grads, state, params):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def trained(gradient, update, params, state, steps=STEPS):
    """(params, state) before the first step and after each."""
    yield params, state
    for step in range(steps):
        params, state = update(gradient(params, *batch(step)), state, params)
        yield params, state


gradient_of_loss = quick.jit(jax.grad(loss))


@functools.cache
def on_one_device():
    """(params, state) before the first step and after each, without a mesh."""
    return alone(relaxation())


def alone(optimizer):
    params = jax.tree.map(jnp.asarray, network())
    state = quick.jit(optimizer.init)(params)
    update = quick.jit(functools.partial(updated, optimizer))
    return [jax.device_get(at) for at in trained(gradient_of_loss, update, params, state)]


def assert_same(state, expected, sets=SETS, rtol=1e-6):
    """Float weights and scales are equal to rounding, and codes but where a weight is at a
    threshold."""
    found, wanted = ({n: kernel_of(tree, n) for n in sets} for tree in (state, expected))
    found, wanted = (jax.device_get(with_codes(kernels)) for kernels in (found, wanted))
    for name, qset in sets.items():
        (y, fit, codes, _), (wanted_y, wanted_fit, wanted_codes, step) = found[name], wanted[name]
        np.testing.assert_allclose(y, wanted_y, rtol=rtol, atol=rtol / 10, err_msg=name)
        # Stored scales are rounded to a grid, so the last bit may make a step of it.
        assert np.all(np.abs(fit.scale - wanted_fit.scale) <= step + rtol * wanted_fit.scale), name
        assert_same_codes(qset, codes, wanted_codes, wanted_y, wanted_fit, rtol)


def kernel_of(tree, name):
    """The float weights and the fit of a layer's kernel."""
    state = find_states(tree)[0]
    fit = fits_of(state, sets_of(state, {}))[f"{name}/kernel"]
    return jax.device_get((state.float_params[name]["kernel"], fit))


@quick.jit
def with_codes(kernels):
    """By name (float weights, fit) → (float weights, fit, codes, distance to the next scale)."""
    return {
        name: (
            y,
            fit,
            SETS[name].codes(y, fit),
            grid_of(fit.scale, SETS[name], "float32").spacing,
        )
        for name, (y, fit) in kernels.items()
    }


def placed(qset, w):
    """The codes and the fit of a whole weight, its scales found by NumPy."""
    groups = qset.granularity.groups(w.shape)
    view = np.moveaxis(w.reshape(groups.view), groups.axes, range(-len(groups.axes), 0))
    rows = view.reshape(-1, groups.size)
    if isinstance(qset, brx.TernaryThreshold):
        found = [oracles.ternary_threshold(row, qset.factor)[1:] for row in rows]
        scales = [[scale for scale, _ in found], [2 * cut for _, cut in found]]
    else:
        scales = [[oracles.optimum(row, qset.levels)[0] for row in rows]]
    fit = Fit(*(np.reshape(scale, groups.scale) for scale in scales))
    return quick.jit(qset.codes)(w, fit), fit


def assert_same_codes(qset, codes, expected, w, fit, rtol=1e-6):
    """Codes are equal, but where w is at a threshold between two of them."""
    groups = qset.granularity.groups(w.shape)
    a, scale = np.abs(w).reshape(groups.view), np.asarray(fit.scale).reshape(groups.scale_view)
    if fit.code_scale is not None:
        scale = np.asarray(fit.code_scale).reshape(groups.scale_view)
    thresholds = [scale * (m + n) / 2 for m, n in itertools.pairwise(qset.magnitudes)]
    near = [np.abs(a - threshold) <= rtol * threshold for threshold in thresholds]
    near += [a <= rtol * scale] * (qset.magnitudes[0] > 0)  # there the sign changes
    equal = np.asarray(codes) == np.asarray(expected)
    assert np.all(equal | np.any(near, axis=0).reshape(w.shape)), np.sum(~equal)
