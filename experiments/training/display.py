"""What a training program shows while it runs: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from absl import logging
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Shows loss, error, images a second and the time left."""

    def __init__(self, *, first_step: int, last_step: int):
        """Starts at a step that is not 0 when a run goes on."""
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
        """Moves on to a step; a row of metrics is shown, and kept if it has a test error."""
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()
