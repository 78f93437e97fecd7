"""Kernels for TPUs that compute no votes, not even in a tile.

With states V, logits are `Σ_p u[b,p,i] (V[b,j,:] · W[p,j,:,i])`, and weighted sums are
`Σ_{p,i} (c u)[b,p,i] W[p,j,:,i]`: a product for the matrix unit and elementwise work for each p.
Input capsules lie along the lanes: poses are `[B, P, I]`, weights `[P, J, D, I]`. XLA's own layouts
on a TPU are the same, so the transpositions below copy nothing, and no axis needs padding in HBM.

A tile has n input capsules and m examples. A panel is several tiles of examples whose states are in
vector memory together. Grid indices: q of the panel, s of the tile within it, i of the capsules'
tile.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.core import ShapedArray
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import linear
from capsjax.kernels.vote_passes.config import MosaicTpuConfig, mosaic_tpu_config_for
from capsjax.kernels.vote_passes.mosaic_tpu import tiles
from capsjax.kernels.vote_passes.passes import (
    Device,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
    case_of,
)


def config_for(spec: Spec, inputs: Inputs, others: Any, *, device: Device) -> MosaicTpuConfig:
    """Return the configuration for a pass.

    Raises:
      Unsupported: `linear.check` refuses the pass, or the weights of 128 input capsules do not fit
        into the vector memory of the device.
    """
    linear.check(spec, inputs, others, device)
    terms = others if isinstance(others, tuple) and not isinstance(others, State | Term) else (1,)
    config = mosaic_tpu_config_for(case_of(spec, inputs, len(terms)), device.kind)
    if config is None:
        raise Unsupported(
            f"routing: tiles of weights [I, P, J, D] = {inputs.weights.shape} exceed the TPU's "
            "vector memory"
        )
    return config


def moments(
    spec: Spec, inputs: Inputs, state: State, *, config: MosaicTpuConfig, interpret: Any
) -> Moments:
    """Compute the moments: sums over children of couplings times votes."""
    del spec
    states = () if state.b is None else (state.b,)
    return Moments(None, _weighted_sums(config, interpret, *linear.arrays(inputs), states))


def chain(
    spec: Spec, inputs: Inputs, term: Term, *, config: MosaicTpuConfig, interpret: Any
) -> State:
    """Compute the cotangent of the state from that of the moments."""
    del spec
    states = term.state.b, term.cotangent.first
    return State(b=_weighted_sums(config, interpret, *linear.arrays(inputs), states))


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool,
    config: MosaicTpuConfig,
    interpret: Any,
) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    del spec
    full, arrays = not constant_couplings, linear.arrays(inputs)
    found = _input_gradients(config, interpret, *arrays, linear.states(terms), full)
    return linear.gradients(inputs, *found)


def _weighted_sums(
    config: MosaicTpuConfig,
    interpret: Any,
    poses: Array,
    weights: Array,
    prior: Array | None,
    states: tuple[Array, ...],  # V; or V and the cotangent of the sums
) -> Array:
    """Sum votes over I, times couplings, or with two states times gradients of logits."""
    problem = tiles.Problem(config, *poses.shape, *weights.shape[2:])
    m, n, panel = config.examples, problem.n, problem.panel
    uniform = prior is None and not states
    operands, specs = tiles.tile_operands(problem, ("q", "i", "s"), poses, weights, prior, states)

    def kernel(*all_refs: Any) -> None:
        q, i, s = (pl.program_id(axis) for axis in range(3))
        inputs, refs = tiles.split_refs(
            problem, all_refs, capsule_tile=i, has_prior=prior is not None
        )
        *state_refs, sums_ref, poses_ref, couplings_ref, d_logits_ref = refs

        @pl.when(i == 0)
        def _() -> None:
            sums_ref[s] = jnp.zeros(sums_ref.shape[1:], jnp.float32)

        inputs.transpose_poses(poses_ref, q * panel + s)
        total, d_sums = (*(ref.at[s] for ref in state_refs), None, None)[:2]
        if not uniform:
            tiles.write_factors(inputs, poses_ref, total, d_sums, couplings_ref, d_logits_ref)
        factors_ref = couplings_ref if d_sums is None else d_logits_ref

        def add(j: Array, _: None) -> None:
            factors = 1 / problem.J if uniform else factors_ref[j]

            def add_component(p: Array, sums: Array) -> Array:
                return sums + tiles.dot(inputs.weights(p, j), factors * poses_ref[p], 1, 1)

            zeros = jnp.zeros(sums_ref.shape[2:], jnp.float32)
            sums_ref[s, j] += tiles.loop(problem.P, add_component, zeros)

        lax.fori_loop(0, problem.J, add, None)

    sums = pl.pallas_call(
        kernel,
        grid=(problem.panels, problem.capsule_tiles, panel),
        in_specs=specs,
        out_specs=pl.BlockSpec((panel, problem.J, problem.D, m), lambda q, i, s: (q, 0, 0, 0)),
        out_shape=ShapedArray((problem.example_tiles, problem.J, problem.D, m), jnp.float32),
        scratch_shapes=[
            pltpu.VMEM((problem.P, m, n), jnp.float32),
            *(pltpu.VMEM((problem.J, m, n), jnp.float32) for _ in range(2)),
        ],
        cost_estimate=tiles.cost(
            problem,
            products=1 + len(states),
            softmaxes=1 - uniform,
            hbm_bytes=tiles.nbytes(poses)
            + problem.panels * (tiles.nbytes(weights) + tiles.nbytes(prior))
            + 4 * (1 + len(states)) * problem.example_tiles * problem.J * problem.D * m,
        ),
        compiler_params=tiles.compiler_params(problem),
        name="dynamic_routing_sums",
        interpret=interpret,
    )(*operands)
    return sums.transpose(0, 3, 1, 2).reshape(-1, problem.J, problem.D)[: problem.B]


def _input_gradients(
    config: MosaicTpuConfig,
    interpret: Any,
    poses: Array,
    weights: Array,
    prior: Array | None,
    iterations: Sequence[tuple[Array | None, Array]],  # V, cotangent of the sums
    full: bool,  # False: at constant couplings
) -> tuple[Array, Array, Array | None]:
    """Compute the gradients of poses, weights and prior.

    The gradient of a vote is, summed over iterations, its coupling times the cotangent of the sums,
    plus the gradient of its logit times V: terms of a factor `[b, i, j]` and a state `[b, j, :]`.
    """
    problem = tiles.Problem(config, *poses.shape, *weights.shape[2:])
    m, n, panel = config.examples, problem.n, problem.panel
    has_prior = prior is not None
    states = [state for pair in iterations for state in pair if state is not None]
    softmaxes = sum(has_prior or total is not None for total, _ in iterations)
    operands, specs = tiles.tile_operands(problem, ("i", "q", "s"), poses, weights, prior, states)

    def kernel(*all_refs: Any) -> None:
        i, q, s = (pl.program_id(axis) for axis in range(3))
        inputs, refs = tiles.split_refs(problem, all_refs, capsule_tile=i, has_prior=has_prior)
        state_refs = iter(ref.at[s] for ref in refs[: len(states)])
        d_poses_ref, d_weights_ref, *refs = refs[len(states) :]
        d_prior_ref = refs.pop(0) if has_prior else None
        poses_ref, d_poses_sums_ref, *factor_refs = refs
        d_weights_sums_ref = d_weights_ref if weights.dtype == jnp.float32 else factor_refs.pop(0)

        @pl.when((q == 0) & (s == 0))
        def _() -> None:
            d_weights_sums_ref[...] = jnp.zeros(d_weights_sums_ref.shape, jnp.float32)
            if d_prior_ref is not None:
                d_prior_ref[...] = jnp.zeros(d_prior_ref.shape, jnp.float32)

        inputs.transpose_poses(poses_ref, q * panel + s)
        d_poses_sums_ref[...] = jnp.zeros(d_poses_sums_ref.shape, jnp.float32)

        terms: list[tuple[Any, Any]] = []  # (factor, state); None: uniform couplings
        d_logits_refs = []
        for has_total in [total is not None for total, _ in iterations]:
            total: Any = None if not has_total else next(state_refs)
            d_sums: Any = next(state_refs)
            if total is None and not has_prior:
                terms.append((None, d_sums))
                continue
            couplings_ref = factor_refs.pop(0)
            d_logits_ref = factor_refs.pop(0) if full else None
            tiles.write_factors(
                inputs, poses_ref, total, d_sums if full else None, couplings_ref, d_logits_ref
            )
            terms.append((couplings_ref, d_sums))
            if full and total is not None:
                terms.append((d_logits_ref, total))
            if full and has_prior:
                d_logits_refs.append(d_logits_ref)
        if d_logits_refs:
            _add_over_examples(d_prior_ref, d_logits_refs)

        def add(j: Array, _: None) -> None:
            factors = [1 / problem.J if ref is None else ref[j] for ref, _ in terms]
            columns = [state[j] for _, state in terms]  # [D, m]
            rows = [state.T for state in columns]

            def add_component(p: Array, _: None) -> None:
                weights, poses = inputs.weights(p, j), poses_ref[p]
                d_poses, d_weights = [], []
                for factor, column, row in zip(factors, columns, rows, strict=True):
                    d_poses.append(factor * tiles.dot(row, weights, 1, 0))
                    d_weights.append(tiles.dot(column, factor * poses, 1, 0))
                # Terms of one vote are added first, because they partly cancel.
                d_poses_sums_ref[p] += sum(d_poses[1:], d_poses[0])
                d_weights_sums_ref[p, j] += sum(d_weights[1:], d_weights[0])

            tiles.loop(problem.P, add_component, None)

        lax.fori_loop(0, problem.J, add, None)
        d_poses_ref[...] = jnp.swapaxes(d_poses_sums_ref[...], 0, 1).astype(poses.dtype)
        if d_weights_sums_ref is not d_weights_ref:

            @pl.when((q == problem.panels - 1) & (s == panel - 1))
            def _() -> None:
                d_weights_ref[...] = d_weights_sums_ref[...].astype(weights.dtype)

    prior_specs = specs[2:3] if has_prior else []
    prior_shapes = [ShapedArray((problem.J, 1, problem.I), jnp.float32)] * has_prior
    d_poses, d_weights, *d_prior = pl.pallas_call(
        kernel,
        grid=(problem.capsule_tiles, problem.panels, panel),
        in_specs=specs,
        out_specs=[*specs[:2], *prior_specs],
        out_shape=[*(ShapedArray(x.shape, x.dtype) for x in operands[:2]), *prior_shapes],
        scratch_shapes=[
            *(pltpu.VMEM((problem.P, m, n), jnp.float32) for _ in range(2)),
            *(
                pltpu.VMEM((problem.P, problem.J, problem.D, n), jnp.float32)
                for _ in range(weights.dtype != jnp.float32)
            ),
            *(pltpu.VMEM((problem.J, m, n), jnp.float32) for _ in range(softmaxes * (1 + full))),
        ],
        cost_estimate=tiles.cost(
            problem,
            products=softmaxes * (1 + full) + 2 * len(states),
            softmaxes=softmaxes,
            hbm_bytes=2 * (tiles.nbytes(poses) + tiles.nbytes(weights))
            + 2 * tiles.nbytes(prior)
            + 4
            * len(states)
            * (problem.capsule_tiles if problem.panels > 1 else 1)
            * problem.example_tiles
            * problem.J
            * problem.D
            * m,
        ),
        compiler_params=tiles.compiler_params(problem),
        name="dynamic_routing_input_gradients",
        interpret=interpret,
    )(*operands)
    return (
        d_poses.transpose(0, 2, 1),
        d_weights.transpose(3, 0, 1, 2),
        None if prior is None else d_prior[0][:, 0].T.astype(prior.dtype),
    )


def _add_over_examples(sums_ref: Any, terms_refs: Sequence[Any]) -> None:
    def add(j: Array, _: None) -> None:
        # Terms of one vote are added first, because they partly cancel.
        terms = sum((ref[j] for ref in terms_refs[1:]), terms_refs[0][j])
        sums_ref[j] += jnp.sum(terms, axis=0, keepdims=True)

    lax.fori_loop(0, sums_ref.shape[0], add, None)
