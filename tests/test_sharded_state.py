"""With --capsule_parallel=M every device holds 1 / M of the split weights, at every moment."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest
import small_runs

TESTS = pathlib.Path(__file__).parent
ITEM_BYTES = {"pred": 1, "bf16": 2}  # of other dtypes the number of bits is in the name


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `state_bytes.py` saw on four devices, and the programs that XLA compiled for it."""
    folder = tmp_path_factory.mktemp("sharded_state")
    data_dir = small_runs.write_digits(folder / "data", size=44, side=20)
    dump = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text"
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {dump}",
    }
    command = [sys.executable, str(TESTS / "state_bytes.py"), data_dir, str(folder / "run")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1]) | {"dump": folder / "dump"}


def test_weights_and_moments_are_split_over_the_devices_at_every_moment(found):
    shard = found["whole"] / 4
    split = {"start": 3, "step": 3, "save": 3, "evaluation": 3, "figures": 1, "restored by 4": 1}
    for moment, arrays in split.items():  # weights, and both of their moments while training
        assert found["lying"][moment][0] == arrays * shard, moment
        assert found["largest"][moment] == shard, moment


def test_no_weights_are_gathered_on_the_host(found):
    assert found["fetched"] == []


def test_a_checkpoint_of_four_devices_is_restored_bit_for_bit_by_any_number(found):
    assert len(found["hashes"]) == 4
    assert len(set(found["hashes"].values())) == 1
    for parts in (4, 2, 1):
        assert found["lying"][f"restored by {parts}"] == [found["whole"] / parts]


def test_no_compiled_program_has_an_array_or_temporaries_as_large_as_the_weights(found):
    """Of all programs that ran on four devices: start, step, evaluation, metrics and figures."""
    programs = {}
    for path in found["dump"].glob("*_after_optimizations.txt"):
        arrays = re.findall(r"\b(pred|bf16|[suf]\d+)\[([\d,]+)\]", path.read_text())
        largest = max((array_bytes(*array) for array in arrays), default=0)
        buffers = path.with_name(f"{path.stem}-buffer-assignment.txt").read_text()
        temporaries = map(int, re.findall(r"size (\d+), preallocated-temp", buffers))
        programs[path.name.split(".")[1]] = largest, max(temporaries, default=0)
    assert programs.keys() >= {"jit__params", "jit__step", "jit__evaluate", "jit_measured"}
    for name, (largest, temporaries) in programs.items():
        # Where random bits are drawn, those of a shard are 8 bytes for each of its numbers.
        assert largest <= found["whole"] / 2, name
        assert temporaries < found["whole"], name


def array_bytes(dtype, shape):
    item = ITEM_BYTES.get(dtype) or int(dtype[1:]) // 8
    return item * math.prod(map(int, shape.split(",")))
