"""The printed tables of `device_check`, from its rows."""

import collections
import math
from collections.abc import Sequence
from typing import Any

from experiments import cli

Row = dict[str, Any]


def lines(stage: str, rows: Sequence[Row]) -> list[str]:
    """Return the printed lines of a stage."""
    if stage == "environment":
        return [f"{name}: {value}" for row in rows for name, value in row.items()]
    counts = collections.Counter(map(outcome, rows))
    found = [f"{stage}: " + (", ".join(f"{n} {what}" for what, n in counts.items()) or "no row")]
    if stage == "values":
        columns = ["function", "case", "dtype", "precision", "", "worst", "error", "stored votes"]
        cells = [_value_cells(row) for row in rows if "errors" in row]
    else:
        columns = ["case", "dtype", "implementation", "mode", "median us", "min", "max"]
        columns += ["floor us", "speedup", "calls"]
        cells = [_time_cells(row) for row in rows if "us" in row]
    if cells:
        found += cli.table([columns, *cells])
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if reason := row.get("refused") or row.get("reason"):
            reasons.setdefault(reason, []).append(_program(row))
    names = {reason: ", ".join(dict.fromkeys(programs)) for reason, programs in reasons.items()}
    return found + [f"{programs}: {reason}" for reason, programs in names.items()]


def outcome(row: Row) -> str:
    """Return what became of a row, in a word or two."""
    if "refused" in row:
        return "refused"
    if "error" in row:
        return "ended by an error"
    if "reason" in row:
        return "not measured"
    return "measured" if "us" in row else "right" if row["ok"] else "wrong"


def title(row: Row) -> str:
    """Return the words that tell a row from the others."""
    others = (row.get("dtype"), row.get("precision"))
    return " ".join(filter(None, [row["stage"], _program(row), *others]))


def failure(row: Row) -> str:
    """Return the error of a row, or what is wrong with its values."""
    if "error" in row:
        return row["error"]
    found = [f"{name} has error {_scientific(row['errors'][name])}" for name in row["wrong"]]
    return ", ".join(found + ([] if row["same_bits"] else ["a second run has other bits"]))


def _program(row: Row) -> str:
    names = ("function", "case", "implementation", "mode")
    return " ".join(row[name] for name in names if row.get(name))


def _value_cells(row: Row) -> list[str]:
    errors = row["errors"]
    worst = max(errors, key=lambda name: math.inf if errors[name] is None else errors[name])
    return [
        *(row[name] or "" for name in ("function", "case", "dtype", "precision")),
        outcome(row),
        worst,
        _scientific(errors[worst]),
        _scientific(row["stored_errors"][worst]),
    ]


def _time_cells(row: Row) -> list[str]:
    def shown(name: str, digits: int) -> str:
        return "" if row.get(name) is None else f"{row[name]:.{digits}f}"

    return [
        *(row[name] for name in ("case", "dtype", "implementation", "mode")),
        *(shown(name, 1) for name in ("us", "min_us", "max_us", "floor_us")),
        shown("speedup", 2),
        str(row["calls"]),
    ]


def _scientific(error: float | None) -> str:
    """Format an error; None is one that is not finite."""
    return "not finite" if error is None else f"{error:.0e}"
