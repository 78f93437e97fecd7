"""Routing by inverted dot-product attention against the float64 oracle, its limits and errors."""

from functools import cache, partial
from typing import NamedTuple

import exactness
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_oracles as oracles
from exactness import values_and_gradients

import capsjax
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Implementation

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

assert_exact = partial(exactness.assert_exact, atol=1e-11)
SMALL_TILES = Implementation("xla", XlaConfig(children=4, examples=2))


class Options(NamedTuple):
    """What a call has beside poses."""

    num_iterations: int = 2
    matrix: bool = False
    weights: str = "IPJE"  # or "PJE", "PE"
    affine: bool = True
    prior: str = ""  # or "IJ", "BIJ"; some logits are -infinity, all of child 2
    mask: bool = False
    parent_mask: bool = False
    parents: bool = False  # a single step from these poses
    gradient: str = "full"
    sizes: tuple[int, int, int, int, int, int] = (3, 5, 2, 2, 4, 3)  # B, I, R, P, J, E


OPTIONS = {
    "T=1": Options(1),
    "T=2, plain": Options(2, affine=False),
    "T=3, matrices": Options(3, True),
    "T=4, prior": Options(4, prior="IJ"),
    "one of each": Options(3, affine=False, sizes=(1, 1, 1, 1, 1, 1)),
    "one child": Options(2, sizes=(2, 1, 1, 2, 3, 2)),
    "last": Options(3, gradient="last"),
    "shared by children": Options(3, True, "PJE"),
    "shared by all": Options(2, weights="PE", prior="BIJ"),
    "all": Options(3, True, "IPJE", True, "BIJ", True, True),
    "all, last": Options(2, True, "PJE", True, "IJ", True, True, gradient="last"),
    "step": Options(1, affine=False, parents=True),
    "step, all": Options(1, True, "IPJE", True, "BIJ", True, True, True),
    "step, last": Options(1, parents=True, gradient="last"),
}
# Cases in which the definition with stored votes is compared too.
STORED = ["T=4, prior", "one of each", "last", "all", "step, all"]


def make(options):
    """Arrays (poses, weights, scale, offset, prior, parents), masks, and the cotangent."""
    rng = np.random.default_rng(0)
    sizes = dict(zip("BIRPJE", options.sizes, strict=True))
    rows = "R" if options.matrix else ""

    def normal(letters, scale=1.0):
        return rng.normal(size=[sizes[x] for x in letters]) * scale

    prior = normal(options.prior) if options.prior else None
    if prior is not None:
        prior[..., 1, 1:3] = prior[..., 2, :] = -np.inf
    arrays = (
        normal(f"BI{rows}P"),
        normal(options.weights, 0.5),
        1 + normal(f"{rows}E", 0.3) if options.affine else None,
        normal(f"{rows}E", 0.3) if options.affine else None,
        prior,
        normal(f"BJ{rows}E") if options.parents else None,
    )
    mask = rng.random(options.sizes[:2]) < 0.7 if options.mask else None
    parent_mask = None
    if options.parent_mask:
        parent_mask = np.ones((sizes["B"], sizes["J"]), bool)
        parent_mask[0, 3] = parent_mask[1, 0] = False
    return arrays, {"mask": mask, "parent_mask": parent_mask}, normal(f"BJ{rows}E")


@cache
def exact(options):
    """The oracle's results and gradients."""
    arrays, masks, cotangent = make(options)
    kept = np.ones(options.sizes[:2]) if masks["mask"] is None else masks["mask"]

    def run(poses, weights, scale, offset, prior, parents):
        if not options.matrix:
            poses = poses[:, :, None]
            scale, offset = (None if x is None else x[None] for x in (scale, offset))
            parents = None if parents is None else parents[:, :, None]
        found = oracles.inverted_attention(
            poses * kept[..., None, None],
            weights,
            scale,
            offset,
            prior,
            parents,
            num_iterations=options.num_iterations,
            parent_mask=masks["parent_mask"],
            gradient=options.gradient,
        )
        return (found if options.matrix else found[:, :, 0],)

    (outputs,), gradients = oracles.with_gradients(run, arrays, (cotangent,))
    return outputs, gradients


def route(poses, weights, scale, offset, prior, parents, *, num_iterations=None, **settings):
    settings |= {"scale": scale, "offset": offset, "prior": prior}
    if parents is not None:
        return capsjax.inverted_attention_step(poses, weights, parents, **settings)
    return capsjax.inverted_attention_routing(
        poses, weights, num_iterations=num_iterations, **settings
    )


def settings_of(options, masks):
    return {
        "num_iterations": options.num_iterations,
        "matrix": options.matrix,
        "gradient": options.gradient,
        **jax.tree.map(jnp.asarray, masks),
    }


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, SMALL_TILES) for name in OPTIONS] + [(name, "reference") for name in STORED],
    ids=[*OPTIONS, *(f"{name}, reference" for name in STORED)],
)
def test_options_match_the_oracle(name, implementation):
    options = OPTIONS[name]
    arrays, masks, cotangent = make(options)
    arrays, cotangent = jax.tree.map(jnp.asarray, (arrays, cotangent))
    function = partial(route, implementation=implementation, **settings_of(options, masks))
    assert_exact(values_and_gradients(function, arrays, cotangent), exact(options))


@pytest.mark.parametrize("name", ["all", "step, all"])
def test_nan_of_masked_capsules_changes_nothing(name):
    options = OPTIONS[name]
    arrays, masks, cotangent = make(options)
    (poses, *others, parents), cotangent = jax.tree.map(jnp.asarray, (arrays, cotangent))
    poses = jnp.where(masks["mask"][..., None, None], poses, jnp.nan)
    if parents is not None:
        parents = jnp.where(masks["parent_mask"][..., None, None], parents, jnp.nan)
    function = partial(route, **settings_of(options, masks))
    found = values_and_gradients(function, (poses, *others, parents), cotangent)
    assert_exact(found, exact(options))


def test_a_masked_parent_is_as_if_it_were_not_there():
    (poses, weights, *_), _, _ = make(OPTIONS["T=3, matrices"])
    there = np.array([True, False, True, True])
    routed = partial(capsjax.inverted_attention_routing, matrix=True, num_iterations=3)
    found = routed(poses, weights, parent_mask=there)
    assert_exact(found[:, there], routed(poses, weights[:, :, there]))
    assert not np.any(found[:, 1])


def test_an_iteration_is_a_step():
    (poses, weights, scale, offset, *_), _, _ = make(OPTIONS["T=1"])
    affine = {"scale": scale, "offset": offset}
    routed = partial(capsjax.inverted_attention_routing, poses, weights, **affine)
    first = routed(num_iterations=1)
    second = capsjax.inverted_attention_step(poses, weights, first, **affine)
    assert_exact(second, routed(num_iterations=2))
    third = capsjax.inverted_attention_step(poses, weights, second, **affine)
    assert_exact(third, routed(num_iterations=3))
    # A step from zeros has uniform couplings, as the first iteration.
    assert_exact(
        capsjax.inverted_attention_step(poses, weights, jnp.zeros_like(first), **affine), first
    )


def test_vmap_over_examples_and_over_weights():
    options = OPTIONS["step, all"]
    arrays, masks, _ = jax.tree.map(jnp.asarray, make(options))
    settings = settings_of(options, masks)
    masks = settings.pop("mask"), settings.pop("parent_mask")

    def one(*arrays):
        *arrays, mask, parent_mask = arrays
        return route(*arrays, mask=mask, parent_mask=parent_mask, **settings)

    mapped = jax.jit(jax.vmap(one, (0, None, None, None, 0, 0, 0, 0)))
    assert_exact(mapped(*arrays, *masks), exact(options)[0])
    poses, weights = arrays[:2]
    routed = partial(capsjax.inverted_attention_routing, matrix=True)
    found = jax.jit(jax.vmap(routed, (None, 0)))(poses, jnp.stack([weights, -2 * weights]))
    assert_exact(found[0], routed(poses, weights))
    assert_exact(found[1], routed(poses, -2 * weights))


def test_scan_over_steps_and_remat():
    (poses, weights, *_), _, cotangent = make(OPTIONS["T=1"])
    poses, weights, cotangent = map(jnp.asarray, (poses, weights, cotangent))

    def scanned(weights):
        step = jax.checkpoint(capsjax.inverted_attention_step)
        first = capsjax.inverted_attention_routing(poses, weights, num_iterations=1)

        def once(parents, _):
            return step(poses, weights, parents), None

        return jax.lax.scan(once, first, None, length=2)[0]

    def together(weights):
        return capsjax.inverted_attention_routing(poses, weights, num_iterations=3)

    found = values_and_gradients(scanned, (weights,), cotangent)
    assert_exact(found, values_and_gradients(together, (weights,), cotangent))


def test_an_empty_batch_and_several_batch_axes():
    (poses, weights, *_, parents), _, _ = make(OPTIONS["step"])
    run = jax.jit(capsjax.inverted_attention_step)
    assert run(poses[:0], weights, parents[:0]).shape == (0, 4, 3)
    together = run(poses, weights, parents)
    assert_exact(run(poses[1], weights, parents[1]), together[1])
    assert_exact(run(poses[:, None], weights, parents[:, None])[:, 0], together)


# A convolution: the dense routing on windows that are cut out by hand.


@pytest.mark.parametrize(("stride", "matrix", "step"), [(1, False, False), (2, True, True)])
def test_a_convolution_routes_each_window(stride, matrix, step):
    rng = np.random.default_rng(1)
    kernel, rows = (2, 3), (2,) * matrix

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape))

    h, w = (3, 3) if stride == 1 else (2, 2)
    arrays = (
        normal(2, 4, 5, 2, *rows, 3),
        normal(*kernel, 2, 3, 4, 3) / 2,
        1 + normal(*rows, 3) / 3,
        normal(*rows, 3) / 3,
        normal(2, h, w, *kernel, 2, 4).at[:, 0, 0, 1, 1, 1, 2].set(-jnp.inf),
        normal(2, h, w, 4, *rows, 3) if step else None,
    )
    settings = {
        "num_iterations": 2,
        "matrix": matrix,
        "mask": jnp.asarray(rng.random((2, 4, 5, 2)) < 0.8),
        "parent_mask": jnp.asarray(rng.random((2, h, w, 4)) < 0.8),
    }
    cotangent = normal(2, h, w, 4, *rows, 3)

    def cut(x):
        x = oracles.windows_of(x, kernel, stride, 1)
        return x.reshape(2 * h * w, 12, *x.shape[6:])

    def dense(poses, weights, scale, offset, prior, parents):
        found = route(
            cut(poses),
            weights.reshape(12, *weights.shape[3:]),
            scale,
            offset,
            prior.reshape(-1, 12, 4),
            None if parents is None else parents.reshape(-1, *parents.shape[3:]),
            num_iterations=2,
            matrix=matrix,
            mask=cut(settings["mask"]),
            parent_mask=settings["parent_mask"].reshape(-1, 4),
            implementation="reference",
        )
        return found.reshape(cotangent.shape)

    wanted = values_and_gradients(dense, arrays, cotangent)
    for implementation in ("xla", "reference"):
        convolution = partial(route, stride=stride, implementation=implementation, **settings)
        assert_exact(values_and_gradients(convolution, arrays, cotangent), wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_is_near(dtype):
    options = OPTIONS["all"]
    arrays, masks, cotangent = make(options)
    arrays = tuple(None if x is None else jnp.asarray(x, dtype) for x in arrays)
    function = partial(route, **settings_of(options, masks))
    found = values_and_gradients(function, arrays, jnp.asarray(cotangent, dtype))
    for a, w in zip(*map(jax.tree.leaves, (found, exact(options))), strict=True):
        assert a.dtype == dtype
        tolerance = {"float32": 1e-5, "bfloat16": 1e-1}[dtype] * np.abs(w).max()
        np.testing.assert_allclose(np.asarray(a, np.float64), w, atol=tolerance)


@pytest.mark.parametrize("stride", [None, 1])
def test_a_symbolic_batch_exports(stride):
    places, kernel, windows = ((), (), ()) if stride is None else ((4, 4), (2, 2), (3, 3))
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(*kernel, 6, 4, 3, 5)), jnp.float32)

    def gradient(poses, parents):
        def loss(poses, parents):
            found = capsjax.inverted_attention_step(poses, weights, parents, stride=stride)
            return (found**2)[..., :2].sum()

        return jax.grad(loss, 1)(poses, parents)

    (batch,) = jax.export.symbolic_shape("b")
    shapes = (*places, 6, 4), (*windows, 3, 5)
    structs = [jax.ShapeDtypeStruct((batch, *shape), "float32") for shape in shapes]
    compiled = jax.jit(gradient)
    exported = jax.export.export(compiled, platforms=("cpu", "cuda", "tpu"))(*structs)
    arrays = [jnp.asarray(rng.random((3, *shape)), jnp.float32) for shape in shapes]
    np.testing.assert_allclose(exported.call(*arrays), compiled(*arrays), atol=1e-5)


OK = {"poses": np.ones((2, 6, 4)), "weights": np.ones((6, 4, 3, 5))}
SCALAR = {"weights": np.ones((6, 4, 3, 1))}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": np.ones(4)}, ValueError, r"scale must have shape \[D\] = \[5\], got \(4,\)"),
        (
            {"offset": np.ones(5), "poses": np.ones((2, 6, 2, 4)), "matrix": True},
            ValueError,
            r"offset must have shape \[R, E\] = \[2, 5\], got \(5,\)",
        ),
        (
            {**SCALAR, "scale": np.ones(1)},
            ValueError,
            "scale must be None for poses of length 1, which are not normalised, got an array",
        ),
        ({"offset": np.ones(5, np.float16)}, TypeError, "offset must be float64, got float16"),
        ({"num_iterations": 0}, ValueError, "num_iterations must be an integer of at least 1"),
        ({"gradient": "none"}, ValueError, "gradient must be one of full, last, got 'none'"),
        ({"matrix": True}, ValueError, r"weights must have shape \[I, P, J, E\] = \[2, 4"),
        ({"stride": 1}, ValueError, r"poses must have shape \[..., H, W, I, P\]"),
        ({"weights": np.ones((4, 5))}, ValueError, "prior must distinguish output capsules"),
        ({"axis_name": "capsules"}, ValueError, "axis_name must name an axis of the enclosing"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of"),
    ],
)
def test_refusals_are_one_sentence_with_argument_rule_and_value(changes, error, message):
    with pytest.raises(error, match=f"inverted_attention_routing: {message}") as e:
        capsjax.inverted_attention_routing(**OK | changes)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("parents", "error", "message"),
    [
        (
            np.ones((3, 5)),
            ValueError,
            r"parents must have shape \[..., J, D\] = \[2, 3, 5\], got \(3, 5\)",
        ),
        (np.ones((2, 3, 5), np.int32), TypeError, "parents must be float64, got int32"),
        (None, TypeError, "parents must be an array, got None"),
    ],
)
def test_refused_parents(parents, error, message):
    with pytest.raises(error, match=f"inverted_attention_step: {message}"):
        capsjax.inverted_attention_step(**OK, parents=parents)
