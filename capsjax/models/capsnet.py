"""CapsNet, the network of "Dynamic Routing Between Capsules"."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from capsjax import nn
from capsjax.metrics import lengths
from capsjax.models._blocks import check_images, check_labels, keeps_arguments


@keeps_arguments
class CapsNet(nnx.Module):
    """CapsNet: a convolution, primary capsules, class capsules, and an image decoder.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 4 and
    figure 1, https://arxiv.org/abs/1710.09829. The defaults are the paper's for MNIST:
    8,215,568 parameters, of which the decoder has 1,411,344.

    Args:
      image_shape: (H, W, C) of the images; a call refuses others, and images of integers.
      num_classes: J, one class capsule for each class.
      conv_channels: Output channels of the first convolution.
      kernel_size: Height and width of the windows of both convolutions.
      primary_types: Primary capsules at each position.
      primary_length: P, the length of a primary capsule.
      primary_stride: Stride of the primary capsules' convolution.
      primary_scale: Factor on the output of that convolution, before its bias is added.
      capsule_length: D, the length of a class capsule.
      capsule_bias: Initial value of the biases of both capsule layers. None, as in the paper: 0 in
        the primary capsules, and class capsules without bias.
      num_iterations: T, routing iterations.
      gradient: As in `dynamic_routing`.
      hidden: Sizes of the decoder's hidden layers.
      implementation: As in `dynamic_routing`.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises all parameters.

    Raises:
      ValueError: The images are too small for the two convolutions.

    Example:
      >>> model = CapsNet((28, 28, 1), 10, conv_channels=8, primary_types=2, rngs=nnx.Rngs(0))
      >>> capsules = model(jnp.zeros((5, 28, 28, 1)))
      >>> capsules.shape, model.reconstruct(capsules, jnp.arange(5)).shape
      ((5, 10, 16), (5, 28, 28, 1))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        conv_channels: int = 256,
        kernel_size: int = 9,
        primary_types: int = 32,
        primary_length: int = 8,
        primary_stride: int = 2,
        primary_scale: float = 1.0,
        capsule_length: int = 16,
        capsule_bias: float | None = None,
        num_iterations: int = 3,
        gradient: str = "full",
        hidden: tuple[int, ...] = (512, 1024),
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = self.image_shape = image_shape
        grid = tuple(
            (size - 2 * (kernel_size - 1) - 1) // primary_stride + 1 for size in (height, width)
        )
        if min(grid) < 1:
            raise ValueError(
                f"CapsNet: image_shape must be at least {2 * kernel_size - 1} pixels high and "
                f"wide for two {kernel_size}x{kernel_size} convolutions, got {image_shape}"
            )
        self.convolution = nn.Convolution(
            channels, conv_channels, kernel_size=kernel_size, dtype=dtype, rngs=rngs
        )
        self.primary = nn.PrimaryCapsules(
            conv_channels,
            types=primary_types,
            length=primary_length,
            kernel_size=kernel_size,
            stride=primary_stride,
            scale=primary_scale,
            bias=capsule_bias or 0.0,
            dtype=dtype,
            rngs=rngs,
        )
        self.capsules = nn.Capsules(
            grid[0] * grid[1] * primary_types,
            primary_length,
            num_classes,
            capsule_length,
            routing=nn.DynamicRouting(num_iterations, gradient=gradient, bias=capsule_bias),
            weights_init=nn.votes_init,
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        self.decoder = nn.Decoder(
            num_classes, capsule_length, image_shape, hidden=hidden, dtype=dtype, rngs=rngs
        )

    def __call__(self, images: Array) -> Array:
        """Map images `[..., H, W, C]` in [0, 1] to class capsules `[..., J, D]`."""
        return self.capsules(self.primary_poses(images))

    def primary_poses(self, images: Array) -> Array:
        """Map images `[..., H, W, C]` to the poses of the primary capsules, `[..., I, P]`."""
        check_images("CapsNet", images, self.image_shape)
        return self.primary(jax.nn.relu(self.convolution(images)))

    def reconstruct(self, capsules: Array, labels: Array | None = None) -> Array:
        """Reconstruct each image from the capsule of one class.

        Args:
          capsules: Class capsules `[..., J, D]`.
          labels: Class of each image, integers `[...]`; None for the longest capsule. Training
            passes the true labels, so that the decoder learns before the classification does.

        Returns:
          Images `[..., H, W, C]` in [0, 1].

        Raises:
          ValueError: Labels have another shape, or one is not 0 … J - 1; the values of labels
            traced by a transformation are not checked.
          TypeError: Labels are no integers.
        """
        if labels is None:
            labels = jnp.argmax(lengths(capsules), axis=-1)
        else:
            check_labels("CapsNet.reconstruct", labels, capsules.shape[:-2], capsules.shape[-2])
        return self.decoder(capsules, jax.nn.one_hot(labels, capsules.shape[-2]))
