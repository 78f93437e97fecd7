"""Routing taken apart: the parts add up, and lie where the network looks."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import capsjax
from capsjax.models import CapsNet
from experiments.analysis import evidence
from experiments.figures import trees


def test_coupling_times_agreement_by_hand():
    couplings = jnp.array([[[0.5], [1.0], [0.25]]])  # T = 1, I = 3, J = 1
    votes = jnp.array([[[6.0, 0.0]], [[1.0, 4.0]], [[0.0, 0.0]]])
    # Their sum is (3, 0) + (1, 4) + 0 = (4, 4): along its direction lie 3 / √2, 5 / √2 and 0.
    _, shares, lengths = evidence.decompose(couplings, votes)
    np.testing.assert_allclose(shares[0, :, 0], np.array([3, 5, 0]) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(lengths, [[32 / 33]], rtol=1e-6)


def test_a_child_that_votes_against_the_others_has_less_than_none():
    votes = jnp.array([[[2.0]], [[2.0]], [[-1.0]]])
    _, shares, _ = evidence.decompose(jnp.ones((1, 3, 1)), votes)
    np.testing.assert_allclose(shares[0, :, 0], [2, 2, -1])


def test_a_parent_without_votes_has_no_evidence():
    _, shares, lengths = evidence.decompose(jnp.ones((2, 3, 1)), jnp.zeros((3, 1, 4)))
    assert not shares.any()
    assert not lengths.any()


@pytest.fixture(scope="module", params=[None, 0.1])
def model(request):
    """A network with 3 x 2 positions of 4 types, and votes long enough for routing to matter."""
    model = CapsNet(
        (22, 20, 1),
        5,
        conv_channels=3,
        primary_types=4,
        capsule_length=3,
        capsule_bias=request.param,
        hidden=(4,),
        rngs=nnx.Rngs(0),
    )
    model.capsules.weights[...] *= 10
    return model


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).random((22, 20, 1), np.float32)


def test_all_evidence_is_what_the_capsules_are_made_of(model, image):
    found = evidence.trace_routing(model, image)
    assert found.evidence.shape == (3, 24, 5)
    poses = model.primary_poses(jnp.asarray(image))
    np.testing.assert_allclose(found.couplings, model.capsules.couplings(poses), rtol=1e-6)
    np.testing.assert_allclose(found.couplings.sum(axis=2), 1, rtol=1e-5)
    # The last iteration's lengths are those of the network itself.
    np.testing.assert_allclose(
        found.lengths[-1], capsjax.lengths(model(jnp.asarray(image))), rtol=1e-4
    )
    if model.capsules.bias is not None:
        return
    total = found.evidence.sum(axis=1)  # |s|, and |s|² / (1 + |s|²) is the length
    np.testing.assert_allclose(total**2 / (1 + total**2), found.lengths, rtol=1e-4)


def test_a_receptive_field_is_every_pixel_that_a_capsule_depends_on(model, image):
    where = evidence.receptive_fields(model, image.shape)
    assert (len(where.rows), len(where.columns), where.side) == (3, 2, 17)
    jacobian = jax.jacobian(lambda x: model.primary_poses(x).sum(axis=1))(jnp.asarray(image))
    seen = np.asarray(jacobian)[..., 0].reshape(3, 2, 4, 22, 20).any(axis=2)
    for (r, c), pixels in np.ndenumerate(np.empty((3, 2))):
        del pixels
        rows, columns = (np.flatnonzero(seen[r, c].any(axis=axis)) for axis in (1, 0))
        assert (rows[0] + rows[-1]) / 2 == where.rows[r]
        assert (columns[0] + columns[-1]) / 2 == where.columns[c]
        assert len(rows) == len(columns) == where.side


def test_the_paper_sees_17_pixels_around_8_to_18():
    model = CapsNet(conv_channels=1, primary_types=1, hidden=(1,), rngs=nnx.Rngs(0))
    where = evidence.receptive_fields(model, (28, 28, 1))
    np.testing.assert_array_equal(where.rows, [8, 10, 12, 14, 16, 18])
    np.testing.assert_array_equal(where.columns, where.rows)
    assert (where.side, where.positions) == (17, 36)


WHERE = trees.ReceptiveFields(np.array([8.0, 10, 12]), np.array([8.0, 10]), 17)


def test_types_of_a_position_are_added_up():
    shares = np.arange(2 * 24.0).reshape(2, 24)
    found = evidence.sum_by_position(shares, WHERE)
    assert found.shape == (2, 3, 2)
    assert found[0, 0, 0] == 0 + 1 + 2 + 3
    assert found[0, 0, 1] == 4 + 5 + 6 + 7  # columns before rows
    assert found[1, 2, 1] == shares[1, 20:].sum()


def test_the_centre_counts_what_speaks_for_a_capsule_only():
    shares = np.zeros((3, 2))
    shares[0, 0], shares[2, 1], shares[1, 1] = 3, 1, -9
    np.testing.assert_allclose(evidence.evidence_centre(shares, WHERE), [9, 8.5])


def test_leading_children_are_at_places_of_their_own():
    shares = np.zeros(24)
    shares[[5, 6, 17, 0, 23]] = 9, 8, 7, 1, 0.5
    leading = evidence.leading_children(shares, WHERE, 3)
    assert leading.tolist() == [5, 17, 0]  # 6 is at the place of 5
    assert len(evidence.leading_children(shares, WHERE, 12)) == 6
    others = evidence.leading_children(shares, WHERE, 2, exclude=[6, 16])  # where 5 and 17 are
    assert others.tolist() == [0, 23]
    places, types = evidence.locate_children(leading, WHERE, types=4)
    assert places.tolist() == [[0, 1], [2, 0], [0, 0]]
    assert types.tolist() == [1, 1, 0]


def test_rows_tell_of_the_longest_capsules():
    shares = np.zeros((2, 24, 3))
    shares[:, 4, 2] = 2, 4
    shares[:, 0, 2] = -1, -1
    couplings = np.full((2, 24, 3), 1 / 3)
    couplings[1, 4, 2] = 0.9
    found = evidence.RoutingTrace(couplings, shares, np.array([[0.5, 0.1, 0.2], [0.1, 0.0, 0.6]]))
    first, second, *others = evidence.evidence_rows("a", found, WHERE, parents=2, children=1)
    assert first == {
        "image": "a",
        "class": 2,
        "iteration": 1,
        "length": 0.2,
        "evidence": 1.0,
        "against": 1 / 3,
        "mean_coupling": pytest.approx(1 / 3),
        "leading_coupling": pytest.approx(1 / 3),
        "centre_row": 8.0,
        "centre_column": 10.0,
    }
    assert (second["iteration"], second["evidence"], second["against"]) == (2, 3.0, 0.2)
    assert second["leading_coupling"] == 0.9
    assert [row["class"] for row in others] == [0, 0]
    assert others[0]["centre_row"] is None  # no evidence, no centre
    json.dumps([first, second, *others], allow_nan=False)
