"""The TPU's passes with gaussian logits, interpreted, and programs that are lowered to them."""

from functools import cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.config import MosaicTpuGaussianConfig, TpuGroups
from capsjax.kernels.vote_passes.passes import Implementation, Inputs, Moments, Spec, State, Term

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Problem(NamedTuple):
    """Sizes, which no tile divides, and options of the passes."""

    sizes: tuple[int, ...] = (60, 13, 3, 2, 2, 2)  # B, I, J, R, P, E
    prior: str = ""  # or "IJ", "BIJ"; some logits are -infinity, all of child 2
    # Of "gates", "closed" (all of them 0), "k", "mask" and "coordinates"; with "constant" couplings
    # also the gradients of the last iteration alone, at constant couplings.
    options: tuple[str, ...] = ()
    dtype: str = "float32"
    far: float = 0.0  # distance of the votes from 0, in their standard deviations


EVERY = "gates", "k", "mask", "coordinates"
PROBLEMS = {
    "plain": Problem(),
    "all": Problem(prior="IJ", options=EVERY),
    "all, prior of each example": Problem((60, 19, 3, 2, 2, 3), prior="BIJ", options=EVERY),
    "constant": Problem(prior="IJ", options=(*EVERY, "constant")),
    "constant, without gates": Problem((60, 9, 3, 1, 2, 3), options=("constant",)),
    "matrices": Problem((60, 9, 2, 4, 2, 4), options=("gates",)),
    "vectors": Problem((60, 10, 2, 1, 5, 3), options=("gates", "k")),
    "one of each": Problem((1, 1, 1, 1, 1, 1)),
    "gates of 0": Problem((3, 9, 2, 1, 2, 2), prior="IJ", options=("gates", "closed", "k")),
    # Two tiles of parents, and of examples.
    "many parents": Problem((2, 3, 130, 1, 2, 1), prior="IJ", options=("gates",)),
    "many examples": Problem((130, 9, 2, 1, 2, 2), prior="IJ", options=EVERY),
    "far": Problem((60, 40, 3, 1, 3, 3), options=("coordinates", "gates"), far=1e3),
    "bfloat16": Problem((60, 13, 3, 1, 3, 3), prior="BIJ", options=EVERY, dtype="bfloat16"),
}
# Several blocks of children, for two cores, and groups of them in a block.
SMALL = MosaicTpuGaussianConfig(TpuGroups(2, 1, 2**24), TpuGroups(2, 1, 2**24), cores=2)
# Last places of the largest entry of a leaf, beside twice the error of the plain form. One is enough
# where XLA's CPU compiler has no fused multiply-add (--xla_cpu_max_isa=SSE4_2), as a TPU has none.
# With it, logits of the chain and of the gradients differ by a few last places.
UNITS = 8
SMALL_KERNEL = Implementation("mosaic_tpu", SMALL, interpret=True)


class Results(NamedTuple):
    """Results of all passes of two iterations, the first without a state."""

    moments: list[Moments]
    chain: State
    input_gradients: Inputs
    constant_couplings: Inputs | None  # of the last iteration alone; None if not tested


@cache
def make(problem):
    """Return spec, inputs, states and cotangents of two iterations."""
    rng = np.random.default_rng(0)
    batch, children, parents, rows, length, columns = problem.sizes
    depth = rows * columns

    def normal(scale, *shape, dtype="float32"):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    def given(option, x):
        return x if option in problem.options else None

    prior = None
    if problem.prior:
        prior = np.array(normal(1.0, *(batch, children, parents)[-len(problem.prior) :]))
        prior[..., 2:3, :] = -np.inf
        prior[..., 4:, : parents - 2] = -np.inf
        prior = jnp.asarray(prior)
    mask = rng.random((batch, parents)) < 0.7
    mask[:, -1] = True
    mask[0] = batch == 1  # an example without parents
    gates = rng.random((batch, children)).astype("float32")
    gates[:, 3:4] = 0
    if "closed" in problem.options:
        gates[:] = 0
    offset = problem.far * normal(1.0, 1, depth)
    inputs = Inputs(
        normal(0.7, batch, children, rows, length, dtype=problem.dtype),
        normal(0.7, children, length, parents, columns, dtype=problem.dtype),
        gates=given("gates", jnp.asarray(gates)),
        prior=prior,
        coordinates=given("coordinates", normal(0.3, children, depth) + offset),
        parent_mask=given("mask", jnp.asarray(mask)),
    )
    state = State(
        k=given("k", normal(1.0, batch, parents)),
        z=normal(0.5, batch, parents, depth) + offset[None],
        q=jnp.asarray(rng.uniform(0.2, 1, (batch, parents, depth)), "float32"),
    )
    cotangents = [
        Moments(*(normal(1.0, batch, parents, *shape) for shape in ((), (depth,), (depth,))))
        for _ in range(2)
    ]
    return Spec(parents, "gaussian", "central"), inputs, (State(), state), cotangents


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
        Inputs(*constant[-1][0]) if "constant" in problem.options else None,
    )


@cache
def run(problem, implementation):
    """Return the results of a backend."""
    spec, *arguments = make(problem)
    settings = {"implementation": implementation}

    def all_passes(inputs, states, cotangents):
        moments = [passes.moments(spec, inputs, state, **settings) for state in states]
        terms = [Term(*x) for x in zip(states, moments, cotangents, strict=True)]
        d_state, kept = passes.chain(spec, inputs, terms[1], **settings)
        constant = None
        if "constant" in problem.options:
            static = {"constant_couplings": True} | settings
            constant = passes.input_gradients(spec, inputs, terms[1:], **static)
        terms[1] = terms[1]._replace(kept=kept)
        gradients = passes.input_gradients(spec, inputs, terms, **settings)
        return Results(moments, d_state, gradients, constant)

    return jax.jit(all_passes)(*arguments)


@pytest.mark.parametrize("name", PROBLEMS)
def test_kernels_are_as_exact_as_the_plain_form(name):
    problem = PROBLEMS[name]
    actual, plain = run(problem, SMALL_KERNEL), run(problem, Implementation("xla"))
    exactly = map(jax.tree.leaves_with_path, (actual, plain, exact(problem)))
    for (path, a), (_, p), (_, e) in zip(*exactly, strict=True):
        assert a.dtype == p.dtype
        assert a.shape == p.shape == e.shape
        unit = float(jnp.finfo(a.dtype).eps) * max(np.abs(e).max(), 1e-30)
        errors = [np.abs(np.asarray(x, np.float64) - e).max() / unit for x in (a, p)]
        assert errors[0] <= 2 * errors[1] + UNITS, (jax.tree_util.keystr(path), errors)
