"""With --capsule_parallel=M every device holds 1 / M of the split weights, at every moment."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import small_runs

TESTS = pathlib.Path(__file__).parent
ITEM_BYTES = {"pred": 1, "bf16": 2}  # of other dtypes the number of bits is in the name


def test_no_device_and_no_host_ever_holds_all_split_weights(tmp_path):
    """In one run of a process with four devices, and in all programs that it compiles."""
    found = on_four_devices(tmp_path)
    whole = found["whole"]
    arrays = {"start": 3, "step": 3, "save": 3, "evaluation": 3, "figures": 1, "restored by 4": 1}
    for moment, count in arrays.items():  # weights, and both of their moments while training
        assert found["lying"][moment][0] == count * whole / 4, moment
        assert found["largest"][moment] == whole / 4, moment
    for parts in (4, 2, 1):
        assert found["lying"][f"restored by {parts}"] == [whole / parts]
    assert len(found["hashes"]) == 4
    assert len(set(found["hashes"].values())) == 1  # the same bits on any number of devices
    assert found["fetched"] == []
    programs = compiled_programs(tmp_path / "dump")
    assert programs.keys() >= {"jit__params", "jit__step", "jit__evaluate", "jit_compute"}
    for name, (largest, temporaries) in programs.items():
        # Where random bits are drawn, those of a shard are 8 bytes for each of its numbers.
        assert largest <= whole / 2, name
        assert temporaries < whole, name


def on_four_devices(folder):
    """What `state_bytes.py` saw."""
    data_dir = small_runs.write_digits(folder / "data", size=44, side=20)
    dump = f"--xla_dump_to={folder / 'dump'} --xla_dump_hlo_as_text"
    environment = os.environ | {
        "PYTHONPATH": f"{TESTS.parent}:{TESTS}",
        "JAX_PLATFORMS": "cpu",
        # Of its own: a program that another process has compiled would not be dumped.
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {dump} {small_runs.QUICK}",
    }
    command = [sys.executable, str(TESTS / "state_bytes.py"), data_dir, str(folder / "run")]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=400)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def compiled_programs(dump):
    """The bytes of the largest array and of all temporaries of each program, on one device."""
    programs = {}
    for path in dump.glob("*_after_optimizations.txt"):
        arrays = re.findall(r"\b(pred|bf16|[suf]\d+)\[([\d,]+)\]", path.read_text())
        largest = max((array_bytes(*array) for array in arrays), default=0)
        buffers = path.with_name(f"{path.stem}-buffer-assignment.txt").read_text()
        temporaries = map(int, re.findall(r"size (\d+), preallocated-temp", buffers))
        programs[path.name.split(".")[1]] = largest, max(temporaries, default=0)
    return programs


def array_bytes(dtype, shape):
    item = ITEM_BYTES.get(dtype) or int(dtype[1:]) // 8
    return item * math.prod(map(int, shape.split(",")))
