"""Layers before and after capsule layers: convolutions, primary capsules, image decoder."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from capsjax import shapes
from capsjax.conv import strided_conv
from capsjax.kernels.squash import squash

kernel_init = jax.nn.initializers.lecun_normal()


class Convolution(nnx.Module):
    """A convolution without padding, by `capsjax.strided_conv`.

    Args:
      in_channels: C.
      out_channels: O.
      kernel_size: Height and width of the window.
      stride: Pixels from one window to the next, along both axes.
      scale: Factor on the convolution, before the bias is added.
      bias: Initial value of the bias.
      kernel_init: Initializer of the kernel `[h, w, C, O]`.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises the kernel.

    Raises:
      ValueError: The images of a call have another number of channels or axes.

    Example:
      >>> Convolution(1, 4, kernel_size=9, rngs=nnx.Rngs(0))(jnp.ones((2, 28, 28, 1))).shape
      (2, 20, 20, 4)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int = 1,
        scale: float = 1.0,
        bias: float = 0.0,
        kernel_init: Initializer = kernel_init,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape))
        self.bias = nnx.Param(jnp.full((out_channels,), bias, jnp.float32))
        self.stride = stride
        self.scale = scale
        self.dtype = dtype

    def __call__(self, images: Array) -> Array:
        """Map images `[..., H, W, C]` to feature maps with O channels, in the dtype `dtype`."""
        kernel = self.kernel[...].astype(self.dtype)
        wanted = (*images.shape[:-3], None, None, kernel.shape[2])
        shapes.check_shape("Convolution", "images", images, "[..., H, W, C]", wanted)
        convolved = strided_conv(images.astype(self.dtype), kernel, stride=self.stride)
        bias = self.bias[...].astype(self.dtype)
        return self.scale * convolved + jnp.broadcast_to(bias, convolved.shape)


class PrimaryCapsules(nnx.Module):
    """Primary capsules: a convolution of which every `length` channels form a capsule, squashed.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 4,
    https://arxiv.org/abs/1710.09829. With `scale=1/types` and `bias=0.1` the layer equals that
    of the authors' code, where uniform couplings divide the convolution by `types`.

    Args:
      in_channels: C of the feature maps.
      types: Capsules at each position.
      length: P, the length of a capsule.
      kernel_size: Height and width of the window.
      stride: Pixels from one window to the next, along both axes.
      scale: Factor on the convolution, before the bias is added.
      bias: Initial value of the bias.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises the kernel.

    Example:
      >>> layer = PrimaryCapsules(4, types=3, length=8, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 20, 20, 4))).shape  # 6 x 6 positions of 3 capsules
      (2, 108, 8)
    """

    def __init__(
        self,
        in_channels: int,
        *,
        types: int = 32,
        length: int = 8,
        kernel_size: int = 9,
        stride: int = 2,
        scale: float = 1.0,
        bias: float = 0.0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.convolution = Convolution(
            in_channels,
            types * length,
            kernel_size=kernel_size,
            stride=stride,
            scale=scale,
            bias=bias,
            dtype=dtype,
            rngs=rngs,
        )
        self.length = length

    def __call__(self, features: Array) -> Array:
        """Map `[..., H, W, C]` to poses `[..., I, P]`; along I types vary fastest, rows slowest."""
        maps = self.convolution(features)
        capsules = math.prod(maps.shape[-3:]) // self.length
        return squash(maps.reshape(*maps.shape[:-3], capsules, self.length))


class PrimaryMatrixCapsules(nnx.Module):
    """Primary matrix capsules: poses and activations, linear in the features of a position.

    Source: Hinton, Sabour and Frosst, "Matrix capsules with EM routing", section 4,
    https://openreview.net/forum?id=HJWLfGWRb: a 1 x 1 convolution; activations are sigmoids.

    Args:
      in_channels: C of the feature maps.
      types: Capsules at each position.
      rows: R of the poses.
      columns: P of the poses.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises the kernel.

    Example:
      >>> layer = PrimaryMatrixCapsules(32, types=8, rngs=nnx.Rngs(0))
      >>> poses, activations = layer(jnp.ones((2, 14, 14, 32)))
      >>> poses.shape, activations.shape
      ((2, 14, 14, 8, 4, 4), (2, 14, 14, 8))
    """

    def __init__(
        self,
        in_channels: int,
        *,
        types: int = 32,
        rows: int = 4,
        columns: int = 4,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        channels = types * (rows * columns + 1)
        self.convolution = Convolution(in_channels, channels, kernel_size=1, dtype=dtype, rngs=rngs)
        self.shape = types, rows, columns

    def __call__(self, features: Array) -> tuple[Array, Array]:
        """Map `[..., H, W, C]` to poses `[..., H, W, I, R, P]` and activations `[..., H, W, I]`."""
        maps = self.convolution(features)
        types = self.shape[0]
        poses = maps[..., :-types].reshape(*maps.shape[:-1], *self.shape)
        return poses, jax.nn.sigmoid(maps[..., -types:])


class Decoder(nnx.Module):
    """A fully connected decoder from masked capsules to images.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 4.1 and
    figure 2, https://arxiv.org/abs/1710.09829.

    Args:
      num_capsules: J.
      length: D.
      image_shape: (H, W, C) of the images.
      hidden: Sizes of the hidden layers.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises all layers.

    Example:
      >>> decoder = Decoder(10, 16, (28, 28, 1), rngs=nnx.Rngs(0))
      >>> decoder(jnp.ones((2, 10, 16)), jax.nn.one_hot(jnp.array([3, 8]), 10)).shape
      (2, 28, 28, 1)
    """

    def __init__(
        self,
        num_capsules: int,
        length: int,
        image_shape: tuple[int, int, int],
        *,
        hidden: Sequence[int] = (512, 1024),
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = image_shape
        sizes = (num_capsules * length, *hidden, height * width * channels)
        self.layers = nnx.List(
            nnx.Linear(inputs, outputs, dtype=dtype, rngs=rngs)
            for inputs, outputs in itertools.pairwise(sizes)
        )
        self.image_shape = image_shape

    def __call__(self, capsules: Array, chosen: Array) -> Array:
        """Map capsules `[..., J, D]`, times a 0/1 mask `[..., J]`, to images in [0, 1]."""
        shapes.check_shape("Decoder", "chosen", chosen, "[..., J]", capsules.shape[:-1])
        leading = capsules.shape[:-2]
        x = capsules * chosen[..., None].astype(capsules.dtype)
        x = x.reshape(*leading, math.prod(capsules.shape[-2:]))
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return jax.nn.sigmoid(last(x)).reshape(*leading, *self.image_shape)
