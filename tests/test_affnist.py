"""affNIST: reading and validating its files, and the generated affnist_like set."""

import dataclasses
import logging

import numpy as np
import pytest
from scipy import io

from experiments.data import affnist
from experiments.data.affine import Pose, warp
from experiments.data.datasets import Dataset, Split, centred
from experiments.errors import InputError


def fields(size=7):
    """Return the struct in affNIST's files, with the fields that are read and two others."""
    rng = np.random.default_rng(0)
    labels = np.arange(size, dtype=np.uint8)[None] % 10
    return {
        "affine_matrix": np.zeros((1, size)),
        "image": rng.integers(0, 256, (1600, size), np.uint8),
        "label_one_of_n": np.eye(10, dtype=np.uint8)[:, labels[0]],
        "label_int": labels,
    }


def save(folder, struct, name="transformed/test.mat", **options):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    io.savemat(path, {"affNISTdata": struct}, **options)
    return path


@pytest.mark.parametrize("name", ["transformed/test.mat", "transformed/test_batches/1.mat"])
@pytest.mark.parametrize("kind", [np.uint8, float])
def test_columns_are_images_in_row_major_order(tmp_path, name, kind):
    struct = fields()
    struct["label_int"] = struct["label_int"].astype(kind)
    path = save(tmp_path, struct, name, do_compression=True)
    assert affnist.find(str(tmp_path)) == path
    split = affnist.read(path)
    assert split.images.shape == (7, 40, 40, 1)
    assert split.images.dtype == np.uint8
    assert split.images[3, 2, 1, 0] == struct["image"][2 * 40 + 1, 3]
    np.testing.assert_array_equal(split.labels, np.arange(7))
    assert split.labels.dtype == np.int32


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"image": np.zeros((784, 7), np.uint8)}, r"image must be uint8 of shape \(1600, N\), got"),
        ({"image": np.zeros((1600, 7))}, "image must be uint8 .* got float64"),
        ({"image": np.zeros((1600, 7, 1, 2), np.uint8)}, "image must be uint8 .* got uint8 of"),
        ({"image": np.zeros((1600, 0), np.uint8)}, "label_int must have shape .* at least 1"),
        ({"image": "text"}, "image is not a numeric array"),
        ({"image": {"a": 1}}, "image is not a numeric array"),
        ({"label_int": np.zeros((1, 6))}, r"label_int must have shape \(1, N\), N = 7"),
        ({"label_int": "1234567"}, "label_int is not a numeric array"),
        ({"label_int": np.ones((1, 7)) * 1j}, "an array is complex"),
        ({"label_int": np.full((1, 7), 10)}, "label_int must be whole numbers from 0 to 9"),
        ({"label_int": np.full((1, 7), 0.5)}, "label_int must be whole numbers from 0 to 9"),
        ({"label_int": np.full((1, 7), np.nan)}, "label_int must be whole numbers from 0 to 9"),
    ],
)
def test_invalid_shapes_and_types_are_refused(tmp_path, others, message):
    path = save(tmp_path, fields() | others)
    with pytest.raises(InputError, match=message) as raised:
        affnist.read(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    "struct", [{"image": np.zeros((1600, 1), np.uint8)}, np.zeros((3, 3)), "text", 1.0]
)
def test_other_structs_are_refused(tmp_path, struct):
    path = save(tmp_path, struct)
    with pytest.raises(InputError, match="is not a MATLAB file with a struct affNISTdata"):
        affnist.read(path)


@pytest.mark.parametrize(
    "content",
    [b"", b"text", b"\0" * 400, b"MATLAB 7.3 MAT-file" + b" " * 105 + b"\0\2IM" + b"x" * 99],
)
def test_other_file_formats_are_refused(tmp_path, content):
    (tmp_path / "test.mat").write_bytes(content)
    with pytest.raises(InputError, match="is not a MATLAB file with a struct affNISTdata"):
        affnist.read(tmp_path / "test.mat")


def test_just_centered_digits_are_not_found(tmp_path):
    # The author's archives hold just_centered/test.mat, with the same fields and sizes.
    save(tmp_path, fields(), "test.mat")
    assert affnist.find(str(tmp_path)) is None


def test_the_whole_test_set_is_preferred_to_its_first_part(tmp_path):
    path = save(tmp_path, fields(), "transformed/test.mat")
    save(tmp_path, fields(), "transformed/test_batches/1.mat")
    assert affnist.find(str(tmp_path)) == path


def test_long_names_and_unknown_users_have_no_files():
    assert affnist.find("x" * 300) is None
    assert affnist.find("~nosuchuser/affnist") is None


@pytest.fixture(scope="module")
def split():
    images = np.zeros((400, 28, 28, 1), np.uint8)
    images[:, 6:22, 10:18] = 255
    images[7] = 0
    return Split(images, np.arange(400, dtype=np.int32) % 10)


def test_affnist_like_crops_no_ink_and_uses_all_positions(split):
    made = affnist.make_affnist_like(split)
    assert made.images.shape == (400, 40, 40, 1)
    assert made.images.dtype == np.uint8
    np.testing.assert_array_equal(made.labels, split.labels)
    area = made.images.sum((1, 2, 3)) / 255
    assert not area[7]
    # The bar has 128 pixels; width and height are scaled by 0.8 to 1.2, and shear keeps the area.
    kept = np.delete(area, 7) / 128
    assert 0.63 < kept.min() < 0.75
    assert 1.3 < kept.max() < 1.45
    # On each side, some images touch the border, but only a few.
    for edge in (
        made.images[:, 0],
        made.images[:, -1],
        made.images[:, :, 0],
        made.images[:, :, -1],
    ):
        assert 0.005 < edge.any((1, 2)).mean() < 0.2


def test_affnist_like_is_deterministic(split):
    once, again = affnist.make_affnist_like(split), affnist.make_affnist_like(split)
    np.testing.assert_array_equal(once.images, again.images)
    assert len(np.unique(once.images, axis=0)) > 390


@pytest.fixture
def dataset(split):
    return Dataset("mnist", 10, split, split, "da7a")


def test_test_sets_have_their_names(dataset, tmp_path):
    assert affnist.load_test_sets(dataset, 28, folder="") == {}
    assert [*affnist.load_test_sets(dataset, 40, folder="")] == ["affnist_like"]
    save(tmp_path, fields())
    assert [*affnist.load_test_sets(dataset, 40, folder=str(tmp_path))] == ["affnist"]
    with pytest.raises(
        InputError, match=r"^--affnist_dir needs runs with --canvas=40, got .*28x28"
    ):
        affnist.load_test_sets(dataset, 28, folder=str(tmp_path))


def test_a_folder_without_files_is_refused(dataset, tmp_path):
    save(tmp_path, fields())
    named = str(tmp_path / "none")
    with pytest.raises(InputError, match=r"none has none of transformed/test\.mat, "):
        affnist.load_test_sets(dataset, 40, folder=named, data_dir=str(tmp_path))


def test_affnist_is_found_in_data_dir(dataset, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    empty = tmp_path / "empty"
    assert [*affnist.load_test_sets(dataset, 40, folder="", data_dir=str(empty))] == [
        "affnist_like"
    ]
    (message,) = caplog.messages
    assert message.startswith("using affnist_like, made from the test images, instead of affNIST: ")
    assert f"--data_dir={empty} has none of transformed/test.mat" in message
    path = save(tmp_path, fields())
    assert (
        affnist.load_test_sets(dataset, 40, folder="", data_dir=str(tmp_path))["affnist"].size == 7
    )
    assert affnist.load_test_sets(dataset, 28, folder="", data_dir=str(tmp_path)) == {}
    path.write_bytes(b"damaged")
    with pytest.raises(InputError, match="is not a MATLAB file"):
        affnist.load_test_sets(dataset, 40, folder="", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["mnist_small", "tfds:mnist", "tfds:mnist/3.0.1"])
def test_affnist_is_used_for_all_data_sets_of_mnist_digits(dataset, tmp_path, name):
    save(tmp_path, fields())
    digits = dataclasses.replace(dataset, name=name)
    assert [*affnist.load_test_sets(digits, 40, folder=str(tmp_path))] == ["affnist"]


@pytest.mark.parametrize(
    ("name", "channels"), [("fashion_mnist", 1), ("tfds:mnist_corrupted", 1), ("mnist", 3)]
)
def test_affnist_is_not_used_for_other_images(dataset, tmp_path, caplog, name, channels):
    caplog.set_level(logging.INFO)
    save(tmp_path, fields())
    images = np.repeat(dataset.test.images, channels, axis=-1)
    others = dataclasses.replace(dataset, name=name, test=dataset.test._replace(images=images))
    own = f"{name} with images of 28x28x{channels}"
    with pytest.raises(
        InputError, match=f"^--affnist_dir needs runs on MNIST digits.*, got {own}$"
    ):
        affnist.load_test_sets(others, 40, folder=str(tmp_path))
    found = affnist.load_test_sets(others, 40, folder="", data_dir=str(tmp_path))
    assert [*found] == ["affnist_like"]
    expected = np.repeat(affnist.make_affnist_like(dataset.test).images, channels, axis=-1)
    np.testing.assert_array_equal(found["affnist_like"].images, expected)
    assert f"the runs are on {own}" in caplog.text


def test_centred_images_are_in_the_middle(split):
    images = centred(split.images, 41)
    assert images.shape == (400, 41, 41, 1)
    np.testing.assert_array_equal(images[:, 6:34, 6:34], split.images)
    assert images.sum() == split.images.sum()
    np.testing.assert_array_equal(centred(split.images, 28), split.images)
    still = warp(images[:2] / np.float32(255), Pose.broadcast(2))
    np.testing.assert_array_equal(still, images[:2] / np.float32(255))
