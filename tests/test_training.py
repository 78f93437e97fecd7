"""Training: what a step does, what a row says, and that a resumed run repeats an unbroken one."""

import dataclasses
import itertools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import capsjax
from capsjax.models import CapsNet
from experiments.data import affine, datasets
from experiments.errors import InputError
from experiments.training import loop
from experiments.training.objectives import CapsuleClassification
from experiments.training.transforms import Augmentation, scaled, shifted, turned

BATCH, EPOCH_STEPS, LAST_STEP = 32, 20, 40


class Counted(loop.Trainer):
    """A Trainer that counts how often its step is traced."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.traces = 0

    def _step(self, *arguments):
        self.traces += 1
        return super()._step(*arguments)


@pytest.fixture(scope="module")
def dataset():
    """The middles of digits: 20 batches and a part of one to train on, 2 and a part to test."""
    whole = datasets.load("mnist_small")
    train, test = (
        datasets.Split(split.images[:size, 4:23, 4:23], split.labels[:size])
        for split, size in ((whole.train, BATCH * EPOCH_STEPS + 9), (whole.test, 2 * BATCH + 21))
    )
    return dataclasses.replace(whole, train=train, test=test)


@pytest.fixture(scope="module")
def trainer():
    def build():
        return CapsNet(
            (19, 19, 1),
            conv_channels=4,
            primary_types=4,
            capsule_length=4,
            num_iterations=2,
            hidden=(16,),
            rngs=nnx.Rngs(0),
        )

    optimizer = loop.adam(0.01, final_learning_rate=0.003, num_steps=LAST_STEP)
    return Counted(build, CapsuleClassification(10, Augmentation(shift=1), 0.0005), optimizer)


def run(trainer, state, dataset, *, last_step=LAST_STEP, log_every_steps=10, stopped=lambda: 0):
    """Every step's progress; its state is on the host, since the next step takes the buffers."""
    progress = loop.train(
        trainer,
        state,
        dataset.train,
        dataset.test,
        batch_size=BATCH,
        last_step=last_step,
        log_every_steps=log_every_steps,
        seed=3,
        stopped=stopped,
    )
    return [(step, jax.tree.map(np.array, state), row) for step, state, row in progress]


@pytest.fixture(scope="module")
def unbroken(trainer, dataset):
    return run(trainer, trainer.initial_state(0), dataset)


def restored(state):
    """A state as a checkpoint gives it back."""
    return jax.device_put(state, jax.devices()[0])


def without_speed(progress):
    return [{**row, "images_per_second": 0} for _, _, row in progress if row is not None]


@pytest.fixture(scope="module")
def losses(trainer):
    """The objective's loss of each example, compiled: without a key as in a test."""

    @jax.jit
    def losses(params, images, labels, key):
        return trainer.objective.loss(trainer.model(params), images, labels, key)[0]

    return losses


# The images


def offset(image, moved, limit):
    """By how much `moved` is `image` shifted, what has left the frame being lost."""
    height, width, _ = image.shape
    padded = np.pad(image, ((limit, limit), (limit, limit), (0, 0)))
    fits = [
        (top - limit, left - limit)
        for top, left in np.ndindex(2 * limit + 1, 2 * limit + 1)
        if (padded[top : top + height, left : left + width] == moved).all()
    ]
    assert len(fits) == 1
    return fits[0]


@pytest.mark.parametrize("limit", [1, 2])
def test_each_image_moves_by_an_offset_of_its_own_within_the_limit(limit):
    images = np.random.default_rng(0).integers(1, 256, (400, 6, 6, 3), dtype=np.uint8)
    moved = np.asarray(shifted(jnp.asarray(images), jax.random.key(0), limit))
    offsets = {offset(a, b, limit) for a, b in zip(images, moved, strict=True)}
    assert offsets == set(itertools.product(range(-limit, limit + 1), repeat=2))
    assert moved.dtype == images.dtype


def test_no_shift_changes_nothing():
    images = jnp.ones((2, 5, 5, 1))
    assert shifted(images, jax.random.key(0), 0) is images


def test_shifts_depend_on_the_key_alone():
    images = jnp.arange(40 * 25.0).reshape(40, 5, 5, 1)
    one, same, other = (shifted(images, jax.random.key(k), 2) for k in (1, 1, 2))
    chex.assert_trees_all_equal(one, same)
    assert (one != other).any(axis=(1, 2, 3)).sum() > 20


def test_each_image_turns_and_grows_within_the_limits():
    # A spot to the right of the centre: where it goes tells angle and factor.
    images = np.zeros((300, 31, 31, 1), np.float32)
    images[:, 14:17, 22:25] = 1
    moved = np.asarray(turned(jnp.asarray(images), jax.random.key(0), rotation=40, scale=0.2))
    down, right = (
        (moved[..., 0] * grid).sum((1, 2)) / moved.sum((1, 2, 3))
        for grid in np.mgrid[-15:16, -15:16]
    )
    angles, factors = np.rad2deg(np.arctan2(down, right)), np.hypot(down, right) / 8
    np.testing.assert_allclose([angles.min(), angles.max()], [-40, 40], atol=2)
    np.testing.assert_allclose([factors.min(), factors.max()], [0.8, 1.2], atol=0.02)
    assert abs(np.corrcoef(angles, factors)[0, 1]) < 0.2
    expected = affine.warp(
        images,
        affine.Pose.broadcast(300, rotation=angles, scale=np.stack([factors, factors], 1)),
    )
    np.testing.assert_allclose(moved, expected, atol=0.2)  # the spot's place is not exact


def test_rotation_and_scale_are_part_of_the_augmentation():
    images = jnp.asarray(np.random.default_rng(0).random((4, 9, 9, 1), np.float32))
    key = jax.random.key(1)
    still = Augmentation()(images, key)
    assert still is images
    assert (Augmentation(rotation=20)(images, key) != images).any()
    assert (Augmentation(scale=0.1)(images, key) != images).any()
    both = Augmentation(rotation=20, shift=1)(images, key)
    first = Augmentation(rotation=20)(images, key)
    chex.assert_trees_all_equal(both, shifted(first, key, 1))


def test_crops_are_of_all_places_and_the_augmentation_ends_with_them():
    grid = np.arange(6 * 8, dtype=np.float32).reshape(6, 8, 1)
    crops = np.asarray(Augmentation(crop=5)(jnp.asarray([grid] * 300), jax.random.key(0)))
    assert crops.shape == (300, 5, 5, 1)
    corners = crops[:, 0, 0, 0].astype(int)
    assert set(corners) == {8 * row + column for row in range(2) for column in range(4)}
    np.testing.assert_array_equal(crops[..., 0] - corners[:, None, None], [grid[:5, :5, 0]] * 300)


def test_standardized_images_have_mean_0_and_variance_1_each():
    images = np.random.default_rng(0).random((4, 9, 7, 2), np.float32)
    images[0] *= np.float32(0.1)
    images[3] = 0.3
    found = np.asarray(Augmentation(standardize=True).inputs(jnp.asarray(images)))
    expected = images - images.mean((1, 2, 3), keepdims=True)
    expected[:3] /= images[:3].std((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(found, expected, atol=5e-3)
    np.testing.assert_allclose(found[:3].var((1, 2, 3)), 1, atol=1e-4)


def test_jitter_is_an_image_at_a_time_within_the_limits_and_only_in_training():
    images = jnp.asarray(np.random.default_rng(0).random((400, 5, 6, 2), np.float32))
    jitter = Augmentation(brightness=0.3, contrast=0.5)
    assert jitter.inputs(images) is images
    assert jitter(images, jax.random.key(0)) is images  # a decoder draws images without jitter
    seen = np.asarray(jitter.inputs(images, jax.random.key(0)))
    means = (np.mean(part, (1, 2), keepdims=True) for part in (images, seen))
    before, after = means
    added, factors = (after - before)[:, 0, 0], np.std(seen, (1, 2)) / np.std(images, (1, 2))
    for values in (added, factors):  # of both channels
        np.testing.assert_allclose(values[:, 0], values[:, 1], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose([added.min(), added.max()], [-0.3, 0.3], atol=0.02)
    np.testing.assert_allclose([factors.min(), factors.max()], [0.5, 1.5], atol=0.02)
    assert abs(np.corrcoef(added[:, 0], factors[:, 0])[0, 1]) < 0.2
    np.testing.assert_allclose(seen, after + factors[:, None, None] * (images - before), atol=1e-5)


def test_jitter_comes_after_standardization_which_would_undo_it():
    images = jnp.asarray(np.random.default_rng(0).random((4, 9, 9, 1), np.float32))
    both = Augmentation(standardize=True, brightness=0.5)
    seen = both.inputs(images, jax.random.key(0)).mean((1, 2, 3))
    assert (abs(seen) > 1e-3).all()


def test_bytes_become_0_to_1():
    images = scaled(jnp.array([0, 51, 255], jnp.uint8))
    assert images.dtype == jnp.float32
    np.testing.assert_allclose(images, [0, 0.2, 1], rtol=1e-6)


# The optimizer


def test_the_rate_falls_by_one_factor_a_step_from_the_first_to_the_final():
    optimizer = loop.adam(1e-2, final_learning_rate=1e-4, num_steps=20)
    params = jnp.zeros(())
    state, rates = optimizer.init(params), []
    for _ in range(21):
        # A gradient that stays the same makes a step of Adam as long as its rate.
        update, state = optimizer.update(jnp.ones(()), state, params)
        rates.append(-float(update))
    assert (rates[0], rates[20]) == (pytest.approx(1e-2, rel=1e-4), pytest.approx(1e-4, rel=1e-4))
    np.testing.assert_allclose(np.divide(rates[1:], rates[:-1]), 0.01 ** (1 / 20), rtol=1e-4)


# The decoder's mask


@pytest.fixture(scope="module")
def expected(trainer, unbroken, dataset):
    """Trained parameters, images, wrong labels, and the losses that each mask gives."""
    params = unbroken[-1][1].params
    images = scaled(jnp.asarray(dataset.test.images[:BATCH]))

    @jax.jit
    def losses(params, images):
        model = trainer.model(params)
        capsules = model(images)
        winners = jnp.argmax(capsjax.lengths(capsules), axis=1)
        labels = (winners + 1) % 10
        margin = capsjax.margin_loss(capsjax.lengths(capsules), jax.nn.one_hot(labels, 10))
        with_masks = [
            margin + capsjax.reconstruction_loss(model.reconstruct(capsules, mask), images)
            for mask in (labels, winners)
        ]
        return labels, margin, *with_masks

    labels, margin, with_label, with_winner = losses(params, images)
    assert (abs(with_label - with_winner) > 1e-5).all()
    return params, images, labels, {"none": margin, True: with_label, False: with_winner}


def test_the_decoder_sees_the_label_in_training_and_the_longest_capsule_after(losses, expected):
    params, images, labels, wanted = expected
    for is_training in (True, False):
        found = losses(params, images, labels, jax.random.key(0) if is_training else None)
        np.testing.assert_allclose(found, wanted[is_training], rtol=1e-5)


def test_without_weight_there_is_no_decoder(trainer, expected):
    params, images, labels, wanted = expected
    objective = CapsuleClassification(10, Augmentation(), 0.0)

    @jax.jit
    def losses(params, images, labels):
        return objective.loss(trainer.model(params), images, labels, jax.random.key(0))[0]

    np.testing.assert_allclose(losses(params, images, labels), wanted["none"], rtol=1e-6)


def test_a_step_and_an_evaluation_use_these_masks(trainer, dataset, unbroken, losses):
    """The labels are wrong for nearly all images, so that the two masks differ."""
    state = restored(unbroken[LAST_STEP - 1][1])._replace(window=trainer.empty_window())
    params = unbroken[LAST_STEP - 1][1].params  # the step takes those of the state
    key = jax.random.wrap_key_data(np.array(state.key))
    images, labels = dataset.test.images[:BATCH], (dataset.test.labels[:BATCH] + 1) % 10
    whole = scaled(jnp.asarray(images))
    moved = shifted(whole, jax.random.fold_in(key, LAST_STEP), 1)

    def mean_loss(shown, is_training):
        found = losses(params, shown, labels, key if is_training else None)
        return pytest.approx(float(found.mean()), rel=1e-5)

    split = datasets.Split(images, labels)
    evaluated = trainer.evaluate(state.params, split, batch_size=BATCH).loss
    assert evaluated == mean_loss(whole, False)
    assert evaluated != mean_loss(whole, True)
    stepped = float(trainer.step(state, images, labels).window.loss)
    assert stepped == mean_loss(moved, True)
    assert stepped != mean_loss(moved, False)


# Evaluation


def test_the_last_smaller_batch_counts(trainer, unbroken, dataset):
    params, labels = unbroken[-1][1].params, dataset.test.labels
    parts = trainer.evaluate(params, dataset.test, batch_size=BATCH)
    whole = trainer.evaluate(params, dataset.test, batch_size=len(labels))
    assert parts.scores.shape == (2 * BATCH + 21, 10)
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-5, atol=1e-6)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    assert parts.error(labels) == whole.error(labels) == 100 * np.mean(parts.predictions != labels)


def test_a_split_smaller_than_a_batch_is_no_special_case(trainer, unbroken, dataset):
    params, few = unbroken[-1][1].params, datasets.Split(*(x[:BATCH] for x in dataset.test))
    found = trainer.evaluate(params, few, batch_size=10 * BATCH)
    wanted = trainer.evaluate(params, few, batch_size=BATCH)
    np.testing.assert_array_equal(found.scores, wanted.scores)
    assert found.loss == wanted.loss


# The loop


def test_a_tiny_network_learns(unbroken):
    rows = [row for _, _, row in unbroken if row is not None]
    assert rows[-1]["test_error"] < 40  # chance is 90
    assert rows[-1]["train_loss"] < 0.6 * rows[0]["train_loss"]


def test_rows_come_when_they_are_due(unbroken):
    assert [step for step, _, _ in unbroken] == list(range(1, LAST_STEP + 1))
    rows = {step: row for step, _, row in unbroken if row is not None}
    assert list(rows) == list(range(10, LAST_STEP + 1, 10))
    metrics = {"step", "epoch", "train_loss", "train_error", "images_per_second"}
    for step, row in rows.items():
        of_test = {"test_loss", "test_error"} if step in (EPOCH_STEPS, LAST_STEP) else set()
        assert row.keys() == metrics | of_test
        assert (row["step"], row["epoch"]) == (step, step / EPOCH_STEPS)
        assert row["images_per_second"] > 0


def test_a_row_is_the_mean_of_the_steps_since_the_one_before(trainer, dataset, unbroken):
    single = run(trainer, trainer.initial_state(0), dataset, last_step=20, log_every_steps=1)
    chex.assert_trees_all_equal(single[14][1].params, unbroken[14][1].params)
    for last in (10, 20):
        *_, row = unbroken[last - 1]
        for name in ("train_loss", "train_error"):
            mean = np.mean([row[name] for _, _, row in single[last - 10 : last]])
            assert row[name] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("step", [15, EPOCH_STEPS])
def test_a_resumed_run_repeats_the_unbroken_one(trainer, dataset, unbroken, step):
    resumed = run(trainer, restored(unbroken[step - 1][1]), dataset)
    assert without_speed(resumed) == without_speed(unbroken[step:])
    chex.assert_trees_all_equal(resumed[-1][1], unbroken[-1][1])


def test_the_step_is_traced_and_compiled_once(trainer, dataset, unbroken):
    """Over rows, epochs, a second start, and a state that comes from a checkpoint."""
    run(trainer, trainer.initial_state(0), dataset, last_step=11)
    run(trainer, restored(unbroken[8][1]), dataset, last_step=11)
    assert trainer.traces == 1
    assert trainer.step._cache_size() == 1


def test_the_loop_ends_when_it_is_told_to(trainer, dataset):
    requests = iter([0, 0, 15])
    progress = run(trainer, trainer.initial_state(0), dataset, stopped=lambda: next(requests))
    assert [step for step, _, _ in progress] == [1, 2]


# What is not finite


def test_a_bad_step_is_named():
    good = loop.empty_window()
    loop.check_finite(good)
    message = r"^the loss or its gradient is not finite at step 17; try a lower --learning_rate$"
    with pytest.raises(InputError, match=message):
        loop.check_finite(good._replace(bad_step=jnp.int32(17)))


def test_a_step_notes_the_first_loss_that_is_not_finite(trainer, dataset, unbroken):
    images, labels = dataset.train.images[:BATCH], dataset.train.labels[:BATCH]
    state = unbroken[24][1]
    spoiled = jax.tree.map(lambda leaf: leaf * np.float32("nan"), state.params)
    state = trainer.step(restored(state), images, labels)
    assert int(state.window.bad_step) == -1
    for _ in range(2):
        state = trainer.step(restored(state._replace(params=spoiled)), images, labels)
        assert int(state.window.bad_step) == 27
    with pytest.raises(InputError, match="at step 27;"):
        run(trainer, state, dataset)


def test_a_test_loss_that_is_not_finite_is_named(dataset):
    """The last update of an epoch may spoil a network whose training loss was still good."""
    window = loop.empty_window()._replace(steps=jnp.int32(1))
    bad = loop.Evaluation(np.zeros((len(dataset.test.labels), 10)), float("nan"))
    stub = types.SimpleNamespace(
        batch=lambda examples, indices: examples.take(indices),
        empty_window=loop.empty_window,
        step=lambda state, images, labels: state,
        compile_step=lambda state, images, labels: None,
        evaluated=lambda state: state.params,
        evaluate=lambda *_, batch_size: bad,
    )
    state = loop.State({}, {}, optax.EmptyState(), jnp.int32(4), jnp.zeros(2), window)
    message = r"^the loss on the test data is not finite at step 5; try a lower --learning_rate$"
    with pytest.raises(InputError, match=message):
        run(stub, state, dataset, last_step=5)
