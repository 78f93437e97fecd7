"""Files of networks: bit for bit there and back, and one clear error for every damaged file."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from capsjax import models, nn

pytestmark = pytest.mark.usefixtures("quick_compilation")

NETWORKS = {
    "CapsNet": lambda rngs: models.CapsNet(
        [17, 17, 1],
        4,
        conv_channels=2,
        primary_types=2,
        capsule_bias=0.1,
        hidden=[3, 5],
        gradient="last",
        rngs=rngs,
    ),
    "CapsNet, bfloat16": lambda rngs: models.CapsNet(
        (17, 17, 3), np.int64(3), conv_channels=2, hidden=(), dtype=jnp.bfloat16, rngs=rngs
    ),
    "EfficientCapsNet": lambda rngs: models.EfficientCapsNet(
        (16, 16, 1),
        10,
        convolutions=((4, 5, 1), (8, 3, 2)),
        primary_kernel_size=5,
        hidden=None,
        rngs=rngs,
    ),
    "MatrixCapsNet": lambda rngs: models.MatrixCapsNet(
        (20, 20, 1),
        3,
        conv_channels=4,
        primary_types=2,
        types=(3, 2),
        routing=nn.EMRouting(num_iterations=2, cost_scale=None),
        rngs=rngs,
    ),
    "SRCapsNet": lambda rngs: models.SRCapsNet(
        (24, 24, 1), 10, conv_channels=8, types=3, rngs=rngs
    ),
    "InvertedAttentionCapsNet": lambda rngs: models.InvertedAttentionCapsNet(
        (16, 16, 1), 10, channels=(8, 8), blocks=(1, 1), types=(2, 2, 2), rngs=rngs
    ),
}


def network(name):
    """A network with random numbers in place of its initial values, which take long to compile."""
    build = NETWORKS[name]
    structure, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return nnx.merge(
        structure,
        jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), state),
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_is_the_same_after_saving_and_loading(name, tmp_path):
    model, path = network(name), tmp_path / "network.safetensors"
    models.save(model, path)
    same = models.load(path)
    assert type(same) is type(model)
    assert same.arguments == model.arguments
    state, loaded = nnx.state(model), nnx.state(same)
    jax.tree.map(np.testing.assert_array_equal, state, loaded)
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, loaded)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_always_saved_as_the_same_bytes(tmp_path, name):
    model = network(name)
    for file in ("first", "second"):
        models.save(model, tmp_path / file)
    models.save(models.load(tmp_path / "first"), tmp_path / "again")
    first = (tmp_path / "first").read_bytes()
    assert (tmp_path / "second").read_bytes() == first
    assert (tmp_path / "again").read_bytes() == first


def test_statistics_of_training_are_saved(tmp_path):
    model = network("SRCapsNet")
    model.normalisation.mean[...] = jnp.arange(48.0)
    models.save(model, tmp_path / "x")
    found = models.load(tmp_path / "x").normalisation.mean[...]
    np.testing.assert_array_equal(found, np.arange(48))


def test_a_run_is_loaded_in_a_process_that_has_the_library_only(tmp_path):
    models.save(network("CapsNet"), tmp_path / "network.safetensors")
    program = (
        "import sys; sys.modules['experiments'] = None; from capsjax import models; "
        f"print(models.load({str(tmp_path)!r}).arguments)"
    )
    root = pathlib.Path(models.__file__).parents[2]
    command = [sys.executable, "-c", program]
    run = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert "('image_shape', (17, 17, 1)), ('num_classes', 4)" in run.stdout, run.stderr


def test_other_classes_and_changed_parameters_are_not_saved(tmp_path):
    layer = nn.Decoder(2, 2, (3, 3, 1), hidden=(), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"^save: network must be one of CapsNet, .*, got Decoder"):
        models.save(layer, tmp_path / "x")

    class Other(models.SRCapsNet):
        """Computes something else."""

    other = Other((24, 24, 1), 10, conv_channels=8, types=3, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"^save: network must be one of .*, got Other$"):
        models.save(other, tmp_path / "x")
    model = network("SRCapsNet")
    model.routing_bias = nnx.Param(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"^save: network must have as routing_bias float32 \[.*"):
        models.save(model, tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Tensors and metadata of a file, by which others are made."""
    path = tmp_path_factory.mktemp("saved") / "x"
    models.save(network("CapsNet"), path)
    with safetensors.safe_open(path, framework="numpy") as file:
        return safetensors.numpy.load_file(path), file.metadata()


def arguments(changes):
    def change(tensors, metadata):
        given = json.loads(metadata["arguments"]) | changes
        metadata["arguments"] = json.dumps({k: v for k, v in given.items() if v != "absent"})

    return change


def metadata(**changes):
    return lambda tensors, metadata: metadata.update(changes)


def tensors(changes):
    return lambda tensors, metadata: tensors.update(changes)


BROAD = np.zeros((4, 4), np.float32)
REFUSED = {
    "another program's file": (metadata(format="pt"), "was not written by capsjax.models.save"),
    "a later version": (metadata(version="2"), "must have version 1 of the format, got '2'"),
    "an unknown network": (metadata(network="os.system"), "must name one of CapsNet, .*, got 'os"),
    "another network": (metadata(network="SRCapsNet"), "refused arguments of SRCapsNet: missing"),
    "no JSON": (metadata(arguments="{"), "refused arguments of CapsNet: Expecting"),
    "deep JSON": (metadata(arguments="[" * 60000), "refused arguments of CapsNet: "),
    "long JSON": (metadata(arguments=" " * 70000), "70000 characters are too many"),
    "a list": (metadata(arguments="[]"), "must be a JSON object"),
    "an argument is missing": (arguments({"hidden": "absent"}), "missing or unknown: hidden"),
    "an argument is unknown": (arguments({"cls": 1}), "missing or unknown: cls"),
    "no classes": (arguments({"num_classes": 0}), "num_classes has a value that is not allowed: 0"),
    "true for 1": (arguments({"num_classes": True}), "num_classes has a value"),
    "NaN": (arguments({"primary_scale": float("nan")}), "primary_scale has a value"),
    "text for a number": (arguments({"num_iterations": "3"}), "num_iterations has a value"),
    "two sides": (arguments({"image_shape": [17, 17]}), "image_shape has a value"),
    "an object's dtype": (arguments({"dtype": "object"}), "dtype must be one of float32"),
    "an unknown gradient": (
        arguments({"gradient": "none"}),
        "of CapsNet: .*gradient",
    ),
    "small images": (arguments({"image_shape": [5, 5, 1]}), "must be at least 17 pixels"),
    "absurd sizes": (
        arguments({"conv_channels": 2**23, "primary_types": 2**23, "hidden": [2**23] * 9}),
        "must have as capsules.weights float32 .*, got ",
    ),
    "sizes beyond any": (arguments({"conv_channels": 10**30}), "conv_channels has a value"),
    "many layers": (arguments({"hidden": [1] * 9000}), "hidden must have at most"),
    "a missing tensor": (lambda t, m: t.pop("capsules.bias"), "bias float32 .*no tensor"),
    "a further tensor": (tensors({"x": BROAD}), "must have as x no tensor, got float32"),
    "another shape": (
        tensors({"capsules.bias": BROAD}),
        r"bias float32 \[4, 16\], got",
    ),
    "another dtype": (
        tensors({"capsules.bias": np.zeros((4, 16), np.float16)}),
        r"as capsules.bias float32 \[4, 16\], got float16",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_contents_are_refused_in_one_line(name, contents, tmp_path):
    change, message = REFUSED[name]
    arrays, strings = dict(contents[0]), dict(contents[1])
    change(arrays, strings)
    path = tmp_path / "network.safetensors"
    safetensors.numpy.save_file(arrays, path, metadata=strings)
    with pytest.raises(ValueError, match=message) as error:
        models.load(path)
    assert str(error.value).startswith(f"load: {path} ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400 + len(str(path))


def test_many_blocks_are_refused_before_they_are_built(tmp_path):
    path = tmp_path / "x"
    models.save(network("InvertedAttentionCapsNet"), path)
    with safetensors.safe_open(path, framework="numpy") as file:
        strings = file.metadata()
    arguments({"blocks": [10**7, 1]})(None, strings)
    safetensors.numpy.save_file(safetensors.numpy.load_file(path), path, metadata=strings)
    with pytest.raises(ValueError, match=r"blocks must have at most .* together, got 10000001"):
        models.load(path)


def test_damaged_files_are_refused(contents, tmp_path):
    path = tmp_path / "x"
    whole = safetensors.numpy.save(*contents)
    header = (2**60).to_bytes(8, "little")
    for content in (b"", b"\x80\x04N.", whole[:100], whole[:-1], whole + b"x", header + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^load: {path} is damaged or no safetensors file"):
            models.load(path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"experiments\.export --workdir="):
        models.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        models.load(tmp_path / "none")
