"""Values and gradients that published programs compute, in float64; `golden/README.md` has them.

Each entry below maps the arrays of a file, in that program's own axis order, to one call of this
library, so that the gradients come back in that order too.
"""

import pathlib
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax

pytestmark = pytest.mark.usefixtures("float64", "quick_compilation")

FOLDER = pathlib.Path(__file__).parent / "golden"


class Golden(NamedTuple):
    """A call, and what it must return."""

    function: Any  # of the arrays that have gradients, in the file's axis order
    arrays: tuple[str, ...]  # names of those arrays
    outputs: tuple[str, ...]
    cotangents: tuple[str | None, ...] = ("ct",)  # None: not in the loss
    gradients: tuple[str, ...] | None = None  # by default those of `arrays`
    tolerance: float = 1e-10  # relative to the largest number of an array


def columns_of(weights):
    """Weights `[J, I, D, P]` of PyTorch programs in our order, `[I, P, J, D]`."""
    return weights.transpose(1, 3, 0, 2)


# Self-routing, and dynamic routing, of SR-CapsNet: a window of 3 x 3 positions.


def window(x, types):
    """A map `[b, A·C, h, w]` as capsules `[b, h·w·A, C]`."""
    x = x.reshape(len(x), types, -1, *x.shape[2:]).transpose(0, 3, 4, 1, 2)
    return x.reshape(len(x), -1, x.shape[-1])


def srcapsnet_self(file, *, stride=None):
    def run(pose, activations, weights, routing_weights, bias):
        poses, activations = window(pose, 3), window(activations, 3)[..., 0]
        weights = weights.reshape(27, 4, 6, 5).transpose(0, 3, 1, 2)
        routing_weights, bias = routing_weights.transpose(0, 2, 1), bias[0, 0]
        if stride is not None:
            poses, activations = poses.reshape(-1, 3, 3, 3, 5), activations.reshape(-1, 3, 3, 3)
            weights, routing_weights, bias = (
                x.reshape(3, 3, 3, *x.shape[1:]) for x in (weights, routing_weights, bias)
            )
        outputs, probabilities = capsjax.self_routing(
            poses, activations, weights, routing_weights, routing_bias=bias, stride=stride
        )
        return probabilities.reshape(-1, 4, 1, 1), outputs.reshape(-1, 24, 1, 1)

    arrays = "in_pose", "in_a", "w_W1", "w_W2", "w_b2"
    return Golden(run, arrays, ("out_a", "out_pose"), ("ct_a", "ct_pose"))


def srcapsnet_dynamic(file, *, num_iterations):
    def run(pose, weights):
        weights = weights.reshape(27, 4, 6, 5).transpose(0, 3, 1, 2)
        routed = capsjax.dynamic_routing(window(pose, 3), weights, num_iterations=num_iterations)
        return (routed.reshape(-1, 24, 1, 1),)

    return Golden(run, ("in_pose", "w_W"), ("out_pose",), ("ct_pose",))


# Inverted dot-product attention of Apple. It divides couplings by their sum plus 1e-10, which the
# LayerNorm after them removes.


def apple_layer(x, weights, scale, offset, parents=None, *, num_iterations=1, stride=None):
    """A layer on `[b, n, (h, w,) a]`, whose matrices are flat; weights [..., n, x, d, m] if so."""
    side = weights.shape[-3]
    matrix = x.shape[-1] != side
    pose = (side, side) if matrix else (weights.shape[-1],)
    if matrix:
        weights = weights.swapaxes(-1, -2)
    settings = {
        "scale": scale.reshape(pose),
        "offset": offset.reshape(pose),
        "matrix": matrix,
        "stride": stride,
    }

    def to_ours(x, pose):
        x = x if stride is None else jnp.moveaxis(x, 1, 3)
        return x.reshape(*x.shape[:-1], *pose)

    x = to_ours(x, (side, side) if matrix else (side,))
    if parents is None:
        routed = capsjax.inverted_attention_routing(
            x, weights, num_iterations=num_iterations, **settings
        )
    else:
        routed = capsjax.inverted_attention_step(x, weights, to_ours(parents, pose), **settings)
    routed = routed.reshape(*routed.shape[: -len(pose)], -1)
    return routed if stride is None else jnp.moveaxis(routed, 3, 1)


AFFINE = "nonlinear_act_weight", "nonlinear_act_bias"


def apple(file, *, num_iterations, stride=None):
    def run(*arrays):
        return (apple_layer(*arrays, num_iterations=num_iterations, stride=stride),)

    return Golden(run, ("in_x", "w_w", *(f"w_{x}" for x in AFFINE)), ("out",))


def apple_model(file, *, concurrent):
    def run(x, *arrays):
        *arrays, fc_weight, fc_bias = arrays
        layers = [
            partial(_layer, arrays[3 * k : 3 * k + 3], stride=1 if k == 0 else None)
            for k in range(3)
        ]
        values = [x]
        for layer in layers:
            values.append(layer(values[-1], num_iterations=1 if concurrent else 3))
        for _ in range(2 if concurrent else 0):
            pairs = zip(layers, values[:-1], values[1:], strict=True)
            values[1:] = [layer(below, above) for layer, below, above in pairs]
        logits = values[-1] @ fc_weight[0] + fc_bias[None]
        return logits, *values[1:]

    def _layer(own, below, above=None, *, stride, **settings):
        if stride is None and below.ndim == 5:  # [b, m, 1, 1, d]
            below = below[:, :, 0, 0]
        return apple_layer(below, *own, above, stride=stride, **settings)

    layers = [f"capsule_layers_{k}_{name}" for k in range(3) for name in ("w", *AFFINE)]
    names = [*layers, "final_fc_weight", "final_fc_bias"]
    return Golden(
        run,
        ("in_x", *(f"w_{name}" for name in names)),
        ("out_logits", *(f"out_layer{k}" for k in range(3))),
        ("ct_logits", None, None, None),
    )


# K-means, and dynamic, routing of CapsuleLayer.


def capsulelayer(file, *, shared=False, **settings):
    def run(x, weights):
        weights = weights.transpose(2, 0, 1) if shared else columns_of(weights)
        return (capsjax.kmeans_routing(x, weights, **settings),)

    return Golden(run, ("in_x", "w_weight"), ("out",))


# XifengGuo's squash adds 1e-8 to a length of about 1.
ADDED_TO_LENGTHS = 1e-7


def dynamic(file, *, weights, bias=None, tolerance=1e-10, **settings):
    """Dynamic routing of [b, I, P], with weights and bias brought into our order."""
    names = [name for name in file if name.startswith("w_")]

    def run(x, w, *others):
        settings["bias"] = bias(*others) if bias else None
        routed = capsjax.dynamic_routing(x, weights(w), **settings)
        return (routed.reshape(file["out"].shape),)

    return Golden(run, ("in_x", *names), ("out",), tolerance=tolerance)


# Multi-interest layers: one matrix shared by all capsules, noise as first logits, and constant
# couplings in the gradient. Their squash adds 1e-9 to a squared length of about 1.
ADDED_TO_SQUARES = 1e-8


def interests(file, *, weights=lambda w: w, noise=lambda x: x, **settings):
    """MIND and ComiRec of the programs themselves."""
    mask = file["in_mask"] > 0 if "in_mask" in file else before(file["in_seq_len"], 6)
    prior = noise(file["in_init_logits"]) if "in_init_logits" in file else None
    name = "w" if "w" in file else "w_S"

    def run(x, w):
        settings_of_all = {"prior": prior, "mask": mask, "gradient": "last"}
        return (capsjax.dynamic_routing(x, weights(w), **settings_of_all, **settings),)

    gradients = "grad_x", "grad_w" if name == "w" else "grad_S"
    return Golden(run, ("in_x", name), ("out",), gradients=gradients, tolerance=ADDED_TO_SQUARES)


def before(lengths, size):
    """A mask `[b, size]` of the first positions."""
    return np.arange(size)[None] < np.reshape(lengths, (-1, 1))


def torcheasyrec(file, *, scale, squash_power, num_iterations):
    initial = file.get("in_init_logits", np.zeros((3, 8, 3)))

    def run(x, weights):
        routed = capsjax.kmeans_routing(
            x,
            weights,
            num_iterations=num_iterations,
            similarity="cosine",
            temperature=scale,
            initial_logits=scale * initial,
            unit_means=False,
            carry_couplings=True,
            squash_power=squash_power,
            mask=before(file["in_seq_len"], 8),
            parent_mask=file["out_capsule_mask"],
            gradient="last",
        )
        return (routed,)

    gradients = "grad_x", "grad_bilinear_matrix"
    return Golden(run, ("in_x", "w_bilinear_matrix"), ("out",), gradients=gradients)


def mind(file, *, routing, tolerance=1e-10):
    """The independent programs of multi-interest layers, which share names of arrays."""
    mask = before(file["lengths"], 7)
    settings = {"num_iterations": 3, "mask": mask, "gradient": "last"}
    if "interests" in file:
        settings["parent_mask"] = before(file["interests"], 3)

    def run(poses, weights):
        return (routing(poses, weights, file, settings),)

    return Golden(
        run, ("poses", "weights"), ("outputs",), ("cotangent",), ("d_poses", "d_weights"), tolerance
    )


def agreement(poses, weights, file, settings):
    return capsjax.dynamic_routing(poses, weights, prior=file.get("noise"), **settings)


def spherical(poses, weights, file, settings):
    return capsjax.kmeans_routing(
        poses,
        weights,
        similarity="cosine",
        temperature=file["scale"],
        initial_logits=file["noise"],
        squash_power=float(file["power"]),
        **settings,
    )


def carried(poses, weights, file, settings):
    return capsjax.kmeans_routing(
        poses,
        weights,
        similarity="cosine",
        temperature=file["scale"],
        initial_logits=file["scale"] * file["deviation"] * file["noise"],
        unit_means=False,
        carry_couplings=True,
        squash_power=float(file["power"]),
        **settings,
    )


GOLDEN = {
    "srcapsnet_self_dense": srcapsnet_self,
    "srcapsnet_self_dense as a convolution": partial(srcapsnet_self, stride=1),
    "srcapsnet_dynamic_dense": partial(srcapsnet_dynamic, num_iterations=3),
    "srcapsnet_dynamic_dense_it1": partial(srcapsnet_dynamic, num_iterations=1),
    "apple_fc_vector_it1": partial(apple, num_iterations=1),
    "apple_fc_vector_it3": partial(apple, num_iterations=3),
    "apple_fc_matrix_it1": partial(apple, num_iterations=1),
    "apple_fc_matrix_it2": partial(apple, num_iterations=2),
    "apple_conv_vector_onepos_it3": partial(apple, num_iterations=3, stride=1),
    "apple_conv_matrix_onepos_it3": partial(apple, num_iterations=3, stride=1),
    "apple_conv_vector_windows_it3": partial(apple, num_iterations=3, stride=1),
    "apple_conv_matrix_windows_it3": partial(apple, num_iterations=3, stride=1),
    "apple_model_sequential_vector": partial(apple_model, concurrent=False),
    "apple_model_sequential_matrix": partial(apple_model, concurrent=False),
    "apple_model_concurrent_vector": partial(apple_model, concurrent=True),
    "capsulelayer_linear_kmeans_dot": partial(capsulelayer, num_iterations=4, squash_power=None),
    "capsulelayer_linear_kmeans_dot_it1": partial(
        capsulelayer, num_iterations=2, squash_power=None
    ),
    "capsulelayer_linear_kmeans_cosine": partial(
        capsulelayer, num_iterations=4, squash_power=None, similarity="cosine"
    ),
    "capsulelayer_linear_kmeans_dot_shared_squash": partial(
        capsulelayer, num_iterations=4, shared=True
    ),
    "capsulelayer_linear_dynamic": partial(dynamic, weights=columns_of),
    "sarasra_fc_it1": partial(
        dynamic, weights=lambda w: w.reshape(7, 5, 4, 6), bias=lambda b: b, num_iterations=1
    ),
    "sarasra_fc_it3": partial(
        dynamic, weights=lambda w: w.reshape(7, 5, 4, 6), bias=lambda b: b, num_iterations=3
    ),
    "ethanleet_dense_it1": partial(
        dynamic,
        weights=lambda w: w[0].transpose(0, 3, 1, 2),
        bias=lambda b: b[0, 0],
        num_iterations=1,
    ),
    "ethanleet_dense_it3": partial(
        dynamic,
        weights=lambda w: w[0].transpose(0, 3, 1, 2),
        bias=lambda b: b[0, 0],
        num_iterations=3,
    ),
    "xifengguo_dense_it1": partial(
        dynamic, weights=columns_of, num_iterations=1, gradient="last", tolerance=ADDED_TO_LENGTHS
    ),
    "xifengguo_dense_it3": partial(
        dynamic, weights=columns_of, num_iterations=3, gradient="last", tolerance=ADDED_TO_LENGTHS
    ),
    "comirec_bilinear0": partial(interests, noise=lambda x: x.swapaxes(1, 2)),
    "comirec_bilinear2": partial(
        interests, weights=lambda w: w.reshape(6, 3, 4, 4).transpose(0, 3, 1, 2)
    ),
    "deepmatch_mind_it1": partial(interests, noise=lambda x: x[..., 0], num_iterations=1),
    "deepmatch_mind_it3": partial(interests, noise=lambda x: x[..., 0], num_iterations=3),
    "torcheasyrec_normal_it1": partial(torcheasyrec, scale=1.0, squash_power=2.0, num_iterations=1),
    "torcheasyrec_normal_it3": partial(
        torcheasyrec, scale=20.0, squash_power=1.0, num_iterations=3
    ),
    "torcheasyrec_zeros_it3": partial(torcheasyrec, scale=20.0, squash_power=1.0, num_iterations=3),
    "mind_comirec_dr": partial(mind, routing=agreement, tolerance=ADDED_TO_SQUARES),
    "mind_deepmatch": partial(mind, routing=agreement, tolerance=ADDED_TO_SQUARES),
    "mind_easyrec": partial(mind, routing=spherical),
    "mind_easyrec_soft": partial(mind, routing=spherical),
    "mind_torcheasyrec": partial(mind, routing=carried),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_values_and_gradients_are_those_of_the_published_program(name):
    with np.load(FOLDER / f"{name.split()[0]}.npz") as arrays:
        file = dict(arrays)
    golden = GOLDEN[name](file)
    arrays = [jnp.asarray(file[x]) for x in golden.arrays]
    cotangents = tuple(
        jnp.zeros_like(file[out]) if name is None else jnp.asarray(file[name])
        for out, name in zip(golden.outputs, golden.cotangents, strict=True)
    )

    @jax.jit
    def run(*arrays):
        outputs, vjp = jax.vjp(golden.function, *arrays)
        return outputs, vjp(cotangents)

    outputs, gradients = run(*arrays)
    wanted = golden.gradients or [f"grad_{x.partition('_')[2]}" for x in golden.arrays]
    names = (*golden.outputs, *wanted)
    for key, found in zip(names, (*outputs, *gradients), strict=True):
        expected = file[key]
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert found.dtype == jnp.float64
        assert error <= golden.tolerance, key


def test_every_file_is_tested():
    files = {path.stem for path in FOLDER.glob("*.npz")}
    assert files == {name.split()[0] for name in GOLDEN}
