"""Execute docs/tutorial.ipynb in a new kernel; errors and warnings in cells are failures."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Iterator

import nbformat
from absl import logging
from matplotlib import font_manager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from experiments import cli, files
from experiments.cli import flag
from experiments.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    """The notebook, its output and its time limit."""

    notebook: str = flag("docs/tutorial.ipynb", "Notebook to execute; it is only read.")
    output: str = flag("runs/tutorial.ipynb", "File for the executed notebook.")
    time_limit: int = flag(600, "Limit for all cells together, seconds.", minimum=1, maximum=10**6)


def main(config: Config) -> int:
    """Execute the notebook, write it with its outputs, and log errors and warnings.

    Returns:
      The exit status, 1 if a cell raised an error, ran out of time or wrote to stderr.
    """
    path, output = pathlib.Path(config.notebook), pathlib.Path(config.output)
    notebook = read(path)
    if os.path.isdir(output):
        raise InputError(f"--output must be a file, got the folder {output}")
    files.append_lines(output, [])  # fail before execution if the output is not writable
    # Builds Matplotlib's font cache here, because a cell that did it would log to stderr.
    font_manager.findfont("DejaVu Sans")
    started = time.monotonic()
    try:
        execute(notebook, folder=path.parent, time_limit=config.time_limit)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        logging.error("%s", error)
        failed = True
    else:
        failed = False
    for line in stderr_lines(notebook):
        logging.error("%s", line)
        failed = True
    files.write_bytes(output, f"{nbformat.writes(notebook)}\n".encode())
    logging.info("%s written after %.0f s", output, time.monotonic() - started)
    return int(failed)


def read(path: pathlib.Path) -> NotebookNode:
    """Read a notebook.

    Raises:
      InputError: The file cannot be read or is not a notebook.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise InputError(f"--notebook: {path} cannot be read as a notebook: {error}") from error


def execute(notebook: NotebookNode, *, folder: pathlib.Path, time_limit: int) -> None:
    """Execute all cells in place in a new kernel; store no timestamps and no Python version."""
    deadline = time.monotonic() + time_limit
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        timeout_func=lambda cell: max(1, round(deadline - time.monotonic())),
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}


def stderr_lines(notebook: NotebookNode) -> Iterator[str]:
    """Yield a line per output to stderr, where warnings go."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                yield f"cell [{cell.execution_count}] wrote to stderr: {output.text.strip()}"


if __name__ == "__main__":
    cli.run(Config, main)
