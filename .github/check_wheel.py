"""Checks a wheel that was installed in an empty environment: run it from outside the checkout."""

import importlib.metadata
import importlib.util
import re

import numpy as np

import brelax_jax as brx

files = [str(file) for file in importlib.metadata.files("brelax_jax") or ()]
folders = {file.partition("/")[0] for file in files}
assert folders == {"brelax_jax", f"brelax_jax-{brx.__version__}.dist-info"}, folders
assert "brelax_jax/py.typed" in files
links = re.findall(r"\]\(([^)]*)\)", importlib.metadata.metadata("brelax_jax").get_payload())
relative = [link for link in links if not link.startswith("https://")]
assert links
assert not relative, relative
assert "site-packages" in brx.__file__, brx.__file__
for extra in ("flax", "matplotlib", "pytest", "tensorflow_datasets"):
    assert importlib.util.find_spec(extra) is None, f"{extra} is no dependency"

np.testing.assert_allclose(brx.Binary().project(np.float32([1, -3])), [2, -2])
np.testing.assert_allclose(brx.Ternary().project(np.float32([0.1, -3, 3])), [0, -3, 3])
print("brelax_jax", brx.__version__, "in", len(files), "files")
