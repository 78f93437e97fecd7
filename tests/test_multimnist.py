"""MultiMNIST: pairs, objectives, training program and figure."""

import collections
import dataclasses
import re
import shutil

import in_process
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from experiments import train_multimnist
from experiments.data import datasets, multimnist
from experiments.errors import InputError
from experiments.figures.style import BLUE, ORANGE
from experiments.training import objectives, records

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def digits():
    return datasets.load("mnist_small").test


@pytest.fixture(scope="module")
def pairs(digits):
    return multimnist.OverlaidDigits(digits, 5000, 7)


def test_digits_are_shifted_by_up_to_four_pixels_and_not_cropped(digits, pairs):
    indices = np.arange(3000)
    images, labels = pairs.take(indices)
    assert images.shape == (3000, 2, 36, 36, 1)
    assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
    corners = set()
    for index in range(0, 3000, 7):
        original = digits.images[index % digits.size]
        assert labels[index, 0] == digits.labels[index % digits.size]
        found = [
            (row, column)
            for row in range(9)
            for column in range(9)
            if (images[index, 0, row : row + 28, column : column + 28] == original).all()
            and images[index, 0].sum() == original.sum()
        ]
        assert found
        corners |= set(found)
    assert {row for row, _ in corners} == {column for _, column in corners} == set(range(9))


def test_second_digits_are_uniform_over_the_other_classes(digits, pairs):
    labels = pairs.labels
    assert (labels[:, 0] != labels[:, 1]).all()
    of_seven = labels[labels[:, 0] == 7, 1]
    counts = collections.Counter(of_seven.tolist())
    others = np.bincount(digits.labels[digits.labels != 7], minlength=10)
    for k in set(range(10)) - {7}:
        expected = len(of_seven) * others[k] / others.sum()
        assert abs(counts[k] - expected) < 5 * expected**0.5


def test_an_example_depends_only_on_seed_and_index(digits, pairs):
    images, labels = pairs.take(np.array([4000, 3, 17]))
    again, _ = multimnist.OverlaidDigits(digits, 10**9, 7).take(np.array([17, 4000]))
    np.testing.assert_array_equal(again, images[[2, 0]])
    np.testing.assert_array_equal(pairs.labels[[4000, 3, 17]], labels)
    other, _ = multimnist.OverlaidDigits(digits, 5000, 8).take(np.array([4000, 3, 17]))
    assert (other != images).any(axis=(1, 2, 3, 4)).all()


def test_random_bits_are_splitmix64():
    """The first five outputs for the state 1234567, as published with the reference code."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.uint64(1234567) + np.arange(1, 6).astype(np.uint64) * golden
    expected = [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]
    assert multimnist._mix(state).tolist() == expected


def test_mean_overlap_of_bounding_boxes(pairs):
    """Of 20 x 20 pixels; the mean distance of two shifts is 80 / 27 pixels."""
    _, _, shifts = pairs._draw(np.arange(5000))
    beside = np.abs(shifts[:, 0] - shifts[:, 1])
    covered = (20 - beside) / 20
    along = 1 - 80 / 27 / 20
    np.testing.assert_allclose(covered.mean(), along, atol=0.005)
    np.testing.assert_allclose(covered.prod(axis=1).mean(), along**2, atol=0.008)


SCORES = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.9, 0.3, 0.2], [0.6, 0.1, 0.9, 0.2]])
LABELS = np.array([[1, 0], [1, 3], [1, 3]])  # both right, one right, none right


def test_errors_per_image_and_per_digit():
    objective = objectives.OverlaidSigmoids(4)
    errors = objective.errors(jnp.asarray(SCORES), jnp.asarray(LABELS))
    assert errors.tolist() == [False, True, True]
    found = objective.test_metrics(SCORES, LABELS)
    assert found == {
        "test_error": pytest.approx(100 * 2 / 3),
        "test_error_per_digit": pytest.approx(50.0),
    }


class Model:
    """Capsules of given lengths; a decoder that draws the class's number."""

    def __call__(self, images):
        lengths = jnp.array([0.9, 0.5, 0.2])
        return jnp.broadcast_to(jnp.outer(lengths, jnp.array([1.0, 0.0])), (len(images), 3, 2))

    def reconstruct(self, capsules, labels):
        return jnp.broadcast_to(labels[..., None, None, None] / 10, (*labels.shape, 4, 4, 1))


def test_loss_sums_margins_of_both_classes_and_errors_of_both_reconstructions():
    layers = jnp.stack([jnp.full((1, 4, 4, 1), 0.2), jnp.full((1, 4, 4, 1), 0.5)], 1)
    labels = jnp.array([[2, 1]])
    objective = objectives.OverlaidCapsules(3, 0.5)
    losses, lengths = objective.loss(Model(), layers, labels, None)
    np.testing.assert_allclose(lengths, [[0.9, 0.5, 0.2]], rtol=1e-6)
    margin = 0.5 * (0.9 - 0.1) ** 2 + (0.9 - 0.5) ** 2 + (0.9 - 0.2) ** 2
    drawn = 0.5 * 16 * ((0.2 - 0.2) ** 2 + (0.1 - 0.5) ** 2)
    np.testing.assert_allclose(losses, [margin + drawn], rtol=1e-5)
    swapped, _ = objective.loss(Model(), layers[:, ::-1], labels[:, ::-1], None)
    np.testing.assert_allclose(swapped, losses, rtol=1e-6)


def test_overlay_clips_to_white():
    layers = jnp.stack([jnp.full((1, 2, 2, 1), 0.7), jnp.full((1, 2, 2, 1), 0.6)], 1)
    assert (objectives.overlay(layers) == 1).all()
    np.testing.assert_allclose(objectives.overlay(layers / 2), jnp.full((1, 2, 2, 1), 0.65))


SETTINGS = {
    "dataset": "mnist_small",
    "workdir": "run",
    "conv_channels": 2,
    "primary_types": 1,
    "capsule_length": 2,
    "num_iterations": 2,
    "batch_size": 8,
    "train_size": 48,
    "test_size": 21,
    "log_every_steps": 2,
}


@pytest.fixture(scope="module")
def small_data():
    """Patch: digits of 11 x 11 pixels, and trainers that are compiled once."""
    whole = datasets.load("mnist_small")
    splits = [s._replace(images=s.images[:, 8:19, 8:19]) for s in (whole.train, whole.test)]
    small = datasets.Dataset("mnist_small", 10, *splits, "5a")
    trainers = {}

    def build(config, dataset, original=train_multimnist.build):
        key = config.network, config.train_size
        if key not in trainers:
            trainers[key] = original(config, dataset)
        return trainers[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load", lambda *_, **__: small)
        patch.setattr(train_multimnist, "build", build)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_data):
    """The workdir of a run that was not interrupted."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    settings = SETTINGS | {"workdir": str(workdir), "checkpoint_every_steps": 4}
    assert train_multimnist.main(train_multimnist.Config(**settings)) == 0
    return workdir


@pytest.fixture
def program(tmp_path, monkeypatch, capsys, small_data):
    """Return a function that runs the program in this process: its exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def program(**changes):
        status, _, stderr = in_process.run(
            train_multimnist, SETTINGS | changes, monkeypatch, capsys
        )
        return status, stderr

    return program


def test_a_resumed_run_ends_as_an_uninterrupted_one(program, finished, tmp_path):
    assert program(max_steps=3) == (0, "")
    assert program() == (0, "")
    expected, resumed = (
        [{**row, "images_per_second": None} for row in records.read_metrics(folder)][-1]
        for folder in (finished, tmp_path / "run")
    )
    assert resumed == expected
    assert {"test_error", "test_error_per_digit"} <= resumed.keys()
    figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert figures == {"learning_curves.png", "overlaps.png"}


def test_lost_checkpoints_are_refused(program, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").glob("*/record.json"):
        path.unlink()
    rows = records.read_metrics(tmp_path / "run")
    status, stderr = program()
    assert status == 2
    assert re.fullmatch("train_multimnist: workdir run was trained to step .*\n", stderr)
    assert records.read_metrics(tmp_path / "run") == rows


def test_the_cnn_baseline_trains(program, tmp_path):
    assert program(network="pooling_cnn", max_steps=1) == (0, "")
    assert records.read_metrics(tmp_path / "run")[-1]["step"] == 1


def test_invalid_settings_are_refused(program):
    status, stderr = program(test_size=0)
    assert (status, stderr) == (2, "train_multimnist: --test_size must be at least 1, got 0\n")
    config = train_multimnist.Config(**SETTINGS | {"train_size": 3})
    with pytest.raises(InputError, match=r"^--batch_size must be at most the 3 training exam.* 8$"):
        train_multimnist.main(config)


def test_test_pairs_do_not_depend_on_the_seed():
    dataset = datasets.load("mnist_small")
    config = train_multimnist.Config(dataset="mnist_small", test_size=30)
    first, second = (
        train_multimnist.examples(dataclasses.replace(config, seed=seed), dataset)[1]
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(first.take(np.arange(30))[0], second.take(np.arange(30))[0])


@pytest.fixture
def overlaps():
    """Layers with a digit in the upper half and one in the lower half."""
    layers = np.zeros((2, 2, 8, 8, 1))
    layers[:, 0, 1:3] = 1
    layers[:, 1, 5:7] = 1
    return layers


def draw(layers, reconstructions, predicted):
    return train_multimnist.draw_overlaps(
        layers,
        reconstructions,
        labels=np.array([[3, 5], [4, 2]]),
        predicted=np.array(predicted),
        lengths=np.array([[0.9, 0.8], [0.7, 0.6]]),
    )


def test_a_reconstruction_has_the_colour_of_the_digit_of_its_class(overlaps):
    figure = draw(overlaps, overlaps[:, ::-1], [[5, 3], [2, 4]])
    [axes] = figure.axes
    [image] = axes.images
    mosaic = np.asarray(image.get_array())
    height, width = mosaic.shape[0] // 2, mosaic.shape[1] // 2
    for top in (0, height):
        for left in (0, width):
            np.testing.assert_allclose(mosaic[top + 3, left + 4], to_rgb(ORANGE), atol=0.01)
            np.testing.assert_allclose(mosaic[top + 7, left + 4], to_rgb(BLUE), atol=0.01)
    assert not [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    captions = [label.get_text() for label in axes.get_xticklabels()]
    assert captions == ["3 + 5\n5  0.90\n3  0.80", "4 + 2\n2  0.70\n4  0.60"]


def test_a_reconstruction_of_a_wrong_class_is_grey_and_framed(overlaps):
    figure = draw(overlaps, overlaps, [[3, 5], [4, 9]])
    [axes] = figure.axes
    mosaic = np.asarray(axes.images[0].get_array())
    height, width = mosaic.shape[0] // 2, mosaic.shape[1] // 2
    red, green, blue = mosaic[height + 7, width + 4]
    assert red == green == blue > 0.5
    [frame] = axes.patches
    assert frame.get_x() == 0.5
    assert axes.get_title("left") == "Framed: wrong predictions"
