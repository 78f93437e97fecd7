"""Writes one HTML page about runs and experiments: errors, settings, curves, results, figures.

The page is whole by itself: it opens from disk, needs no network and holds no script.
"""

import dataclasses
import os
import pathlib

from absl import logging

from experiments import cli, files
from experiments.cli import flag
from experiments.errors import InputError
from experiments.report_page import page, workdirs


@dataclasses.dataclass(frozen=True)
class Config:
    """Which runs and results, and where to."""

    workdirs: str = flag(
        "",
        "Folders of runs, or of an experiment's results.json and figures, separated by commas; one "
        "that has no config.json stands for the runs in its subfolders, or in those of them. "
        "Nothing is written there.",
    )
    output: str = flag("report.html", "The page, .html; one that is there is replaced.")


def main(config: Config) -> int:
    """Reads the runs and results, and writes the page."""
    named = config.workdirs.split(",")
    if not all(named):
        raise InputError(
            "--workdirs must be folders of runs or results, separated by commas, "
            f"got {config.workdirs!r}"
        )
    output = pathlib.Path(config.output)
    if output.suffix != ".html" or os.path.isdir(output):
        raise InputError(f"--output must be a file that ends in .html, got {config.output!r}")
    if not os.path.isdir(output.parent):
        raise InputError(f"--output: {output.parent} is not a folder; make it first")
    runs, folders = workdirs.read(named)
    files.write_bytes(output, page.page(runs, folders).encode())
    logging.info("%s shows %s", output, page.contents(runs))
    return 0


if __name__ == "__main__":
    cli.run(Config, main)
