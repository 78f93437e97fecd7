"""Self-attention routing: values and gradients against the oracle, transformations, errors."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import self_attention_oracle as oracle
import sharded_self_attention
import tolerances

import capsjax
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Implementation
from capsjax.routing.self_attention import exponential_squash

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Problem(NamedTuple):
    """Sizes and options of a routing."""

    batch: int = 3
    children: int = 7
    length: int = 3
    parents: int = 4
    depth: int = 5
    bias: bool = True
    prior: str | None = None  # "shared" by the examples, one of "each"; "-inf" of some children
    masked: bool = False  # children and parents, other ones in each example
    shared: int = 4  # axes of the weights


PROBLEMS = {
    "no bias": Problem(bias=False),
    "bias": Problem(),
    "prior": Problem(prior="shared"),
    "prior of each example": Problem(prior="each", bias=False),
    "prior of -infinity": Problem(prior="-inf"),
    "masks": Problem(masked=True),
    "masks and prior": Problem(prior="each", masked=True),
    "one child": Problem(children=1),
    "one parent": Problem(parents=1),
    "numbers": Problem(batch=1, children=5, length=1, parents=2, depth=1),
    "several tiles": Problem(batch=27, children=131, length=2, prior="shared"),
    "weights shared by children": Problem(shared=3),
    "weights shared by children, prior": Problem(shared=3, prior="shared", masked=True),
    "weights shared by all": Problem(shared=2, prior="shared"),
}


def arguments(problem, dtype="float64"):
    """Poses, weights, bias, prior and cotangent, in NumPy; and the masks as keywords."""
    rng = np.random.default_rng(0)
    batch, children, length, parents, depth, bias, prior, masked, shared = problem

    def normal(scale, *shape):
        return (rng.normal(size=shape) * scale).astype(jnp.dtype(dtype))

    shape = (children, length, parents, depth)
    shape = {4: shape, 3: shape[1:], 2: (length, depth)}[shared]
    logits = normal(1.0, *([batch] * (prior == "each")), children, parents) if prior else None
    if prior == "-inf":
        logits[2] = logits[4:, 1:] = -np.inf
    arrays = (
        # Sums of about as many votes for any number of children: softmax and squash not saturated.
        normal(1.5 / (children * length) ** 0.5, batch, children, length),
        normal(0.5, *shape),
        normal(0.3, children, parents) if bias else None,
        logits,
        normal(1.0, batch, parents, depth),
    )
    masks = {}
    if masked:
        masks = {
            "mask": rng.random((batch, children)) < 0.7,
            "parent_mask": rng.random((batch, parents)) < 0.7,
        }
        masks["parent_mask"][0] = False
    return arrays, masks


def exact(problem, dtype="float64"):
    """The oracle's outputs and gradients."""
    arrays, masks = arguments(problem, dtype)
    wide = [None if x is None else np.asarray(x, np.float64) for x in arrays]
    return oracle.self_attention_routing(*wide, **masks)


def route(poses, weights, couplings_bias, prior, **settings):
    return capsjax.self_attention_routing(
        poses, weights, couplings_bias=couplings_bias, prior=prior, **settings
    )


def outputs_and_gradients(problem, dtype="float64", **settings):
    (*arrays, cotangent), masks = arguments(problem, dtype)

    @jax.jit
    def run(arrays, cotangent, masks):
        outputs, vjp = jax.vjp(lambda *a: route(*a, **masks, **settings), *arrays)
        return outputs, vjp(cotangent)

    return run(arrays, cotangent, masks)


@pytest.mark.parametrize("name", ["prior", "weights shared by children", "masks and prior"])
def test_the_oracles_gradients_are_finite_differences(name):
    arrays, masks = arguments(PROBLEMS[name]._replace(batch=2, children=3, length=2))
    *arrays, cotangent = arrays

    def loss():
        outputs, _ = oracle.self_attention_routing(*arrays, cotangent, **masks)
        return np.sum(outputs * cotangent)

    _, gradients = oracle.self_attention_routing(*arrays, cotangent, **masks)
    for array, gradient in zip(arrays, gradients, strict=True):
        if array is None:
            assert gradient is None
            continue
        for index in np.ndindex(array.shape):
            middle, values = array[index], []
            for step in (1e-5, -1e-5):
                array[index] = middle + step
                values.append(loss())
            array[index] = middle
            slope = (values[0] - values[1]) / 2e-5
            assert abs(slope - gradient[index]) <= 1e-6 * np.abs(gradient).max(), index


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_values_and_gradients_are_the_oracles(name, implementation):
    with jax.enable_x64(True):
        found = outputs_and_gradients(PROBLEMS[name], implementation=implementation)
    pairs = zip(*map(jax.tree.leaves, (found, exact(PROBLEMS[name]))), strict=True)
    for actual, wanted in pairs:
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-10 * np.abs(wanted).max())


# Without a prior the first pass is the kernel's; with one there is only the second pass.
@pytest.mark.parametrize(
    ("implementation", "name"), [("mosaic_tpu", "bias"), ("triton", "masks and prior")]
)
def test_kernels_route_as_exactly_as_stored_votes(implementation, name):
    problem = PROBLEMS[name]
    kernel = Implementation(implementation, interpret=True)
    with jax.default_matmul_precision("highest"):
        found = outputs_and_gradients(problem, "float32", implementation=kernel)
    pairs = zip(*map(jax.tree.leaves, (found, exact(problem, "float32"))), strict=True)
    for actual, wanted in pairs:
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tiles_are_as_exact_as_stored_votes(dtype):
    problem = PROBLEMS["masks and prior"]
    tiles = Implementation("xla", XlaConfig(children=2, examples=2))
    plain = outputs_and_gradients(problem, dtype, implementation="reference")
    found = outputs_and_gradients(problem, dtype, implementation=tiles)
    tolerances.assert_as_exact(found, plain, exact(problem, dtype))


def test_examples_along_any_number_of_leading_axes():
    (poses, weights, bias, prior, _), masks = arguments(
        Problem(batch=6, prior="each", masked=True), "float32"
    )
    run = jax.jit(partial(route))
    together = run(poses, weights, bias, prior, **masks)
    for example in range(6):
        own = {name: x[example] for name, x in masks.items()}
        alone = run(poses[example], weights, bias, prior[example], **own)
        np.testing.assert_allclose(alone, together[example], atol=1e-6)
    two_axes = [x.reshape(2, 3, *x.shape[1:]) for x in (poses, prior)]
    masks = {name: x.reshape(2, 3, -1) for name, x in masks.items()}
    found = run(two_axes[0], weights, bias, two_axes[1], **masks)
    np.testing.assert_allclose(found.reshape(together.shape), together, atol=1e-6)
    assert run(poses[:0], weights, bias, None).shape == (0, 4, 5)


def test_a_masked_capsule_sends_nothing_not_even_nan():
    (poses, weights, bias, prior, _), _ = arguments(Problem(prior="shared"), "float32")
    mask = jnp.array([True, True, False, True, False, True, True])
    poisoned = jnp.where(mask[None, :, None], poses, jnp.nan)

    @jax.jit
    def value_and_gradients(poses, weights, bias, prior, mask=None):
        def loss(poses, bias, prior):
            return route(poses, weights, bias, prior, mask=mask).sum()

        return jax.value_and_grad(loss, (0, 1, 2))(poses, bias, prior)

    kept = np.flatnonzero(mask)
    value, gradients = value_and_gradients(poisoned, weights, bias, prior, mask)
    wanted, wanted_gradients = value_and_gradients(
        poses[:, kept], weights[kept], bias[kept], prior[kept]
    )
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    others = np.flatnonzero(~mask)
    for axis, gradient, other in zip((1, 0, 0), gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(gradient.take(kept, axis), other, atol=1e-6)
        assert not np.any(gradient.take(others, axis))


def test_a_prior_of_zeros_and_a_mask_of_all_change_nothing():
    # With either of them S is a product of its own, without the first pass.
    (poses, weights, bias, _, _), _ = arguments(Problem(), "float32")
    wanted = route(poses, weights, bias, None)
    for settings in ({"prior": jnp.zeros((7, 4))}, {"parent_mask": jnp.ones(4, bool)}):
        found = route(poses, weights, bias, **{"prior": None, **settings})
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_vmap_over_weights_and_scan_with_checkpoints():
    (poses, weights, bias, _, _), _ = arguments(Problem(), "float32")
    many = jnp.stack([weights, -weights, 2 * weights])
    run = jax.jit(partial(route, prior=None))
    mapped = jax.vmap(run, (None, 0, None))(poses, many, bias)
    for output, one in zip(mapped, many, strict=True):
        np.testing.assert_allclose(output, run(poses, one, bias), atol=1e-6)

    @jax.jit
    def scanned(poses, weights):
        step = jax.checkpoint(lambda u, w: route(u, w, bias, None).sum())
        return jax.lax.scan(lambda total, u: (total + step(u, weights), None), 0.0, poses)[0]

    found = jax.jit(jax.grad(scanned, (0, 1)))(poses, weights)
    wanted = jax.jit(jax.grad(lambda u, w: run(u, w, bias).sum(), (0, 1)))(poses, weights)
    for gradient, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(gradient, other, atol=1e-5)


def test_reference_has_forward_mode():
    (poses, weights, bias, prior, _), _ = arguments(Problem(prior="shared"), "float32")
    for logits in (None, prior):
        function = partial(
            route, weights=weights, couplings_bias=bias, prior=logits, implementation="reference"
        )
        forward = jax.jit(lambda u, f=function: jax.jvp(f, (u,), (jnp.ones_like(u),))[1])(poses)
        backward = jax.jit(jax.jacrev(function))(poses).sum((3, 4, 5))
        np.testing.assert_allclose(forward, backward, atol=1e-5)


def test_children_attend_to_the_parent_that_they_agree_on():
    # Children vote alike for parent 0, and for parent 1 each in a direction of its own.
    weights = np.zeros((4, 1, 2, 4), np.float32)
    weights[:, 0, 0, 0] = 1
    weights[:, 0, 1] = np.eye(4)
    lengths = capsjax.lengths(capsjax.self_attention_routing(jnp.ones((4, 1)), weights))
    # Logits 4 · 1 / sqrt(4) and 1 / sqrt(4); the votes add up to 4 and to a length of 2.
    share = 1 / (1 + np.exp(0.5 - 2))
    wanted = 1 - np.exp([-4 * share, -2 * (1 - share)])
    np.testing.assert_allclose(lengths, wanted, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_squash_and_its_derivative_at_any_length(dtype):
    eps = float(jnp.finfo(dtype).eps)
    run = jax.jit(
        lambda x: (
            exponential_squash(x),
            jax.jacrev(exponential_squash)(x),
            jax.jacfwd(exponential_squash)(x),
        )
    )
    for scale in (0, 1e-20, 1e-3, 1, 30, 1e20):
        x = (np.array([3.0, 4.0, 0.0]) * scale / 5).astype(jnp.dtype(dtype))
        value, slope, forward = run(x)
        wide = x.astype(np.float64)
        length = np.linalg.norm(wide)
        unit = wide / length if length else wide
        factor = -np.expm1(-length) / length if length else 1.0
        np.testing.assert_allclose(value, factor * wide, rtol=4 * eps)
        wanted = factor * np.eye(3) + (np.exp(-length) - factor) * np.outer(unit, unit)
        np.testing.assert_allclose(slope, wanted, rtol=0, atol=4 * eps * np.abs(wanted).max())
        np.testing.assert_allclose(forward, slope, rtol=1e-6)
        # Rounding a component to bfloat16 may lengthen the vector.
        assert dtype == "bfloat16" or np.linalg.norm(np.asarray(value, np.float64)) < 1


def test_input_capsules_over_an_axis_of_four_devices():
    cases = sharded_self_attention.run()
    assert len(cases) == 8
    for name, case in cases.items():
        assert case["distance"] < 1e-12, name
        assert {kind for _, kind in case["sent"]} == {"all-reduce"}, name


OK = {"poses": (2, 6, 4), "weights": (6, 4, 3, 5)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"poses": (4,)}, r"poses must have shape \[..., I, P\] = \[any, any\], got \(4,\)"),
        ({"weights": (7, 4, 3, 5)}, r"weights must have shape .* = \[6, 4, any, any\], got \(7,"),
        ({"weights": (4, 5)}, "prior must distinguish output capsules .* got None"),
        (
            {"couplings_bias": (3, 6)},
            r"couplings_bias must have shape \[I, J\] = \[6, 3\], got \(3, 6\)",
        ),
        (
            {"couplings_bias": (2, 6, 3)},
            r"couplings_bias must have shape \[I, J\] = \[6, 3\], got \(2, 6, 3\)",
        ),
        ({"prior": (6, 4)}, r"prior must have shape .* with J = 3, got \(6, 4\)"),
        ({"mask": (6,)}, "mask must be bool, got float32"),
        ({"parent_mask": (3,)}, "parent_mask must be bool, got float32"),
    ],
)
def test_wrong_arguments_name_argument_rule_and_value(changes, message):
    arrays = {name: jnp.ones(shape) for name, shape in {**OK, **changes}.items()}
    poses, weights = arrays.pop("poses"), arrays.pop("weights")
    with pytest.raises((ValueError, TypeError), match=f"^self_attention_routing: {message}"):
        capsjax.self_attention_routing(poses, weights, **arrays)


def test_wrong_dtypes_and_settings():
    poses, weights = (jnp.ones(shape) for shape in OK.values())
    name = "^self_attention_routing: "
    with pytest.raises(TypeError, match=f"{name}couplings_bias must be float32, got bfloat16"):
        route(poses, weights, jnp.ones((6, 3), jnp.bfloat16), None)
    with pytest.raises(TypeError, match=f"{name}weights must have the dtype of poses, float32"):
        route(poses, weights.astype(jnp.bfloat16), None, None)
    with pytest.raises(ValueError, match=f"{name}implementation must be None or one of reference"):
        route(poses, weights, None, None, implementation="cuda")
    with pytest.raises(ValueError, match=f"{name}axis_name must name an axis of the enclosing"):
        route(poses, weights, None, None, axis_name="capsules")
