"""Programs that read a CapsNet run take a safetensors file in its place, before any training."""

import json
import shutil

import in_process
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import small_runs
from flax import nnx
from PIL import Image

from capsjax import lengths, models
from experiments import evaluate, export, parse_tree, tweak_dimensions
from experiments.data import image_files
from experiments.errors import InputError
from experiments.training import trained

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Other sizes than those of any run.
TINY = {
    "conv_channels": 2,
    "kernel_size": 8,
    "primary_types": 1,
    "primary_length": 3,
    "capsule_length": 3,
    "hidden": (5,),
}


def save(path, shape=(17, 17, 1), *, has_decoder=True):
    """Save a small network, with what training does to the decoder's biases."""
    model = models.CapsNet(shape, 4, **TINY, rngs=nnx.Rngs(0))
    if has_decoder:
        for layer in model.decoder.layers:
            layer.bias[...] = jnp.full(layer.bias.shape, 0.1)
    models.save(model, path)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network and its file."""
    path = tmp_path_factory.mktemp("weights") / "network.safetensors"
    return save(path), str(path)


@pytest.fixture
def image(tmp_path):
    pixels = np.zeros((100, 80), np.uint8)
    pixels[20:80, 35:45] = 255
    path = tmp_path / "bar.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def test_evaluate_classifies_images_as_the_network_does(model, image, monkeypatch, capsys, caplog):
    network, path = model
    flags = {"workdir": path, "images": image}
    with caplog.at_level("INFO"):
        status, stdout, _ = in_process.run(evaluate, flags, monkeypatch, capsys)
    assert status == 0
    assert f"{path}, a file of weights" in caplog.text
    pixels = image_files.read_images([image], shape=(17, 17, 1))
    expected = np.asarray(lengths(jax.jit(network)(pixels[0])))
    shown = np.array(stdout.splitlines()[1].split("|")[1].split(), float)
    np.testing.assert_allclose(shown, expected, atol=6e-4)


@pytest.mark.parametrize(
    ("program", "flags", "output"),
    [
        (parse_tree, {}, "bar_tree.png"),
        (tweak_dimensions, {"examples": 0}, "bar_tweaks.png"),
    ],
)
def test_figures_are_drawn(program, flags, output, model, image, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tweak_dimensions, "animate", lambda *_, **__: b"")  # it takes seconds
    flags = {"workdir": model[1], "images": image, "output": tmp_path, **flags}
    assert in_process.run(program, flags, monkeypatch, capsys)[0] == 0
    assert (tmp_path / output).exists()


def test_export_writes_the_same_network_beside_the_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "mine.safetensors"
    save(path)
    assert in_process.run(export, {"workdir": path}, monkeypatch, capsys)[0] == 0
    before, after = map(safetensors.numpy.load_file, (path, tmp_path / "network.safetensors"))
    assert before.keys() == after.keys()
    for name, values in before.items():
        np.testing.assert_array_equal(after[name], values)
    program = jax.export.deserialize(bytearray((tmp_path / "network.jax_export").read_bytes()))
    assert "reconstructions" in str(program.out_tree)


@pytest.mark.parametrize(
    ("program", "flags"), [(evaluate, {}), (parse_tree, {}), (tweak_dimensions, {"images": "a"})]
)
def test_what_needs_test_images_is_refused(program, flags, model, monkeypatch, capsys):
    flags = {"workdir": model[1], **flags}
    status, stdout, stderr = in_process.run(program, flags, monkeypatch, capsys)
    assert (status, stdout, stderr.count("\n")) == (2, "", 1)
    assert f"workdir {model[1]} is a file of weights, which has no test images" in stderr


def test_a_decoder_that_never_learned_is_refused(tmp_path, image, monkeypatch, capsys):
    path = tmp_path / "network.safetensors"
    save(path, has_decoder=False)
    flags = {"workdir": path, "images": image, "examples": 0, "output": tmp_path}
    status, _, stderr = in_process.run(tweak_dimensions, flags, monkeypatch, capsys)
    assert status == 2
    assert "was trained without reconstruction" in stderr


def test_files_that_hold_no_such_network_are_refused(tmp_path, image, monkeypatch, capsys):
    text, two, broken = (tmp_path / f"{k}.safetensors" for k in range(3))
    text.write_text("no network")
    save(two, shape=(17, 17, 2))
    network = save(broken)
    network.capsules.weights[...] = jnp.full(network.capsules.weights.shape, jnp.nan)
    models.save(network, broken)
    for path, reason in (
        (text, f"cannot be read: load: {text} is damaged or no safetensors file"),
        (two, "must take images of 1 or 3 channels, got 2"),
        (broken, "has weights that are not finite"),
    ):
        flags = {"workdir": path, "images": image}
        status, stdout, stderr = in_process.run(evaluate, flags, monkeypatch, capsys)
        assert (status, stdout, stderr.count("\n")) == (2, "", 1)
        assert stderr.startswith(f"evaluate: workdir {path} {reason}")


def test_other_networks_are_refused(model, monkeypatch):
    monkeypatch.setattr(models, "load", lambda path: nnx.Rngs(0))
    with pytest.raises(InputError, match=r"^workdir .* holds a Rngs, no CapsNet$"):
        trained.load(model[1], with_data=False)


def test_the_weights_that_come_along_have_a_decoder():
    run = trained.load(str(trained.WEIGHTS), with_data=False)
    assert (run.step, bool(run.config.reconstruction_weight)) == (None, True)
    assert run.dataset.test.images.shape == (0, 28, 28, 1)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    small_runs.save_run(folder / "run", small_runs.write_digits(folder / "digits"))
    return folder / "run"


@pytest.mark.parametrize("network", ["capsnet", "pooling_cnn", "sr_capsnet"])
def test_a_copied_run_tells_sizes_and_names_without_its_data(network, tmp_path):
    for split in ("train", "test"):
        for name in ("circle", "square", "triangle"):
            folder = tmp_path / "shapes" / split / name
            folder.mkdir(parents=True)
            for k in range(4):
                image = np.random.default_rng(k).integers(0, 256, (20, 18), np.uint8)
                Image.fromarray(image).save(folder / f"{k}.png")
    dataset = f"folder:{tmp_path / 'shapes'}"
    small_runs.save_run(tmp_path / "run", "", dataset=dataset, network=network)
    with_data = trained.load(str(tmp_path / "run"))
    shutil.rmtree(tmp_path / "shapes")
    run = trained.load(str(tmp_path / "run"), with_data=False)
    assert run.dataset.facts == with_data.dataset.facts
    assert run.dataset.class_names == ("circle", "square", "triangle")
    assert run.test.images.shape == (0, 20, 18, 1)
    jax.tree.map(np.testing.assert_array_equal, run.params, with_data.params)


@pytest.mark.parametrize(
    "changes",
    [
        *({"image_shape": shape} for shape in ([17, 17], [17, 0, 1], [17.0, 17, 1], "17")),
        *({"num_classes": number} for number in (0, "10", None)),
        *({"class_names": names} for names in (["a"], [1] * 10, None, {})),
        {"class_names": ...},
    ],
    ids=str,
)
def test_damaged_sizes_are_named(changes, small_run, tmp_path):
    run = json.loads((small_run / "config.json").read_text())
    data = run["data"] | changes
    run["data"] = {name: value for name, value in data.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match=r"config\.json is damaged at data \("):
        trained.load(str(tmp_path), with_data=False)


def test_a_run_of_an_earlier_version_asks_for_its_data(small_run, tmp_path):
    workdir = shutil.copytree(small_run, tmp_path / "run")
    run = json.loads((workdir / "config.json").read_text())
    del run["data"]
    (workdir / "config.json").write_text(json.dumps(run))
    assert trained.load(str(workdir), with_data=False).test.size == 60
    run["config"]["data_dir"] = str(tmp_path / "moved")
    (workdir / "config.json").write_text(json.dumps(run))
    with pytest.raises(InputError, match="moved"):
        trained.load(str(workdir), with_data=False)
