"""Metrics of retrieval against a computation with Python's sets, and exact search."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.analysis import ranking

RNG = np.random.default_rng(0)


def naive(ranked, targets, k):
    recalls, gains, hits = [], [], []
    for row, wanted in zip(ranked, targets, strict=True):
        found = [rank for rank, item in enumerate(row[:k], 1) if item in set(wanted)]
        ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(wanted)) + 1))
        recalls.append(len(found) / len(wanted))
        gains.append(sum(1 / math.log2(rank + 1) for rank in found) / ideal)
        hits.append(bool(found))
    return [sum(values) / len(values) for values in (recalls, gains, hits)]


@st.composite
def lists(draw):
    catalogue = draw(st.integers(3, 12))
    users = draw(st.integers(1, 4))
    items = st.permutations(range(catalogue))
    width = draw(st.integers(1, catalogue))
    ranked = np.array([draw(items)[:width] for _ in range(users)])
    short = draw(st.integers(0, width))
    ranked[0, short:] = ranking.NOTHING
    targets = [
        np.array(draw(st.lists(st.integers(0, catalogue - 1), min_size=1, unique=True)))
        for _ in range(users)
    ]
    return ranked, targets, draw(st.integers(1, width))


@settings(deadline=None)
@given(lists())
def test_metrics_equal_those_of_sets(case):
    ranked, targets, k = case
    found = ranking.ranking_metrics(ranked, targets, sizes=(k,))
    assert list(found) == [f"recall_{k}", f"ndcg_{k}", f"hit_rate_{k}"]
    np.testing.assert_allclose(list(found.values()), naive(ranked, targets, k), rtol=1e-12)


def test_a_perfect_list_has_1_and_a_late_hit_less_ndcg_alone():
    found = ranking.ranking_metrics(
        np.array([[1, 2, 3], [4, 5, 6]]), [np.array([2, 1]), np.array([6])], sizes=(2, 3)
    )
    assert found["recall_2"] == found["hit_rate_2"] == found["ndcg_2"] == 0.5
    assert found["recall_3"] == found["hit_rate_3"] == 1
    assert found["ndcg_3"] == (1 + 1 / 2) / 2


def test_exact_search_is_the_best_of_all_interests_without_those_that_a_user_lacks():
    interests = RNG.normal(size=(7, 3, 4)).astype(np.float32)
    catalogue = RNG.normal(size=(20, 4)).astype(np.float32)
    valid = np.arange(3)[None] < RNG.integers(1, 4, 7)[:, None]
    interests[~valid] = 0
    excluded = [RNG.choice(20, size, replace=False) for size in range(7)]
    found, scores = ranking.exact_search(
        interests, valid, catalogue, k=5, excluded=excluded, batch_size=3
    )
    for user in range(7):
        best = (interests[user][valid[user]].astype(float) @ catalogue.T).max(0)
        best[excluded[user]] = -np.inf
        assert found[user].tolist() == np.argsort(-best)[:5].tolist()
        np.testing.assert_allclose(scores[user], np.sort(best)[::-1][:5], rtol=1e-5)


def test_an_absent_interest_of_zeros_does_not_win_over_negative_scores():
    interests, catalogue = np.array([[[1.0], [0.0]]], np.float32), np.array([[-1.0], [-2.0]])
    only_first, both = np.array([[True, False]]), np.array([[True, True]])
    search = ranking.exact_search
    assert search(interests, only_first, catalogue, k=1)[1].item() == -1
    assert search(interests, both, catalogue, k=1)[1].item() == 0


def test_lists_are_filled_up_where_everything_is_excluded():
    interests, valid = np.ones((2, 1, 1), np.float32), np.ones((2, 1), bool)
    found, _ = ranking.exact_search(
        interests,
        valid,
        np.array([[1.0], [3.0], [2.0]]),
        k=9,
        excluded=[np.array([1]), np.array([0, 1, 2])],
    )
    assert found.tolist() == [[2, 0, -1], [-1, -1, -1]]


def test_diversity_of_interests_counts_pairs_and_nearest_items():
    catalogue = np.eye(3, dtype=np.float32)
    interests = np.array(
        [
            [[2, 0, 0], [0, 3, 0], [9, 9, 9]],  # two, orthogonal
            [[1, 0, 0], [5, 0, 0], [4, 1, 0]],  # three, all nearest to item 0
            [[0, 1, 0], [0, 0, 0], [0, 0, 0]],  # one: not counted
        ],
        np.float32,
    )
    valid = np.array([[True, True, False], [True, True, True], [True, False, False]])
    found = ranking.interest_diversity(interests, valid, catalogue)
    c = 4 / math.sqrt(17)
    assert found["interests"] == 2
    assert found["interest_cosine"] == pytest.approx((0 + (1 + c + c) / 3) / 2)
    assert found["distinct_nearest"] == pytest.approx((1 + 1 / 3) / 2)


def test_interests_that_a_squash_made_tiny_have_cosines_too():
    interests = np.full((1, 2, 4), 1e-30, np.float32)
    found = ranking.interest_diversity(interests, np.ones((1, 2), bool), np.eye(4))
    assert found["interest_cosine"] == pytest.approx(1)


def test_one_interest_each_has_no_pairs():
    found = ranking.interest_diversity(np.ones((2, 1, 3)), np.ones((2, 1), bool), np.eye(3))
    assert found == {"interests": 1}


def test_list_diversity_is_the_fraction_of_pairs_of_different_categories():
    categories = np.array([0, 0, 1, 2])
    ranked = np.array([[0, 1, 2, 3], [2, 3, -1, -1], [1, -1, -1, -1]])
    # 5 of 6 pairs, 1 of 1; the third user has no pair.
    assert ranking.list_diversity(ranked, categories, k=4) == pytest.approx((5 / 6 + 1) / 2)


def test_recovery_of_the_true_clusters_is_complete_whatever_the_order_of_the_interests():
    clusters = np.array([[7, 7, 2, 2, 9, 0]])
    mask = np.array([[True] * 5 + [False]])
    couplings = np.zeros((1, 6, 4))
    couplings[0, np.arange(6), [3, 3, 0, 0, 1, 2]] = 0.6
    found = ranking.recovery(couplings, mask, clusters)
    assert found == {
        "purity": 1,
        "purity_of_one_interest": 0.4,
        "adjusted_rand": 1,
        "clusters_found": 1,
        "interests_with_items": 3,
        "true_interests": 3,
    }


def test_a_cluster_that_is_the_commonest_of_no_interest_is_not_found():
    taken, true = np.array([0, 0, 0, 1, 1, 1, 2]), np.array([5, 5, 3, 8, 8, 3, 8])
    found = ranking.recovery(np.eye(4)[taken][None], np.ones((1, 7), bool), true[None])
    assert found["clusters_found"] == pytest.approx(2 / 3)
    assert found["purity"] == pytest.approx(5 / 7)
    assert found["interests_with_items"] == 3


def test_adjusted_rand_is_0_on_average_for_a_random_grouping_and_purity_is_not():
    couplings = RNG.normal(size=(300, 30, 4))
    clusters = RNG.integers(0, 3, (300, 30))
    found = ranking.recovery(couplings, np.ones((300, 30), bool), clusters)
    assert abs(found["adjusted_rand"]) < 0.01
    assert found["purity"] > 0.45


def test_adjusted_rand_equals_a_count_over_pairs():
    taken, true = RNG.integers(0, 3, 12), RNG.integers(0, 4, 12)
    found = ranking.recovery(np.eye(3)[taken][None], np.ones((1, 12), bool), true[None])
    pairs = [(i, j) for i in range(12) for j in range(i)]
    same = np.array([(taken[i] == taken[j], true[i] == true[j]) for i, j in pairs])
    both, rows, columns = same.all(1).sum(), same[:, 0].sum(), same[:, 1].sum()
    expected = rows * columns / len(pairs)
    wanted = (both - expected) / ((rows + columns) / 2 - expected)
    assert found["adjusted_rand"] == pytest.approx(wanted)
