"""Measure every implementation of routing on this device, beside stored votes and the roofline."""

import dataclasses
import pathlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax

from capsjax.kernels.vote_passes import passes, tuned
from capsjax.kernels.vote_passes.cases import CASES, Case
from capsjax.kernels.vote_passes.config import CONFIGS
from experiments import cli, files
from experiments.benchmarks import timing, torch_routing
from experiments.benchmarks.routing_rows import (
    MODES,
    TORCH,
    Variant,
    check_torch,
    measure_case,
    title,
)
from experiments.cli import flag
from experiments.errors import InputError
from experiments.figures import routing_speed

# For each dtype, the largest difference from the baseline that rounding may explain. A config that
# differs by more is not the best one, however fast.
MAX_DIFFERENCES = {"float32": 2e-3, "bfloat16": 3e-2}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to measure, and how often. Lists are comma-separated."""

    cases: str = flag(
        "capsnet_mnist", "Cases of kernels/vote_passes/cases.py, comma-separated; empty: all."
    )
    implementations: str = flag(
        "", f"Any of {', '.join(passes.IMPLEMENTATIONS)}, comma-separated; empty: all."
    )
    modes: str = flag("", "forward, gradients (with the outputs), comma-separated; empty: both.")
    dtypes: str = flag("", "float32, bfloat16, comma-separated; empty: that of the case.")
    scaling: str = flag(
        "", "More numbers of input capsules for the first case, comma-separated; empty: none."
    )
    torch: bool = flag(False, "Also measure PyTorch's einsum over stored votes.")
    sweep: bool = flag(
        False,
        "Search for the best config: measure each implementation that has one with its default, "
        "and with each size of the default halved and doubled.",
    )
    tuned: str = flag(
        "",
        "Folder for the best configs of --sweep, one JSON file a kind of device, whose other rows "
        "are kept; empty: none. The library reads kernels/vote_passes/tuned.",
    )
    repeats: int = flag(
        5, "Rounds; each times all rows of a case in turn.", minimum=1, maximum=10_000
    )
    output: str = flag("", "File to append a JSON line a row to; empty: none.")
    figures: str = flag("", "Folder for time_over_capsules.png and roofline.png; empty: none.")


def main(config: Config) -> int:
    """Measure case by case; print and write the rows of a case before the next starts."""
    problems = select_problems(config)
    known = CONFIGS if config.sweep else passes.IMPLEMENTATIONS
    names = select("implementations", config.implementations, known)
    modes = select("modes", config.modes, MODES)
    dtypes = select("dtypes", config.dtypes, MAX_DIFFERENCES) if config.dtypes else []
    if config.torch:
        torch_routing.device()  # raises InputError if it cannot be used
        check_torch(next(iter(problems.values())))
        names.append(TORCH)
    if config.output:
        files.append_lines(config.output, [])  # fails before the first measurement
    if config.tuned:
        if not config.sweep or "gradients" not in modes:
            raise InputError("--tuned needs --sweep, and gradients among --modes")
        save_tuned(config.tuned, [])  # fails before the first measurement
    rows: list[dict[str, Any]] = []
    for (name, _), case in problems.items():
        variants = [
            Variant(implementation, mode, dtype, kernel_config)
            for dtype in dtypes or [case.dtype]
            for mode in modes
            for implementation in names
            for kernel_config in (
                neighbouring_configs(implementation, case)
                if config.sweep and implementation != TORCH
                else [None]
            )
        ]
        new = measure_case(name, case, variants, repeats=config.repeats)
        print("\n".join(report(name, case, new, sweep=config.sweep)), end="\n\n", flush=True)
        if config.output:
            files.append_lines(config.output, new)
        if config.tuned:
            save_tuned(config.tuned, new)
        rows += new
    if config.figures:
        draw(rows, config.figures, next(name for name, _ in problems))
    return 0


def select_problems(config: Config) -> dict[tuple[str, int], Case]:
    """Return the cases by name and number of input capsules: --cases, then those of --scaling."""
    names = select("cases", config.cases, CASES)
    problems = {(name, CASES[name].capsules): CASES[name] for name in names}
    if config.scaling:
        for count in cli.numbers("scaling", config.scaling, minimum=1, maximum=2**24, kind=int):
            problems[names[0], count] = CASES[names[0]]._replace(capsules=count)
    return problems


def select(flag_name: str, text: str, known: Collection[str]) -> list[str]:
    """Parse the names in a comma-separated flag; return them in the order of `known`."""
    names = text.split(",") if text else list(known)
    for name in names:
        if name not in known:
            raise InputError(f"--{flag_name} must be among {', '.join(known)}, got {name!r}")
    return [name for name in known if name in names]


def neighbouring_configs(implementation: str, case: Case) -> list[Any]:
    """List the default config of an implementation, then those with one field changed.

    A size is halved or doubled, a switch turned over.
    """
    config_for: Any = CONFIGS[implementation]
    # Configs of TPU kernels depend on the generation of the TPU.
    kind = (jax.devices()[0].device_kind,) if passes.PLATFORMS.get(implementation) == "tpu" else ()
    config = config_for(case, *kind)
    if config is None:
        return [None]
    changed = [
        tuned.decode(implementation, x, type(config)) for x in _changed(tuned.encode(config))
    ]
    return [config, *changed]


def report(name: str, case: Case, rows: Sequence[dict[str, Any]], *, sweep: bool) -> list[str]:
    """Return the printed lines of a case: its sizes, the device's peaks, and a table of rows."""
    timed = [row for row in rows if "reason" not in row]
    sizes = dict(zip("BIPJDT", case[:6], strict=True))
    lines = [" ".join([name, *(f"{letter}={size}" for letter, size in sizes.items())])]
    peaks = {row["dtype"]: f"{row['peak_flops_per_second'] / 1e9:.0f}" for row in timed}
    if timed:
        triad = f"{timed[0]['peak_bytes_per_second'] / 1e9:.1f} GB/s"
        products = ", ".join(f"{peak} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
        lines.append(f"peaks on {rows[0]['device']}: triad {triad}, matrix product {products}")
    columns = ["median ms", "min", "max", "calls", "compile s", "temporary MB", "peak MB"]
    columns += ["GFLOP/s", "% of roofline", "speedup", "difference"]
    cells = [["", "mode", "dtype", *columns], *map(_cells, timed)]
    lines += cli.table(cells) if timed else []
    for row in rows:
        if "reason" in row:
            settings = f"{_title(row)}, {row['mode']}, {row['dtype']}"
            lines.append(f"{settings}: not measured: {row['reason']}")
    if sweep:
        lines += best(timed)
    return lines


def best(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return a line for each implementation, mode and dtype: the config of the shortest median."""
    lines = []
    for default, fastest in fastest_configs(rows):
        gain = default["median"] / fastest["median"]
        lines.append(
            f"best, {fastest['mode']}, {fastest['dtype']}: {_title(fastest)}, "
            f"{gain:.2f} x the default's speed"
        )
    return lines


def fastest_configs(
    rows: Sequence[dict[str, Any]],
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return the first and the fastest row of each implementation, mode and dtype."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["config"] is None or "reason" in row:
            continue
        if row["difference"] <= MAX_DIFFERENCES[row["dtype"]]:
            key = row["implementation"], row["mode"], row["dtype"]
            groups.setdefault(key, []).append(row)
    return [(group[0], min(group, key=lambda row: row["median"])) for group in groups.values()]


def save_tuned(folder: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write the fastest configs of a case to the device's file; keep its other rows.

    Raises:
      InputError: The file is there and not valid, or it cannot be written.
    """
    kind = timing.environment()["device"]
    path = pathlib.Path(folder) / tuned.file_name(kind)
    try:
        measured = {row.key: row for row in tuned.read(path, kind)}
    except ValueError as error:
        raise InputError(str(error)) from error
    for _, row in fastest_configs(rows):
        if row["mode"] == "gradients":  # a config is for all passes of a training step
            new = tuned.Measured(
                row["implementation"],
                Case(*(row[field] for field in Case._fields)),
                row["config"],
                row["median"],
                row["jax"],
                row["date"],
            )
            measured[new.key] = new
    files.write_json(path, tuned.to_json(kind, list(measured.values())))


def draw(rows: Sequence[dict[str, Any]], folder: str, scaled: str) -> None:
    """Write the figures: times of the case `scaled` over its capsules, and the roofline of all."""
    timed = [row for row in rows if "reason" not in row]
    rows_of_figures = {
        routing_speed.time_over_capsules: [row for row in rows if row["case"] == scaled],
        routing_speed.roofline: [
            row for row in timed if row["capsules"] == CASES[row["case"]].capsules
        ],
    }
    for figure, drawn in rows_of_figures.items():
        path = pathlib.Path(folder) / f"{figure.__name__}.png"
        if any(row in timed for row in drawn):
            files.save_figure(figure(drawn), path)
        else:
            print(f"{path} is not drawn: none of its rows could be measured")


def _changed(value: Any) -> Iterator[Any]:
    """Yield an encoded config with each of its fields changed in turn."""
    if isinstance(value, dict):
        for name, field in value.items():
            yield from ({**value, name: new} for new in _changed(field))
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (size for size in (value // 2, 2 * value) if size)


def _title(row: dict[str, Any]) -> str:
    return title(row["implementation"], row["config"])


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
