"""Shows and measures what each dimension of a class capsule means: its decoder's drawings."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments import cli, effects, figures, inspection, pictures, records, trained, tweak_figures
from experiments.cli import flag
from experiments.errors import InputError


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
        figure = figures.dimension_tweaks(grid, values=inspection.TWEAKS)
        records.save_figure(figure, output / f"{name}_tweaks.png")
        sweep = tweak_figures.sweep(grid, values=inspection.TWEAKS)
        records.write_bytes(output / f"{name}_sweep.gif", sweep)
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
    records.write_json(output / "results.json", table)
    records.write_json(output / "by_class.json", effects.class_rows(found, num_classes))
    move = (
        f"when a dimension goes from {min(inspection.TWEAKS):g} to {max(inspection.TWEAKS):+g},\n"
        f"in standard deviations of a class, over {len(found.winners)} test images"
    ).replace("-", "\N{MINUS SIGN}")
    sizes = np.array([[row[f"{name}_deviations"] for name in effects.names()] for row in table])
    figure = tweak_figures.effect_sizes(
        sizes, measures=effects.names(), title=f"Mean size of the change {move}"
    )
    records.save_figure(figure, output / "effects.png")
    figure = tweak_figures.effects_by_class(
        effects.by_class(found, num_classes),
        measures=effects.names(),
        title=f"Mean change {move}",
    )
    records.save_figure(figure, output / "effects_by_class.png")
    for m, name in enumerate(effects.names()):
        best = int(sizes[:, m].argmax())
        print(
            f"{name.replace('_', ' ')}: most by dimension {best + 1}, "
            f"{sizes[best, m]:.2f} standard deviations; mean of all {sizes[:, m].mean():.2f}"
        )


if __name__ == "__main__":
    cli.run(Config, main)
