"""Weights and training loops that several test files share.

`init` runs outside jit, as users call it: there arrays of one shape share what is compiled for
them, whatever the optimizer.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import brelax_jax as brx


def array(values, dtype="float32"):
    """An array of JAX for which nothing is compiled, as for those that `jnp` makes."""
    return jax.device_put(np.asarray(values).astype(dtype))


def ones(*shape):
    return array(np.ones(shape))


def normal(seed, *shape, dtype="float32"):
    return array(np.random.default_rng(seed).standard_normal(shape), dtype)


def spoilt(x, place, value=np.nan):
    """A copy with another value at a place."""
    x = np.array(x)
    x[place] = value
    return x


@functools.cache
def compiled(*optimizers):
    """One training step of each, in one program: XLA compiles once what they have in common."""

    @jax.jit
    def step(grads, carries, **kwargs):
        after = []
        for optimizer, (params, state) in zip(optimizers, carries, strict=True):
            updates, state = optimizer.update(grads, state, params, **kwargs)
            after.append((optax.apply_updates(params, updates), state))
        return after

    return step


def traces_of(optimizers, params, grads, state=None, **kwargs):
    """For each of some named optimizers the params and states after each of some updates."""
    step, trace = compiled(*optimizers.values()), []
    states = [o.init(params) if state is None else state for o in optimizers.values()]
    carries = [(params, state) for state in states]
    for grad in grads:
        carries = step(grad, carries, **kwargs)
        trace.append(carries)
    return dict(zip(optimizers, zip(*trace, strict=True), strict=True))


def trace_of(optimizer, params, grads, state=None, **kwargs):
    """The params and states after each of some updates."""
    return traces_of({"one": optimizer}, params, grads, state, **kwargs)["one"]


RULES = brx.select(
    ("^binary/kernel", brx.Binary(granularity=brx.PerChannel())),
    ("^threshold/kernel", brx.TernaryThreshold()),
    ("^half/kernel", brx.Binary(granularity=brx.PerBlock(2, axis=0))),
)
QUANTIZED = ("binary", "threshold", "half")


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: {
            "kernel": array(rng.standard_normal((4, 3)), dtype),
            "bias": array(rng.standard_normal(3)),
        }
        for name, dtype in {
            "binary": "float32",
            "threshold": "float32",
            "half": "bfloat16",
            "plain": "float32",
        }.items()
    }


@functools.lru_cache(maxsize=None, typed=True)
def relaxing(lam=1.0, hard_from=8, rules=RULES, base=None):
    return brx.binary_relax(base or optax.sgd(0.05, momentum=0.5), rules, lam, hard_from)


@jax.jit
def gradients(params, t):
    return jax.tree.map(lambda p: jnp.cos(3 * p + t.astype(p.dtype)), params)


def steps(optimizer, params, count, state=None):
    """The params and the state after some updates, each by the cosine of the params."""
    step = compiled(optimizer)
    state = optimizer.init(params) if state is None else state
    for t in range(count):
        [(params, state)] = step(gradients(params, jnp.float32(t)), [(params, state)])
    return params, state
