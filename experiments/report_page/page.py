"""The page of a report: tables, curves and figures, as one HTML text."""

import pathlib
from collections.abc import Sequence

from experiments.report_page.curves import curves
from experiments.report_page.markup import Markup, element, joined
from experiments.report_page.tables import errors, results, settings, words
from experiments.report_page.workdirs import Folder, Run

# Nothing is fetched or run even if a text should not be escaped somewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(runs: Sequence[Run], folders: Sequence[Folder]) -> str:
    """The whole page; the same runs and folders make the same text."""
    styles = {group: k for k, group in enumerate(dict.fromkeys(run.group for run in runs))}
    sections = [
        ("errors", "Last test errors", errors(runs, styles)),
        ("settings", "Settings and versions", settings(runs)),
        ("curves", "Learning curves", curves(runs, styles)),
        ("results", "Results", results(folders)),
        ("figures", "Figures", _figures(folders)),
    ]
    shown = [section for section in sections if section[2]]
    title = f"capsjax: {what(runs)}"
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


def what(runs: Sequence[Run]) -> str:
    """What a page shows, in two words at most: so many runs, or results without a run."""
    return f"{len(runs)} run{'s' * (len(runs) > 1)}" if runs else "results"


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
            element("h3", words(pathlib.PurePath(name).stem)),
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
