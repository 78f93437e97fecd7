"""Runs of train_mnist with tiny untrained networks, for tests of programs that read runs."""

import dataclasses

import jax
import numpy as np

from experiments.data import datasets, idx
from experiments.training import mnist, records
from experiments.training.checkpoints import Checkpoints

SIDE = 17  # pixels, the minimum for a capsule network
# LLVM's optimisations take longer than such small programs run.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def write_digits(folder, *, size=60, side=SIDE):
    """Write the central pixels of the first digits of mnist_small as idx files."""
    folder.mkdir(exist_ok=True)
    whole = datasets.load("mnist_small")
    edge = (28 - side) // 2
    for split, part in (("train", whole.train), ("test", whole.test)):
        images = part.images[:size, edge : edge + side, edge : edge + side, 0]
        arrays = (np.ascontiguousarray(images), part.labels[:size].astype(np.uint8))
        for stem, array in zip(idx.STEMS[split], arrays, strict=True):
            (folder / stem).write_bytes(idx.header(array) + array.tobytes())
    return str(folder)


def save_run(path, data_dir, **settings):
    """Save a run with a checkpoint of random parameters, and return its workdir."""
    small = {"conv_channels": 2, "primary_types": 1, "capsule_length": 3}
    config = mnist.Config(dataset="mnist", data_dir=data_dir, batch_size=8, **small)
    config = dataclasses.replace(config, **settings)
    dataset = datasets.load(config.dataset, data_dir=data_dir)
    trainer = mnist.build(config, dataset)
    workdir = records.open_workdir(
        path, config=config, data_sha256=dataset.sha256, data=dataset.facts
    )
    state, rng = trainer.initial_state(0), np.random.default_rng(0)
    # Noise, because an initial network predicts the same class for all images.
    params = jax.tree.map(
        lambda x: np.float32(x + 0.2 * rng.standard_normal(x.shape)), state.params
    )
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, state._replace(params=params))
    return str(workdir)
