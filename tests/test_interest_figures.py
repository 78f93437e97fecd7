"""Figures of multi-interest networks: every label can be read."""

import itertools

import numpy as np
import pytest

from experiments.figures import interests


def boxes(figure, labels):
    figure.draw_without_rendering()
    return [label.get_window_extent() for label in labels if label.get_text()]


@pytest.mark.parametrize(("children", "parents"), [(1, 1), (5, 8), (24, 4)])
def test_labels_of_a_users_interests_do_not_overlap_and_are_inside(children, parents):
    rng = np.random.default_rng(0)
    couplings = rng.dirichlet(np.ones(parents), children).T
    figure = interests.user_interests(
        couplings,
        [f"{child}.1234567" for child in range(children)],
        [["11.12", "13.14", "15.16"]] * parents,
        title="User 123456",
        groups=np.arange(children),
    )
    axes, bar = figure.axes
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        for one, other in itertools.combinations(boxes(figure, ticks), 2):
            assert not one.overlaps(other)
    labels = [*axes.get_xticklabels(), *axes.get_yticklabels(), axes.xaxis.label, bar.yaxis.label]
    whole = figure.bbox
    for box in boxes(figure, [*labels, axes.title, axes._left_title]):
        assert whole.x0 <= box.x0
        assert box.x1 <= whole.x1
        assert whole.y0 <= box.y0
        assert box.y1 <= whole.y1
    shown = axes.images[0].get_array()
    np.testing.assert_array_equal(shown, couplings)


def test_learning_curves_show_losses_and_both_recalls():
    rows = [{"epoch": epoch / 2, "train_loss": 5 - epoch} for epoch in range(1, 5)]
    for row in rows[1::2]:
        row |= {"validation_recall_20": 0.1, "validation_recall_50": 0.2}
    left, right = interests.learning_curves(rows).axes
    assert left.lines[0].get_xydata().tolist() == [[0.5, 4], [1, 3], [1.5, 2], [2, 1]]
    found = {line.get_label(): line.get_xydata().tolist() for line in right.lines}
    assert found == {"recall@50": [[1, 20], [2, 20]], "recall@20": [[1, 10], [2, 10]]}
