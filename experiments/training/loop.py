"""Training: the compiled step, evaluation, and the loop that yields metrics."""

import ctypes
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util
from jax import Array
from jax.sharding import SingleDeviceSharding

from experiments.data import datasets
from experiments.errors import InputError
from experiments.training.objectives import Objective
from experiments.training.transforms import scaled

CGROUP_MEMORY = "/sys/fs/cgroup/memory.max"
Params = dict[str, Any]  # parameters, and statistics of batch normalisation if there are any


class Window(NamedTuple):
    """Sums over the steps since the last row of metrics, which a checkpoint saves too."""

    steps: Array  # int32
    loss: Array  # float32, sum of batch means
    errors: Array  # float32, sum of batch means of wrong predictions
    bad_step: Array  # int32, the first step whose loss or gradient was not finite, or -1


class State(NamedTuple):
    """Everything that a step changes, and that a checkpoint saves."""

    params: Params
    average: Params  # moving average of `params`, empty if none is kept
    optimizer: optax.OptState
    step: Array  # int32, steps done
    key: Array  # uint32 key data; a step's own key is folded in
    window: Window


class Evaluation(NamedTuple):
    """Scores and loss of a network on a whole split."""

    scores: np.ndarray  # float32 [N, K]: capsule lengths or probabilities, by the objective
    loss: float  # mean over the examples

    @property
    def predictions(self) -> np.ndarray:
        """The classes with the highest score, int [N]."""
        return self.scores.argmax(axis=1)

    def error(self, labels: np.ndarray) -> float:
        """Return the percentage of wrong predictions."""
        return 100 * float(np.mean(self.predictions != labels))


class Progress(NamedTuple):
    """The state after a step."""

    step: int
    state: State
    row: dict[str, float | int] | None  # metrics, every `log_every_steps` and at an epoch's end


class Trainer:
    """The compiled functions of one network, objective and optimizer, on one device.

    The network is never built as a whole: its structure comes from abstract evaluation, and its
    parameters from a compiled program, whose results lie where training needs them.

    Args:
      build: Makes the network, with the same parameters at every call.
      objective: What is minimised, and how images are augmented.
      optimizer: An Optax gradient transformation.
      average_decay: Of an exponential moving average of parameters and statistics, which is
        evaluated in their place; 0 keeps none. After n steps the decay is at most
        (1 + n) / (10 + n), so that the initial parameters, which start the average, are soon
        forgotten.

    Attributes:
      network: The network with shapes and dtypes in place of arrays.
      has_statistics: Whether the network normalises by batches. Its statistics (`nnx.BatchStat`)
        lie among the parameters; steps update them, and the optimizer does not see them.
      step: From a state, images and labels to the next state; the given state is donated.
      empty_window: Makes the `Window` without steps.

    Raises:
      InputError: `build` refuses the settings.
    """

    def __init__(
        self,
        build: Callable[[], nnx.Module],
        objective: Objective,
        optimizer: optax.GradientTransformation,
        *,
        average_decay: float = 0.0,
    ):
        self.build = build
        self.objective = objective
        self.optimizer = optimizer
        self.average_decay = average_decay
        self.network: Any = nnx.eval_shape(build)
        self._graph, _ = nnx.split(self.network)
        statistics = nnx.to_pure_dict(nnx.state(self.network, nnx.BatchStat))
        self._statistics = frozenset(traverse_util.flatten_dict(statistics))
        self.has_statistics = bool(self._statistics)
        self._shapes = jax.eval_shape(
            lambda params: self._state(params, jnp.zeros(2, jnp.uint32)),
            jax.eval_shape(self._params),
        )
        self._axes: tuple[str, ...] | None = None  # of a mesh, over which a batch is split
        self._shardings = self._layout()
        self.empty_window = jax.jit(empty_window, out_shardings=self._shardings.window)
        self._score_batch = self.jit(lambda params, x: self.objective.scores(self.model(params), x))
        self._compile()

    def _layout(self) -> State:
        """Return the sharding of each array of a state."""
        device = SingleDeviceSharding(jax.local_devices()[0])
        return jax.tree.map(lambda _: device, self._shapes)

    def _compile(self) -> None:
        """Declare step and evaluation; XLA compiles each at its first call."""
        self.step = jax.jit(self._step, donate_argnums=0)
        self._evaluate_batch = jax.jit(self._evaluate)

    def initial_state(self, seed: int) -> State:
        """Return the state before the first step; each device makes its own shards.

        Args:
          seed: Of augmentation and dropout; that of the parameters is `build`'s.
        """
        # Moments in a program of their own: while numbers are drawn, only parameters take memory.
        params = jax.jit(self._params, out_shardings=self._shardings.params)()
        key = np.asarray(jax.random.key_data(jax.random.key(seed)))
        rest = self._shardings._replace(params={})
        state = jax.jit(
            lambda params, key: self._state(params, key)._replace(params={}), out_shardings=rest
        )(params, key)
        return state._replace(params=params)

    def abstract_state(self) -> State:
        """Return shapes, dtypes and shardings of a state, as `Checkpoints.restore` takes them."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._shapes,
            self._shardings,
        )

    def batch(self, examples: datasets.Examples, indices: np.ndarray) -> tuple[Any, Any]:
        """Return images and labels of these examples, as a step takes them."""
        return examples.take(indices)

    def jit(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Compile a function of parameters and arrays; every process gets its whole result."""
        return jax.jit(function)

    def compile_step(self, state: State, images: Any, labels: Any) -> None:
        """Compile the step ahead of its first call, and return the compiler's memory.

        Raises:
          InputError: The step needs more memory than there is.
        """
        check_program_memory(self.step.lower(state, images, labels).compile(), "a training step")
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # else the allocator keeps 0.2 GB beside what the step needs

    def model(self, params: Params) -> Any:
        """Return the network with these parameters, of the type that `build` returns."""
        # A copy, because variables can be updated only in the trace that creates them.
        return nnx.merge(self._graph, params, copy=self.has_statistics)

    def evaluated(self, state: State) -> Params:
        """Return the parameters to evaluate: the averaged ones if an average is kept."""
        return state.average if self.average_decay else state.params

    def evaluate(
        self, params: Params, examples: datasets.Examples, *, batch_size: int
    ) -> Evaluation:
        """Return scores and mean loss of a whole split, the last, smaller batch included.

        Raises:
          InputError: A batch needs more memory than there is.
        """
        scores, losses = [], []
        for start in range(0, examples.size, batch_size):
            indices = np.arange(start, min(start + batch_size, examples.size))
            # One compiled size: the last batch is padded, and the padding's results are cut off.
            kept = len(indices)
            missing = batch_size - kept if start or self._axes else 0
            images, labels = self.batch(examples, np.append(indices, np.full(missing, start)))
            if not start:
                compiled = self._evaluate_batch.lower(params, images, labels).compile()
                check_program_memory(compiled, "a batch of the evaluation")
            batch_losses, batch_scores = self._evaluate_batch(params, images, labels)
            losses.append(np.asarray(batch_losses)[:kept])
            scores.append(np.asarray(batch_scores)[:kept])
        return Evaluation(np.concatenate(scores), float(np.concatenate(losses).mean()))

    def scores(self, params: Params, images: np.ndarray, *, batch_size: int = 128) -> np.ndarray:
        """Return the classes' scores, float32 `[N, K]`, of images `[N, H, W, C]` in 0 … 1."""
        starts = range(0, len(images), batch_size)
        batches = (images[start : start + batch_size] for start in starts)
        return np.concatenate([np.asarray(self._score_batch(params, x)) for x in batches])

    def _params(self) -> Params:
        return nnx.to_pure_dict(nnx.state(self.build()))

    def _state(self, params: Params, key: Array) -> State:
        trained, _ = self._parts(params)
        return State(
            params,
            # A copy, because a buffer cannot be donated twice.
            average=jax.tree.map(jnp.copy, params) if self.average_decay else {},
            optimizer=self.optimizer.init(trained),
            step=jnp.zeros((), jnp.int32),
            key=key,
            window=empty_window(),
        )

    def _parts(self, params: Params) -> tuple[Params, Params]:
        """Split into what the optimizer trains, and the statistics."""
        if not self.has_statistics:
            return params, {}
        flat = traverse_util.flatten_dict(params)
        statistics = {path: flat.pop(path) for path in self._statistics}
        return traverse_util.unflatten_dict(flat), traverse_util.unflatten_dict(statistics)

    def _local_model(self, params: Params) -> Any:
        """Return the network that one device runs in a step, with its shards of parameters."""
        return self.model(params)

    def _step(self, state: State, images: Array, labels: Array) -> State:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
        images = self.objective.augment(scaled(images), key, axis_name=self._axes)

        trained, statistics = self._parts(state.params)
        objective = self.objective.at_step(state.step)

        def mean_loss(trained: Params) -> tuple[Array, tuple[Array, Params]]:
            model = self._local_model(_joined(trained, statistics))
            losses, scores = objective.loss(model, images, labels, key, axis_name=self._axes)
            updated = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)) if statistics else {}
            return losses.mean(), (scores, updated)

        (loss, (scores, statistics)), gradients = jax.value_and_grad(mean_loss, has_aux=True)(
            trained
        )
        errors = jnp.mean(self.objective.errors(scores, labels).astype(jnp.float32))
        loss, errors, gradients = self._averaged(loss, errors, gradients)
        updates, optimizer = self.optimizer.update(gradients, state.optimizer, trained)
        finite = jnp.isfinite(loss) & jnp.isfinite(self._norm(gradients))
        params, average = _joined(optax.apply_updates(trained, updates), statistics), {}
        if self.average_decay:
            decay = jnp.minimum(self.average_decay, (1 + state.step) / (10 + state.step))
            average = optax.incremental_update(params, state.average, 1 - decay)
        seen = state.window
        return State(
            params=params,
            average=average,
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
        """Average over the devices the means over the examples of each."""
        return loss, errors, gradients

    def _norm(self, gradients: Params) -> Array:
        return optax.tree.norm(gradients)

    def _evaluate(self, params: Params, images: Array, labels: Array) -> tuple[Array, Array]:
        return self.objective.loss(self._local_model(params), scaled(images), labels, None)


def check_memory(state: Any) -> None:
    """Check that a training state and its gradients fit into the memory of this process's devices.

    Args:
      state: A tree of `jax.ShapeDtypeStruct`s with shardings; its `params` have gradients.

    Raises:
      InputError: They do not.
    """

    def size(leaf: Any) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    needed = sum(map(size, jax.tree.leaves((state, state.params))))
    _check_fits(needed, "parameters, moments and gradients need", "a smaller network")


def check_program_memory(program: jax.stages.Compiled, what: str) -> None:
    """Check that a compiled program fits into the memory of this process's devices.

    Raises:
      InputError: It does not; `what` says what it computes.
    """
    found = program.memory_analysis()
    if found is not None:  # there are backends that cannot tell
        sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
        needed = sum(sizes) - found.alias_size_in_bytes
        _check_fits(needed, f"{what} needs", "a smaller --batch_size or network")


def _check_fits(needed: int, what: str, advice: str) -> None:
    """Check that each of this process's devices has `needed` bytes."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":  # one memory, of all its devices
        needed *= jax.local_device_count()
        memory: float = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = pathlib.Path(CGROUP_MEMORY)  # of a container; a number of bytes or "max"
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            memory = min(memory, int(text))
    else:
        memory = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    if needed > memory:
        raise InputError(
            f"{what} {needed / 2**30:.1f} GiB of memory, and there are {memory / 2**30:.1f} GiB; "
            f"use {advice}"
        )


def keep_compiled(folder: str) -> None:
    """Keep all compiled programs in a folder, the small ones too, of which a start has dozens."""
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def empty_window() -> Window:
    """Return the sums before the first step."""
    return Window(
        steps=jnp.zeros((), jnp.int32),
        loss=jnp.zeros(()),
        errors=jnp.zeros(()),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def adam(
    learning_rate: float, *, final_learning_rate: float, num_steps: int
) -> optax.GradientTransformation:
    """Return Adam with a learning rate that decays exponentially over `num_steps` steps."""
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
    """Train from a state to the last step, and yield after every step.

    Args:
      trainer: The compiled functions.
      state: From `trainer`; its buffers are donated.
      train_examples: Examples for training.
      test_examples: Examples for the test error.
      batch_size: Examples in a step.
      last_step: The step at which to end, counted from the first step of the run.
      log_every_steps: Steps from one row of metrics to the next.
      seed: Of the order of the examples.
      stopped: Called after every step; the loop ends when it returns a number other than 0.
      extra_metrics: Computes further metrics of an epoch's last row from the parameters, where
        these lie.

    Yields:
      The progress after each step; a row at an epoch's end has the test error too.

    Raises:
      InputError: The loss or its gradient is not finite.
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
            params = trainer.evaluated(state)
            evaluation = trainer.evaluate(params, test_examples, batch_size=batch_size)
            if not math.isfinite(evaluation.loss):
                raise _not_finite("the loss on the test data", step)
            row["test_loss"] = evaluation.loss
            row |= trainer.objective.test_metrics(evaluation.scores, test_examples.labels)
            if extra_metrics is not None:
                row |= extra_metrics(params)
        started, started_at = time.perf_counter(), step
        yield Progress(step, state, row)


def check_finite(window: Window) -> None:
    """Raise InputError with the first step whose loss or gradient was not finite, if any."""
    bad_step = int(window.bad_step)
    if bad_step >= 0:
        raise _not_finite("the loss or its gradient", bad_step)


def _joined(trained: Params, statistics: Params) -> Params:
    """Join the two parts of the parameters."""
    if not statistics:
        return trained
    flat = traverse_util.flatten_dict(trained) | traverse_util.flatten_dict(statistics)
    return traverse_util.unflatten_dict(flat)


def _not_finite(what: str, step: int) -> InputError:
    return InputError(f"{what} is not finite at step {step}; try a lower --learning_rate")


def _training_metrics(window: Window) -> dict[str, float]:
    check_finite(window)
    steps = int(window.steps)
    return {
        "train_loss": float(window.loss) / steps,
        "train_error": 100 * float(window.errors) / steps,
    }
