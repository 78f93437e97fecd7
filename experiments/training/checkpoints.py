"""Checkpoints of a run, verified by SHA-256."""

import functools
import hashlib
import json
import pathlib
import re
import shutil
import zlib
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from absl import logging

from experiments import files
from experiments.errors import InputError
from experiments.training import processes, records

_RECORD, _LAST = "record.json", "last_checkpoint.json"
_RECORD_LIMIT = 2**26  # bytes
_NONE_YET = -1  # in _LAST, until the first checkpoint is complete


class Checkpoints:
    """Saves and restores the newest three checkpoints of a run, by Orbax.

    Orbax does not notice a flipped bit among the values, and raises various errors (KeyError,
    AttributeError) at other damage. So each checkpoint gets a record.json, written last, with the
    step, the SHA-256 of each of its files, verified before Orbax opens them, and dtype and shape of
    every leaf; and length and SHA-256 of metrics.jsonl, for `check_metrics`.

    A checkpoint without a record.json is an unfinished save, or one whose record was lost.
    last_checkpoint.json in the workdir tells them apart: it holds the step of the last complete
    checkpoint, and is written after that checkpoint's record. A checkpoint that was complete is
    never removed because of damage.

    Several processes share one disk, and all must call the same functions. Each writes, hashes and
    reads its own shards; no array is gathered, neither on a device nor on a host.
    """

    def __init__(self, workdir: files.StrPath):
        """Find the checkpoints of the run in `workdir`, and write nothing."""
        run = records.read_config(workdir)
        self._run = {"config": run["config"], "data_sha256": run["data_sha256"]}
        self._workdir = workdir
        # Orbax wants an absolute path.
        self._folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self._damaged: set[int] = set()
        self._manager: ocp.CheckpointManager | None = None

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first."""
        return saved_steps(self._workdir)

    def save(self, step: int, state: Any) -> None:
        """Save the state of one step, and return when it is on disk.

        Args:
          step: Above every step saved so far; a step that has a checkpoint is skipped.
          state: A tree of JAX arrays.

        Raises:
          InputError: The file system refuses to write; earlier checkpoints are intact.
        """
        if self._manager is None:
            self._manager = self._open_manager()
        if processes.from_lead(step in self.steps()):
            return
        folder = self._folder / str(step)
        # Checked first, since Orbax fills the screen when the disk fills up under its writes.
        processes.on_lead(lambda: self._check_space(folder, state))
        try:
            if not self._manager.save(step, args=ocp.args.StandardSave(state)):
                newest = self.steps()[-1]
                raise RuntimeError(f"Checkpoints.save: step must be above {newest}, got {step}")
            digests = processes.gather(lambda: _digests(folder))
            processes.on_lead(lambda: self._seal(folder, _signatures(state), digests))
        except (OSError, ValueError) as error:
            reason = files.system_error(error)
            if reason is None:
                raise
            for left in (folder, *self._folder.glob(f"{step}.orbax-checkpoint-tmp*")):
                shutil.rmtree(left, ignore_errors=True)
            self._manager.reload()
            raise InputError(
                f"checkpoint {folder} cannot be written: {reason}; those before it are intact"
            ) from error
        processes.on_lead(lambda: _write_last(self._workdir, step))

    def restore(self, template: Any) -> tuple[int, Any] | None:
        """Restore the newest intact checkpoint, and warn of each newer one that is damaged.

        Args:
          template: A state of arrays or `jax.ShapeDtypeStruct`s, with the structure, dtypes, shapes
            and shardings to restore; each device reads its own shards.

        Returns:
          Step and state, or None if no checkpoint was completed yet.

        Raises:
          InputError: All are damaged or lost, or one was written by another program or run.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                state = self._read(step, template)
            except _DamagedError as error:
                damaged[step] = str(error)
                continue
            damaged |= processes.on_lead(functools.partial(self._lost_since, step)) or {}
            for bad, reason in sorted(damaged.items()) if processes.is_lead() else ():
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
        processes.on_lead(lambda: check_not_lost(self._workdir))
        return None

    def close(self) -> None:
        """End Orbax's threads; every save is on disk already."""
        if self._manager is not None:
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _read(self, step: int, template: Any) -> Any:
        folder = self._folder / str(step)
        record = _intact(folder)
        if {key: record.get(key) for key in self._run} != self._run:
            raise InputError(f"checkpoint {folder} belongs to a run with other settings or data")
        found = {
            name: (leaf.get("dtype"), leaf.get("shape")) for name, leaf in record["leaves"].items()
        }
        wanted = {name: tuple(leaf.values()) for name, leaf in _signatures(template).items()}
        for name in sorted(found | wanted):
            if found.get(name) != wanted.get(name):
                raise InputError(
                    f"checkpoint {folder} does not fit this program: {name} is "
                    f"{found.get(name, 'absent')} there, {wanted.get(name, 'absent')} here"
                )
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        reason = ""
        try:
            with ocp.StandardCheckpointer() as reader:
                state = reader.restore(folder / "default", abstract)
        except (OSError, ValueError) as error:
            if (said := files.system_error(error)) is None:
                raise
            reason = said
        if reason := processes.first_reason(reason):  # or some would go on to what is older
            raise _DamagedError(reason)
        return state

    def _open_manager(self) -> ocp.CheckpointManager:
        """Clear unusable checkpoints and open Orbax's manager, at the first save.

        Not earlier, since a run may be read while another program trains it.
        """
        processes.on_lead(self._clear)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=3,
            create=False,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
        )
        with files.writing(self._folder):
            return ocp.CheckpointManager(self._folder, options=options)

    def _lost_since(self, step: int) -> dict[int, str]:
        """Return the complete checkpoints after `step` that are lost, each with the reason."""
        last = _read_last(self._workdir)
        if last is None or last <= step:
            return {}
        found = {
            other: f"it has no {_RECORD}"
            for other in _unsealed_steps(self._workdir)
            if step < other <= last
        }
        gone = {} if (self._folder / str(last)).exists() else {last: "its folder is missing"}
        return gone | found

    def _clear(self) -> None:
        with files.writing(self._folder):
            begin_training(self._workdir)
            steps, last = self.steps(), _read_last(self._workdir)
            damaged = set(self._damaged)
            for step in _unsealed_steps(self._workdir):
                # Older than all others: Orbax was removing it.
                if steps and last is not None and steps[0] < step <= last:
                    damaged.add(step)
                    continue
                entry = self._folder / str(step)
                logging.warning("checkpoint %s has no %s: removed as unfinished", entry, _RECORD)
                shutil.rmtree(entry)
            for step in damaged:
                source, target = self._folder / str(step), self._folder / f"damaged_{step}"
                if source.exists():
                    if target.exists():
                        shutil.rmtree(target)
                    source.rename(target)
            if damaged:
                _write_last(self._workdir, self.steps()[-1])

    def _check_space(self, folder: pathlib.Path, state: Any) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + 2**20
        free = shutil.disk_usage(self._folder).free
        if free < needed:
            raise InputError(
                f"checkpoint {folder} cannot be written: it needs {needed / 2**20:.1f} MiB and the "
                f"disk has {free / 2**20:.1f} MiB free; those before it are intact"
            )

    def _seal(self, folder: pathlib.Path, leaves: dict[str, Any], digests: list[Any]) -> None:
        """Write the record of a checkpoint whose files are on disk, and the record's own hash."""
        found = {name: digest for of_process in digests for name, digest in of_process.items()}
        for entry in (folder.parent, folder, *folder.rglob("*")):
            if entry.is_dir():
                files.fsync(entry)
        record = {
            **self._run,
            "step": int(folder.name),
            "leaves": leaves,
            "files": dict(sorted(found.items())),
            "metrics": _digest_of_metrics(self._workdir),
        }
        text = json.dumps(record)
        sealed = {"sha256": _text_sha256(text), "record": json.loads(text)}
        files.write(folder / _RECORD, json.dumps(sealed).encode())


def saved_steps(workdir: files.StrPath) -> list[int]:
    """Return the steps of a run that have a checkpoint, oldest first."""
    found = {entry.parent.name for entry in pathlib.Path(workdir).glob(f"checkpoints/*/{_RECORD}")}
    return sorted(int(name) for name in found if _is_step(name))


def check_metrics(workdir: files.StrPath, step: int | None = None) -> None:
    """Check the rows of metrics that a checkpoint was saved with; later rows may follow them.

    Without metrics.jsonl it warns, since who removed the file knows that its rows are gone.

    Args:
      workdir: The folder of the run.
      step: That of the checkpoint, by default the newest. Nothing is checked at a step without
        one, or with one of a version that did not record its metrics.

    Raises:
      InputError: Rows are missing, were added or changed.
    """
    steps = saved_steps(workdir)
    step = max(steps, default=0) if step is None else step
    if step not in steps:
        return
    folder = pathlib.Path(workdir) / "checkpoints" / str(step)
    try:
        wanted = _unsealed(folder / _RECORD).get("metrics")
    except (_DamagedError, OSError):  # `restore` warns of it
        return
    if wanted is None:
        return
    path = pathlib.Path(workdir) / "metrics.jsonl"
    if not records.has_metrics(workdir):
        logging.warning("%s is missing: there are no rows up to step %d", path, step)
        return
    content = records.read_metrics_file(workdir)
    if _digest(content[: wanted["bytes"]]) == wanted:
        return
    if len(content) < wanted["bytes"]:
        rows_end = records.last_step(workdir)
        found = f"it has no rows after step {rows_end}" if rows_end else "it has no rows"
    else:
        found = "rows were changed, added or removed"
    raise InputError(
        f"{path} is not what was saved with the checkpoint of step {step}: {found}; put it back, "
        "or remove it to do without its rows"
    )


def begin_training(workdir: files.StrPath) -> None:
    """Prepare a run's folder for training, before its first row of metrics is written.

    Raises:
      InputError: Its checkpoints are lost, or it cannot be written.
    """
    check_not_lost(workdir)
    newest, last = max(saved_steps(workdir), default=_NONE_YET), _read_last(workdir)
    if last is None or last < newest:  # killed between a checkpoint's record and this file
        _write_last(workdir, newest)


def check_not_lost(workdir: files.StrPath) -> None:
    """Check that a run without a complete checkpoint never had one.

    A kill before the first checkpoint leaves the file of `begin_training`, rows of metrics and at
    most one checkpoint folder without a record; in any other case checkpoints were lost.

    Raises:
      InputError: The run had a checkpoint, and there is none.
    """
    last = _read_last(workdir)  # before the others, which a process that trains may add to
    if saved_steps(workdir):
        return
    left, rows_end = _unsealed_steps(workdir), records.last_step(workdir)
    if not (left or rows_end) if last is None else last == _NONE_YET and len(left) < 2:
        return
    folder = pathlib.Path(workdir) / "checkpoints"
    found = f"{', '.join(map(str, left))} without {_RECORD}" if left else "none"
    raise InputError(
        f"workdir {workdir} was trained to step {max([last or 0, rows_end, *left])}, but "
        f"{folder} has no complete checkpoint (found {found}); put them back, or to start again "
        f"remove {workdir} or use another --workdir"
    )


def _unsealed_steps(workdir: files.StrPath) -> list[int]:
    """Return the steps that have a folder without a record."""
    folders = pathlib.Path(workdir).glob("checkpoints/*/")
    found = {int(folder.name) for folder in folders if _is_step(folder.name)}
    return sorted(found - set(saved_steps(workdir)))


def _read_last(workdir: files.StrPath) -> int | None:
    """Return the step of the last complete checkpoint; None if the file is absent or damaged."""
    path = pathlib.Path(workdir) / _LAST
    try:
        step = json.loads(files.read(path, limit=_RECORD_LIMIT))["step"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if type(step) is int else None


def _write_last(workdir: files.StrPath, step: int) -> None:
    path = pathlib.Path(workdir) / _LAST
    with files.writing(path):
        files.remove_temporaries(path)
        files.write(path, json.dumps({"step": step}).encode())


class _DamagedError(Exception):
    """A checkpoint's files are not those that were written."""


def _intact(folder: pathlib.Path) -> dict[str, Any]:
    """Return a checkpoint's record after verifying its files, of which each process reads some."""
    reason = ""
    try:
        record = _unsealed(folder / _RECORD)
        if record.get("step", int(folder.name)) != int(folder.name):
            raise _DamagedError(f"it is that of step {record['step']}")
        own = list(record["files"].items())[jax.process_index() :: jax.process_count()]
        for name, digest in own:
            if _sha256(folder / name) != digest:
                raise _DamagedError(f"{name} is not what was written")
    except (_DamagedError, OSError) as error:
        reason = str(error)
    if reason := processes.first_reason(reason):
        raise _DamagedError(reason)
    return record


def _signatures(tree: Any) -> dict[str, dict[str, Any]]:
    """Return dtype and shape of every leaf, by its path in the tree."""
    return {
        jax.tree_util.keystr(path): {"dtype": str(leaf.dtype), "shape": list(leaf.shape)}
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _unsealed(path: pathlib.Path) -> dict[str, Any]:
    """Return the record if its checksum fits, and its form: who forges one computes the other too.

    The checksum is a SHA-256, or the CRC-32 of older versions.

    Raises:
      _DamagedError: They do not.
      OSError: It cannot be read.
    """
    try:
        sealed = json.loads(files.read(path, limit=_RECORD_LIMIT))
        text = json.dumps(sealed["record"])
        fits = (
            sealed["sha256"] == _text_sha256(text)
            if "sha256" in sealed
            else sealed["crc32"] == zlib.crc32(text.encode())
        )
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _DamagedError(f"{path.name} is damaged: {error!r}") from error
    if not fits:
        raise _DamagedError(f"{path.name} is damaged: its checksum does not match")
    if unforeseen := _unforeseen(sealed["record"]):
        raise _DamagedError(f"{path.name} is damaged: {unforeseen}")
    return sealed["record"]


def _unforeseen(record: Any) -> str:
    """Say what is not as `Checkpoints` writes it in a record; nothing where all is."""
    if not isinstance(record, dict):
        return "it holds no object"
    own, leaves, metrics = record.get("files"), record.get("leaves"), record.get("metrics")
    if not (isinstance(own, dict) and own):
        return "it names no files"
    for name, digest in own.items():
        parts = name.split("/")
        if set(parts) & {"", ".", ".."} or not name.isprintable() or not isinstance(digest, str):
            return f"it names the file {name!r}"
    if not isinstance(leaves, dict) or not all(isinstance(leaf, dict) for leaf in leaves.values()):
        return "its leaves are no objects"
    if metrics is not None and not (
        isinstance(metrics, dict)
        and type(metrics.get("bytes")) is int
        and metrics["bytes"] >= 0
        and isinstance(metrics.get("sha256"), str)
    ):
        return "its metrics have no length and SHA-256"
    if type(record.get("step", 0)) is not int:
        return "its step is no integer"
    return ""


def _is_step(name: str) -> bool:
    """Return whether a folder is named as that of a checkpoint: 200, not 0200."""
    return re.fullmatch("0|[1-9][0-9]*", name) is not None


def _digest_of_metrics(workdir: files.StrPath) -> dict[str, Any] | None:
    return _digest(records.read_metrics_file(workdir)) if records.has_metrics(workdir) else None


def _digest(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _sha256(path: pathlib.Path) -> str:
    """Return the digest of a file.

    Raises:
      OSError: It cannot be read, or is no file but a link, pipe or folder.
    """
    if path.is_symlink() or not path.is_file():
        raise OSError(f"{path.name} is not a file")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _digests(folder: pathlib.Path) -> dict[str, str]:
    """Return the SHA-256 of the files that this process hashes, once they are on disk.

    Orbax writes a process's shards into ocdbt.process_<its index>; process 0 hashes all else, such
    as the metadata that belong to no process.
    """
    digests = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        owner = re.search(r"(?:^|/)ocdbt\.process_(\d+)/", name)
        if path.is_file() and (int(owner[1]) if owner else 0) == jax.process_index():
            files.fsync(path)
            digests[name] = _sha256(path)
    return digests
