"""Writes one HTML page about some runs: settings, test errors, curves, results and figures.

The page is whole by itself: it opens from disk, needs no network and holds no script.
"""

import dataclasses
import os
import pathlib

from absl import logging

from experiments import cli, records, report_page, report_runs
from experiments.cli import flag
from experiments.errors import InputError


@dataclasses.dataclass(frozen=True)
class Config:
    """Which runs, and where to."""

    workdirs: str = flag(
        "",
        "Folders of runs, separated by commas; one that has no config.json stands for the runs in "
        "its subfolders, or in those of them. Nothing is written there.",
    )
    output: str = flag("report.html", "The page, .html; one that is there is replaced.")


def main(config: Config) -> int:
    """Reads the runs, and writes the page."""
    workdirs = config.workdirs.split(",")
    if not all(workdirs):
        raise InputError(
            f"--workdirs must be folders of runs, separated by commas, got {config.workdirs!r}"
        )
    output = pathlib.Path(config.output)
    if output.suffix != ".html" or os.path.isdir(output):
        raise InputError(f"--output must be a file that ends in .html, got {config.output!r}")
    if not os.path.isdir(output.parent):
        raise InputError(f"--output: {output.parent} is not a folder; make it first")
    runs, folders = report_runs.read(workdirs)
    records.write_bytes(output, report_page.page(runs, folders).encode())
    logging.info("%s shows %d run%s", output, len(runs), "s" * (len(runs) > 1))
    return 0


if __name__ == "__main__":
    cli.run(Config, main)
