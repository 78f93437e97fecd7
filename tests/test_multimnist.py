"""Overlapping digits: which pairs there are, where they lie, and how they are scored."""

import collections
import dataclasses
import re

import in_process
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train_multimnist
from experiments.data import datasets, multimnist
from experiments.training import objectives, records


@pytest.fixture(scope="module")
def digits():
    return datasets.load("mnist_small").test


@pytest.fixture(scope="module")
def pairs(digits):
    return multimnist.OverlaidDigits(digits, 5000, 7)


def test_each_digit_lies_whole_within_four_pixels_of_the_middle(digits, pairs):
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


def test_partners_are_of_every_other_class_and_evenly_drawn(digits, pairs):
    labels = pairs.labels
    assert (labels[:, 0] != labels[:, 1]).all()
    of_seven = labels[labels[:, 0] == 7, 1]
    counts = collections.Counter(of_seven.tolist())
    others = np.bincount(digits.labels[digits.labels != 7], minlength=10)
    for k in set(range(10)) - {7}:
        expected = len(of_seven) * others[k] / others.sum()
        assert abs(counts[k] - expected) < 5 * expected**0.5


def test_an_example_depends_on_seed_and_place_alone(digits, pairs):
    images, labels = pairs.take(np.array([4000, 3, 17]))
    again, _ = multimnist.OverlaidDigits(digits, 10**9, 7).take(np.array([17, 4000]))
    np.testing.assert_array_equal(again, images[[2, 0]])
    np.testing.assert_array_equal(pairs.labels[[4000, 3, 17]], labels)
    other, _ = multimnist.OverlaidDigits(digits, 5000, 8).take(np.array([4000, 3, 17]))
    assert (other != images).any(axis=(1, 2, 3, 4)).all()


def test_the_bits_are_splitmix64s():
    """The first five outputs for the state 1234567, as published with the reference code."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.uint64(1234567) + np.arange(1, 6).astype(np.uint64) * golden
    wanted = [
        *(6457827717110365317, 3203168211198807973, 9817491932198370423),
        *(4593380528125082431, 16408922859458223821),
    ]
    assert multimnist._mix(state).tolist() == wanted


def test_boxes_overlap_as_two_independent_shifts_make_them(pairs):
    """Of 20 x 20 pixels; the mean distance of two shifts is 80 / 27 pixels."""
    _, _, shifts = pairs._draw(np.arange(5000))
    beside = np.abs(shifts[:, 0] - shifts[:, 1])
    covered = (20 - beside) / 20
    along = 1 - 80 / 27 / 20
    np.testing.assert_allclose(covered.mean(), along, atol=0.005)
    np.testing.assert_allclose(covered.prod(axis=1).mean(), along**2, atol=0.008)


SCORES = np.array([[0.9, 0.8, 0.1, 0.2], [0.1, 0.9, 0.3, 0.2], [0.6, 0.1, 0.9, 0.2]])
LABELS = np.array([[1, 0], [1, 3], [1, 3]])  # both right, one right, none right


def test_an_image_is_right_if_both_digits_are_and_a_digit_counts_by_itself():
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


def test_the_loss_wants_both_classes_long_and_each_digit_drawn_by_its_own():
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


def test_overlaid_ink_is_no_brighter_than_white():
    layers = jnp.stack([jnp.full((1, 2, 2, 1), 0.7), jnp.full((1, 2, 2, 1), 0.6)], 1)
    assert (objectives.overlay(layers) == 1).all()
    np.testing.assert_allclose(objectives.overlay(layers / 2), jnp.full((1, 2, 2, 1), 0.65))


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Runs the program in this process, with a tiny network: exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def program(**changes):
        settings = {
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
        } | changes
        status, _, stderr = in_process.run(train_multimnist, settings, monkeypatch, capsys)
        return status, stderr

    return program


def test_a_stopped_run_goes_on_to_the_same_end_and_draws(program, tmp_path):
    assert program(workdir="whole", checkpoint_every_steps=4) == (0, "")
    assert program(max_steps=3) == (0, "")
    assert program() == (0, "")
    whole, parts = (
        [
            {name: value for name, value in row.items() if name != "images_per_second"}
            for row in records.read_metrics(tmp_path / name)
        ][-1]
        for name in ("whole", "run")
    )
    assert parts == whole
    assert {"test_error", "test_error_per_digit"} <= whole.keys()
    figures = {path.name for path in (tmp_path / "run" / "figures").iterdir()}
    assert figures == {"learning_curves.png", "overlaps.png"}


def test_a_run_that_lost_its_checkpoints_is_refused(program, tmp_path):
    assert program()[0] == 0
    for path in (tmp_path / "run/checkpoints").glob("*/record.json"):
        path.unlink()
    rows = records.read_metrics(tmp_path / "run")
    status, stderr = program()
    assert status == 2
    assert re.fullmatch("train_multimnist: workdir run was trained to step .*\n", stderr)
    assert records.read_metrics(tmp_path / "run") == rows


def test_the_control_trains_too(program, tmp_path):
    assert program(network="pooling_cnn", max_steps=1) == (0, "")
    assert records.read_metrics(tmp_path / "run")[-1]["step"] == 1


def test_what_cannot_be_used_is_one_line(program, tmp_path):
    for flags, message in (
        ({"train_size": 3}, "--batch_size must be at most the 3 training examples .*, got 8"),
        ({"test_size": 0}, "--test_size must be at least 1, got 0"),
    ):
        status, stderr = program(**flags)
        assert status == 2
        assert re.fullmatch(f"train_multimnist: {message}\n", stderr)


def test_another_seed_tests_on_the_same_pairs():
    dataset = datasets.load("mnist_small")
    config = train_multimnist.Config(dataset="mnist_small", test_size=30)
    first, second = (
        train_multimnist.examples(dataclasses.replace(config, seed=seed), dataset)[1]
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(first.take(np.arange(30))[0], second.take(np.arange(30))[0])
