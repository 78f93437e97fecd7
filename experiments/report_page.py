"""The page of a report: tables, curves and figures of runs, as one HTML text."""

import collections
import json
import pathlib
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from experiments import report_chart
from experiments.markup import Markup, element, joined
from experiments.report_chart import Curve
from experiments.report_runs import Folder, Run, Table

# Nothing is fetched or run even if a text should not be escaped somewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_ABSENT = "\N{EN DASH}"
_UNDRAWN = {"step", "epoch", "images_per_second"}


def page(runs: Sequence[Run], folders: Sequence[Folder]) -> str:
    """The whole page; the same runs make the same text."""
    styles = {group: k for k, group in enumerate(dict.fromkeys(run.group for run in runs))}
    sections = [
        ("errors", "Last test errors", _errors(runs, styles)),
        ("settings", "Settings and versions", _settings(runs)),
        ("curves", "Learning curves", _curves(runs, styles)),
        ("results", "Results", _results(folders)),
        ("figures", "Figures", _figures(folders)),
    ]
    shown = [section for section in sections if section[2]]
    title = f"capsjax: {len(runs)} run{'s' * (len(runs) > 1)}"
    style = (pathlib.Path(__file__).parent / "report.css").read_text()
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(style)),
    )
    body = element(
        "body",
        element("h1", title),
        element("nav", *(element("a", name, href=f"#{key}") for key, name, _ in shown)),
        *(element("section", element("h2", name), body, id=key) for key, name, body in shown),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def _errors(runs: Sequence[Run], styles: dict[str, int]) -> Markup:
    """A row a run: the newest value of each test error, however good an older one was."""
    measures = list(dict.fromkeys(key for run in runs for row in run.rows for key in row))
    errors = [key for key in measures if key.startswith("test_") and "error" in key]
    heads = ["run", *(f"{_words(key)}, %" for key in errors or ["test_error"])]
    heads += ["epochs", "steps", "training time", "images/s"]
    lines = []
    for run in runs:
        last = run.rows[-1]
        epochs = _number(round(last["epoch"], 2)) if "epoch" in last else _ABSENT
        if type(planned := run.facts.get("num_epochs")) is int and "epoch" in last:
            epochs += f" of {planned}"
        speeds = [row["images_per_second"] for row in run.rows if "images_per_second" in row]
        lines.append(
            [
                joined(report_chart.swatch(styles[run.group]), run.label),
                *(_last(run.rows, key) for key in errors or ["test_error"]),
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
    """The time of all steps: each row has the speed since the one before it."""
    batch_size = run.facts.get("batch_size")
    if type(batch_size) is not int or not all(row.get("images_per_second") for row in run.rows):
        return _ABSENT
    steps = [0, *(row["step"] for row in run.rows)]
    seconds = sum(
        (after - before) * batch_size / row["images_per_second"]
        for before, after, row in zip(steps, steps[1:], run.rows, strict=False)
    )
    if not 0 <= seconds < 1e10:  # steps or speeds that no run has
        return _ABSENT
    minutes, left = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {left} s" if minutes else f"{left} s"
    return f"{minutes // 60} h {minutes % 60} min"


def _settings(runs: Sequence[Run]) -> Markup:
    names = list(dict.fromkeys(name for run in runs for name in run.facts))
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
        heads = ["setting", *(run.label for run in runs)]
        parts.append(_table(heads, differing, "settings that differ"))
    if same:
        what = "the same in all runs" if len(runs) > 1 else "all"
        summary = element("summary", f"{len(same)} settings and versions, {what}")
        table = _table(["setting", "value"], same, "settings that are the same")
        parts.append(element("details", summary, table))
    return joined(*parts)


def _curves(runs: Sequence[Run], styles: dict[str, int]) -> Markup:
    """A chart a measure, with a curve for each run that has it."""
    across = "epoch" if all("epoch" in row for run in runs for row in run.rows) else "step"
    measures = list(dict.fromkeys(key for run in runs for row in run.rows for key in row))
    parts = ("test", "train")
    measures.sort(key=lambda key: (*(not key.startswith(part) for part in parts), "loss" in key))
    charts = []
    longest = 0
    for measure in measures:
        if measure in _UNDRAWN:
            continue
        points = [
            [(row[across], row[measure]) for row in run.rows if measure in row] for run in runs
        ]
        longest = max(longest, *map(len, points))
        curves = [
            Curve(run.label, styles[run.group], own)
            for run, own in zip(runs, points, strict=True)
            if own
        ]
        title = _words(measure) + (", %" if measure in ("train_error", "test_error") else "")
        charts.append(
            element(
                "figure",
                element("figcaption", title),
                report_chart.chart(curves, across=across, measure=_words(measure)),
            )
        )
    if not charts:
        return Markup()
    notes = ["Scales that span more than a factor of 10 are logarithmic."]
    if longest > report_chart.DRAWN:
        notes.append(f"Of a curve of more than {report_chart.DRAWN} points some are left out.")
    return joined(
        element("p", " ".join(notes)),
        element("ul", *_legend(runs, styles), class_="legend"),
        element("div", *charts, class_="charts many" if len(runs) > 6 else "charts"),
    )


def _legend(runs: Sequence[Run], styles: dict[str, int]) -> Iterator[Markup]:
    sizes = collections.Counter(run.group for run in runs)
    for group, style in styles.items():
        text = f"{group} ({sizes[group]} seeds)" if sizes[group] > 1 else group
        yield element("li", report_chart.swatch(style), text)


def _results(folders: Sequence[Folder]) -> Markup:
    parts: list[Markup] = []
    for folder in folders:
        if table := folder.results:
            parts.append(element("h3", folder.label))
            parts.append(_values(table, f"results of {folder.label}"))
    return joined(*parts)


def _figures(folders: Sequence[Folder]) -> Markup:
    """A row a name, with that figure of each folder that has it."""
    named: dict[str, list[Markup]] = {}
    for folder in folders:
        for picture in folder.pictures:
            what = f"{picture.name} of {folder.label}"
            image = element(
                "img", src=picture.uri, alt=what, width=picture.width, height=picture.height
            )
            box = element("input", type="checkbox", aria_label=f"{what} in its own size")
            caption = element("figcaption", folder.label)
            figure = element("figure", caption, element("label", box, image))
            named.setdefault(picture.name, []).append(figure)
    rows = [
        element(
            "div",
            element("h3", _words(pathlib.PurePath(name).stem)),
            element("div", *figures, class_="row"),
        )
        for name, figures in named.items()
    ]
    if not rows:
        return Markup()
    alone = all(len(figures) == 1 for figures in named.values())
    return joined(
        element(
            "p", "A click, a tap or the space key shows a figure in its own size.", class_="hint"
        ),
        element("div", *rows, class_="single" if alone else False),
    )


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
    return _table(list(map(_words, table.columns)), lines, label, numbers=numbers)


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


def _words(name: str) -> str:
    return name.replace("_", " ")


def _exact(value: Any) -> str:
    """A value of a JSON file, text without quotes."""
    return (value or "(empty)") if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: float) -> str:
    return f"{value:.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"
