"""explore, without a browser: arrays in, the parts of the page out, and what is refused."""

import base64
import dataclasses
import io
import math
import re
import socket

import in_process
import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image, ImageDraw

from capsjax import lengths, models
from experiments import explore
from experiments.analysis import evidence
from experiments.errors import InputError
from experiments.explore_page import views
from experiments.training import trained

pytestmark = pytest.mark.usefixtures("quick_compilation")

HOSTILE = "<img src=x onerror=alert(1)>${1+1}{{2}}"


def drawn(draw, side=views.CANVAS):
    """What the page sends for a drawing."""
    picture = Image.new("RGBA", (side, side), "black")
    draw(ImageDraw.Draw(picture))
    content = io.BytesIO()
    picture.save(content, "PNG")
    png = f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"
    return {"png": png, "drawn": True}


def seven(pen):
    pen.line([(60, 60), (210, 60), (120, 240)], fill="white", width=22)


@pytest.fixture(scope="module")
def explorer():
    return explore.Explorer(trained.load(str(trained.WEIGHTS), with_data=False), "weights")


@pytest.fixture(scope="module")
def image(explorer):
    return views.read_canvas(drawn(seven), explorer.shape)


def test_a_drawing_is_placed_as_the_digits_of_mnist_are(image):
    assert (image.shape, image.dtype) == ((28, 28, 1), np.float32)
    rows = np.flatnonzero(image.any(axis=(1, 2)))
    assert np.ptp(rows) + 1 == 20
    columns = np.average(np.arange(28), weights=image.sum(axis=(0, 2)))
    assert abs(columns - 14) <= 0.5


def test_nothing_drawn_is_no_image(explorer):
    assert views.read_canvas(None, explorer.shape) is None
    assert views.read_canvas(drawn(lambda pen: None), explorer.shape) is None
    empty = explorer.answer(None, *[0] * 19)
    assert "Draw one digit" in empty.says
    assert empty[1:] == ("", "", "", "")


def test_colour_is_kept_for_networks_of_colour_images():
    box = drawn(lambda pen: pen.rectangle((0, 0, 139, 279), fill="red"))
    image = views.read_canvas(box, (28, 28, 3))
    np.testing.assert_array_equal(image[:, :14], np.broadcast_to([1, 0, 0], (28, 14, 3)))
    assert not image[:, 14:].any()


@pytest.mark.parametrize(
    "value",
    [
        1,
        "data:image/png;base64,AAAA",
        {"drawn": True},
        {"png": 3, "drawn": True},
        {"png": "data:image/png;base64,AAAA", "drawn": True},
        {"png": "data:image/png;base64,\N{SNOWMAN}", "drawn": True},
        drawn(seven, side=400),
        drawn(seven) | {"drawn": False},
    ],
    ids=str,
)
def test_what_the_page_does_not_send_is_refused_in_one_line(explorer, value):
    with pytest.raises(InputError, match=r"^the page sent no drawing"):
        views.read_canvas(value, explorer.shape)
    parts = explorer.answer(value, *[0] * 19)
    assert parts.says.startswith('<p class="says error" role="status">the page sent no drawing')
    assert parts.bars == ""


def test_without_sliders_nothing_changes(explorer, image):
    shown = explorer.view(image, 0, 0, 0)
    np.testing.assert_array_equal(*shown.images)
    np.testing.assert_allclose(*shown.lengths, atol=1e-6)
    np.testing.assert_allclose(*shown.reconstructions, atol=1e-6)
    assert shown.angle == pytest.approx(0, abs=0.1)


def test_a_view_is_what_the_network_computes(explorer, image):
    """Turned and shifted, with one dimension changed."""
    added = np.zeros(16, np.float32)
    added[3] = 0.25
    shown = explorer.view(image, 30, 0, 2, *added)
    np.testing.assert_array_equal(shown.images[0], image)
    assert abs(shown.images[1] - image).max() > 0.5
    model = models.load(trained.WEIGHTS)
    (before, after), trace = jax.jit(
        lambda x: (model(x), evidence.route(model, model.primary_poses(x[1])))
    )(shown.images)
    np.testing.assert_allclose(shown.lengths, lengths(np.stack([before, after])), atol=1e-5)
    winner = shown.lengths[1].argmax()
    units = [x[winner] / np.linalg.norm(x[winner]) for x in (before, after)]
    assert shown.angle == pytest.approx(math.degrees(math.acos(units[0] @ units[1])), abs=0.1)
    changed = np.array([after, after])
    changed[1, winner] += added
    drawn = jax.jit(model.reconstruct)(changed, np.full(2, winner))
    np.testing.assert_allclose(shown.reconstructions, drawn, atol=1e-4)
    assert abs(drawn[1] - drawn[0]).max() > 0.05
    _, contributions, history = map(np.asarray, trace)
    np.testing.assert_allclose(shown.history, history[:, winner], atol=1e-5)
    maps = evidence.sum_by_position(contributions[..., winner], explorer.fields)
    np.testing.assert_allclose(shown.evidence, maps, atol=1e-5)


def test_the_parts_say_lengths_shape_and_iterations(explorer, image):
    parts = explorer.answer(drawn(seven), *[0] * 19)
    assert "Longest capsule: <b>7</b>, length 0.9" in parts.says
    assert "moved" not in parts.says
    assert parts.bars.count("<tr") == 10
    assert '<tr class="winner"><th>7</th>' in parts.bars
    assert parts.pictures.count("<img") == 2
    assert "stroke width" in parts.tweaked
    assert "iteration 3: length" in parts.evidence
    assert parts.evidence.count("<circle") == 3 * explorer.fields.positions
    moved = explorer.answer(drawn(seven), 40, 0, 0, *[0] * 16)
    assert "Before the drawing was moved: 7" in moved.says
    assert moved.pictures.count("<img") == 3


def test_names_and_doubts_are_shown_and_never_run(explorer, image):
    names = [f"{HOSTILE}{k}" for k in range(10)]
    parts = views.sections(
        explorer.view(image, 0, 0, 0), explorer.fields, names=names, doubt=HOSTILE
    )
    assert "onerror" in parts.says
    assert "onerror" in parts.bars
    assert not any("<img src=x" in part for part in parts)


def test_many_classes_are_cut_to_the_longest_and_it_is_said(explorer, image):
    shown = explorer.view(image, 0, 0, 0)
    many = shown._replace(lengths=np.tile(np.linspace(0.1, 0.9, 47), (2, 1)))
    bars = views.sections(many, explorer.fields, names=[f"n{k}" for k in range(47)]).bars
    assert bars.count("<tr") == views.MAX_BARS
    assert f"The {views.MAX_BARS} longest of 47 capsules." in bars
    assert "<th>n46</th>" in bars
    assert "<th>n0</th>" not in bars


def test_an_image_file_becomes_the_drawing(explorer, tmp_path):
    path = tmp_path / "photograph.png"
    picture = Image.new("L", (300, 300), 255)
    ImageDraw.Draw(picture).line([(80, 60), (220, 60), (130, 250)], fill=0, width=22)
    picture.save(path)
    drawing, *parts = explorer.take_file(str(path), *[0] * 19)
    assert (drawing["drawn"], drawing["doubt"]) == (False, "")
    assert views.read_canvas(drawing, explorer.shape).shape == (28, 28, 1)
    assert "<b>7</b>" in views.Sections(*parts).says


def test_a_bad_file_gets_one_line_with_its_name(explorer, tmp_path):
    path = tmp_path / "no_image.png"
    path.write_text("no image")
    drawing, says, *rest = explorer.take_file(str(path), *[0] * 19)
    assert "no_image.png: the image cannot be read" in says
    assert str(tmp_path) not in says
    assert drawing == rest[0]  # both are left as they are
    assert explorer.take_file(None)[1] == drawing


def test_reset_sets_every_slider_to_0(explorer):
    values = explorer.reset(drawn(seven), *range(1, 20))
    assert values[:19] == (0,) * 19
    assert values[19:] == explorer.answer(drawn(seven), *[0] * 19)


def test_a_network_on_a_canvas_whose_decoder_never_learned(tmp_path):
    path = tmp_path / "network.safetensors"
    tiny = {"conv_channels": 2, "primary_types": 1, "capsule_length": 3, "hidden": (2,)}
    models.save(models.CapsNet((22, 22, 1), 10, **tiny, rngs=nnx.Rngs(0)), path)
    run = trained.load(str(path), with_data=False)
    images = np.zeros((0, 17, 17, 1), np.uint8)
    dataset = dataclasses.replace(run.dataset, test=run.test._replace(images=images))
    config = dataclasses.replace(run.config, canvas=22)
    explorer = explore.Explorer(run._replace(config=config, dataset=dataset), "canvas")
    parts = explorer.answer(drawn(seven), 10, 1, 0)
    assert parts.bars
    assert "turned and shifted" in parts.pictures
    assert "reconstruction" not in parts.pictures
    assert parts.tweaked == ""
    assert "trained without reconstruction" in explorer.answer(None).says


def test_what_is_no_network_is_refused(tmp_path, monkeypatch, capsys):
    path = tmp_path / "a.safetensors"
    path.write_text("no network")
    for workdir, reason in (
        (path, f"workdir {path} cannot be read: load: {path} is damaged or no safetensors file .*"),
        ("none", "workdir none holds no run: it has no config.json"),
    ):
        status, stdout, stderr = in_process.run(explore, {"workdir": workdir}, monkeypatch, capsys)
        assert (status, stdout) == (2, "")
        assert re.fullmatch(f"explore: {reason}\n", stderr)


def test_a_port_in_use_is_refused(explorer):
    with socket.create_server((explore.HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(InputError, match=rf"^--port={port} cannot be used"),
            explore.serve(explorer, port),
        ):
            pass
