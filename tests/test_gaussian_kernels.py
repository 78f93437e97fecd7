"""Pallas-Triton kernels for gaussian logits, interpreted, against the float64 oracle."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances

from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.config import TritonGaussianConfig, triton_gaussian_config_for
from capsjax.kernels.vote_passes.passes import (
    Device,
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
    Unsupported,
)
from capsjax.kernels.vote_passes.unroll import Routing, unroll
from test_lowering import lowering_for

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Problem(NamedTuple):
    """Sizes, which no tile divides, and options of the passes."""

    sizes: tuple[int, int, int, int, int, int] = (35, 5, 1, 3, 3, 4)  # B, I, R, P, J, E
    prior: str = ""  # or "IJ", "BIJ"; some logits are -infinity, all of child 2
    options: tuple[str, ...] = ()  # of "gates", "k", "mask", "coordinates"; "closed": gates of 0
    dtype: str = "float32"
    mean: float = 0.0  # of the votes, whose standard deviation is about 1
    jump: float = 0.0  # of the states' means from that of the votes


EVERY = "gates", "k", "mask", "coordinates"
PROBLEMS = {
    "plain": Problem(),
    "prior of each example": Problem(prior="BIJ"),
    "parent mask": Problem(options=("mask",)),
    "gates": Problem(options=("gates",)),
    "no open gate": Problem(options=("gates", "closed")),
    "matrices, all": Problem((35, 5, 2, 3, 3, 2), prior="IJ", options=EVERY),
    "bfloat16, all": Problem((35, 5, 1, 5, 3, 4), prior="BIJ", options=EVERY, dtype="bfloat16"),
    "one of each": Problem((1, 1, 1, 1, 1, 1)),
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
    "xla": Implementation("xla"),
}
# Relative to the largest entry of a leaf. Results in bfloat16 have 8 significant bits.
ERRORS = {"float32": 3e-6, "bfloat16": 5e-3}


class Results(NamedTuple):
    """Results of all passes of two iterations, the first without a state."""

    moments: list[Moments]
    chain: State
    input_gradients: Inputs


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
    poses = normal(1.0, batch, children, rows, length, dtype=problem.dtype)
    weights = normal(length**-0.5, children, length, parents, columns, dtype=problem.dtype)
    if problem.mean:  # the weight of a constant pose component
        poses, weights = poses.at[..., 1].set(1), weights.at[:, 1].add(problem.mean)
    inputs = Inputs(
        poses,
        weights,
        gates=given("gates", jnp.asarray(gates, "float32")),
        prior=prior,
        coordinates=given("coordinates", normal(1.0, children, depth)),
        parent_mask=given("mask", jnp.asarray(mask)),
    )
    precision = rng.uniform(0.1, 0.5, (batch, parents, depth))
    if problem.jump:  # with the precision of a parent that far away, so that no coupling is 0
        precision *= (3 / problem.jump) ** 2
    state = State(
        k=given("k", normal(1.0, batch, parents)),
        z=normal(0.5, batch, parents, depth) + (problem.mean + problem.jump),
        q=jnp.asarray(precision, "float32"),
    )
    cotangents = [
        Moments(*(normal(1.0, batch, parents, *last) for last in ((), (depth,), (depth,))))
        for _ in range(2)
    ]
    spec = Spec(parents, logits="gaussian", moments="central")
    return spec, inputs, (State(), state), cotangents


def exact(problem, *, constant_couplings=False):
    """Return the oracle's results."""
    spec, *arguments = make(problem)
    inputs, states, cotangents = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
    mask = inputs.parent_mask
    inputs = inputs._replace(parent_mask=None if mask is None else mask.astype(bool))
    found = [
        oracles.vote_gradients(spec, inputs, *pair, constant_couplings=constant_couplings)
        for pair in zip(states, cotangents, strict=True)
    ]
    return Results(
        [Moments(*oracles.vote_moments(spec, inputs, state)[1]) for state in states],
        State(*found[-1][1]),
        jax.tree.map(np.add, *(Inputs(*of_inputs) for of_inputs, _ in found)),
    )


@partial(jax.jit, static_argnums=(0, 1))
def all_passes(spec, implementation, inputs, states, cotangents):
    """Return the results of an implementation."""
    settings = {"implementation": implementation}
    moments = [passes.moments(spec, inputs, state, **settings) for state in states]
    terms = [Term(*one) for one in zip(states, moments, cotangents, strict=True)]
    d_state, kept = passes.chain(spec, inputs, terms[1], **settings)
    terms[1] = terms[1]._replace(kept=kept)
    return Results(moments, d_state, passes.input_gradients(spec, inputs, terms, **settings))


def run(problem, implementation):
    spec, *arguments = make(problem)
    return all_passes(spec, IMPLEMENTATIONS[implementation], *arguments)


def assert_close(actual, wanted, dtype):
    pairs = zip(*map(jax.tree.leaves_with_path, (actual, wanted)), strict=True)
    for (path, a), (_, e) in pairs:
        assert a.shape == e.shape, path
        error = np.abs(np.asarray(a, np.float64) - e).max() / max(np.abs(e).max(), 1e-3)
        assert error < ERRORS[dtype], f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "small tiles") for name in PROBLEMS if name != "one of each"),
        ("one of each", "triton"),
    ],
)
def test_passes_match_the_oracle(name, implementation):
    problem = PROBLEMS[name]
    assert_close(run(problem, implementation), exact(problem), problem.dtype)


def test_constant_couplings_have_no_gradient():
    problem = PROBLEMS["matrices, all"]
    spec, inputs, states, cotangents = make(problem)
    wanted = exact(problem, constant_couplings=True)

    @jax.jit
    def gradients(inputs, states, cotangents):
        moments = jax.tree.map(lambda x: jnp.asarray(x, "float32"), wanted.moments)
        terms = [Term(*one) for one in zip(states, moments, cotangents, strict=True)]
        return passes.input_gradients(
            spec,
            inputs,
            terms,
            constant_couplings=True,
            implementation=IMPLEMENTATIONS["small tiles"],
        )

    actual = gradients(inputs, states, cotangents)
    assert_close(actual, wanted.input_gradients, problem.dtype)


@pytest.mark.parametrize("changes", [{"mean": m} for m in (10.0, 100.0, 1000.0)] + [{"jump": 40.0}])
def test_far_means_cost_no_more_digits_than_in_the_plain_form(changes):
    problem = PROBLEMS["gates"]._replace(**changes)
    actual, plain = (run(problem, name) for name in ("small tiles", "xla"))
    tolerances.assert_as_exact(actual, plain, exact(problem))
