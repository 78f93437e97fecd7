"""Pallas-Triton kernels for gaussian logits, interpreted, against the float64 oracle."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.config import TritonGaussianConfig
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Moments, Spec, State, Term

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Problem(NamedTuple):
    """Sizes, which no tile divides, and options of the passes."""

    sizes: tuple[int, int, int, int, int, int] = (35, 7, 4, 4, 3, 4)  # B, I, R, P, J, E
    prior: str = ""  # or "IJ", "BIJ"; some logits are -infinity, all of child 2
    options: tuple[str, ...] = ()  # of "gates", "k", "mask", "coordinates"
    dtype: str = "float32"
    mean: float = 0.0  # of the votes, whose standard deviation is about 1


EVERY = "gates", "k", "mask", "coordinates"
VECTORS = 5, 6, 1, 7, 3, 10
PROBLEMS = {
    "plain": Problem(),
    "prior": Problem(prior="IJ"),
    "prior of each example": Problem(prior="BIJ"),
    "gates": Problem(options=("gates",)),
    "no gates": Problem(options=("gates", "closed")),
    "k and parent mask": Problem(options=("k", "mask")),
    "coordinates": Problem(options=("coordinates",)),
    "all": Problem(prior="IJ", options=EVERY),
    "all, prior of each example": Problem((33, 5, 3, 2, 5, 3), prior="BIJ", options=EVERY),
    "vectors": Problem(VECTORS),
    "vectors, all": Problem(VECTORS, prior="IJ", options=EVERY),
    "longest vectors": Problem((3, 4, 1, 16, 2, 16), options=("gates", "coordinates")),
    "one of each": Problem((1, 1, 1, 1, 1, 1)),
    "bfloat16": Problem(dtype="bfloat16"),
    "bfloat16, all": Problem(prior="BIJ", options=EVERY, dtype="bfloat16"),
}
# Several parents and children in a program, several programs, and several tiles in a program.
SMALL = TritonGaussianConfig(
    sums_warps=2,
    sums_ranges=3,
    statistics_warps=2,
    statistics_children=2,
    gradients_warps=2,
    gradients_splits=1,
)
IMPLEMENTATIONS = {
    "small tiles": Implementation("triton", SMALL, interpret=True),
    "triton": Implementation("triton", interpret=True),
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
    batch, children, rows, length, parents, columns = problem.sizes
    depth = rows * columns

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
    gates = rng.random((batch, children)) * ("closed" not in problem.options)
    inputs = Inputs(
        normal(1.0, batch, children, rows, length, dtype=problem.dtype),
        normal(length**-0.5, children, length, parents, columns, dtype=problem.dtype),
        gates=given("gates", jnp.asarray(gates, "float32")),
        prior=prior,
        coordinates=given("coordinates", normal(1.0, children, depth)),
        parent_mask=given("mask", jnp.asarray(mask)),
    )
    # The last pose component is constant and has the mean as its weight.
    if problem.mean:
        poses, weights, *_ = inputs
        inputs = inputs._replace(
            poses=poses.at[..., -1].set(1), weights=weights.at[:, -1].add(problem.mean)
        )
    state = State(
        k=given("k", normal(1.0, batch, parents)),
        z=normal(0.5, batch, parents, depth) + problem.mean,
        q=jnp.asarray(rng.uniform(0.1, 0.5, (batch, parents, depth)), "float32"),
    )
    cotangents = [
        Moments(
            normal(1.0, batch, parents),
            normal(1.0, batch, parents, depth),
            normal(1.0, batch, parents, depth),
        )
        for _ in range(2)
    ]
    spec = Spec(parents, logits="gaussian", moments="central")
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


def run(problem, implementation):
    """Return the results of an implementation."""
    spec, *arguments = make(problem)
    settings = {"implementation": implementation}

    def all_passes(inputs, states, cotangents):
        moments = [passes.moments(spec, inputs, state, **settings) for state in states]
        terms = [Term(*one) for one in zip(states, moments, cotangents, strict=True)]
        d_state, kept = passes.chain(spec, inputs, terms[1], **settings)
        constant = passes.input_gradients(
            spec, inputs, terms[1:], constant_couplings=True, **settings
        )
        terms[1] = terms[1]._replace(kept=kept)
        found = passes.input_gradients(spec, inputs, terms, **settings)
        return Results(moments, d_state, found, constant)

    return jax.jit(all_passes)(*arguments)


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "small tiles") for name in PROBLEMS),
        *((name, "triton") for name in ("all", "vectors, all")),
    ],
)
def test_passes_match_the_oracle(name, implementation):
    problem = PROBLEMS[name]
    tolerance = 1e-2 if problem.dtype == "bfloat16" else 1e-5
    assert_close(run(problem, IMPLEMENTATIONS[implementation]), exact(problem), tolerance)


def assert_close(actual, wanted, tolerance):
    pairs = zip(*map(jax.tree.leaves_with_path, (actual, wanted)), strict=True)
    for (path, a), (_, e) in pairs:
        assert a.shape == e.shape, path
        error = np.abs(np.asarray(a, np.float64) - e).max() / max(np.abs(e).max(), 1e-3)
        print(jax.tree_util.keystr(path), f"{error:.1e}")
        assert error < tolerance, f"{jax.tree_util.keystr(path)}: {error:.1e}"
