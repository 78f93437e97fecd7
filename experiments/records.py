"""All writing of files: the folder of a run, its checkpoints, metrics and figures.

Every file is written to the end, under another name, before it takes its place: whatever stops a
program, what lies there is either the old file or the new one.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import operator
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging

from experiments.errors import InputError

if TYPE_CHECKING:  # importing matplotlib takes a while, and most programs draw nothing
    from matplotlib.figure import Figure

StrPath = str | os.PathLike[str]

_CONFIG, _METRICS, _RECORD = "config.json", "metrics.jsonl", "record.json"


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
    with _writing(f"workdir {folder}"):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"workdir {folder} is a file, not a folder; use another --workdir")
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _CONFIG).exists():
            _check_same_run(folder, config, data_sha256)
        else:
            # A start that was stopped may have left the temporary file, and nothing else.
            if foreign := {entry.name for entry in folder.iterdir()} - {_temporary(_CONFIG)}:
                raise InputError(
                    f"workdir {folder} holds files but no run ({min(foreign)}, for one); nothing "
                    "is written over, use another --workdir"
                )
            run = {
                "config": dataclasses.asdict(config),
                "data_sha256": data_sha256,
                "versions": {name: _version(name) for name in ("jax", "flax", "optax", "capsjax")},
            }
            _write(folder / _CONFIG, json.dumps(run, indent=2, allow_nan=False).encode())
        for name in ("checkpoints", "figures"):
            (folder / name).mkdir(exist_ok=True)
    return folder


@contextlib.contextmanager
def exclusive(workdir: StrPath) -> Iterator[None]:
    """Inside, no other process trains in this folder; the lock ends with the process, however.

    Raises:
      InputError: Another process does already.
    """
    with open(pathlib.Path(workdir) / _CONFIG, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"workdir {workdir} is in use by another process; wait for its end or use "
                "another --workdir"
            ) from error
        yield


def read_config(workdir: StrPath) -> dict[str, Any]:
    """Reads what `open_workdir` wrote: the keys config, data_sha256 and versions.

    Raises:
      InputError: the folder holds no run, or its config.json is damaged.
    """
    path = pathlib.Path(workdir) / _CONFIG
    if not path.is_file():
        raise InputError(f"workdir {workdir} holds no run: it has no {_CONFIG}")
    try:
        run = json.loads(path.read_bytes())
        if not (isinstance(run["config"], dict) and isinstance(run["data_sha256"], str)):
            raise TypeError("config or data_sha256 is of another type")
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{path} is damaged or unreadable ({error!r})") from error
    return run


def save_figure(figure: "Figure", path: StrPath) -> None:
    """Writes a figure as a PNG file of 150 dots an inch, in a folder that is made if need be."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    with _writing(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        _write(pathlib.Path(path), buffer.getvalue())


def write_json(path: StrPath, value: Any) -> None:
    """Writes results as JSON, in a folder that is made if need be."""
    with _writing(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value, indent=2, allow_nan=False)
        _write(pathlib.Path(path), f"{text}\n".encode())


def append_lines(path: StrPath, rows: Iterable[Mapping[str, Any]]) -> None:
    """Adds rows to a file of JSON lines, in a folder that is made if need be."""
    with _writing(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:
            file.write(b"".join(_line(row) for row in rows))


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
            _line(row)  # and this on NaN
        except (ValueError, TypeError, KeyError) as error:
            if not line.endswith(b"\n"):
                break
            raise InputError(f"{path} is damaged at line {number} ({error!r})") from error
        rows.append(row)
    return rows


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
        with _writing(self._path):
            _write(self._path, b"".join(_line(row) for row in rows if row["step"] <= step))
        if tensorboard:
            import tensorboardX

            folder = os.fspath(pathlib.Path(workdir) / "tensorboard")
            with _writing(folder):
                self._summaries = tensorboardX.SummaryWriter(folder, purge_step=step + 1)
        with _writing(self._path):
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
        left = _line(row)
        with _writing(self._path):
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


class Checkpoints:
    """The newest three checkpoints of a run, written by Orbax.

    Orbax does not notice a flipped bit among the values, and other damage makes it raise anything
    from KeyError to AttributeError after a page of complaints. So each checkpoint gets a
    record.json, written last: a SHA-256 for each of its files, checked before Orbax opens them,
    and dtype, shape and CRC-32 of every leaf, checked afterwards. A checkpoint without one is a
    save that did not finish.
    """

    def __init__(self, workdir: StrPath):
        """Finds the checkpoints of the run in `workdir`; nothing is written before `save`."""
        run = read_config(workdir)
        self._run = {"config": run["config"], "data_sha256": run["data_sha256"]}
        self._workdir = workdir
        # Orbax wants an absolute path.
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._damaged: set[int] = set()
        self._manager: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first."""
        found = {entry.parent.name for entry in self._folder.glob(f"*/{_RECORD}")}
        return sorted(int(name) for name in found if name.isdecimal())

    def save(self, step: int, state: Any) -> None:
        """Writes the checkpoint of one step; it is on disk when this returns.

        Args:
          step: above every step saved so far; a step that has its checkpoint is left alone.
          state: a tree of JAX arrays.

        Raises:
          InputError: the disk is full, or the like; the checkpoints before it are intact.
        """
        if self._manager is None:
            with _writing(self._folder):
                self._manager = self._open_manager()
        if step in self.steps():
            return
        folder = self._folder / str(step)
        # Checked first, since Orbax fills the screen when the disk fills up under its writes.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise InputError(
                f"checkpoint {folder} cannot be written: it needs {needed / 2**20:.1f} MiB and the "
                f"disk has {free / 2**20:.1f} MiB free; those before it are intact"
            )
        try:
            if not self._manager.save(step, args=ocp.args.StandardSave(state)):
                newest = self.steps()[-1]
                raise RuntimeError(f"Checkpoints.save: step must be above {newest}, got {step}")
            record = {
                **self._run,
                "leaves": {name: _describe(leaf) for name, leaf in _named(state)},
                "files": {name: _sha256(folder / name) for name in _sync(folder)},
            }
            _write(folder / _RECORD, _sealed(record))
        except (OSError, ValueError) as error:
            reason = _system_error(error)
            if reason is None:
                raise
            for left in (folder, *self._folder.glob(f"{step}.orbax-checkpoint-tmp*")):
                shutil.rmtree(left, ignore_errors=True)
            self._manager.reload()
            raise InputError(
                f"checkpoint {folder} cannot be written: {reason}; those before it are intact"
            ) from error

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """Reads the newest good checkpoint, with a warning for each newer one that is damaged.

        Args:
          template: a state with the structure, dtypes, shapes and shardings to restore.

        Returns:
          Its step and state, or None when there is no checkpoint.

        Raises:
          InputError: all are damaged, or one was written by another program or run.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state = self._read(step, template)
            except (_DamagedError, OSError) as error:
                damaged[step] = str(error)
                continue
            for bad, reason in damaged.items():
                logging.warning(
                    "checkpoint %s is damaged (%s): going on from step %d",
                    *(self._folder / str(bad), reason, step),
                )
            self._damaged = set(damaged)
            return step, state
        if damaged:
            listed = ", ".join(f"{step} ({reason})" for step, reason in damaged.items())
            raise InputError(
                f"every checkpoint in {self._folder} is damaged: {listed}; to start again, remove "
                f"{self._workdir} or use another --workdir"
            )
        return None

    def close(self) -> None:
        """Ends Orbax's threads; everything saved is on disk already."""
        if self._manager is not None:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, step: int, template: Any) -> Any:
        folder = self._folder / str(step)
        record = _unsealed(folder / _RECORD)
        for name, digest in record["files"].items():
            if _sha256(folder / name) != digest:
                raise _DamagedError(f"{name} is not what was written")
        if {key: record[key] for key in self._run} != self._run:
            raise InputError(f"checkpoint {folder} belongs to a run with other settings or data")
        found = {name: (leaf["dtype"], leaf["shape"]) for name, leaf in record["leaves"].items()}
        wanted = {name: (str(leaf.dtype), list(leaf.shape)) for name, leaf in _named(template)}
        for name in sorted(found | wanted):
            if found.get(name) != wanted.get(name):
                raise InputError(
                    f"checkpoint {folder} does not fit this program: {name} is "
                    f"{found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
                )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        with ocp.StandardCheckpointer() as reader:
            state = reader.restore(folder / "default", abstract)
        for name, leaf in _named(state):
            if _describe(leaf) != record["leaves"][name]:
                raise _DamagedError(f"{name} was not restored as it was saved")
        return state

    def _open_manager(self) -> ocp.CheckpointManager:
        """Makes room for new checkpoints: not sooner, since a run may be read while it trains."""
        for entry in self._folder.iterdir():
            if entry.name.isdecimal() and not (entry / _RECORD).exists():
                logging.warning("checkpoint %s has no %s: removed as unfinished", entry, _RECORD)
                shutil.rmtree(entry)
        for step in self._damaged:
            target = self._folder / f"damaged_{step}"
            if target.exists():
                shutil.rmtree(target)
            (self._folder / str(step)).rename(target)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=3, cleanup_tmp_directories=True, enable_async_checkpointing=False
        )
        return ocp.CheckpointManager(self._folder, options=options)


class _DamagedError(Exception):
    """A checkpoint is not what was written."""


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


def _named(tree: Any) -> list[tuple[str, Any]]:
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]


def _describe(leaf: Any) -> dict[str, Any]:
    array = np.asarray(leaf)
    checksum = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return {"dtype": str(array.dtype), "shape": list(array.shape), "crc32": checksum}


def _sealed(record: dict[str, Any]) -> bytes:
    text = json.dumps(record)
    return json.dumps({"crc32": zlib.crc32(text.encode()), "record": record}).encode()


def _unsealed(path: pathlib.Path) -> dict[str, Any]:
    try:
        sealed = json.loads(path.read_bytes())
        if zlib.crc32(json.dumps(sealed["record"]).encode()) == sealed["crc32"]:
            return sealed["record"]
    except (ValueError, TypeError, KeyError) as error:
        raise _DamagedError(f"{path.name} is damaged: {error!r}") from error
    raise _DamagedError(f"{path.name} is damaged: its checksum does not match")


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: pathlib.Path) -> list[str]:
    """Waits until a folder is on disk with all it holds; returns the names of its files."""
    entries = [folder.parent, folder, *folder.rglob("*")]
    for entry in entries:
        _fsync(entry)
    return sorted(e.relative_to(folder).as_posix() for e in entries if e.is_file())


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary(name: str) -> str:
    return f".{name}.tmp"


def _write(path: pathlib.Path, content: bytes) -> None:
    """Replaces a file, in one step and durably."""
    temporary = path.with_name(_temporary(path.name))
    temporary.write_bytes(content)
    _fsync(temporary)
    temporary.replace(path)
    _fsync(path.parent)


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(row), allow_nan=False).encode() + b"\n"


def _system_error(error: Exception) -> str | None:
    """What the operating system said, if it is the cause of an error."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    # TensorStore reports a full disk as a ValueError with the number in its text.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else None


@contextlib.contextmanager
def _writing(what: StrPath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{what} cannot be written: {_system_error(error)}") from error
