"""Training of networks: a step, an evaluation, and a loop that yields metrics."""

import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from experiments.data import datasets
from experiments.errors import InputError
from experiments.training.objectives import Objective
from experiments.training.transforms import scaled

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

    scores: np.ndarray  # float32 [N, K]: lengths of class capsules, or what the objective says
    loss: float  # mean over the examples

    @property
    def predictions(self) -> np.ndarray:
        """The class of the highest score, int [N]."""
        return self.scores.argmax(axis=1)

    def error(self, labels: np.ndarray) -> float:
        """Wrong predictions in percent."""
        return 100 * float(np.mean(self.predictions != labels))


class Progress(NamedTuple):
    """Where training is after a step."""

    step: int
    state: State
    row: dict[str, float | int] | None  # metrics, where they are due


class Trainer:
    """The compiled functions of one network, objective and optimizer."""

    def __init__(
        self, model: nnx.Module, objective: Objective, optimizer: optax.GradientTransformation
    ):
        """Splits the model; its parameters become the start."""
        self.graph, state = nnx.split(model)
        self._start = nnx.to_pure_dict(state)
        self.objective = objective
        self.optimizer = optimizer
        self.axes: tuple[str, ...] | None = None  # of a mesh, over which a batch is split
        self.step = jax.jit(self._step, donate_argnums=0)
        self._evaluate_batch = jax.jit(self._evaluate)
        self._score_batch = jax.jit(lambda params, x: objective.scores(self.model(params), x))

    def initial_state(self, seed: int) -> State:
        """The state before the first step, in buffers of its own: a step gives them away."""
        state = State(
            params=jax.tree.map(jnp.copy, self._start),
            optimizer=self.optimizer.init(self._start),
            step=jnp.array(0, jnp.int32),
            key=jax.random.key_data(jax.random.key(seed)),
            window=empty_window(),
        )
        return jax.device_put(state, jax.local_devices()[0])

    def empty_window(self) -> Window:
        """No steps yet, where the state is."""
        return empty_window()

    def batch(self, examples: datasets.Examples, indices: np.ndarray) -> tuple[Any, Any]:
        """The images and labels of these examples, as a step takes them."""
        return examples.take(indices)

    def whole(self, tree: Any) -> Any:
        """A part of the state on one device, as the functions of one device take it."""
        return tree

    def compile_step(self, state: State, images: Any, labels: Any) -> None:
        """Compiles the step before it runs, and gives the memory that this took back."""
        self.step.lower(state, images, labels).compile()
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # else the allocator keeps 0.2 GB beside what the step needs

    def model(self, params: Params) -> Any:
        """The network with these parameters, of the type given to the constructor."""
        return nnx.merge(self.graph, params)

    def evaluate(
        self, params: Params, examples: datasets.Examples, *, batch_size: int
    ) -> Evaluation:
        """Scores and mean loss over a whole split: the last, smaller batch included."""
        scores, losses = [], []
        for start in range(0, examples.size, batch_size):
            indices = np.arange(start, min(start + batch_size, examples.size))
            # One compiled size: the last batch is filled up, and what was added is cut off.
            kept = len(indices)
            missing = batch_size - kept if start or self.axes else 0
            images, labels = self.batch(examples, np.append(indices, np.full(missing, start)))
            batch_losses, batch_scores = self._evaluate_batch(params, images, labels)
            losses.append(np.asarray(batch_losses)[:kept])
            scores.append(np.asarray(batch_scores)[:kept])
        return Evaluation(np.concatenate(scores), float(np.concatenate(losses).mean()))

    def scores(self, params: Params, images: np.ndarray, *, batch_size: int = 128) -> np.ndarray:
        """The scores of the classes, float32 `[N, K]`, for images `[N, H, W, C]` in 0 … 1."""
        starts = range(0, len(images), batch_size)
        batches = (images[start : start + batch_size] for start in starts)
        return np.concatenate([np.asarray(self._score_batch(params, x)) for x in batches])

    def _step(self, state: State, images: Array, labels: Array) -> State:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        images = self.objective.augment(scaled(images), key, axis_name=self.axes)

        def mean_loss(params: Params) -> tuple[Array, Array]:
            model = self.model(params)
            losses, scores = self.objective.loss(model, images, labels, key, axis_name=self.axes)
            return losses.mean(), scores

        (loss, scores), gradients = jax.value_and_grad(mean_loss, has_aux=True)(state.params)
        errors = jnp.mean(self.objective.errors(scores, labels).astype(jnp.float32))
        loss, errors, gradients = self._averaged(loss, errors, gradients)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(self._norm(gradients))
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

    def _averaged(
        self, loss: Array, errors: Array, gradients: Params
    ) -> tuple[Array, Array, Params]:
        """The means over all devices of what is each device's mean over its examples."""
        return loss, errors, gradients

    def _norm(self, gradients: Params) -> Array:
        return optax.tree.norm(gradients)

    def _evaluate(self, params: Params, images: Array, labels: Array) -> tuple[Array, Array]:
        return self.objective.loss(self.model(params), scaled(images), labels, None)


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
    return jax.device_put(window, jax.local_devices()[0])


def adam(
    learning_rate: float, *, final_learning_rate: float, num_steps: int
) -> optax.GradientTransformation:
    """Adam whose rate falls by the same factor in every step, down to the final one."""
    factor = final_learning_rate / learning_rate
    return optax.adam(optax.exponential_decay(learning_rate, num_steps, factor))


def train(
    trainer: Trainer,
    state: State,
    train_examples: datasets.Examples,
    test_examples: datasets.Examples,
    *,
    batch_size: int,
    last_step: int,
    log_every_steps: int,
    seed: int,
    stopped: Callable[[], int],
    extra_metrics: Callable[[Params], dict[str, float]] | None = None,
) -> Iterator[Progress]:
    """Trains from a state on, and yields after every step.

    Args:
      trainer: The compiled functions.
      state: The start; its buffers are given away.
      train_examples: What the batches are taken from.
      test_examples: What the test error is measured on.
      batch_size: Examples in a step.
      last_step: Where to end, counted from the first step of all.
      log_every_steps: Steps from one row of metrics to the next.
      seed: Of the order of the examples.
      stopped: Asked after every step; the loop ends when it says so.
      extra_metrics: What else an epoch's last row tells of the parameters, which it gets on one
        device; it changes nothing.

    Yields:
      The progress after each step; a row of metrics every `log_every_steps` steps, and at an
      epoch's end with the test error too.

    Raises:
      InputError: The loss is no longer a finite number.
    """
    epoch_steps = train_examples.size // batch_size
    step = int(state.step)
    order = datasets.batches(train_examples.size, batch_size=batch_size, seed=seed, first_step=step)
    if step < last_step:
        trainer.compile_step(state, *trainer.batch(train_examples, np.arange(batch_size)))
    started, started_at = time.perf_counter(), step
    while step < last_step and not stopped():
        state = trainer.step(state, *trainer.batch(train_examples, next(order)))
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
        state = state._replace(window=trainer.empty_window())
        if epoch_ends:
            evaluation = trainer.evaluate(state.params, test_examples, batch_size=batch_size)
            if not math.isfinite(evaluation.loss):
                raise _not_finite("the loss on the test data", step)
            row["test_loss"] = evaluation.loss
            row |= trainer.objective.test_metrics(evaluation.scores, test_examples.labels)
            if extra_metrics is not None:
                row |= extra_metrics(trainer.whole(state.params))
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
