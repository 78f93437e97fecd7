"""Read and write the settings and metrics in a run's folder, its workdir.

Checkpoints, in the same folder, have their own module.
"""

import contextlib
import dataclasses
import fcntl
import fnmatch
import importlib.metadata
import importlib.util
import json
import math
import operator
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from experiments import files
from experiments.errors import InputError
from experiments.files import StrPath

_CONFIG, _METRICS = "config.json", "metrics.jsonl"
_CONFIG_LIMIT, _METRICS_LIMIT = 2**20, 2**30  # bytes


def open_workdir(
    path: StrPath, *, config: Any, data_sha256: str, data: Mapping[str, Any] | None = None
) -> pathlib.Path:
    """Create the folder of a new run, or check that the run in it has the same settings and data.

    Args:
      path: The folder. It may exist if it is empty or holds a run.
      config: The program's Config. Fields with affects_result=False may differ from the run's.
      data_sha256: Digest of the training data.
      data: What else a new run notes of its data; None for nothing.

    Returns:
      The folder.

    Raises:
      InputError: The folder cannot be written, or holds other files or a different run.
    """
    folder = pathlib.Path(path)
    with files.writing(f"workdir {folder}"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"workdir {folder} is a file, not a folder; use another --workdir")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _CONFIG).exists():
            # A start that was interrupted may have left a temporary file.
            partial = files.temporary(f"{_CONFIG}.*")
            names = {entry.name for entry in folder.iterdir()} - {_CONFIG}
            if foreign := {name for name in names if not fnmatch.fnmatchcase(name, partial)}:
                raise InputError(
                    f"workdir {folder} holds files but no run ({min(foreign)}, for one); nothing "
                    "is written over, use another --workdir"
                )
            run = {
                "config": dataclasses.asdict(config),
                "data_sha256": data_sha256,
                "data": data,
                "versions": {name: _version(name) for name in ("jax", "flax", "optax", "capsjax")},
            }
            with contextlib.suppress(FileExistsError):  # another process created it
                files.create(folder / _CONFIG, json.dumps(run, indent=2, allow_nan=False).encode())
        _check_same_run(folder, config, data_sha256)
        for name in ("checkpoints", "figures"):
            (folder / name).mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive(workdir: StrPath) -> Iterator[None]:
    """Lock the folder against training by another process, until the body or this process ends.

    Raises:
      InputError: Another process holds the lock, or there can be none.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Opened for writing, because NFS grants an exclusive lock on no other file.
            file = stack.enter_context(open(pathlib.Path(workdir) / _CONFIG, "r+b"))
        except OSError as error:
            raise InputError(f"workdir {workdir} cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"workdir {workdir} is in use by another process; wait for its end or use "
                "another --workdir"
            ) from error
        except OSError as error:  # a file system without locks
            raise InputError(
                f"workdir {workdir} cannot be locked against another process: {error.strerror}; "
                "use a --workdir on another file system"
            ) from error
        yield


def holds_run(workdir: StrPath) -> bool:
    """Return whether the folder holds a run, which has a config.json."""
    return os.path.isfile(pathlib.Path(workdir) / _CONFIG)


def read_config(workdir: StrPath) -> dict[str, Any]:
    """Read config.json of a run: the keys config, data_sha256, data and versions.

    Raises:
      InputError: The folder holds no run, or its config.json is damaged.
    """
    path = pathlib.Path(workdir) / _CONFIG
    if not holds_run(workdir):
        raise InputError(f"workdir {workdir} holds no run: it has no {_CONFIG}")
    try:
        run = json.loads(files.read(path, limit=_CONFIG_LIMIT))
        if not (isinstance(run["config"], dict) and isinstance(run["data_sha256"], str)):
            raise TypeError("config or data_sha256 is of another type")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is damaged or unreadable ({error!r})") from error
    return run


def read_metrics(workdir: StrPath) -> list[dict[str, Any]]:
    """Read the rows of metrics.jsonl, dropping a last line that a crash left incomplete.

    Raises:
      InputError: There is no such file, or a line is damaged.
    """
    return [row for row, _ in _parse_metrics(workdir, read_metrics_file(workdir))]


def read_metrics_file(workdir: StrPath) -> bytes:
    """Read metrics.jsonl as it is.

    Raises:
      InputError: There is no such file, or it cannot be read.
    """
    path = pathlib.Path(workdir) / _METRICS
    try:
        return files.read(path, limit=_METRICS_LIMIT)
    except FileNotFoundError:
        raise InputError(
            f"workdir {workdir} has no {_METRICS}: nothing was trained there yet"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _parse_metrics(workdir: StrPath, content: bytes) -> list[tuple[dict[str, Any], bytes]]:
    """Return the rows with their lines, without a last one that is incomplete."""
    found: list[tuple[dict[str, Any], bytes]] = []
    before = -1
    for number, line in enumerate(content.splitlines(keepends=True), 1):
        try:
            row = json.loads(line)
            step = operator.index(row["step"])  # raises TypeError for anything but an integer
            files.json_line(row)  # raises ValueError for NaN
            if step <= before:
                raise ValueError(f"step {step} follows step {before}")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if not line.endswith(b"\n"):
                break
            path = pathlib.Path(workdir) / _METRICS
            raise InputError(f"{path} is damaged at line {number} ({error!r})") from error
        found.append((row, line))
        before = step
    return found


def has_metrics(workdir: StrPath) -> bool:
    """Return whether the folder has a metrics.jsonl."""
    return (pathlib.Path(workdir) / _METRICS).exists()


def last_step(workdir: StrPath) -> int:
    """Return the step of the last row of metrics.jsonl, or 0 without rows.

    Raises:
      InputError: A line is damaged.
    """
    rows = read_metrics(workdir) if has_metrics(workdir) else []
    return rows[-1]["step"] if rows else 0


def training_seconds(rows: Sequence[Mapping[str, float]], batch_size: int) -> float:
    """Return the training time of a run in seconds, excluding evaluation.

    Args:
      rows: Rows of metrics.jsonl. `images_per_second` of a row is the speed since the row before.
      batch_size: Images in a step.
    """
    steps = [0, *(row["step"] for row in rows)]
    return sum(
        (after - before) * batch_size / row["images_per_second"]
        for before, after, row in zip(steps[:-1], steps[1:], rows, strict=True)
    )


class Metrics:
    """Append rows to metrics.jsonl; each is on disk before `write` returns."""

    def __init__(self, workdir: StrPath, *, step: int, tensorboard: bool = False):
        """Open the file and drop the rows after `step`, because a resumed run writes them again.

        Args:
          workdir: The folder of the run.
          step: The step that the run continues from, 0 for a new run.
          tensorboard: Also write TensorBoard files to tensorboard/ in the folder.

        Raises:
          InputError: The file is damaged or cannot be written, or tensorboardX is missing.
        """
        if tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise InputError("--tensorboard needs tensorboardX: pip install 'capsjax[tensorboard]'")
        self._path = pathlib.Path(workdir) / _METRICS
        self._summaries = None
        content = read_metrics_file(workdir) if has_metrics(workdir) else b""
        kept = [line for row, line in _parse_metrics(workdir, content) if row["step"] <= step]
        with files.writing(self._path):
            files.remove_temporaries(self._path)
            files.write(self._path, b"".join(line.removesuffix(b"\n") + b"\n" for line in kept))
        if tensorboard:
            import tensorboardX

            folder = os.fspath(pathlib.Path(workdir) / "tensorboard")
            with files.writing(folder):
                self._summaries = tensorboardX.SummaryWriter(folder, purge_step=step + 1)
        with files.writing(self._path):
            # Unbuffered, so that closing writes nothing and cannot fail.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

    def write(self, row: Mapping[str, float | int]) -> None:
        """Append one row of finite values; `step` is required.

        Raises:
          InputError: The file cannot be written, for example because the disk is full.
        """
        step = row["step"]
        if not isinstance(step, int):
            raise TypeError(f"Metrics.write: step must be an int, got {step!r}")
        for name, value in row.items():
            if not math.isfinite(value):
                raise ValueError(f"Metrics.write: {name} must be finite, got {value}")
        with files.writing(self._path):
            files.append(self._file, files.json_line(row))
            os.fsync(self._file.fileno())
        if self._summaries is not None:
            for name, value in row.items():
                if name != "step":
                    self._summaries.add_scalar(name, value, step)
            self._summaries.flush()

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._summaries is not None:
            self._summaries.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_same_run(folder: pathlib.Path, config: Any, data_sha256: str) -> None:
    run = read_config(folder)
    here = {**dataclasses.asdict(config), "data_sha256": data_sha256}
    added = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.metadata.get("added", False)
    }
    there = {**added, **run["config"], "data_sha256": run["data_sha256"]}
    free = {
        field.name
        for field in dataclasses.fields(config)
        if not field.metadata.get("affects_result", True)
    }
    absent = "absent"
    differing = [
        f"{name} {there.get(name, absent)} there, {here.get(name, absent)} here"
        for name in here | there
        if name not in free and (name in here, here.get(name)) != (name in there, there.get(name))
    ]
    if differing:
        raise InputError(
            f"workdir {folder} holds a run with other settings: {'; '.join(differing)}; "
            "use another --workdir"
        )


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a clone that was not installed
        return "not installed"
