"""Loading of data sets, order of batches, and normalisation of image files."""

import gzip
import hashlib
import io
import itertools
import struct
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import make_mnist_small
from experiments.data import datasets, idx, image_files
from experiments.errors import InputError

TRAIN_IMAGES, TRAIN_LABELS = idx.STEMS["train"]
TEST_IMAGES, TEST_LABELS = idx.STEMS["test"]


def idx_bytes(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 | array.ndim, *array.shape) + array.tobytes()


def fake_files():
    rng = np.random.default_rng(0)
    arrays = {}
    for (images, labels), size in zip(idx.STEMS.values(), (30, 20), strict=True):
        arrays[images] = rng.integers(0, 256, (size, 5, 5), np.uint8)
        arrays[labels] = rng.integers(0, 10, size, np.uint8)
    return {stem: idx_bytes(array) for stem, array in arrays.items()}


def write(folder, files, *, suffix=""):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, content in files.items():
        packed = gzip.compress(content) if suffix == ".gz" else content
        (folder / (stem + suffix)).write_bytes(packed)
    return str(folder)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder; the current folder is empty as well."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "home"


# --- load


def test_mnist_small_is_the_first_part_of_mnist():
    dataset = datasets.load("mnist_small")
    assert (dataset.name, dataset.num_classes) == ("mnist_small", 10)
    assert dataset.train.images.shape == (6_000, 28, 28, 1)
    assert dataset.test.images.shape == (1_000, 28, 28, 1)
    assert dataset.train.images.dtype == np.uint8
    assert dataset.train.labels.dtype == np.int32
    assert dataset.train.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert dataset.test.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(dataset.train.labels).tolist() == [
        592, 671, 581, 608, 623, 514, 608, 651, 551, 601
    ]  # fmt: skip
    assert np.bincount(dataset.test.labels).tolist() == [
        85, 126, 116, 107, 110, 87, 87, 99, 89, 94
    ]  # fmt: skip
    assert dataset.sha256 == "73b8ed2412a1adf5e6e15c5a4bd907923738f6341fab033d5867e98768776ee5"


def test_readme_of_mnist_small_has_its_digests():
    readme = (datasets.MNIST_SMALL.parent / "README.md").read_text()
    assert hashlib.sha256(datasets.MNIST_SMALL.read_bytes()).hexdigest() in readme
    assert datasets.load("mnist_small").sha256 in readme


@pytest.mark.parametrize(
    ("name", "subfolder"),
    [
        ("mnist", "."),
        ("mnist", "MNIST/raw"),
        ("fashion_mnist", "."),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_plain_and_gzipped_idx_files_give_equal_data(tmp_path, name, subfolder):
    files = fake_files()
    write(tmp_path / "plain" / subfolder, files)
    write(tmp_path / "packed" / subfolder, files, suffix=".gz")
    plain = datasets.load(name, data_dir=str(tmp_path / "plain"))
    packed = datasets.load(name, data_dir=str(tmp_path / "packed"))
    assert plain.sha256 == packed.sha256
    for dataset in (plain, packed):
        assert (dataset.name, dataset.num_classes) == (name, 10)
        assert dataset.train.images.shape == (30, 5, 5, 1)
        assert dataset.train.images.tobytes() == files[TRAIN_IMAGES][16:]
        assert dataset.test.labels.tolist() == list(files[TEST_LABELS][8:])
        assert dataset.test.labels.dtype == np.int32


@pytest.mark.parametrize("stem", [TRAIN_IMAGES, TRAIN_LABELS, TEST_IMAGES, TEST_LABELS])
def test_digest_depends_on_every_array(tmp_path, stem):
    files = fake_files()
    before = datasets.load("mnist", data_dir=write(tmp_path, files)).sha256
    files[stem] = files[stem][:-1] + bytes([(files[stem][-1] + 1) % 10])
    assert datasets.load("mnist", data_dir=write(tmp_path, files)).sha256 != before


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "cwd/data/MNIST/raw"),
        ("fashion_mnist", "cwd/data/FashionMNIST/raw"),
        ("fashion_mnist", "home/.keras/datasets/fashion-mnist"),
    ],
)
def test_default_folders_of_other_programs_are_searched(tmp_path, home, name, folder):
    write(tmp_path / folder, fake_files(), suffix=".gz")
    assert datasets.load(name).train.images.shape == (30, 5, 5, 1)


@pytest.fixture
def keras_npz(home):
    path = home / ".keras/datasets/mnist.npz"
    path.parent.mkdir(parents=True)
    zeros, labels = np.zeros((4, 28, 28), np.uint8), np.arange(4, dtype=np.uint8)
    np.savez(path, x_train=zeros, y_train=labels, x_test=zeros[:2], y_test=labels[:2])
    return path


def test_published_keras_npz_is_read(keras_npz, monkeypatch):
    digest = hashlib.sha256(keras_npz.read_bytes()).hexdigest()
    monkeypatch.setattr(datasets, "_KERAS_NPZ_SHA256", digest)
    dataset = datasets.load("mnist")
    assert dataset.train.labels.tolist() == [0, 1, 2, 3]
    assert dataset.test.images.shape == (2, 28, 28, 1)


def test_other_keras_npz_is_refused(keras_npz):
    with pytest.raises(
        InputError, match=r"mnist\.npz: damaged or not the published file: .* 731c5ac6"
    ):
        datasets.load("mnist")


def test_only_data_dir_is_searched_if_given(tmp_path, home):
    write(tmp_path / "cwd/data/MNIST/raw", fake_files())
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"mnist was not found.*empty") as caught:
        datasets.load("mnist", data_dir=str(tmp_path / "empty"))
    assert str(home) not in str(caught.value)


def test_missing_data_error_names_folders_and_flags(home):
    with pytest.raises(InputError) as caught:
        datasets.load("mnist")
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "mnist was not found",
        "data/MNIST/raw",
        str(home / ".keras/datasets/mnist.npz"),
        str(home / "tensorflow_datasets/mnist"),
        "--data_dir=DIR",
        "--download",
        "--dataset=mnist_small",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("", "", r"--dataset must be mnist_small, mnist, .* got ''\."),
        ("MNIST", "", r"--dataset must be .* got 'MNIST'\."),
        ("tfds:", "", r"--dataset must be .* got 'tfds:'\."),
        ("tfds:huggingface:mnist", "", r"--dataset must be .* got 'tfds:huggingface:mnist'\."),
        ("mnist_small", ".", r"takes no --data_dir; .*--dataset=mnist"),
        ("mnist", "nowhere", r"--data_dir must be a folder that can be read, got nowhere\."),
        ("mnist", __file__, r"--data_dir must be a folder that can be read, got .*test_data\.py"),
    ],
)
def test_invalid_names_and_folders_are_refused(home, name, data_dir, message):
    with pytest.raises(InputError, match=message):
        datasets.load(name, data_dir=data_dir)


def test_mnist_is_refused_as_fashion_mnist(tmp_path, monkeypatch):
    data_dir = write(tmp_path, fake_files())
    monkeypatch.setattr(datasets, "_MNIST_SHA256", datasets.load("mnist", data_dir=data_dir).sha256)
    with pytest.raises(InputError, match=r"the files are MNIST, not Fashion-MNIST"):
        datasets.load("fashion_mnist", data_dir=data_dir)


@pytest.mark.parametrize(
    ("stem", "array", "message"),
    [
        (TRAIN_LABELS, np.zeros(29), r"train-images.* got 30 images and 29 labels"),
        (TEST_LABELS, np.zeros(30), r"t10k-images.* got 20 images and 30 labels"),
        (TEST_IMAGES, np.zeros((20, 6, 6)), r"mnist: .* got \(5, 5, 1\) and \(6, 6, 1\)"),
    ],
)
def test_inconsistent_files_are_refused(tmp_path, stem, array, message):
    files = fake_files() | {stem: idx_bytes(array.astype(np.uint8))}
    with pytest.raises(InputError, match=message):
        datasets.load("mnist", data_dir=write(tmp_path, files))


def test_classes_above_ten_are_counted_and_keep_their_names(tmp_path):
    labels = {TRAIN_LABELS: np.arange(30) % 25 + 1, TEST_LABELS: np.arange(20) + 7}
    files = fake_files() | {k: idx_bytes(v.astype(np.uint8)) for k, v in labels.items()}
    dataset = datasets.load("mnist", data_dir=write(tmp_path, files))
    assert dataset.class_names == tuple(map(str, range(1, 27)))
    assert dataset.num_classes == 26
    assert dataset.train.labels.tolist() == (np.arange(30) % 25).tolist()


@pytest.mark.parametrize(("part", "names"), [("letters", ("A", "B", "C")), ("digits", ())])
def test_emnist_is_turned_upright(tmp_path, part, names):
    files = fake_files()
    if part == "letters":
        for stem, size in ((TRAIN_LABELS, 30), (TEST_LABELS, 20)):
            files[stem] = idx_bytes((np.arange(size) % 26 + 1).astype(np.uint8))
    emnist = {
        f"emnist-{part}-{stem.replace('t10k', 'test')}": content for stem, content in files.items()
    }
    dataset = datasets.load(f"emnist_{part}", data_dir=write(tmp_path, emnist, suffix=".gz"))
    assert dataset.class_names[:3] == names
    stored = np.frombuffer(files[TRAIN_IMAGES][16:], np.uint8).reshape(30, 5, 5)
    np.testing.assert_array_equal(dataset.train.images[..., 0], stored.swapaxes(1, 2))


def test_files_that_are_not_mnists_are_said(tmp_path, caplog):
    datasets.load("mnist", data_dir=write(tmp_path, fake_files()))
    assert "the files are not the published MNIST: 30 training and 20 test" in caplog.text


def test_a_missing_data_set_error_says_what_is_there(tmp_path):
    (tmp_path / "emnist.zip").touch()
    with pytest.raises(InputError, match=r"\(it has emnist\.zip\)"):
        datasets.load("mnist", data_dir=str(tmp_path))


def test_nonsquare_images_are_placed_on_a_canvas():
    images = np.full((3, 6, 4, 1), 9, np.uint8)
    placed = datasets.placed(datasets.Split(images, np.arange(3)), 9).images
    assert placed.shape == (3, 9, 9, 1)
    assert (placed.any(2).sum(1) == 6).all()
    assert datasets.centred(images, 9)[0, 1:7, 2:6].all()


# --- folders of images


def write_folders(root, size, *, counts=(6, 7, 8), names=("2", "10", "1"), prefix=""):
    for name, count in zip(names, counts, strict=True):
        (root / prefix / name).mkdir(parents=True)
        for number in range(count):
            image = Image.new("L", size, int(name))
            image.save(root / prefix / name / f"{number}.png")


def test_a_folder_a_class_is_a_data_set(tmp_path):
    write_folders(tmp_path, (5, 7))
    dataset = datasets.load(f"folder:{tmp_path}")
    assert dataset.class_names == ("1", "2", "10")
    assert dataset.train.images.shape == (18, 7, 5, 1)
    assert dataset.test.labels.tolist() == [0, 1, 2]
    for split in (dataset.train, dataset.test):
        values = np.array([1, 2, 10])[split.labels]
        assert (split.images == values[:, None, None, None]).all()


def test_folders_train_and_test_are_kept_apart(tmp_path):
    write_folders(tmp_path, (5, 5), prefix="train")
    write_folders(tmp_path, (5, 5), prefix="test", counts=(1, 1), names=("2", "1"))
    dataset = datasets.load(f"folder:{tmp_path}")
    assert (dataset.train.size, dataset.test.labels.tolist()) == (21, [0, 1])


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda root: None, r"one folder of images for each of at least 2 classes, got none"),
        (lambda root: write_folders(root, (5, 5), counts=(2, 2, 2)), r"there are no test images"),
        (lambda root: root.rmdir(), r"there is no such folder"),
    ],
)
def test_other_folders_are_refused(tmp_path, prepare, message):
    root = tmp_path / "own"
    root.mkdir()
    prepare(root)
    with pytest.raises(InputError, match=message):
        datasets.load(f"folder:{root}")


# --- make_mnist_small


def test_mnist_small_is_built_reproducibly(tmp_path):
    files = fake_files()
    digests = {stem: hashlib.sha256(content).hexdigest() for stem, content in files.items()}
    outputs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for output, suffix in zip(outputs, ("", ".gz"), strict=True):
        source = Path(write(tmp_path / f"source{suffix}", files, suffix=suffix))
        make_mnist_small.build(source, output, sha256=digests, num_train=7, num_test=3)
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    with zipfile.ZipFile(outputs[0]) as archive:
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    with np.load(outputs[0], allow_pickle=False) as archive:
        assert archive["train_images"].tobytes() == files[TRAIN_IMAGES][16 : 16 + 7 * 25]
        assert archive["test_labels"].tobytes() == files[TEST_LABELS][8 : 8 + 3]
        assert archive["train_images"].shape == (7, 5, 5)


def test_files_other_than_mnist_build_nothing(tmp_path):
    source = Path(write(tmp_path / "source", fake_files()))
    with pytest.raises(InputError, match=rf"{TRAIN_IMAGES}: uncompressed sha256 must be ba89"):
        make_mnist_small.build(source, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


# --- batches


def take(count, stream):
    return np.array(list(itertools.islice(stream, count)))


def test_batches_do_not_depend_on_numpys_version():
    stream = datasets.batches(10, batch_size=4, seed=7)
    assert take(3, stream).tolist() == [[8, 4, 1, 6], [3, 2, 7, 5], [3, 9, 1, 6]]


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 3), (12, 4), (5, 5), (7, 1)])
def test_an_epoch_has_each_example_at_most_once(num_examples, batch_size):
    steps = num_examples // batch_size
    epochs = take(40 * steps, datasets.batches(num_examples, batch_size=batch_size, seed=0))
    epochs = epochs.reshape(40, steps * batch_size)
    assert epochs.dtype == np.int32
    assert all(len(set(epoch)) == steps * batch_size for epoch in epochs.tolist())
    assert set(epochs.ravel().tolist()) == set(range(num_examples))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 20


@pytest.mark.parametrize("first_step", [1, 2, 3, 4, 5, 29])
def test_batches_from_first_step_continue_the_stream(first_step):
    unbroken = take(40, datasets.batches(11, batch_size=3, seed=5))
    resumed = take(
        40 - first_step, datasets.batches(11, batch_size=3, seed=5, first_step=first_step)
    )
    np.testing.assert_array_equal(resumed, unbroken[first_step:])


def test_seeds_have_different_orders():
    first, second = (take(5, datasets.batches(100, batch_size=20, seed=seed)) for seed in (0, 1))
    assert (first != second).any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch_size": 0, "seed": 0}, r"--batch_size must be 1 to 9, .* got 0\."),
        ({"batch_size": 10, "seed": 0}, r"--batch_size must be 1 to 9, .* got 10\."),
        ({"batch_size": 3, "seed": -1}, r"--seed must be 0 to .* got -1\."),
        ({"batch_size": 3, "seed": 2**64}, r"--seed must be 0 to 2\*\*64 - 1"),
    ],
)
def test_invalid_batch_arguments_are_refused_at_the_call(kwargs, message):
    with pytest.raises(InputError, match=message):
        datasets.batches(9, **kwargs)


# --- read_images


@pytest.fixture(scope="module")
def digits():
    return datasets.load("mnist_small").test.images[:20, ..., 0]


@pytest.mark.parametrize("inverted", [False, True], ids=["light ink", "dark ink"])
@pytest.mark.parametrize(
    ("side", "resample", "tolerance"),
    [(28, "NEAREST", 0.015), (280, "NEAREST", 0.015), (301, "BICUBIC", 0.04), (800, "BOX", 0.015)],
)
def test_digits_of_any_size_polarity_and_position_are_normalised_as_mnist(
    tmp_path, digits, side, resample, tolerance, inverted
):
    paths = []
    for number, digit in enumerate(digits):
        image = Image.fromarray(digit).resize((side, side), Image.Resampling[resample])
        pixels = np.pad(np.asarray(image), ((0, side // 3), (side // 2, 0)))
        paths.append(str(tmp_path / f"{number}.png"))
        Image.fromarray(255 - pixels if inverted else pixels).save(paths[-1])
    images = image_files.read_images(paths, shape=(28, 28, 1))
    assert images.shape == (20, 28, 28, 1)
    assert images.dtype == np.float32
    assert images.min() == 0
    assert images.max() == pytest.approx(1, abs=1e-4)
    assert np.abs(images[..., 0] - digits / 255).mean() < tolerance


def test_noisy_photographs_are_normalised_as_mnist(tmp_path, digits):
    rng = np.random.default_rng(0)
    paths = []
    for number, digit in enumerate(digits):
        paper = 220 - 0.7 * np.kron(np.pad(digit, ((0, 9), (5, 0))), np.ones((9, 9)))
        pixels = (paper + rng.normal(0, 9, paper.shape)).clip(0, 255).astype(np.uint8)
        paths.append(str(tmp_path / f"{number}.jpg"))
        Image.fromarray(pixels).save(paths[-1])
    images = image_files.read_images(paths, shape=(28, 28, 1))
    assert np.abs(images[..., 0] - digits / 255).mean() < 0.03


def rectangle(*, mode="L", size=(60, 90), ink=0, ground=255):
    image = Image.new(mode, size, ground)
    image.paste(ink, (10, 5, 20, 45))
    return image


@pytest.mark.parametrize(
    ("suffix", "image"),
    [
        ("png", rectangle()),
        ("bmp", rectangle(mode="RGB", ink=(0, 0, 0), ground=(255, 255, 255))),
        ("jpg", rectangle()),
        ("gif", rectangle()),
        ("webp", rectangle(mode="RGB", ink=(0, 0, 0), ground=(255, 255, 255))),
        ("png", rectangle(mode="RGBA", ink=(0, 0, 0, 255), ground=(0, 0, 0, 0))),
        ("png", rectangle(mode="1", ink=0, ground=1)),
        ("png", rectangle(ink=90, ground=160)),
        ("tif", rectangle()),
        ("png", rectangle(mode="I;16", ink=9_000, ground=61_000)),
        ("png", rectangle(mode="LA", ink=(255, 255), ground=(0, 0))),
        ("png", rectangle(ink=200, ground=20)),
    ],
)
@pytest.mark.parametrize("image_size", [28, 56])
def test_longer_side_is_20_of_28_and_centre_of_mass_in_the_middle(
    tmp_path, suffix, image, image_size
):
    path = tmp_path / f"image.{suffix}"
    image.save(path)
    result = image_files.read_images([str(path)], shape=(image_size, image_size, 1))[0, ..., 0]
    rows, columns = np.nonzero(result > 0.5)
    scale = image_size // 28
    assert np.ptp(rows) + 1 == 20 * scale
    assert np.ptp(columns) + 1 == 5 * scale
    assert abs(rows.mean() - image_size / 2) <= 0.5
    assert abs(columns.mean() - image_size / 2) <= 0.5


def test_a_digit_with_its_mass_at_one_end_is_not_cropped(tmp_path):
    pixels = np.zeros((40, 40), np.uint8)
    pixels[:2] = 255
    pixels[:, 20] = 150
    pixels = np.pad(pixels, 60)
    Image.fromarray(pixels).save(tmp_path / "hammer.png")
    result = image_files.read_images([str(tmp_path / "hammer.png")], shape=(28, 28, 1))
    assert np.ptp(np.nonzero(result[0, ..., 0])[0]) + 1 == 20


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    rectangle().save(tmp_path / "turned.png", exif=exif)
    result = image_files.read_images([str(tmp_path / "turned.png")], shape=(28, 28, 1))
    rows, columns = np.nonzero(result[0, ..., 0])
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (5, 20)


def test_colour_images_are_scaled_and_cropped_to_a_square(tmp_path):
    image = Image.new("RGB", (80, 40), (255, 0, 51))
    image.paste((0, 102, 0), (40, 0, 80, 40))
    image.save(tmp_path / "colour.png")
    result = image_files.read_images([str(tmp_path / "colour.png")], shape=(8, 8, 3))
    assert result.shape == (1, 8, 8, 3)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[0, 4, 0], [1, 0, 0.2], atol=1e-6)
    np.testing.assert_allclose(result[0, 4, 7], [0, 0.4, 0], atol=1e-6)


def png(image, **options):
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"the image cannot be read: FileNotFoundError"),
        (b"", r"the image cannot be read: UnidentifiedImageError"),
        (b"just text", r"the image cannot be read: UnidentifiedImageError"),
        (png(rectangle())[:60], r"the image cannot be read"),
        (png(rectangle(), exif=b"MM\0*"), r"the image cannot be read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", r"the image cannot be read"),
        (png(Image.new("L", (9, 9), 200)), r"the image is blank: its contrast is below 10%"),
        (png(Image.new("RGB", (9, 9), (9, 80, 200))), r"the image is blank"),
        (png(rectangle(ink=120, ground=130)), r"the image is blank"),
        (png(Image.new("I;16", (9, 9))), r"the image is blank"),
    ],
)
def test_invalid_images_are_refused(tmp_path, content, message, channels):
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=rf"bad\.png: .*{message}") as caught:
        image_files.read_images([str(path)], shape=(28, 28, channels))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("limit", [4_000, 2_000], ids=["where Pillow warns", "where it stops"])
def test_images_above_pillows_limit_are_refused(tmp_path, monkeypatch, limit):
    rectangle().save(tmp_path / "bomb.png")  # 5,400 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(InputError, match=r"bomb\.png: the image is too large: .*5400 pixels"):
        image_files.read_images([str(tmp_path / "bomb.png")], shape=(28, 28, 1))


# --- TFDS, without the package


@pytest.mark.parametrize("name", ["tfds:toy", "mnist"])
@pytest.mark.parametrize("download", [False, True])
def test_missing_tfds_error_names_the_extra(home, monkeypatch, name, download):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    if name == "mnist" and not download:
        (home / "tensorflow_datasets/mnist/3.0.1").mkdir(parents=True)
        (home / "tensorflow_datasets/mnist/3.0.1/dataset_info.json").write_text("{}")
    with pytest.raises(InputError, match=r"pip install 'capsjax\[tfds\]'"):
        datasets.load(name, download=download)


@pytest.mark.parametrize("error", [ImportError, ConnectionError, ValueError, RuntimeError])
def test_tfds_downloads_only_with_the_flag_and_its_error_is_one_line(home, monkeypatch, error):
    asked = []

    def builder(name, **kwargs):
        asked.append((name, kwargs))
        raise error("no\nluck")

    tfds = types.SimpleNamespace(
        builder=builder, download=types.SimpleNamespace(DownloadError=LookupError)
    )
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", tfds)
    with pytest.raises(InputError, match="was not found"):
        datasets.load("fashion_mnist", data_dir=".")
    assert not asked
    message = rf"fashion_mnist: TFDS cannot prepare it: {error.__name__}: no luck"
    with pytest.raises(InputError, match=message):
        datasets.load("fashion_mnist", data_dir=".", download=True)
    assert asked == [("fashion_mnist", {"data_dir": ".", "file_format": "array_record"})]


def test_without_a_home_the_included_data_are_named(monkeypatch):
    """As in a container with a user id that nobody has."""

    def home(name):
        raise KeyError(name)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", home)
    with pytest.raises(InputError, match="mnist"):
        datasets.load("mnist")
