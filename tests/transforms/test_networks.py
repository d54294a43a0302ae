"""One small network in Flax Linen, Flax NNX, Equinox and plain pytrees: same rules, same results.

Kernels are `kernel`, (in, out), in Flax and in the plain version, `weight`, (out, in), in Equinox.
"""

import functools
from typing import NamedTuple

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

import brelax_jax as brx
from tests.helpers.training import array

pytestmark = pytest.mark.usefixtures("quickly_compiled")

WORDS, FEATURES, WIDTH, CLASSES = 7, 4, 8, 3
EPS = 1e-5
STEPS, HARD_FROM = 24, 16
RULES = brx.select(
    ("^embed/", None),
    ("^first/(kernel|weight)$", brx.Binary()),
    ("^head/", None),
    default=brx.Ternary(),
)
OPTIMIZER = brx.binary_relax(
    optax.adamw(0.02, weight_decay=0.01), RULES, brx.geometric_continuation(0.5, 1.2), HARD_FROM
)


class Linen(linen.Module):
    """The network in Flax Linen."""

    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(WORDS, FEATURES, name="embed")(tokens).mean(axis=1)
        x = linen.Dense(WIDTH, name="first")(x)
        x = linen.relu(linen.LayerNorm(EPS, name="norm")(x))
        x = linen.relu(linen.Dense(WIDTH, name="second")(x))
        return linen.Dense(CLASSES, name="head")(x)


class Nnx(nnx.Module):
    """The network in Flax NNX."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, FEATURES, rngs=rngs)
        self.first = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, epsilon=EPS, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens).mean(axis=1)
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(nnx.relu(self.second(x)))


class Equinox(eqx.Module):
    """The network in Equinox, for one example."""

    embed: eqx.nn.Embedding
    first: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    second: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(WORDS, FEATURES, key=keys[0])
        self.first = eqx.nn.Linear(FEATURES, WIDTH, key=keys[1])
        self.norm = eqx.nn.LayerNorm(WIDTH, eps=EPS)
        self.second = eqx.nn.Linear(WIDTH, WIDTH, key=keys[2])
        self.head = eqx.nn.Linear(WIDTH, CLASSES, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens).mean(axis=0)
        x = jax.nn.relu(self.norm(self.first(x)))
        return self.head(jax.nn.relu(self.second(x)))


def plain(params, tokens):
    """The network as a function of nested dicts."""

    def dense(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    x = dense("first", params["embed"]["embedding"][tokens].mean(axis=1))
    x = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + EPS)
    x = jax.nn.relu(x * params["norm"]["scale"] + params["norm"]["bias"])
    return dense("head", jax.nn.relu(dense("second", x)))


@functools.cache
def weights():
    """Where every network starts: nested dicts, as Linen names them."""
    rng = np.random.default_rng(0)

    def dense(rows, columns):
        kernel = rng.standard_normal((rows, columns)) / np.sqrt(rows)
        return {"kernel": kernel, "bias": 0.1 * rng.standard_normal(columns)}

    params = {
        "embed": {"embedding": rng.standard_normal((WORDS, FEATURES))},
        "first": dense(FEATURES, WIDTH),
        "norm": {"scale": np.ones(WIDTH), "bias": np.zeros(WIDTH)},
        "second": dense(WIDTH, WIDTH),
        "head": dense(WIDTH, CLASSES),
    }
    return jax.tree.map(array, params)


@functools.cache
def batches():
    rng = np.random.default_rng(1)
    return [
        (
            array(rng.integers(0, WORDS, (16, 5)), "int32"),
            array(rng.integers(0, CLASSES, 16), "int32"),
        )
        for _ in range(STEPS)
    ]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Run(NamedTuple):
    """What training left, every tree named as Linen names it."""

    losses: list
    params: dict
    floats: dict
    quantized: dict


def read(opt_state, params, as_dict=lambda tree: tree):
    return [
        jax.tree.map(np.asarray, as_dict(tree))
        for tree in (
            params,
            brx.float_params(opt_state, params),
            brx.quantized_params(opt_state, params),
        )
    ]


def train_linen():
    state = train_state.TrainState.create(
        apply_fn=Linen().apply, params=jax.tree.map(jnp.copy, weights()), tx=OPTIMIZER
    )

    @jax.jit
    def step(state, tokens, labels):
        def loss(params):
            return cross_entropy(state.apply_fn({"params": params}, tokens), labels)

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for batch in batches():
        state, value = step(state, *batch)
        losses.append(float(value))
    return Run(losses, *read(state.opt_state, state.params))


def nnx_model():
    model = nnx.eval_shape(lambda: Nnx(nnx.Rngs(0)))  # its arrays are replaced
    nnx.update(model, nnx.State(jax.tree.map(jnp.copy, weights())))
    return model


@nnx.jit
def nnx_step(model, optimizer, tokens, labels):
    def loss(model):
        return cross_entropy(model(tokens), labels)

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


def nnx_dict(tree):
    return nnx.to_pure_dict(tree)


def train_nnx(interrupted=False):
    """Interrupted: the model and the optimizer are split to arrays and merged at every step."""
    model = nnx_model()
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    losses = []
    for batch in batches():
        if interrupted:
            graph, state = nnx.split((model, optimizer))
            model, optimizer = nnx.merge(graph, jax.tree.map(jnp.copy, state))
        losses.append(float(nnx_step(model, optimizer, *batch)))
    return Run(losses, *read(optimizer.opt_state, nnx.state(model, nnx.Param), nnx_dict))


DENSE = ("first", "second", "head")


def equinox_model():
    params, model = weights(), eqx.filter_eval_shape(Equinox, jax.random.key(0))
    new = [params[name]["kernel"].T for name in DENSE]
    new += [params[name]["bias"] for name in (*DENSE, "norm")]
    new += [params["norm"]["scale"], params["embed"]["embedding"]]

    def where(model):
        layers = [getattr(model, name) for name in DENSE]
        weights = [layer.weight for layer in layers] + [layer.bias for layer in layers]
        return [*weights, model.norm.bias, model.norm.weight, model.embed.weight]

    return eqx.tree_at(where, model, new)


def equinox_dict(model):
    named = {
        name: {"kernel": getattr(model, name).weight.T, "bias": getattr(model, name).bias}
        for name in DENSE
    }
    norm = {"scale": model.norm.weight, "bias": model.norm.bias}
    return {**named, "norm": norm, "embed": {"embedding": model.embed.weight}}


def train_equinox():
    model = equinox_model()
    state = OPTIMIZER.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, tokens, labels):
        def loss(model):
            return cross_entropy(jax.vmap(model)(tokens), labels)

        value, grads = eqx.filter_value_and_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = OPTIMIZER.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, value

    losses = []
    for batch in batches():
        model, state, value = step(model, state, *batch)
        losses.append(float(value))
    params = eqx.filter(model, eqx.is_inexact_array)
    return Run(losses, *read(state, params, equinox_dict))


def train_plain():
    params = jax.tree.map(jnp.copy, weights())
    state = OPTIMIZER.init(params)

    @jax.jit
    def step(params, state, tokens, labels):
        value, grads = jax.value_and_grad(
            lambda params: cross_entropy(plain(params, tokens), labels)
        )(params)
        updates, state = OPTIMIZER.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for batch in batches():
        params, state, value = step(params, state, *batch)
        losses.append(float(value))
    return Run(losses, *read(state, params))


TRAINED = {
    "Linen": functools.cache(train_linen),
    "NNX": functools.cache(train_nnx),
    "Equinox": functools.cache(train_equinox),
    "plain": functools.cache(train_plain),
}
every_network = pytest.mark.parametrize("name", TRAINED)


@every_network
def test_the_same_rules_give_the_same_results(name):
    """To rounding: the networks' own sums are in different orders."""
    run, wanted = TRAINED[name](), TRAINED["plain"]()
    np.testing.assert_allclose(run.losses, wanted.losses, rtol=1e-4)
    chex.assert_trees_all_close(run[1:], wanted[1:], rtol=1e-3, atol=1e-4)
    assert wanted.losses[-1] < 0.9 * wanted.losses[0]


@every_network
def test_phase_two_is_exact(name):
    run = TRAINED[name]()
    chex.assert_trees_all_equal(run.params, run.quantized)
    kernels = {layer: run.params[layer]["kernel"] for layer in DENSE}
    counts = {layer: len(np.unique(kernel)) for layer, kernel in kernels.items()}
    assert counts == {"first": 2, "second": 3, "head": WIDTH * CLASSES}
    for layer in ("first", "second"):
        assert len(np.unique(run.floats[layer]["kernel"])) > WIDTH
        np.testing.assert_array_equal(run.params[layer]["bias"], run.floats[layer]["bias"])


def test_nnx_goes_on_after_split_and_merge_at_every_step():
    run, wanted = train_nnx(interrupted=True), TRAINED["NNX"]()
    chex.assert_trees_all_equal(run, wanted)


PARAMS = {
    "Linen": weights,
    "NNX": lambda: nnx.state(nnx_model(), nnx.Param),
    "Equinox": lambda: eqx.filter(equinox_model(), eqx.is_inexact_array),
    "plain": weights,
}


@pytest.mark.parametrize("name", PARAMS)
def test_what_one_set_alone_applies_to(name):
    """Kernels. Equinox calls them and its embedding `weight`; a parent's name tells these apart."""
    params = PARAMS[name]()
    optimizer = brx.binary_connect(optax.sgd(0.1), brx.Binary())
    found = set(jax.eval_shape(brx.metrics, jax.eval_shape(optimizer.init, params), params))
    kernel = "weight" if name == "Equinox" else "kernel"
    assert found == {f"{layer}/{kernel}" for layer in DENSE}


def test_kernels_of_scanned_layers_have_scales_of_their_own():
    class Layer(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(WIDTH)(x), None

    stack = linen.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    params = jax.eval_shape(stack().init, jax.random.key(0), jnp.ones((3, WIDTH)))["params"]
    scales = {}
    for axis in (None, 0, (0, -1)):
        granularity = brx.PerTensor() if axis is None else brx.PerChannel(axis)
        optimizer = brx.binary_connect(optax.sgd(0.1), brx.Binary(granularity=granularity))
        state = jax.eval_shape(optimizer.init, params)
        [leaf] = jax.eval_shape(brx.metrics, state, params).values()
        scales[axis] = leaf.scale.shape
    assert scales == {None: (1, 1, 1), 0: (2, 1, 1), (0, -1): (2, 1, WIDTH)}
