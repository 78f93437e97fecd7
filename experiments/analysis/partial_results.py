"""Partial results on disk, from which an interrupted measurement resumes."""

import hashlib
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from absl import logging
from numpy.typing import ArrayLike

from experiments import files
from experiments.errors import InputError
from experiments.files import StrPath


class PartialResults:
    """Named counts in a JSON file that is rewritten after each count."""

    def __init__(self, path: StrPath, inputs: dict[str, Any]):
        """Open the file, and resume from the counts that it holds.

        Args:
          path: The file.
          inputs: Everything that determines the counts, as JSON values.

        Raises:
          InputError: The file holds counts for other inputs, is damaged, or cannot be read or
            written.
        """
        self._path, self._inputs = pathlib.Path(path), inputs
        found = _read(self._path)
        self._counts: dict[str, int] = found["counts"]
        if self._counts and found["facts"] != inputs:
            raise InputError(
                f"{path} holds {len(self._counts)} measurements with other settings or runs; use "
                "another --output, or delete the file to start again"
            )
        if self._counts:
            logging.info("%s: resuming after %d measurements", path, len(self._counts))
        self._write()

    def __call__(self, name: str, measure: Callable[..., int], *args: Any) -> int:
        """Return the stored count of that name, or compute `measure(*args)` and store it."""
        if name not in self._counts:
            self._counts[name] = measure(*args)
            self._write()
        return self._counts[name]

    def remove(self) -> None:
        """Delete the file, so that the next run starts again."""
        with files.writing(self._path):
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        files.write_json(self._path, {"facts": self._inputs, "counts": self._counts})


def sha256(arrays: Iterable[ArrayLike]) -> str:
    """Return the SHA-256 of the arrays' bytes, without their shapes and types."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: pathlib.Path) -> dict[str, Any]:
    """Read the inputs ("facts") and the counts of a file; both are empty if it does not exist."""
    try:
        found = json.loads(path.read_bytes())
        if not all(type(count) is int for count in found["counts"].values()):
            raise TypeError("a count is not an integer")
        return {"facts": found["facts"], "counts": found["counts"]}
    except (FileNotFoundError, NotADirectoryError):
        return {"facts": None, "counts": {}}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}); delete it to start again") from error
