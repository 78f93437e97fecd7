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


def softmax(logits):
    """Over the last axis."""
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def dynamic_routing(poses, weights, prior, bias, cotangent, *, num_iterations, gradient):
    """Outputs, couplings of each iteration, and the gradients of `sum(cotangent · outputs)`."""
    poses, weights = (np.asarray(x, np.float64) for x in (poses, weights))
    votes = np.einsum("bip,ipjd->bijd", poses, weights)
    logits = np.zeros(votes.shape[:3])
    if prior is not None:
        logits = logits + np.asarray(prior, np.float64)
    history = []
    for _ in range(num_iterations):
        couplings = softmax(logits)
        sums = np.einsum("bij,bijd->bjd", couplings, votes)
        if bias is not None:
            sums = sums + np.asarray(bias, np.float64)
        outputs = squash(sums)
        history.append((couplings, sums, outputs))
        logits = logits + np.einsum("bijd,bjd->bij", votes, outputs)

    d_votes, d_logits = np.zeros_like(votes), np.zeros(votes.shape[:3])
    d_bias = np.zeros(votes.shape[2:])
    d_outputs = np.asarray(cotangent, np.float64)
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
        None if prior is None else d_logits.sum(0),
        None if bias is None else d_bias,
    )
    return history[-1][2], np.stack([couplings for couplings, _, _ in history]), gradients


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
