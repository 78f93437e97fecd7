"""Users' image files, converted to the format of a data set.

Shape letters: N images; H, W, C height, width and channels of a data set's images.
"""

import struct
import textwrap
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from absl import logging
from PIL import Image, ImageOps

from experiments.data import drawings
from experiments.errors import InputError

_MIN_CONTRAST = 0.1  # as a fraction of white; an image with less is rejected as blank
_MAX_SIDE = 600  # pixels; larger images are scaled down first
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


class Picture(NamedTuple):
    """An image as a network sees it, and what is doubtful about it."""

    pixels: np.ndarray  # float32 [H, W, C] in [0, 1]
    doubt: str  # empty: none


def read_images(paths: Sequence[str], *, shape: tuple[int, int, int]) -> np.ndarray:
    """Read image files as `read_pictures` does, and log a warning about each doubtful one.

    Args:
      paths: N files of any size.
      shape: H, W, C of the result; C is 1 or 3.

    Returns:
      Images in [0, 1], float32 `[N, H, W, C]`.

    Raises:
      InputError: A file is missing, unreadable, above Pillow's size limit, or blank.
    """
    pictures = read_pictures(paths, shape=shape)
    for path, picture in zip(paths, pictures, strict=True):
        if picture.doubt:
            logging.warning("%s: %s", path, picture.doubt)
    return np.stack([picture.pixels for picture in pictures])


def read_pictures(paths: Sequence[str], *, shape: tuple[int, int, int]) -> list[Picture]:
    """Read image files and convert them to a data set's format.

    With 1 channel, the one drawing on the sheet is found (`drawings.find`) and placed as MNIST's
    digits are: the longer side of its box is 20/28 of the image, its centre of mass is in the
    middle, and it is light on black. With 3 channels, images are scaled and cropped to the shape.
    Transparent pixels are white, or black where the image would be blank on white.

    Args:
      paths: BMP, GIF, JPEG, PNG, TIFF or WebP files of any size, with 8 or 16 bits a channel.
      shape: H, W, C of the result; C is 1 or 3.

    Raises:
      InputError: A file is missing, unreadable, above Pillow's size limit, or blank; or C is 2.
    """
    if shape[-1] == 2:
        raise InputError("image files cannot be read as stereo pairs, which the network takes")
    return [_read_picture(path, shape) for path in paths]


def open_image(path: str) -> Image.Image:
    """Open an image file, turned upright, in Pillow mode RGBA.

    Raises:
      InputError: It is missing, unreadable, above Pillow's size limit, or of another number format.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as opened:
                image = ImageOps.exif_transpose(opened)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: the image is too large: {error}") from error
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300)
        raise InputError(
            f"{path}: the image cannot be read: {reason} (formats: {', '.join(_FORMATS)})"
        ) from error
    if image.mode.startswith("I"):  # 16 bits of grey, of which 8 are enough
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise InputError(
                f"{path}: an image must have 8 or 16 bits per channel, got values from "
                f"{values.min()} to {values.max()}."
            )
        image = Image.fromarray((values.astype(np.int64) // 257).astype(np.uint8))
    if image.mode.startswith("F"):
        raise InputError(
            f"{path}: an image must have 8 or 16 bits per channel, got Pillow mode {image.mode}."
        )
    return image.convert("RGBA")


def _read_picture(path: str, shape: tuple[int, int, int]) -> Picture:
    height, width, channels = shape
    image = open_image(path)
    image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    for ground in ("white", "black"):
        sheet = Image.new("RGBA", image.size, ground)
        opaque = Image.alpha_composite(sheet, image).convert("L" if channels == 1 else "RGB")
        pixels = np.asarray(opaque, np.float32) / 255
        if np.ptp(pixels, axis=(0, 1)).max() >= _MIN_CONTRAST:
            break
    else:
        raise InputError(f"{path}: the image is blank: its contrast is below {_MIN_CONTRAST:.0%}.")
    if channels == 3:
        return Picture(np.asarray(ImageOps.fit(opaque, (width, height)), np.float32) / 255, "")
    drawing = drawings.find(pixels)
    if drawing is None:
        raise InputError(f"{path}: no drawing was found: nothing on it differs from the paper.")
    return Picture(drawings.fit(drawing.ink, (height, width))[..., None], drawing.doubt)
