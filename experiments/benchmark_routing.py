"""Measures routing on this device: every implementation, beside stored votes and the roofline."""

import dataclasses
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

from capsjax.kernels.vote_passes import passes
from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.config import CONFIGS
from experiments import cli, files
from experiments.benchmarks import torch_routing
from experiments.benchmarks.routing_rows import MODES, TORCH, Way, check_torch, measure, variants
from experiments.cli import flag
from experiments.errors import InputError
from experiments.figures import routing_speed

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how often. Lists are separated by commas."""

    cases: str = flag("capsnet_mnist", "Cases of kernels/vote_passes/cases.py; empty: all.")
    implementations: str = flag("", f"Any of {', '.join(passes.IMPLEMENTATIONS)}; empty: all.")
    modes: str = flag("", "forward, gradients (and values); empty: both.")
    dtypes: str = flag("", "float32, bfloat16; empty: the one of the case.")
    scaling: str = flag(
        "", "Numbers of input capsules, at each of which the first case is measured too."
    )
    torch: bool = flag(False, "Also measure PyTorch's einsum over stored votes.")
    sweep: bool = flag(
        False,
        "Look for the best config: measure each implementation that has one with its own choice "
        "and with each size of it halved and doubled.",
    )
    repeats: int = flag(5, "Rounds in which all rows of a case are timed in turn.", minimum=1)
    output: str = flag("", "File that a JSON line for each row is added to; empty: none.")
    figures: str = flag("", "Folder for time_over_capsules.png and roofline.png; empty: none.")


def main(config: Config) -> int:
    """Measures case by case, and prints and writes each one's rows as soon as they are there."""
    problems = problems_of(config)
    known = CONFIGS if config.sweep else passes.IMPLEMENTATIONS
    names = chosen("implementations", config.implementations, known)
    modes = chosen("modes", config.modes, MODES)
    dtypes = chosen("dtypes", config.dtypes, DTYPES) if config.dtypes else []
    if config.torch:
        torch_routing.device()  # raises if there is none
        check_torch(next(iter(problems.values())))
        names.append(TORCH)
    if config.output:
        files.append_lines(config.output, [])  # fails now, if it must
    rows: list[dict[str, Any]] = []
    for (name, _), case in problems.items():
        ways = [
            Way(implementation, mode, dtype, choice)
            for dtype in dtypes or [case.dtype]
            for mode in modes
            for implementation in names
            for choice in (
                variants(implementation, case)
                if config.sweep and implementation != TORCH
                else [None]
            )
        ]
        new = measure(name, case, ways, repeats=config.repeats)
        print("\n".join(report(name, case, new, sweep=config.sweep)), end="\n\n", flush=True)
        if config.output:
            files.append_lines(config.output, new)
        rows += new
    if config.figures:
        draw(rows, config.figures, next(name for name, _ in problems))
    return 0


def problems_of(config: Config) -> dict[tuple[str, int], Case]:
    """The cases by name and I: those asked for, then the first of them with other I."""
    names = chosen("cases", config.cases, CASES)
    problems = {(name, CASES[name].capsules): CASES[name] for name in names}
    for word in config.scaling.split(",") if config.scaling else []:
        if not word.isdecimal() or int(word) < 1:
            raise InputError(
                f"--scaling must be whole numbers from 1 up, separated by commas, got {word!r}"
            )
        problems[names[0], int(word)] = CASES[names[0]]._replace(capsules=int(word))
    return problems


def chosen(flag_name: str, text: str, known: Collection[str]) -> list[str]:
    """The names in a flag, in the order in which they are known."""
    names = text.split(",") if text else list(known)
    for name in names:
        if name not in known:
            raise InputError(f"--{flag_name} must be among {', '.join(known)}, got {name!r}")
    return [name for name in known if name in names]


def report(name: str, case: Case, rows: Sequence[dict[str, Any]], *, sweep: bool) -> list[str]:
    """A table of the rows of a case, with the peaks that were measured beside them."""
    measured = [row for row in rows if "reason" not in row]
    sizes = dict(zip("BIPJDT", case[:6], strict=True))
    lines = [" ".join([name, *(f"{letter}={size}" for letter, size in sizes.items())])]
    peaks = {row["dtype"]: f"{row['peak_flops_per_second'] / 1e9:.0f}" for row in measured}
    if measured:
        triad = f"{measured[0]['peak_bytes_per_second'] / 1e9:.1f} GB/s"
        products = ", ".join(f"{peak} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
        lines.append(f"peaks on {rows[0]['device']}: triad {triad}, matrix product {products}")
    columns = ["median ms", "min", "max", "calls", "compile s", "temporary MB", "peak MB"]
    columns += ["GFLOP/s", "% of roofline", "speedup", "difference"]
    cells = [["", "mode", "dtype", *columns], *map(_cells, measured)]
    lines += cli.table(cells) if measured else []
    for row in rows:
        if "reason" in row:
            title = f"{_title(row)}, {row['mode']}, {row['dtype']}"
            lines.append(f"{title}: not measured: {row['reason']}")
    if sweep:
        lines += best(measured)
    return lines


def best(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each implementation, mode and dtype, the config of the shortest median."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["config"] is not None:
            key = row["implementation"], row["mode"], row["dtype"]
            groups.setdefault(key, []).append(row)
    lines = []
    for (_, mode, dtype), group in groups.items():
        first = min(group, key=lambda row: row["median"])
        gain = group[0]["median"] / first["median"]
        lines.append(f"best, {mode}, {dtype}: {_title(first)}, {gain:.2f} x its own choice's speed")
    return lines


def draw(rows: Sequence[dict[str, Any]], folder: str, scaled: str) -> None:
    """Draws what was measured: time over I for one case, and all cases below their roofs."""
    measured = [row for row in rows if "reason" not in row]
    drawn = {
        routing_speed.time_over_capsules: [row for row in rows if row["case"] == scaled],
        routing_speed.roofline: [
            row for row in measured if row["capsules"] == CASES[row["case"]].capsules
        ],
    }
    for figure, its_rows in drawn.items():
        path = pathlib.Path(folder) / f"{figure.__name__}.png"
        if any(row in measured for row in its_rows):
            files.save_figure(figure(its_rows), path)
        else:
            print(f"{path} is not drawn: none of its rows could be measured")


def _title(row: dict[str, Any]) -> str:
    sizes = row["config"] or {}
    return " ".join([row["implementation"], *(f"{key}={size}" for key, size in sizes.items())])


def _cells(row: dict[str, Any]) -> list[str]:
    def shown(name: str, scale: float, digits: int) -> str:
        return "-" if row[name] is None else f"{row[name] * scale:.{digits}f}"

    return [
        _title(row),
        row["mode"],
        row["dtype"],
        *(shown(name, 1e3, 3) for name in ("median", "min", "max")),
        str(row["calls"]),
        shown("compile_seconds", 1, 1),
        *(shown(name, 1e-6, 1) for name in ("temporary_bytes", "peak_bytes")),
        shown("flops_per_second", 1e-9, 1),
        shown("roofline_percent", 1, 1),
        f"{row['speedup']:.3g}",
        f"{row['difference']:.0e}",
    ]


if __name__ == "__main__":
    cli.run(Config, main)
