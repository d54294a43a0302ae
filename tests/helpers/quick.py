"""Programs that are compiled quickly: for what is compared with, and never for what is tested.

Their sums go from one entry to the next, so they are less precise than those of other programs.
"""

import functools
import os
import threading

import jax
from jax._src import compilation_cache, compiler, lru_cache
from jax._src.interpreters import mlir

OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OLDER = {"xla_cpu_use_fusion_emitters": False}  # generates code in a third of the time
# For all programs: to divide a small one among threads takes longer than it saves.
IN_ONE_PART = {"xla_cpu_parallel_codegen_split_count": 1}

get_compile_options = compiler.get_compile_options
make_ir_context = mlir.make_ir_context


@functools.cache
def options():
    return OPTIONS | known(OLDER) | in_one_part()


@functools.cache
def in_one_part():
    return known(IN_ONE_PART)


def known(options):
    """These of XLA's options, or none if this version of it does not know them."""
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return options


def jit(function, **kwargs):
    """As `jax.jit`, but JAX starts only when the result is called."""

    @functools.cache
    def jitted():
        return jax.jit(function, compiler_options=options(), **kwargs)

    return lambda *args: jitted()(*args)


def on_cpu(*args, default, cpu=None, **others):
    """In the place of `lax.platform_dependent`."""
    return (cpu or default)(*args)


def install():
    """Makes `jax_disable_most_optimizations` mean `options`, for all programs; without it each is
    optimized, in one part. The programs of a thread share MLIR's context: to make one takes longer
    than all else that is done to lower a small program. And several processes may keep compiled
    programs in one directory, as they are: to compress them takes longer than to write them.
    """
    lru_cache.LRUCache.put = _put
    compilation_cache.compress_executable = compilation_cache.decompress_executable = bytes
    mlir.make_ir_context = lambda: _context_of(threading.get_ident())
    compiler.get_compile_options = _get_compile_options


def _put(cache, key, value):
    """Others see the file only when it is whole."""
    part = cache.path / f"{key}.{os.getpid()}"
    part.write_bytes(value)
    part.replace(cache.path / f"{key}{lru_cache._CACHE_SUFFIX}")


@functools.cache
def _context_of(thread):
    return make_ir_context()


def _get_compile_options(*args, env_options_overrides=None, **kwargs):
    if not env_options_overrides:
        quickly = jax.config.values["jax_disable_most_optimizations"]
        env_options_overrides = options() if quickly else in_one_part()
    return get_compile_options(*args, env_options_overrides=env_options_overrides, **kwargs)
