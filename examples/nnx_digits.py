"""BinaryRelax with Flax NNX: a ternary network for handwritten digits.

Only the optimizer is wrapped; the model, the loss and the loop are those of any NNX program.
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import brelax_jax as brx
from brelax_jax._command_line import Parser

BATCH = 64


class Network(nnx.Module):
    """Two convolutions and a dense layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Conv(1, 32, (3, 3), rngs=rngs)
        self.conv = nnx.Conv(32, 64, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(4 * 4 * 64, 10, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = nnx.relu(self.stem(x))
        x = nnx.relu(self.conv(x))
        return self.head(x.reshape(len(x), -1))


def loss(model: Network, images: Array, labels: Array) -> Array:
    """Mean cross entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(
    model: Network, optimizer: nnx.Optimizer[Network], images: Array, labels: Array
) -> None:
    """One step of any optimizer."""
    optimizer.update(model, nnx.grad(loss)(model, images, labels))


def main(epochs: int = 30) -> float:
    """Trains; prints and returns the test accuracy, and prints how many values each kernel has."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    train, test = train_test_split(np.arange(len(labels)), stratify=labels, random_state=0)
    steps = epochs * (len(train) // BATCH)
    hard_from = 3 * steps // 4

    model = Network(nnx.Rngs(0))
    base = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    lam = brx.linear_continuation(hard_from)
    relaxed = brx.binary_relax(base, brx.TernaryThreshold(), lam, hard_from)  # the line that is new
    optimizer = nnx.Optimizer(model, relaxed, wrt=nnx.Param)  # was: nnx.Optimizer(model, base, …)

    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(train)
        for start in range(0, len(train) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            train_step(model, optimizer, jnp.asarray(images[batch]), jnp.asarray(labels[batch]))

    accuracy = float(jnp.mean(model(jnp.asarray(images[test])).argmax(axis=-1) == labels[test]))
    print(f"test accuracy {accuracy:.1%}")
    for name in ("stem", "conv", "head"):
        print(f"{name}: {len(np.unique(getattr(model, name).kernel[...]))} distinct values")
    return accuracy


if __name__ == "__main__":
    Parser("examples.nnx_digits", __doc__).parse_args()
    main()
