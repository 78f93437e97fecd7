"""Convolution as one matrix product over image patches: good for few input channels."""

import jax.numpy as jnp
from jax import Array, lax

# Fewer numbers than these lie too scattered to be moved one window at a time. Windows of windows
# of 1 channel took 0.7 to 0.9 times as long, of 32 and 64, with gradients, 1.1 and 1.9 times.
FEW_CHANNELS = 8


def strided_conv(images: Array, kernel: Array, *, stride: tuple[int, int]) -> Array:
    """Convolves; the patches hold every pixel `h * w / stride²` times."""
    height, width, channels, outputs = kernel.shape
    if channels < FEW_CHANNELS:
        patches = _windows(images, (1, width), (1, stride[1]))
        patches = _windows(patches, (height, 1), (stride[0], 1))
    else:
        patches = _windows(images, (height, width), stride)
    product = patches.reshape(-1, height * width * channels) @ kernel.reshape(-1, outputs)
    return product.reshape(*patches.shape[:3], outputs)


def _windows(images: Array, size: tuple[int, int], stride: tuple[int, int]) -> Array:
    """All windows of `[b, rows, columns, c]`, `[b, rows, columns, h w c]`."""
    batch, height, width, channels = images.shape
    rows, columns = height - size[0] + 1, width - size[1] + 1
    shifted = [
        lax.slice(images, (0, y, x, 0), (batch, y + rows, x + columns, channels), (1, *stride, 1))
        for y in range(size[0])
        for x in range(size[1])
    ]
    return jnp.concatenate(shifted, axis=-1)
