"""A small Config and the folder of a run, for tests of the files in it."""

import dataclasses

from experiments import cli
from experiments.training import records


@dataclasses.dataclass(frozen=True)
class Config:
    """Two settings that affect the result, and one that does not."""

    workdir: str = cli.flag("", "Folder.", affects_result=False)
    batch_size: int = cli.flag(128, "Examples a step.")
    dtype: str = cli.flag("float32", "Type of the numbers.")


def open_workdir(path, *, data_sha256="da7a", **settings):
    return records.open_workdir(path, config=Config(**settings), data_sha256=data_sha256)
