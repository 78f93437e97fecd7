"""The calls of docs/coming_from.md against numbers of the projects' own programs, in float64."""

import pathlib
from functools import partial
from typing import Any, NamedTuple

import documents
import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

FOLDER = pathlib.Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def page():
    return documents.run("coming_from.md")


class Golden(NamedTuple):
    """A call of the page: its name, and its arguments but for the arrays that have gradients."""

    call: str
    arrays: tuple[str, ...]
    settings: dict[str, Any] = {}  # noqa: RUF012 (read only)
    others: tuple[Any, ...] = ()  # arguments after the arrays: names of the file, or values
    tolerance: float = 1e-10  # relative to the largest number of an array


# The squash of MIND and ComiRec adds 1e-9 to a squared length of about 1.
ADDED_TO_SQUARES = 1e-8
MIND = ("in_init_logits", "in_seq_len")
EASYREC = (*MIND, "out_capsule_mask")
SEGCAPS = ("in_x", "w_W", "w_b")
CAPSULE_LAYER = ("in_x", "w_weight")

GOLDEN = {
    "deepmatch_mind_it3": Golden("deepmatch", ("in_x", "w_S"), {}, (*MIND, 3), ADDED_TO_SQUARES),
    "comirec_bilinear2": Golden("comirec", ("in_x", "w"), {}, ("in_mask", 3), ADDED_TO_SQUARES),
    "torcheasyrec_normal_it3": Golden(
        "torcheasyrec", ("in_x", "w_bilinear_matrix"), {}, (*EASYREC, 20.0, 1.0, 3)
    ),
    "conv/segcaps_conv_it1": Golden("segcaps_conv", SEGCAPS, {"num_iterations": 1}),
    "conv/segcaps_conv_it3": Golden("segcaps_conv", SEGCAPS),
    "conv/segcaps_deconv_it3": Golden("segcaps_deconv", SEGCAPS),
    "capsulelayer_linear_kmeans_dot": Golden("capsule_linear", CAPSULE_LAYER),
    "capsulelayer_linear_kmeans_cosine": Golden(
        "capsule_linear", CAPSULE_LAYER, {"similarity": "cosine"}
    ),
    "capsulelayer_linear_kmeans_dot_shared_squash": Golden(
        "capsule_linear", CAPSULE_LAYER, {"squash_power": 1.0}
    ),
    "conv/capsulelayer_conv2d_kmeans_dot": Golden("capsule_conv2d_k_means", CAPSULE_LAYER),
    "conv/capsulelayer_conv2d_dynamic": Golden("capsule_conv2d_dynamic", CAPSULE_LAYER),
}


def load(name):
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as arrays:
        file = dict(arrays)
    if name.startswith("deepmatch"):
        file["in_init_logits"] = file["in_init_logits"][..., 0]
    return file


def error(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", GOLDEN)
def test_values_and_gradients_are_those_of_the_published_program(page, name):
    golden, file = GOLDEN[name], load(name)
    others = [file[x] if isinstance(x, str) else x for x in golden.others]

    @jax.jit
    def run(*arrays):
        call = partial(page[golden.call], **golden.settings)
        outputs, vjp = jax.vjp(lambda *x: call(*x, *others), *arrays)
        return outputs, vjp(jnp.asarray(file["ct"]))

    outputs, gradients = run(*(jnp.asarray(file[x]) for x in golden.arrays))
    assert outputs.dtype == jnp.float64
    assert error(outputs, file["out"]) <= golden.tolerance
    for array, gradient in zip(golden.arrays, gradients, strict=True):
        expected = file[f"grad_{array.partition('_')[2]}"] if array != "w" else file["grad_w"]
        assert error(gradient, expected) <= golden.tolerance, array


def test_every_file_of_convolutions_is_tested():
    assert {f"conv/{path.stem}" for path in (FOLDER / "conv").glob("*.npz")} <= set(GOLDEN)


def test_every_example_of_segcaps_is_routed_by_itself(page):
    """Unlike in SegCaps' own program, where a batch mixes examples and types."""
    file = load("conv/segcaps_conv_it3")
    rng = np.random.default_rng(0)
    poses = np.concatenate([file["in_x"], rng.standard_normal(file["in_x"].shape)])
    both = jax.jit(page["segcaps_conv"])(poses, file["w_W"], file["w_b"])
    assert error(both[:1], file["out"]) < 1e-10


def test_efficient_capsnet_with_published_weights(page):
    golden, weights = (load(f"efficient_capsnet_smallnorb/{x}") for x in ("golden", "weights"))
    arrays = (weights[f"CapsNet/digit_caps/{x}"] for x in "Wb")
    found = jax.jit(page["efficient_capsnet"])(golden["primary"], *arrays)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, golden["capsules"], atol=5e-6)


def keras_capsule(inputs, kernel, num_capsule, routings):
    """The formulas of bojone/Capsule, 432b9c7, for arrays that may be complex."""
    votes = (inputs @ kernel[0]).reshape(*inputs.shape[:2], num_capsule, -1)
    logits = np.zeros(votes.shape[:3])
    for step in range(routings):
        couplings = np.exp(logits - logits.real.max(2, keepdims=True))
        couplings = couplings / couplings.sum(2, keepdims=True)
        sums = np.einsum("bij,bijd->bjd", couplings, votes)
        if step < routings - 1:
            unit = sums / np.sqrt((sums**2).sum(-1, keepdims=True))
            logits = np.einsum("bjd,bijd->bij", unit, votes)
    squares = (sums**2).sum(-1, keepdims=True) + 1e-7
    return np.sqrt(squares) / (0.5 + squares) * sums


@pytest.mark.parametrize("routings", [1, 3])
def test_keras_capsule(page, routings):
    rng = np.random.default_rng(routings)
    arrays = [rng.standard_normal(shape) for shape in ((2, 7, 5), (1, 5, 4 * 6))]
    cotangent = rng.standard_normal((2, 4, 6))

    @jax.jit
    def run(*arrays):
        call = partial(page["keras_capsule"], num_capsule=4, routings=routings)
        outputs, vjp = jax.vjp(call, *arrays)
        return outputs, vjp(jnp.asarray(cotangent))

    outputs, gradients = run(*arrays)
    assert error(outputs, keras_capsule(*arrays, 4, routings)) < 1e-13
    for k, gradient in enumerate(map(np.asarray, gradients)):
        for n in rng.choice(gradient.size, 25, replace=False):
            moved = [x.astype(np.complex128) for x in arrays]
            moved[k].flat[n] += 1e-30j
            found = (keras_capsule(*moved, 4, routings).imag * cotangent).sum() / 1e-30
            assert abs(found - gradient.flat[n]) < 1e-12 * np.abs(gradient).max()


def test_em_routing_of_any_number_of_children_with_masked_pairs(page):
    """What the page says to users of Heinsen routing."""
    rng = np.random.default_rng(0)
    scores, matrices = rng.standard_normal((2, 6)), rng.standard_normal((2, 6, 3, 2))
    weights, betas = rng.standard_normal((1, 4, 2, 5)), rng.standard_normal((2, 4))
    pairs = rng.random((2, 6, 4)) < 0.7
    pairs[:, :3, 1] = True  # every parent has some children
    pairs[:, 4], pairs[:, 5] = False, False  # children without parents

    @partial(jax.jit, static_argnums=3)
    def routed(scores, matrices, weights, size):
        return page["em_of_any_length"](
            scores[:, :size], matrices[:, :size], weights, pairs[:, :size], *betas
        )

    arrays = scores, matrices, weights
    for one, other in zip(routed(*arrays, 6), routed(*arrays, 4), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    gradients = jax.jit(
        jax.grad(lambda *x: sum(jnp.sum(y) for y in routed(*x, 6)), argnums=(0, 1, 2))
    )(*arrays)
    assert all(np.isfinite(x).all() for x in gradients)
    np.testing.assert_array_equal(gradients[1][:, 4:], 0)
    assert (np.abs(gradients[1][:, :4]) > 0).any()
