"""`train_mnist` on the networks of the family: statistics, averages, resumption and refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_runs
from flax import nnx

from capsjax.models import EfficientCapsNet
from experiments import evaluate
from experiments.analysis import classifier_run
from experiments.data import datasets
from experiments.errors import InputError
from experiments.training import checkpoints, mnist, networks, objectives, parallel, trained
from experiments.training.transforms import Augmentation

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = {"convolutions": ((4, 5, 2), (8, 3, 1)), "primary_kernel_size": 8, "hidden": (8,)}


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Noise in place of MNIST, and a small EfficientCapsNet, averaged."""
    monkeypatch.setitem(
        networks.PUBLISHED,
        "efficient_capsnet",
        lambda **rest: EfficientCapsNet(**SMALL, **rest),
    )
    data_dir = training_runs.write_noise(tmp_path / "noise", side=28)
    tiny = training_runs.tiny_config(data_dir, num_epochs=2, workdir=str(tmp_path / "run"))
    changes = {"network": "efficient_capsnet", "ema_decay": 0.9, "checkpoint_every_steps": 3}
    return dataclasses.replace(tiny, **changes)


def state_of(config):
    """Return the trainer, and the newest checkpoint of a run."""
    trainer = mnist.build(config, datasets.load(config.dataset, data_dir=config.data_dir))
    with checkpoints.Checkpoints(config.workdir) as saved:
        return trainer, saved.restore(trainer.abstract_state())[1]


def test_a_resumed_run_repeats_the_unbroken_one_and_is_evaluated(
    config, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(classifier_run.inspection, "report", lambda *_, **__: None)
    dataset = datasets.load(config.dataset, data_dir=config.data_dir)
    shared = mnist.build(config, dataset)  # compiled once
    monkeypatch.setattr(mnist, "build", lambda *_: shared)
    assert classifier_run.train_run(config, dataset) == 0
    broken = dataclasses.replace(config, workdir=str(tmp_path / "broken"))
    for max_steps in (3, 0):
        stopped = dataclasses.replace(broken, max_steps=max_steps)
        assert classifier_run.train_run(stopped, dataset) == 0
    trainer, state = state_of(config)
    jax.tree.map(np.testing.assert_array_equal, state, state_of(broken)[1])

    assert {path[-1] for path in trainer._statistics} == {"mean", "var"}
    loaded = trained.load(config.workdir).params
    jax.tree.map(np.testing.assert_array_equal, loaded, state.average)
    for found, raw in zip(trainer._parts(loaded), trainer._parts(state.params), strict=True):
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(raw), strict=True)
        assert any(np.any(a != b) for a, b in pairs)
    assert evaluate.main(evaluate.Config(workdir=config.workdir)) == 0
    assert "confusion matrix" in capsys.readouterr().out


def test_a_step_updates_the_statistics_as_the_network_does(config):
    config = dataclasses.replace(config, shift=0, ema_decay=0.0)
    dataset = datasets.load(config.dataset, data_dir=config.data_dir)
    trainer = mnist.build(config, dataset)
    state = trainer.initial_state(0)
    images, labels = trainer.batch(dataset.train, np.arange(8))

    @jax.jit
    def updated(params):
        model = trainer.model(params)
        model(jnp.asarray(images, jnp.float32) / 255, training=True)
        return nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    wanted = updated(state.params)
    _, found = trainer._parts(trainer.step(state, images, labels).params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted)


def test_the_average_of_parameters_and_statistics_is_that_of_the_definition(config):
    dataset = datasets.load(config.dataset, data_dir=config.data_dir)
    trainer = mnist.build(dataclasses.replace(config, ema_decay=0.15), dataset)
    state = trainer.initial_state(0)
    batch, average = trainer.batch(dataset.train, np.arange(8)), jax.device_get(state.params)
    for step in range(4):
        state = trainer.step(state, *batch)
        decay = min(0.15, (1 + step) / (10 + step))
        average = jax.tree.map(
            lambda mean, new, decay=decay: decay * mean + (1 - decay) * np.asarray(new),
            average,
            state.params,
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        trainer.evaluated(state),
        average,
    )


def test_the_spread_loss_is_that_of_the_paper():
    activations = jnp.asarray([[0.9, 0.5, 0.1], [0.2, 0.3, 0.1]])
    labels = jnp.asarray([0, 0])
    objective = objectives.SpreadClassification(3, Augmentation(), growing_steps=10)

    def loss(step):
        at = objective if step is None else objective.at_step(jnp.asarray(step))
        return at.loss(lambda images: (None, images), activations, labels, None)[0]

    for step, margin in ((None, 0.9), (0, 0.2), (5, 0.55), (20, 0.9)):
        wanted = [
            sum(max(0, margin - (row[0] - other)) ** 2 for other in row[1:])
            for row in np.asarray(activations, float)
        ]
        np.testing.assert_allclose(loss(step), wanted, rtol=1e-5)


def test_probabilities_and_logits_have_one_cross_entropy():
    logits = jnp.asarray([[1.0, 2.0, -1.0]])
    labels = jnp.asarray([2])
    found = [
        objectives.NormalisedClassification(3, Augmentation(), probabilities=probabilities).loss(
            lambda images, training: images, output, labels, None
        )
        for probabilities, output in ((False, logits), (True, jax.nn.softmax(logits)))
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    np.testing.assert_allclose(found[0][1], jax.nn.softmax(logits), rtol=1e-5)


@pytest.mark.parametrize("network", sorted(networks.PUBLISHED))
def test_each_network_has_a_step_and_an_evaluation(network, config, monkeypatch, tmp_path):
    monkeypatch.undo()
    side = 48 if network.endswith("small_norb") else 28
    data_dir = training_runs.write_noise(tmp_path / "sized", side=side)
    trainer = mnist.build(
        dataclasses.replace(config, network=network),
        datasets.load(config.dataset, data_dir=data_dir),
    )
    state = trainer.abstract_state()
    images = jax.ShapeDtypeStruct((4, side, side, 1), jnp.uint8)
    labels = jax.ShapeDtypeStruct((4,), jnp.int32)
    after = jax.eval_shape(trainer._step, state, images, labels)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    for before, new in zip(*map(jax.tree.leaves, (state, after)), strict=True):
        assert (new.shape, new.dtype) == (before.shape, before.dtype)
    _, scores = jax.eval_shape(trainer._evaluate, trainer.evaluated(state), images, labels)
    assert scores.shape == (4, 10)
    without = ("efficient_capsnet_small_norb", "matrix_capsnet")
    assert trainer.has_statistics == (network not in without)


def test_several_devices_and_foreign_implementations_are_refused(config, monkeypatch):
    dataset = datasets.load(config.dataset, data_dir=config.data_dir)
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    several = dataclasses.replace(config, data_parallel=2)
    with pytest.raises(InputError, match=r"must be 1 for a network with batch normalisation, got"):
        parallel.spread(mnist.build(config, dataset), several, batch_size=8)
    named = dataclasses.replace(config, network="sr_capsnet", implementation="xla")
    with pytest.raises(InputError, match=r"--implementation must be auto for --network=sr_capsnet"):
        mnist.build(named, dataset)
