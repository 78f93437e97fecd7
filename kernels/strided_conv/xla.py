"""XLA's own convolution: the definition, and the fastest on a GPU or TPU."""

from jax import Array, lax


def strided_conv(images: Array, kernel: Array, *, stride: tuple[int, int]) -> Array:
    """Convolves; on a CPU its gradients are tens of times slower than its values."""
    return lax.conv_general_dilated(
        images, kernel, stride, "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
