"""Capsule layers: fully connected, convolutional, and of classes with coordinate addition."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.nn.routings import DynamicRouting, EMRouting, Given, Routing, Sizes
from capsjax.routing.dynamic import routing_couplings


class Capsules(nnx.Module):
    """A fully connected capsule layer with any routing.

    Source: Sabour, Frosst and Hinton, "Dynamic Routing Between Capsules", sections 2 and 4,
    https://arxiv.org/abs/1710.09829, for the default routing.

    Args:
      in_capsules: I.
      in_length: P.
      out_capsules: J.
      out_length: D; E, the columns, if poses are matrices.
      rows: R of matrix poses; None for vectors.
      routing: A routing of `capsjax.nn`; its parameters are attributes of the layer.
      weights_init: Initializer of the weights `[I, P, J, E]`; None for that of the routing. Stacked
        layers need weights that keep the lengths of poses: see `capsules_init`.
      implementation: As in `dynamic_routing`.
      axis_name: Axis of the enclosing `jax.shard_map` over which both the batch and the weights (by
        input capsule) are sharded; each device then routes its input capsules for the whole batch.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises the weights.

    Raises:
      ValueError: The routing takes vectors only, and `rows` is given.

    Example:
      >>> layer = Capsules(6, 4, 3, 5, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 6, 4))).shape
      (2, 3, 5)

      Matrix capsules with activations:

      >>> layer = Capsules(6, 4, 3, 4, rows=4, routing=EMRouting(), rngs=nnx.Rngs(0))
      >>> poses, activations = layer(jnp.ones((2, 6, 4, 4)), jnp.full((2, 6), 0.5))
      >>> poses.shape, activations.shape
      ((2, 3, 4, 4), (2, 3))
    """

    bias: nnx.Param[Array] | None = None  # `[J, D]`, of dynamic routing with a bias

    def __init__(
        self,
        in_capsules: int,
        in_length: int,
        out_capsules: int,
        out_length: int,
        *,
        rows: int | None = None,
        routing: Routing = DynamicRouting(),  # noqa: B008 (frozen)
        weights_init: Initializer | None = None,
        implementation: str | None = None,
        axis_name: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.sizes = Sizes((), in_capsules, in_length, out_capsules, out_length, rows)
        self.routing: Any = routing  # whose fields are settings of its algorithm
        self.weights = _weights("Capsules", self.sizes, routing, weights_init, rngs)
        self.parameter_names = _set_parameters(self)
        self.implementation = implementation
        self.axis_name = axis_name
        self.dtype = dtype

    def __call__(self, poses: Array, activations: Array | None = None) -> Any:
        """Map poses `[..., I, (R,) P]`, and activations `[..., I]` if the routing has any.

        With `axis_name`, the batch is one axis. Returns poses `[..., J, (R,) E]`; with activations
        `[..., J]`, as a tuple, if the routing has any.

        Raises:
          ValueError: Activations are missing, or given to a routing that has none.
        """
        _check_activations("Capsules", self.routing, activations)
        if self.axis_name is None:
            return self._route(poses, activations)
        axis = self.axis_name
        examples = len(poses)
        poses, activations = jax.tree.map(
            lambda x: lax.all_to_all(x, axis, split_axis=1, concat_axis=0, tiled=True),
            (poses, activations),
        )
        outputs = self._route(poses, activations)
        first = examples * lax.axis_index(axis)
        return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, examples), outputs)

    def _route(self, poses: Array, activations: Array | None) -> Any:
        return _routed(
            self,
            poses,
            activations,
            self.weights[...],
            implementation=self.implementation,
            axis_name=self.axis_name,
        )

    def couplings(self, poses: Array) -> Array:
        """Compute the couplings of every iteration, `[T, ..., I, J]`, from poses `[..., I, P]`.

        Raises:
          ValueError: The routing is not dynamic, or the layer has an `axis_name`, so a device holds
            only a shard of the weights.
        """
        if not isinstance(self.routing, DynamicRouting):
            raise ValueError(
                "Capsules.couplings: routing must be a DynamicRouting, got "
                f"{type(self.routing).__name__}"
            )
        if self.axis_name is not None:
            raise ValueError(
                f"Capsules.couplings: axis_name must be None, got {self.axis_name!r}; use a layer "
                "with all weights"
            )
        return routing_couplings(
            poses.astype(self.dtype),
            self.weights[...].astype(self.dtype),
            num_iterations=self.routing.num_iterations,
            leaky=self.routing.leaky,
            **_parameters(self),
        )


class ConvCapsules(nnx.Module):
    """A convolutional capsule layer: each position routes the capsules of a window.

    The weights are shared by all positions, and neither patches nor votes of all windows are
    stored. With `EMRouting` and `VariationalBayesRouting` a child distributes itself over the
    output capsules of all windows that contain it, as in Hinton, Sabour and Frosst 2018, "Matrix
    capsules with EM routing", section 4; with other routings over those of each window.

    Args:
      in_types: I, the input capsules at each position.
      in_length: P.
      out_types: J, the output capsules at each position.
      out_length: D; E, the columns, if poses are matrices.
      kernel_size: Height and width of a window, K = L.
      stride: Positions from one window to the next, along both axes.
      padding: Positions around the map, with poses and activations of 0.
      rows: R of matrix poses; None for vectors.
      routing: A routing of `capsjax.nn`; its parameters are attributes of the layer.
      weights_init: Initializer of `[K, L, I, P, J, E]`; None for that of the routing.
      implementation: As in `dynamic_routing`.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises the weights.

    Raises:
      ValueError: The routing has no convolutional form, or takes vectors only and `rows` is given.

    Example:
      >>> layer = ConvCapsules(
      ...     8, 4, 16, 4, kernel_size=3, stride=2, rows=4, routing=EMRouting(), rngs=nnx.Rngs(0)
      ... )
      >>> poses, activations = layer(jnp.ones((2, 7, 7, 8, 4, 4)), jnp.full((2, 7, 7, 8), 0.5))
      >>> poses.shape, activations.shape
      ((2, 3, 3, 16, 4, 4), (2, 3, 3, 16))
    """

    def __init__(
        self,
        in_types: int,
        in_length: int,
        out_types: int,
        out_length: int,
        *,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        rows: int | None = None,
        routing: Routing = DynamicRouting(),  # noqa: B008 (frozen)
        weights_init: Initializer | None = None,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if not routing.takes_windows:
            raise ValueError(
                "ConvCapsules: routing must have a convolutional form, got "
                f"{type(routing).__name__}, which has none"
            )
        window = kernel_size, kernel_size
        self.sizes = Sizes(window, in_types, in_length, out_types, out_length, rows)
        self.routing: Any = routing  # whose fields are settings of its algorithm
        self.weights = _weights("ConvCapsules", self.sizes, routing, weights_init, rngs)
        self.parameter_names = _set_parameters(self)
        self.stride = stride
        self.padding = padding
        self.implementation = implementation
        self.dtype = dtype

    def __call__(self, poses: Array, activations: Array | None = None) -> Any:
        """Map poses `[..., H, W, I, (R,) P]`, and activations `[..., H, W, I]` if there are any.

        Returns poses `[..., h, w, J, (R,) E]`; with activations `[..., h, w, J]`, as a tuple, if
        the routing has any.

        Raises:
          ValueError: Activations are missing, or given to a routing that has none.
        """
        _check_activations("ConvCapsules", self.routing, activations)
        inner = 2 if self.sizes.rows is None else 3  # axes behind H and W
        if self.padding:
            poses = _padded(poses, self.padding, inner)
            activations = None if activations is None else _padded(activations, self.padding, 1)
        return _routed(
            self,
            poses,
            activations,
            self.weights[...],
            implementation=self.implementation,
            stride=self.stride,
        )


class ClassCapsules(nnx.Module):
    """A capsule layer from a map to classes, whose weights all positions share.

    Source: Hinton, Sabour and Frosst, "Matrix capsules with EM routing", section 4,
    https://openreview.net/forum?id=HJWLfGWRb. With coordinate addition the centre of each position,
    (row + 0.5) / H and (column + 0.5) / W, is added to the last column of the votes, in rows 0 and
    1; to components 0 and 1 of a vector.

    Args:
      in_types: Input capsules at each position.
      in_length: P.
      out_capsules: J.
      out_length: D; E, the columns, if poses are matrices.
      rows: R of matrix poses; None for vectors.
      coordinate_addition: Whether votes tell the position of the child.
      routing: A routing of `capsjax.nn`; its parameters are attributes of the layer.
      weights_init: Initializer of `[types, P, J, E]`; None for that of the routing.
      implementation: As in `dynamic_routing`.
      dtype: Of the computation; parameters are float32.
      rngs: Random streams; `params` initialises the weights.

    Raises:
      ValueError: Coordinates are to be added by a routing that takes none, or to votes with less
        than two rows or components.

    Example:
      >>> layer = ClassCapsules(16, 4, 5, 4, rows=4, rngs=nnx.Rngs(0))
      >>> poses, activations = layer(jnp.ones((2, 4, 4, 16, 4, 4)), jnp.full((2, 4, 4, 16), 0.5))
      >>> poses.shape, activations.shape
      ((2, 5, 4, 4), (2, 5))
    """

    def __init__(
        self,
        in_types: int,
        in_length: int,
        out_capsules: int,
        out_length: int,
        *,
        rows: int | None = None,
        coordinate_addition: bool = True,
        routing: Routing = EMRouting(),  # noqa: B008 (frozen)
        weights_init: Initializer | None = None,
        implementation: str | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if coordinate_addition and not routing.takes_coordinates:
            raise ValueError(
                "ClassCapsules: coordinate_addition must be False for "
                f"{type(routing).__name__}, which adds no coordinates"
            )
        if coordinate_addition and (out_length if rows is None else rows) < 2:
            raise ValueError(
                "ClassCapsules: votes must have two rows or components for coordinates, got "
                f"rows = {rows} and out_length = {out_length}"
            )
        self.sizes = Sizes((), in_types, in_length, out_capsules, out_length, rows)
        self.routing: Any = routing  # whose fields are settings of its algorithm
        self.weights = _weights("ClassCapsules", self.sizes, routing, weights_init, rngs)
        self.parameter_names = _set_parameters(self)
        self.coordinate_addition = coordinate_addition
        self.implementation = implementation
        self.dtype = dtype

    def __call__(self, poses: Array, activations: Array | None = None) -> Any:
        """Map poses `[..., H, W, types, (R,) P]`, and activations `[..., H, W, types]` if any.

        Returns poses `[..., J, (R,) E]`; with activations `[..., J]`, as a tuple, if the routing
        has any.

        Raises:
          ValueError: Activations are missing, or given to a routing that has none.
        """
        _check_activations("ClassCapsules", self.routing, activations)
        inner = poses.ndim - (1 if self.sizes.rows is None else 2)  # axes up to the types
        leading, (height, width, types) = poses.shape[: inner - 3], poses.shape[inner - 3 : inner]
        children = height * width * types
        poses = poses.reshape(*leading, children, *poses.shape[inner:])
        if activations is not None:
            activations = activations.reshape(*leading, children)
        shared = self.weights[...]
        # A copy for each position: the engine takes one matrix for each child.
        weights = jnp.broadcast_to(shared, (height, width, *shared.shape))
        common: dict[str, Any] = {"implementation": self.implementation}
        if self.coordinate_addition:
            common["coordinates"] = self._coordinates(height, width)
        weights = weights.reshape(children, *shared.shape[1:])
        # Other parameters of a child, if the routing has any, are shared by all positions too.
        own = {"routing_weights", "routing_bias", "couplings_bias"}
        parameters = {
            name: jnp.broadcast_to(x, (height * width, *x.shape)).reshape(children, *x.shape[1:])
            if name in own
            else x
            for name, x in _parameters(self).items()
        }
        return _routed(self, poses, activations, weights, parameters=parameters, **common)

    def _coordinates(self, height: int, width: int) -> Array:
        """Return the coordinates of all children, `[I, D]`, or `[I, R, E]` for matrices."""
        sizes, dtype = self.sizes, accumulation_dtype(jnp.dtype(self.dtype))
        rows = (jnp.arange(height, dtype=dtype) + 0.5) / height
        columns = (jnp.arange(width, dtype=dtype) + 0.5) / width
        inner = (sizes.columns,) if sizes.rows is None else (sizes.rows, sizes.columns)
        zeros = jnp.zeros((height, width, sizes.children, *inner), dtype)
        last = () if sizes.rows is None else (-1,)
        found = zeros.at[(..., 0, *last)].add(rows[:, None, None])
        found = found.at[(..., 1, *last)].add(columns[None, :, None])
        return found.reshape(-1, *inner)


def _weights(
    name: str, sizes: Sizes, routing: Routing, weights_init: Initializer | None, rngs: nnx.Rngs
) -> nnx.Param[Array]:
    """Return initial weights; raise ValueError for matrices that the routing does not take."""
    if sizes.rows is not None and not routing.takes_matrices:
        raise ValueError(
            f"{name}: rows must be None for {type(routing).__name__}, which routes vectors, "
            f"got {sizes.rows}"
        )
    shape = *sizes.windows, *sizes[1:5]
    return nnx.Param((weights_init or routing.weights_init)(rngs.params(), shape))


def _set_parameters(layer: Any) -> tuple[str, ...]:
    """Make the parameters of a layer's routing attributes, and return their names."""
    parameters = layer.routing.parameters(layer.sizes)
    for name, value in parameters.items():
        setattr(layer, name, nnx.Param(value))
    return tuple(parameters)


def _parameters(layer: Any) -> dict[str, Any]:
    """Return the routing's parameters in the accumulation dtype: half precision rounds none."""
    dtype = accumulation_dtype(jnp.dtype(layer.dtype))
    return {name: getattr(layer, name)[...].astype(dtype) for name in layer.parameter_names}


def _routed(
    layer: Any,
    poses: Array,
    activations: Array | None,
    weights: Array,
    *,
    parameters: Mapping[str, Any] | None = None,
    **common: Any,
) -> Any:
    given = Given(
        poses.astype(layer.dtype),
        None if activations is None else activations.astype(layer.dtype),
        weights.astype(layer.dtype),
        _parameters(layer) if parameters is None else parameters,
        layer.sizes,
        common,
    )
    poses, activations = layer.routing(given)
    return poses if activations is None else (poses, activations)


def _padded(x: Array, padding: int, inner: int) -> Array:
    """Pad the axes H and W with zeros, in front of `inner` others."""
    around = [(0, 0)] * (x.ndim - inner - 2) + [(padding, padding)] * 2 + [(0, 0)] * inner
    return jnp.pad(x, around)


def _check_activations(name: str, routing: Routing, activations: Array | None) -> None:
    kind = type(routing).__name__
    if routing.has_activations and activations is None:
        raise ValueError(f"{name}: activations must be given to {kind}, got None")
    if not routing.has_activations and activations is not None:
        raise ValueError(f"{name}: activations must be None for {kind}, which has none")
