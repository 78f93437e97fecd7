"""Figures of a trained classifier.

Shape letters: N examples; H, W, C height, width and channels of an image, C 1 or 3; K classes; D
dimensions of a capsule; V values added to a dimension; T routing iterations; I children (input
capsules); J parents (output capsules). Images are in [0, 1]. `class_names` are K names, or J names
of parents, by default their indices. No function uses pyplot or writes a file.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis, XAxis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from experiments.figures.style import BLUE, GREY, POINTS, RED, STYLE, settle_ticks, side_by_side

_HEAT = "Blues"


@STYLE
def learning_curves(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw loss and error (%) over epochs, annotated with the last test error.

    Args:
      rows: The rows of `metrics.jsonl`. Each has `epoch` and any of `train_loss`, `test_loss`,
        `train_error` and `test_error`.

    Raises:
      ValueError: `rows` is empty, or a row lacks `epoch`.
    """
    invalid = [dict(row) for row in rows if "epoch" not in row]
    if invalid or not rows:
        raise ValueError(
            f"learning_curves: rows must be one or more with an epoch, got {invalid[:1] or rows}"
        )
    figure = Figure((7.2, 2.8))
    for axes, measure in zip(figure.subplots(1, 2), ("loss", "error"), strict=True):
        shown = [np.empty(0)]
        for part, colour, width in (("train", BLUE, 0.8), ("test", RED, 1.3)):
            key = f"{part}_{measure}"
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if not points:
                continue
            epochs, values = np.array(points, float).T
            (line,) = axes.plot(epochs, values, color=colour, label=part, lw=width, zorder=3)
            line.set(clip_on=False, alpha=1 if len(points) <= 1000 else 0.5)
            line.set_marker("o" if len(points) <= 40 else "")
            shown.append(values)
            if key == "test_error":
                beside = axes.get_yaxis_transform()
                last = axes.text(1.02, values[-1], f"{values[-1]:.2f} %", transform=beside)
                last.set(color=colour, fontweight="bold", verticalalignment="center")
        _set_value_scale(axes, np.concatenate(shown))
        axes.set(title="Loss" if measure == "loss" else "Error (%)", xlabel="epoch")
        axes.set_xlim(0, max(row["epoch"] for row in rows) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True))
        axes.grid(visible=True)
        if len(shown) > 1:
            # Above the axes, because curves may cover any position inside them.
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=2)
    settle_ticks(figure)
    return figure


@STYLE
def reconstructions(
    images: np.ndarray,
    reconstructions: np.ndarray,
    lengths: np.ndarray,
    labels: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
) -> Figure:
    """Draw images above their reconstructions, with a frame around wrong predictions.

    Args:
      images: Original images, `[N, H, W, C]`; N of 10 or 12 fills the width of a page.
      reconstructions: The decoder's images, `[N, H, W, C]`.
      lengths: Lengths of the class capsules, `[N, K]`; the longest is the prediction.
      labels: True classes, `[N]`.
      class_names: Names of the classes, `[K]`.

    Raises:
      ValueError: A shape, a pixel value or a label is invalid.
    """
    sizes = dict(zip("NHWC", np.shape(images), strict=False))
    images = _check_images("reconstructions: images", images, "NHWC")
    decoded = _check_images("reconstructions: reconstructions", reconstructions, "NHWC", **sizes)
    N, H, W, _ = images.shape
    lengths = _check_shape("reconstructions: lengths", lengths, "NK", N=N)
    names = _class_labels("reconstructions", lengths.shape[1], class_names)
    labels = _check_classes("reconstructions: labels", labels, "N", len(names), N=N)
    longest = lengths.argmax(axis=1)
    wrong = np.flatnonzero(longest != labels)
    captions = [
        f"{names[label]}\n{names[best]}\n{example[best]:.2f}"
        for label, best, example in zip(labels, longest, lengths, strict=True)
    ]
    tile = max(0.6, _text_inches(names) + 0.1)
    height = 2 * tile * H / W + (0.85 if wrong.size else 0.65)
    figure = Figure((max(2.6, N * tile + 0.9), height))
    axes = figure.subplots()
    draw_tiles(axes, np.stack([images, decoded]))
    axes.set_yticks([0, 1], ["original", "reconstruction"])
    axes.set_xticks(range(N), captions)
    beside = (-3.5, -3.5)  # the offset of tick labels, for a common baseline
    heads = axes.annotate("true class\npredicted\nlength", (0, 0), beside, xycoords="axes fraction")
    heads.set(anncoords="offset points", color=GREY, ha="right", va="top")
    for column in wrong:
        axes.get_xticklabels()[column].set_color(RED)
        frame = Rectangle((column - 0.5, -0.5), 1, 2, fill=False, edgecolor=RED, clip_on=False)
        axes.add_patch(frame)
    if wrong.size:
        axes.set_title("Framed: wrong predictions")
    return figure


@STYLE
def dimension_tweaks(grid: np.ndarray, *, values: Sequence[float]) -> Figure:
    """Draw reconstructions of a capsule with one dimension changed at a time.

    Args:
      grid: Reconstructions by dimension and added value, `[D, V, H, W, C]`.
      values: The values that were added to the dimension, `[V]`.

    Raises:
      ValueError: A shape or a pixel value is invalid.
    """
    grid = _check_images("dimension_tweaks: grid", grid, "DVHWC")
    D, V, H, W, _ = grid.shape
    added = np.round(_check_shape("dimension_tweaks: values", values, "V", V=V), 4) + 0.0  # no -0
    numbers = [f"{value:g}".replace("-", "\N{MINUS SIGN}") for value in added]
    tile = max(0.5, _text_inches(numbers) + 0.1)
    figure = Figure((max(3.2, V * tile + 0.6), D * tile * H / W + 0.5))
    axes = figure.subplots()
    draw_tiles(axes, grid)
    axes.set_xticks(range(V), numbers)
    axes.set_yticks(range(D), [str(d + 1) for d in range(D)])
    axes.set(xlabel="added to one dimension of the capsule", ylabel="dimension")
    axes.xaxis.set_label_position("top")
    axes.tick_params(labeltop=True, labelbottom=False)
    return figure


@STYLE
def couplings(
    couplings: np.ndarray, *, label: int, class_names: Sequence[str] | None = None
) -> Figure:
    """Draw the couplings of one example in each routing iteration.

    The upper row shows mean and 5 to 95 % quantiles of the couplings to each parent; the lower row
    is a heat map of all children, sorted by their most coupled parent in the last iteration. The
    parent with the largest mean coupling in the last iteration is highlighted.

    Args:
      couplings: `[T, I, J]`, summing to 1 over J.
      label: The true class of the example.
      class_names: Names of the parents, `[J]`.

    Raises:
      ValueError: The shape, a coupling or the label is invalid.
    """
    c = _check_couplings("couplings: couplings", couplings, "TIJ")
    T, I, J = c.shape  # noqa: E741
    names = _class_labels("couplings", J, class_names)
    true = names[_check_classes("couplings: label", label, "", J)]
    means = c.mean(axis=1)
    low, high = np.quantile(c, [0.05, 0.95], axis=1)
    winner = int(means[-1].argmax())
    order = np.lexsort((-c[-1].max(axis=1), c[-1].argmax(axis=1)))

    panel = min(2.4, max(1.0, 9 / T))
    figure = Figure((max(6.0, T * panel + 1.2), 4.6))
    grid = figure.subplots(
        2, T, sharex="col", sharey="row", squeeze=False, gridspec_kw={"height_ratios": [2, 3]}
    )
    # At least 2/J, so that uniform couplings are in the middle of the colour map.
    top = max(c.max(), 2 / J)
    colours = [RED if j == winner else BLUE for j in range(J)]
    thickness = min(8, 0.6 * 72 * panel / J)
    for t, (above, below) in enumerate(grid.T):
        above.axhline(1 / J, color=GREY, lw=0.6, ls="--")
        above.vlines(range(J), low[t], high[t], color=colours, alpha=0.35, linewidth=thickness)
        above.scatter(range(J), means[t], c=colours, s=min(12, thickness**2), zorder=3)
        above.set_title(f"iteration {t + 1}", loc="center")
        above.grid(visible=True, axis="y")
        heat = below.imshow(
            c[t, order], cmap=_HEAT, aspect="auto", interpolation="nearest", vmin=0, vmax=top
        )
        heat.set_extent((-0.5, J - 0.5, I, 0))
        below.set_xlabel("parent")
        _label_classes(below.xaxis, names, 0.8 * panel / J, always=winner)
        for j, text in zip(below.get_xticks(), below.get_xticklabels(), strict=True):
            if j == winner:
                text.set(color=RED, fontweight="bold")
    grid[0, 0].set(ylabel="coupling", ylim=(0, None))
    grid[1, 0].set_ylabel("child, sorted by top parent")
    grid[1, 0].yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    figure.colorbar(heat, ax=grid[1], label="coupling", pad=0.02 / T)
    figure.suptitle(
        f"True class {true}; highlighted: most coupled parent {names[winner]}\n"
        f"Dot: mean; bar: 5 to 95 % of {I} children; dashed: uniform, 1/{J}"
    )
    settle_ticks(figure)
    return figure


@STYLE
def coupling_entropy(couplings: np.ndarray) -> Figure:
    """Draw mean and quantiles of the entropy of the couplings in each routing iteration.

    Args:
      couplings: `[T, N, I, J]`, summing to 1 over J.

    Raises:
      ValueError: The shape or a coupling is invalid.
    """
    c = _check_couplings("coupling_entropy: couplings", couplings, "TNIJ")
    T, N, I, J = c.shape  # noqa: E741
    entropy = -(c * np.log(np.where(c > 0, c, 1))).sum(axis=-1).reshape(T, N * I)
    quantiles = np.quantile(entropy, [0.05, 0.25, 0.75, 0.95], axis=1)
    uniform = math.log(J)
    iterations = np.arange(1, T + 1)
    figure = Figure((4.8, 2.8))
    axes = figure.subplots()
    axes.axhline(uniform, color=GREY, label=f"uniform:\nlog {J} = {uniform:.3f}", ls="--", lw=1)
    axes.plot(iterations, entropy.mean(axis=1), color=RED, label="mean", marker="o", zorder=3)
    axes.vlines(iterations, *quantiles[[1, 2]], alpha=0.35, color=BLUE, label="25 to 75 %", lw=6)
    axes.vlines(iterations, *quantiles[[0, 3]], color=BLUE, label="5 to 95 %", lw=1)
    axes.set(
        title=f"Couplings of {N * I} children ({N} examples)",
        xlabel="iteration",
        ylabel="entropy (nats)",
        xlim=(0.5, T + 0.5),
        ylim=(max(0, quantiles[0].min() - 0.1 * uniform), 1.05 * uniform),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(visible=True, axis="y")
    figure.legend(loc="outside right upper")
    settle_ticks(figure)
    return figure


@STYLE
def confusion_matrix(counts: np.ndarray, *, class_names: Sequence[str] | None = None) -> Figure:
    """Draw a confusion matrix; only errors are coloured, and up to 20 classes have counts.

    Args:
      counts: Integers `[K, K]`, true classes as rows, predicted classes as columns.
      class_names: Names of the classes, `[K]`.

    Raises:
      ValueError: `counts` is not a non-negative, non-zero integer matrix with K of at least 2.
    """
    counts = _check_shape("confusion_matrix: counts", counts, "KK", K=len(np.atleast_1d(counts)))
    K = len(counts)
    if not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0 or not counts.any() or K < 2:
        raise ValueError(
            "confusion_matrix: counts must be non-negative integers, not all 0, of 2 or more "
            f"classes, got {counts.dtype} from {counts.min()} to {counts.max()} of {K}"
        )
    names = _class_labels("confusion_matrix", K, class_names)
    errors = counts * ~np.eye(K, dtype=bool)
    percent = 100 * errors / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    if written := K <= 20:
        cell = max(0.3, min(0.9, 3.2 / K), _text_inches([str(counts.max())]) + 0.08)
    else:
        cell = min(max(0.14, 5 / K), 14 / K)
    side, room = K * cell, _text_inches(names)
    figure = Figure((max(3.4, side + room + 1.3), side + (room if room > cell else 0) + 0.8))
    axes = figure.subplots()
    heat = axes.imshow(percent, cmap=_HEAT, vmin=0, vmax=percent.max() or 1)
    for k in range(K):
        axes.add_patch(Rectangle((k - 0.5, k - 0.5), 1, 1, color="0.88", linewidth=0))
    if written:
        luminance = heat.to_rgba(percent)[..., :3] ** 2.2 @ (0.2126, 0.7152, 0.0722)
        for row, column in np.ndindex(K, K):
            text = axes.text(column, row, str(counts[row, column]))
            text.set(ha="center", va="center_baseline")
            dark, empty = luminance[row, column] < 0.18, not counts[row, column]
            text.set_color("white" if dark else GREY if empty else "black")
    _label_classes(axes.xaxis, names, cell)
    _label_classes(axes.yaxis, names, cell)
    wrong, total = errors.sum(), counts.sum()
    axes.set(
        title=f"{wrong} of {total} wrong: {100 * wrong / total:.2f} %",
        xlabel="predicted class",
        ylabel="true class",
    )
    figure.colorbar(heat, aspect=8 * side, label="errors, % of the true class", pad=0.15 / side)
    settle_ticks(figure)
    return figure


@STYLE
def misclassified(
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    lengths: np.ndarray,
    *,
    class_names: Sequence[str] | None = None,
    limit: int = 40,
) -> Figure:
    """Draw the first misclassified images with true and predicted class and their lengths.

    Args:
      images: `[N, H, W, C]`.
      labels: True classes, `[N]`.
      predictions: Predicted classes, `[N]`.
      lengths: Lengths of the class capsules, `[N, K]`.
      class_names: Names of the classes, `[K]`.
      limit: Maximum number of images to draw.

    Raises:
      ValueError: A shape, a pixel value, a class or the limit is invalid.
    """
    if limit < 1:
        raise ValueError(f"misclassified: limit must be at least 1, got {limit}")
    images = _check_images("misclassified: images", images, "NHWC")
    N, H, W, _ = images.shape
    lengths = _check_shape("misclassified: lengths", lengths, "NK", N=N)
    names = _class_labels("misclassified", lengths.shape[1], class_names)
    labels = _check_classes("misclassified: labels", labels, "N", len(names), N=N)
    predictions = _check_classes("misclassified: predictions", predictions, "N", len(names), N=N)
    wrong = np.flatnonzero(labels != predictions)
    if not wrong.size:
        figure = Figure((3.6, 1.0))
        figure.text(0.5, 0.5, f"None of {N} images is misclassified.", ha="center", va="center")
        return figure
    shown = wrong[:limit]
    arrow = "\N{RIGHTWARDS ARROW}"
    captions = [
        (f"{names[true]} ({example[true]:.2f})", f"{arrow} {names[guess]} ({example[guess]:.2f})")
        for true, guess, example in zip(
            labels[shown], predictions[shown], lengths[shown], strict=True
        )
    ]
    columns = min(8, len(shown))
    rows = math.ceil(len(shown) / columns)
    tile = max(0.8, _text_inches([line for caption in captions for line in caption]) + 0.12)
    figure = Figure((max(4.6, columns * tile), rows * (0.75 * tile * H / W + 0.45) + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(shown) :]:
        axes.remove()
    for axes, image, caption in zip(grid.flat, images[shown], captions, strict=False):
        axes.imshow(image, cmap="gray", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_xlabel("\n".join(caption))
    part = f", first {len(shown)} shown" if len(shown) < len(wrong) else ""
    figure.suptitle(
        f"{len(wrong)} of {N} misclassified{part}\ntrue (length) {arrow} predicted (length)"
    )
    return figure


def _set_value_scale(axes: Axes, values: np.ndarray) -> None:
    """Scale the y axis to values: log, or symlog if there are zeros, from a ratio of 10."""
    positive = values[values > 0]
    if not positive.size or positive.max() < 10 * positive.min():
        axes.set_ylim(0, None if positive.size else 1)
        return
    low, high = positive.min(), positive.max()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high < 200 * low else (1,)
    ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
    ticks = [tick for tick in ticks if low / 1.3 <= tick <= high * 1.3]
    if (values == 0).any():
        axes.set_yscale("symlog", linthresh=low, linscale=0.4)
        axes.set_ylim(-0.15 * low, high * 1.3)
        ticks = [0.0, *ticks]
    else:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.3, high * 1.3)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)


def draw_tiles(axes: Axes, tiles: np.ndarray) -> None:
    """Draw images `[rows, columns, H, W, C]` as a mosaic; tile (r, c) is centred at x=c, y=r."""
    rows, columns, H, W, C = tiles.shape
    gap = max(1, H // 28)
    framed = np.pad(tiles, ((0, 0), (0, 0), (gap, gap), (gap, gap), (0, 0)), constant_values=1)
    H, W = H + 2 * gap, W + 2 * gap
    mosaic = framed.transpose(0, 2, 1, 3, 4).reshape(rows * H, columns * W, C)
    extent = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axes.imshow(mosaic, cmap="gray", vmin=0, vmax=1, aspect=H / W, extent=extent)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def _label_classes(axis: Axis, names: list[str], inches: float, *, always: int = 0) -> None:
    """Label classes that are `inches` apart, skipping some if space is short, but not `always`."""
    height, width = 1.25 * POINTS / 72, _text_inches(names) + 0.05
    is_x = isinstance(axis, XAxis)
    rotated = is_x and width > inches
    every = math.ceil((width if is_x and not rotated else height) / inches)
    shown = range(always % every, len(names), every)
    axis.set_ticks(shown, [names[k] for k in shown], rotation=90 if rotated else 0)


def _text_inches(texts: Sequence[str]) -> float:
    """Return the width in inches of the widest text, each of one line."""
    font = FontProperties(size=POINTS)
    measure = text_to_path.get_text_width_height_descent
    return max(measure(text, font, ismath=False)[0] for text in texts) / 72


def _class_labels(function: str, count: int, class_names: Sequence[str] | None) -> list[str]:
    """Return names of `count` classes, truncated to 14 letters; by default their indices."""
    names = [str(name) for name in (range(count) if class_names is None else class_names)]
    if len(names) != count:
        raise ValueError(
            f"{function}: class_names must be one for each of {count} classes, got {len(names)}"
        )
    return [name if len(name) <= 14 else f"{name[:13]}…" for name in names]


def _check_shape(what: str, value: ArrayLike, letters: str, **sizes: int) -> np.ndarray:
    """Convert to an array, one axis per letter; raise ValueError if a given size differs."""
    array = np.asarray(value)
    if (
        array.ndim != len(letters)
        or not array.size
        or any(sizes.get(letter, n) != n for letter, n in zip(letters, array.shape, strict=True))
    ):
        known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
        raise ValueError(
            f"{what} must have shape [{', '.join(letters)}]{known and ' with '}{known} "
            f"and not be empty, got {array.shape}"
        )
    return array


def _check_images(what: str, value: ArrayLike, letters: str, **sizes: int) -> np.ndarray:
    """Return images as float32, stereo pairs side by side; raise ValueError for other values."""
    images = _check_shape(what, value, letters, **sizes).astype(np.float32, copy=False)
    if images.shape[-1] not in (1, 2, 3):
        raise ValueError(f"{what} must have 1, 2 or 3 channels, got {images.shape[-1]}")
    if not (images.min() >= 0 and images.max() <= 1):
        raise ValueError(f"{what} must lie in [0, 1], got {images.min():g} to {images.max():g}")
    return side_by_side(images)


def _check_classes(
    what: str, value: ArrayLike, letters: str, count: int, **sizes: int
) -> np.ndarray:
    classes = _check_shape(what, value, letters, **sizes)
    if not np.issubdtype(classes.dtype, np.integer) or classes.min() < 0 or classes.max() >= count:
        raise ValueError(
            f"{what} must be integers from 0 to {count - 1}, "
            f"got {classes.dtype} from {classes.min()} to {classes.max()}"
        )
    return classes


def _check_couplings(what: str, value: ArrayLike, letters: str) -> np.ndarray:
    couplings = _check_shape(what, value, letters).astype(np.float32)
    if couplings.shape[-1] < 2:
        raise ValueError(f"{what} must have at least 2 parents, got {couplings.shape[-1]}")
    sums = couplings.sum(axis=-1)
    # The sums of a bfloat16 softmax are within 0.005 of 1.
    if not (couplings.min() >= 0 and abs(sums - 1).max() <= 0.01):
        raise ValueError(
            f"{what} must be non-negative and sum to 1 over the parents, "
            f"got sums from {sums.min():g} to {sums.max():g}"
        )
    return couplings
