"""Which leaves are quantized: rules, the default for kernels, and the paths that rules search."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import brelax_jax as brx
from tests.helpers.training import array, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

BINARY, TERNARY = brx.Binary(), brx.Ternary()
LINK = optax.sgd(0.1)


def kernel(*shape):
    return ones(*(shape or (2, 3)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A user's own pytree."""

    kernel: jax.Array
    bias: jax.Array


Pair = collections.namedtuple("Pair", ["kernel", "bias"])


class Linen(linen.Module):
    """An embedding, a normalization and two kernels."""

    @linen.compact
    def __call__(self, x):
        x = linen.Conv(2, (3,), name="conv")(linen.Embed(5, 4)(x))
        return linen.Dense(3)(linen.BatchNorm(use_running_average=True)(x))


class Nnx(nnx.Module):
    """The same."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Conv(4, 2, (3,), rngs=rngs), nnx.Linear(2, 3, rngs=rngs)])
        self.norm = nnx.BatchNorm(2, rngs=rngs)


def quantized_paths(params, rules):
    """The paths of the leaves that a transformation quantizes, as the library names them.

    The shapes of the state say which; a rule that matches nothing makes the error list the paths.
    """
    state = jax.eval_shape(brx.relax_params(rules, 1.0).init, params)
    kept = [y is not None and not isinstance(y, optax.MaskedNode) for y in flat(state.float_params)]
    with pytest.raises(ValueError, match=r"'\^nothing\$' matches no leaf") as error:
        brx.relax_params(brx.select(("^nothing$", None)), 1.0).init(params)
    paths = str(error.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert len(paths) == len(kept)
    return [path for path, quantized in zip(paths, kept, strict=True) if quantized]


def flat(tree):
    return jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))


TREES = {
    "dict": ({"a": {"kernel": kernel(), "bias": kernel()}}, ["a/kernel"]),
    "list": ([{"kernel": kernel()}, [kernel(3), kernel()]], ["0/kernel", "1/1"]),
    "tuple": ((kernel(), (kernel(), kernel(2))), ["0", "1/0"]),
    "namedtuple": ({"x": Pair(kernel(), kernel())}, ["x/kernel"]),
    "dataclass": ([Layer(kernel(), kernel())], ["0/kernel"]),
    "one array": (kernel(), [""]),
    "None": ({"a": None, "c": kernel()}, ["c"]),
}


@pytest.mark.parametrize(("params", "paths"), TREES.values(), ids=TREES)
def test_paths_in_every_container(params, paths):
    assert quantized_paths(params, BINARY) == paths
    for path in paths:
        assert quantized_paths(params, brx.select((f"^{path}$", BINARY))) == [path]


def test_linen_params():
    model = Linen()
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6), int))["params"]
    params = jax.tree.map(lambda leaf: ones(*leaf.shape), shapes)
    assert quantized_paths(params, TERNARY) == ["Dense_0/kernel", "conv/kernel"]
    rules = brx.select((r"^conv/", None), ("embedding$", BINARY), default=TERNARY)
    assert quantized_paths(params, rules) == ["Dense_0/kernel", "Embed_0/embedding"]


def test_nnx_paths_are_the_same_at_init_and_update():
    """At `init` NNX hands out variables, whose paths end in '.value'; at `update` plain arrays."""
    state = nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)
    rules = brx.select((r"^layers/0/kernel$", BINARY), (r"^layers/1/kernel$", TERNARY))
    paths = ["layers/0/kernel", "layers/1/kernel"]
    for params in (state, nnx.as_pure(state), nnx.to_pure_dict(state)):
        assert quantized_paths(params, rules) == paths
        assert quantized_paths(params, BINARY) == paths
        optimizer = brx.binary_relax(LINK, rules, 1.0)
        opt_state = nnx.as_pure(jax.eval_shape(optimizer.init, params))  # as nnx.Optimizer
        pure = nnx.as_pure(params)
        updates, _ = jax.eval_shape(optimizer.update, pure, opt_state, pure)
        assert jax.tree.structure(updates) == jax.tree.structure(pure)


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "applies"),
    [
        ("kernel", (2, 2), "float32", True),
        ("kernel", (3, 3, 2, 2), "bfloat16", True),
        ("weight", (2, 2), "float16", True),
        ("upscale", (2, 2), "float32", True),  # the last name as a whole decides
        ("kernel", (4,), "float32", False),
        ("kernel", (), "float32", False),
        ("kernel", (0, 2), "float32", False),
        ("bias", (2, 2), "float32", False),
        ("scale", (2, 2), "float32", False),
        ("embedding", (2, 2), "float32", False),
        ("kernel", (2, 2), "int8", False),
        ("kernel", (2, 2), "bool", False),
        ("kernel", (2, 2), "complex64", False),
    ],
)
@pytest.mark.parametrize("above", ["layer", "bias", "scale"])
def test_the_default_applies_to_kernels(above, path, shape, dtype, applies):
    params = {above: {path: jnp.zeros(shape, dtype)}, "other": {"w": jnp.zeros((2, 2))}}
    for rules in (BINARY, brx.select(default=BINARY), brx.select((path, None), default=BINARY)):
        expected = applies and (rules == BINARY or not rules.rules)
        wanted = sorted([f"{above}/{path}"] * expected + ["other/w"])
        assert quantized_paths(params, rules) == wanted


def test_the_first_match_decides():
    params = {name: {"kernel": kernel(4, 4)} for name in ("conv1", "conv2", "head")}
    rules = brx.select(
        ("conv1", None),
        ("conv", brx.Uniform(3)),  # matches conv1 too, too late
        ("kernel", brx.ScaledLevels((-3, -1, 1, 3))),
        default=BINARY,
    )
    assert quantized_paths(params, rules) == ["conv2/kernel", "head/kernel"]
    params = jax.tree.map(lambda w: array(np.linspace(-1, 1, 16).reshape(4, 4)), params)
    init = brx.relax_params(rules, 1.0).init
    quantized = jax.jit(lambda params: brx.quantized_params(init(params), params))(params)
    counts = {name: len(np.unique(leaf["kernel"])) for name, leaf in quantized.items()}
    assert counts == {"conv1": 16, "conv2": 7, "head": 4}


def test_a_rule_reaches_leaves_that_are_no_kernels():
    params = {"bias": kernel(4), "embedding": kernel(), "gain": jnp.float32(2.0)}
    assert quantized_paths(params, brx.select(("", BINARY))) == ["bias", "embedding", "gain"]


def test_patterns_are_searched_as_regular_expressions():
    params = {f"block{i}": {"kernel": kernel()} for i in (1, 2, 12)}
    rules = brx.select((r"block\d/k", BINARY))
    assert quantized_paths(params, rules) == ["block1/kernel", "block2/kernel"]
    assert quantized_paths(params, brx.select((r"ck(1|12)/", BINARY))) == [
        "block1/kernel",
        "block12/kernel",
    ]


def test_equal_rules_are_equal_and_compile_once():
    def rules():
        return brx.select(("a", brx.Uniform(4)), ("b", None), default=brx.Ternary())

    assert rules() == rules()
    assert hash(rules()) == hash(rules())
    assert rules() != brx.select(("a", brx.Uniform(5)), ("b", None), default=brx.Ternary())
    traces = []

    @jax.jit
    def count(state):
        traces.append(1)
        return state.count

    for _ in range(2):
        count(brx.relax_params(brx.select(("a", BINARY)), 1.0).init({"a": kernel()}))
    assert len(traces) == 1


def test_an_empty_tree_passes():
    """Optax makes such placeholders."""
    for params in ({}, (), [{}], {"a": None}, {"a": optax.MaskedNode()}):
        optimizer = brx.binary_relax(LINK, brx.select(("kernel", BINARY)), 1.0)
        updates, state = optimizer.update(params, optimizer.init(params), params)
        assert jax.tree.leaves(updates) == []
        assert int(state.count) == 1


def block(size, axis=-1):
    return brx.Binary(granularity=brx.PerBlock(size, axis))


def channel(axis):
    return brx.Ternary(granularity=brx.PerChannel(axis))


PARAMS = {
    "mid": {"kernel": kernel(4, 6), "steps": np.arange(3), "on": np.ones(2, bool)},
    "phase": np.ones(2, "complex64"),
    "gain": np.float32(1.0),
}
REFUSED_AT_INIT = {
    "no leaf": (("mid/bias", BINARY), r"'mid/bias' matches no leaf.*gain, mid/kernel"),
    "no leaf, and None": (("mid/bias", None), r"'mid/bias' matches no leaf"),
    "integers": (("steps", BINARY), r"'mid/steps' is of dtype int32.*Binary.*None"),
    "booleans": (("on$", BINARY), r"'mid/on' is of dtype bool.*None"),
    "complex": (("phase", BINARY), r"'phase' is of dtype complex64.*None"),
    "everything": (("", TERNARY), r"is of dtype (int32|bool|complex64)"),
    "axis above": (("kernel", channel(2)), r"'mid/kernel'.*axis 2 .*\(4, 6\).*-2 to 1"),
    "axis below": (("kernel", channel(-3)), r"'mid/kernel'.*axis -3 .*\(4, 6\)"),
    "axis twice": (("kernel", channel((1, -1))), r"'mid/kernel'.*\(4, 6\) twice"),
    "axis of a scalar": (("gain", channel(-1)), r"'gain'.*scalar.*PerTensor"),
    "a block too many": (("kernel", block(4)), r"'mid/kernel'.*does not divide axis 1.*2 of its 6"),
    "a block too large": (("kernel", block(8, 0)), r"'mid/kernel'.*does not divide axis 0.*4 entr"),
    "a block's axis": (("kernel", block(2, 5)), r"'mid/kernel'.*axis 5 .*\(4, 6\)"),
}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(("rule", "message"), REFUSED_AT_INIT.values(), ids=REFUSED_AT_INIT)
def test_rules_that_do_not_fit_are_refused_at_init(rule, message, jitted):
    init = brx.binary_relax(LINK, brx.select(rule), 1.0).init
    with pytest.raises(ValueError, match=message):
        (jax.jit(init) if jitted else init)(PARAMS)


REFUSED = {
    "a class": (("kernel", brx.Ternary), r"Ternary\(\).*got .*Ternary"),
    "a number of bits": (("kernel", 4), r"got 4"),
    "a name": (("kernel", "binary"), r"got 'binary'"),
    "no pair": ("kernel", r"pair.*got 'kernel'"),
    "three": (("a", "b", BINARY), r"pair.*'b'"),
    "a pair in a list": (["kernel", BINARY], r"pair"),
    "a pattern that is no text": ((1, BINARY), r"pair.*1"),
    "a broken pattern": (("conv(", BINARY), r"'conv\(' is not a regular expression"),
}


@pytest.mark.parametrize(("rule", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_rule_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        brx.select(rule)


def test_a_default_that_is_no_set_is_refused():
    with pytest.raises(ValueError, match=r"got .*Binary"):
        brx.select(default=brx.Binary)
