"""A tiny run of train_mnist, and what it leaves, for the tests of the program."""

import dataclasses

import in_process
import jax
import numpy as np

from experiments import train_mnist
from experiments.data import datasets, idx
from experiments.training import mnist, records, trained
from experiments.training.checkpoints import Checkpoints

LAST_STEP = 30  # of 6 epochs


def write_noise(folder, *, seed=0, side=17):
    """Write 5 batches of 8 and 4 more images to train on, 2 and 5 more to test; their folder."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for split, size in (("train", 44), ("test", 21)):
        images = rng.integers(0, 256, (size, side, side), dtype=np.uint8)
        labels = (np.arange(size) % 10).astype(np.uint8)
        for stem, array in zip(idx.STEMS[split], (images, labels), strict=True):
            (folder / stem).write_bytes(idx.header(array) + array.tobytes())
    return str(folder)


def tiny_config(data_dir, **settings):
    """A Config that trains in a second once it is compiled."""
    config = mnist.Config(
        dataset="mnist",
        data_dir=data_dir,
        workdir="run",
        batch_size=8,
        num_epochs=6,
        learning_rate=0.01,
        conv_channels=2,
        primary_types=3,
        capsule_length=3,
        num_iterations=2,
        log_every_steps=2,
        checkpoint_every_steps=4,
    )
    return dataclasses.replace(config, **settings)


def finish(config, folder):
    """Trains in a folder to the end; the folder of the run."""
    workdir = folder / "run"
    assert train_mnist.main(dataclasses.replace(config, workdir=str(workdir))) == 0
    return workdir


def run_program(config, monkeypatch, capsys, **changes):
    """Run train_mnist as a program in this process: its exit status and stderr."""
    settings = dataclasses.asdict(config) | changes
    status, _, stderr = in_process.run(train_mnist, settings, monkeypatch, capsys)
    return status, stderr


def trainer_of(config):
    return mnist.build(config, datasets.load(config.dataset, data_dir=config.data_dir))


def rows(workdir):
    return [row | {"images_per_second": 0} for row in records.read_metrics(workdir)]


def newest_state(workdir):
    """Step and arrays of the newest good checkpoint, by path in the state."""
    config = trained.config_of(mnist.Config, records.read_config(workdir)["config"], str(workdir))
    with Checkpoints(workdir) as checkpoints:
        step, state = checkpoints.restore(trainer_of(config).abstract_state())
    leaves = jax.tree.leaves_with_path(state)
    return step, {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same_result(workdir, wanted):
    """Equal in every bit of parameters, optimizer, step, key and rows."""
    (step, state), (wanted_step, wanted_state) = newest_state(workdir), newest_state(wanted)
    assert step == wanted_step
    assert {name: array.tobytes() for name, array in state.items()} == {
        name: array.tobytes() for name, array in wanted_state.items()
    }
    assert rows(workdir) == rows(wanted)


def contents(folder):
    return {
        path.relative_to(folder): path.is_file() and path.read_bytes() for path in folder.rglob("*")
    }
