"""From stored images (uint8) to the network's inputs, inside the jitted step."""

import jax
import jax.numpy as jnp
from jax import Array


def normalize(images: Array, mean: Array, std: Array) -> Array:
    """float32, of mean 0 and deviation 1 in each channel over the training split."""
    return (images.astype(jnp.float32) - mean) / std


def augment(key: Array, images: Array, shifts: bool = True) -> Array:
    """Shifts by up to an eighth of the side, filled with zeros, unless images are random crops
    already; colour images are flipped, too.
    """
    shift_key, flip_key = jax.random.split(key)
    if shifts:
        images = _shifted(shift_key, images)
    if images.shape[-1] == 1:
        return images
    flip = jax.random.bernoulli(flip_key, shape=(len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


def _shifted(key: Array, images: Array) -> Array:
    count, height, width, channels = images.shape
    pad = height // 8
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (count, 2), 0, 2 * pad + 1)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)
