"""The whole procedure with every option, in plain JAX, against the float64 oracle."""

from functools import cache, partial
from typing import Any, NamedTuple

import exactness
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import capsjax
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Implementation

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

assert_exact = partial(exactness.assert_exact, rtol=1e-11, atol=1e-13)


class Options(NamedTuple):
    """What a call has beside poses and weights."""

    prior: str = ""  # or "IJ", "BIJ"
    infinite: bool = False  # some logits of the prior are -infinity
    parent_mask: str = ""  # or "J", "BJ"
    mask: bool = False
    leaky: bool = False
    weights: str = "IPJD"  # or "PJD", "PD"
    bias: bool = True
    num_iterations: int = 3
    gradient: str = "full"
    sizes: tuple[int, int, int, int, int] = (3, 7, 4, 5, 6)  # B, I, P, J, D


OPTIONS = {
    "T=1": Options(bias=False, num_iterations=1),
    "T=1, last": Options(num_iterations=1, gradient="last"),
    "T=1, prior": Options("IJ", num_iterations=1),
    "T=2": Options(num_iterations=2),
    "T=5": Options("IJ", True, mask=True, num_iterations=5),
    "last": Options("IJ", mask=True, gradient="last"),
    "one of each": Options("IJ", bias=False, sizes=(1, 1, 1, 1, 1)),
    "prior of each example": Options("BIJ", infinite=True, mask=True, bias=False),
    "mask of parents": Options(parent_mask="J"),
    "a child without parents": Options("IJ", infinite=True, parent_mask="BJ"),
    "leaky": Options(leaky=True),
    "leaky, T=1": Options(leaky=True, num_iterations=1),
    "shared by children": Options(weights="PJD"),
    "shared by children, T=1": Options(weights="PJD", num_iterations=1),
    "shared by children, last": Options(weights="PJD", gradient="last"),
    "shared by all": Options("IJ", weights="PD"),
    "all": Options("BIJ", True, "BJ", True, True),
    "all, last": Options("IJ", True, "BJ", True, True, gradient="last"),
    "all, shared by children": Options("BIJ", True, "BJ", True, True, "PJD"),
    "all, shared by all": Options("BIJ", True, "BJ", True, True, "PD", num_iterations=2),
}
SMALL_TILES = Implementation("xla", XlaConfig(children=4, examples=2))


class Problem(NamedTuple):
    """The arrays of a call."""

    arrays: tuple[jax.Array, jax.Array, jax.Array | None, jax.Array | None]  # … prior, bias
    cotangent: jax.Array
    settings: dict[str, Any]


def make(options):
    rng = np.random.default_rng(0)
    sizes = dict(zip("BIPJD", options.sizes, strict=True))

    def normal(scale, letters):
        return rng.normal(size=[sizes[x] for x in letters]) * scale

    poses, weights, bias = normal(0.5, "BIP"), normal(0.5, options.weights), normal(0.1, "JD")
    prior = normal(1, options.prior) if options.prior else None
    if options.infinite:
        prior[..., 1, 2] = prior[..., 3, :] = prior[..., 5, :4] = -np.inf
    parent_mask = None
    if options.parent_mask:
        parent_mask = np.ones([sizes[x] for x in options.parent_mask], bool)
        parent_mask[..., 4] = False  # which leaves child 5 without a parent
        if options.parent_mask == "BJ":
            parent_mask[0, 1] = False
    mask = rng.random(options.sizes[:2]) < 0.7 if options.mask else None
    arrays = poses, weights, prior, bias if options.bias else None
    settings = {
        "mask": mask,
        "parent_mask": parent_mask,
        "leaky": options.leaky,
        "num_iterations": options.num_iterations,
    }
    arrays = tuple(None if x is None else jnp.asarray(x) for x in arrays)
    return Problem(arrays, jnp.asarray(normal(1, "BJD")), settings)


@cache
def exact(options):
    """The oracle's outputs, couplings and gradients."""
    (poses, weights, prior, bias), cotangent, settings = make(options)
    batch, children, length, parents, depth = options.sizes
    mask, parent_mask = settings.pop("mask"), settings.pop("parent_mask")
    kept = np.ones((batch, children)) if mask is None else np.asarray(mask)
    own = {"IPJD": weights, "PJD": weights[None], "PD": weights[None, :, None]}[options.weights]
    if parent_mask is not None:
        parent_mask = np.broadcast_to(parent_mask, (batch, parents))
    outputs, couplings, gradients = oracles.dynamic_routing(
        poses * kept[..., None],
        np.broadcast_to(own, (children, length, parents, depth)),
        prior,
        bias,
        cotangent,
        gradient=options.gradient,
        parent_mask=parent_mask,
        **settings,
    )
    d_poses, d_weights, *others = gradients
    shared = {"IPJD": (), "PJD": (0,), "PD": (0, 2)}[options.weights]
    gradients = d_poses * kept[..., None], d_weights.sum(shared), *others
    return outputs, couplings * kept[..., None], gradients


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("implementation", ["reference", SMALL_TILES], ids=["reference", "xla"])
def test_options_match_the_oracle(name, implementation):
    options = OPTIONS[name]
    arrays, cotangent, settings = make(options)

    @jax.jit
    def run(*arrays):
        def route(poses, weights, prior, bias):
            return capsjax.dynamic_routing(
                poses,
                weights,
                prior=prior,
                bias=bias,
                gradient=options.gradient,
                implementation=implementation,
                **settings,
            )

        outputs, vjp = jax.vjp(route, *arrays)
        return outputs, vjp(cotangent)

    outputs, _, gradients = exact(options)
    assert_exact(run(*arrays), (outputs, gradients))


@pytest.mark.parametrize("name", ["all", "all, shared by children", "all, shared by all"])
def test_options_match_the_oracle_under_vmap(name):
    options = OPTIONS[name]
    (*arrays, bias), cotangent, settings = make(options)
    mask, parent_mask = settings.pop("mask"), settings.pop("parent_mask")

    def route(poses, weights, prior, mask, parent_mask):
        return capsjax.dynamic_routing(
            poses, weights, prior=prior, bias=bias, mask=mask, parent_mask=parent_mask, **settings
        )

    @jax.jit
    def run(*arrays):
        function = jax.vmap(route, (0, None, 0, 0, 0))
        outputs, vjp = jax.vjp(lambda *arrays: function(*arrays, mask, parent_mask), *arrays)
        return outputs, vjp(cotangent)

    outputs, _, gradients = exact(options)
    assert_exact(run(*arrays), (outputs, gradients[:3]))


@pytest.mark.parametrize(
    "name",
    [
        "T=5",
        "a child without parents",
        "leaky, T=1",
        "shared by all",
        "all",
        "all, shared by children",
        "all, shared by all",
    ],
)
def test_couplings_and_given_votes_match_the_oracle(name):
    options = OPTIONS[name]
    (poses, weights, prior, bias), _, settings = make(options)
    settings |= {"prior": prior, "bias": bias}
    outputs, couplings, _ = exact(options)
    found = jax.jit(lambda u, w: capsjax.routing_couplings(u, w, **settings))(poses, weights)
    assert_exact(found, couplings)
    letters = {"IPJD": "bip,ipjd->bijd", "PJD": "bip,pjd->bijd", "PD": "bip,pd->bid"}
    votes = jnp.einsum(letters[options.weights], poses, weights)
    votes = votes if votes.ndim == 4 else votes[:, :, None]
    votes = jnp.broadcast_to(votes, couplings.shape[1:] + votes.shape[-1:])
    route = jax.jit(lambda votes: capsjax.dynamic_routing_from_votes(votes, **settings))
    assert_exact(route(votes), outputs)


def test_shared_weights_take_any_number_of_children():
    weights = jnp.ones((4, 3, 5)) * 0.1
    for children in (1, 6, 9):
        assert capsjax.dynamic_routing(jnp.ones((2, children, 4)), weights).shape == (2, 3, 5)


def test_shared_weights_make_no_votes():
    batch, children, parents, depth = 16, 512, 64, 64
    poses = jax.ShapeDtypeStruct((batch, children, 16), "float32")
    weights = jax.ShapeDtypeStruct((16, parents, depth), "float32")
    run = jax.value_and_grad(lambda u, w: capsjax.dynamic_routing(u, w).sum(), (0, 1))
    needed = jax.jit(run).lower(poses, weights).compile().memory_analysis().temp_size_in_bytes
    assert needed < batch * children * parents * depth * 4 / 4


def test_options_with_other_leading_axes():
    (poses, weights, prior, bias), _, settings = make(OPTIONS["all"])
    route = jax.jit(lambda u, **arrays: capsjax.dynamic_routing(u, weights, bias=bias, **arrays))
    arrays = {"prior": prior, **{name: settings[name] for name in ("mask", "parent_mask")}}
    flat = route(poses, **arrays)

    def twice(x):
        return jnp.stack([x, x[::-1]])

    together = route(twice(poses), **{name: twice(x) for name, x in arrays.items()})
    assert_exact(together, twice(flat))
    assert_exact(route(poses[1], **{name: x[1] for name, x in arrays.items()}), flat[1])


def test_a_float16_prior_of_minus_infinity():
    with jax.enable_x64(False):
        poses, weights = jnp.ones((2, 3, 4), jnp.float16), jnp.ones((3, 4, 2, 5), jnp.float16)
        prior = jnp.full((3, 2), -jnp.inf, jnp.float16).at[0].set(0)
        run = jax.grad(lambda p: capsjax.dynamic_routing(poses, weights, prior=p).sum())
        assert np.all(np.isfinite(run(prior)))
        alone = capsjax.dynamic_routing(poses[:, :1], weights[:1])
        routed = capsjax.dynamic_routing(poses, weights, prior=prior)
        np.testing.assert_allclose(routed, alone, atol=2e-3)


OK = {"poses": (2, 6, 4), "weights": (6, 4, 3, 5)}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"axis_name": ["data"]}, ValueError, r"axis_name must name an axis .*, got \['data'\]"),
        ({"poses": [[1.0, 2.0], [3.0]]}, TypeError, "poses must be an array, or nested lists"),
        ({"poses": None}, TypeError, "poses must be an array, .* got a NoneType"),
        ({"mask": "all"}, TypeError, "mask must be an array, .* got a str"),
        ({"prior": np.ones(3)}, ValueError, r"prior must have shape \[I, J\] or \[..., I, J\]"),
        ({"prior": np.float32(1)}, ValueError, r"prior must have shape \[I, J\] or"),
        ({"prior": np.ones((3, 6, 3))}, ValueError, r"= \[2, 6, J\], got \(3, 6, 3\)"),
        ({"prior": np.ones((6, 4))}, ValueError, "with J = 3, got \\(6, 4\\)"),
        ({"prior": np.ones((6, 3), int)}, TypeError, "prior must be float32, got int"),
        ({"mask": np.ones((2, 2, 6), bool)}, ValueError, r"mask must have shape \[I\] or"),
        ({"parent_mask": np.ones(6, bool)}, ValueError, r"parent_mask must have shape \[J\] or"),
        ({"parent_mask": np.ones(3)}, TypeError, "parent_mask must be bool, got float"),
        (
            {"weights": np.ones((4, 5), np.float32)},
            ValueError,
            "prior must distinguish output capsules that share weights",
        ),
        (
            {"weights": np.ones((5, 3, 5), np.float32)},
            ValueError,
            r"weights must have shape \[I, P, J, D\], \[P, J, D\] or \[P, D\] with I = 6 and P = 4",
        ),
        ({"implementation": "cuda"}, ValueError, "implementation must be None or one of refer"),
        ({"implementation": 3}, ValueError, "implementation must be None or one of .*, got 3"),
    ],
)
def test_refusals_are_one_sentence_with_argument_rule_and_value(arguments, error, message):
    arrays = {name: jnp.ones(shape, jnp.float32) for name, shape in OK.items()} | arguments
    poses, weights = arrays.pop("poses"), arrays.pop("weights")
    with jax.enable_x64(False), pytest.raises(error, match=f"dynamic_routing: .*{message}") as e:
        capsjax.dynamic_routing(poses, weights, **arrays)
    assert "\n" not in str(e.value)
