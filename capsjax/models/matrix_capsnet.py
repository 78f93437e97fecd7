"""Matrix capsules with EM routing, the network of Hinton, Sabour and Frosst (2018)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from capsjax import nn
from capsjax.models._blocks import check_images, keeps_arguments


@keeps_arguments
class MatrixCapsNet(nnx.Module):
    """Matrix capsules: a convolution, primary capsules, two convolutional layers, and classes.

    Source: Hinton, Sabour and Frosst, "Matrix capsules with EM routing", section 4 and figure 1,
    https://openreview.net/forum?id=HJWLfGWRb. The defaults are the paper's for smallNORB, cropped
    to 32 x 32: A = B = C = D = 32 and 317,194 parameters; `small` builds the one with A = 64,
    B = 8 and C = D = 16, of 68,754.

    Args:
      image_shape: (H, W, C) of the images; a call refuses others, and images of integers.
      num_classes: One class capsule for each class.
      conv_channels: A, channels of the convolution, 5 x 5 with stride 2.
      primary_types: B, primary capsules at each position.
      types: C and D, capsules at each position of the two convolutional layers, 3 x 3 with strides
        2 and 1.
      routing: Of all three capsule layers.
      implementation: As in `dynamic_routing`.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises all parameters.

    Raises:
      ValueError: The images are too small for the convolutions.

    Example:
      >>> model = MatrixCapsNet.small((20, 20, 1), 10, rngs=nnx.Rngs(0))
      >>> poses, activations = model(jnp.zeros((2, 20, 20, 1)))
      >>> poses.shape, activations.shape
      ((2, 10, 4, 4), (2, 10))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (32, 32, 2),
        num_classes: int = 5,
        *,
        conv_channels: int = 32,
        primary_types: int = 32,
        types: tuple[int, int] = (32, 32),
        routing: nn.EMRouting = nn.EMRouting(),  # noqa: B008 (frozen)
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = self.image_shape = image_shape
        smallest = 5 + 2 * (3 - 1) + 4 * (3 - 1)
        if min(height, width) < smallest:
            raise ValueError(
                f"MatrixCapsNet: image_shape must be at least {smallest} pixels high and wide for "
                f"its three convolutions, got {image_shape}"
            )
        self.convolution = nn.Convolution(
            channels, conv_channels, kernel_size=5, stride=2, dtype=dtype, rngs=rngs
        )
        self.primary = nn.PrimaryMatrixCapsules(
            conv_channels, types=primary_types, dtype=dtype, rngs=rngs
        )
        self.conv_capsules = nnx.List(
            nn.ConvCapsules(
                inputs,
                4,
                outputs,
                4,
                kernel_size=3,
                stride=stride,
                rows=4,
                routing=routing,
                implementation=implementation,
                dtype=dtype,
                rngs=rngs,
            )
            for inputs, outputs, stride in ((primary_types, types[0], 2), (*types, 1))
        )
        self.capsules = nn.ClassCapsules(
            types[1],
            4,
            num_classes,
            4,
            rows=4,
            routing=routing,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )

    @classmethod
    def small(
        cls,
        image_shape: tuple[int, int, int] = (32, 32, 2),
        num_classes: int = 5,
        *,
        routing: nn.EMRouting = nn.EMRouting(),  # noqa: B008 (frozen)
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> "MatrixCapsNet":
        """Build the paper's small network: A = 64, B = 8, C = D = 16."""
        return cls(
            image_shape,
            num_classes,
            conv_channels=64,
            primary_types=8,
            types=(16, 16),
            routing=routing,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Map images `[..., H, W, C]` to class poses `[..., J, 4, 4]`, activations `[..., J]`."""
        check_images("MatrixCapsNet", images, self.image_shape)
        poses, activations = self.primary(jax.nn.relu(self.convolution(images)))
        for layer in self.conv_capsules:
            poses, activations = layer(poses, activations)
        return self.capsules(poses, activations)
