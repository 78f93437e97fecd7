"""Shows routing as a parse tree: which parts of an image speak for which class capsule."""

import dataclasses
import pathlib
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging
from matplotlib.figure import Figure

from capsjax.models import CapsNet
from experiments import cli, files
from experiments.analysis import evidence, pictures
from experiments.cli import flag
from experiments.errors import InputError
from experiments.figures import trees
from experiments.training import trained

PARENTS, FOCUS = 3, 2  # class capsules in the tree; those whose evidence is drawn


@dataclasses.dataclass(frozen=True)
class Config(pictures.Settings):
    """Whose routing, of which images, and where the results go."""

    output: str = flag("runs/parse_tree", "Folder of figures and results.json.")
    overlap: str = flag("", "Two test images A,B to lay over each other, in place of --index.")
    shift: int = flag(3, "Pixels that A moves to the left and B to the right.", minimum=0)
    children: int = flag(6, "Primary capsules in the tree.", minimum=2, maximum=12)


def main(config: Config) -> int:
    """Draws evidence and tree of every picture."""
    run = trained.load(config.workdir, data_dir=config.data_dir)
    model = pictures.capsnet(run, config.workdir)
    output = pathlib.Path(config.output)
    table: list[dict[str, Any]] = []
    for name, image in looked_at(config, run).items():
        found, where = evidence.routed(model, image), evidence.fields(model, image.shape)
        table += evidence.rows(name, found, where, parents=FOCUS, children=config.children)
        files.save_figure(draw_evidence(image, found, where), output / f"{name}_evidence.png")
        figure = draw_tree(
            image,
            found,
            where,
            digits=2 if config.overlap else 1,
            children=config.children,
            drawings=drawings(model, image) if run.config.reconstruction_weight else None,
        )
        files.save_figure(figure, output / f"{name}_tree.png")
        shown = ", ".join(
            f"{k} ({found.lengths[-1, k]:.2f})" for k in evidence.longest(found, PARENTS)
        )
        print(f"{name}: longest capsules {shown}")
    files.write_json(output / "results.json", table)
    logging.info("figures and results.json are in %s", output)
    return 0


def looked_at(config: Config, run: trained.Trained) -> dict[str, np.ndarray]:
    """The pictures by name: those of the settings, or two test images in one.

    Raises:
      InputError: They cannot be had.
    """
    if not config.overlap:
        return pictures.chosen(run, images=config.images, index=config.index)
    if config.images:
        raise InputError("--overlap is made of test images: give it or --images, not both")
    found = re.fullmatch(r"(\d+),(\d+)", config.overlap)
    if not found:
        raise InputError(f"--overlap must be two test images, A,B, got {config.overlap!r}")
    first, second = (pictures.tested(run, int(index)) for index in found.groups())
    if config.shift >= first.shape[1]:
        raise InputError(
            f"--shift must be less than the images' {first.shape[1]} pixels, got {config.shift}"
        )
    return {f"overlap_{found[1]}_{found[2]}": overlapped(first, second, shift=config.shift)}


def overlapped(first: np.ndarray, second: np.ndarray, *, shift: int) -> np.ndarray:
    """The sum, at most 1, of `first` moved to the left and `second` moved to the right."""
    width = first.shape[1]
    room = ((0, 0), (shift, shift), (0, 0))
    return np.minimum(np.pad(first, room)[:, 2 * shift :] + np.pad(second, room)[:, :width], 1)


def drawings(model: CapsNet, image: np.ndarray) -> np.ndarray:
    """What the decoder draws of each class capsule of an image, `[J, H, W, C]`."""
    capsules = model(jnp.asarray(image))
    classes = jnp.arange(len(capsules))
    return np.asarray(
        model.reconstruct(jnp.broadcast_to(capsules, (len(classes), *capsules.shape)), classes)
    )


def draw_evidence(image: np.ndarray, found: evidence.Routing, where: trees.Fields) -> Figure:
    """Where the evidence for the longest capsules lies, iteration by iteration."""
    focus = evidence.longest(found, FOCUS)
    return trees.evidence(
        image,
        np.stack([evidence.by_position(found.evidence[..., parent], where) for parent in focus]),
        where,
        names=[f"class {parent}" for parent in focus],
        lengths=found.lengths[:, focus].T,
    )


def draw_tree(
    image: np.ndarray,
    found: evidence.Routing,
    where: trees.Fields,
    *,
    digits: int,
    children: int,
    drawings: np.ndarray | None,
) -> Figure:
    """The longest capsules over the children that speak most for the first `digits` of them."""
    parents, last = evidence.longest(found, PARENTS), found.evidence[-1]
    leading: list[int] = []
    for place, parent in enumerate(parents[:digits]):
        count = (children + digits - 1 - place) // digits  # an odd one is the first digit's
        leading += evidence.leading_children(last[:, parent], where, count, taken=leading).tolist()
    chosen = np.array(leading)
    positions, types = evidence.places(chosen, where, types=len(last) // where.positions)
    return trees.tree(
        image,
        found.couplings[-1][np.ix_(chosen, np.array(parents))],
        where,
        positions=positions,
        captions=[f"{n}: type {kind + 1}" for n, kind in enumerate(types, 1)],
        parents=[f"class {parent}: {found.lengths[-1, parent]:.2f}" for parent in parents],
        drawings=drawings if drawings is None else drawings[parents],
        title="Class capsules with their lengths, what they draw, and the children that speak most "
        "for them\nwith what these see; on the edges: couplings of the last iteration",
    )


if __name__ == "__main__":
    cli.run(Config, main)
