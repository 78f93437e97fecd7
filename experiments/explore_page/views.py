"""What the page of `explore` shows, as functions of arrays: images in, HTML out.

Shape letters: K classes; D dimensions of a class capsule; T routing iterations; R and Q rows and
columns of positions of primary capsules; H, W, C height, width and channels of an image.
"""

import base64
import functools
import io
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
from PIL import Image

import capsjax
from capsjax.models import CapsNet
from experiments.analysis import effects, evidence
from experiments.data import affine, drawings, image_files
from experiments.errors import InputError
from experiments.figures.style import BLUE, RED
from experiments.figures.trees import ReceptiveFields

CANVAS = 280  # pixels a side of the page's canvas
MAX_BARS = 30
_HERE = pathlib.Path(__file__).parent


class View(NamedTuple):
    """What a network makes of an image, and of the same image turned and shifted."""

    images: np.ndarray  # [2, H, W, C] in [0, 1], before and after it was moved
    lengths: np.ndarray  # [2, K], of the class capsules
    angle: float  # degrees, from the winning capsule before to the same capsule after
    reconstructions: np.ndarray | None  # [2, H, W, C], without and with what the sliders add
    evidence: np.ndarray  # [T, R, Q], for the winning capsule after
    history: np.ndarray  # [T], its length by iteration


class Sections(NamedTuple):
    """The parts of the page that an answer changes, as HTML."""

    says: str
    bars: str
    pictures: str
    tweaked: str
    evidence: str


def look(
    model: CapsNet, images: jax.Array, added: jax.Array, *, has_decoder: bool
) -> dict[str, jax.Array]:
    """Compute what a `View` needs of the network; it can be compiled.

    Args:
      model: The network.
      images: Before and after moving, `[2, H, W, C]`, as the network takes them.
      added: Values to add to the dimensions of the winning capsule, `[D]`.
      has_decoder: Whether the network learned to reconstruct.
    """
    poses = model.primary_poses(images)
    capsules = model.capsules(poses)
    lengths = capsjax.lengths(capsules)
    winner = jnp.argmax(lengths[1])
    directions = capsules[:, winner] / jnp.maximum(lengths[:, winner, None], 1e-12)
    _, contributions, history = evidence.route(model, poses[1])
    arrays = {
        "lengths": lengths,
        "angle": jnp.degrees(jnp.arccos(jnp.clip(directions[0] @ directions[1], -1, 1))),
        "evidence": contributions[:, :, winner],
        "history": history[:, winner],
    }
    if has_decoder:
        changed = jnp.stack([capsules[1], capsules[1].at[winner].add(added)])
        arrays["reconstructions"] = model.reconstruct(changed, jnp.full(2, winner))
    return arrays


def view(
    compute: Callable[[np.ndarray, np.ndarray], dict[str, jax.Array]],
    fields: ReceptiveFields,
    image: np.ndarray,
    *,
    turn: float = 0,
    right: float = 0,
    down: float = 0,
    added: np.ndarray,
) -> View:
    """Return what a network makes of an image `[H, W, C]` in [0, 1].

    Args:
      compute: `look` with its model bound, compiled.
      fields: The receptive fields of the primary capsules.
      image: The image before it is moved.
      turn: Degrees clockwise.
      right: Pixels.
      down: Pixels.
      added: Values to add to the dimensions of the winning capsule, `[D]`.
    """
    pose = affine.Pose.broadcast(1, rotation=turn, shift=(right, down))
    moved = affine.warp(image[None], pose)[0] if turn or right or down else image
    images = np.stack([image, moved])
    arrays = {name: np.asarray(array, np.float32) for name, array in compute(images, added).items()}
    return View(
        images=images,
        lengths=arrays["lengths"],
        angle=float(arrays["angle"]),
        reconstructions=arrays.get("reconstructions"),
        evidence=evidence.sum_by_position(arrays["evidence"], fields),
        history=arrays["history"],
    )


def read_canvas(value: Any, shape: tuple[int, int, int]) -> np.ndarray | None:
    """Read what the page's canvas holds as an image of a data set's shape (H, W, C).

    A drawing for 1 channel is scaled and placed as MNIST's digits are; `read_file` has done so with
    a picture.

    Args:
      value: None, or a dict: `png`, a data URL, and `drawn`, False for a picture as it was read.
      shape: H, W, C of the data set's images.

    Returns:
      `[H, W, C]` in [0, 1], or None if nothing is drawn.

    Raises:
      InputError: The value is not what the page sends.
    """
    if not value:
        return None
    height, width, channels = shape
    try:
        is_drawn = value["drawn"] is True
        encoded = value["png"].removeprefix("data:image/png;base64,")
        content = io.BytesIO(base64.b64decode(encoded, validate=True))
        with Image.open(content, formats=("PNG",)) as picture:
            if picture.size != ((CANVAS, CANVAS) if is_drawn else (width, height)):
                raise ValueError(f"{picture.size[0]} x {picture.size[1]} pixels")
            pixels = picture.convert("L" if channels == 1 else "RGB")
    except (AttributeError, KeyError, OSError, SyntaxError, TypeError, ValueError) as error:
        raise InputError(f"the page sent no drawing: {error}") from error
    if not np.asarray(pixels).any():
        return None
    if is_drawn and channels == 1:
        ink = np.asarray(pixels, np.float32) / 255
        return drawings.fit(ink, (height, width))[..., None]
    pixels = pixels.resize((width, height), Image.Resampling.BOX)
    return np.asarray(pixels, np.float32).reshape(shape) / 255


def read_file(path: str, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Read an image file as a value for the page's canvas, which `read_canvas` reads.

    Its key `doubt` says what is doubtful about the picture; empty: nothing.

    Raises:
      InputError: As `image_files.read_pictures`, with the name of the file.
    """
    try:
        (picture,) = image_files.read_pictures([path], shape=shape)
    except InputError as error:
        raise InputError(str(error).replace(path, pathlib.Path(path).name)) from error
    return {"png": data_url(picture.pixels), "drawn": False, "doubt": picture.doubt}


def data_url(image: np.ndarray) -> str:
    """Return an image `[H, W, C]` in [0, 1] as a data URL of a PNG file."""
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if image.shape[-1] == 1 else pixels).save(content, "PNG")
    return f"data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}"


def message(text: str, *, is_error: bool = False) -> str:
    """Return one line of text for the top of the page."""
    return str(_template().message(" ".join(text.split()), is_error))


def sections(
    shown: View, fields: ReceptiveFields, *, names: Sequence[str], doubt: str = ""
) -> Sections:
    """Return the parts of the page for one view.

    Args:
      shown: What the network makes of the drawing.
      fields: The receptive fields of the primary capsules.
      names: Of the classes, `[K]`.
      doubt: What is doubtful about the picture.
    """
    before, after = shown.lengths
    order = np.argsort(-after, kind="stable").tolist()
    winner = order[0]
    moved = bool((shown.images[0] != shown.images[1]).any())
    bars = range(len(order)) if len(order) <= MAX_BARS else order[:MAX_BARS]
    pictures = [("the network sees", shown.images[0])]
    if moved:
        pictures = [("before", shown.images[0]), ("turned and shifted", shown.images[1])]
    tweaked, measures = [], []
    if shown.reconstructions is not None:
        pictures.append(("reconstruction", shown.reconstructions[0]))
        tweaked = list(zip(("without changes", "with changes"), shown.reconstructions, strict=True))
        shape = effects.measure_shape(shown.reconstructions.mean(axis=-1))
        rows = zip(effects.MEASURES, shape, effects.UNITS, strict=True)
        measures = [(k.replace("_", " "), *pair, unit) for k, pair, unit in rows]
    template = _template()
    parts = (
        template.says(
            winner=(names[winner], after[winner]),
            second=(names[order[1]], after[order[1]]) if len(order) > 1 else None,
            earlier=(names[before.argmax()], before.max()) if moved else None,
            angle=shown.angle,
            doubt=doubt,
        ),
        template.bars([(names[k], before[k], after[k]) for k in bars], len(after), names[winner]),
        template.pictures([(text, data_url(image)) for text, image in pictures]),
        template.tweaked([(text, data_url(image)) for text, image in tweaked], measures),
        template.evidence(
            data_url(shown.images[1]),
            shown.images.shape[1:3],
            [(dots(values, shown.evidence, fields), x) for values, x in _iterations(shown)],
            names[winner],
        ),
    )
    return Sections(*map(str, parts))


def empty(*, has_decoder: bool) -> Sections:
    """Return the parts of the page while nothing is drawn."""
    advice = "" if has_decoder else "It was trained without reconstruction, so nothing is redrawn."
    return Sections(message(f"Draw one digit or drop an image file. {advice}"), "", "", "", "")


def dots(
    values: np.ndarray, all_values: np.ndarray, fields: ReceptiveFields
) -> list[tuple[float, float, float, str]]:
    """Return a dot (x, y, radius in pixels, colour) for the evidence at each position.

    Its area is in proportion to the evidence; the largest of all iterations fills its position.

    Args:
      values: Evidence `[R, Q]` of one iteration.
      all_values: `[T, R, Q]`.
      fields: The receptive fields at the positions.
    """
    largest = abs(all_values).max() or 1
    spacing = min([2.0, *np.diff(fields.rows), *np.diff(fields.columns)])
    return [
        (
            float(fields.columns[q] + 0.5),
            float(fields.rows[r] + 0.5),
            float(0.5 * spacing * np.sqrt(abs(value) / largest)),
            RED if value > 0 else BLUE,
        )
        for (r, q), value in np.ndenumerate(values)
    ]


def _iterations(shown: View) -> Any:
    return zip(shown.evidence, shown.history, strict=True)


@functools.cache
def _template() -> Any:
    """Return the template's macros."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("answer.html.jinja").module
