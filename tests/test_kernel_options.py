"""Kernel passes, interpreted, x options and precisions, against the float64 oracle."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.config import MosaicTpuConfig, TpuTile, TritonConfig
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Moments, Spec, State, Term

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Problem(NamedTuple):
    """Sizes, which no tile divides, and options of the passes."""

    sizes: tuple[int, int, int, int, int] = (19, 13, 4, 5, 6)  # B, I, P, J, D
    prior: str = ""  # or "IJ", "BIJ"; some logits are -infinity, all of child 2
    options: tuple[str, ...] = ()  # of "gates", "k", "mask", "leaky", "mass"
    dtype: str = "float32"


EVERY = "gates", "k", "mask", "leaky", "mass"
PROBLEMS = {
    "plain": Problem(),
    "prior": Problem(prior="IJ"),
    "prior of each example": Problem(prior="BIJ"),
    "leaky": Problem(options=("leaky",)),
    "mass": Problem(options=("mass",)),
    "gates": Problem(options=("gates",)),
    "k and parent mask": Problem(options=("k", "mask")),
    "all": Problem(prior="IJ", options=EVERY),
    "all, prior of each example": Problem((9, 13, 3, 5, 6), prior="BIJ", options=EVERY),
    # More parents than stay in registers on a GPU.
    "many parents": Problem((5, 9, 8, 13, 16)),
    "many parents, all": Problem((5, 9, 8, 13, 16), prior="BIJ", options=EVERY),
    "long poses": Problem((5, 6, 16, 3, 20)),
    "one of each": Problem((1, 1, 1, 1, 1)),
    # Three tiles of a TPU's capsules, for two cores; poses and weights fill its registers.
    "three tiles": Problem((11, 260, 8, 2, 16), options=("gates",)),
    "bfloat16": Problem(dtype="bfloat16"),
    "bfloat16, all": Problem(prior="IJ", options=EVERY, dtype="bfloat16"),
}
# Several tiles of examples and groups of children in a program, and several programs.
SMALL_TRITON = TritonConfig(
    sums_examples=16,
    sums_ranges=2,
    sums_warps=1,
    sums_stages=1,
    gradients_examples=16,
    gradients_splits=1,
    gradients_warps=1,
    gradients_stages=1,
    weights_in_parts=True,
)
# Several tiles of examples, products computed again, and a half of the capsules for each core.
SMALL_TPU_TILE = TpuTile(8, buffers=1, keeps_products=False, unrolled=False, memory=2**24)
SMALL_TPU = MosaicTpuConfig(SMALL_TPU_TILE, SMALL_TPU_TILE, SMALL_TPU_TILE, cores=2)
IMPLEMENTATIONS = {
    "triton": Implementation("triton", interpret=True),
    "triton, small tiles": Implementation("triton", SMALL_TRITON, interpret=True),
    "mosaic_tpu": Implementation("mosaic_tpu", interpret=True),
    "mosaic_tpu, small tiles": Implementation("mosaic_tpu", SMALL_TPU, interpret=True),
}
TRITON_PROBLEMS = tuple(name for name in PROBLEMS if name != "three tiles")
TPU_PROBLEMS = (
    *("leaky", "mass", "all", "all, prior of each example", "long poses", "one of each"),
    *("three tiles", "bfloat16", "bfloat16, all"),
)
# Largest error of a leaf, of its largest entry, by the bfloat16 parts of an operand: 2 parts have
# 16 bits and 3 have 24; the sums have few terms, whose errors may be the same way.
ERRORS = {1: 2e-2, 2: 5e-5, 3: 2e-6}
# The parts on each platform by `jax.default_matmul_precision`.
PARTS = {
    "triton": {None: 2, "bfloat16": 1, "high": 2, "highest": 3},
    "mosaic_tpu": {None: 1, "high": 2, "highest": 3},
}


class Results(NamedTuple):
    """Results of all passes of two iterations, the first without a state."""

    moments: list[Moments]
    chain: State
    input_gradients: Inputs
    constant_couplings: Inputs  # of the last iteration alone


@cache
def make(problem):
    """Return spec, inputs, states and cotangents of two iterations."""
    rng = np.random.default_rng(0)
    batch, children, length, parents, depth = problem.sizes

    def normal(scale, *shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    def given(option, x):
        return x if option in problem.options else None

    prior = None
    if problem.prior:
        shape = (batch, children, parents)[-len(problem.prior) :]
        prior = np.array(normal(1.0, *shape))
        prior[..., 2:3, :] = -np.inf
        prior[..., 4:, : parents - 2] = -np.inf
        prior = jnp.asarray(prior)
    mask = rng.random((batch, parents)) < 0.7
    mask[:, -1] = True
    mask[0] = False  # an example without parents
    inputs = Inputs(
        normal(0.5, batch, children, 1, length, dtype=problem.dtype),
        normal(0.5, children, length, parents, depth, dtype=problem.dtype),
        gates=given("gates", jnp.asarray(rng.random((batch, children)), "float32")),
        prior=prior,
        parent_mask=given("mask", jnp.asarray(mask)),
    )
    state = State(k=given("k", normal(1.0, batch, parents)), b=normal(0.5, batch, parents, depth))
    has_mass = "mass" in problem.options
    cotangents = [
        Moments(
            normal(1.0, batch, parents) if has_mass else None, normal(1.0, batch, parents, depth)
        )
        for _ in range(2)
    ]
    spec = Spec(parents, leaky="leaky" in problem.options, mass=has_mass)
    return spec, inputs, (State(), state), cotangents


@cache
def exact(problem):
    """Return the oracle's results."""
    spec, *arguments = make(problem)
    inputs, states, cotangents = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
    mask = inputs.parent_mask
    inputs = inputs._replace(parent_mask=None if mask is None else mask.astype(bool))
    moments = [oracles.vote_moments(spec, inputs, state)[1] for state in states]
    full, constant = (
        [
            oracles.vote_gradients(spec, inputs, *pair, constant_couplings=constant)
            for pair in zip(states, cotangents, strict=True)
        ]
        for constant in (False, True)
    )
    return Results(
        [Moments(*x) for x in moments],
        State(*full[-1][1]),
        jax.tree.map(np.add, *(Inputs(*of_inputs) for of_inputs, _ in full)),
        Inputs(*constant[-1][0]),
    )


def run(problem, implementation, precision):
    """Return the results of the kernels."""
    spec, *arguments = make(problem)
    settings = {"implementation": implementation}

    def all_passes(inputs, states, cotangents):
        terms = [Term(*pair) for pair in zip(states, (None, None), cotangents, strict=True)]
        d_state, kept = passes.chain(spec, inputs, terms[1], **settings)
        constant = passes.input_gradients(
            spec, inputs, terms[1:], constant_couplings=True, **settings
        )
        terms[1] = terms[1]._replace(kept=kept)
        return Results(
            [passes.moments(spec, inputs, state, **settings) for state in states],
            d_state,
            passes.input_gradients(spec, inputs, terms, **settings),
            constant,
        )

    with jax.default_matmul_precision(precision):
        return jax.jit(all_passes)(*arguments)


@pytest.mark.parametrize(
    ("name", "implementation", "precision"),
    [
        *((name, "triton, small tiles", None) for name in TRITON_PROBLEMS),
        *(("all", "triton", precision) for precision in PARTS["triton"]),
        *((name, "triton", None) for name in ("plain", "many parents", "one of each")),
        *((name, "triton, small tiles", "highest") for name in ("many parents", "long poses")),
        *((name, "mosaic_tpu, small tiles", "highest") for name in TPU_PROBLEMS),
        *(("three tiles", "mosaic_tpu, small tiles", precision) for precision in (None, "high")),
    ],
)
def test_kernels_are_exact_to_the_precision_of_their_products(name, implementation, precision):
    problem = PROBLEMS[name]
    actual = run(problem, IMPLEMENTATIONS[implementation], precision)
    assert_exact(actual, exact(problem), parts_of(problem, implementation, precision))


@pytest.mark.parametrize(
    ("name", "implementation", "precision"),
    [
        ("all", "mosaic_tpu, small tiles", "highest"),
        ("all, prior of each example", "mosaic_tpu, small tiles", "highest"),
        ("many parents", "mosaic_tpu", None),
        *(("three tiles", "mosaic_tpu", precision) for precision in (None, "highest")),
    ],
)
def test_a_chain_adds_its_input_gradients_to_those_so_far(name, implementation, precision):
    problem = PROBLEMS[name]
    spec, *arguments = make(problem)
    settings = {"implementation": IMPLEMENTATIONS[implementation]}

    def both_iterations(inputs, states, cotangents):
        terms = [Term(*pair) for pair in zip(states, (None, None), cotangents, strict=True)]
        d_state, so_far = passes.chain_and_input_gradients(spec, inputs, terms[1], None, **settings)
        _, found = passes.chain_and_input_gradients(spec, inputs, terms[0], so_far, **settings)
        return d_state, found

    with jax.default_matmul_precision(precision):
        actual = jax.jit(both_iterations)(*arguments)
    wanted = exact(problem)
    wanted = wanted.chain, wanted.input_gradients
    assert_exact(actual, wanted, parts_of(problem, implementation, precision))


def parts_of(problem, implementation, precision):
    """The bfloat16 parts of the operands."""
    if problem.dtype == "bfloat16":
        return 1
    return PARTS[implementation.split(",")[0]][precision]


def assert_exact(actual, wanted, parts):
    """Assert the error of so many parts for each leaf."""
    pairs = zip(*map(jax.tree.leaves_with_path, (actual, wanted)), strict=True)
    for (path, a), (_, e) in pairs:
        assert a.shape == e.shape, path
        error = np.abs(np.asarray(a, np.float64) - e).max() / max(np.abs(e).max(), 1e-3)
        assert error < ERRORS[parts], f"{jax.tree_util.keystr(path)}: {error:.1e}"


def test_kernels_refuse_a_precision_that_they_do_not_have():
    with pytest.raises(passes.Unsupported, match=r"default_matmul_precision .* got 'F16_F16_F32'"):
        run(PROBLEMS["plain"], IMPLEMENTATIONS["triton"], "F16_F16_F32")
