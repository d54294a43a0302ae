"""Runs the tests that need eight devices where there are so many.

In a process of their own, because JAX fixes the number of devices when it starts; and in a single
one, because they train one network. Its programs are compiled with few optimizations; those of
`make soak` with all.
"""

import os
from pathlib import Path

import pytest

from tests.helpers import forked, meshes

NAMES = ("sharding", "shard_map", "metadata")
FILES = [str(Path(__file__).with_name(f"test_{name}.py")) for name in NAMES]


@pytest.mark.usefixtures("quickly_compiled")
@pytest.mark.parametrize(
    "extent", ["not soak", pytest.param("soak", marks=pytest.mark.soak)], ids=["", "soak"]
)
def test_on_eight_devices(extent, tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
    environ = {"XLA_FLAGS": f"{flags}{meshes.DEVICES}", "JAX_PLATFORMS": "cpu"}
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-m", extent]
    status = forked.run(tmp_path, pytest.main, [*options, *FILES], **environ)
    assert status == 0, (tmp_path / "printed").read_text()[-5000:]
