"""Networks of `capsjax.models` as single safetensors files.

The file's metadata hold the network's name, the arguments of its constructor as JSON, and the
version of the format. All of a file is checked before anything is allocated; nothing is unpickled.
"""

import dataclasses
import inspect
import json
import math
import os
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from capsjax.models.capsnet import CapsNet
from capsjax.models.efficient_capsnet import EfficientCapsNet
from capsjax.models.inverted_attention_capsnet import InvertedAttentionCapsNet
from capsjax.models.matrix_capsnet import MatrixCapsNet
from capsjax.models.sr_capsnet import SRCapsNet

FILE_NAME = "network.safetensors"
_VERSION = "1"
_NETWORKS: dict[str, type[nnx.Module]] = {
    kind.__name__: kind
    for kind in (CapsNet, EfficientCapsNet, MatrixCapsNet, SRCapsNet, InvertedAttentionCapsNet)
}
_KEYS = ("format", "version", "network", "arguments")
_MAX_JSON = 65536  # characters; the arguments of a network take some hundred
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_FILE_DTYPES = {"F32": "float32", "F64": "float64", "F16": "float16", "BF16": "bfloat16"}


def save(network: nnx.Module, path: str | os.PathLike[str]) -> None:
    """Save a network of `capsjax.models` with its parameters and statistics to a safetensors file.

    Args:
      network: One of the classes of `capsjax.models`; subclasses are refused.
      path: The file, which is replaced if it exists: completely, or after a crash not at all.

    Raises:
      TypeError: The network is of another class.
      ValueError: Its parameters no longer have the shapes and dtypes of its constructor.

    Example:
      >>> import tempfile
      >>> model = models.SRCapsNet((24, 24, 1), 10, conv_channels=8, types=3, rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     models.save(model, f"{folder}/network.safetensors")
      ...     model = models.load(f"{folder}/network.safetensors")
    """
    name = type(network).__name__
    if _NETWORKS.get(name) is not type(network):
        raise TypeError(f"save: network must be one of {', '.join(_NETWORKS)}, got {name}")
    arguments = dict(network.arguments)  # type: ignore[attr-defined]
    wanted = _abstract(name, arguments)
    tensors = {key: np.asarray(value) for key, value in _leaves(network).items()}
    _check_tensors(
        "save: network", wanted, {k: (v.shape, str(v.dtype)) for k, v in tensors.items()}
    )
    values = ("capsjax", _VERSION, name, json.dumps(_encoded(arguments), allow_nan=False))
    content = _sorted_header(
        safetensors.numpy.save(tensors, metadata=dict(zip(_KEYS, values, strict=True)))
    )
    partial = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        if os.path.exists(partial):
            os.unlink(partial)
        raise


def load(path: str | os.PathLike[str]) -> Any:
    """Load a network of `capsjax.models` from a safetensors file of `save`, or a run's folder.

    Neither the programs of `experiments` nor the data that the network was trained on are needed.

    Args:
      path: The file; or a folder with a `network.safetensors`, which
        `python -m experiments.export --workdir=FOLDER` writes into the folder of a run.

    Returns:
      The network, `CapsNet` or another class of `capsjax.models`, on the default device.

    Raises:
      FileNotFoundError: There is no such file, or the folder has none.
      ValueError: The file is damaged, of another format or version, or its tensors are not those of
        the network that it names.

    Example:
      >>> import tempfile
      >>> model = models.CapsNet(conv_channels=8, primary_types=2, hidden=(8,), rngs=nnx.Rngs(0))
      >>> with tempfile.TemporaryDirectory() as run:
      ...     models.save(model, f"{run}/network.safetensors")
      ...     same = models.load(run)
      >>> images = jnp.ones((1, 28, 28, 1))
      >>> bool((same(images) == model(images)).all())
      True
    """
    where = os.fspath(path)
    if os.path.isdir(where):
        where = os.path.join(where, FILE_NAME)
        if not os.path.exists(where):
            raise FileNotFoundError(
                f"load: {os.fspath(path)} has no {FILE_NAME}; in a run's folder "
                f"python -m experiments.export --workdir={os.fspath(path)} writes it"
            )
    elif not os.path.exists(where):
        raise FileNotFoundError(f"load: there is no file or folder {where}")
    try:
        with safetensors.safe_open(where, framework="numpy") as file:
            found = {key: _described(file, key) for key in file.keys()}  # noqa: SIM118 (no dict)
            name, arguments = _read_metadata(where, file.metadata() or {}, len(found))
            model = _abstract(name, arguments, where=where)
            _check_tensors(f"load: {where}", model, found)
            tensors = {key: file.get_tensor(key) for key in found}
    except safetensors.SafetensorError as error:
        raise ValueError(f"load: {where} is damaged or no safetensors file ({error})") from error
    structure, state = _split(name, arguments)
    leaves = {path: jnp.asarray(tensors[_key(path)]) for path, _ in nnx.to_flat_state(state)}
    filled = [(path, leaf.replace(leaves[path])) for path, leaf in nnx.to_flat_state(state)]
    return nnx.merge(structure, nnx.from_flat_state(filled))


def _described(file: Any, key: str) -> tuple[tuple[int, ...], str]:
    part = file.get_slice(key)
    dtype = part.get_dtype()
    return tuple(part.get_shape()), _FILE_DTYPES.get(dtype, dtype)


def _sorted_header(content: bytes) -> bytes:
    """Sort the header of a safetensors file, whose order the library draws anew at each call.

    The file is then a function of the network. Its format is the header's size in 8 bytes,
    little-endian, and the header, JSON padded with spaces to a multiple of 8.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _read_metadata(
    where: str, metadata: Mapping[str, str], num_tensors: int
) -> tuple[str, dict[str, Any]]:
    if metadata.get("format") != "capsjax":
        raise ValueError(f"load: {where} was not written by capsjax.models.save")
    if metadata.get("version") != _VERSION:
        raise ValueError(
            f"load: {where} must have version {_VERSION} of the format, got "
            f"{metadata.get('version')!r:.40}; a newer capsjax may read it"
        )
    name, text = metadata.get("network", ""), metadata.get("arguments", "")
    if name not in _NETWORKS:
        raise ValueError(f"load: {where} must name one of {', '.join(_NETWORKS)}, got {name!r:.40}")
    try:
        if len(text) > _MAX_JSON:
            raise ValueError(f"{len(text)} characters are too many")
        given = json.loads(text)
        if not isinstance(given, dict):
            raise ValueError("they must be a JSON object")
        return name, _checked(name, given, num_tensors)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load: {where} has refused arguments of {name}: {error}") from error


def _checked(name: str, given: dict[str, Any], num_tensors: int) -> dict[str, Any]:
    """Return a constructor's arguments decoded from JSON, all present and of the declared types."""
    hints = _hints(name)
    if given.keys() != hints.keys():
        differing = sorted(given.keys() ^ hints.keys())
        raise ValueError(f"missing or unknown: {', '.join(differing)!s:.200}")
    arguments = {key: _decoded(key, given[key], hints[key]) for key in hints}
    # A loop of the constructor adds tensors at each turn: never more turns than tensors.
    turns = sum(arguments.get("blocks", ()))
    if turns > num_tensors:
        raise ValueError(f"blocks must have at most {num_tensors} blocks together, got {turns}")
    for key in ("hidden", "convolutions"):
        if len(arguments.get(key) or ()) > num_tensors:
            raise ValueError(f"{key} must have at most {num_tensors} entries")
    return arguments


def _hints(name: str) -> dict[str, Any]:
    """Return the declared types of a constructor's arguments, by name."""
    constructor = inspect.unwrap(_NETWORKS[name].__init__)
    hints = typing.get_type_hints(constructor)
    return {
        key: hints[key]
        for key in inspect.signature(constructor).parameters
        if key in hints and key != "rngs"
    }


def _encoded(value: Any) -> Any:
    """Return an argument, or a dict of arguments, as JSON."""
    if isinstance(value, dict):
        return {key: _encoded(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_encoded(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {"routing": type(value).__name__, **dataclasses.asdict(value)}
    return value


def _decoded(key: str, value: Any, hint: Any) -> Any:
    """Return an argument from JSON as its declared type, or raise ValueError."""
    if key == "dtype":
        if value in _DTYPES:
            return value
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {value!r:.40}")
    if key.split(".")[-1] == "gradient" and value not in ("full", "last"):
        raise ValueError(f"gradient must be full or last, got {value!r:.40}")
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    option = next(option for option in options if option is not type(None))
    if typing.get_origin(option) is tuple and isinstance(value, list):
        items = typing.get_args(option)
        if items[-1] is Ellipsis:
            items = items[:1] * len(value)
        if len(items) == len(value):
            pairs = zip(value, items, strict=True)
            return tuple(_decoded(key, item, kind) for item, kind in pairs)
    elif dataclasses.is_dataclass(option) and isinstance(value, dict):
        kind: Any = option
        settings = typing.get_type_hints(kind)
        names = {field.name for field in dataclasses.fields(kind)}
        if value.keys() == {"routing", *names} and value["routing"] == kind.__name__:
            return kind(**{n: _decoded(f"{key}.{n}", value[n], settings[n]) for n in names})
    elif option is int and type(value) is int:
        if 1 <= value < 2**24:
            return value
    elif option is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    elif option in (str, bool) and type(value) is option:
        return value
    raise ValueError(f"{key} has a value that is not allowed: {value!r:.60}")


def _split(name: str, arguments: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return structure and abstract state of a network; nothing is allocated."""
    kind: Any = _NETWORKS[name]
    settings = {**arguments, "dtype": jnp.dtype(arguments["dtype"])}
    return nnx.split(nnx.eval_shape(lambda: kind(**settings, rngs=nnx.Rngs(0))))


def _abstract(
    name: str, arguments: Mapping[str, Any], *, where: str = ""
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shapes and dtypes of a network's tensors by name."""
    try:
        _, state = _split(name, arguments)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"load: {where} has refused arguments of {name}: {error}") from error
    return {
        _key(path): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in nnx.to_flat_state(state)
    }


def _leaves(network: nnx.Module) -> dict[str, jax.Array]:
    return {_key(path): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(network))}


def _key(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _check_tensors(
    where: str,
    wanted: Mapping[str, tuple[tuple[int, ...], str]],
    found: Mapping[str, tuple[tuple[int, ...], str]],
) -> None:
    for key in sorted(wanted.keys() | found.keys()):
        if wanted.get(key) != found.get(key):
            here, there = (
                "no tensor" if pair is None else f"{pair[1]} {list(pair[0])}"
                for pair in (wanted.get(key), found.get(key))
            )
            raise ValueError(f"{where} must have as {key:.80} {here}, got {there}")
