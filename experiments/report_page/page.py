"""Write the page of a report: prepare its tables, curves and figures, and fill the template."""

import json
import pathlib
import re
import statistics
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jinja2

from experiments.report_page import charts
from experiments.report_page.workdirs import Folder, Picture, Results, Run, measures
from experiments.training import records

_ABSENT = "\N{EN DASH}"
# Not allowed in HTML or in UTF-8; a file's name may hold any of them.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_HERE = pathlib.Path(__file__).parent


class Cell(NamedTuple):
    """One cell of a table."""

    text: str
    note: str = ""  # in small letters below the text
    swatch: str = ""  # CSS classes of a curve that is shown before the text
    strong: bool = False
    marked: bool = False


class Table(NamedTuple):
    """A table whose first column holds the names of its rows."""

    label: str  # for screen readers
    heads: list[str]
    rows: list[list[Cell]]
    numbers: Collection[int] = ()  # columns that are aligned to the right


class Settings(NamedTuple):
    """What config.json says about the runs."""

    differing: Table | None
    same: Table | None
    summary: str  # of the table of equal settings, which is folded


class Figures(NamedTuple):
    """Figures of the same name side by side, with the label of the folder of each."""

    rows: list[tuple[str, list[tuple[str, Picture]]]]
    single: bool  # whether no row holds more than one figure


def page(runs: Sequence[Run], folders: Sequence[Folder]) -> str:
    """Return the page as HTML; the same runs and folders give the same text."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )
    groups = dict.fromkeys(run.group for run in runs)
    styles = {group: charts.style(number) for number, group in enumerate(groups)}
    text = environment.get_template("page.html.jinja").render(
        title=f"capsjax: {contents(runs)}",
        style=(_HERE / "report.css").read_text(),
        errors=_errors(runs, styles),
        settings=_settings(runs),
        curves=charts.curves(runs, styles),
        results=[
            (folder.label, _results(folder.results, f"results of {folder.label}"))
            for folder in folders
            if folder.results
        ],
        figures=_figures(folders),
        area=charts.AREA,
        thinned_above=charts.THINNED,
    )
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


def contents(runs: Sequence[Run]) -> str:
    """Return what a page is about: the number of runs, or "results" if there are no runs."""
    return f"{len(runs)} run{'s' * (len(runs) > 1)}" if runs else "results"


def _errors(runs: Sequence[Run], styles: dict[str, str]) -> Table | None:
    """Return a row per run with the latest value of each test error."""
    if not runs:
        return None
    found = [key for key in measures(runs) if key.startswith("test_") and "error" in key]
    keys = found or ["test_error"]
    heads = ["run", *map(charts.heading, keys), "epochs", "steps", "training time", "images/s"]
    rows = []
    for run in runs:
        last = run.rows[-1]
        epochs = _epochs(last) if "epoch" in last else _ABSENT
        if type(planned := run.facts.get("num_epochs")) is int and "epoch" in last:
            epochs += f" of {planned}"
        speeds = [row["images_per_second"] for row in run.rows if "images_per_second" in row]
        rows.append(
            [
                Cell(run.label, swatch=styles[run.group]),
                *(_last_error(run.rows, key) for key in keys),
                Cell(epochs),
                Cell(str(last["step"])),
                Cell(_training_time(run)),
                Cell(_number(round(statistics.median(speeds))) if speeds else _ABSENT),
            ]
        )
    return Table("last test errors", heads, rows, numbers=range(1, len(heads)))


def _last_error(rows: Sequence[dict[str, float]], key: str) -> Cell:
    found = [row for row in rows if key in row]
    if not found:
        return Cell("none yet")
    row = found[-1]
    when = f"epoch {_epochs(row)}" if "epoch" in row else f"step {row['step']}"
    is_current = row["step"] == rows[-1]["step"]
    return Cell(f"{row[key]:.2f}", note="" if is_current else f"after {when}", strong=True)


def _epochs(row: dict[str, float]) -> str:
    return _number(round(row["epoch"], 2))


def _training_time(run: Run) -> str:
    batch_size = run.facts.get("batch_size")
    if type(batch_size) is not int or not 0 < batch_size < 2**31:
        return _ABSENT
    if not all(row.get("images_per_second") for row in run.rows):
        return _ABSENT
    seconds = records.training_seconds(run.rows, batch_size)
    if not 0 <= seconds < 1e10:  # steps or speeds that no run has
        return _ABSENT
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left} s" if minutes else f"{left} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _settings(runs: Sequence[Run]) -> Settings | None:
    """Return what config.json says: differing settings side by side, and the equal ones."""
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    names.sort(key=lambda name: name == "workdir")  # last, as the labels show it already
    if not names:
        return None
    same, differing = [], []
    for name in names:
        values = [json.dumps(run.facts[name]) if name in run.facts else "" for run in runs]
        shown = [_exact(run.facts[name]) if name in run.facts else _ABSENT for run in runs]
        if len(set(values)) == 1:
            same.append([Cell(name), Cell(shown[0])])
        else:
            pairs = zip(values, shown, strict=True)
            cells = [Cell(text, marked=own != values[0]) for own, text in pairs]
            differing.append([Cell(name), *cells])
    grid = [[Cell("setting"), *(Cell(run.label) for run in runs)], *differing]
    if len(runs) > len(differing):  # the shorter side goes across
        grid = [list(column) for column in zip(*grid, strict=True)]
        grid[0][0] = Cell("run")
    heads = [cell.text for cell in grid[0]]
    return Settings(
        Table("settings that differ", heads, grid[1:]) if differing else None,
        Table("settings that are the same", ["setting", "value"], same) if same else None,
        f"{len(same)} settings and versions that are the same in all runs"
        if len(runs) > 1
        else f"All {len(same)} settings and versions",
    )


def _results(results: Results, label: str) -> Table:
    def cell(value: Any) -> Cell:
        if value is None:
            return Cell(_ABSENT)
        return Cell(_number(value) if type(value) is float else _exact(value))

    numbers = [
        column
        for column in range(len(results.columns))
        if all(type(row[column]) in (int, float, type(None)) for row in results.rows)
    ]
    rows = [list(map(cell, row)) for row in results.rows]
    return Table(label, list(map(_words, results.columns)), rows, numbers)


def _figures(folders: Sequence[Folder]) -> Figures | None:
    rows: dict[str, list[tuple[str, Picture]]] = {}
    for folder in folders:
        for picture in folder.pictures:
            rows.setdefault(picture.name, []).append((folder.label, picture))
    if not rows:
        return None
    titled = [(_words(pathlib.PurePath(name).stem), row) for name, row in rows.items()]
    return Figures(titled, single=all(len(row) == 1 for row in rows.values()))


def _words(name: str) -> str:
    return name.replace("_", " ")


def _exact(value: Any) -> str:
    """Return a JSON value as text, strings without quotes."""
    return (value or "(empty)") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return f"{value:.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"
