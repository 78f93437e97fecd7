"""Report memory, traffic and operations of routing on GPUs and TPUs, compiled ahead of time."""

import concurrent.futures
import dataclasses
import datetime
from collections.abc import Iterable
from typing import Any

import jax

from capsjax.kernels.vote_passes.cases import CASES, FAMILY, Case
from capsjax.kernels.vote_passes.passes import IMPLEMENTATIONS, PLATFORMS
from experiments import cli, files
from experiments.cli import flag
from experiments.compilers import targets
from experiments.compilers.compiling import CompileRequest, compile_costs, platform_of
from experiments.compilers.data_sheets import TARGETS
from experiments.errors import InputError

STORED_VOTES = "reference"  # the implementation that stores the votes
# By name: a routing function, and sizes.
PROBLEMS = {**{name: ("dynamic_routing", case) for name, case in CASES.items()}, **FAMILY}


@dataclasses.dataclass(frozen=True)
class Config:
    """Which programs to compile."""

    target: str = flag("h100,a100,tpu_v5e", f"Any of {', '.join(TARGETS)}, comma-separated.")
    case: str = flag("", f"Any of {', '.join(PROBLEMS)}, comma-separated; empty: all.")
    implementation: str = flag(
        "",
        f"Any of {', '.join(IMPLEMENTATIONS)}, comma-separated; empty: all that the target has.",
    )
    dtype: str = flag(
        "", "In place of that of the cases; empty: theirs.", choices=("", "float32", "bfloat16")
    )
    precision: str = flag(
        "",
        "jax.default_matmul_precision; empty: none.",
        choices=("", "default", "high", "highest"),
    )
    scaling: bool = flag(
        False,
        "Instead of the cases, compile 1k to 1M input capsules: gradients only, no stored votes.",
    )
    jobs: int = flag(
        2, "Compilations in parallel, each of which takes 1 to 3 GB.", minimum=1, maximum=1024
    )
    output: str = flag("", "File to append a JSON line a row to; empty: none.")


def main(config: Config) -> int:
    """Compile every request; print and write a row as soon as it is compiled."""
    named = requests(config)
    stored: dict[tuple[Any, ...], float] = {}
    print(heading())
    with concurrent.futures.ThreadPoolExecutor(config.jobs) as pool:
        compiled = pool.map(compile_costs, (request for _, request in named))
        for (name, request), costs in zip(named, compiled, strict=True):
            row = describe(name, request, costs)
            key = (request.target, request.function, request.case, request.gradients)
            if row.get("floor_us"):
                if request.implementation == STORED_VOTES:
                    stored[key] = row["floor_us"]
                if key in stored:
                    row["gain"] = stored[key] / row["floor_us"]
            print("\n".join([line(row), *kernel_lines(row)]), flush=True)
            if config.output:
                files.append_lines(config.output, [row])
    return 0


def requests(config: Config) -> list[tuple[str, CompileRequest]]:
    """List the compilations that the settings ask for, each with the name of its case.

    Raises:
      InputError: A name is unknown, or a compiler is not installed.
    """
    for target in config.target.split(","):
        targets.check_installed(target)
    names = _select("case", config.case, PROBLEMS)
    selected = _select("implementation", config.implementation, IMPLEMENTATIONS)
    problems = {f"I={size}": ("dynamic_routing", case) for size, case in scaling_cases().items()}
    if not config.scaling:
        problems = {name: PROBLEMS[name] for name in names}
    if config.dtype:
        problems = {
            name: (function, case._replace(dtype=config.dtype))
            for name, (function, case) in problems.items()
        }
    precision = config.precision or None
    return [
        (
            name,
            CompileRequest(
                target, implementation, case, gradients, precision=precision, function=function
            ),
        )
        for target in config.target.split(",")
        for name, (function, case) in problems.items()
        for implementation in implementations(target)
        if implementation in selected and not (config.scaling and implementation == STORED_VOTES)
        for gradients in ((True,) if config.scaling else (False, True))
    ]


def scaling_cases() -> dict[int, Case]:
    """Return cases of 1k to 1M input capsules, which fit every target's memory with gradients."""
    sizes = [2**exponent for exponent in range(10, 21, 2)]
    return {size: Case(batch=32, capsules=size, length=4, parents=10, depth=16) for size in sizes}


def implementations(target: str) -> list[str]:
    """List the implementations that run on a target."""
    platform = platform_of(TARGETS[target])
    return [name for name in IMPLEMENTATIONS if PLATFORMS.get(name, platform) == platform]


def describe(name: str, request: CompileRequest, costs: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a request: its settings, its costs, the version of JAX and the date."""
    return {
        **dataclasses.asdict(request),
        "case": name,
        "sizes": request.case._asdict(),
        **costs,
        "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }


# Titles and widths: rows are printed one by one, before the widths of later ones are known.
_COLUMNS = {
    "temp MB": 9,
    "moved MB": 10,
    "partial MB": 12,
    "GFLOP": 8,
    "launches": 10,
    "issue us": 10,
    "memory us": 11,
    "floor us": 10,
    "bound": 9,
    "gain": 7,
}
# Titles and widths of a kernel's row, and the fields that it shows.
_GPU_COLUMNS = {
    "calls": (6, "calls"),
    "regs": (6, "registers"),
    "spill B": (9, "spills"),
    "in loops": (10, "loop_local"),
    "smem kB": (9, "shared_memory"),
    "barriers": (10, "loop_barriers"),
    "resident": (10, "resident_blocks"),
    "waves": (7, "waves"),
    "instructions": (14, "instructions"),
    "issue us": (10, "issue_us"),
    "product us": (12, "product_us"),
    "memory us": (11, "memory_us"),
    "asked MB": (10, "requested_mb"),
}
_TPU_COLUMNS = {
    "calls": (6, "calls"),
    "vmem kB": (9, "vector_memory"),
    "bundles": (9, "bundles"),
    "executed": (10, "executed"),
    "issue us": (10, "issue_us"),
    "memory us": (11, "memory_us"),
}


def heading() -> str:
    """Return the titles of the table."""
    titles = "".join(f"{name:>{width}}" for name, width in _COLUMNS.items())
    return f"{'target':9}{'case':28}{'implementation':15}{'pass':10}{titles}"


def line(row: dict[str, Any]) -> str:
    """Format a row of the table.

    `bound` is the kind of bound that decides on most of `floor us`; `gain` is that floor of stored
    votes over that of the row. Time between launches is in neither.
    """
    passes = "gradients" if row["gradients"] else "forward"
    start = f"{row['target']:9}{row['case']:28}{row['implementation']:15}{passes:10}"
    if "reason" in row:
        return f"{start} {row['reason'][:300]}"
    cells = (
        f"{row['temporary_mb']:.2f}",
        _cell(row["moved_mb"]),
        _cell(row["partial_mb"]),
        f"{row['matrix_gflop'] + row['vector_gflop']:.2f}",
        _cell(row["launches"]),
        _cell(row["issue_us"]),
        _cell(row["memory_us"]),
        _cell(row["floor_us"]),
        max(row["bounds_us"], key=row["bounds_us"].__getitem__, default=""),
        f"{row['gain']:.2f}" if row.get("gain") else "",
    )
    return start + "".join(
        f"{cell:>{width}}" for cell, width in zip(cells, _COLUMNS.values(), strict=True)
    )


def kernel_lines(row: dict[str, Any]) -> list[str]:
    """Format a table of the Pallas kernels of a row."""
    kernels = [kernel for kernel in row.get("kernels", ()) if kernel["pallas"]]
    if not kernels:
        return []
    columns = _GPU_COLUMNS if "registers" in kernels[0] else _TPU_COLUMNS
    titles = "".join(f"{name:>{width}}" for name, (width, _) in columns.items())
    lines = [f"  {'kernel':37}{titles}"]
    for kernel in kernels:
        cells = (f"{_cell(kernel[field], field):>{width}}" for width, field in columns.values())
        lines.append(f"  {kernel['name'][:36]:37}{''.join(cells)}")
    return lines


def _cell(value: float | None, field: str = "") -> str:
    """Format a number; memory in kB."""
    if value is None:
        return ""
    if field.endswith("_memory"):
        return str(round(value / 1000))
    return str(value) if isinstance(value, int) else f"{value:.1f}"


def _select(flag_name: str, text: str, known: Iterable[str]) -> list[str]:
    """Parse the names in a comma-separated flag; an empty one selects all."""
    known = list(known)
    selected = text.split(",") if text else known
    for name in selected:
        if name not in known:
            raise InputError(f"--{flag_name} must name any of {', '.join(known)}, got {name!r}")
    return selected


if __name__ == "__main__":
    cli.run(Config, main)
