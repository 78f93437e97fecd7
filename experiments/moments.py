"""Stroke width, slant, width and height of what an image shows, in pixels and degrees.

A pixel's ink is its value with the contrast stretched by `ink`. All sizes are taken from the whole
grey image, so that they change smoothly: there is no threshold that a pixel jumps over.
"""

from typing import NamedTuple

import numpy as np

# Ink begins at the first value and is whole from the second on. A decoder's blur is mostly below
# the first; the two are symmetric, so that a pixel that an edge cuts in half keeps half its ink.
_NO_INK, _ALL_INK = 0.1, 0.9


class Shape(NamedTuple):
    """What `measured` finds; each of the shape `[...]` of its images, NaN where there is no ink."""

    stroke_width: np.ndarray
    slant: np.ndarray
    width: np.ndarray
    height: np.ndarray


# What a unit of each is, in the order of Shape.
UNITS = ("pixels", "degrees", "pixels", "pixels")


def ink(images: np.ndarray) -> np.ndarray:
    """How much ink each pixel of light-on-dark images `[...]` in 0 … 1 has, from 0 to 1."""
    return np.clip((np.asarray(images, np.float64) - _NO_INK) / (_ALL_INK - _NO_INK), 0, 1)


def measured(images: np.ndarray) -> Shape:
    """Measures images `[..., H, W]`, light on dark, in 0 … 1.

    With A the area of the ink and m_xx, m_xy, m_yy its central second moments, each divided by A
    (1 / 12 added to m_xx and m_yy for the extent of a pixel):

    - stroke width: 2 A / perimeter, the perimeter being the ink's total variation, which is the
      mean perimeter of all its level sets. A long stroke has its own width; round a bar of
      length L and width t it is t L / (L + t).
    - slant: atan(-m_xy / m_yy), in degrees: how far the columns shift with the rows; positive for
      what leans to the right, as italics do.
    - height: √(12 m_yy), the side of a bar with that spread.
    - width: √(12 (m_xx - m_xy² / m_yy)), the same across, once the slant is undone by a shear: so
      that what leans does not count as wide.

    Raises:
      ValueError: The shape or a value is out of its range.
    """
    if np.ndim(images) < 2:
        raise ValueError(f"measured: images must have shape [..., H, W], got {np.shape(images)}")
    if not (np.min(images, initial=0) >= 0 and np.max(images, initial=0) <= 1):
        raise ValueError(
            f"measured: images must lie in [0, 1], got {np.min(images):g} to {np.max(images):g}"
        )
    inked = ink(images)
    rows, columns = (np.arange(size, dtype=float) for size in inked.shape[-2:])
    with np.errstate(invalid="ignore"):  # 0 / 0 without ink is the NaN that is promised
        area = inked.sum(axis=(-2, -1))
        shares = inked / area[..., None, None]
        by_row, by_column = shares.sum(axis=-1), shares.sum(axis=-2)
        down = rows - (by_row @ rows)[..., None]
        across = columns - (by_column @ columns)[..., None]
        m_yy = (by_row * down**2).sum(axis=-1) + 1 / 12
        m_xx = (by_column * across**2).sum(axis=-1) + 1 / 12
        m_xy = np.einsum("...yx,...y,...x->...", shares, down, across)
        return Shape(
            stroke_width=2 * area / perimeter(inked),
            slant=np.degrees(np.arctan(-m_xy / m_yy)),
            width=np.sqrt(12 * (m_xx - m_xy**2 / m_yy)),
            height=np.sqrt(12 * m_yy),
        )


def perimeter(inked: np.ndarray) -> np.ndarray:
    """The total variation of ink `[..., H, W]` on ground without any, in pixels.

    The gradient is taken in the middle of each 2 x 2 pixels: exact for edges along the axes and
    the diagonals; a right angle loses 0.3 pixels.
    """
    padded = np.pad(inked, [(0, 0)] * (inked.ndim - 2) + [(1, 1), (1, 1)])
    rises, steps = np.diff(padded, axis=-2), np.diff(padded, axis=-1)
    down = (rises[..., 1:] + rises[..., :-1]) / 2
    across = (steps[..., 1:, :] + steps[..., :-1, :]) / 2
    return np.hypot(down, across).sum(axis=(-2, -1))
