"""Efficient-CapsNet, the network of Mazzia, Salvetti and Chiaberge (2021)."""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from capsjax import nn, shapes
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.metrics import lengths
from capsjax.models._blocks import check_images, check_labels, keeps_arguments
from capsjax.routing.self_attention import exponential_squash, self_attention_routing

# The defaults of the authors' normalization layers.
EPSILON, MOMENTUM = 1e-3, 0.99

# Channels and kernel sizes of the upsampling decoder, before the channels of the images.
UPSAMPLED_CHANNELS, UPSAMPLED_KERNEL = (64, 128, 128), 3


@keeps_arguments
class EfficientCapsNet(nnx.Module):
    """Efficient-CapsNet: four convolutions, depthwise primary capsules, self-attention routing.

    Source: Mazzia, Salvetti and Chiaberge, "Efficient-CapsNet: capsule network with self-attention
    routing", https://arxiv.org/abs/2101.12491, and the authors' code (EscVM/Efficient-CapsNet).
    The defaults are theirs for MNIST; `multi_mnist` and `small_norb` build the other two networks.

    | network | images | parameters without decoder | decoder |
    | --- | --- | --- | --- |
    | `EfficientCapsNet` (MNIST) | 28 x 28 x 1 | 161,824 | dense, 1,411,344 |
    | `EfficientCapsNet.multi_mnist` | 36 x 36 x 1 | 154,656 | dense, 1,936,144 |
    | `EfficientCapsNet.small_norb` | 48 x 48 x 2 | 151,664 | upsampling, 229,570 |

    Parameters are `nnx.Param`, batch statistics `nnx.BatchStat`. The argument `training` of a call
    is the mode: True normalises by the batch and updates the statistics, False normalises by the
    statistics. The methods `train` and `eval` of NNX change nothing.

    Args:
      image_shape: (H, W, C) of the images; a call refuses others, and images of integers.
      num_classes: J, one class capsule for each class.
      convolutions: Output channels, kernel size and stride of each convolution. An activation and a
        normalization follow each.
      negative_slope: Of the activation, a leaky ReLU; 0 for a ReLU.
      normalization: `"batch"`; or `"instance"`, which normalises each image by itself.
      primary_kernel_size: Height and width of the windows of the primary capsules' depthwise
        convolution.
      primary_stride: Positions from one of these windows to the next.
      primary_length: P, the length of a primary capsule.
      capsule_length: D, the length of a class capsule.
      hidden: Sizes of a dense decoder's hidden layers; None for a decoder that upsamples, for
        images whose height and width are multiples of 8.
      implementation: As in `self_attention_routing`.
      dtype: Of the computation; parameters are float32, normalization is in float32 at least.
      rngs: Random streams; `params` initialises all parameters.

    Raises:
      ValueError: The images are too small for the convolutions, or not upsampled to by the decoder;
        or the last convolution's channels are not a multiple of `primary_length`.

    Example:
      >>> model = EfficientCapsNet((28, 28, 1), 10, hidden=(16,), rngs=nnx.Rngs(0))
      >>> images = jnp.zeros((5, 28, 28, 1))
      >>> capsules = model(images)
      >>> capsules.shape, model.reconstruct(capsules, jnp.arange(5)).shape
      ((5, 10, 16), (5, 28, 28, 1))

      Training, without hidden state: the updated statistics are a result of a step. The copy is
      needed because NNX updates variables only in the trace where they were created.

      >>> structure, parameters, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
      >>> @jax.jit
      ... def gradients(parameters, statistics, images, targets):
      ...     def loss(parameters):
      ...         model = nnx.merge(structure, parameters, statistics, copy=True)
      ...         capsules = model(images, training=True)
      ...         loss = margin_loss(lengths(capsules), targets).mean()
      ...         return loss, nnx.state(model, nnx.BatchStat)
      ...
      ...     return jax.grad(loss, has_aux=True)(parameters)
      >>> slopes, statistics = gradients(parameters, statistics, images, jnp.eye(5, 10))
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (28, 28, 1),
        num_classes: int = 10,
        *,
        convolutions: tuple[tuple[int, int, int], ...] = (
            (32, 5, 1),
            (64, 3, 1),
            (64, 3, 1),
            (128, 3, 2),
        ),
        negative_slope: float = 0.0,
        normalization: str = "batch",
        primary_kernel_size: int = 9,
        primary_stride: int = 1,
        primary_length: int = 8,
        capsule_length: int = 16,
        hidden: tuple[int, ...] | None = (512, 1024),
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        shapes.check_choice(
            "EfficientCapsNet", "normalization", normalization, ("batch", "instance")
        )
        out_channels = convolutions[-1][0]
        if out_channels % primary_length:
            raise ValueError(
                "EfficientCapsNet: convolutions must end with a multiple of primary_length = "
                f"{primary_length} channels, got {out_channels}"
            )
        self.image_shape = image_shape
        windows = [window for _, *window in convolutions]
        windows.append([primary_kernel_size, primary_stride])
        grid = _grid(image_shape, windows)
        blocks, in_channels = [], image_shape[2]
        for channels, kernel_size, stride in convolutions:
            block = _ConvolutionBlock(
                in_channels,
                channels,
                kernel_size=kernel_size,
                stride=stride,
                negative_slope=negative_slope,
                normalization=normalization,
                dtype=dtype,
                rngs=rngs,
            )
            blocks.append(block)
            in_channels = channels
        self.blocks = nnx.List(blocks)
        self.primary = _DepthwisePrimaryCapsules(
            out_channels,
            primary_length,
            kernel_size=primary_kernel_size,
            stride=primary_stride,
            dtype=dtype,
            rngs=rngs,
        )
        self.capsules = _SelfAttentionCapsules(
            (
                grid[0] * grid[1] * out_channels // primary_length,
                primary_length,
                num_classes,
                capsule_length,
            ),
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
        self.decoder: nn.Decoder | _UpsamplingDecoder
        if hidden is None:
            self.decoder = _UpsamplingDecoder(
                num_classes * capsule_length, image_shape, dtype=dtype, rngs=rngs
            )
        else:
            self.decoder = nn.Decoder(
                num_classes, capsule_length, image_shape, hidden=hidden, dtype=dtype, rngs=rngs
            )

    @classmethod
    def multi_mnist(cls, *, rngs: nnx.Rngs, **settings: Any) -> "EfficientCapsNet":
        """Build the network for MultiMNIST; `settings` are other arguments of the class."""
        defaults: dict[str, Any] = {
            "image_shape": (36, 36, 1),
            "convolutions": ((32, 5, 1), (64, 3, 1), (64, 3, 2), (128, 3, 2)),
            "primary_kernel_size": 5,
            # Of 6 x 6 positions the authors' stride leaves one window, without the last positions.
            "primary_stride": 2,
        }
        return cls(**defaults | settings, rngs=rngs)

    @classmethod
    def small_norb(cls, *, rngs: nnx.Rngs, **settings: Any) -> "EfficientCapsNet":
        """Build the network for smallNORB; `settings` are other arguments of the class."""
        defaults: dict[str, Any] = {
            "image_shape": (48, 48, 2),
            "num_classes": 5,
            "convolutions": ((32, 7, 2), (64, 3, 1), (64, 3, 1), (128, 3, 2)),
            "negative_slope": 0.3,
            "normalization": "instance",
            "primary_kernel_size": 8,
            "hidden": None,
        }
        return cls(**defaults | settings, rngs=rngs)

    def __call__(self, images: Array, *, training: bool = False) -> Array:
        """Map images `[..., H, W, C]` in [0, 1] to class capsules `[..., J, D]`."""
        return self.capsules(self.primary_poses(images, training=training))

    def primary_poses(self, images: Array, *, training: bool = False) -> Array:
        """Map images `[..., H, W, C]` to the poses of the primary capsules, `[..., I, P]`."""
        check_images("EfficientCapsNet", images, self.image_shape)
        leading = images.shape[:-3]
        maps = images.reshape(math.prod(leading), *images.shape[-3:])
        for block in self.blocks:
            maps = block(maps, training=training)
        poses = self.primary(maps)
        return poses.reshape(*leading, *poses.shape[1:])

    def reconstruct(self, capsules: Array, labels: Array | None = None) -> Array:
        """Reconstruct each image, or one digit of each, from the capsule of one class.

        Args:
          capsules: Class capsules `[..., J, D]`.
          labels: Class of each image, integers `[...]`; None for the longest capsule. Of images of
            two digits, a call with the label of one digit reconstructs that digit.

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
            check_labels(
                "EfficientCapsNet.reconstruct", labels, capsules.shape[:-2], capsules.shape[-2]
            )
        return self.decoder(capsules, jax.nn.one_hot(labels, capsules.shape[-2]))


class _ConvolutionBlock(nnx.Module):
    """A convolution, a leaky ReLU and a normalization, of maps `[B, H, W, C]`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int,
        negative_slope: float,
        normalization: str,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.convolution = nn.Convolution(
            in_channels,
            out_channels,
            kernel_size=kernel_size,
            stride=stride,
            kernel_init=jax.nn.initializers.he_normal(),
            dtype=dtype,
            rngs=rngs,
        )
        self.negative_slope = negative_slope
        # Statistics in half precision would be rounded too much.
        wide = accumulation_dtype(jnp.dtype(dtype))
        settings: dict[str, Any] = {
            "epsilon": EPSILON,
            "use_fast_variance": False,  # E[x²] - E[x]² cancels where the mean is large
            "dtype": wide,
            "rngs": rngs,
        }
        self.normalization: nnx.BatchNorm | nnx.InstanceNorm
        if normalization == "batch":
            self.normalization = nnx.BatchNorm(out_channels, momentum=MOMENTUM, **settings)
            # Flax creates float32 statistics, and warns when it updates them from float64.
            self.normalization.mean = nnx.BatchStat(jnp.zeros(out_channels, wide))
            self.normalization.var = nnx.BatchStat(jnp.ones(out_channels, wide))
        else:
            self.normalization = nnx.InstanceNorm(
                out_channels,
                scale_init=_uniform_around_zero,
                bias_init=_uniform_around_zero,
                **settings,
            )

    def __call__(self, maps: Array, *, training: bool) -> Array:
        maps = self.convolution(maps)
        slope = self.negative_slope
        maps = jax.nn.leaky_relu(maps, slope) if slope else jax.nn.relu(maps)
        if isinstance(self.normalization, nnx.BatchNorm):
            normalized = self.normalization(maps, use_running_average=not training)
        else:
            normalized = self.normalization(maps)
        return normalized.astype(maps.dtype)


class _DepthwisePrimaryCapsules(nnx.Module):
    """Primary capsules: a depthwise convolution of which every P channels form a capsule."""

    def __init__(
        self,
        channels: int,
        length: int,
        *,
        kernel_size: int,
        stride: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (kernel_size, kernel_size, 1, channels)
        self.kernel = nnx.Param(jax.nn.initializers.glorot_uniform()(rngs.params(), shape))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.length = length
        self.stride = stride
        self.dtype = dtype

    def __call__(self, maps: Array) -> Array:
        """Map `[B, H, W, C]` to poses `[B, I, P]`, by rows, columns and channels."""
        kernel = self.kernel[...].astype(self.dtype)
        size, stride = kernel.shape[0], self.stride
        # The published networks have one window. A product for each window is then all of it, and
        # its gradient is fast, which that of XLA's grouped convolution is not on a CPU.
        windows = [
            maps[:, y : y + size, x : x + size]
            for y in range(0, maps.shape[1] - size + 1, stride)
            for x in range(0, maps.shape[2] - size + 1, stride)
        ]
        sums = [jnp.einsum("bhwc,hwc->bc", window, kernel[:, :, 0]) for window in windows]
        convolved = jnp.stack(sums, 1)
        convolved += jnp.broadcast_to(self.bias[...].astype(self.dtype), convolved.shape)
        capsules = convolved.shape[1] * convolved.shape[2] // self.length
        return exponential_squash(convolved.reshape(maps.shape[0], capsules, self.length))


class _SelfAttentionCapsules(nnx.Module):
    """A fully connected capsule layer, by `self_attention_routing`."""

    def __init__(
        self,
        shape: tuple[int, int, int, int],
        *,
        implementation: str | None,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        children, _, parents, _ = shape
        # As in the authors' code, every axis but the last one counts as inputs.
        weights_init = jax.nn.initializers.he_normal(in_axis=(0, 1, 2), out_axis=3)
        self.weights = nnx.Param(weights_init(rngs.params(), shape))
        self.couplings_bias = nnx.Param(jnp.zeros((children, parents), jnp.float32))
        self.implementation = implementation
        self.dtype = dtype

    def __call__(self, poses: Array) -> Array:
        """Map poses `[..., I, P]` to poses `[..., J, D]`."""
        return self_attention_routing(
            poses,
            self.weights[...].astype(self.dtype),
            couplings_bias=self.couplings_bias[...].astype(
                accumulation_dtype(jnp.dtype(self.dtype))
            ),
            implementation=self.implementation,
        )


class _UpsamplingDecoder(nnx.Module):
    """A decoder of a dense layer, then alternately upsampling and convolutions."""

    def __init__(
        self,
        inputs: int,
        image_shape: tuple[int, int, int],
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, channels = image_shape
        if height % 8 or width % 8:
            raise ValueError(
                "EfficientCapsNet: image_shape must have a height and width of multiples of 8 "
                f"pixels for a decoder that upsamples (hidden=None), got {image_shape}"
            )
        # Three times a map is doubled, and loses 2 rows and columns; at the end it loses 2 more.
        self.grid = height // 8 + 2, width // 8 + 2
        self.dense = nnx.Linear(
            inputs,
            math.prod(self.grid),
            kernel_init=jax.nn.initializers.glorot_uniform(),
            dtype=dtype,
            rngs=rngs,
        )
        sizes = (1, *UPSAMPLED_CHANNELS, channels)
        self.convolutions = nnx.List(
            nn.Convolution(
                before,
                after,
                kernel_size=UPSAMPLED_KERNEL,
                kernel_init=jax.nn.initializers.glorot_uniform(),
                dtype=dtype,
                rngs=rngs,
            )
            for before, after in itertools.pairwise(sizes)
        )

    def __call__(self, capsules: Array, chosen: Array) -> Array:
        """Map capsules `[..., J, D]`, times a 0/1 mask `[..., J]`, to images in [0, 1]."""
        leading = capsules.shape[:-2]
        x = capsules * chosen[..., None].astype(capsules.dtype)
        x = self.dense(x.reshape(math.prod(leading), math.prod(capsules.shape[-2:])))
        x = x.reshape(x.shape[0], *self.grid, 1)
        *hidden, last = self.convolutions
        for convolution in hidden:
            batch, height, width, channels = x.shape
            doubled = (batch, 2 * height, 2 * width, channels)
            x = jax.nn.leaky_relu(convolution(jax.image.resize(x, doubled, "bilinear")), 0.2)
        x = jax.nn.sigmoid(last(x))
        return x.reshape(*leading, *x.shape[1:])


def _grid(image_shape: tuple[int, int, int], windows: list[list[int]]) -> tuple[int, int]:
    """Compute how many windows of the last convolution there are along height and width."""
    needed = 1
    for kernel_size, stride in reversed(windows):
        needed = (needed - 1) * stride + kernel_size
    if min(image_shape[:2]) < needed:
        raise ValueError(
            f"EfficientCapsNet: image_shape must be at least {needed} pixels high and wide for "
            f"these convolutions, got {image_shape}"
        )
    height, width = image_shape[:2]
    for kernel_size, stride in windows:
        height, width = ((size - kernel_size) // stride + 1 for size in (height, width))
    return height, width


def _uniform_around_zero(key: Array, shape: Any, dtype: Any = jnp.float32, **_: Any) -> Array:
    """Draw from [-0.05, 0.05), as the authors' normalization layers for smallNORB start."""
    return jax.random.uniform(key, shape, dtype, -0.05, 0.05)
