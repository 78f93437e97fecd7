"""Write one HTML page that compares runs: test errors, settings, curves, results and figures.

The page is a single file without scripts; it opens from disk and needs no network.
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
    """Settings of the report."""

    workdirs: str = flag(
        "",
        "Folders to show, separated by commas: the workdir of a run, a folder with runs one or two "
        "levels below it, or the output of an experiment (results.json and figures). They are "
        "only read.",
    )
    output: str = flag("report.html", "The .html file to write; an existing file is replaced.")


def main(config: Config) -> int:
    """Read the folders and write the page."""
    named = config.workdirs.split(",")
    if not all(named):
        raise InputError(
            f"--workdirs must be one or more folders, separated by commas, got {config.workdirs!r}"
        )
    output = pathlib.Path(config.output)
    if output.suffix != ".html" or os.path.isdir(output):
        raise InputError(f"--output must be a file that ends in .html, got {config.output!r}")
    if not os.path.isdir(output.parent):
        raise InputError(f"--output: {output.parent} is not a folder; create it first")
    runs, folders = workdirs.read(named)
    files.write_bytes(output, page.page(runs, folders).encode())
    logging.info("%s shows %s", output, page.contents(runs))
    return 0


if __name__ == "__main__":
    cli.run(Config, main)
