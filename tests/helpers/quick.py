"""Programs that are compiled quickly: for what is compared with, and never for what is tested.

Their sums go from one entry to the next, so they are less precise than those of other programs.
"""

import functools

import jax
from jax._src import compiler

OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OLDER = {"xla_cpu_use_fusion_emitters": False}  # generates code in a third of the time

get_compile_options = compiler.get_compile_options


@functools.cache
def options():
    """Those of XLA's options that this version of it knows."""
    try:
        jax.jit(lambda: 0, compiler_options=OPTIONS | OLDER).lower().compile()
    except jax.errors.JaxRuntimeError:
        return OPTIONS
    return OPTIONS | OLDER


def jit(function, **kwargs):
    """As `jax.jit`, but JAX starts only when the result is called."""

    @functools.cache
    def jitted():
        return jax.jit(function, compiler_options=options(), **kwargs)

    return lambda *args: jitted()(*args)


def install():
    """Makes `jax_disable_most_optimizations` mean these options, for all programs."""
    compiler.get_compile_options = _get_compile_options


def _get_compile_options(*args, env_options_overrides=None, **kwargs):
    if jax.config.values["jax_disable_most_optimizations"]:
        env_options_overrides = env_options_overrides or options()
    return get_compile_options(*args, env_options_overrides=env_options_overrides, **kwargs)
