"""Pallas-Triton kernels with votes in registers, interpreted, against the float64 oracle.

Their logits are gaussian, with central moments, or linear, with sums and matrices as poses.
"""

from dataclasses import replace
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from capsjax import inverted_attention_routing
from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import passes, triton
from capsjax.kernels.vote_passes.config import TritonVotesConfig
from capsjax.kernels.vote_passes.passes import (
    Device,
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
)
from capsjax.kernels.vote_passes.unroll import Routing, unroll

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Problem(NamedTuple):
    """Sizes, which no tile divides, and options of the passes."""

    sizes: tuple[int, int, int, int, int, int] = (35, 5, 1, 3, 3, 4)  # B, I, R, P, J, E
    prior: str = ""  # or "IJ", "BIJ"; some logits are -infinity, all of child 2
    options: tuple[str, ...] = ()  # of "gates", "k", "mask", "coordinates"; "closed": gates of 0
    dtype: str = "float32"
    mean: float = 0.0  # of the votes, whose standard deviation is about 1
    jump: float = 0.0  # of the states' means from that of the votes
    logits: str = "gaussian"
    leaky: bool = False
    mass: bool = False  # whether "sums" include it


MATRICES = 35, 5, 2, 3, 3, 2
EVERY = "gates", "k", "mask", "coordinates"
PROBLEMS = {
    "plain": Problem(),
    "prior of each example": Problem(prior="BIJ"),
    "parent mask, leaky": Problem(options=("mask",), leaky=True),
    "gates": Problem(options=("gates",)),
    "no open gate": Problem(options=("gates", "closed")),
    "matrices, all": Problem(MATRICES, prior="IJ", options=EVERY),
    "bfloat16, all": Problem((35, 5, 1, 5, 3, 4), prior="BIJ", options=EVERY, dtype="bfloat16"),
    "one of each": Problem((1, 1, 1, 1, 1, 1)),
    "linear": Problem(MATRICES, logits="linear"),
    "linear, all": Problem(MATRICES, prior="IJ", options=EVERY, logits="linear", mass=True),
    "linear, bfloat16 and leaky, all": Problem(
        (35, 5, 3, 4, 3, 2), "BIJ", EVERY, "bfloat16", logits="linear", leaky=True, mass=True
    ),
    "linear, leaky": Problem(MATRICES, options=("mask", "gates"), logits="linear", leaky=True),
    "linear, two of each": Problem((2, 2, 2, 1, 2, 1), options=("gates",), logits="linear"),
}
# Several parents and children in a program, several programs, and several tiles in a program.
SMALL = TritonVotesConfig(
    sums_warps=2,
    sums_ranges=3,
    statistics_warps=2,
    statistics_children=1,
    gradients_warps=2,
    gradients_splits=1,
)
IMPLEMENTATIONS = {
    "small tiles": Implementation("triton", SMALL, interpret=True),
    "two children": Implementation("triton", replace(SMALL, statistics_children=2), interpret=True),
    "triton": Implementation("triton", interpret=True),
    "xla": Implementation("xla"),
}
OTHER_TILES = {
    "gates": "two children",
    "one of each": "triton",
    "linear, leaky": "two children",
    "linear, two of each": "triton",
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
    k = given("k", normal(1.0, batch, parents))
    if problem.logits == "linear":
        moments = "sums"
        state = State(k, b=normal(0.5, batch, parents, depth))
    else:
        moments = "central"
        if problem.jump:  # with the precision of a parent that far away, so that no coupling is 0
            precision *= (3 / problem.jump) ** 2
        center = normal(0.5, batch, parents, depth) + (problem.mean + problem.jump)
        state = State(k, z=center, q=jnp.asarray(precision, "float32"))
    cotangents = []
    for _ in range(2):
        mass, *others = (normal(1.0, batch, parents, *last) for last in ((), (depth,), (depth,)))
        if problem.logits == "linear":
            cotangents.append(Moments(mass if problem.mass else None, others[0]))
        else:
            cotangents.append(Moments(mass, *others))
    spec = Spec(parents, problem.logits, moments, problem.mass, problem.leaky)
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


@partial(jax.jit, static_argnums=0, static_argnames="implementation")
def all_passes(spec, inputs, states, cotangents, *, implementation):
    """Return the results of an implementation."""
    settings = {"implementation": implementation}
    moments = [passes.moments(spec, inputs, state, **settings) for state in states]
    terms = [Term(*one) for one in zip(states, moments, cotangents, strict=True)]
    d_state, kept = passes.chain(spec, inputs, terms[1], **settings)
    terms[1] = terms[1]._replace(kept=kept)
    return Results(moments, d_state, passes.input_gradients(spec, inputs, terms, **settings))


run_passes = partial(all_passes, implementation=IMPLEMENTATIONS["small tiles"])


def run(problem, implementation):
    spec, *arguments = make(problem)
    return all_passes(spec, *arguments, implementation=IMPLEMENTATIONS[implementation])


def assert_close(actual, wanted, dtype):
    pairs = zip(*map(jax.tree.leaves_with_path, (actual, wanted)), strict=True)
    for (path, a), (_, e) in pairs:
        assert a.shape == e.shape, path
        error = np.abs(np.asarray(a, np.float64) - e).max() / max(np.abs(e).max(), 1e-3)
        assert error < ERRORS[dtype], f"{jax.tree_util.keystr(path)}: {error:.1e}"


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "small tiles") for name in PROBLEMS if name not in OTHER_TILES),
        *OTHER_TILES.items(),
    ],
)
def test_passes_match_the_oracle(name, implementation):
    problem = PROBLEMS[name]
    assert_close(run(problem, implementation), exact(problem), problem.dtype)


@pytest.mark.parametrize("name", ["matrices, all", "linear, two of each"])
def test_constant_couplings_have_no_gradient(name):
    problem = PROBLEMS[name]
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


@pytest.mark.parametrize("mean", [10.0, 100.0, 1000.0])
def test_far_means_cost_no_more_digits_than_in_the_plain_form(mean):
    problem = PROBLEMS["gates"]._replace(mean=mean)
    actual, plain = (run(problem, name) for name in ("small tiles", "xla"))
    tolerances.assert_as_exact(actual, plain, exact(problem))


def test_states_far_from_the_votes_cost_few_digits():
    """Here no parent collapses: couplings below 2^-126 are 0 in float32.

    A parent that has only such couplings has a mean, and gradients through it, in float64 alone.
    """
    problem = PROBLEMS["gates"]._replace(jump=40.0)
    wanted = exact(problem)
    assert wanted.moments[1].mass.min() > 1e-6
    tolerances.assert_within_units(run(problem, "small tiles"), wanted, units=10)


def test_a_precision_of_zero_has_a_gradient():
    problem = PROBLEMS["gates"]
    spec, inputs, states, cotangents = make(problem)
    state = states[1]._replace(q=states[1].q.at[..., 1].set(0))
    wanted = oracles.vote_gradients(
        spec,
        *jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, state, cotangents[1])),
    )[1]
    actual = run_passes(spec, inputs, (State(), state), cotangents).chain
    assert_close(actual, State(*wanted), problem.dtype)


@pytest.mark.parametrize("name", ["gates", "linear, two of each"])
def test_a_state_of_biases_alone_needs_no_votes_for_its_softmax(name):
    problem = PROBLEMS[name]
    spec, inputs, _, cotangents = make(problem)
    rng = np.random.default_rng(1)
    state = State(k=jnp.asarray(rng.normal(size=cotangents[0].first.shape[:2]), "float32"))
    exact_arguments = jax.tree.map(lambda x: np.asarray(x, np.float64), (inputs, state))
    actual = run_passes(spec, inputs, (State(), state), cotangents)
    _, wanted = oracles.vote_moments(spec, *exact_arguments)
    assert_close(actual.moments[1], Moments(*wanted), problem.dtype)
    of_inputs, of_state = zip(
        *(
            oracles.vote_gradients(
                spec, exact_arguments[0], each, jax.tree.map(np.float64, cotangent)
            )
            for each, cotangent in zip((State(), exact_arguments[1]), cotangents, strict=True)
        ),
        strict=True,
    )
    assert_close(actual.chain, State(*of_state[1]), problem.dtype)
    total = jax.tree.map(np.add, *(Inputs(*x) for x in of_inputs))
    assert_close(actual.input_gradients, total, problem.dtype)


# Whole programs, lowered for a GPU that is not here.


def mixture_step(t, carry, moments, params):
    del t, params
    variance = moments.second / moments.mass[..., None] + 0.1
    state = State(k=-jnp.log(variance).sum(-1) / 2, z=moments.first, q=1 / variance)
    return carry, state, (moments.first, moments.mass)


def attention_step(t, carry, moments, params):
    del t, params
    return carry, State(b=moments.first / 4), (moments.first, moments.mass)


STEPS = {"gaussian": mixture_step, "linear": attention_step}
KERNELS = {"statistics", "moments", "chain", "input_gradients"}


@pytest.mark.parametrize(
    ("name", "settings", "kernels"),
    [
        ("matrices, all", {}, KERNELS),
        ("prior of each example", {}, KERNELS),
        ("bfloat16, all", {"gradient": "last"}, KERNELS - {"chain"}),
        ("plain", {"num_iterations": 1}, {"moments", "input_gradients"}),
        ("linear", {}, KERNELS),
        ("linear, bfloat16 and leaky, all", {}, KERNELS),
    ],
)
def test_a_whole_program_is_lowered_to_kernels(name, settings, kernels):
    spec, inputs, *_ = make(PROBLEMS[name])
    settings = {"num_iterations": 3} | settings
    step = STEPS[spec.logits]
    routing = Routing(spec, step, **settings, implementation=Implementation("triton"))

    def value_and_gradients(inputs, parent_mask):
        def route(inputs):
            return unroll(routing, inputs._replace(parent_mask=parent_mask))

        outputs, vjp = jax.vjp(route, inputs)
        return outputs, vjp(outputs)

    arguments = inputs._replace(parent_mask=None), inputs.parent_mask
    text = lowered_for_a_gpu(value_and_gradients, *arguments)
    found = {kernel for kernel in KERNELS if f"routing_{spec.logits}_{kernel}" in text}
    assert found == kernels
    assert "stablehlo.while" not in text


def struct(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def lowered_for_a_gpu(function, *arguments):
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with use_abstract_mesh(AbstractMesh((), (), (), abstract_device=device)):
        program = jax.jit(function).trace(*arguments)
        return program.lower(lowering_platforms=("cuda",)).as_text()


def test_inverted_attention_of_matrices_has_kernels_on_a_gpu_and_none_on_a_tpu():
    arrays = struct(2, 6, 4, 4), struct(6, 4, 3, 4)
    route = jax.jit(partial(inverted_attention_routing, matrix=True))
    assert "routing_linear_moments" in lowered_for_a_gpu(route, *arrays)
    on_a_tpu = route.trace(*arrays).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" not in on_a_tpu
    assert "stablehlo.while" in on_a_tpu


SPEC = Spec(3, logits="gaussian", moments="central")
LINEAR = Spec(3)
OF_MATRICES = Inputs(struct(2, 6, 4, 4), struct(6, 4, 3, 4))
OPTIONS = Inputs(
    struct(2, 6, 3, 2, dtype="bfloat16"),
    struct(6, 2, 3, 3, dtype="bfloat16"),
    gates=struct(2, 6),
    prior=struct(2, 6, 3),
    coordinates=struct(6, 9),
    parent_mask=struct(2, 3, dtype="bool"),
)
ACCEPTED = {
    "matrices": (SPEC, OF_MATRICES),
    "vectors": (SPEC, Inputs(struct(2, 6, 1, 16), struct(6, 16, 3, 16))),
    "every option": (Spec(3, "gaussian", "central", leaky=True), OPTIONS),
    "linear": (LINEAR, OF_MATRICES),
    "linear, every option": (Spec(3, mass=True, leaky=True), OPTIONS),
}
OTHER_MOMENTS = "must have linear logits and sums, or gaussian logits and central moments"
REFUSED = {
    "gaussian sums": (Spec(3, "gaussian"), OF_MATRICES, OTHER_MOMENTS),
    "linear mean": (Spec(3, moments="central"), OF_MATRICES, "must have linear logits and sums"),
    "cosine": (Spec(3, "cosine"), OF_MATRICES, "must have linear logits and sums"),
    "shared weights": (
        LINEAR,
        OF_MATRICES._replace(weights=struct(4, 3, 4)),
        r"must have weights \[I,",
    ),
    "votes": (SPEC, OF_MATRICES._replace(weights=None), r"must have weights \[I,"),
    "float64": (
        LINEAR,
        OF_MATRICES._replace(poses=struct(2, 6, 4, 4, dtype="float64")),
        "must be float32 or bfloat16, got float64",
    ),
    "rows": (
        LINEAR,
        Inputs(struct(2, 6, 5, 4), struct(6, 4, 3, 4)),
        "at most 16, got R = 5, P = 4 and E = 4",
    ),
    "length": (SPEC, Inputs(struct(2, 6, 1, 17), struct(6, 17, 3, 4)), "R = 1, P = 17 and E = 4"),
    "columns": (SPEC, Inputs(struct(2, 6, 4, 4), struct(6, 4, 3, 5)), "R = 4, P = 4 and E = 5"),
    "size": (
        SPEC,
        Inputs(struct(2**12, 2**16, 4, 4), struct(2**16, 4, 3, 4)),
        r"fewer than 2\*\*31 elements",
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_kernels_accept(name):
    spec, inputs = ACCEPTED[name]
    assert isinstance(triton.config_for(spec, inputs, State(), device=Device()), TritonVotesConfig)


@pytest.mark.parametrize("name", REFUSED)
def test_kernels_say_what_they_do_not_accept(name):
    spec, inputs, reason = REFUSED[name]
    with pytest.raises(Unsupported, match=reason):
        triton.config_for(spec, inputs, State(), device=Device())


def test_kernels_refuse_several_devices_and_batches_of_unknown_size():
    with pytest.raises(Unsupported, match="must lie on one device"):
        triton.config_for(SPEC, OF_MATRICES, State(), device=Device(num_devices=2))
    (batch,) = jax.export.symbolic_shape("batch")
    unknown = OF_MATRICES._replace(poses=struct(batch, 6, 4, 4))
    with pytest.raises(Unsupported, match="must have a batch of known size"):
        triton.config_for(SPEC, unknown, State(), device=Device())
