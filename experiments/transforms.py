"""Images as numbers from 0 to 1, and the random moves of training images."""

import jax
import jax.numpy as jnp
from jax import Array


def scaled(images: Array) -> Array:
    """Bytes to float32 in 0 … 1."""
    return images.astype(jnp.float32) / 255


def shifted(images: Array, key: Array, limit: int) -> Array:
    """Moves each image `[B, H, W, C]` by up to `limit` pixels along each axis, filling with 0."""
    if limit == 0:
        return images
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (limit, limit), (limit, limit), (0, 0)))
    return _windows(padded, key, (height, width), 2 * limit + 1)


def placed(images: Array, key: Array, canvas: int) -> Array:
    """Puts each image `[B, S, S, C]` somewhere on a black square `[B, canvas, canvas, C]`."""
    free = canvas - images.shape[1]
    if free == 0:
        return images
    padded = jnp.pad(images, ((0, 0), (free, free), (free, free), (0, 0)))
    return _windows(padded, key, (canvas, canvas), free + 1)


def _windows(images: Array, key: Array, size: tuple[int, int], places: int) -> Array:
    """Cuts a window out of each image, its corner at random in a square of `places` pixels."""
    offsets = jax.random.randint(key, (len(images), 2), 0, places)

    def cut(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (*size, images.shape[-1]))

    return jax.vmap(cut)(images, offsets)
