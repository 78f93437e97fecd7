"""The public convolution: what it chooses, leading axes, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import capsjax
from capsjax.kernels.strided_conv import patches, spectral


def _operations(function, *arguments, platform):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_a_cpu_gets_matrix_products_and_an_accelerator_its_own_convolution():
    shapes = (
        jax.ShapeDtypeStruct((8, 20, 20, 64), jnp.float32),
        jax.ShapeDtypeStruct((9, 9, 64, 64), jnp.float32),
    )

    def loss(images, kernel):
        return capsjax.strided_conv(images, kernel, stride=2).sum()

    gradients = jax.grad(loss, (0, 1))
    assert "stablehlo.convolution" not in _operations(gradients, *shapes, platform="cpu")
    for platform in ("cuda", "tpu"):
        assert "stablehlo.convolution" in _operations(gradients, *shapes, platform=platform)


@pytest.mark.parametrize(
    ("images", "kernel", "stride", "pays"),
    [
        ((128, 20, 20, 256), (9, 9, 256, 256), 2, True),  # the paper's primary capsules
        ((64, 20, 20, 64), (9, 9, 64, 64), 2, True),
        ((64, 20, 20, 256), (9, 9, 256, 256), 2, True),
        ((20, 20, 20, 256), (9, 9, 256, 256), 2, True),
        ((8, 20, 20, 256), (9, 9, 256, 256), 2, False),
        ((64, 20, 20, 128), (3, 3, 128, 128), 1, True),
        ((64, 20, 20, 128), (9, 9, 128, 128), 3, False),
        ((128, 28, 28, 1), (9, 9, 1, 256), 1, False),  # its first layer: one channel
        ((1, 20, 20, 256), (9, 9, 256, 256), 2, False),  # the kernel's transform for one image
        ((128, 16, 16, 64), (3, 3, 64, 64), 2, False),
    ],
)
def test_the_spectral_form_is_chosen_where_it_was_measured_to_be_faster(
    images, kernel, stride, pays
):
    shapes = jax.ShapeDtypeStruct(images, jnp.float32), jax.ShapeDtypeStruct(kernel, jnp.float32)

    def trace():
        jax.eval_shape(lambda x, k: spectral.strided_conv(x, k, stride=(stride, stride)), *shapes)

    if pays:
        trace()
    else:
        with pytest.raises(capsjax.Unsupported, match="cost more than the direct sum"):
            trace()


@pytest.mark.parametrize("form", ["spectral", "patches"])
def test_the_forms_of_a_cpu_run_in_a_shard_map(form, monkeypatch):
    """Whose images vary over the mesh while the kernel does not."""
    monkeypatch.setattr(spectral, "_worthwhile", lambda *_: True)
    monkeypatch.setattr(patches, "WHOLE", 0)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    keys = jax.random.split(jax.random.key(0), 2)
    arrays = jax.random.normal(keys[0], (9, 8, 7, 8)), jax.random.normal(keys[1], (3, 3, 8, 4))

    def loss(images, kernel, implementation):
        convolved = capsjax.strided_conv(images, kernel, stride=2, implementation=implementation)
        return (convolved**2).sum()

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data"))
    def gradients(images, kernel):
        found = jax.grad(loss, (0, 1))(images, kernel, form)
        return found[0], found[1][None]

    images, kernel = gradients(*arrays)
    wanted = jax.grad(loss, (0, 1))(*arrays, "xla")
    np.testing.assert_allclose(images, wanted[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(kernel[0], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("batch", "stride"), [(8, 1), (6, 2), (1, 1)])
def test_patches_of_blocks_give_the_values_and_gradients_of_xla(batch, stride, monkeypatch):
    monkeypatch.setattr(patches, "WHOLE", 0)
    rng = np.random.default_rng(0)
    shapes = (batch, 7, 9, 8), (3, 2, 8, 5)

    def loss(images, kernel, implementation):
        convolved = capsjax.strided_conv(
            images, kernel, stride=stride, implementation=implementation
        )
        return (convolved**3).sum()

    with jax.enable_x64(True):
        arrays = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        both = jax.value_and_grad(loss, (0, 1))
        found, wanted = (both(*arrays, name) for name in ("patches", "xla"))
        traced = jax.make_jaxpr(lambda *arrays: loss(*arrays, "patches"))(*arrays)
        for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)
        one_by_one = jax.vmap(capsjax.strided_conv, (0, None))(arrays[0][:, None], arrays[1])
        np.testing.assert_allclose(
            one_by_one[:, 0], capsjax.strided_conv(*arrays, implementation="xla"), atol=1e-11
        )
    assert ("scan" in str(traced)) == (batch > 1)


def test_blocks_are_made_of_large_batches_of_known_size_and_many_channels():
    def has_loop(batch, channels):
        shapes = (batch, 24, 24, channels), (3, 3, channels, 64)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        traced = jax.make_jaxpr(
            lambda *arrays: capsjax.strided_conv(*arrays, implementation="patches")
        )(*arrays)
        return "scan" in str(traced)

    symbolic = jax.export.symbolic_shape("b")[0]
    assert has_loop(128, 32)
    assert not any(has_loop(*sizes) for sizes in ((16, 32), (128, 4), (symbolic, 32)))


@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_no_image_gives_no_map(leading):
    convolved = capsjax.strided_conv(
        jnp.zeros((*leading, 8, 7, 2)), jnp.ones((3, 3, 2, 4)), stride=2
    )
    assert convolved.shape == (*leading, 3, 3, 4)


def test_leading_axes():
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.random((2, 3, 8, 9, 2)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 2, 4)), jnp.float32)
    convolved = capsjax.strided_conv(images, kernel, stride=2)
    assert convolved.shape == (2, 3, 3, 4, 4)
    alone = capsjax.strided_conv(images[1, 2], kernel, stride=2)
    np.testing.assert_allclose(convolved[1, 2], alone, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "kernel", "stride", "message"),
    [
        ((8, 8), (3, 3, 1, 4), 1, r"images must have shape \[..., H, W, C\]"),
        (
            (8, 8, 2),
            (3, 3, 1, 4),
            1,
            r"kernel must have shape \[h, w, C, O\] = \[any, any, 2, any\]",
        ),
        ((8, 8, 1), (9, 3, 1, 4), 1, "kernel must fit into the images, 8 x 8, got 9 x 3"),
        ((8, 8, 1), (3, 3, 1, 4), 0, "stride must be an integer of at least 1, got 0"),
    ],
)
def test_errors(images, kernel, stride, message):
    with pytest.raises(ValueError, match=f"strided_conv: {message}"):
        capsjax.strided_conv(jnp.ones(images), jnp.ones(kernel), stride=stride)
    with pytest.raises(TypeError, match="strided_conv: kernel must have the dtype of images"):
        capsjax.strided_conv(jnp.ones((8, 8, 1)), jnp.ones((3, 3, 1, 4), jnp.bfloat16))
