"""The initializer of the training program's networks."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from examples.train.models import conv_init

pytestmark = pytest.mark.usefixtures("quickly_compiled")

HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


@pytest.mark.parametrize(
    ("shape", "partitionable"),
    [((3, 3, 4, 8), False), ((1, 3, 1, 2), True)],
)
def test_kernels_start_as_flax_draws_them(shape, partitionable):
    """To rounding, which versions of Flax do differently; in shapes that XLA compiles fast."""
    with jax.threefry_partitionable(partitionable):
        ours, theirs = (init(jax.random.key(3), shape) for init in (conv_init, HE))
    np.testing.assert_allclose(ours, theirs, rtol=3e-7)
