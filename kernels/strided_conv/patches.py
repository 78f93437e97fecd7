"""Convolution as one matrix product over image patches: good for few input channels."""

import jax.numpy as jnp
from jax import Array


def strided_conv(images: Array, kernel: Array, *, stride: tuple[int, int]) -> Array:
    """Convolves; the patches hold every pixel `h * w / stride²` times."""
    height, width, channels, outputs = kernel.shape
    rows = (images.shape[1] - height) // stride[0] + 1
    columns = (images.shape[2] - width) // stride[1] + 1
    shifted = [
        images[
            :,
            y : y + (rows - 1) * stride[0] + 1 : stride[0],
            x : x + (columns - 1) * stride[1] + 1 : stride[1],
        ]
        for y in range(height)
        for x in range(width)
    ]
    patches = jnp.concatenate(shifted, axis=-1)
    product = patches.reshape(-1, height * width * channels) @ kernel.reshape(-1, outputs)
    return product.reshape(images.shape[0], rows, columns, outputs)
