"""Networks that are saved come back bit for bit, and a file is there whole or not at all."""

import errno
import functools
import os
import signal
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import brelax_jax as brx
from brelax_jax.export._file import _write, read
from tests.helpers import snippets
from tests.helpers.altered import file, network
from tests.helpers.training import array, ones

pytestmark = pytest.mark.usefixtures("quickly_compiled")

RULES = brx.select(
    ("a/b/kernel", brx.TernaryThreshold(granularity=brx.PerChannel())),
    ("list/0", brx.Binary()),
    ("half", brx.ScaledLevels((-1.7, 1.7), granularity=brx.PerBlock(3, 0))),
)


@functools.cache
def start():
    """Params that are not on their sets, and their state."""
    rng = np.random.default_rng(0)
    kernel, first, half = (array(rng.standard_normal(n)) for n in ((4, 3), 5, 6))
    params = {
        "a/b": {"kernel": kernel, "bias": ones(3)},
        "list": [first, {"half": array(half, "bfloat16")}],
        "steps": array(3, "int32"),
    }
    return params, brx.binary_connect(optax.sgd(0.1), RULES).init(params)


@functools.cache
def quantized():
    params, state = start()
    return brx.quantized_params(state, params)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "network.safetensors"


def save(path, params, *args, **kwargs):
    """Where params are not on their sets."""
    with pytest.warns(UserWarning, match="are not the params"):
        brx.save(path, params, *args, **kwargs)


def check_equal(loaded, wanted):
    """Bit for bit, where a list has become a dict."""
    assert loaded.keys() == {*wanted}
    for key, value in wanted.items():
        value = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(value, dict):
            check_equal(loaded[key], value)
            continue
        assert isinstance(loaded[key], jax.Array)
        assert loaded[key].dtype == value.dtype
        assert loaded[key].shape == value.shape
        assert np.asarray(loaded[key]).tobytes() == np.asarray(value).tobytes(), key


def test_what_is_loaded_are_the_quantized_params_bit_for_bit(path):
    save(path, *start())
    check_equal(brx.load(path), quantized())


def test_packed_leaves_dequantize_to_the_same(path):
    save(path, *start())
    packed = brx.load(os.fspath(path), packed=True)
    assert isinstance(packed["a/b"]["kernel"], brx.Packed)
    assert packed["a/b"]["kernel"].data.nbytes == 3
    assert (packed["list"][0].levels, packed["list"][0].data.nbytes) == (2, 1)
    check_equal(jax.jit(brx.dequantize)(packed), quantized())


def test_a_network_on_its_sets_is_saved_without_a_warning(path):
    brx.save(path, quantized(), start()[1])
    check_equal(brx.load(path), quantized())


def test_weights_from_elsewhere_are_projected(path):
    params, _ = start()
    with pytest.warns(UserWarning, match=r"in 3 leaves, .* % of the norm, .*were projected"):
        brx.save(path, params, rules=RULES)
    check_equal(brx.load(path), jax.jit(brx.dequantize)(RULES.quantize(params)))


def test_in_phase_one_the_warning_says_by_how_much(path):
    params, state = start()
    kernel, w = params["a/b"]["kernel"], quantized()["a/b"]["kernel"]
    others = {"a/b": params["a/b"], "list": quantized()["list"], "steps": params["steps"]}
    percent = 100 * np.linalg.norm(w - kernel) / np.linalg.norm(kernel)
    with pytest.warns(
        UserWarning, match=f"1 leaves, at most by {percent:.3g} .*'a/b/kernel'.*Phas"
    ):
        brx.save(path, others, state)


def test_other_leaves_in_a_dtype_of_choice(path):
    save(path, *start(), dtype="bfloat16")
    loaded = brx.load(path)
    assert loaded["a/b"]["bias"].dtype == jnp.bfloat16
    assert loaded["a/b"]["kernel"].dtype == jnp.float32
    assert loaded["steps"].dtype == jnp.int32


def test_other_trees_beside_the_params(path):
    stats = {"norm": {"mean": array(range(3))}}
    save(path, *start(), others={"batch_stats": stats})
    loaded = brx.load(path)
    check_equal(loaded.pop("batch_stats"), stats)
    check_equal(loaded, quantized())
    with pytest.raises(ValueError, match="'a/b' is there twice, or contains other leaves"):
        brx.save(path, *start(), others={"a/b": ones(2)})


def test_params_that_are_one_array(path):
    w = array([[1, -1], [1, 1]])
    brx.save(path, w, rules=brx.Binary())
    np.testing.assert_array_equal(brx.load(path), w)


def test_every_kind_of_leaf_comes_back(path):
    path.write_bytes(file())
    leaves = {
        "/".join(map(str, keys)): leaf if isinstance(leaf, tuple) else (None, None, leaf)
        for keys, leaf in network().items()
    }
    wanted = jax.jit(brx.dequantize)({name: leaf[2] for name, leaf in leaves.items()})
    for leaf in read(path):
        w = leaf.dequantize()
        assert w.dtype == wanted[leaf.name].dtype
        assert w.tobytes() == np.asarray(wanted[leaf.name]).tobytes()
        assert (leaf.qset, leaf.granularity) == leaves[leaf.name][:2]


def test_the_reader_of_the_documentation_needs_numpy_only(path):
    path.write_bytes(file())
    found = snippets.run("docs/file-format.md")["read"](path)
    wanted = {leaf.name: leaf.dequantize() for leaf in read(path)}
    assert found.keys() == wanted.keys()
    for name, w in wanted.items():
        assert found[name].dtype == w.dtype
        assert found[name].tobytes() == w.tobytes()


def test_equal_networks_are_equal_files(path):
    assert file.__wrapped__() == file()


def own_granularity():
    class Own(brx.PerTensor):
        pass

    return brx.Binary(granularity=Own())


@pytest.mark.parametrize(
    ("params", "kwargs", "message"),
    [
        ({"w": ones(2, 2)}, {}, "got neither"),
        ({"w": ones(2, 2)}, {"opt_state": 1, "rules": brx.Binary()}, "got both"),
        ({"w": ones(2, 2)}, {"rules": brx.Binary(), "dtype": "int8"}, "dtype must be"),
        (
            {"w": array([[np.nan]])},
            {"rules": brx.Binary()},
            "'w' has weights that are not",
        ),
        (
            {"w": ones(2, 2)},
            {"rules": own_granularity()},
            "'w' has scales by .*Own.* only those by PerT",
        ),
        (
            {"w": ones(2, 2), "w:codes": ones(1)},
            {"rules": brx.Binary()},
            "need the name 'w:codes'",
        ),
        (
            {"w": ones(2, 2), "c": array([1], "complex64")},
            {"rules": brx.Binary()},
            "complex",
        ),
    ],
)
def test_what_cannot_be_saved(path, params, kwargs, message):
    with pytest.raises(ValueError, match=message):
        brx.save(path, params, **kwargs)
    assert not path.exists()


def test_without_safetensors_the_extra_is_named(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (
        lambda: brx.save(path, {"w": ones(2, 2)}, rules=brx.Binary()),
        lambda: brx.load(__file__),
    ):
        with pytest.raises(ModuleNotFoundError, match=r"pip install 'brelax_jax\[export\]'"):
            call()


def write_new(path):
    brx.save(path, {"w": array(-np.ones((2, 2)))}, rules=brx.Binary())


def test_a_full_disk_leaves_the_old_file_whole(path, monkeypatch):
    brx.save(path, {"w": ones(2, 2)}, rules=brx.Binary())
    old = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            write_new(path)
    assert path.read_bytes() == old
    assert [*path.parent.iterdir()] == [path]
    write_new(path)
    assert np.asarray(brx.load(path)["w"])[0, 0] == -1


@pytest.mark.parametrize("moment", [(os, "fsync"), (Path, "replace")])
def test_a_kill_leaves_the_old_file_whole(path, moment, monkeypatch):
    write_new(path)  # compiles, too
    old = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork; nothing is compiled in it
        child = os.fork()
    if child == 0:
        monkeypatch.setattr(*moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        _write(path, b"new")
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert path.read_bytes() == old


def test_a_link_stays_one(path, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(path)
    write_new(link)
    assert link.is_symlink()
    assert np.asarray(brx.load(path)["w"])[0, 0] == -1
