"""Affine moves of images, by given amounts or by random ones.

The convention is that of torchvision's `RandomAffine`,
https://docs.pytorch.org/vision/main/generated/torchvision.transforms.functional.affine.html: an
image is scaled, sheared, turned clockwise about its centre and shifted, in this order, and what
comes from outside is black. Shifts are in pixels to the right and down. It differs in two points:
widths and heights may be scaled differently, and pixels are interpolated linearly unless asked
otherwise (torchvision's default is the nearest pixel).
"""

import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.ndimage import map_coordinates
from numpy.typing import ArrayLike

ORDERS = {"nearest": 0, "bilinear": 1}  # of the splines between pixels


class Pose(NamedTuple):
    """How each of N images is moved, float64."""

    rotation: np.ndarray  # [N], degrees clockwise
    shift: np.ndarray  # [N, 2], pixels to the right and down
    scale: np.ndarray  # [N, 2], factors of width and height
    shear: np.ndarray  # [N], degrees by which upright lines lean to the right

    @classmethod
    def of(
        cls,
        size: int,
        *,
        rotation: ArrayLike = 0.0,
        shift: ArrayLike = (0.0, 0.0),
        scale: ArrayLike = (1.0, 1.0),
        shear: ArrayLike = 0.0,
    ) -> Self:
        """The pose of `size` images; one amount is that of all."""
        lengths, pairs = (size,), (size, 2)
        return cls(
            np.broadcast_to(np.asarray(rotation, float), lengths),
            np.broadcast_to(np.asarray(shift, float), pairs),
            np.broadcast_to(np.asarray(scale, float), pairs),
            np.broadcast_to(np.asarray(shear, float), lengths),
        )


def warped(images: np.ndarray, pose: Pose, *, order: int = 1) -> np.ndarray:
    """Moves images.

    Args:
      images: `[N, H, W, C]`, floating.
      pose: Of the N images.
      order: 1 interpolates linearly, 0 takes the nearest pixel.

    Returns:
      float32 `[N, H, W, C]`.
    """
    cosine, sine = np.cos(np.radians(pose.rotation)), np.sin(np.radians(pose.rotation))
    lean = np.tan(np.radians(pose.shear))
    # Of columns and rows counted from the centre: where a pixel goes to, without the shift.
    forward = np.array(
        [[cosine, -cosine * lean - sine], [sine, -sine * lean + cosine]]
    ) * np.moveaxis(pose.scale, -1, 0)
    backward = np.linalg.inv(np.moveaxis(forward, -1, 0))
    start = -np.einsum("nij,nj->ni", backward, pose.shift)
    # Rows before columns, as arrays are indexed.
    return np.asarray(
        _sampled(
            jnp.asarray(images, jnp.float32),
            jnp.asarray(backward[:, ::-1, ::-1], jnp.float32),
            jnp.asarray(start[:, ::-1], jnp.float32),
            order=order,
        )
    )


def random_affine(size: int, side: int, rotation: float, shift: float, *, key: list[int]) -> Pose:
    """Draws poses as `RandomAffine(degrees=rotation, translate=(shift, shift))` does.

    Args:
      size: N.
      side: Pixels a side of the images.
      rotation: Angles are uniform up to so many degrees either way.
      shift: Shifts are uniform up to this share of the side either way, then rounded to pixels.
      key: Of the draw, two integers from 0 to 2**64 - 1: the same key draws the same poses.
    """
    angle, *shifts = 2 * uniform(3, size, key=key) - 1
    return Pose.of(
        size, rotation=rotation * angle, shift=np.rint(shift * side * np.array(shifts)).T
    )


def uniform(count: int, size: int, *, key: list[int]) -> np.ndarray:
    """Draws numbers from 0 up to but not including 1, float64 `[count, size]`.

    They depend on nothing but the arguments: NumPy keeps the bits of Philox from version to
    version, but not what its Generator makes of them.
    """
    bits = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count * size)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(count, size)


@functools.partial(jax.jit, static_argnames="order")
def _sampled(images: Array, backward: Array, start: Array, *, order: int) -> Array:
    """The images at `backward @ place + start`, for every place counted from the centre."""
    centres = (np.array(images.shape[1:3]) - 1) / 2
    places = np.indices(images.shape[1:3], np.float32) - centres[:, None, None]

    def moved(image: Array, matrix: Array, offset: Array) -> Array:
        found = jnp.einsum("ij,jhw->ihw", matrix, places.astype(np.float32), precision="highest")
        rows, columns = found + (offset + centres)[:, None, None]

        def channel(pixels: Array) -> Array:
            return map_coordinates(pixels, [rows, columns], order=order, mode="constant")

        return jax.vmap(channel, -1, -1)(image)

    return jax.vmap(moved)(images, backward, start)
