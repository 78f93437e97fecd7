"""Effects of changing one capsule dimension on the shape of the decoder's reconstruction.

Shape letters: B images of a batch; N images; D dimensions of a class capsule; V values that are
added to a dimension ("tweaks"); K classes; M shape measures, the fields of `ShapeMeasures`; H, W, C
height, width and channels of an image.
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

_BATCH_SIZE = 16  # images, each with D · V reconstructions: 176 for D = 16
# Pixel values at which ink starts and is complete. Decoder blur is mostly below 0.1; the range is
# symmetric about 0.5, so that a pixel half covered by a stroke has half its ink.
_NO_INK, _FULL_INK = 0.1, 0.9


class ShapeMeasures(NamedTuple):
    """Shape measures of images `[..., H, W]`, each `[...]`; NaN for an image without ink."""

    stroke_width: np.ndarray
    slant: np.ndarray
    width: np.ndarray
    height: np.ndarray


MEASURES = ShapeMeasures._fields
UNITS = ("pixels", "degrees", "pixels", "pixels")  # of MEASURES


class Effects(NamedTuple):
    """Changes of shape measures when one dimension of the predicted class capsule is tweaked."""

    changes: np.ndarray  # [N, D, M], in UNITS
    standard_deviations: np.ndarray  # [M], of untweaked reconstructions within their class
    predicted: np.ndarray  # [N], the class whose capsule was tweaked


def reconstruct_tweaked(model: CapsNet, images: Array) -> tuple[Array, Array]:
    """Reconstruct images `[B, H, W, C]` with every tweak of every dimension.

    Returns:
      The predicted classes `[B]`, and the reconstructions `[B, D, V, H, W, C]` from their capsules.
    """
    capsules = model(images)
    predicted = jnp.argmax(capsjax.lengths(capsules), axis=-1)
    return predicted, jax.vmap(lambda one: inspection.tweak_dimensions(model, one))(capsules)


def measure_effects(
    reconstruct: Callable[[Array], tuple[Array, Array]], images: np.ndarray
) -> Effects:
    """Measure how tweaks change the shape of reconstructions.

    Images with a reconstruction without ink are skipped, because it has no shape.

    Args:
      reconstruct: `reconstruct_tweaked` with its model bound, compiled.
      images: `[N, H, W, C]` in [0, 1].
    """
    classes, measures = [], []
    for start in range(0, len(images), _BATCH_SIZE):
        predicted, reconstructions = reconstruct(jnp.asarray(images[start : start + _BATCH_SIZE]))
        classes.append(np.asarray(predicted))
        grey = np.asarray(reconstructions, np.float32).mean(axis=-1)
        measures.append(np.stack(measure_shape(grey), axis=-2))  # [B, D, M, V]
    table = np.concatenate(measures)
    has_ink = np.isfinite(table).all(axis=(1, 2, 3))
    winners = np.concatenate(classes)[has_ink]
    untweaked = table[has_ink, 0, :, inspection.TWEAKS.index(0)]
    return Effects(
        changes=fit_changes(table[has_ink], np.array(inspection.TWEAKS)),
        standard_deviations=within_class_std(untweaked, winners),
        predicted=winners,
    )


def fit_changes(measures: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return the change of measures `[..., V]` over the range of `values` `[V]`.

    It is the slope of the least-squares line times the range, so that all tweaks contribute.
    """
    centred = values - np.mean(values)
    return measures @ (centred / (centred @ centred)) * np.ptp(values)


def within_class_std(measures: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the pooled standard deviation of measures about the mean of their class.

    Args:
      measures: `[N, M]`.
      classes: `[N]`.

    Returns:
      `[M]`, in the units of the measures.
    """
    residuals = measures.astype(float)
    for k in np.unique(classes):
        residuals[classes == k] -= residuals[classes == k].mean(axis=0)
    return np.sqrt((residuals**2).sum(axis=0) / max(1, len(residuals)))


def dimension_rows(effects: Effects) -> list[dict[str, float | int]]:
    """Return a row per dimension with the mean absolute change of every measure.

    Keys ending in `_deviations` are in standard deviations, the others in `UNITS`.
    """
    sizes = abs(effects.changes).mean(axis=0)
    relative = standardize(effects.standard_deviations, sizes)
    return [
        {"dimension": d, "images": len(effects.changes)}
        | {
            f"{name}_deviations": float(x)
            for name, x in zip(MEASURES, relative[d - 1], strict=True)
        }
        | {
            f"{name}_{unit}": float(x)
            for name, unit, x in zip(MEASURES, UNITS, sizes[d - 1], strict=True)
        }
        for d in range(1, len(sizes) + 1)
    ]


def class_rows(effects: Effects, num_classes: int) -> list[dict[str, float | int]]:
    """Return a row per predicted class and dimension with mean changes in standard deviations."""
    means = mean_by_class(effects, num_classes)
    counts = np.bincount(effects.predicted, minlength=num_classes)
    return [
        {"class": k, "images": int(counts[k]), "dimension": d + 1}
        | {f"{name}_deviations": float(x) for name, x in zip(MEASURES, means[k, d], strict=True)}
        for k in np.flatnonzero(counts).tolist()
        for d in range(means.shape[1])
    ]


def mean_by_class(effects: Effects, num_classes: int) -> np.ndarray:
    """Return the mean signed change in standard deviations, `[K, D, M]`.

    It is NaN for classes that were not predicted for any image.
    """
    sums = np.zeros((num_classes, *effects.changes.shape[1:]))
    np.add.at(sums, effects.predicted, effects.changes)
    counts = np.bincount(effects.predicted, minlength=num_classes)[:, None, None]
    means = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return standardize(effects.standard_deviations, means)


def standardize(standard_deviations: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Divide changes `[..., M]` by standard deviations `[M]`, where these are not 0."""
    return changes / np.where(standard_deviations > 0, standard_deviations, 1)


def measure_shape(images: np.ndarray) -> ShapeMeasures:
    """Measure stroke width, slant, width and height of the ink in images.

    Ink is the pixel value, rescaled by `ink_fraction`. All measures are integrals of it without a
    hard threshold, so they vary smoothly with the image. With A the area of the ink and m_xx, m_xy,
    m_yy its central second moments divided by A (m_xx and m_yy plus 1/12, the moment of a pixel):

    - stroke width, pixels: 2 A / perimeter. A bar of length L and width t has t L / (L + t), which
      is close to t for a long stroke.
    - slant, degrees: atan(-m_xy / m_yy), positive for a slant to the right (italics).
    - height, pixels: √(12 m_yy), the height of a bar with the same moment.
    - width, pixels: √(12 (m_xx - m_xy² / m_yy)), the width of a bar with the same moment, after a
      shear that removes the slant.

    Args:
      images: Light ink on a dark background, `[..., H, W]` in [0, 1].

    Returns:
      Measures, each `[...]`; NaN for an image without ink.

    Raises:
      ValueError: `images` has fewer than two axes, or values outside [0, 1].
    """
    if np.ndim(images) < 2:
        raise ValueError(
            f"measure_shape: images must have shape [..., H, W], got {np.shape(images)}"
        )
    if not (np.min(images, initial=0) >= 0 and np.max(images, initial=0) <= 1):
        raise ValueError(
            f"measure_shape: images must lie in [0, 1], got {np.min(images):g} to "
            f"{np.max(images):g}"
        )
    ink = ink_fraction(images)
    rows, columns = (np.arange(size, dtype=float) for size in ink.shape[-2:])
    with np.errstate(invalid="ignore"):  # an image without ink gives 0 / 0, the documented NaN
        area = ink.sum(axis=(-2, -1))
        density = ink / area[..., None, None]
        by_row, by_column = density.sum(axis=-1), density.sum(axis=-2)
        y = rows - (by_row @ rows)[..., None]
        x = columns - (by_column @ columns)[..., None]
        m_yy = (by_row * y**2).sum(axis=-1) + 1 / 12
        m_xx = (by_column * x**2).sum(axis=-1) + 1 / 12
        m_xy = np.einsum("...yx,...y,...x->...", density, y, x)
        return ShapeMeasures(
            stroke_width=2 * area / perimeter(ink),
            slant=np.degrees(np.arctan(-m_xy / m_yy)),
            width=np.sqrt(12 * (m_xx - m_xy**2 / m_yy)),
            height=np.sqrt(12 * m_yy),
        )


def ink_fraction(images: np.ndarray) -> np.ndarray:
    """Rescale pixel values linearly from [0.1, 0.9] to [0, 1], and clip them."""
    return np.clip((np.asarray(images, np.float64) - _NO_INK) / (_FULL_INK - _NO_INK), 0, 1)


def perimeter(ink: np.ndarray) -> np.ndarray:
    """Return the total variation of ink `[..., H, W]`, its mean level-set perimeter in pixels.

    The gradient is taken at the centre of each 2 x 2 pixels: exact for horizontal, vertical and
    diagonal edges, and 0.3 pixels too small per right angle.
    """
    padded = np.pad(ink, [(0, 0)] * (ink.ndim - 2) + [(1, 1), (1, 1)])
    vertical, horizontal = np.diff(padded, axis=-2), np.diff(padded, axis=-1)
    gradient_y = (vertical[..., 1:] + vertical[..., :-1]) / 2
    gradient_x = (horizontal[..., 1:, :] + horizontal[..., :-1, :]) / 2
    return np.hypot(gradient_y, gradient_x).sum(axis=(-2, -1))
