"""Data sets prepared by TFDS, written by hand because preparing them needs TensorFlow."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from experiments.data import datasets
from experiments.errors import InputError

tfds = pytest.importorskip(
    "tensorflow_datasets",
    reason="needs the package tensorflow_datasets (pip install 'capsjax[tfds]')",
)
from array_record.python import array_record_module  # noqa: E402


@pytest.fixture
def toy(tmp_path):
    """Return a function that writes a version of a prepared data set."""

    def make(*, version="1.0.0", shape=(6, 6, 3), image="image", num_test=4):
        mode = "L" if shape[-1] == 1 else "RGB"
        folder = tmp_path / "toy" / version
        folder.mkdir(parents=True)
        features = tfds.features.FeaturesDict(
            {
                image: tfds.features.Image(shape=(None, None, shape[-1])),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
        )
        infos = []
        for split, size in (("train", 7), ("test", num_test)):
            template = tfds.core.ShardedFileTemplate(
                data_dir=folder, dataset_name="toy", split=split, filetype_suffix="array_record"
            )
            path = template.sharded_filepath(shard_index=0, num_shards=1)
            record = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            for number in range(size):
                picture = Image.new(mode, shape[1::-1], (number,) * shape[-1])
                png = io.BytesIO()
                picture.save(png, "PNG")
                png.seek(0)
                example = {image: png, "label": number % 3}
                record.write(features.serialize_example(features.encode_example(example)))
            record.close()
            infos.append(
                tfds.core.SplitInfo(
                    name=split, shard_lengths=[size], num_bytes=1, filename_template=template
                )
            )
        tfds.folder_dataset.write_metadata(
            data_dir=folder, features=features, split_infos=infos, check_data=False
        )
        return folder

    return make


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
