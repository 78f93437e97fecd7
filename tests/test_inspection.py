"""Arguments of the figures of a trained network (test_figures tests the figures)."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest
import small_runs

import capsjax
from experiments import files
from experiments.analysis import inspection
from experiments.data import datasets
from experiments.figures import classifier
from experiments.training import loop, mnist
from experiments.training.transforms import scaled

WITHOUT_DECODER = {
    *("learning_curves", "confusion_matrix", "misclassified", "couplings", "coupling_entropy")
}
DRAWN_BY_DECODER = {"reconstructions", "dimension_tweaks"}


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A trainer, parameters with long capsules, the model, its lengths, and a test set."""
    data_dir = small_runs.write_digits(tmp_path_factory.mktemp("digits"), size=21)
    small = {"conv_channels": 2, "primary_types": 3, "capsule_length": 3, "batch_size": 8}
    dataset = datasets.load("mnist", data_dir=data_dir)
    trainer = mnist.build(mnist.Config(dataset="mnist", data_dir=data_dir, **small), dataset)
    params = trainer.initial_state(0).params
    params["capsules"]["weights"] *= 100  # long capsules with distinct reconstructions
    model = trainer.model(params)
    lengths = np.asarray(jax.jit(lambda x: capsjax.lengths(model(scaled(x))))(dataset.test.images))
    wrong = (lengths.argmax(axis=1) + 1).astype(np.int32) % 10
    return trainer, params, model, lengths, dataset.test._replace(labels=wrong)


@pytest.fixture
def draw(network, monkeypatch):
    """Return a function that draws with an objective: the arguments of the figures by name."""
    trainer, params, _, lengths, test = network
    arguments_of = {}
    for name in WITHOUT_DECODER | DRAWN_BY_DECODER:
        monkeypatch.setattr(classifier, name, lambda *arguments, **_: arguments)
    monkeypatch.setattr(
        files, "save_figure", lambda figure, path: arguments_of.update({path.stem: figure})
    )

    def draw(**changes):
        monkeypatch.setattr(trainer, "objective", dataclasses.replace(trainer.objective, **changes))
        evaluation = loop.Evaluation(lengths, 0.5)
        inspection.draw_figures(trainer, params, test, evaluation, [], pathlib.Path())
        return arguments_of

    return draw


def test_networks_without_a_decoder_have_no_reconstruction_figures(draw):
    assert draw(reconstruction_weight=0.0).keys() == WITHOUT_DECODER


def test_reconstruction_figures_are_of_the_longest_capsule(network, draw):
    drawn, (_, _, model, lengths, _) = draw(), network
    assert drawn.keys() == WITHOUT_DECODER | DRAWN_BY_DECODER
    images, reconstructions, _, labels = drawn["reconstructions"]
    winners = lengths.argmax(axis=1)[: len(images)]
    capsules = model(images)
    expected = model.reconstruct(capsules, winners)
    np.testing.assert_allclose(reconstructions, expected, atol=1e-6)
    assert abs(reconstructions - model.reconstruct(capsules, labels)).max() > 1e-4
    [tweaks] = drawn["dimension_tweaks"]
    middle = inspection.TWEAKS.index(0)
    np.testing.assert_allclose(tweaks[:, middle], expected[:1].repeat(len(tweaks), 0), atol=1e-6)
