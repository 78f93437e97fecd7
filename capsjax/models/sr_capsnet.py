"""SR-CapsNet, the self-routing network of Hahn, Pyeon and Kim (2019)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from capsjax import nn
from capsjax.models._blocks import NormalisedConvolution, batch_norm, check_images, keeps_arguments
from capsjax.routing.self_routing import self_routing


@keeps_arguments
class SRCapsNet(nnx.Module):
    """SR-CapsNet: a convolution, primary capsules, self-routed capsules, and class activations.

    Source: Hahn, Pyeon and Kim, "Self-Routing Capsule Networks", NeurIPS 2019, and the authors'
    code (coder3000/SR-CapsNet, `SmallNet`), whose sizes are the defaults: on smallNORB, 32 x 32,
    with 16 types of 16-dimensional capsules and 2,445,408 parameters. The class layer has no poses.

    Args:
      image_shape: (H, W, C) of the images; a call refuses others, and images of integers.
      num_classes: J.
      conv_channels: Channels of the convolution, 7 x 7 with stride 2 and padding 1.
      types: Capsules at each position of both capsule layers.
      length: Of their poses.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises all parameters.

    Raises:
      ValueError: The images are too small for the convolutions.

    Example:
      >>> model = SRCapsNet((24, 24, 1), 10, conv_channels=8, types=3, rngs=nnx.Rngs(0))
      >>> activations = model(jnp.zeros((2, 24, 24, 1)))
      >>> activations.shape, round(float(activations[0].sum()), 3)
      ((2, 10), 1.0)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (32, 32, 2),
        num_classes: int = 5,
        *,
        conv_channels: int = 256,
        types: int = 16,
        length: int = 16,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = self.image_shape = image_shape
        grid = tuple(_after(_after(size, 7, 2), 5, 1) for size in (height, width))
        if min(grid) < 1:
            raise ValueError(
                "SRCapsNet: image_shape must be at least 9 pixels high and wide for its "
                f"convolutions, got {image_shape}"
            )
        padded: Any = {"padding": 1, "dtype": dtype, "rngs": rngs}
        self.convolution = NormalisedConvolution(
            channels, conv_channels, kernel_size=7, stride=2, **padded
        )
        self.poses = NormalisedConvolution(
            conv_channels, types * length, kernel_size=5, stride=1, **padded
        )
        self.activations = NormalisedConvolution(
            conv_channels, types, kernel_size=5, stride=1, **padded
        )
        self.conv_capsules = nn.ConvCapsules(
            types,
            length,
            types,
            length,
            kernel_size=3,
            stride=2,
            padding=1,
            routing=nn.SelfRouting(),
            dtype=dtype,
            rngs=rngs,
        )
        self.normalisation = batch_norm(types * length, dtype, rngs)
        children = _after(grid[0], 3, 2) * _after(grid[1], 3, 2) * types
        self.routing_weights = nnx.Param(jnp.zeros((children, length, num_classes)))
        self.routing_bias = nnx.Param(jnp.zeros((children, num_classes)))
        self.types, self.length, self.dtype = types, length, dtype

    def __call__(self, images: Array, *, training: bool = False) -> Array:
        """Map images `[B, H, W, C]` to class activations `[B, J]`, which sum to 1.

        With `training`, normalise by the batch, and update the statistics. The authors train the
        log of the activations with the cross-entropy.
        """
        check_images("SRCapsNet", images, self.image_shape, rank=4)
        features = jax.nn.relu(self.convolution(images, training=training))
        poses = self.poses(features, training=training)
        poses = poses.reshape(*poses.shape[:3], self.types, self.length)
        activations = jax.nn.sigmoid(self.activations(features, training=training))
        poses, activations = self.conv_capsules(poses, activations)
        flat = poses.reshape(*poses.shape[:3], -1)
        flat = self.normalisation(flat, use_running_average=not training).astype(self.dtype)
        poses = flat.reshape(len(images), -1, self.length)
        weights = self.routing_weights[...].astype(self.dtype)
        # No poses are read from the class capsules: their votes have length 1, and are 0.
        _, found = self_routing(
            poses,
            activations.reshape(len(images), -1),
            jnp.zeros((*weights.shape, 1), self.dtype),
            weights,
            routing_bias=self.routing_bias[...],
        )
        return found


def _after(size: int, kernel_size: int, stride: int) -> int:
    """Return the size of a map after a convolution with padding 1."""
    return (size + 2 - kernel_size) // stride + 1
