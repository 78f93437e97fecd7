"""Retrieval by several interests of a user: exact search, recall, NDCG, hit rate and diversity.

Shape letters, besides those of `capsjax.shapes`: V items of the catalogue. `k` is the length of a
list of recommendations.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NOTHING = -1  # in place of an item, where a list is shorter than k
_RECOVERY = (
    "purity",
    "purity_of_one_interest",
    "adjusted_rand",
    "clusters_found",
    "interests_with_items",
    "true_interests",
)


def exact_search(
    interests: np.ndarray,
    valid: np.ndarray,
    catalogue: np.ndarray,
    *,
    k: int,
    excluded: Sequence[np.ndarray] | None = None,
    batch_size: int = 256,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the k items with the highest scores; an item's is that of the interest nearest to it.

    Args:
      interests: `[B, J, D]`.
      valid: Booleans `[B, J]`; other interests do not exist for that user. They must not be left as
        zeros, because the product 0 is above that of an item that the user does not like.
      catalogue: Vectors of the items, `[V, D]`.
      k: At most V are found.
      excluded: Items that are not recommended, one array a user.
      batch_size: Users at a time, for which `[batch_size, V]` scores are stored.

    Returns:
      Items, int32 `[B, k]`, and their scores, best first; `NOTHING` where a list is too short.
    """
    found, scores = [], []
    for start in range(0, len(interests), batch_size):
        # One compiled size, filled up with users without interests.
        rows = slice(start, start + batch_size)
        kept = len(interests[rows])
        missing = batch_size - kept
        skipped = np.zeros((batch_size, len(catalogue)), bool)
        for row, items in zip(skipped, [] if excluded is None else excluded[rows], strict=False):
            row[items] = True
        top = _top(
            np.pad(interests[rows], ((0, missing), (0, 0), (0, 0))),
            np.pad(valid[rows], ((0, missing), (0, 0))),
            catalogue,
            skipped,
            k=min(k, len(catalogue)),
        )
        found.append(np.asarray(top[0])[:kept])
        scores.append(np.asarray(top[1])[:kept])
    return np.concatenate(found), np.concatenate(scores)


@functools.partial(jax.jit, static_argnames="k")
def _top(
    interests: Array, valid: Array, catalogue: Array, skipped: Array, *, k: int
) -> tuple[Array, Array]:
    products = jnp.einsum("bjd,vd->bjv", interests, catalogue)
    scores = jnp.where(valid[..., None], products, -jnp.inf).max(1)
    scores, items = jax.lax.top_k(jnp.where(skipped, -jnp.inf, scores), k)
    return jnp.where(jnp.isfinite(scores), items, NOTHING), scores


def ranking_metrics(
    ranked: np.ndarray, targets: Sequence[np.ndarray], *, sizes: Sequence[int]
) -> dict[str, float]:
    """Compute recall, NDCG and hit rate of lists of recommendations, as means over the users.

    For a user with the set S of items to be found, and a list of k items: recall is the fraction of
    S that is in the list; hit rate is 1 if any is; NDCG is the sum of 1 / log2(rank + 1) over the
    items found, ranks from 1, divided by its highest possible value, with min(k, |S|) items in
    front. (ComiRec's program, https://github.com/THUDM/ComiRec, takes for the rank the position
    among the items to be found: its NDCG is another number.)

    Args:
      ranked: Items `[B, k]`, best first, without repetitions; `NOTHING` for none.
      targets: Items to be found, one array a user, none of them empty.
      sizes: The values of k, each at most that of `ranked`.

    Returns:
      `recall_k`, `ndcg_k` and `hit_rate_k` for each k, from 0 to 1.
    """
    width = ranked.shape[1]
    wanted = [set(map(int, items)) for items in targets]
    hits = np.array(
        [
            [item in of_user for item in row]
            for row, of_user in zip(ranked.tolist(), wanted, strict=True)
        ]
    ).reshape(len(wanted), width)
    counts = np.array([len(of_user) for of_user in wanted])
    gains = 1 / np.log2(np.arange(width) + 2)
    best = np.cumsum(np.append(0, gains))
    metrics = {}
    for k in sizes:
        found = hits[:, :k]
        metrics[f"recall_{k}"] = float(np.mean(found.sum(1) / counts))
        gained = (found * gains[:k]).sum(1)
        metrics[f"ndcg_{k}"] = float(np.mean(gained / best[np.minimum(counts, k)]))
        metrics[f"hit_rate_{k}"] = float(np.mean(found.any(1)))
    return metrics


def interest_diversity(
    interests: np.ndarray, valid: np.ndarray, catalogue: np.ndarray
) -> dict[str, float]:
    """Measure how different the interests of a user are.

    Args:
      interests: `[B, J, D]`.
      valid: Booleans `[B, J]`.
      catalogue: `[V, D]`.

    Returns:
      `interests`, their mean number; and, of users with two or more, if there are any:
      `interest_cosine`, the mean cosine of two interests of a user (1: all are the same), and
      `distinct_nearest`, how many different items are nearest to an interest of a user, divided by
      the number of interests (1: no two interests find the same item first).
    """
    counts = valid.sum(1)
    metrics = {"interests": float(counts.mean())}
    several = counts >= 2
    if not several.any():
        return metrics
    # In float64, because the squares of interests that a squash made short underflow in float32.
    interests = interests[several].astype(np.float64)
    valid, counts = valid[several], counts[several]
    lengths = np.linalg.norm(interests, axis=-1, keepdims=True)
    units = np.where(valid[..., None], interests / np.maximum(lengths, 1e-100), 0)
    # The cosines of all pairs, less those of an interest with itself.
    products = np.sum(units.sum(1) ** 2, -1) - np.sum(units**2, (1, 2))
    metrics["interest_cosine"] = float(np.mean(products / (counts * (counts - 1))))
    nearest = [
        np.unique((of_user[kept] @ catalogue.T).argmax(1)).size
        for of_user, kept in zip(interests, valid, strict=True)
    ]
    metrics["distinct_nearest"] = float(np.mean(nearest / counts))
    return metrics


def list_diversity(ranked: np.ndarray, categories: np.ndarray, *, k: int) -> float:
    """Return the fraction of the pairs in a list whose items have different categories.

    Source: Cen et al., "Controllable Multi-Interest Framework for Recommendation", the diversity of
    the aggregation module, https://arxiv.org/abs/2005.09347.

    Args:
      ranked: Items `[B, at least k]`.
      categories: `[V]`.
      k: At least 2.
    """
    shares = []
    for row in ranked[:, :k]:
        items = row[row != NOTHING]
        if len(items) < 2:
            continue
        sizes = np.unique(categories[items], return_counts=True)[1]
        pairs = len(items) * (len(items) - 1)
        shares.append(1 - np.sum(sizes * (sizes - 1)) / pairs)
    return float(np.mean(shares))


def recovery(couplings: np.ndarray, mask: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    """Compare the items that each interest took with the clusters that they truly belong to.

    An item is given to the interest with its highest coupling.

    Args:
      couplings: `[B, I, J]`.
      mask: Booleans `[B, I]`; other items are ignored.
      clusters: True cluster of each item, int `[B, I]`.

    Returns:
      Means over the users of: `purity`, the fraction of the items that are of the commonest cluster
      of their interest; `purity_of_one_interest`, the same if one interest took all;
      `adjusted_rand`, the agreement of the two groupings, 1 if they are equal and 0 on average for
      a random one (Hubert and Arabie, "Comparing partitions", 1985); `clusters_found`, the fraction
      of the clusters that are the commonest of an interest; `interests_with_items`; and
      `true_interests`, the number of clusters.
    """
    rows = []
    for of_user, kept, truth in zip(couplings.argmax(-1), mask, clusters, strict=True):
        taken, true = of_user[kept], truth[kept]
        table = np.zeros((couplings.shape[-1], int(true.max()) + 1))
        np.add.at(table, (taken, true), 1)
        rows.append(
            (
                table.max(1).sum() / len(true),
                table.sum(0).max() / len(true),
                _adjusted_rand(table),
                len(np.unique(table[np.unique(taken)].argmax(1))) / len(np.unique(true)),
                len(np.unique(taken)),
                len(np.unique(true)),
            )
        )
    means = map(float, np.mean(rows, 0))
    return dict(zip(_RECOVERY, means, strict=True))


def _adjusted_rand(table: np.ndarray) -> float:
    """Return the adjusted Rand index of a contingency table; 1 where both groupings are trivial."""

    def pairs(counts: np.ndarray) -> float:
        return float(np.sum(counts * (counts - 1)) / 2)

    whole = pairs(table.sum())
    rows, columns = pairs(table.sum(1)), pairs(table.sum(0))
    expected = rows * columns / whole if whole else 0.0
    most = (rows + columns) / 2
    return 1.0 if most == expected else (pairs(table) - expected) / (most - expected)
