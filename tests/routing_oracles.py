"""Simple routings in NumPy float64 with stored votes: independent programs from the papers.

Gradients are complex steps: every operation here is analytic, so the imaginary part of a result
whose argument is shifted by 1e-30j is 1e-30 times the derivative, exact to rounding. `constant`
removes imaginary parts, which makes a value a constant of the gradient.

Poses are matrices `[B, I, R, P]`, with R = 1 for vectors; the letters are those of
`capsjax.shapes`.
"""

import numpy as np


def with_gradients(function, arrays, cotangents):
    """Return results, and the gradients of `sum(cotangent · result)` by each array."""

    def loss(k, array):
        results = function(*arrays[:k], array, *arrays[k + 1 :])
        return sum((g * x).sum() for g, x in zip(cotangents, results, strict=True))

    gradients = []
    for k, array in enumerate(arrays):
        if array is None:
            gradients.append(None)
            continue
        gradient = np.zeros(array.shape)
        for place in np.ndindex(array.shape):
            shifted = array.astype(complex)
            shifted[place] += 1e-30j
            gradient[place] = loss(k, shifted).imag / 1e-30
        gradients.append(gradient)
    return function(*arrays), tuple(gradients)


def constant(x):
    return np.asarray(x).real


def votes_of(poses, weights):
    """Votes `[B, I, J, R, E]`; weights without axes I or J are shared."""
    if weights.ndim == 4:
        return np.einsum("birp,ipje->bijre", poses, weights)
    if weights.ndim == 3:
        return np.einsum("birp,pje->bijre", poses, weights)
    return np.einsum("birp,pe->bire", poses, weights)[:, :, None]


def softmax(logits, parent_mask):
    """Over the last axis of `[B, I, J]`; 0 for a child whose logits are all -infinity."""
    if parent_mask is not None:
        logits = np.where(np.asarray(parent_mask)[:, None], logits, -np.inf)
    largest = logits.real.max(-1, keepdims=True)
    exponentials = np.exp(logits - np.where(largest > -np.inf, largest, 0))
    return quotient(exponentials, exponentials.sum(-1, keepdims=True))


def weighted_sums(couplings, votes):
    """The sums `[B, J, R, E]` of coupling times vote over the children."""
    return np.einsum("bij,bijre->bjre", couplings, np.broadcast_to(votes, _full(couplings, votes)))


def agreement(votes, parents):
    """The dot products `[B, I, J]` of votes and poses of the parents `[B, J, R, E]`."""
    full = *votes.shape[:2], *parents.shape[1:]
    return np.einsum("bijre,bjre->bij", np.broadcast_to(votes, full), parents)


def lengths(x):
    """Euclidean lengths of matrices, with two axes of size 1 kept; analytic, unlike a norm."""
    return np.sqrt((x * x).sum((-2, -1), keepdims=True))


def units(x):
    """Matrices divided by their length; 0 for one of zeros."""
    return quotient(x, lengths(x))


def quotient(x, y):
    """Return x / y, and 0 where y is 0."""
    positive = y.real > 0
    return np.where(positive, x / np.where(positive, y, 1), 0)


def hide(parent_mask, x):
    """Zero the results `[B, J, …]` of masked parents."""
    if parent_mask is None:
        return x
    mask = np.asarray(parent_mask)
    return np.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - 2)), x, 0)


def self_routing(
    poses, activations, weights, routing_weights, routing_bias, prior, *, parent_mask=None
):
    """Equations 3 to 5 of the paper: poses `[B, J, R, E]` and activations `[B, J]`.

    `routing_weights` are `[I, R, P, J]`.
    """
    logits = np.einsum("birp,irpj->bij", poses, routing_weights)
    for added in (routing_bias, prior):
        logits = logits if added is None else logits + added
    factors = softmax(logits, parent_mask) * activations[..., None]
    mass = factors.sum(1)
    sums = weighted_sums(factors, votes_of(poses, weights))
    return quotient(sums, mass[..., None, None]), quotient(mass, mass.sum(1, keepdims=True))


def inverted_attention(
    poses,
    weights,
    scale,
    offset,
    prior,
    parents,
    *,
    num_iterations,
    parent_mask=None,
    gradient="full",
):
    """Procedure 1 of the paper, with the authors' scaled logits: poses `[B, J, R, E]`.

    `parents` None are zeros, whose couplings are uniform; `scale` and `offset` are `[R, E]`.
    """
    votes = votes_of(poses, weights)
    depth = votes.shape[-2] * votes.shape[-1]
    for _ in range(num_iterations):
        if parents is None:
            shape = len(poses), prior.shape[-1] if weights.ndim == 2 else votes.shape[2]
            parents = np.zeros((*shape, *votes.shape[3:]))
        logits = agreement(votes, parents) / np.sqrt(depth)
        couplings = softmax(logits if prior is None else logits + prior, parent_mask)
        parents = weighted_sums(constant(couplings) if gradient == "last" else couplings, votes)
        if depth > 1:
            differences = parents - parents.mean((-2, -1), keepdims=True)
            variance = (differences * differences).mean((-2, -1), keepdims=True)
            parents = differences / np.sqrt(variance + 1e-5)
        parents = parents if scale is None else parents * scale
        parents = parents if offset is None else parents + offset
    return hide(parent_mask, parents)


def kmeans(
    poses,
    weights,
    initial_logits,
    prior,
    temperature,
    *,
    num_iterations,
    similarity,
    unit_means=True,
    carry_couplings=False,
    squash_power=1.0,
    parent_mask=None,
    gradient="full",
):
    """Soft assignments to normalised sums of votes, and a squash of the last: `[B, J, R, E]`."""
    votes = votes_of(poses, weights)
    parents = weights.shape[-2]
    if weights.ndim == 2:
        parents = (initial_logits if prior is None else prior).shape[-1]
    logits = np.zeros((*poses.shape[:2], parents))
    if initial_logits is not None:
        logits = logits + initial_logits
    for _ in range(num_iterations):
        couplings = softmax(logits if prior is None else logits + prior, parent_mask)
        if gradient == "last":
            couplings = constant(couplings)
        sums = weighted_sums(couplings, votes)
        means = units(sums) if unit_means else sums
        logits = agreement(units(votes) if similarity == "cosine" else votes, means)
        logits = temperature * (logits + couplings if carry_couplings else logits)
    if squash_power is not None:
        length = lengths(sums)
        sums = units(sums) * (length**2 / (1 + length**2)) ** squash_power
    return hide(parent_mask, sums)


def _full(couplings, votes):
    return *couplings.shape, *votes.shape[3:]


def windows_of(x, size, stride, axis):
    """The windows of a map with H at `axis` and W at the next: `[…, h, w, K, L, …]`.

    The result is an array of the library of `x`.
    """
    height, width = x.shape[axis : axis + 2]
    rows = []
    for row in range(0, height - size[0] + 1, stride):
        columns = []
        for column in range(0, width - size[1] + 1, stride):
            place = [slice(None)] * x.ndim
            place[axis], place[axis + 1] = (
                slice(row, row + size[0]),
                slice(column, column + size[1]),
            )
            columns.append(x[tuple(place)])
        rows.append(columns)
    xp = x.__array_namespace__()
    return xp.stack([xp.stack(columns, axis) for columns in rows], axis)
