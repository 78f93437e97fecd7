"""K-means routing against the float64 oracle, its limits, and its errors."""

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
    """What a call has beside poses."""

    num_iterations: int = 3
    similarity: str = "dot"
    weights: str = "IPJD"  # or "PJD", "PD"
    initial: str = ""  # or "IJ", "BIJ"
    prior: str = ""  # or "IJ", "BIJ"; some logits are -infinity, all of child 2
    mask: bool = False
    parent_mask: bool = False
    unit_means: bool = True
    carry_couplings: bool = False
    squash_power: float | None = 1.0
    gradient: str = "full"
    sizes: tuple[int, int, int, int, int] = (3, 5, 2, 4, 3)  # B, I, P, J, D


OPTIONS = {
    "T=1": Options(1),
    "T=1, initial logits": Options(1, initial="IJ"),
    "T=2, initial logits": Options(2, initial="BIJ", prior="IJ"),
    "T=3, shared by children": Options(weights="PJD"),
    "T=4, sums": Options(4, unit_means=False, squash_power=None),
    "one of each": Options(sizes=(1, 1, 1, 1, 1), squash_power=0.7),
    "one child": Options(2, "cosine", initial="IJ", sizes=(2, 1, 2, 3, 2)),
    "cosine": Options(3, "cosine", squash_power=0.2),
    "cosine, last": Options(3, "cosine", initial="BIJ", gradient="last"),
    "cosine, shared by children": Options(3, "cosine", "PJD"),
    "cosine, shared by all": Options(3, "cosine", "PD", "BIJ"),
    "shared by all": Options(2, weights="PD", prior="IJ"),
    "all": Options(3, "cosine", "IPJD", "IJ", "BIJ", True, True, squash_power=2.0),
    "carried": Options(3, "cosine", "PD", "BIJ", "", True, True, False, True, 0.2, "last"),
    "carried, prior": Options(3, "dot", "IPJD", "IJ", "BIJ", True, True, True, True, 1.0, "last"),
    "carried, T=1": Options(1, initial="IJ", carry_couplings=True, gradient="last"),
}
# Cases in which the definition with stored votes is compared too.
STORED = [
    "T=2, initial logits",
    "T=4, sums",
    "cosine, last",
    "cosine, shared by all",
    "all",
    "carried, prior",
]


def make(options):
    """Arrays (poses, weights, initial logits, prior, temperature), masks, and the cotangent."""
    rng = np.random.default_rng(0)
    sizes = dict(zip("BIPJD", options.sizes, strict=True))

    def normal(letters, scale=1.0):
        return rng.normal(size=[sizes[x] for x in letters]) * scale

    prior = normal(options.prior) if options.prior else None
    if prior is not None:
        prior[..., 1, 1:3] = prior[..., 2, :] = -np.inf
    arrays = (
        normal("BIP"),
        normal(options.weights, 0.5),
        normal(options.initial) if options.initial else None,
        prior,
        np.asarray(1.5),
    )
    mask = rng.random(options.sizes[:2]) < 0.7 if options.mask else None
    parent_mask = None
    if options.parent_mask:
        parent_mask = np.ones((sizes["B"], sizes["J"]), bool)
        parent_mask[0, 3] = parent_mask[1, 0] = False
    return arrays, {"mask": mask, "parent_mask": parent_mask}, normal("BJD")


SHARED = ("similarity", "unit_means", "carry_couplings", "squash_power", "gradient")


def settings_of(options):
    found = {name: getattr(options, name) for name in SHARED}
    return {"num_iterations": options.num_iterations, **found}


@cache
def exact(options):
    """The oracle's results and gradients."""
    arrays, masks, cotangent = make(options)
    kept = np.ones(options.sizes[:2]) if masks["mask"] is None else masks["mask"]
    settings = settings_of(options)

    def run(poses, *arrays):
        poses = (poses * kept[..., None])[:, :, None]
        found = oracles.kmeans(poses, *arrays, parent_mask=masks["parent_mask"], **settings)
        return (found[:, :, 0],)

    (outputs,), gradients = oracles.with_gradients(run, arrays, (cotangent,))
    return outputs, gradients


def route(poses, weights, initial_logits, prior, temperature, **settings):
    return capsjax.kmeans_routing(
        poses,
        weights,
        initial_logits=initial_logits,
        prior=prior,
        temperature=temperature,
        **settings,
    )


@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, SMALL_TILES) for name in OPTIONS] + [(name, "reference") for name in STORED],
    ids=[*OPTIONS, *(f"{name}, reference" for name in STORED)],
)
def test_options_match_the_oracle(name, implementation):
    options = OPTIONS[name]
    arrays, masks, cotangent = jax.tree.map(jnp.asarray, make(options))
    function = partial(route, implementation=implementation, **settings_of(options), **masks)
    assert_exact(values_and_gradients(function, arrays, cotangent), exact(options))


def test_padding_of_nan_changes_nothing():
    options = OPTIONS["all"]
    (poses, *others), masks, cotangent = jax.tree.map(jnp.asarray, make(options))
    poses = jnp.where(masks["mask"][..., None], poses, jnp.nan)
    function = partial(route, **settings_of(options), **masks)
    found = values_and_gradients(function, (poses, *others), cotangent)
    assert_exact(found, exact(options))


def test_a_masked_parent_is_as_if_it_were_not_there():
    poses, weights, *_ = make(OPTIONS["T=1"])[0]
    there = np.array([True, False, True, True])
    found = capsjax.kmeans_routing(poses, weights, parent_mask=there, temperature=2)
    alone = capsjax.kmeans_routing(poses, weights[:, :, there], temperature=2)
    assert_exact(found[:, there], alone)
    assert not np.any(found[:, 1])


@pytest.mark.parametrize("power", [1.0, 0.2, None])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_values_and_gradients_of_zero_votes_are_finite(similarity, power):
    poses, weights = jnp.zeros((2, 5, 3)), jnp.ones((5, 3, 4, 5))
    function = partial(capsjax.kmeans_routing, similarity=similarity, squash_power=power)
    outputs, gradients = values_and_gradients(function, (poses, weights), jnp.ones((2, 4, 5)))
    assert not np.any(outputs)
    assert all(np.all(np.isfinite(x)) for x in gradients)


def test_initial_logits_count_once_and_a_prior_always():
    (poses, weights, initial, *_), _, _ = make(OPTIONS["T=1, initial logits"])
    once = capsjax.kmeans_routing(poses, weights, initial_logits=initial, num_iterations=1)
    assert_exact(once, capsjax.kmeans_routing(poses, weights, prior=initial, num_iterations=1))
    twice = capsjax.kmeans_routing(poses, weights, initial_logits=initial, num_iterations=2)
    always = capsjax.kmeans_routing(poses, weights, prior=initial, num_iterations=2)
    assert np.abs(twice - always).max() > 1e-2


def test_vmap_over_examples_and_over_weights():
    options = OPTIONS["all"]
    arrays, masks, _ = jax.tree.map(jnp.asarray, make(options))

    def one(*arrays):
        *arrays, mask, parent_mask = arrays
        return route(*arrays, mask=mask, parent_mask=parent_mask, **settings_of(options))

    mapped = jax.jit(jax.vmap(one, (0, None, None, 0, None, 0, 0)))
    assert_exact(mapped(*arrays, *masks.values()), exact(options)[0])
    poses, weights = arrays[:2]
    routed = capsjax.kmeans_routing
    found = jax.jit(jax.vmap(routed, (None, 0)))(poses, jnp.stack([weights, -2 * weights]))
    assert_exact(found[0], routed(poses, weights))
    assert_exact(found[1], routed(poses, -2 * weights))


def test_scan_and_remat():
    (poses, weights, *_), _, cotangent = make(OPTIONS["T=1"])
    poses, weights, cotangent = map(jnp.asarray, (poses, weights, cotangent))
    routed = jax.checkpoint(capsjax.kmeans_routing)

    def scanned(weights):
        return jax.lax.scan(lambda _, u: (None, routed(u, weights)), None, poses)[1]

    def together(weights):
        return capsjax.kmeans_routing(poses, weights)

    found = values_and_gradients(scanned, (weights,), cotangent)
    assert_exact(found, values_and_gradients(together, (weights,), cotangent))


def test_an_empty_batch_and_several_batch_axes():
    (poses, weights, initial, prior, _), *_ = make(OPTIONS["T=2, initial logits"])
    run = jax.jit(
        lambda u, logits: capsjax.kmeans_routing(u, weights, initial_logits=logits, prior=prior)
    )
    assert run(poses[:0], initial[:0]).shape == (0, 4, 3)
    carried = {"initial_logits": initial[:0], "carry_couplings": True, "gradient": "last"}
    assert capsjax.kmeans_routing(poses[:0], weights[0], **carried).shape == (0, 4, 3)
    shared = capsjax.kmeans_routing(poses[:0], weights[0, :, 0], initial_logits=initial[:0])
    assert shared.shape == (0, 4, 3)
    together = run(poses, initial)
    assert_exact(run(poses[1], initial[1]), together[1])
    assert_exact(run(poses[:, None], initial[:, None])[:, 0], together)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lower_precision_is_near(dtype):
    options = OPTIONS["all"]
    (*arrays, temperature), masks, cotangent = jax.tree.map(jnp.asarray, make(options))
    arrays = tuple(x.astype(dtype) for x in arrays)
    function = partial(route, temperature=float(temperature), **settings_of(options), **masks)
    found = values_and_gradients(function, arrays, cotangent.astype(dtype))
    outputs, (*gradients, _) = exact(options)
    wanted = outputs, gradients
    for a, w in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert a.dtype == dtype
        tolerance = {"float32": 1e-5, "bfloat16": 1e-1}[dtype] * np.abs(w).max()
        np.testing.assert_allclose(np.asarray(a, np.float64), w, atol=tolerance)


@pytest.mark.parametrize("name", ["cosine", "carried"])
def test_a_symbolic_batch_exports(name):
    options = OPTIONS[name]
    (poses, weights, initial, *_), _, _ = make(options)
    weights = jnp.asarray(weights, jnp.float32)

    def gradient(poses, *initial):
        def loss(poses):
            (logits,) = initial or (None,)
            routed = route(poses, weights, logits, None, 2.0, **settings_of(options))
            return (routed**2).sum()

        return jax.grad(loss)(poses)

    arrays = [jnp.asarray(x, jnp.float32) for x in (poses, initial) if x is not None]
    (batch,) = jax.export.symbolic_shape("b")
    structs = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), "float32") for x in arrays]
    compiled = jax.jit(gradient)
    exported = jax.export.export(compiled, platforms=("cpu", "cuda", "tpu"))(*structs)
    np.testing.assert_allclose(exported.call(*arrays), compiled(*arrays), atol=1e-5)


OK = {"poses": np.ones((2, 6, 4)), "weights": np.ones((6, 4, 3, 5))}
SHARED_BY_ALL = {"weights": np.ones((4, 5))}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"similarity": "pearson"},
            ValueError,
            "similarity must be one of dot, cosine, got 'pearson'",
        ),
        (
            {"carry_couplings": True},
            ValueError,
            "carry_couplings must be False unless gradient is 'last', .*, got gradient 'full'",
        ),
        ({"squash_power": 0}, ValueError, "squash_power must be a number above 0, got 0"),
        (
            {"temperature": np.ones(3)},
            ValueError,
            r"temperature must be a number, got an array of shape \(3,\)",
        ),
        ({"temperature": "hot"}, TypeError, "temperature must be an array"),
        (
            {"initial_logits": np.ones((5, 3))},
            ValueError,
            r"initial_logits must have shape \[I, J\] or \[..., I, J\] = \[6, 3\], got \(5, 3\)",
        ),
        (
            {"initial_logits": np.ones((3, 6, 3))},
            ValueError,
            r"initial_logits must have shape .* = \[2, 6, 3\], got \(3, 6, 3\)",
        ),
        (
            {**SHARED_BY_ALL, "initial_logits": np.ones((5, 3))},
            ValueError,
            r"initial_logits must have shape .* = \[6, 3\], got \(5, 3\)",
        ),
        (
            {"initial_logits": np.ones((6, 3), np.float16)},
            TypeError,
            "initial_logits must be float64, got float16",
        ),
        (SHARED_BY_ALL, ValueError, "prior must distinguish output capsules"),
        ({"num_iterations": 0}, ValueError, "num_iterations must be an integer of at least 1"),
        ({"axis_name": "capsules"}, ValueError, "axis_name must name an axis of the enclosing"),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of"),
    ],
)
def test_refusals_are_one_sentence_with_argument_rule_and_value(changes, error, message):
    with pytest.raises(error, match=f"kmeans_routing: {message}") as e:
        capsjax.kmeans_routing(**OK | changes)
    assert "\n" not in str(e.value)
