"""EfficientCapsNet: parameter counts, the authors' published weights, batch statistics."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import capsjax
from capsjax.models import EfficientCapsNet

pytestmark = pytest.mark.usefixtures("quick_compilation")

GOLDEN = pathlib.Path(__file__).parent / "golden" / "efficient_capsnet_smallnorb"


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def small(**settings):
    defaults = {
        "image_shape": (16, 16, 1),
        "num_classes": 3,
        "convolutions": ((4, 5, 1), (8, 3, 2)),
        "primary_kernel_size": 5,
        "primary_length": 4,
        "capsule_length": 6,
        "hidden": (7,),
        "rngs": nnx.Rngs(0),
    }
    return EfficientCapsNet(**defaults | settings)


def mapped(model):
    """The network as a function of images and the mode, compiled."""
    graph, state = nnx.split(model)

    @partial(jax.jit, static_argnums=1)
    def run(images, training):
        return nnx.merge(graph, state, copy=True)(images, training=training)

    return run


def random_images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).random(shape), jnp.float32)


@pytest.mark.parametrize(
    ("build", "parts"),
    [
        (EfficientCapsNet, (130_688, 10_496, 20_640, 1_411_344, 161_824)),
        (EfficientCapsNet.multi_mnist, (130_688, 3_328, 20_640, 1_936_144, 154_656)),
        (EfficientCapsNet.small_norb, (133_024, 8_320, 10_320, 229_570, 151_664)),
    ],
)
def test_parameter_counts(build, parts):
    model = nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
    found = [count(part) for part in (model.blocks, model.primary, model.capsules, model.decoder)]
    assert tuple(found) == parts[:4]
    assert count(model) - count(model.decoder) == parts[4]


def published(dtype):
    """The network for smallNORB with the authors' weights, and what theirs computes."""
    with np.load(GOLDEN / "weights.npz", allow_pickle=False) as file:
        weights = dict(file)
    model = nnx.eval_shape(lambda: EfficientCapsNet.small_norb(dtype=dtype, rngs=nnx.Rngs(0)))
    convolutions = [block.convolution for block in model.blocks]
    norms = [block.normalization for block in model.blocks]
    suffixes = ["", "_1", "_2", "_3"]
    names = [f"CapsNet/conv2d_{number}" for number in range(4, 9)]
    names += [f"Generator/conv2d{suffix}" for suffix in suffixes]
    kernels = [*convolutions, model.primary, *model.decoder.convolutions]
    modules = {**dict(zip(names, kernels, strict=True)), "Generator/dense": model.decoder.dense}
    variables = {}
    for name, module in modules.items():
        variables |= {f"{name}/kernel": module.kernel, f"{name}/bias": module.bias}
    for suffix, module in zip(suffixes, norms, strict=True):
        name = f"CapsNet/instance_normalization{suffix}"
        variables |= {f"{name}/gamma": module.scale, f"{name}/beta": module.bias}
    weights["CapsNet/digit_caps/W"] = weights["CapsNet/digit_caps/W"].transpose(1, 2, 0, 3)
    weights["CapsNet/digit_caps/b"] = weights["CapsNet/digit_caps/b"][:, :, 0].T
    variables["CapsNet/digit_caps/W"] = model.capsules.weights
    variables["CapsNet/digit_caps/b"] = model.capsules.couplings_bias
    assert variables.keys() == weights.keys()
    assert len(jax.tree.leaves(nnx.state(model))) == len(variables)
    for name, variable in variables.items():
        assert variable.shape == weights[name].shape, name
        variable.set_value(jnp.asarray(weights[name]))
    with np.load(GOLDEN / "golden.npz", allow_pickle=False) as file:
        return model, dict(file)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_published_weights_give_what_the_authors_program_computes(dtype):
    with jax.enable_x64(dtype == "float64"):
        model, golden = published(jnp.dtype(dtype))

        @jax.jit
        def run(images):
            capsules = model(images)
            return {
                "primary": model.primary_poses(images),
                "capsules": capsules,
                "lengths": jnp.sqrt(capsjax.lengths(capsules) ** 2 + 1e-7),
                "reconstructions": model.reconstruct(capsules),
            }

        found = run(jnp.asarray(golden.pop("images")))
    assert found.keys() == golden.keys()
    assert {x.dtype.name for x in found.values()} == {dtype}
    for name, wanted in golden.items():
        np.testing.assert_allclose(found[name], wanted, rtol=0, atol=1e-5, err_msg=name)


def test_a_training_step_lowers_the_loss_and_returns_the_statistics():
    structure, parameters, statistics = nnx.split(small(), nnx.Param, nnx.BatchStat)
    images, labels = random_images(6, 16, 16, 1), jnp.arange(6) % 3

    @jax.jit
    def loss_and_gradients(parameters, statistics):
        def loss(parameters):
            model = nnx.merge(structure, parameters, statistics, copy=True)
            capsules = model(images, training=True)
            margin = capsjax.margin_loss(capsjax.lengths(capsules), jax.nn.one_hot(labels, 3))
            error = capsjax.reconstruction_loss(model.reconstruct(capsules, labels), images)
            return (margin + error).mean(), nnx.state(model, nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(parameters)

    (before, updated), gradients = loss_and_gradients(parameters, statistics)
    assert jax.tree.structure(gradients) == jax.tree.structure(parameters)
    for path, gradient in jax.tree.leaves_with_path(gradients):
        assert np.any(gradient), path
    parameters = jax.tree.map(lambda x, d: x - 0.05 * d, parameters, gradients)
    (after, _), _ = loss_and_gradients(parameters, updated)
    assert after < before - 0.01

    # Running averages with momentum 0.99, from 0 and 1, of the first convolution's activations.
    model = nnx.merge(structure, *nnx.split(small(), nnx.Param, nnx.BatchStat)[1:])
    maps = np.asarray(jax.nn.relu(model.blocks[0].convolution(images)), np.float64)
    first = updated["blocks"][0]["normalization"]
    np.testing.assert_allclose(first["mean"][...], 0.01 * maps.mean((0, 1, 2)), rtol=1e-5)
    variance = 0.99 + 0.01 * maps.var((0, 1, 2))
    np.testing.assert_allclose(first["var"][...], variance, rtol=1e-5)


def test_the_mode_is_the_argument_of_a_call():
    model, images = small(), random_images(4, 16, 16, 1)
    run = mapped(model)
    alone = jnp.concatenate([run(image[None], False) for image in images])
    np.testing.assert_allclose(run(images, False), alone, atol=1e-6)
    assert np.abs(run(images, True) - run(images, False)).max() > 1e-2
    for ignored in (model.train, model.eval):
        ignored()
        np.testing.assert_allclose(mapped(model)(images, False), alone, atol=1e-6)


def test_evaluation_normalises_by_the_statistics():
    model, images = small(), random_images(2, 16, 16, 1)
    block = model.blocks[0]
    rng = np.random.default_rng(1)
    mean, var, scale, bias = (rng.random(4).astype(np.float32) for _ in range(4))
    norm = block.normalization
    norm.mean[...], norm.var[...], norm.scale[...], norm.bias[...] = mean, var, scale, bias
    maps = np.asarray(jax.nn.relu(block.convolution(images)))
    wanted = (maps - mean) / np.sqrt(var + 1e-3) * scale + bias
    np.testing.assert_allclose(block(images, training=False), wanted, atol=1e-5)


def test_a_state_restores_the_network():
    model, images = small(), random_images(2, 16, 16, 1)
    model.blocks[0].normalization.mean[...] = jnp.arange(4.0)
    state = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    other = small(rngs=nnx.Rngs(1))
    run = jax.jit(lambda state: nnx.merge(nnx.graphdef(other), state)(images))
    wanted = run(nnx.state(model))
    restored = nnx.state(other)
    assert np.abs(run(restored) - wanted).max() > 1e-3
    nnx.replace_by_pure_dict(restored, state)
    np.testing.assert_array_equal(run(restored), wanted)


def test_instance_normalization_knows_no_batch():
    model = small(normalization="instance", negative_slope=0.3)
    images = random_images(3, 16, 16, 1)
    run = mapped(model)
    np.testing.assert_allclose(run(images, True), run(images, False), atol=1e-6)
    np.testing.assert_allclose(run(images[:1], True), run(images, True)[:1], atol=1e-6)
    assert not jax.tree.leaves(nnx.state(model, nnx.BatchStat))


def test_primary_capsules_are_a_depthwise_convolution():
    model = small(image_shape=(20, 26, 1), primary_kernel_size=3, primary_stride=2)
    maps = random_images(2, 7, 10, 8)
    layer = model.primary
    layer.bias[...] = jnp.arange(8.0)
    convolved = lax.conv_general_dilated(
        maps,
        layer.kernel[...],
        (2, 2),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=8,
    )
    vectors = np.asarray(convolved + jnp.arange(8.0).reshape(1, 1, 1, 8)).reshape(2, 3 * 4 * 2, 4)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    wanted = (1 - np.exp(-norms)) * vectors / norms
    np.testing.assert_allclose(layer(maps), wanted, atol=1e-5)
    assert jax.eval_shape(model, jax.ShapeDtypeStruct((2, 20, 26, 1), "float32")).shape == (2, 3, 6)


def test_leading_axes_and_empty_batches():
    model = small(hidden=None)
    images = random_images(6, 16, 16, 1)

    @jax.jit
    def run(images):
        capsules = model(images)
        return capsules, model.reconstruct(capsules)

    together = run(images)
    assert [x.shape for x in together] == [(6, 3, 6), (6, 16, 16, 1)]
    in_two_axes = run(images.reshape(2, 3, 16, 16, 1))
    alone = run(images[0])
    for several, two, one in zip(together, in_two_axes, alone, strict=True):
        np.testing.assert_allclose(two.reshape(several.shape), several, atol=1e-6)
        np.testing.assert_allclose(one, several[0], atol=1e-6)
    assert [x.shape for x in run(images[:0])] == [(0, 3, 6), (0, 16, 16, 1)]


@pytest.mark.parametrize("hidden", [(7,), None])
def test_a_decoder_sees_one_class_only(hidden):
    model = small(hidden=hidden)
    capsules = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3, 6)), jnp.float32)
    labels = jnp.array([2, 1, 0, 1])
    drawn = model.reconstruct(capsules, labels)
    others = capsules.at[jnp.arange(4), labels].set(0)
    np.testing.assert_allclose(model.reconstruct(capsules - others, labels), drawn, atol=1e-6)
    assert np.abs(model.reconstruct(capsules, (labels + 1) % 3) - drawn).max() > 1e-3
    longest = jnp.argmax(capsjax.lengths(capsules), -1)
    np.testing.assert_array_equal(model.reconstruct(capsules), model.reconstruct(capsules, longest))
    assert 0 <= drawn.min() <= drawn.max() <= 1


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_state():
    def run(images):
        model = small(dtype=jnp.bfloat16, hidden=None)
        outputs = model(images, training=True)
        return outputs, model.reconstruct(outputs), jax.tree.leaves(nnx.state(model))

    images = jax.ShapeDtypeStruct((2, 16, 16, 1), jnp.float32)
    outputs, drawn, state = jax.eval_shape(run, images)
    assert outputs.dtype == drawn.dtype == jnp.bfloat16
    assert {leaf.dtype.name for leaf in state} == {"float32"}


def test_float64_has_statistics_in_float64():
    def run(images):
        model = small(dtype=jnp.float64)
        return model(images, training=True), nnx.state(model, nnx.BatchStat)

    with jax.enable_x64(True):
        outputs, statistics = jax.eval_shape(run, jax.ShapeDtypeStruct((2, 16, 16, 1), "float64"))
        assert outputs.dtype == jnp.float64
        assert {leaf.dtype.name for leaf in jax.tree.leaves(statistics)} == {"float64"}


def test_initial_scales_are_the_authors():
    model = EfficientCapsNet.small_norb(rngs=nnx.Rngs(0))
    last = model.blocks[3].convolution.kernel[...]
    np.testing.assert_allclose(last.std(), np.sqrt(2 / (9 * 64)), rtol=0.02)
    weights = model.capsules.weights[...]
    np.testing.assert_allclose(weights.std(), np.sqrt(2 / (5 * 16 * 8)), rtol=0.02)
    assert not np.any(model.capsules.couplings_bias[...])
    scale = model.blocks[3].normalization.scale[...]
    assert 0.04 < np.abs(scale).max() <= 0.05
    assert np.abs(scale.mean()) < 0.01


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_shape": (16, 14, 1)}, r"image_shape must be at least 15 pixels .* \(16, 14, 1\)"),
        ({"image_shape": (20, 16, 1), "hidden": None}, "a height and width of multiples of 8"),
        ({"primary_length": 3}, "convolutions must end with a multiple of primary_length = 3"),
        ({"normalization": "layer"}, "normalization must be one of batch, instance, got 'layer'"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=f"^EfficientCapsNet: .*{message}"):
        small(**settings)
