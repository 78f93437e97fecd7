"""The tables of a report: last test errors, settings, and the results of other programs."""

import json
import statistics
from collections.abc import Sequence
from typing import Any

from experiments.report_page import chart
from experiments.report_page.markup import Markup, element, joined
from experiments.report_page.workdirs import Folder, Run, Table, measures
from experiments.training import records

_ABSENT = "\N{EN DASH}"


def errors(runs: Sequence[Run], styles: dict[str, int]) -> Markup:
    """A row a run: the newest value of each test error, however good an older one was."""
    if not runs:
        return Markup()
    found = [key for key in measures(runs) if key.startswith("test_") and "error" in key]
    keys = found or ["test_error"]
    heads = ["run", *map(heading, keys), "epochs", "steps", "training time", "images/s"]
    lines = []
    for run in runs:
        last = run.rows[-1]
        epochs = _number(round(last["epoch"], 2)) if "epoch" in last else _ABSENT
        if type(planned := run.facts.get("num_epochs")) is int and "epoch" in last:
            epochs += f" of {planned}"
        speeds = [row["images_per_second"] for row in run.rows if "images_per_second" in row]
        lines.append(
            [
                joined(chart.swatch(styles[run.group]), run.label),
                *(_last(run.rows, key) for key in keys),
                epochs,
                str(last["step"]),
                _duration(run),
                _number(round(statistics.median(speeds))) if speeds else _ABSENT,
            ]
        )
    return joined(
        element(
            "p",
            "Of the last evaluation, not the best one. Time is that of the steps alone, from their "
            "images a second, without evaluations; images/s is the median.",
        ),
        _table(heads, lines, "last test errors", numbers=range(1, len(heads))),
    )


def _last(rows: Sequence[dict[str, float]], key: str) -> Markup:
    found = [row for row in rows if key in row]
    if not found:
        return element("span", "none yet")
    row = found[-1]
    if row["step"] == rows[-1]["step"]:
        return element("b", f"{row[key]:.2f}")
    when = f"epoch {_number(round(row['epoch'], 2))}" if "epoch" in row else f"step {row['step']}"
    return joined(element("b", f"{row[key]:.2f}"), element("small", f"after {when}"))


def _duration(run: Run) -> str:
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


def settings(runs: Sequence[Run]) -> Markup:
    """What config.json says of each run: what differs side by side, and the rest folded away."""
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
    names.sort(key=lambda name: name == "workdir")  # which the labels tell already
    same, differing = [], []
    for name in names:
        values = [json.dumps(run.facts[name]) if name in run.facts else "" for run in runs]
        shown = [_exact(run.facts[name]) if name in run.facts else _ABSENT for run in runs]
        if len(set(values)) == 1:
            same.append([name, shown[0]])
        else:
            pairs = zip(values, shown, strict=True)
            marked = [text if own == values[0] else element("mark", text) for own, text in pairs]
            differing.append([name, *marked])
    parts = []
    if differing:
        parts.append(element("p", "What differs between the runs; marked: unlike the first run."))
        heads, lines = ["setting", *(run.label for run in runs)], differing
        if len(runs) > len(differing):  # the shorter side goes across
            columns = list(map(list, zip(heads, *differing, strict=True)))
            heads, lines = ["run", *columns[0][1:]], columns[1:]
        parts.append(_table(heads, lines, "settings that differ"))
    if same:
        what = "the same in all runs" if len(runs) > 1 else "all"
        summary = element("summary", f"{len(same)} settings and versions, {what}")
        folded = _table(["setting", "value"], same, "settings that are the same")
        parts.append(element("details", summary, folded))
    return joined(*parts)


def results(folders: Sequence[Folder]) -> Markup:
    """The table of each results.json."""
    parts: list[Markup] = []
    for folder in folders:
        if table := folder.results:
            parts.append(element("h3", folder.label))
            parts.append(_values(table, f"results of {folder.label}"))
    return joined(*parts)


def _values(table: Table, label: str) -> Markup:
    numbers = [
        column
        for column in range(len(table.columns))
        if all(type(row[column]) in (int, float, type(None)) for row in table.rows)
    ]
    lines = [
        [
            _ABSENT if value is None else _number(value) if type(value) is float else _exact(value)
            for value in row
        ]
        for row in table.rows
    ]
    return _table(list(map(words, table.columns)), lines, label, numbers=numbers)


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], label: str, *, numbers: Sequence[int] = ()
) -> Markup:
    """A table that scrolls by itself where it is wider than the page."""
    classes = ["number" if column in numbers else "" for column in range(len(heads))]

    def cell(name: str, text: str, column: int, **attributes: str) -> Markup:
        return element(name, text, class_=classes[column] or False, **attributes)

    head = [cell("th", text, column, scope="col") for column, text in enumerate(heads)]
    body = [
        [
            cell("td", text, column) if column else cell("th", text, column, scope="row")
            for column, text in enumerate(row)
        ]
        for row in rows
    ]
    table = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *(element("tr", *cells) for cells in body)),
    )
    return element("div", table, class_="scroll", role="region", aria_label=label, tabindex=0)


def heading(measure: str) -> str:
    """A measure of metrics.jsonl in words; errors are in percent."""
    return words(measure) + (", %" if "error" in measure else "")


def words(name: str) -> str:
    """A name without its underscores."""
    return name.replace("_", " ")


def _exact(value: Any) -> str:
    """A value of a JSON file, text without quotes."""
    return (value or "(empty)") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return f"{value:.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"
