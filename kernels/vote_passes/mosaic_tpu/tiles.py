"""Tiles of the TPU kernels: how arrays are cut, and what is computed with one tile.

The letters are those of `kernels`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.vote_passes.config import TPU_LANES, MosaicTpuConfig

# Loops over the length of a pose up to this are written out.
UNROLLED = 16


class Problem(NamedTuple):
    """Sizes, in the shape letters, and how they are cut."""

    config: MosaicTpuConfig
    B: int
    I: int  # noqa: E741
    P: int
    J: int
    D: int

    @property
    def S(self) -> int:  # noqa: N802
        """Tiles of examples."""
        return pl.cdiv(self.B, self.config.examples)

    @property
    def panel(self) -> int:
        """Tiles of a panel: all panels are full."""
        return next(n for n in range(self.config.panel, 0, -1) if self.S % n == 0)

    @property
    def Q(self) -> int:  # noqa: N802
        """Panels."""
        return self.S // self.panel

    @property
    def n(self) -> int:
        """Capsules of a tile."""
        return min(self.I, TPU_LANES)

    @property
    def N(self) -> int:  # noqa: N802
        """Tiles of capsules."""
        return pl.cdiv(self.I, self.n)


def cut_operands(
    problem: Problem,
    order: tuple[str, str, str],
    poses: Array,
    weights: Array,
    prior: Array | None,
    states: Sequence[Array],
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """The kernels' operands and their blocks; `order` names the grid's axes q, i and s."""
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
    padding = (0, problem.S * m - problem.B)
    for state in states:  # [B, J, D] to [S, J, D, m]
        padded = jnp.pad(state, (padding, (0, 0), (0, 0)))
        cut = padded.reshape(problem.S, m, problem.J, problem.D)
        operands.append(cut.transpose(0, 2, 3, 1))
        specs.append(spec((panel, problem.J, problem.D, m), lambda q, i, s: (q, 0, 0, 0)))
    return operands, specs


def compiler_params(problem: Problem) -> pltpu.CompilerParams:
    """A grid walked in order, as sums over its steps need, and the memory of the config."""
    return pltpu.CompilerParams(
        dimension_semantics=("arbitrary",) * 3, vmem_limit_bytes=problem.config.memory
    )


def cost(problem: Problem, *, products: int, softmaxes: int, hbm_bytes: int) -> pl.CostEstimate:
    """What a pass costs, for XLA: products with all weights, and the blocks that are moved."""
    couplings = problem.B * problem.I * problem.J
    return pl.CostEstimate(
        flops=2 * products * couplings * problem.P * problem.D,
        transcendentals=softmaxes * couplings,
        bytes_accessed=hbm_bytes,
    )


def nbytes(array: Array | None) -> int:
    """Bytes of an array, 0 if there is none."""
    return 0 if array is None else array.size * array.dtype.itemsize


class Inputs(NamedTuple):
    """A tile's inputs; what lies past the end of an array is read as 0."""

    problem: Problem
    poses_ref: Any  # [m, P, n]
    weights_ref: Any  # [P, J, D, n]
    prior_ref: Any | None  # [J, 1, n]
    exists: Array | None  # [1, n], which capsules there are; None: all

    def spread_poses(self, spread_ref: Any, example_tile: Array) -> None:
        """Writes the poses as [P, m, n]: whole vectors for each component."""
        m = self.problem.config.examples
        exists = self.exists
        if self.problem.B % m:
            row = lax.broadcasted_iota(jnp.int32, (m, 1), 0) < self.problem.B - example_tile * m
            exists = row if exists is None else row & exists
        poses = jnp.swapaxes(self.poses_ref[...].astype(jnp.float32), 0, 1)
        spread_ref[...] = poses if exists is None else jnp.where(exists[None], poses, 0.0)

    def weights(self, p: Array, j: Array) -> Array:
        """[D, n], float32."""
        return self._existing(self.weights_ref[p, j].astype(jnp.float32))

    def with_prior(self, logits: Array, j: Array) -> Array:
        """The logits [m, n] for one parent, the prior's included."""
        return logits if self.prior_ref is None else logits + self._existing(self.prior_ref[j])

    def _existing(self, x: Array) -> Array:
        return x if self.exists is None else jnp.where(self.exists, x, 0.0)


def split_refs(
    problem: Problem, all_refs: Sequence[Any], *, capsule_tile: Array, has_prior: bool
) -> tuple[Inputs, list[Any]]:
    """The inputs among a kernel's references, and the other references."""
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
    """Writes couplings [J, m, n], and if `d_sums` is given the gradients of their logits.

    Args:
      inputs: The tile's.
      poses_ref: [P, m, n].
      total: V, [J, D, m], or None for zero.
      d_sums: The gradient of the weighted sums, [J, D, m], or None.
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
            d_logits_ref[j] = agreements[-1]  # of the couplings, so far
        logits = inputs.with_prior(zeros if total is None else agreements[0], j)
        couplings_ref[j] = logits
        return jnp.maximum(largest, logits)

    largest = lax.fori_loop(0, parents, agree, jnp.full_like(zeros, -jnp.inf))

    def exponentiate(j: Array, whole: Array) -> Array:
        exponential = jnp.exp(couplings_ref[j] - largest)
        couplings_ref[j] = exponential
        return whole + exponential

    whole = lax.fori_loop(0, parents, exponentiate, zeros)

    def normalise(j: Array, mean: Array) -> Array:
        couplings = couplings_ref[j] / whole
        couplings_ref[j] = couplings
        return mean if d_sums is None else mean + couplings * d_logits_ref[j]

    mean = lax.fori_loop(0, parents, normalise, zeros)

    def differentiate(j: Array, _: None) -> None:
        d_logits_ref[j] = couplings_ref[j] * (d_logits_ref[j] - mean)

    if d_sums is not None:
        lax.fori_loop(0, parents, differentiate, None)


def dot(a: Array, b: Array, a_axis: int, b_axis: int) -> Array:
    """A matrix product. Mosaic has two precisions: any but the lowest means the highest."""
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
    """As `lax.fori_loop` from 0 to count, written out if that is short."""
    return lax.fori_loop(0, count, body, init, unroll=count <= UNROLLED)
