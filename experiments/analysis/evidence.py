"""Where the evidence for a class capsule comes from: routing taken apart, child by child.

Shape letters: T routing iterations; I children (primary capsules); J parents (class capsules); D
dimensions of a parent; R x C positions of the primary capsules, with `types` of them at each.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

import capsjax
from capsjax.models import CapsNet
from experiments.figures.trees import Fields


class Routing(NamedTuple):
    """What routing did with one image, in every iteration."""

    couplings: np.ndarray  # [T, I, J]
    evidence: np.ndarray  # [T, I, J], what each child adds to the length of each parent's sum
    lengths: np.ndarray  # [T, J], of the parents


def routed(model: CapsNet, image: np.ndarray) -> Routing:
    """Routes one image `[H, W, C]` in 0 … 1, and tells what each child contributed.

    A parent's sum is s = Σ_i c_i û_i (and its bias): coupling times vote. Child i's evidence is
    the part of its contribution that lies along the sum, c_i û_i · s / |s|: coupling times
    agreement. So the evidence of all children (and the bias' own) adds up to |s|, of which the
    parent's length is the squash; a child that votes against the others has less than none.
    """
    poses = model.primary_poses(jnp.asarray(image))
    layer = model.capsules
    couplings = layer.couplings(poses)
    votes = jnp.einsum("ip,ipjd->ijd", poses, layer.weights[...].astype(poses.dtype))
    bias = None if layer.bias is None else layer.bias[...]
    return Routing(*map(np.asarray, contributions(couplings, votes, bias)))


def contributions(
    couplings: Array, votes: Array, bias: Array | None = None
) -> tuple[Array, Array, Array]:
    """Couplings `[T, I, J]`, evidence `[T, I, J]` and lengths `[T, J]` of votes `[I, J, D]`."""
    votes = votes.astype(couplings.dtype)
    sums = jnp.einsum("tij,ijd->tjd", couplings, votes)
    if bias is not None:
        sums += bias[None]
    lengths = capsjax.lengths(sums)[..., None]
    directions = sums / jnp.where(lengths > 0, lengths, 1)
    evidence = couplings * jnp.einsum("ijd,tjd->tij", votes, directions)
    return couplings, evidence, capsjax.lengths(capsjax.squash(sums))


def fields(model: CapsNet, image_shape: tuple[int, ...]) -> Fields:
    """The receptive fields of the primary capsules, through both convolutions.

    A window of the second convolution spans k2 windows of the first, s1 pixels apart, of k1 pixels
    each; the next one begins s1 s2 pixels on.
    """
    first, second = model.convolution, model.primary.convolution
    size, step = first.kernel.shape[0], first.stride
    side = size + (second.kernel.shape[0] - 1) * step
    starts = [np.arange(0, pixels - side + 1, step * second.stride) for pixels in image_shape[:2]]
    rows, columns = (start + (side - 1) / 2 for start in starts)
    return Fields(rows, columns, side)


def by_position(evidence: np.ndarray, where: Fields) -> np.ndarray:
    """Adds the evidence `[T, I]` for one parent up over the types at a position: `[T, R, C]`."""
    shape = (len(evidence), len(where.rows), len(where.columns), -1)
    return evidence.reshape(shape).sum(axis=-1)


def centre(evidence: np.ndarray, where: Fields) -> np.ndarray:
    """The mean row and column, `[..., 2]` in pixels, of evidence `[..., R, C]` above 0."""
    weights = np.maximum(evidence, 0)
    total = weights.sum(axis=(-2, -1))
    moments = weights.sum(axis=-1) @ where.rows, weights.sum(axis=-2) @ where.columns
    return np.stack(moments, axis=-1) / total[..., None]


def leading_children(
    evidence: np.ndarray, where: Fields, count: int, *, taken: Sequence[int] = ()
) -> np.ndarray:
    """The children `[<= count]` with the most evidence in `[I]`, no two at one position.

    Nor is any at the position of a child that is `taken`.
    """
    types = len(evidence) // where.positions
    order = np.argsort(-evidence, kind="stable")
    order = order[~np.isin(order // types, np.array(taken, int) // types)]
    _, firsts = np.unique(order // types, return_index=True)
    return order[np.sort(firsts)[:count]]


def places(children: np.ndarray, where: Fields, *, types: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column `[N, 2]` among the receptive fields, and type `[N]`, of children `[N]`."""
    position, kind = np.divmod(children, types)
    return np.stack(np.divmod(position, len(where.columns)), axis=1), kind


def longest(found: Routing, count: int) -> list[int]:
    """The class capsules that are longest in the end, the longest first."""
    return np.argsort(-found.lengths[-1], kind="stable")[:count].tolist()


def rows(
    name: str, found: Routing, where: Fields, *, parents: int, children: int
) -> list[dict[str, Any]]:
    """What is measured of the longest capsules in every iteration.

    `against` is the share of all evidence, sizes added, that is below 0; `leading_coupling` the
    mean over the children that have the most evidence in the end. None is the share and the
    centre of no evidence at all.
    """
    table = []
    for parent in longest(found, parents):
        leading = leading_children(found.evidence[-1, :, parent], where, children)
        shares, couplings = found.evidence[..., parent], found.couplings[..., parent]
        with np.errstate(invalid="ignore"):  # 0 / 0 becomes None
            against = np.maximum(-shares, 0).sum(axis=1) / abs(shares).sum(axis=1)
            centres = centre(by_position(shares, where), where)
        for t, (row, column) in enumerate(centres):
            measures = {
                "length": found.lengths[t, parent],
                "evidence": shares[t].sum(),
                "against": against[t],
                "mean_coupling": couplings[t].mean(),
                "leading_coupling": couplings[t, leading].mean(),
                "centre_row": row,
                "centre_column": column,
            }
            numbers = {k: float(x) if np.isfinite(x) else None for k, x in measures.items()}
            table.append({"image": name, "class": parent, "iteration": t + 1} | numbers)
    return table
