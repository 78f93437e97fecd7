"""Self-attention routing in NumPy float64, with all attention matrices and gradients by hand.

It follows the paper: votes, scaled dot products between all pairs of children, softmax over the
parents. `test_self_attention.py` checks the gradients against finite differences. The letters are
those of `capsjax.shapes`.
"""

import numpy as np


def squash(s):
    """`(1 - exp(-|s|)) s/|s|` along the last axis."""
    length = np.sqrt(np.sum(s * s, -1, keepdims=True))
    return np.divide(s, length, out=np.zeros_like(s), where=length > 0) * (1 - np.exp(-length))


def squash_vjp(s, dv):
    """The gradient of `sum(dv · squash(s))` where no s is 0: tangential and radial parts."""
    length = np.sqrt(np.sum(s * s, -1, keepdims=True))
    unit = s / length
    radial = np.sum(unit * dv, -1, keepdims=True) * unit
    return (1 - np.exp(-length)) / length * (dv - radial) + np.exp(-length) * radial


def softmax(logits):
    """Over the last axis; 0 where all logits are -infinity."""
    largest = logits.max(-1, keepdims=True)
    exponentials = np.exp(logits - np.where(largest > -np.inf, largest, 0))
    total = exponentials.sum(-1, keepdims=True)
    return np.divide(exponentials, total, out=np.zeros_like(exponentials), where=total > 0)


def self_attention_routing(
    poses, weights, couplings_bias, prior, cotangent, *, mask=None, parent_mask=None
):
    """Outputs, and the gradients of `sum(cotangent · outputs)` by the first four arguments.

    Poses `[B, I, P]`; weights `[I, P, J, D]`, `[P, J, D]` or `[P, D]`; None for an absent bias or
    prior. Masks are `[B, I]` and `[B, J]`.
    """
    examples, children, _ = poses.shape
    parents, depth = cotangent.shape[1:]
    own = weights[:, None] if weights.ndim == 2 else weights
    own = np.broadcast_to(own, (children, own.shape[-3], parents, depth))
    kept = np.ones((examples, children)) if mask is None else mask.astype(float)
    votes = np.einsum("bip,ipjd->bijd", poses, own)

    attention = np.einsum("bijd,bkjd->bjik", votes, votes) * kept[:, None, None] / np.sqrt(depth)
    logits = attention.sum(-1).swapaxes(1, 2)
    if prior is not None:
        logits = logits + prior
    if parent_mask is not None:
        logits = np.where(parent_mask[:, None], logits, -np.inf)
        cotangent = np.where(parent_mask[..., None], cotangent, 0)
    shares = softmax(logits)
    couplings = shares if couplings_bias is None else shares + couplings_bias
    couplings = couplings * kept[..., None]
    sums = np.einsum("bij,bijd->bjd", couplings, votes)
    outputs = squash(sums)
    if parent_mask is not None:
        outputs = np.where(parent_mask[..., None], outputs, 0)

    d_sums = squash_vjp(sums, cotangent)
    d_votes = couplings[..., None] * d_sums[:, None]
    d_couplings = np.einsum("bijd,bjd->bij", votes, d_sums) * kept[..., None]
    d_logits = shares * (d_couplings - np.sum(shares * d_couplings, -1, keepdims=True))
    d_attention = np.broadcast_to(d_logits.swapaxes(1, 2)[..., None], attention.shape)
    d_attention = d_attention * kept[:, None, None] / np.sqrt(depth)
    d_votes = d_votes + np.einsum("bjik,bkjd->bijd", d_attention, votes)
    d_votes = d_votes + np.einsum("bjik,bijd->bkjd", d_attention, votes)
    d_weights = np.einsum("bijd,bip->ipjd", d_votes, poses)
    shared = {4: (), 3: (0,), 2: (0, 2)}[weights.ndim]
    d_prior = None
    if prior is not None:
        d_prior = d_logits if prior.ndim == 3 else d_logits.sum(0)
    return outputs, (
        np.einsum("bijd,ipjd->bip", d_votes, own),
        d_weights.sum(shared),
        None if couplings_bias is None else d_couplings.sum(0),
        d_prior,
    )
