"""Shows and measures what each dimension of a class capsule means: its decoder's drawings."""

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
from experiments.analysis import effects, inspection, pictures
from experiments.cli import flag
from experiments.errors import InputError
from experiments.figures import classifier
from experiments.figures.style import STYLE, settle_ticks
from experiments.training import trained


@dataclasses.dataclass(frozen=True)
class Config(pictures.Settings):
    """Whose dimensions, on which images, and where the results go."""

    output: str = flag("runs/tweaks", "Folder of figures, animations and results.json.")
    examples: int = flag(256, "First test images over which effects are measured.", minimum=2)


def main(config: Config) -> int:
    """Draws grid and sweep of every picture, then measures the effects over the test set."""
    run = trained.load(config.workdir, data_dir=config.data_dir)
    model = pictures.capsnet(run, config.workdir)
    if not run.config.reconstruction_weight:
        raise InputError(
            f"workdir {config.workdir} was trained without reconstruction "
            "(--reconstruction_weight=0): its decoder draws nothing"
        )
    if config.examples > run.test.size:
        raise InputError(
            f"--examples must be at most the {run.test.size} test images of {run.dataset.name}, "
            f"got {config.examples}"
        )
    output = pathlib.Path(config.output)
    for name, image in pictures.chosen(run, images=config.images, index=config.index).items():
        grid = np.asarray(inspection.tweaked(model, model(jnp.asarray(image))))
        figure = classifier.dimension_tweaks(grid, values=inspection.TWEAKS)
        files.save_figure(figure, output / f"{name}_tweaks.png")
        files.write_bytes(output / f"{name}_sweep.gif", sweep(grid, values=inspection.TWEAKS))
    # Parameters that were constants of the program would be folded into it, for seconds.
    draw = jax.jit(lambda params, images: effects.drawn(run.trainer.model(params), images))
    found = effects.measured(
        functools.partial(draw, run.params), run.test.images[: config.examples] / np.float32(255)
    )
    report(found, run.dataset.num_classes, output)
    logging.info("figures and results.json are in %s", output)
    return 0


def report(found: effects.Effects, num_classes: int, output: pathlib.Path) -> None:
    """Writes the effects as tables and heat maps, and prints which dimension does most.

    Raises:
      InputError: No drawing has ink.
    """
    if not len(found.winners):
        raise InputError("none of the test images is drawn with any ink: nothing can be measured")
    table = effects.rows(found)
    files.write_json(output / "results.json", table)
    files.write_json(output / "by_class.json", effects.class_rows(found, num_classes))
    move = (
        f"when a dimension goes from {min(inspection.TWEAKS):g} to {max(inspection.TWEAKS):+g},\n"
        f"in standard deviations of a class, over {len(found.winners)} test images"
    ).replace("-", "\N{MINUS SIGN}")
    sizes = np.array([[row[f"{name}_deviations"] for name in effects.names()] for row in table])
    figure = effect_sizes(sizes, measures=effects.names(), title=f"Mean size of the change {move}")
    files.save_figure(figure, output / "effects.png")
    figure = effects_by_class(
        effects.by_class(found, num_classes),
        measures=effects.names(),
        title=f"Mean change {move}",
    )
    files.save_figure(figure, output / "effects_by_class.png")
    for m, name in enumerate(effects.names()):
        best = int(sizes[:, m].argmax())
        print(
            f"{name.replace('_', ' ')}: most by dimension {best + 1}, "
            f"{sizes[best, m]:.2f} standard deviations; mean of all {sizes[:, m].mean():.2f}"
        )


_MILLISECONDS = 120  # a frame of an animation
_GREYS = 32  # of an animation: a quarter of the bytes that all 256 take


@STYLE
def effect_sizes(sizes: np.ndarray, *, measures: Sequence[str], title: str) -> Figure:
    """Draws and writes down how much each dimension changes each measure, `[D, M]`."""
    D, M = sizes.shape
    figure = Figure((0.9 * M + 1.6, 0.2 * D + 1.2))
    axes = figure.subplots()
    heat = axes.imshow(sizes, cmap="Blues", vmin=0, aspect="auto")
    for (d, m), size in np.ndenumerate(sizes):
        text = axes.text(m, d, f"{size:.2f}", ha="center", va="center_baseline")
        text.set_color("white" if size > 0.6 * sizes.max() else "black")
    axes.set_xticks(range(M), [name.replace("_", " ") for name in measures])
    axes.set_yticks(range(D), [str(d) for d in range(1, D + 1)])
    axes.set(ylabel="dimension of the capsule")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.suptitle(title)
    figure.colorbar(heat, label="standard deviations")
    settle_ticks(figure)
    return figure


@STYLE
def effects_by_class(changes: np.ndarray, *, measures: Sequence[str], title: str) -> Figure:
    """Draws the mean change `[K, D, M]` of each measure, a panel each; NaN stays white."""
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
        axes.set_xlabel("dimension of the capsule")
    for axes in grid[:, 0]:
        axes.set_ylabel("class")
    figure.suptitle(title)
    figure.colorbar(heat, ax=grid, label="standard deviations", aspect=40)
    settle_ticks(figure)
    return figure


@STYLE
def sweep(grid: np.ndarray, *, values: Sequence[float]) -> bytes:
    """Draws an animated GIF: all drawings of a capsule, each with its dimension moved to and fro.

    Args:
      grid: Decoded images `[D, V, H, W, C]` in 0 … 1, for each dimension and each change of it.
      values: What was added to the dimension, `[V]`.
    """
    D, V = grid.shape[:2]
    columns = math.ceil(math.sqrt(D))
    lines = math.ceil(D / columns)
    figure = Figure((0.8 * columns, 0.95 * lines + 0.3), dpi=100)
    places = figure.subplots(lines, columns, squeeze=False)
    for axes in places.flat[D:]:
        axes.remove()
    shown = []
    for d, axes in enumerate(places.flat[:D]):
        shown.append(axes.imshow(grid[d, 0], cmap="gray", vmin=0, vmax=1))
        axes.set_title(str(d + 1), loc="center", pad=2)
        axes.set_axis_off()
    heading = figure.suptitle("")
    canvas = FigureCanvasAgg(figure)
    greys = [round(v * (_GREYS - 1) / 255) * 255 // (_GREYS - 1) for v in range(256)]
    frames = []
    for v in (*range(V), *range(V - 2, 0, -1)):
        for d, image in enumerate(shown):
            image.set_data(grid[d, v])
        heading.set_text(f"added to one dimension: {values[v]:+.2f}".replace("-", "\N{MINUS SIGN}"))
        canvas.draw()
        frame = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        if grid.shape[-1] == 1:
            frame = frame.convert("L").point(greys)
        frames.append(frame)
    buffer = io.BytesIO()
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=_MILLISECONDS, loop=0
    )
    return buffer.getvalue()


if __name__ == "__main__":
    cli.run(Config, main)
