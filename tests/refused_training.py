"""One of two processes of runs that are refused one after the other; the last error ends it."""

import dataclasses
import os
import pathlib

from jax.experimental import multihost_utils

from experiments import cli, train_mnist
from experiments.analysis import inspection
from experiments.cli import flag
from experiments.errors import InputError
from experiments.training import mnist


@dataclasses.dataclass(frozen=True)
class Config(mnist.Config):
    """A run, and what process 1 has instead of it."""

    other_data_dir: str = flag("", "Data of process 1 in the first run.")
    folder: str = flag("", "Holds a folder for each process, and the workdir of the last run.")


def main(config: Config) -> int:
    """Run with other settings in each process, with no common disk, and without its records."""
    own = config.process_id
    inspection.report = lambda *_, **__: None
    plain = {f.name: getattr(config, f.name) for f in dataclasses.fields(mnist.Config)}

    def refuse(**changes):
        try:
            train_mnist.main(mnist.Config(**plain | changes))
        except InputError as error:
            return str(error)
        raise AssertionError("the run was not refused")

    folder = pathlib.Path(config.folder)
    data = {"data_dir": config.other_data_dir} if own else {}
    print(refuse(learning_rate=0.1 + own / 10, workdir=str(folder / "differing"), **data))
    (folder / f"disk_{own}").mkdir()
    os.chdir(folder / f"disk_{own}")
    print(refuse(workdir="run"), flush=True)
    shared = mnist.Config(**plain | {"workdir": str(folder / "run"), "max_steps": 4})
    assert train_mnist.main(shared) == 0
    multihost_utils.sync_global_devices("trained")
    (folder / "run/checkpoints/4/record.json").unlink(missing_ok=True)
    multihost_utils.sync_global_devices("removed")
    return train_mnist.main(shared)


if __name__ == "__main__":
    cli.run(Config, main)
