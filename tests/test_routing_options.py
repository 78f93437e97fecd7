"""Priors of each example, masked parents, leaks and shared weights, against the oracle."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import capsjax

B, I, P, J, D = 3, 7, 4, 5, 6  # noqa: E741


class Options(NamedTuple):
    """What a call has beside poses, weights and a bias."""

    prior: str = ""  # or "IJ", "BIJ"
    infinite: bool = False  # some logits of the prior are -infinity
    parent_mask: str = ""  # or "J", "BJ"
    mask: bool = False
    leaky: bool = False
    weights: str = "IPJD"  # or "PJD", "PD"
    num_iterations: int = 3
    gradient: str = "full"


OPTIONS = {
    "prior of each example": Options("BIJ"),
    "infinite": Options("IJ", infinite=True),
    "infinite, of each example": Options("BIJ", infinite=True, mask=True),
    "mask of parents": Options(parent_mask="J"),
    "mask of parents for each example": Options(parent_mask="BJ", mask=True),
    "a child without parents": Options("IJ", infinite=True, parent_mask="BJ"),
    "leaky": Options(leaky=True),
    "leaky T=1": Options(leaky=True, num_iterations=1),
    "shared by children": Options(weights="PJD"),
    "shared by children, T=1": Options(weights="PJD", num_iterations=1),
    "shared by children, last": Options(weights="PJD", gradient="last"),
    "shared by all": Options("IJ", weights="PD"),
    "shared by all, of each example": Options("BIJ", weights="PD"),
    "all": Options("BIJ", True, "BJ", True, True),
    "all last": Options("IJ", True, "BJ", True, True, gradient="last"),
    "all shared": Options("BIJ", True, "BJ", True, True, "PJD"),
    "all shared by all": Options("BIJ", True, "BJ", True, True, "PD", num_iterations=2),
}


def make(options):
    """Poses, weights, prior, bias and cotangent; mask and parent mask."""
    rng = np.random.default_rng(0)
    sizes = dict(zip("BIPJD", (B, I, P, J, D), strict=True))

    def normal(scale, letters):
        return rng.normal(size=[sizes[x] for x in letters]) * scale

    poses, weights, bias = normal(0.5, "BIP"), normal(0.5, options.weights), normal(0.1, "JD")
    prior = normal(1, options.prior) if options.prior else None
    if options.infinite:
        prior[..., 1, 2] = prior[..., 3, :] = prior[..., 5, :4] = -np.inf
    parent_mask = np.ones([sizes[x] for x in options.parent_mask or "J"], bool)
    parent_mask[..., 4] = False  # which leaves child 5 without a parent
    if options.parent_mask == "BJ":
        parent_mask[0, 1] = False
    mask = rng.random((B, I)) < 0.7 if options.mask else None
    arrays = poses, weights, prior, bias, normal(1, "BJD")
    arrays = tuple(None if x is None else jnp.asarray(x) for x in arrays)
    return arrays, mask, parent_mask if options.parent_mask else None


def exact(options):
    """The oracle's outputs, couplings and gradients."""
    (poses, weights, prior, bias, cotangent), mask, parent_mask = make(options)
    kept = np.ones((B, I)) if mask is None else np.asarray(mask)
    own = {"IPJD": weights, "PJD": weights[None], "PD": weights[None, :, None]}[options.weights]
    outputs, couplings, gradients = oracles.dynamic_routing(
        poses * kept[..., None],
        np.broadcast_to(own, (I, P, J, D)),
        prior,
        bias,
        cotangent,
        num_iterations=options.num_iterations,
        gradient=options.gradient,
        leaky=options.leaky,
        parent_mask=None if parent_mask is None else np.broadcast_to(parent_mask, (B, J)),
    )
    d_poses, d_weights, *others = gradients
    d_weights = {
        "IPJD": d_weights,
        "PJD": d_weights.sum(0),
        "PD": d_weights.sum((0, 2)),
    }[options.weights]
    return outputs, couplings * kept[..., None], (d_poses * kept[..., None], d_weights, *others)


def assert_exact(actual, wanted):
    for a, w in zip(*map(jax.tree.leaves, (actual, wanted)), strict=True):
        np.testing.assert_allclose(a, w, rtol=1e-11, atol=1e-13)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match_the_oracle(name, implementation):
    options = OPTIONS[name]
    (*arrays, cotangent), mask, parent_mask = make(options)

    @jax.jit
    def run(*arrays):
        def route(poses, weights, prior, bias):
            return capsjax.dynamic_routing(
                poses,
                weights,
                prior=prior,
                bias=bias,
                mask=mask,
                parent_mask=parent_mask,
                leaky=options.leaky,
                num_iterations=options.num_iterations,
                gradient=options.gradient,
                implementation=implementation,
            )

        outputs, vjp = jax.vjp(route, *arrays)
        return outputs, vjp(cotangent)

    outputs, _, gradients = exact(options)
    assert_exact(run(*arrays), (outputs, gradients))


@pytest.mark.parametrize("name", [name for name in OPTIONS if OPTIONS[name].gradient == "full"])
def test_couplings_and_given_votes_match_the_oracle(name):
    options = OPTIONS[name]
    (poses, weights, prior, bias, _), mask, parent_mask = make(options)
    settings = {
        "prior": prior,
        "bias": bias,
        "mask": mask,
        "parent_mask": parent_mask,
        "leaky": options.leaky,
        "num_iterations": options.num_iterations,
    }
    outputs, couplings, _ = exact(options)
    found = jax.jit(lambda u, w: capsjax.routing_couplings(u, w, **settings))(poses, weights)
    assert_exact(found, couplings)
    letters = {"IPJD": "bip,ipjd->bijd", "PJD": "bip,pjd->bijd", "PD": "bip,pd->bid"}
    votes = jnp.einsum(letters[options.weights], poses, weights)
    votes = jnp.broadcast_to(votes if votes.ndim == 4 else votes[:, :, None], (B, I, J, D))
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


@pytest.mark.parametrize("leading", [(), (2, 3)])
def test_options_with_other_leading_axes(leading):
    rng = np.random.default_rng(1)
    poses, prior = rng.normal(size=(*leading, I, P)), rng.normal(size=(*leading, I, J))
    weights = jnp.asarray(rng.normal(size=(I, P, J, D)))
    parent_mask = rng.random((*leading, J)) < 0.8
    together = capsjax.dynamic_routing(poses, weights, prior=prior, parent_mask=parent_mask)
    assert together.shape == (*leading, J, D)
    for index in np.ndindex(leading):
        one = capsjax.dynamic_routing(
            poses[index], weights, prior=prior[index], parent_mask=parent_mask[index]
        )
        assert_exact(together[index], one)


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
