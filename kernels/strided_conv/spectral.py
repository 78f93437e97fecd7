"""Convolution as products of discrete Fourier transforms of the stride's phases: for a CPU.

A stride of s splits an image into s² interleaved phases, and the convolution into one of stride 1
over s² as many channels. There the transform turns each frequency into one matrix product over
channels: 148 real products in place of 729 for the 9x9 kernel of stride 2 over a 20x20 image. The
transforms are products with fixed matrices.

Transforms are larger than what they are made of (155 MB for a kernel of 21 MB), so they exist for
some channels at a time, and the gradient makes them anew. Letters: F frequencies, Q phases, b
examples, c input and o output channels.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from capsjax.kernels.dispatch import Unsupported

Pair = tuple[int, int]

# 2 Zen 4 cores: about 80 billion multiplications and 1.5 billion such moves a second. It places
# the measured break-even points of BUILD_NOTES.md, "Convolution on a CPU".
MOVED = 50
# Input channels transformed at a time: 32, 128 and all 256 take 1.19, 1.16 and 1.34 times as long.
CHANNELS = 64


class Plan(NamedTuple):
    """The static sizes of one convolution."""

    stride: Pair
    extent: Pair  # pixels of a phase
    taps: Pair  # of a phase
    output: Pair  # pixels
    channels: int  # transformed at a time, a divisor of all


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

    There is no forward-mode derivative: `"patches"` and `"xla"` have it.

    Raises:
      Unsupported: The transforms would cost more than they spare.
    """
    batch, height, width, channels = images.shape
    kernel_size = kernel.shape[:2]
    taps = _each(lambda k, s: -(-k // s), kernel_size, stride)
    output = _each(lambda n, k, s: (n - k) // s + 1, (height, width), kernel_size, stride)
    extent = _each(lambda o, t: o + t - 1, output, taps)
    if not _worthwhile(extent, taps, output, batch, math.prod(stride), kernel.shape):
        raise Unsupported(f"transforms of {extent} phases cost more than the direct sum")

    dtype = jnp.promote_types(images.dtype, jnp.float32)
    chunks = -(-channels // CHANNELS)
    size = -(-channels // chunks)
    missing = (0, chunks * size - channels)
    x = jnp.pad(images.astype(dtype), ((0, 0), (0, 0), (0, 0), missing))
    k = jnp.pad(kernel.astype(dtype), ((0, 0), (0, 0), missing, (0, 0)))
    return _convolve(Plan(stride, extent, taps, output, size), x, k).astype(images.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: Plan, images: Array, kernel: Array) -> Array:
    """Convolves float32 or float64 images whose channels are so many chunks."""
    return _forward(plan, images, kernel)[0]


def _forward(plan: Plan, images: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    matrices = _transforms(plan.extent, plan.taps, plan.output)

    def add_chunk(chunk: Array, y: Array) -> Array:
        x, k = _transformed_chunk(plan, images, kernel, chunk)
        return y + jnp.einsum("fbc,fco->fbo", x, k)

    outputs = kernel.shape[-1]
    y = jnp.zeros((len(matrices.image), len(images), outputs), images.dtype)
    y = lax.fori_loop(0, kernel.shape[2] // plan.channels, add_chunk, y)
    y = _apply(matrices.output, y).reshape(*plan.output, -1, outputs)
    return y.transpose(2, 0, 1, 3), (images, kernel)


def _backward(plan: Plan, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    images, kernel = residuals
    matrices = _transforms(plan.extent, plan.taps, plan.output)
    dy = dy.transpose(1, 2, 0, 3).reshape(math.prod(plan.output), len(images), -1)
    # Autodiff would put the frequencies last in what follows, for 0.3 GB of copies.
    dy = _apply(matrices.output.T, dy)

    def set_chunk(chunk: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        x, k = _transformed_chunk(plan, images, kernel, chunk)
        dx = _apply(matrices.image.T, jnp.einsum("fbo,fco->fbc", dy, k))
        dk = _apply(matrices.kernel.T, jnp.einsum("fbc,fbo->fco", x, dy))
        dx = dx.reshape(*dx.shape[:2], math.prod(plan.stride), -1)
        dk = dk.reshape(len(dk), 1, math.prod(plan.stride), plan.channels, -1)
        dx = _join_phases(dx, plan.extent, plan.stride, images.shape[1:3])
        dk = _join_phases(dk, plan.taps, plan.stride, kernel.shape[:2])[0]
        start = chunk * plan.channels
        return (
            lax.dynamic_update_slice_in_dim(gradients[0], dx, start, 3),
            lax.dynamic_update_slice_in_dim(gradients[1], dk, start, 2),
        )

    zeros = jnp.zeros_like(images), jnp.zeros_like(kernel)
    return lax.fori_loop(0, kernel.shape[2] // plan.channels, set_chunk, zeros)


_convolve.defvjp(_forward, _backward)


def _transformed_chunk(
    plan: Plan, images: Array, kernel: Array, chunk: Array
) -> tuple[Array, Array]:
    """The transforms of a chunk of channels, `[F, b, Q c]` and `[F, Q c, o]`."""
    matrices = _transforms(plan.extent, plan.taps, plan.output)
    start = chunk * plan.channels
    x = lax.dynamic_slice_in_dim(images, start, plan.channels, 3)
    k = lax.dynamic_slice_in_dim(kernel, start, plan.channels, 2)
    x = _apply(matrices.image, _split_phases(x, plan.extent, plan.stride))
    k = _apply(matrices.kernel, _split_phases(k[None], plan.taps, plan.stride))
    return x.reshape(*x.shape[:2], -1), k.reshape(len(k), -1, k.shape[-1])


def _apply(matrix: np.ndarray, x: Array) -> Array:
    """The product with the first axis of `x`, in its dtype."""
    product = jnp.asarray(matrix, x.dtype) @ x.reshape(len(x), -1)
    return product.reshape(-1, *x.shape[1:])


def _split_phases(x: Array, size: Pair, stride: Pair) -> Array:
    """`[b, rows, columns, …]` to `[pixels of a phase, b, Q, …]`, phases having `size` pixels."""
    # The last phases may reach past the image, and the image past the last window.
    x = _fit(x, _each(lambda n, s: n * s, size, stride))
    x = x.reshape(len(x), size[0], stride[0], size[1], stride[1], *x.shape[3:])
    x = jnp.moveaxis(x, (1, 3), (0, 1))
    return x.reshape(math.prod(size), x.shape[2], math.prod(stride), *x.shape[5:])


def _join_phases(x: Array, size: Pair, stride: Pair, target: tuple[int, ...]) -> Array:
    """The transpose of `_split_phases`, to `[b, *target, …]`."""
    x = x.reshape(*size, x.shape[1], *stride, *x.shape[3:])
    x = jnp.moveaxis(x, (0, 1), (1, 3))
    x = x.reshape(len(x), size[0] * stride[0], size[1] * stride[1], *x.shape[5:])
    return _fit(x, target)


def _fit(x: Array, target: tuple[int, ...]) -> Array:
    """Cuts rows and columns of `[b, rows, columns, …]` off, or adds zeros."""
    x = x[:, : target[0], : target[1]]
    missing = [(0, n - m) for n, m in zip(target, x.shape[1:3], strict=True)]
    return jnp.pad(x, [(0, 0), *missing, *[(0, 0)] * (x.ndim - 3)])


def _each(function: Callable[..., int], *pairs: tuple[int, ...]) -> Pair:
    rows, columns = (function(*values) for values in zip(*pairs, strict=True))
    return rows, columns


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
    # With gradients the kernel is transformed twice, and its gradient once.
    of_kernel = pairs * (2 * math.prod(taps) + 3 * MOVED)
    spectral = 1.5 * math.prod(extent) * (image + of_kernel / batch)
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
