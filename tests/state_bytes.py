"""Trains on four devices, and prints as JSON how large arrays on devices and hosts were.

python tests/state_bytes.py DATA_DIR WORKDIR
"""

import collections
import functools
import hashlib
import json
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import files, train_mnist
from experiments.analysis import inspection
from experiments.data import datasets
from experiments.figures import classifier
from experiments.training import mnist, parallel, processes, runs, trained
from experiments.training.checkpoints import Checkpoints

# The weights of the class capsules are 10 MB, all else 0.7 MB.
TYPES, LENGTH = 256, 32
WEIGHTS = (4 * TYPES, 8, 10, LENGTH)
WHOLE = 4 * int(np.prod(WEIGHTS))

fetched: list[tuple[str, int]] = []  # functions that made a host array of a large device array
lying: dict[str, list[int]] = collections.defaultdict(list)  # by moment: bytes on each device
largest: dict[str, int] = collections.defaultdict(int)  # by moment: the largest shard
hashes: dict[str, str] = {}  # by moment: of all bits of the parameters


def watch_fetches() -> None:
    """Note every way in which JAX hands a large array to the host."""

    def noted(name, function):
        @functools.wraps(function)
        def wrapper(tree, *arguments, **options):
            leaves = jax.tree.leaves(tree) if name != "_value" else [tree]
            for leaf in leaves:
                if isinstance(leaf, jax.Array) and leaf.nbytes >= WHOLE:
                    fetched.append((name, leaf.nbytes))
            return function(tree, *arguments, **options)

        return wrapper

    np.asarray = noted("np.asarray", np.asarray)
    np.array = noted("np.array", np.array)
    jax.device_get = noted("jax.device_get", jax.device_get)
    multihost_utils.process_allgather = noted(
        "process_allgather", multihost_utils.process_allgather
    )
    array_type = type(jax.numpy.zeros(()))
    array_type._value = property(noted("_value", array_type._value.fget))


def look(moment: str) -> None:
    """Note the bytes that arrays of the weights' shape have on each device."""
    by_device = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
        for shard in array.addressable_shards:
            size = shard.data.nbytes
            largest[moment] = max(largest[moment], size)
            if array.shape == WEIGHTS:
                by_device[shard.device] += size
    lying[moment].append(max(by_device.values()))


def watch(owner, name: str, moment: str) -> None:
    """Look after each call of a method."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*arguments, **options):
        result = method(*arguments, **options)
        look(moment)
        if moment == "save":
            hashes[moment] = state_hash(arguments[2].params)
        return result

    setattr(owner, name, wrapper)


def state_hash(state) -> str:
    """Hashes a state shard by shard, so that the number of devices does not matter."""
    total = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        starts = {
            next((part.start or 0 for part in shard.index), 0): shard.data
            for shard in leaf.addressable_shards
        }
        for start in sorted(starts):
            total.update(np.asarray(starts[start]).tobytes())
    return total.hexdigest()


def main(data_dir: str, workdir: str) -> None:
    """Trains two steps on four devices with all metrics and figures, and restores on fewer."""
    for name in ("couplings", "coupling_entropy", "reconstructions", "dimension_tweaks"):
        setattr(classifier, name, lambda *_, **__: None)
    files.save_figure = lambda *_: None
    processes.start = lambda *_, **__: None  # too late: JAX runs already
    watch_fetches()
    watch(parallel.ParallelTrainer, "initial_state", "start")
    watch(parallel.ParallelTrainer, "evaluate", "evaluation")
    watch(runs.Display, "update", "step")
    watch(Checkpoints, "save", "save")
    watch(inspection, "report", "figures")
    config = mnist.Config(
        dataset="mnist",
        data_dir=data_dir,
        workdir=workdir,
        batch_size=8,
        num_iterations=2,
        conv_channels=1,
        primary_types=TYPES,
        capsule_length=LENGTH,
        capsule_bias=0.1,
        decoder_units=4,
        diagnostics=True,
        capsule_parallel=4,
        max_steps=2,
    )
    assert train_mnist.main(config) == 0
    dataset = datasets.load(config.dataset, data_dir=data_dir)
    for parts in (4, 2, 1):
        if parts == 1:
            before = len(fetched)
        trainer = parallel.spread(
            mnist.build(config, dataset), parallel.Settings(1, parts), batch_size=8
        )
        step, params = trained.restored(trainer, workdir)
        assert step == 2
        look(f"restored by {parts}")
        hashes[f"restored by {parts}"] = state_hash(params)
        del params
    found = {"whole": WHOLE, "fetched": fetched[:before]}
    print(json.dumps(found | {"lying": lying, "largest": largest, "hashes": hashes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
