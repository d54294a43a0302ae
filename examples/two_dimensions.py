"""A quadratic, picked from 700 random ones, on which BinaryConnect flips signs without end.

BinaryRelax, with the same SGD and start, nears the minimum, then lands beside it. 75: phase II.
"""

import matplotlib.pyplot as plt
import numpy as np
import optax

import brelax_jax as brx
from brelax_jax._command_line import Parser

Parser("examples.two_dimensions", __doc__).parse_args()
A, target = np.array([[1.2, -0.6], [-0.6, 3.1]]), np.array([1.2, -1.9])
sgd, binary = optax.sgd(optax.piecewise_constant_schedule(0.1, {75: 0.1})), brx.Binary()
relax = brx.binary_relax(sgd, binary, brx.geometric_continuation(0.1, 1.055), hard_from=75)
runs = {"BinaryConnect": brx.binary_connect(sgd, binary), "BinaryRelax": relax}
for number, (name, optimizer) in enumerate(runs.items(), start=1):
    w, path = np.array([[0.3, 1.8]], np.float32), [np.array([0.3, 1.8])]
    state = optimizer.init(w)
    for _ in range(115):  # each with the quadratic's gradient
        updates, state = optimizer.update((w - target) @ A, state, w)
        w = np.asarray(optax.apply_updates(w, updates))
        path.append(w[0])
    flips, offset = np.diff(np.sign(path[-41:]), axis=0).any(axis=1).sum(), path[-1] - target
    print(f"{name}: {flips} flips in the last 40 steps, loss {offset @ A @ offset / 2:.2f}")
    plt.subplot(1, 2, number, title=f"{name} (star: minimum, ring: end)", aspect="equal")
    plt.plot([-2, 2, 0, -2, 2], [-2, 2, 0, 2, -2], color="0.8")  # the binary points
    plt.plot(*np.transpose(path), ".-", *target, "k*", *path[-1], "ro", lw=0.6, mfc="none")
plt.gcf().set_size_inches(9, 4.6)
plt.savefig("two_dimensions.png", dpi=130)
