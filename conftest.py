"""What all tests share."""

import contextlib
import copy
import dataclasses
import gc
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache

import brelax_jax
from tests.helpers import forked, quick

quick.install()
gc.set_threshold(100_000, 20, 20)  # to import and to trace makes many objects that stay

EVERY_PLATFORM = {"contract", "devices", "test_batched_search", "test_export", "test_lanes"}
KINDS = ("quickly, for every platform", "optimized", "quickly")  # in this order
PACKAGE = Path(brelax_jax.__file__).parent
cached = []  # the kind of programs in JAX's caches
COMPILED = "BRELAX_JAX_COMPILED_TESTS"
SLOWEST = (
    "test_on_eight_devices", "test_resume", "test_exactness", "test_batched_search",
    "test_accuracy", "test_together", "test_examples", "test_language_model", "test_training_mesh",
    "test_sets", "test_wrappers", "test_exactness_loops", "test_distributed", "test_experiments",
    "test_transformations", "test_optimality", "test_scale_dtype", "test_export", "test_codes",
    "test_tree_tools", "test_search", "test_peers", "test_nnx", "test_networks", "test_start",
)  # fmt: skip


def pytest_configure(config):
    """A directory that keeps compiled programs, so that each is compiled once: in this process, its
    workers, and those that get the variables of `compiled_programs`.
    """
    if COMPILED not in os.environ:
        os.environ[COMPILED] = tempfile.mkdtemp()
        config.add_cleanup(lambda: shutil.rmtree(os.environ.pop(COMPILED)))
    jax.config.update("jax_compilation_cache_dir", os.environ[COMPILED])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_modifyitems(items):
    """Files whose programs are compiled alike follow one another, because caches are cleared in
    between. Of these the slowest come first, so that all workers end at about the same time.
    """
    alike = {}
    for item in items:
        alike[item.path] = max(alike.get(item.path, 0), KINDS.index(_kind(item)))
    items.sort(key=lambda i: (alike[i.path], [*SLOWEST, i.path.stem].index(i.path.stem)))


def _kind(test):
    """How a test's programs are compiled."""
    path = test.path
    if path.is_relative_to(PACKAGE) or "quickly_compiled" in getattr(test, "fixturenames", ()):
        every = EVERY_PLATFORM & {path.parent.name, path.stem}
        return "quickly, for every platform" if every else "quickly"
    return "optimized"


def _cache_only(kind):
    """Drops what JAX has cached of another kind: it does not tell them apart."""
    if cached != [kind]:
        jax.clear_caches()
        cached[:] = [kind]


@contextlib.contextmanager
def configured(**values):
    """Other values of JAX's configuration."""
    before = {name: jax.config.values[name] for name in values}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(values)
    yield
    use(before)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs():
    """The variables with which another process compiles into the same directory."""
    gc.freeze()  # what was imported stays: a collection need not go through it
    return {name.upper(): str(jax.config.values[name]) for name in forked.SETTINGS}


@pytest.fixture(scope="module")
def quickly_compiled(compiled_programs, request):
    """As `compiled_programs`, but programs are compiled with few optimizations: for runs so short
    that optimizing takes longer than it saves, and whose numbers are compared to a tolerance. The
    longer ones of `make soak` are optimized. And but for the tests in `EVERY_PLATFORM`, what would
    run on accelerators is not traced.
    """
    if request.config.option.markexpr == "soak":
        yield compiled_programs
        return
    _cache_only(_kind(request))
    with configured(jax_disable_most_optimizations=True), pytest.MonkeyPatch.context() as patch:
        if _kind(request) == "quickly":
            patch.setattr(lax, "platform_dependent", quick.on_cpu)
        yield compiled_programs | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "True"}


@pytest.fixture(scope="module", autouse=True)
def programs_of_this_kind(request):
    """The examples in docstrings are compiled quickly too."""
    if request.path.is_relative_to(PACKAGE):
        request.getfixturevalue("quickly_compiled")
    elif _kind(request) == "optimized":
        _cache_only("optimized")


@pytest.fixture(scope="module")
def traced_once():
    """Runs of equal settings are traced once, though they start from other weights or end in
    another directory.
    """
    from examples.train import loop

    trainers, new = {}, loop.Trainer

    def trainer(config, data):
        start = config.warm_start and "another run"  # its default strengths are others
        key = dataclasses.replace(config, out=None, warm_start=start)
        if key not in trainers:
            trainers[key] = new(config, data)
        shared = copy.copy(trainers[key])
        shared.config, shared.data = config, data
        return shared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Trainer", trainer)
        yield


@pytest.fixture(scope="module")
def undrawn():
    """Pictures are composed but not drawn."""
    from matplotlib.figure import Figure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda *_, **__: None)
        yield
