"""What the fuzz test draws: *programs* (tree, sets, form, base, wrapper), and *values* to run each
on (weights, gradients, λ of each step, `hard_from`, the count to start from).
"""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import strategies as st

import brelax_jax as brx

STEPS = 12
LAST = 2**31 - 1
SHAPES = ((4, 6), (6, 4), (2, 3, 4), (5, 1), (1, 1), (7,), (), (0, 3), (3, 0))
DTYPES = ("float32", "float32", "bfloat16", "float16")
SETS = (
    brx.Binary(),
    brx.Ternary(),
    brx.Ternary(rule=brx.LeastSquares(0.05)),
    brx.TernaryThreshold(),
    brx.TernaryThreshold(0.1),
    brx.Uniform(3),
    brx.Uniform(8),
    brx.PowerOfTwo(4),
    brx.PowerOfTwo(5),
    brx.ScaledLevels((-3, -1, 1, 3)),
    brx.ScaledLevels((-1.7, -0.3, 0, 0.3, 1.7)),
)
NAMES = ("kernel", "bias", "scale", "embedding", "w", "0")
BASES = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adam": optax.adam(0.05, eps=1e-4),
    "adamw": optax.adamw(0.05, eps=1e-4, weight_decay=0.1),
}
FORMS = ("binary_relax", "relax_params", "binary_connect", "parq", "proxquant")
MAPS = {"parq": brx.PiecewiseAffine(), "proxquant": brx.SoftThreshold(updates_float_params=True)}
LAMBDAS = (0.0, 1e-45, 1e-30, 0.3, 1.0, 50.0, 1e6, 1e9, 3e38, np.inf)

Pair = collections.namedtuple("Pair", ["kernel", "other"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A user's own pytree."""

    kernel: Any
    bias: Any


@dataclasses.dataclass
class Leaf:
    """One array of the params: no pytree, so a leaf of the tree of specifications."""

    shape: tuple[int, ...]
    dtype: str
    qset: brx.QuantizedSet | None

    def __repr__(self):
        return f"{self.dtype}{self.shape}→{self.qset}"


@st.composite
def leaves(draw, on_set=False):
    shape = draw(st.sampled_from(SHAPES[:-2] if on_set else SHAPES))
    if not on_set and draw(st.integers(0, 5)) == 5:
        return Leaf(shape, draw(st.sampled_from(("int32", "bool"))), None)
    qset = draw(st.sampled_from(SETS) if on_set else st.none() | st.sampled_from(SETS))
    if qset is not None:
        granularity = draw(st.sampled_from(granularities(shape)))
        qset = dataclasses.replace(qset, granularity=granularity)
    return Leaf(shape, draw(st.sampled_from(DTYPES)), qset)


def granularities(shape):
    """Every granularity of a few that fits."""
    rank = len(shape)
    channels = [brx.PerChannel(axis) for axis in ((-1, 0) if rank else ())]
    channels += [brx.PerChannel((0, -1))] * (rank > 1)
    blocks = [brx.PerBlock(2, axis) for axis in range(rank) if shape[axis] % 2 == 0]
    return [brx.PerTensor(), *channels, *blocks]


def containers(children):
    absent = st.none() | st.builds(optax.MaskedNode)
    some = children | absent
    return (
        st.dictionaries(st.sampled_from(NAMES), some, max_size=3)
        | st.lists(some, max_size=3)
        | st.lists(some, max_size=3).map(tuple)
        | st.builds(Layer, some, some)
        | st.builds(Pair, some, some)
    )


WRAPPERS = {
    "none": lambda inner, mask: inner,
    "chain": lambda inner, mask: optax.chain(optax.identity(), inner),
    "masked": optax.masked,
    "MultiSteps": lambda inner, mask: optax.MultiSteps(inner, 2).gradient_transformation(),
    "apply_if_finite": lambda inner, mask: optax.apply_if_finite(inner, LAST),
}


@dataclasses.dataclass
class Program:
    """What is compiled.

    `one_set` is given in the place of rules, and falls on kernels by their names. A `fault` makes
    `init` refuse the params.
    """

    tree: Any
    form: str
    base: str
    wrapper: str
    one_set: brx.QuantizedSet | None
    fault: str | None
    has_hard_from: bool
    track_flips: bool

    def __post_init__(self):
        if self.one_set is not None:
            for path, leaf in self.leaves().items():
                leaf.qset = self.one_set if is_kernel(path, leaf) else None

    def leaves(self):
        """path → Leaf."""
        return {
            jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
            for keys, leaf in jax.tree_util.tree_leaves_with_path(self.tree)
        }

    def quantized(self):
        """Those that are on a set: empty ones never are."""
        return {p: leaf for p, leaf in self.leaves().items() if leaf.qset and 0 not in leaf.shape}

    def rules(self):
        if self.one_set is not None:
            return self.one_set
        seen = self.quantized() if self.wrapper == "masked" else self.leaves()
        rules = [(f"^{path}$", leaf.qset) for path, leaf in seen.items()]
        return brx.select(*FAULTS[self.fault], *rules)

    def optimizer(self, lam, hard_from):
        base, wrap = BASES[self.base], WRAPPERS[self.wrapper]
        hard_from = hard_from if self.has_hard_from else None
        if self.form == "relax_params":
            link = brx.relax_params(self.rules(), lam, hard_from, track_flips=self.track_flips)
            inner = optax.chain(base, link)
        elif self.form == "binary_connect":
            inner = brx.binary_connect(base, self.rules(), track_flips=self.track_flips)
        else:
            inner = brx.binary_relax(
                base,
                self.rules(),
                lam,
                hard_from,
                track_flips=self.track_flips,
                proximal_map=MAPS.get(self.form, brx.Relaxation()),
            )
        return wrap(inner, self.mask)

    def mask(self, tree):
        on_set = self.quantized()
        return map_paths(lambda path, _: path in on_set, tree)

    def base_alone(self):
        """What moves the float weights, under the same wrapper."""
        return WRAPPERS[self.wrapper](BASES[self.base], self.mask)

    def moves_as_base_alone(self, leaf):
        """Not where a map moves them, decay acts on params, or gradients are rounded first."""
        wide = leaf.dtype == "float32"
        if self.form == "proxquant":
            return False
        if self.form == "relax_params":
            return wide and self.base != "adamw"
        return wide or self.wrapper != "MultiSteps"


FAULTS = {
    None: [],
    "nothing matches": [("no such leaf", None)],
    "no such axis": [("", brx.Binary(granularity=brx.PerChannel(9)))],
    "not floating": [("", brx.Ternary())],
}


def is_kernel(path, leaf):
    """What `select` documents of its default."""
    name = path.split("/")[-1]
    return (
        leaf.dtype.endswith(("float16", "float32"))
        and len(leaf.shape) >= 2
        and name not in ("bias", "scale", "embedding")
    )


def map_paths(function, tree):
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: function(jax.tree_util.keystr(keys, simple=True, separator="/"), leaf),
        tree,
    )


@st.composite
def programs(draw):
    rest = st.recursive(leaves(), containers, max_leaves=3)
    together = draw(st.sampled_from((Layer, Pair, lambda *parts: parts, lambda *parts: [*parts])))
    tree = together(draw(leaves(on_set=True)), draw(rest))
    program = Program(
        tree,
        draw(st.sampled_from(FORMS)),
        draw(st.sampled_from(list(BASES))),
        draw(st.sampled_from(list(WRAPPERS))),
        draw(st.none() | st.none() | st.sampled_from(SETS)),
        None,
        draw(st.booleans()),
        draw(st.booleans()),
    )
    if program.one_set is None and draw(st.integers(0, 7)) == 7:
        program.fault = draw(st.sampled_from([fault for fault in FAULTS if fault]))
        program.wrapper = "none"
    kinds = {leaf.dtype for leaf in program.leaves().values()}
    # Adam and momentum alone refuse, or turn to floats, what is not floating.
    if kinds & {"int32", "bool"} and program.wrapper != "masked":
        program.base = "sgd"
        if program.wrapper == "apply_if_finite":  # it refuses them too
            program.wrapper = "none"
    return program


WEIGHTS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "zero": lambda rng, shape: np.zeros(shape),
    "zeros of both signs": lambda rng, shape: rng.choice([0.0, -0.0], shape),
    "few values": lambda rng, shape: rng.choice([-2.0, -1.0, 0.0, 1.0], shape),
    "one large": lambda rng, shape: rng.standard_normal(shape) * rng.choice([1, 1e4], shape),
    "heavy tails": lambda rng, shape: rng.standard_cauchy(shape) ** 3,
    "huge": lambda rng, shape: rng.standard_normal(shape) * 1e37,
    "tiny": lambda rng, shape: rng.standard_normal(shape) * 1e-30,
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 1e-40,
    "NaN": lambda rng, shape: np.where(rng.random(shape) < 0.2, np.nan, 1.0),
    "infinity": lambda rng, shape: np.where(rng.random(shape) < 0.2, -np.inf, 1.0),
}


@dataclasses.dataclass
class Values:
    """The arguments of a compiled program.

    `weights` and `grads` hold for each leaf a kind of values and a seed; gradients also a factor.
    """

    weights: list
    grads: list
    lams: list[float]
    hard_after: int
    first: int

    @property
    def hard_from(self):
        return min(self.first + self.hard_after, LAST)

    def arguments(self, program):
        leaves, tree = jax.tree.flatten(program.tree)
        params = [
            array(*drawn, leaf.shape, leaf.dtype)
            for drawn, leaf in zip(self.weights, leaves, strict=True)
        ]
        grads = [
            factor * array(kind, seed, (STEPS, *leaf.shape), leaf.dtype)
            for (kind, seed, factor), leaf in zip(self.grads, leaves, strict=True)
        ]
        grads = [grad.astype(leaf.dtype) for grad, leaf in zip(grads, leaves, strict=True)]
        return (
            tree.unflatten(params),
            tree.unflatten(grads),
            jnp.array(self.lams, jnp.float32),
            jnp.int32(self.hard_from),
            jnp.int32(self.first),
        )


def array(kind, seed, shape, dtype):
    rng = np.random.default_rng(seed)
    if dtype in ("int32", "bool"):
        return jnp.asarray(rng.integers(0, 2, shape), dtype)
    with np.errstate(over="ignore"):
        return jnp.asarray(WEIGHTS[kind](rng, shape), "float32").astype(dtype)


@st.composite
def values(draw, program):
    seed, kind = st.integers(0, 999), st.sampled_from(list(WEIGHTS))
    every, count = st.sampled_from(LAMBDAS), len(program.leaves())
    factor = st.sampled_from((1.0, 0.0, 1e-3, 30.0))
    return Values(
        weights=draw(lists(st.tuples(kind, seed), count)),
        grads=draw(lists(st.tuples(kind, seed, factor), count)),
        lams=draw(every.map(lambda lam: [lam] * STEPS) | lists(every, STEPS)),
        hard_after=draw(st.integers(0, STEPS + 3)),
        first=draw(st.sampled_from((0, 12345, LAST - 5, LAST))),
    )


def lists(elements, size):
    return st.lists(elements, min_size=size, max_size=size)
