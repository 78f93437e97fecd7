"""EM and variational-Bayes routing in NumPy float64, with stored votes: independent programs.

They follow the papers' procedures literally. Parents of a convolution are all output capsules of
all positions, which a child may reach or not, so that nothing here knows about windows' offsets.
Gradients are those of `routing_oracles.with_gradients`. The letters are those of `capsjax.shapes`;
N is a number of positions of parents, 1 if all children reach all parents.
"""

import numpy as np
import scipy.special


def dense_votes(poses, weights, coordinates=None):
    """Votes [B, I, 1, J, D] of poses [B, I, R, P] for weights [I, P, J, E]."""
    votes = np.einsum("birp,ipje->bijre", poses, weights)
    votes = votes.reshape(*votes.shape[:3], -1)
    if coordinates is not None:
        votes = votes + coordinates.reshape(1, votes.shape[1], 1, votes.shape[-1])
    return votes[:, :, None]


def window_votes(poses, weights, stride):
    """Votes [B, H·W·A, N, J, D] of a map [B, H, W, A, R, P]; which children reach which N."""
    batch, height, width, types, rows, _ = poses.shape
    high, wide, _, _, parents, columns = weights.shape
    down, across = (height - high) // stride + 1, (width - wide) // stride + 1
    shape = batch, height, width, types, down, across, parents, rows * columns
    votes = np.zeros(shape, np.result_type(poses, weights))
    reaches = np.zeros(shape[1:6], bool)
    for y, x, k, m, i in np.ndindex(down, across, high, wide, types):
        row, column = y * stride + k, x * stride + m
        vote = np.einsum("brp,pje->bjre", poses[:, row, column, i], weights[k, m, i])
        votes[:, row, column, i, y, x] = vote.reshape(batch, parents, -1)
        reaches[row, column, i, y, x] = True
    children = height * width * types
    votes = votes.reshape(batch, children, down * across, parents, -1)
    return votes, reaches.reshape(children, -1)


def softmax(logits, axes, least=0):
    """Over several axes; 0 where all logits are -infinity; the normaliser is `least` at least."""
    if least:
        exponentials = np.exp(logits)
        total = exponentials.sum(axes, keepdims=True)
        return exponentials / np.where(total.real > least, total, least)
    largest = logits.real.max(axes, keepdims=True)
    shifted = logits - np.where(largest > -np.inf, largest, 0)
    reached = shifted.real > -np.inf
    exponentials = np.where(reached, np.exp(np.where(reached, shifted, 0)), 0)
    total = exponentials.sum(axes, keepdims=True)
    return exponentials / np.where(total.real > 0, total, 1)


def _moments(weights, votes):
    """Mass [B, N, J], mean and Σ w (v - mean)², 0 where the mass is 0."""
    mass = weights.sum(1)
    safe = np.where(mass.real > 0, mass, 1)[..., None]
    mean = (weights[..., None] * votes).sum(1) / safe
    return mass, mean, (weights[..., None] * (votes - mean[:, None]) ** 2).sum(1)


def em(
    votes,
    activations,
    beta_u,
    beta_a,
    base,
    *,
    inverse_temperatures,
    cost_scales,
    min_variance,
    axes,
    constant=None,
):
    """Means [B, N, J, D] and activations [B, N, J] of procedure 1.

    Args:
      votes: [B, I, N, J, D].
      activations: [B, I].
      beta_u: [J].
      beta_a: [J].
      base: [B, I, N, J], added to all logits.
      inverse_temperatures: One for each iteration.
      cost_scales: One for each iteration.
      min_variance: Added to the variances.
      axes: Of the parents that compete: (2, 3), or (3,) within a position.
      constant: Couplings of the last iteration, if they are constants.
    """
    logits = base
    for step, (inverse, scale) in enumerate(zip(inverse_temperatures, cost_scales, strict=True)):
        couplings = softmax(logits, axes)
        if constant is not None and step == len(inverse_temperatures) - 1:
            couplings = constant
        mass, mean, second = _moments(couplings * activations[:, :, None, None], votes)
        variance = second / np.where(mass.real > 0, mass, 1)[..., None] + min_variance
        cost = ((beta_u[:, None] + np.log(np.sqrt(variance))) * mass[..., None]).sum(-1)
        activation = 1 / (1 + np.exp(-inverse * (beta_a - scale * cost)))
        log_density = -((votes - mean[:, None]) ** 2) / (2 * variance[:, None])
        log_density = log_density - np.log(2 * np.pi * variance[:, None]) / 2
        logits = base + np.log(activation)[:, None] + log_density.sum(-1)
    return mean, activation, couplings


def variational_bayes(
    votes,
    activations,
    beta_u,
    beta_a,
    base,
    *,
    num_iterations,
    axes,
    allowed=None,
    first=None,
    alpha0=1.0,
    kappa0=1.0,
    psi0=1.0,
    nu0=None,
    least=0,
):
    """Posterior means [B, N, J, D] and logits [B, N, J] of algorithm 1, with diagonal precisions.

    `allowed` [B, J] are the parents with a mixing proportion; `first` the couplings to start with;
    `least` is the smallest normaliser of the others.
    """
    depth = votes.shape[-1]
    nu0 = depth + 1 if nu0 is None else nu0
    couplings = softmax(base, axes) if first is None else first
    for _ in range(num_iterations):
        mass, mean, second = _moments(couplings * activations[:, :, None, None], votes)
        alpha, kappa, nu = alpha0 + mass, kappa0 + mass, nu0 + mass
        posterior = mass[..., None] * mean / kappa[..., None]
        psi = psi0 + second + kappa0 * (mass / kappa)[..., None] * mean**2
        counted = alpha if allowed is None else alpha * allowed[:, None]
        total = counted.sum(-1, keepdims=True)
        log_pi = scipy.special.digamma(alpha) - scipy.special.digamma(total)
        log_det = sum(scipy.special.digamma((nu + 1 - d) / 2) for d in range(1, depth + 1))
        log_det = log_det + depth * np.log(2) - np.log(psi).sum(-1)
        distance = ((votes - posterior[:, None]) ** 2 / psi[:, None]).sum(-1)
        expected = depth / kappa[:, None] + nu[:, None] * distance
        logits = (log_pi + log_det / 2 - depth / 2 * np.log(2 * np.pi))[:, None] - expected / 2
        couplings = softmax(base + logits, axes, least)
    entropy = depth / 2 * np.log(2 * np.pi * np.e) - log_det / 2
    return posterior, beta_a - (np.exp(log_pi) * entropy + beta_u)
