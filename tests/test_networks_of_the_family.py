"""Published networks of other routings: sizes, and that steps of training lower the loss."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from capsjax import models, nn

pytestmark = pytest.mark.usefixtures("quick_compilation")

SR = {"conv_channels": 8, "types": 3, "length": 4}
INVERTED = {"channels": (4, 6), "blocks": (1, 1), "types": (2, 3, 2)}
# With the paper's 0.01 activations move slowly from 0.5: its schedule is for long training.
EM = nn.EMRouting(2, inverse_temperature=1.0)
MATRIX = {"conv_channels": 8, "primary_types": 3, "types": (3, 2)}


def count(build):
    """The number of parameters, which nothing computes."""
    state = nnx.state(nnx.eval_shape(build), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


PARAMETERS = {
    # 5·5·2·32 + 32, 32·544 + 544, 9·32·32·16 twice, 32·5·16, and two costs of each output type.
    "MatrixCapsNet": (lambda: models.MatrixCapsNet(rngs=nnx.Rngs(0)), 317_194),
    "MatrixCapsNet.small": (lambda: models.MatrixCapsNet.small(rngs=nnx.Rngs(0)), 68_754),
    # Convolutions 98·256, 6400·(256 + 16), capsules 144·(256·16 + 16·16 + 16), classes
    # 576·(80 + 5), and two numbers for each of 256 + 256 + 16 + 256 normalised channels.
    "SRCapsNet": (lambda: models.SRCapsNet(rngs=nnx.Rngs(0)), 2_445_408),
    # Backbone 1,340,224, primary 65,568, capsules 2·147,488 + 128,032, classifier 17.
    "InvertedAttentionCapsNet": (
        lambda: models.InvertedAttentionCapsNet(rngs=nnx.Rngs(0)),
        1_828_817,
    ),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_counted(name):
    build, wanted = PARAMETERS[name]
    assert count(build) == wanted


def spread_loss(activations, labels):
    """Hinton, Sabour and Frosst 2018, equation 3, with the margin 0.9."""
    of_class = jnp.take_along_axis(activations, labels[:, None], 1)
    short = jnp.maximum(0, 0.9 - (of_class - activations)) ** 2
    return jnp.mean(jnp.sum(short, 1) - 0.81)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


NETWORKS = {
    "MatrixCapsNet": (
        lambda: models.MatrixCapsNet((17, 18, 1), 3, **MATRIX, routing=EM, rngs=nnx.Rngs(0)),
        lambda model, images, labels: spread_loss(model(images)[1], labels),
    ),
    "SRCapsNet": (
        lambda: models.SRCapsNet((17, 18, 1), 3, **SR, rngs=nnx.Rngs(0)),
        lambda model, images, labels: cross_entropy(jnp.log(model(images, training=True)), labels),
    ),
    "InvertedAttentionCapsNet": (
        lambda: models.InvertedAttentionCapsNet((17, 18, 1), 3, **INVERTED, rngs=nnx.Rngs(0)),
        lambda model, images, labels: cross_entropy(model(images, training=True), labels),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_training_lowers_the_loss_and_reaches_every_parameter(name):
    build, objective = NETWORKS[name]
    structure, params, others = nnx.split(build(), nnx.Param, ...)
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.uniform(size=(6, 17, 18, 1)), jnp.float32)
    labels = jnp.asarray([0, 1, 2, 0, 1, 2])
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, others, state):
        def loss(params):
            model = nnx.merge(structure, params, others, copy=True)
            value = objective(model, images, labels)
            return value, nnx.split(model, nnx.Param, ...)[2]

        (value, others), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), others, state, value, gradients

    state = optimizer.init(params)
    values, moved = [], None
    for _ in range(30):
        params, others, state, value, gradients = step(params, others, state)
        values.append(float(value))
        nonzero = jax.tree.map(lambda x: bool(jnp.any(x != 0)), gradients)
        moved = nonzero if moved is None else jax.tree.map(lambda a, b: a or b, moved, nonzero)
    assert np.isfinite(values).all()
    assert values[-1] < 0.7 * values[0]
    without = [jax.tree_util.keystr(k) for k, v in jax.tree.leaves_with_path(moved) if not v]
    assert without == []


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.MatrixCapsNet((16, 32, 1), rngs=nnx.Rngs(0)), "at least 17 pixels"),
        (lambda: models.SRCapsNet((4, 32, 1), rngs=nnx.Rngs(0)), "at least"),
        (
            lambda: models.InvertedAttentionCapsNet((12, 32, 1), rngs=nnx.Rngs(0)),
            "at least 13 pixels",
        ),
    ],
)
def test_images_that_are_too_small_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


ANY = {
    "CapsNet": lambda: models.CapsNet((28, 20, 1), 3, rngs=nnx.Rngs(0)),
    "EfficientCapsNet": lambda: models.EfficientCapsNet((28, 29, 1), 3, rngs=nnx.Rngs(0)),
    **{name: build for name, (build, _) in NETWORKS.items()},
}


@pytest.mark.parametrize("name", ANY)
def test_images_of_another_shape_or_type_are_refused(name):
    model = nnx.eval_shape(ANY[name])
    height, width, channels = model.image_shape
    wanted = f"[any, {height}, {width}, {channels}]"
    for shape in (
        *((2, width, height, channels), (2, height, width, 3), (2, height, width)),
        *((2, channels, height, width), (2, height * width), (2, height + 1, width, channels)),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: images must have shape .*, got ") as error:
            nnx.eval_shape(lambda model, shape=shape: model(jnp.zeros(shape)), model)
        assert f"= {wanted}, got {shape}" in str(error.value)
    images = jnp.zeros((2, *model.image_shape), jnp.uint8)
    message = rf"^{name}: images must be floating, from 0 to 1, got uint8"
    with pytest.raises(TypeError, match=message):
        nnx.eval_shape(lambda model: model(images), model)


@pytest.mark.parametrize("name", ["CapsNet", "EfficientCapsNet"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([2, 3], r"labels must be 0 to 2, got 2 to 3"),
        ([-1, 1], r"labels must be 0 to 2, got -1 to 1"),
        ([1, 1, 1], r"labels must have shape \[...\] = \[2\], got \(3,\)"),
        ([0.0, 1.0], r"labels must be integers, got float32"),
        ([True, False], r"labels must be integers, got bool"),
    ],
)
def test_labels_that_are_no_classes_are_refused(name, labels, message):
    model = nnx.eval_shape(ANY[name])
    with pytest.raises((ValueError, TypeError), match=f"^{name}.reconstruct: {message}$"):
        model.reconstruct(jnp.zeros((2, 3, 16)), jnp.asarray(labels))
