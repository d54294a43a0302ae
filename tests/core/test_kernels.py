"""What one set alone applies to, by the names that frameworks and models give to their weights."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import brelax_jax as brx

pytestmark = pytest.mark.usefixtures("quickly_compiled")

TERNARY = brx.Ternary()
TREES = {
    "ViT, big_vision": (
        {
            "embedding": {"kernel": (2, 2, 3, 8), "bias": (8,)},
            "cls": (1, 1, 8),
            "pos_embedding": (1, 5, 8),
            "Transformer": {
                "encoderblock_0": {
                    "LayerNorm_0": {"scale": (8,), "bias": (8,)},
                    "MlpBlock_0": {"Dense_0": {"kernel": (8, 32), "bias": (32,)}},
                    "MultiHeadDotProductAttention_0": {"query": {"kernel": (8, 2, 4)}},
                },
                "encoder_norm": {"scale": (8,)},
            },
            "head": {"kernel": (8, 3)},
        },
        ["Dense_0/kernel", "query/kernel", "head/kernel"],
    ),
    "Hugging Face, ViT": (
        {
            "embeddings": {
                "cls_token": (1, 1, 4),
                "position_embeddings": (1, 5, 4),
                "patch_embeddings": {"projection": {"kernel": (2, 2, 3, 4)}},
            },
            "layernorm_before": {"scale": (4,)},
            "attention": {"query": {"kernel": (4, 4), "bias": (4,)}},
        },
        ["query/kernel"],
    ),
    "Hugging Face, GPT-2": (
        {
            "wte": {"embedding": (9, 4)},
            "wpe": {"embedding": (5, 4)},
            "h": {"0": {"ln_1": {"scale": (4,)}, "attn": {"c_attn": {"kernel": (12, 4)}}}},
        },
        ["c_attn/kernel"],
    ),
    "Haiku": (
        {"embed": {"embeddings": (5, 4)}, "linear": {"w": (4, 4), "b": (4,)}},
        ["linear/w"],
    ),
    "stacked by hk.layer_stack": (
        {
            "layer_norm": {"scale": (6, 4), "offset": (6, 4)},
            "linear": {"w": (6, 4, 4), "b": (6, 4)},
        },
        ["linear/w"],
    ),
    "stacked by nn.scan": (
        {"ln": {"scale": (6, 4), "bias": (6, 4)}, "gate": {"kernel": (6, 4, 4)}},
        ["gate/kernel"],
    ),
    "RMS norms and PReLU": (
        {
            "rms": {"weight": (6, 4)},
            "RMSNorm_0": {"weight": (6, 4)},
            "prelu": {"negative_slope": (6, 1)},
            "batch_norm": {"gamma": (1, 4), "beta": (1, 4)},
            "linear": {"weight": (4, 4)},
        },
        ["linear/weight"],
    ),
    "by hand": ({"w1": (4, 4), "b1": (1, 4), "w2": (4, 2), "b": (1, 2)}, ["w1", "w2"]),
    "kernels beneath names of something else": (
        {
            "PreNorm_0": {"fn": {"Dense_0": {"kernel": (4, 4)}}},
            "token_mixing": {"Dense_0": {"kernel": (4, 4)}},
            "post_attention": {"kernel": (4, 4)},
        },
        ["fn/Dense_0/kernel", "token_mixing/Dense_0/kernel", "post_attention/kernel"],
    ),
    "names in which those of something else are parts": (
        {"upscale": (4, 4), "lora_b": (4, 2)},
        ["upscale", "lora_b"],
    ),
}


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, "float32"),
        tree,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.mark.parametrize("name", TREES)
def test_of_which_leaves_kernels_are_told_apart(name):
    tree, wanted = TREES[name]
    found = brx.select(default=TERNARY).assign(shapes(tree))
    assert len(found) == len(wanted)
    for end in wanted:
        assert any(path.endswith(end) for path in found), (end, list(found))


NOTHING = {
    "one set": brx.Binary(),
    "a default": brx.select(default=brx.Binary()),
    "a pattern takes the only kernel": brx.select(("^a/", None), default=brx.Binary()),
    "a function": brx.select((lambda path, leaf: leaf.ndim == 3, brx.Binary())),
}


@pytest.mark.parametrize("rules", NOTHING.values(), ids=NOTHING)
def test_a_set_that_selects_nothing_is_an_error_that_lists_the_paths(rules):
    params = {"a": {"bias": jnp.ones((2, 2))}, "norm": {"scale": jnp.ones(3)}}
    if isinstance(rules, brx.Selection) and rules.rules:
        params["a"] = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match=r"Binary\(.*no leaf is selected.*a/.*, norm/scale\."):
        brx.binary_connect(optax.sgd(0.1), rules).init(params)


@pytest.mark.parametrize("rules", [brx.select(), brx.select(("kernel", None)), {"kernel": None}])
def test_no_set_at_all_is_none(rules):
    params = {"kernel": jnp.ones((2, 2))}
    state = brx.binary_connect(optax.sgd(0.1), rules).init(params)
    assert brx.metrics(state, params) == {}


def experts(granularity):
    """Weights of four experts, of which one is small, and whether a warning names it."""
    w = np.random.default_rng(0).standard_normal((4, 6, 5)).astype(np.float32)
    w[2] *= 1e-2
    params = {"moe": {"kernel": jnp.asarray(w)}}
    optimizer = brx.binary_connect(optax.sgd(0.0), brx.Ternary(granularity=granularity))
    return optimizer, params


@pytest.mark.parametrize("granularity", [brx.PerTensor(), brx.PerChannel()])
def test_experts_that_would_vanish_are_named(granularity):
    optimizer, params = experts(granularity)
    message = r"'moe/kernel'.*1 of the 4 slices along axis 0.* 2\..*PerChannel\(\(0, -1\)\)"
    with pytest.warns(UserWarning, match=message):
        state = optimizer.init(params)
    assert not np.any(brx.quantized_params(state, params)["moe"]["kernel"][2])
    jax.jit(optimizer.init)(params)  # values are not known, and warnings are errors


def test_with_the_granularity_that_the_warning_names_they_stay():
    optimizer, params = experts(brx.PerChannel((0, -1)))
    quantized = brx.quantized_params(optimizer.init(params), params)["moe"]["kernel"]
    assert np.all(np.any(quantized != 0, axis=(1, 2)))


def test_experts_of_zeros_vanish_silently():
    """Zeros are their own projection."""
    optimizer, params = experts(brx.PerTensor())
    zeros = jax.tree.map(lambda w: w.at[2].set(0), params)
    optimizer.init(zeros)


def test_a_vision_transformer_of_flax():
    class ViT(linen.Module):
        """With the names of the published ones."""

        @linen.compact
        def __call__(self, x):
            x = linen.Conv(8, (2, 2), (2, 2), name="embedding")(x).reshape(x.shape[0], -1, 8)
            cls = self.param("cls", linen.initializers.zeros, (1, 1, 8))
            x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], 1)
            x += self.param("pos_embedding", linen.initializers.normal(0.02), (1, x.shape[1], 8))
            return linen.Dense(3, name="head")(linen.MultiHeadDotProductAttention(2)(x).mean(1))

    params = jax.eval_shape(ViT().init, jax.random.key(0), jnp.ones((1, 4, 4, 3)))["params"]
    attention = [f"MultiHeadDotProductAttention_0/{part}/kernel" for part in ("key", "out")]
    attention += [f"MultiHeadDotProductAttention_0/{part}/kernel" for part in ("query", "value")]
    assert list(brx.select(default=TERNARY).assign(params)) == [*attention, "head/kernel"]
