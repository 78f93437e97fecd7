"""Self-routing against the float64 oracle, its limits, and its errors."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracles as oracles
from exactness import assert_exact, values_and_gradients

import capsjax
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Implementation

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

SMALL_TILES = Implementation("xla", XlaConfig(children=4, examples=2))


class Options(NamedTuple):
    """What a call has beside poses, activations and routing weights."""

    matrix: bool = False
    weights: str = "IPJE"  # or "PJE", "PE"
    bias: bool = False
    prior: str = ""  # or "IJ", "BIJ"; some logits are -infinity, all of child 2
    mask: bool = False
    parent_mask: bool = False
    silent: bool = False  # all activations of the first example are 0
    sizes: tuple[int, int, int, int, int, int] = (3, 5, 2, 2, 4, 3)  # B, I, R, P, J, E


OPTIONS = {
    "vectors": Options(bias=True),
    "one of each": Options(sizes=(1, 1, 1, 1, 1, 1)),
    "one child": Options(sizes=(3, 1, 1, 2, 3, 2), silent=True),
    "matrices": Options(True, silent=True),
    "shared by children": Options(True, "PJE", True),
    "shared by all": Options(weights="PE"),
    "prior": Options(prior="IJ"),
    "all": Options(True, "IPJE", True, "BIJ", True, True, True),
    "all, shared by all": Options(True, "PE", True, "BIJ", True, True, True),
}
# Cases in which the definition with stored votes is compared too.
STORED = ["one child", "prior", "all", "all, shared by all"]


def make(options):
    """Arrays (poses, activations, weights, routing weights, bias, prior), masks, cotangents."""
    rng = np.random.default_rng(0)
    sizes = dict(zip("BIRPJE", options.sizes, strict=True))
    rows = "R" if options.matrix else ""

    def normal(letters, scale=1.0):
        return rng.normal(size=[sizes[x] for x in letters]) * scale

    activations = rng.random(options.sizes[:2])
    if options.silent:
        activations[0] = 0
    prior = normal(options.prior) if options.prior else None
    if prior is not None:
        prior[..., 1, 1:3] = prior[..., 2, :] = -np.inf
    arrays = (
        normal(f"BI{rows}P"),
        activations,
        normal(options.weights, 0.5),
        normal(f"I{rows}PJ"),
        normal("IJ") if options.bias else None,
        prior,
    )
    mask = rng.random(options.sizes[:2]) < 0.7 if options.mask else None
    parent_mask = None
    if options.parent_mask:
        parent_mask = np.ones((sizes["B"], sizes["J"]), bool)
        parent_mask[0, 3] = parent_mask[1, 0] = False  # leaves child 1 of example 1 without parents
        prior[1, 1, 3] = -np.inf
    return arrays, {"mask": mask, "parent_mask": parent_mask}, (normal(f"BJ{rows}E"), normal("BJ"))


@cache
def exact(options):
    """The oracle's results and gradients."""
    (poses, activations, weights, routing_weights, *added), masks, cotangents = make(options)
    kept = np.ones(activations.shape) if masks["mask"] is None else masks["mask"]

    def run(poses, activations, weights, routing_weights, *added):
        if not options.matrix:
            poses, routing_weights = poses[:, :, None], routing_weights[:, None]
        found, probabilities = oracles.self_routing(
            poses * kept[..., None, None],
            activations * kept,
            weights,
            routing_weights,
            *added,
            parent_mask=masks["parent_mask"],
        )
        return found if options.matrix else found[:, :, 0], probabilities

    return oracles.with_gradients(
        run, (poses, activations, weights, routing_weights, *added), cotangents
    )


def route(poses, activations, weights, routing_weights, bias, prior, **settings):
    return capsjax.self_routing(
        poses, activations, weights, routing_weights, routing_bias=bias, prior=prior, **settings
    )


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, SMALL_TILES) for name in OPTIONS] + [(name, "reference") for name in STORED],
    ids=[*OPTIONS, *(f"{name}, reference" for name in STORED)],
)
def test_options_match_the_oracle(name, implementation):
    options = OPTIONS[name]
    arrays, masks, cotangents = make(options)
    arrays, masks, cotangents = jax.tree.map(jnp.asarray, (arrays, masks, cotangents))
    function = partial(route, implementation=implementation, **masks)
    assert_exact(values_and_gradients(function, arrays, cotangents), exact(options))


def test_padding_of_nan_changes_nothing():
    options = OPTIONS["all"]
    arrays, masks, cotangents = jax.tree.map(jnp.asarray, make(options))
    poses, activations, *others = arrays
    hidden = ~masks["mask"]
    arrays = (
        jnp.where(hidden[..., None, None], jnp.nan, poses),
        jnp.where(hidden, jnp.nan, activations),
        *others,
    )
    function = partial(route, **masks)
    assert_exact(values_and_gradients(function, arrays, cotangents), exact(options))


def test_a_masked_parent_is_as_if_it_were_not_there():
    poses, activations, weights, routing_weights, *_ = make(OPTIONS["vectors"])[0]
    there = np.array([True, False, True, True])
    found = capsjax.self_routing(poses, activations, weights, routing_weights, parent_mask=there)
    alone = capsjax.self_routing(
        poses, activations, weights[:, :, there], routing_weights[..., there]
    )
    assert_exact([x[:, there] for x in found], alone)
    assert not any(np.any(x[:, 1]) for x in found)
    none = capsjax.self_routing(
        poses, activations, weights, routing_weights, parent_mask=np.zeros(4, bool)
    )
    assert not any(map(np.any, none))


def test_activations_sum_to_one_over_the_parents():
    arrays, masks, _ = make(OPTIONS["all"])
    _, activations = route(*arrays, **masks)
    np.testing.assert_allclose(activations.sum(-1), [0, 1, 1], atol=1e-12)


def test_the_range_of_known_activations_is_checked_inside_of_jit_too():
    poses, activations, weights, routing_weights, *_ = make(OPTIONS["vectors"])[0]

    @jax.jit
    def routed(poses):
        return capsjax.self_routing(poses, jnp.asarray(activations), weights, routing_weights)

    wanted = capsjax.self_routing(poses, activations, weights, routing_weights)
    assert_exact(routed(poses), wanted)


def test_vmap_over_examples_and_over_weights():
    arrays, masks, _ = jax.tree.map(jnp.asarray, make(OPTIONS["all"]))
    wanted = jax.jit(partial(route, **masks))(*arrays)
    axes = 0, 0, None, None, None, 0

    def one(*arrays):
        *arrays, mask, parent_mask = arrays
        return route(*arrays, mask=mask, parent_mask=parent_mask)

    mapped = jax.jit(jax.vmap(one, (*axes, 0, 0)))
    assert_exact(mapped(*arrays, masks["mask"], masks["parent_mask"]), wanted)
    poses, activations, weights, routing_weights, *_ = arrays
    two = jnp.stack([weights, -weights]), jnp.stack([routing_weights, 2 * routing_weights])
    found = jax.jit(jax.vmap(capsjax.self_routing, (None, None, 0, 0)))(poses, activations, *two)
    for k in range(2):
        wanted = capsjax.self_routing(poses, activations, two[0][k], two[1][k])
        assert_exact([x[k] for x in found], wanted)


def test_scan_and_remat():
    poses, activations, weights, routing_weights, *_ = make(OPTIONS["vectors"])[0]
    routed = jax.checkpoint(capsjax.self_routing)

    @jax.jit
    def total(weights):
        def add(total, example):
            outputs, probabilities = routed(*example, weights, routing_weights)
            return total + (outputs.sum() * probabilities**2).sum(), None

        return jax.lax.scan(add, 0.0, (poses, activations))[0]

    def plain(weights):
        outputs, probabilities = capsjax.self_routing(poses, activations, weights, routing_weights)
        return (outputs.sum((1, 2))[:, None] * probabilities**2).sum()

    assert_exact(jax.value_and_grad(total)(weights), jax.value_and_grad(plain)(weights))


# A convolution: the dense routing on windows that are cut out by hand.


@pytest.mark.parametrize(("stride", "matrix"), [(1, False), (2, True)])
def test_a_convolution_routes_each_window(stride, matrix):
    rng = np.random.default_rng(1)
    kernel, rows = (2, 3), (2,) * matrix

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape))

    poses, activations = normal(2, 4, 5, 2, *rows, 3), jnp.asarray(rng.random((2, 4, 5, 2)))
    weights, bias = normal(*kernel, 2, 3, 4, 3), normal(*kernel, 2, 4)
    routing_weights = normal(*kernel, 2, *rows, 3, 4)
    h, w = (3, 3) if stride == 1 else (2, 2)
    prior = normal(2, h, w, *kernel, 2, 4).at[:, 0, 0, 1, 1, 1, 2].set(-jnp.inf)
    masks = {
        "mask": jnp.asarray(rng.random((2, 4, 5, 2)) < 0.8),
        "parent_mask": jnp.asarray(rng.random((2, h, w, 4)) < 0.8),
    }
    arrays = poses, activations, weights, routing_weights, bias, prior
    cotangents = normal(2, h, w, 4, *rows, 3), normal(2, h, w, 4)

    def cut(x):
        x = oracles.windows_of(x, kernel, stride, 1)
        return x.reshape(2 * h * w, 12, *x.shape[6:])

    def dense(poses, activations, weights, routing_weights, bias, prior):
        found = route(
            cut(poses),
            cut(activations),
            weights.reshape(12, *weights.shape[3:]),
            routing_weights.reshape(12, *routing_weights.shape[3:]),
            bias.reshape(12, 4),
            prior.reshape(-1, 12, 4),
            mask=cut(masks["mask"]),
            parent_mask=masks["parent_mask"].reshape(-1, 4),
            implementation="reference",
        )
        return tuple(x.reshape(2, h, w, *x.shape[1:]) for x in found)

    wanted = values_and_gradients(dense, arrays, cotangents)
    for implementation in ("xla", "reference"):
        convolution = partial(route, stride=stride, implementation=implementation, **masks)
        assert_exact(values_and_gradients(convolution, arrays, cotangents), wanted)


def test_an_empty_batch_and_several_batch_axes():
    poses, activations, weights, routing_weights, *_ = make(OPTIONS["vectors"])[0]
    run = jax.jit(capsjax.self_routing)
    assert run(poses[:0], activations[:0], weights, routing_weights)[0].shape == (0, 4, 3)
    together = run(poses, activations, weights, routing_weights)
    one = run(poses[1], activations[1], weights, routing_weights)
    assert_exact(one, [x[1] for x in together])
    in_two = run(poses[:, None], activations[:, None], weights, routing_weights)
    assert_exact([x[:, 0] for x in in_two], together)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_is_near(dtype):
    arrays, masks, cotangents = make(OPTIONS["all"])
    lower = tuple(jnp.asarray(x, dtype) for x in arrays)
    function = partial(route, **jax.tree.map(jnp.asarray, masks))
    cotangents = tuple(jnp.asarray(x, dtype) for x in cotangents)
    found = values_and_gradients(function, lower, cotangents)
    for a, w in zip(*map(jax.tree.leaves, (found, exact(OPTIONS["all"]))), strict=True):
        assert a.dtype == dtype
        tolerance = {"float32": 1e-5, "bfloat16": 1e-1}[dtype] * np.abs(w).max()
        np.testing.assert_allclose(np.asarray(a, np.float64), w, atol=tolerance)


@pytest.mark.parametrize("stride", [None, 1])
def test_a_symbolic_batch_exports(stride):
    places, kernel = ((), ()) if stride is None else ((4, 4), (2, 2))
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(*kernel, 6, 4, 3, 5)), jnp.float32)
    routing_weights = jnp.asarray(rng.normal(size=(*kernel, 6, 4, 3)), jnp.float32)

    def gradient(poses, activations):
        def loss(poses):
            found = capsjax.self_routing(
                poses, activations, weights, routing_weights, stride=stride
            )
            return sum((x**2).sum() for x in found)

        return jax.grad(loss)(poses)

    (batch,) = jax.export.symbolic_shape("b")
    shapes = (*places, 6, 4), (*places, 6)
    structs = [jax.ShapeDtypeStruct((batch, *shape), "float32") for shape in shapes]
    compiled = jax.jit(gradient)
    exported = jax.export.export(compiled, platforms=("cpu", "cuda", "tpu"))(*structs)
    arrays = [jnp.asarray(rng.random((3, *shape)), jnp.float32) for shape in shapes]
    np.testing.assert_allclose(exported.call(*arrays), compiled(*arrays), atol=1e-5)


OK = {
    "poses": (2, 6, 4),
    "activations": (2, 6),
    "weights": (6, 4, 3, 5),
    "routing_weights": (6, 4, 3),
}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"activations": (2, 5)},
            ValueError,
            r"activations must have shape \[..., I\] = \[2, 6\], got \(2, 5\)",
        ),
        (
            {"activations": (2, 6, 1, 1)},
            ValueError,
            r"activations must have shape \[..., I\], and poses one axis more",
        ),
        (
            {"routing_weights": (6, 3, 4)},
            ValueError,
            r"routing_weights must have shape \[I, P, J\] = \[6, 4, 3\], got \(6, 3, 4\)",
        ),
        (
            {"routing_bias": (3,)},
            ValueError,
            r"routing_bias must have shape \[I, J\] = \[6, 3\], got \(3,\)",
        ),
        ({"prior": (6, 4)}, ValueError, r"prior must have shape \[I, J\] or \[..., I, J\]"),
        ({"routing_weights": "none"}, TypeError, "routing_weights must be an array"),
        ({"activations": np.full((2, 6), 2.0)}, ValueError, r"activations must be in \[0, 1\]"),
        (
            {"routing_weights": np.ones((6, 4, 3), np.float16)},
            TypeError,
            "routing_weights must be float64, got float16",
        ),
        ({"stride": 0}, ValueError, "stride must be an integer of at least 1, got 0"),
        ({"stride": 1}, ValueError, r"activations must have shape \[..., H, W, I\]"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of"),
        ({"axis_name": "capsules"}, ValueError, "axis_name must name an axis of the enclosing"),
        ({"mask": np.ones(6)}, TypeError, "mask must be bool, got float64"),
        ({"parent_mask": np.ones(6, bool)}, ValueError, r"parent_mask must have shape \[J\] or"),
    ],
)
def test_refusals_are_one_sentence_with_argument_rule_and_value(changes, error, message):
    arguments = {
        name: jnp.ones(value) if isinstance(value, tuple) else value
        for name, value in {**OK, **changes}.items()
    }
    with pytest.raises(error, match=f"self_routing: {message}") as e:
        capsjax.self_routing(**arguments)
    assert "\n" not in str(e.value)
