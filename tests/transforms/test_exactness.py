"""In phase II every scale group holds at most |L| distinct values, bit for bit, after plain
`apply_updates`; phase I is not rounded.

Compilation dominates these tests: one program holds a leaf for each set and granularity, in every
width and form, and serves every case, whose numbers are its arguments.
"""

import dataclasses
import functools
import itertools
import zlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers import covering, oracles
from tests.helpers.exactness import bits, fresh_state, grouped, rules
from tests.helpers.training import normal, traces_of

SETS = {
    "binary": brx.Binary(),
    "ternary": brx.Ternary(),
    "threshold": brx.TernaryThreshold(),
    "uniform4": brx.Uniform(4),
    "uniform8": brx.Uniform(8),
    "power4": brx.PowerOfTwo(4),
    "four": brx.ScaledLevels((-3, -1, 1, 3)),
    "uneven": brx.ScaledLevels((-1.7, -0.3, 0, 0.3, 1.7)),
}
GRANULARITIES = {
    "tensor": brx.PerTensor(),
    "channel": brx.PerChannel(-1),
    "block": brx.PerBlock(8, axis=0),
}
LEAVES = {
    f"{name}-{per}": dataclasses.replace(qset, granularity=granularity)
    for name, qset in SETS.items()
    for per, granularity in GRANULARITIES.items()
}
OPTIMIZERS = {
    "sgd": lambda rate: optax.sgd(0.1 * rate),
    "momentum": lambda rate: optax.sgd(0.1 * rate, momentum=0.9),
    # In float16 the usual eps of 1e-8 is zero, and Adam alone makes NaN.
    "adam": lambda rate: optax.adam(0.01 * rate, eps=1e-4),
    "adamw": lambda rate: optax.adamw(0.01 * rate, eps=1e-4, weight_decay=0.1),
}
WIDTHS = (32, 16)
DTYPES = ("float32", "bfloat16", "float16")
FORMS = ("wrapper", "chain")
PLACES = ((32, "wrapper"), (32, "chain"), (16, "chain"), (16, "wrapper"))
# The suite has the first and the third place, and each search in one of them.
ELSEWHERE = {
    (32, "wrapper"): ("uniform8", "power4", "uneven"),
    (16, "chain"): ("ternary", "uniform4", "four"),
}
SHAPE = (16, 12)
STEPS = 19
JUMP = 14
NEVER = 10**6


class Whole(NamedTuple):
    """In the place of a width: every set, in one dtype and granularity."""

    dtype: str
    per: str
    shift: int  # which leaf has which optimizer


def leaves_of(width, form):
    """Name → (set, dtype): each set in one granularity, by turns: the places of the suite have
    every granularity, and the sets of formulas in two. The 16-bit dtypes take turns too. The
    hardest leaf comes on top.
    """
    if isinstance(width, Whole):
        names = [f"{name}-{width.per}" for name in SETS]
        return {name: (LEAVES[name], width.dtype) for name in names}
    turn = PLACES.index((width, form))
    leaves = {}
    for i, name in enumerate(SETS):
        dtype = "float32" if width == 32 else ("float16", "bfloat16")[(i + turn) % 2]
        for j, per in enumerate(GRANULARITIES):
            if (j - i) % 3 == turn % 3 and name not in ELSEWHERE.get((width, form), ()):
                leaves[f"{name}-{per}"] = LEAVES[f"{name}-{per}"], dtype
    if (width, form) == (16, "chain"):
        leaves["uniform8-block"] = LEAVES["uniform8-block"], "bfloat16"
    return leaves


IN_FLOAT32 = leaves_of(32, "wrapper")


@dataclasses.dataclass(frozen=True)
class Case:
    """How the weights move.

    `kick` adds a multiple of the float weights to the gradients, in units in which 2 flips every
    sign under SGD, and 1 − `jump` is such a multiple in one step of phase II, which multiplies the
    weights by `jump`.
    """

    hard_from: int = NEVER
    infinite_from: int = NEVER
    heavy: bool = False
    rate: float = 1.0
    kick: float = 0.0
    jump: float = 1.0

    @property
    def exact_from(self):
        """The first step after which the params must be exact."""
        first = min(self.hard_from, self.infinite_from)
        return first if first == self.hard_from >= 8 else first + 2


CASES = {
    "hard from 8": Case(8),
    "hard from 8, heavy tails": Case(8, heavy=True),
    "hard from 13, signs flip": Case(13, rate=10, kick=2),
    "hard from 10, heavy tails, signs flip": Case(10, heavy=True, rate=10, kick=2),
    "hard from 0": Case(0),
    "hard from 3, heavy tails": Case(3, heavy=True),
    "hard from 0, heavy tails, signs flip": Case(0, heavy=True, rate=10, kick=2),
    "infinite from 6": Case(infinite_from=6),
    "infinite from 0, heavy tails": Case(infinite_from=0, heavy=True),
    "infinite from 10, hard from 9": Case(9, 10),
}


every_place = pytest.mark.parametrize(("width", "form"), covering.pairs(WIDTHS, FORMS))
every_form = pytest.mark.parametrize("form", FORMS)
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
@every_place
def test_params_are_exactly_quantized(width, form, case):
    """A covering design: see `leaves_of`."""
    check_exactness(width, form, case)


@pytest.mark.soak
@pytest.mark.parametrize("shift", range(len(OPTIMIZERS)))
@every_form
@pytest.mark.parametrize("per", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_params_are_exactly_quantized_in_every_combination(dtype, per, form, shift):
    for case in CASES.values():
        check_exactness(Whole(dtype, per, shift), form, case)


def check_exactness(width, form, case):
    trace = run(width, form, case)
    faults = {
        name: faults_of(trace, name, qset)[case.exact_from :]
        for name, (qset, dtype) in leaves_of(width, form).items()
        # bfloat16 has no bits left for a change of these sets' scales: documented, not promised.
        if not (dtype == "bfloat16" and qset.levels[-1] > 31)
    }
    wrong = {name: np.argwhere(groups)[:3].tolist() for name, groups in faults.items()}
    assert not any(wrong.values()), f"[step since the first exact one, group] of {wrong}"


def faults_of(trace, name, qset):
    """Steps and groups with too many values, or not bit for bit what `quantized_params` returns."""
    p, q = (trace[part][name] for part in ("params", "quantized"))
    values = np.sort(grouped(p.astype(np.float64), qset.granularity), axis=-1)
    distinct = 1 + np.count_nonzero(np.diff(values, axis=-1), axis=-1)
    unequal = grouped(bits(p) != bits(q), qset.granularity).any(-1)
    return unequal | (distinct > len(qset.levels)) | np.isnan(values).any(-1)


@every_case
def test_sets_that_outgrow_bfloat16_are_at_most_an_ulp_off(case):
    """Uniform(8) leaves no bit for the step in which a scale changes."""
    trace, name = run(16, "chain", case), "uniform8-block"
    p, q = (trace[part][name].astype(np.float64) for part in ("params", "quantized"))
    largest = np.maximum(np.abs(p), np.roll(np.abs(p), 1, axis=0))
    off = grouped(np.abs(p - q), LEAVES[name].granularity).max(-1)
    ulp = float(jnp.finfo("bfloat16").eps) * grouped(largest, LEAVES[name].granularity).max(-1)
    assert (off <= ulp)[case.exact_from :].all(), f"{(off / ulp).max()} ulps"


@pytest.mark.parametrize("direction", [1, -1], ids=["up", "down"])
@every_place
def test_jumps_of_the_scale_are_exact_in_the_same_step(width, form, direction):
    case = Case(8, jump={32: 14.0, 16: 1.8}[width] ** direction)
    test_params_are_exactly_quantized(width, form, case)
    scales = run(width, form, case)["scales"]
    ratios = {name: np.median(scale[JUMP] / scale[JUMP - 1]) for name, scale in scales.items()}
    followed = [name for name, ratio in ratios.items() if abs(np.log(ratio / case.jump)) < 0.1]
    assert followed, f"no scale jumped {case.jump}-fold: {ratios}"


@pytest.mark.parametrize(
    "case", [CASES["hard from 8"], CASES["hard from 8, heavy tails"]], ids=["normal", "heavy"]
)
@pytest.mark.parametrize(
    "name",
    covering.some(LEAVES, IN_FLOAT32),
)
def test_quantized_params_are_the_projection_of_the_float_params(name, case):
    width = 32 if name in IN_FLOAT32 else Whole("float32", per=name.split("-")[1], shift=0)
    qset, trace = LEAVES[name], run(width, "wrapper", case)
    levels = np.array(qset.levels)
    # The grid keeps this much of a scale; sums in float32 come on top.
    top = 1 + np.ceil(np.log2(levels[-1]))
    rounding = 2.0 ** (top - 20) + 3e-6
    for step in (0, 3, 7, 8, STEPS - 1):  # in phase I, and from step 8 on in phase II
        ys, qs = (
            grouped(trace[part][name][step : step + 1].astype(np.float64), qset.granularity)[0]
            for part in ("floats", "quantized")
        )
        for y, q, scale in zip(ys, qs, trace["scales"][name][step].ravel(), strict=True):
            if isinstance(qset, brx.TernaryThreshold):
                codes, best, cut = oracles.ternary_threshold(y, qset.factor)
                near = np.abs(np.abs(y) / cut - 1) < 1e-3
                assert abs(scale / best - 1) < rounding or near.any()
                assert np.array_equal(np.sign(q)[~near], codes[~near])
                continue
            assert_nearest(y, q, scale, levels, rounding)
            exact = {"binary": oracles.binary, "ternary": oracles.ternary}.get(name.split("-")[0])
            best, error = exact(y) if exact else oracles.optimum(y, levels)
            slack = np.sum((rounding * q) ** 2) + (1e-6 if exact else 1e-4) * np.sum(y**2)
            assert oracles.error(y, scale, levels) <= error + slack
            if isinstance(qset, brx.Binary):
                assert abs(scale / best - 1) < rounding


def assert_nearest(y, q, scale, levels, rounding):
    """Each entry is scale · the nearest level, or within 1e-3 of the threshold between two."""
    distances = np.abs(y[:, None] - scale * levels)
    off = np.abs(q[:, None] - scale * levels).min(-1)
    assert off.max() <= rounding * scale * levels[-1]
    excess = np.abs(y - q) - distances.min(-1)
    assert excess.max() <= 1e-3 * scale * levels[-1]


@every_place
def test_quantized_params_do_not_depend_on_compilation(width, form):
    params, state, quantized = final(width, form, CASES["hard from 0"])
    eager = brx.quantized_params(state, params)
    for name in params:
        assert np.array_equal(bits(eager[name]), bits(quantized[name])), name


@functools.cache
def soon_and_never():
    """(form, hard_from) → trace."""
    grads = [{"kernel": normal(i, 8, 8)} for i in range(30)]
    cases = itertools.product(FORMS, (28, None))
    base = optax.sgd(0.1, 0.9)
    optimizers = {case: FORM[case[0]](base, brx.Binary(), 0.5, case[1]) for case in cases}
    return traces_of(optimizers, grads[0], grads)


@every_form
def test_phase_one_is_unrounded_until_eight_updates_before_phase_two(form):
    soon, never = (soon_and_never()[form, hard_from] for hard_from in (28, None))
    pairs = [(a["kernel"], b["kernel"]) for (a, _), (b, _) in zip(soon, never, strict=True)]
    same = [np.array_equal(a, b) for a, b in pairs]
    assert all(same[:20])
    assert not any(same[28:])
    # The last eight differ by rounding, and in the first of them some entries wait for the next.
    for a, b in pairs[20:28]:
        close = np.isclose(a, b, rtol=0, atol=2e-5)
        assert close.mean() > 0.9
    assert close.all()


FORM = {
    "wrapper": brx.binary_relax,
    "chain": lambda base, *args: optax.chain(base, brx.relax_params(*args)),
}


def transformation(width, form, rate, infinite_from, hard_from):
    """Each leaf has one of the four optimizers, another one in each form and width."""
    leaves = leaves_of(width, form)
    shift = PLACES.index((width, form)) if width in WIDTHS else width.shift
    labels = {
        name: list(OPTIMIZERS)[(i + shift) % len(OPTIMIZERS)] for i, name in enumerate(leaves)
    }
    base = optax.partition({name: make(rate) for name, make in OPTIMIZERS.items()}, labels)
    return FORM[form](
        base,
        rules({name: qset for name, (qset, _) in leaves.items()}),
        lambda count: jnp.where(count < infinite_from, 1.4**count, jnp.inf),
        hard_from,
    )


@jax.jit
def scan(carry, grads, case):
    """(width, form) → (params, state), gradients, numbers of the case → final carry, trace."""
    numbers = case["rate"], case["infinite_from"], case["hard_from"]
    optimizers = {key: transformation(*key, *numbers) for key in carry}

    def step(carry, given):
        trace = {}
        for key, optimizer in optimizers.items():
            carry[key], trace[key] = one_step(optimizer, *carry[key], given[0][key], given[1])
        return carry, trace

    push = jnp.full(STEPS, case["kick"]).at[JUMP].add(1 - case["jump"]) / (0.1 * case["rate"])
    return jax.lax.scan(step, carry, (grads, push))


def one_step(optimizer, params, state, grads, push):
    floats = brx.float_params(state, params)
    grads = jax.tree.map(lambda g, y: g + (push * y).astype(g.dtype), grads, floats)
    updates, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return (params, state), {
        "params": params,
        "quantized": brx.quantized_params(state, params),
        "floats": brx.float_params(state, params),
        "scales": scales_of(state),
    }


def start_of(width, form, case):
    """Params, state and the gradients of each step."""
    rng = np.random.default_rng(zlib.crc32(repr((width, form, case)).encode()))

    def noise(scale, *shape):
        draw = rng.standard_t(1.5, shape) if case.heavy else rng.standard_normal(shape)
        return scale * draw

    dtypes = {name: dtype for name, (_, dtype) in leaves_of(width, form).items()}
    params = {name: jnp.asarray(noise(0.05, *SHAPE), dtype) for name, dtype in dtypes.items()}
    size = 0.1 if case.jump == 1 else 0.005
    grads = {name: jnp.asarray(noise(size, STEPS, *SHAPE), dtype) for name, dtype in dtypes.items()}
    return (params, fresh_state(shapes_of_state(width, form), params)), grads


@functools.cache
def shapes_of_state(width, form):
    leaves = leaves_of(width, form).items()
    params = {name: jax.ShapeDtypeStruct(SHAPE, dtype) for name, (_, dtype) in leaves}
    return jax.eval_shape(transformation(width, form, 1.0, NEVER, NEVER).init, params)


@functools.cache
def completed(keys, case):
    """(width, form) → the final (params, state), and the trace, the steps as its first axis."""
    starts = {key: start_of(*key, case) for key in keys}
    carry, grads = ({key: start[i] for key, start in starts.items()} for i in range(2))
    numbers = {name: jnp.float32(value) for name, value in dataclasses.asdict(case).items()}
    last, trace = scan(carry, grads, numbers)
    return {key: (last[key], jax.tree.map(np.asarray, trace[key])) for key in keys}


def complete(width, form, case):
    """Two places share a program: those of the suite, and the two others."""
    place = width, form
    keys = PLACES[PLACES.index(place) % 2 :: 2] if place in PLACES else (place,)
    return completed(keys, case)[place]


def run(width, form, case):
    """The trace of one case."""
    return complete(width, form, case)[1]


def final(width, form, case):
    """The params, the state and the quantized params after the last step of a case."""
    (params, state), trace = complete(width, form, case)
    return params, state, {name: q[-1] for name, q in trace["quantized"].items()}


def scales_of(state):
    """The stored scales of a wrapper's or chain's state, by leaf."""
    return optax.tree.get(state, "scales")
