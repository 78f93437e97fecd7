"""Compiles routing for GPUs and TPUs ahead of time, and reports its memory and traffic there."""

import concurrent.futures
import dataclasses
import datetime
from collections.abc import Iterable
from typing import Any

import jax

from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.passes import IMPLEMENTATIONS, PLATFORMS
from experiments import cli, files
from experiments.cli import flag
from experiments.compilers import targets
from experiments.compilers.compiling import Program, measure, platform_of
from experiments.errors import InputError

STORED_VOTES = "reference"


@dataclasses.dataclass(frozen=True)
class Config:
    """Which programs to compile."""

    target: str = flag(
        ",".join(targets.TARGETS), f"Any of {', '.join(targets.TARGETS)}, with commas in between."
    )
    case: str = flag("", f"Any of {', '.join(CASES)}, with commas in between; empty: all.")
    implementation: str = flag(
        "",
        f"Any of {', '.join(IMPLEMENTATIONS)}, with commas in between; empty: all "
        "that a target has.",
    )
    scaling: bool = flag(
        False,
        "Instead of the cases: 1k to 1M input capsules, for all but stored votes, with gradients.",
    )
    jobs: int = flag(2, "Compilers that run at the same time, at 1 to 3 GB each.", minimum=1)
    output: str = flag("", "File that a JSON line for each row is added to; empty: none.")


def main(config: Config) -> int:
    """Compiles every program, and prints a row for each as soon as it is there."""
    asked = programs(config)
    print(heading())
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        for (name, program), measured in zip(
            asked, pool.map(measure, (program for _, program in asked)), strict=True
        ):
            row = describe(name, program, measured)
            print(line(row), flush=True)
            if config.output:
                files.append_lines(config.output, [row])
    return 0


def programs(config: Config) -> list[tuple[str, Program]]:
    """Every program that a configuration asks for, with the name of its case.

    Raises:
      InputError: a name is unknown, or a compiler is not installed.
    """
    for target in config.target.split(","):
        targets.check_installed(target)
    names = _chosen("case", config.case, CASES)
    chosen = _chosen("implementation", config.implementation, IMPLEMENTATIONS)
    cases = {f"I={size}": case for size, case in scaling_cases().items()}
    if not config.scaling:
        cases = {name: CASES[name] for name in names}
    return [
        (name, Program(target, implementation, case, gradients))
        for target in config.target.split(",")
        for name, case in cases.items()
        for implementation in implementations(target)
        if implementation in chosen and not (config.scaling and implementation == STORED_VOTES)
        for gradients in ((True,) if config.scaling else (False, True))
    ]


def scaling_cases() -> dict[int, Case]:
    """From 1k to 1M input capsules, small enough to fit into every target with its gradients."""
    sizes = [2**exponent for exponent in range(10, 21, 2)]
    return {size: Case(batch=32, capsules=size, length=4, parents=10, depth=16) for size in sizes}


def implementations(target: str) -> list[str]:
    """The implementations that run on a target."""
    platform = platform_of(targets.TARGETS[target])
    return [name for name in IMPLEMENTATIONS if PLATFORMS.get(name, platform) == platform]


def describe(name: str, program: Program, measured: dict[str, Any]) -> dict[str, Any]:
    """One row: what was compiled, what was counted in it, and by which version of JAX."""
    return {
        **dataclasses.asdict(program),
        "case": name,
        "sizes": program.case._asdict(),
        **measured,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


_COLUMNS = {
    "temp MB": 9,
    "moved MB": 10,
    "XLA's MB": 10,
    "GFLOP": 8,
    "regs": 5,
    "spill B": 8,
    "chip kB": 8,
    "bundles": 8,
}


def heading() -> str:
    """The head of the table."""
    cells = "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())
    return f"{'target':8} {'case':19}{'implementation':18}{'pass':10}{cells}"


def line(row: dict[str, Any]) -> str:
    """A row of the table; of kernels the largest figures, of its own ones if it has any."""
    passes = "gradients" if row["gradients"] else "forward"
    start = f"{row['target']:8} {row['case']:19}{row['implementation']:18}{passes:10}"
    if "reason" in row:
        return f"{start} not compiled: {row['reason'][:120]}"
    kernels = [kernel for kernel in row["kernels"] if kernel["pallas"]] or row["kernels"]

    def largest(*names: str) -> int | None:
        found = [kernel[name] for kernel in kernels for name in names if name in kernel]
        return max(found, default=None)

    memory = largest("shared_memory", "vector_memory")
    cells = (
        f"{row['temporary_mb']:.2f}",
        f"{row['moved_mb']:.1f}",
        None if row["accessed_mb"] is None else f"{row['accessed_mb']:.1f}",
        f"{row['matrix_gflop'] + row['vector_gflop']:.2f}",
        largest("registers"),
        largest("spills"),
        None if memory is None else round(memory / 1000),
        largest("bundles"),
    )
    return start + "".join(
        f"{'' if cell is None else cell:>{width}}"
        for cell, width in zip(cells, _COLUMNS.values(), strict=True)
    )


def _chosen(flag_name: str, text: str, known: Iterable[str]) -> list[str]:
    """The names in a list with commas; all for an empty one."""
    known = list(known)
    chosen = text.split(",") if text else known
    for name in chosen:
        if name not in known:
            raise InputError(f"--{flag_name} must name any of {', '.join(known)}, got {name!r}")
    return chosen


if __name__ == "__main__":
    cli.run(Config, main)
