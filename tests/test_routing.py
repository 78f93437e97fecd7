"""Properties of routing that no numeric table shows, and its errors."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import capsjax
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Implementation


def _arguments(batch=2, capsules=6, length=4, parents=3, depth=5, seed=0):
    rng = np.random.default_rng(seed)
    poses = rng.normal(size=(batch, capsules, length))
    weights = rng.normal(size=(capsules, length, parents, depth)) * 0.5
    return jnp.asarray(poses, jnp.float32), jnp.asarray(weights, jnp.float32)


def test_examples_along_any_number_of_leading_axes_are_routed_independently():
    poses, weights = _arguments(batch=12)
    route = jax.jit(capsjax.dynamic_routing)
    together = route(poses, weights)
    in_two_axes = route(poses.reshape(3, 4, 6, 4), weights)
    np.testing.assert_allclose(in_two_axes.reshape(together.shape), together, atol=1e-6)
    for example, output in zip(poses, together, strict=True):
        np.testing.assert_allclose(route(example, weights), output, atol=1e-6)
    assert route(poses[:0], weights).shape == (0, 3, 5)


def test_nested_lists_are_taken_as_arrays():
    poses, weights = _arguments(batch=1)
    wanted = capsjax.dynamic_routing(poses, weights)
    found = capsjax.dynamic_routing(poses.tolist(), weights.tolist())
    np.testing.assert_allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_masked_capsule_sends_nothing_not_even_nan(implementation):
    poses, weights = _arguments()
    prior = jnp.asarray(np.random.default_rng(1).normal(size=(6, 3)), jnp.float32)
    mask = jnp.array([True, True, False, True, False, True])
    poisoned = jnp.where(mask[None, :, None], poses, jnp.nan)

    @jax.jit
    def value_and_gradients(poses, prior, weights, mask=None):
        def loss(poses, prior):
            return capsjax.dynamic_routing(
                poses, weights, prior=prior, mask=mask, implementation=implementation
            ).sum()

        return jax.value_and_grad(loss, (0, 1))(poses, prior)

    value, gradients = value_and_gradients(poisoned, prior, weights, mask)
    kept = np.flatnonzero(mask)
    wanted, wanted_gradients = value_and_gradients(poses[:, kept], prior[kept], weights[kept])
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    np.testing.assert_allclose(gradients[0][:, kept], wanted_gradients[0], atol=1e-6)
    np.testing.assert_allclose(gradients[1][kept], wanted_gradients[1], atol=1e-6)
    assert not np.any(gradients[0][:, [2, 4]])
    assert not np.any(gradients[1][jnp.array([2, 4])])


def test_votes_of_a_single_example_route_as_poses_and_weights_do():
    poses, weights = _arguments()
    votes = jnp.einsum("ip,ipjd->ijd", poses[0], weights)
    np.testing.assert_allclose(
        capsjax.dynamic_routing_from_votes(votes, num_iterations=4),
        capsjax.dynamic_routing(poses[0], weights, num_iterations=4),
        atol=1e-6,
    )


def test_couplings_are_the_oracles_and_sum_to_one_over_the_parents():
    poses, weights = _arguments()
    couplings = capsjax.routing_couplings(poses, weights, num_iterations=4)
    cotangent = np.zeros((2, 3, 5))
    _, wanted, _ = oracles.dynamic_routing(
        poses, weights, None, None, cotangent, num_iterations=4, gradient="full"
    )
    assert couplings.shape == (4, 2, 6, 3)
    np.testing.assert_allclose(couplings, wanted, atol=1e-5)
    np.testing.assert_allclose(couplings.sum(-1), np.ones((4, 2, 6)), atol=1e-6)
    mask = jnp.arange(6) > 0
    masked = capsjax.routing_couplings(poses, weights, mask=mask, leaky=True)
    assert not np.any(masked[:, :, 0])
    assert np.all(masked[:, :, 1:] > 0)
    assert np.all(masked.sum(-1) < 1)
    assert capsjax.routing_couplings(poses[:0], weights).shape == (3, 0, 6, 3)


def test_a_masked_parent_is_as_if_it_were_not_there():
    poses, weights = _arguments(parents=4)
    there = jnp.array([True, False, True, True])
    kept = np.flatnonzero(there)
    route = jax.jit(lambda w, mask=None: capsjax.dynamic_routing(poses, w, parent_mask=mask))
    found = route(weights, there)
    np.testing.assert_allclose(found[:, kept], route(weights[:, :, kept]), atol=1e-6)
    assert not np.any(found[:, 1])
    assert not np.any(route(weights, jnp.zeros(4, bool)))


def test_a_leaky_routing_has_one_more_parent_without_votes():
    poses, weights = _arguments()
    more = jnp.pad(weights, ((0, 0), (0, 0), (0, 1), (0, 0)))
    leaky = capsjax.dynamic_routing(poses, weights, leaky=True)
    wanted = capsjax.dynamic_routing(poses, more)[:, :3]
    np.testing.assert_allclose(leaky, wanted, atol=1e-6)
    assert np.abs(leaky - capsjax.dynamic_routing(poses, weights)).max() > 1e-3


def test_tiles_do_not_change_a_routing():
    poses, weights = _arguments()
    wanted = capsjax.dynamic_routing(poses, weights)
    for children, examples in ((1, 1), (6, 8)):
        tiles = Implementation("xla", XlaConfig(children=children, examples=examples))
        found = capsjax.dynamic_routing(poses, weights, implementation=tiles)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_reference_has_forward_mode_and_hessian():
    poses, weights = _arguments(batch=1, capsules=3, length=2, parents=2, depth=2)
    tangent = jnp.ones_like(poses)

    @jax.jit
    def route(u):
        return capsjax.dynamic_routing(u, weights, implementation="reference")

    forward = jax.jit(lambda u: jax.jvp(route, (u,), (tangent,))[1])(poses)
    step = 1e-2
    numeric = (route(poses + step * tangent) - route(poses - step * tangent)) / (2 * step)
    np.testing.assert_allclose(forward, numeric, atol=1e-3)
    hessian = jax.jit(jax.hessian(lambda u: route(u).sum()))(poses).reshape(6, 6)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-5)
    assert np.abs(hessian).max() > 1e-3
    # Backward over backward needs no forward mode.
    gradient = jax.grad(lambda u: capsjax.dynamic_routing(u, weights).sum())
    twice = jax.jit(jax.grad(lambda u: (gradient(u) * tangent).sum()))(poses)
    np.testing.assert_allclose(twice.reshape(6), hessian.sum(0), atol=1e-5)


def test_scan_and_remat():
    poses, weights = _arguments()

    @jax.jit
    def twice(poses, weights):
        route = jax.checkpoint(capsjax.dynamic_routing)
        return jax.lax.scan(lambda total, u: (total + route(u, weights).sum(), None), 0.0, poses)[0]

    wanted = capsjax.dynamic_routing(poses, weights).sum()
    np.testing.assert_allclose(twice(poses, weights), wanted, rtol=1e-5)
    gradient = jax.jit(jax.grad(twice, 1))(poses, weights)
    wanted = jax.jit(jax.grad(lambda w: capsjax.dynamic_routing(poses, w).sum()))(weights)
    np.testing.assert_allclose(gradient, wanted, atol=1e-6)


def test_vmap_over_weights_too():
    poses, weights = _arguments()
    many = jnp.stack([weights, -weights, 2 * weights])
    route = jax.vmap(capsjax.dynamic_routing, (None, 0))
    for output, one in zip(route(poses, many), many, strict=True):
        np.testing.assert_allclose(output, capsjax.dynamic_routing(poses, one), atol=1e-6)


def test_agreement_moves_couplings_to_the_parent_that_children_agree_on():
    # Four children vote alike for parent 0, and for parent 1 each in a direction of its own.
    votes = np.zeros((4, 2, 4), np.float32)
    votes[:, 0] = [1, 0, 0, 0]
    votes[:, 1] = np.eye(4)
    outputs = [
        capsjax.lengths(capsjax.dynamic_routing_from_votes(votes, num_iterations=t)) for t in (1, 5)
    ]
    assert outputs[1][0] > outputs[0][0] > 0.7
    assert outputs[1][1] < outputs[0][1] == 0.5


OK = {"poses": (2, 6, 4), "weights": (6, 4, 3, 5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"weights": (7, 4, 3, 5)},
            r"weights must have shape \[I, P, J, D\] = \[6, 4, any, any\], got \(7, 4, 3, 5\)",
        ),
        (
            {"weights": (6, 4, 3)},
            r"weights must have shape \[I, P, J, D\], \[P, J, D\] or \[P, D\] with I = 6 and "
            r"P = 4, got \(6, 4, 3\)",
        ),
        ({"weights": (5, 6)}, r"weights must have shape .* or \[P, D\] with I = 6 and P = 4, got"),
        ({"weights": (4, 5)}, "prior must distinguish output capsules .* got None"),
        ({"weights": (4,)}, r"weights must have shape \[I, P, J, D\]"),
        ({"weights": (6, 4, 0, 5)}, r"weights must have shape"),
        ({"weights": (4, 3, 0)}, r"weights must have shape"),
        ({"poses": (4,)}, r"poses must have shape \[..., I, P\] = \[any, any\], got \(4,\)"),
        (
            {"prior": (3, 6)},
            r"prior must have shape \[I, J\] or \[..., I, J\] = \[2, 6, J\], got \(3, 6\)",
        ),
        (
            {"prior": (6, 4)},
            r"prior must have shape \[I, J\] or \[..., I, J\] with J = 3, got \(6, 4\)",
        ),
        ({"prior": (1, 6, 3)}, r"prior must have shape .* got \(1, 6, 3\)"),
        ({"bias": (5,)}, r"bias must have shape \[J, D\] = \[3, 5\], got \(5,\)"),
    ],
)
def test_wrong_shapes_name_argument_rule_and_value(changes, message):
    arrays = {name: jnp.ones(shape) for name, shape in {**OK, **changes}.items()}
    poses, weights = arrays.pop("poses"), arrays.pop("weights")
    with pytest.raises(ValueError, match=f"dynamic_routing: {message}"):
        capsjax.dynamic_routing(poses, weights, **arrays)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"num_iterations": 0},
            ValueError,
            "num_iterations must be an integer of at least 1, got 0",
        ),
        ({"num_iterations": 2.0}, ValueError, "num_iterations must be an integer of at least 1"),
        (
            {"gradient": "implicit"},
            ValueError,
            "gradient must be one of full, last, got 'implicit'",
        ),
        (
            {"implementation": "cuda"},
            ValueError,
            "implementation must be None or one of reference, xla, triton, mosaic_tpu, got 'cuda'",
        ),
        (
            {"implementation": Implementation("pallas_triton", interpret=True)},
            ValueError,
            "implementation must be None or one of reference, xla, .* got 'pallas_triton'",
        ),
        ({"mask": jnp.ones(6)}, TypeError, "mask must be bool, got float32"),
        ({"mask": jnp.ones(5, bool)}, ValueError, r"mask must have shape \[I\] or \[..., I\]"),
        ({"parent_mask": jnp.ones(3)}, TypeError, "parent_mask must be bool, got float32"),
        (
            {"parent_mask": jnp.ones((6, 3), bool)},
            ValueError,
            r"parent_mask must have shape \[J\] or \[..., J\] = \(2, 3\), got \(6, 3\)",
        ),
        (
            {"prior": jnp.ones((6, 3), jnp.bfloat16)},
            TypeError,
            "prior must be float32, got bfloat16",
        ),
    ],
)
def test_wrong_settings_name_argument_rule_and_value(settings, error, message):
    poses, weights = _arguments()
    with pytest.raises(error, match=f"dynamic_routing: {message}"):
        jax.jit(lambda u, w: capsjax.dynamic_routing(u, w, **settings))(poses, weights)


def test_wrong_dtypes():
    poses, weights = _arguments()
    with pytest.raises(TypeError, match="dynamic_routing: poses must be floating, got int32"):
        capsjax.dynamic_routing(poses.astype(jnp.int32), weights)
    message = "weights must have the dtype of poses, bfloat16, got float32"
    with pytest.raises(TypeError, match=message):
        capsjax.dynamic_routing(poses.astype(jnp.bfloat16), weights)
    with pytest.raises(ValueError, match=r"votes must have shape \[..., I, J, D\]"):
        capsjax.dynamic_routing_from_votes(jnp.ones((3, 5)))


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_bfloat16_needs_no_implicit_promotion(implementation):
    poses, weights = jnp.ones((2, 6, 4), jnp.bfloat16), jnp.ones((6, 4, 3, 4), jnp.bfloat16)

    def total(*arrays):
        found = capsjax.dynamic_routing(*arrays, implementation=implementation)
        return found.astype(jnp.float32).sum()

    with jax.numpy_dtype_promotion("strict"):
        gradients = jax.grad(total, (0, 1))(poses, weights)
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}


def test_a_boolean_is_no_number_of_iterations():
    with pytest.raises(ValueError, match="num_iterations must be an integer of at least 1, got Tr"):
        capsjax.dynamic_routing(jnp.ones((6, 4)), jnp.ones((6, 4, 3, 4)), num_iterations=True)
