"""The Python snippets of the README and of docs/ run, and do what their pages say of them."""

import re

import chex
import jax
import numpy as np
import optax
import pytest

import brelax_jax as brx
from tests.helpers import forked
from tests.helpers.snippets import PAGES, prose, read, run, run_strictly, snippets

ON_EIGHT_DEVICES = ["docs/sharding.md"]
NEEDED = {"docs/export.md": ("gguf", "jax2onnx", "onnxruntime")}  # beside the extra `test`
HERE = [page for page in PAGES if snippets(page) and page not in ON_EIGHT_DEVICES]


@pytest.fixture(scope="module", autouse=True)
def cache(quickly_compiled):
    return quickly_compiled


@pytest.mark.parametrize("page", HERE)
def test_snippets_run(page):
    for package in NEEDED.get(page, ()):
        pytest.importorskip(package)
    run(page)


@pytest.mark.parametrize("page", ON_EIGHT_DEVICES)
def test_snippets_run_on_eight_devices(page, tmp_path):
    """In a process of their own: JAX fixes the number of devices when it starts."""
    flags = "--xla_force_host_platform_device_count=8"
    status = forked.run(tmp_path, run_strictly, page, XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    assert status == 0, (tmp_path / "printed").read_text()


@pytest.mark.parametrize("page", PAGES)
def test_no_snippet_is_overlooked(page):
    """Fenced blocks name their language, and no indented block holds Python."""
    fences = re.findall(r"^ *(?:```|~~~).*$", read(page), re.M)
    assert set(fences[::2]) <= {"```python", "```sh", "```text"}
    assert set(fences[1::2]) <= {"```"}
    assert not re.findall(r"^ {4}.*\b(?:brx|jax|optax)\.\w+\(.*$", prose(page), re.M)


def test_the_rules_fit_their_network():
    """A rule for which there is no leaf is an error."""
    names = run("docs/getting_started.md")
    jax.eval_shape(brx.binary_relax(optax.sgd(0.1), names["rules"], 1.0).init, names["params"])


def test_the_program_of_the_readme_learns_and_ends_binary():
    names = run("README.md")
    correct = names["model"].apply(names["params"], names["test_x"]).argmax(-1) == names["test_y"]
    assert correct.mean() > 0.94
    for layer in names["params"]["params"].values():
        assert len(np.unique(layer["kernel"])) == 2


@pytest.mark.parametrize(
    ("weights", "average"), [("deployed", "average"), ("deployed_ema", "averaged")]
)
def test_what_is_deployed_is_the_projected_average(weights, average):
    names = run("docs/wrappers.md")
    deployed, mean = names[weights]["kernel"], names[average]["kernel"]
    np.testing.assert_allclose(deployed, brx.Binary().project(mean), rtol=1e-5)
    assert len(np.unique(deployed)) == 2
    assert len(np.unique(mean)) > 2


def test_the_average_is_that_of_the_float_weights():
    """Each counts 0.9 times as much as the next."""
    history = []
    names = run("docs/wrappers.md")
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
    names = run("docs/wrappers.md")
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
