"""Routing in NumPy float64 with stored votes and gradients by hand: an independent program.

It follows the paper's procedure literally, logits and all; nothing here knows how the library
rearranges it. `test_oracles.py` checks the gradients against finite differences. The letters are
those of `capsjax.shapes`.
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
    """Output, couplings of each iteration, and the gradients of `sum(cotangent · outputs)`."""
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


def votes_of(spec, inputs):
    """The votes `[B, I, J, D]`, one child at a time."""
    poses, weights, _, _, coordinates, _ = (None if x is None else np.asarray(x) for x in inputs)
    examples, children = poses.shape[:2]
    parents = spec.num_parents
    votes = []
    for e, i, j in np.ndindex(examples, children, parents):
        if weights is None:
            vote = poses[e, i, j if poses.shape[2] == parents else 0]
        else:
            own = weights[i] if weights.ndim == 4 else weights
            vote = (poses[e, i] @ own[:, j]).ravel()
        votes.append(vote if coordinates is None else vote + coordinates[i])
    return np.array(votes).reshape(examples, children, parents, -1)


def vote_couplings(spec, inputs, state, votes):
    """The couplings of one pass `[B, I, J]`, one child at a time; 0 for a child without parents."""
    prior, mask = (None if x is None else np.asarray(x) for x in (inputs.prior, inputs.parent_mask))
    k, b, z, q = (None if x is None else np.asarray(x) for x in state)
    couplings = np.zeros(votes.shape[:3])
    for e, i in np.ndindex(*votes.shape[:2]):
        exponentials = np.zeros(spec.num_parents)
        for j, vote in enumerate(votes[e, i]):
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
    return couplings


def vote_moments(spec, inputs, state, *, couplings=None):
    """Couplings (unless they are given) and the moments of one pass."""
    gates = None if inputs.gates is None else np.asarray(inputs.gates)
    votes = votes_of(spec, inputs)
    if couplings is None:
        couplings = vote_couplings(spec, inputs, state, votes)
    factors = couplings if gates is None else couplings * gates[..., None]
    mass = factors.sum(1)
    first = (factors[..., None] * votes).sum(1)
    if spec.moments == "sums":
        return couplings, (mass if spec.mass else None, first, None)
    mean = first / np.where(mass > 0, mass, 1)[..., None]
    return couplings, (mass, mean, (factors[..., None] * (votes - mean[:, None]) ** 2).sum(1))


def vote_gradients(spec, inputs, state, cotangent, *, constant_couplings=False):
    """The gradients of `sum(cotangent · moments)` by the inputs, and by the state."""
    poses, weights, gates, prior, coordinates, _ = (
        None if x is None else np.asarray(x) for x in inputs
    )
    k, b, z, q = (None if x is None else np.asarray(x)[:, None] for x in state)
    d_mass, d_first, d_second = (None if x is None else np.asarray(x) for x in cotangent)
    votes = votes_of(spec, inputs)
    couplings, (mass, mean, _) = vote_moments(spec, inputs, state)
    factors = couplings if gates is None else couplings * gates[..., None]

    if spec.moments == "sums":
        slope = d_first[:, None]
        d_factors = np.sum(slope * votes, -1)
    else:  # of the mean, Σ w v / Σ w; moving it does not change the squares around it
        deviations = votes - mean[:, None]
        scaled = d_first / np.where(mass > 0, mass, np.inf)[..., None]
        slope = scaled[:, None] + 2 * d_second[:, None] * deviations
        d_factors = np.sum(scaled[:, None] * deviations + d_second[:, None] * deviations**2, -1)
    if d_mass is not None:
        d_factors = d_factors + d_mass[:, None]
    d_votes = factors[..., None] * slope
    d_gates = None if gates is None else np.sum(couplings * d_factors, -1)
    d_couplings = d_factors if gates is None else gates[..., None] * d_factors
    mean_gradient = np.sum(couplings * d_couplings, -1, keepdims=True)
    d_logits = couplings * (d_couplings - mean_gradient)
    if constant_couplings:
        d_logits = np.zeros_like(d_logits)

    d_b = d_z = d_q = None
    if b is not None:
        norms = np.linalg.norm(votes, axis=-1, keepdims=True) if spec.logits == "cosine" else 1
        unit = votes / norms
        d_unit = d_logits[..., None] * b
        d_b = np.sum(d_logits[..., None] * unit, 1)
        if spec.logits == "cosine":
            d_unit = d_unit - unit * np.sum(unit * d_unit, -1, keepdims=True)
        d_votes = d_votes + d_unit / norms
    if q is not None:
        d_z = np.sum(d_logits[..., None] * q * (votes - z), 1)
        d_q = -np.sum(d_logits[..., None] * (votes - z) ** 2, 1) / 2
        d_votes = d_votes - d_logits[..., None] * q * (votes - z)
    d_state = (None if k is None else d_logits.sum(1), d_b, d_z, d_q)

    d_prior = d_logits if prior is not None and prior.ndim == 3 else d_logits.sum(0)
    d_coordinates = None if coordinates is None else d_votes.sum((0, 2))
    if weights is None:
        d_weights = None
        d_poses = d_votes if poses.shape[2] == votes.shape[2] else d_votes.sum(2, keepdims=True)
    else:
        rows = d_votes.reshape(*votes.shape[:3], poses.shape[2], -1)
        own = np.broadcast_to(weights, (poses.shape[1], *weights.shape[-3:]))
        d_poses = np.einsum("bijrc,ipjc->birp", rows, own)
        d_weights = np.einsum("bijrc,birp->ipjc", rows, poses)
        d_weights = d_weights if weights.ndim == 4 else d_weights.sum(0)
    d_prior = None if prior is None else d_prior
    return (d_poses, d_weights, d_gates, d_prior, d_coordinates, None), d_state


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
