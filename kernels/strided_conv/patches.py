"""Convolution as one matrix product over image patches (im2col)."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.sharding import vary_over, varying_axes

# With fewer channels, a slice for each of the h·w offsets of a window copies few adjacent numbers
# at a time, so windows of one row are gathered first, then h of those. For 1 channel that took 0.7
# to 0.9 times as long; for 32 and 64 channels, with gradients, 1.1 and 1.9 times.
FEW_CHANNELS = 8


# Patches of more numbers than this leave the caches before the product reads them, so they are made
# for a block of BLOCK images at a time: values and gradients of 128 images of 24x24x32 by 3x3x32x64
# took 87 ms instead of 152, of 20x20x64 by 3x3x64x128 with stride 2 34 instead of 40 (2 cores with
# AVX-512); of 16 images, the same time. Blocks of 1 and 2 images were slower than those of 4.
WHOLE, BLOCK = 2**22, 4


def strided_conv(images: Array, kernel: Array, *, stride: tuple[int, int]) -> Array:
    """Convolve; the patches hold every pixel `h * w / stride²` times."""
    batch, *pixels = images.shape
    sizes = zip(pixels[:2], kernel.shape[:2], stride, strict=True)
    windows = math.prod((n - k) // s + 1 for n, k, s in sizes)
    numbers = windows * math.prod(kernel.shape[:3])
    # A known batch only: the loop's length is part of the program. Of few channels, the product
    # reads little, and blocks took 22 ms instead of 13 (28x28x1 by 5x5x1x32).
    known = isinstance(batch, int) and batch > BLOCK
    if not known or batch * numbers <= WHOLE or kernel.shape[2] < FEW_CHANNELS:
        return _product(images, kernel, stride)

    # Under shard_map the kernel's gradient is summed over the mesh once, not in every block.
    axes = varying_axes(images, kernel)
    images, kernel = vary_over(axes, images), vary_over(axes, kernel)

    # Gradients make the patches again, instead of keeping those of all blocks.
    @jax.checkpoint
    def of_block(block: Array) -> Array:
        return _product(block, kernel, stride)

    rest = batch % BLOCK
    blocks = images[: batch - rest].reshape(-1, BLOCK, *pixels)
    convolved = lax.map(of_block, blocks)
    convolved = convolved.reshape(-1, *convolved.shape[2:])
    return jnp.concatenate([convolved, of_block(images[batch - rest :])]) if rest else convolved


def _product(images: Array, kernel: Array, stride: tuple[int, int]) -> Array:
    """Convolve by one matrix product."""
    height, width, channels, outputs = kernel.shape
    if channels < FEW_CHANNELS:
        patches = _windows(images, (1, width), (1, stride[1]))
        patches = _windows(patches, (height, 1), (stride[0], 1))
    else:
        patches = _windows(images, (height, width), stride)
    product = patches.reshape(-1, height * width * channels) @ kernel.reshape(-1, outputs)
    return product.reshape(*patches.shape[:3], outputs)


def _windows(images: Array, size: tuple[int, int], stride: tuple[int, int]) -> Array:
    """Gather all windows of images `[B, H, W, C]`, as `[B, rows, columns, h·w·C]`."""
    batch, height, width, channels = images.shape
    rows, columns = height - size[0] + 1, width - size[1] + 1
    shifted = [
        lax.slice(images, (0, y, x, 0), (batch, y + rows, x + columns, channels), (1, *stride, 1))
        for y in range(size[0])
        for x in range(size[1])
    ]
    return jnp.concatenate(shifted, axis=-1)
