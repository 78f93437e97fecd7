"""What moving one dimension of a capsule does to the drawing, measured over many images.

Shape letters: N images; D dimensions of the winning capsule; V tweaks of a dimension; M measures of
a shape, in the order of `Shape`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import capsjax
from capsjax.models import CapsNet
from experiments.analysis import inspection

_BATCH = 16  # images whose drawings are made at a time: 2,816 for 16 dimensions


class Effects(NamedTuple):
    """What `measured` finds."""

    changes: np.ndarray  # [N, D, M], in UNITS
    deviations: np.ndarray  # [M], of the untouched drawings of a class from its mean
    winners: np.ndarray  # [N], the class whose capsule was tweaked


def changes(measures: np.ndarray, values: np.ndarray) -> np.ndarray:
    """How much measures `[..., V]` change from the least to the greatest of the tweaks `[V]`.

    By the straight line that fits best, so that all tweaks count.
    """
    moves = values - np.mean(values)
    return measures @ (moves / (moves @ moves)) * np.ptp(values)


def drawn(model: CapsNet, images: Array) -> tuple[Array, Array]:
    """The winning class `[B]`, and the drawings `[B, D, V, H, W, C]` of its capsule, tweaked."""
    capsules = model(images)
    winners = jnp.argmax(capsjax.lengths(capsules), axis=-1)
    return winners, jax.vmap(lambda one: inspection.tweaked(model, one))(capsules)


def measured(draw: Callable[[Array], tuple[Array, Array]], images: np.ndarray) -> Effects:
    """Measures what tweaks do to the drawings of images `[N, H, W, C]`.

    Images of which a drawing has no ink, so that it has no measures, are left out.

    Args:
      draw: `drawn` of some model, compiled.
      images: In 0 … 1.
    """
    winners, measures = [], []
    for start in range(0, len(images), _BATCH):
        won, drawings = draw(jnp.asarray(images[start : start + _BATCH]))
        winners.append(np.asarray(won))
        grey = np.asarray(drawings, np.float32).mean(axis=-1)
        measures.append(np.stack(shape_of(grey), axis=-2))  # [B, D, M, V]
    whole = np.concatenate(measures)
    inked = np.isfinite(whole).all(axis=(1, 2, 3))
    classes = np.concatenate(winners)[inked]
    untouched = whole[inked, 0, :, inspection.TWEAKS.index(0)]
    return Effects(
        changes=changes(whole[inked], np.array(inspection.TWEAKS)),
        deviations=within_classes(untouched, classes),
        winners=classes,
    )


def within_classes(measures: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The standard deviations `[M]` of measures `[N, M]` from the means of their classes `[N]`."""
    left = measures.astype(float)
    for k in np.unique(classes):
        left[classes == k] -= left[classes == k].mean(axis=0)
    return np.sqrt((left**2).sum(axis=0) / max(1, len(left)))


def rows(effects: Effects) -> list[dict[str, float | int]]:
    """A row for each dimension: the mean size of its change, as measured and in deviations."""
    sizes = abs(effects.changes).mean(axis=0)
    relative = relative_to(effects.deviations, sizes)
    return [
        {"dimension": d, "images": len(effects.changes)}
        | {f"{name}_deviations": float(x) for name, x in zip(names(), relative[d - 1], strict=True)}
        | {
            f"{name}_{unit}": float(x)
            for name, unit, x in zip(names(), UNITS, sizes[d - 1], strict=True)
        }
        for d in range(1, len(sizes) + 1)
    ]


def by_class(effects: Effects, num_classes: int) -> np.ndarray:
    """The mean change `[K, D, M]` in deviations, with its sign; NaN for a class that never won."""
    shape = (num_classes, *effects.changes.shape[1:])
    sums = np.zeros(shape)
    np.add.at(sums, effects.winners, effects.changes)
    counts = np.bincount(effects.winners, minlength=num_classes)[:, None, None]
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return relative_to(effects.deviations, means)


def class_rows(effects: Effects, num_classes: int) -> list[dict[str, float | int]]:
    """A row for each class that won and each dimension, in deviations."""
    means = by_class(effects, num_classes)
    counts = np.bincount(effects.winners, minlength=num_classes)
    return [
        {"class": k, "images": int(counts[k]), "dimension": d + 1}
        | {f"{name}_deviations": float(x) for name, x in zip(names(), means[k, d], strict=True)}
        for k in np.flatnonzero(counts).tolist()
        for d in range(means.shape[1])
    ]


def names() -> tuple[str, ...]:
    """The measures, in order."""
    return Shape._fields


def relative_to(deviations: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Changes `[..., M]` in deviations; a measure in which no drawings differ stays as it is."""
    return changes / np.where(deviations > 0, deviations, 1)


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


def shape_of(images: np.ndarray) -> Shape:
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
