"""Tiles of the TPU kernels: block specifications, and functions of one tile.

Local sizes and grid indices are those of `mosaic_tpu.kernels`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.vote_passes.config import TPU_LANES, MosaicTpuConfig

# Loops of up to this many steps are unrolled.
MAX_UNROLLED = 16


class Problem(NamedTuple):
    """Sizes of a routing problem, and of its tiles."""

    config: MosaicTpuConfig
    B: int
    I: int  # noqa: E741
    P: int
    J: int
    D: int

    @property
    def example_tiles(self) -> int:
        """Number of tiles of examples."""
        return pl.cdiv(self.B, self.config.examples)

    @property
    def panel(self) -> int:
        """Number of tiles of examples in a panel; all panels are full."""
        return next(k for k in range(self.config.panel, 0, -1) if self.example_tiles % k == 0)

    @property
    def panels(self) -> int:
        """Number of panels."""
        return self.example_tiles // self.panel

    @property
    def n(self) -> int:
        """Number of input capsules in a tile."""
        return min(self.I, TPU_LANES)

    @property
    def capsule_tiles(self) -> int:
        """Number of tiles of input capsules."""
        return pl.cdiv(self.I, self.n)


def tile_operands(
    problem: Problem,
    order: tuple[str, str, str],
    poses: Array,
    weights: Array,
    prior: Array | None,
    states: Sequence[Array],
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Return a kernel's operands and their blocks; `order` is that of the grid axes q, i, s."""
    m, n, panel = problem.config.examples, problem.n, problem.panel

    def spec(shape: tuple[int, ...], index: Callable[..., Any], buffers: int = 2) -> pl.BlockSpec:
        return pl.BlockSpec(
            shape,
            lambda *grid: index(**dict(zip(order, grid, strict=True))),
            pipeline_mode=None if buffers == 2 else pl.Buffered(buffers),
        )

    operands = [poses.transpose(0, 2, 1), weights.transpose(1, 2, 3, 0)]
    specs = [
        spec((m, problem.P, n), lambda q, i, s: (q * panel + s, 0, i)),
        spec(
            (problem.P, problem.J, problem.D, n),
            lambda q, i, s: (0, 0, 0, i),
            problem.config.weight_buffers,
        ),
    ]
    if prior is not None:
        operands.append(prior.astype(jnp.float32).T[:, None])
        specs.append(spec((problem.J, 1, n), lambda q, i, s: (0, 0, i)))
    padding = (0, problem.example_tiles * m - problem.B)
    for state in states:  # [B, J, D] to [example_tiles, J, D, m]
        padded = jnp.pad(state, (padding, (0, 0), (0, 0)))
        tiled = padded.reshape(problem.example_tiles, m, problem.J, problem.D)
        operands.append(tiled.transpose(0, 2, 3, 1))
        specs.append(spec((panel, problem.J, problem.D, m), lambda q, i, s: (q, 0, 0, 0)))
    return operands, specs


def compiler_params(problem: Problem) -> pltpu.CompilerParams:
    """Return the compiler's parameters: a sequential grid, because its steps accumulate sums."""
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=problem.config.memory
    )


def cost(problem: Problem, *, products: int, softmaxes: int, hbm_bytes: int) -> pl.CostEstimate:
    """Estimate the cost of a pass from its number of products with all weights, for XLA."""
    couplings = problem.B * problem.I * problem.J
    return pl.CostEstimate(
        flops=2 * products * couplings * problem.P * problem.D,
        transcendentals=softmaxes * couplings,
        bytes_accessed=hbm_bytes,
    )


def nbytes(array: Array | None) -> int:
    """Return the bytes of an array, 0 for None."""
    return 0 if array is None else array.size * array.dtype.itemsize


class Inputs(NamedTuple):
    """References to the inputs of a tile; elements past the end of an array are read as 0."""

    problem: Problem
    poses_ref: Any  # [m, P, n]
    weights_ref: Any  # [P, J, D, n]
    prior_ref: Any | None  # [J, 1, n]
    exists: Array | None  # booleans [1, n], False past the end of I; None: all True

    def transpose_poses(self, transposed_ref: Any, example_tile: Array) -> None:
        """Write the poses as [P, m, n], so that each component is a contiguous matrix."""
        m = self.problem.config.examples
        exists = self.exists
        if self.problem.B % m:
            row = lax.broadcasted_iota(jnp.int32, (m, 1), 0) < self.problem.B - example_tile * m
            exists = row if exists is None else row & exists
        poses = jnp.swapaxes(self.poses_ref[...].astype(jnp.float32), 0, 1)
        transposed_ref[...] = poses if exists is None else jnp.where(exists[None], poses, 0.0)

    def weights(self, p: Array, j: Array) -> Array:
        """Return the weights of component p for parent j, [D, n], in float32."""
        return self._existing(self.weights_ref[p, j].astype(jnp.float32))

    def with_prior(self, logits: Array, j: Array) -> Array:
        """Add the prior, if any, to the logits [m, n] for parent j."""
        return logits if self.prior_ref is None else logits + self._existing(self.prior_ref[j])

    def _existing(self, x: Array) -> Array:
        return x if self.exists is None else jnp.where(self.exists, x, 0.0)


def split_refs(
    problem: Problem, all_refs: Sequence[Any], *, capsule_tile: Array, has_prior: bool
) -> tuple[Inputs, list[Any]]:
    """Split a kernel's references into the inputs and the others."""
    poses_ref, weights_ref, *refs = all_refs
    prior_ref = refs.pop(0) if has_prior else None
    exists, n = None, problem.n
    if problem.I % n:
        lane = lax.broadcasted_iota(jnp.int32, (1, n), 1)
        exists = lane < problem.I - capsule_tile * n
    return Inputs(problem, poses_ref, weights_ref, prior_ref, exists), refs


def write_factors(
    inputs: Inputs, poses_ref: Any, total: Any, d_sums: Any, couplings_ref: Any, d_logits_ref: Any
) -> None:
    """Write the couplings, and if `d_sums` is given, the gradients of their logits.

    Args:
      inputs: Inputs of the tile.
      poses_ref: [P, m, n], the poses.
      total: [J, D, m], the state V of the logits; None for zeros.
      d_sums: [J, D, m], the cotangent of the weighted sums, or None.
      couplings_ref: [J, m, n], written.
      d_logits_ref: [J, m, n], written if `d_sums` is given.
    """
    parents = inputs.problem.J
    zeros = jnp.zeros(couplings_ref.shape[1:], jnp.float32)
    states = [state for state in (total, d_sums) if state is not None]

    def agree(j: Array, largest: Array) -> Array:
        rows = [state[j].T for state in states]

        def add_component(p: Array, sums: list[Array]) -> list[Array]:
            weights, poses = inputs.weights(p, j), poses_ref[p]
            return [x + poses * dot(r, weights, 1, 0) for x, r in zip(sums, rows, strict=True)]

        agreements = loop(inputs.problem.P, add_component, [zeros] * len(states))
        if d_sums is not None:
            d_logits_ref[j] = agreements[-1]  # gradients of the couplings, until the last loop
        logits = inputs.with_prior(zeros if total is None else agreements[0], j)
        couplings_ref[j] = logits
        return jnp.maximum(largest, logits)

    largest = lax.fori_loop(0, parents, agree, jnp.full_like(zeros, -jnp.inf))

    def exponentiate(j: Array, denominator: Array) -> Array:
        exponential = jnp.exp(couplings_ref[j] - largest)
        couplings_ref[j] = exponential
        return denominator + exponential

    denominator = lax.fori_loop(0, parents, exponentiate, zeros)

    def normalise(j: Array, mean: Array) -> Array:
        couplings = couplings_ref[j] / denominator
        couplings_ref[j] = couplings
        return mean if d_sums is None else mean + couplings * d_logits_ref[j]

    mean = lax.fori_loop(0, parents, normalise, zeros)

    def differentiate(j: Array, _: None) -> None:
        d_logits_ref[j] = couplings_ref[j] * (d_logits_ref[j] - mean)

    if d_sums is not None:
        lax.fori_loop(0, parents, differentiate, None)


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """Multiply matrices in Mosaic's higher precision, unless JAX's default is the lowest."""
    asked = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    lowest = asked in (None, "default", "fastest", "bfloat16")
    return lax.dot_general(
        a,
        b,
        (((a_axis,), (b_axis,)), ((), ())),
        precision=lax.Precision.DEFAULT if lowest else lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )


def loop(count: int, body: Callable[[Array, Any], Any], init: Any) -> Any:
    """Run `lax.fori_loop` from 0 to `count`, unrolled if short."""
    return lax.fori_loop(0, count, body, init, unroll=count <= MAX_UNROLLED)
