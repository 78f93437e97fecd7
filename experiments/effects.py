"""What moving one dimension of a capsule does to the drawing, measured over many images.

Shape letters: N images; D dimensions of the winning capsule; V tweaks of a dimension; M measures of
a shape, in the order of `moments.Shape`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import capsjax
from capsjax.models import CapsNet
from experiments import inspection, moments

_BATCH = 16  # images whose drawings are made at a time: 2,816 for 16 dimensions


class Effects(NamedTuple):
    """What `measured` finds."""

    changes: np.ndarray  # [N, D, M], in moments.UNITS
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
        measures.append(np.stack(moments.measured(grey), axis=-2))  # [B, D, M, V]
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
            for name, unit, x in zip(names(), moments.UNITS, sizes[d - 1], strict=True)
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
    return moments.Shape._fields


def relative_to(deviations: np.ndarray, changes: np.ndarray) -> np.ndarray:
    """Changes `[..., M]` in deviations; a measure in which no drawings differ stays as it is."""
    return changes / np.where(deviations > 0, deviations, 1)
