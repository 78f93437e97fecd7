"""Evidence: decomposition of class capsules, and positions of primary capsules."""

import functools
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

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_evidence_is_coupling_times_agreement():
    couplings = jnp.array([[[0.5], [1.0], [0.25]]])  # T = 1, I = 3, J = 1
    votes = jnp.array([[[6.0, 0.0]], [[1.0, 4.0]], [[0.0, 0.0]]])
    # s = (3, 0) + (1, 4) + 0 = (4, 4); the terms' components along s are 3 / √2, 5 / √2 and 0.
    _, values, lengths = evidence.decompose(couplings, votes)
    np.testing.assert_allclose(values[0, :, 0], np.array([3, 5, 0]) / np.sqrt(2), rtol=1e-6)
    np.testing.assert_allclose(lengths, [[32 / 33]], rtol=1e-6)


def test_opposing_votes_have_negative_evidence():
    votes = jnp.array([[[2.0]], [[2.0]], [[-1.0]]])
    _, values, _ = evidence.decompose(jnp.ones((1, 3, 1)), votes)
    np.testing.assert_allclose(values[0, :, 0], [2, 2, -1])


def test_zero_votes_have_zero_evidence():
    _, values, lengths = evidence.decompose(jnp.ones((2, 3, 1)), jnp.zeros((3, 1, 4)))
    assert not values.any()
    assert not lengths.any()


@functools.cache
def make_model(bias):
    """Build a network with 3 x 2 positions of 4 types, and long votes, so that routing matters."""
    model = CapsNet(
        (22, 20, 1),
        5,
        conv_channels=3,
        primary_types=4,
        capsule_length=3,
        capsule_bias=bias,
        hidden=(4,),
        rngs=nnx.Rngs(0),
    )
    model.capsules.weights[...] *= 10
    return model


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).random((22, 20, 1), np.float32)


@pytest.mark.parametrize("bias", [None, 0.1])
def test_evidence_adds_up_to_the_length_before_the_squash(bias, image):
    model = make_model(bias)
    found = evidence.trace_routing(model, image)
    assert found.evidence.shape == (3, 24, 5)

    @jax.jit
    def couplings_and_lengths(image):
        couplings = model.capsules.couplings(model.primary_poses(image))
        return couplings, capsjax.lengths(model(image))

    couplings, lengths = couplings_and_lengths(image)
    np.testing.assert_allclose(found.couplings, couplings, rtol=1e-5)
    np.testing.assert_allclose(found.couplings.sum(axis=2), 1, rtol=1e-5)
    # The last iteration's lengths are the network's output.
    np.testing.assert_allclose(found.lengths[-1], lengths, rtol=1e-4)
    total = found.evidence.sum(axis=1)  # |s| without bias, and |s|² / (1 + |s|²) is the length
    without_bias = abs(total**2 / (1 + total**2) / found.lengths - 1).max() < 1e-4
    assert without_bias == (bias is None)


def test_receptive_fields_are_the_nonzero_jacobian(image):
    model = make_model(None)
    where = evidence.receptive_fields(model, image.shape)
    assert (len(where.rows), len(where.columns), where.side) == (3, 2, 17)
    jacobian = jax.jit(jax.jacobian(lambda x: model.primary_poses(x).sum(axis=1)))(image)
    seen = np.asarray(jacobian)[..., 0].reshape(3, 2, 4, 22, 20).any(axis=2)
    for r, c in np.ndindex(3, 2):
        rows, columns = (np.flatnonzero(seen[r, c].any(axis=axis)) for axis in (1, 0))
        assert (rows[0] + rows[-1]) / 2 == where.rows[r]
        assert (columns[0] + columns[-1]) / 2 == where.columns[c]
        assert len(rows) == len(columns) == where.side


def test_receptive_fields_of_the_paper():
    model = nnx.eval_shape(lambda: CapsNet(rngs=nnx.Rngs(0)))
    where = evidence.receptive_fields(model, (28, 28, 1))
    np.testing.assert_array_equal(where.rows, [8, 10, 12, 14, 16, 18])
    np.testing.assert_array_equal(where.columns, where.rows)
    assert (where.side, where.positions) == (17, 36)


WHERE = trees.ReceptiveFields(np.array([8.0, 10, 12]), np.array([8.0, 10]), 17)


def test_evidence_is_summed_over_types():
    values = np.arange(2 * 24.0).reshape(2, 24)
    found = evidence.sum_by_position(values, WHERE)
    assert found.shape == (2, 3, 2)
    assert found[0, 0, 0] == 0 + 1 + 2 + 3
    assert found[0, 0, 1] == 4 + 5 + 6 + 7  # columns before rows
    assert found[1, 2, 1] == values[1, 20:].sum()


def test_centre_ignores_negative_evidence():
    values = np.zeros((3, 2))
    values[0, 0], values[2, 1], values[1, 1] = 3, 1, -9
    np.testing.assert_allclose(evidence.evidence_centre(values, WHERE), [9, 8.5])


def test_leading_children_have_distinct_positions():
    values = np.zeros(24)
    values[[5, 6, 17, 0, 23]] = 9, 8, 7, 1, 0.5
    leading = evidence.leading_children(values, WHERE, 3)
    assert leading.tolist() == [5, 17, 0]  # 6 has the position of 5
    assert len(evidence.leading_children(values, WHERE, 12)) == 6
    others = evidence.leading_children(
        values, WHERE, 2, exclude=[6, 16]
    )  # the positions of 5 and 17
    assert others.tolist() == [0, 23]
    places, types = evidence.locate_children(leading, WHERE, types=4)
    assert places.tolist() == [[0, 1], [2, 0], [0, 0]]
    assert types.tolist() == [1, 1, 0]


def test_evidence_rows_are_of_the_longest_capsules():
    values = np.zeros((2, 24, 3))
    values[:, 4, 2] = 2, 4
    values[:, 0, 2] = -1, -1
    couplings = np.full((2, 24, 3), 1 / 3)
    couplings[1, 4, 2] = 0.9
    found = evidence.RoutingTrace(couplings, values, np.array([[0.5, 0.1, 0.2], [0.1, 0.0, 0.6]]))
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
