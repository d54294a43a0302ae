"""The programs in docs/wrappers.md run, and do what the page says of them."""

import functools
import pathlib
import re

import chex
import jax
import numpy as np
import optax
import pytest

import brelax_jax as brx

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "wrappers.md"


@functools.cache
def page():
    """The names that the page's programs define, one after the other."""
    names = {}
    for program in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(program, names)
    return names


@pytest.mark.parametrize(
    ("weights", "average"), [("deployed", "average"), ("deployed_ema", "averaged")]
)
def test_what_is_deployed_is_the_projected_average(weights, average):
    deployed, mean = page()[weights]["kernel"], page()[average]["kernel"]
    np.testing.assert_allclose(deployed, brx.Binary().project(mean), rtol=1e-5)
    assert len(np.unique(deployed)) == 2
    assert len(np.unique(mean)) > 2


def test_the_average_is_that_of_the_float_weights():
    """Each counts 0.9 times as much as the next."""
    history = []
    names = page()
    names["train"](
        brx.binary_relax(optax.sgd(0.5), brx.Binary(), lam=1.0, hard_from=30),
        names["params"],
        40,
        lambda state, params: history.append(brx.float_params(state, params)["kernel"]),
    )
    wanted = np.average(history, axis=0, weights=0.9 ** np.arange(39, -1, -1))
    np.testing.assert_allclose(names["averaged"]["kernel"], wanted, rtol=1e-4, atol=1e-6)


def test_lookahead_of_the_float_weights():
    """As a base, it moves them as Optax's moves its fast params; and the params end exact."""
    names = page()
    chex.assert_trees_all_equal(
        names["ahead"], brx.quantized_params(names["ahead_state"], names["ahead"])
    )
    optimizer = brx.binary_relax(names["lookahead"](optax.sgd(0.5), 3, 0.5), brx.Binary(), 0.0)
    params, _ = names["train"](optimizer, names["params"], 7)
    theirs = optax.lookahead(optax.sgd(0.5), 3, 0.5)
    both = optax.LookaheadParams.init_synced(names["params"])
    state = theirs.init(both)
    for _ in range(7):
        updates, state = theirs.update(jax.grad(names["loss"])(both.fast), state, both)
        both = optax.apply_updates(both, updates)
    chex.assert_trees_all_close(params, both.fast, rtol=1e-5)
