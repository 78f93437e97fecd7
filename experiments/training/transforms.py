"""Images as numbers from 0 to 1, and the random moves of training images."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

AxisName = str | tuple[str, ...] | None


def scaled(images: Array) -> Array:
    """Bytes to float32 in 0 … 1."""
    return images.astype(jnp.float32) / 255


def draw(
    sampler: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...], axis_name: AxisName
) -> Array:
    """Random numbers `[B, ...]`, the same for an example however a batch is split over devices.

    Args:
      sampler: Draws for the whole batch, given a shape.
      shape: That of the numbers for the examples here.
      axis_name: The axes of a mesh over which the batch is split; None for one device.
    """
    if axis_name is None:
        return sampler(shape)
    examples, *rest = shape
    whole = sampler((examples * lax.axis_size(axis_name), *rest))
    return lax.dynamic_slice_in_dim(whole, examples * lax.axis_index(axis_name), examples)


def shifted(images: Array, key: Array, limit: int, *, axis_name: AxisName = None) -> Array:
    """Moves each image `[B, H, W, C]` by up to `limit` pixels along each axis, filling with 0."""
    if limit == 0:
        return images
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (limit, limit), (limit, limit), (0, 0)))
    return _windows(padded, key, (height, width), 2 * limit + 1, axis_name)


def placed(images: Array, key: Array, canvas: int, *, axis_name: AxisName = None) -> Array:
    """Puts each image `[B, S, S, C]` somewhere on a black square `[B, canvas, canvas, C]`."""
    free = canvas - images.shape[1]
    if free == 0:
        return images
    padded = jnp.pad(images, ((0, 0), (free, free), (free, free), (0, 0)))
    return _windows(padded, key, (canvas, canvas), free + 1, axis_name)


def _windows(
    images: Array, key: Array, size: tuple[int, int], places: int, axis_name: AxisName
) -> Array:
    """Cuts a window out of each image, its corner at random in a square of `places` pixels."""
    offsets = draw(
        lambda shape: jax.random.randint(key, shape, 0, places), (len(images), 2), axis_name
    )

    def cut(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (*size, images.shape[-1]))

    return jax.vmap(cut)(images, offsets)
