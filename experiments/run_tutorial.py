"""Runs docs/tutorial.ipynb from a clean state; an error or a warning in a cell is a failure."""

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
    """What is run, where the result goes, and how long it may take."""

    notebook: str = flag("docs/tutorial.ipynb", "The notebook to run; it is not changed.")
    output: str = flag("runs/tutorial.ipynb", "File for the notebook with its new outputs.")
    time_limit: int = flag(600, "Seconds that all cells together may take.", minimum=1)


def main(config: Config) -> int:
    """Runs the notebook, writes it with its outputs, and says what went wrong, if anything."""
    path, output = pathlib.Path(config.notebook), pathlib.Path(config.output)
    notebook = read(path)
    if os.path.isdir(output):
        raise InputError(f"--output must be a file, got the folder {output}")
    files.append_lines(output, [])  # fails now, if it must
    # Matplotlib announces it in a cell's stderr when it has to make its cache of fonts first.
    font_manager.findfont("DejaVu Sans")
    started = time.monotonic()
    try:
        execute(notebook, folder=path.parent, time_limit=config.time_limit)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        logging.error("%s", error)
        failed = True
    else:
        failed = False
    for complaint in complaints(notebook):
        logging.error("%s", complaint)
        failed = True
    files.write_bytes(output, f"{nbformat.writes(notebook)}\n".encode())
    logging.info("%s written after %.0f s", output, time.monotonic() - started)
    return int(failed)


def read(path: pathlib.Path) -> NotebookNode:
    """Reads a notebook.

    Raises:
      InputError: The file cannot be read, or is none.
    """
    try:
        return nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.reader.NotJSONError, nbformat.ValidationError) as error:
        raise InputError(f"--notebook: {path} cannot be read as a notebook: {error}") from error


def execute(notebook: NotebookNode, *, folder: pathlib.Path, time_limit: int) -> None:
    """Runs all cells in a new kernel, in place; what differs from run to run is not kept."""
    deadline = time.monotonic() + time_limit
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
        timeout_func=lambda cell: max(1, round(deadline - time.monotonic())),
    )
    client.execute()
    notebook.metadata["language_info"] = {"name": "python"}  # without the version


def complaints(notebook: NotebookNode) -> Iterator[str]:
    """What cells wrote to stderr, warnings above all."""
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                yield f"cell [{cell.execution_count}] wrote to stderr: {output.text.strip()}"


if __name__ == "__main__":
    cli.run(Config, main)
