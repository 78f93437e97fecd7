"""The TPU's passes with gaussian logits, interpreted, and programs that are lowered to them."""

from functools import cache
from typing import NamedTuple

import gaussian_programs as programs
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.cases import Case
from capsjax.kernels.vote_passes.config import (
    TPU_MEMORY,
    MosaicTpuGaussianConfig,
    TpuGroups,
    XlaConfig,
    mosaic_tpu_gaussian_config_for,
)
from capsjax.kernels.vote_passes.mosaic_tpu import gaussian
from capsjax.kernels.vote_passes.passes import (
    Device,
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
)

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
    "all, prior of each example": Problem((60, 19, 2, 2, 2, 2), prior="BIJ", options=EVERY),
    "constant": Problem(prior="IJ", options=(*EVERY, "constant")),
    "constant, without gates": Problem((60, 9, 3, 1, 3, 2), options=("constant",)),
    "matrices": Problem((60, 9, 2, 3, 2, 4), options=("gates",)),
    "one of each": Problem((1, 1, 1, 1, 1, 1)),
    "gates of 0": Problem((3, 9, 2, 1, 2, 2), prior="IJ", options=("gates", "closed", "k")),
    # Two tiles of parents, and of examples.
    "many parents": Problem((2, 3, 130, 1, 2, 1), prior="IJ", options=("gates",)),
    "many examples": Problem((130, 9, 2, 1, 2, 2), prior="IJ", options=EVERY),
    "far": Problem((60, 100, 3, 1, 3, 3), options=("coordinates", "gates"), far=1e3),
    "bfloat16": Problem((60, 13, 3, 1, 3, 3), prior="BIJ", options=EVERY, dtype="bfloat16"),
}
# Several blocks of children, for two cores, and groups of them in a block.
SMALL = MosaicTpuGaussianConfig(TpuGroups(2, 1, 2**24), TpuGroups(2, 1, 2**24), cores=2)
# Moments of small sets are merged, whose means are rounded: as many children in a tile.
PLAIN = Implementation("xla", XlaConfig(children=16, examples=128))
# Last places of the largest entry of a leaf, beside twice the error of the plain form: XLA's CPU
# compiler contracts multiply-adds of two interpreted kernels differently, so that their logits
# differ by a few last places, where a TPU, which has no such instruction, computes the same.
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
    actual, plain = run(problem, SMALL_KERNEL), run(problem, PLAIN)
    exactly = map(jax.tree.leaves_with_path, (actual, plain, exact(problem)))
    for (path, a), (_, p), (_, e) in zip(*exactly, strict=True):
        assert a.dtype == p.dtype
        assert a.shape == p.shape == e.shape
        unit = float(jnp.finfo(a.dtype).eps) * max(np.abs(e).max(), 1e-30)
        errors = [np.abs(np.asarray(x, np.float64) - e).max() / unit for x in (a, p)]
        assert errors[0] <= 2 * errors[1] + UNITS, (jax.tree_util.keystr(path), errors)


def test_a_program_of_two_iterations_equals_the_definition():
    rng = np.random.default_rng(0)

    def random(x):
        numbers = rng.random(x.shape, "float32")
        return jnp.asarray(numbers < 0.7 if x.dtype == bool else numbers)

    shapes = programs.arguments((4, 9, 3, 1, 2, 2), ("gates", "mask"))
    inputs, _, cotangents = jax.tree.map(random, shapes)
    arguments = inputs, jnp.asarray(0.7), cotangents

    def run(implementation, dtype):
        def cast(x):
            return x if x.dtype == bool else x.astype(dtype)

        function = programs.values_and_gradients(3, implementation=implementation)
        return jax.jit(function)(*jax.tree.map(cast, arguments))

    with jax.enable_x64(True):
        wanted = run(Implementation("reference"), "float64")
    found = run(SMALL_KERNEL, "float32")
    for a, e in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, e, atol=3e-6 * max(1, np.abs(e).max()))


def lowered(arguments, parents, *, device_kind="TPU v5 lite", **settings):
    """The text of a program for values and gradients that is lowered for a TPU."""
    device = AbstractDevice(device_kind, num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        program = jax.jit(programs.values_and_gradients(parents, **settings)).trace(*arguments)
        return program.lower(lowering_platforms=("tpu",)).as_text()


LOWERED = {
    "classes": (programs.CLASSES, ("gates",), {"num_iterations": 3}),
    "windows": (programs.WINDOWS, ("gates", "coordinates"), {}),
    "vectors": (programs.VECTORS, programs.EVERY, {}),
    "bfloat16": ((37, 11, 5, 2, 3, 4), programs.EVERY, {}),
    "one of each": ((1, 1, 1, 1, 1, 1), (), {}),
}


@pytest.mark.parametrize(
    ("name", "device_kind"), [*((name, "TPU v5 lite") for name in LOWERED), ("classes", "TPU v4")]
)
def test_programs_are_lowered_to_kernels(name, device_kind):
    sizes, options, settings = LOWERED[name]
    dtype = "bfloat16" if name == "bfloat16" else "float32"
    arguments = programs.arguments(sizes, options, dtype)
    text = lowered(arguments, sizes[2], device_kind=device_kind, **settings)
    assert all(kernel in text for kernel in programs.KERNELS)
    assert "stablehlo.while" not in text


def test_one_iteration_needs_no_chain():
    sizes = 3, 5, 2, 1, 2, 2
    arguments = programs.arguments(sizes, ("gates",))
    text = lowered(arguments, 2, num_iterations=1)
    assert "gaussian_routing_chain" not in text
    for settings in {"gradient": "last"}, {"gradient": "full"}:
        text = lowered(arguments, 2, **settings)
        assert all(kernel in text for kernel in programs.KERNELS)


SMALL_SIZES = 3, 5, 2, 1, 2, 2
REFUSED = {
    "leaky": ({"leaky": True}, {}, "must not be leaky"),
    "shared weights": ({}, {"weights": (2, 2, 2)}, r"must have weights \[I, P, J, E\]"),
    "votes": ({}, {"weights": None}, r"must have weights \[I, P, J, E\]"),
    "long": (
        {},
        {"poses": (3, 5, 1, 17), "weights": (5, 17, 2, 2)},
        "must have R, P and E of at most 16, got 1, 17, 2",
    ),
    "large matrices": (
        {},
        {"poses": (3, 5, 5, 2), "weights": (5, 2, 2, 2)},
        "must have R, P and E of at most 4, got 5, 2, 2",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_kernels_do_not_take_is_left_to_the_plain_form(name):
    settings, changes, reason = REFUSED[name]
    inputs, temperature, cotangents = programs.arguments(SMALL_SIZES, ())
    for field, shape in changes.items():
        inputs = inputs._replace(
            **{field: None if shape is None else jax.ShapeDtypeStruct(shape, "float32")}
        )
    depth = passes.votes_depth(inputs)
    cotangents = jax.ShapeDtypeStruct((3, 2, depth), "float32"), cotangents[1]
    arguments = inputs, temperature, cotangents
    assert "gaussian_routing" not in lowered(arguments, 2, **settings)
    with pytest.raises(passes.Unsupported, match=f"routing: inputs of this kernel {reason}"):
        lowered(arguments, 2, implementation="mosaic_tpu", **settings)


def test_float64_and_batches_of_unknown_size_are_left_to_the_plain_form():
    inputs, *_ = programs.arguments(SMALL_SIZES, ())
    spec, batch = Spec(2, "gaussian", "central"), jax.export.symbolic_shape("b")[0]
    for poses, reason in {
        jax.ShapeDtypeStruct((3, 5, 1, 2), "float64"): "must be float32 or bfloat16, got float64",
        jax.ShapeDtypeStruct((batch, 5, 1, 2), "float32"): "must have a batch of known size",
    }.items():
        with pytest.raises(passes.Unsupported, match=reason):
            gaussian.config_for(spec, inputs._replace(poses=poses), State(), device=Device())
    for device, state, reason in (
        (Device(num_devices=2), State(), "must lie on one device"),
        (Device(), State(b=inputs.poses), "must have no state b"),
    ):
        with pytest.raises(passes.Unsupported, match=reason):
            gaussian.config_for(spec, inputs, state, device=device)


def test_states_that_exceed_the_memory_of_a_tpu_are_left_to_the_plain_form():
    sizes = 128, 1152, 196, 4, 4, 4
    arguments = programs.arguments(sizes, ())
    assert programs.KERNELS[0] in lowered(arguments, 196)
    assert programs.KERNELS[0] not in lowered(arguments, 196, device_kind="TPU v4")
    with pytest.raises(passes.Unsupported, match="J = 196 parents exceed the TPU's vector memory"):
        lowered(arguments, 196, device_kind="TPU v4", implementation="mosaic_tpu")


@pytest.mark.parametrize("prior_of_examples", [False, True])
@pytest.mark.parametrize("device_kind", ["TPU v4", *TPU_MEMORY])
def test_blocks_fit_into_vector_memory(device_kind, prior_of_examples):
    case = Case(128, 1152, length=4, parents=10, depth=16, rows=4)
    config = mosaic_tpu_gaussian_config_for(case, device_kind, prior_of_examples=prior_of_examples)
    most = 2**20 * (0.75 * TPU_MEMORY.get(device_kind, 16) + 8)
    assert max(config.sums.memory, config.gradients.memory) <= most
    assert 1152 % (8 * config.sums.groups * config.cores) == 0
