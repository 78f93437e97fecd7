"""Training runs: settings common to all training programs, and one run from start to end."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import tempfile
from collections.abc import Callable, Mapping
from typing import Self

import numpy as np
from absl import logging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import files
from experiments.cli import flag
from experiments.data import datasets
from experiments.errors import InputError
from experiments.training import loop, parallel, processes, records, signals
from experiments.training.checkpoints import (
    Checkpoints,
    begin_training,
    check_metrics,
    saved_steps,
)


class Display:
    """Shows loss, error, images a second and the time left: a bar on a terminal, or log lines.

    Args:
      first_step: The step from which the run goes on; 0 for a new run.
      last_step: The step at which it ends.
    """

    def __init__(self, *, first_step: int, last_step: int):
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]:.2f}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task(
            "training", completed=first_step, total=last_step, epoch=0.0, text="compiling"
        )

    def update(self, step: int, row: Mapping[str, float | int] | None) -> None:
        """Show a step and, if there is one, its row of metrics; rows with a test error stay."""
        self._bar.update(self._task, completed=step)
        if row is None:
            return
        text = (
            f"loss {row['train_loss']:.4f}  error {row['train_error']:.2f} %  "
            f"{row['images_per_second']:.0f} images/s"
        )
        self._bar.update(self._task, epoch=row["epoch"], text=text)
        if "test_error" in row:
            text = f"{text}  test error {row['test_error']:.2f} %"
        if "test_error" in row or self._bar.disable:
            line = f"epoch {row['epoch']:.2f}  step {step}  {text}"
            if self._bar.disable:
                logging.info("%s", line)
            else:
                self._bar.console.print(line, highlight=False)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


@dataclasses.dataclass(frozen=True)
class Settings(parallel.Settings, processes.Settings):
    """Settings of every training program, to which its own Config adds network and objective."""

    dataset: str = flag(
        "mnist",
        "Data set: mnist_small, mnist, fashion_mnist, smallnorb, folder:<DIR> or tfds:<name>.",
    )
    data_dir: str = flag(
        "", "Folder of the data set's files; empty: the usual caches.", affects_result=False
    )
    download: bool = flag(
        False, "Download a missing data set with TensorFlow Datasets.", affects_result=False
    )
    workdir: str = flag(
        "runs/mnist",
        "Folder for checkpoints, metrics and figures; a run found there goes on.",
        affects_result=False,
    )
    batch_size: int = flag(
        128, "Examples in one step, on all devices together.", minimum=1, maximum=2**31 - 1
    )
    num_epochs: int = flag(50, "Passes over the training data.", minimum=1, maximum=10**9)
    max_steps: int = flag(
        0,
        "Stop after this step; 0: after num_epochs.",
        minimum=0,
        maximum=2**31 - 1,
        affects_result=False,
    )
    learning_rate: float = flag(
        1e-3, "Learning rate of Adam in the first step.", above=0, maximum=1e6
    )
    final_learning_rate: float = flag(
        1e-4,
        "Learning rate after num_epochs, to which it decays exponentially.",
        above=0,
        maximum=1e6,
    )
    seed: int = flag(
        0, "Seed of parameters, order of examples and augmentation.", minimum=0, maximum=2**32 - 1
    )
    log_every_steps: int = flag(50, "Steps between rows of metrics.", minimum=1, maximum=2**31 - 1)
    checkpoint_every_steps: int = flag(
        500, "Steps between checkpoints.", minimum=1, maximum=2**31 - 1, affects_result=False
    )
    tensorboard: bool = flag(
        False, "Write the metrics as TensorBoard files too.", affects_result=False
    )
    compilation_cache: str = flag(
        "", "Folder in which compiled programs are kept; empty: none.", affects_result=False
    )


def prepare(settings: Settings) -> datasets.Dataset:
    """Join the other processes, enable the compilation cache, and load the data set.

    Raises:
      InputError: There is no such data set, or another process has other settings or data.
    """
    spread = (settings.data_parallel, settings.capsule_parallel) != (1, 1)
    processes.start(settings, may_be_cluster=spread)
    if settings.compilation_cache:
        folder = f"--compilation_cache: {settings.compilation_cache}"
        with files.writing(folder):
            os.makedirs(settings.compilation_cache, exist_ok=True)
            tempfile.TemporaryFile(dir=settings.compilation_cache).close()
        loop.keep_compiled(settings.compilation_cache)
    dataset = processes.together(
        lambda: datasets.load(
            settings.dataset, data_dir=settings.data_dir, download=settings.download
        )
    )
    own = {field.name for field in dataclasses.fields(processes.Settings)}
    facts = {name: value for name, value in dataclasses.asdict(settings).items() if name not in own}
    del facts["data_dir"], facts["compilation_cache"]
    processes.check_same({**facts, "data_sha256": dataset.sha256})
    return dataset


def num_steps(settings: Settings, examples: datasets.Examples) -> int:
    """Return the number of steps in all epochs.

    Raises:
      InputError: The batch is larger than the data, or the steps do not fit into an int32.
    """
    if settings.batch_size > examples.size:
        raise InputError(
            f"--batch_size must be at most the {examples.size} training examples of "
            f"{settings.dataset}, got {settings.batch_size}"
        )
    steps = settings.num_epochs * (examples.size // settings.batch_size)
    if steps >= 2**31:
        raise InputError(
            f"--num_epochs={settings.num_epochs} are {steps} steps, more than can be counted: "
            f"at most {2**31 - 1}"
        )
    return steps


def train(
    settings: Settings,
    trainer: loop.Trainer,
    train_examples: datasets.Examples,
    test_examples: datasets.Examples,
    *,
    dataset: datasets.Dataset,
    extra_metrics: Callable[[loop.Params], dict[str, float]] | None = None,
) -> tuple[int, loop.Params]:
    """Train from the workdir's newest checkpoint, or from the start, to the last step.

    Args:
      settings: Those of the run; `prepare` was called with them.
      trainer: Of the devices to train on, as from `parallel.spread`.
      train_examples: Examples for training.
      test_examples: Examples for the test error.
      dataset: Whose digest and sizes a new run notes.
      extra_metrics: As in `loop.train`.

    Returns:
      The exit status (128 + the signal's number if the run was stopped) and the parameters to
      evaluate, sharded as the trainer shards them.

    Raises:
      InputError: The workdir holds another run, has lost its checkpoints or cannot be written, or
        the loss is not finite.
    """
    workdir = pathlib.Path(settings.workdir)

    def check_memory() -> None:
        state = trainer.abstract_state()
        loop.check_memory(state)
        if not records.holds_run(workdir):  # before it is made: another size may use it then
            trainer.compile_step(
                state, *trainer.batch(train_examples, np.arange(settings.batch_size))
            )

    processes.together(check_memory)
    last_step = num_steps(settings, train_examples)
    if settings.max_steps:
        last_step = min(last_step, settings.max_steps)
    with contextlib.ExitStack() as stack:
        stack.enter_context(processes.one_line_on_loss(lambda: _last_checkpoint(workdir)))

        def opened() -> None:
            records.open_workdir(
                workdir, config=settings, data_sha256=dataset.sha256, data=dataset.facts
            )
            stack.enter_context(records.exclusive(workdir))
            begin_training(workdir)

        def save(step: int, state: loop.State) -> None:
            loop.check_finite(state.window)
            checkpoints.save(step, state)

        processes.on_lead(opened)
        # Each process writes its part of every checkpoint: the disk must be the same one.
        processes.check_same(
            {"a run there:": records.holds_run(workdir), "checkpoints": saved_steps(workdir)},
            f"workdir {workdir} must be on a disk that all processes share",
        )
        checkpoints = stack.enter_context(processes.together(lambda: Checkpoints(workdir)))
        stopped = processes.agreed(stack.enter_context(signals.stop_requests()))
        restored = checkpoints.restore(trainer.abstract_state())
        step, state = restored or (0, trainer.initial_state(settings.seed))
        if step > last_step:
            raise InputError(
                f"workdir {workdir} is at step {step} already, past --max_steps={last_step}"
            )
        first_step = step
        if step and processes.is_lead():
            logging.info("going on from step %d of %d in %s", step, last_step, workdir)
        elif processes.is_lead() and (stopped_at := records.last_step(workdir)):
            logging.warning(
                "workdir %s was stopped at step %d or later, before its first checkpoint: training "
                "starts again at step 0; save sooner with --checkpoint_every_steps",
                *(workdir, stopped_at),
            )
        processes.on_lead(lambda: check_metrics(workdir, first_step))
        metrics = processes.on_lead(
            lambda: stack.enter_context(
                records.Metrics(workdir, step=first_step, tensorboard=settings.tensorboard)
            )
        )
        display = processes.on_lead(
            lambda: stack.enter_context(Display(first_step=first_step, last_step=last_step))
        )
        progress = loop.train(
            trainer,
            state,
            train_examples,
            test_examples,
            batch_size=settings.batch_size,
            last_step=last_step,
            log_every_steps=settings.log_every_steps,
            seed=settings.seed,
            stopped=stopped,
            extra_metrics=extra_metrics,
        )
        for step, state, row in progress:
            if metrics and row is not None:
                metrics.write(row)
            if display:
                display.update(step, row)
            if step % settings.checkpoint_every_steps == 0:
                save(step, state)
        save(step, state)
        number = stopped()
        if number and processes.is_lead():
            name = signal.Signals(number).name
            logging.info("%s: saved at step %d; the same --workdir goes on from there", name, step)
        return (128 + number if number else 0), trainer.evaluated(state)


def _last_checkpoint(workdir: pathlib.Path) -> str:
    steps = saved_steps(workdir)
    if not steps:
        return f"there is no checkpoint yet in {workdir}"
    return f"the last good checkpoint is that of step {steps[-1]} in {workdir}"
