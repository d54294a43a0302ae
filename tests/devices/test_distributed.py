"""Two processes train a network to the params of one."""

import functools
import socket

import jax
import numpy as np
import pytest

import brelax_jax as brx
from tests.helpers import forked, meshes, quick, two_processes

TIMEOUT = 600  # seconds, only so that nothing ever hangs


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def in_two_processes(steps, across, sets, directory):
    """What each process has before the first step and after each: (params, state)."""
    environ = {
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    port, places = free_port(), [directory / str(process) for process in range(2)]
    outs = [place / "out.npz" for place in places]
    processes = []
    try:
        for process, (place, out) in enumerate(zip(places, outs, strict=True)):
            place.mkdir()
            arguments = (port, process, steps, across, tuple(sets), out)
            processes.append(forked.start(place, two_processes.main, *arguments, **environ))
        structure = jax.tree.structure(on_one_device(tuple(sets))[0])  # while the two are at it
        for process in processes:
            process.join(TIMEOUT)
        printed = "\n".join((place / "printed").read_text()[-3000:] for place in places)
        assert [process.exitcode for process in processes] == [0, 0], printed
    finally:
        for process in processes:
            process.kill()
            process.join()
    for out in outs:
        with np.load(out) as arrays:
            leaves = [arrays[name] for name in arrays.files]
        size = structure.num_leaves
        starts = range(0, len(leaves), size)
        yield [jax.tree.unflatten(structure, leaves[start : start + size]) for start in starts]


@functools.cache
def on_one_device(names):
    return meshes.alone(meshes.relaxation({name: meshes.SETS[name] for name in names}))


@pytest.mark.parametrize(
    ("across", "steps", "sets"),
    [
        ("model", meshes.STEPS, meshes.WITHOUT_OWN),
        *(
            pytest.param(across, steps, meshes.SETS, marks=pytest.mark.soak)
            for across, steps in [("model", meshes.STEPS), ("data", meshes.STEPS), ("model", 60)]
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else str(value),
)
def test_two_processes_train_to_the_params_of_one(across, steps, sets, tmp_path):
    first, second = in_two_processes(steps, across, sets, tmp_path)
    assert len(first) == steps + 1
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for t, (_, wanted) in enumerate(on_one_device(tuple(sets))):
        # Rounding adds up.
        meshes.assert_same(first[t][1], wanted, sets, rtol=1e-6 * 10 ** (t / 3))
    params, state = first[-1]
    quantized = quick.jit(brx.quantized_params)(state, params)
    jax.tree.map(np.testing.assert_array_equal, params, quantized)
