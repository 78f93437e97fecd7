"""Blocks that several networks share."""

import functools
import inspect
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import DTypeLike

from capsjax import shapes
from capsjax.conv import strided_conv

M = TypeVar("M", bound=nnx.Module)

# Defaults of PyTorch's batch normalisation, whose momentum of 0.1 is here 0.9.
EPSILON, MOMENTUM = 1e-5, 0.9


def check_images(
    name: str, images: Array, image_shape: tuple[int, int, int], *, rank: int | None = None
) -> None:
    """Raise unless the last axes of images, of `rank` axes if it is given, are those of a network.

    Bytes would be taken for numbers from 0 to 255, where networks expect 0 to 1.
    """
    wanted = tuple(image_shape)
    if images.shape[-3:] != wanted or images.ndim != (rank or images.ndim):
        letters = "[..., H, W, C]" if rank is None else "[B, H, W, C]"
        known = ", ".join(map(str, ("any", *wanted)))
        raise ValueError(
            f"{name}: images must have shape {letters} = [{known}], got {tuple(images.shape)}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"{name}: images must be floating, from 0 to 1, got {images.dtype}")


def check_labels(name: str, labels: Array, shape: tuple[int, ...], num_classes: int) -> None:
    """Raise unless labels are integers of a shape, and classes, for which one_hot would give zeros.

    Labels that are traced have no values to check.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must be integers, got {labels.dtype}")
    shapes.check_shape(name, "labels", labels, "[...]", shape)
    if isinstance(labels, jax.core.Tracer):
        return
    values = np.asarray(labels)
    if values.size and not (values.min() >= 0 and values.max() < num_classes):
        raise ValueError(
            f"{name}: labels must be 0 to {num_classes - 1}, got {values.min()} to {values.max()}"
        )


def batch_norm(channels: int, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Return a batch normalisation, which computes in float32 at least."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return nnx.BatchNorm(channels, momentum=MOMENTUM, epsilon=EPSILON, dtype=wide, rngs=rngs)


class NormalisedConvolution(nnx.Module):
    """A convolution without bias, zero-padded, and a batch normalisation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int,
        stride: int,
        padding: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        shape = kernel_size, kernel_size, in_channels, out_channels
        self.kernel = nnx.Param(jax.nn.initializers.he_normal()(rngs.params(), shape))
        self.normalisation = batch_norm(out_channels, dtype, rngs)
        self.stride, self.padding, self.dtype = stride, padding, dtype

    def __call__(self, images: Array, *, training: bool) -> Array:
        """Map `[B, H, W, C]` to `[B, h, w, O]`; in training, by statistics of the batch."""
        around = (self.padding, self.padding)
        images = jnp.pad(images.astype(self.dtype), ((0, 0), around, around, (0, 0)))
        maps = strided_conv(images, self.kernel[...].astype(self.dtype), stride=self.stride)
        return self.normalisation(maps, use_running_average=not training).astype(self.dtype)


def keeps_arguments(network: type[M]) -> type[M]:
    """Decorate a network so that `arguments` holds those of its constructor, for `saved.save`.

    They are pairs of name and value, hashable as NNX asks of what is no array: lists become tuples
    and dtypes their names.
    """
    constructor = network.__init__
    signature = inspect.signature(constructor)

    @functools.wraps(constructor)
    def initialise(self: Any, *positional: Any, **named: Any) -> None:
        bound = signature.bind(self, *positional, **named)
        bound.apply_defaults()
        constructor(self, *positional, **named)
        _, *given = bound.arguments.items()
        self.arguments = tuple(
            (name, jnp.dtype(value).name if name == "dtype" else _plain(value))
            for name, value in given
            if name != "rngs"
        )

    network.__init__ = initialise  # type: ignore[method-assign]
    return network


def _plain(value: Any) -> Any:
    """Return nested lists as tuples, and NumPy's numbers as Python's."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    return value.item() if isinstance(value, np.generic) else value
