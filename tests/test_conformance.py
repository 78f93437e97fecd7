"""Few whole procedures of kernels, and passes of the plain form in tiles, against the oracle.

`test_kernel_options.py` and `test_vote_passes.py` have the passes of the kernels and of the plain
form with every option, and `test_routing_options.py` the procedure on top of them.
"""

import math
import warnings
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tolerances
from jax.experimental.pallas import tpu as pltpu

import capsjax
from capsjax.kernels import strided_conv
from capsjax.kernels.vote_passes import mosaic_tpu, passes, reference
from capsjax.kernels.vote_passes.cases import CASES
from capsjax.kernels.vote_passes.config import (
    MosaicTpuConfig,
    TpuTile,
    XlaConfig,
    triton_config_for,
)
from capsjax.kernels.vote_passes.passes import (
    PLATFORMS,
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Problem(NamedTuple):
    """The sizes of a pass; no size is a multiple of a tile."""

    batch: int = 3
    children: int = 7
    length: int = 4
    parents: int = 5
    depth: int = 6
    prior: bool = False  # [I, J], some logits are -infinity, all of child 2
    dtype: str = "float32"


PROBLEMS = {
    "prior": Problem(prior=True),
    # 4 tiles of examples and 2 of children, the last ones not full.
    "several tiles, prior": Problem(27, 131, 2, 5, 6, prior=True),
    "several tiles, bfloat16": Problem(27, 131, 2, 5, 6, dtype="bfloat16"),
    "one child": Problem(67, 1, 4, 5, 6, prior=True),
}
SMALL_XLA = XlaConfig(children=4, examples=2)
SMALL_TPU_TILE = TpuTile(8, buffers=1, keeps_products=False, unrolled=False, memory=2**24)
SMALL_TPU = MosaicTpuConfig(SMALL_TPU_TILE, SMALL_TPU_TILE, SMALL_TPU_TILE, cores=2)
IMPLEMENTATIONS = {
    "xla, small tiles": Implementation("xla", SMALL_XLA),
    **{name: Implementation(name, interpret=True) for name in PLATFORMS},
}


class Arguments(NamedTuple):
    """The arguments of all passes."""

    inputs: Inputs
    states: list[State]  # of each iteration, the first one without a state
    cotangents: list[Moments]


class Results(NamedTuple):
    """The results of all passes."""

    moments: list[Moments]  # of each state
    chain: State
    input_gradients: Inputs  # summed over the states
    constant_couplings: Inputs  # the same of the last state alone


def arguments_of(problem):
    """The arguments of the passes of two iterations."""
    rng = np.random.default_rng(0)
    batch, children, length, parents, depth, has_prior, dtype = problem

    def normal(scale, *shape, dtype=dtype):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    prior = None
    if has_prior:
        prior = (
            normal(1.0, children, parents).at[2:3].set(-jnp.inf).at[4:, : parents - 2].set(-jnp.inf)
        )
    inputs = Inputs(
        normal(0.5, batch, children, 1, length),
        normal(0.5, children, length, parents, depth),
        prior=prior,
    )
    parents_shape = batch, parents, depth
    states = [State(), State(b=normal(0.5, *parents_shape, dtype="float32"))]
    cotangents = [Moments(None, normal(1.0, *parents_shape, dtype="float32")) for _ in states]
    return Arguments(inputs, states, cotangents)


def all_passes(module, problem, **settings):
    """A function that runs every pass of a backend's module, or of its primitives."""
    spec = Spec(problem.parents)

    def run(inputs, states, cotangents):
        terms = [
            Term(state, None, cotangent)
            for state, cotangent in zip(states, cotangents, strict=True)
        ]
        d_state, kept = module.chain(spec, inputs, terms[-1], **settings)
        constant = module.input_gradients(
            spec, inputs, terms[-1:], constant_couplings=True, **settings
        )
        terms[-1] = terms[-1]._replace(kept=kept)
        return Results(
            [module.moments(spec, inputs, state, **settings) for state in states],
            d_state,
            module.input_gradients(spec, inputs, terms, constant_couplings=False, **settings),
            constant,
        )

    return run


@cache
def exact_and_plain(problem):
    """The oracle's results, and those of the definition in the same dtype."""
    inputs, states, cotangents = jax.tree.map(
        lambda x: np.asarray(x, np.float64), arguments_of(problem)
    )
    spec = Spec(problem.parents)
    gradients = [
        oracles.vote_gradients(spec, inputs, state, cotangent)
        for state, cotangent in zip(states, cotangents, strict=True)
    ]
    constant, _ = oracles.vote_gradients(
        spec, inputs, states[-1], cotangents[-1], constant_couplings=True
    )
    exact = Results(
        [Moments(*oracles.vote_moments(spec, inputs, state)[1]) for state in states],
        State(*gradients[-1][1]),
        jax.tree.map(np.add, *(Inputs(*of_inputs) for of_inputs, _ in gradients)),
        Inputs(*constant),
    )
    return exact, jax.jit(all_passes(reference, problem))(*arguments_of(problem))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_passes_in_tiles_are_as_exact_as_the_reference(problem):
    problem = PROBLEMS[problem]
    exact, plain = exact_and_plain(problem)
    run = all_passes(passes, problem, implementation=IMPLEMENTATIONS["xla, small tiles"])
    tolerances.assert_as_exact(jax.jit(run)(*arguments_of(problem)), plain, exact)


@pytest.mark.parametrize("problem", ["prior", "several tiles, bfloat16"])
def test_reference_passes_are_exact_to_rounding(problem):
    problem = PROBLEMS[problem]
    exact, plain = exact_and_plain(problem)
    tolerances.assert_within_units(plain, exact, units=20)


def test_tpu_kernels_neither_read_unwritten_memory_nor_race(capfd):
    # This mode fills memory with NaN, gives the cores of a chip the parts of a grid that are
    # declared parallel, and prints accesses to one place that have no order. Its effects are
    # ordered, which no primitive here has, so the backend's own functions are called.
    problem = Problem(27, 131, 2, 3, 2, prior=True)
    modelled = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    exact, _ = exact_and_plain(problem)
    run = all_passes(mosaic_tpu, problem, config=SMALL_TPU, interpret=modelled)
    with jax.default_matmul_precision("highest"):
        actual = jax.jit(run)(*arguments_of(problem))
    tolerances.assert_within_units(actual, exact, units=20)
    assert "RACE" not in "".join(capfd.readouterr())


def test_triton_kernels_add_nothing_atomically():
    # Sums that grow in a fixed order give the same bits twice.
    problem = PROBLEMS["several tiles, prior"]
    config = triton_config_for(CASES["conv_capsules"])  # several tiles in each program
    with warnings.catch_warnings():
        message = "The Pallas Triton backend is deprecated"  # from JAX 0.11 on
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        from capsjax.kernels.vote_passes import triton

        run = all_passes(triton, problem, config=config, interpret=False)
        text = str(jax.make_jaxpr(run)(*arguments_of(problem)))
    assert text.count("pallas_call") >= 5
    assert "atomic" not in text


ROUTING = Problem(prior=True)


def routing_arguments(dtype):
    """Poses, weights, prior and bias, of which gradients are taken; mask and cotangent."""
    rng = np.random.default_rng(1)
    inputs = arguments_of(ROUTING._replace(dtype=dtype)).inputs
    batch, children, _, parents, depth, *_ = ROUTING
    bias = jnp.asarray(rng.normal(size=(parents, depth)) * 0.1, dtype)
    mask = jnp.asarray(rng.random((batch, children)) < 0.7)
    cotangent = jnp.asarray(rng.normal(size=(batch, parents, depth)), dtype)
    return (inputs.poses[:, :, 0], inputs.weights, inputs.prior, bias), mask, cotangent


@cache
def route(implementation, num_iterations, gradient, dtype, transform="jit"):
    """Outputs and gradients of a routing with a prior, a bias and a mask."""
    arrays, mask, cotangent = routing_arguments(dtype)

    def function(poses, weights, prior, bias, mask):
        return capsjax.dynamic_routing(
            poses,
            weights,
            prior=prior,
            bias=bias,
            mask=mask,
            num_iterations=num_iterations,
            gradient=gradient,
            implementation=implementation,
        )

    if transform == "vmap":
        function = jax.vmap(function, (0, None, None, None, 0))

    def values_and_gradients(*arrays):
        outputs, vjp = jax.vjp(lambda *a: function(*a, mask), *arrays)
        return outputs, vjp(cotangent)

    if transform != "eager":
        values_and_gradients = jax.jit(values_and_gradients)
    return values_and_gradients(*arrays)


@pytest.mark.parametrize(
    ("implementation", "num_iterations", "gradient", "dtype", "transform"),
    [
        ("reference", 3, "full", "float32", "vmap"),
        ("xla, small tiles", 3, "full", "bfloat16", "jit"),
        ("xla, small tiles", 2, "last", "float32", "jit"),
        (None, 3, "full", "float32", "eager"),
        (None, 3, "full", "float32", "vmap"),
        *(
            case
            for name in PLATFORMS
            for case in (
                (name, 3, "full", "float32", "jit"),
                (name, 3, "full", "float32", "vmap"),
                (name, 2, "last", "float32", "jit"),
            )
        ),
    ],
)
def test_routing_by_each_implementation_is_as_exact_as_the_reference(
    implementation, num_iterations, gradient, dtype, transform
):
    settings = num_iterations, gradient, dtype
    plain = route("reference", *settings)
    with jax.default_matmul_precision("highest"):
        actual = route(IMPLEMENTATIONS.get(implementation, implementation), *settings, transform)
    arrays, mask, cotangent = jax.tree.map(
        lambda x: np.asarray(x, np.float64), routing_arguments(dtype)
    )
    poses, weights, prior, bias = arrays
    mask = mask[..., None]
    outputs, _, (d_poses, *others) = oracles.dynamic_routing(
        poses * mask,
        weights,
        prior,
        bias,
        cotangent,
        num_iterations=num_iterations,
        gradient=gradient,
    )
    exact = outputs, (d_poses * mask, *others)
    tolerances.assert_within_units(plain, exact, units=20)
    if implementation in PLATFORMS:
        tolerances.assert_within_units(actual, exact, units=20)
    else:
        tolerances.assert_as_exact(actual, plain, exact)


def test_dynamic_routing_never_stores_the_votes():
    case = CASES["capsnet_mnist"]

    def peak_megabytes(implementation):
        arguments = (
            jax.ShapeDtypeStruct((case.batch, case.capsules, case.length), case.dtype),
            jax.ShapeDtypeStruct(
                (case.capsules, case.length, case.parents, case.depth), case.dtype
            ),
        )

        def loss(poses, weights):
            return capsjax.dynamic_routing(poses, weights, implementation=implementation).sum()

        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*arguments).compile()
        return compiled.memory_analysis().temp_size_in_bytes / 1e6

    assert peak_megabytes("reference") > 250  # the measure sees the votes where there are any
    assert peak_megabytes("xla") < 60


CONVOLUTIONS = {  # batch, image, kernel, outputs, stride
    "capsnet": (2, (20, 20, 3), (9, 9), 4, (2, 2)),
    "odd": (3, (11, 14, 2), (4, 5), 3, (3, 2)),
    "stride past the kernel": (1, (9, 9, 2), (2, 2), 2, (4, 4)),
    "one pixel": (2, (5, 5, 1), (5, 5), 2, (1, 1)),
    "one channel": (2, (12, 12, 1), (3, 3), 1, (1, 1)),
}


def convolution_arguments(name, dtype):
    """Images, kernel, and the cotangent of their convolution."""
    rng = np.random.default_rng(0)
    batch, image, kernel_size, outputs, stride = CONVOLUTIONS[name]
    images = jnp.asarray(rng.random((batch, *image)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, image[-1], outputs)), dtype)
    shape = jax.eval_shape(partial(strided_conv.xla.strided_conv, stride=stride), images, kernel)
    return images, kernel, jnp.asarray(rng.normal(size=shape.shape), dtype)


@cache
def convolve(implementation, name, dtype):
    """The convolution and its gradients."""

    @jax.jit
    def run(images, kernel, cotangent):
        function = partial(
            strided_conv.IMPLEMENTATIONS[implementation], stride=CONVOLUTIONS[name][-1]
        )
        outputs, vjp = jax.vjp(function, images, kernel)
        return outputs, vjp(cotangent)

    return run(*convolution_arguments(name, dtype))


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in CONVOLUTIONS), ("odd", "bfloat16")]
)
@pytest.mark.parametrize("implementation", strided_conv.IMPLEMENTATIONS)
def test_strided_conv_matches_the_oracle(implementation, name, dtype, monkeypatch):
    # Whether the spectral form pays is not in question here, and its own answer would be no.
    monkeypatch.setattr(strided_conv.spectral, "_worthwhile", lambda *arguments: True)
    stride = CONVOLUTIONS[name][-1]
    depth = 2 * math.prod(stride)  # of two channels: several chunks, one not full
    monkeypatch.setattr(strided_conv.spectral, "DEPTH", depth)
    exact = oracles.strided_conv(*convolution_arguments(name, dtype), stride=stride)
    actual = convolve(implementation, name, dtype)
    if implementation == "patches" or (implementation == "spectral" and dtype == "bfloat16"):
        tolerances.assert_as_exact(actual, convolve("xla", name, dtype), exact)
    else:
        # The plain form, or a transform, which adds rounding where a direct sum has few terms.
        tolerances.assert_within_units(actual, exact, units=16)
