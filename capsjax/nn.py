"""Capsule layers as Flax NNX modules, which hold parameters and call functions of `capsjax`."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

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

# Standard deviation of a standard normal distribution that is truncated at -2 and 2.
_TRUNCATED_DEVIATION = 0.87962566

# Longest votes, relative to their poses, that `capsules_init` draws. Of 2, 3, 4, 6 and no bound,
# docs/initialisation.md, 4 trains five layers of 32 capsules best, and 2 does not train five of 16.
_MAX_VOTE_GAIN = 4.0

# The 0.1 of the authors' code, for one capsule layer on 1152 input capsules: votes start much
# shorter than 1. As in TensorFlow, 0.1 is the value before truncation, so weights have 0.088.
votes_init = jax.nn.initializers.truncated_normal(0.1)


def capsules_init(
    key: Array,
    shape: Sequence[int],
    dtype: DTypeLike | None = None,
    out_sharding: Any = None,
) -> Array:
    """Draw weights `[I, P, J, D]` with which stacked capsule layers learn.

    With standard deviation σ, poses of length ℓ and uniform couplings 1/J, the weighted sums of
    votes have length σ · ℓ · sqrt(I·D) / J. With σ = J / sqrt(I·D) that is the length of the
    poses, in every layer; with a fixed σ it falls from layer to layer, until nothing learns. The
    squash still shortens outputs: making up for it too saturates the couplings. For the same
    reason σ is at most 4 / sqrt(D), with which votes are 4 times as long as poses.

    Args:
      key: A JAX random key.
      shape: (I, P, J, D).
      dtype: Of the weights; None for JAX's default.
      out_sharding: As in `jax.nn.initializers`.

    Returns:
      Weights `[I, P, J, D]`, from a normal distribution truncated at 2 / 0.88 standard deviations.

    Raises:
      ValueError: The shape has not four axes.

    Example:
      >>> capsules_init(jax.random.key(0), (72, 8, 16, 8)).shape
      (72, 8, 16, 8)
    """
    if len(shape) != 4:
        raise ValueError(f"capsules_init: shape must be (I, P, J, D), got {tuple(shape)}")
    in_capsules, _, out_capsules, out_length = shape
    vote_gain = min(out_capsules / math.sqrt(in_capsules), _MAX_VOTE_GAIN)
    deviation = vote_gain / math.sqrt(out_length)
    draw = jax.nn.initializers.truncated_normal(deviation / _TRUNCATED_DEVIATION)
    return draw(key, shape, dtype, out_sharding)


class Convolution(nnx.Module):
    """A convolution without padding, by `capsjax.strided_conv`.

    Args:
      in_channels: C.
      out_channels: O.
      kernel_size: Height and width of the window.
      stride: Pixels from one window to the next, along both axes.
      scale: Factor on the convolution, before the bias is added.
      bias: Initial value of the bias.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises the kernel (Lecun normal).

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
        """Map images `[..., H, W, C]` to feature maps with O channels, in the dtype `dtype`."""
        kernel = self.kernel[...].astype(self.dtype)
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


class Capsules(nnx.Module):
    """A fully connected capsule layer, by `dynamic_routing`.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", sections 2 and 4,
    https://arxiv.org/abs/1710.09829.

    Args:
      in_capsules: I.
      in_length: P.
      out_capsules: J.
      out_length: D.
      num_iterations: T.
      gradient: `"full"` or `"last"`, as in `dynamic_routing`.
      bias: Initial value of the bias; None for no bias, as in the paper.
      weights_init: Initializer of the weights `[I, P, J, D]`. The default is for stacked layers;
        `votes_init` is that of the authors' network.
      implementation: As in `dynamic_routing`.
      axis_name: Axis of the enclosing `jax.shard_map` over which both the batch and the weights (by
        input capsule) are sharded; each device then routes its input capsules for the whole batch.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises the weights.

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
        weights_init: Initializer = capsules_init,
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
        """Map poses `[..., I, P]`, with `axis_name` only `[B, I, P]`, to poses `[..., J, D]`."""
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
        """Compute the couplings of every iteration, `[T, ..., I, J]`, from poses `[..., I, P]`.

        Raises:
          ValueError: The layer has an `axis_name`, so a device holds only a shard of the weights.
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
        """Return the bias in the accumulation dtype, so that half precision does not round it."""
        if self.bias is None:
            return None
        return self.bias[...].astype(accumulation_dtype(jnp.dtype(self.dtype)))


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
