"""The passes with stored votes, in plain JAX, differentiable in every mode.

This implementation is the definition that tests compare the others with: `moments` and `couplings`
are the formulas of `passes`, the other two passes their automatic derivatives. Votes are
`[B, I, J, D]`, or `[B, I, 1, D]` if all parents share them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.vote_passes.passes import (
    Inputs,
    Kept,
    Moments,
    Spec,
    State,
    Term,
    is_uniform,
    nothing_kept,
)

# (spec, logits [B, I, J], whether nothing distinguishes the parents) -> couplings [B, I, J].
Softmax = Callable[[Spec, Array, bool], Array]

# By the number of axes of the weights; with [P, E] all parents share the votes.
_LETTERS = {4: "birp,ipje->bijre", 3: "birp,pje->bijre", 2: "birp,pe->bire"}


def store_votes(inputs: Inputs) -> Inputs:
    """Compute the votes, and return inputs with them in place of poses and weights."""
    return inputs._replace(poses=votes_of(inputs), weights=None, coordinates=None)


def moments(
    spec: Spec,
    inputs: Inputs,
    state: State,
    *,
    constant_couplings: bool = False,
    softmax: Softmax | None = None,
) -> Moments:
    """Compute the moments: sums over children of couplings times votes.

    `softmax` replaces that over the parents of each child.
    """
    votes = votes_of(inputs)
    if softmax is None:
        weights = couplings(spec, inputs, state)
    else:
        weights = softmax(spec, logits(spec, inputs, state, votes), is_uniform(inputs, state))
    if constant_couplings:
        weights = lax.stop_gradient(weights)
    return weighted_moments(spec, inputs, votes, weights)


def weighted_moments(spec: Spec, inputs: Inputs, votes: Array, weights: Array) -> Moments:
    """Compute the moments of votes at given couplings."""
    if inputs.gates is not None:
        weights *= inputs.gates.astype(votes.dtype)[..., None]
    first = _sum(weights, votes)
    mass = weights.sum(1) if spec.mass or spec.moments == "central" else None
    if mass is None or spec.moments == "sums":
        return Moments(mass, first)
    mean = divide(first, mass)
    differences = votes - mean[:, None]
    return Moments(mass, mean, jnp.sum(weights[..., None] * differences**2, 1))


def chain(spec: Spec, inputs: Inputs, term: Term) -> tuple[State, Kept]:
    """Compute the cotangent of the state from that of the moments; keep nothing."""
    _, vjp = jax.vjp(partial(moments, spec, inputs), term.state)
    return vjp(term.cotangent)[0], nothing_kept(spec, inputs)


def input_gradients(
    spec: Spec, inputs: Inputs, terms: Sequence[Term], *, constant_couplings: bool
) -> Inputs:
    """Compute the gradients of the inputs, summed over `terms`."""
    mask = inputs.parent_mask

    def one_pass(inputs: Inputs, state: State) -> Moments:
        inputs = inputs._replace(parent_mask=mask)
        return moments(spec, inputs, state, constant_couplings=constant_couplings)

    differentiable = inputs._replace(parent_mask=None)
    gradients = []
    for term in terms:
        _, vjp = jax.vjp(partial(one_pass, state=term.state), differentiable)
        gradients.append(vjp(term.cotangent)[0])
    return jax.tree.map(lambda *x: sum(x[1:], x[0]), *gradients)


def couplings(spec: Spec, inputs: Inputs, state: State) -> Array:
    """Compute the couplings `[B, I, J]`, without gates."""
    dtype = accumulation_dtype(inputs.poses.dtype)
    shape = (*inputs.poses.shape[:2], spec.num_parents)
    if is_uniform(inputs, state):
        # XLA would constant-fold a softmax over zeros, which takes seconds of compile time.
        return jnp.full(shape, 1 / (spec.num_parents + spec.leaky), dtype)
    return softmax(logits(spec, inputs, state, votes_of(inputs)), leaky=spec.leaky, axis=2)


def logits(spec: Spec, inputs: Inputs, state: State, votes: Array) -> Array:
    """Compute the logits `[B, I, J]`, -infinity where the prior or the parent mask say so."""
    found = jnp.zeros((*inputs.poses.shape[:2], spec.num_parents), votes.dtype)
    if inputs.prior is not None:
        found += jnp.broadcast_to(inputs.prior.astype(votes.dtype), found.shape)
    if state.k is not None:
        found += state.k[:, None]
    if state.b is not None:
        found += _agreement(_unit(votes) if spec.logits == "cosine" else votes, state.b)
    if state.q is not None and state.z is not None:
        differences = votes - state.z[:, None]
        found -= 0.5 * _agreement(differences**2, state.q)
    if inputs.parent_mask is not None:
        found = jnp.where(inputs.parent_mask[:, None], found, -jnp.inf)
    return found


def softmax(logits: Array, *, leaky: bool, axis: int) -> Array:
    """Compute the softmax, 0 if all logits are -infinity; if leaky, with one more logit, 0."""
    if leaky:
        largest = lax.stop_gradient(jnp.maximum(jnp.max(logits, axis, keepdims=True), 0))
        exponentials = jnp.exp(logits - largest)
        return exponentials / (jnp.sum(exponentials, axis, keepdims=True) + jnp.exp(-largest))
    finite = jnp.maximum(logits, float(jnp.finfo(logits.dtype).min))
    return jnp.where(logits > -jnp.inf, jax.nn.softmax(finite, axis=axis), 0)


def divide(sums: Array, mass: Array) -> Array:
    """Divide sums `[B, J, D]` by a mass `[B, J]`; return 0 where the mass is 0."""
    nonzero = mass > 0
    return jnp.where(nonzero[..., None], sums / jnp.where(nonzero, mass, 1)[..., None], 0)


def merge(a: Moments, b: Moments, *, axis: int = -1) -> Moments:
    """Merge central moments of disjoint sets of children (Chan, Golub and LeVeque 1979).

    `axis` is that of D in the mean.
    """
    mass = a.mass + b.mass
    fraction = jnp.expand_dims(b.mass / jnp.where(mass > 0, mass, 1), axis)
    step = b.first - a.first
    second = a.second + b.second + step * step * fraction * jnp.expand_dims(a.mass, axis)
    return Moments(mass, a.first + fraction * step, second)


def votes_of(inputs: Inputs) -> Array:
    """Compute the votes `[B, I, J, D]`, or `[B, I, 1, D]` if all parents share them."""
    dtype = accumulation_dtype(inputs.poses.dtype)
    poses, weights = inputs.poses, inputs.weights
    if weights is None:
        votes = poses.astype(dtype)
    elif weights.ndim == 4 and poses.shape[2] == 1:
        # Equal to the product below, but XLA keeps one copy less of the votes' gradient.
        votes = jnp.einsum("bip,ipje->bije", poses[:, :, 0], weights, preferred_element_type=dtype)
    else:
        votes = jnp.einsum(_LETTERS[weights.ndim], poses, weights, preferred_element_type=dtype)
        parents = 1 if weights.ndim == 2 else weights.shape[-2]
        depth = poses.shape[2] * weights.shape[-1]
        votes = votes.reshape(*poses.shape[:2], parents, depth)
    if inputs.coordinates is not None:
        votes += inputs.coordinates.astype(dtype)[None, :, None]
    return votes


# Gradients of a pass as formulas, for votes [B, I, J, D] and linear or gaussian logits.


def coupling_gradient(spec: Spec, votes: Array, term: Term) -> Array:
    """Compute the gradient `[B, I, J]` of couplings times gates, from that of the moments."""
    mass, first, second = term.cotangent
    if spec.moments == "sums":
        found = _agreement(votes, first)
    else:
        differences = votes - term.moments.first[:, None]
        found = _agreement(differences, divide(first, term.moments.mass))
        found += _agreement(differences**2, second)
    return found if mass is None else found + mass[:, None]


def through_moments(
    spec: Spec, inputs: Inputs, votes: Array, term: Term, couplings: Array
) -> Array:
    """Compute the gradient of the votes through the moments, at constant couplings."""
    _, first, second = term.cotangent
    if inputs.gates is not None:
        couplings = couplings * inputs.gates.astype(votes.dtype)[..., None]
    if spec.moments == "sums":
        return couplings[..., None] * first[:, None]
    differences = votes - term.moments.first[:, None]
    slopes = divide(first, term.moments.mass)[:, None] + 2 * differences * second[:, None]
    return couplings[..., None] * slopes


def through_logits(spec: Spec, votes: Array, state: State, d_logits: Array) -> Array:
    """Compute the gradient of the votes through linear or gaussian logits."""
    d_votes = jnp.zeros_like(votes)
    if state.b is not None:
        d_votes += d_logits[..., None] * state.b[:, None]
    if state.q is not None:
        d_votes -= d_logits[..., None] * state.q[:, None] * (votes - state.z[:, None])
    return d_votes


def through_votes(inputs: Inputs, d_votes: Array) -> Inputs:
    """Compute the gradients of poses and weights from that of the votes."""
    batch, children, rows, _ = inputs.poses.shape
    d_votes = d_votes.reshape(batch, children, -1, rows, inputs.weights.shape[-1])
    weights, poses = (x.astype(d_votes.dtype) for x in (inputs.weights, inputs.poses))
    return Inputs(
        jnp.einsum("bijre,ipje->birp", d_votes, weights),
        jnp.einsum("bijre,birp->ipje", d_votes, poses),
    )


def state_gradient(spec: Spec, votes: Array, state: State, d_logits: Array) -> State:
    """Compute the cotangent of the state from that of linear or gaussian logits."""
    k = None if state.k is None else d_logits.sum(1)
    b = None if state.b is None else _sum(d_logits, votes)
    if state.q is None:
        return State(k, b)
    differences = votes - state.z[:, None]
    z = state.q * _sum(d_logits, differences)
    return State(k, b, z, -0.5 * _sum(d_logits, differences**2))


def _is_shared(votes: Array, parents: int) -> bool:
    return votes.shape[2] != parents


def _agreement(votes: Array, states: Array) -> Array:
    """Compute Σ_d votes · states, `[B, I, J]`, without `[B, I, J, D]` if parents share votes."""
    if _is_shared(votes, states.shape[1]):
        return jnp.einsum("bid,bjd->bij", votes[:, :, 0], states)
    return jnp.einsum("bijd,bjd->bij", votes, states)


def _sum(weights: Array, votes: Array) -> Array:
    """Compute Σ_i weights · votes, `[B, J, D]`."""
    if _is_shared(votes, weights.shape[2]):
        return jnp.einsum("bij,bid->bjd", weights, votes[:, :, 0])
    return jnp.einsum("bij,bijd->bjd", weights, votes)


def _unit(votes: Array) -> Array:
    """Normalise votes to length 1; a zero vote stays zero, with derivative 0."""
    squares = jnp.sum(votes * votes, -1, keepdims=True)
    nonzero = squares > 0
    return jnp.where(nonzero, votes / jnp.sqrt(jnp.where(nonzero, squares, 1)), 0)
