"""A quadratic in two dimensions: same SGD, same start, a tenth of the learning rate from step 75 on.

At a binary point the gradient never vanishes. It drives BinaryConnect's float weights across an axis, where
a sign flips, and back, to and fro, from any start. BinaryRelax settles near the minimum, then on the best point.
"""

import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import brelax_jax as brx

A, target, start = jnp.array([[1.2, -0.6], [-0.6, 3.1]]), jnp.array([1.2, -1.9]), jnp.array([[0.3, 1.8]])
sgd, binary = optax.sgd(optax.piecewise_constant_schedule(0.1, {75: 0.1})), brx.Binary()
relax = brx.binary_relax(sgd, binary, brx.geometric_continuation(0.1, 1.055), hard_from=75)
figure, axes = plt.subplots(1, 2, figsize=(9, 4.6), sharex=True, sharey=True, layout="constrained")
runs = {"BinaryConnect": brx.binary_connect(sgd, binary), "BinaryRelax": relax}
for axis, (name, optimizer) in zip(axes, runs.items(), strict=True):
    w, state, path = start, optimizer.init(start), [start[0]]
    for _ in range(115):
        updates, state = optimizer.update((w - target) @ A, state, w)  # the quadratic's gradient
        w = optax.apply_updates(w, updates)
        path.append(w[0])
    print(f"{name}: ends at {w[0].round(2)}, loss {0.5 * (w[0] - target) @ A @ (w[0] - target):.2f}")
    for slope in (1, -1):
        axis.axline((0, 0), slope=slope, color="0.8", zorder=0)
    axis.plot(*jnp.stack(path).T, ".-", lw=0.6, ms=5, color="#1f6fb4")
    axis.plot(*target, "k*", *w[0], "o", ms=9, mfc="none", mec="#d1495b", mew=2)
    axis.set(title=f"{name} (star: minimum, ring: end)", xlabel="$w_1$", ylabel="$w_2$")
figure.savefig("two_dimensions.png", dpi=130)
