"""Programs that are compiled quickly: for what is compared with, and never for what is tested.

Their sums go from one entry to the next, so they are less precise than those of other programs.
"""

import functools

import jax

OPTIONS = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LEGACY = {"xla_cpu_use_fusion_emitters": False}  # XLA's older code generator takes half the time


@functools.cache
def options():
    """Those of XLA's options that this version of it knows."""
    try:
        jax.jit(lambda: 0, compiler_options=OPTIONS | LEGACY).lower().compile()
    except jax.errors.JaxRuntimeError:
        return OPTIONS
    return OPTIONS | LEGACY


def jit(function):
    return jax.jit(function, compiler_options=options())
