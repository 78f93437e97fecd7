"""Build the networks that the programs train, by name: capsule networks, and two CNNs as controls.

Shape letters are those of `capsjax.shapes`; K is the number of classes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from capsjax import nn
from capsjax.models import (
    CapsNet,
    EfficientCapsNet,
    InvertedAttentionCapsNet,
    MatrixCapsNet,
    SRCapsNet,
)
from experiments.cli import flag
from experiments.errors import InputError
from experiments.training.transforms import AxisName, draw

# Channels of the convolutions and units of the hidden layer of CNNs with max-pooling. The last two
# have as many parameters as Efficient-CapsNet without its decoder, and as CapsNet with it.
POOLING = {
    "pooling_cnn": ((32, 64), 256),
    "pooling_cnn_160k": ((32, 64), 106),
    "pooling_cnn_8m": ((256, 512), 600),
}
NETWORKS = ("capsnet", "cnn", *POOLING)
# Networks with the sizes of their papers, except for the images'. Of the other settings they take
# dtype and, if their layers do, implementation.
PUBLISHED: dict[str, Callable[..., nnx.Module]] = {
    "efficient_capsnet": EfficientCapsNet,
    "efficient_capsnet_small_norb": EfficientCapsNet.small_norb,
    "matrix_capsnet": MatrixCapsNet.small,
    "sr_capsnet": SRCapsNet,
    "inverted_attention_capsnet": InvertedAttentionCapsNet,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a network; the defaults are the paper's capsule network."""

    network: str = flag(
        "capsnet",
        "capsnet; cnn: the paper's baseline for MNIST; pooling_cnn: a small CNN with max-pooling; "
        "pooling_cnn_160k, pooling_cnn_8m: with as many parameters as capsule networks have.",
        choices=NETWORKS,
    )
    num_iterations: int = flag(
        3, "Routing iterations; with 1, couplings are uniform.", minimum=1, maximum=100
    )
    gradient: str = flag(
        "full",
        "Backpropagate through all routing iterations, or the last one.",
        choices=("full", "last"),
    )
    conv_channels: int = flag(256, "Channels of the first convolution.", minimum=1, maximum=16384)
    kernel_size: int = flag(
        9,
        "Height and width of the windows of capsnet's two convolutions.",
        minimum=1,
        maximum=1024,
        added=True,
    )
    primary_types: int = flag(32, "Primary capsules at each position.", minimum=1, maximum=65536)
    primary_scale: float = flag(
        1.0, "Factor on the primary capsules' convolution, before its bias.", above=0, maximum=1e6
    )
    capsule_length: int = flag(16, "Dimensions of a class capsule.", minimum=1, maximum=65536)
    capsule_bias: float = flag(
        0.0,
        "Initial bias of both capsule layers; 0: class capsules have none.",
        minimum=-1e6,
        maximum=1e6,
    )
    decoder_units: int = flag(
        512,
        "Units of the decoder's first hidden layer; the second has twice as many.",
        minimum=1,
        maximum=65536,
        added=True,
    )
    dtype: str = flag(
        "float32",
        "Dtype of the computation; parameters stay float32.",
        choices=("float32", "bfloat16"),
    )
    implementation: str = flag(
        "auto",
        "Implementation of routing; auto: the best one of the platform.",
        choices=("auto", "xla", "reference"),
    )


class Cnn(nnx.Module):
    """Convolutions with ReLU, dense layers, and dropout before the logits.

    The defaults are the paper's baseline for MNIST, without pooling. Padded convolutions follow
    from its 35.4 million parameters; the dropout rate is ours, because the paper gives none.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", section 5,
    https://arxiv.org/abs/1710.09829.

    Args:
      image_shape: H, W, C of the images.
      num_classes: Number of logits, K.
      channels: Output channels of each convolution.
      kernel_size: Height and width of each kernel.
      pooling: Whether 2 x 2 max-pooling follows each convolution, which is then not padded; an odd
        last row or column is dropped.
      hidden: Sizes of the dense layers before the logits.
      dropout: Dropout rate of the last hidden layer in training.
      dtype: Dtype of the computation; parameters stay float32.
      rngs: Random streams for the parameters.

    Raises:
      ValueError: The images are too small for the convolutions.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        channels: Sequence[int] = (256, 256, 128),
        kernel_size: int = 5,
        pooling: bool = False,
        hidden: Sequence[int] = (328, 192),
        dropout: float = 0.5,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        height, width, inputs = image_shape
        if pooling:
            for _ in channels:
                height, width = ((n - kernel_size + 1) // 2 for n in (height, width))
        if min(height, width) < 1:
            raise ValueError(
                f"Cnn: image_shape must leave pixels after {len(channels)} convolutions, "
                f"got {image_shape}"
            )
        self.convolutions = nnx.List(
            nn.Convolution(before, after, kernel_size=kernel_size, dtype=dtype, rngs=rngs)
            for before, after in itertools.pairwise((inputs, *channels))
        )
        sizes = (height * width * channels[-1], *hidden, num_classes)
        self.layers = nnx.List(
            nnx.Linear(before, after, dtype=dtype, rngs=rngs)
            for before, after in itertools.pairwise(sizes)
        )
        self.pooling = pooling
        self.dropout = dropout

    def features(self, images: Array) -> Array:
        """Map images `[B, H, W, C]` to the last hidden layer `[B, hidden]`."""
        x = images
        for convolution in self.convolutions:
            x = x if self.pooling else _padded(x, convolution.kernel.shape[0])
            x = jax.nn.relu(convolution(x))
            x = _pooled(x) if self.pooling else x
        x = x.reshape(len(x), -1)
        for layer in list(self.layers)[:-1]:
            x = jax.nn.relu(layer(x))
        return x

    def __call__(
        self, images: Array, *, dropout_key: Array | None = None, axis_name: AxisName = None
    ) -> Array:
        """Map images `[B, H, W, C]` to logits `[B, K]`, without dropout if the key is None."""
        x = self.features(images)
        if dropout_key is not None:
            rate = 1 - self.dropout
            kept = draw(
                lambda shape: jax.random.bernoulli(dropout_key, rate, shape), x.shape, axis_name
            )
            x = jnp.where(kept, x / rate, 0)
        return self.layers[-1](x)


def build(
    settings: Settings, image_shape: tuple[int, int, int], num_classes: int, *, seed: int
) -> nnx.Module:
    """Build the network of the settings for images of a shape `(H, W, C)`.

    Raises:
      InputError: The images are too small.
    """
    rngs, dtype = nnx.Rngs(seed), jnp.dtype(settings.dtype)
    try:
        if settings.network == "cnn":
            return Cnn(image_shape, num_classes, dtype=dtype, rngs=rngs)
        if settings.network in POOLING:
            channels, units = POOLING[settings.network]
            return Cnn(
                image_shape,
                num_classes,
                channels=channels,
                pooling=True,
                hidden=(units,),
                dtype=dtype,
                rngs=rngs,
            )
        implementation = None if settings.implementation == "auto" else settings.implementation
        if settings.network in PUBLISHED:
            takes = settings.network.startswith(("efficient_capsnet", "matrix_capsnet"))
            if implementation and not takes:
                raise InputError(
                    f"--implementation must be auto for --network={settings.network}, got "
                    f"{implementation!r}"
                )
            named = {"implementation": implementation} if takes else {}
            return PUBLISHED[settings.network](
                image_shape=image_shape, num_classes=num_classes, dtype=dtype, rngs=rngs, **named
            )
        return CapsNet(
            image_shape,
            num_classes,
            conv_channels=settings.conv_channels,
            kernel_size=settings.kernel_size,
            primary_types=settings.primary_types,
            primary_scale=settings.primary_scale,
            capsule_length=settings.capsule_length,
            capsule_bias=settings.capsule_bias or None,
            num_iterations=settings.num_iterations,
            gradient=settings.gradient,
            hidden=(settings.decoder_units, 2 * settings.decoder_units),
            implementation=implementation,
            dtype=dtype,
            rngs=rngs,
        )
    except ValueError as error:
        advice = ""
        if settings.network == "capsnet" and min(image_shape[:2]) < 2 * settings.kernel_size - 1:
            advice = f"; --kernel_size={(min(image_shape[:2]) + 1) // 2} is the largest that fits"
        raise InputError(f"{error}{advice}") from error


def _padded(x: Array, kernel_size: int) -> Array:
    """Pad images `[B, H, W, C]` with zeros, so that a convolution preserves H and W."""
    room = ((kernel_size - 1) // 2, kernel_size // 2)
    return jnp.pad(x, ((0, 0), room, room, (0, 0)))


def _pooled(x: Array) -> Array:
    """Apply 2 x 2 max-pooling to `[B, H, W, C]`."""
    batch, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(batch, height // 2, 2, width // 2, 2, channels).max((2, 4))
