"""Read the input of a report: runs, and the results and figures of runs and of experiments.

The files may come from somebody else. Each kind of file has a size limit, and a file that is not
in the format that the programs write raises an InputError that names it.
"""

import base64
import contextlib
import io
import json
import os
import pathlib
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from PIL import Image

from experiments.errors import InputError
from experiments.training import checkpoints, records

_MIB = 2**20
_CONFIG, _METRICS, _RESULTS = "config.json", "metrics.jsonl", "results.json"
_LIMITS = {_CONFIG: _MIB // 8, _METRICS: 64 * _MIB, _RESULTS: _MIB}
_FIGURE_LIMIT, _FIGURES_LIMIT = 16 * _MIB, 128 * _MIB
_PIXELS = 30_000_000  # of one figure; a browser needs four bytes for each
_MEASURES, _CELLS = 100, 50_000
_FORMATS = ("PNG", "GIF")


class Run(NamedTuple):
    """The settings and metrics of one run."""

    label: str  # the path of its folder, relative to the parent of all folders in the report
    facts: dict[str, Any]  # settings and the rest of config.json, flattened: "versions.jax"
    rows: list[dict[str, float]]  # the rows of metrics.jsonl, at least one

    @property
    def group(self) -> str:
        """The label without a seed at its end, which runs of different seeds share."""
        return re.sub(r"/seed_\d+$", "", self.label)


class Results(NamedTuple):
    """A results.json as a table of JSON values, with None for absent ones."""

    columns: list[str]
    rows: list[list[Any]]


class Picture(NamedTuple):
    """An image file as a data URI, with its size in pixels."""

    name: str
    uri: str
    width: int
    height: int


class Folder(NamedTuple):
    """Results and figures in the folder of a run, of several runs or of an experiment."""

    label: str
    results: Results | None
    pictures: list[Picture]


def read(workdirs: Sequence[str]) -> tuple[list[Run], list[Folder]]:
    """Read runs, and every folder that may hold their results or figures.

    Args:
      workdirs: folders. Each holds a run, or runs one or two levels below it, or no run but a
        results.json.

    Returns:
      The runs, and the folders: those of the runs and those between them and `workdirs`.

    Raises:
      InputError: a folder is missing, is named twice, or holds neither runs nor results; a run has
        no metrics yet; a file is damaged, too large or unreadable.
    """
    runs: list[Run] = []
    folders: dict[pathlib.Path, Folder] = {}
    seen: set[pathlib.Path] = set()
    with _reading():
        found = [(root, _find(root)) for root in map(pathlib.Path, workdirs)]
        outer = [
            os.path.join(root, ".." if paths in ([root], []) else ".") for root, paths in found
        ]
        base = os.path.commonpath(map(os.path.abspath, outer))
        for root, paths in found:
            for path in paths or [root]:
                if path.resolve() in seen:
                    what = "run" if paths else "folder"
                    raise InputError(f"--workdirs names the {what} {path} twice")
                seen.add(path.resolve())
                if paths:
                    runs.append(_read_run(path, _label(path, base)))
                for folder in reversed([path, *path.parents]):
                    if folder.is_relative_to(root) and folder not in folders:
                        folders[folder] = _read_folder(folder, _label(folder, base))
    total = sum(len(picture.uri) for folder in folders.values() for picture in folder.pictures)
    if total > _FIGURES_LIMIT:
        raise InputError(
            f"the figures would make a page of {total // _MIB} MiB, more than "
            f"{_FIGURES_LIMIT // _MIB}; pass fewer --workdirs"
        )
    return runs, list(folders.values())


def measures(runs: Iterable[Run]) -> list[str]:
    """Return the names of all logged measures, in order of first appearance."""
    return list(dict.fromkeys(name for run in runs for row in run.rows for name in row))


def _as_table(value: Any) -> Results:
    """Convert parsed JSON to a table.

    A list of objects gives a row per object, an object of objects a row per object with its name,
    and any other object a row per name and value.

    Raises:
      ValueError: the value has another form, or is too large.
    """
    if not (value and isinstance(value, dict | list)):
        raise ValueError("it must hold a non-empty object or list of objects")
    _check_depth(value)
    rows = list(value.values()) if isinstance(value, dict) else value
    if all(isinstance(row, dict) for row in rows):
        rows = list(map(_flat, rows))
        columns = list(dict.fromkeys(key for row in rows for key in row))
        if len(rows) * len(columns) > _CELLS:
            raise ValueError(f"its table would have more than {_CELLS} cells")
        cells = [[row.get(key) for key in columns] for row in rows]
        if isinstance(value, list):
            return Results(columns, cells)
        return Results(
            ["", *columns], [[name, *own] for name, own in zip(value, cells, strict=True)]
        )
    if isinstance(value, list):
        raise ValueError("every item of its list must be an object")
    return Results(["name", "value"], [list(item) for item in _flat(value).items()])


def _label(path: pathlib.Path, base: str) -> str:
    absolute = os.path.abspath(path)
    return os.path.basename(base) if absolute == base else os.path.relpath(absolute, base)


def _find(root: pathlib.Path) -> list[pathlib.Path]:
    """Return the folders of the runs in `root`, in natural order; none if it only has results."""
    if not os.path.isdir(root):
        what = "is a file, not a folder" if os.path.exists(root) else "does not exist"
        raise InputError(f"workdir {root} {what}")
    if (root / _CONFIG).exists():
        return [root]
    paths = [path.parent for depth in ("*", "*/*") for path in root.glob(f"{depth}/{_CONFIG}")]
    if not (paths or (root / _RESULTS).exists()):
        raise InputError(
            f"workdir {root} holds no run and no results: neither it nor a subfolder has "
            f"{_CONFIG}, and it has no {_RESULTS}"
        )
    return sorted(paths, key=_natural)


def _flat(value: dict[str, Any]) -> dict[str, Any]:
    """Flatten one level of nesting: {"versions": {"jax": 1}} becomes {"versions.jax": 1}."""
    flat: dict[str, Any] = {}
    for name, own in value.items():
        flat |= (
            {f"{name}.{key}": v for key, v in own.items()} if isinstance(own, dict) else {name: own}
        )
    return flat


def _check_depth(value: Any, deepest: int = 10) -> None:
    """Raise ValueError for nesting that could overflow the stack in `json.dumps`."""
    if isinstance(value, dict | list):
        if not deepest:
            raise ValueError("it is nested more than 10 deep")
        for own in value.values() if isinstance(value, dict) else value:
            _check_depth(own, deepest - 1)


def _natural(path: pathlib.Path) -> list[tuple[int, str]]:
    """Sort seed_10 after seed_9."""
    pieces = re.findall(r"[0-9]+|[^0-9]+", str(path))
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in pieces]


def _read_run(path: pathlib.Path, label: str) -> Run:
    _check_size(path / _CONFIG, _LIMITS[_CONFIG])
    said = records.read_config(path)
    try:
        _check_depth(said)
    except ValueError as error:
        raise InputError(f"{path / _CONFIG} is damaged: {error}") from error
    facts = _flat(said.pop("config") | said)
    if (path / _METRICS).exists():
        _check_size(path / _METRICS, _LIMITS[_METRICS])
    checkpoints.check_metrics(path)
    rows = records.read_metrics(path)
    if not rows:
        raise InputError(f"workdir {path} has no metrics yet: metrics.jsonl is empty")
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            if type(value) not in (int, float) or abs(value) > 1e100:
                raise InputError(
                    f"{path / _METRICS} is damaged at line {number}: {name!r} must be a number "
                    f"up to 1e100, got {str(value)[:40]!r}"
                )
    if len(names := {name for row in rows for name in row}) > _MEASURES:
        raise InputError(f"{path / _METRICS} has {len(names)} measures, more than {_MEASURES}")
    return Run(label, facts, rows)


def _read_folder(folder: pathlib.Path, label: str) -> Folder:
    results, figures = folder / _RESULTS, folder / "figures"
    named = _pictures(figures) if figures.is_dir() else []
    if has_results := results.exists():
        named += _pictures(folder)
    table = _read_results(results) if has_results else None
    return Folder(label, table, [_read_picture(path) for path in named])


def _pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the image files directly in a folder, in natural order."""
    named = [path for path in folder.iterdir() if path.suffix.lower() in (".png", ".gif")]
    return sorted(named, key=_natural)


def _read_results(path: pathlib.Path) -> Results:
    content = _read_bytes(path, _LIMITS[_RESULTS])
    try:
        return _as_table(json.loads(content, parse_constant=_refuse))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged or has another format: {error}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_picture(path: pathlib.Path) -> Picture:
    content = _read_bytes(path, _FIGURE_LIMIT)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                kind, (width, height) = str(image.format).lower(), image.size
                if width * height > _PIXELS:
                    raise ValueError(f"{width} x {height} pixels exceed the limit of {_PIXELS}")
                image.load()
    except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError) as error:
        raise InputError(f"{path} is not a valid PNG or GIF: {error}") from error
    uri = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(path.name, uri, width, height)


def _read_bytes(path: pathlib.Path, limit: int) -> bytes:
    _check_size(path, limit)
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _check_size(path: pathlib.Path, limit: int) -> None:
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    if (size := path.stat().st_size) > limit:
        raise InputError(
            f"{path} is too large for a report: {size / _MIB:.1f} MiB, more than {limit / _MIB:g}"
        )


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Convert operating system errors to an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
