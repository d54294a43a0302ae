"""A small file of ours, altered at random: `python -m tests.helpers.altered 10000`.

An altered file must be refused with a ValueError, or load as the same weights. One whose header was
altered and given the right checksum must be refused, or load as finite weights of its own shapes.
"""

import copy
import functools
import hashlib
import json
import random
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

import brelax_jax as brx
from brelax_jax.export._format import KEY, NO_SUM, Leaf, encode
from brelax_jax.export._packing import levels_of, pack_leaf

NONSENSE = (
    None, True, 0, 1, -1, 3, 2**70, 1e400, -0.5, float("nan"), "", "0", "kernel", "float32",
    "PerTensor", [], [0], [-1, 1], [-2, 0, 2], [2**40], {}, {"kind": "PerTensor"}, [[]] * 3,
)  # fmt: skip


def quantized(rng, shape, scales, magnitudes, has_zero=True, dtype="float32", spacing=None):
    """A `Quantized` of NumPy's arrays, with random codes."""
    most = len(magnitudes)
    codes = [code for code in range(-most, most + 1) if code or has_zero]
    scale = rng.uniform(0.5, 2, scales).astype("f4")
    return brx.Quantized(
        rng.choice(np.array(codes, "i1"), shape),
        scale,
        (0.0, *map(float, magnitudes)),
        np.dtype(jax.numpy.dtype(dtype)),
        None if spacing is None else np.full(scales, spacing, "f4"),
        has_zero,
    )


def network():
    """The leaves of a small network: {path: (set, granularity, Quantized) or array}."""
    rng = np.random.default_rng(0)
    block, channel, tensor = brx.PerBlock(4, 0), brx.PerChannel(), brx.PerTensor()
    return {
        ("conv", "kernel"): ("Binary", tensor, quantized(rng, (3, 4), (1, 1), [1], False)),
        ("layers", 0, "w"): ("Ternary", channel, quantized(rng, (3, 4), (1, 4), [1])),
        ("layers", 1, "w"): ("Uniform(4)", block, quantized(rng, (8, 2), (2, 2), range(1, 8))),
        ("levels",): (
            "ScaledLevels",
            tensor,
            quantized(rng, (5,), (1,), [0.3, 1.7], False, "bfloat16", 2.0**-9),
        ),
        ("bias",): rng.standard_normal(3).astype("f4"),
        ("half",): rng.standard_normal(3).astype(jax.numpy.bfloat16),
        ("steps",): np.array(7, "i4"),
    }


@functools.cache
def file():
    """The bytes of a file that holds it."""
    return encode(
        [
            Leaf(keys, leaf)
            if isinstance(leaf, np.ndarray)
            else Leaf(keys, pack_leaf(leaf[2], np), leaf[0], leaf[1])
            for keys, leaf in network().items()
        ]
    )


def altered_bytes(rng, raw):
    """Bytes that were written over, lost, put in, or moved."""
    start = rng.choice((rng.randrange(len(raw)), rng.randrange(16), len(raw) - 1))
    end = min(len(raw), start + rng.choice((1, 1, 2, 8, 200)))
    new = rng.choice(
        (
            bytes([raw[start] ^ (1 << rng.randrange(8))]) + raw[start + 1 : end],
            rng.randbytes(end - start),
            bytes(end - start),
            b"",
            raw[start:end] * 2,
            rng.randbytes(rng.randrange(9)),
            raw[start:end][::-1],
        )
    )
    return rng.choice((raw[:start] + new + raw[end:], raw[:start], raw[:start] + new))


def header_of(raw):
    """The header of our own, and a function that gives a file with another one."""
    size = int.from_bytes(raw[:8], "little")
    outer = json.loads(raw[8 : 8 + size])

    def sealed(header, tensors=None, data=None):
        """A file with this header, the right checksum, and perhaps other tensors and data."""
        header = {**header, "sha256": NO_SUM}
        other = {**outer, **(tensors or {}), "__metadata__": {KEY: json.dumps(header)}}
        text = json.dumps({name: value for name, value in other.items() if value is not None})
        body = raw[8 + size :] if data is None else data
        file = len(text).to_bytes(8, "little") + text.encode() + body
        return file.replace(NO_SUM.encode(), hashlib.sha256(file).hexdigest().encode(), 1)

    return json.loads(outer["__metadata__"][KEY]), sealed


def altered_header(rng, raw):
    """A file in whose header one value is another, with the right checksum."""
    header, sealed = header_of(raw)
    node, places = header, []
    while True:
        children = node.items() if isinstance(node, dict) else enumerate(node)
        places += [(node, key) for key, _ in children]
        inner = [child for _, child in children if isinstance(child, dict | list) and child]
        if not inner or (node is not header and rng.random() < 0.3):
            break
        node = rng.choice(inner)
    node, key = rng.choice(places)
    others = [place[at] for place, at in places]
    if rng.random() < 0.2:
        del node[key]
    else:
        node[key] = copy.deepcopy(rng.choice((*NONSENSE, *others)))
    return sealed(header)


def wrong(error):
    raise AssertionError(f"{error} does not name the file")


def check(path, seed):
    """Loads a file that was altered; returns whether it was refused."""
    rng = random.Random(seed)
    keeps_weights = rng.random() < 0.6
    path.write_bytes((altered_bytes if keeps_weights else altered_header)(rng, file()))
    try:
        loaded, packed = brx.load(path), brx.load(path, packed=True)
    except ValueError as error:
        return str(error).startswith(f"{path}: ") or wrong(error)
    for leaf in jax.tree.leaves(packed, is_leaf=lambda leaf: isinstance(leaf, brx.Packed)):
        if isinstance(leaf, brx.Packed):
            assert levels_of(leaf) > 1
            assert np.isfinite(leaf.scale).all()
    weights = jax.device_get(loaded)
    assert all(np.isfinite(np.asarray(w, "f4")).all() for w in jax.tree.leaves(weights))
    if keeps_weights:
        path.write_bytes(file())
        jax.tree.map(np.testing.assert_array_equal, weights, jax.device_get(brx.load(path)))
    return False


def main(count):
    """Prints how many of so many altered files were refused; the others loaded as they must."""
    warnings.simplefilter("error")
    with TemporaryDirectory() as directory:
        path = Path(directory) / "file.safetensors"
        refused = sum(check(path, seed) for seed in range(count))
    print(f"{count} altered files, {refused} refused")


if __name__ == "__main__":
    main(int(sys.argv[1]))
