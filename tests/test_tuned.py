"""Measured tile sizes: the passes that use them, and files that are refused."""

import configparser
import copy
import dataclasses
import functools
import json
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import capsjax
from capsjax.kernels.vote_passes import passes, tuned
from capsjax.kernels.vote_passes.cases import Case
from capsjax.kernels.vote_passes.config import XlaConfig
from capsjax.kernels.vote_passes.passes import Device, Implementation, Inputs, Spec, State, Term

CASE = Case(batch=3, capsules=6, length=4, parents=3, depth=5, num_iterations=2)
ROW = {
    "implementation": "xla",
    "sizes": CASE._asdict(),
    "config": {"children": 2, "examples": 1},
    "seconds": 1e-3,
    "jax": "0.10.2",
    "date": "2026-11-29",
}
KIND = "NVIDIA H200"


class Tile(NamedTuple):
    """A part of a config."""

    rows: int
    is_fused: bool


@dataclasses.dataclass(frozen=True)
class Nested:
    """A config of parts."""

    sums: Tile | None
    gradients: Tile | None
    cores: int


NESTED = Nested(Tile(8, True), None, 1)


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Return a function that writes the file of a device into an otherwise empty folder."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)

    def write(*rows, kind=KIND, **content):
        path = tmp_path / tuned.file_name(kind)
        path.write_text(json.dumps({"device": kind, "rows": rows, **content}))
        return path

    tuned._rows_by_key.cache_clear()
    yield write
    tuned._rows_by_key.cache_clear()


def find(case=CASE, kind=KIND, name="xla"):
    return tuned.find(name, case, kind, XlaConfig)


def test_the_row_of_equal_sizes_and_dtype_is_found(write):
    write(ROW)
    assert find() == XlaConfig(children=2, examples=1)
    assert find(name="triton") is None
    for size in ("batch", "capsules", "length", "parents", "depth"):
        assert find(CASE._replace(**{size: 9})) is None, size
    assert find(CASE._replace(dtype="bfloat16")) is None


def test_a_pass_of_more_iterations_than_were_measured_has_no_config(write):
    write(ROW)
    assert [find(CASE._replace(num_iterations=T)) is None for T in (1, 2, 3)] == [
        False,
        False,
        True,
    ]


def test_each_kind_of_device_has_its_own_file(write):
    assert write(ROW).name == "nvidia_h200.json"
    assert tuned.file_name("TPU v5 lite") == "tpu_v5_lite.json"
    assert find(kind="NVIDIA H100 80GB HBM3") is None


def test_a_symbolic_batch_has_no_config(write):
    write(ROW)
    (batch,) = jax.export.symbolic_shape("b")
    assert find(CASE._replace(batch=batch)) is None


def test_a_process_reads_a_file_once(write):
    path = write(ROW)
    found = find()
    path.unlink()
    assert find() == found


def test_a_file_is_read_as_it_was_written(write, tmp_path):
    rows = tuned.read(write(ROW), KIND)
    assert rows == [tuned.Measured(**{**ROW, "sizes": CASE})]
    assert json.loads(json.dumps(tuned.to_json(KIND, rows))) == {"device": KIND, "rows": [ROW]}
    assert tuned.read(tmp_path / "missing.json", KIND) == []


def changed(path, value):
    """Return a row with one value replaced, or removed (None)."""
    row = copy.deepcopy(ROW)
    *parents, last = path.split(".")
    level = functools.reduce(dict.__getitem__, parents, row)
    if value is None:
        del level[last]
    else:
        level[last] = value
    return row


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("seconds", None, r"row 1 must have the fields .*, got \['config'"),
        ("note", "fast", "row 1 must have the fields"),
        ("seconds", -1.0, "row 1: seconds must be a positive number, got -1.0"),
        ("seconds", float("nan"), "row 1: seconds must be a positive number, got nan"),
        ("seconds", "1", "row 1: seconds must be of type float, got '1'"),
        ("sizes", [1], r"row 1: sizes must have the fields .*, got \[1\]"),
        ("sizes.batch", None, "row 1: sizes must have the fields"),
        ("sizes.batch", 0, "row 1: sizes: batch must be at least 1, got 0"),
        ("sizes.batch", True, "row 1: sizes: batch must be of type int, got True"),
        ("sizes.dtype", "float8", "row 1: dtype must be float32 or bfloat16, got 'float8'"),
        ("implementation", "gpu", "row 1: implementation must be one of xla, .*, got 'gpu'"),
        ("date", "today", "row 1: date: Invalid isoformat string: 'today'"),
        ("config", 3, "row 1: config must be of type dict, got 3"),
        ("config.children", None, r"config of xla must have the fields children, examples, got"),
        ("config.warps", 4, "config of xla must have the fields children, examples, got"),
        ("config.children", 2.0, "config of xla: children must be of type int, got 2.0"),
        ("config.examples", "8", "config of xla: examples must be of type int, got '8'"),
        ("config.children", 0, "config of xla: children must be at least 1, got 0"),
    ],
)
def test_an_invalid_row_is_an_error_that_names_the_file(path, value, message, write):
    file = write(changed(path, value))
    with pytest.raises(ValueError, match=message) as error:
        find()
    assert str(error.value).startswith(str(file))


def test_an_invalid_file_is_an_error_that_names_it(write):
    path = write(ROW, ROW)
    with pytest.raises(ValueError, match=f"{path}: row 2 repeats the sizes and implementation of"):
        find()
    write(device="another")
    with pytest.raises(ValueError, match=f"{path}: device must be 'NVIDIA H200', got 'another'"):
        find()
    write(rows={})
    with pytest.raises(ValueError, match=f"{path}: rows must be a list, got {{}}"):
        find()
    write(more=1)
    with pytest.raises(ValueError, match=f"{path} must have the fields device, rows, got"):
        find()
    path.write_text("{")
    with pytest.raises(ValueError, match=f"{path} is not a JSON file: "):
        find()


def test_a_config_of_parts_is_what_was_encoded():
    encoded = json.loads(json.dumps(tuned.encode(NESTED)))
    assert encoded == {"sums": {"rows": 8, "is_fused": True}, "gradients": None, "cores": 1}
    assert tuned.decode("here", encoded, Nested) == NESTED
    with pytest.raises(
        ValueError, match=r"^here: sums must have the fields is_fused, rows, got 8$"
    ):
        tuned.decode("here", {**encoded, "sums": 8}, Nested)
    with pytest.raises(ValueError, match=r"^here: cores must be of type int, got None$"):
        tuned.decode("here", {**encoded, "cores": None}, Nested)


def test_a_config_refused_by_its_own_class_is_an_error_that_names_the_file(write):
    @dataclasses.dataclass(frozen=True)
    class PowersOfTwo:
        children: int
        examples: int

        def __post_init__(self):
            raise ValueError("children must be a power of two")

    path = write(ROW)
    with pytest.raises(ValueError, match=f"{path}: config of xla: children must be a power of two"):
        tuned.find("xla", CASE, KIND, PowersOfTwo)


# Passes


def selected(
    name="moments",
    *,
    case=CASE,
    implementation="xla",
    leaky=False,
    rows=1,
    device=None,
    config=None,
):
    """Return the config that a pass is lowered with, by default of CASE on one device of KIND."""
    poses = jax.ShapeDtypeStruct((case.batch, case.capsules, rows, case.length), case.dtype)
    weights = jax.ShapeDtypeStruct((*case[1:4], case.depth // rows), case.dtype)
    terms = (Term(State(), None, State()),) * 3
    trees = Inputs(poses, weights), terms if name == "input_gradients" else State()
    shapes, structure = jax.tree.flatten(trees)
    program = passes.select(
        name,
        passes.PLATFORMS.get(implementation),
        device or Device(KIND),
        shapes,
        implementation=Implementation(implementation, config),
        structure=structure,
        mapped=(),
        precision=None,
        spec=Spec(case.parents, leaky=leaky),
    )
    return dict(program.settings)["config"]


def test_a_pass_uses_its_measured_config(write):
    default = selected()
    write(ROW)
    tuned._rows_by_key.cache_clear()
    assert selected() == XlaConfig(children=2, examples=1) != default


def test_passes_that_were_not_measured_use_the_default_config(write):
    write(ROW)
    measured, named = selected(), XlaConfig(children=1, examples=3)
    assert selected(config=named) == named
    assert selected(leaky=True) != measured
    assert selected(rows=5) != measured
    assert selected(device=Device(KIND, num_devices=2)) != measured
    assert selected(device=Device()) != measured
    assert selected("input_gradients") != measured  # three iterations, and two were measured


def test_routing_on_this_device_uses_its_file(write):
    def has_tiles_of_three_children():
        arrays = jnp.ones(CASE[:3]), jnp.ones(CASE[1:5])
        text = jax.jit(lambda *arrays: capsjax.dynamic_routing(*arrays)).lower(*arrays).as_text()
        return "tensor<2x3x" in text  # two tiles

    assert not has_tiles_of_three_children()
    write(changed("config.children", 3), kind=jax.devices()[0].device_kind)
    tuned._rows_by_key.cache_clear()
    jax.clear_caches()  # of lowered passes, which are those of the process's first lowering
    assert has_tiles_of_three_children()


def test_files_of_the_package_are_valid():
    for path in tuned.FOLDER.glob("*.json"):
        kind = json.loads(path.read_text())["device"]
        assert path.name == tuned.file_name(kind)
        for row in tuned.read(path, kind):
            config = selected(
                case=row.sizes, implementation=row.implementation, device=Device(kind)
            )
            assert tuned.encode(config) == row.config


def test_the_wheel_has_every_file_of_the_folder():
    settings = configparser.ConfigParser()
    settings.read(pathlib.Path(__file__).parents[1] / "setup.cfg")
    patterns = settings["options.package_data"]["capsjax.kernels.vote_passes"].split()
    packed = {path for pattern in patterns for path in tuned.FOLDER.parent.glob(pattern)}
    assert packed == set(tuned.FOLDER.iterdir())
    assert "tuned/*.json" in patterns
