"""Scale and standardize images, and augment training images by random movements and jitter.

Shape letters are those of `capsjax.shapes`.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments.data import affine

AxisName = str | tuple[str, ...] | None


def scaled(images: Array) -> Array:
    """Convert bytes to float32, scaled to 0 … 1."""
    return images.astype(jnp.float32) / 255


def draw(
    sampler: Callable[[tuple[int, ...]], Array], shape: tuple[int, ...], axis_name: AxisName
) -> Array:
    """Draw random numbers `[B, ...]` that do not depend on how the batch is sharded.

    Args:
      sampler: Draws an array of a given shape; called with the shape for the whole batch.
      shape: Shape of the numbers for the examples on this device.
      axis_name: Mesh axes over which the batch is sharded; None for one device.

    Returns:
      The rows of the drawn array that belong to the examples on this device.
    """
    if axis_name is None:
        return sampler(shape)
    examples, *rest = shape
    whole = sampler((examples * lax.axis_size(axis_name), *rest))
    return lax.dynamic_slice_in_dim(whole, examples * lax.axis_index(axis_name), examples)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of training images, drawn anew for each image of a step, and standardization.

    `__call__` moves images, which a decoder then draws; `inputs` changes only what the network
    sees of them.
    """

    shift: int = 0  # largest shift along each axis, in pixels
    rotation: float = 0.0  # largest rotation, in degrees
    scale: float = 0.0  # largest change of width and height: 0.1 is up to 10 % smaller or larger
    canvas: int = 0  # side of a black canvas, in pixels; 0: the images keep their size
    crop: int = 0  # side of the part that is cut out, in pixels; 0: all
    brightness: float = 0.0  # largest value added to all pixels
    contrast: float = 0.0  # largest change of the factor on differences from a channel's mean
    standardize: bool = False  # whether images get mean 0 and variance 1, before the jitter

    def __call__(self, images: Array, key: Array, *, axis_name: AxisName = None) -> Array:
        """Rotate and scale, then shift, then place or crop images `[B, H, W, C]`."""
        if self.rotation or self.scale:
            images = turned(
                images,
                jax.random.fold_in(key, 3),
                rotation=self.rotation,
                scale=self.scale,
                axis_name=axis_name,
            )
        images = shifted(images, key, self.shift, axis_name=axis_name)
        if self.crop:
            return cropped(images, jax.random.fold_in(key, 4), self.crop, axis_name=axis_name)
        if not self.canvas:
            return images
        return placed(images, jax.random.fold_in(key, 1), self.canvas, axis_name=axis_name)

    def inputs(
        self, images: Array, key: Array | None = None, *, axis_name: AxisName = None
    ) -> Array:
        """Return images in 0 … 1 as the network takes them, with jitter if there is a key."""
        if self.standardize:
            images = standardized(images)
        if key is None or not (self.brightness or self.contrast):
            return images
        return jittered(
            images,
            jax.random.fold_in(key, 5),
            brightness=self.brightness,
            contrast=self.contrast,
            axis_name=axis_name,
        )


def standardized(images: Array) -> Array:
    """Give each image `[..., H, W, C]` mean 0 and variance 1 over all of its numbers.

    An image of equal numbers becomes 0, but for rounding.
    """
    axes = (-3, -2, -1)
    centred = images - images.mean(axes, keepdims=True)
    variance = jnp.square(centred).mean(axes, keepdims=True)
    # At least that of one byte that differs by one, below which there are only rounding errors.
    least = 1 / (255**2 * math.prod(images.shape[-3:]))
    return centred / jnp.sqrt(jnp.maximum(variance, least))


def jittered(
    images: Array, key: Array, *, brightness: float, contrast: float, axis_name: AxisName = None
) -> Array:
    """Change brightness and contrast of images `[B, H, W, C]` at random; values are not clipped.

    A value in ±`brightness` is added to an image, and the differences from the mean of each of its
    channels are multiplied by a factor in 1 ± `contrast`; both are uniform.
    """
    added, factor = draw(
        lambda shape: jax.random.uniform(key, shape, minval=-1, maxval=1),
        (len(images), 2),
        axis_name,
    ).T[..., None, None, None]
    mean = images.mean((1, 2), keepdims=True)
    return mean + brightness * added + (1 + contrast * factor) * (images - mean)


def cropped(images: Array, key: Array, side: int, *, axis_name: AxisName = None) -> Array:
    """Cut a square `[B, side, side, C]` out of each image `[B, H, W, C]` at random."""
    places = jnp.array([[pixels - side + 1 for pixels in images.shape[1:3]]])
    return _windows(images, key, (side, side), places, axis_name)


def turned(
    images: Array, key: Array, *, rotation: float, scale: float, axis_name: AxisName = None
) -> Array:
    """Rotate and scale images `[B, H, W, C]` at random about their centre, bilinearly.

    Angles are uniform in ±`rotation` degrees, factors in 1 ± `scale`, the same for width and
    height. Pixels from outside an image are 0.
    """
    angle, factor = draw(
        lambda shape: jax.random.uniform(key, shape, minval=-1, maxval=1),
        (len(images), 2),
        axis_name,
    ).T
    angle, factor = jnp.radians(rotation * angle), 1 + scale * factor
    cosine, sine = jnp.cos(angle) / factor, jnp.sin(angle) / factor
    # From (row, column) of the output to that of the input, as `affine.warp` with the same pose.
    backward = jnp.moveaxis(jnp.stack([cosine, -sine, sine, cosine]).reshape(2, 2, -1), -1, 0)
    return affine.sample(images, backward, jnp.zeros((len(images), 2)), order=1)


def shifted(images: Array, key: Array, limit: int, *, axis_name: AxisName = None) -> Array:
    """Shift images `[B, H, W, C]` at random by up to `limit` pixels an axis, padding with 0."""
    if limit == 0:
        return images
    height, width = images.shape[1:3]
    padded = jnp.pad(images, ((0, 0), (limit, limit), (limit, limit), (0, 0)))
    return _windows(padded, key, (height, width), 2 * limit + 1, axis_name)


def placed(images: Array, key: Array, canvas: int, *, axis_name: AxisName = None) -> Array:
    """Place square images `[B, H, H, C]` at random on black ones `[B, canvas, canvas, C]`."""
    free = canvas - images.shape[1]
    if free == 0:
        return images
    padded = jnp.pad(images, ((0, 0), (free, free), (free, free), (0, 0)))
    return _windows(padded, key, (canvas, canvas), free + 1, axis_name)


def _windows(
    images: Array, key: Array, size: tuple[int, int], places: int | Array, axis_name: AxisName
) -> Array:
    """Cut a window of `size` out of each image, at a random corner in 0 … `places` - 1.

    `places` is a number, or one for each axis, `[1, 2]`.
    """
    offsets = draw(
        lambda shape: jax.random.randint(key, shape, 0, places), (len(images), 2), axis_name
    )

    def cut(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (*size, images.shape[-1]))

    return jax.vmap(cut)(images, offsets)
