"""A training run in its folder: settings that all programs share, and the way from start to end."""

import dataclasses
import signal
from collections.abc import Callable

import jax
from absl import logging

from experiments import data, parallel, records, signals, training
from experiments.checkpoints import Checkpoints
from experiments.cli import flag
from experiments.display import Display
from experiments.errors import InputError


@dataclasses.dataclass(frozen=True)
class Settings(parallel.Settings):
    """Settings of every training program; its own Config adds what is to be trained."""

    dataset: str = flag("mnist", "mnist_small, mnist, fashion_mnist or tfds:<name>.")
    data_dir: str = flag("", "Folder of its files; empty: the usual caches.", affects_result=False)
    download: bool = flag(False, "Fetch a missing data set with TFDS.", affects_result=False)
    workdir: str = flag("runs/mnist", "Folder of all that is written.", affects_result=False)
    batch_size: int = flag(128, "Examples in one step.", minimum=1)
    num_epochs: int = flag(50, "Passes over the training data.", minimum=1)
    max_steps: int = flag(0, "Stop after these; 0: at the end.", minimum=0, affects_result=False)
    learning_rate: float = flag(1e-3, "Adam's step size at the start.", above=0)
    final_learning_rate: float = flag(1e-4, "Adam's step size after num_epochs.", above=0)
    seed: int = flag(0, "Of parameters, order and moves.", minimum=0, maximum=2**32 - 1)
    log_every_steps: int = flag(50, "Steps between rows of metrics.", minimum=1)
    checkpoint_every_steps: int = flag(
        500, "Steps between checkpoints.", minimum=1, affects_result=False
    )
    tensorboard: bool = flag(False, "Write TensorBoard files too.", affects_result=False)
    compilation_cache: str = flag("", "Folder of compiled programs.", affects_result=False)


def prepare(settings: Settings) -> data.Dataset:
    """Turns the compilation cache on, if one is named, and loads the data set."""
    if settings.compilation_cache:
        training.keep_compiled(settings.compilation_cache)
    return data.load(settings.dataset, data_dir=settings.data_dir, download=settings.download)


def num_steps(settings: Settings, examples: data.Examples) -> int:
    """The steps of all epochs.

    Raises:
      InputError: The batch is larger than the data.
    """
    if settings.batch_size > examples.size:
        raise InputError(
            f"--batch_size must be at most the {examples.size} training examples of "
            f"{settings.dataset}, got {settings.batch_size}"
        )
    return settings.num_epochs * (examples.size // settings.batch_size)


def train(
    settings: Settings,
    trainer: training.Trainer,
    train_examples: data.Examples,
    test_examples: data.Examples,
    *,
    data_sha256: str,
    extra_metrics: Callable[[training.Params], dict[str, float]] | None = None,
) -> tuple[int, training.Params]:
    """Trains from the workdir's newest checkpoint to the end; `extra_metrics` as in `training`.

    Returns:
      The exit status (128 + the signal's number if the run was stopped) and the parameters.

    Raises:
      InputError: The workdir holds another run or cannot be written, or the loss is not finite.
    """
    one_device = trainer
    trainer = parallel.spread(trainer, settings, batch_size=settings.batch_size)
    workdir = records.open_workdir(settings.workdir, config=settings, data_sha256=data_sha256)
    last_step = num_steps(settings, train_examples)
    if settings.max_steps:
        last_step = min(last_step, settings.max_steps)
    with (
        records.exclusive(workdir),
        Checkpoints(workdir) as checkpoints,
        signals.stop_requests() as stopped,
    ):
        start = one_device.initial_state(settings.seed)
        step, start = checkpoints.restore(start) or (0, start)
        start = trainer.placed(start)
        first_step, state = step, start
        if step:
            logging.info("going on from step %d of %d in %s", step, last_step, workdir)
        with (
            records.Metrics(workdir, step=first_step, tensorboard=settings.tensorboard) as metrics,
            Display(first_step=first_step, last_step=last_step) as display,
        ):
            for step, state, row in training.train(
                trainer,
                start,
                train_examples,
                test_examples,
                batch_size=settings.batch_size,
                last_step=last_step,
                log_every_steps=settings.log_every_steps,
                seed=settings.seed,
                stopped=stopped,
                extra_metrics=extra_metrics,
            ):
                if row is not None:
                    metrics.write(row)
                display.update(step, row)
                if step % settings.checkpoint_every_steps == 0:
                    training.check_finite(state.window)
                    checkpoints.save(step, trainer.whole(state))
        training.check_finite(state.window)
        checkpoints.save(step, trainer.whole(state))
        params = jax.device_put(trainer.whole(state.params), jax.local_devices()[0])
        if stopped():
            name = signal.Signals(stopped()).name
            logging.info("%s: saved at step %d; the same --workdir goes on from there", name, step)
            return 128 + stopped(), params
    return 0, params
