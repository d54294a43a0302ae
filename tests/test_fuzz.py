"""Any tree, any set, any λ, any count, any value: hypothesis looks for what breaks.

A drawn *program* (tree, sets, form, base, wrapper) is compiled once and run on many drawn *values*
(weights, gradients, λ of each step, `hard_from`, the count to start from).
"""

import collections
import dataclasses
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import brelax_jax as brx
from tests.test_exactness import bits

STEPS = 12
LAST = 2**31 - 1
SHAPES = ((4, 6), (6, 4), (2, 3, 4), (5, 1), (1, 1), (7,), (), (0, 3), (3, 0))
DTYPES = ("float32", "float32", "bfloat16", "float16")
SETS = (
    brx.Binary(),
    brx.Ternary(),
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
FORMS = ("binary_relax", "relax_params", "binary_connect")
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
        elif self.form == "binary_relax":
            inner = brx.binary_relax(
                base, self.rules(), lam, hard_from, track_flips=self.track_flips
            )
        else:
            inner = brx.binary_connect(base, self.rules(), track_flips=self.track_flips)
        return wrap(inner, self.mask)

    def mask(self, tree):
        on_set = self.quantized()
        return map_paths(lambda path, _: path in on_set, tree)

    def base_alone(self):
        """What moves the float weights, under the same wrapper."""
        return WRAPPERS[self.wrapper](BASES[self.base], self.mask)

    def moves_as_base_alone(self, leaf):
        """Not where decay acts on the params, or gradients are rounded first."""
        wide = leaf.dtype == "float32"
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


def kinds(tree):
    """What no update may change."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, jax.typeof(x).weak_type), tree)


def with_count(state, count):
    """The optimizer state with the count of each of our states replaced."""

    def is_ours(node):
        return isinstance(node, brx.BinaryRelaxState)

    return jax.tree.map(
        lambda node: node._replace(count=count) if is_ours(node) else node, state, is_leaf=is_ours
    )


def compiled(program):
    """(params, grads of each step, λ of each step, hard_from, first count) → what they left."""

    @jax.jit
    def run(params, grads, lams, hard_from, first):
        def lam(count):
            return lams[jnp.clip(count - first, 0, STEPS - 1)]

        optimizer, alone = program.optimizer(lam, hard_from), program.base_alone()

        def step(carry, grads):
            params, state, free, free_state = carry
            updates, after = optimizer.update(grads, state, params)
            new = optax.apply_updates(params, updates)
            assert jax.tree.structure((new, after)) == jax.tree.structure((params, state))
            assert kinds((new, after)) == kinds((params, state))
            grads = jax.tree.map(lambda g, y: g.astype(y.dtype), grads, free)
            updates, free_state = alone.update(grads, free_state, free)
            free = optax.apply_updates(free, updates)
            read = (brx.quantized_params(after, new), brx.float_params(after, new))
            assert jax.tree.structure(read[0]) == jax.tree.structure(params)
            assert kinds(read[0]) == kinds(params)
            assert kinds(brx.with_float_params(after, new)) == kinds(after)
            left = (new, *read, free, brx.strength(after), brx.metrics(after, new))
            return (new, after, free, free_state), left

        start = with_count(optimizer.init(params), first)
        free = brx.float_params(start, params)
        return jax.lax.scan(step, (params, start, free, alone.init(free)), grads, STEPS)[1]

    return run


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


def grouped(x, granularity):
    """(steps, *shape) → (steps, groups, entries of a group)."""
    shape = x.shape[1:]
    if isinstance(granularity, brx.PerBlock):
        axis, size = granularity.axis, granularity.size
        shape = (*shape[:axis], shape[axis] // size, size, *shape[axis + 1 :])
        x, kept = x.reshape(len(x), *shape), [a for a in range(len(shape)) if a != axis + 1]
    else:
        axes = granularity.axis if isinstance(granularity, brx.PerChannel) else ()
        axes = axes if isinstance(axes, tuple) else (axes,)
        kept = sorted(axis % len(shape) for axis in axes)
    rest = [axis for axis in range(len(shape)) if axis not in kept]
    groups = int(np.prod([shape[axis] for axis in kept], dtype=int))
    return x.transpose(0, *(a + 1 for a in (*kept, *rest))).reshape(len(x), groups, -1)


class Wanted(NamedTuple):
    """Of each step: α, whether the params must be exact, and whether they are plainly relaxed."""

    alpha: np.ndarray
    exact: np.ndarray
    relaxed: np.ndarray


def wanted_of(program, values, finite):
    """`finite` says of each step whether all its gradients are."""
    wanted = Wanted(np.zeros(STEPS), np.zeros(STEPS, bool), np.zeros(STEPS, bool))
    done, in_a_row, by_count = 0, 0, False  # updates of ours so far, those at α = 1 in a row
    for t in range(STEPS):
        adds_up = program.wrapper == "MultiSteps" and t % 2 == 0
        if adds_up or (program.wrapper == "apply_if_finite" and not finite[t]):
            for of_step in wanted[:2]:
                of_step[t] = of_step[t - 1] if t else 0
            continue  # params as they were, whose rounding is of the update before
        count, connect = min(values.first + done, LAST), program.form == "binary_connect"
        by_phase = program.has_hard_from and not connect
        hard = by_phase and count >= values.hard_from
        lam = np.inf if hard or connect else values.lams[count - values.first]
        with np.errstate(divide="ignore", over="ignore"):
            wanted.alpha[t] = 1 / (1 + 1 / np.float32(lam))
        in_a_row = in_a_row + 1 if wanted.alpha[t] == 1 else 0
        if in_a_row == 1:
            by_count = hard and done >= 8
        wanted.exact[t] = in_a_row > 2 or (by_count and in_a_row > 0)
        near = by_phase and count >= values.hard_from - 8
        wanted.relaxed[t] = wanted.alpha[t] < 1 and not near
        done += 1
    return wanted


def check_values(program, run, values):
    arguments = values.arguments(program)
    *trees, alpha, metrics = jax.tree.map(np.asarray, run(*arguments))
    grads = [np.asarray(grad, np.float64) for grad in jax.tree.leaves(arguments[1])]
    finite = [all(np.isfinite(grad[t]).all() for grad in grads) for t in range(STEPS)]
    wanted = wanted_of(program, values, finite)
    np.testing.assert_allclose(alpha, wanted.alpha, rtol=1e-6, atol=1e-37)
    trees = [by_path(tree) for tree in (*arguments[:2], *trees)]
    assert set(metrics) == set(program.quantized())
    for path, leaf in program.leaves().items():
        start, grads, p, q, y, free = (np.asarray(tree[path]) for tree in trees)
        adds_zero_updates = program.wrapper == "MultiSteps"  # 0·∞ before the second step is NaN
        finite_run = np.isfinite(grads).all() and np.isfinite(start).all()
        if program.moves_as_base_alone(leaf) and (finite_run or not adds_zero_updates):
            check_equal_moves(y, free)
        if path not in program.quantized():
            assert np.array_equal(bits(p), bits(q))
            continue
        given = [start[None].astype(y.dtype), y]
        if adds_zero_updates:
            given.append(grads)
        good = good_groups(leaf, given)
        check_leaf(leaf, start, (p, q, y), good, wanted)
        check_metrics(leaf, metrics[path], good.all(axis=1), wanted, program.track_flips)


def check_equal_moves(y, free):
    """The same weights, and NaN and infinity in the same places."""
    y, free = y.astype(np.float64), free.astype(np.float64)
    largest = np.max(np.abs(free), where=np.isfinite(free), initial=0)
    np.testing.assert_allclose(y, free, rtol=1e-4, atol=1e-5 * largest + 2e-38)


def good_groups(leaf, given):
    """(steps, groups): no NaN or infinity so far, and room for a scale and a difference."""
    room = float(jnp.finfo(leaf.dtype).max) / 16
    good = np.ones((STEPS, 1), bool)
    for x in given:
        small = np.abs(grouped(x, leaf.qset.granularity).astype(np.float64)) < room
        good = good & np.logical_and.accumulate(small.all(-1))
    return good


def check_leaf(leaf, start, trace, good, wanted):
    bits_of = [bits(grouped(x, leaf.qset.granularity)) for x in trace[:2]]
    p, q, y = (grouped(x, leaf.qset.granularity).astype(np.float64) for x in trace)
    p, q, y = (np.where(good[..., None], x, 0) for x in (p, q, y))
    assert np.isfinite(p).all(), "params that are not finite, where the float weights are"
    assert np.isfinite(q).all(), "quantized params that are not finite"
    assert (distinct_values(q) <= len(leaf.qset.levels)).all(), "too many quantized values"
    if not (leaf.dtype == "bfloat16" and leaf.qset.levels[-1] > 31):
        wrong = good & wanted.exact[:, None] & (bits_of[0] != bits_of[1]).any(-1)
        assert not wrong.any(), f"not the quantized params: step, group {np.argwhere(wrong)[:3]}"
    info = jnp.finfo(leaf.dtype)
    before = grouped(start[None], leaf.qset.granularity).astype(np.float64)
    sizes = np.maximum(np.abs(np.concatenate([before, p[:-1]])), np.abs(q) + np.abs(y))
    allowed = (4 * float(info.eps) + 1e-5) * sizes.max(-1, keepdims=True) + 2 * float(info.tiny)
    alpha = wanted.alpha[:, None, None]
    far = np.abs(p - (1 - alpha) * y - alpha * q) > allowed
    wrong = far.any(-1) & good & wanted.relaxed[:, None]
    assert not wrong.any(), f"not (1 − α)·y + α·proj(y): step, group {np.argwhere(wrong)[:3]}"


def check_metrics(leaf, metrics, good, wanted, track_flips):
    """Numbers that are what they say wherever the leaf is good."""
    assert (metrics.flips is not None) == track_flips
    assert metrics.occupancy.shape == (STEPS, len(leaf.qset.levels))
    assert (metrics.distance[good] >= 0).all()
    near = metrics.distance[good & wanted.relaxed, None]  # where no scale is held back
    shares = [metrics.occupancy[good], *([metrics.flips[good, None]] if track_flips else [])]
    for share in (*shares, near):
        assert ((share >= -1e-6) & (share <= 1 + 1e-5)).all()
    np.testing.assert_allclose(metrics.occupancy[good].sum(-1), 1, rtol=1e-5)
    assert np.isfinite(metrics.scale[good]).all()
    assert (metrics.scale[good] >= 0).all()


def distinct_values(x):
    return 1 + np.count_nonzero(np.diff(np.sort(x, axis=-1), axis=-1), axis=-1)


def by_path(tree):
    return {
        jax.tree_util.keystr(keys, simple=True, separator="/"): leaf
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_fault(program):
    """`init` refuses what `select` documents, and nothing else."""
    leaves = program.leaves().values()
    whole = [leaf for leaf in leaves if 0 not in leaf.shape]
    odd = [leaf for leaf in whole if leaf.dtype in ("int32", "bool")]
    refused = {"nothing matches": leaves, "no such axis": whole, "not floating": odd}
    tree = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), program.tree)
    init = program.optimizer(1.0, 3).init
    if refused[program.fault]:
        with pytest.raises(ValueError, match=r"matches no leaf|out of range|Only floating leaves"):
            jax.eval_shape(init, tree)
    else:
        jax.eval_shape(init, tree)


def fuzz(examples, cases, seed=0, phases=tuple(hypothesis.Phase)):
    """Draws programs, and values for each `cases` times."""

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=phases,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.data())
    def run(data):
        program = data.draw(programs(), label="program")
        if program.fault:
            check_fault(program)
            return
        run = compiled(program)
        for _ in range(cases):
            check_values(program, run, data.draw(values(program), label="values"))

    run()


def test_any_program_on_any_values():
    fuzz(examples=8, cases=25)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 26))
def test_many_programs_on_many_values(seed):
    """25 × 16 × 25 = 10,000 cases."""
    fuzz(examples=16, cases=25, seed=seed)


@pytest.mark.parametrize("never", [2**31, 2**40, np.int64(2**40), 1e12, np.float64(1e300), np.inf])
def test_hard_from_beyond_the_last_count(never):
    """The count stops at its int32's end, before it."""
    optimizer = brx.binary_relax(optax.sgd(0.1), brx.Binary(), 1.0, hard_from=never)
    params = jnp.eye(2)
    state = with_count(optimizer.init(params), jnp.int32(LAST))
    _, state = optimizer.update(params, state, params)
    assert int(state.count) == LAST
    assert float(brx.strength(state)) == 0.5


@pytest.mark.parametrize("many", [2**31, 2**40, np.int64(2**40)])
def test_schedules_longer_than_the_last_count(many):
    geometric = brx.geometric_continuation(1.0, 2.0, every=many)
    linear = brx.linear_continuation(many)
    for count in (0, LAST // 2, LAST):
        assert geometric(jnp.int32(count)) == 1
        alpha = min(count / many, 1)
        lam = alpha / (1 - alpha) if alpha < 1 - 1e-6 else np.inf
        np.testing.assert_allclose(linear(jnp.int32(count)), lam, rtol=1e-5)
