"""What `metrics` says of a leaf, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers import quick
from tests.helpers.training import array, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

SETS = {
    "binary-channel": brx.Binary(granularity=brx.PerChannel()),
    "ternary-block": brx.Ternary(granularity=brx.PerBlock(4, axis=0)),
    "threshold": brx.TernaryThreshold(),
    "uneven": brx.ScaledLevels((-1.7, -0.3, 0.3, 1.7)),
}
RULES = brx.select(*((f"^{name}/", qset) for name, qset in SETS.items()))
STEPS = 4
read = jax.jit(brx.metrics)


def normal(seed, *shape):
    rng = np.random.default_rng(seed)
    return {name: {"kernel": array(rng.standard_normal(shape))} for name in (*SETS, "plain")}


@pytest.fixture(scope="module")
def trace():
    """The state before and after each of some updates, and what is read from it then."""
    optimizer = brx.binary_relax(
        optax.sgd(0.3), RULES, brx.linear_continuation(4), hard_from=3, track_flips=True
    )

    @jax.jit
    def read(*args):
        return [read(*args) for read in (brx.metrics, brx.float_params, brx.quantized_params)]

    params = normal(0, 8, 6)
    state, update = quick.jit(optimizer.init)(params), quick.jit(optimizer.update)
    trace = [(state, *read(state, params))]
    for step in range(STEPS):
        updates, state = update(normal(1 + step, 8, 6), state, params)
        params = optax.apply_updates(params, updates)
        trace.append((state, *read(state, params)))
    return trace


def codes(qset, q, scale):
    """Which of the set's levels each quantized weight is at, as an index."""
    groups = qset.granularity.groups(q.shape)
    spread = np.broadcast_to(np.reshape(scale, groups.scale_view), groups.view).reshape(q.shape)
    return np.abs(q[..., None] - spread[..., None] * np.array(qset.levels)).argmin(-1)


@pytest.mark.parametrize("name", SETS)
def test_every_figure_is_what_its_name_says(name, trace):
    qset = SETS[name]
    before = None
    for step, (_, found, *trees) in enumerate(trace):
        leaf = found[f"{name}/kernel"]
        y, q = (np.asarray(tree[name]["kernel"], np.float64) for tree in trees)
        wanted = np.linalg.norm(y - q) / np.linalg.norm(y)
        np.testing.assert_allclose(leaf.distance, wanted, rtol=1e-4)
        now = codes(qset, q, leaf.scale)
        occupied = [np.mean(now == level) for level in range(len(qset.levels))]
        np.testing.assert_allclose(leaf.occupancy, occupied, atol=1e-6)
        assert leaf.scale.shape == qset.granularity.groups(y.shape).scale
        flips = 0 if before is None else np.mean(now != before)
        np.testing.assert_allclose(leaf.flips, flips, atol=1e-6)
        assert before is None or flips > 0
        before = now
        lam = [0, 0, 1 / 3, 1, np.inf][step]
        np.testing.assert_allclose(leaf.lam, lam, rtol=1e-6)
        np.testing.assert_allclose(leaf.strength, 1 / (1 + 1 / lam) if lam else 0, rtol=1e-6)


def test_only_quantized_leaves_are_there_and_each_has_the_lam_of_its_state(trace):
    assert set(trace[0][1]) == {f"{name}/kernel" for name in SETS}
    optimizer = optax.partition(
        {
            "two": brx.relax_params(brx.Binary(), 1.0),
            "three": brx.relax_params(brx.TernaryThreshold(), 3.0),
        },
        {"a": "two", "c": "three"},
    )
    params = {"a": ones(2, 2), "c": array(np.eye(2))}
    init, update = quick.jit(optimizer.init), quick.jit(optimizer.update)
    _, state = update(params, init(params), params)
    found = brx.metrics(state, params)
    assert {path: float(leaf.lam) for path, leaf in found.items()} == {"a": 1.0, "c": 3.0}
    assert len(found["a"].occupancy) == 2
    assert len(found["c"].occupancy) == 3


def test_without_tracking_there_are_no_flips_and_no_memory_for_them():
    params = normal(0, 8, 6)
    for track in (False, True):
        optimizer = brx.binary_connect(optax.sgd(0.1), RULES, track_flips=track)
        state = jax.eval_shape(optimizer.init, params)
        extra = [leaf for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.int8]
        assert len(extra) == (len(SETS) if track else 0)
        found = jax.eval_shape(brx.metrics, state, params)
        assert all((leaf.flips is None) != track for leaf in found.values())


def test_a_state_that_goes_on_from_other_params_has_their_codes():
    """Flips are counted from the replaced weights on."""
    optimizer = brx.binary_connect(optax.sgd(1.0), brx.TernaryThreshold(), track_flips=True)
    params = {"kernel": array([[3.0, -1.0, 0.1, 2.0]])}
    other = {"kernel": array([[-3.0, 1.0, -0.1, -2.0]])}
    state = brx.with_float_params(quick.jit(optimizer.init)(params), params)
    replaced = brx.with_float_params(state, other)
    assert float(read(replaced, other)["kernel"].flips) == 0
    assert float(read(replaced._replace(codes=state.codes), other)["kernel"].flips) == 0.5
    grads = {"kernel": array([[-6.0, 2.0, -0.2, -4.0]])}  # back to where they were
    _, after = quick.jit(optimizer.update)(grads, replaced, other)
    assert float(read(after, other)["kernel"].flips) == 0.5


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_the_distance_does_not_depend_on_the_size_of_the_weights(size):
    w = {"kernel": np.asarray(normal(3, 8, 6)["plain"]["kernel"])}
    init = quick.jit(brx.binary_connect(optax.sgd(0.1), brx.TernaryThreshold()).init)
    scaled = jax.tree.map(lambda x: array(x * np.float32(size)), w)
    wanted, found = (read(init(x), x)["kernel"].distance for x in (w, scaled))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert 0.3 < wanted < 0.6


def test_the_distance_where_a_scale_is_held_back():
    """A jump from 1e-30 to 1e30 takes several updates: meanwhile the set is far away."""
    params = {"kernel": array(np.full((2, 2), 1e-30))}
    optimizer = brx.binary_connect(optax.sgd(1.0), brx.Binary())
    state, update = quick.jit(optimizer.init)(params), quick.jit(optimizer.update)
    for step, size in enumerate([*[1e-30] * 3, *[1e30] * 2]):
        y = np.asarray(brx.float_params(state, params)["kernel"])
        grads = {"kernel": y - np.float32(size)}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(read(state, params)["kernel"].distance, step > 2, atol=1e-5)


def test_zeros_are_on_the_set_and_what_is_not_finite_shows():
    init = quick.jit(brx.binary_connect(optax.sgd(0.1), brx.Binary()).init)
    for value, wanted in ((0.0, 0.0), (2.0, 0.0), (np.nan, np.nan), (np.inf, np.nan)):
        params = {"kernel": array(np.full((4, 4), value))}
        state = init(params)
        leaf = read(state, params)["kernel"]
        np.testing.assert_allclose(leaf.distance, wanted, atol=2e-6)


def test_bfloat16_params_have_metrics_in_float32():
    params = {"kernel": array(np.ones((8, 6)), "bfloat16")}
    state = brx.binary_connect(optax.sgd(0.1), brx.Binary(), track_flips=True).init(params)
    leaf = jax.eval_shape(brx.metrics, state, params)["kernel"]
    assert {part.dtype for part in leaf} == {jnp.dtype("float32")}


def test_states_of_other_params_are_refused(trace):
    state, *_ = trace[0]
    with pytest.raises(ValueError, match="binary-channel/kernel"):
        brx.metrics(state, {"other": ones(3)})
    with pytest.raises(ValueError, match="no state of binary_relax"):
        brx.metrics(optax.sgd(0.1).init({}), {})


def test_they_are_a_tree_of_arrays(trace):
    leaf = trace[-1][1]["uneven/kernel"]
    assert isinstance(leaf, brx.LeafMetrics)
    assert all(isinstance(part, jax.Array) for part in leaf)


def test_weights_that_are_all_zero_are_at_distance_zero_whatever_their_scale():
    params = {"kernel": np.zeros((4, 3), np.float32)}
    state = brx.binary_connect(optax.sgd(0.1), brx.Binary(rule=brx.Fixed(1.0))).init(params)
    assert brx.metrics(state, params)["kernel"].distance == 0
