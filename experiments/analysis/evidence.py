"""Decomposition of class capsules into the contributions ("evidence") of primary capsules.

Shape letters: T routing iterations; I primary capsules (children); J class capsules (parents); P
and D dimensions of a child and a parent; R and Q rows and columns of positions, each with I / (R Q)
types of primary capsules; N selected children; H, W, C height, width and channels of an image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

import capsjax
from capsjax.models import CapsNet
from experiments.figures.trees import ReceptiveFields


class RoutingTrace(NamedTuple):
    """Routing of one image, by iteration."""

    couplings: np.ndarray  # [T, I, J]
    evidence: np.ndarray  # [T, I, J], contribution of each child to |s| of each parent
    lengths: np.ndarray  # [T, J], of the parents


def trace_routing(model: CapsNet, image: np.ndarray) -> RoutingTrace:
    """Route one image, and decompose the length of each parent into its children's evidence.

    A parent's weighted sum is s = Σ_i c_i û_i, plus its bias, of couplings c and votes û. The
    evidence of child i is c_i û_i · s / |s|, the component of its term along s. Evidence (with the
    bias's own) therefore adds up to |s|, whose squash is the parent's length. It is negative for a
    vote that points away from s.

    Args:
      model: The network.
      image: `[H, W, C]`, as the network takes it.
    """
    poses = model.primary_poses(jnp.asarray(image))
    return RoutingTrace(*map(np.asarray, route(model, poses)))


def route(model: CapsNet, poses: Array) -> tuple[Array, Array, Array]:
    """Route one image's primary poses `[I, P]`, and decompose them; it can be compiled.

    Returns:
      The fields of `RoutingTrace`.
    """
    layer = model.capsules
    couplings = layer.couplings(poses)
    votes = jnp.einsum("ip,ipjd->ijd", poses, layer.weights[...].astype(poses.dtype))
    bias = None if layer.bias is None else layer.bias[...]
    return decompose(couplings, votes, bias)


def decompose(
    couplings: Array, votes: Array, bias: Array | None = None
) -> tuple[Array, Array, Array]:
    """Compute evidence c_i û_i · s / |s| and parents' lengths from couplings c and votes û.

    Args:
      couplings: `[T, I, J]`.
      votes: `[I, J, D]`.
      bias: Added to the weighted sum s, `[J, D]`, or None.

    Returns:
      Couplings `[T, I, J]`, evidence `[T, I, J]` and parents' lengths `[T, J]`.
    """
    votes = votes.astype(couplings.dtype)
    sums = jnp.einsum("tij,ijd->tjd", couplings, votes)
    if bias is not None:
        sums += bias[None]
    lengths = capsjax.lengths(sums)[..., None]
    directions = sums / jnp.where(lengths > 0, lengths, 1)
    evidence = couplings * jnp.einsum("ijd,tjd->tij", votes, directions)
    return couplings, evidence, capsjax.lengths(capsjax.squash(sums))


def receptive_fields(model: CapsNet, image_shape: tuple[int, ...]) -> ReceptiveFields:
    """Compute the receptive fields of the primary capsules in an image `[H, W, C]`.

    With kernel sizes k1, k2 and strides s1, s2 of the two convolutions, a field has
    k1 + (k2 - 1) s1 pixels a side, and adjacent fields are s1 s2 pixels apart.
    """
    first, second = model.convolution, model.primary.convolution
    size, step = first.kernel.shape[0], first.stride
    side = size + (second.kernel.shape[0] - 1) * step
    starts = [np.arange(0, pixels - side + 1, step * second.stride) for pixels in image_shape[:2]]
    rows, columns = (start + (side - 1) / 2 for start in starts)
    return ReceptiveFields(rows, columns, side)


def sum_by_position(evidence: np.ndarray, fields: ReceptiveFields) -> np.ndarray:
    """Sum the evidence `[T, I]` for one parent over the types at each position: `[T, R, Q]`."""
    shape = (len(evidence), len(fields.rows), len(fields.columns), -1)
    return evidence.reshape(shape).sum(axis=-1)


def evidence_centre(evidence: np.ndarray, fields: ReceptiveFields) -> np.ndarray:
    """Return the centroid (row, column) of positive evidence `[..., R, Q]`: pixels `[..., 2]`."""
    weights = np.maximum(evidence, 0)
    total = weights.sum(axis=(-2, -1))
    moments = weights.sum(axis=-1) @ fields.rows, weights.sum(axis=-2) @ fields.columns
    return np.stack(moments, axis=-1) / total[..., None]


def leading_children(
    evidence: np.ndarray,
    fields: ReceptiveFields,
    count: int,
    *,
    exclude: Sequence[int] = (),
) -> np.ndarray:
    """Select the children with the most evidence, at most one per position.

    Args:
      evidence: Evidence for one parent, `[I]`.
      fields: The receptive fields.
      count: Number of children to select.
      exclude: Indices of children whose positions are excluded.

    Returns:
      Indices of at most `count` children, by decreasing evidence.
    """
    types = len(evidence) // fields.positions
    order = np.argsort(-evidence, kind="stable")
    order = order[~np.isin(order // types, np.array(exclude, int) // types)]
    _, firsts = np.unique(order // types, return_index=True)
    return order[np.sort(firsts)[:count]]


def locate_children(
    children: np.ndarray, fields: ReceptiveFields, *, types: int
) -> tuple[np.ndarray, np.ndarray]:
    """Convert child indices `[N]` to positions (row, column) `[N, 2]` and capsule types `[N]`."""
    position, capsule_type = np.divmod(children, types)
    return np.stack(np.divmod(position, len(fields.columns)), axis=1), capsule_type


def longest_parents(trace: RoutingTrace, count: int) -> list[int]:
    """Return the class capsules with the greatest final lengths, longest first."""
    return np.argsort(-trace.lengths[-1], kind="stable")[:count].tolist()


def evidence_rows(
    name: str, trace: RoutingTrace, fields: ReceptiveFields, *, parents: int, children: int
) -> list[dict[str, Any]]:
    """Return a row of measures per iteration for each of the longest class capsules.

    `against` is the absolute sum of negative evidence over the sum of absolute evidence;
    `leading_coupling` is averaged over the leading children of the last iteration. `against` and
    the centre are None where all evidence is 0.

    Args:
      name: The image's name, copied into each row.
      trace: Routing of the image.
      fields: The receptive fields.
      parents: Number of class capsules.
      children: Number of leading children.
    """
    table = []
    for parent in longest_parents(trace, parents):
        leading = leading_children(trace.evidence[-1, :, parent], fields, children)
        evidence, couplings = trace.evidence[..., parent], trace.couplings[..., parent]
        with np.errstate(invalid="ignore"):  # 0 / 0 becomes None
            against = np.maximum(-evidence, 0).sum(axis=1) / abs(evidence).sum(axis=1)
            centres = evidence_centre(sum_by_position(evidence, fields), fields)
        for t, (row, column) in enumerate(centres):
            measures = {
                "length": trace.lengths[t, parent],
                "evidence": evidence[t].sum(),
                "against": against[t],
                "mean_coupling": couplings[t].mean(),
                "leading_coupling": couplings[t, leading].mean(),
                "centre_row": row,
                "centre_column": column,
            }
            values = {k: float(x) if np.isfinite(x) else None for k, x in measures.items()}
            table.append({"image": name, "class": parent, "iteration": t + 1} | values)
    return table
