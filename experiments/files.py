"""Writing files so that whatever stops a program leaves the old file or the new one."""

import contextlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from experiments.errors import InputError

if TYPE_CHECKING:  # importing matplotlib takes a while, and most programs draw nothing
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]


def write(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file, in one step and durably."""
    begun = path.with_name(temporary(path.name))
    begun.write_bytes(content)
    fsync(begun)
    begun.replace(path)
    fsync(path.parent)


def create(path: pathlib.Path, content: bytes) -> None:
    """Makes a whole file, durably, if there is none: of several processes one succeeds.

    Raises:
      FileExistsError: There is one, which is left as it is.
    """
    begun = path.with_name(temporary(f"{path.name}.{os.getpid()}"))
    try:
        begun.write_bytes(content)
        fsync(begun)
        try:
            os.link(begun, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            begun.replace(path)
    finally:
        begun.unlink(missing_ok=True)
    fsync(path.parent)


def fsync(path: pathlib.Path) -> None:
    """Waits until a file or a folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(name: str) -> str:
    """The name under which a file is begun."""
    return f".{name}.tmp"


def system_error(error: Exception) -> str | None:
    """What the operating system said, if it is the cause of an error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore reports a full disk as a ValueError with the number in its text.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else None


@contextlib.contextmanager
def writing(what: StrPath) -> Iterator[None]:
    """Inside, an error of the operating system becomes an InputError that names `what`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} cannot be written: {system_error(error)}") from error


def save_figure(figure: "Figure", path: StrPath) -> None:
    """Writes a figure as a PNG file of 150 dots an inch, in a folder that is made if need be."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes(path, buffer.getvalue())


def write_json(path: StrPath, value: Any) -> None:
    """Writes results as JSON, in a folder that is made if need be."""
    write_bytes(path, f"{json.dumps(value, indent=2, allow_nan=False)}\n".encode())


def write_bytes(path: StrPath, content: bytes) -> None:
    """Writes a whole file, in a folder that is made if need be."""
    with writing(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        write(pathlib.Path(path), content)


def append_lines(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a file of JSON lines, in a folder that is made if need be."""
    with writing(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(b"".join(json_line(row) for row in rows))


def json_line(row: Mapping[str, Any]) -> bytes:
    """Returns a row as one line of JSON; a value that is not finite is a ValueError."""
    return json.dumps(dict(row), allow_nan=False).encode() + b"\n"
