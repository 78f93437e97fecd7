"""Write whole files atomically: a crash leaves the old file or the new one, never a part of it."""

import contextlib
import errno
import io
import json
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from experiments.errors import InputError

if TYPE_CHECKING:  # matplotlib is slow to import, and most programs draw nothing
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]


def write(path: pathlib.Path, content: bytes) -> None:
    """Create or replace a file, atomically and durably; write into a device or a pipe."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        path.write_bytes(content)  # replacing /dev/null would take it from everybody
        return
    with _partial(path, content) as partial:
        partial.replace(path)
    fsync(path.parent)


def create(path: pathlib.Path, content: bytes) -> None:
    """Create a file, atomically and durably; if several processes do, one succeeds.

    Raises:
      FileExistsError: The file exists; it is left unchanged.
    """
    with _partial(path, content) as partial:
        try:
            os.link(partial, path)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            partial.replace(path)
    fsync(path.parent)


@contextlib.contextmanager
def _partial(path: pathlib.Path, content: bytes) -> Iterator[pathlib.Path]:
    """Write a temporary file beside `path`, on disk at the start of the body and gone at its end.

    Its name is this call's own, and nothing that exists is opened, so that neither another writer
    nor a link made by somebody else gets what belongs to this file.
    """
    unique = f"{os.getpid()}.{secrets.token_hex(4)}"
    # Beside a name as long as a file system allows, the temporary one must not be longer.
    stem = path.name.encode(errors="surrogateescape")[:100].decode(errors="ignore")
    partial = path.with_name(temporary(f"{stem}.{unique}"))
    try:
        with open(partial, "xb", buffering=0) as file:
            _write_all(file, content)
            os.fsync(file.fileno())
        if path.is_file():  # a replaced file keeps who may read it
            partial.chmod(path.stat().st_mode & 0o7777)
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def remove_temporaries(path: pathlib.Path) -> None:
    """Remove what killed writers of a file left; its only writer may call this."""
    for left in path.parent.glob(temporary(f"{path.name}.*")):
        left.unlink(missing_ok=True)


def fsync(path: pathlib.Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def temporary(name: str) -> str:
    """Return the name of a temporary file that is renamed once it is complete."""
    return f".{name}.tmp"


def read(path: pathlib.Path, *, limit: int) -> bytes:
    """Read a file that may come from somebody else, of at most `limit` bytes.

    Raises:
      OSError: It is no regular file (reading a pipe would wait for ever), or is larger.
    """
    # Opening a pipe must not wait either; on a file the flag does nothing.
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | os.O_NONBLOCK)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        content = file.read(limit + 1)
    if len(content) > limit:
        reason = f"it is larger than {limit / 2**20:g} MiB"
        raise OSError(errno.EFBIG, reason, os.fspath(path))
    return content


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
    """Append rows to a file of JSON lines, all or none; create its folder if missing.

    Raises:
      InputError: The file cannot be written.
    """
    content = b"".join(json_line(row) for row in rows)
    with writing(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            append(file, content)


def append(file: io.FileIO, content: bytes) -> None:
    """Append to an unbuffered file, and where a write fails, take back the part that was written.

    Raises:
      OSError: The content cannot be written.
    """
    is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    end = os.fstat(file.fileno()).st_size
    try:
        _write_all(file, content)
    except OSError:
        if is_file:
            file.truncate(end)
        raise


def _write_all(file: io.FileIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def json_line(row: Mapping[str, Any]) -> bytes:
    """Return a row as one line of JSON; raise ValueError for NaN and infinity."""
    return json.dumps(dict(row), allow_nan=False).encode() + b"\n"
