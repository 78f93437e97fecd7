"""What a long measurement has found so far, on disk: a killed program goes on where it was."""

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


class Kept:
    """Counts by name, each in a file before the next is measured."""

    def __init__(self, path: StrPath, facts: dict[str, Any]):
        """Goes on with the file's counts, which must be of the same facts.

        Args:
          path: The file.
          facts: All that the counts depend on, as JSON has it.

        Raises:
          InputError: The file holds counts of other facts, is damaged, or cannot be read or
            written.
        """
        self._path, self._facts = pathlib.Path(path), facts
        found = _read(self._path)
        self._counts: dict[str, int] = found["counts"]
        if self._counts and found["facts"] != facts:
            raise InputError(
                f"{path} holds {len(self._counts)} measurements of other settings or runs; use "
                "another --output, or remove it to measure anew"
            )
        if self._counts:
            logging.info("%s goes on after %d measurements", path, len(self._counts))
        self._write()

    def __call__(self, name: str, measure: Callable[..., int], *args: Any) -> int:
        """The count of that name, which `measure(*args)` gives if it is not there yet."""
        if name not in self._counts:
            self._counts[name] = measure(*args)
            self._write()
        return self._counts[name]

    def remove(self) -> None:
        """Removes the file: the results are written, and the next start measures anew."""
        with files.writing(self._path):
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        files.write_json(self._path, {"facts": self._facts, "counts": self._counts})


def sha256(arrays: Iterable[ArrayLike]) -> str:
    """The digest of arrays' bytes; their shapes and types do not count."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _read(path: pathlib.Path) -> dict[str, Any]:
    """The facts and the counts of a file; no facts if there is none."""
    try:
        found = json.loads(path.read_bytes())
        if not all(type(count) is int for count in found["counts"].values()):
            raise TypeError("a count is not a whole number")
        return {"facts": found["facts"], "counts": found["counts"]}
    except (FileNotFoundError, NotADirectoryError):
        return {"facts": None, "counts": {}}
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}); remove it to measure anew") from error
