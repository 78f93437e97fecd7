"""Reader of idx files, with valid, invalid and random contents."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.data import idx
from experiments.errors import InputError

LABELS = np.arange(30, dtype=np.uint8)
IMAGES = np.arange(750, dtype=np.uint16).astype(np.uint8).reshape(30, 5, 5)


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 | array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["idx", "idx.gz"])
@pytest.mark.parametrize(
    ("read", "array"),
    [
        (idx.read_labels, LABELS),
        (idx.read_images, IMAGES),
        (idx.read_images, IMAGES[:1, :1, :1]),
        (idx.read_images, IMAGES[:, :4]),
    ],
)
def test_arrays_are_read_back(tmp_path, read, array, pack):
    path = tmp_path / ("file.gz" if pack is gzip.compress else "file")
    path.write_bytes(pack(idx_bytes(array)))
    result = read(path)
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result, array[..., None] if array.ndim == 3 else array)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["idx", "idx.gz"])
@pytest.mark.parametrize("name", ["file", "file.gz"])
def test_gzip_is_told_by_content(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(idx_bytes(IMAGES)))
    np.testing.assert_array_equal(idx.read_images(tmp_path / name)[..., 0], IMAGES)


@pytest.mark.parametrize(("kind", "dtype"), [(0x09, "i1"), (0x0B, ">i2"), (0x0C, ">i4")])
def test_labels_of_other_integer_types_are_read(tmp_path, kind, dtype):
    content = struct.pack(">2I", kind << 8 | 1, 30) + LABELS.astype(dtype).tobytes()
    (tmp_path / "labels").write_bytes(content)
    np.testing.assert_array_equal(idx.read_labels(tmp_path / "labels"), LABELS)


@pytest.mark.parametrize("array", [LABELS, IMAGES])
def test_header_precedes_the_array(array):
    assert idx.header(array) + array.tobytes() == idx_bytes(array)


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["idx", "idx.gz"])
@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (idx.read_images, b"", r"starts with 16 bytes of header, got a file of 0 bytes"),
        (
            idx.read_labels,
            b"\0\0\x08\x01\0\0\0",
            r"starts with 8 bytes of header, got a file of 7 bytes",
        ),
        (idx.read_images, idx_bytes(LABELS), r"is 0x00000803, got 0x00000801"),
        (idx.read_labels, idx_bytes(IMAGES), r"is 0x00000801, got 0x00000803"),
        (idx.read_labels, b"\0\0\x0d\x01" + bytes(8), r"is 0x00000801, got 0x00000d01"),
        (idx.read_images, b"\0\0\x0c\x03" + bytes(28), r"is 0x00000803, got 0x00000c03"),
        (idx.read_images, idx_bytes(IMAGES)[:-1], r"30 x 5 x 5, need 750 bytes .* got 749"),
        (idx.read_images, idx_bytes(IMAGES) + b"\0", r"need 750 bytes .* got more"),
        (idx.read_labels, idx_bytes(LABELS)[:-9], r"in the header, 30, need 30 .* got 21"),
        (idx.read_labels, idx_bytes(LABELS[:0]), r"amount to 1 to 4294967296 bytes .* got 0 = 0"),
        (idx.read_images, idx_bytes(IMAGES[:, :0]), r"amount to 1 to .* got 30 x 0 x 5 = 0"),
        (
            idx.read_images,
            struct.pack(">4I", 0x803, 2**32 - 1, 28, 28),
            r"amount to 1 to 4294967296 bytes of data, got 4294967295 x 28 x 28 = 3367",
        ),
    ],
)
def test_invalid_contents_are_refused(tmp_path, read, content, message, pack):
    path = tmp_path / ("file.gz" if pack is gzip.compress else "file")
    path.write_bytes(pack(content))
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def with_flipped_bits(packed, position):
    return packed[:position] + bytes([packed[position] ^ 0xFF]) + packed[position + 1 :]


@pytest.mark.parametrize(
    "content",
    [
        gzip.compress(idx_bytes(IMAGES))[:-9],
        gzip.compress(idx_bytes(IMAGES)) + b"more",
        with_flipped_bits(gzip.compress(idx_bytes(IMAGES)), 60),
        with_flipped_bits(gzip.compress(idx_bytes(IMAGES)), -5),
    ],
    ids=["cut", "trailing bytes", "damaged data", "damaged checksum"],
)
def test_corrupt_gzip_is_refused(tmp_path, content):
    path = tmp_path / "file.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"file\.gz: the file cannot be read: \S+"):
        idx.read_images(path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: the file cannot be read: .*No such file"):
        idx.read_labels(tmp_path / "nowhere")


STEMS = [stem for pair in idx.STEMS.values() for stem in pair]


@pytest.mark.parametrize("missing", STEMS)
def test_incomplete_folders_are_refused(tmp_path, missing):
    for stem in STEMS:
        if stem != missing:
            (tmp_path / f"{stem}.gz").touch()
    with pytest.raises(
        InputError, match=rf": {missing} \(plain or \.gz\) is missing\. The folder has t"
    ):
        idx.locate(tmp_path)


def test_plain_files_are_preferred_and_empty_folders_allowed(tmp_path):
    assert idx.locate(tmp_path) == {}
    assert idx.locate(tmp_path / "nowhere") == {}
    for stem in STEMS:
        (tmp_path / f"{stem}.gz").touch()
    (tmp_path / STEMS[1]).touch()
    suffixes = [path.suffix for path in idx.locate(tmp_path).values()]
    assert suffixes == [".gz", "", ".gz", ".gz"]


@pytest.mark.parametrize(
    "spelling",
    [
        lambda stem: stem.replace("-idx", ".idx"),
        lambda stem: stem.upper() + ".GZ",
        lambda stem: f"{stem}/{stem}",
        lambda stem: f"{stem}.gz/{stem.replace('-idx', '.idx')}",
    ],
)
def test_other_spellings_of_the_names_are_found(tmp_path, spelling):
    for stem in STEMS:
        path = tmp_path / spelling(stem)
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert idx.locate(tmp_path) == {stem: tmp_path / spelling(stem) for stem in STEMS}


@pytest.mark.parametrize(
    "content",
    [struct.pack(">2I", 0x801, 2**32 - 1), struct.pack(">2I", 0x801, 1) + bytes(2**26)],
    ids=["header of 4 GiB on nothing", "64 MiB behind a header of 1 byte"],
)
def test_memory_is_bounded_by_header_and_file(tmp_path, content):
    path = tmp_path / "labels.gz"
    path.write_bytes(gzip.compress(content, 1))
    tracemalloc.start()
    with pytest.raises(InputError):
        idx.read_labels(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def header(magic, shape):
    return struct.pack(f">{1 + len(shape)}I", magic, *shape)


def whole_file(shape, fill):
    return idx_bytes(np.full(shape, fill, np.uint8))


sizes = st.one_of(st.integers(0, 4), st.integers(0, 2**32 - 1))
contents = st.one_of(
    st.binary(max_size=80),
    st.builds(header, st.integers(0x800, 0x804), st.lists(sizes, min_size=1, max_size=3)),
    st.builds(whole_file, st.sampled_from([(1,), (9,), (3, 2, 2)]), st.integers(0, 255)),
)


@settings(max_examples=300, deadline=None)
@given(content=contents, tail=st.binary(max_size=2), pack=st.booleans(), flip=st.integers(0, 60))
def test_any_bytes_give_their_array_or_an_input_error(tmp_path_factory, content, tail, pack, flip):
    content += tail
    path = tmp_path_factory.getbasetemp() / ("fuzz.gz" if pack else "fuzz")
    packed = gzip.compress(content) if pack else content
    path.write_bytes(with_flipped_bits(packed, flip) if flip < len(packed) else packed)
    for read, header_size in ((idx.read_images, 16), (idx.read_labels, 8)):
        try:
            array = read(path)
        except InputError:
            continue
        assert array.size == len(content) - header_size
        assert not pack or array.tobytes() == content[header_size:]
