"""Data sets prepared by TFDS, written by hand because preparing them needs TensorFlow."""

import io
import sys

import numpy as np
import pytest
import smallnorb_files
from PIL import Image

from experiments.data import datasets
from experiments.errors import InputError

tfds = pytest.importorskip(
    "tensorflow_datasets",
    reason="needs the package tensorflow_datasets (pip install 'capsjax[tfds]')",
)
from array_record.python import array_record_module  # noqa: E402


def write_prepared(folder, name, features, examples):
    """Write a prepared data set with these features: examples by split, with images as arrays."""
    folder.mkdir(parents=True)
    infos = []
    for split, members in examples.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record"
        )
        path = template.sharded_filepath(shard_index=0, num_shards=1)
        record = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for example in members:
            encoded = {
                key: png(value) if isinstance(value, np.ndarray) else value
                for key, value in example.items()
            }
            record.write(features.serialize_example(features.encode_example(encoded)))
        record.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=[len(members)], num_bytes=1, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=infos, check_data=False
    )


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    stream.seek(0)
    return stream


@pytest.fixture
def toy(tmp_path):
    """Return a function that writes a version of a prepared data set."""

    def make(*, version="1.0.0", shape=(6, 6, 3), image="image", num_test=4):
        folder = tmp_path / "toy" / version
        features = tfds.features.FeaturesDict(
            {
                image: tfds.features.Image(shape=(None, None, shape[-1])),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
        )
        size = shape[:2] if shape[-1] == 1 else shape
        examples = {
            split: [
                {image: np.full(size, number, np.uint8), "label": number % 3}
                for number in range(count)
            ]
            for split, count in (("train", 7), ("test", num_test))
        }
        write_prepared(folder, "toy", features, examples)
        return folder

    return make


NORB_SIZES = {
    "label_category": 5,
    "instance": 10,
    "label_elevation": 9,
    "label_azimuth": 18,
    "label_lighting": 6,
}


def write_norb(root, arrays, *, side=96):
    """Write arrays of `smallnorb_files` as TFDS prepares them, where azimuths are 0 to 17."""
    features = tfds.features.FeaturesDict(
        dict.fromkeys(("image", "image2"), tfds.features.Image(shape=(None, None, 1)))
        | {key: tfds.features.ClassLabel(num_classes=size) for key, size in NORB_SIZES.items()}
    )
    examples = {}
    for split in ("train", "test"):
        images, labels, info = (arrays[f"{split} {part}"] for part in ("dat", "cat", "info"))
        values = np.concatenate([labels[:, None], info // (1, 1, 2, 1)], 1).tolist()
        examples[split] = [
            {"image": left, "image2": right} | dict(zip(NORB_SIZES, row, strict=True))
            for (left, right), row in zip(images[..., :side, :], values, strict=True)
        ]
    write_prepared(root / "smallnorb/2.1.0", "smallnorb", features, examples)


@pytest.mark.parametrize("name", ["tfds:smallnorb", "tfds:smallnorb/2.1.0", "smallnorb"])
def test_smallnorb_is_that_of_its_files(tmp_path, name):
    arrays = smallnorb_files.arrays(num_train=19, num_test=3)
    write_norb(tmp_path / "tfds", arrays)
    dataset = datasets.load(name, data_dir=str(tmp_path / "tfds"))
    files = smallnorb_files.write(tmp_path / "files", arrays)
    wanted = datasets.load("smallnorb", data_dir=files)
    assert (dataset.name, dataset.sha256) == (name, wanted.sha256)
    assert dataset.class_names == wanted.class_names
    for split in ("train", "test"):
        np.testing.assert_array_equal(dataset.info[split], wanted.info[split])


def test_smallnorb_of_another_size_is_refused(tmp_path):
    write_norb(tmp_path, smallnorb_files.arrays(num_train=2, num_test=2), side=90)
    with pytest.raises(InputError, match=r"cannot read train: .* got uint8 of \(2, 90, 96\)"):
        datasets.load("tfds:smallnorb", data_dir=str(tmp_path))


def test_a_set_of_its_name_without_viewpoints_is_refused(tmp_path, toy):
    toy().parent.rename(tmp_path / "smallnorb")
    with pytest.raises(InputError, match=r"image, image2 and label_category, .* got image, label"):
        datasets.load("tfds:smallnorb", data_dir=str(tmp_path))


@pytest.mark.parametrize("shape", [(6, 6, 3), (9, 9, 1)])
def test_prepared_data_sets_are_read_without_tensorflow(tmp_path, toy, shape):
    toy(shape=shape)
    dataset = datasets.load("tfds:toy", data_dir=str(tmp_path))
    assert (dataset.name, dataset.num_classes) == ("tfds:toy", 3)
    assert dataset.train.images.shape == (7, *shape)
    assert dataset.train.images[:, 0, 0, 0].tolist() == list(range(7))
    assert dataset.test.labels.tolist() == [0, 1, 2, 0]
    assert dataset.test.labels.dtype == np.int32
    assert "tensorflow" not in sys.modules


def test_the_newest_version_is_read_by_default(tmp_path, toy):
    for version, num_test in (("1.9.0", 2), ("1.10.0", 3), ("1.2.0", 4)):
        toy(version=version, num_test=num_test)
    assert len(datasets.load("tfds:toy", data_dir=str(tmp_path)).test.labels) == 3
    assert len(datasets.load("tfds:toy/1.9.0", data_dir=str(tmp_path)).test.labels) == 2


@pytest.mark.parametrize(
    ("kwargs", "file", "damage", "message"),
    [
        ({"image": "picture"}, "", None, r"must have the features image .* got label, picture and"),
        ({}, "toy-train*", lambda content: content[:5000], r"TFDS cannot read"),
        ({}, "toy-test*", lambda content: b"", r"TFDS cannot read"),
        ({}, "features.json", lambda content: b"{", r"TFDS cannot read it"),
        ({}, "dataset_info.json", lambda content: b"{", r"TFDS cannot read it"),
        (
            {},
            "dataset_info.json",
            lambda content: content.replace(b'"array_record"', b'"tfrecord"'),
            r"TFDS cannot read it: NotImplementedError: .*TFRECORD",
        ),
    ],
)
def test_invalid_prepared_data_sets_are_refused(tmp_path, toy, kwargs, file, damage, message):
    folder = toy(**kwargs)
    if damage:
        path = next(folder.glob(file))
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message) as caught:
        datasets.load("tfds:toy", data_dir=str(tmp_path))
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
