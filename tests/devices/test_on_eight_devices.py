"""Runs the tests that need eight devices where there are so many.

In a process of their own, because JAX fixes the number of devices when it starts; and in a single
one, because they train one network. Its programs are compiled with few optimizations; those of
`make soak` with all.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import meshes

NAMES = ("sharding", "shard_map", "metadata")
FILES = [Path(__file__).with_name(f"test_{name}.py") for name in NAMES]


@pytest.mark.parametrize(
    "extent", ["not soak", pytest.param("soak", marks=pytest.mark.soak)], ids=["", "soak"]
)
def test_on_eight_devices(extent):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
    environment = {
        "XLA_FLAGS": f"{flags}{meshes.DEVICES}",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": str(extent == "not soak"),
    }
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-m", extent]
    command = [sys.executable, "-m", "pytest", *options, *FILES]
    done = subprocess.run(
        command,
        env=os.environ | environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
