"""Convolution as products of discrete Fourier transforms of the stride's phases: for a CPU.

A stride of s splits an image into s² interleaved phases, and the convolution into one of stride 1
over s² as many channels. There the transform turns each frequency into one matrix product over
channels: 148 real products in place of 729 for the 9x9 kernel of stride 2 over a 20x20 image. The
transforms are products with fixed matrices, so every gradient is made of matrix products too.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from capsjax.kernels.dispatch import Unsupported

Pair = tuple[int, int]

# 2 Zen 4 cores: about 80 billion multiplications and 1.5 billion such moves a second. It places
# the measured break-even points of BUILD_NOTES.md, "Convolution on a CPU".
MOVED = 50


class Transforms(NamedTuple):
    """Real matrices; F counts real frequencies once and complex ones three times.

    A complex product takes three real ones (Karatsuba): for x = a + bi and k = c + di, the
    products p = (a + b)c, q = a(d - c), r = b(c + d) give xk = (p - r) + (p + q)i.
    """

    image: np.ndarray  # [F, pixels of a phase]
    kernel: np.ndarray  # [F, taps of a phase]
    output: np.ndarray  # [pixels of the output, F]


def strided_conv(images: Array, kernel: Array, *, stride: Pair) -> Array:
    """Convolves, in float32 at least; its error is that of the direct sum.

    Raises:
      Unsupported: The transforms would cost more than they spare.
    """
    batch, height, width, channels = images.shape
    kernel_size, outputs = kernel.shape[:2], kernel.shape[3]
    taps = _each(lambda k, s: -(-k // s), kernel_size, stride)
    output = _each(lambda n, k, s: (n - k) // s + 1, (height, width), kernel_size, stride)
    extent = _each(lambda o, t: o + t - 1, output, taps)
    if not _worthwhile(extent, taps, output, batch, math.prod(stride), kernel.shape):
        raise Unsupported(f"transforms of {extent} phases cost more than the direct sum")

    dtype = jnp.promote_types(images.dtype, jnp.float32)
    matrices = Transforms(*(m.astype(dtype) for m in _transforms(extent, taps, output)))
    (rows, row_step), (columns, column_step) = zip(extent, stride, strict=True)
    # The last phases may reach past the image, and the image past the last window.
    x = images[:, : rows * row_step, : columns * column_step].astype(dtype)
    x = jnp.pad(x, _padding(x.shape, (batch, rows * row_step, columns * column_step, channels)))
    x = x.reshape(batch, rows, row_step, columns, column_step, channels)
    x = x.transpose(1, 3, 0, 2, 4, 5).reshape(rows * columns, batch, -1)
    k = jnp.pad(
        kernel.astype(dtype),
        _padding(kernel.shape, (taps[0] * row_step, taps[1] * column_step, channels, outputs)),
    )
    k = k.reshape(taps[0], row_step, taps[1], column_step, channels, outputs)
    k = k.transpose(0, 2, 1, 3, 4, 5).reshape(math.prod(taps), -1, outputs)

    x = jnp.einsum("fs,sbc->fbc", matrices.image, x)
    k = jnp.einsum("ft,tco->fco", matrices.kernel, k)
    products = jnp.einsum("fbc,fco->fbo", x, k)
    y = jnp.einsum("sf,fbo->bso", matrices.output, products)
    return y.reshape(batch, *output, outputs).astype(images.dtype)


def _each(function: Callable[..., int], *pairs: tuple[int, ...]) -> Pair:
    rows, columns = (function(*values) for values in zip(*pairs, strict=True))
    return rows, columns


def _padding(shape: tuple[int, ...], target: tuple[int, ...]) -> list[Pair]:
    return [(0, t - n) for n, t in zip(shape, target, strict=True)]


def _worthwhile(
    extent: Pair, taps: Pair, output: Pair, batch: int, phases: int, kernel: tuple[int, ...]
) -> bool:
    """Whether this form costs less than one product over patches, in multiplications an image.

    Both are bound by memory in part. A number that is written and read again counts as
    `MOVED` multiplications: patches in the direct form, the transformed kernel here.
    """
    height, width, channels, outputs = kernel
    pairs = phases * channels * outputs
    direct = math.prod(output) * height * width * channels * (outputs + MOVED)
    image = math.prod(extent) * phases * channels + math.prod(output) * outputs + pairs
    spectral = 1.5 * math.prod(extent) * (image + pairs * (math.prod(taps) + MOVED) / batch)
    return spectral < direct


@cache
def _transforms(extent: Pair, taps: Pair, output: Pair) -> Transforms:
    """The matrices, in float64: x and k to frequencies, and the sums of products back.

    Circular correlation of period `extent` is exact on the output's pixels, which no tap leaves.
    Frequencies (a, b) and (-a, -b) of a real image are conjugates: one of the two suffices.
    """
    frequencies = list(np.ndindex(*extent))
    mirrored = [tuple(-a % n for a, n in zip(f, extent, strict=True)) for f in frequencies]
    real = [f for f, m in zip(frequencies, mirrored, strict=True) if f == m]
    half = [f for f, m in zip(frequencies, mirrored, strict=True) if f < m]

    def waves(of: Sequence[tuple[int, ...]], size: Pair) -> np.ndarray:
        """`exp(-2πi f·x)` for the frequencies and the pixels of `size`, `[f, x]`."""
        turns = np.array(of).reshape(-1, 2) / extent @ np.array(list(np.ndindex(*size))).T
        return np.exp(-2j * np.pi * turns)

    # Correlation: the image's transform times the conjugate of the kernel's.
    x, k, y = waves(half, extent), waves(half, taps).conj(), waves(half, output).conj()
    pixels = math.prod(extent)
    # y = Re(conj(wave) · xk), twice for the two conjugates; Re(yz) = Re y Re z - Im y Im z, with
    # z = (p - r) + (p + q)i.
    back = 2 / pixels * np.concatenate([y.real - y.imag, -y.imag, -y.real])
    return Transforms(
        image=np.concatenate([waves(real, extent).real, x.real + x.imag, x.real, x.imag]),
        kernel=np.concatenate([waves(real, taps).real, k.real, k.imag - k.real, k.real + k.imag]),
        output=np.concatenate([waves(real, output).real / pixels, back]).T,
    )
