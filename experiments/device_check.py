"""Check the kernels on the accelerator that is here: their values, then their times.

Made for the first minutes on a device. Stages come in the order of their worth, and each row is
written as soon as it is known:

- environment: the device, versions, the bandwidth of its memory.
- values: routing with all gradients, and each pass by itself, against stored votes in float64, with
  NaN in all free memory before, and twice: a second run must give the same bits. A problem that the
  kernels do not accept is "refused". The exit status is 1 if a value is wrong.
- times: kernels, stored votes and "xla"; several sets of inputs in turn, in one program.
- torch: the same in PyTorch, if it is installed.

experiments/README.md has the commands for Nsight Compute and compute-sanitizer, with --once.
"""

import concurrent.futures
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.vote_passes import passes, tuned
from capsjax.kernels.vote_passes.cases import CASES, Case
from experiments import cli, files
from experiments.benchmarks import (
    device_tables,
    exactness,
    roofline,
    routing_rows,
    routing_times,
    timing,
    torch_routing,
)
from experiments.benchmarks.exactness import PROBLEMS, SETTINGS
from experiments.benchmarks.routing_rows import MODES, NotMeasured, Variant
from experiments.benchmarks.routing_times import one_line
from experiments.cli import flag
from experiments.errors import InputError

# The cases to time, in the order of their worth.
TIMED = (
    ("capsnet_mnist", "float32"),
    ("capsnet_mnist", "bfloat16"),
    ("conv_capsules", "float32"),
    ("capsnet_affnist", "float32"),
    ("many_parents", "float32"),
    ("long", "bfloat16"),
)
# The largest sizes of a dry run: B, I, P, J, D, T.
DRY_SIZES = (4, 20, 16, 8, 16, 5)
TORCH_WAYS = ("eager", "compile", "graph")
# For each stage, the part of the limit after which it starts no more rows.
STAGES = {"environment": 1.0, "values": 0.5, "times": 0.85, "torch": 0.95}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to check, and for how long."""

    output: str = flag("", "File to append a JSON line a row to; empty: none.")
    floors: str = flag("", "File of compile_report --output, for a column of floors; empty: none.")
    limit: float = flag(500, "Seconds after which no row is started.", above=0, maximum=1e6)
    stages: str = flag("", f"Any of {', '.join(STAGES)}, comma-separated; empty: all.")
    once: str = flag(
        "",
        "Instead of the stages, compile outputs and gradients of this problem, and call them three "
        f"times, for a profiler: any of {', '.join(PROBLEMS)}; empty: none.",
        choices=("", *PROBLEMS),
    )
    dry: bool = flag(False, 'Check this program on any device: "xla" as the kernels, tiny sizes.')


class Recorder:
    """The rows of a run, each written to a file at once, and the time that is left."""

    def __init__(self, output: str, limit: float) -> None:
        self.rows: list[dict[str, Any]] = []
        self._output, self._limit, self._started = output, limit, time.perf_counter()
        self.begin("environment")
        if output:
            files.append_lines(output, [])  # fails before the first measurement

    def begin(self, stage: str) -> None:
        """Begin a stage, which ends at its part of the limit."""
        self._stage, self._longest, self._row_started = stage, 0.0, time.perf_counter()
        self._deadline = self._started + STAGES[stage] * self._limit

    def left(self) -> float:
        """Return the seconds until the stage ends, at least 0."""
        return max(0.0, self._deadline - time.perf_counter())

    def has_time(self, name: str) -> bool:
        """Return whether the longest row of the stage so far would end in time; else record it."""
        now = time.perf_counter()
        self._longest, self._row_started = max(self._longest, now - self._row_started), now
        if self._longest <= self.left():
            return True
        self.leave_out(name)
        return False

    def leave_out(self, name: str) -> None:
        """Record that the stage ends before this row."""
        reason = "not started, nor what comes after it: the time of this stage is over"
        self.add(case=name, reason=reason)

    def add(self, **row: Any) -> None:
        """Add a row of the stage, and write it."""
        seconds = round(time.perf_counter() - self._started, 1)
        self.rows.append({"stage": self._stage, **row, "at_seconds": seconds})
        if self._output:
            files.append_lines(self._output, self.rows[-1:])


def main(config: Config) -> int:
    """Run the stages, print their tables, and return 1 if a row failed."""
    names = {name.strip() for name in config.stages.split(",")} if config.stages else set(STAGES)
    if unknown := names - STAGES.keys():
        raise InputError(f"--stages must be among {', '.join(STAGES)}, got {min(unknown)!r}")
    kernels = "xla" if config.dry else kernels_of_this_platform()
    if config.once:
        call_thrice(config.once, kernels, dry=config.dry)
        return 0
    floors = routing_times.read_floors(config.floors) if config.floors else {}
    recorder = Recorder(config.output, config.limit)
    stages: dict[str, Callable[[], None]] = {
        "environment": lambda: check_environment(recorder, kernels),
        "values": lambda: check_values(recorder, kernels, dry=config.dry),
        "times": lambda: measure(recorder, kernels, floors, dry=config.dry),
        "torch": lambda: measure_torch(recorder, dry=config.dry),
    }
    for name, run in stages.items():
        if name in names:
            recorder.begin(name)
            run()
            rows = [row for row in recorder.rows if row["stage"] == name]
            print("\n".join(device_tables.lines(name, rows)), end="\n\n", flush=True)
    failed = [row for row in recorder.rows if "error" in row or not row.get("ok", True)]
    for row in failed:
        print(f"failed: {device_tables.title(row)}: {device_tables.failure(row)}")
    return 1 if failed else 0


def kernels_of_this_platform() -> str:
    """Return the implementation with kernels for this device.

    Raises:
      InputError: There is none.
    """
    for name in routing_rows.platforms():
        if name in passes.PREFERENCE:
            return passes.PREFERENCE[name][0]
    kind = jax.devices()[0].device_kind
    raise InputError(
        f"no accelerator with kernels is here, only a {kind}; --dry checks this program without one"
    )


def call_thrice(name: str, kernels: str, *, dry: bool) -> None:
    """Compile outputs and gradients of a problem in float32, and call them three times."""
    problem = problems(dry)[name]
    arguments = jax.device_put(exactness.arguments(problem))
    compiled = jax.jit(exactness.routing(problem, kernels)).lower(*arguments).compile()
    for _ in range(3):
        jax.block_until_ready(compiled(*arguments))


def problems(dry: bool) -> dict[str, exactness.Problem]:
    """Return the problems, or tiny ones with the same options."""
    if not dry:
        return PROBLEMS
    return {name: p._replace(case=shrink(p.case)) for name, p in PROBLEMS.items()}


def shrink(case: Case) -> Case:
    """Return a case of at most `DRY_SIZES`."""
    batch, capsules, length, parents, depth, num_iterations = map(min, case[:6], DRY_SIZES)
    return Case(batch, capsules, length, parents, depth, num_iterations, *case[6:])


def check_environment(recorder: Recorder, kernels: str) -> None:
    """Record the device and versions, and measure the bandwidth of its memory."""
    device = jax.devices()[0]
    call, moved = roofline.triad()
    seconds = timing.time_calls({0: call}, repeats=3)[0].median
    recorder.add(
        **timing.environment(),
        platform=device.client.platform_version,
        capability=str(getattr(device, "compute_capability", "")),
        cores=getattr(device, "core_count", None),
        memory_bytes=(device.memory_stats() or {}).get("bytes_limit"),
        python=platform.python_version(),
        kernels=kernels,
        has_tuned_sizes=(tuned.FOLDER / tuned.file_name(device.device_kind)).is_file(),
        gb_per_second=moved / seconds / 1e9,
    )


def check_values(recorder: Recorder, kernels: str, *, dry: bool) -> None:
    """Compare routing, then the passes, with float64; programs are compiled ahead, in parallel."""
    todo = {
        (function, name): problem
        for function in exactness.FUNCTIONS
        for name, problem in problems(dry).items()
    }
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = {
            key: pool.submit(exactness.compile_programs, key[0], problem, kernels)
            for key, problem in todo.items()
        }
        for (function, name), problem in todo.items():
            # Popped, so that the memory of a problem is free when it is done.
            future = compiled.pop((function, name))
            if not concurrent.futures.wait([future], recorder.left()).done or not recorder.left():
                recorder.leave_out(f"{function} of {name}")
                break
            row: dict[str, Any] = {"function": function, "case": name, "implementation": kernels}
            row["options"] = problem._asdict() | {"case": problem.case[:6]}
            for index, setting in enumerate(SETTINGS):
                fields = row | {"dtype": setting.dtype, "precision": setting.precision}
                try:
                    fields |= exactness.compare(future.result(), index)
                except Unsupported as refusal:
                    fields["refused"] = str(refusal)
                except Exception as error:
                    fields["error"] = one_line(error)
                recorder.add(**fields)
        pool.shutdown(cancel_futures=True)


def measure(
    recorder: Recorder, kernels: str, floors: dict[tuple[Any, ...], float], *, dry: bool
) -> None:
    """Time every implementation of a case in the same rounds, and compare with its floor."""
    for name, case in timed_cases(dry):
        if not recorder.has_time(f"{name} in {case.dtype}"):
            break
        variants = [
            Variant(implementation, mode, case.dtype)
            for mode in reversed(MODES)  # gradients first
            for implementation in dict.fromkeys((kernels, exactness.STORED_VOTES, "xla"))
        ]
        try:
            sets = routing_times.inputs_in_turn(case, most=2 if dry else 16)
        except NotMeasured as reason:
            recorder.add(case=name, dtype=case.dtype, reason=str(reason))
            continue
        found = routing_times.time_variants(variants, sets, case.num_iterations)
        for variant in variants:
            implementation, mode, dtype, _ = variant
            key = jax.devices()[0].device_kind, name, implementation, dtype, mode == "gradients"
            row = {"case": name, "implementation": implementation, "mode": mode, "dtype": dtype}
            stored = found[variant._replace(implementation=exactness.STORED_VOTES)]
            if "us" in stored and "us" in found[variant]:
                row["speedup"] = stored["us"] / found[variant]["us"]
            recorder.add(**row, **found[variant], floor_us=floors.get(key))


def measure_torch(recorder: Recorder, *, dry: bool) -> None:
    """Time stored votes in PyTorch on the first case."""
    name, case = next(timed_cases(dry))
    row = {"case": name, "dtype": case.dtype}
    try:
        device = torch_routing.device()
        import torch
    except InputError as error:
        recorder.add(**row, implementation="torch", reason=str(error))
        return
    row["torch"] = torch.__version__
    torch.set_float32_matmul_precision("high")  # TF32, as XLA's default
    sets = routing_times.inputs_in_turn(case, most=2 if dry else 16)
    for mode in reversed(MODES):
        for way in TORCH_WAYS:
            if not recorder.has_time(f"PyTorch, {way}, {mode}"):
                return
            fields = row | {"implementation": f"torch {way}", "mode": mode}
            try:
                if way == "graph" and device != "cuda":
                    fields["reason"] = f"CUDA graphs need CUDA, not a {device}"
                else:
                    T = case.num_iterations
                    fields |= routing_times.time_torch(sets, num_iterations=T, mode=mode, way=way)
            except Exception as error:
                fields["error"] = one_line(error)
            recorder.add(**fields)


def timed_cases(dry: bool) -> Iterator[tuple[str, Case]]:
    """Yield the cases of `TIMED` by name."""
    for name, dtype in TIMED:
        case = CASES[name]._replace(dtype=dtype)
        yield name, shrink(case) if dry else case


if __name__ == "__main__":
    cli.run(Config, main)
