"""The folder of a run: its settings, metrics, figures and results. Checkpoints are beside this."""

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


def open_workdir(path: StrPath, *, config: Any, data_sha256: str) -> pathlib.Path:
    """Makes the folder of a run, or checks that the run in it is the same one.

    Args:
      path: the folder; it may exist if it is empty or holds a run.
      config: the program's Config. Fields with affects_result=False may differ from the run's.
      data_sha256: the digest of the data that the run trains on.

    Returns:
      The folder.

    Raises:
      InputError: it cannot be written, holds other files, or a run with other settings or data.
    """
    folder = pathlib.Path(path)
    with files.writing(f"workdir {folder}"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"workdir {folder} is a file, not a folder; use another --workdir")
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _CONFIG).exists():
            # A start that was stopped may have left the temporary file, and nothing else.
            begun = files.temporary(f"{_CONFIG}.*")
            names = {entry.name for entry in folder.iterdir()} - {_CONFIG}
            if foreign := {name for name in names if not fnmatch.fnmatchcase(name, begun)}:
                raise InputError(
                    f"workdir {folder} holds files but no run ({min(foreign)}, for one); nothing "
                    "is written over, use another --workdir"
                )
            run = {
                "config": dataclasses.asdict(config),
                "data_sha256": data_sha256,
                "versions": {name: _version(name) for name in ("jax", "flax", "optax", "capsjax")},
            }
            with contextlib.suppress(FileExistsError):  # another process was faster
                files.create(folder / _CONFIG, json.dumps(run, indent=2, allow_nan=False).encode())
        _check_same_run(folder, config, data_sha256)
        for name in ("checkpoints", "figures"):
            (folder / name).mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive(workdir: StrPath) -> Iterator[None]:
    """Inside, no other process trains in this folder; the lock ends with the process, however.

    Raises:
      InputError: Another process does already.
    """
    # For writing, though nothing is written: NFS locks no other file for one process alone.
    with open(pathlib.Path(workdir) / _CONFIG, "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"workdir {workdir} is in use by another process; wait for its end or use "
                "another --workdir"
            ) from error
        yield


def holds_run(workdir: StrPath) -> bool:
    """Whether `open_workdir` was here."""
    return os.path.isfile(pathlib.Path(workdir) / _CONFIG)


def read_config(workdir: StrPath) -> dict[str, Any]:
    """Reads what `open_workdir` wrote: the keys config, data_sha256 and versions.

    Raises:
      InputError: the folder holds no run, or its config.json is damaged.
    """
    path = pathlib.Path(workdir) / _CONFIG
    if not holds_run(workdir):
        raise InputError(f"workdir {workdir} holds no run: it has no {_CONFIG}")
    try:
        run = json.loads(path.read_bytes())
        if not (isinstance(run["config"], dict) and isinstance(run["data_sha256"], str)):
            raise TypeError("config or data_sha256 is of another type")
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"{path} is damaged or unreadable ({error!r})") from error
    return run


def read_metrics(workdir: StrPath) -> list[dict[str, Any]]:
    """Reads the rows of metrics.jsonl, without a last line that was torn by a crash.

    Raises:
      InputError: there is no such file, or a line is damaged.
    """
    path = pathlib.Path(workdir) / _METRICS
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        raise InputError(
            f"workdir {workdir} has no {_METRICS}: nothing was trained there yet"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            operator.index(row["step"])  # raises on anything but an integer,
            files.json_line(row)  # and this on NaN
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if not line.endswith(b"\n"):
                break
            raise InputError(f"{path} is damaged at line {number} ({error!r})") from error
        rows.append(row)
    return rows


def last_step(workdir: StrPath) -> int:
    """The step of the last row of metrics.jsonl; 0 without rows.

    Raises:
      InputError: a line is damaged.
    """
    rows = read_metrics(workdir) if (pathlib.Path(workdir) / _METRICS).exists() else []
    return rows[-1]["step"] if rows else 0


def training_seconds(rows: Sequence[Mapping[str, float]], batch_size: int) -> float:
    """What the steps of a run took, evaluation apart: a row has their speed since the one before.

    Args:
      rows: those of metrics.jsonl, with `step` and `images_per_second`.
      batch_size: images in a step.
    """
    steps = [0, *(row["step"] for row in rows)]
    return sum(
        (after - before) * batch_size / row["images_per_second"]
        for before, after, row in zip(steps[:-1], steps[1:], rows, strict=True)
    )


class Metrics:
    """Appends rows to metrics.jsonl, each on disk before `write` returns."""

    def __init__(self, workdir: StrPath, *, step: int, tensorboard: bool = False):
        """Opens the file and drops the rows after `step`: a resumed run writes them again.

        Args:
          workdir: the folder of the run.
          step: the step that the run goes on from, 0 for a new one.
          tensorboard: also write TensorBoard files, into the folder's tensorboard/.

        Raises:
          InputError: the file is damaged or cannot be written, or tensorboardX is missing.
        """
        if tensorboard and importlib.util.find_spec("tensorboardX") is None:
            raise InputError("--tensorboard needs tensorboardX: pip install 'capsjax[tensorboard]'")
        self._path = pathlib.Path(workdir) / _METRICS
        self._summaries = None
        rows = read_metrics(workdir) if self._path.exists() else []
        with files.writing(self._path):
            files.write(
                self._path, b"".join(files.json_line(row) for row in rows if row["step"] <= step)
            )
        if tensorboard:
            import tensorboardX

            folder = os.fspath(pathlib.Path(workdir) / "tensorboard")
            with files.writing(folder):
                self._summaries = tensorboardX.SummaryWriter(folder, purge_step=step + 1)
        with files.writing(self._path):
            # Without a buffer, closing has nothing left to write and cannot fail.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115

    def write(self, row: Mapping[str, float | int]) -> None:
        """Appends one row; `step` must be among its finite values.

        Raises:
          InputError: the disk is full, or the like.
        """
        step = row["step"]
        if not isinstance(step, int):
            raise TypeError(f"Metrics.write: step must be an int, got {step!r}")
        for name, value in row.items():
            if not math.isfinite(value):
                raise ValueError(f"Metrics.write: {name} must be finite, got {value}")
        left = files.json_line(row)
        with files.writing(self._path):
            while left:
                left = left[self._file.write(left) :]
            os.fsync(self._file.fileno())
        if self._summaries is not None:
            for name, value in row.items():
                if name != "step":
                    self._summaries.add_scalar(name, value, step)
            self._summaries.flush()

    def close(self) -> None:
        """Closes the files; everything written is on disk already."""
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
    there = {**run["config"], "data_sha256": run["data_sha256"]}
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
    except importlib.metadata.PackageNotFoundError:  # a program run from a clone
        return "not installed"
