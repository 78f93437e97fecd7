"""`jax.export` of every public function, layer and network with a batch of any size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax import models, nn

pytestmark = pytest.mark.usefixtures("quick_compilation")

WEIGHTS = np.random.default_rng(1).normal(size=(6, 4, 3, 5)).astype(np.float32) * 0.3
IMAGES, POSES = (28, 28, 1), (6, 4)


def network():
    return models.CapsNet(IMAGES, 10, conv_channels=8, primary_types=2, rngs=nnx.Rngs(0))


def efficient_network():
    return models.EfficientCapsNet(
        (16, 16, 1),
        10,
        convolutions=((4, 5, 1), (8, 3, 2)),
        primary_kernel_size=5,
        hidden=None,
        rngs=nnx.Rngs(0),
    )


def routed(**settings):
    return lambda poses: capsjax.dynamic_routing(poses, WEIGHTS, **settings)


def with_all_options(poses, prior):
    return capsjax.dynamic_routing(
        poses,
        WEIGHTS,
        prior=prior,
        leaky=True,
        mask=jnp.arange(6) < 4,
        parent_mask=jnp.arange(3) < 2,
    )


# The function, and the shapes of its arguments behind the batch.
EXPORTED = {
    "dynamic_routing": (routed(), POSES),
    "dynamic_routing, gradient": (jax.grad(lambda u: routed()(u).sum()), POSES),
    "dynamic_routing, reference": (routed(implementation="reference"), POSES),
    "dynamic_routing, two leading axes": (routed(), (2, *POSES)),
    "dynamic_routing, shared": (lambda u: capsjax.dynamic_routing(u, WEIGHTS[0]), POSES),
    "dynamic_routing, options": (with_all_options, POSES, (6, 3)),
    "dynamic_routing_from_votes": (capsjax.dynamic_routing_from_votes, (6, 3, 5)),
    "routing_couplings": (lambda u: capsjax.routing_couplings(u, WEIGHTS), POSES),
    "self_attention_routing": (
        lambda u: capsjax.self_attention_routing(u, WEIGHTS, couplings_bias=WEIGHTS[:, 0, :, 0]),
        POSES,
    ),
    "self_attention_routing, gradient, prior": (
        jax.grad(lambda u, prior: capsjax.self_attention_routing(u, WEIGHTS, prior=prior).sum()),
        POSES,
        (6, 3),
    ),
    "inverted_attention_routing, mask": (
        lambda u: capsjax.inverted_attention_routing(u, WEIGHTS, mask=jnp.arange(6) < 4),
        POSES,
    ),
    "coupling_entropy": (capsjax.coupling_entropy, (6, 3)),
    "squash": (capsjax.squash, POSES),
    "lengths": (capsjax.lengths, POSES),
    "margin_loss": (capsjax.margin_loss, (10,), (10,)),
    "reconstruction_loss": (capsjax.reconstruction_loss, IMAGES, IMAGES),
    "strided_conv": (
        lambda x: capsjax.strided_conv(x, jnp.ones((9, 9, 16, 8)), stride=2),
        (20, 20, 16),
    ),
    "Capsules": (nn.Capsules(6, 4, 3, 5, rngs=nnx.Rngs(0)), POSES),
    "Capsules.couplings": (nn.Capsules(6, 4, 3, 5, rngs=nnx.Rngs(0)).couplings, POSES),
    "Convolution": (nn.Convolution(1, 4, kernel_size=9, rngs=nnx.Rngs(0)), IMAGES),
    "PrimaryCapsules": (nn.PrimaryCapsules(4, types=3, rngs=nnx.Rngs(0)), (20, 20, 4)),
    "Decoder": (nn.Decoder(10, 16, IMAGES, rngs=nnx.Rngs(0)), (10, 16), (10,)),
    "CapsNet": (network(), IMAGES),
    "CapsNet.reconstruct": (network().reconstruct, (10, 16)),
    "EfficientCapsNet": (efficient_network(), (16, 16, 1)),
    "EfficientCapsNet.reconstruct": (efficient_network().reconstruct, (10, 16)),
}


# One example, and more than a tile of the plain form holds.
OTHER_SIZES = {"dynamic_routing": (1, 129), "dynamic_routing, gradient": (1, 129)}


@pytest.mark.parametrize("name", EXPORTED)
def test_a_symbolic_batch_exports(name):
    function, *shapes = EXPORTED[name]
    (batch,) = jax.export.symbolic_shape("b")
    structs = [jax.ShapeDtypeStruct((batch, *shape), "float32") for shape in shapes]
    compiled = jax.jit(lambda *arrays: function(*arrays))
    exported = jax.export.export(compiled, platforms=("cpu", "cuda", "tpu"))(*structs)
    rng = np.random.default_rng(0)
    for size in OTHER_SIZES.get(name, (3,)):
        arrays = [jnp.asarray(rng.random((size, *shape)), jnp.float32) for shape in shapes]
        found, wanted = exported.call(*arrays), compiled(*arrays)
        assert found.shape == wanted.shape
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
