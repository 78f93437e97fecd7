"""Programs of docs/recipes, run as they stand there, do what their pages say."""

import documents
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_text_classifier(capsys):
    page = documents.run("recipes/text_classifier.md")
    assert page["losses"][-1] < 0.1 * page["losses"][0]
    assert page["accuracy"] > 0.95
    assert page["difference"] < 1e-6
    assert page["strongest"] > 0.95
    assert "test accuracy" in capsys.readouterr().out

    parameters, words = page["parameters"], page["words"]
    alone = page["classes"](parameters, words)
    # The same weights, and 30 more places of another word as padding.
    padded = jnp.pad(words, ((0, 0), (0, 30)), constant_values=7)

    @jax.jit
    def routed(mask):
        poses, _ = page["children"](parameters, padded)
        return capsjax.dynamic_routing(poses, parameters["weights"], mask=mask)

    mask = jnp.pad(words > 0, ((0, 0), (0, 30)))
    np.testing.assert_allclose(routed(mask), alone, atol=1e-6)
    assert jnp.abs(routed(jnp.ones_like(mask)) - alone).max() > 0.01
    couplings = page["explain"](parameters, words)
    np.testing.assert_allclose(couplings.sum(-1), words > 0, atol=1e-6)


def test_point_autoencoder(capsys):
    page = documents.run("recipes/point_autoencoder.md")
    assert page["losses"][-1] < 0.2 * page["losses"][0]
    assert "reference values" in capsys.readouterr().out
    clouds = page["clouds"](jax.random.key(1), 4)
    model = nnx.merge(page["graph"], page["parameters"])
    encode, decode = jax.jit(model.encode), jax.jit(model.decode)
    capsules = encode(clouds)
    assert capsules.shape == (4, 8, 8)
    # A cloud is a set: its points may come in any order.
    np.testing.assert_array_equal(encode(clouds[:, ::-1]), capsules)
    # Each latent capsule draws a patch of its own.
    changed = decode(capsules.at[:, 3].set(0)) != decode(capsules)
    assert np.flatnonzero(changed.any((0, 2))).tolist() == list(range(24, 32))
