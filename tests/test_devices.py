"""Training on many devices: the same numbers as on one, and what cannot be split is named."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import small_runs

from experiments.errors import InputError
from experiments.training import parallel

ROOT = pathlib.Path(__file__).parents[1]
STEPS = 8


def python(program, *arguments, devices=1):
    """Run a program with so many devices of the host; its lines."""
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {small_runs.QUICK}",
    }
    command = [sys.executable, "-c", program, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


# Of each network and mesh: losses of the steps, the test loss, and how the state lies.
LOSSES = """
import sys
from experiments.data import datasets
from experiments.training import loop, mnist, parallel
small = dict(conv_channels=4, primary_types=4, capsule_length=4, batch_size=8, dataset="mnist")
for network, bias in (("capsnet", 0.1), ("pooling_cnn", 0.0)):
    config = mnist.Config(
        data_dir=sys.argv[1], network=network, capsule_bias=bias, canvas=21, **small
    )
    dataset = datasets.load("mnist", data_dir=sys.argv[1])
    test = mnist.test_split(config, dataset)
    for shape in ((1, 1), (2, 2) if network == "capsnet" else (4, 1)):
        settings = parallel.Settings(*shape)
        trainer = parallel.spread(mnist.build(config, dataset), settings, batch_size=8)
        losses = []
        progress = loop.train(
            trainer, trainer.initial_state(0), dataset.train, test, batch_size=8, last_step=8,
            log_every_steps=1, seed=0, stopped=lambda: 0,
        )
        for step, state, row in progress:
            losses += [row["train_loss"], row["train_error"]]
        losses += [row["test_loss"], row["test_error"]]
        print(network, *shape, *map(repr, losses))
        if network == "capsnet":
            weights = state.optimizer[0].mu["capsules"]["weights"]
            print("part", shape[1], weights.shape[0] / weights.addressable_data(0).shape[0])
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """7 batches of 8 digits and a part of one to train on, and as many to test."""
    return small_runs.write_digits(tmp_path_factory.mktemp("digits") / "data", size=59, side=20)


def test_steps_on_four_devices_are_those_of_one(digits):
    found = {}
    for line in python(LOSSES, digits, devices=4):
        name, *values = line.split()
        if name == "part":
            assert float(values[0]) == float(values[1])
        else:
            found[name, *map(int, values[:2])] = np.array(values[2:], float)
    assert len(found) == 4
    for (name, *shape), values in found.items():
        assert len(values) == 2 * STEPS + 2
        np.testing.assert_allclose(values, found[name, 1, 1], rtol=2e-5, err_msg=f"{name} {shape}")


@pytest.mark.parametrize(
    ("parts", "shape"), [((1, 1), (1, 1)), ((-1, 2), (4, 2)), ((2, -1), (2, 4)), ((-1, 1), (8, 1))]
)
def test_what_is_left_is_used(parts, shape):
    assert parallel.mesh_shape(parallel.Settings(*parts), 8, processes=1) == shape


@pytest.mark.parametrize(
    ("parts", "processes", "message"),
    [
        ((0, 1), 1, "--data_parallel must be at least 1, or -1 for all that are left, got 0"),
        ((-1, -1), 1, "--data_parallel and --capsule_parallel must not both be -1"),
        ((3, 3), 1, ".* must be at most the 8 devices, got 3 x 3"),
        ((-1, 9), 1, ".* must be at most the 8 devices, got 1 x 9"),
        ((2, 2), 2, ".* must be all 8 devices of the 2 processes, got 2 x 2; .*"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(parts, processes, message):
    with pytest.raises(InputError, match=f"^{message}$"):
        parallel.mesh_shape(parallel.Settings(*parts), 8, processes=processes)
