"""tweak_dimensions and parse_tree: files they write, refused settings, legible trees."""

import dataclasses
import functools
import json
import re
import types

import in_process
import numpy as np
import pytest
import test_figures
from PIL import Image

from experiments import files, parse_tree, tweak_dimensions
from experiments.data import datasets, idx
from experiments.figures import trees
from experiments.training import mnist, records, trained
from experiments.training.checkpoints import Checkpoints


@functools.cache  # each network is compiled once
def load(workdir, *, data_dir, with_data=True, original=trained.load):
    run = original(workdir.replace("cnn", "capsnet"), data_dir=data_dir, with_data=with_data)
    if not workdir.endswith("cnn"):
        return run
    config = dataclasses.replace(run.config, network="pooling_cnn")
    return run._replace(config=config, trainer=types.SimpleNamespace(model=lambda params: None))


PROGRAMS = {"tweak_dimensions": tweak_dimensions, "parse_tree": parse_tree}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Folder of 12 training and 12 test images of noise, 20 x 20 pixels."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for images_stem, labels_stem in idx.STEMS.values():
        images = rng.integers(0, 256, (12, 20, 20), dtype=np.uint8)
        for stem, array in (
            (images_stem, images),
            (labels_stem, np.arange(12, dtype=np.uint8) % 10),
        ):
            (folder / stem).write_bytes(idx.header(array) + array.tobytes())
    return folder


def save_run(folder, data_dir, *, checkpoint=True, **settings):
    """Save an untrained network as a run, and return its workdir."""
    config = mnist.Config(
        dataset="mnist",
        data_dir=str(data_dir),
        batch_size=4,
        conv_channels=2,
        primary_types=3,
        capsule_length=3,
        **settings,
    )
    dataset = datasets.load("mnist", data_dir=str(data_dir))
    workdir = records.open_workdir(
        folder, config=config, data_sha256=dataset.sha256, data=dataset.facts
    )
    if checkpoint:
        trainer = mnist.build(config, dataset)
        with Checkpoints(workdir) as checkpoints:
            checkpoints.save(1, trainer.initial_state(0))
    return workdir


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory, data_dir):
    folder = tmp_path_factory.mktemp("runs")
    return {
        "capsnet": save_run(folder / "capsnet", data_dir),
        "plain": save_run(folder / "plain", data_dir, reconstruction_weight=0.0),
        "cnn": folder / "cnn",
        "begun": save_run(folder / "begun", data_dir, checkpoint=False),
        "none": folder / "none",
    }


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Return a function that runs a program in this process: exit status, stdout and stderr."""
    monkeypatch.setattr(trained, "load", load)
    monkeypatch.chdir(tmp_path)

    def program(name, **flags):
        return in_process.run(PROGRAMS[name], flags, monkeypatch, capsys)

    return program


def left(folder):
    return {path.name for path in folder.iterdir()}


def read(path):
    return json.loads(path.read_bytes())


def test_tweak_dimensions_writes_grids_animations_and_effects(program, workdirs, tmp_path):
    for name in ("a", "b"):
        Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save(f"{name}.png")
    before = {path: path.stat().st_mtime_ns for path in workdirs["capsnet"].rglob("*")}
    status, stdout, _ = program(
        "tweak_dimensions",
        workdir=workdirs["capsnet"],
        output="out",
        images="a.png,b.png",
        examples=4,
    )
    assert status == 0
    assert left(tmp_path / "out") == {
        *("a_tweaks.png", "a_sweep.gif", "b_tweaks.png", "b_sweep.gif"),
        *("effects.png", "effects_by_class.png", "results.json", "by_class.json"),
    }
    table = read(tmp_path / "out/results.json")
    assert [row["dimension"] for row in table] == [1, 2, 3]
    assert {row["images"] for row in table} == {4}
    assert len(stdout.splitlines()) == 4
    assert before == {path: path.stat().st_mtime_ns for path in workdirs["capsnet"].rglob("*")}


@pytest.mark.parametrize("run", ["capsnet", "plain"])
def test_parse_tree_draws_with_and_without_a_decoder(program, workdirs, tmp_path, run):
    status, stdout, _ = program("parse_tree", workdir=workdirs[run], output="out", index=11)
    assert status == 0
    assert left(tmp_path / "out") == {"test_11_evidence.png", "test_11_tree.png", "results.json"}
    table = read(tmp_path / "out/results.json")
    assert [row["iteration"] for row in table] == [1, 2, 3] * parse_tree.EVIDENCE_PARENTS
    assert re.fullmatch(r"test_11: longest capsules (\d \(0\.\d\d\)(, |\n)){3}", stdout)


def test_parse_tree_draws_two_digits_and_an_odd_number_of_children(
    program, workdirs, tmp_path, monkeypatch
):
    captions, tree = [], trees.tree

    def recorded(*arguments, **options):
        captions.extend(options["captions"])
        return tree(*arguments, **options)

    monkeypatch.setattr(trees, "tree", recorded)
    flags = {"workdir": workdirs["capsnet"], "output": "out", "overlap": "3,7", "shift": 2}
    status, stdout, _ = program("parse_tree", **flags, children=3)
    assert (status, stdout[:9]) == (0, "overlap_3")
    assert len(captions) == 3
    assert left(tmp_path / "out") == {
        *("overlap_3_7_evidence.png", "overlap_3_7_tree.png", "results.json"),
    }


def test_overlay_shifts_and_adds_digits():
    first, second = np.zeros((5, 6, 1)), np.zeros((5, 6, 1))
    first[2, 3], second[2, 3], second[4, 0] = 0.7, 0.9, 0.4
    first[0, 0] = 1  # shifted out of the image
    expected = np.zeros((5, 6, 1))
    expected[2, 2], expected[2, 4], expected[4, 1] = 0.7, 0.9, 0.4
    np.testing.assert_array_equal(parse_tree.overlay(first, second, shift=1), expected)
    unmoved = parse_tree.overlay(first, second, shift=0)
    assert unmoved[2, 3] == 1  # 0.7 + 0.9, at most 1
    np.testing.assert_array_equal(unmoved[4, 0], 0.4)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
    ("run", "flags", "message"),
    [
        ("none", {}, "workdir .*none holds no run: it has no config.json"),
        ("begun", {}, "workdir .* has no checkpoint yet; let it train further"),
        ("cnn", {}, "workdir .*cnn holds a pooling_cnn, which has no capsules"),
        ("capsnet", {"index": 12}, "test image 12 does not exist: mnist has 0 to 11"),
        ("capsnet", {"index": -1}, "--index must be at least 0, got -1"),
        ("capsnet", {"images": "none.png"}, "none.png: the image cannot be read: .*"),
        (
            "capsnet",
            {"images": "a/x.png,b/x.png"},
            "--images must have different file names, got x, x",
        ),
        (
            "capsnet",
            {"data_dir": "none"},
            "--data_dir must be a folder that can be read, got none.",
        ),
        ("capsnet", {"output": "file/out"}, "file/out/.* cannot be written: Not a directory"),
    ],
)
def test_invalid_settings_of_both_programs_are_refused(
    program, workdirs, tmp_path, name, run, flags, message
):
    (tmp_path / "file").write_text("precious")
    usual = {"workdir": workdirs[run], "output": "out"}
    if name == "tweak_dimensions":
        usual["examples"] = 4
    status, stdout, stderr = program(name, **usual | flags)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(f"{name}: {message}\n", stderr)
    assert left(tmp_path) == {"file"}


@pytest.mark.parametrize(
    ("name", "run", "flags", "message"),
    [
        ("tweak_dimensions", "plain", {}, r"workdir .*plain was trained without reconstruction .*"),
        (
            "tweak_dimensions",
            "capsnet",
            {"examples": 13},
            "--examples must be at most the 12 test images of mnist, got 13",
        ),
        (
            "tweak_dimensions",
            "capsnet",
            {"examples": 1},
            "--examples must be 0 or at least 2, got 1",
        ),
        (
            "parse_tree",
            "capsnet",
            {"overlap": "3"},
            "--overlap must be the .* A,B, got '3'",
        ),
        ("parse_tree", "capsnet", {"overlap": "3,12"}, "test image 12 does not exist: .*"),
        (
            "parse_tree",
            "capsnet",
            {"overlap": "3,4", "images": "a.png"},
            "--overlap and --images exclude each other",
        ),
        (
            "parse_tree",
            "capsnet",
            {"overlap": "3,4", "shift": 20},
            "--shift must be less than the images' 20 pixels, got 20",
        ),
        ("parse_tree", "capsnet", {"children": 13}, "--children must be at most 12, got 13"),
    ],
)
def test_invalid_settings_of_one_program_are_refused(
    program, workdirs, tmp_path, name, run, flags, message
):
    status, stdout, stderr = program(name, **{"workdir": workdirs[run], "output": "out"} | flags)
    assert (status, stdout) == (2, "")
    assert re.fullmatch(f"{name}: {message}\n", stderr)
    assert not left(tmp_path)


def test_a_full_disk_is_reported_in_one_line(program, workdirs, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write", full)
    status, _, stderr = program("parse_tree", workdir=workdirs["capsnet"], output="out")
    assert status == 2
    assert re.fullmatch("parse_tree: .*png cannot be written: No space left on device\n", stderr)


WHERE = trees.ReceptiveFields(np.arange(8.0, 19, 2), np.arange(8.0, 19, 2), 17)


def drawn_tree(N, K, C, *, decoder=True):
    rng = np.random.default_rng(0)
    return trees.tree(
        test_figures.images(28, 28, C),
        rng.random((N, K)) / K,
        WHERE,
        positions=np.stack([np.arange(N) % 6, np.arange(N) // 6], axis=1),
        captions=[f"{n}: type 32" for n in range(1, N + 1)],
        parents=[f"class {k}: 0.99" for k in range(K)],
        reconstructions=test_figures.images(K, 28, 28, C) if decoder else None,
        title="Of what this is and of what that is, and of what it should be\nand so on",
    )


@pytest.mark.parametrize(
    "figure",
    [
        lambda: drawn_tree(6, 3, 1),
        lambda: drawn_tree(12, 3, 3),
        lambda: drawn_tree(6, 2, 1, decoder=False),
        lambda: drawn_tree(2, 3, 1),
    ],
)
def test_trees_are_legible(figure):
    test_figures.assert_legible(figure())


@pytest.mark.parametrize(("F", "T", "C"), [(2, 3, 1), (1, 1, 3), (2, 5, 1)])
def test_evidence_is_legible(F, T, C):
    figure = trees.evidence(
        test_figures.images(28, 28, C),
        np.random.default_rng(0).normal(size=(F, T, 6, 6)),
        WHERE,
        names=[f"class {f}" for f in range(F)],
        lengths=np.full((F, T), 0.5),
    )
    test_figures.assert_legible(figure)
