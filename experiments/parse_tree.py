"""Draw routing as a parse tree: the primary capsules with the most evidence for each class."""

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
from experiments.analysis import evidence, selection
from experiments.cli import flag
from experiments.errors import InputError
from experiments.figures import trees
from experiments.training import trained

# Shape letters: J class capsules (parents); H, W, C height, width and channels of an image.
PARENTS, EVIDENCE_PARENTS = 3, 2  # class capsules in the tree, and in the figure of evidence


@dataclasses.dataclass(frozen=True)
class Config(selection.Settings):
    """The network, the images and the output."""

    output: str = flag("runs/parse_tree", "Folder of figures and results.json.")
    overlap: str = flag("", "Indices A,B of test images to overlay, in place of --index.")
    shift: int = flag(3, "Pixels by which A is shifted left and B right.", minimum=0, maximum=1000)
    children: int = flag(6, "Number of primary capsules in the tree.", minimum=2, maximum=12)


def main(config: Config) -> int:
    """Draw evidence and parse tree of each image."""
    with_data = bool(config.overlap or not config.images)
    run = trained.load(config.workdir, data_dir=config.data_dir, with_data=with_data)
    model = selection.capsnet_of(run, config.workdir)
    output = pathlib.Path(config.output)
    table: list[dict[str, Any]] = []
    for name, image in select_images(config, run).items():
        seen = np.asarray(run.trainer.objective.inputs(jnp.asarray(image)))
        trace = evidence.trace_routing(model, seen)
        fields = evidence.receptive_fields(model, image.shape)
        table += evidence.evidence_rows(
            name, trace, fields, parents=EVIDENCE_PARENTS, children=config.children
        )
        files.save_figure(draw_evidence(image, trace, fields), output / f"{name}_evidence.png")
        figure = draw_tree(
            image,
            trace,
            fields,
            num_digits=2 if config.overlap else 1,
            children=config.children,
            reconstructions=(
                reconstruct_classes(model, seen) if run.config.reconstruction_weight else None
            ),
        )
        files.save_figure(figure, output / f"{name}_tree.png")
        shown = ", ".join(
            f"{k} ({trace.lengths[-1, k]:.2f})" for k in evidence.longest_parents(trace, PARENTS)
        )
        print(f"{name}: longest capsules {shown}")
    files.write_json(output / "results.json", table)
    logging.info("figures and results.json are in %s", output)
    return 0


def select_images(config: Config, run: trained.Trained) -> dict[str, np.ndarray]:
    """Return images `[H, W, C]` in [0, 1] by name: --images, --index or the overlay of --overlap.

    Raises:
      InputError: A flag's value is invalid, or an image cannot be read.
    """
    if not config.overlap:
        return selection.select_images(run, images=config.images, index=config.index)
    if config.images:
        raise InputError("--overlap and --images exclude each other")
    indices = re.fullmatch("([0-9]{1,9}),([0-9]{1,9})", config.overlap)
    if not indices:
        raise InputError(
            f"--overlap must be the indices of two test images, A,B, got {config.overlap!r}"
        )
    first, second = (selection.load_test_image(run, int(index)) for index in indices.groups())
    if config.shift >= first.shape[1]:
        raise InputError(
            f"--shift must be less than the images' {first.shape[1]} pixels, got {config.shift}"
        )
    return {f"overlap_{indices[1]}_{indices[2]}": overlay(first, second, shift=config.shift)}


def overlay(first: np.ndarray, second: np.ndarray, *, shift: int) -> np.ndarray:
    """Add images `[H, W, C]`, shifted left and right by `shift` pixels, and clip the sum to 1."""
    width = first.shape[1]
    padding = ((0, 0), (shift, shift), (0, 0))
    left, right = np.pad(first, padding)[:, 2 * shift :], np.pad(second, padding)[:, :width]
    return np.minimum(left + right, 1)


def reconstruct_classes(model: CapsNet, image: np.ndarray) -> np.ndarray:
    """Reconstruct an image `[H, W, C]`, as the network takes it, from each class capsule alone.

    The result has shape `[J, H, W, C]`.
    """
    capsules = model(jnp.asarray(image))
    classes = jnp.arange(len(capsules))
    return np.asarray(
        model.reconstruct(jnp.broadcast_to(capsules, (len(classes), *capsules.shape)), classes)
    )


def draw_evidence(
    image: np.ndarray, trace: evidence.RoutingTrace, fields: trees.ReceptiveFields
) -> Figure:
    """Draw the evidence for the longest class capsules by position and iteration."""
    parents = evidence.longest_parents(trace, EVIDENCE_PARENTS)
    values = [evidence.sum_by_position(trace.evidence[..., parent], fields) for parent in parents]
    return trees.evidence(
        image,
        np.stack(values),
        fields,
        names=[f"class {parent}" for parent in parents],
        lengths=trace.lengths[:, parents].T,
    )


def draw_tree(
    image: np.ndarray,
    trace: evidence.RoutingTrace,
    fields: trees.ReceptiveFields,
    *,
    num_digits: int,
    children: int,
    reconstructions: np.ndarray | None,
) -> Figure:
    """Draw the longest class capsules above the leading children of the first `num_digits`.

    Class capsules are shown as their reconstructions `[J, H, W, C]`, if there are any.
    """
    parents, last = evidence.longest_parents(trace, PARENTS), trace.evidence[-1]
    leading: list[int] = []
    for rank, parent in enumerate(parents[:num_digits]):
        # An odd number of children is split in favour of the first digit.
        count = (children + num_digits - 1 - rank) // num_digits
        leading += evidence.leading_children(
            last[:, parent], fields, count, exclude=leading
        ).tolist()
    selected = np.array(leading)
    positions, types = evidence.locate_children(
        selected, fields, types=len(last) // fields.positions
    )
    return trees.tree(
        image,
        trace.couplings[-1][np.ix_(selected, np.array(parents))],
        fields,
        positions=positions,
        captions=[f"{n}: type {kind + 1}" for n, kind in enumerate(types, 1)],
        parents=[f"class {parent}: {trace.lengths[-1, parent]:.2f}" for parent in parents],
        reconstructions=None if reconstructions is None else reconstructions[parents],
        title="Top: class capsules, lengths, reconstructions. Edges: couplings of last iteration."
        "\nBottom: primary capsules with the most evidence, and their receptive fields.",
    )


if __name__ == "__main__":
    cli.run(Config, main)
