"""Helpers for the tests of the report: they write runs, run the program and parse the page."""

import html.parser
import json

import in_process
from matplotlib.figure import Figure

from experiments import files, report

HOSTILE = "<script>document.title='x'</script>\"'&lt;"
ABSENT = "\N{EN DASH}"
_VOID = {"img", "input", "meta", "wbr"}


def report_program(tmp_path, monkeypatch, capsys):
    """Return a function that runs the program in `tmp_path`: exit status and stderr."""
    monkeypatch.chdir(tmp_path)

    def program(*workdirs, **flags):
        flags = {"workdirs": ",".join(workdirs), **flags}
        status, _, stderr = in_process.run(report, flags, monkeypatch, capsys)
        return status, stderr

    return program


def write_run(path, *, settings=None, rows=None, figures=(), results=None, versions="0.10.2"):
    """Write a run of two epochs to a new folder."""
    path.mkdir(parents=True)
    config = {"dataset": "mnist_small", "batch_size": 64, "num_epochs": 4, "seed": 0}
    run = {
        "config": config | {"workdir": str(path)} | (settings or {}),
        "data_sha256": "da7a",
        "versions": {"jax": versions},
    }
    (path / "config.json").write_text(json.dumps(run))
    write_rows(path, metrics() if rows is None else rows)
    for name in figures:
        write_figure(path, name)
    if results is not None:
        (path / "results.json").write_text(json.dumps(results))
    return path


def metrics(*, epochs=2, errors=(1.5, 2.25)):
    """Return two rows per epoch, of one second each at batch size 64; the second is evaluated."""
    rows = []
    for epoch in range(1, epochs + 1):
        for half in (0.5, 0):
            rows.append(
                {
                    "step": round(100 * (epoch - half)),
                    "epoch": epoch - half,
                    "train_loss": 1 / (epoch - half),
                    "train_error": 0.0 if not half else 40 / epoch,
                    "images_per_second": 3200.0,
                }
            )
        rows[-1] |= {"test_loss": 0.5 / epoch, "test_error": errors[(epoch - 1) % len(errors)]}
    return rows


def write_rows(path, rows):
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_figure(path, name, *, size=(2, 1), folder="figures"):
    figure = Figure(size)
    figure.text(0.5, 0.5, "Here", ha="center")
    files.save_figure(figure, path / folder / name)


def write_experiment(path, *figures, results):
    """Write the output of a program that trains nothing: results.json with figures beside it."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "results.json").write_text(json.dumps(results))
    for name in figures:
        write_figure(path, name, folder=".")
    return path


class Element:
    """An HTML element with its attributes and children."""

    def __init__(self, tag, attributes):
        """Start without children."""
        self.tag, self.attributes, self.children = tag, attributes, []

    @property
    def text(self):
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, *tags):
        """Yield the descendants with one of these tags, in document order."""
        for child in self.children:
            if isinstance(child, Element):
                if child.tag in tags:
                    yield child
                yield from child.all(*tags)

    def section(self, key):
        (found,) = [part for part in self.all("section") if part.attributes["id"] == key]
        return found


def parse(page):
    """Parse a page into elements and checks that every tag is closed in its place."""
    parser = _Parser()
    parser.feed(page)
    parser.close()
    assert [element.tag for element in parser.open] == ["page"]
    return parser.open[0]


def cells(table):
    """Return the text of each cell of a table, including its head."""
    return [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")]


class _Parser(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open = [Element("page", {})]

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in _VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)
