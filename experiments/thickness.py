"""Strokes made thicker or thinner, by fractions of a pixel."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

_FINER = 4  # times as many pixels a side while distances are measured


def thickened(images: np.ndarray, changes: Sequence[float]) -> np.ndarray:
    """Dilates or erodes strokes by discs of any radius.

    As Castro et al., "Morpho-MNIST", section 3.1, https://arxiv.org/abs/1809.10780, on a finer
    grid: there, what is brighter than half of the image's brightest pixel is ink. Dilation or
    erosion of it by a disc is a threshold of the distance to its edge, so radii need not be whole.
    A change of 0 redraws the image from its edges too, so that all have the same look.

    Args:
      images: `[N, H, W, C]` in 0 … 1.
      changes: S changes of the width of a stroke in pixels: two radii of the disc, negative for
        thinner strokes.

    Returns:
      float32 `[S, N, H, W, C]` in 0 … 1.
    """
    N, H, W, C = images.shape
    widths = np.asarray(changes, np.float32)
    result = np.zeros((len(widths), N, H, W, C), np.float32)
    for n in range(N):
        for c in range(C):
            plane = images[n, ..., c]
            peak = plane.max()
            fine = ndimage.zoom(plane, _FINER, order=1, mode="grid-constant", grid_mode=True)
            ink = fine > peak / 2
            if not ink.any():  # a blank image has no edge
                continue
            # An edge runs between pixels: half a pixel from the centres on its two sides.
            framed = np.pad(ink, 1)
            outside, inside = (
                ndimage.distance_transform_edt(part)[1:-1, 1:-1] for part in (~framed, framed)
            )
            distance = np.where(ink, 0.5 - inside, outside - 0.5).astype(np.float32)
            covered = np.clip(_FINER / 2 * widths[:, None, None] - distance + 0.5, 0, 1)
            blocks = covered.reshape(len(widths), H, _FINER, W, _FINER)
            result[:, n, ..., c] = peak * blocks.mean((2, 4))
    return result
