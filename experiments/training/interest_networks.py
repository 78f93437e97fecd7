"""Networks that turn a history of items into interests: MIND, ComiRec, EasyRec and baselines.

Shape letters are those of `capsjax.shapes`, where input capsules are the items of a history and
output capsules the interests; V is the number of items of the catalogue.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

import capsjax
from experiments.cli import flag
from experiments.errors import InputError

ROUTED = ("mind", "comirec_dr", "easyrec")
SEVERAL = (*ROUTED, "comirec_sa")  # networks of more than one interest
NETWORKS = (*SEVERAL, "popularity", "mean", "gru", "attention")
TEMPERATURE = 20.0  # EasyRec's, of the cosines of its k-means
HIDDEN = 4  # width of hidden layers, in lengths of an item, as in ComiRec-SA


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a network; the defaults are MIND's layer, trained as retrieval scores items."""

    network: str = flag(
        "mind",
        "mind, comirec_dr, easyrec: routing; comirec_sa: self-attention; baselines of one vector a "
        "user: popularity, mean, gru, attention (one layer).",
        choices=NETWORKS,
    )
    history_length: int = flag(
        30, "Newest items of a user that a network reads.", minimum=1, maximum=10_000
    )
    embedding_size: int = flag(32, "Length of items and interests.", minimum=1, maximum=65536)
    max_interests: int = flag(
        4, "Largest number of interests of a user.", minimum=1, maximum=10_000
    )
    interest_count: str = flag(
        "all",
        "Interests by the length of the history, by the formula of a paper or library; all: "
        "max_interests for everyone.",
        choices=("all", "mind", "deepmatch", "torcheasyrec", "easyrec"),
    )
    num_iterations: int = flag(
        3, "Routing iterations; with 1, couplings do not adapt.", minimum=1, maximum=1000
    )
    vote_scale: float = flag(
        4.0, "Initial length of a vote of a routing, in lengths of an item.", above=0, maximum=1e6
    )
    hidden_layers: int = flag(
        0, "Hidden layers behind the interests of mind and easyrec; MIND has one.", choices=(0, 1)
    )
    readout: str = flag(
        "items",
        "Interest that learns from a target: hard, the nearest one (ComiRec); soft: all, weighted "
        "by label-aware attention (MIND); items: every item is scored by the interest nearest to "
        "it, negatives too, as retrieval does.",
        choices=("hard", "soft", "items"),
    )
    label_power: float = flag(
        1.0, "Power of the label-aware attention of a soft readout.", above=0, maximum=1e6
    )


class Network(nnx.Module):
    """Vectors of the items, and how the items of a history become interests.

    Args:
      settings: Those of the network.
      num_items: V.
      rngs: Of the parameters.
    """

    def __init__(self, settings: Settings, num_items: int, *, rngs: nnx.Rngs):
        self.settings = settings
        size = settings.embedding_size
        # Vectors of length about 1: the squash of a routing would shorten shorter ones further.
        self.items = _normal(rngs, (num_items, size), 1 / math.sqrt(size))

    def __call__(self, items: Array, mask: Array) -> tuple[Array, Array]:
        """Return the interests of users, and which of them a user has.

        Args:
          items: Numbers of the items, `[B, I]`.
          mask: Booleans `[B, I]`, False for padding.

        Returns:
          Interests `[B, J, D]`, and booleans `[B, J]`.
        """
        interests = self.interests(self.items[...][items], mask)
        kept = jnp.arange(interests.shape[1])[None] < self.count(mask)[:, None]
        return interests, kept

    def for_target(self, items: Array, mask: Array, target: Array) -> tuple[Array, Array]:
        """Return the vectors of users that shall find target items `[B, D]`.

        Returns:
          As a call: one vector a user by label-aware attention, or with the readout `items` all.
        """
        interests, kept = self(items, mask)
        if self.settings.readout == "items":
            return interests, kept
        power = math.inf if self.settings.readout == "hard" else self.settings.label_power
        users = capsjax.label_aware_attention(
            interests, target, power=power, num_interests=self.count(mask)
        )
        return users[:, None], jnp.ones_like(kept[:, :1])

    def count(self, mask: Array) -> Array:
        """Return the number of interests of each user, `[B]`."""
        lengths = mask.sum(1, dtype=jnp.int32)
        if self.settings.network not in SEVERAL:
            return jnp.ones_like(lengths)
        if self.settings.interest_count == "all":
            return jnp.full_like(lengths, self.settings.max_interests)
        return capsjax.count_interests(
            lengths, self.settings.max_interests, formula=self.settings.interest_count
        )

    def interests(self, vectors: Array, mask: Array) -> Array:
        """Return interests `[B, J, D]` of items `[B, I, P]`."""
        raise NotImplementedError


class Popularity(Network):
    """How often each item is in the training data: a vector of length 1, the same for all users."""

    def __init__(self, settings: Settings, counts: np.ndarray, *, rngs: nnx.Rngs):
        super().__init__(dataclasses.replace(settings, embedding_size=1), len(counts), rngs=rngs)
        self.items = nnx.Param(jnp.asarray(counts, jnp.float32)[:, None])

    def interests(self, vectors: Array, mask: Array) -> Array:
        """Return 1 for every user."""
        del mask
        return jnp.ones((vectors.shape[0], 1, 1))


class Mean(Network):
    """The mean of the items."""

    def interests(self, vectors: Array, mask: Array) -> Array:
        """Return the mean of the items, `[B, 1, D]`."""
        return _mean(vectors, mask)[:, None]


class Gru(Network):
    """A gated recurrent unit; its last state is the user.

    Source: Hidasi et al., "Session-based Recommendations with Recurrent Neural Networks",
    https://arxiv.org/abs/1511.06939.
    """

    def __init__(self, settings: Settings, num_items: int, *, rngs: nnx.Rngs):
        super().__init__(settings, num_items, rngs=rngs)
        size = settings.embedding_size
        self.inputs = _normal(rngs, (size, 3 * size), 1 / math.sqrt(size))
        self.bias = nnx.Param(jnp.zeros(3 * size))
        self.gates = _normal(rngs, (size, 2 * size), 1 / math.sqrt(size))
        self.candidate = _normal(rngs, (size, size), 1 / math.sqrt(size))

    def interests(self, vectors: Array, mask: Array) -> Array:
        """Return the last state, `[B, 1, D]`; padding leaves the state as it is."""
        gates, candidate = self.gates[...], self.candidate[...]
        inputs = vectors @ self.inputs[...] + self.bias[...][None, None]

        def step(state: Array, slot: tuple[Array, Array]) -> tuple[Array, None]:
            given, kept = slot
            update, reset, new = jnp.split(given, 3, axis=-1)
            more_update, more_reset = jnp.split(state @ gates, 2, axis=-1)
            update = jax.nn.sigmoid(update + more_update)
            reset = jax.nn.sigmoid(reset + more_reset)
            new = jnp.tanh(new + (reset * state) @ candidate)
            return jnp.where(kept[:, None], update * state + (1 - update) * new, state), None

        first = jnp.zeros_like(vectors[:, 0])
        state, _ = jax.lax.scan(step, first, (inputs.swapaxes(0, 1), mask.T))
        return state[:, None]


class Attention(Network):
    """One block of self-attention and a feed-forward layer; the user is the newest item's output.

    Source: Kang and McAuley, "Self-Attentive Sequential Recommendation",
    https://arxiv.org/abs/1808.09781, with one head and one block.
    """

    def __init__(self, settings: Settings, num_items: int, *, rngs: nnx.Rngs):
        super().__init__(settings, num_items, rngs=rngs)
        size = settings.embedding_size
        self.positions = _normal(rngs, (settings.history_length, size), 0.1 / math.sqrt(size))
        self.before, self.after = nnx.LayerNorm(size, rngs=rngs), nnx.LayerNorm(size, rngs=rngs)
        self.projections = _normal(rngs, (3, size, size), 1 / math.sqrt(size))
        self.hidden = nnx.Linear(size, HIDDEN * size, rngs=rngs)
        self.out = nnx.Linear(HIDDEN * size, size, rngs=rngs)

    def interests(self, vectors: Array, mask: Array) -> Array:
        """Return the output of the newest item, `[B, 1, D]`: no other is read of one block."""
        placed = vectors + self.positions[...][None]
        query_weights, key_weights, value_weights = self.projections[...]
        normed = self.before(placed)
        query = normed[:, -1] @ query_weights
        keys, values = normed @ key_weights, placed @ value_weights
        logits = jnp.einsum("bd,bid->bi", query, keys) / math.sqrt(query.shape[-1])
        attention = jax.nn.softmax(logits, axis=1, where=mask)
        found = placed[:, -1] + jnp.einsum("bi,bid->bd", attention, values)
        return (found + self.out(jax.nn.relu(self.hidden(self.after(found)))))[:, None]


class Routed(Network):
    """Interests by routing: `mind`, `comirec_dr` or `easyrec`."""

    def __init__(self, settings: Settings, num_items: int, *, rngs: nnx.Rngs):
        super().__init__(settings, num_items, rngs=rngs)
        size, parents = settings.embedding_size, settings.max_interests
        if settings.network == "comirec_dr":
            shape: tuple[int, ...] = (settings.history_length, size, parents, size)
        else:
            shape = (size, size)
        self.weights = _normal(rngs, shape, settings.vote_scale / math.sqrt(size))
        self.has_head = settings.hidden_layers > 0 and settings.network != "comirec_dr"
        if not self.has_head:
            return
        # MIND's layers behind the interests, whose last one is linear: vectors of items have
        # negative elements.
        self.hidden = nnx.Linear(size, HIDDEN * size, rngs=rngs)
        self.out = nnx.Linear(HIDDEN * size, size, rngs=rngs)

    def interests(self, vectors: Array, mask: Array) -> Array:
        """Return interests `[B, J, D]`."""
        capsules = self.capsules(vectors, mask)
        if not self.has_head:
            return capsules
        return self.out(jax.nn.relu(self.hidden(capsules)))

    def capsules(self, vectors: Array, mask: Array) -> Array:
        """Return the outputs of the routing, `[B, J, D]`."""
        shared: dict[str, Any] = {}
        if self.settings.network != "comirec_dr":
            shared["max_interests"] = self.settings.max_interests
            shared["initial_logits"] = self._initial_logits(vectors.dtype)
        if self.settings.network == "easyrec":
            shared |= {"routing": "kmeans", "temperature": TEMPERATURE}
        return capsjax.multi_interests(
            vectors,
            self.weights[...],
            num_interests=self.count(mask),
            mask=mask,
            num_iterations=self.settings.num_iterations,
            **shared,
        )

    def couplings(self, items: Array, mask: Array) -> Array:
        """Return how much of each item goes to each interest, `[B, I, J]`.

        Dynamic routing: the couplings of the last iteration. K-means: those that another iteration
        would have, of the capsules found.
        """
        vectors = self.items[...][items]
        kept = jnp.arange(self.settings.max_interests)[None] < self.count(mask)[:, None]
        if self.settings.network == "easyrec":
            capsules = _unit(self.capsules(vectors, mask))
            votes = _unit(vectors @ self.weights[...])
            logits = TEMPERATURE * jnp.einsum("bid,bjd->bij", votes, capsules)
            return jax.nn.softmax(jnp.where(kept[:, None], logits, -jnp.inf))
        shared: dict[str, Any] = {}
        if self.settings.network == "mind":
            shared["prior"] = self._initial_logits(vectors.dtype)
        return capsjax.routing_couplings(
            vectors,
            self.weights[...],
            num_iterations=self.settings.num_iterations,
            mask=mask,
            parent_mask=kept,
            **shared,
        )[-1]

    def _initial_logits(self, dtype: jnp.dtype) -> Array:
        """Return random logits `[I, J]`, the same for all users and at every call."""
        shape = self.settings.history_length, self.settings.max_interests
        return jax.random.normal(jax.random.key(0), shape, dtype)


class SelfAttentive(Network):
    """Interests by self-attention: ComiRec-SA."""

    def __init__(self, settings: Settings, num_items: int, *, rngs: nnx.Rngs):
        super().__init__(settings, num_items, rngs=rngs)
        size, hidden = settings.embedding_size, HIDDEN * settings.embedding_size
        self.positions = _normal(rngs, (settings.history_length, size), 0.1 / math.sqrt(size))
        self.hidden = _normal(rngs, (size, hidden), 1 / math.sqrt(size))
        self.queries = _normal(rngs, (hidden, settings.max_interests), 1 / math.sqrt(hidden))

    def interests(self, vectors: Array, mask: Array) -> Array:
        """Return interests `[B, J, D]`."""
        return capsjax.self_attentive_interests(
            vectors,
            self.hidden[...],
            self.queries[...],
            position_embeddings=self.positions[...],
            mask=mask,
            num_interests=self.count(mask),
        )

    def couplings(self, items: Array, mask: Array) -> Array:
        """Return the weight of each item in each interest, `[B, I, J]`; over I they sum to 1."""
        placed = self.items[...][items] + self.positions[...][None]
        logits = jnp.tanh(placed @ self.hidden[...]) @ self.queries[...]
        weights = jax.nn.softmax(jnp.where(mask[..., None], logits, -jnp.inf), axis=1)
        kept = jnp.arange(self.settings.max_interests)[None] < self.count(mask)[:, None]
        return jnp.where(kept[:, None], weights, 0)


_CLASSES: dict[str, type[Network]] = {
    "mean": Mean,
    "gru": Gru,
    "attention": Attention,
    "comirec_sa": SelfAttentive,
    **dict.fromkeys(ROUTED, Routed),
}


def build(settings: Settings, counts: np.ndarray, *, seed: int) -> Network:
    """Build a network, with the same parameters at every call.

    Args:
      settings: Those of the network.
      counts: How often each item is in the training data, `[V]`.
      seed: Of the parameters.

    Raises:
      InputError: There are more interests than items of a history.
    """
    if settings.network in SEVERAL and settings.max_interests > settings.history_length:
        raise InputError(
            f"--max_interests must be at most --history_length={settings.history_length}, got "
            f"{settings.max_interests}"
        )
    rngs = nnx.Rngs(seed)
    if settings.network == "popularity":
        return Popularity(settings, counts, rngs=rngs)
    return _CLASSES[settings.network](settings, len(counts), rngs=rngs)


def _normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> nnx.Param:
    return nnx.Param(scale * jax.random.normal(rngs.params(), shape))


def _mean(vectors: Array, mask: Array) -> Array:
    count = jnp.maximum(mask.sum(1), 1).astype(vectors.dtype)
    return jnp.where(mask[..., None], vectors, 0).sum(1) / count[:, None]


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-12))
