"""Flax NNX modules: they own the parameters and call the functions of `capsjax`."""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from capsjax import shapes
from capsjax.conv import strided_conv
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.squash import squash
from capsjax.routing.dynamic import dynamic_routing, routing_couplings

# Votes of length well under 1: with deviation 1 routing saturates at once and does not train,
# with 0.01 it starts too slowly.
votes_init = jax.nn.initializers.truncated_normal(0.1)


class Convolution(nnx.Module):
    """A convolution without padding, whose gradients are usable on a CPU too.

    Args:
      in_channels: C.
      out_channels: Channels of the result.
      kernel_size: Rows and columns of the window.
      stride: Pixels from one window to the next.
      scale: Factor on the convolution, before the bias is added.
      bias: What the bias starts at.
      dtype: Of the computation; parameters stay float32.
      rngs: For the kernel (Lecun normal).

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
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(jax.nn.initializers.lecun_normal()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.full((out_channels,), bias, jnp.float32))
        self.stride = stride
        self.scale = scale
        self.dtype = dtype

    def __call__(self, images: Array) -> Array:
        """Maps images `[..., H, W, C]` to feature maps `[..., H', W', out_channels]`."""
        kernel = self.kernel[...].astype(self.dtype)
        convolved = strided_conv(images.astype(self.dtype), kernel, stride=self.stride)
        bias = self.bias[...].astype(self.dtype)
        return self.scale * convolved + jnp.broadcast_to(bias, convolved.shape)


class PrimaryCapsules(nnx.Module):
    """A convolution whose channels are capsules: `length` channels at one position are one capsule.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 4,
    https://arxiv.org/abs/1710.09829. With `scale=1/types` and `bias=0.1` it is the layer of the
    authors' code, which routes from one capsule with uniform couplings.

    Args:
      in_channels: Channels of the feature maps.
      types: Capsules at one position.
      length: P, channels of a capsule.
      kernel_size: Rows and columns of the window.
      stride: Pixels from one window to the next.
      scale: Factor on the convolution, before its bias is added.
      bias: What the bias starts at.
      dtype: Of the computation; parameters stay float32.
      rngs: For the kernel.

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
        """Maps `[..., H, W, C]` to poses `[..., I, P]`, I counting rows, columns, then types."""
        maps = self.convolution(features)
        capsules = math.prod(maps.shape[-3:]) // self.length
        return squash(maps.reshape(*maps.shape[:-3], capsules, self.length))


class Capsules(nnx.Module):
    """A layer of capsules, each fed by all capsules below through routing by agreement.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", sections 2 and 4,
    https://arxiv.org/abs/1710.09829.

    Args:
      in_capsules: I.
      in_length: P.
      out_capsules: J.
      out_length: D.
      num_iterations: T.
      gradient: `"full"` or `"last"`, as in `dynamic_routing`.
      bias: What the bias starts at; None for no bias, as in the paper.
      weights_init: Makes the weights; truncated normal of deviation 0.1 if not given.
      implementation: As in `dynamic_routing`.
      axis_name: Inside `jax.shard_map`, the axis over which examples are split, and the weights by
        their input capsules: each device routes its capsules for the examples of all along it.
      dtype: Of the computation; parameters stay float32.
      rngs: For the weights.

    Example:
      >>> layer = Capsules(6, 4, 3, 5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 6, 4))).shape
      (2, 3, 5)
    """

    def __init__(
        self,
        in_capsules: int,
        in_length: int,
        out_capsules: int,
        out_length: int,
        *,
        num_iterations: int = 3,
        gradient: str = "full",
        bias: float | None = None,
        weights_init: Initializer = votes_init,
        implementation: str | None = None,
        axis_name: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_capsules, in_length, out_capsules, out_length)
        self.weights = nnx.Param(weights_init(rngs.params(), shape))
        self.bias = None if bias is None else nnx.Param(jnp.full(shape[2:], bias, jnp.float32))
        self.num_iterations = num_iterations
        self.gradient = gradient
        self.implementation = implementation
        self.axis_name = axis_name
        self.dtype = dtype

    def __call__(self, poses: Array) -> Array:
        """Maps poses `[..., I, P]` to poses `[..., J, D]`; with an axis, `[B, I, P]` only."""
        if self.axis_name is None:
            return self._route(poses)
        axis = self.axis_name
        own_capsules = lax.all_to_all(poses, axis, split_axis=1, concat_axis=0, tiled=True)
        outputs = self._route(own_capsules)
        first = len(poses) * lax.axis_index(axis)
        return lax.dynamic_slice_in_dim(outputs, first, len(poses))

    def _route(self, poses: Array) -> Array:
        return dynamic_routing(
            poses.astype(self.dtype),
            self.weights[...].astype(self.dtype),
            num_iterations=self.num_iterations,
            bias=self._bias(),
            gradient=self.gradient,
            implementation=self.implementation,
            axis_name=self.axis_name,
        )

    def couplings(self, poses: Array) -> Array:
        """Maps poses `[..., I, P]` to the couplings of every iteration `[T, ..., I, J]`.

        For a look inside: unlike the layer itself, it stores the votes.

        Raises:
          ValueError: The layer has an axis, so its weights are a part of all.
        """
        if self.axis_name is not None:
            raise ValueError(
                f"Capsules.couplings: axis_name must be None, got {self.axis_name!r}; use a layer "
                "with all weights"
            )
        return routing_couplings(
            poses.astype(self.dtype),
            self.weights[...].astype(self.dtype),
            num_iterations=self.num_iterations,
            bias=self._bias(),
        )

    def _bias(self) -> Array | None:
        """The bias in a dtype that routing takes beside poses of `dtype`."""
        if self.bias is None:
            return None
        return self.bias[...].astype(accumulation_dtype(jnp.dtype(self.dtype)))


class Decoder(nnx.Module):
    """Draws an image from capsules, all but the chosen ones masked with 0.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 4.1 and
    figure 2, https://arxiv.org/abs/1710.09829.

    Args:
      num_capsules: J.
      length: D.
      image_shape: H, W, C.
      hidden: Sizes of the layers in between.
      dtype: Of the computation; parameters stay float32.
      rngs: For the kernels.

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
        """Maps capsules `[..., J, D]` and a mask `[..., J]` of 0 and 1 to images in 0 … 1."""
        shapes.check_shape("Decoder", "chosen", chosen, "[..., J]", capsules.shape[:-1])
        leading = capsules.shape[:-2]
        x = capsules * chosen[..., None].astype(capsules.dtype)
        x = x.reshape(*leading, math.prod(capsules.shape[-2:]))
        *hidden, last = self.layers
        for layer in hidden:
            x = jax.nn.relu(layer(x))
        return jax.nn.sigmoid(last(x)).reshape(*leading, *self.image_shape)
