"""Arrays in float8 are refused; bfloat16 needs no implicit promotion, gradients included."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import capsjax
from capsjax import recommend

pytestmark = pytest.mark.usefixtures("quick_compilation")

LENGTHS = jnp.array([3, 5])
INTERESTS = partial(
    recommend.multi_interests,
    max_interests=3,
    num_interests=jnp.array([1, 2]),
    mask=jnp.arange(5)[None] < LENGTHS[:, None],
)
KMEANS = partial(INTERESTS, routing="kmeans", key=jax.random.key(0))
READ = recommend.label_aware_attention


def self_attentive(items, weights):
    bias, positions = jnp.ones(4), jnp.ones((5, 4))
    return recommend.self_attentive_interests(
        items, weights, weights, hidden_bias=bias, position_embeddings=positions
    )


RECOMMEND = {
    "dynamic": partial(INTERESTS, key=jax.random.key(0)),
    "kmeans": partial(KMEANS, squash_power=0.5, gradient="full"),
    "kmeans, couplings": partial(KMEANS, carry_couplings=True),
    "self-attentive": self_attentive,
    "read": lambda items, weights: READ(items @ weights, items[:, 0], power=1.5, num_interests=2),
}


@pytest.mark.parametrize("name", RECOMMEND)
def test_interests_in_bfloat16_under_strict_promotion(name):
    def total(items, weights):
        return RECOMMEND[name](items, weights).astype(jnp.float32).sum()

    items, weights = jnp.ones((2, 5, 4), jnp.bfloat16), jnp.eye(4, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("strict"):
        gradients = jax.grad(total, (0, 1))(items, weights)
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_float8_is_refused(dtype):
    poses, weights = jnp.ones((2, 5, 4), dtype), jnp.ones((5, 4, 3, 4), dtype)
    numbers, each = jnp.ones((2, 5), dtype), jnp.ones(3, dtype)
    calls = [
        partial(capsjax.dynamic_routing, poses, weights),
        partial(capsjax.dynamic_routing_from_votes, weights),
        partial(capsjax.em_routing, poses, numbers, weights, beta_u=each, beta_a=each),
        partial(capsjax.self_routing, poses, numbers, weights, weights[..., 0]),
        partial(capsjax.self_attention_routing, poses, weights),
        partial(capsjax.inverted_attention_routing, poses, weights),
        partial(capsjax.kmeans_routing, poses, weights),
        partial(KMEANS, poses, weights[0, :, 0]),
        partial(READ, poses, poses[:, 0]),
        partial(capsjax.squash, poses),
        partial(capsjax.lengths, poses),
        partial(capsjax.coupling_entropy, numbers),
        partial(capsjax.margin_loss, numbers, numbers),
        partial(capsjax.reconstruction_loss, weights, weights),
        partial(capsjax.strided_conv, weights, weights),
    ]
    for call in calls:
        with pytest.raises(
            TypeError, match=r": \w+ must be floating of at least 16 bits, got float8"
        ):
            call()
