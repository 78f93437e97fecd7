"""Draw and measure the effect of each class capsule dimension on the decoder's reconstruction."""

import dataclasses
import functools
import io
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from experiments import cli, files
from experiments.analysis import effects, inspection, selection
from experiments.cli import flag
from experiments.errors import InputError
from experiments.figures import classifier
from experiments.figures.style import STYLE, settle_ticks, side_by_side
from experiments.training import trained

# Shape letters: K classes; D dimensions of a class capsule; V values added to a dimension; M
# shape measures; H, W, C height, width and channels of an image.
FRAME_MILLISECONDS = 120
GREY_LEVELS = 32  # of an animation; a quarter of the size with 256


@dataclasses.dataclass(frozen=True)
class Config(selection.Settings):
    """The network, the images and the output."""

    output: str = flag("runs/tweaks", "Folder of figures, animations and JSON results.")
    examples: int = flag(
        256,
        "Test images for measuring effects, the first ones, at least 2; 0: none, so that --images "
        "needs no data.",
        minimum=0,
        maximum=2**31 - 1,
    )


def main(config: Config) -> int:
    """Draw the tweaks of each image, then measure their effects on test images."""
    if config.examples == 1:
        raise InputError("--examples must be 0 or at least 2, got 1")
    with_data = bool(config.examples or not config.images)
    run = trained.load(config.workdir, data_dir=config.data_dir, with_data=with_data)
    model = selection.capsnet_of(run, config.workdir)
    if not run.config.reconstruction_weight:
        raise InputError(
            f"workdir {config.workdir} was trained without reconstruction "
            "(--reconstruction_weight=0), so it has no decoder"
        )
    if config.examples > run.test.size:
        raise InputError(
            f"--examples must be at most the {run.test.size} test images of {run.dataset.name}, "
            f"got {config.examples}"
        )
    output = pathlib.Path(config.output)
    images = selection.select_images(run, images=config.images, index=config.index)
    for name, image in images.items():
        seen = run.trainer.objective.inputs(jnp.asarray(image))
        grid = np.asarray(inspection.tweak_dimensions(model, model(seen)))
        figure = classifier.dimension_tweaks(grid, values=inspection.TWEAKS)
        files.save_figure(figure, output / f"{name}_tweaks.png")
        files.write_bytes(output / f"{name}_sweep.gif", animate(grid, values=inspection.TWEAKS))
    if not config.examples:
        logging.info("figures are in %s", output)
        return 0
    # Parameters are an argument, because XLA would constant-fold closed-over arrays for seconds.
    reconstruct = jax.jit(
        lambda params, images: effects.reconstruct_tweaked(
            run.trainer.model(params), run.trainer.objective.inputs(images)
        )
    )
    measured = effects.measure_effects(
        functools.partial(reconstruct, run.params),
        run.test.images[: config.examples] / np.float32(255),
    )
    write_effects(measured, run.dataset.num_classes, output)
    logging.info("figures and results.json are in %s", output)
    return 0


@STYLE
def animate(grid: np.ndarray, *, values: Sequence[float]) -> bytes:
    """Return an animated GIF of reconstructions, which runs through `values` and back.

    Args:
      grid: Reconstructions by dimension and added value, `[D, V, H, W, C]` in [0, 1].
      values: The values that were added to the dimension, `[V]`.
    """
    grid = side_by_side(grid)
    D, V = grid.shape[:2]
    columns = math.ceil(math.sqrt(D))
    lines = math.ceil(D / columns)
    figure = Figure((0.8 * columns, 0.95 * lines + 0.3), dpi=100)
    panels = figure.subplots(lines, columns, squeeze=False)
    for axes in panels.flat[D:]:
        axes.remove()
    images = []
    for d, axes in enumerate(panels.flat[:D]):
        images.append(axes.imshow(grid[d, 0], cmap="gray", vmin=0, vmax=1))
        axes.set_title(str(d + 1), loc="center", pad=2)
        axes.set_axis_off()
    heading = figure.suptitle("")
    canvas = FigureCanvasAgg(figure)
    greys = [round(v * (GREY_LEVELS - 1) / 255) * 255 // (GREY_LEVELS - 1) for v in range(256)]
    frames = []
    for v in (*range(V), *range(V - 2, 0, -1)):
        for d, image in enumerate(images):
            image.set_data(grid[d, v])
        heading.set_text(
            f"added to each dimension: {values[v]:+.2f}".replace("-", "\N{MINUS SIGN}")
        )
        canvas.draw()
        frame = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        if grid.shape[-1] == 1:
            frame = frame.convert("L").point(greys)
        frames.append(frame)
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=FRAME_MILLISECONDS, loop=0
    )
    return buffer.getvalue()


def write_effects(measured: effects.Effects, num_classes: int, output: pathlib.Path) -> None:
    """Write effects as JSON and heat maps, and print each measure's most effective dimension.

    Raises:
      InputError: No test image was measured, because all have a reconstruction without ink.
    """
    if not len(measured.predicted):
        raise InputError("no test image can be measured: all have a reconstruction without ink")
    table = effects.dimension_rows(measured)
    files.write_json(output / "results.json", table)
    files.write_json(output / "by_class.json", effects.class_rows(measured, num_classes))
    low = f"{min(inspection.TWEAKS):g}".replace("-", "\N{MINUS SIGN}")
    conditions = (
        f"if a dimension changes from {low} to {max(inspection.TWEAKS):+g},\n"
        f"in within-class standard deviations, over {len(measured.predicted)} test images"
    )
    sizes = np.array([[row[f"{name}_deviations"] for name in effects.MEASURES] for row in table])
    figure = draw_effect_sizes(
        sizes, measures=effects.MEASURES, title=f"Mean absolute change {conditions}"
    )
    files.save_figure(figure, output / "effects.png")
    figure = draw_class_effects(
        effects.mean_by_class(measured, num_classes),
        measures=effects.MEASURES,
        title=f"Mean change {conditions}",
    )
    files.save_figure(figure, output / "effects_by_class.png")
    for m, name in enumerate(effects.MEASURES):
        best = int(sizes[:, m].argmax())
        print(
            f"{name.replace('_', ' ')}: largest change by dimension {best + 1}, "
            f"{sizes[best, m]:.2f} standard deviations; mean of all {sizes[:, m].mean():.2f}"
        )


@STYLE
def draw_effect_sizes(sizes: np.ndarray, *, measures: Sequence[str], title: str) -> Figure:
    """Draw an annotated heat map of mean absolute changes `[D, M]`."""
    D, M = sizes.shape
    figure = Figure((0.9 * M + 1.6, 0.2 * D + 1.2))
    axes = figure.subplots()
    heat = axes.imshow(sizes, cmap="Blues", vmin=0, aspect="auto")
    for (d, m), size in np.ndenumerate(sizes):
        text = axes.text(m, d, f"{size:.2f}", ha="center", va="center_baseline")
        text.set_color("white" if size > 0.6 * sizes.max() else "black")
    axes.set_xticks(range(M), [name.replace("_", " ") for name in measures])
    axes.set_yticks(range(D), [str(d) for d in range(1, D + 1)])
    axes.set(ylabel="capsule dimension")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(title)
    figure.colorbar(heat, label="standard deviations")
    settle_ticks(figure)
    return figure


@STYLE
def draw_class_effects(changes: np.ndarray, *, measures: Sequence[str], title: str) -> Figure:
    """Draw heat maps of mean changes `[K, D, M]`, one panel per measure; NaN is white."""
    K, D, M = changes.shape
    limit = np.nanmax(abs(changes)) or 1
    columns = min(2, M)
    lines = math.ceil(M / columns)
    figure = Figure((7.2, lines * (0.16 * K + 0.7) + 0.4))
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[M:]:
        axes.remove()
    for m, axes in enumerate(grid.flat[:M]):
        heat = axes.imshow(changes[..., m], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_title(measures[m].replace("_", " "))
        axes.set_xticks(range(D), [str(d) for d in range(1, D + 1)])
        axes.set_yticks(range(K), [str(k) for k in range(K)])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("capsule dimension")
    for axes in grid[:, 0]:
        axes.set_ylabel("class")
    figure.suptitle(title)
    figure.colorbar(heat, ax=grid, label="standard deviations", aspect=40)
    settle_ticks(figure)
    return figure


if __name__ == "__main__":
    cli.run(Config, main)
