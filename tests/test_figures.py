"""Figures of classifiers: drawn values, legibility and refused arguments."""

import itertools
import pkgutil
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from experiments.figures import __path__ as PACKAGE
from experiments.figures import classifier

GARMENTS = [
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
]
ODD = ["$", r"$\nope$", "a name that is far too long for a label", ""] + ["WWWWWWWWWWWWWW"] * 96
TWEAKS = np.linspace(-0.25, 0.25, 11)


def metrics(epochs: int, *, rows_per_epoch: int = 4, lowest: float = 0.0) -> list[dict]:
    rows: list[dict] = []
    for step in range(1, epochs * rows_per_epoch + 1):
        epoch = step / rows_per_epoch
        error = max(lowest, round(90 / step**2, 1))
        rows.append({"step": step, "epoch": epoch, "train_loss": 1 / step, "train_error": error})
        if step % rows_per_epoch == 0:
            rows.append({"step": step, "epoch": epoch, "test_error": 0.25 + 9 / step})
    return rows


def images(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).random(shape, np.float32)


def examples(N: int, K: int, H: int, C: int, *, correct: bool = False) -> tuple:
    """Return images, labels, predictions and lengths; all predictions are wrong, or all correct."""
    labels = np.arange(N) % K
    predictions = labels if correct else (labels + 1) % K
    lengths = np.full((N, K), 0.125)
    lengths[np.arange(N), predictions] = 0.75
    return images(N, H, H, C), labels, predictions, lengths


def reconstructed(N: int, K: int, H: int, C: int, *, correct: bool = False, names=None) -> Figure:
    originals, labels, _, lengths = examples(N, K, H, C, correct=correct)
    return classifier.reconstructions(
        originals, originals[::-1], lengths, labels, class_names=names and names[:K]
    )


def softmax(*shape: int, sharpness: float = 4.0) -> np.ndarray:
    """Return a softmax over the last axis, uniform in iteration 1 and sharper in each next one."""
    logits = np.random.default_rng(2).normal(size=shape[1:])
    logits = sharpness * np.arange(shape[0]).reshape(-1, *[1] * logits.ndim) * logits
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def confusions(K: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 9, (K, K)) + 1000 * np.eye(K, dtype=int)


def canvas_of(figure: Figure) -> FigureCanvasAgg:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas


def texts_on(figure: Figure) -> list[Text]:
    """Return all texts that are drawn, i.e. without labels of ticks outside the axes."""
    unseen = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]:
                if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                    unseen |= {tick.label1, tick.label2}
    return [
        text
        for text in figure.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in unseen
    ]


def words(figure: Figure) -> set[str]:
    return {text.get_text() for text in texts_on(figure)}


def assert_legible(figure: Figure) -> None:
    """Assert that texts are on the canvas, 7 points or more, and overlap no text and no axes."""
    renderer = canvas_of(figure).get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts_on(figure)]
    boxes += [("a plot", axes.get_window_extent(renderer)) for axes in figure.axes]
    allowed = {(text, "a plot") for axes in figure.axes for text in map(Text.get_text, axes.texts)}
    width, height = figure.bbox.size
    for name, box in boxes:
        inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
        assert inside, f"{name!r} leaves the canvas: {box}"
    assert all(text.get_fontsize() >= 7 for text in texts_on(figure))
    edges = np.array([box.extents for _, box in boxes])
    low = np.maximum(edges[:, None, :2], edges[None, :, :2])
    high = np.minimum(edges[:, None, 2:], edges[None, :, 2:])
    pairs = np.argwhere(np.triu((high - low > 0.5).all(axis=-1), k=1))
    covered = {(boxes[i][0], boxes[j][0]) for i, j in pairs}
    assert not covered - allowed


FIGURES = {
    "curves": lambda: classifier.learning_curves(metrics(12)),
    "curves of one row": lambda: classifier.learning_curves(metrics(1, rows_per_epoch=1)),
    "curves of a part of an epoch": lambda: classifier.learning_curves(metrics(1)[:2]),
    "curves of 600 epochs": lambda: classifier.learning_curves(metrics(600)),
    "curves without zeros": lambda: classifier.learning_curves(metrics(30, lowest=0.1)),
    "reconstructions": lambda: reconstructed(12, 10, 28, 1),
    "reconstructions, one": lambda: reconstructed(1, 2, 28, 1),
    "reconstructions, correct": lambda: reconstructed(10, 10, 28, 1, correct=True),
    "reconstructions, named": lambda: reconstructed(10, 10, 28, 1, names=GARMENTS),
    "reconstructions, colour": lambda: reconstructed(12, 100, 64, 3, names=ODD),
    "tweaks": lambda: classifier.dimension_tweaks(images(16, 11, 28, 28, 1), values=TWEAKS),
    "tweaks, colour": lambda: classifier.dimension_tweaks(images(16, 11, 64, 64, 3), values=TWEAKS),
    "tweaks, one": lambda: classifier.dimension_tweaks(images(1, 1, 28, 28, 1), values=[1 / 3]),
    "couplings": lambda: classifier.couplings(softmax(3, 1152, 10), label=3),
    "couplings, named": lambda: classifier.couplings(
        softmax(3, 99, 10), label=3, class_names=GARMENTS
    ),
    "couplings, 1 iteration": lambda: classifier.couplings(
        softmax(1, 5, 2), label=1, class_names=ODD[-2:]
    ),
    "couplings, 9 iterations": lambda: classifier.couplings(softmax(9, 5, 30), label=1),
    "couplings, 100": lambda: classifier.couplings(softmax(3, 300, 100), label=2, class_names=ODD),
    "entropy": lambda: classifier.coupling_entropy(softmax(3, 20, 50, 10)),
    "entropy, 1 iteration": lambda: classifier.coupling_entropy(softmax(1, 1, 5, 2)),
    "entropy, slow": lambda: classifier.coupling_entropy(softmax(5, 2, 50, 100, sharpness=0.01)),
    "confusion": lambda: classifier.confusion_matrix(confusions(10)),
    "confusion, named": lambda: classifier.confusion_matrix(confusions(10), class_names=GARMENTS),
    "confusion, 2": lambda: classifier.confusion_matrix(confusions(2)),
    "confusion, 20": lambda: classifier.confusion_matrix(np.full((20, 20), 1_000_000)),
    "confusion, 100": lambda: classifier.confusion_matrix(confusions(100), class_names=ODD),
    "misclassified": lambda: classifier.misclassified(*examples(60, 10, 28, 1)),
    "misclassified, one": lambda: classifier.misclassified(*examples(1, 2, 28, 1)),
    "misclassified, none": lambda: classifier.misclassified(*examples(9, 2, 28, 1, correct=True)),
    "misclassified, colour": lambda: classifier.misclassified(
        *examples(40, 100, 64, 3), class_names=ODD, limit=16
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figures_are_legible(name):
    assert_legible(FIGURES[name]())


@pytest.mark.parametrize(
    ("places", "complaint"), [([(0.5, 0.5), (0.52, 0.5)], "word"), ([(0.99, 0.5)], "leaves")]
)
def test_assert_legible_detects_overlap_and_overflow(places, complaint):
    figure = Figure()
    for x, y in places:
        figure.text(x, y, "word")
    with pytest.raises(AssertionError, match=complaint):
        assert_legible(figure)


@pytest.mark.parametrize(
    "name", ["curves", "reconstructions", "tweaks", "couplings", "entropy", "confusion"]
)
def test_figures_ignore_the_users_matplotlib_settings(name):
    expected = np.asarray(canvas_of(FIGURES[name]()).buffer_rgba())
    hostile = {"font.size": 20, "axes.facecolor": "red", "xtick.labelsize": 30, "lines.marker": "x"}
    with mpl.rc_context(hostile):
        before = dict(mpl.rcParams)
        figure = FIGURES[name]()
        assert dict(mpl.rcParams) == before
        np.testing.assert_array_equal(canvas_of(figure).buffer_rgba(), expected)


def test_pyplot_is_not_imported():
    modules = [f"experiments.figures.{module.name}" for module in pkgutil.iter_modules(PACKAGE)]
    assert "experiments.figures.classifier" in modules
    check = f"import sys, {', '.join(modules)}; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_learning_curves_have_the_values_of_the_rows():
    rows = [*metrics(3), {"epoch": 3.0, "test_loss": 0.5}]
    loss, error = classifier.learning_curves(rows).axes
    assert [loss.get_title(loc="left"), error.get_title(loc="left")] == ["Loss", "Error (%)"]
    for axes, measure in ((loss, "loss"), (error, "error")):
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert list(lines) == ["train", "test"]
        for part, line in lines.items():
            key = f"{part}_{measure}"
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            np.testing.assert_array_equal(line.get_xydata(), points)
        assert axes.get_xlim() == (0, 3)


@pytest.mark.parametrize("errors", [[2.0, 0.625], [0.5, 0.0], [0.0]])
def test_last_test_error_is_annotated_at_its_height(errors):
    figure = classifier.learning_curves(
        [{"epoch": 1 + n, "test_error": e} for n, e in enumerate(errors)]
    )
    (text,) = figure.axes[1].texts
    assert text.get_text() == f"{errors[-1]:.2f} %"
    assert text.get_position()[1] == errors[-1]


@pytest.mark.parametrize(
    ("errors", "scale", "lowest"),
    [
        ([5.0, 4.0, 1.0], "linear", 0),
        ([5.0, 0.1], "log", 0.05),
        ([5.0, 0.1, 0.0], "symlog", -0.1),
        ([0.0, 0.0], "linear", 0),
        ([3.0], "linear", 0),
        ([float("nan"), 50.0, 0.5], "log", 0.3),
    ],
)
def test_scale_is_logarithmic_for_a_wide_range_and_includes_zeros(errors, scale, lowest):
    rows = [{"epoch": 1 + n, "train_error": error} for n, error in enumerate(errors)]
    axes = classifier.learning_curves(rows).axes[1]
    bottom, top = axes.get_ylim()
    assert axes.get_yscale() == scale
    assert lowest <= bottom <= np.nanmin(errors)
    assert top >= np.nanmax(errors)
    assert (0 in axes.get_yticks()) == (scale != "log")


def test_reconstructions_are_below_their_originals():
    N, H = 3, 28
    originals, labels, _, lengths = examples(N, 4, H, 1)
    decoded = images(N + 1, H, H, 1)[1:]
    lengths[1, [1, 2]] = 0.875, 0.5
    names = ["a", "b", "c", "one name too long"]
    figure = classifier.reconstructions(originals, decoded, lengths, labels, class_names=names)
    (axes,) = figure.axes
    (mosaic,) = axes.get_images()
    rows = mosaic.get_array().reshape(2, H + 2, N, H + 2)[:, 1:-1, :, 1:-1].transpose(0, 2, 1, 3)
    np.testing.assert_array_equal(rows, np.stack([originals, decoded])[..., 0])
    captions = axes.get_xticklabels()
    assert [text.get_text() for text in captions] == [
        "a\nb\n0.75",
        "b\nb\n0.88",
        "c\none name too …\n0.75",
    ]
    assert {"original", "reconstruction", "Framed: wrong predictions"} <= words(figure)
    frames = [patch.get_x() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert frames == [-0.5, 1.5]
    colours = [text.get_color() for text in captions]
    assert colours[0] == colours[2] != colours[1]


def test_correct_predictions_are_not_framed():
    (axes,) = reconstructed(4, 4, 28, 1, correct=True).axes
    assert not axes.patches
    assert not axes.get_title(loc="left")


def test_dimension_tweaks_have_rows_of_dimensions_and_columns_of_values():
    grid = images(16, 11, 28, 28, 3)
    figure = classifier.dimension_tweaks(grid, values=np.arange(-0.25, 0.26, 0.05))
    (axes,) = figure.axes
    (mosaic,) = axes.get_images()
    tiles = mosaic.get_array().reshape(16, 30, 11, 30, 3)[:, 1:-1, :, 1:-1]
    np.testing.assert_array_equal(tiles.transpose(0, 2, 1, 3, 4), grid)
    columns = "−0.25 −0.2 −0.15 −0.1 −0.05 0 0.05 0.1 0.15 0.2 0.25"  # noqa: RUF001
    assert [text.get_text() for text in axes.get_xticklabels()] == columns.split()
    assert [text.get_text() for text in axes.get_yticklabels()] == [str(d) for d in range(1, 17)]


def test_couplings_show_means_quantiles_and_sorted_children():
    c = softmax(3, 40, 5)
    c[0] = [0.1, 0.6, 0.1, 0.1, 0.1]
    figure = classifier.couplings(c, label=4)
    grid = np.reshape(figure.axes[:6], (2, 3))
    winner = c[-1].mean(axis=0).argmax()
    assert winner != 1
    order = None
    for t, (above, below) in enumerate(grid.T):
        assert above.get_title() == f"iteration {t + 1}"
        ranges, dots = above.collections
        np.testing.assert_allclose(dots.get_offsets()[:, 1], c[t].mean(axis=0), rtol=1e-5)
        ends = np.array(ranges.get_segments())[:, :, 1].T
        np.testing.assert_allclose(ends, np.quantile(c[t], [0.05, 0.95], axis=0), rtol=1e-5)
        (heat,) = below.get_images()
        if order is None:
            distance = abs(grid[1, 2].get_images()[0].get_array()[:, None] - c[-1]).sum(axis=-1)
            order = distance.argmin(axis=1)
            assert sorted(order) == list(range(40))
            ranks = [(row.argmax(), -row.max()) for row in c[-1, order]]
            assert ranks == sorted(ranks)
        np.testing.assert_allclose(heat.get_array(), c[t, order], rtol=1e-5)
        colours = [tuple(colour) for colour in dots.get_facecolors()]
        assert [n for n, colour in enumerate(colours) if colours.count(colour) == 1] == [winner]
    assert figure.get_suptitle().startswith(
        f"True class 4; highlighted: most coupled parent {winner}"
    )


@pytest.mark.parametrize("winner", [0, 37, 99])
def test_highlighted_parent_is_always_labelled(winner):
    c = np.full((1, 3, 100), 0.005)
    c[..., winner] += 0.5
    axes = classifier.couplings(c, label=0).axes[1]
    (bold,) = [text for text in axes.get_xticklabels() if text.get_fontweight() == "bold"]
    assert bold.get_text() == str(winner)
    assert to_rgba(bold.get_color()) != to_rgba("black")


def test_entropy_of_uniform_and_one_hot_couplings():
    c = np.stack([np.full((2, 3, 4), 0.25), np.broadcast_to(np.eye(4)[:3], (2, 3, 4))])
    figure = classifier.coupling_entropy(c)
    even, mean = figure.axes[0].get_lines()
    np.testing.assert_allclose(even.get_ydata(), np.log(4))
    np.testing.assert_allclose(mean.get_xydata(), [[1, np.log(4)], [2, 0]], rtol=1e-6)
    assert "uniform:\nlog 4 = 1.386" in words(figure)


def test_entropy_quantiles_are_over_all_children():
    c = softmax(2, 3, 20, 5)
    entropy = -(c * np.log(c)).sum(axis=-1).reshape(2, -1)
    axes = classifier.coupling_entropy(c).axes[0]
    for lines, quantiles in zip(axes.collections, [(0.25, 0.75), (0.05, 0.95)], strict=True):
        ends = np.array(lines.get_segments())[:, :, 1].T
        np.testing.assert_allclose(ends, np.quantile(entropy, quantiles, axis=1), rtol=1e-4)


def test_confusion_matrix_colours_error_rates():
    counts = np.array([[90, 10, 0], [1, 199, 0], [0, 0, 0]])
    figure = classifier.confusion_matrix(counts, class_names=["a", "b", "c"])
    axes = figure.axes[0]
    (heat,) = axes.get_images()
    np.testing.assert_allclose(heat.get_array(), [[0, 10, 0], [0.5, 0, 0], [0, 0, 0]])
    assert axes.get_title(loc="left") == "11 of 300 wrong: 3.67 %"
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(j, i): str(counts[i, j]) for i, j in itertools.product(range(3), repeat=2)}
    assert {"true class", "predicted class", "a", "b", "c"} <= words(figure)
    diagonal = [patch.get_xy() for patch in axes.patches if isinstance(patch, Rectangle)]
    assert diagonal == [(k - 0.5, k - 0.5) for k in range(3)]


def test_confusion_matrix_without_errors():
    figure = classifier.confusion_matrix(np.diag([7, 8]))
    assert figure.axes[0].get_title(loc="left") == "0 of 15 wrong: 0.00 %"
    assert not figure.axes[0].get_images()[0].get_array().any()


@pytest.mark.parametrize(("K", "written"), [(20, 400), (21, 0)])
def test_counts_are_shown_for_up_to_20_classes(K, written):
    assert len(classifier.confusion_matrix(confusions(K)).axes[0].texts) == written


def test_counts_contrast_with_their_cells():
    counts = np.diag([1000] * 12)
    counts[0, 1:] = range(11)

    def light(rgb):
        rgb = np.array(rgb)
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    axes = classifier.confusion_matrix(counts).axes[0]
    cells = axes.get_images()[0].to_rgba(axes.get_images()[0].get_array())[..., :3]
    for text in axes.texts:
        column, row = text.get_position()
        cell = axes.patches[row].get_facecolor()[:3] if row == column else cells[row, column]
        dark, bright = sorted([light(to_rgb(text.get_color())), light(cell)])
        assert (bright + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, success criterion 1.4.3


def test_misclassified_shows_only_wrong_predictions():
    pictures, labels, predictions, lengths = examples(5, 3, 28, 1)
    predictions[[0, 2, 4]] = labels[[0, 2, 4]]
    figure = classifier.misclassified(
        pictures, labels, predictions, lengths, class_names=["a", "b", "c"]
    )
    drawn = [axes.get_images()[0].get_array() for axes in figure.axes]
    np.testing.assert_array_equal(drawn, pictures[[1, 3], ..., 0])
    captions = [axes.get_xlabel() for axes in figure.axes]
    assert captions == ["b (0.12)\n→ c (0.75)", "a (0.12)\n→ b (0.75)"]
    assert figure.get_suptitle().startswith("2 of 5 misclassified\n")


@pytest.mark.parametrize(("limit", "drawn"), [(1, 1), (9, 9), (40, 13)])
def test_misclassified_draws_at_most_the_limit(limit, drawn):
    figure = classifier.misclassified(*examples(13, 3, 28, 1), limit=limit)
    assert len(figure.axes) == drawn
    assert (f"first {drawn} shown" in figure.get_suptitle()) == (drawn < 13)


def test_misclassified_without_errors():
    figure = classifier.misclassified(*examples(9, 3, 28, 1, correct=True))
    assert not figure.axes
    assert words(figure) == {"None of 9 images is misclassified."}


X, Y, P, L = examples(4, 3, 8, 1)
C = softmax(3, 6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: classifier.learning_curves([]), r"learning_curves: rows must be .* got \[\]"),
        (lambda: classifier.learning_curves([{"step": 7}]), r"with an epoch, got \[{'step': 7}\]"),
        (
            lambda: classifier.reconstructions(X[..., 0], X, L, Y),
            r"reconstructions: images must have shape \[N, H, W, C\] .* got \(4, 8, 8\)",
        ),
        (
            lambda: classifier.reconstructions(X, X[:3], L, Y),
            r"reconstructions: reconstructions .* N = 4, H = 8, W = 8, C = 1 .* \(3, 8, 8, 1\)",
        ),
        (
            lambda: classifier.reconstructions(X, X, L[:2], Y),
            r"reconstructions: lengths must have shape \[N, K\] with N = 4 .* got \(2, 3\)",
        ),
        (lambda: classifier.reconstructions(X, X, L, Y + 1), "labels must be integers from 0 to 2"),
        (
            lambda: classifier.reconstructions(X, X, L, Y * 1.0),
            "labels must be integers .* float64",
        ),
        (
            lambda: classifier.reconstructions(X, X, L, Y, class_names=["a"]),
            "reconstructions: class_names must be one for each of 3 classes, got 1",
        ),
        (
            lambda: classifier.reconstructions(255 * np.ones_like(X), X, L, Y),
            r"images must lie in \[0, 1\], got 255 to 255",
        ),
        (lambda: classifier.reconstructions(X * np.nan, X, L, Y), r"images must lie in \[0, 1\]"),
        (
            lambda: classifier.dimension_tweaks(images(2, 3, 8, 8, 4), values=[0, 1, 2]),
            "dimension_tweaks: grid must have 1, 2 or 3 channels, got 4",
        ),
        (
            lambda: classifier.dimension_tweaks(images(2, 3, 8, 8, 1), values=[0, 1]),
            r"dimension_tweaks: values must have shape \[V\] with V = 3 .* got \(2,\)",
        ),
        (lambda: classifier.couplings(C[0], label=0), r"couplings must have shape \[T, I, J\]"),
        (lambda: classifier.couplings(C, label=4), "couplings: label must be integers from 0 to 3"),
        (
            lambda: classifier.couplings(np.moveaxis(C, 1, 2), label=0),
            "couplings: couplings must be non-negative and sum to 1 over the parents",
        ),
        (lambda: classifier.couplings(C[..., :1], label=0), "must have at least 2 parents, got 1"),
        (
            lambda: classifier.coupling_entropy(C),
            r"coupling_entropy: couplings must have shape \[T, N, I, J\] .* got \(3, 6, 4\)",
        ),
        (
            lambda: classifier.confusion_matrix(np.ones((2, 3), int)),
            r"confusion_matrix: counts must have shape \[K, K\] with K = 2 .* got \(2, 3\)",
        ),
        (
            lambda: classifier.confusion_matrix(np.eye(3)),
            "counts must be non-negative integers, .* got float64",
        ),
        (
            lambda: classifier.confusion_matrix(-np.eye(3, dtype=int)),
            "non-negative integers, .* from -1 to 0",
        ),
        (lambda: classifier.confusion_matrix(np.zeros((3, 3), int)), "not all 0"),
        (lambda: classifier.confusion_matrix(np.ones((1, 1), int)), "2 or more classes, .* of 1"),
        (
            lambda: classifier.misclassified(X, Y, P[:2], L),
            r"misclassified: predictions must have shape \[N\] with N = 4 .* got \(2,\)",
        ),
        (
            lambda: classifier.misclassified(X[:0], Y[:0], P[:0], L[:0]),
            r"misclassified: images .* not be empty, got \(0, 8, 8, 1\)",
        ),
        (
            lambda: classifier.misclassified(X, Y, P, L, limit=0),
            "misclassified: limit must be at least 1, got 0",
        ),
    ],
)
def test_invalid_arguments_are_refused_with_rule_and_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
