"""Routing diagnostics, of arrays with known values and of a network."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_figures import assert_legible

import capsjax
from capsjax.models import CapsNet
from experiments import files, train_mnist
from experiments.analysis import diagnostics, inspection
from experiments.data import datasets
from experiments.errors import InputError
from experiments.figures import routing
from experiments.training import loop, mnist, runs, transforms
from experiments.training.objectives import CapsuleClassification
from experiments.training.transforms import Augmentation

pytestmark = pytest.mark.usefixtures("quick_compilation")


def middles(split, size):
    """Return the central 19 x 19 pixels of the first digits: 2 x 2 primary capsules per type."""
    return datasets.Split(split.images[:size, 4:23, 4:23], split.labels[:size])


def test_entropy_of_uniform_and_one_hot_couplings():
    couplings = jnp.array([[[[0.25] * 4] * 2], [[[1.0, 0, 0, 0], [0.5, 0.5, 0, 0]]]])
    expected = [math.log(4), math.log(2) / 2]
    np.testing.assert_allclose(diagnostics.mean_coupling_entropy(couplings), expected, rtol=1e-6)


def test_a_clear_parent_has_a_coupling_above_the_threshold():
    undecided, half, clear = [0.25] * 4, [0.5, 0.5, 0, 0], [0.1, 0.1, 0.6, 0.2]
    couplings = jnp.array([[[undecided, half]], [[half, clear]], [[clear, clear]]])
    np.testing.assert_allclose(diagnostics.clear_parent_fraction(couplings), [0, 0.5, 1])
    np.testing.assert_allclose(
        diagnostics.clear_parent_fraction(couplings, threshold=0.3), [0.5, 1, 1]
    )


def test_a_dead_capsule_is_short_in_all_examples():
    lengths = jnp.array([[0.05, 0.9, 0.1, 0.0], [0.05, 0.0, 0.1, 0.2]])
    np.testing.assert_allclose(diagnostics.dead_fraction(lengths), 0.5)
    np.testing.assert_allclose(diagnostics.dead_fraction(lengths, threshold=0.01), 0.0)


def test_gradient_fractions_are_of_squared_norms_of_subtrees():
    gradients = {
        "decoder": {"layers": {0: jnp.array([1.0, 2.0]), 1: jnp.array([[2.0]])}},  # 9
        "capsules": {"weights": jnp.array([4.0])},  # 16
        "primary": {"kernel": jnp.zeros(3)},
    }
    fractions = diagnostics.gradient_fractions(gradients)
    expected = {"decoder": 9 / 25, "capsules": 16 / 25, "primary": 0}
    assert fractions.keys() == expected.keys()
    for part, fraction in expected.items():
        np.testing.assert_allclose(fractions[part], fraction, rtol=1e-6)


def test_gradient_fractions_of_a_zero_gradient_are_zero():
    assert float(diagnostics.gradient_fractions({"a": jnp.zeros(2)})["a"]) == 0


@pytest.fixture(scope="module")
def small():
    """A network with two iterations, and 70 digits, more than the diagnostics use."""
    digits = middles(datasets.load("mnist_small").train, 70)

    def build():
        return CapsNet(
            digits.images.shape[1:],
            conv_channels=2,
            primary_types=4,
            capsule_length=4,
            num_iterations=2,
            hidden=(16,),
            rngs=nnx.Rngs(0),
        )

    trainer = loop.Trainer(
        build, CapsuleClassification(10, Augmentation(shift=1), 0.0005), optax.adam(0.01)
    )
    params = trainer.initial_state(0).params
    params["capsules"]["weights"] *= 20  # long votes, so that routing changes the couplings
    return trainer, params, digits


def test_diagnostics_are_those_of_the_first_augmented_examples(small):
    trainer, params, examples = small
    row = diagnostics.make_diagnostics(trainer, examples)(params)
    images, labels = examples.images[: diagnostics.EXAMPLES], examples.labels[:64]
    key = jax.random.key(0)
    images = trainer.objective.augment(transforms.scaled(jnp.asarray(images)), key)

    @jax.jit
    def recompute(params):
        model = trainer.model(params)
        poses = model.primary_poses(images)
        weights = params["capsules"]["weights"]

        def loss(params):
            losses, _ = trainer.objective.loss(trainer.model(params), images, labels, key)
            return losses.mean()

        return (
            capsjax.routing_couplings(poses, weights, num_iterations=2),
            capsjax.lengths(poses),
            capsjax.lengths(model(images)),
            jax.grad(loss)(params),
        )

    couplings, primary, classes, gradients = recompute(params)
    expected = {
        "coupling_entropy_1": math.log(10),
        "coupling_entropy_2": capsjax.coupling_entropy(couplings[1]).mean(),
        "clear_parents_1": 0,
        "clear_parents_2": (couplings[1].max(axis=2) > 0.5).mean(),
        "dead_primary_capsules": (primary.max(axis=0) <= 0.1).mean(),
        "dead_class_capsules": (classes.max(axis=0) <= 0.1).mean(),
        "gradient_norm": math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients))),
    }
    fractions = {name: row.pop(name) for name in list(row) if name.startswith("gradient_share_")}
    assert row.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(row[name], value, rtol=1e-3, err_msg=name)
    assert 0 < row["clear_parents_2"] < 1
    assert fractions.keys() == {
        f"gradient_share_{part}" for part in ("convolution", "primary", "capsules", "decoder")
    }
    np.testing.assert_allclose(sum(fractions.values()), 1, rtol=1e-5)
    json.dumps(row | fractions, allow_nan=False)  # plain numbers


def test_train_mnist_refuses_networks_without_capsules_before_writing(tmp_path, monkeypatch):
    whole = datasets.load("mnist_small")
    few = dataclasses.replace(whole, train=middles(whole.train, 24), test=middles(whole.test, 8))
    monkeypatch.setattr(runs, "prepare", lambda config: few)
    config = mnist.Config(
        workdir=str(tmp_path / "run"), network="pooling_cnn", batch_size=8, diagnostics=True
    )
    with pytest.raises(InputError, match=r"^--diagnostics measures routing, .* no capsules$"):
        train_mnist.main(config)
    assert not (tmp_path / "run").exists()


def test_figure_is_drawn_only_if_rows_have_diagnostics(small, monkeypatch, tmp_path):
    trainer, params, examples = small
    drawn = []
    monkeypatch.setattr(files, "save_figure", lambda figure, path: drawn.append(path.name))
    monkeypatch.setattr(inspection, "_capsule_figures", lambda *_: {})
    scores = np.eye(10, dtype=np.float32)[examples.labels]
    for rows in ([{"epoch": 1.0}], [{"epoch": 1.0} | ROW]):
        evaluation = loop.Evaluation(scores, 0.5)
        inspection.draw_figures(trainer, params, examples, evaluation, rows, tmp_path)
    assert drawn.count("routing_diagnostics.png") == 1
    assert drawn[-1] == "learning_curves.png"  # written last, as a mark that all are complete


def test_rows_without_diagnostics_are_refused():
    with pytest.raises(ValueError, match=r"^diagnostics: rows must include .* got none$"):
        routing.diagnostics([{"step": 1, "epoch": 1.0}])


ROW = {
    "gradient_norm": 0.1,
    **{f"coupling_entropy_{t}": 2.0 / t for t in (1, 2, 3)},
    **{f"clear_parents_{t}": 0.2 * t for t in (1, 2, 3)},
    "dead_primary_capsules": 0.25,
    "dead_class_capsules": 0.0,
    "gradient_share_convolution": 0.1,
    "gradient_share_primary": 0.2,
    "gradient_share_capsules": 0.3,
    "gradient_share_decoder": 0.4,
}


def test_figure_shows_all_diagnostics_legibly():
    figure = routing.diagnostics([{"epoch": 0.5}, {"epoch": 1.0} | ROW, {"epoch": 2.0} | ROW])
    drawn = [line.get_ydata()[-1] for axes in figure.axes for line in axes.lines]
    np.testing.assert_allclose(drawn, [2, 1, 2 / 3, 20, 40, 60, 25, 0, 10, 20, 30, 40], rtol=1e-6)
    assert_legible(figure)
