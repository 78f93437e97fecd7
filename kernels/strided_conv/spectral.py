"""Convolution as products of discrete Fourier transforms of the stride's phases: for a CPU.

A stride of s splits an image into s² interleaved phases, and the convolution into one of stride 1
over s² as many channels. There the transform turns each frequency into one matrix product over
channels: 150 real products in place of 729 for the 9x9 kernel of stride 2 over a 20x20 image. The
transforms are products with fixed matrices, one for rows and one for columns.

Transforms are larger than what they are made of (155 MB for a kernel of 21 MB), so they exist for
some channels at a time, and the gradient makes them anew. Letters: R pairs of a row's frequencies,
F frequencies of rows and columns, Q phases, b examples, c input and o output channels.
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
from capsjax.kernels.sharding import vary_over, varying_axes

Pair = tuple[int, int]

# Multiplications in the time that a patch's number takes, a number of image or output in Fourier
# space, and of the kernel there: fitted to the timings of BUILD_NOTES.md, "Convolution on a CPU".
PATCH, IMAGE, KERNEL = 25, 150, 60
# Numbers of a pixel (phases times channels) transformed at a time, which products sum over: XLA:CPU
# runs a batch of products on one core alone where they sum over half as many.
DEPTH = 256


class Plan(NamedTuple):
    """The static sizes of one convolution."""

    stride: Pair
    extent: Pair  # pixels of a phase
    taps: Pair  # of a phase
    output: Pair  # pixels
    channels: int  # transformed at a time, a divisor of all


class Transform(NamedTuple):
    """Real matrices from the pixels of an image, a kernel or an output to frequencies.

    Two numbers of a row's transform make a pair: real and imaginary part of one frequency, or two
    real ones. Of columns then come F / R real numbers a pair, three for each complex one.
    """

    rows: np.ndarray  # [R 2, rows]
    columns: np.ndarray  # [R, F / R, 2 columns]


class Transforms(NamedTuple):
    """Image and kernel to frequencies; `output` is the transpose of their way back to pixels.

    A complex product takes three real ones (Karatsuba): for x = a + bi and k = c + di, the
    products p = (a + b)c, q = a(d - c), r = b(c + d) give xk = (p - r) + (p + q)i.
    """

    image: Transform
    kernel: Transform
    output: Transform


def strided_conv(images: Array, kernel: Array, *, stride: Pair) -> Array:
    """Convolves, in float32 at least; its error is that of the direct sum.

    There is no forward-mode derivative: `"patches"` and `"xla"` have it.

    Raises:
      Unsupported: The transforms would cost more than they spare, or the batch is symbolic, so that
        nobody knows.
    """
    batch, height, width, channels = images.shape
    if not isinstance(batch, int):
        raise Unsupported("whether transforms pay depends on the batch, which is symbolic")
    kernel_size = kernel.shape[:2]
    taps = _each(lambda k, s: -(-k // s), kernel_size, stride)
    output = _each(lambda n, k, s: (n - k) // s + 1, (height, width), kernel_size, stride)
    extent = _each(lambda o, t: o + t - 1, output, taps)
    if not _worthwhile(extent, output, batch, math.prod(stride), kernel.shape):
        raise Unsupported(f"transforms of {extent} phases cost more than the direct sum")

    dtype = jnp.promote_types(images.dtype, jnp.float32)
    chunks = -(-channels * math.prod(stride) // DEPTH)
    size = -(-channels // chunks)
    missing = (0, chunks * size - channels)
    # As in routing: gradients must vary over a mesh as what they are of.
    axes = varying_axes(images, kernel)
    images, kernel = vary_over(axes, images), vary_over(axes, kernel)
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

    frequencies = math.prod(matrices.image.columns.shape[:2])
    y = jnp.zeros((frequencies, len(images), kernel.shape[-1]), images.dtype)
    y = vary_over(varying_axes(images), y)
    y = lax.fori_loop(0, kernel.shape[2] // plan.channels, add_chunk, y)
    return _to_pixels(matrices.output, y).transpose(2, 0, 1, 3), (images, kernel)


def _backward(plan: Plan, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    images, kernel = residuals
    matrices = _transforms(plan.extent, plan.taps, plan.output)
    dy = _to_frequencies(matrices.output, dy.transpose(1, 2, 0, 3))

    # Autodiff would put the frequencies last in what follows, for 0.3 GB of copies.
    def set_chunk(chunk: Array, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
        x, k = _transformed_chunk(plan, images, kernel, chunk)
        dx = _to_pixels(matrices.image, jnp.einsum("fbo,fco->fbc", dy, k))
        dk = _to_pixels(matrices.kernel, jnp.einsum("fbc,fbo->fco", x, dy))
        dx = dx.reshape(*dx.shape[:3], math.prod(plan.stride), -1)
        dk = dk.reshape(*dk.shape[:2], 1, math.prod(plan.stride), plan.channels, -1)
        dx = _join_phases(dx, plan.stride, images.shape[1:3])
        dk = _join_phases(dk, plan.stride, kernel.shape[:2])[0]
        start = chunk * plan.channels
        return (
            lax.dynamic_update_slice_in_dim(gradients[0], dx, start, 3),
            lax.dynamic_update_slice_in_dim(gradients[1], dk, start, 2),
        )

    vary = partial(vary_over, varying_axes(images))
    zeros = vary(jnp.zeros_like(images)), vary(jnp.zeros_like(kernel))
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
    x = _to_frequencies(matrices.image, _split_phases(x, plan.extent, plan.stride))
    k = _to_frequencies(matrices.kernel, _split_phases(k[None], plan.taps, plan.stride))
    return x.reshape(*x.shape[:2], -1), k.reshape(len(k), -1, k.shape[-1])


def _to_frequencies(matrices: Transform, x: Array) -> Array:
    """`[rows, columns, …]` to `[F, …]`."""
    rows, columns = (jnp.asarray(matrix, x.dtype) for matrix in matrices)
    z = rows @ x.reshape(len(x), -1)
    z = columns @ z.reshape(len(columns), columns.shape[2], -1)
    return z.reshape(-1, *x.shape[2:])


def _to_pixels(matrices: Transform, z: Array) -> Array:
    """The transpose of `_to_frequencies`."""
    rows, columns = (jnp.asarray(matrix.swapaxes(-2, -1), z.dtype) for matrix in matrices)
    x = columns @ z.reshape(len(columns), columns.shape[2], -1)
    x = rows @ x.reshape(rows.shape[1], -1)
    return x.reshape(len(rows), -1, *z.shape[1:])


def _split_phases(x: Array, size: Pair, stride: Pair) -> Array:
    """`[b, rows, columns, …]` to `[*size, b, Q, …]`, phases having `size` pixels."""
    # The last phases may reach past the image, and the image past the last window.
    x = _fit(x, _each(lambda n, s: n * s, size, stride))
    x = x.reshape(len(x), size[0], stride[0], size[1], stride[1], *x.shape[3:])
    x = jnp.moveaxis(x, (1, 3), (0, 1))
    return x.reshape(*size, x.shape[2], math.prod(stride), *x.shape[5:])


def _join_phases(x: Array, stride: Pair, target: tuple[int, ...]) -> Array:
    """The transpose of `_split_phases`, to `[b, *target, …]`."""
    rows, columns = (size * s for size, s in zip(x.shape[:2], stride, strict=True))
    x = x.reshape(*x.shape[:3], *stride, *x.shape[4:])
    x = jnp.moveaxis(x, (0, 1), (1, 3))
    x = x.reshape(len(x), rows, columns, *x.shape[5:])
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
    extent: Pair, output: Pair, batch: int, phases: int, kernel: tuple[int, ...]
) -> bool:
    """Whether this form, with gradients, costs less than one product over patches.

    Both in multiplications an image; the kernel is transformed once for all images of a batch.
    """
    height, width, channels, outputs = kernel
    direct = math.prod(output) * height * width * channels * (outputs + PATCH)
    pairs = phases * channels * outputs
    numbers = phases * channels + outputs
    spectral = 1.5 * math.prod(extent) * (pairs * (1 + KERNEL / batch) + numbers * IMAGE)
    return spectral < direct


@cache
def _transforms(extent: Pair, taps: Pair, output: Pair) -> Transforms:
    """The matrices, in float64: x and k to frequencies, and the sums of products back.

    Circular correlation of period `extent` is exact on the output's pixels, which no tap leaves.
    """

    def of_kernel(re: np.ndarray, im: np.ndarray) -> list[np.ndarray]:
        return [re, -im - re, re - im]  # correlation: conjugates

    def of_output(re: np.ndarray, im: np.ndarray) -> list[np.ndarray]:
        # Of Re(conj(wave) · xk), with xk = (p - r) + (p + q)i.
        return [re + im, im, -re]

    return Transforms(
        image=_transform(extent, extent, lambda re, im: [re + im, re, im]),
        kernel=_transform(extent, taps, of_kernel),
        output=_transform(extent, output, of_output, mean=True),
    )


def _transform(
    extent: Pair,
    pixels: Pair,
    factors: Callable[[np.ndarray, np.ndarray], Sequence[np.ndarray]],
    *,
    mean: bool = False,
) -> Transform:
    """The transform of real pixels; `factors` gives the three numbers for a complex one's parts.

    Frequencies f and -f of a real image are conjugates: one of the two suffices, and counts twice
    in a mean over all.
    """
    once, twice = np.array([1, 2]) / math.prod(extent) if mean else (1, 1)
    real, half = _own_conjugates(extent[0])
    rows = np.zeros((2 * len(half) + 2, pixels[0]))
    rows[: len(real)] = _waves(real, extent[0], pixels[0]).real
    waves = _waves(half, extent[0], pixels[0])
    rows[2::2], rows[3::2] = waves.real, waves.imag

    # The first pair holds two real numbers, which are transformed each for itself.
    real, pairs = _own_conjugates(extent[1])
    waves = _waves(pairs, extent[1], pixels[1])
    own = once * _waves(real, extent[1], pixels[1]).real
    single = np.concatenate([own, *(twice * x for x in factors(waves.real, waves.imag))])
    waves = _waves(range(extent[1]), extent[1], pixels[1])
    of_complex = np.hstack([waves.real, -waves.imag]), np.hstack([waves.imag, waves.real])
    columns = np.zeros((len(half) + 1, 3 * extent[1], 2 * pixels[1]))
    columns[0, : len(single), : pixels[1]] = single
    columns[0, len(single) : 2 * len(single), pixels[1] :] = single
    columns[1:] = twice * np.concatenate(factors(*of_complex))
    return Transform(rows, columns)


def _own_conjugates(n: int) -> tuple[list[int], list[int]]:
    """The frequencies of period `n` that are their own conjugates, and half of the others."""
    return [f for f in range(n) if f == -f % n], [f for f in range(n) if f < -f % n]


def _waves(frequencies: Sequence[int], n: int, size: int) -> np.ndarray:
    """`exp(-2πi f x / n)`, `[f, x]`."""
    return np.exp(-2j * np.pi * np.outer(frequencies, np.arange(size)) / n)
