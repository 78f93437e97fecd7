"""Routing in NumPy float64 with stored votes and gradients by hand: an independent program.

It follows the paper's procedure literally, logits and all; nothing here knows how the library
rearranges it. `test_oracles.py` checks the gradients against finite differences.
"""

import numpy as np


def squash(s):
    """`|s|²/(1 + |s|²) · s/|s|` along the last axis."""
    squares = np.sum(s * s, -1, keepdims=True)
    return s * np.sqrt(squares) / (1 + squares)


def squash_vjp(s, dv):
    """The gradient of `sum(dv · squash(s))`."""
    n = np.sqrt(np.sum(s * s, -1, keepdims=True))
    unit = np.divide(s, n, out=np.zeros_like(s), where=n > 0)
    radial = np.sum(unit * dv, -1, keepdims=True)
    factor, slope = n / (1 + n**2), (1 - n**2) / (1 + n**2) ** 2
    return factor * dv + n * slope * unit * radial


def softmax(logits, leaky=False):
    """Over the last axis; 0 where all logits are -infinity; leaky: beside one more logit of 0."""
    largest = logits.max(-1, keepdims=True)
    largest = np.maximum(largest, 0) if leaky else np.where(largest > -np.inf, largest, 0)
    exponentials = np.exp(logits - largest)
    total = exponentials.sum(-1, keepdims=True) + leaky * np.exp(-largest)
    return np.divide(exponentials, total, out=np.zeros_like(exponentials), where=total > 0)


def dynamic_routing(
    poses,
    weights,
    prior,
    bias,
    cotangent,
    *,
    num_iterations,
    gradient,
    leaky=False,
    parent_mask=None,
):
    """Outputs, couplings of each iteration, and the gradients of `sum(cotangent · outputs)`."""
    poses, weights = (np.asarray(x, np.float64) for x in (poses, weights))
    votes = np.einsum("bip,ipjd->bijd", poses, weights)
    logits = np.zeros(votes.shape[:3])
    cotangent = np.asarray(cotangent, np.float64)
    if prior is not None:
        logits = logits + np.asarray(prior, np.float64)
    if parent_mask is not None:
        logits = np.where(np.asarray(parent_mask)[:, None], logits, -np.inf)
        cotangent = np.where(np.asarray(parent_mask)[..., None], cotangent, 0)
    history = []
    for _ in range(num_iterations):
        couplings = softmax(logits, leaky)
        sums = np.einsum("bij,bijd->bjd", couplings, votes)
        if bias is not None:
            sums = sums + np.asarray(bias, np.float64)
        outputs = squash(sums)
        history.append((couplings, sums, outputs))
        logits = logits + np.einsum("bijd,bjd->bij", votes, outputs)

    d_votes, d_logits = np.zeros_like(votes), np.zeros(votes.shape[:3])
    d_bias = np.zeros(votes.shape[2:])
    d_outputs = cotangent
    for couplings, sums, outputs in reversed(history):
        if d_outputs is None:  # only through the agreements of later iterations
            d_outputs = np.einsum("bij,bijd->bjd", d_logits, votes)
            d_votes += d_logits[..., None] * outputs[:, None]
        d_sums = squash_vjp(sums, d_outputs)
        d_bias += d_sums.sum(0)
        d_votes += couplings[..., None] * d_sums[:, None]
        if gradient == "last":
            break
        d_couplings = np.einsum("bijd,bjd->bij", votes, d_sums)
        mean = np.sum(couplings * d_couplings, -1, keepdims=True)
        d_logits += couplings * (d_couplings - mean)
        d_outputs = None
    gradients = (
        np.einsum("bijd,ipjd->bip", d_votes, weights),
        np.einsum("bijd,bip->ipjd", d_votes, poses),
        None if prior is None else d_logits if prior.ndim == 3 else d_logits.sum(0),
        None if bias is None else d_bias,
    )
    outputs = history[-1][2]
    if parent_mask is not None:
        outputs = np.where(np.asarray(parent_mask)[..., None], outputs, 0)
    return outputs, np.stack([couplings for couplings, _, _ in history]), gradients


def vote_moments(spec, inputs, state):
    """Couplings and the moments of one pass, one example and one child at a time."""
    poses, weights, gates, prior, coordinates, mask = (
        None if x is None else np.asarray(x) for x in inputs
    )
    k, b, z, q = (None if x is None else np.asarray(x) for x in state)
    examples, children = poses.shape[:2]
    parents = spec.num_parents
    couplings = np.zeros((examples, children, parents))
    all_votes = []
    for e, i in np.ndindex(examples, children):
        votes = []
        for j in range(parents):
            if weights is None:
                vote = poses[e, i, j if poses.shape[2] == parents else 0]
            else:
                own = weights[i] if weights.ndim == 4 else weights
                vote = (poses[e, i] @ own[:, j]).ravel()
            votes.append(vote if coordinates is None else vote + coordinates[i])
        all_votes.append(votes)
        exponentials = np.zeros(parents)
        for j, vote in enumerate(votes):
            logit = 0.0
            if prior is not None:
                logit += prior[i, j] if prior.ndim == 2 else prior[e, i, j]
            if k is not None:
                logit += k[e, j]
            if b is not None:
                scale = np.linalg.norm(vote) if spec.logits == "cosine" else 1
                logit += vote @ b[e, j] / scale
            if q is not None:
                logit -= np.sum(q[e, j] * (vote - z[e, j]) ** 2) / 2
            if mask is None or mask[e, j]:
                exponentials[j] = np.exp(logit)
        total = exponentials.sum() + spec.leaky
        couplings[e, i] = exponentials / (total or 1)
    votes = np.array(all_votes).reshape(examples, children, parents, -1)
    factors = couplings if gates is None else couplings * gates[..., None]
    mass = factors.sum(1)
    first = (factors[..., None] * votes).sum(1)
    if spec.moments == "sums":
        return couplings, (mass if spec.mass else None, first)
    mean = first / np.where(mass > 0, mass, 1)[..., None]
    return couplings, (mass, mean, (factors[..., None] * (votes - mean[:, None]) ** 2).sum(1))


def strided_conv(images, kernel, cotangent, *, stride):
    """Outputs and the gradients of `sum(cotangent · outputs)`, one window at a time."""
    images, kernel, cotangent = (np.asarray(x, np.float64) for x in (images, kernel, cotangent))
    height, width = kernel.shape[:2]
    outputs = np.zeros_like(cotangent)
    d_images, d_kernel = np.zeros_like(images), np.zeros_like(kernel)
    for row, column in np.ndindex(*cotangent.shape[1:3]):
        y, x = row * stride[0], column * stride[1]
        window = images[:, y : y + height, x : x + width]
        there = cotangent[:, row, column]
        outputs[:, row, column] = np.einsum("bhwc,hwco->bo", window, kernel)
        d_images[:, y : y + height, x : x + width] += np.einsum("bo,hwco->bhwc", there, kernel)
        d_kernel += np.einsum("bo,bhwc->hwco", there, window)
    return outputs, (d_images, d_kernel)
