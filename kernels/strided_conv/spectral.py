"""Strided convolution in Fourier space, for CPUs.

A stride s splits an image into s² interleaved phases, and turns the convolution into one of stride
1 with s² times as many channels. Fourier transforms turn that into one matrix product over channels
for each frequency: 150 real products instead of 729 for a 9x9 kernel of stride 2 on 20x20 images.
The transforms themselves are products with two constant matrices, for rows and for columns.

Transforms are larger than the arrays transformed (155 MB for a kernel of 21 MB), so only a chunk of
channels is transformed at a time, and the backward pass recomputes the transforms.

Local sizes are in lower case: b examples; c and o input and output channels; q phases; f real
numbers of a 2-D transform; r pairs of numbers of a row's transform.
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

# Costs, in multiplications, of moving one number of the patches, of a transformed image or output,
# and of a transformed kernel: fitted to the timings in docs/results/cpu.md, "Convolution on a CPU".
PATCH, IMAGE, KERNEL = 25, 150, 60
# Contracted size (phases times channels) of a chunk. With half of it XLA:CPU runs the batch of
# matrix products on a single core.
DEPTH = 256


class Plan(NamedTuple):
    """Static sizes of a convolution; pairs are (rows, columns)."""

    stride: Pair
    extent: Pair  # pixels of one phase of the image
    taps: Pair  # pixels of one phase of the kernel
    output: Pair  # pixels of the output
    channels: int  # input channels of a chunk; divides their number


class Transform(NamedTuple):
    """Real matrices that transform rows, then columns, of an image, a kernel or an output.

    The numbers of a row's transform form pairs: the real and imaginary parts of one frequency, or
    two real frequencies. The transform along columns turns each pair into f / r real numbers: three
    for each complex frequency, as `Transforms` needs them.
    """

    rows: np.ndarray  # [2·r, rows]
    columns: np.ndarray  # [r, f / r, 2·columns]


class Transforms(NamedTuple):
    """Transforms of images and kernels, and the transpose of the output's inverse transform.

    A complex product takes three real ones (Karatsuba's trick): x = a + bi and k = c + di have
    xk = (p1 - p3) + (p1 + p2)i with p1 = (a + b)c, p2 = a(d - c), p3 = b(c + d).
    """

    image: Transform
    kernel: Transform
    output: Transform  # transposed: from output pixels to the three products


def strided_conv(images: Array, kernel: Array, *, stride: Pair) -> Array:
    """Convolve, in float32 at least; no forward-mode derivative.

    Raises:
      Unsupported: The batch size is symbolic, or the cost estimate of `"patches"` is lower.
    """
    batch, height, width, channels = images.shape
    if not isinstance(batch, int):
        raise Unsupported("the batch size must be known, because the cost estimate depends on it")
    kernel_size = kernel.shape[:2]
    taps = _per_axis(lambda k, s: -(-k // s), kernel_size, stride)
    output = _per_axis(lambda n, k, s: (n - k) // s + 1, (height, width), kernel_size, stride)
    extent = _per_axis(lambda o, t: o + t - 1, output, taps)
    if not _worthwhile(extent, output, batch, math.prod(stride), kernel.shape):
        raise Unsupported(f"transforms of {extent} phases cost more than the direct sum")

    dtype = jnp.promote_types(images.dtype, jnp.float32)
    chunks = -(-channels * math.prod(stride) // DEPTH)
    size = -(-channels // chunks)
    missing = (0, chunks * size - channels)
    # Under shard_map gradients must vary over the same mesh axes as their primals.
    axes = varying_axes(images, kernel)
    images, kernel = vary_over(axes, images), vary_over(axes, kernel)
    x = jnp.pad(images.astype(dtype), ((0, 0), (0, 0), (0, 0), missing))
    k = jnp.pad(kernel.astype(dtype), ((0, 0), (0, 0), missing, (0, 0)))
    return _convolve(Plan(stride, extent, taps, output, size), x, k).astype(images.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _convolve(plan: Plan, images: Array, kernel: Array) -> Array:
    """Convolve float32 or float64 images whose channels are a multiple of a chunk's."""
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

    # Written by hand, because autodiff moves the frequencies to the last axis: 0.3 GB of copies.
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
    """Transform a chunk of channels of images and kernel, to `[f, b, q·c]` and `[f, q·c, o]`."""
    matrices = _transforms(plan.extent, plan.taps, plan.output)
    start = chunk * plan.channels
    x = lax.dynamic_slice_in_dim(images, start, plan.channels, 3)
    k = lax.dynamic_slice_in_dim(kernel, start, plan.channels, 2)
    x = _to_frequencies(matrices.image, _split_phases(x, plan.extent, plan.stride))
    k = _to_frequencies(matrices.kernel, _split_phases(k[None], plan.taps, plan.stride))
    return x.reshape(*x.shape[:2], -1), k.reshape(len(k), -1, k.shape[-1])


def _to_frequencies(matrices: Transform, x: Array) -> Array:
    """Transform pixels `[rows, columns, …]` to frequencies `[f, …]`."""
    rows, columns = (jnp.asarray(matrix, x.dtype) for matrix in matrices)
    z = rows @ x.reshape(len(x), -1)
    z = columns @ z.reshape(len(columns), columns.shape[2], -1)
    return z.reshape(-1, *x.shape[2:])


def _to_pixels(matrices: Transform, z: Array) -> Array:
    """Apply the transpose of `_to_frequencies`."""
    rows, columns = (jnp.asarray(matrix.swapaxes(-2, -1), z.dtype) for matrix in matrices)
    x = columns @ z.reshape(len(columns), columns.shape[2], -1)
    x = rows @ x.reshape(rows.shape[1], -1)
    return x.reshape(len(rows), -1, *z.shape[1:])


def _split_phases(x: Array, size: Pair, stride: Pair) -> Array:
    """Split `[b, rows, columns, …]` into phases of `size` pixels, `[*size, b, q, …]`."""
    # The last phases may exceed the image, and the image may exceed the last window.
    x = _crop_or_pad(x, _per_axis(lambda n, s: n * s, size, stride))
    x = x.reshape(len(x), size[0], stride[0], size[1], stride[1], *x.shape[3:])
    x = jnp.moveaxis(x, (1, 3), (0, 1))
    return x.reshape(*size, x.shape[2], math.prod(stride), *x.shape[5:])


def _join_phases(x: Array, stride: Pair, target: tuple[int, ...]) -> Array:
    """Apply the transpose of `_split_phases`, to `[b, *target, …]`."""
    rows, columns = (size * s for size, s in zip(x.shape[:2], stride, strict=True))
    x = x.reshape(*x.shape[:3], *stride, *x.shape[4:])
    x = jnp.moveaxis(x, (0, 1), (1, 3))
    x = x.reshape(len(x), rows, columns, *x.shape[5:])
    return _crop_or_pad(x, target)


def _crop_or_pad(x: Array, target: tuple[int, ...]) -> Array:
    """Crop or zero-pad `[b, rows, columns, …]` to `[b, *target, …]`."""
    x = x[:, : target[0], : target[1]]
    missing = [(0, n - m) for n, m in zip(target, x.shape[1:3], strict=True)]
    return jnp.pad(x, [(0, 0), *missing, *[(0, 0)] * (x.ndim - 3)])


def _per_axis(function: Callable[..., int], *pairs: tuple[int, ...]) -> Pair:
    rows, columns = (function(*values) for values in zip(*pairs, strict=True))
    return rows, columns


def _worthwhile(
    extent: Pair, output: Pair, batch: int, phases: int, kernel: tuple[int, ...]
) -> bool:
    """Return whether values and gradients cost less than by one product over patches.

    Both costs are in multiplications per image; the kernel is transformed once a batch.
    """
    height, width, channels, outputs = kernel
    direct = math.prod(output) * height * width * channels * (outputs + PATCH)
    pairs = phases * channels * outputs
    numbers = phases * channels + outputs
    spectral = 1.5 * math.prod(extent) * (pairs * (1 + KERNEL / batch) + numbers * IMAGE)
    return spectral < direct


@cache
def _transforms(extent: Pair, taps: Pair, output: Pair) -> Transforms:
    """Build the matrices of a convolution, in float64.

    A circular correlation of period `extent` is exact on the output's pixels, because no window
    there wraps around.
    """

    def of_kernel(re: np.ndarray, im: np.ndarray) -> list[np.ndarray]:
        return [re, -im - re, re - im]  # (c, d - c, c + d) of the conjugate, for a correlation

    def of_output(re: np.ndarray, im: np.ndarray) -> list[np.ndarray]:
        # Coefficients of p1, p2, p3 in Re(conj(wave)·xk).
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
    """Build the transform of real pixels.

    `factors` maps the real and imaginary parts of a complex number to its three real numbers.
    Frequencies n and -n of a real image are conjugates, so only one of the two is computed, and
    counts twice in a mean over all.
    """
    once, twice = np.array([1, 2]) / math.prod(extent) if mean else (1, 1)
    real, half = _real_and_half(extent[0])
    rows = np.zeros((2 * len(half) + 2, pixels[0]))
    rows[: len(real)] = _waves(real, extent[0], pixels[0]).real
    waves = _waves(half, extent[0], pixels[0])
    rows[2::2], rows[3::2] = waves.real, waves.imag

    # The first pair holds two real frequencies of the rows, which are transformed separately.
    real, pairs = _real_and_half(extent[1])
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


def _real_and_half(n: int) -> tuple[list[int], list[int]]:
    """Return the real frequencies of period `n`, and one of each conjugate pair of the others."""
    return [f for f in range(n) if f == -f % n], [f for f in range(n) if f < -f % n]


def _waves(frequencies: Sequence[int], n: int, size: int) -> np.ndarray:
    """Compute `exp(-2πi·frequency·x / n)` for x below `size`, `[frequencies, size]`."""
    return np.exp(-2j * np.pi * np.outer(frequencies, np.arange(size)) / n)
