"""Any tree, any set, any λ, any count, any value: hypothesis looks for what breaks.

A drawn program is compiled once and run on many drawn values, see `tests/helpers/fuzzing.py`.
"""

from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import brelax_jax as brx
from tests.helpers.exactness import bits, grouped
from tests.helpers.fuzzing import LAST, MAPS, STEPS, programs, values

pytestmark = pytest.mark.usefixtures("quickly_compiled")


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
        check_leaf(leaf, start, (p, q, y), good, wanted, program.form in MAPS)
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


def check_leaf(leaf, start, trace, good, wanted, mapped):
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
    # Other maps have formulas of their own (test_proximal.py), but none pulls away from the set.
    off = np.abs(p - q) - np.abs(y - q) if mapped else np.abs(p - (1 - alpha) * y - alpha * q)
    wrong = (off > allowed).any(-1) & good & wanted.relaxed[:, None]
    assert not wrong.any(), f"not pulled as it should be: step, group {np.argwhere(wrong)[:3]}"


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
    fuzz(examples=3, cases=30)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(26))
def test_many_programs_on_many_values(seed):
    """26 × 16 programs, a few of which are to be refused at once, × 30: more than 10,000 cases."""
    fuzz(examples=16, cases=30, seed=seed)


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
