"""Entries of masked capsules mean absent, whatever they are: results and gradients equal zeros."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax
from capsjax import recommend

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, I, R, P, J, E, D = 2, 4, 2, 3, 3, 2, 4  # noqa: E741
MASK, PARENT_MASK = np.array([1, 0, 1, 1], bool), np.array([1, 1, 0], bool)
CHILD, PARENT = ~MASK, ~PARENT_MASK
OF_CHILDREN_AND_PARENTS = CHILD[:, None] | PARENT
MASKS = {"mask": MASK, "parent_mask": PARENT_MASK}
# Another mask for each example; child 1 and parent 2 are masked in both.
EACH = {
    "mask": np.array([[1, 0, 1, 1], [0, 0, 1, 1]], bool),
    "parent_mask": np.array([[1, 1, 0], [0, 1, 0]], bool),
}


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def probabilities(*shape):
    return np.abs(np.tanh(normal(*shape)))


# Arrays by name, with booleans that broadcast to them and tell what belongs to a masked capsule.
POSES = normal(B, I, P), CHILD[:, None]
MATRICES = normal(B, I, R, P), CHILD[:, None, None]
ACTIVATIONS = probabilities(B, I), CHILD
WEIGHTS = normal(I, P, J, D), OF_CHILDREN_AND_PARENTS[:, None, :, None]
SHARED_WEIGHTS = normal(P, J, D), PARENT[:, None]
MATRIX_WEIGHTS = normal(I, P, J, E), OF_CHILDREN_AND_PARENTS[:, None, :, None]
PRIOR, PRIOR_OF_EACH = (
    (normal(I, J), OF_CHILDREN_AND_PARENTS),
    (normal(B, I, J), OF_CHILDREN_AND_PARENTS),
)
GAUSSIAN = {
    "poses": MATRICES,
    "activations": ACTIVATIONS,
    "weights": MATRIX_WEIGHTS,
    "beta_u": (normal(J), PARENT),
    "beta_a": (normal(J), PARENT),
    "coordinates": (normal(I, R, E), CHILD[:, None, None]),
    "prior": PRIOR,
}
# In a convolution, 3 x 3 windows of 2 x 2: types of children and of parents are masked everywhere.
WINDOWS = {
    "poses": (normal(B, 4, 4, I, P), CHILD[:, None]),
    "activations": (probabilities(B, 4, 4, I), CHILD),
    "weights": (normal(2, 2, I, P, J, D), OF_CHILDREN_AND_PARENTS[:, None, :, None]),
    "beta_u": (normal(J), PARENT),
    "beta_a": (normal(J), PARENT),
    "prior": (normal(2, 2, I, J), OF_CHILDREN_AND_PARENTS),
}
OF_WINDOWS = {"mask": np.broadcast_to(MASK, (4, 4, I)), "parent_mask": PARENT_MASK, "stride": 1}
STEP = {"poses": POSES, "weights": WEIGHTS, "parents": (normal(B, J, D), PARENT[:, None])}
DYNAMIC = {"poses": POSES, "weights": WEIGHTS, "bias": (normal(J, D), PARENT[:, None])}
KMEANS = {"poses": POSES, "weights": WEIGHTS, "initial_logits": PRIOR_OF_EACH}
INTERESTS = {"items": POSES, "weights": WEIGHTS, "initial_logits": PRIOR}
FIRST = {"mask": MASK, "num_interests": np.array([1, 2])}  # of 3
ROUTED = {
    "dynamic": (capsjax.dynamic_routing, DYNAMIC | {"prior": PRIOR}, MASKS),
    "dynamic, reference": (
        partial(capsjax.dynamic_routing, implementation="reference"),
        DYNAMIC | {"prior": PRIOR_OF_EACH},
        MASKS,
    ),
    "dynamic, masks of each example": (capsjax.dynamic_routing, DYNAMIC | {"prior": PRIOR}, EACH),
    "dynamic, shared weights": (
        capsjax.dynamic_routing,
        {"poses": POSES, "weights": SHARED_WEIGHTS, "prior": PRIOR_OF_EACH},
        MASKS,
    ),
    "dynamic, votes": (
        capsjax.dynamic_routing_from_votes,
        {"votes": (normal(B, I, J, D), OF_CHILDREN_AND_PARENTS[..., None]), "prior": PRIOR},
        MASKS,
    ),
    "dynamic, couplings": (partial(capsjax.routing_couplings, num_iterations=2), DYNAMIC, MASKS),
    "em": (partial(capsjax.em_routing, num_iterations=2), GAUSSIAN, MASKS),
    "em, positions": (partial(capsjax.em_routing, num_iterations=2), WINDOWS, OF_WINDOWS),
    "variational_bayes": (
        partial(capsjax.variational_bayes_routing, num_iterations=2),
        GAUSSIAN,
        EACH,
    ),
    "self": (
        capsjax.self_routing,
        {
            "poses": MATRICES,
            "activations": ACTIVATIONS,
            "weights": MATRIX_WEIGHTS,
            "routing_weights": (
                normal(I, R, P, J),
                OF_CHILDREN_AND_PARENTS[:, None, None, :],
            ),
            "routing_bias": PRIOR,
            "prior": PRIOR_OF_EACH,
        },
        MASKS,
    ),
    "self, types": (
        capsjax.self_routing,
        {name: WINDOWS[name] for name in ("poses", "activations", "weights", "prior")}
        | {
            "routing_weights": (
                normal(2, 2, I, P, J),
                OF_CHILDREN_AND_PARENTS[:, None, :],
            ),
        },
        OF_WINDOWS,
    ),
    "self_attention": (
        capsjax.self_attention_routing,
        {"poses": POSES, "weights": WEIGHTS, "couplings_bias": PRIOR, "prior": PRIOR},
        MASKS,
    ),
    "inverted_attention": (
        capsjax.inverted_attention_routing,
        {"poses": POSES, "weights": WEIGHTS, "prior": PRIOR},
        MASKS,
    ),
    "inverted_attention, step": (capsjax.inverted_attention_step, STEP, MASKS),
    "kmeans": (partial(capsjax.kmeans_routing, num_iterations=2), KMEANS | {"prior": PRIOR}, MASKS),
    "kmeans, cosine": (
        partial(capsjax.kmeans_routing, similarity="cosine", carry_couplings=True, gradient="last"),
        KMEANS,
        MASKS,
    ),
    "interests": (recommend.multi_interests, INTERESTS, FIRST),
    "interests, kmeans": (
        partial(recommend.multi_interests, routing="kmeans"),
        INTERESTS,
        FIRST,
    ),
    "interests, self-attentive": (
        recommend.self_attentive_interests,
        {
            "items": POSES,
            "hidden_weights": (normal(P, 5), np.array(False)),
            "query_weights": (normal(5, J), PARENT),
            "position_embeddings": (normal(I, P), CHILD[:, None]),
        },
        FIRST,
    ),
    "interests, read": (
        recommend.label_aware_attention,
        {"interests": (normal(B, J, D), PARENT[:, None]), "target": (normal(B, D), np.array(0))},
        {"num_interests": 2},
    ),
}


@pytest.mark.parametrize("name", ROUTED)
def test_entries_of_masked_capsules_are_as_if_zero(name):
    function, arrays, settings = ROUTED[name]

    @jax.jit
    def run(arrays):
        def total(arrays):
            found = function(**arrays, **settings)
            parts = jax.tree.leaves(found)
            return sum(
                jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in parts
            ), found

        (_, found), gradients = jax.value_and_grad(total, has_aux=True)(arrays)
        return found, gradients

    def filled(content):
        given = content.astype(np.float32)
        return {
            key: np.where(absent, np.resize(given, x.shape), x)
            for key, (x, absent) in arrays.items()
        }

    wanted = run(filled(np.zeros(1)))
    assert any(np.any(x != 0) for x in jax.tree.leaves(wanted[0]))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(wanted))
    for content in ([np.nan], [np.inf, -np.inf, 3e38]):
        jax.tree.map(np.testing.assert_array_equal, run(filled(np.array(content))), wanted)


def test_masked_weights_stay_shared_under_vmap():
    """Else a mask of each example would copy the weights for each."""
    poses, weights = POSES[0], WEIGHTS[0].copy()
    weights[1] = np.nan

    def route(poses, mask):
        return capsjax.dynamic_routing(poses, weights, mask=mask)

    mapped = jax.vmap(route)
    np.testing.assert_allclose(
        mapped(poses, EACH["mask"]),
        capsjax.dynamic_routing(poses, weights, mask=EACH["mask"]),
        atol=1e-6,
    )
    assert f"[{B},{I},{P},{J},{D}]" not in str(jax.make_jaxpr(mapped)(poses, EACH["mask"]))


def test_activations_of_masked_capsules_may_be_outside_their_range():
    arrays = {name: array for name, (array, _) in GAUSSIAN.items()}
    arrays["activations"] = np.where(CHILD, np.nan, arrays["activations"])
    poses, activations = capsjax.em_routing(**arrays, **MASKS)
    assert np.all(np.isfinite(poses))
    assert np.all(np.isfinite(activations))


GIVEN = {name: array for name, (array, _) in GAUSSIAN.items()}


@pytest.mark.parametrize(
    ("function", "arrays", "name"),
    [
        (capsjax.em_routing, GIVEN, "inverse_temperature"),
        (capsjax.em_routing, GIVEN, "cost_scale"),
        (capsjax.em_routing, GIVEN, "min_variance"),
        (capsjax.variational_bayes_routing, GIVEN, "nu0"),
        (capsjax.variational_bayes_routing, GIVEN, "psi0"),
        (capsjax.kmeans_routing, {"poses": POSES[0], "weights": WEIGHTS[0]}, "temperature"),
        (capsjax.kmeans_routing, {"poses": POSES[0], "weights": WEIGHTS[0]}, "squash_power"),
        (capsjax.inverted_attention_routing, GIVEN | {"matrix": True}, "num_iterations"),
        (
            recommend.label_aware_attention,
            {"interests": POSES[0], "target": POSES[0][:, 0]},
            "power",
        ),
    ],
)
@pytest.mark.parametrize("value", [True, np.True_, jnp.array(True)], ids=["bool", "NumPy", "JAX"])
def test_booleans_are_no_numbers(function, arrays, name, value):
    if name == "num_iterations":
        arrays = {key: arrays[key] for key in ("poses", "weights", "matrix")}
    with pytest.raises(
        (TypeError, ValueError), match=f"{name} must be a.* number|{name} must be an integer"
    ):
        function(**arrays, **{name: value})


def test_forward_mode_of_the_default_names_the_implementation_that_has_it():
    poses, weights = jnp.asarray(POSES[0]), jnp.asarray(WEIGHTS[0])

    def route(poses):
        return capsjax.dynamic_routing(poses, weights)

    for forward in (
        lambda: jax.jvp(route, (poses,), (poses,)),
        lambda: jax.jit(lambda x: jax.jvp(route, (x,), (x,)))(poses),
        lambda: jax.jacfwd(route)(poses),
        lambda: jax.jit(jax.jacfwd(route))(poses),
        lambda: jax.jvp(jax.vmap(route), (poses[None],), (poses[None],)),
    ):
        with pytest.raises(TypeError, match="implementation='reference'"):
            forward()


def test_gradients_of_the_default_have_forward_mode():
    poses, weights = jnp.asarray(POSES[0]), jnp.asarray(WEIGHTS[0])

    def twice(implementation):
        def route(x):
            return capsjax.dynamic_routing(x, weights, implementation=implementation).sum()

        return jax.jvp(jax.grad(route), (poses,), (poses,))[1]

    np.testing.assert_allclose(twice("xla"), twice("reference"), rtol=1e-4, atol=1e-6)
