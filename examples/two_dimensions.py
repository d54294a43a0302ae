"""A quadratic in two dimensions: same SGD, same start, a tenth of the learning rate from step 75 on.

At no binary point does the gradient vanish: it drives BinaryConnect's float weights across an axis,
where a sign flips, and back, without end. BinaryRelax nears the minimum, then lands beside it.
"""

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optax

import brelax_jax as brx

A, target, start = np.array([[1.2, -0.6], [-0.6, 3.1]]), np.array([1.2, -1.9]), [0.3, 1.8]
sgd, binary = optax.sgd(optax.piecewise_constant_schedule(0.1, {75: 0.1})), brx.Binary()
relax = brx.binary_relax(sgd, binary, brx.geometric_continuation(0.1, 1.055), hard_from=75)
runs = {"BinaryConnect": brx.binary_connect(sgd, binary), "BinaryRelax": relax}
axes: Any = plt.subplots(1, 2, figsize=(9, 4.6), sharex=True, sharey=True)[1]
for axis, (name, optimizer) in zip(axes, runs.items(), strict=True):
    path: list[Any] = [np.array([start], np.float32)]
    state = optimizer.init(path[0])
    for _ in range(115):  # with the quadratic's gradient
        updates, state = optimizer.update((path[-1] - target) @ A, state, path[-1])
        path.append(optax.apply_updates(path[-1], updates))
    points = np.concatenate(path)
    flips, offset = np.diff(np.sign(points), axis=0).any(axis=1), points[-1] - target
    print(
        f"{name}: {flips[-40:].sum()} flips in the last 40 steps, loss {offset @ A @ offset / 2:.2f}"
    )
    axis.plot([-2, 2, 0, -2, 2], [-2, 2, 0, 2, -2], color="0.8")  # the binary points
    axis.plot(*points.T, ".-", *target, "k*", *points[-1], "ro", lw=0.6, mfc="none")
    axis.set(title=f"{name} (star: minimum, ring: end)", xlabel="$w_1$", ylabel="$w_2$")
plt.savefig("two_dimensions.png", dpi=130)
