"""smallNORB: its files, viewpoints, and runs on stereo pairs."""

import dataclasses
import gzip
import json
import shutil
import struct
import tracemalloc
from pathlib import Path

import in_process
import jax
import numpy as np
import pytest
import small_runs
from flax import nnx
from PIL import Image
from smallnorb_files import arrays, content, write, write_packed

from capsjax import models
from experiments import evaluate, explore, export, parse_tree, train_mnist, tweak_dimensions
from experiments.data import datasets, smallnorb
from experiments.errors import InputError
from experiments.training import mnist, records, trained

pytestmark = pytest.mark.usefixtures("quick_compilation")

# --- files


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_files_are_read_whatever_their_names_say_of_gzip(tmp_path, suffix, pack):
    found = arrays(num_train=4, num_test=3)
    dataset = datasets.load("smallnorb", data_dir=write(tmp_path, found, suffix=suffix, pack=pack))
    assert (dataset.name, dataset.num_classes) == ("smallnorb", 5)
    assert dataset.class_names == ("animal", "human", "airplane", "truck", "car")
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        pairs = found[f"{name} dat"].astype(float)
        means = pairs.reshape(-1, 2, 48, 2, 48, 2).mean((3, 5)).transpose(0, 2, 3, 1)
        assert split.images.dtype == np.uint8
        assert split.images.shape == (*split.labels.shape, 48, 48, 2)
        np.testing.assert_array_equal(split.images, np.floor(means + 0.5))
        np.testing.assert_array_equal(split.labels, found[f"{name} cat"])
        np.testing.assert_array_equal(dataset.info[name], found[f"{name} info"])


def test_more_pairs_than_a_block_are_halved_alike(tmp_path, monkeypatch):
    whole = datasets.load("smallnorb", data_dir=write(tmp_path))
    monkeypatch.setattr(smallnorb, "_BLOCK", 7)
    assert datasets.load("smallnorb", data_dir=str(tmp_path)).sha256 == whole.sha256


@pytest.mark.parametrize("key", smallnorb.FILES)
def test_the_digest_depends_on_every_file(tmp_path, key):
    found = arrays(num_train=4, num_test=3)
    before = datasets.load("smallnorb", data_dir=write(tmp_path, found)).sha256
    found[key] = found[key][::-1]
    assert datasets.load("smallnorb", data_dir=write(tmp_path, found)).sha256 != before


def test_files_in_folders_of_their_names_are_found(tmp_path):
    write(tmp_path / "flat")
    for path in list((tmp_path / "flat").iterdir()):
        folder = tmp_path / "deep" / path.name
        folder.mkdir(parents=True)
        shutil.move(path, folder / path.name)
    found = datasets.load("smallnorb", data_dir=str(tmp_path / "deep"))
    assert found.train.size == 36


def test_missing_files_are_listed_with_what_is_there(tmp_path):
    (tmp_path / "norb.zip").touch()
    with pytest.raises(InputError) as caught:
        datasets.load("smallnorb", data_dir=str(tmp_path))
    message = str(caught.value)
    assert "\n" not in message
    for part in ("smallnorb was not found", *smallnorb.FILES.values(), "(it has norb.zip)"):
        assert part in message
    with pytest.raises(InputError, match=r"training-dat\.mat.* in --data_dir, which is not given"):
        datasets.load("smallnorb")


@pytest.mark.parametrize("key", smallnorb.FILES)
def test_an_incomplete_folder_names_the_missing_file(tmp_path, key):
    write(tmp_path, arrays(num_train=4, num_test=3))
    (tmp_path / smallnorb.FILES[key]).unlink()
    with pytest.raises(InputError, match=rf"{smallnorb.FILES[key]} \(plain or .gz\) is missing"):
        datasets.load("smallnorb", data_dir=str(tmp_path))


def header(*numbers):
    return struct.pack(f"<I{len(numbers) - 1}i", *numbers)


BYTES, INTEGERS = 0x1E3D4C55, 0x1E3D4C54
GOOD = arrays(num_train=4, num_test=3)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzipped"])
@pytest.mark.parametrize(
    ("key", "damaged", "message"),
    [
        ("train dat", b"", r"must have 24 bytes, got a file of 0 bytes"),
        ("test cat", content(GOOD["test cat"])[:19], r"must have 20 bytes, got .* 19 bytes"),
        ("train dat", GOOD["train dat"].astype(np.int32), r"0x1e3d4c55, 4 .*, got 0x1e3d4c54, 4"),
        ("train cat", GOOD["train cat"].astype(np.uint8), r"0x1e3d4c54, 1 .*, got 0x1e3d4c55, 1"),
        ("train cat", GOOD["train info"], r"0x1e3d4c54, 1 .*, got 0x1e3d4c54, 2"),
        ("train cat", struct.pack(">I4i", INTEGERS, 1, 4, 1, 1) + bytes(16), r"got 0x544c3d1e, "),
        ("train dat", GOOD["train dat"][..., :95], r"must be N x 2 x 96 x 96, got 4 x 2 x 96 x 95"),
        ("test info", GOOD["test info"][:, :3], r"must be N x 4, got 3 x 3"),
        ("train dat", content(GOOD["train dat"])[:-1], r"need 73728 bytes of data, got 73727"),
        ("test dat", content(GOOD["test dat"]) + b"0", r"need 55296 bytes of data, got more"),
        (
            "train dat",
            header(BYTES, 4, 2**31 - 1, 2, 96, 96),
            r"amount to 1 to .* got 2147483647 x",
        ),
        ("train dat", header(BYTES, 4, 24_300, 2, 96, 96), r"need 447897600 bytes .* got 0"),
        ("train cat", header(INTEGERS, 1, -4, 1, 1) + bytes(16), r"amount to 1 to .* got -4 = -16"),
        ("train cat", header(INTEGERS, 1, 0, 1, 1), r"amount to 1 to .* got 0 = 0"),
        ("train cat", GOOD["train cat"][:3], r"equally many pairs of images, got 4, 3 and 4"),
        ("test info", GOOD["test info"][:2], r"equally many pairs of images, got 3, 3 and 2"),
        ("train cat", GOOD["train cat"] + 2, r"labels must be 0 to 4, got 5 at index 3"),
        ("train info", GOOD["train info"] + [0, 0, 1, 0], r"azimuths must be .* 34, got 1 at ind"),
        (
            "test info",
            GOOD["test info"] + [0, 8, 0, 0],
            r"elevations must be .* 8, got 9 at index 1",
        ),
    ],
)
def test_invalid_files_are_refused(tmp_path, key, damaged, message, pack):
    if isinstance(damaged, np.ndarray) and damaged.dtype == np.int64:
        damaged = damaged.astype(np.int32)
    data_dir = write(tmp_path, GOOD | {key: damaged}, pack=pack)
    with pytest.raises(InputError, match=message) as caught:
        datasets.load("smallnorb", data_dir=data_dir)
    assert "\n" not in str(caught.value)


def test_memory_is_bounded_by_the_file(tmp_path):
    huge = header(BYTES, 4, 200_000, 2, 96, 96) + bytes(100)  # 3.7 GB
    data_dir = write_packed(tmp_path, GOOD | {"train dat": huge})
    tracemalloc.start()
    with pytest.raises(InputError, match="got 100"):
        datasets.load("smallnorb", data_dir=data_dir)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


# --- viewpoints


@pytest.mark.parametrize(
    ("viewpoints", "column", "familiar", "novel"),
    [
        ("azimuth", 2, [300, 320, 340, 0, 20, 40], range(60, 281, 20)),
        ("elevation", 1, [30, 35, 40], range(45, 71, 5)),
    ],
)
def test_viewpoints_are_those_of_the_paper(tmp_path, viewpoints, column, familiar, novel):
    whole = datasets.load("smallnorb", data_dir=write(tmp_path))
    config = mnist.Config(dataset="smallnorb", viewpoints=viewpoints)
    chosen = mnist.select_viewpoints(config, whole)
    for split, found, degrees in (
        ("train", chosen.train, familiar),
        ("test", chosen.familiar, familiar),
        ("test", chosen.test, novel),
    ):
        codes = whole.info[split][:, column]
        angles = 10 * codes if viewpoints == "azimuth" else 30 + 5 * codes
        kept = [angle in degrees for angle in angles]
        assert 0 < sum(kept) < len(kept)
        images, labels = getattr(whole, split)
        np.testing.assert_array_equal(found.images, images[kept])
        np.testing.assert_array_equal(found.labels, labels[kept])
    assert chosen.sha256 == whole.sha256
    assert mnist.select_viewpoints(dataclasses.replace(config, viewpoints="all"), whole) is whole


def test_viewpoints_that_the_data_lack_are_refused(tmp_path):
    found = arrays()
    found["test info"][:, 2] = 0
    whole = datasets.load("smallnorb", data_dir=write(tmp_path, found))
    with pytest.raises(InputError, match="54 to test from the same viewpoints and 0 from others"):
        mnist.select_viewpoints(mnist.Config(viewpoints="azimuth"), whole)


def test_viewpoints_of_another_data_set_are_refused(tmp_path, monkeypatch, capsys):
    flags = {"dataset": "mnist_small", "viewpoints": "azimuth", "workdir": tmp_path / "run"}
    status, _, stderr = in_process.run(train_mnist, flags, monkeypatch, capsys)
    assert status == 2
    assert stderr.endswith(
        "--viewpoints=azimuth needs --dataset=smallnorb or tfds:smallnorb, got "
        "--dataset=mnist_small\n"
    )
    assert not (tmp_path / "run").exists()


# --- runs


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "norb")


SETTINGS = {"dataset": "smallnorb", "shift": 0, "crop": 20, "standardize": True}


@pytest.fixture(scope="module")
def workdir(data_dir, tmp_path_factory):
    """A capsule network with a decoder, on crops of the novel azimuths."""
    path = tmp_path_factory.mktemp("runs") / "capsnet"
    return small_runs.save_run(path, data_dir, **SETTINGS, viewpoints="azimuth")


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
    """Return a function that runs a program in this process: exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def program(module, **flags):
        return in_process.run(module, flags, monkeypatch, capsys)

    return program


def test_a_run_is_loaded_with_its_crop_its_standardization_and_its_viewpoints(workdir, data_dir):
    run = trained.load(workdir)
    whole = datasets.load("smallnorb", data_dir=data_dir)
    novel = ~smallnorb.is_familiar(whole.info["test"], "azimuth")
    np.testing.assert_array_equal(run.test.images, whole.test.images[novel][:, 14:34, 14:34])
    images = run.test.images / np.float32(255)
    axes = (1, 2, 3)
    seen = (images - images.mean(axes, keepdims=True)) / images.std(axes, keepdims=True)
    lengths = np.linalg.norm(run.model(seen), axis=-1)
    for scores in (
        run.trainer.scores(run.params, images),
        run.trainer.evaluate(run.params, run.test, batch_size=8).scores,
    ):
        np.testing.assert_allclose(scores, lengths, atol=1e-4)


def test_evaluate_names_classes_and_both_kinds_of_viewpoints(program, workdir):
    status, stdout, _ = program(evaluate, workdir=workdir)
    assert status == 0
    *_, total, novel, familiar = stdout.splitlines()
    run = trained.load(workdir)
    assert stdout.splitlines()[1].split() == list(smallnorb.CLASS_NAMES)
    assert (run.test.size, run.dataset.familiar.size) == (36, 18)
    error = total.split()[2]
    assert novel == f"novel viewpoints (azimuth): test error {error} % of 36"
    assert familiar.startswith("familiar viewpoints (azimuth): test error ")
    assert familiar.endswith(" % of 18")


@pytest.mark.parametrize("module", [tweak_dimensions, parse_tree])
def test_figures_are_drawn_of_pairs(program, workdir, tmp_path, module):
    flags = {"examples": 4} if module is tweak_dimensions else {}
    status, _, stderr = program(module, workdir=workdir, output="out", index=3, **flags)
    assert status == 0, stderr
    assert len(list((tmp_path / "out").glob("*.png"))) >= 2


@pytest.mark.parametrize("module", [evaluate, tweak_dimensions, parse_tree])
def test_image_files_are_refused_in_one_line(program, workdir, module):
    Image.fromarray(np.eye(40, dtype=np.uint8) * 255).save("a.png")
    flags = {"examples": 0} if module is tweak_dimensions else {}
    status, _, stderr = program(module, workdir=workdir, images="a.png", **flags)
    assert status == 2
    assert stderr.endswith("image files cannot be read as stereo pairs, which the network takes\n")


def test_the_explorer_refuses_pairs_in_one_line(program, workdir):
    status, _, stderr = program(explore, workdir=workdir)
    assert status == 2
    assert stderr.endswith("takes stereo pairs, images of 2 channels, which cannot be drawn\n")


def test_export_says_what_its_files_take_and_its_program_standardizes(
    program, workdir, tmp_path, caplog
):
    caplog.set_level("INFO")
    status, _, _ = program(export, workdir=workdir, output="out")
    assert status == 0
    text = "--crop=20: both files take the central 20 x 20 pixels of the images of smallnorb"
    assert text in caplog.text
    assert "--standardize: network.jax_export takes images in 0 ... 1" in caplog.text
    run = trained.load(workdir)
    images = run.test.images[:3] / np.float32(255)
    program_found = jax.export.deserialize((tmp_path / "out" / export.PROGRAM).read_bytes())
    lengths = program_found.call(images)["lengths"]
    np.testing.assert_allclose(lengths, run.trainer.scores(run.params, images), atol=1e-5)
    network = models.load(tmp_path / "out" / "network.safetensors")
    seen = run.trainer.objective.inputs(images)
    np.testing.assert_allclose(
        np.linalg.norm(network(seen), axis=-1), run.trainer.scores(run.params, images), atol=1e-5
    )


def test_training_learns_classes_and_records_its_settings(data_dir, tmp_path, program):
    flags = {
        "dataset": "smallnorb", "data_dir": data_dir, "network": "pooling_cnn", "workdir": "run",
        "batch_size": 12, "num_epochs": 20, "shift": 0, "crop": 20, "brightness": 0.02,
        "contrast": 0.1, "viewpoints": "elevation", "learning_rate": 0.003,
    }  # fmt: skip
    status, _, stderr = program(train_mnist, **flags)
    assert status == 0, stderr
    assert (tmp_path / "run/figures/misclassified.png").exists()
    config = json.loads((tmp_path / "run/config.json").read_text())["config"]
    assert {config[name] for name in ("crop", "viewpoints", "contrast")} == {20, "elevation", 0.1}
    *_, last = records.read_metrics("run")
    assert last["test_error"] < 60  # of five classes; chance is 80
    status, stdout, _ = program(evaluate, workdir="run")
    assert stdout.splitlines()[-2].startswith("novel viewpoints (elevation): test error ")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 49}, r"--crop must be 0 or at most the 48 pixels of the images, .* got 49"),
        ({"crop": 20, "canvas": 60}, r"without --canvas, got 20"),
        (
            {"network": "efficient_capsnet_small_norb", "crop": 31},
            r"EfficientCapsNet: .*\(31, 31, 2\)",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(data_dir, settings, message):
    dataset = datasets.load("smallnorb", data_dir=data_dir)
    with pytest.raises(InputError, match=message):
        mnist.build(mnist.Config(dataset="smallnorb", batch_size=8, **settings), dataset)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("smallnorb_matrix_capsnet", lambda: models.MatrixCapsNet.small(rngs=nnx.Rngs(0))),
        (
            "smallnorb_efficient_capsnet",
            lambda: models.EfficientCapsNet.small_norb(rngs=nnx.Rngs(0)),
        ),
    ],
)
def test_flagfiles_build_the_networks_of_the_papers(data_dir, monkeypatch, capsys, name, wanted):
    configs = []
    monkeypatch.setattr(train_mnist, "main", configs.append)
    folder = Path(train_mnist.__file__).parent / "flagfiles"
    in_process.run(train_mnist, {"flagfile": folder / f"{name}.cfg"}, monkeypatch, capsys)
    config = dataclasses.replace(configs[0], batch_size=8)
    dataset = datasets.load("smallnorb", data_dir=data_dir)
    trainer = mnist.build(config, dataset)
    shapes = [
        jax.tree.map(lambda leaf: leaf.shape, nnx.to_pure_dict(nnx.state(network)))
        for network in (trainer.network, nnx.eval_shape(wanted))
    ]
    assert shapes[0] == shapes[1]
