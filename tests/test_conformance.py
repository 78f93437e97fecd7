"""Every operation x implementation x case x dtype x transform against the float64 oracle."""

import math
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
from capsjax.kernels.vote_passes import mosaic_tpu, reference
from capsjax.kernels.vote_passes.cases import CASES
from capsjax.kernels.vote_passes.config import MosaicTpuConfig, TritonConfig, XlaConfig
from capsjax.kernels.vote_passes.passes import (
    IMPLEMENTATIONS,
    PLATFORMS,
    Device,
    Implementation,
    Inputs,
    Moments,
    Spec,
    State,
    Term,
)


class Routing(NamedTuple):
    """A small routing problem; no size is a multiple of a tile."""

    batch: int = 3
    capsules: int = 7
    length: int = 4
    parents: int = 5
    depth: int = 6
    num_iterations: int = 3
    prior: bool | str = False  # True: [I, J]; "each": [B, I, J]
    forbidden: bool = False  # some logits of the prior are -infinity, all of child 2
    bias: bool = False
    mask: bool = False
    parent_mask: bool | str = False  # True: [J]; "each": [B, J]
    leaky: bool = False
    weights: str = "[I, P, J, D]"
    gradient: str = "full"


ROUTING = {
    **{f"T={t}": Routing(num_iterations=t) for t in range(1, 6)},
    **{f"last T={t}": Routing(num_iterations=t, gradient="last") for t in (1, 2, 3)},
    "prior": Routing(prior=True),
    "prior T=1": Routing(prior=True, num_iterations=1),
    "prior last": Routing(prior=True, gradient="last"),
    "forbidden": Routing(prior=True, forbidden=True, bias=True),
    "bias": Routing(bias=True),
    "mask": Routing(mask=True),
    "all T=5": Routing(num_iterations=5, prior=True, bias=True, mask=True),
    "all T=2": Routing(num_iterations=2, prior=True, bias=True, mask=True),
    "all last": Routing(prior=True, bias=True, mask=True, gradient="last"),
    "one of each": Routing(1, 1, 1, 1, 1),
    "I=1": Routing(capsules=1, prior=True),
    "J=1": Routing(parents=1, prior=True),
    "P=1 D=1": Routing(length=1, depth=1),
    "batch past a tile": Routing(batch=131, capsules=5, parents=3, depth=2, prior=True),
    "capsules past a tile": Routing(batch=2, capsules=301, parents=37, depth=16, bias=True),
}
SHARED = {"weights": "[P, J, D]"}
ALL_OPTIONS = {
    "prior": "each",
    "forbidden": True,
    "bias": True,
    "mask": True,
    "parent_mask": "each",
    "leaky": True,
}
# What kernels do not take.
PLAIN_ROUTING = {
    "prior of each example": Routing(prior="each", forbidden=True),
    "parent mask": Routing(parent_mask=True, bias=True),
    "parent mask of each example": Routing(parent_mask="each", prior=True, forbidden=True),
    "leaky": Routing(leaky=True),
    "leaky T=1": Routing(leaky=True, num_iterations=1),
    "leaky last": Routing(leaky=True, prior=True, gradient="last"),
    "every option": Routing(**ALL_OPTIONS),
    "every option last": Routing(**ALL_OPTIONS, gradient="last"),
    "shared": Routing(**SHARED),
    "shared T=1": Routing(**SHARED, num_iterations=1),
    "shared last": Routing(**SHARED, prior=True, gradient="last"),
    "shared, every option": Routing(**SHARED, **ALL_OPTIONS),
    "shared by parents too": Routing(weights="[P, D]", prior=True),
    "shared by parents too, every option": Routing(weights="[P, D]", **ALL_OPTIONS),
}
# Kernels are interpreted here: as they are, and cut so small that there are several tiles and
# panels of examples, chunks of parents and groups of capsules, the last ones past the end.
MEMORY_MODELLED = pltpu.InterpretParams(detect_races=True)
TRITON_IN_SMALL_TILES = "triton, small tiles"
XLA_IN_SMALL_TILES = "xla, small tiles"
SMALL_TRITON = TritonConfig(
    sums_examples=16,
    sums_parents=4,
    sums_capsules=3,
    sums_warps=4,
    sums_programs=3,
    gradients_examples=16,
    gradients_parents=2,
    gradients_capsules=2,
    gradients_warps=4,
    gradients_programs=3,
)
SMALL_TPU = MosaicTpuConfig(examples=8, panel=1, weight_buffers=1, memory=2**24)
KERNELS = {
    "mosaic_tpu": Implementation("mosaic_tpu", interpret=True),
    "mosaic_tpu, small tiles": Implementation("mosaic_tpu", SMALL_TPU, interpret=True),
    "triton": Implementation("triton", interpret=True),
    TRITON_IN_SMALL_TILES: Implementation("triton", SMALL_TRITON, interpret=True),
}
NAMED = {
    **{name: name for name in IMPLEMENTATIONS},
    XLA_IN_SMALL_TILES: Implementation("xla", XlaConfig(children=4, examples=2)),
    **KERNELS,
    None: None,
}
ANYWHERE = [name for name in IMPLEMENTATIONS if name not in PLATFORMS]
IN_ALL_CASES = [name for name in (*ANYWHERE, *KERNELS) if name != TRITON_IN_SMALL_TILES]
HALF = ("T=1", "T=3", "last T=2", "all T=5", "all last", "one of each", "capsules past a tile")
CONVOLUTIONS = {  # batch, image, kernel, outputs, stride
    "capsnet": (2, (20, 20, 3), (9, 9), 4, (2, 2)),
    "odd": (3, (11, 14, 2), (4, 5), 3, (3, 2)),
    "stride past the kernel": (1, (9, 9, 2), (2, 2), 2, (4, 4)),
    "one pixel": (2, (5, 5, 1), (5, 5), 2, (1, 1)),
    "one channel": (2, (12, 12, 1), (3, 3), 1, (1, 1)),
}
TRANSFORMS = ("eager", "vmap")  # all else is under jit


class Arguments(NamedTuple):
    """Those of a routing; None for an absent one."""

    poses: jax.Array
    weights: jax.Array
    prior: jax.Array | None
    bias: jax.Array | None
    mask: jax.Array | None
    parent_mask: jax.Array | None
    cotangent: jax.Array  # of the outputs


def routing_arguments(case, dtype, seed=0):
    """The arguments of a case."""
    rng = np.random.default_rng(seed)
    batch, capsules, length, parents, depth, *_ = case

    def normal(scale, *shape):
        return jnp.asarray(rng.normal(size=shape) * scale, dtype)

    poses = normal(0.5, batch, capsules, length)
    sizes = {"I": capsules, "P": length, "J": parents, "D": depth}
    weights = normal(0.5, *(sizes[letter] for letter in case.weights[1:-1].split(", ")))
    prior = parent_mask = None
    if case.prior:
        prior = normal(1.0, *(batch,) * (case.prior == "each"), capsules, parents)
    bias = normal(0.1, parents, depth) if case.bias else None
    mask = jnp.asarray(rng.random((batch, capsules)) < 0.7) if case.mask else None
    cotangent = normal(1.0, batch, parents, depth)
    if case.forbidden:
        prior = prior.at[..., 0, 1].set(-jnp.inf).at[..., 2, :].set(-jnp.inf)
        prior = prior.at[..., 4, :3].set(-jnp.inf)
    if case.parent_mask:
        parent_mask = jnp.arange(parents) != 3
        if case.parent_mask == "each":  # child 4 of example 1 is left without a parent
            parent_mask = jnp.stack([parent_mask] * batch).at[1, 4].set(False)
    return Arguments(poses, weights, prior, bias, mask, parent_mask, cotangent)


@cache
def route(implementation, case, dtype, transform="jit"):
    """Outputs and gradients of one implementation."""
    *arrays, mask, parent_mask, cotangent = routing_arguments(case, dtype)

    def function(poses, weights, prior, bias, mask, parent_mask):
        return capsjax.dynamic_routing(
            poses,
            weights,
            prior=prior,
            bias=bias,
            mask=mask,
            parent_mask=parent_mask,
            leaky=case.leaky,
            num_iterations=case.num_iterations,
            gradient=case.gradient,
            implementation=NAMED[implementation],
        )

    if transform == "vmap":
        of_each = 0 if case.prior == "each" else None, 0 if case.parent_mask == "each" else None
        axes = 0, None, of_each[0], None, 0 if case.mask else None, of_each[1]
        function = jax.vmap(function, axes)

    def values_and_gradients(*arrays):
        outputs, vjp = jax.vjp(lambda *a: function(*a, mask, parent_mask), *arrays)
        return outputs, vjp(cotangent)

    if transform == "jit":
        values_and_gradients = jax.jit(values_and_gradients)
    return values_and_gradients(*arrays)


def exact_routing(case, dtype):
    """The oracle's outputs and gradients for the same arguments; a masked pose is 0."""
    poses, weights, prior, bias, mask, parent_mask, cotangent = (
        None if x is None else np.asarray(x, bool if x.dtype == bool else np.float64)
        for x in routing_arguments(case, dtype)
    )
    batch, capsules, length, parents, depth, *_ = case
    missing = {"[I, P, J, D]": (), "[P, J, D]": (0,), "[P, D]": (0, 2)}[case.weights]
    own = np.expand_dims(weights, missing)
    kept = 1 if mask is None else mask[..., None]
    outputs, _, (d_poses, d_weights, d_prior, d_bias) = oracles.dynamic_routing(
        poses * kept,
        np.broadcast_to(own, (capsules, length, parents, depth)),
        prior,
        bias,
        cotangent,
        num_iterations=case.num_iterations,
        gradient=case.gradient,
        leaky=case.leaky,
        parent_mask=None if parent_mask is None else np.broadcast_to(parent_mask, (batch, parents)),
    )
    return outputs, (d_poses * kept, d_weights.sum(missing), d_prior, d_bias)


def assert_matches_the_oracle(implementation, case, dtype):
    plain = route("reference", case, dtype)
    exact = exact_routing(case, dtype)
    tolerances.assert_as_exact(route(implementation, case, dtype), plain, exact)
    # The rule compares with the plain implementation; that one is held to a bound of its own.
    unit = float(jnp.finfo(dtype).eps)
    for value, wanted in zip(*map(jax.tree.leaves, (plain, exact)), strict=True):
        scale = max(np.abs(wanted).max(), 1e-3)
        np.testing.assert_allclose(
            np.asarray(value, np.float64) / scale, wanted / scale, atol=20 * unit
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in ROUTING), *((name, "bfloat16") for name in HALF)],
)
@pytest.mark.parametrize("implementation", IN_ALL_CASES)
def test_dynamic_routing_matches_the_oracle(implementation, name, dtype):
    assert_matches_the_oracle(implementation, ROUTING[name], dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float32") for name in PLAIN_ROUTING),
        *((name, "bfloat16") for name in PLAIN_ROUTING if "every option" in name),
    ],
)
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_all_options_match_the_oracle(implementation, name, dtype):
    assert_matches_the_oracle(implementation, PLAIN_ROUTING[name], dtype)


@pytest.mark.parametrize("name", ["T=3", "all T=5", "all last", "one of each", "every option"])
def test_small_tiles_of_the_plain_form_match_the_oracle(name):
    case = (ROUTING | PLAIN_ROUTING)[name]
    assert_matches_the_oracle(XLA_IN_SMALL_TILES, case, "float32")


@pytest.mark.parametrize("implementation", PLATFORMS)
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("prior of each example", r"must have one prior \[I, J\] for all examples"),
        ("parent mask", "must have no gates, coordinates or parent_mask"),
        ("leaky", "must have linear logits and sums, no leak and no mass"),
        ("shared", r"must have weights \[I, P, J, D\]"),
    ],
)
def test_kernels_say_which_options_they_do_not_take(implementation, name, reason):
    with pytest.raises(capsjax.Unsupported, match=f"routing: inputs of this kernel {reason}"):
        route(implementation, PLAIN_ROUTING[name], "float32")


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", ["all T=2", "one of each"])
@pytest.mark.parametrize("implementation", [*IN_ALL_CASES, None])
def test_dynamic_routing_under_transforms(implementation, name, transform):
    case = ROUTING[name]
    actual = route(implementation, case, "float32", transform)
    plain = route("reference", case, "float32", transform)
    tolerances.assert_as_exact(actual, plain, exact_routing(case, "float32"))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("name", [name for name in PLAIN_ROUTING if "every option" in name])
def test_all_options_under_transforms(name, transform):
    case = PLAIN_ROUTING[name]
    actual = route(None, case, "float32", transform)
    plain = route("reference", case, "float32", transform)
    tolerances.assert_as_exact(actual, plain, exact_routing(case, "float32"))


@pytest.mark.parametrize("name", ["all T=2", "prior last"])
def test_tpu_kernels_read_nothing_unwritten_and_do_not_race(name, capfd):
    # This mode fills memory with NaN and prints what accesses the same place without an order. Its
    # effects are ordered, which no primitive here has: the passes of a routing one after the other.
    case = ROUTING[name]
    poses, weights, prior, _, mask, _, cotangent = routing_arguments(case, "float32")
    kept = 1 if mask is None else mask[..., None]
    inputs = Inputs((poses * kept)[:, :, None], weights, prior=prior)
    states = [State(), *(State(b=cotangent * t) for t in range(1, case.num_iterations))]
    terms = [Term(state, None, Moments(None, cotangent + 1)) for state in states]
    passes = {
        "moments": [(inputs, state) for state in states],
        "chain": [(inputs, terms[1])],
        "input_gradients": [(inputs, terms)],
    }
    spec, config = (
        Spec(case.parents),
        mosaic_tpu.config_for(Spec(case.parents), inputs, State(), device=Device()),
    )
    for function, calls in passes.items():
        more = {}
        if function == "input_gradients":
            more["constant_couplings"] = case.gradient == "last"
        run = partial(
            getattr(mosaic_tpu, function), spec, config=config, interpret=MEMORY_MODELLED, **more
        )
        plain = partial(getattr(reference, function), spec, **more)
        for call in calls:
            with jax.enable_x64(True):
                exact = jax.tree.map(lambda x: np.asarray(x, np.float64), call)
                exact = jax.jit(plain)(*jax.tree.map(jnp.asarray, exact))
            exact = jax.tree.map(np.asarray, exact)
            tolerances.assert_as_exact(jax.jit(run)(*call), jax.jit(plain)(*call), exact)
    assert "RACE" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("name", ["all T=5", *PLAIN_ROUTING])
@pytest.mark.parametrize("implementation", ANYWHERE)
def test_dynamic_routing_in_float64(implementation, name):
    case = (ROUTING | PLAIN_ROUTING)[name]
    with jax.enable_x64(True):
        results = route(implementation, case, "float64"), exact_routing(case, "float64")
    for value, wanted in zip(*map(jax.tree.leaves, results), strict=True):
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in (*HALF, "batch past a tile")), ("all T=5", "bfloat16")],
)
def test_triton_kernels_in_small_tiles_match_the_oracle(name, dtype):
    assert_matches_the_oracle(TRITON_IN_SMALL_TILES, ROUTING[name], dtype)


def test_triton_kernels_give_the_same_bits_twice():
    case = ROUTING["batch past a tile"]
    twice = [route.__wrapped__(TRITON_IN_SMALL_TILES, case, "float32") for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *twice)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("implementation", strided_conv.IMPLEMENTATIONS)
def test_strided_conv_matches_the_oracle(implementation, name, dtype, monkeypatch):
    # Whether the spectral form pays is not in question here, and its own answer would be no.
    monkeypatch.setattr(strided_conv.spectral, "_worthwhile", lambda *arguments: True)
    batch, image, kernel_size, outputs, stride = CONVOLUTIONS[name]
    depth = 2 * math.prod(stride)  # of two channels: several chunks, one not full
    monkeypatch.setattr(strided_conv.spectral, "DEPTH", depth)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((batch, *image)), dtype)
    kernel = jnp.asarray(rng.normal(size=(*kernel_size, image[-1], outputs)), dtype)
    shape = jax.eval_shape(partial(strided_conv.xla.strided_conv, stride=stride), images, kernel)
    cotangent = jnp.asarray(rng.normal(size=shape.shape), dtype)

    def values_and_gradients(name):
        function = partial(strided_conv.IMPLEMENTATIONS[name], stride=stride)

        @jax.jit
        def run(images, kernel):
            outputs, vjp = jax.vjp(function, images, kernel)
            return outputs, vjp(cotangent)

        return run(images, kernel)

    exact = oracles.strided_conv(images, kernel, cotangent, stride=stride)
    plain = values_and_gradients("xla")
    actual = values_and_gradients(implementation)
    if implementation == "spectral" and dtype == "float32":
        # A transform adds rounding of its own where a direct sum has a few terms only.
        for value, wanted in zip(*map(jax.tree.leaves, (actual, exact)), strict=True):
            np.testing.assert_allclose(value, wanted, atol=2e-6 * np.abs(wanted).max())
    else:
        tolerances.assert_as_exact(actual, plain, exact)
