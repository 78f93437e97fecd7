"""The capsule network of inverted dot-product attention routing (Tsai et al. 2020)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from capsjax import nn
from capsjax.conv import strided_conv
from capsjax.models._blocks import (
    EPSILON,
    NormalisedConvolution,
    check_images,
    keeps_arguments,
)
from capsjax.routing.inverted_attention import (
    inverted_attention_routing,
    inverted_attention_step,
)

# R, P and E of all poses.
SIDE = 4


@keeps_arguments
class InvertedAttentionCapsNet(nnx.Module):
    """A residual backbone, primary capsules, two convolutional capsule layers, and classes.

    Routing is concurrent: after a first pass through all layers with uniform couplings, each
    iteration updates the poses of every layer from those that the iteration before gave its
    children and itself. One linear layer, which the classes share, makes logits of their poses.

    Source: Tsai, Srivastava, Goh and Salakhutdinov, "Capsules with Inverted Dot-Product Attention
    Routing", https://arxiv.org/abs/2002.04764, and the authors' configuration for CIFAR-10
    (apple/ml-capsules-inverted-attention-routing, `resnet_backbone_CIFAR10`), whose sizes are the
    defaults: 4 x 4 matrix poses, 32 types, 1,828,817 parameters.

    Args:
      image_shape: (H, W, C) of the images; a call refuses others, and images of integers.
      num_classes: J.
      channels: Of the backbone's two stages of residual blocks, the second with stride 2.
      blocks: Residual blocks of each stage.
      types: Primary capsules at each position, and capsules of the two convolutional layers, 3 x 3
        with strides 2 and 1.
      num_iterations: T, routing iterations.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises all parameters.

    Raises:
      ValueError: The images are too small for the convolutions.

    Example:
      >>> model = InvertedAttentionCapsNet(
      ...     (16, 16, 1), 10, channels=(8, 8), blocks=(1, 1), types=(2, 2, 2), rngs=nnx.Rngs(0)
      ... )
      >>> model(jnp.zeros((2, 16, 16, 1))).shape
      (2, 10)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        *,
        channels: tuple[int, int] = (64, 128),
        blocks: tuple[int, int] = (3, 4),
        types: tuple[int, int, int] = (32, 32, 32),
        num_iterations: int = 2,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, in_channels = self.image_shape = image_shape
        grid = [((size + 1) // 2 - 3) // 2 + 1 - 2 for size in (height, width)]
        if min(grid) < 1:
            raise ValueError(
                "InvertedAttentionCapsNet: image_shape must be at least 13 pixels high and wide "
                f"for its convolutions, got {image_shape}"
            )
        self.convolution = _convolution(in_channels, channels[0], 3, 1, dtype=dtype, rngs=rngs)
        stages = [(channels[0], 1)] * blocks[0] + [(channels[1], 2)]
        stages += [(channels[1], 1)] * (blocks[1] - 1)
        residual, inputs = [], channels[0]
        for outputs, stride in stages:
            residual.append(_ResidualBlock(inputs, outputs, stride, dtype=dtype, rngs=rngs))
            inputs = outputs
        self.backbone = nnx.List(residual)
        depth = SIDE * SIDE
        kernel = jax.nn.initializers.lecun_normal()(rngs.params(), (1, 1, inputs, types[0] * depth))
        self.primary_kernel = nnx.Param(kernel)
        self.primary_norm = nnx.LayerNorm(depth, epsilon=EPSILON, dtype=dtype, rngs=rngs)
        routing = nn.InvertedAttentionRouting(num_iterations)
        settings: Any = {"rows": SIDE, "routing": routing, "dtype": dtype, "rngs": rngs}
        window: Any = {"kernel_size": 3, **settings}
        children = grid[0] * grid[1] * types[2]
        self.layers = nnx.List(
            [
                nn.ConvCapsules(types[0], SIDE, types[1], SIDE, stride=2, **window),
                nn.ConvCapsules(types[1], SIDE, types[2], SIDE, stride=1, **window),
                nn.Capsules(children, SIDE, num_classes, SIDE, **settings),
            ]
        )
        self.classifier = nnx.Linear(depth, 1, dtype=dtype, rngs=rngs)
        self.num_iterations, self.dtype = num_iterations, dtype

    def __call__(self, images: Array, *, training: bool = False) -> Array:
        """Map images `[B, H, W, C]` to logits `[B, J]`.

        With `training`, normalise by the batch, and update the statistics.
        """
        children = self.primary_poses(images, training=training)
        poses = [children]
        for layer in self.layers:
            poses.append(self._step(layer, poses[-1], None))
        for _ in range(self.num_iterations - 1):
            pairs = zip(self.layers, poses[:-1], poses[1:], strict=True)
            poses = [children, *(self._step(*arguments) for arguments in pairs)]
        classes = poses[-1]
        flat = classes.reshape(*classes.shape[:2], SIDE * SIDE)
        return self.classifier(flat)[..., 0]

    def primary_poses(self, images: Array, *, training: bool = False) -> Array:
        """Map images `[B, H, W, C]` to the poses of the primary capsules, `[B, h, w, I, 4, 4]`."""
        check_images("InvertedAttentionCapsNet", images, self.image_shape, rank=4)
        features = jax.nn.relu(self.convolution(images, training=training))
        for block in self.backbone:
            features = block(features, training=training)
        maps = strided_conv(features, self.primary_kernel[...].astype(self.dtype))
        poses = maps.reshape(*maps.shape[:3], -1, SIDE * SIDE)
        return self.primary_norm(poses).reshape(*poses.shape[:-1], SIDE, SIDE)

    def _step(self, layer: Any, poses: Array, parents: Array | None) -> Array:
        """Update the poses of a layer once; without parents, by uniform couplings."""
        if isinstance(layer, nn.Capsules):
            poses = poses.reshape(len(poses), -1, SIDE, SIDE)
        arrays = poses.astype(self.dtype), layer.weights[...].astype(self.dtype)
        settings = {
            "scale": layer.scale[...],
            "offset": layer.offset[...],
            "matrix": True,
            "stride": getattr(layer, "stride", None),
        }
        if parents is None:
            return inverted_attention_routing(*arrays, num_iterations=1, **settings)
        return inverted_attention_step(*arrays, parents, **settings)


class _ResidualBlock(nnx.Module):
    """Two 3 x 3 convolutions beside a shortcut, which is a 1 x 1 convolution if sizes differ."""

    def __init__(
        self, inputs: int, outputs: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.first = _convolution(inputs, outputs, 3, stride, dtype=dtype, rngs=rngs)
        self.second = _convolution(outputs, outputs, 3, 1, dtype=dtype, rngs=rngs)
        self.shortcut = (
            None
            if stride == 1 and inputs == outputs
            else _convolution(inputs, outputs, 1, stride, dtype=dtype, rngs=rngs)
        )

    def __call__(self, x: Array, *, training: bool) -> Array:
        """Map `[B, H, W, C]` to `[B, h, w, O]`."""
        y = self.second(jax.nn.relu(self.first(x, training=training)), training=training)
        beside = x if self.shortcut is None else self.shortcut(x, training=training)
        return jax.nn.relu(y + beside)


def _convolution(
    inputs: int, outputs: int, kernel_size: int, stride: int, *, dtype: DTypeLike, rngs: nnx.Rngs
) -> NormalisedConvolution:
    """Return a normalised convolution, padded to keep the map's size if the stride is 1."""
    return NormalisedConvolution(
        inputs,
        outputs,
        kernel_size=kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        dtype=dtype,
        rngs=rngs,
    )
