"""Arguments of the figures of a trained network (test_figures tests the figures)."""

import pathlib

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


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Return a function that calls draw_figures: arguments of all figures, model and lengths."""
    data_dir = small_runs.write_digits(tmp_path / "digits", size=21)
    drawn = {}
    for name in WITHOUT_DECODER | DRAWN_BY_DECODER:
        monkeypatch.setattr(classifier, name, lambda *arguments, **_: arguments)
    monkeypatch.setattr(
        files, "save_figure", lambda figure, path: drawn.update({path.stem: figure})
    )

    def draw(**changes):
        small = {"conv_channels": 2, "primary_types": 3, "capsule_length": 3, "batch_size": 8}
        config = mnist.Config(dataset="mnist", data_dir=data_dir, **small | changes)
        dataset = datasets.load(config.dataset, data_dir=config.data_dir)
        trainer = mnist.build(config, dataset)
        params = trainer.initial_state(0).params
        params["capsules"]["weights"] *= 100  # long capsules with distinct reconstructions
        model = trainer.model(params)
        lengths = np.asarray(capsjax.lengths(model(scaled(dataset.test.images))))
        wrong = (lengths.argmax(axis=1) + 1).astype(np.int32) % 10
        test = dataset.test._replace(labels=wrong)
        evaluation = loop.Evaluation(lengths, 0.5)
        inspection.draw_figures(trainer, params, test, evaluation, [], pathlib.Path())
        return drawn, model, lengths

    return draw


def test_networks_without_a_decoder_have_no_reconstruction_figures(draw):
    drawn, _, _ = draw(reconstruction_weight=0.0)
    assert drawn.keys() == WITHOUT_DECODER


def test_reconstruction_figures_are_of_the_longest_capsule(draw):
    drawn, model, lengths = draw()
    assert drawn.keys() == WITHOUT_DECODER | DRAWN_BY_DECODER
    images, reconstructions, _, labels = drawn["reconstructions"]
    winners = lengths.argmax(axis=1)[: len(images)]
    capsules = model(images)
    wanted = model.reconstruct(capsules, winners)
    np.testing.assert_allclose(reconstructions, wanted, atol=1e-6)
    assert abs(reconstructions - model.reconstruct(capsules, labels)).max() > 1e-4
    [tweaks] = drawn["dimension_tweaks"]
    middle = inspection.TWEAKS.index(0)
    np.testing.assert_allclose(tweaks[:, middle], wanted[:1].repeat(len(tweaks), 0), atol=1e-6)
