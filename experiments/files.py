"""Write whole files atomically: a crash leaves the old file or the new one, never a part of it."""

import contextlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from experiments.errors import InputError

if TYPE_CHECKING:  # matplotlib is slow to import, and most programs draw nothing
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]


def write(path: pathlib.Path, content: bytes) -> None:
    """Create or replace a file, atomically and durably."""
    partial = path.with_name(temporary(path.name))
    partial.write_bytes(content)
    fsync(partial)
    partial.replace(path)
    fsync(path.parent)


def create(path: pathlib.Path, content: bytes) -> None:
    """Create a file, atomically and durably; if several processes do, one succeeds.

    Raises:
      FileExistsError: The file exists; it is left unchanged.
    """
    partial = path.with_name(temporary(f"{path.name}.{os.getpid()}"))
    try:
        partial.write_bytes(content)
        fsync(partial)
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: pathlib.Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(name: str) -> str:
    """Return the name of the temporary file that is renamed to `name` once it is complete."""
    return f".{name}.tmp"


def system_error(error: Exception) -> str | None:
    """Return the operating system's message if it caused an error, else None."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore reports a full disk as a ValueError whose text contains the error code.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else None


@contextlib.contextmanager
def writing(what: StrPath) -> Iterator[None]:
    """Turn an OSError of the body into an InputError that names `what` was being written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} cannot be written: {system_error(error)}") from error


def save_figure(figure: "Figure", path: StrPath) -> None:
    """Write a figure as a PNG file of 150 dots an inch; create its folder if missing."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())


def write_json(path: StrPath, value: Any) -> None:
    """Write a value as JSON; create the folder if missing."""
    write_bytes(path, f"{json.dumps(value, indent=2, allow_nan=False)}\n".encode())


def write_bytes(path: StrPath, content: bytes) -> None:
    """Write a file; create its folder if missing.

    Raises:
      InputError: The file cannot be written.
    """
    with writing(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(pathlib.Path(path), content)


def append_lines(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a file of JSON lines, not atomically; create its folder if missing.

    Raises:
      InputError: The file cannot be written.
    """
    with writing(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(b"".join(json_line(row) for row in rows))


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as one line of JSON; raise ValueError for NaN and infinity."""
    return json.dumps(dict(row), allow_nan=False).encode() + b"\n"
