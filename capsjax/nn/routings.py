"""Routing algorithms as settings of a capsule layer: one frozen dataclass each.

A layer owns the weights of the votes; a routing tells which other parameters its algorithm has, and
calls the function. Fields are that function's arguments. The letters are those of `capsjax.shapes`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn.initializers import Initializer

from capsjax.nn.initializers import attention_init, averages_init, capsules_init
from capsjax.routing.dynamic import dynamic_routing
from capsjax.routing.em import em_routing
from capsjax.routing.inverted_attention import inverted_attention_routing
from capsjax.routing.kmeans import kmeans_routing
from capsjax.routing.self_attention import self_attention_routing
from capsjax.routing.self_routing import self_routing
from capsjax.routing.variational_bayes import variational_bayes_routing


class Sizes(NamedTuple):
    """Sizes of the weights of a layer."""

    windows: tuple[int, ...]  # K and L of a convolution; else empty
    children: int  # I
    length: int  # P
    parents: int  # J
    columns: int  # E; D for vectors
    rows: int | None  # R of matrix poses; None for vectors

    @property
    def depth(self) -> int:
        """Return D, the length of a vote."""
        return (self.rows or 1) * self.columns


class Given(NamedTuple):
    """What a layer gives to its routing in a call."""

    poses: Array
    activations: Any  # an array or None: the routing determines which
    weights: Array
    parameters: Mapping[str, Any]  # by name, in the accumulation dtype
    sizes: Sizes
    common: Mapping[str, Any]  # arguments that every function has


class Routing(Protocol):
    """What a layer needs to know about a routing algorithm."""

    # Whether it reads activations of the input capsules, and returns those of the output capsules.
    has_activations: ClassVar[bool]
    takes_matrices: ClassVar[bool]
    takes_coordinates: ClassVar[bool]
    takes_windows: ClassVar[bool]
    weights_init: ClassVar[Initializer]  # of the weights of the votes

    def parameters(self, sizes: Sizes) -> dict[str, Array]:
        """Return the initial values of its parameters, in float32."""
        ...

    def __call__(self, given: Given) -> tuple[Array, Array | None]:
        """Route, and return poses, and activations if there are any."""
        ...


@dataclasses.dataclass(frozen=True)
class DynamicRouting:
    """Dynamic routing, by `dynamic_routing`; `bias` is the initial value, None for no bias."""

    num_iterations: int = 3
    gradient: str = "full"
    leaky: bool = False
    bias: float | None = None

    has_activations: ClassVar[bool] = False
    takes_matrices: ClassVar[bool] = False
    takes_coordinates: ClassVar[bool] = False
    takes_windows: ClassVar[bool] = True
    weights_init: ClassVar[Initializer] = staticmethod(capsules_init)

    def parameters(self, sizes: Sizes) -> dict[str, Array]:
        """Return the initial bias `[J, D]`."""
        if self.bias is None:
            return {}
        return {"bias": jnp.full((sizes.parents, sizes.depth), self.bias, jnp.float32)}

    def __call__(self, given: Given) -> tuple[Array, Array | None]:
        """Route poses to poses; there are no activations."""
        outputs = dynamic_routing(
            given.poses,
            given.weights,
            num_iterations=self.num_iterations,
            gradient=self.gradient,
            leaky=self.leaky,
            **given.parameters,
            **given.common,
        )
        return outputs, None


@dataclasses.dataclass(frozen=True)
class EMRouting:
    """EM routing, by `em_routing`; beta_u and beta_a start at 0.

    `cost_scale` None stands for 100 J / (children of a parent), after Gritzman.
    """

    num_iterations: int = 3
    inverse_temperature: float = 0.01
    cost_scale: float | None = 1.0
    min_variance: float = 1e-4
    competition: str = "positions"
    gradient: str = "full"

    has_activations: ClassVar[bool] = True
    takes_matrices: ClassVar[bool] = True
    takes_coordinates: ClassVar[bool] = True
    takes_windows: ClassVar[bool] = True
    weights_init: ClassVar[Initializer] = staticmethod(averages_init)

    def parameters(self, sizes: Sizes) -> dict[str, Array]:
        """Return the initial costs, `[J]` each."""
        return _betas(sizes)

    def __call__(self, given: Given) -> tuple[Array, Array | None]:
        """Route poses and activations to poses and activations."""
        settings = dataclasses.asdict(self)
        if self.cost_scale is None:
            # The weights have an axis, or several, of all children of a parent.
            *children, _, parents, _ = given.weights.shape
            settings["cost_scale"] = 100 * parents / math.prod(children)
        return em_routing(
            given.poses,
            given.activations,
            given.weights,
            **settings,
            **given.parameters,
            **given.common,
        )


@dataclasses.dataclass(frozen=True)
class VariationalBayesRouting:
    """Variational Bayes routing, by `variational_bayes_routing`; betas start at 0.

    The activations of the layer are the sigmoids of the logits; batch normalisation, as in the
    paper, is not part of it.
    """

    num_iterations: int = 3
    alpha0: float = 1.0
    kappa0: float = 1.0
    psi0: float = 1.0
    nu0: float | None = None
    competition: str = "positions"
    starts_at_types: bool = False
    gradient: str = "full"

    has_activations: ClassVar[bool] = True
    takes_matrices: ClassVar[bool] = True
    takes_coordinates: ClassVar[bool] = True
    takes_windows: ClassVar[bool] = True
    weights_init: ClassVar[Initializer] = staticmethod(averages_init)

    def parameters(self, sizes: Sizes) -> dict[str, Array]:
        """Return the initial beta_u and beta_a, `[J]` each."""
        return _betas(sizes)

    def __call__(self, given: Given) -> tuple[Array, Array | None]:
        """Route poses and activations to poses and activations."""
        poses, logits = variational_bayes_routing(
            given.poses,
            given.activations,
            given.weights,
            **dataclasses.asdict(self),
            **given.parameters,
            **given.common,
        )
        return poses, jax.nn.sigmoid(logits)


@dataclasses.dataclass(frozen=True)
class SelfRouting:
    """Self-routing, by `self_routing`; routing weights and bias start at 0."""

    has_activations: ClassVar[bool] = True
    takes_matrices: ClassVar[bool] = True
    takes_coordinates: ClassVar[bool] = False
    takes_windows: ClassVar[bool] = True
    weights_init: ClassVar[Initializer] = staticmethod(averages_init)

    def parameters(self, sizes: Sizes) -> dict[str, Array]:
        """Return the initial routing weights, `[I, (R,) P, J]`, and bias, `[I, J]`."""
        leading = *sizes.windows, sizes.children
        rows = () if sizes.rows is None else (sizes.rows,)
        return {
            "routing_weights": jnp.zeros((*leading, *rows, sizes.length, sizes.parents)),
            "routing_bias": jnp.zeros((*leading, sizes.parents)),
        }

    def __call__(self, given: Given) -> tuple[Array, Array | None]:
        """Route poses and activations to poses and activations."""
        return self_routing(
            given.poses,
            given.activations,
            given.weights,
            given.parameters["routing_weights"].astype(given.poses.dtype),
            routing_bias=given.parameters["routing_bias"],
            **given.common,
        )


@dataclasses.dataclass(frozen=True)
class SelfAttentionRouting:
    """Self-attention routing, by `self_attention_routing`; the couplings' bias starts at 0."""

    has_activations: ClassVar[bool] = False
    takes_matrices: ClassVar[bool] = False
    takes_coordinates: ClassVar[bool] = False
    takes_windows: ClassVar[bool] = False
    weights_init: ClassVar[Initializer] = staticmethod(capsules_init)

    def parameters(self, sizes: Sizes) -> dict[str, Array]:
        """Return the initial bias of the couplings, `[I, J]`."""
        return {"couplings_bias": jnp.zeros((sizes.children, sizes.parents))}

    def __call__(self, given: Given) -> tuple[Array, Array | None]:
        """Route poses to poses; there are no activations."""
        outputs = self_attention_routing(
            given.poses, given.weights, **given.parameters, **given.common
        )
        return outputs, None


@dataclasses.dataclass(frozen=True)
class InvertedAttentionRouting:
    """Sequential inverted attention, by `inverted_attention_routing`; scale starts at 1."""

    num_iterations: int = 2
    gradient: str = "full"

    has_activations: ClassVar[bool] = False
    takes_matrices: ClassVar[bool] = True
    takes_coordinates: ClassVar[bool] = False
    takes_windows: ClassVar[bool] = True
    weights_init: ClassVar[Initializer] = staticmethod(attention_init)

    def parameters(self, sizes: Sizes) -> dict[str, Array]:
        """Return scale and offset of the LayerNorm, `[D]` or `[R, E]`; none if D is 1."""
        if sizes.depth == 1:
            return {}
        shape = (sizes.depth,) if sizes.rows is None else (sizes.rows, sizes.columns)
        return {"scale": jnp.ones(shape), "offset": jnp.zeros(shape)}

    def __call__(self, given: Given) -> tuple[Array, Array | None]:
        """Route poses to poses; there are no activations."""
        outputs = inverted_attention_routing(
            given.poses,
            given.weights,
            matrix=given.sizes.rows is not None,
            **dataclasses.asdict(self),
            **given.parameters,
            **given.common,
        )
        return outputs, None


@dataclasses.dataclass(frozen=True)
class KMeansRouting:
    """K-means routing, by `kmeans_routing`."""

    num_iterations: int = 3
    similarity: str = "dot"
    temperature: float = 1.0
    squash_power: float | None = 1.0
    gradient: str = "full"

    has_activations: ClassVar[bool] = False
    takes_matrices: ClassVar[bool] = False
    takes_coordinates: ClassVar[bool] = False
    takes_windows: ClassVar[bool] = False
    weights_init: ClassVar[Initializer] = staticmethod(capsules_init)

    def parameters(self, sizes: Sizes) -> dict[str, Array]:
        """Return no parameters."""
        return {}

    def __call__(self, given: Given) -> tuple[Array, Array | None]:
        """Route poses to poses; there are no activations."""
        outputs = kmeans_routing(
            given.poses, given.weights, **dataclasses.asdict(self), **given.common
        )
        return outputs, None


def _betas(sizes: Sizes) -> dict[str, Array]:
    return {name: jnp.zeros(sizes.parents) for name in ("beta_u", "beta_a")}
