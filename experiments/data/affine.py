"""Affine transformations of images, with given or random parameters.

An image is scaled, sheared, rotated clockwise about its centre and translated, in this order;
pixels from outside the image are black. The convention is that of torchvision's `RandomAffine`,
https://docs.pytorch.org/vision/main/generated/torchvision.transforms.functional.affine.html, with
two differences: width and height have separate scale factors, and the default interpolation is
bilinear (torchvision's is nearest).

Shape letters: N images; H, W, C height, width and channels of an image.
"""

import functools
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.ndimage import map_coordinates
from numpy.typing import ArrayLike

SPLINE_ORDERS = {"nearest": 0, "bilinear": 1}


class Pose(NamedTuple):
    """Parameters of one affine transformation per image, float64."""

    rotation: np.ndarray  # [N], degrees clockwise
    shift: np.ndarray  # [N, 2], pixels to the right and down
    scale: np.ndarray  # [N, 2], factors of width and height
    shear: np.ndarray  # [N], degrees from upright, positive to the right

    @classmethod
    def broadcast(
        cls,
        size: int,
        *,
        rotation: ArrayLike = 0.0,
        shift: ArrayLike = (0.0, 0.0),
        scale: ArrayLike = (1.0, 1.0),
        shear: ArrayLike = 0.0,
    ) -> Self:
        """Broadcast each parameter to N = `size` images; the defaults are the identity."""
        scalars, pairs = (size,), (size, 2)
        return cls(
            np.broadcast_to(np.asarray(rotation, float), scalars),
            np.broadcast_to(np.asarray(shift, float), pairs),
            np.broadcast_to(np.asarray(scale, float), pairs),
            np.broadcast_to(np.asarray(shear, float), scalars),
        )


def warp(images: np.ndarray, pose: Pose, *, order: int = 1) -> np.ndarray:
    """Apply an affine transformation to each image.

    Args:
      images: `[N, H, W, C]`, floating point.
      pose: The parameters of the N transformations.
      order: Order of the interpolating spline, a value of `SPLINE_ORDERS`: 0 nearest, 1 bilinear.

    Returns:
      Transformed images, float32 `[N, H, W, C]`.
    """
    cosine, sine = np.cos(np.radians(pose.rotation)), np.sin(np.radians(pose.rotation))
    slope = np.tan(np.radians(pose.shear))
    # Maps (column, row), relative to the centre, from input to output, without the shift.
    forward = np.array(
        [[cosine, -cosine * slope - sine], [sine, -sine * slope + cosine]]
    ) * np.moveaxis(pose.scale, -1, 0)
    backward = np.linalg.inv(np.moveaxis(forward, -1, 0))
    offset = -np.einsum("nij,nj->ni", backward, pose.shift)
    # Reversed to (row, column), because `map_coordinates` takes array indices.
    return np.asarray(
        sample(
            jnp.asarray(images, jnp.float32),
            jnp.asarray(backward[:, ::-1, ::-1], jnp.float32),
            jnp.asarray(offset[:, ::-1], jnp.float32),
            order=order,
        )
    )


def random_affine(size: int, side: int, rotation: float, shift: float, *, key: list[int]) -> Pose:
    """Draw poses as torchvision's `RandomAffine(degrees=rotation, translate=(shift, shift))` does.

    Args:
      size: Number of poses, N.
      side: Height and width of the images in pixels.
      rotation: Angles are uniform in ±`rotation` degrees.
      shift: Shifts are uniform in ±`shift` · `side` pixels, then rounded to whole pixels.
      key: Philox key, two integers from 0 to 2**64 - 1: equal keys draw equal poses.
    """
    angle, *shifts = 2 * uniform(3, size, key=key) - 1
    return Pose.broadcast(
        size, rotation=rotation * angle, shift=np.rint(shift * side * np.array(shifts)).T
    )


def uniform(count: int, size: int, *, key: list[int]) -> np.ndarray:
    """Draw float64 numbers `[count, size]`, uniform in [0, 1), from a Philox key.

    Equal arguments give equal numbers with every version of NumPy: the raw bits of Philox are
    stable, whereas NumPy may change how `Generator` turns bits into numbers.
    """
    bits = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count * size)
    return ((bits >> np.uint64(11)) * 2.0**-53).reshape(count, size)


@functools.partial(jax.jit, static_argnames="order")
def sample(images: Array, backward: Array, offset: Array, *, order: int) -> Array:
    """Sample each image at `backward @ x + offset` for every output pixel x, from the centre."""
    centre = (np.array(images.shape[1:3]) - 1) / 2
    grid = np.indices(images.shape[1:3], np.float32) - centre[:, None, None]

    def sample_image(image: Array, matrix: Array, shift: Array) -> Array:
        source = jnp.einsum("ij,jhw->ihw", matrix, grid.astype(np.float32), precision="highest")
        rows, columns = source + (shift + centre)[:, None, None]

        def sample_channel(pixels: Array) -> Array:
            return map_coordinates(pixels, [rows, columns], order=order, mode="constant")

        return jax.vmap(sample_channel, -1, -1)(image)

    return jax.vmap(sample_image)(images, backward, offset)
