"""Find a handwritten character in a scan or a photograph, as MNIST's authors found theirs.

Shape letters: H, W height and width of a picture.
"""

from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage import filters, measure, transform

# All lengths are fractions of the longer side of the picture, unless a comment says otherwise.
_BACKGROUND = 0.3  # ink is narrower than this; shadows and the table are wider
_BLUR = 1 / 500  # against the noise of cameras
_INK_THRESHOLD = 0.3  # of the ink's strength: what is drawn
_STRONG = 0.5  # of the ink's strength: what is looked for; the lines of paper are weaker or long
_LINE_LENGTH = 0.6  # of the way across the sheet
_LINE_WIDTH = 0.025  # wider lines are strokes
_EDGE = 1 / 60  # where a sheet has ended
_SPECK = 0.04  # of the largest component's area
_DRAWING = 0.25  # of the largest component's area: as large as another drawing
_NEAR = 0.35  # of the drawing's longer side: a part of it is not farther away


class Drawing(NamedTuple):
    """Ink of one drawing, and what is doubtful about it."""

    ink: np.ndarray  # float32 [H, W] in [0, 1], zero outside the drawing
    doubt: str  # empty: none


def find(pixels: np.ndarray) -> Drawing | None:
    """Find the drawing on a sheet of paper, with dark or light ink.

    The background is estimated by a grey closing, so that shadows and a table around the sheet
    belong to it. Lines across the sheet, components that touch its edge, and specks are removed.

    Args:
      pixels: Grey picture in [0, 1], floating point `[H, W]`.

    Returns:
      The drawing, or None if there is none.
    """
    side = max(pixels.shape)
    smooth = ndimage.gaussian_filter(pixels, side * _BLUR if side > 100 else 0)
    sheet = _sheet(smooth)
    inside = smooth if sheet is None else np.where(sheet, smooth, np.median(smooth[sheet]))
    if not _has_dark_ink(inside):
        inside = 1 - inside
    background = ndimage.grey_closing(inside, size=max(3, round(side * _BACKGROUND)))
    ink = (background - inside) / np.maximum(background, 0.1)
    ink = np.maximum(ink - np.median(ink), 0)
    if sheet is not None:
        sheet = ndimage.binary_erosion(sheet, iterations=max(1, round(side / 100)))
        ink *= sheet
    if ink.max() <= 0:
        return None
    whole = np.ones(ink.shape, bool) if sheet is None else sheet
    strength = _strength(ink)
    strong = _without_lines(ink > _STRONG * strength, whole)
    kept, doubt = _choose(strong, whole)
    if not kept.any():
        return None
    reach = ndimage.binary_dilation(kept, iterations=max(1, round(side / 150)))
    # The strength of the chosen strokes, because something darker may have been left out.
    strength = np.quantile(ink[kept], 0.9)
    ink = np.where(reach & (ink >= _INK_THRESHOLD * strength), np.minimum(ink / strength, 1), 0)
    return Drawing(ink.astype(np.float32), doubt)


def fit(ink: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scale and place ink `[H, W]` as MNIST's scans were, on a black picture of another shape.

    The bounding box is scaled to 20/28 of the picture, and its centre of mass put in the middle.
    """
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = 20 / 28 * min(new / old for new, old in zip(shape, ink.shape, strict=True))
    height, width = (max(1, round(side * scale)) for side in ink.shape)
    digit = np.asarray(Image.fromarray(ink).resize((width, height), Image.Resampling.BOX))
    corner = []
    for axis, (size, side) in enumerate(zip(shape, digit.shape, strict=True)):
        centre = np.average(np.arange(side), weights=digit.sum(axis=1 - axis))
        corner.append(min(max(0, round(size / 2 - centre)), size - side))
    result = np.zeros(shape, np.float32)
    result[corner[0] : corner[0] + height, corner[1] : corner[1] + width] = digit
    return result


def _sheet(pixels: np.ndarray) -> np.ndarray | None:
    """Return the mask of a sheet that lies on a table of another brightness, or None."""
    if np.ptp(pixels) == 0:
        return None
    light = pixels > filters.threshold_otsu(pixels)
    edge = np.concatenate([light[0], light[-1], light[:, 0], light[:, -1]])
    differs = light != (edge.mean() > 0.5)
    regions = measure.regionprops(measure.label(differs))
    if not regions:
        return None
    region = max(regions, key=lambda region: region.area)
    filled = region.area_filled
    # A light 0 on black is filled as well, but it is thin and round, and a sheet is neither.
    corners = _rectangle_area(region.image_filled)
    if filled < 0.2 * pixels.size or filled < 0.8 * corners or region.area < 0.6 * filled:
        return None
    sheet = np.zeros(pixels.shape, bool)
    sheet[region.slice] = region.image_filled
    # A sheet ends within a narrow band; a shadow on it does not.
    near = max(2, round(max(pixels.shape) * _EDGE))
    inside = sheet & ~ndimage.binary_erosion(sheet, iterations=near, border_value=1)
    outside = ndimage.binary_dilation(sheet, iterations=near) & ~sheet
    step = np.median(pixels[inside]) - np.median(pixels[outside])
    whole = np.median(pixels[sheet]) - np.median(pixels[~sheet])
    return sheet if step * whole > 0.5 * whole * whole else None


def _rectangle_area(mask: np.ndarray) -> float:
    """Return the area of the smallest rectangle, at any of 30 angles, around a region."""
    points = np.argwhere(mask ^ ndimage.binary_erosion(mask)).astype(float)
    angles = np.radians(np.arange(0, 90, 3))
    along = points @ np.stack([np.cos(angles), np.sin(angles)])
    across = points @ np.stack([-np.sin(angles), np.cos(angles)])
    return float(((np.ptp(along, axis=0) + 1) * (np.ptp(across, axis=0) + 1)).min())


def _has_dark_ink(pixels: np.ndarray) -> bool:
    """Tell dark ink on light paper from the opposite, on a smooth background."""
    height, width = pixels.shape
    rows, columns = np.indices(pixels.shape)
    x, y = columns / width - 0.5, rows / height - 0.5
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], -1)
    margin = max(1, round(min(height, width) * 0.06))
    edge = np.ones(pixels.shape, bool)
    edge[margin:-margin, margin:-margin] = False
    values, basis = pixels[edge], terms[edge]
    # A second fit without the quarter that fits worst: a strip of the table, a stroke at the edge.
    good = np.ones(len(values), bool)
    for _ in range(2):
        coefficients = np.linalg.lstsq(basis[good], values[good], rcond=None)[0]
        errors = np.abs(basis @ coefficients - values)
        good = errors <= np.quantile(errors, 0.75)
    residual = pixels - terms @ coefficients
    low, high = np.quantile(residual[~edge] if (~edge).any() else residual, [0.01, 0.99])
    return bool(-low >= high)


def _strength(ink: np.ndarray) -> float:
    """Return the strength of the strokes, above that of paper and its lines."""
    drawn = ink[ink > 0.25 * ink.max()]
    return float(np.quantile(drawn, 0.8))


def _without_lines(mask: np.ndarray, sheet: np.ndarray) -> np.ndarray:
    """Remove the straight thin lines that cross the sheet; strokes that cross them stay."""
    side = max(mask.shape)
    if side < 100:  # scans as small as MNIST's have no lines
        return mask
    tilt = np.radians(np.linspace(-10, 10, 81))
    for upright in (False, True):
        angles = tilt if upright else tilt + np.pi / 2
        extent = sheet.any(axis=1 - upright * 1).sum() if upright else sheet.any(axis=0).sum()
        thin = mask & ~ndimage.binary_opening(
            mask,
            np.ones(
                (1, 1 + int(_LINE_WIDTH * side)) if upright else (1 + int(_LINE_WIDTH * side), 1),
                bool,
            ),
        )
        accumulator, angles, distances = transform.hough_line(thin, theta=angles)
        _, found, offsets = transform.hough_line_peaks(
            accumulator,
            angles,
            distances,
            min_distance=max(4, side // 100),
            min_angle=5,
            threshold=_LINE_LENGTH * 0.5 * extent,
        )
        rows, columns = np.indices(mask.shape)
        reach = max(2, _LINE_WIDTH / 2 * side)
        for angle, offset in zip(found, offsets, strict=True):
            distance = columns * np.cos(angle) + rows * np.sin(angle) - offset
            band = thin & (np.abs(distance) <= reach)
            covered = band.any(axis=1 if upright else 0).sum()
            if covered < _LINE_LENGTH * extent:
                continue
            width = band.sum() / covered
            shape = (1, round(2 * width) + 1) if upright else (round(2 * width) + 1, 1)
            stroke = ndimage.binary_opening(mask, np.ones(shape, bool))
            rest = mask & ~(band & ~stroke)
            gap = (1, round(2 * width) + 3) if upright else (round(2 * width) + 3, 1)
            bridged = ndimage.binary_closing(rest, np.ones(gap, bool)) & band
            mask = rest | bridged
    return mask


def _choose(mask: np.ndarray, sheet: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the components of a mask that make up one drawing, and what is doubtful."""
    joined = ndimage.binary_dilation(mask, iterations=max(1, round(max(mask.shape) / 300)))
    labels = measure.label(joined, connectivity=2) * mask
    regions = measure.regionprops(labels)
    border = ~ndimage.binary_erosion(sheet, iterations=2)
    touching = set(np.unique(labels[border])) - {0}
    inner = [region for region in regions if region.label not in touching]
    smallest = 0.0005 * sheet.sum()
    inner = [region for region in inner if region.area >= smallest] or regions
    if not inner:
        return np.zeros_like(mask), ""
    inner.sort(key=lambda region: -region.area)
    kept, others = [inner[0]], []
    size = max(np.ptp(inner[0].coords, axis=0)) + 1
    from_drawing = ndimage.distance_transform_edt(labels != inner[0].label)
    for region in inner[1:]:
        share = region.area / inner[0].area
        away = from_drawing[tuple(region.coords.T)].min()
        if share >= _SPECK and away <= _NEAR * size and not _beside(region.bbox, inner[0].bbox):
            kept.append(region)
        elif share >= _DRAWING:
            others.append(region)
    doubt = f"{1 + len(others)} separate drawings; the largest is taken" if others else ""
    return np.isin(labels, [region.label for region in kept]), doubt


def _beside(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Tell whether two bounding boxes stand side by side, as characters of one line do."""
    (top, left, bottom, right), (y0, x0, y1, x1) = one, other
    heights = sorted([bottom - top, y1 - y0])
    return (left >= x1 or x0 >= right) and heights[0] >= 0.6 * heights[1]
