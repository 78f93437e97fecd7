"""Training of capsule networks: a step, an evaluation, and a loop that yields metrics."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

import capsjax
from capsjax.models import CapsNet
from experiments import data
from experiments.errors import InputError

Params = dict[str, Any]


class Window(NamedTuple):
    """Sums over the steps since the last row of metrics; part of the state, so that it resumes."""

    steps: Array  # int32
    loss: Array  # float32, sum of batch means
    errors: Array  # float32, sum of batch means of wrong predictions
    bad_step: Array  # int32, the first step whose loss or gradient was not finite, or -1


class State(NamedTuple):
    """All that changes while training; a checkpoint holds it whole."""

    params: Params
    optimizer: optax.OptState
    step: Array  # int32, steps done
    key: Array  # uint32 key data; a step's own key is folded in
    window: Window


class Evaluation(NamedTuple):
    """What a network says about a whole split."""

    lengths: np.ndarray  # float32 [N, J]
    loss: float  # mean over the examples

    @property
    def predictions(self) -> np.ndarray:
        """The class of the longest capsule, int [N]."""
        return self.lengths.argmax(axis=1)

    def error(self, labels: np.ndarray) -> float:
        """Wrong predictions in percent."""
        return 100 * float(np.mean(self.predictions != labels))


class Progress(NamedTuple):
    """Where training is after a step."""

    step: int
    state: State
    row: dict[str, float | int] | None  # metrics, where they are due


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, and how the images are moved first."""

    num_classes: int
    reconstruction_weight: float
    shift: int

    def loss(
        self, model: CapsNet, images: Array, labels: Array, *, training: bool
    ) -> tuple[Array, Array]:
        """The loss of each example, and its capsule lengths.

        The decoder draws the true class in training, and that of the longest capsule otherwise.
        """
        capsules = model(images)
        lengths = capsjax.lengths(capsules).astype(jnp.float32)
        loss = capsjax.margin_loss(lengths, jax.nn.one_hot(labels, self.num_classes))
        if self.reconstruction_weight:
            drawn = model.reconstruct(capsules, labels if training else None).astype(jnp.float32)
            loss += capsjax.reconstruction_loss(drawn, images, weight=self.reconstruction_weight)
        return loss, lengths


class Trainer:
    """The compiled functions of one network, objective and optimizer."""

    def __init__(
        self, model: CapsNet, objective: Objective, optimizer: optax.GradientTransformation
    ):
        """Splits the model; its parameters become the start."""
        self.graph, state = nnx.split(model)
        self._start = nnx.to_pure_dict(state)
        self.objective = objective
        self.optimizer = optimizer
        self.step = jax.jit(self._step, donate_argnums=0)
        self._evaluate_batch = jax.jit(self._evaluate)

    def initial_state(self, seed: int) -> State:
        """The state before the first step, in buffers of its own: a step gives them away."""
        state = State(
            params=jax.tree.map(jnp.copy, self._start),
            optimizer=self.optimizer.init(self._start),
            step=jnp.array(0, jnp.int32),
            key=jax.random.key_data(jax.random.key(seed)),
            window=empty_window(),
        )
        return jax.device_put(state, jax.devices()[0])

    def model(self, params: Params) -> CapsNet:
        """The network with these parameters."""
        return nnx.merge(self.graph, params)

    def evaluate(self, params: Params, split: data.Split, *, batch_size: int) -> Evaluation:
        """Runs the network on every example of a split, the last, smaller batch included."""
        lengths, losses = [], []
        for start in range(0, len(split.labels), batch_size):
            images = split.images[start : start + batch_size]
            labels = split.labels[start : start + batch_size]
            # One compiled size: the last batch is filled up, and what was added is cut off.
            missing = batch_size - len(labels) if start else 0
            images = np.concatenate([images, images[:1].repeat(missing, 0)])
            labels = np.concatenate([labels, labels[:1].repeat(missing, 0)])
            batch_losses, batch_lengths = self._evaluate_batch(params, images, labels)
            kept = len(labels) - missing
            losses.append(np.asarray(batch_losses)[:kept])
            lengths.append(np.asarray(batch_lengths)[:kept])
        return Evaluation(np.concatenate(lengths), float(np.concatenate(losses).mean()))

    def _step(self, state: State, images: Array, labels: Array) -> State:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        images = shifted(scaled(images), key, self.objective.shift)

        def mean_loss(params: Params) -> tuple[Array, Array]:
            losses, lengths = self.objective.loss(self.model(params), images, labels, training=True)
            return losses.mean(), lengths

        (loss, lengths), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        errors = jnp.mean(jnp.argmax(lengths, axis=1) != labels)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients))
        seen = state.window
        return State(
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer,
            step=state.step + 1,
            key=state.key,
            window=Window(
                steps=seen.steps + 1,
                loss=seen.loss + loss,
                errors=seen.errors + errors,
                bad_step=jnp.where(finite | (seen.bad_step >= 0), seen.bad_step, state.step + 1),
            ),
        )

    def _evaluate(self, params: Params, images: Array, labels: Array) -> tuple[Array, Array]:
        return self.objective.loss(self.model(params), scaled(images), labels, training=False)


def keep_compiled(folder: str) -> None:
    """Has compiled programs kept in a folder, the small ones too: a start has dozens."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def empty_window() -> Window:
    """No steps yet."""
    integer, real = jnp.int32, jnp.float32
    window = Window(
        jnp.array(0, integer), jnp.array(0, real), jnp.array(0, real), jnp.array(-1, integer)
    )
    # On its device for good, as what a checkpoint restores: else a resumed step is compiled twice.
    return jax.device_put(window, jax.devices()[0])


def scaled(images: Array) -> Array:
    """Bytes to float32 in 0 … 1."""
    return images.astype(jnp.float32) / 255


def shifted(images: Array, key: Array, limit: int) -> Array:
    """Moves each image by up to `limit` pixels along each axis, filling up with 0."""
    if limit == 0:
        return images
    offsets = jax.random.randint(key, (images.shape[0], 2), 0, 2 * limit + 1)
    padded = jnp.pad(images, ((0, 0), (limit, limit), (limit, limit), (0, 0)))

    def cut(image: Array, offset: Array) -> Array:
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(cut)(padded, offsets)


def adam(
    learning_rate: float, *, final_learning_rate: float, num_steps: int
) -> optax.GradientTransformation:
    """Adam whose rate falls by the same factor in every step, down to the final one."""
    factor = final_learning_rate / learning_rate
    return optax.adam(optax.exponential_decay(learning_rate, num_steps, factor))


def train(
    trainer: Trainer,
    state: State,
    dataset: data.Dataset,
    *,
    batch_size: int,
    last_step: int,
    log_every_steps: int,
    seed: int,
    stopped: Callable[[], int],
) -> Iterator[Progress]:
    """Trains from a state on, and yields after every step.

    Args:
      trainer: The compiled functions.
      state: The start; its buffers are given away.
      dataset: Training batches come from `train`, the test error from `test`.
      batch_size: Examples in a step.
      last_step: Where to end, counted from the first step of all.
      log_every_steps: Steps from one row of metrics to the next.
      seed: Of the order of the examples.
      stopped: Asked after every step; the loop ends when it says so.

    Yields:
      The progress after each step; a row of metrics every `log_every_steps` steps, and at an
      epoch's end with the test error too.

    Raises:
      InputError: The loss is no longer a finite number.
    """
    examples = len(dataset.train.labels)
    epoch_steps = examples // batch_size
    step = int(state.step)
    order = data.batches(examples, batch_size=batch_size, seed=seed, first_step=step)
    started, started_at = time.perf_counter(), step
    while step < last_step and not stopped():
        chosen = next(order)
        state = trainer.step(state, dataset.train.images[chosen], dataset.train.labels[chosen])
        step += 1
        epoch_ends = step % epoch_steps == 0 or step == last_step
        if not (epoch_ends or step % log_every_steps == 0):
            yield Progress(step, state, None)
            continue
        row: dict[str, float | int] = {"step": step, "epoch": step / epoch_steps}
        row |= _training_metrics(state.window)
        row["images_per_second"] = (
            (step - started_at) * batch_size / (time.perf_counter() - started)
        )
        state = state._replace(window=empty_window())
        if epoch_ends:
            evaluation = trainer.evaluate(state.params, dataset.test, batch_size=batch_size)
            if not math.isfinite(evaluation.loss):
                raise _not_finite("the loss on the test data", step)
            row["test_loss"] = evaluation.loss
            row["test_error"] = evaluation.error(dataset.test.labels)
        started, started_at = time.perf_counter(), step
        yield Progress(step, state, row)


def check_finite(window: Window) -> None:
    """Raises InputError naming the first step, if any, whose loss or gradient was not finite."""
    bad_step = int(window.bad_step)
    if bad_step >= 0:
        raise _not_finite("the loss or its gradient", bad_step)


def _not_finite(what: str, step: int) -> InputError:
    return InputError(f"{what} is not finite at step {step}; try a lower --learning_rate")


def _training_metrics(window: Window) -> dict[str, float]:
    check_finite(window)
    steps = int(window.steps)
    return {
        "train_loss": float(window.loss) / steps,
        "train_error": 100 * float(window.errors) / steps,
    }
